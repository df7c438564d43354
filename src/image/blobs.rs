//! Where the blobs of an image are: in a store on this machine, or elsewhere.
//!
//! A layer in a single file is read in parts, and the reader verifies the bytes ([`Blobs::blob`]). A layer of
//! many blobs reads each of them whole and already verified ([`Blobs::read`]).
//!
//! **What was hashed is what is used.** [`Blobs::read`] copies the blob into private memory, and compares
//! length and digest of that copy.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Take};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;

use serde::{Deserialize, Serialize};

use super::bytes::ReadAt;
use crate::digest::{Digest, Hasher};
use crate::error::{Class, Classified};
use crate::sys::file::{Links, open_folder, open_regular_at};
use crate::sys::memory;

/// A blob of such a size, in bytes, is hashed while it is read: more than a chunk, which other threads may read meanwhile.
/// A larger one, which no reader allows, gets no buffer before it has the bytes.
const LARGE_BYTES: RangeInclusive<u64> = (1 << 20) + 1..=256 << 20;
/// The most that is read and hashed at once then, in bytes: it is in the processor's cache still.
const PART_BYTES: usize = 256 << 10;

/// A place that provides blobs by digest.
pub trait Blobs: fmt::Debug + Send + Sync {
    /// Returns a blob to be read in parts. Nothing is checked, opened or fetched: the reader verifies what it
    /// reads.
    ///
    /// `stored_bytes` is its size according to the manifest.
    fn blob(&self, digest: &Digest, stored_bytes: u64) -> Blob;

    /// Reads a whole blob into `bytes`, replacing the content.
    ///
    /// `stored_bytes` is its size according to the manifest; the caller bounds it. No more memory is used.
    ///
    /// # Errors
    /// [`BlobError`]; `bytes` is then empty.
    fn read(&self, digest: &Digest, stored_bytes: u64, bytes: &mut Vec<u8>) -> Result<(), BlobError>;

    /// Whether a read may wait for another machine.
    fn is_remote(&self) -> bool {
        false
    }

    /// Starts what the place does in the background. Called once, by the process that serves a mount.
    ///
    /// # Errors
    /// That of starting a thread.
    fn start(&self) -> io::Result<()> {
        Ok(())
    }

    /// Returns how much of each blob that comes from another machine is here.
    fn progress(&self) -> Vec<BlobProgress> {
        Vec::new()
    }
}

/// How much of a blob that comes from another machine is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobProgress {
    /// The blob; of a layer made of chunks, one of its blobs, and the numbers are those of all.
    pub digest: Digest,
    /// Its size, in bytes.
    pub size: u64,
    /// How many bytes are here.
    pub have: u64,
    /// `partial`; `complete`: it is in the store; `offline`: its source does not answer; `disk-full`: it cannot be
    /// kept; `differs`: it is whole and has another digest; `fetching`: it is part of a deployment that is pending.
    pub state: String,
    /// The last error of its source, if nothing has succeeded since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// One blob, unverified.
#[derive(Clone)]
pub enum Blob {
    /// A file of this machine.
    File(PathBuf),
    /// A blob elsewhere, read in parts.
    Remote {
        /// The place, for messages.
        place: String,
        /// Its bytes.
        bytes: Arc<dyn ReadAt>,
    },
}

impl Blob {
    /// Returns its file, if it is on this machine.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Remote { .. } => None,
        }
    }
}

/// Where it is.
impl fmt::Display for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Remote { place, .. } => f.write_str(place),
        }
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blob({self})")
    }
}

/// Why a whole blob cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlobError {
    /// It cannot be read.
    #[error("blob {digest}: {source}")]
    Io {
        /// The blob.
        digest: Digest,
        /// The error of the operating system or the transport.
        source: io::Error,
    },
    /// Its size differs from the manifest's.
    #[error("blob {digest} has {found} bytes, expected {expected}")]
    Size {
        /// The blob.
        digest: Digest,
        /// The expected size, in bytes.
        expected: u64,
        /// How many bytes were read; one more than expected where it is longer.
        found: u64,
    },
    /// Its content does not match its digest.
    #[error("blob {expected}: its content has digest {found}")]
    Content {
        /// The blob.
        expected: Digest,
        /// The digest of the bytes read.
        found: Digest,
    },
}

impl Classified for BlobError {
    fn class(&self) -> Class {
        match self {
            Self::Io { .. } => Class::Failure,
            Self::Size { .. } | Self::Content { .. } => Class::Verification,
        }
    }
}

/// Reads a stream to its end as a whole blob, with the checks of [`Blobs::read`].
///
/// # Errors
/// As [`Blobs::read`].
pub fn read_whole(
    from: impl Read,
    digest: &Digest,
    stored_bytes: u64,
    bytes: &mut Vec<u8>,
) -> Result<(), BlobError> {
    bytes.clear();
    // One byte more than declared, so that a longer blob is detected.
    let from = from.take(stored_bytes.saturating_add(1));
    let is_large = LARGE_BYTES.contains(&stored_bytes);
    let read = if is_large { read_large(from, bytes) } else { read_small(from, bytes) };
    let checked = match read {
        Err(source) => Err(BlobError::Io { digest: *digest, source }),
        // Rule (OCI descriptors): content has the size and the digest of its descriptor.
        Ok(_) if bytes.len() as u64 != stored_bytes => {
            Err(BlobError::Size { digest: *digest, expected: stored_bytes, found: bytes.len() as u64 })
        }
        Ok(found) if found == *digest => Ok(()),
        Ok(found) => Err(BlobError::Content { expected: *digest, found }),
    };
    // Leave no unverified bytes where a careless caller could use them.
    checked.inspect_err(|_| bytes.clear())
}

/// Reads to the end, and returns the digest of what was read.
fn read_small(mut from: impl Read, bytes: &mut Vec<u8>) -> io::Result<Digest> {
    from.read_to_end(bytes)?;
    Ok(Digest::of(bytes))
}

/// The same for many bytes, which another thread hashes while this one reads the next of them.
fn read_large<R: Read>(mut from: Take<R>, bytes: &mut Vec<u8>) -> io::Result<Digest> {
    // The system provides the zeros as they are needed: a blob that ends early takes no more memory than it has bytes.
    *bytes = vec![0; from.limit() as usize];
    memory::use_large_pages(bytes);
    let (unread, digest) = thread::scope(|scope| {
        let (parts, ready) = mpsc::channel::<&[u8]>();
        let hash = move || {
            let mut hasher = Hasher::new();
            ready.iter().for_each(|part| hasher.update(part));
            hasher.finish()
        };
        // Where there may be no other thread, all of it is hashed below.
        let hashing = thread::Builder::new().spawn_scoped(scope, hash);
        let mut rest = bytes.as_mut_slice();
        loop {
            let most = rest.len().min(PART_BYTES);
            let part = rest.split_at_mut(most).0;
            memory::populate(part);
            match from.read(part) {
                Ok(0) => break,
                Ok(len) => {
                    let (part, after) = rest.split_at_mut(len);
                    let _ = parts.send(part);
                    rest = after;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        drop(parts);
        Ok((rest.len(), hashing.ok().and_then(|thread| thread.join().ok())))
    })?;
    bytes.truncate(bytes.len() - unread);
    Ok(digest.unwrap_or_else(|| Digest::of(bytes)))
}

/// The blobs of an OCI layout in a folder: `DIR/blobs/sha256/HEX`.
///
/// The folder is opened by the first [`Blobs::read`], and stays open: a daemon reads blobs long after it has
/// left its working directory and, at boot, after its root folder has become another one.
#[derive(Debug, Clone)]
pub struct BlobFolder {
    path: PathBuf,
    links: Links,
    folder: Arc<OnceLock<File>>,
}

impl BlobFolder {
    /// Returns the blobs of the layout in `dir`, whose files may or may not be links.
    pub fn of_layout(dir: &Path, links: Links) -> Self {
        Self { path: dir.join("blobs/sha256"), links, folder: Arc::default() }
    }

    /// Returns the path where a blob is, or would be.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.path.join(digest.hex())
    }

    fn open(&self, digest: &Digest) -> io::Result<File> {
        let folder = match self.folder.get() {
            Some(folder) => folder,
            None => {
                let opened = open_folder(&self.path)?;
                self.folder.get_or_init(|| opened)
            }
        };
        open_regular_at(folder, &digest.hex(), self.links)
    }
}

impl Blobs for BlobFolder {
    fn blob(&self, digest: &Digest, _: u64) -> Blob {
        Blob::File(self.path(digest))
    }

    fn read(&self, digest: &Digest, stored_bytes: u64, bytes: &mut Vec<u8>) -> Result<(), BlobError> {
        // A failure leaves nothing of an earlier blob behind.
        bytes.clear();
        let file = self.open(digest).map_err(|source| BlobError::Io { digest: *digest, source })?;
        read_whole(file, digest, stored_bytes, bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_blob_is_the_right_one_or_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobFolder::of_layout(dir.path(), Links::Refused);
        let digest = Digest::of(b"content");
        let path = blobs.path(&digest);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut bytes = b"what was there".to_vec();

        let error = blobs.read(&digest, 7, &mut bytes).unwrap_err();
        assert!(matches!(error, BlobError::Io { .. }) && error.class() == Class::Failure, "{error}");
        fs::write(&path, b"content").unwrap();
        blobs.read(&digest, 7, &mut bytes).unwrap();
        assert_eq!(bytes, b"content");

        for (stored_bytes, content, said) in [
            (7, &b"contenT"[..], "its content has digest"),
            (7, b"conten", "has 6 bytes, expected 7"),
            (7, b"content and more", "has 8 bytes, expected 7"),
            (u64::MAX, b"content", "has 7 bytes, expected 18446744073709551615"),
        ] {
            fs::write(&path, content).unwrap();
            let error = blobs.read(&digest, stored_bytes, &mut bytes).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
            assert_eq!((error.class(), bytes.len()), (Class::Verification, 0));
        }

        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(matches!(blobs.read(&digest, 7, &mut bytes), Err(BlobError::Io { .. })));
        assert_eq!(blobs.blob(&digest, 7).file(), Some(&*path));
    }

    #[test]
    fn a_large_blob_is_the_right_one_or_an_error() {
        let size = *LARGE_BYTES.start() as usize + 3 * PART_BYTES / 2;
        let content: Vec<u8> = (0..size).map(|at| (at * 31 % 251) as u8).collect();
        let digest = Digest::of(&content);
        let mut bytes = b"what was there".to_vec();
        read_whole(&content[..], &digest, size as u64, &mut bytes).unwrap();
        assert!(bytes == content);

        for at in [0, PART_BYTES, size - 1] {
            let mut changed = content.clone();
            changed[at] ^= 1;
            let error = read_whole(&changed[..], &digest, size as u64, &mut bytes).unwrap_err();
            let found = Digest::of(&changed);
            assert!(
                matches!(error, BlobError::Content { expected, found: other } if (expected, other) == (digest, found))
            );
            assert!(bytes.is_empty());
        }
        let longer = [&content[..], b"12"].concat();
        for (wrong, len) in
            [(&content[..0], 0), (&content[..2 * PART_BYTES], 2 * PART_BYTES), (&longer[..], size + 1)]
        {
            let error = read_whole(wrong, &digest, size as u64, &mut bytes).unwrap_err();
            assert!(matches!(error, BlobError::Size { found, .. } if found == len as u64), "{error}");
            assert!(bytes.is_empty());
        }
        // It comes in pieces of any size, and may fail on the way.
        struct Pieces<'a>(&'a [u8], usize);
        impl Read for Pieces<'_> {
            fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
                self.1 += 1;
                match self.1 % 3 {
                    0 => Err(io::ErrorKind::Interrupted.into()),
                    _ if self.0.is_empty() => Err(io::ErrorKind::TimedOut.into()),
                    piece => {
                        let len = to.len().min(piece * 60_000);
                        self.0.read(&mut to[..len])
                    }
                }
            }
        }
        let error =
            read_whole(Pieces(&content[..size - 1], 0), &digest, size as u64, &mut bytes).unwrap_err();
        assert!(matches!(&error, BlobError::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut));
        assert!(bytes.is_empty());
        let then_end = Pieces(&content, 0).take(size as u64);
        read_whole(then_end, &digest, size as u64, &mut bytes).unwrap();
        assert!(bytes == content);
    }
}
