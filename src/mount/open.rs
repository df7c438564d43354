//! Opens what a plan has for reading in this process.

use std::sync::Arc;

use super::MountError;
use super::kernel::through_device::through_device;
use super::plan::{LayerBytes, MountPlan, Planned, PlannedLayer};
use crate::digest::Digest;
use crate::error::{Class, Classified};
use crate::image::blobs::Blob;
use crate::image::bytes::ReadAt;
use crate::image::format::Content;
use crate::image::layer::{Layer, LayerError};
use crate::image::oci::Trust;
use crate::image::overlay::Merged;
use crate::image::plain;
use crate::image::source::Source;
use crate::image::verified::{PlainSource, VerifiedSource};
use crate::image::verity::{BLOCK_BYTES, Geometry, VerityError};
use crate::sys::file::{Links, open_regular};

/// Opens all that a plan has, as one tree.
///
/// # Errors
/// A layer or a file that cannot be opened or does not verify, or whose format has no reader here.
pub fn open(plan: &MountPlan) -> Result<Merged, MountError> {
    match &plan.content {
        Planned::Image { layers, .. } => {
            let layers = layers.iter().map(open_layer).collect::<Result<_, _>>()?;
            Ok(Merged::new(layers)?)
        }
        Planned::File { file, shown } => Ok(Merged::plain(plain::open(file)?, shown.clone())?),
    }
}

/// What the log calls the layers of a plan, the bottom one first.
pub(super) fn names(plan: &MountPlan) -> Vec<String> {
    match &plan.content {
        Planned::Image { layers, .. } => {
            layers.iter().map(|layer| format!("layer {}", layer.descriptor.digest)).collect()
        }
        Planned::File { file, .. } => vec![file.path.display().to_string()],
    }
}

fn open_layer(layer: &PlannedLayer) -> Result<Arc<dyn Layer>, MountError> {
    let digest = layer.descriptor.digest;
    let cannot_be_mounted =
        || MountError::Format { layer: digest, media_type: layer.descriptor.media_type().to_string() };
    let format = layer.descriptor.format().map_err(|_| cannot_be_mounted())?;
    // Before a file is touched: a format that nobody can read is the user's matter, not the disk's.
    let no_reader = || MountError::NoReader { layer: digest, format: format.name() };
    match (format.content(), &layer.bytes) {
        (Content::Image(image), LayerBytes::One(blob)) => {
            let open = image.open.ok_or_else(no_reader)?;
            let unreadable =
                |source| MountError::LayerRead { layer: digest, place: blob.to_string(), source };
            open(source(layer, blob)?).map_err(unreadable)
        }
        (Content::Chunked(chunked), LayerBytes::Chunks(chunks)) => {
            let open = chunked.open.ok_or_else(no_reader)?;
            let place = chunks.blobs.blob(&digest, chunks.size).to_string();
            open(chunks).map_err(|source| MountError::LayerRead { layer: digest, place, source })
        }
        _ => Err(cannot_be_mounted()),
    }
}

/// Opens bytes that come from another machine. No hash covers the two superblocks that say where things are: if they
/// make no sense, they are fetched again, as a block is that does not verify.
fn open_remote(
    bytes: &Arc<dyn ReadAt>,
    root_hash: Digest,
) -> Result<VerifiedSource<Arc<dyn ReadAt>>, VerityError> {
    loop {
        let error = match VerifiedSource::open(Arc::clone(bytes), root_hash) {
            Err(error) if error.class() == Class::Verification => error,
            opened => return opened,
        };
        const BLOCK: u64 = BLOCK_BYTES as u64;
        let behind = bytes.len().ok().and_then(Geometry::of_file).map(|found| found.data_bytes());
        // Both, whatever the first one says.
        let again = [Some(0), behind].into_iter().flatten().map(|at| bytes.distrust(at, BLOCK));
        if !again.fold(false, |so_far, again| so_far | again) {
            return Err(error);
        }
    }
}

/// The bytes of a layer in one blob, verified where the plan has a root hash for them.
fn source(layer: &PlannedLayer, blob: &Blob) -> Result<Arc<dyn Source>, MountError> {
    let digest = layer.descriptor.digest;
    let unverified =
        |source: VerityError| MountError::LayerVerity { layer: digest, place: blob.to_string(), source };
    let unreadable = |source| MountError::LayerRead {
        layer: digest,
        place: blob.to_string(),
        source: LayerError::Read(source),
    };
    let root_hash = layer.descriptor.trust;
    match blob {
        Blob::File(path) => {
            let (file, _) = open_regular(path, Links::Followed).map_err(|error| MountError::LayerFile {
                layer: digest,
                place: blob.to_string(),
                source: error.source,
            })?;
            match root_hash {
                Trust::RootHash(root_hash) => {
                    let verified = VerifiedSource::open(file, root_hash).map_err(unverified)?;
                    Ok(match through_device(layer, verified) {
                        Ok(device) => Arc::new(device),
                        Err(verified) => Arc::new(verified),
                    })
                }
                Trust::Content | Trust::None => {
                    Ok(Arc::new(PlainSource::unsafe_no_verity(file).map_err(unreadable)?))
                }
            }
        }
        Blob::Remote { bytes, .. } => match root_hash {
            Trust::RootHash(root_hash) => Ok(Arc::new(open_remote(bytes, root_hash).map_err(unverified)?)),
            Trust::Content | Trust::None => {
                Ok(Arc::new(PlainSource::unsafe_no_verity(Arc::clone(bytes)).map_err(unreadable)?))
            }
        },
    }
}
