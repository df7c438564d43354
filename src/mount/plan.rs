//! What is to be mounted: the plan (pure), and the layers that it opens.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use super::MountError;
use super::kernel::dm_verity::LayerInput;
use super::kernel::through_device::through_device;
use super::table::LayerRecord;
use crate::digest::Digest;
use crate::image::layer::Layer;
use crate::image::oci::{LayerFormat, OciImage};
use crate::image::source::Source;
use crate::image::squashfs::Squashfs;
use crate::image::verified::{PlainSource, VerifiedSource};
use crate::image::verity::VerityError;

/// What is to be mounted, all of it from a manifest whose digest was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPlan {
    /// What the user asked for: a target's name or an OCI source.
    pub source: String,
    /// Digest of the image's OCI manifest.
    pub digest: Option<Digest>,
    /// The layers, the bottom one first.
    pub layers: Vec<PlannedLayer>,
}

/// A layer of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedLayer {
    /// The file that holds it.
    pub path: PathBuf,
    /// SHA-256 of the file, as the manifest says; it is not checked, the root hash is.
    pub digest: Digest,
    /// Size of the file in bytes, as the manifest says.
    pub size: u64,
    /// The manifest's media type.
    pub media_type: String,
    /// The root hash of its hash tree; `None` only with `unsafe_no_verity`.
    pub root_hash: Option<Digest>,
}

impl MountPlan {
    /// Plans the mount of an image. `path` tells where the blob of a layer lies.
    ///
    /// `pins` are root hashes that the user gave, one for each layer, the bottom one first, or none.
    ///
    /// # Errors
    /// A layer without a root hash (unless `unsafe_no_verity`), pins that do not match, and an
    /// image without layers.
    pub fn new(
        source: &str,
        image: &OciImage,
        path: &dyn Fn(&Digest) -> PathBuf,
        pins: &[Digest],
        unsafe_no_verity: bool,
    ) -> Result<Self, MountError> {
        if image.layers.is_empty() {
            return Err(MountError::NoLayers { image: image.digest });
        }
        if !pins.is_empty() && pins.len() != image.layers.len() {
            return Err(MountError::PinCount { expected: image.layers.len(), found: pins.len() });
        }
        let mut layers = Vec::with_capacity(image.layers.len());
        for (index, layer) in image.layers.iter().enumerate() {
            let pin = pins.get(index).copied();
            // A pin replaces nothing: it must be what the manifest says, where the manifest says it.
            if let (Some(expected), Some(found)) = (pin, layer.root_hash)
                && expected != found
            {
                return Err(MountError::Pin { layer: layer.digest, expected, found });
            }
            // Rule (docs/design.md, unverified mounts): only `--unsafe-no-verity` makes one.
            let root_hash = match layer.root_hash.or(pin) {
                Some(hash) => (!unsafe_no_verity).then_some(hash),
                None if unsafe_no_verity => None,
                None => return Err(MountError::NoRootHash { layer: layer.digest }),
            };
            layers.push(PlannedLayer {
                path: path(&layer.digest),
                digest: layer.digest,
                size: layer.size,
                media_type: layer.media_type.clone(),
                root_hash,
            });
        }
        Ok(Self { source: source.to_string(), digest: Some(image.digest), layers })
    }

    /// Whether every block of every layer will be verified.
    pub fn is_verified(&self) -> bool {
        self.layers.iter().all(|layer| layer.root_hash.is_some())
    }

    /// The layers as the register of mounts shows them.
    pub fn records(&self) -> Vec<LayerRecord> {
        let record = |layer: &PlannedLayer| LayerRecord { digest: layer.digest, root_hash: layer.root_hash };
        self.layers.iter().map(record).collect()
    }

    /// Opens all layers for reading in this process.
    ///
    /// # Errors
    /// A layer that cannot be opened or does not verify, or whose format has no reader here.
    pub fn open(&self) -> Result<Vec<Arc<dyn Layer>>, MountError> {
        self.layers.iter().map(PlannedLayer::open).collect()
    }
}

impl PlannedLayer {
    fn open(&self) -> Result<Arc<dyn Layer>, MountError> {
        // Before the file is touched: a format that nobody can read is the user's matter, not the disk's.
        match LayerFormat::of(&self.media_type) {
            Some(LayerFormat::Squashfs) => {}
            Some(LayerFormat::Erofs) => return Err(MountError::Erofs { layer: self.digest }),
            _ => {
                let (layer, media_type) = (self.digest, self.media_type.clone());
                return Err(MountError::Format { layer, media_type });
            }
        }
        let file = File::open(&self.path).map_err(|source| MountError::LayerFile {
            layer: self.digest,
            path: self.path.clone(),
            source,
        })?;
        let source: Arc<dyn Source> = match self.root_hash {
            Some(root_hash) => {
                let verified = VerifiedSource::open(file, root_hash).map_err(|error| self.failed(error))?;
                let (path, digest, media_type) = (self.path.as_path(), self.digest, self.media_type.as_str());
                match through_device(&LayerInput { path, digest, root_hash, media_type }, verified) {
                    Ok(device) => Arc::new(device),
                    Err(verified) => Arc::new(verified),
                }
            }
            None => Arc::new(PlainSource::unsafe_no_verity(file).map_err(|source| {
                MountError::LayerRead { layer: self.digest, path: self.path.clone(), source: source.into() }
            })?),
        };
        let layer = Squashfs::open(source).map_err(|source| MountError::LayerRead {
            layer: self.digest,
            path: self.path.clone(),
            source,
        })?;
        Ok(Arc::new(layer))
    }

    fn failed(&self, error: VerityError) -> MountError {
        MountError::LayerVerity { layer: self.digest, path: self.path.clone(), source: error }
    }
}
