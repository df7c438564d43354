//! What a medium holds: the blobs of one system, and the files of its EFI system partition.

use std::collections::BTreeMap;

use super::error::MediumError;
use super::fat::Volume;
use super::layout::{self, Medium};
use crate::deploy::offer::Whole;
use crate::digest::Digest;
use crate::image::boot::{self, LOADER, UKI};
use crate::image::files::Files;
use crate::image::index::Index;
use crate::image::oci::{Descriptor, MANIFEST, REF_NAME};
use crate::manifest::SystemManifest;
use crate::store::{image_name, system_name, version_name};
use crate::transport::Transport;

/// Largest program of the target `boot`, in bytes.
const MAX_PROGRAM: u64 = 512 << 20;
/// The marker of an OCI layout (image-spec, image-layout.md).
pub(super) const OCI_LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
/// What the EFI system partition has beyond the files and the FATs, in bytes.
const ESP_ROOM: u64 = 1 << 20;
/// Its smallest size, in bytes: FAT16 has a smallest number of clusters.
const ESP_MIN: u64 = 6 << 20;

/// The part of a layout that is one system, as a layout of its own.
pub(super) struct Content {
    /// What the medium says about it.
    pub medium: Medium,
    /// The system manifest.
    pub manifest: SystemManifest,
    /// The OCI manifest of the target `boot`.
    pub boot: Descriptor,
    /// The kernel id that its image names.
    pub kernel_id: Digest,
    /// Every target's OCI manifest, with the target's name.
    pub images: Vec<(String, Descriptor)>,
    /// `index.json`.
    pub index: Vec<u8>,
    /// The blobs, with their sizes in bytes.
    pub blobs: BTreeMap<Digest, u64>,
}

impl Content {
    /// Collects a system and all that it reaches. Only manifests are read.
    ///
    /// # Errors
    /// [`MediumError::NoKernel`] for a system that no medium can start; those of the layout.
    pub(super) fn of(from: &dyn Transport, whole: &Whole) -> Result<Self, MediumError> {
        let manifest = SystemManifest::parse(&whole.manifest)
            .map_err(|source| MediumError::NotASystem { object: from.location(), source })?;
        let medium = Medium::of(&manifest);
        let no_kernel = |why| MediumError::NoKernel { version: manifest.version, why };
        let mut blobs = BTreeMap::new();
        let mut entries = Vec::new();
        let mut images = Vec::new();
        let mut boot = None;
        for (name, target) in &manifest.targets {
            let image = Descriptor::new(MANIFEST, target.digest, target.size);
            let read = from.image(&image)?;
            if name.as_str() == boot::TARGET
                && let Ok(Some(id)) = boot::kernel_id(&read)
            {
                if !read.manifest.annotations.contains_key(boot::INSTALLS) {
                    return Err(no_kernel("it could not set up a disk, since its hostfs had no mke2fs"));
                }
                boot = Some((image.clone(), id));
            }
            for blob in read.manifest.layers.iter().chain([&read.manifest.config, &image]) {
                blobs.insert(blob.digest, blob.size);
            }
            entries.push(named(&image, &image_name(name.as_str(), &target.digest)));
            images.push((name.to_string(), image));
        }
        let (boot, kernel_id) =
            boot.ok_or_else(|| no_kernel("it has no target `boot` that mosfs build made"))?;
        let artifact = |one: &Descriptor, blobs: &mut BTreeMap<Digest, u64>| -> Result<_, MediumError> {
            let read = from.manifest(one)?;
            for blob in read.layers.iter().chain([&read.config, one]) {
                blobs.insert(blob.digest, blob.size);
            }
            let mut entry = Descriptor::new(MANIFEST, one.digest, one.size);
            entry.artifact_type = Some(read.kind().to_string());
            Ok(entry)
        };
        let system = artifact(&whole.artifact, &mut blobs)?;
        entries.push(named(&system, &system_name(&medium.system)));
        entries.push(named(&system, &version_name(manifest.version)));
        let mut referrers = Vec::new();
        for one in &whole.referrers {
            referrers.push(artifact(one, &mut blobs)?);
        }
        // Wherever they come from, in one order.
        referrers.sort_by(|one, other| {
            (&one.artifact_type, one.digest).cmp(&(&other.artifact_type, other.digest))
        });
        entries.extend(referrers);
        let mut index = Index::empty();
        index.manifests = entries;
        let index = index.to_bytes();
        Ok(Self { medium, manifest, boot, kernel_id, images, index, blobs })
    }

    /// The path of a blob on the medium.
    pub(super) fn blob_path(digest: &Digest) -> String {
        format!("{}/{}", BLOBS, digest.hex())
    }
}

/// The folder of the blobs.
pub(super) const BLOBS: &str = "store/blobs/sha256";
/// `index.json` of the layout.
pub(super) const INDEX_FILE: &str = "store/index.json";
/// `oci-layout` of the layout.
pub(super) const OCI_LAYOUT_FILE: &str = "store/oci-layout";

fn named(descriptor: &Descriptor, name: &str) -> Descriptor {
    let mut entry = descriptor.clone();
    entry.annotations.insert(REF_NAME.into(), name.into());
    entry
}

/// The programs of a target `boot`: the unified kernel image and the boot loader.
pub(super) fn programs(files: &Files, version: u64) -> Result<(Vec<u8>, Vec<u8>), MediumError> {
    let read = |name, why| files.read(name, MAX_PROGRAM)?.ok_or(MediumError::NoKernel { version, why });
    Ok((
        read(UKI, "its target `boot` has no mosfs.efi")?,
        read(LOADER, "its target `boot` has no loader.efi")?,
    ))
}

/// The files of the EFI system partition: the kernel alone, or with keys to enroll behind systemd-boot.
pub(super) fn esp_files(
    uki: Vec<u8>,
    loader: Vec<u8>,
    keys: &BTreeMap<String, Vec<u8>>,
) -> BTreeMap<String, Vec<u8>> {
    if keys.is_empty() {
        return BTreeMap::from([(layout::ESP_BOOT.to_string(), uki)]);
    }
    let conf = layout::loader_conf(&loader);
    let mut files = BTreeMap::from([
        (layout::ESP_BOOT.to_string(), loader),
        (layout::ESP_KERNEL.to_string(), uki),
        (layout::LOADER_CONF.to_string(), conf.as_bytes().to_vec()),
    ]);
    for (name, content) in keys {
        files.insert(format!("{}/{name}", layout::ENROLL_KEYS), content.clone());
    }
    files
}

/// The file system for these files.
pub(super) fn esp_volume(files: &BTreeMap<String, Vec<u8>>, medium: &Medium) -> Volume {
    let content: u64 = files.values().map(|content| content.len() as u64).sum();
    let size_bytes = (content + content / 100 + ESP_ROOM).max(ESP_MIN).next_multiple_of(1 << 20);
    Volume { size_bytes, sector_bytes: 512, id: medium.fat_id() }
}
