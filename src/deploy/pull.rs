//! Pull: a signed system, or a single image, from a registry or another layout into a store.
//!
//! The order is that of an update: system manifest, signature and certificate, the targets' OCI manifests,
//! room; then the blobs that the store lacks; names last, in one step. Pulling verifies no signature: an
//! installation from the store verifies it against a CA, which `pull` does not have.

use std::collections::BTreeSet;
use std::path::Path;

use super::apply::{fetch_artifact, fetch_blobs};
use super::error::DeployError;
use super::offer::{Whole, find_whole};
use super::plan::Fetch;
use crate::digest::Digest;
use crate::error::IoError;
use crate::image::oci::{Descriptor, MANIFEST, Platform};
use crate::manifest::SystemManifest;
use crate::progress::Progress;
use crate::store::{FetchJob, Store, image_name, image_repository, system_name, version_name};
use crate::sys::file;
use crate::transport::Transport;

/// What was pulled.
pub struct Pulled {
    /// Its names in the store.
    pub names: Vec<String>,
    /// The digest of the system manifest, or of the image's OCI manifest.
    pub digest: Digest,
    /// How many blobs were fetched because the store lacked them.
    pub fetched: usize,
}

/// Pulls a signed system; without a name, the highest version.
///
/// # Errors
/// [`DeployError::NotSigned`], [`DeployError::NoSpace`] before any blob is fetched; then what
/// transport and store say.
pub fn system(
    from: &dyn Transport,
    name: Option<&str>,
    store: &Store,
    progress: &Progress,
) -> Result<Pulled, DeployError> {
    let Whole { artifact, referrers, manifest: bytes } = find_whole(from, name)?;
    let digest = Digest::of(&bytes);
    let manifest = SystemManifest::parse(&bytes)
        .map_err(|error| DeployError::NotASystem { object: from.location(), why: error.to_string() })?;
    let (mut images, mut lacking, mut seen) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (name, target) in &manifest.targets {
        let image = Descriptor::new(MANIFEST, target.digest, target.size);
        let place = from.within(&image_repository(name.as_str()))?;
        let content = place.image(&image)?.manifest;
        for blob in content.layers.into_iter().chain([content.config, image.clone()]) {
            if seen.insert(blob.digest) && !store.has(&blob) {
                lacking.push(Fetch { target: name.to_string(), blob });
            }
        }
        images.push((image_name(name.as_str(), &target.digest), image));
    }
    check_room(store.dir(), lacking.iter().map(|fetch| fetch.blob.size))?;
    let writer = store.writer()?;
    fetch_blobs(&writer, from, &lacking, false, progress)?;
    for one in std::iter::once(&artifact).chain(&referrers) {
        fetch_artifact(&writer, from, one)?;
    }
    let (by_digest, by_version) = (system_name(&digest), version_name(manifest.version));
    let mut entries: Vec<_> = images.iter().map(|(name, image)| (Some(name.as_str()), image)).collect();
    entries.push((Some(&by_digest), &artifact));
    entries.push((Some(&by_version), &artifact));
    entries.extend(referrers.iter().map(|one| (None, one)));
    // Rule: a version stands for one system.
    writer.replace_entries(&[], &entries, &[&by_version])?;
    let names = entries.iter().filter_map(|(name, _)| name.map(str::to_string)).collect();
    Ok(Pulled { names, digest, fetched: lacking.len() })
}

/// Rule: room is checked before the first blob is fetched.
fn check_room(folder: &Path, sizes: impl Iterator<Item = u64>) -> Result<(), DeployError> {
    /// Blobs take whole blocks of the file system, in bytes.
    const BLOCK: u64 = 4096;
    let available = file::available_bytes(folder).map_err(|error| IoError::new("stat", folder, error))?;
    let needed = sizes.map(|size| size.div_ceil(BLOCK).saturating_mul(BLOCK)).fold(0, u64::saturating_add);
    if needed > available {
        return Err(DeployError::NoSpace { path: folder.to_path_buf(), needed, available });
    }
    Ok(())
}

/// Pulls a single image, for a platform, under a name of the store.
///
/// # Errors
/// What transport and store say.
pub fn image(
    from: &dyn Transport,
    name: Option<&str>,
    platform: &Platform,
    as_name: &str,
    store: &Store,
    progress: &Progress,
) -> Result<Pulled, DeployError> {
    let found = from.find_image(name, platform)?;
    let image = from.image(&found)?;
    let blobs: Vec<Descriptor> = image
        .manifest
        .layers
        .iter()
        .chain([&image.manifest.config, &found])
        .filter(|blob| !store.has(blob))
        .cloned()
        .collect();
    check_room(store.dir(), blobs.iter().map(|blob| blob.size))?;
    let writer = store.writer()?;
    let jobs: Vec<_> = blobs
        .iter()
        .map(|blob| FetchJob { from, blob, again: false, object: blob.digest.to_string() })
        .collect();
    writer.fetch_all(&jobs, progress)?;
    writer.set_name(as_name, &found)?;
    Ok(Pulled { names: vec![as_name.to_string()], digest: found.digest, fetched: blobs.len() })
}
