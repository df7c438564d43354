//! What a new system shares with an earlier one of the same store (`build --base NAME`).
//!
//! A store holds each blob once, so a base does not change what is stored. It is looked up before anything is
//! fetched, and each target's note states how much of it the base already has: what a device that runs the
//! base does not have to fetch.

use std::collections::BTreeSet;

use crate::digest::Digest;
use crate::image::oci::{Descriptor, MAX_MANIFEST_BYTES, Manifest};
use crate::manifest::SYSTEM_MEDIA_TYPE;
use crate::manifest::system::SystemManifest;
use crate::sorting;
use crate::store::{Store, StoreError, version_name};

/// An earlier system or image.
#[derive(Debug)]
pub struct Base {
    name: String,
    blobs: BTreeSet<Digest>,
}

impl Base {
    /// Looks up a base: a version of a system, or any name of the store.
    ///
    /// # Errors
    /// [`StoreError`] where the store has no such name, or a manifest that it leads to is not there.
    pub fn of(store: &Store, name: &str) -> Result<Self, StoreError> {
        let full = name.parse().map_or_else(|_| name.to_string(), version_name);
        let entry = store.resolve(&full)?;
        let bytes = store.get(&entry.digest, MAX_MANIFEST_BYTES)?;
        let manifest = Manifest::parse(&bytes)?;
        let mut blobs = BTreeSet::new();
        match &manifest.layers[..] {
            [system] if manifest.kind() == SYSTEM_MEDIA_TYPE => {
                let bytes = store.get(&system.digest, MAX_MANIFEST_BYTES)?;
                // It is only counted: a device verifies a system before running it.
                let targets = SystemManifest::parse_loose(&bytes).map(|system| system.targets);
                for target in targets.unwrap_or_default().values() {
                    blobs.extend(
                        store.image(&target.digest)?.manifest.layers.iter().map(|layer| layer.digest),
                    );
                }
            }
            layers => blobs.extend(layers.iter().map(|layer| layer.digest)),
        }
        Ok(Self { name: name.to_string(), blobs })
    }

    /// How much of these layers or chunks the base has, for people.
    pub fn note(&self, layers: &[Descriptor]) -> String {
        let all = sorting::map(layers.iter().map(|layer| (layer.digest, layer.size)));
        let shared = all.iter().filter(|(digest, _)| self.blobs.contains(digest));
        let (count, bytes) = shared.fold((0, 0), |(count, bytes), (_, size)| (count + 1, bytes + size));
        format!(
            "{count} of {} layers and chunks, {bytes} of {} bytes, are those of {}",
            all.len(),
            all.values().sum::<u64>(),
            self.name
        )
    }
}
