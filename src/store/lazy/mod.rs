//! Images whose blobs come from another place as they are read.
//!
//! ```text
//! part.rs   the file of a blob that is here in parts; its holes are the map    DIR/.mosfs/lazy/HEX
//! link.rs   the place that missing bytes come from, and how long it is waited for
//! blob.rs   reads of one such blob
//! flight.rs bytes that are being fetched, and who waits for them
//! list.rs   what a program reads first, recorded before
//! fill.rs   what is fetched while nobody waits for it
//! record.rs what is read of an image, noted for a list
//! ```
//!
//! A [`LazyImage`] is a place of blobs ([`Blobs`]) like a store: a mount reads from it and verifies what it gets, each
//! block against the hash tree, each chunk by its digest. Nothing that the place sends is believed. A blob that is
//! whole, and has its digest, becomes a blob of the store; a partial one is never visible by name.
//!
//! Rule: sizes are a server's word until the content has its digest, so memory is taken for none before it was compared
//! with a bound: [`MAX_LAYER_BYTES`], and those of the format for metadata and chunks.
//!
//! Several processes may read one blob: they share the file. One of them completes it.

mod blob;
mod fill;
mod flight;
mod link;
mod list;
mod part;
mod record;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub use list::{LIST_TYPE, MAX_LIST_BYTES, ReadList};
pub(super) use part::{FOLDER, unneeded};
#[cfg(feature = "registry")]
pub use record::Recorder;

use self::blob::LazyBlob;
use self::fill::Fill;
use self::flight::{Fetched, Flight};
use self::link::{Link, LinkError, Urgency};
use self::part::{BLOCK, Part};
use super::{Store, StoreError};
use crate::digest::Digest;
use crate::error::IoContext;
use crate::image::blobs::{Blob, BlobError, BlobFolder, BlobProgress, Blobs, read_whole};
use crate::image::bytes::may_wait;
use crate::image::format::LayerFormat;
use crate::image::oci::{Descriptor, OciImage};
use crate::image::puzzlefs::{MAX_CHUNK_BYTES, MAX_METADATA_BYTES};
use crate::image::verity::Geometry;
use crate::sys::flock::Lock;
use crate::sys::locks::lock;
use crate::transport::{Transport, TransportError};

/// The largest layer that is fetched while it is read, in bytes: its map takes 32 MiB of memory.
const MAX_LAYER_BYTES: u64 = 1 << 40;
/// The first bytes of a layer that are fetched before it is opened: its superblock.
const HEAD: u64 = 128 << 10;
/// What is fetched of its end beside the hash tree: a file system's tables are there.
const TABLES: u64 = 512 << 10;
/// The most that is fetched of its end before it is opened.
const MOST_TAIL: u64 = 4 << 20;
/// How much of a list is fetched before the image is opened, in bytes; the rest comes while it is used.
const LIST_FIRST: u64 = 2 << 20;
/// Connections for what is fetched before the image is opened.
const AT_ONCE: usize = 8;
/// How often a chunk that has another digest is fetched.
const CHUNK_TRIES: u32 = 3;

/// How an image is fetched.
pub struct LazyOptions {
    /// How long a reader waits for bytes.
    pub patience: Duration,
    /// Whether all of the image is fetched in the background.
    pub fill: bool,
    /// What to fetch first.
    pub list: Option<ReadList>,
    /// Called once, in the process that serves the image, when all of its blobs are in the store.
    pub complete: Option<Box<dyn Fn() + Send + Sync>>,
}

/// An image whose blobs come from another place as they are read, and are kept in a store.
pub struct LazyImage {
    shared: Arc<Shared>,
}

/// What the threads of an image share.
struct Shared {
    store: Store,
    folder: BlobFolder,
    link: Arc<Link>,
    /// The layers that are one blob and were not in the store, the bottom one first.
    blobs: Vec<Lazy>,
    /// The chunks that were not in the store, with their descriptors.
    chunks: BTreeMap<Digest, Descriptor>,
    chunk_flights: Mutex<HashMap<Digest, Arc<Flight>>>,
    fill: Arc<Fill>,
    complete: Option<Box<dyn Fn() + Send + Sync>>,
}

/// A layer that is here in parts.
struct Lazy {
    blob: Arc<LazyBlob>,
    root_hash: Option<Digest>,
    /// Held by the process that completes the blob.
    fill_lock: Mutex<Option<Lock>>,
}

impl LazyImage {
    /// Opens an image of `from` whose manifest is known. What is in `store` is used, the rest is fetched into it.
    ///
    /// Nothing is fetched yet, and no thread is started ([`LazyImage::warm`], [`Blobs::start`]).
    ///
    /// # Errors
    /// [`TransportError::TooBig`]; those of the store's files.
    pub fn open(
        store: &Store,
        from: Box<dyn Transport>,
        image: &OciImage,
        options: LazyOptions,
    ) -> Result<Self, StoreError> {
        // A daemon leaves its working folder.
        let dir = std::path::absolute(store.dir()).on("find", store.dir())?;
        let store = &Store::open_with(&dir, store.layout.links())?;
        let link = Arc::new(Link::new(from, options.patience));
        let fill = Arc::new(Fill::new(options.fill));
        let mut blobs: Vec<Lazy> = Vec::new();
        for layer in &image.layers {
            let descriptor = Descriptor::new(layer.media_type(), layer.digest, layer.size);
            let is_known = blobs.iter().any(|lazy| lazy.blob.part().blob().digest == layer.digest);
            if is_known || store.has(&descriptor) || layer.format().is_ok_and(LayerFormat::is_chunked) {
                continue;
            }
            check_size(&descriptor, MAX_LAYER_BYTES)?;
            let (number, queue) = (blobs.len(), Arc::clone(&fill));
            let ahead = Box::new(move |blocks| queue.ahead(number, blocks));
            let blob = Arc::new(LazyBlob::new(Part::open(store, &descriptor)?, Arc::clone(&link), ahead));
            blobs.push(Lazy { blob, root_hash: layer.trust.root_hash(), fill_lock: Mutex::default() });
        }
        let chunked = image.layers.iter().filter(|layer| layer.format().is_ok_and(LayerFormat::is_chunked));
        let listed = chunked
            .map(|layer| (layer.digest, layer.size, MAX_METADATA_BYTES))
            .chain(image.chunks.iter().map(|(digest, size)| (digest, size, MAX_CHUNK_BYTES.into())));
        let mut chunks = BTreeMap::new();
        for (digest, size, max) in listed {
            let descriptor = Descriptor::new("application/octet-stream", digest, size);
            if !store.has(&descriptor) {
                check_size(&descriptor, max)?;
                chunks.insert(digest, descriptor);
            }
        }
        if let Some(list) = &options.list {
            fill.list(list.reads().filter_map(|read| {
                let at = blobs.iter().position(|lazy| lazy.blob.part().blob().digest == read.blob)?;
                let blocks = blobs.get(at)?.blob.part().blocks();
                let end = read.offset.saturating_add(read.len).div_ceil(BLOCK).min(blocks);
                (read.offset / BLOCK < end).then_some((at, read.offset / BLOCK..end))
            }));
        }
        let folder = store.transport().blob_folder();
        let shared = Shared {
            store: store.clone(),
            folder,
            link,
            blobs,
            chunks,
            chunk_flights: Mutex::default(),
            fill,
            complete: options.complete,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Fetches what opening the layers reads, all layers at once: what a list names first, else the beginning and
    /// the end of each, where superblock, tables and hash tree are.
    ///
    /// Errors are left to those who read.
    pub fn warm(&self) {
        let jobs = match self.shared.fill.take_list(LIST_FIRST) {
            listed if !listed.is_empty() => listed,
            _ => self.ends(),
        };
        let next = Mutex::new(jobs.into_iter());
        let work = || {
            while let Some((number, blocks)) = { lock(&next).next() } {
                let Some(lazy) = self.shared.blobs.get(number) else { continue };
                lazy.blob.fetch_likely(blocks);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..AT_ONCE {
                scope.spawn(work);
            }
            work();
        });
    }

    /// The beginning and the end of each layer.
    fn ends(&self) -> Vec<(usize, std::ops::Range<u64>)> {
        let mut jobs = Vec::new();
        for (number, lazy) in self.shared.blobs.iter().enumerate() {
            let (size, blocks) = (lazy.blob.part().blob().size, lazy.blob.part().blocks());
            let tree = Geometry::of_file(size).map_or(0, |found| size - found.data_bytes());
            let tail = (tree + TABLES).min(MOST_TAIL).min(size);
            jobs.push((number, 0..(HEAD / BLOCK).min(blocks)));
            // In pieces, so that several connections carry it.
            let first = (size - tail) / BLOCK;
            let piece = blob::MOST_BYTES / BLOCK;
            jobs.extend(
                (first..blocks).step_by(piece as usize).map(|at| (number, at..(at + piece).min(blocks))),
            );
        }
        jobs
    }
}

impl Shared {
    /// Whether all blobs are in the store.
    fn is_complete(&self) -> bool {
        self.blobs.iter().all(|lazy| lazy.blob.part().is_complete())
            && self.chunks.values().all(|chunk| self.store.has(chunk))
    }

    /// Reads a chunk that is not in the store: one request, whoever needs it.
    fn chunk(&self, chunk: &Descriptor, urgency: Urgency) -> Fetched {
        let (flight, is_ours) = {
            let mut flights = lock(&self.chunk_flights);
            match flights.get(&chunk.digest) {
                Some(flight) => (Arc::clone(flight), false),
                None => {
                    let flight = Arc::<Flight>::default();
                    flights.insert(chunk.digest, Arc::clone(&flight));
                    (flight, true)
                }
            }
        };
        if !is_ours {
            let late = || LinkError::Failed(format!("chunk {} did not come in time", chunk.digest));
            return flight.wait(Instant::now() + self.link.patience() * 2).unwrap_or_else(|| Err(late()));
        }
        let forget = || drop(lock(&self.chunk_flights).remove(&chunk.digest));
        flight.fly(|| self.fetch_chunk(chunk, urgency), forget)
    }

    fn fetch_chunk(&self, chunk: &Descriptor, urgency: Urgency) -> Fetched {
        let mut bytes = vec![0; chunk.size as usize];
        let mut found = None;
        for tries in 0..CHUNK_TRIES {
            self.link.fetch(chunk, 0, &mut bytes, urgency, tries > 0)?;
            let digest = Digest::of(&bytes);
            // Rule (docs/design.md, chunks by digest): what was hashed is what is used.
            if digest == chunk.digest {
                if let Err(error) = self.store.writer().and_then(|writer| writer.put_bytes("", &bytes)) {
                    log::warn!("chunk {} is not kept: {error}", chunk.digest);
                }
                return Ok(Arc::new(bytes));
            }
            found = Some(digest);
        }
        let found = found.map_or(String::new(), |found| found.to_string());
        let place = self.link.from().location();
        let why = format!("{place} sends other bytes: chunk {} has digest {found}", chunk.digest);
        Err(LinkError::Failed(why))
    }
}

impl Blobs for LazyImage {
    fn blob(&self, digest: &Digest, stored_bytes: u64) -> Blob {
        let lazy = self.shared.blobs.iter().find(|lazy| lazy.blob.part().blob().digest == *digest);
        match lazy {
            Some(lazy) if !lazy.blob.part().is_complete() => Blob::Remote {
                place: format!("{digest} in {}", self.shared.link.from().location()),
                bytes: Arc::clone(&lazy.blob) as _,
            },
            _ => self.shared.folder.blob(digest, stored_bytes),
        }
    }

    fn read(&self, digest: &Digest, stored_bytes: u64, bytes: &mut Vec<u8>) -> Result<(), BlobError> {
        let chunk = match self.shared.chunks.get(digest) {
            Some(chunk) if !self.shared.store.has(chunk) => chunk,
            _ => return self.shared.folder.read(digest, stored_bytes, bytes),
        };
        bytes.clear();
        let failed = |source| BlobError::Io { digest: *digest, source };
        if chunk.size != stored_bytes {
            return Err(BlobError::Size { digest: *digest, expected: stored_bytes, found: chunk.size });
        }
        if !may_wait() {
            return Err(failed(io::ErrorKind::WouldBlock.into()));
        }
        let _waiting = self.shared.link.wait();
        let fetched =
            self.shared.chunk(chunk, Urgency::Reader).map_err(|error| failed(io::Error::other(error)))?;
        read_whole(fetched.as_slice(), digest, stored_bytes, bytes)
    }

    fn is_remote(&self) -> bool {
        !self.shared.blobs.is_empty() || !self.shared.chunks.is_empty()
    }

    fn start(&self) -> io::Result<()> {
        fill::start(&self.shared)
    }

    fn progress(&self) -> Vec<BlobProgress> {
        let shared = &self.shared;
        let error = shared.link.last_error();
        let mut all: Vec<_> = shared
            .blobs
            .iter()
            .map(|lazy| {
                let part = lazy.blob.part();
                let state = match () {
                    () if part.is_complete() => "complete",
                    () if shared.fill.differs(&part.blob().digest) => "differs",
                    () if lazy.blob.is_full() => "disk-full",
                    () if shared.link.is_broken() => "offline",
                    () => "partial",
                };
                BlobProgress {
                    digest: part.blob().digest,
                    size: part.blob().size,
                    have: part.have_bytes(),
                    state: state.into(),
                    error: error.clone().filter(|_| !part.is_complete()),
                }
            })
            .collect();
        // All chunks are one row, under the digest of the first.
        if let Some(&digest) = shared.chunks.keys().next() {
            let (mut size, mut have) = (0, 0);
            for chunk in shared.chunks.values() {
                size += chunk.size;
                have += if shared.store.has(chunk) { chunk.size } else { 0 };
            }
            let state = match () {
                () if have == size => "complete",
                () if shared.link.is_broken() => "offline",
                () => "partial",
            };
            let error = error.filter(|_| have < size);
            all.push(BlobProgress { digest, size, have, state: state.into(), error });
        }
        all
    }
}

/// Refuses a size for which more memory would be taken than is allowed.
fn check_size(blob: &Descriptor, max: u64) -> Result<(), TransportError> {
    let Descriptor { digest, size, .. } = *blob;
    if size > max { Err(TransportError::TooBig { digest, size, max }) } else { Ok(()) }
}

impl fmt::Debug for LazyImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LazyImage({})", self.shared.link.from().location())
    }
}
