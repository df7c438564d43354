//! The file of a blob that is here in parts, and the map of what is here.
//!
//! ```text
//! DIR/.mosfs/lazy/HEX        as long as the blob; what is not here is a hole. Locked, shared, by who reads it
//! DIR/.mosfs/lazy/HEX.lock   flock: shared to write to HEX, exclusive to make it a blob
//! DIR/.mosfs/lazy/HEX.fill   flock: exclusive for the process that completes the blob
//! ```
//!
//! **The holes are the map.** There is none on the disk, nothing is synced, and nothing is written in any order:
//! after a crash a hole is fetched, and a block that is there and wrong does not verify, and is fetched again.
//! In memory there is a bit for each 4 KiB block. A file system that reports no holes makes every block look
//! present; each is then fetched when it does not verify.
//!
//! **Garbage collection** holds the store's lock. It leaves a file that is locked, and one whose blob is needed.
//!
//! **Becoming a blob.** The file is hashed and renamed under the exclusive lock, so nobody writes to it in
//! between, and nobody writes to it afterwards: a writer looks, under the shared lock, whether the blob's name
//! leads to this file. Those who have it open read on from the blob.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::digest::{Digest, Hasher};
use crate::error::{IoContext, IoError};
use crate::image::oci::Descriptor;
use crate::store::{Store, StoreError, TempBlob, partial};
use crate::sys::failpoint;
use crate::sys::file::{self, Links};
use crate::sys::flock::Lock;

/// The unit of the map, in bytes.
pub(super) const BLOCK: u64 = 4096;
/// How much is read and hashed at a time, in bytes.
const CHUNK: usize = 1 << 20;

/// The folder of such files, below a store's private folder.
pub(in crate::store) const FOLDER: &str = "lazy";

/// The file of a blob, and what of it is here.
pub(super) struct Part {
    file: File,
    path: PathBuf,
    /// Where the file is once it is a blob.
    blob_path: PathBuf,
    blob: Descriptor,
    /// One bit a block.
    map: Box<[AtomicU64]>,
    /// How many bits are set.
    have: AtomicU64,
    /// All of it is here and is a blob of the store.
    complete: AtomicBool,
}

/// What became of bytes that were to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// They are in the file.
    Kept,
    /// The file has become a blob meanwhile, and has all bytes.
    Complete,
}

/// What became of a file whose blocks are all here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Completed {
    /// It is a blob of the store.
    Blob,
    /// Its content has another digest.
    Differs(Digest),
}

impl Part {
    /// Opens or makes the file, and takes over what a whole download that was cut off has left.
    pub(super) fn open(store: &Store, blob: &Descriptor) -> Result<Self, StoreError> {
        let folder = store.private(FOLDER);
        file::create_folders(&folder)?;
        let path = folder.join(blob.digest.hex());
        adopt(store, blob, &path);
        let file = loop {
            let file = file::open_to_continue(&path)?;
            // As long as it is locked, garbage collection leaves it.
            file.lock_shared().on("lock", &path)?;
            if is_at(&file, &path) {
                break file;
            }
        };
        // Longer where it was another blob's, which it never is; what is beyond the end is cut off.
        if file.metadata().on("stat", &path)?.len() != blob.size {
            file.set_len(blob.size).on("resize", &path)?;
        }
        let words = blob.size.div_ceil(BLOCK).div_ceil(64) as usize;
        let map = (0..words).map(|_| AtomicU64::new(0)).collect();
        let part = Self {
            file,
            path,
            blob_path: store.blob_path(&blob.digest),
            blob: blob.clone(),
            map,
            have: AtomicU64::new(0),
            complete: AtomicBool::new(false),
        };
        part.rescan(0..part.blocks(), &|_| false).on("look for holes in", &part.path)?;
        Ok(part)
    }

    /// The blob.
    pub(super) fn blob(&self) -> &Descriptor {
        &self.blob
    }

    /// How many blocks the blob has.
    pub(super) fn blocks(&self) -> u64 {
        self.blob.size.div_ceil(BLOCK)
    }

    /// The bytes of blocks.
    pub(super) fn bytes_of(&self, blocks: &Range<u64>) -> Range<u64> {
        blocks.start * BLOCK..(blocks.end.saturating_mul(BLOCK)).min(self.blob.size)
    }

    /// How many bytes are here.
    pub(super) fn have_bytes(&self) -> u64 {
        self.have.load(Ordering::Relaxed).saturating_mul(BLOCK).min(self.blob.size)
    }

    /// Whether it is a blob of the store by now.
    pub(super) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Whether a block is here.
    pub(super) fn has(&self, block: u64) -> bool {
        self.map
            .get((block / 64) as usize)
            .is_some_and(|word| word.load(Ordering::Acquire) & (1 << (block % 64)) != 0)
    }

    /// The first block of a range that is not here.
    pub(super) fn first_missing(&self, blocks: Range<u64>) -> Option<u64> {
        let mut block = blocks.start;
        while block < blocks.end {
            let word = self.map.get((block / 64) as usize)?.load(Ordering::Acquire);
            // Those before `block` in its word count as present.
            let missing = !word & (u64::MAX << (block % 64));
            let found = block / 64 * 64 + u64::from(missing.trailing_zeros());
            if missing != 0 {
                return (found < blocks.end).then_some(found);
            }
            block = (block / 64 + 1) * 64;
        }
        None
    }

    /// Notes that blocks are here.
    pub(super) fn mark(&self, blocks: Range<u64>) {
        for block in blocks {
            let bit = 1 << (block % 64);
            if let Some(word) = self.map.get((block / 64) as usize)
                && word.fetch_or(bit, Ordering::AcqRel) & bit == 0
            {
                self.have.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Notes that blocks are not here: what lies there does not verify.
    pub(super) fn unmark(&self, blocks: Range<u64>) {
        for block in blocks {
            let bit = 1 << (block % 64);
            if let Some(word) = self.map.get((block / 64) as usize)
                && word.fetch_and(!bit, Ordering::AcqRel) & bit != 0
            {
                self.have.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// Looks what of a range another process has written since. `leave_out` are blocks whose content is known to
    /// be wrong.
    pub(super) fn rescan(&self, blocks: Range<u64>, leave_out: &dyn Fn(u64) -> bool) -> io::Result<()> {
        let bytes = self.bytes_of(&blocks);
        // Another descriptor: lseek(2) moves the cursor, which threads share.
        let mut at = bytes.start;
        while at < bytes.end {
            let Some((begin, end)) = file::next_data(&self.file, at)? else { break };
            let end = end.min(bytes.end);
            if begin >= end {
                break;
            }
            let whole = if end == self.blob.size { self.blocks() } else { end / BLOCK };
            for block in begin.div_ceil(BLOCK)..whole {
                if !leave_out(block) {
                    self.mark(block..block + 1);
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Reads bytes that are here.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// Writes whole blocks (the last one may be short).
    ///
    /// # Errors
    /// Those of the operating system, such as a full disk.
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<Written> {
        if self.is_complete() {
            return Ok(Written::Complete);
        }
        let _lock = Lock::shared(&self.path.with_extension("lock"))?;
        if self.look_for_blob() {
            return Ok(Written::Complete);
        }
        // A file without a name is nobody else's; one that has another name may be anything by now.
        if !is_at(&self.file, &self.path) && self.file.metadata()?.nlink() > 0 {
            return Err(io::Error::other(format!("{} was moved away", self.path.display())));
        }
        self.file.write_all_at(bytes, offset)?;
        failpoint::hit("store.lazy.written");
        let first = offset / BLOCK;
        self.mark(first..first + (bytes.len() as u64).div_ceil(BLOCK));
        Ok(Written::Kept)
    }

    /// Takes the task of completing the blob, unless another process has it. It is held until it is dropped.
    pub(super) fn try_fill(&self) -> io::Result<Option<Lock>> {
        Lock::try_exclusive(&self.path.with_extension("fill"))
    }

    /// Whether another process has made it a blob.
    pub(super) fn look_for_blob(&self) -> bool {
        let is_blob = is_at(&self.file, &self.blob_path);
        if is_blob {
            self.mark(0..self.blocks());
            self.complete.store(true, Ordering::Release);
        }
        is_blob
    }

    /// Makes it a blob of the store, if it has the right digest.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) fn complete(&self, store: &Store) -> Result<Completed, StoreError> {
        let lock = self.path.with_extension("lock");
        let _lock = Lock::exclusive(&lock).on("lock", &lock)?;
        if self.look_for_blob() {
            return Ok(Completed::Blob);
        }
        let found = self.digest()?;
        if found != self.blob.digest {
            return Ok(Completed::Differs(found));
        }
        failpoint::hit("store.lazy.whole");
        let file = self.file.try_clone().on("open", &self.path)?;
        store.writer()?.commit(TempBlob::of(file, self.path.clone()), &self.blob.digest)?;
        failpoint::hit("store.lazy.committed");
        self.complete.store(true, Ordering::Release);
        // Nobody opens them any more. Whoever waits for one finds that the blob is there.
        let _ = fs::remove_file(self.path.with_extension("fill"));
        Ok(Completed::Blob)
    }

    fn digest(&self) -> Result<Digest, IoError> {
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while at < self.blob.size {
            let most = (self.blob.size - at).min(CHUNK as u64) as usize;
            let piece = buffer.get_mut(..most).unwrap_or_default();
            self.file.read_exact_at(piece, at).on("read", &self.path)?;
            hasher.update(piece);
            at += most as u64;
        }
        Ok(hasher.finish())
    }

    /// A descriptor of the file, to verify it as a whole.
    pub(super) fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// The folder of the file.
    pub(super) fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }
}

/// Whether `path` names the open file.
fn is_at(file: &File, path: &Path) -> bool {
    let identity = |data: fs::Metadata| (data.dev(), data.ino());
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(ours), Ok(named)) => identity(ours) == identity(named),
        _ => false,
    }
}

/// Takes over the first bytes of a blob that a download has left ([`partial`]), if nobody goes on
/// with it.
fn adopt(store: &Store, blob: &Descriptor, path: &Path) {
    let left = store.private(partial::FOLDER).join(blob.digest.hex());
    if path.exists() || !left.exists() {
        return;
    }
    if let Ok(file) = file::open_to_continue(&left)
        && file.try_lock().is_ok()
        && is_at(&file, &left)
        && file.metadata().is_ok_and(|data| data.len() <= blob.size)
        && let Err(error) = fs::rename(&left, path)
    {
        log::info!("{} is not taken over: {error}", left.display());
    }
}

/// The files of blobs that nobody reads and that `is_needed` does not name, with the space that each takes, in bytes:
/// what garbage collection removes.
pub(in crate::store) fn unneeded(
    store: &Store,
    is_needed: &dyn Fn(&Digest) -> bool,
) -> Result<Vec<(PathBuf, u64)>, StoreError> {
    let folder = store.private(FOLDER);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(IoError::new("list", &folder, source).into()),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.on("list", &folder)?.path();
        let hex = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let digest = Digest::from_hex(hex).ok();
        let is_kept = |digest: &Digest| {
            let part = folder.join(digest.hex());
            is_needed(digest) && part.exists() || is_read(&part)
        };
        if digest.as_ref().is_some_and(is_kept) {
            continue;
        }
        let data = fs::symlink_metadata(&path).on("stat", &path)?;
        if !data.is_dir() {
            found.push((path, data.blocks().saturating_mul(512)));
        }
    }
    Ok(found)
}

/// Whether a process reads from the file.
fn is_read(part: &Path) -> bool {
    match file::open_regular(part, Links::Refused) {
        Ok((file, _)) => file.try_lock().is_err(),
        Err(_) => false,
    }
}
