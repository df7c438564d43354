//! Where the bytes of an image come from.

use std::io;

use crate::digest::Digest;

/// Random access to the bytes of an image.
///
/// A source returns a slice of memory that is private to this process: the caller decodes exactly what the
/// source verified, even if the underlying file changes.
pub trait Source: Send + Sync {
    /// Returns the size of the image, in bytes.
    fn size_bytes(&self) -> u64;

    /// Reads exactly `len` bytes at `offset`.
    ///
    /// `scratch` is memory that the source may use; its content is lost. It grows to at most `len` + 8 KiB.
    /// The result is in `scratch` or in the source itself.
    ///
    /// # Errors
    /// [`ReadError::OutOfRange`], before anything is read or allocated, if the range is not within the image;
    /// [`ReadError::Verity`] if a block does not match the root hash.
    fn read<'a>(&'a self, offset: u64, len: usize, scratch: &'a mut Vec<u8>) -> Result<&'a [u8], ReadError>;
}

/// Why bytes of an image cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The operating system failed the read.
    #[error("cannot read {len} bytes at {offset}: {source}")]
    Io {
        /// Offset in the image, in bytes.
        offset: u64,
        /// Length of the read, in bytes.
        len: usize,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The image points beyond its own end.
    #[error("{len} bytes at {offset} are beyond the end of the image of {size} bytes")]
    OutOfRange {
        /// Offset in the image, in bytes.
        offset: u64,
        /// Length of the read, in bytes.
        len: u64,
        /// Size of the image, in bytes.
        size: u64,
    },
    /// A block does not have the hash that the level above requires.
    #[error("verity: block {block} ({what}) has hash {found}, expected {expected}")]
    Verity {
        /// `data`, or `hash level N` (0 is the one above the data).
        what: String,
        /// Number of the 4096-byte block, counted from the start of the image file.
        block: u64,
        /// The hash that the tree (or, for the top, the root hash) requires.
        expected: Digest,
        /// The hash of the bytes read.
        found: Digest,
    },
    /// A blob is shorter or longer than what refers to it says.
    #[error("blob {blob} has {found} bytes, expected {expected}")]
    Length {
        /// The blob.
        blob: Digest,
        /// The length that its descriptor says, in bytes.
        expected: u64,
        /// How many bytes were read; one more than expected where it is longer.
        found: u64,
    },
}

/// Checks that `[offset, offset + len)` lies within an image of `size` bytes.
pub fn check_range(offset: u64, len: u64, size: u64) -> Result<(), ReadError> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(ReadError::OutOfRange { offset, len, size }),
    }
}

/// An image that is held in memory.
pub struct MemorySource(pub Vec<u8>);

impl Source for MemorySource {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read<'a>(&'a self, offset: u64, len: usize, _: &'a mut Vec<u8>) -> Result<&'a [u8], ReadError> {
        check_range(offset, len as u64, self.size_bytes())?;
        Ok(&self.0[offset as usize..][..len])
    }
}
