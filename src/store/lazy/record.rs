//! Records what is read of an image: the list of `mosfs trace`.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use super::list::{ListedRead, ReadList};
use super::part::BLOCK;
use crate::digest::Digest;
use crate::image::blobs::{Blob, BlobError, BlobProgress, Blobs};
use crate::image::bytes::ReadAt;
use crate::sys::file::{Links, open_regular};
use crate::sys::locks;

/// The most blocks that are recorded: 1 GiB of an image.
const MOST_BLOCKS: usize = 1 << 18;

/// Blobs of which every first read is noted.
#[derive(Debug)]
pub struct Recorder {
    inner: Arc<dyn Blobs>,
    noted: Arc<Mutex<Noted>>,
}

/// What was read so far, in order.
#[derive(Debug, Default)]
struct Noted {
    reads: Vec<ListedRead>,
    /// The blocks that were read before, of each blob.
    seen: BTreeMap<Digest, HashSet<u64>>,
    blocks: usize,
}

impl Recorder {
    /// Records what is read of `inner`.
    pub fn new(inner: Arc<dyn Blobs>) -> Self {
        Self { inner, noted: Arc::default() }
    }

    /// The list of what was read.
    pub fn list(&self) -> ReadList {
        let noted = locks::lock(&self.noted);
        ReadList::of(noted.reads.iter().copied())
    }
}

impl Noted {
    fn note(&mut self, blob: Digest, offset: u64, len: u64) {
        let seen = self.seen.entry(blob).or_default();
        for block in offset / BLOCK..offset.saturating_add(len).div_ceil(BLOCK) {
            if self.blocks >= MOST_BLOCKS || !seen.insert(block) {
                continue;
            }
            self.blocks += 1;
            match self.reads.last_mut() {
                Some(last) if last.blob == blob && last.offset + last.len == block * BLOCK => {
                    last.len += BLOCK
                }
                _ => self.reads.push(ListedRead { blob, offset: block * BLOCK, len: BLOCK }),
            }
        }
    }
}

impl Blobs for Recorder {
    fn blob(&self, digest: &Digest, stored_bytes: u64) -> Blob {
        let inner = self.inner.blob(digest, stored_bytes);
        let bytes = match &inner {
            Blob::Remote { bytes, .. } => Bytes::Remote(Arc::clone(bytes)),
            Blob::File(path) => match open_regular(path, Links::Followed) {
                Ok((file, _)) => Bytes::File(file),
                // Whoever opens it gets the error.
                Err(_) => return inner,
            },
        };
        let recorded = Recorded { bytes, blob: *digest, noted: Arc::clone(&self.noted) };
        Blob::Remote { place: inner.to_string(), bytes: Arc::new(recorded) }
    }

    fn read(&self, digest: &Digest, stored_bytes: u64, bytes: &mut Vec<u8>) -> Result<(), BlobError> {
        self.inner.read(digest, stored_bytes, bytes)?;
        locks::lock(&self.noted).note(*digest, 0, stored_bytes);
        Ok(())
    }

    fn is_remote(&self) -> bool {
        self.inner.is_remote()
    }

    fn start(&self) -> io::Result<()> {
        self.inner.start()
    }

    fn progress(&self) -> Vec<BlobProgress> {
        self.inner.progress()
    }
}

enum Bytes {
    File(File),
    Remote(Arc<dyn ReadAt>),
}

/// A blob whose reads are noted.
struct Recorded {
    bytes: Bytes,
    blob: Digest,
    noted: Arc<Mutex<Noted>>,
}

impl Recorded {
    fn bytes(&self) -> &dyn ReadAt {
        match &self.bytes {
            Bytes::File(file) => file,
            Bytes::Remote(bytes) => bytes.as_ref(),
        }
    }
}

impl ReadAt for Recorded {
    fn len(&self) -> io::Result<u64> {
        self.bytes().len()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes().read_exact_at(buffer, offset)?;
        locks::lock(&self.noted).note(self.blob, offset, buffer.len() as u64);
        Ok(())
    }

    fn distrust(&self, offset: u64, len: u64) -> bool {
        self.bytes().distrust(offset, len)
    }
}

impl fmt::Debug for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recorded({})", self.blob)
    }
}
