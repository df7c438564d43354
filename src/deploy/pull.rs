//! Pull: a signed system, or a single image, from a registry or another layout into a store.
//!
//! The order is that of an update: system manifest, signature and certificate, the targets' OCI manifests,
//! room; then the blobs that the store lacks; names last, in one step. Nothing is believed by this:
//! whoever installs from the store verifies the signature against a CA, which `pull` does not have.

use super::apply::{SystemBlobs, receive};
use super::error::DeployError;
use super::plan::{check_space, content, fetch_offer};
use crate::digest::Digest;
use crate::image::oci::{Descriptor, Platform};
use crate::manifest::SystemManifest;
use crate::progress::Progress;
use crate::store::{FetchJob, Store, system_name, version_name};
use crate::transport::Transport;

/// What was pulled.
pub struct Pulled {
    /// The names that it has in the store.
    pub names: Vec<String>,
    /// The digest of the system manifest, or of the image's OCI manifest.
    pub digest: Digest,
    /// How many blobs were not there.
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
    let offer = fetch_offer(from, name)?;
    offer.require_signed()?;
    let manifest = SystemManifest::parse(offer.manifest_bytes())
        .map_err(|error| DeployError::NotASystem { object: from.location(), why: error.to_string() })?;
    let content = content(&manifest, Some(store), from)?;
    check_space(store.dir(), content.needed_bytes)?;
    let writer = store.writer()?;
    let blobs = SystemBlobs { artifact: &offer.artifact, referrers: &offer.referrers };
    receive(&writer, from, &content.fetch, &blobs, progress)?;
    let (by_digest, by_version) = (system_name(&offer.digest()), version_name(manifest.version));
    let mut entries: Vec<_> =
        content.images.iter().map(|(name, image)| (Some(name.as_str()), image)).collect();
    entries.push((Some(&by_digest), &offer.artifact));
    entries.push((Some(&by_version), &offer.artifact));
    entries.extend(offer.referrers.iter().map(|one| (None, one)));
    // Rule: a version stands for one system.
    writer.replace_entries(&[], &entries, &[&by_version])?;
    let names = entries.iter().filter_map(|(name, _)| name.map(str::to_string)).collect();
    Ok(Pulled { names, digest: offer.digest(), fetched: content.fetch.len() })
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
    let needed = blobs.iter().map(|blob| blob.size).fold(0, u64::saturating_add);
    check_space(store.dir(), needed)?;
    let writer = store.writer()?;
    let jobs: Vec<_> =
        blobs.iter().map(|blob| FetchJob { from, blob, object: blob.digest.to_string() }).collect();
    writer.fetch_all(&jobs, progress)?;
    writer.set_name(as_name, &found)?;
    Ok(Pulled { names: vec![as_name.to_string()], digest: found.digest, fetched: blobs.len() })
}
