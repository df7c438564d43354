//! Checks a store: reads everything that exists, and looks for everything that should exist.
//!
//! 1. every blob is hashed, on several threads
//! 2. every entry of `index.json` is followed: manifests parse, and config, layers and subject exist
//! 3. every layer that is an image of a file system is read through its verity tree ("root hash and tree both
//!    there, or both absent; anything else is refused"); every chunk of a layer of many blobs is decoded
//!
//! Unreferenced blobs and temporary files are reported but are not errors: an interrupted build leaves them.
//! Every bad object is listed, not just the first.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::{Store, StoreError, files, partial};
use crate::digest::{Digest, Hasher};
use crate::error::{AnyError, Class, Classified};
use crate::image::LayerError;
use crate::image::check::content;
use crate::image::format::{ChunkedFormat, ChunkedLayer, Chunks, Content, LayerFormat};
use crate::image::index::{Index, UnreadEntry};
use crate::image::oci::{Descriptor, LayerDescriptor, MAX_MANIFEST_BYTES, Manifest, OciImage};
use crate::image::source::ReadError;
use crate::image::verified::VerifiedSource;
use crate::image::verity::{Located, VerityError, locate};
use crate::progress::{Progress, Task};
use crate::sorting;
use crate::sys::locks;
use crate::transport::{OciDir, Transport, TransportError};

/// How deep indexes may nest.
const MAX_DEPTH: usize = 8;

/// The result of a check.
#[derive(Debug, Default)]
pub struct Report {
    /// The problems, each with its object; sorted.
    pub problems: Vec<Problem>,
    /// How many blobs were hashed.
    pub blobs: usize,
    /// Their total size, in bytes.
    pub bytes: u64,
    /// How many names were followed.
    pub names: usize,
    /// How many layers were read through their verity tree.
    pub layers: usize,
    /// Unreferenced blobs. Not an error.
    pub unreachable: Vec<Digest>,
    /// Files left by writers that died, and files that are not blobs. Not an error.
    pub extra_files: Vec<PathBuf>,
    /// Entries of the index that mosfs cannot read, and what they reach is not checked. Not wrong.
    pub unread: Vec<String>,
}

/// A problem.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The content of a blob does not match its name.
    #[error("blob {expected}: its content has digest {found}")]
    Blob {
        /// The blob.
        expected: Digest,
        /// The digest of its content.
        found: Digest,
    },
    /// A blob cannot be read.
    #[error("blob {blob}: {source}")]
    Unreadable {
        /// The blob.
        blob: Digest,
        /// Why.
        source: std::io::Error,
    },
    /// A required blob is missing.
    #[error("{needed_by}: blob {blob} is missing")]
    Missing {
        /// The blob.
        blob: Digest,
        /// What needs it.
        needed_by: String,
    },
    /// The size of a blob differs from its descriptor's.
    #[error("{needed_by}: blob {blob} has {found} bytes, expected {expected}")]
    Size {
        /// The blob.
        blob: Digest,
        /// The size in the descriptor, in bytes.
        expected: u64,
        /// Its size in bytes.
        found: u64,
        /// What needs it.
        needed_by: String,
    },
    /// A manifest, index or layer is malformed.
    #[error("{object}: {why}")]
    Document {
        /// What.
        object: String,
        /// Why.
        why: String,
    },
    /// A layer's verity data is missing, unexpected, or malformed.
    #[error("{object}: layer {layer}: {source}")]
    Verity {
        /// What has the layer.
        object: String,
        /// The layer.
        layer: Digest,
        /// What is wrong.
        source: VerityError,
    },
    /// A layer has a tree, but no root hash to check it against.
    #[error("{object}: layer {layer}: it has a verity tree but no root hash")]
    NoRootHash {
        /// What has the layer.
        object: String,
        /// The layer.
        layer: Digest,
    },
    /// A block of a layer does not match the root hash.
    #[error("{object}: layer {layer}: {source}")]
    Block {
        /// What has the layer.
        object: String,
        /// The layer.
        layer: Digest,
        /// Which block, and its hashes.
        source: ReadError,
    },
    /// The metadata of a layer of many blobs is malformed, or one of the blobs does not decode as expected.
    #[error("{object}: layer {layer}: {source}")]
    Content {
        /// What has the layer.
        object: String,
        /// The layer.
        layer: Digest,
        /// What is wrong.
        source: LayerError,
    },
    /// More of the same, not listed.
    #[error("{object}: layer {layer}: {count} more bad blocks")]
    MoreBlocks {
        /// What has the layer.
        object: String,
        /// The layer.
        layer: Digest,
        /// How many.
        count: u64,
    },
}

/// A store or an image with problems, which were reported one by one.
#[derive(Debug, thiserror::Error)]
#[error("{object}: {count} problems; the first is: {first}")]
pub struct NotWhole {
    /// What was checked.
    pub object: String,
    /// How many problems there are.
    pub count: usize,
    /// The first one.
    pub first: String,
}

impl Classified for NotWhole {
    fn class(&self) -> Class {
        Class::Verification
    }
}

impl Report {
    /// Returns whether there are no problems.
    pub fn is_good(&self) -> bool {
        self.problems.is_empty()
    }

    /// Returns an error if there are problems.
    pub fn verdict(&self, object: &str) -> Result<(), NotWhole> {
        match self.problems.first() {
            None => Ok(()),
            Some(first) => {
                let (object, first) = (object.to_string(), first.to_string());
                Err(NotWhole { object, count: self.problems.len(), first })
            }
        }
    }
}

/// What the entries reach, each object once.
#[derive(Default)]
struct ReachableObjects {
    blobs: BTreeSet<Digest>,
    /// By digest; a layer of many blobs also by its manifest, whose list of chunks is checked with it.
    layers: BTreeMap<(Digest, Option<Digest>), ReachedLayer>,
    documents: BTreeSet<Digest>,
    /// The sizes of blobs according to descriptors, in bytes.
    sizes: BTreeMap<Digest, u64>,
}

/// A layer that was reached first through `object`.
struct ReachedLayer {
    layer: LayerDescriptor,
    /// The chunks that its manifest lists.
    chunks: Arc<Chunks>,
    object: String,
}

/// Checks a whole store, or any other layout in a folder, on up to `threads` threads.
///
/// Holds a store's lock, shared, if it is available, so that no garbage collection interferes.
///
/// # Errors
/// Only if the store cannot be read at all; its problems are in the report.
pub fn check(store: &Store, threads: NonZeroUsize, progress: &Progress) -> Result<Report, StoreError> {
    // A layout of another tool, or a read-only one, has no lock; but then nothing collects garbage in it
    // either.
    let _held = if store.private("lock").exists() { store.hold().ok() } else { None };
    let layout = store.transport();
    let mut report = Report::default();
    let Index { manifests: entries, unread, .. } = layout.index()?;
    let name = |entry: &UnreadEntry| format!("`{}`: {}", entry.ref_name().unwrap_or_default(), entry.why());
    report.unread = unread.iter().map(name).collect();

    let mut blobs = Vec::new();
    for (path, size) in files(&store.dir().join("blobs/sha256"))? {
        match path.file_name().and_then(|name| Digest::from_hex(name.to_str()?).ok()) {
            Some(digest) => blobs.push((digest, size)),
            None => report.extra_files.push(path),
        }
    }
    for folder in ["tmp", partial::FOLDER] {
        report.extra_files.extend(files(&store.private(folder))?.into_iter().map(|(path, _)| path));
    }
    sorting::sort(&mut blobs);
    report.blobs = blobs.len();
    report.bytes = total(&blobs);

    // A first pass determines the expected sizes of blobs: one of another size is wrong and need not be read,
    // however long it claims to be.
    let mut known = ReachableObjects::default();
    for entry in &entries {
        follow(layout, entry, "", &BTreeSet::new(), &mut known, &mut Vec::new());
    }
    let worth: Vec<_> =
        blobs.iter().copied().filter(|blob| is_worth_reading(layout, blob, &known.sizes)).collect();
    let bad = hash_blobs(layout, &worth, threads, progress);
    let broken = sorting::set(bad.iter().map(|(digest, _)| *digest));
    report.problems.extend(bad.into_iter().map(|(_, problem)| problem));

    let mut reached = ReachableObjects::default();
    for entry in &entries {
        let object = match entry.ref_name() {
            Some(name) => {
                report.names += 1;
                format!("`{name}`")
            }
            None => format!("entry {}", entry.digest),
        };
        follow(layout, entry, &object, &broken, &mut reached, &mut report.problems);
    }
    check_layers(layout, &reached, &broken, threads, progress, &mut report);
    report.unreachable =
        blobs.iter().map(|(digest, _)| *digest).filter(|digest| !reached.blobs.contains(digest)).collect();
    Ok(report)
}

/// Checks one image of a layout: its manifest, config and layers.
///
/// # Errors
/// [`TransportError`] if the name cannot be resolved.
pub fn check_image(
    layout: &OciDir,
    manifest: &Descriptor,
    object: &str,
    threads: NonZeroUsize,
    progress: &Progress,
) -> Result<Report, AnyError> {
    let mut report = Report { names: 1, ..Report::default() };
    let mut reached = ReachableObjects::default();
    let none = BTreeSet::new();
    follow(layout, manifest, object, &none, &mut reached, &mut report.problems);
    let mut blobs = Vec::new();
    for digest in &reached.blobs {
        // Missing blobs have already been reported.
        if let Ok((_, size)) = layout.open_blob(digest) {
            blobs.push((*digest, size));
        }
    }
    report.blobs = blobs.len();
    report.bytes = total(&blobs);
    blobs.retain(|blob| is_worth_reading(layout, blob, &reached.sizes));
    let bad = hash_blobs(layout, &blobs, threads, progress);
    report.problems.extend(bad.into_iter().map(|(_, problem)| problem));
    // A broken layer is still read through its tree, to name the bad blocks.
    check_layers(layout, &reached, &none, threads, progress, &mut report);
    Ok(report)
}

/// Returns which of these blobs a store lacks: missing ones, and those with the wrong content.
pub fn lacking(
    store: &Store,
    blobs: &[Descriptor],
    threads: NonZeroUsize,
    progress: &Progress,
) -> BTreeSet<Digest> {
    let (here, gone): (Vec<_>, Vec<_>) = blobs.iter().partition(|blob| store.has(blob));
    let here: Vec<_> = here.into_iter().map(|blob| (blob.digest, blob.size)).collect();
    let bad = hash_blobs(store.transport(), &here, threads, progress);
    bad.into_iter().map(|(digest, _)| digest).chain(gone.into_iter().map(|blob| blob.digest)).collect()
}

/// A file that nothing references is not read beyond a hole of this size, in bytes.
const MOST_SPARSE: u64 = 1 << 30;

/// The bytes of blobs, of which an attacker who wrote the disk can fake any number.
fn total(blobs: &[(Digest, u64)]) -> u64 {
    blobs.iter().fold(0, |sum, (_, size)| sum.saturating_add(*size))
}

/// Whether a blob's content can matter: it has the expected size, or nothing needs it and its bytes are on
/// the disk. (A file of 8 EiB that is one hole takes no space, and years to read.)
fn is_worth_reading(layout: &OciDir, (digest, size): &(Digest, u64), sizes: &BTreeMap<Digest, u64>) -> bool {
    match sizes.get(digest) {
        Some(expected) => expected == size,
        None => std::fs::symlink_metadata(layout.blob_path(digest))
            .is_ok_and(|found| found.blocks().saturating_mul(512).saturating_add(MOST_SPARSE) >= *size),
    }
}

/// Hashes blobs of a layout, and returns the problems of those that are not what their digests say.
fn hash_blobs(
    layout: &OciDir,
    blobs: &[(Digest, u64)],
    threads: NonZeroUsize,
    progress: &Progress,
) -> Vec<(Digest, Problem)> {
    let task = progress.task("verify", &layout.location(), Some(total(blobs)));
    let other = |error: TransportError| std::io::Error::other(error.to_string());
    let bad = other_content(blobs, threads, |digest| {
        let (file, _) = layout.open_blob(digest).map_err(other)?;
        hash(file, &task)
    });
    let problem = |(digest, found)| match found {
        Ok(found) => (digest, Problem::Blob { expected: digest, found }),
        Err(source) => (digest, Problem::Unreadable { blob: digest, source }),
    };
    bad.into_iter().map(problem).collect()
}

/// Hashes blobs, which have these sizes, by `hash`; the largest ones first, so that the threads end together. Returns those
/// with another digest than their own, and those that cannot be read, in the order of their digests.
pub(crate) fn other_content(
    blobs: &[(Digest, u64)],
    threads: NonZeroUsize,
    hash: impl Fn(&Digest) -> std::io::Result<Digest> + Sync,
) -> Vec<(Digest, std::io::Result<Digest>)> {
    let mut order: Vec<_> = blobs.to_vec();
    sorting::sort_by_key(&mut order, |(digest, size)| (std::cmp::Reverse(*size), *digest));
    let (next, bad) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some((digest, _)) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let found = hash(digest);
            if found.as_ref().ok() != Some(digest) {
                locks::lock(&bad).push((*digest, found));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.get().min(order.len().max(1)) {
            scope.spawn(work);
        }
        work();
    });
    let mut bad = locks::into_inner(bad);
    sorting::sort_by_key(&mut bad, |(digest, _)| *digest);
    bad
}

/// Hashes what is left to read of a blob.
pub(crate) fn hash(mut blob: impl Read, task: &Task) -> std::io::Result<Digest> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match blob.read(&mut buffer)? {
            0 => return Ok(hasher.finish()),
            got => {
                hasher.update(buffer.get(..got).unwrap_or_default());
                task.advance(got as u64);
            }
        }
    }
}

/// Follows an entry to all that it reaches.
fn follow(
    layout: &OciDir,
    entry: &Descriptor,
    object: &str,
    broken: &BTreeSet<Digest>,
    reached: &mut ReachableObjects,
    problems: &mut Vec<Problem>,
) {
    let mut todo = vec![(entry.clone(), 0)];
    while let Some((entry, depth)) = todo.pop() {
        let nested = depth > 0;
        if !reach(layout, &entry, object, nested, reached, problems)
            || !reached.documents.insert(entry.digest)
        {
            continue;
        }
        // Its content has already been reported.
        if broken.contains(&entry.digest) || !(entry.is_index() || entry.is_manifest()) {
            continue;
        }
        let mut wrong = |why: String| {
            let object = format!("{object} ({})", entry.digest);
            problems.push(Problem::Document { object, why });
        };
        let bytes = match layout.fetch(&entry, MAX_MANIFEST_BYTES) {
            Ok(bytes) => bytes,
            Err(error) => {
                wrong(error.to_string());
                continue;
            }
        };
        if entry.is_index() {
            match Index::parse(&bytes, MAX_MANIFEST_BYTES) {
                Ok(_) if depth >= MAX_DEPTH => wrong(format!("indexes nest deeper than {MAX_DEPTH}")),
                Ok(index) => todo.extend(index.manifests.into_iter().map(|inner| (inner, depth + 1))),
                Err(error) => wrong(error.to_string()),
            }
            continue;
        }
        let image = match OciImage::parse(&bytes) {
            Ok(image) => image,
            Err(error) => {
                wrong(error.to_string());
                continue;
            }
        };
        let Manifest { config, layers, subject, .. } = image.manifest;
        for blob in layers.iter().chain([&config]).chain(&subject) {
            reach(layout, blob, object, false, reached, problems);
        }
        for layer in image.layers {
            let (chunks, object) = (Arc::clone(&image.chunks), object.to_string());
            let chunked = layer.format().is_ok_and(LayerFormat::is_chunked);
            let key = (layer.digest, chunked.then_some(entry.digest));
            reached.layers.entry(key).or_insert(ReachedLayer { layer, chunks, object });
        }
    }
}

/// Records that a blob is needed; returns whether it exists. Manifests of other platforms in an index may be
/// missing: tools copy one platform and keep the index.
fn reach(
    layout: &OciDir,
    blob: &Descriptor,
    object: &str,
    optional: bool,
    reached: &mut ReachableObjects,
    problems: &mut Vec<Problem>,
) -> bool {
    reached.blobs.insert(blob.digest);
    reached.sizes.insert(blob.digest, blob.size);
    let problem = match layout.open_blob(&blob.digest) {
        Ok((_, size)) if size == blob.size => return true,
        Ok((_, found)) => {
            Problem::Size { blob: blob.digest, expected: blob.size, found, needed_by: object.into() }
        }
        Err(TransportError::BlobMissing { .. }) if optional => return false,
        Err(TransportError::BlobMissing { .. }) => {
            Problem::Missing { blob: blob.digest, needed_by: object.into() }
        }
        Err(error) => Problem::Document { object: object.into(), why: error.to_string() },
    };
    problems.push(problem);
    false
}

/// Reads every layer that has a tree through it, and decodes every layer of many blobs.
fn check_layers(
    layout: &OciDir,
    reached: &ReachableObjects,
    skip: &BTreeSet<Digest>,
    threads: NonZeroUsize,
    progress: &Progress,
    report: &mut Report,
) {
    for ((digest, _), ReachedLayer { layer, chunks, object }) in &reached.layers {
        let Ok(format) = layer.format() else { continue };
        let Ok((file, _)) = layout.open_blob(digest) else { continue };
        let object = object.clone();
        match format.content() {
            Content::Image(_) => {}
            // It was hashed whole.
            Content::Tar(_) => continue,
            Content::Chunked(chunked) => {
                let chunks = Arc::clone(chunks);
                let layer = ChunkedLayer { digest: *digest, size: layer.size, chunks, blobs: layout.blobs() };
                report.layers += 1;
                let bad = check_chunked(chunked, &layer, threads, progress);
                report.problems.extend(bad.into_iter().map(|source| Problem::Content {
                    object: object.clone(),
                    layer: *digest,
                    source,
                }));
                continue;
            }
        }
        match layer.trust.root_hash() {
            Some(root_hash) => {
                report.layers += 1;
                match VerifiedSource::open(file, root_hash) {
                    Ok(source) => {
                        let found = source.verify_all(threads, progress);
                        let more = found.bad_count.saturating_sub(found.bad.len() as u64);
                        report.problems.extend(found.bad.into_iter().map(|source| Problem::Block {
                            object: object.clone(),
                            layer: *digest,
                            source,
                        }));
                        if more > 0 {
                            report.problems.push(Problem::MoreBlocks { object, layer: *digest, count: more });
                        }
                    }
                    Err(source) => report.problems.push(Problem::Verity { object, layer: *digest, source }),
                }
            }
            // Rule (docs/design.md, both or neither).
            None if skip.contains(digest) => {}
            None => match locate(&file) {
                Ok(Located::Absent { .. }) => {}
                Ok(Located::Present(_)) => {
                    report.problems.push(Problem::NoRootHash { object, layer: *digest });
                }
                Err(source) => report.problems.push(Problem::Verity { object, layer: *digest, source }),
            },
        }
    }
}

/// Opens a layer of many blobs, and decodes each. Blobs that are missing or have another digest have already
/// been reported.
fn check_chunked(
    format: ChunkedFormat,
    layer: &ChunkedLayer,
    threads: NonZeroUsize,
    progress: &Progress,
) -> Vec<LayerError> {
    let Some(open) = format.open else { return Vec::new() };
    let mut bad = match open(layer) {
        Ok(opened) => content(&*opened, threads, progress),
        Err(error) => vec![error],
    };
    bad.retain(|error| matches!(error, LayerError::Corrupt { .. }));
    bad
}
