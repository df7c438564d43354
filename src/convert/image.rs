//! A whole image into the store: each layer verified, and all of them file system images.
//!
//! An image whose layers all have verity trees is stored as it is: manifest, config and digest do
//! not change. Of any other image a new manifest is made:
//!
//! - A tar layer is converted; a file system image without a tree gets one.
//! - The config stays, but for `rootfs.diff_ids`: they are the digests of the new layers, since a file system image
//!   is its own uncompressed form (as stacker does it). An artifact's config stays untouched.
//! - Annotations and artifact type stay; `subject` goes, as it spoke of the other manifest.
//!
//! A PuzzleFS image is stored as it is too. Where PuzzleFS is asked for, any other image becomes one:
//! see [`super::puzzlefs::ingest`].
//!
//! The bytes of both depend on the source image alone.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::erofs::{self, Scratch};
use super::job::{Ingest, IngestError, Ingested, Storage, diff_ids, in_layer, with_diff_ids, with_layers};
use super::lower::Lower;
use super::reuse::Source;
use super::{ConvertError, ImageKind, Packing, Ready, TarLayer, convert_tar, examine, inspect, puzzlefs};
use crate::digest::Digest;
use crate::image::format::{Compression, Content, LayerFormat};
use crate::image::oci::{
    Descriptor, LayerDescriptor, MANIFEST, MAX_MANIFEST_BYTES, OciImage, Platform, Trust,
};
use crate::image::overlay::MAX_KERNEL_LAYERS;
use crate::image::squashfs::Superblock;
use crate::image::verified::VerifiedSource;
use crate::image::verity::{self, Sealed};
use crate::sys::failpoint;

/// Checks what can be checked of an image before its layers are fetched: it has layers, of known formats, and no
/// more than each backend can mount.
///
/// # Errors
/// [`OciError::UnknownLayer`](crate::image::oci::OciError::UnknownLayer), [`IngestError::NoLayers`], [`IngestError::TooManyLayers`].
pub fn check_layers(image: &OciImage) -> Result<(), IngestError> {
    image.layers.iter().try_for_each(|layer| layer.format().map(|_| ()))?;
    if image.layers.is_empty() {
        return Err(IngestError::NoLayers { image: image.digest });
    }
    // A layer that is there twice is mounted once.
    let found = image.layers.iter().map(|layer| layer.digest).collect::<HashSet<_>>().len();
    if found > MAX_KERNEL_LAYERS {
        return Err(IngestError::TooManyLayers { image: image.digest, found });
    }
    Ok(())
}

/// Brings an image into the store. What is stored has no name yet.
pub fn ingest(job: &Ingest<'_>, source: &Descriptor) -> Result<Ingested, IngestError> {
    let bytes = job.from.fetch(source, MAX_MANIFEST_BYTES)?;
    let image = OciImage::parse(&bytes)?;
    check_layers(&image)?;
    let config = job.from.fetch(&image.manifest.config, MAX_MANIFEST_BYTES)?;
    if let [rootfs] = &image.layers[..]
        && rootfs.format()?.is_chunked()
    {
        puzzlefs::ingest::keep(job, &image, rootfs)?;
        let writer = job.writer;
        writer.put_bytes(&image.manifest.config.media_type, &config)?;
        let manifest = writer.put_bytes(&source.media_type, &bytes)?;
        return Ok(Ingested { manifest, untouched: true, notes: Vec::new() });
    }
    if job.storage == Storage::Puzzlefs {
        return puzzlefs::ingest::convert(job, &image, config);
    }
    let diff_ids = diff_ids(&image, &config)?;
    if job.effort.packing.kind() == ImageKind::Erofs
        && let Some(at) = image.layers.iter().position(|layer| layer.image().is_none())
    {
        // Before anything is fetched.
        erofs::check_program().map_err(|source| in_layer(&image, at, source.into()))?;
    }

    let (mut layers, kept) = images(job, &image)?;
    let mut notes: Vec<String> = other_platform(&config, job.platform).into_iter().collect();
    notes.extend(kept);
    for (at, layer) in image.layers.iter().enumerate() {
        let Content::Tar(compression) = layer.format()?.content() else { continue };
        let (below, _) = layers.split_at(at);
        let source = Source::new(layer, at, diff_ids.as_deref(), below, job.effort.packing);
        let (stored, said) = job
            .made
            .stored
            .get_or_make(source, |source| tar_layer(job, &image, at, source.diff_id, compression, below))?;
        notes.extend(said.into_iter().map(|note| format!("layer {}: {note}", layer.digest)));
        if let Some(place) = layers.get_mut(at) {
            *place = stored;
        }
    }

    let writer = job.writer;
    if layers == image.layers {
        writer.put_bytes(&image.manifest.config.media_type, &config)?;
        let manifest = writer.put_bytes(&source.media_type, &bytes)?;
        return Ok(Ingested { manifest, untouched: true, notes });
    }
    let new_config = match diff_ids {
        Some(_) => with_diff_ids(&config, &layers)?,
        None => config,
    };
    let layers = layers.iter().map(LayerDescriptor::to_descriptor).collect();
    let manifest = with_layers(&image, writer, &new_config, layers)?;
    let manifest = writer.put_bytes(MANIFEST, &manifest.to_bytes())?;
    Ok(Ingested { manifest, untouched: false, notes })
}

/// Converts a tar layer, and stores the result. Returns the new layer, and what was changed or dropped.
fn tar_layer(
    job: &Ingest<'_>,
    image: &OciImage,
    at: usize,
    diff_id: Option<Digest>,
    compression: Compression,
    below: &[LayerDescriptor],
) -> Result<(LayerDescriptor, Vec<String>), IngestError> {
    let layer = &image.layers[at];
    let tar = TarLayer { digest: layer.digest, size: layer.size, compression, diff_id };
    let temp = job.writer.temp()?;
    let mut lower = Lower::new(job.writer.store(), below);
    let mut below = |path: &[u8]| lower.at(path);
    let from = job.from.open(&layer.to_descriptor(), 0)?;
    let packing = job.effort.packing;
    let converted = match packing.kind() {
        ImageKind::Squashfs => convert_tar(from, &tar, &temp.file, job.effort, &mut below, job.progress),
        ImageKind::Erofs => {
            let other = job.writer.temp()?;
            let folder = other.path().parent().unwrap_or(Path::new("/tmp"));
            let scratch = Scratch { file: &other.file, folder };
            erofs::convert_tar(from, &tar, &temp.file, scratch, job.effort, &mut below, job.progress)
        }
    }
    .map_err(|source| in_layer(image, at, source))?;
    job.writer.commit(temp, &converted.sealed.digest)?;
    failpoint::hit("build.layer.stored");
    Ok((sealed_layer(packing.media_type(), &converted.sealed), converted.notes))
}

/// Stores the layers that are images of file systems, several at a time. Tar layers stay as they are. Returns all
/// layers, and notes.
fn images(job: &Ingest<'_>, image: &OciImage) -> Result<(Vec<LayerDescriptor>, Vec<String>), IngestError> {
    let next = AtomicUsize::new(0);
    // Threads for the layers, and what is left of them for the blocks of each.
    let outer = job.effort.threads.get().min(image.layers.len().max(1));
    let inner = NonZeroUsize::new(job.effort.threads.get() / outer).unwrap_or(NonZeroUsize::MIN);
    let work = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(layer) = image.layers.get(at) else { return Ok(done) };
            if layer.image().is_some() {
                // An error ends this thread alone; the others end after the layer that they are at.
                let stored =
                    job.made.images.get_or_make(layer.clone(), |_| image_layer(job, image, at, inner));
                let stored = stored.inspect_err(|_| next.store(usize::MAX / 2, Ordering::Relaxed))?;
                done.push((at, stored));
            }
        }
    };
    let results: Vec<Result<Vec<_>, IngestError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..outer).map(|_| scope.spawn(work)).collect();
        let mut results = vec![work()];
        results.extend(threads.into_iter().map(|thread| thread.join().unwrap_or(Err(IngestError::Panicked))));
        results
    });
    let mut layers = image.layers.clone();
    let mut notes = BTreeMap::new();
    for result in results {
        for (at, (stored, superblock)) in result? {
            if let Some(layer) = layers.get_mut(at) {
                notes.extend(kept(layer, superblock, job.effort.packing).map(|note| (at, note)));
                *layer = stored;
            }
        }
    }
    Ok((layers, notes.into_values().collect()))
}

/// What to say of an image that is packed otherwise than the publisher chose. `superblock` is that of a squashfs image.
fn kept(layer: &LayerDescriptor, superblock: Option<Superblock>, chosen: Packing) -> Option<String> {
    let default = Packing::default();
    let choice = |packing: Packing| (packing.kind(), packing.codec(), packing.block_bytes());
    if choice(chosen) == choice(default) {
        return None;
    }
    let found = match superblock {
        Some(found) => {
            let same = (ImageKind::Squashfs, found.compressor.name(), found.block_bytes as usize);
            if same == (chosen.kind(), chosen.codec().name(), chosen.block_bytes()) {
                return None;
            }
            format!("squashfs with {} and blocks of {} KiB", found.compressor.name(), found.block_bytes >> 10)
        }
        None => match layer.format().map_or("an image", LayerFormat::name) {
            "erofs" if chosen.kind() == ImageKind::Erofs => return None,
            other => other.to_string(),
        },
    };
    Some(format!("layer {} is already {found}: it is kept as it is", layer.digest))
}

/// Stores one image of a file system, with a tree. Returns the layer, and its superblock if it is squashfs.
fn image_layer(
    job: &Ingest<'_>,
    image: &OciImage,
    at: usize,
    threads: NonZeroUsize,
) -> Result<(LayerDescriptor, Option<Superblock>), IngestError> {
    let wrong = |source| in_layer(image, at, source);
    let layer = &image.layers[at];
    let blob = Descriptor::new(layer.media_type(), layer.digest, layer.size);
    let store = job.writer.store();
    let root_hash = layer.trust.root_hash();
    if root_hash.is_some() && store.has(&blob) {
        let (file, _) = store.transport().open_blob(&layer.digest)?;
        // It is there already, whole or not: what was checked once is checked again before it is signed for.
        let superblock = examine(&file, root_hash, threads, job.progress)
            .and_then(|_| inspect_image(&file, layer, root_hash))
            .map_err(wrong)?;
        return Ok((layer.clone(), superblock));
    }
    let task = job.progress.task("fetch", &layer.digest.to_string(), Some(layer.size));
    let temp = job.writer.receive(job.from, &blob, &task)?;
    drop(task);
    match examine(&temp.file, root_hash, threads, job.progress).map_err(wrong)? {
        Ready::Untouched => {
            let superblock = inspect_image(&temp.file, layer, root_hash).map_err(wrong)?;
            job.writer.commit(temp, &layer.digest)?;
            failpoint::hit("build.layer.stored");
            Ok((layer.clone(), superblock))
        }
        Ready::NeedsTree(image_bytes) => {
            let sealed = verity::seal(&temp.file, image_bytes, threads, job.progress)
                .map_err(|source| wrong(ConvertError::Seal(source)))?;
            let superblock = inspect_image(&temp.file, layer, Some(sealed.root_hash)).map_err(wrong)?;
            job.writer.commit(temp, &sealed.digest)?;
            failpoint::hit("build.layer.stored");
            Ok((sealed_layer(layer.media_type(), &sealed), superblock))
        }
    }
}

fn sealed_layer(media_type: &str, sealed: &Sealed) -> LayerDescriptor {
    LayerDescriptor::new(media_type, sealed.digest, sealed.size_bytes, Trust::RootHash(sealed.root_hash))
}

/// What to say where an image's config names another platform than the system is built for.
fn other_platform(config: &[u8], platform: &Platform) -> Option<String> {
    // An artifact's config names none.
    let other: Platform = serde_json::from_slice(config).ok()?;
    let differs =
        !other.architecture.is_empty() && !other.os.is_empty() && platform.accepts(&other).is_none();
    differs.then(|| {
        format!("the image's config says that it is for {other}, the system is built for {platform}")
    })
}

/// Reads an image of a file system through, where there is a reader for its format. Returns the superblock of squashfs.
fn inspect_image(
    file: &File,
    layer: &LayerDescriptor,
    root_hash: Option<Digest>,
) -> Result<Option<Superblock>, ConvertError> {
    let is_squashfs = layer.image().is_some_and(|format| format.kernel == "squashfs");
    let (Some(root_hash), true) = (root_hash, is_squashfs) else { return Ok(None) };
    let source = VerifiedSource::open(file.try_clone()?, root_hash)
        .map_err(|source| ConvertError::Verity { source })?;
    inspect::squashfs(Arc::new(source)).map(Some)
}
