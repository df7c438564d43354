//! Push: a signed system from a store to a registry.
//!
//! ```text
//! PREFIX/mos/images/TARGET       layers, config; the OCI manifest by digest, then its tag HEX
//! PREFIX/mos/system/system       the system manifest's artifact by digest, then its tag HEX
//!                                signature, certificate, floor signature; then their tags HEX.sig …
//!                                the list of referrers, where the registry keeps none itself
//!                                last of all the tag VERSION
//! ```
//!
//! A registry accepts a manifest only after everything that it references, and a reader who finds VERSION
//! finds all of it: an interrupted push is invisible by version, and the next one sends what is missing. The
//! tags of signature and certificate are for the registry's garbage collection, which does not know that the
//! fallback list keeps them; readers do not use them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::error::DeployError;
use super::offer::{Whole, find_whole};
use crate::digest::Digest;
use crate::image::oci::{Descriptor, MANIFEST, MAX_MANIFEST_BYTES, Manifest, SYSTEM_REPOSITORY};
use crate::manifest::SystemManifest;
use crate::progress::{ALL, Progress};
use crate::sorting;
use crate::store::{Store, StoreError, image_repository};
use crate::sys::failpoint;
use crate::sys::locks;
use crate::transport::registry::{Registry, RegistryError, Uploaded};
use crate::transport::{Transport, TransportError, parallel};
use crate::trust::{CERTIFICATE_TYPE, FLOOR_SIGNATURE_TYPE, SIGNATURE_TYPE};

/// What was pushed.
#[derive(Debug)]
pub struct Pushed {
    /// The system's version.
    pub version: u64,
    /// The digest of the system manifest.
    pub digest: Digest,
    /// How many blobs were sent.
    pub sent: usize,
    /// How many blobs the registry mounted from another of its repositories.
    pub mounted: usize,
    /// How many blobs were already present.
    pub present: usize,
}

/// Pushes a signed system; without a name, the highest version of the store.
///
/// # Errors
/// [`DeployError::NotSigned`]; [`DeployError::VersionElsewhere`] where the registry has another system of
/// this version; what transport and store say.
pub fn system(
    store: &Store,
    name: Option<&str>,
    to: &Registry,
    progress: &Progress,
) -> Result<Pushed, DeployError> {
    let offer = find_whole(store.transport(), name)?;
    let manifest = SystemManifest::parse(&offer.manifest).map_err(|error| DeployError::NotASystem {
        object: store.transport().location(),
        why: error.to_string(),
    })?;
    let system = to.at(SYSTEM_REPOSITORY)?;
    refuse_other(&system, manifest.version, &offer)?;

    let push = Push { store, progress, counts: Mutex::default(), known: Mutex::default() };
    for (target, image) in &manifest.targets {
        let bytes = store.get(&image.digest, MAX_MANIFEST_BYTES)?;
        let descriptor = Descriptor::new(MANIFEST, image.digest, bytes.len() as u64);
        let repository = to.at(&image_repository(target.as_str()))?;
        push.manifest(&repository, &descriptor, &bytes)?;
        repository.put_document(&image.digest.hex(), media_type(&bytes)?.as_str(), &bytes)?;
        failpoint::hit("push.image.pushed");
    }
    push.artifact(&system, &offer.artifact)?;
    let hex = Digest::of(&offer.manifest).hex();
    let bytes = store.get(&offer.artifact.digest, MAX_MANIFEST_BYTES)?;
    system.put_document(&hex, MANIFEST, &bytes)?;
    failpoint::hit("push.system.pushed");
    push.referrers(&system, &offer, &hex)?;
    failpoint::hit("push.referrers.pushed");
    system.put_document(&manifest.version.to_string(), MANIFEST, &bytes)?;
    let counts = locks::into_inner(push.counts);
    let [present, mounted, sent] = counts;
    Ok(Pushed { version: manifest.version, digest: Digest::of(&offer.manifest), sent, mounted, present })
}

/// Rule: a version stands for one system.
fn refuse_other(system: &Registry, version: u64, offer: &Whole) -> Result<(), DeployError> {
    let found = match system.peek(&version.to_string()) {
        Ok(found) => found,
        Err(TransportError::Registry(error)) if matches!(*error, RegistryError::NotFound { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    match found {
        Some(found) if found != offer.artifact.digest => Err(DeployError::VersionElsewhere {
            location: system.location(),
            version,
            found,
            expected: offer.artifact.digest,
        }),
        _ => Ok(()),
    }
}

fn media_type(manifest: &[u8]) -> Result<String, DeployError> {
    let parsed = Manifest::parse(manifest)?;
    Ok(parsed.media_type.unwrap_or_else(|| MANIFEST.into()))
}

struct Push<'a> {
    store: &'a Store,
    progress: &'a Progress,
    /// Present, mounted, sent.
    counts: Mutex<[usize; 3]>,
    /// Which repository of the registry has a blob.
    known: Mutex<HashMap<Digest, String>>,
}

impl Push<'_> {
    /// Sends an image or artifact: its blobs, then its manifest by digest; whether the registry has
    /// understood its subject.
    fn manifest(&self, to: &Registry, descriptor: &Descriptor, bytes: &[u8]) -> Result<bool, DeployError> {
        let manifest = Manifest::parse(bytes)?;
        let mut blobs: Vec<&Descriptor> = manifest.layers.iter().chain([&manifest.config]).collect();
        sorting::sort_by_key(&mut blobs, |blob| blob.digest);
        blobs.dedup_by_key(|blob| blob.digest);
        let all = blobs.iter().map(|blob| blob.size).sum();
        let whole = Arc::new(self.progress.task("push", ALL, Some(all)));
        parallel::for_each(&blobs, |blob| -> Result<(), DeployError> {
            let task = self.progress.task("push", &blob.digest.to_string(), Some(blob.size)).part_of(&whole);
            let (file, size) = self.store.transport().open_blob(&blob.digest)?;
            if size != blob.size {
                let object = self.store.blob_path(&blob.digest).display().to_string();
                let wrong = TransportError::SizeMismatch { object, expected: blob.size, found: size };
                return Err(StoreError::from(wrong).into());
            }
            let known = || locks::lock(&self.known);
            let elsewhere = known().get(&blob.digest).cloned();
            let how = to.put_blob(blob, &file, elsewhere.as_deref(), &task)?;
            known().entry(blob.digest).or_insert_with(|| to.repository().to_string());
            let mut counts = locks::lock(&self.counts);
            counts[match how {
                Uploaded::Present => 0,
                Uploaded::Mounted => 1,
                Uploaded::Sent => 2,
            }] += 1;
            Ok(())
        })?;
        let media_type = manifest.media_type.as_deref().unwrap_or(MANIFEST);
        Ok(to.put_document(&descriptor.digest.to_string(), media_type, bytes)?)
    }

    fn artifact(&self, to: &Registry, artifact: &Descriptor) -> Result<bool, DeployError> {
        let bytes = self.store.get(&artifact.digest, MAX_MANIFEST_BYTES)?;
        self.manifest(to, artifact, &bytes)
    }

    /// Sends what says something about the system.
    fn referrers(&self, system: &Registry, offer: &Whole, hex: &str) -> Result<(), DeployError> {
        let mut count: HashMap<&str, usize> = HashMap::new();
        let mut understood = true;
        let mut listed = Vec::new();
        for referrer in &offer.referrers {
            let bytes = self.store.get(&referrer.digest, MAX_MANIFEST_BYTES)?;
            understood &= self.manifest(system, referrer, &bytes)?;
            let kind = Manifest::parse(&bytes)?.kind().to_string();
            let name = match kind.as_str() {
                SIGNATURE_TYPE => "sig",
                CERTIFICATE_TYPE => "cert",
                FLOOR_SIGNATURE_TYPE => "floor",
                _ => "other",
            };
            let number = count.entry(name).or_default();
            *number += 1;
            let tag = if *number == 1 { format!("{hex}.{name}") } else { format!("{hex}.{name}-{number}") };
            system.put_document(&tag, MANIFEST, &bytes)?;
            let mut entry = referrer.clone();
            entry.artifact_type = Some(kind);
            listed.push(entry);
        }
        if !understood {
            system.put_referrers(&offer.artifact.digest, &listed)?;
        }
        Ok(())
    }
}
