//! Builds a hash tree and appends it to an image.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;

use super::{BLOCK_BYTES, Geometry, HASHES_PER_BLOCK, Superblock, VerityError, parallel};
use crate::digest::{Digest, Hasher};
use crate::image::bytes::{self, read_exact};
use crate::image::source::ReadError;
use crate::progress::{Progress, Task};
use crate::sys::sha256::hash_blocks;

/// A hash tree, as stored after the superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// The root hash.
    pub root_hash: Digest,
    /// The hash blocks from the top level down: 1/127 of the data's size. Empty for one data block.
    pub bytes: Vec<u8>,
}

impl Tree {
    /// Hashes the data area of `file`, on up to `threads` threads.
    ///
    /// Uses memory for the tree and 512 KiB per thread. `task` is updated with the number of data bytes done.
    ///
    /// # Errors
    /// [`ReadError::Io`] if the data cannot be read in full.
    pub fn build(
        file: &File,
        geometry: &Geometry,
        salt: &[u8],
        threads: NonZeroUsize,
        task: &Task,
    ) -> Result<Self, ReadError> {
        let mut bytes = vec![0; geometry.tree_blocks() as usize * BLOCK_BYTES];
        // Start of a level in `bytes`: the tree follows the superblock.
        let begin = |level: usize| {
            (geometry.levels()[level].first_block - geometry.data_blocks() - 1) as usize * BLOCK_BYTES
        };
        let mut root = [[0; 32]];
        let Some(top) = geometry.levels().len().checked_sub(1) else {
            let mut block = [0; BLOCK_BYTES];
            read_exact(file, 0, &mut block)?;
            hash_blocks(salt, &block, &mut root);
            let [root] = root;
            return Ok(Self { root_hash: Digest::from_bytes(root), bytes });
        };

        // Level 0 from the data: one hash block, so 128 data blocks, is one piece of work.
        let piece_bytes = (HASHES_PER_BLOCK * BLOCK_BYTES) as u64;
        let pieces = (0..).step_by(piece_bytes as usize).zip(bytes[begin(0)..].chunks_mut(BLOCK_BYTES));
        parallel::for_each(threads, pieces, |(offset, hash_block): (u64, &mut [u8]), scratch| {
            let len = piece_bytes.min(geometry.data_bytes() - offset) as usize;
            scratch.resize(len, 0);
            read_exact(file, offset, scratch)?;
            hash_blocks(salt, scratch, &mut hash_block.as_chunks_mut().0[..len / BLOCK_BYTES]);
            task.advance(len as u64);
            Ok(())
        })?;

        // The levels above: all of them together are 1/127 of level 0, so one thread is enough.
        for level in 1..=top {
            let (above, below) = bytes.split_at_mut(begin(level - 1));
            let blocks = geometry.levels()[level - 1].blocks as usize;
            let below = &below[..blocks * BLOCK_BYTES];
            hash_blocks(salt, below, &mut above[begin(level)..].as_chunks_mut().0[..blocks]);
        }
        hash_blocks(salt, &bytes[..BLOCK_BYTES], &mut root);
        let [root] = root;
        Ok(Self { root_hash: Digest::from_bytes(root), bytes })
    }
}

/// An image with its verity data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// The root hash, for the layer's annotation.
    pub root_hash: Digest,
    /// The digest of the whole file: the blob's name in a store.
    pub digest: Digest,
    /// The size of the whole file, in bytes.
    pub size_bytes: u64,
    /// The verity superblock.
    pub superblock: Superblock,
}

/// Appends verity data to a file system image of `image_bytes` bytes at the start of `file`.
///
/// Bytes after the image (padding of mksquashfs) are truncated. The same image produces the same file.
/// Nothing is synced: the caller decides when the file counts. After an error the image itself is intact, but
/// part of the verity data may follow it in the file.
///
/// # Errors
/// [`VerityError::FileSize`] if the file is shorter than the image, [`VerityError::DataSize`] if the image is
/// empty; [`VerityError::Read`] and [`VerityError::Write`] from the file.
pub fn seal(
    file: &File,
    image_bytes: u64,
    threads: NonZeroUsize,
    progress: &Progress,
) -> Result<Sealed, VerityError> {
    let data_bytes = image_bytes.checked_next_multiple_of(BLOCK_BYTES as u64).unwrap_or(u64::MAX);
    let geometry = Geometry::new(data_bytes).map_err(|_| VerityError::DataSize { found: image_bytes })?;
    let found = bytes::len(file)?;
    if found < image_bytes {
        return Err(VerityError::FileSize { what: "the file system image", found, expected: image_bytes });
    }
    // Truncate first, so that the file grows back with zeros.
    for size in [image_bytes, data_bytes] {
        file.set_len(size).map_err(|source| VerityError::Write { offset: size, source })?;
    }

    let mut hasher = hash_data(file, data_bytes, &progress.task("digest", "image", Some(data_bytes)))?;
    let superblock = Superblock::for_data(&hasher.clone().finish(), geometry.data_blocks());
    let task = progress.task("hash", "image", Some(data_bytes));
    let tree = Tree::build(file, &geometry, &superblock.salt, threads, &task)?;

    let mut offset = data_bytes;
    for part in [&superblock.to_block()[..], &tree.bytes] {
        file.write_all_at(part, offset).map_err(|source| VerityError::Write { offset, source })?;
        hasher.update(part);
        offset += part.len() as u64;
    }
    Ok(Sealed { root_hash: tree.root_hash, digest: hasher.finish(), size_bytes: offset, superblock })
}

/// Feeds the data area of a file to a hasher.
fn hash_data(file: &File, data_bytes: u64, task: &Task) -> Result<Hasher, ReadError> {
    let mut hasher = Hasher::new();
    let mut scratch = vec![0; 256 * 1024];
    while hasher.bytes() < data_bytes {
        let len = (data_bytes - hasher.bytes()).min(scratch.len() as u64) as usize;
        read_exact(file, hasher.bytes(), &mut scratch[..len])?;
        hasher.update(&scratch[..len]);
        task.advance(len as u64);
    }
    Ok(hasher)
}
