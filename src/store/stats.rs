//! What a store's images take, and what they share.
//!
//! An image is a name `mos/images/TARGET:sha256/HEX`, or any other name of an image; then the name stands for
//! the target. An image takes its manifest, its config and its layers or chunks, each blob once, however
//! often its manifest lists it. Sizes are those of descriptors: nothing is read but manifests.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{Store, StoreError, files};
use crate::digest::Digest;
use crate::image::oci::{Descriptor, MAX_MANIFEST_BYTES, OciImage};
use crate::sorting;
use crate::transport::{Transport, TransportError};

/// Names of targets' images begin so.
const IMAGE_PREFIX: &str = "mos/images/";

/// What a store's images take.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// How many images there are.
    pub images: usize,
    /// Bytes of all images, as if each had blobs of its own.
    pub sum_bytes: u64,
    /// Bytes that they take: each blob once.
    pub stored_bytes: u64,
    /// What sharing saves: the difference.
    pub saved_bytes: u64,
    /// Bytes of the blobs that no image needs: systems, signatures, what `mosfs gc` removes.
    pub other_bytes: u64,
    /// The targets, in the order of their names.
    pub targets: Vec<TargetStats>,
}

/// What the images of one target take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TargetStats {
    /// Its name.
    pub target: String,
    /// Bytes of all its images, as if each had blobs of its own.
    pub sum_bytes: u64,
    /// Bytes that they take: each blob once.
    pub stored_bytes: u64,
    /// What sharing between its images, the versions of the target, saves: the difference.
    pub saved_bytes: u64,
    /// Bytes of those that images of other targets need as well.
    pub shared_with_targets_bytes: u64,
    /// Its images, in the order of their digests.
    pub images: Vec<ImageStats>,
}

/// What one image takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageStats {
    /// Digest of its manifest.
    pub digest: Digest,
    /// The formats of its layers, each once.
    pub formats: Vec<&'static str>,
    /// How many blobs it needs.
    pub blobs: usize,
    /// Bytes of those.
    pub bytes: u64,
    /// Bytes of those that no other image needs.
    pub own_bytes: u64,
}

/// An image, with the sizes of its blobs in bytes.
struct Image {
    target: String,
    digest: Digest,
    formats: BTreeSet<&'static str>,
    blobs: BTreeMap<Digest, u64>,
}

impl Store {
    /// What the images of the store take, and what they share.
    ///
    /// # Errors
    /// A store that cannot be read, or a manifest in it that is not what its digest says.
    pub fn stats(&self) -> Result<Stats, StoreError> {
        let mut images = Vec::new();
        let mut seen = BTreeSet::new();
        for (name, entry) in self.names()? {
            let target = match name.strip_prefix(IMAGE_PREFIX) {
                Some(rest) => rest.split(':').next().unwrap_or(rest).to_string(),
                None => name.clone(),
            };
            if entry.is_manifest() && seen.insert((target.clone(), entry.digest)) {
                images.extend(self.image_of(target, &entry)?);
            }
        }
        let mut present = BTreeMap::new();
        for (path, size) in files(&self.dir().join("blobs/sha256"))? {
            if let Some(digest) = path.file_name().and_then(|name| Digest::from_hex(name.to_str()?).ok()) {
                present.insert(digest, size);
            }
        }
        Ok(count(&images, &present))
    }

    /// The image of an entry; `None` for an artifact, and where its manifest is not there.
    fn image_of(&self, target: String, entry: &Descriptor) -> Result<Option<Image>, StoreError> {
        let bytes = match self.transport().fetch(entry, MAX_MANIFEST_BYTES) {
            Ok(bytes) => bytes,
            Err(TransportError::BlobMissing { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let image = OciImage::parse(&bytes)?;
        let formats = sorting::set(image.layers.iter().filter_map(|layer| Some(layer.format().ok()?.name())));
        let config = &image.manifest.config;
        let is_image = config.is_image_config() || !formats.is_empty();
        if !is_image {
            return Ok(None);
        }
        let mut blobs = sorting::map(image.manifest.layers.iter().map(|layer| (layer.digest, layer.size)));
        blobs.insert(config.digest, config.size);
        blobs.insert(entry.digest, entry.size);
        Ok(Some(Image { target, digest: entry.digest, formats, blobs }))
    }
}

fn count(images: &[Image], present: &BTreeMap<Digest, u64>) -> Stats {
    // Who needs a blob: how many images, and which targets.
    let mut users: BTreeMap<Digest, (usize, BTreeSet<&str>)> = BTreeMap::new();
    let mut targets: BTreeMap<&str, Vec<&Image>> = BTreeMap::new();
    for image in images {
        targets.entry(&image.target).or_default().push(image);
        for blob in image.blobs.keys() {
            let (count, by) = users.entry(*blob).or_default();
            *count += 1;
            by.insert(&image.target);
        }
    }
    let mut stats = Stats { images: images.len(), ..Stats::default() };
    let mut all: BTreeMap<Digest, u64> = BTreeMap::new();
    for (target, mut images) in targets {
        sorting::sort_by_key(&mut images, |image| image.digest);
        let mut once: BTreeMap<Digest, u64> = BTreeMap::new();
        let mut sum_bytes = 0;
        let mut list = Vec::new();
        for image in images {
            let bytes = image.blobs.values().sum();
            let own =
                image.blobs.iter().filter(|(blob, _)| users.get(blob).is_some_and(|(count, _)| *count == 1));
            sum_bytes += bytes;
            once.extend(&image.blobs);
            list.push(ImageStats {
                digest: image.digest,
                formats: image.formats.iter().copied().collect(),
                blobs: image.blobs.len(),
                bytes,
                own_bytes: own.map(|(_, size)| size).sum(),
            });
        }
        let stored_bytes = once.values().sum();
        let shared = once.iter().filter(|(blob, _)| users.get(blob).is_some_and(|(_, by)| by.len() > 1));
        stats.sum_bytes += sum_bytes;
        stats.targets.push(TargetStats {
            target: target.to_string(),
            sum_bytes,
            stored_bytes,
            saved_bytes: sum_bytes - stored_bytes,
            shared_with_targets_bytes: shared.map(|(_, size)| size).sum(),
            images: list,
        });
        all.extend(once);
    }
    stats.stored_bytes = all.values().sum();
    stats.saved_bytes = stats.sum_bytes - stats.stored_bytes;
    stats.other_bytes =
        present.iter().filter(|(blob, _)| !all.contains_key(blob)).map(|(_, size)| size).sum();
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(target: &str, number: u8, blobs: &[(u8, u64)]) -> Image {
        let digest = |number: u8| Digest::from_bytes([number; 32]);
        Image {
            target: target.into(),
            digest: digest(number),
            formats: ["squashfs"].into(),
            blobs: blobs.iter().map(|(number, size)| (digest(*number), *size)).collect(),
        }
    }

    #[test]
    fn sharing_is_counted_between_versions_and_between_targets() {
        let images = [
            // Two versions that share 100 bytes, and a target that shares 30 of one of them.
            image("a", 1, &[(10, 100), (11, 7)]),
            image("a", 2, &[(10, 100), (12, 30)]),
            image("b", 3, &[(12, 30), (13, 1)]),
        ];
        let present = [(10, 100), (11, 7), (12, 30), (13, 1), (99, 5)];
        let present = present.map(|(number, size)| (Digest::from_bytes([number; 32]), size)).into();
        let stats = count(&images, &present);
        assert_eq!((stats.sum_bytes, stats.stored_bytes, stats.saved_bytes), (268, 138, 130));
        assert_eq!((stats.other_bytes, stats.images), (5, 3));
        let [a, b] = &stats.targets[..] else { panic!("two targets") };
        assert_eq!((a.sum_bytes, a.stored_bytes, a.saved_bytes), (237, 137, 100));
        assert_eq!((a.shared_with_targets_bytes, b.shared_with_targets_bytes), (30, 30));
        assert_eq!((b.sum_bytes, b.stored_bytes, b.saved_bytes), (31, 31, 0));
        let own: Vec<_> = a.images.iter().chain(&b.images).map(|image| image.own_bytes).collect();
        assert_eq!(own, [7, 0, 1]);
    }
}
