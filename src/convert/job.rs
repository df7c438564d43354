//! The job of bringing an image into the store, and what all ways of doing it have in common: config, manifest, errors.

use serde_json::Value;

use super::puzzlefs::PuzzlefsError;
use super::reuse::Made;
use super::{ConvertError, Effort};
use crate::digest::Digest;
use crate::error::{Class, Classified, IoError};
use crate::image::LayerError;
use crate::image::oci::{
    CONFIG, DOCKER_CONFIG, Descriptor, LayerDescriptor, MANIFEST, Manifest, OciError, OciImage, Platform,
};
use crate::image::overlay::MAX_KERNEL_LAYERS;
use crate::progress::Progress;
use crate::store::{StoreError, Writer};
use crate::transport::{Transport, TransportError};

/// An image that is in the store.
#[derive(Debug, Clone)]
pub struct Ingested {
    /// The manifest, also where a new one was made.
    pub manifest: Descriptor,
    /// Whether manifest and layers are the source's own.
    pub untouched: bool,
    /// What a conversion changed or dropped, for people.
    pub notes: Vec<String>,
}

/// Where an image comes from and goes to.
pub struct Ingest<'a> {
    /// The place that has it.
    pub from: &'a dyn Transport,
    /// The store, with its lock held.
    pub writer: &'a Writer<'a>,
    /// The machines that the image is for; one whose config names others gets a note.
    pub platform: &'a Platform,
    /// How many threads work at a time, and how hard.
    pub effort: Effort,
    /// The format that layers are brought into.
    pub storage: Storage,
    /// What the build has made already.
    pub made: &'a Made,
    /// Who hears of it.
    pub progress: &'a Progress,
}

/// The format that layers are brought into, where they do not have it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Storage {
    /// Each layer a squashfs or erofs image with a verity tree.
    #[default]
    Atomfs,
    /// All layers one PuzzleFS image.
    Puzzlefs,
}

/// The manifest of an image with other layers, and with its config stored. `subject` goes: it spoke of the other
/// manifest.
pub(super) fn with_layers(
    image: &OciImage,
    writer: &Writer<'_>,
    config: &[u8],
    layers: Vec<Descriptor>,
) -> Result<Manifest, IngestError> {
    let config_type = match &*image.manifest.config.media_type {
        DOCKER_CONFIG => CONFIG,
        other => other,
    };
    Ok(Manifest {
        schema_version: 2,
        media_type: Some(MANIFEST.into()),
        artifact_type: image.manifest.artifact_type.clone(),
        config: writer.put_bytes(config_type, config)?,
        layers,
        subject: None,
        annotations: image.manifest.annotations.clone(),
        extra: Default::default(),
    })
}

/// The digests of the uncompressed layers that an image's config names; `None` for an artifact.
pub(super) fn diff_ids(image: &OciImage, config: &[u8]) -> Result<Option<Vec<Digest>>, IngestError> {
    if !image.manifest.config.is_image_config() {
        return Ok(None);
    }
    let config: Value = serde_json::from_slice(config).map_err(IngestError::Config)?;
    let Some(list) = config.pointer("/rootfs/diff_ids").and_then(Value::as_array) else { return Ok(None) };
    let bad = |found: String| IngestError::DiffIds { layers: image.layers.len(), found };
    if list.len() != image.layers.len() {
        return Err(bad(format!("{} diff_ids", list.len())));
    }
    let digest =
        |id: &Value| id.as_str().and_then(|text| text.parse().ok()).ok_or_else(|| bad(id.to_string()));
    list.iter().map(digest).collect::<Result<_, _>>().map(Some)
}

/// The config with the digests of the layers as they are stored.
pub(super) fn with_diff_ids(config: &[u8], layers: &[LayerDescriptor]) -> Result<Vec<u8>, IngestError> {
    let mut config: Value = serde_json::from_slice(config).map_err(IngestError::Config)?;
    if let Some(place) = config.pointer_mut("/rootfs/diff_ids") {
        *place = layers.iter().map(|layer| Value::from(layer.digest.to_string())).collect();
    }
    // serde_json sorts the keys of a map.
    serde_json::to_vec(&config).map_err(IngestError::Config)
}

/// Says which layer of an image an error is about.
pub(super) fn in_layer(image: &OciImage, at: usize, source: ConvertError) -> IngestError {
    let layer = &image.layers[at];
    IngestError::Layer {
        number: at + 1,
        count: image.layers.len(),
        layer: layer.digest,
        media_type: layer.media_type().to_string(),
        source,
    }
}

/// Why an image cannot be brought into the store.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// The source does not provide it.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The store does not take it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The manifest cannot be read, or has a layer of an unknown kind.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// A layer cannot be converted or verified.
    #[error("layer {number} of {count}, {layer} ({media_type}): {source}")]
    Layer {
        /// Which layer it is; 1 is the bottom one.
        number: usize,
        /// How many there are.
        count: usize,
        /// The layer, as the source names it.
        layer: Digest,
        /// Its media type.
        media_type: String,
        /// What is wrong with it.
        source: ConvertError,
    },
    /// There is nothing to mount.
    #[error("image {image} has no layers")]
    NoLayers {
        /// Digest of the image's manifest.
        image: Digest,
    },
    /// The kernel mounts fewer.
    #[error(
        "image {image} has {found} different layers, more than the {MAX_KERNEL_LAYERS} that overlayfs takes"
    )]
    TooManyLayers {
        /// Digest of the image's manifest.
        image: Digest,
        /// How many there are.
        found: usize,
    },
    /// The config is not JSON.
    #[error("the image's config cannot be read: {0}")]
    Config(serde_json::Error),
    /// The config does not fit the layers.
    #[error("the image's config names {found}, expected one digest for each of the {layers} layers")]
    DiffIds {
        /// How many layers the manifest has.
        layers: usize,
        /// What the config has.
        found: String,
    },
    /// A PuzzleFS image cannot be made.
    #[error(transparent)]
    Puzzlefs(#[from] PuzzlefsError),
    /// A PuzzleFS image of the source is not whole, or makes no sense.
    #[error("the PuzzleFS image {image}: {source}")]
    Chunks {
        /// Digest of its manifest.
        image: Digest,
        /// What is wrong with it.
        source: LayerError,
    },
    /// The operating system's answer.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A defect.
    #[error("a thread that stored a layer panicked")]
    Panicked,
}

impl Classified for IngestError {
    fn class(&self) -> Class {
        match self {
            Self::Transport(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Oci(error) => error.class(),
            Self::Layer { source, .. } => source.class(),
            Self::NoLayers { .. } | Self::TooManyLayers { .. } => Class::Input,
            Self::DiffIds { .. } | Self::Chunks { .. } => Class::Verification,
            Self::Puzzlefs(error) => error.class(),
            Self::Config(_) | Self::Io(_) | Self::Panicked => Class::Failure,
        }
    }
}
