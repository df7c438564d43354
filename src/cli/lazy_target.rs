//! Targets of a deployment whose blobs are not all in the store: `mosfs activate --lazy`, `mosfs mount --lazy`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{RegistryArgs, lazy};
use crate::deploy::{DeployError, DeploymentId, System, target};
use crate::error::AnyError;
use crate::image::blobs::Blobs;
use crate::image::oci::{CONFIG, Descriptor, MANIFEST, MAX_MANIFEST_BYTES, OciImage};
use crate::manifest::system::Target;
use crate::mount::{Backend, MountError, backend};
use crate::store::lazy::{LazyImage, LazyOptions};
use crate::store::{Store, image_repository};
use crate::transport::{SourceRef, Transport, TransportError};

/// Where the missing blobs of targets are.
pub(super) struct LazyTargets<'a> {
    system: PathBuf,
    from: Option<&'a SourceRef>,
    registry: &'a RegistryArgs,
}

impl<'a> LazyTargets<'a> {
    /// Those of this system folder; `from` is the registry that a user named.
    pub(super) fn new(system: &Path, from: Option<&'a SourceRef>, registry: &'a RegistryArgs) -> Self {
        Self { system: system.into(), from, registry }
    }

    /// The OCI manifest of a signed target; from its registry where the store lacks it. It is identified by the
    /// digest and size that were signed.
    pub(super) fn image(
        &self,
        store: &Store,
        id: &DeploymentId,
        name: &str,
        signed: &Target,
    ) -> Result<OciImage, AnyError> {
        let manifest = Descriptor::new(MANIFEST, signed.digest, signed.size);
        if !store.has(&manifest) {
            let from = self.place(id, name)?;
            let bytes = from.fetch(&manifest, MAX_MANIFEST_BYTES)?;
            let writer = store.writer()?;
            writer.put_bytes(MANIFEST, &bytes)?;
        }
        Ok(target::image_of(store, name, signed)?)
    }

    /// The blobs of a target, fetched while they are read; `None` if all are in the store.
    pub(super) fn blobs(
        &self,
        id: &DeploymentId,
        name: &str,
        image: &OciImage,
        wanted: Backend,
        fill: bool,
    ) -> Result<Option<Arc<dyn Blobs>>, AnyError> {
        let store = System::at(&self.system).store()?;
        let is_lacking = |layer: &&Descriptor| !store.has(layer);
        let Some(lacking) = image.manifest.layers.iter().find(is_lacking) else { return Ok(None) };
        if wanted == Backend::DmVerity {
            let why =
                format!("layer {} is fetched while it is read, which takes the fuse backend", lacking.digest);
            return Err(MountError::NoBackend { backend: backend::DM_VERITY, why }.into());
        }
        let from = self.place(id, name)?;
        let config = &image.manifest.config;
        if !store.has(config) {
            store.writer()?.put_bytes(CONFIG, &from.fetch(config, MAX_MANIFEST_BYTES)?)?;
        }
        let list = lazy::find_list(from.as_ref(), &image.digest);
        let patience = self.registry.quiet_access().patience;
        // The deployment's names stand for the image already.
        let options = LazyOptions { patience, fill, list, complete: None };
        let image = LazyImage::open(&store, from, image, options)?;
        image.warm();
        Ok(Some(Arc::new(image)))
    }

    /// The repository of a target.
    fn place(&self, id: &DeploymentId, name: &str) -> Result<Box<dyn Transport>, AnyError> {
        let source = match self.from {
            Some(source) => source.clone(),
            None => {
                let state = System::at(&self.system).state()?;
                state.sources.get(id).ok_or(DeployError::NoSource { id: *id })?.parse()?
            }
        };
        if !source.is_registry() {
            let why = "expected a registry, docker://HOST[:PORT]/PREFIX";
            return Err(TransportError::BadSource { found: source.to_string(), why }.into());
        }
        let access = lazy::access(&self.registry.quiet_access());
        Ok(source.open(&access)?.within(&image_repository(name))?)
    }

    /// The same for a daemon that mounts it again.
    pub(super) fn arguments(&self) -> Vec<OsString> {
        let mut all: Vec<OsString> = vec!["--lazy".into()];
        all.extend(self.from.iter().map(|source| format!("--from={source}").into()));
        let options = self.registry.arguments().into_iter();
        all.extend(
            options.map(|(name, value)| value.map_or(name.into(), |value| format!("{name}={value}").into())),
        );
        all
    }
}
