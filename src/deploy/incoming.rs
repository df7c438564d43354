//! What is known of a deployment that is still being fetched ([`super::fetching`]).

use std::collections::BTreeSet;

use super::id::DeploymentId;
use super::state::State;
use super::{System, deployment};
use crate::digest::Digest;
use crate::image::blobs::BlobProgress;
use crate::image::oci::Descriptor;
use crate::manifest::SystemManifest;
use crate::store::Store;

/// The system manifest of a deployment that is being fetched, which is a blob of the store.
fn manifest(store: &Store, id: &DeploymentId) -> Option<SystemManifest> {
    SystemManifest::parse(&store.get(&id.digest, deployment::MAX_MANIFEST).ok()?).ok()
}

/// The documents of a deployment that is being fetched: with what they name, all that garbage collection has to keep.
pub(super) fn roots(store: &Store, id: &DeploymentId) -> Vec<Digest> {
    let targets = manifest(store, id).map(|manifest| manifest.targets).unwrap_or_default();
    targets.values().map(|target| target.digest).chain([id.digest]).collect()
}

/// How much is here of each layer of the deployment that is being fetched; empty if none is.
pub(super) fn progress(system: &System, state: &State) -> Vec<BlobProgress> {
    let Some(id) = state.fetching() else { return Vec::new() };
    let Ok(store) = system.store() else { return Vec::new() };
    let last_error = state.last_update.as_ref().and_then(|update| update.error.clone());
    let targets = manifest(&store, &id).map(|manifest| manifest.targets).unwrap_or_default();
    let mut seen = BTreeSet::new();
    let mut all = Vec::new();
    for image in targets.values().filter_map(|target| store.image(&target.digest).ok()) {
        for layer in image.manifest.layers.iter().filter(|layer| seen.insert(layer.digest)) {
            all.push(of_layer(&store, layer, last_error.as_deref()));
        }
    }
    all
}

fn of_layer(store: &Store, layer: &Descriptor, last_error: Option<&str>) -> BlobProgress {
    let have = store.have_bytes(layer);
    let is_here = store.has(layer);
    BlobProgress {
        digest: layer.digest,
        size: layer.size,
        have,
        state: if is_here { "complete" } else { "fetching" }.into(),
        error: last_error.filter(|_| !is_here).map(str::to_string),
    }
}
