//! File content into squashfs data blocks: split, compressed on many threads, written in order.
//!
//! ```text
//! this thread: split ─┬─> jobs ──> N workers: compress ──┐
//!                     └─> order of results ──────────────┴─> one thread: write
//! ```
//!
//! What lies where depends on the order of the content alone, never on the threads: the same
//! input yields the same bytes for any N. Memory: a few blocks a thread, as both queues are bounded.
//!
//! A file smaller than a block shares a fragment block with its neighbours; the tail of a larger
//! one is a short block of its own (mksquashfs' default). A small file with the content of an earlier one
//! takes its place in the fragment. A block of zeros is not stored.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::packing::{Compressor, Packing};
use super::tar::Content;
use super::{ConvertError, Effort, MAX_METADATA_BYTES};
use crate::digest::Digest;
use crate::image::squashfs::BLOCK_STORED;

/// Where the content of a regular file is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct FileData {
    /// Its size with holes, in bytes.
    pub size: u64,
    /// Its blocks: 0 is a hole, else 1 + the number of a stored block. All but the last are
    /// as long as the image's blocks, and the numbers of one file follow each other.
    pub blocks: Vec<u32>,
    /// For a small file: the number of its fragment, and where in it the content begins.
    pub fragment: Option<(u32, u32)>,
}

/// Where a stored block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    /// Offset in the image, in bytes.
    pub start: u64,
    /// Size in bytes, and [`BLOCK_STORED`].
    pub word: u32,
}

/// All blocks of an image.
#[derive(Debug, Default)]
pub(super) struct Packed {
    /// The data blocks by their number.
    pub blocks: Vec<Stored>,
    /// The fragment blocks by their number.
    pub fragments: Vec<Stored>,
    /// Where the next byte of the image goes.
    pub end: u64,
}

struct Job {
    data: Vec<u8>,
    done: SyncSender<io::Result<Vec<u8>>>,
}

/// A block on its way to the file, in the order of the file.
struct Pending {
    done: Receiver<io::Result<Vec<u8>>>,
    plain_bytes: usize,
    fragment: bool,
}

/// Packs the content of files.
pub(super) struct Packer {
    jobs: Option<SyncSender<Job>>,
    order: Option<SyncSender<Pending>>,
    workers: Vec<JoinHandle<()>>,
    writer: Option<JoinHandle<io::Result<Packed>>>,
    /// Size of a block, in bytes.
    block_bytes: usize,
    next_block: u32,
    next_fragment: u32,
    fragment: Vec<u8>,
    list_bytes: u64,
    /// Where the content of each small file is, by its digest.
    small: HashMap<Digest, (u32, u32)>,
}

impl Packer {
    /// A packer that writes to `file` from offset `start` on.
    pub(super) fn new(file: File, start: u64, effort: Effort) -> io::Result<Self> {
        let Effort { threads, packing } = effort;
        let block_bytes = packing.block_bytes();
        let (jobs, queue) = sync_channel::<Job>(threads.get());
        let (order, results) = sync_channel::<Pending>(threads.get() * 4);
        let queue = Arc::new(Mutex::new(queue));
        let mut packer = Self {
            jobs: Some(jobs),
            order: Some(order),
            workers: Vec::new(),
            writer: None,
            block_bytes,
            next_block: 0,
            next_fragment: 0,
            fragment: Vec::with_capacity(block_bytes),
            list_bytes: 0,
            small: HashMap::new(),
        };
        for number in 0..threads.get() {
            let queue = Arc::clone(&queue);
            let worker = std::thread::Builder::new().name(format!("compress-{number}"));
            packer.workers.push(worker.spawn(move || compress_all(&queue, packing))?);
        }
        let writer = std::thread::Builder::new().name("write".into());
        packer.writer = Some(writer.spawn(move || write_all(&results, &file, start))?);
        Ok(packer)
    }

    /// Begins a file of `size` bytes.
    pub(super) fn file(&mut self, size: u64) -> Result<FileWriter<'_>, ConvertError> {
        let block_bytes = self.block_bytes as u64;
        self.list_bytes = self.list_bytes.saturating_add(size.div_ceil(block_bytes).saturating_mul(4));
        if self.list_bytes > MAX_METADATA_BYTES {
            return Err(ConvertError::TooMuch { path: String::new(), entries: 0, bytes: self.list_bytes });
        }
        let small = size < block_bytes;
        if small && self.fragment.len() as u64 + size > block_bytes {
            self.flush_fragment()?;
        }
        let mut data = FileData { size, ..FileData::default() };
        if small && size > 0 {
            data.fragment = Some((self.next_fragment, self.fragment.len() as u32));
        }
        Ok(FileWriter { packer: self, data, small, block: Vec::new() })
    }

    fn flush_fragment(&mut self) -> Result<(), ConvertError> {
        if !self.fragment.is_empty() {
            let full = std::mem::replace(&mut self.fragment, Vec::with_capacity(self.block_bytes));
            self.submit(full, true)?;
            self.next_fragment += 1;
        }
        Ok(())
    }

    fn submit(&mut self, data: Vec<u8>, fragment: bool) -> Result<(), ConvertError> {
        let (done, result) = sync_channel(1);
        let pending = Pending { done: result, plain_bytes: data.len(), fragment };
        let sent = self.order.as_ref().is_some_and(|order| order.send(pending).is_ok())
            && self.jobs.as_ref().is_some_and(|jobs| jobs.send(Job { data, done }).is_ok());
        // Only a writer that failed closes its queue: its error is the one to report.
        if sent {
            Ok(())
        } else {
            Err(ConvertError::Write(
                self.join().err().unwrap_or_else(|| io::Error::other("a thread ended early")),
            ))
        }
    }

    /// Writes what is left and waits for all threads.
    pub(super) fn finish(mut self) -> Result<Packed, ConvertError> {
        self.flush_fragment()?;
        self.join().map_err(ConvertError::Write)
    }

    fn join(&mut self) -> io::Result<Packed> {
        (self.jobs, self.order) = (None, None);
        let panicked = |_| io::Error::other("a thread panicked");
        let written = self.writer.take().map(|thread| thread.join().map_err(panicked));
        for worker in self.workers.drain(..) {
            worker.join().map_err(panicked)?;
        }
        written.ok_or_else(|| io::Error::other("written already"))??
    }
}

impl Drop for Packer {
    fn drop(&mut self) {
        // After an error: let no thread outlive its packer.
        let _ = self.join();
    }
}

/// Takes the content of one file.
pub(super) struct FileWriter<'a> {
    packer: &'a mut Packer,
    data: FileData,
    small: bool,
    block: Vec<u8>,
}

impl FileWriter<'_> {
    /// The next stretch of content. All of them together have the file's size.
    pub(super) fn write(&mut self, content: Content<'_>) -> Result<(), ConvertError> {
        match content {
            Content::Data(bytes) => self.data(bytes),
            Content::Hole(count) => self.hole(count),
        }
    }

    fn data(&mut self, mut bytes: &[u8]) -> Result<(), ConvertError> {
        if self.small {
            self.packer.fragment.extend_from_slice(bytes);
            return Ok(());
        }
        let block_bytes = self.packer.block_bytes;
        while !bytes.is_empty() {
            if self.block.capacity() == 0 {
                self.block.reserve_exact(block_bytes);
            }
            let (now, later) = bytes.split_at(bytes.len().min(block_bytes - self.block.len()));
            self.block.extend_from_slice(now);
            bytes = later;
            self.flush_if(block_bytes)?;
        }
        Ok(())
    }

    fn hole(&mut self, mut count: u64) -> Result<(), ConvertError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        let block_bytes = self.packer.block_bytes as u64;
        while count > 0 {
            if !self.small && self.block.is_empty() && count >= block_bytes {
                // Bounded by `list_bytes`.
                let holes = count / block_bytes;
                self.data.blocks.resize(self.data.blocks.len() + holes as usize, 0);
                count %= block_bytes;
                continue;
            }
            let now = count.min(ZEROS.len() as u64);
            self.data(&ZEROS[..now as usize])?;
            count -= now;
        }
        Ok(())
    }

    /// Hands on the block if it is at least that long.
    fn flush_if(&mut self, length: usize) -> Result<(), ConvertError> {
        if self.block.len() < length || self.block.is_empty() {
            return Ok(());
        }
        if is_zero(&self.block) {
            self.data.blocks.push(0);
            self.block.clear();
            return Ok(());
        }
        let block = std::mem::take(&mut self.block);
        self.packer.submit(block, false)?;
        self.packer.next_block += 1;
        self.data.blocks.push(self.packer.next_block);
        Ok(())
    }

    /// Ends the file.
    pub(super) fn finish(mut self) -> Result<FileData, ConvertError> {
        self.flush_if(1)?;
        if let Some(place) = &mut self.data.fragment {
            let content = self.packer.fragment.get(place.1 as usize..).unwrap_or_default();
            match self.packer.small.entry(Digest::of(content)) {
                Entry::Occupied(earlier) => {
                    self.packer.fragment.truncate(place.1 as usize);
                    *place = *earlier.get();
                }
                Entry::Vacant(first) => {
                    first.insert(*place);
                }
            }
        }
        Ok(self.data)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // Most blocks differ early; then 32 bytes at a time, which the compiler makes vectors of.
    bytes.chunks(32).all(|chunk| chunk.iter().fold(0, |or, byte| or | byte) == 0)
}

/// A worker: compresses blocks until the queue is closed.
fn compress_all(queue: &Mutex<Receiver<Job>>, packing: Packing) {
    let mut compressor = packing.compressor();
    loop {
        let job = match queue.lock() {
            Ok(queue) => queue.recv(),
            Err(_) => return,
        };
        let Ok(Job { data, done }) = job else { return };
        let result = match &mut compressor {
            Ok(compressor) => compress(compressor, data),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        // The writer is gone only after an error of its own.
        let _ = done.send(result);
    }
}

/// The block compressed, or as it is where that saves nothing.
fn compress(compressor: &mut Compressor, data: Vec<u8>) -> io::Result<Vec<u8>> {
    Ok(compressor.compress(&data)?.unwrap_or(data))
}

fn write_all(results: &Receiver<Pending>, file: &File, start: u64) -> io::Result<Packed> {
    let mut packed = Packed { end: start, ..Packed::default() };
    while let Ok(pending) = results.recv() {
        let gone = |_| io::Error::other("a compressing thread ended early");
        let bytes = pending.done.recv().map_err(gone)??;
        file.write_all_at(&bytes, packed.end)?;
        let plain = if bytes.len() == pending.plain_bytes { BLOCK_STORED } else { 0 };
        let stored = Stored { start: packed.end, word: bytes.len() as u32 | plain };
        if pending.fragment { &mut packed.fragments } else { &mut packed.blocks }.push(stored);
        packed.end += bytes.len() as u64;
    }
    Ok(packed)
}
