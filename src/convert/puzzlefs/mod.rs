//! A merged view into a PuzzleFS image: metadata and chunks.
//!
//! ```text
//! view ─> plan: numbers, order ─┬─> content, one stream ─> cut ─┬─> N threads: compress, hash ─┐
//!                               │                               └─> order of chunks ───────────┴─> store
//!                               └─> metadata, when all chunks are known
//! ```
//! Layers are merged before they are packed: the view is the one that a mount shows, so a PuzzleFS image has the
//! tree that the same layers show as squashfs. One list of inodes is written, and no whiteouts.
//!
//! # Content
//! All files make one stream ([`plan`]), which FastCDC cuts: 16 KiB at least, 64 KiB on average, 256 KiB at most,
//! normalisation 1, no seed. A chunk is stored compressed ([`compress`]), or as it is where that is not smaller or the
//! compressed form exceeds 128 KiB. Every one of these numbers decides about digests: the same tree gives the same
//! chunks in every version and in the puzzlefs tool, so they are stored and moved once.
//!
//! Nothing depends on a clock or on the number of threads.

pub mod compress;
pub mod fsverity;
pub mod ingest;
mod metadata;
pub(super) mod plan;

use std::collections::HashSet;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use fastcdc::v2020::StreamCDC;

use self::compress::Compressor;
use self::plan::{Content, Plan};
use super::tree::MAX_ENTRIES;
use crate::digest::Digest;
use crate::error::{Class, Classified};
use crate::image::LayerError;
use crate::image::oci::{Descriptor, MAX_MANIFEST_BYTES};
use crate::image::overlay::{Merged, OverlayError};
use crate::image::puzzlefs::{FILEDATA_ZSTD, ROOTFS, VERITY_ANNOTATION};
use crate::progress::Progress;
use crate::store::{StoreError, Writer};
use crate::sys::locks;

/// The smallest chunk but the last, in bytes.
const MIN_CHUNK: usize = 16 << 10;
/// The average that the cuts aim at, in bytes.
const AVERAGE_CHUNK: usize = 64 << 10;
/// The largest chunk, in bytes.
const MAX_CHUNK: usize = 256 << 10;
/// What stays of the largest manifest for anything but chunks, in bytes: config, annotations.
const MANIFEST_REST_BYTES: u64 = 64 << 10;
/// The fewest bytes that a chunk takes in a manifest.
const CHUNK_ENTRY_BYTES: u64 = 156;

/// A chunk of the stream.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    /// SHA-256 of the stored bytes.
    digest: Digest,
    /// fs-verity's digest of the stored bytes.
    verity: Digest,
    decoded_bytes: u32,
    stored_bytes: u32,
    compressed: bool,
}

/// An image that is in the store.
#[derive(Debug)]
pub struct Packed {
    /// The layers of its manifest: the metadata, then each chunk once, in the order of the stream.
    pub layers: Vec<Descriptor>,
}

/// How large an image may be.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The largest manifest, in bytes.
    pub max_manifest_bytes: u64,
    /// The most files.
    pub max_files: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_manifest_bytes: MAX_MANIFEST_BYTES, max_files: MAX_ENTRIES }
    }
}

/// Packs a view into the store.
///
/// # Errors
/// See [`PuzzlefsError`]; blobs that were stored by then have no name.
pub fn pack(
    view: &Merged,
    writer: &Writer<'_>,
    limits: Limits,
    threads: NonZeroUsize,
    progress: &Progress,
) -> Result<Packed, PuzzlefsError> {
    let mut plan = Plan::new(view, limits.max_files)?;
    let files = std::mem::take(&mut plan.files);
    let content_bytes = files.iter().map(|(_, size)| size).sum();
    let task = progress.task("pack", "puzzlefs", Some(content_bytes));
    let mut content = Content::new(view, files);
    let cut = StreamCDC::new(&mut content, MIN_CHUNK, AVERAGE_CHUNK, MAX_CHUNK);
    let cut = cut.map(|chunk| {
        let chunk = chunk.map_err(|error| PuzzlefsError::Cut(io::Error::other(error.to_string())))?;
        task.advance(chunk.data.len() as u64);
        Ok(chunk.data)
    });
    let stored = store_all(cut, writer, limits, threads);
    // What the stream failed of explains the rest.
    if let Some(error) = content.failed.take() {
        return Err(error);
    }
    let (chunks, listed) = stored?;
    let metadata = metadata::write(&plan, &chunks)?;
    let mut rootfs = writer.put_bytes(ROOTFS, &metadata)?;
    rootfs.annotations.insert(VERITY_ANNOTATION.into(), fsverity::digest(&metadata).hex());
    let mut layers = vec![rootfs];
    layers.extend(listed);
    Ok(Packed { layers })
}

/// A chunk on its way.
struct Job {
    data: Vec<u8>,
    done: SyncSender<Outcome>,
}

type Outcome = io::Result<(Chunk, Vec<u8>)>;

/// Compresses and stores chunks. Returns all of the stream, and each once, as a manifest lists it.
fn store_all(
    chunks: impl Iterator<Item = Result<Vec<u8>, PuzzlefsError>>,
    writer: &Writer<'_>,
    limits: Limits,
    threads: NonZeroUsize,
) -> Result<(Vec<Chunk>, Vec<Descriptor>), PuzzlefsError> {
    let (jobs, queue) = sync_channel::<Job>(threads.get());
    let (order, results) = sync_channel::<Receiver<Outcome>>(threads.get() * 4);
    let queue = Mutex::new(queue);
    std::thread::scope(|scope| {
        for number in 0..threads.get() {
            let worker = std::thread::Builder::new().name(format!("compress-{number}"));
            worker.spawn_scoped(scope, || compress_all(&queue)).map_err(PuzzlefsError::Cut)?;
        }
        let storing = std::thread::Builder::new().name("store".into());
        let storing = storing
            .spawn_scoped(scope, move || store_in_order(&results, writer, limits))
            .map_err(PuzzlefsError::Cut)?;
        let mut failed = None;
        for chunk in chunks {
            let (done, outcome) = sync_channel(1);
            let data = match chunk {
                Ok(data) => data,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            };
            // Only the storing thread closes its queue early: its error is the one to report.
            if order.send(outcome).is_err() || jobs.send(Job { data, done }).is_err() {
                break;
            }
        }
        drop((jobs, order));
        let stored = storing.join().unwrap_or(Err(PuzzlefsError::Panicked));
        match failed {
            Some(error) => Err(error),
            None => stored,
        }
    })
}

fn compress_all(queue: &Mutex<Receiver<Job>>) {
    let mut compressor = Compressor::new();
    loop {
        let job = locks::lock(queue).recv();
        let Ok(Job { data, done }) = job else { return };
        let outcome = match &mut compressor {
            Ok(compressor) => compressor.compress(&data).map(|compressed| chunk(data, compressed)),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        // The storing thread is gone only after an error of its own.
        let _ = done.send(outcome);
    }
}

fn chunk(data: Vec<u8>, compressed: Option<Vec<u8>>) -> (Chunk, Vec<u8>) {
    let decoded_bytes = data.len() as u32;
    let (stored, compressed) = match compressed {
        Some(stored) => (stored, true),
        None => (data, false),
    };
    let chunk = Chunk {
        digest: Digest::of(&stored),
        verity: fsverity::digest(&stored),
        decoded_bytes,
        stored_bytes: stored.len() as u32,
        compressed,
    };
    (chunk, stored)
}

fn store_in_order(
    results: &Receiver<Receiver<Outcome>>,
    writer: &Writer<'_>,
    limits: Limits,
) -> Result<(Vec<Chunk>, Vec<Descriptor>), PuzzlefsError> {
    let mut batch = writer.batch();
    let (mut chunks, mut listed, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
    while let Ok(outcome) = results.recv() {
        let (chunk, stored) =
            outcome.recv().map_err(|_| PuzzlefsError::Panicked)?.map_err(PuzzlefsError::Cut)?;
        chunks.push(chunk);
        if !seen.insert(chunk.digest) {
            continue;
        }
        batch.put(&chunk.digest, &stored)?;
        listed.push(Descriptor::new(FILEDATA_ZSTD, chunk.digest, chunk.stored_bytes.into()));
        let least = listed.len() as u64 * CHUNK_ENTRY_BYTES + MANIFEST_REST_BYTES;
        if least > limits.max_manifest_bytes {
            let max_bytes = limits.max_manifest_bytes;
            return Err(PuzzlefsError::TooLarge { chunks: listed.len(), max_bytes });
        }
    }
    batch.finish()?;
    Ok((chunks, listed))
}

/// Why an image cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PuzzlefsError {
    /// The layers of the source do not make a tree, or cannot be read.
    #[error(transparent)]
    Tree(#[from] OverlayError),
    /// The content of the source cannot be read.
    #[error(transparent)]
    Content(LayerError),
    /// A file of the source has fewer bytes than it says.
    #[error("a file of {size} bytes has less content")]
    Short {
        /// What it says.
        size: u64,
    },
    /// There is no reader for a layer of the source.
    #[error("layer {layer}: {format} layers cannot be read here, so they cannot be packed")]
    NoReader {
        /// The layer.
        layer: Digest,
        /// Its format.
        format: &'static str,
    },
    /// The manifest would be larger than what registries and mosfs take.
    #[error(
        "the image has too many chunks for one manifest: {chunks} or more need over {max_bytes} bytes, \
         which is the largest manifest (about 26,000 chunks, 1.7 GB of files)"
    )]
    TooLarge {
        /// How many chunks there were when it was clear.
        chunks: usize,
        /// The largest manifest, in bytes.
        max_bytes: u64,
    },
    /// The metadata would be larger than what is read.
    #[error("the image's metadata is larger than the {max} bytes allowed")]
    Metadata {
        /// The bound, in bytes.
        max: u64,
    },
    /// There are more files than an image may have.
    #[error("the image has more than {max} files")]
    TooMuch {
        /// The bound.
        max: usize,
    },
    /// The stream cannot be cut or compressed.
    #[error("cannot make chunks: {0}")]
    Cut(io::Error),
    /// The store does not take it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A defect.
    #[error("a thread that made chunks panicked")]
    Panicked,
}

impl Classified for PuzzlefsError {
    fn class(&self) -> Class {
        match self {
            // The author of the import manifest has to resolve it.
            Self::TooLarge { .. } | Self::Metadata { .. } | Self::TooMuch { .. } | Self::NoReader { .. } => {
                Class::Input
            }
            Self::Store(error) => error.class(),
            _ => Class::Failure,
        }
    }
}
