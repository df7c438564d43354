//! Whole blobs by their digest, for formats that keep content in many small blobs.
//!
//! Squashfs and erofs images are one file each, read in part through a [`Source`](super::Source). A PuzzleFS image
//! is a blob of metadata and thousands of chunks, each read whole and checked against its digest.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use super::source::ReadError;
use crate::digest::Digest;

/// Blobs that are read whole.
///
/// What is returned lies in memory of this process and was checked there: length and SHA-256. A blob that
/// changes underneath, at any moment, gives an error.
pub trait Blobs: Send + Sync {
    /// Reads the blob `digest` of `stored_bytes` bytes into `out`, whose content is replaced.
    ///
    /// `out` grows to at most `stored_bytes` bytes, so the caller checks that number first.
    ///
    /// # Errors
    /// [`ReadError::Io`] where the blob is missing or cannot be read, [`ReadError::Length`] where it is shorter or
    /// longer, [`ReadError::Verity`] where its content has another digest. `out` is empty then.
    fn read(&self, digest: &Digest, stored_bytes: u64, out: &mut Vec<u8>) -> Result<(), ReadError>;
}

/// The blobs of an OCI layout in a folder (`DIR/blobs/sha256`).
#[derive(Debug, Clone)]
pub struct BlobFolder {
    folder: PathBuf,
}

impl BlobFolder {
    /// The blobs in `folder`, each in a file named by the 64 hex digits of its SHA-256.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }
}

impl Blobs for BlobFolder {
    fn read(&self, digest: &Digest, stored_bytes: u64, out: &mut Vec<u8>) -> Result<(), ReadError> {
        out.clear();
        let len = usize::try_from(stored_bytes).unwrap_or(usize::MAX);
        let read = |out: &mut Vec<u8>| -> io::Result<u64> {
            let mut file = File::open(self.folder.join(digest.hex()))?;
            out.try_reserve_exact(len)?;
            Read::by_ref(&mut file).take(stored_bytes).read_to_end(out)?;
            // Whether there is a byte too many.
            Ok(file.read(&mut [0])? as u64)
        };
        let more = match read(out) {
            Ok(more) => more,
            Err(source) => {
                out.clear();
                return Err(ReadError::Io { offset: 0, len, source });
            }
        };
        if more > 0 {
            out.clear();
            return Err(ReadError::Length {
                blob: *digest,
                expected: stored_bytes,
                found: stored_bytes + more,
            });
        }
        let checked = check(digest, stored_bytes, out);
        if checked.is_err() {
            out.clear();
        }
        checked
    }
}

/// Checks bytes in memory against the length and digest of the blob that they should be.
///
/// # Errors
/// [`ReadError::Length`], [`ReadError::Verity`].
pub fn check(digest: &Digest, stored_bytes: u64, bytes: &[u8]) -> Result<(), ReadError> {
    if bytes.len() as u64 != stored_bytes {
        return Err(ReadError::Length { blob: *digest, expected: stored_bytes, found: bytes.len() as u64 });
    }
    let found = Digest::of(bytes);
    if found != *digest {
        return Err(ReadError::Verity { what: "blob".into(), block: 0, expected: *digest, found });
    }
    Ok(())
}
