//! Reads the files of an image in a store, each block verified, without mounting it.

use std::sync::Arc;

use super::Store;
use crate::digest::Digest;
use crate::error::{Class, Classified, IoError};
use crate::image::blobs::Blobs;
use crate::image::bytes::ReadAt;
use crate::image::files::Files;
use crate::image::format::{ChunkedLayer, Content};
use crate::image::oci::{LayerDescriptor, OciImage};
use crate::image::overlay::{Merged, OverlayError};
use crate::image::verified::VerifiedSource;
use crate::image::verity::VerityError;
use crate::image::{Layer, LayerError};
use crate::sys::file::open_regular;

/// Why the files of an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// A layer whose format only the kernel reads, or that nothing verifies.
    #[error("layer {layer}: no verified reader for {media_type}")]
    NoReader {
        /// The layer.
        layer: Digest,
        /// Its media type.
        media_type: String,
    },
    /// A layer that does not have its root hash.
    #[error("layer {layer}: {source}")]
    Verity {
        /// The layer.
        layer: Digest,
        /// What is wrong with it.
        source: VerityError,
    },
    /// A layer that makes no sense.
    #[error("layer {layer}: {source}")]
    Layer {
        /// The layer.
        layer: Digest,
        /// What is wrong with it.
        source: LayerError,
    },
    /// The layers do not make a tree.
    #[error(transparent)]
    Merged(#[from] OverlayError),
    /// A layer that cannot be opened.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for ViewError {
    fn class(&self) -> Class {
        match self {
            Self::NoReader { .. } => Class::Input,
            Self::Verity { .. } | Self::Layer { .. } => Class::Verification,
            Self::Merged(_) | Self::Io(_) => Class::Failure,
        }
    }
}

impl Store {
    /// Returns the files of an image of this store. Every block is verified when it is read.
    ///
    /// # Errors
    /// [`ViewError`].
    pub(crate) fn files(&self, image: &OciImage) -> Result<Files, ViewError> {
        let open = |digest: &Digest| Ok(open_regular(&self.blob_path(digest), self.transport().links())?.0);
        files(image, open, || self.blobs())
    }
}

/// Returns the files of an image. Every block is verified when it is read. `open` opens a layer of one blob, and `blobs`
/// serves those of many.
///
/// # Errors
/// [`ViewError`], and what `open` returns.
pub(crate) fn files<R: ReadAt + 'static>(
    image: &OciImage,
    open: impl Fn(&Digest) -> Result<R, ViewError>,
    blobs: impl Fn() -> Arc<dyn Blobs>,
) -> Result<Files, ViewError> {
    let layer = |layer: &LayerDescriptor| -> Result<Arc<dyn Layer>, ViewError> {
        let digest = layer.digest;
        let no_reader = || ViewError::NoReader { layer: digest, media_type: layer.media_type().to_string() };
        let wrong = |source| ViewError::Layer { layer: digest, source };
        match layer.format().map_err(|_| no_reader())?.content() {
            Content::Image(format) => {
                let (Some(read), Some(root_hash)) = (format.open, layer.trust.root_hash()) else {
                    return Err(no_reader());
                };
                let source = VerifiedSource::open(open(&digest)?, root_hash)
                    .map_err(|source| ViewError::Verity { layer: digest, source })?;
                read(Arc::new(source)).map_err(wrong)
            }
            Content::Chunked(format) => {
                let read = format.open.ok_or_else(no_reader)?;
                let chunks = Arc::clone(&image.chunks);
                read(&ChunkedLayer { digest, size: layer.size, chunks, blobs: blobs() }).map_err(wrong)
            }
            Content::Tar(_) => Err(no_reader()),
        }
    };
    let layers = image.layers.iter().map(layer).collect::<Result<_, _>>()?;
    Ok(Files::new(Merged::new(layers)?))
}
