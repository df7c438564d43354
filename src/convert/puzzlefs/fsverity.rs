//! Digests as the kernel's fs-verity makes them (linux, Documentation/filesystems/fsverity.rst, "File digest
//! computation"): SHA-256, blocks of 4,096 bytes, no salt.
//!
//! ```text
//! level 0      a SHA-256 of each block of the file; the last block is padded with zeros
//! level N      a SHA-256 of each block of the hashes of level N - 1, padded alike, until one hash is left: the root
//! descriptor   256 bytes: version 1, algorithm 1, log2 of the block 12, salt size 0, u32 0, u64 file size,
//!              64 bytes root hash, 32 bytes salt, 144 bytes 0; its SHA-256 is the digest
//! ```

use crate::digest::{Digest, Hasher};

/// Size of a block, in bytes.
const BLOCK_BYTES: usize = 4096;

/// The fs-verity digest of a file with these bytes.
pub fn digest(bytes: &[u8]) -> Digest {
    let root = match bytes.len() {
        // "The root hash of an empty file is defined as zeros."
        0 => [0; 32],
        _ => root(bytes),
    };
    let mut descriptor = [0; 256];
    descriptor[..4].copy_from_slice(&[1, 1, 12, 0]);
    descriptor[8..16].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    descriptor[16..48].copy_from_slice(&root);
    Digest::of(&descriptor)
}

fn root(bytes: &[u8]) -> [u8; 32] {
    let mut hashes = level(bytes);
    while hashes.len() > 1 {
        hashes = level(hashes.as_flattened());
    }
    hashes.first().copied().unwrap_or_default()
}

fn level(bytes: &[u8]) -> Vec<[u8; 32]> {
    const ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    bytes
        .chunks(BLOCK_BYTES)
        .map(|block| {
            let mut hasher = Hasher::new();
            hasher.update(block);
            hasher.update(&ZEROS[block.len()..]);
            *hasher.finish().as_bytes()
        })
        .collect()
}
