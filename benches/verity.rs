//! How fast blocks are hashed, trees are built and verified data is read.
//!
//! `cargo bench --bench verity`; quote ratios of one run, not figures of two machines.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use mosfs::sys::sha256::{BLOCK, hash_blocks};
use sha2::{Digest as _, Sha256};

fn main() {
    divan::main();
}

/// Bytes without structure.
fn noise(len: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
        .collect()
}

/// Blocks hashed at once: 1 is a single stream.
#[divan::bench(args = [1, 2, 32])]
fn salted_blocks(bencher: Bencher, blocks: usize) {
    let data = noise(blocks * BLOCK);
    let mut out = vec![[0; 32]; blocks];
    bencher.counter(BytesCount::new(data.len())).bench_local(|| {
        hash_blocks(&[7; 32], black_box(&data), &mut out);
    });
}

/// The same by the `sha2` crate.
#[divan::bench]
fn sha2_crate(bencher: Bencher) {
    let data = noise(BLOCK);
    bencher
        .counter(BytesCount::new(data.len()))
        .bench_local(|| Sha256::new().chain_update([7; 32]).chain_update(black_box(&data)).finalize());
}
