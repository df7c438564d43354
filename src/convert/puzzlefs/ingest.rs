//! PuzzleFS images into the store: those of others as they are, and those made of other layers.
//!
//! An image that is made keeps config, annotations and artifact type of its source. In an image config `rootfs.diff_ids`
//! is empty: chunks are no layers. So entrypoint, environment and user travel in the place where every tool looks for
//! them; the puzzlefs tool, whose own images have an empty config, does not read it.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Limits, PuzzlefsError, pack};
use crate::convert::job::{Ingest, IngestError, Ingested, diff_ids, in_layer, with_diff_ids, with_layers};
use crate::convert::reuse::Source;
use crate::convert::{ConvertError, Effort, LowerEntry, Packing, TarLayer, examine, lower, write_squashfs};
use crate::error::IoContext;
use crate::image::ReadError;
use crate::image::check;
use crate::image::format::{ChunkedLayer, Content};
use crate::image::layer::Layer;
use crate::image::oci::{Descriptor, LayerDescriptor, MANIFEST, MAX_MANIFEST_BYTES, OciImage};
use crate::image::overlay::Merged;
use crate::image::puzzlefs::{MAX_CHUNK_BYTES, Puzzlefs};
use crate::image::squashfs::Squashfs;
use crate::image::verified::PlainSource;
use crate::store::TempBlob;
use crate::sys::failpoint;

/// Stores the blobs of a PuzzleFS image, and decodes every chunk once. `rootfs` is its one layer.
///
/// # Errors
/// Those of the transport and the store; [`IngestError::Chunks`] where the image makes no sense.
pub fn keep(job: &Ingest<'_>, image: &OciImage, rootfs: &LayerDescriptor) -> Result<(), IngestError> {
    let all = image.manifest.layers.iter().map(|layer| layer.size).sum();
    let task = job.progress.task("fetch", &image.digest.to_string(), Some(all));
    let mut batch = job.writer.batch();
    let mut seen = HashSet::new();
    for blob in image.manifest.layers.iter().filter(|blob| seen.insert(blob.digest)) {
        if image.chunks.has(&blob.digest) && blob.size <= u64::from(MAX_CHUNK_BYTES) {
            // Checked against digest and size on the way.
            let bytes = job.from.fetch(blob, blob.size)?;
            batch.put(&blob.digest, &bytes)?;
            task.advance(blob.size);
        } else {
            job.writer.fetch(job.from, blob, &task)?;
        }
    }
    batch.finish()?;
    drop(task);
    let wrong = |source| IngestError::Chunks { image: image.digest, source };
    let layer = ChunkedLayer {
        digest: rootfs.digest,
        size: rootfs.size,
        chunks: Arc::clone(&image.chunks),
        blobs: job.writer.store().blobs(),
    };
    let opened = Puzzlefs::open(&layer).map_err(wrong)?;
    match check::content(&opened, job.effort.threads, job.progress).into_iter().next() {
        Some(source) => Err(wrong(source)),
        None => Ok(()),
    }
}

/// Makes a PuzzleFS image of an image's layers, and stores it.
///
/// # Errors
/// Those of the layers' conversion, and [`IngestError::Puzzlefs`].
pub fn convert(job: &Ingest<'_>, image: &OciImage, config: Vec<u8>) -> Result<Ingested, IngestError> {
    let diff_ids = diff_ids(image, &config)?;
    let mut notes = Vec::new();
    let mut layers: Vec<Arc<dyn Layer>> = Vec::new();
    for (at, layer) in image.layers.iter().enumerate() {
        let (below, _) = image.layers.split_at(at);
        let source = Source::new(layer, at, diff_ids.as_deref(), below, Packing::temporary());
        let open = |source: &Source| open_layer(job, image, at, source, &layers);
        let (opened, said) = match job.made.is_shared(&layer.digest) {
            true => job.made.opened.get_or_make(source, open)?,
            false => open(&source)?,
        };
        notes.extend(said.into_iter().map(|note| format!("layer {}: {note}", layer.digest)));
        layers.push(opened);
    }
    let view = Merged::new(layers).map_err(PuzzlefsError::Tree)?;
    let packed = pack(&view, job.writer, Limits::default(), job.effort.threads, job.progress)?;
    failpoint::hit("build.layer.stored");
    notes
        .push("times are not stored: PuzzleFS has none, and every file shows 1970-01-01 00:00:00 UTC".into());

    let writer = job.writer;
    let new_config = match diff_ids {
        Some(_) => with_diff_ids(&config, &[])?,
        None => config,
    };
    let manifest = with_layers(image, writer, &new_config, packed.layers)?;
    let bytes = manifest.to_bytes();
    if bytes.len() as u64 > MAX_MANIFEST_BYTES {
        let chunks = manifest.layers.len() - 1;
        return Err(PuzzlefsError::TooLarge { chunks, max_bytes: MAX_MANIFEST_BYTES }.into());
    }
    let manifest = writer.put_bytes(MANIFEST, &bytes)?;
    Ok(Ingested { manifest, untouched: false, notes })
}

/// One layer of the source, opened from a temporary file, and what was changed or dropped.
fn open_layer(
    job: &Ingest<'_>,
    image: &OciImage,
    at: usize,
    made_of: &Source,
    below: &[Arc<dyn Layer>],
) -> Result<(Arc<dyn Layer>, Vec<String>), IngestError> {
    let layer = &made_of.layer;
    let wrong = |source| in_layer(image, at, source);
    let unreadable = |source| wrong(ConvertError::Below { layer: layer.digest, source: Box::new(source) });
    let format = layer.format()?;
    // Nobody else has the temporary file: it is written or checked here, and loses its name when `temp` is dropped.
    let source = |temp: &TempBlob| -> Result<Arc<PlainSource>, IngestError> {
        let file = temp.file.try_clone().on("open", temp.path())?;
        let source = PlainSource::unsafe_no_verity(file);
        Ok(Arc::new(source.map_err(|source: ReadError| unreadable(source.into()))?))
    };
    match format.content() {
        Content::Tar(compression) => {
            let temp = job.writer.temp()?;
            let tar =
                TarLayer { digest: layer.digest, size: layer.size, compression, diff_id: made_of.diff_id };
            let effort = Effort { packing: made_of.packing, ..job.effort };
            let mut from = job.from.open(&layer.to_descriptor(), 0)?;
            let view = match below {
                [] => None,
                _ => Some(Merged::new(below.to_vec()).map_err(PuzzlefsError::Tree)?),
            };
            let mut below = |path: &[u8]| match &view {
                Some(view) => lower::under(view, &made_of.below, path),
                None => Ok(LowerEntry::Nothing),
            };
            let (_, notes) = write_squashfs(&mut from, &tar, &temp.file, effort, &mut below, job.progress)
                .map_err(wrong)?;
            let opened = Squashfs::open(source(&temp)?).map_err(unreadable)?;
            Ok((Arc::new(opened), notes))
        }
        Content::Image(image) => {
            let no_reader = PuzzlefsError::NoReader { layer: layer.digest, format: format.name() };
            let open = image.open.ok_or(no_reader)?;
            let blob = Descriptor::new(layer.media_type(), layer.digest, layer.size);
            let task = job.progress.task("fetch", &layer.digest.to_string(), Some(layer.size));
            let temp = job.writer.receive(job.from, &blob, &task)?;
            let root_hash = layer.trust.root_hash();
            examine(&temp.file, root_hash, job.effort.threads, job.progress).map_err(wrong)?;
            Ok((open(source(&temp)?).map_err(unreadable)?, Vec::new()))
        }
        // Such an image is kept as it is.
        Content::Chunked(_) => {
            Err(PuzzlefsError::NoReader { layer: layer.digest, format: format.name() }.into())
        }
    }
}
