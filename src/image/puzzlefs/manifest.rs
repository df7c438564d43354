//! How an OCI manifest lists a PuzzleFS image.

use std::collections::BTreeMap;

use super::ListedBlob;
use crate::digest::Digest;
use crate::image::oci::{Descriptor, OciError};

/// Media type of the metadata. It is never compressed.
pub const ROOTFS: &str = "application/vnd.puzzlefs.image.rootfs.v1";
/// Media type of a chunk. The type of a chunk may end in `+zstd`, also where the chunk is stored as it is: the
/// metadata says which it is.
pub const FILEDATA: &str = "application/vnd.puzzlefs.image.filedata.v1";
/// What the media type of a chunk ends in, in an image that was built with compression.
pub const ZSTD_SUFFIX: &str = "+zstd";
/// Annotation of the metadata's descriptor: the fs-verity digest of that blob, in hex.
pub const VERITY_ANNOTATION: &str = "io.puzzlefsoci.puzzlefs.puzzlefs_verity_root_hash";
/// The most chunks that a manifest may list; the same chunk may be listed more than once.
pub const MAX_CHUNKS: usize = 65_536;

/// Whether a media type is that of a chunk.
pub fn is_chunk(media_type: &str) -> bool {
    media_type.strip_prefix(FILEDATA).is_some_and(|rest| rest.is_empty() || rest.starts_with('+'))
}

/// Whether a media type is that of metadata or of a chunk.
pub fn is_part(media_type: &str) -> bool {
    media_type == ROOTFS || is_chunk(media_type)
}

/// The blobs of an image, as its manifest lists them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The metadata.
    pub rootfs: ListedBlob,
    /// The chunks, each once, in the order of the manifest.
    pub chunks: Vec<ListedBlob>,
}

impl Listing {
    /// Finds the blobs in the layers of a manifest; `None` where the image is of another format.
    ///
    /// # Errors
    /// [`OciError::Puzzlefs`] where other layers stand beside it, where there is not one metadata blob, and where a
    /// chunk is listed with two sizes; [`OciError::TooMany`] beyond [`MAX_CHUNKS`].
    pub fn of(layers: &[Descriptor]) -> Result<Option<Self>, OciError> {
        let parts = layers.iter().filter(|layer| is_part(&layer.media_type)).count();
        if parts == 0 {
            return Ok(None);
        }
        let wrong = |why: String| Err(OciError::Puzzlefs { why });
        if let Some(other) = layers.iter().find(|layer| !is_part(&layer.media_type)) {
            return wrong(format!("it also has a layer of media type `{}`", other.media_type));
        }
        let mut metadata = layers.iter().filter(|layer| layer.media_type == ROOTFS);
        let (Some(rootfs), None) = (metadata.next(), metadata.next()) else {
            let found = layers.iter().filter(|layer| layer.media_type == ROOTFS).count();
            return wrong(format!("it has {found} blobs of metadata (`{ROOTFS}`), expected 1"));
        };
        if parts - 1 > MAX_CHUNKS {
            let (document, what) = ("image manifest", "chunks");
            return Err(OciError::TooMany { document, what, found: parts - 1, max: MAX_CHUNKS });
        }
        let mut sizes = BTreeMap::<Digest, u64>::new();
        let mut chunks = Vec::with_capacity(parts - 1);
        for chunk in layers.iter().filter(|layer| layer.media_type != ROOTFS) {
            match sizes.insert(chunk.digest, chunk.size) {
                None => chunks.push(ListedBlob { digest: chunk.digest, size: chunk.size }),
                Some(size) if size == chunk.size => {}
                Some(size) => {
                    let (digest, other) = (chunk.digest, chunk.size);
                    return wrong(format!("it lists chunk {digest} with {size} and with {other} bytes"));
                }
            }
        }
        Ok(Some(Self { rootfs: ListedBlob { digest: rootfs.digest, size: rootfs.size }, chunks }))
    }
}
