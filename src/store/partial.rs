//! Blobs that come from another machine, received so that a cut, a crash or a kill loses nothing.
//!
//! ```text
//! DIR/.mosfs/partial/HEX     the first bytes of the blob HEX; never visible as a blob
//! ```
//!
//! Invariants: the process that appends to the file holds its lock (flock), and it becomes a blob by
//! [`Writer::commit`] only once all of it has the blob's digest. Its content is not trusted: what an earlier
//! process received is hashed again, so it need not be synced, and a file that a power cut damaged is
//! detected by its digest and received again from its start, once. `mosfs gc` removes the files; it holds the
//! store's lock exclusive, so no process is writing to one.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::{StoreError, TempBlob, Writer};
use crate::digest::Hasher;
use crate::error::{IoContext, IoError};
use crate::image::oci::Descriptor;
use crate::progress::Task;
use crate::sys::failpoint;
use crate::sys::file;
use crate::transport::{Transport, TransportError};

/// The folder of such files, below a store's private folder.
pub(super) const FOLDER: &str = "partial";
/// How much is read, hashed and written at a time, in bytes.
const CHUNK_BYTES: usize = 1 << 20;

/// Receives a blob into the store, unless it exists once no other process is receiving it; returns whether it
/// was received. With `again`, an existing blob is ignored.
pub(super) fn receive(
    writer: &Writer<'_>,
    from: &dyn Transport,
    blob: &Descriptor,
    again: bool,
    task: &Task,
) -> Result<bool, StoreError> {
    let mut part = Part::open(writer, blob)?;
    if !again && writer.store().has(blob) {
        part.remove();
        task.advance(blob.size);
        return Ok(false);
    }
    let object = format!("{} in {}", blob.digest, from.location());
    loop {
        let resumed = part.bytes > 0;
        let outcome = part.fill(from, blob, task);
        let error = match outcome {
            Ok(hasher) => {
                let (size, found) = (hasher.bytes(), hasher.finish());
                if size != blob.size {
                    TransportError::SizeMismatch { object: object.clone(), expected: blob.size, found: size }
                        .into()
                } else if found != blob.digest {
                    TransportError::DigestMismatch { object: object.clone(), expected: blob.digest, found }
                        .into()
                } else {
                    writer.commit(part.into_temp(), &blob.digest)?;
                    return Ok(true);
                }
            }
            Err(error) => error,
        };
        match &error {
            // The file may have been left damaged by an earlier process: try once from the start.
            StoreError::Transport(
                TransportError::DigestMismatch { .. } | TransportError::SizeMismatch { .. },
            ) if resumed => {
                log::info!("{error}; receiving it from its start");
                part.empty()?;
            }
            // The next run continues where this one stopped.
            StoreError::Transport(why) if why.is_temporary() => return Err(error),
            _ => {
                part.remove();
                return Err(error);
            }
        }
    }
}

/// The first bytes of a blob, locked.
struct Part {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl Part {
    /// Opens or creates the file, and waits for any process that is receiving the blob.
    fn open(writer: &Writer<'_>, blob: &Descriptor) -> Result<Self, StoreError> {
        let folder = writer.store().private(FOLDER);
        file::create_folders(&folder)?;
        let path = folder.join(blob.digest.hex());
        loop {
            let file = file::open_to_continue(&path)?;
            match file.lock() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                locked => locked.on("lock", &path)?,
            }
            let ours = file.metadata().on("stat", &path)?;
            // The previous holder of the lock may have made the file a blob: then this is no longer the
            // partial file.
            match fs::symlink_metadata(&path) {
                Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => {
                    let mut part = Self { file, path, bytes: ours.len() };
                    if part.bytes > blob.size {
                        part.empty()?;
                    }
                    return Ok(part);
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(IoError::new("stat", &path, source).into()),
            }
        }
    }

    fn empty(&mut self) -> Result<(), StoreError> {
        self.file.set_len(0).on("truncate", &self.path)?;
        self.bytes = 0;
        Ok(())
    }

    /// Hashes the existing bytes, and receives the rest; at most one byte too many.
    fn fill(&mut self, from: &dyn Transport, blob: &Descriptor, task: &Task) -> Result<Hasher, StoreError> {
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; CHUNK_BYTES.min(blob.size.saturating_add(1) as usize)];
        self.file.rewind().on("rewind", &self.path)?;
        while hasher.bytes() < self.bytes {
            match self.file.read(&mut buffer).on("read", &self.path)? {
                // It was longer when it was opened.
                0 => break,
                got => {
                    hasher.update(buffer.get(..got).unwrap_or_default());
                    task.advance(got as u64);
                }
            }
        }
        if hasher.bytes() == blob.size {
            return Ok(hasher);
        }
        let mut stream = from.open(blob, hasher.bytes())?;
        while hasher.bytes() <= blob.size {
            let got = match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(match error.downcast::<TransportError>() {
                        Ok(error) => error.into(),
                        Err(source) => IoError::new("receive", &self.path, source).into(),
                    });
                }
            };
            let bytes = buffer.get(..got).unwrap_or_default();
            hasher.update(bytes);
            self.file.write_all(bytes).on("write", &self.path)?;
            self.bytes = hasher.bytes();
            task.advance(got as u64);
            failpoint::hit("store.partial.written");
        }
        Ok(hasher)
    }

    /// Best effort: `mosfs gc` removes the file if this fails.
    fn remove(&self) {
        let _ = fs::remove_file(&self.path);
    }

    fn into_temp(self) -> TempBlob {
        TempBlob::of(self.file, self.path)
    }
}
