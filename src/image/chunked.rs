//! A layer of many blobs: one of metadata, which names the others, the chunks, by their digests.

use std::sync::Arc;

use super::blobs::Blobs;
use crate::digest::Digest;

/// The largest metadata that is read, in bytes.
pub const MAX_METADATA_BYTES: u64 = 256 << 20;

/// The chunks that a manifest lists: the digest and the stored size of each, in bytes.
///
/// There may be tens of thousands, each of which is looked up when the layer is opened. Writers list them in the order in
/// which files use them, so that the next one is mostly where it is looked for first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunks {
    /// In the order of the manifest, each of them once.
    listed: Vec<(Digest, u64)>,
    /// Which of `listed`, and its first bits, in the order of the digests.
    sorted: Vec<(u64, u32)>,
}

/// A chunk is listed with two sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("chunk {chunk} is listed with {} bytes and with {} bytes", sizes[0], sizes[1])]
pub struct TwoSizes {
    /// The chunk.
    pub chunk: Digest,
    /// The sizes, in bytes.
    pub sizes: [u64; 2],
}

impl Chunks {
    /// Makes the list. The same chunk may be listed many times.
    ///
    /// # Errors
    /// [`TwoSizes`].
    pub fn new(mut listed: Vec<(Digest, u64)>) -> Result<Self, TwoSizes> {
        let mut sorted: Vec<_> = listed.iter().map(|one| one.0.first_bits()).zip(0..).collect();
        let one = |number: u32| listed[number as usize];
        sorted.sort_unstable_by(|a, b| {
            // Few are alike as far as that.
            a.0.cmp(&b.0).then_with(|| (one(a.1).0, a.1).cmp(&(one(b.1).0, b.1)))
        });
        let mut again = Vec::new();
        for pair in sorted.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
            let ((chunk, first), (other, second)) = (one(pair[0].1), one(pair[1].1));
            match chunk == other {
                true if first != second => return Err(TwoSizes { chunk, sizes: [first, second] }),
                true => again.push(pair[1].1),
                false => {}
            }
        }
        if again.is_empty() {
            return Ok(Self { listed, sorted });
        }
        again.sort_unstable();
        let mut number = 0..;
        listed.retain(|_| number.next().is_none_or(|number| again.binary_search(&number).is_err()));
        Self::new(listed)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.listed.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }

    /// Returns all of them, in the order of the manifest.
    pub fn iter(&self) -> impl Iterator<Item = (Digest, u64)> {
        self.listed.iter().copied()
    }

    /// Returns which of them has that digest, and its stored size, in bytes. `guess` is looked at first.
    pub fn find(&self, digest: &Digest, guess: usize) -> Option<(usize, u64)> {
        let at = match self.listed.get(guess) {
            Some(one) if one.0 == *digest => guess,
            _ => self.search(digest)?,
        };
        self.listed.get(at).map(|one| (at, one.1))
    }

    /// Whether one of them has that digest.
    pub fn has(&self, digest: &Digest) -> bool {
        self.search(digest).is_some()
    }

    fn search(&self, digest: &Digest) -> Option<usize> {
        let first_bits = digest.first_bits();
        let order = |&(bits, number): &(u64, u32)| {
            bits.cmp(&first_bits).then_with(|| self.listed[number as usize].0.cmp(digest))
        };
        let at = self.sorted.binary_search_by(order).ok()?;
        self.sorted.get(at).map(|one| one.1 as usize)
    }
}

/// What a chunked layer is read from.
#[derive(Debug, Clone)]
pub struct ChunkedLayer {
    /// The blob of metadata.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// The chunks that the manifest lists. One that is not among them is not copied and may be collected, so a
    /// layer that uses it is refused.
    pub chunks: Arc<Chunks>,
    /// Where the blobs are.
    pub blobs: Arc<dyn Blobs>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(first_bits: u64, last: u8) -> Digest {
        let mut bytes = [last; 32];
        bytes[..8].copy_from_slice(&first_bits.to_be_bytes());
        Digest::from_bytes(bytes)
    }

    #[test]
    fn each_chunk_is_found_and_no_other() {
        let even = |number: u64| digest(number.wrapping_mul(0x9e37_79b9_7f4a_7c15), 0);
        let alike = |number: u64| digest(7, number as u8);
        let ends = |number: u64| digest(if number.is_multiple_of(2) { number } else { u64::MAX - number }, 1);
        for count in [0, 1, 2, 3, 4, 5, 100, 255] {
            for make in [even, alike, ends] {
                let listed: Vec<_> = (0..count).map(|number| (make(number), number + 1)).collect();
                let twice = [&listed[..], &listed[..]].concat();
                let chunks = Chunks::new(twice).unwrap();
                assert_eq!((chunks.len(), chunks.is_empty()), (listed.len(), count == 0));
                assert!(chunks.iter().eq(listed.iter().copied()));
                for (at, (chunk, size)) in listed.iter().enumerate() {
                    for guess in [at, 0, at + 1, usize::MAX] {
                        assert_eq!(chunks.find(chunk, guess), Some((at, *size)));
                    }
                    assert!(chunks.has(chunk));
                }
                for other in (0..300).map(|number| digest(number, 255)).chain([digest(u64::MAX, 255)]) {
                    assert!(chunks.find(&other, 1).is_none() && !chunks.has(&other));
                }
            }
        }
    }

    #[test]
    fn two_sizes_of_a_chunk_are_refused() {
        let chunk = digest(5, 0);
        let error = Chunks::new(vec![(chunk, 8), (digest(1, 0), 8), (chunk, 7)]).unwrap_err();
        assert_eq!(error, TwoSizes { chunk, sizes: [8, 7] });
    }
}
