//! What is to be mounted. Pure: nothing is opened.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use crate::digest::Digest;
use crate::error::{Class, Classified};
use crate::image::blobs::{Blob, Blobs};
use crate::image::format::{ChunkedLayer, LayerFormat};
use crate::image::oci::{LayerDescriptor, OciImage, Trust};
use crate::image::overlay::Shown;
use crate::image::plain::{Check, PlainFile};

/// What is to be mounted.
///
/// A target of a signed system is planned by [`plan_target`](crate::plan_target). Any other image:
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
/// use mosfs::{MountPlan, PlanError, Store, Verification};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let example = Example::publish()?;
/// # let store = &example.store;
/// # let (name, _) = store.names()?.into_iter().find(|(name, _)| name.starts_with("mos/images/")).unwrap();
/// let image = store.image(&store.resolve(&name)?.digest)?;
/// let plan = MountPlan::new("web", &image, &store.blobs(), Verification::default())?;
/// assert!(plan.is_verified());
///
/// // A layer as it came, a tar stream, has nothing to verify it with.
/// # let other = Store::open(&example.folder.path().join("images"))?;
/// let image = other.image(&other.resolve("web")?.digest)?;
/// let error = MountPlan::new("web", &image, &other.blobs(), Verification::default()).unwrap_err();
/// assert!(matches!(error, PlanError::NoRootHash { .. }));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct MountPlan {
    /// What the user asked for: a target's name, an OCI source or a file.
    pub source: String,
    /// What that is.
    pub content: Planned,
}

/// What a plan consists of.
#[derive(Debug, Clone)]
pub enum Planned {
    /// An OCI image, all of it from a manifest whose digest was checked.
    Image {
        /// Digest of the image's OCI manifest.
        digest: Option<Digest>,
        /// The layers, the bottom one first, none twice.
        layers: Vec<PlannedLayer>,
        /// Where their blobs are.
        blobs: Arc<dyn Blobs>,
    },
    /// An image in a plain file.
    File {
        /// The file, and what verifies it.
        file: PlainFile,
        /// How it is shown.
        shown: Shown,
    },
}

/// A layer of a plan.
#[derive(Debug, Clone)]
pub struct PlannedLayer {
    /// The layer as the manifest describes it; its `trust` is what its bytes will be checked against.
    pub descriptor: LayerDescriptor,
    /// Where its bytes are.
    pub bytes: LayerBytes,
}

/// Where the bytes of a layer are.
#[derive(Debug, Clone)]
pub enum LayerBytes {
    /// In one blob.
    One(Blob),
    /// In many blobs.
    Chunks(ChunkedLayer),
}

/// What a user says about the verification of an image. By default, what its manifest says is required.
#[derive(Debug, Clone, Copy, Default)]
pub struct Verification<'a> {
    /// The root hashes that are required, one for each layer, the bottom one first; or none.
    pub root_hashes: &'a [Digest],
    /// `--unsafe-no-verity`: root hashes are neither required nor used.
    pub unsafe_no_verity: bool,
}

impl MountPlan {
    /// Plans the mount of an image whose blobs are in `blobs`.
    ///
    /// # Errors
    /// A layer that nothing verifies (unless that was asked for), root hashes that do not match, and an image without
    /// layers.
    pub fn new(
        source: &str,
        image: &OciImage,
        blobs: &Arc<dyn Blobs>,
        verification: Verification<'_>,
    ) -> Result<Self, PlanError> {
        let Verification { root_hashes: pins, unsafe_no_verity } = verification;
        if image.layers.is_empty() {
            return Err(PlanError::NoLayers { image: image.digest });
        }
        if !pins.is_empty() && pins.len() != image.layers.len() {
            return Err(PlanError::PinCount { expected: image.layers.len(), found: pins.len() });
        }
        let plan = |(index, layer): (usize, &LayerDescriptor)| {
            let trust = trust(layer, pins.get(index).copied(), unsafe_no_verity)?;
            let bytes = if layer.format().is_ok_and(LayerFormat::is_chunked) {
                LayerBytes::Chunks(ChunkedLayer {
                    digest: layer.digest,
                    size: layer.size,
                    chunks: Arc::clone(&image.chunks),
                    blobs: Arc::clone(blobs),
                })
            } else {
                LayerBytes::One(blobs.blob(&layer.digest, layer.size))
            };
            Ok(PlannedLayer { descriptor: layer.clone().with_trust(trust), bytes })
        };
        let layers = image.layers.iter().enumerate().map(plan).collect::<Result<_, PlanError>>()?;
        let layers = without_repeats(layers);
        Ok(Self::of_layers(source, Some(image.digest), layers, Arc::clone(blobs)))
    }

    /// The plan of layers, the bottom one first, none twice, whose blobs are in `blobs`.
    pub fn of_layers(
        source: &str,
        digest: Option<Digest>,
        layers: Vec<PlannedLayer>,
        blobs: Arc<dyn Blobs>,
    ) -> Self {
        Self { source: source.to_string(), content: Planned::Image { digest, layers, blobs } }
    }

    /// Plans the mount of an image in a plain file.
    pub fn of_file(file: PlainFile, shown: Shown) -> Self {
        Self { source: file.path.display().to_string(), content: Planned::File { file, shown } }
    }

    /// The layers of an OCI image, the bottom one first; a plain file has none.
    pub fn layers(&self) -> &[PlannedLayer] {
        match &self.content {
            Planned::Image { layers, .. } => layers,
            Planned::File { .. } => &[],
        }
    }

    /// Where the layers' blobs are, if that is another machine.
    pub fn remote(&self) -> Option<&Arc<dyn Blobs>> {
        match &self.content {
            Planned::Image { blobs, .. } => Some(blobs).filter(|blobs| blobs.is_remote()),
            Planned::File { .. } => None,
        }
    }

    /// Digest of the OCI manifest, if it is known.
    pub fn digest(&self) -> Option<Digest> {
        match &self.content {
            Planned::Image { digest, .. } => *digest,
            Planned::File { .. } => None,
        }
    }

    /// Whether all bytes will be verified.
    pub fn is_verified(&self) -> bool {
        match &self.content {
            Planned::Image { layers, .. } => layers.iter().all(|layer| layer.descriptor.trust != Trust::None),
            Planned::File { file, .. } => file.check != Check::UnsafeNoVerity,
        }
    }
}

/// What the bytes of a layer will be checked against.
fn trust(layer: &LayerDescriptor, pin: Option<Digest>, unsafe_no_verity: bool) -> Result<Trust, PlanError> {
    match (layer.trust, pin) {
        // A pin replaces nothing: it must be what the manifest says, where the manifest says it.
        (Trust::RootHash(found), Some(expected)) if expected != found => {
            Err(PlanError::Pin { layer: layer.digest, expected, found })
        }
        // There is no root hash that could be the one required.
        (Trust::Content, Some(_)) => Err(PlanError::PinOnChunks { layer: layer.digest }),
        (Trust::Content, None) => Ok(Trust::Content),
        // Rule (docs/design.md, unverified mounts): only `--unsafe-no-verity` makes one.
        (Trust::RootHash(_) | Trust::None, _) if unsafe_no_verity => Ok(Trust::None),
        (Trust::RootHash(hash), _) | (Trust::None, Some(hash)) => Ok(Trust::RootHash(hash)),
        (Trust::None, None) => Err(PlanError::NoRootHash { layer: layer.digest }),
    }
}

/// Leaves out each layer that comes again further up, as overlayfs takes no folder twice.
///
/// Nothing is lost: a folder of the lower copy is visible only where the same folder of the upper
/// one is, and every name in it is there too, as a file, a whiteout or a folder of the same kind. So the
/// lower copy adds no name, and hides none that the upper one does not hide.
fn without_repeats(layers: Vec<PlannedLayer>) -> Vec<PlannedLayer> {
    // Two blobs with one root hash are one device to dm-verity.
    let content =
        |layer: &PlannedLayer| layer.descriptor.trust.root_hash().unwrap_or(layer.descriptor.digest);
    let mut above = HashSet::new();
    let mut kept: Vec<_> = layers.into_iter().rev().filter(|layer| above.insert(content(layer))).collect();
    kept.reverse();
    kept
}

impl PlannedLayer {
    /// The file that holds it, if it is one file of this machine.
    pub fn file(&self) -> Option<&Path> {
        match &self.bytes {
            LayerBytes::One(blob) => blob.file(),
            LayerBytes::Chunks(_) => None,
        }
    }
}

/// Why a mount of an image cannot be planned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The image has nothing to mount.
    #[error("image {image} has no layers")]
    NoLayers {
        /// Digest of its manifest.
        image: Digest,
    },
    /// The manifest names no root hash, so nothing could be verified.
    #[error("layer {layer} has no root hash: it cannot be verified")]
    NoRootHash {
        /// Digest of the layer.
        layer: Digest,
    },
    /// A root hash is required of a layer that is made of chunks.
    #[error(
        "layer {layer} is made of chunks, each verified by its own digest: it has no root hash to compare"
    )]
    PinOnChunks {
        /// Digest of the layer.
        layer: Digest,
    },
    /// The number of pins is not that of the layers.
    #[error("expected {expected} root hashes, one for each layer, found {found}")]
    PinCount {
        /// Number of layers.
        expected: usize,
        /// Number of pins.
        found: usize,
    },
    /// A pin is not what the manifest says.
    #[error("layer {layer}: the manifest has root hash {found}, expected {expected}")]
    Pin {
        /// Digest of the layer.
        layer: Digest,
        /// What the user gave.
        expected: Digest,
        /// What the manifest says.
        found: Digest,
    },
}

impl Classified for PlanError {
    fn class(&self) -> Class {
        match self {
            Self::Pin { .. } | Self::NoRootHash { .. } | Self::PinOnChunks { .. } => Class::Verification,
            Self::NoLayers { .. } | Self::PinCount { .. } => Class::Input,
        }
    }
}
