//! SHA-256 of many salted 4096-byte blocks, as fast as the processor allows.
//!
//! ```text
//! hashed message, 4128 bytes:    salt (32) | block (4096)
//! SHA-256 compressions:          [salt | block[..32]]  [block[32..96]] … 63 of these …  [block[4064..] | padding]
//! ```
//!
//! The compressions are offset by 32 bytes from the block's own alignment, so each loads its 64 bytes
//! directly from the block: nothing is copied.
//!
//! With the SHA extensions of x86-64, one message leaves most of the unit idle, because each round waits for
//! the previous one. Two independent interleaved messages fill it: twice as fast (Zen 4: 3.6 against 1.8
//! GB/s). Three run out of registers and are slower than two (2.3 GB/s). On other processors the `sha2` crate
//! hashes, with the features available. Both compute the same digests; the tests compare them.

use sha2::{Digest as _, Sha256};

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// Bytes of a salt, and of a digest.
pub const DIGEST: usize = 32;

/// Writes to `out[i]` the SHA-256 digest of `salt` followed by the i-th block of `data`.
///
/// # Panics
/// If `data` is not `out.len()` blocks long: a bug in the caller.
pub fn hash_blocks(salt: &[u8], data: &[u8], out: &mut [[u8; DIGEST]]) {
    let (blocks, rest) = data.as_chunks::<BLOCK>();
    assert!(rest.is_empty() && blocks.len() == out.len(), "{} bytes for {} digests", data.len(), out.len());
    // A salt of another length, which only a plain file may have, shifts the blocks in the message.
    #[cfg(target_arch = "x86_64")]
    if let Ok(salt) = salt.try_into()
        && x86::available()
    {
        return x86::hash_blocks(salt, blocks, out);
    }
    portable(salt, blocks, out);
}

/// Does the same with the `sha2` crate.
fn portable(salt: &[u8], blocks: &[[u8; BLOCK]], out: &mut [[u8; DIGEST]]) {
    for (block, out) in blocks.iter().zip(out) {
        *out = Sha256::new().chain_update(salt).chain_update(block).finalize().into();
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_blend_epi16, _mm_loadu_si128, _mm_setr_epi8,
        _mm_setr_epi32, _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi8,
        _mm_shuffle_epi32, _mm_storeu_si128,
    };

    use super::{BLOCK, DIGEST};

    /// The initial hash value H(0) (FIPS 180-4, section 5.3.3).
    const INITIAL: [u32; 8] = [
        0x6a09_e667,
        0xbb67_ae85,
        0x3c6e_f372,
        0xa54f_f53a,
        0x510e_527f,
        0x9b05_688c,
        0x1f83_d9ab,
        0x5be0_cd19,
    ];

    /// The round constants K, four to a group (FIPS 180-4, section 4.2.2).
    #[rustfmt::skip]
    const K: [[u32; 4]; 16] = [
        [0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5], [0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5],
        [0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3], [0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174],
        [0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc], [0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da],
        [0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7], [0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967],
        [0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13], [0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85],
        [0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3], [0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070],
        [0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5], [0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3],
        [0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208], [0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2],
    ];

    /// Length of the message in bits; it ends the padding (FIPS 180-4, section 5.1.1).
    const MESSAGE_BITS: i32 = ((DIGEST + BLOCK) * 8) as i32;

    /// Returns whether this processor has the features that [`hash_blocks`] uses.
    pub(super) fn available() -> bool {
        is_x86_feature_detected!("sha")
            && is_x86_feature_detected!("sse4.1")
            && is_x86_feature_detected!("ssse3")
    }

    /// Does the same as the function of the parent module. Call it only if [`available`] returns true.
    pub(super) fn hash_blocks(salt: &[u8; DIGEST], blocks: &[[u8; BLOCK]], out: &mut [[u8; DIGEST]]) {
        assert!(available());
        let (block_pairs, last_block) = blocks.as_chunks::<2>();
        let (out_pairs, last_out) = out.as_chunks_mut::<2>();
        for ([a, b], out) in block_pairs.iter().zip(out_pairs) {
            // SAFETY: the processor has the features that the function is compiled for (asserted above).
            *out = unsafe { streams(salt, [a, b]) };
        }
        for (block, out) in last_block.iter().zip(last_out) {
            // SAFETY: as above.
            [*out] = unsafe { streams(salt, [block]) };
        }
    }

    /// Returns the digests of `N` messages, one or two, computed in an interleaved way.
    ///
    /// The package is compiled for size. So [`compress`] is called in one place, where the compiler then puts it, and
    /// nothing here is a loop or a closure that it could leave as one: states and words stay in registers.
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn streams<const N: usize>(salt: &[u8; DIGEST], blocks: [&[u8; BLOCK]; N]) -> [[u8; DIGEST]; N] {
        const { assert!(N == 1 || N == 2) };
        const LAST: usize = BLOCK / 64;
        let mut state = [initial_state(); N];
        for number in 0..=LAST {
            let at = 64 * number;
            // The salt comes before the block, the padding after it: one bit, zeros, and the length in bits as a
            // 64-bit number, as big-endian words.
            macro_rules! words {
                ($block:expr) => {{
                    let before: &[u8] = if number == 0 { salt } else { &$block[at - 32..at] };
                    let (third, fourth) = if number == LAST {
                        (_mm_setr_epi32(i32::MIN, 0, 0, 0), _mm_setr_epi32(0, 0, 0, MESSAGE_BITS))
                    } else {
                        (load(&$block[at..at + 16]), load(&$block[at + 16..at + 32]))
                    };
                    [load(&before[..16]), load(&before[16..]), third, fourth]
                }};
            }
            let mut words = [words!(blocks[0]); N];
            if N == 2 {
                words[N - 1] = words!(blocks[N - 1]);
            }
            compress(&mut state, words);
        }
        state.map(|state| digest(state))
    }

    /// The state in the order that the instructions require: words A B E F and C D G H, highest lane first.
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn initial_state() -> [__m128i; 2] {
        let [a, b, c, d, e, f, g, h] = INITIAL.map(u32::cast_signed);
        [_mm_setr_epi32(f, e, b, a), _mm_setr_epi32(h, g, d, c)]
    }

    /// The state as the 32 bytes of a digest.
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn digest([abef, cdgh]: [__m128i; 2]) -> [u8; DIGEST] {
        let feba = _mm_shuffle_epi32::<0x1b>(abef);
        let dchg = _mm_shuffle_epi32::<0xb1>(cdgh);
        let dcba = _mm_blend_epi16::<0xf0>(feba, dchg);
        let hgfe = _mm_alignr_epi8::<8>(dchg, feba);
        let mut out = [0; DIGEST];
        let (low, high) = out.split_at_mut(16);
        // SAFETY: each half is 16 bytes long and writable; the store needs no alignment.
        unsafe {
            _mm_storeu_si128(low.as_mut_ptr().cast(), swap(dcba));
            _mm_storeu_si128(high.as_mut_ptr().cast(), swap(hgfe));
        }
        out
    }

    /// Four big-endian words of a message.
    #[inline]
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn load(bytes: &[u8]) -> __m128i {
        assert!(bytes.len() == 16);
        // SAFETY: 16 bytes are readable there (asserted above); the load needs no alignment.
        swap(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
    }

    /// Reverses the bytes of each 32-bit word.
    #[inline]
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn swap(words: __m128i) -> __m128i {
        _mm_shuffle_epi8(words, _mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12))
    }

    /// One compression of each of `N` messages, one or two, interleaved four rounds at a time.
    ///
    /// It is written out, by a macro: the package is compiled for size, and a loop that the compiler leaves in keeps the
    /// states in memory, which takes nearly twice the time.
    #[inline]
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn compress<const N: usize>(state: &mut [[__m128i; 2]; N], mut words: [[__m128i; 4]; N]) {
        let before = *state;
        macro_rules! four_rounds {
            ($group:literal, $k:ident, $message:expr) => {
                let words = &mut words[$message];
                let [abef, cdgh] = &mut state[$message];
                let rounds = _mm_add_epi32(words[$group % 4], $k);
                *cdgh = _mm_sha256rnds2_epu32(*cdgh, *abef, rounds);
                *abef = _mm_sha256rnds2_epu32(*abef, *cdgh, _mm_shuffle_epi32::<0x0e>(rounds));
                // The message schedule, four groups ahead; the last four groups need no more.
                if $group < 12 {
                    let [w0, w1, w2, w3] = [
                        words[$group % 4],
                        words[($group + 1) % 4],
                        words[($group + 2) % 4],
                        words[($group + 3) % 4],
                    ];
                    let sum = _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8::<4>(w3, w2));
                    words[$group % 4] = _mm_sha256msg2_epu32(sum, w3);
                }
            };
        }
        macro_rules! rounds {
            ($($group:literal)*) => {
                $(
                    let [k0, k1, k2, k3] = K[$group].map(u32::cast_signed);
                    let k = _mm_setr_epi32(k0, k1, k2, k3);
                    four_rounds!($group, k, 0);
                    if N == 2 {
                        four_rounds!($group, k, N - 1);
                    }
                )*
            };
        }
        rounds!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        for ([abef, cdgh], [abef_before, cdgh_before]) in state.iter_mut().zip(before) {
            *abef = _mm_add_epi32(*abef, abef_before);
            *cdgh = _mm_add_epi32(*cdgh, cdgh_before);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn both_ways_agree_with_the_plain_hash(
            salt in any::<[u8; 32]>(),
            seed in any::<u64>(),
            blocks in 0_usize..7,
            misalign in 0_usize..16,
        ) {
            // xorshift64: cheap bytes without structure.
            let mut x = seed | 1;
            let bytes: Vec<u8> = (0..misalign + blocks * BLOCK).map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x as u8
            }).collect();
            let data = &bytes[misalign..];
            let expected: Vec<[u8; 32]> = data.chunks(BLOCK)
                .map(|block| Sha256::digest([&salt[..], block].concat()).into())
                .collect();
            let mut out = vec![[0; 32]; blocks];
            hash_blocks(&salt, data, &mut out);
            prop_assert_eq!(&out, &expected);
            out.fill([0; 32]);
            portable(&salt, data.as_chunks().0, &mut out);
            prop_assert_eq!(&out, &expected);
            #[cfg(target_arch = "x86_64")]
            if x86::available() {
                out.fill([0; 32]);
                x86::hash_blocks(&salt, data.as_chunks().0, &mut out);
                prop_assert_eq!(&out, &expected);
            }
        }
    }

    #[test]
    fn known_answer() {
        // head -c 4128 /dev/zero | sha256sum
        let zeros = [0; 2 * BLOCK];
        let mut out = [[1; 32]; 2];
        hash_blocks(&[0; 32], &zeros, &mut out);
        assert_eq!(
            crate::digest::hex(&out[0]),
            "2e534ef0107d592d1706ac38ad58596b85ef3375d360a6d669f974792df5cb5a"
        );
        assert_eq!(out[0], out[1]);
    }

    #[test]
    #[should_panic(expected = "4097 bytes for 1 digests")]
    fn wrong_lengths_are_the_callers_mistake() {
        hash_blocks(&[0; 32], &[0; 4097], &mut [[0; 32]]);
    }
}
