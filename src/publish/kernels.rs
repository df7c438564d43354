//! What the kernels of a system cannot mount of it.
//!
//! dm-verity hands blocks to the kernel's squashfs, which decodes only what it was built for: `CONFIG_SQUASHFS_LZ4` and
//! its like. Every kernel that mounts squashfs layers has zstd and zlib; of other codecs each target gets a note where
//! a kernel of the system cannot decode them, or where no kernel's configuration is there to look into. FUSE decodes
//! them all.
//!
//! ```text
//! /boot/config-RELEASE              Debian and its relatives
//! /usr/lib/modules/RELEASE/config   Fedora and its relatives (also below /lib)
//! ```

use std::collections::BTreeSet;

use crate::convert::{ConvertError, View, open_verified};
use crate::error::{Class, Classified};
use crate::image::oci::LayerDescriptor;
use crate::image::squashfs::{Compressor, Squashfs};
use crate::manifest::{SystemManifest, TargetName};
use crate::store::{Store, StoreError};
use crate::text::one_line;

/// Most bytes of a kernel's configuration; Debian's has 280 KiB.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Most names of a folder that are looked at.
const MAX_NAMES: usize = 1 << 12;
/// Most kernels that are looked at in an image.
const MAX_KERNELS: usize = 16;

/// Why the kernels of a system cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum KernelsError {
    /// An image is not in the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A layer cannot be read.
    #[error("target `{target}`: {source}")]
    Layer {
        /// The target.
        target: TargetName,
        /// Why.
        source: ConvertError,
    },
}

impl Classified for KernelsError {
    fn class(&self) -> Class {
        match self {
            Self::Store(error) => error.class(),
            Self::Layer { source, .. } => source.class(),
        }
    }
}

/// A kernel of the system.
struct Kernel {
    target: TargetName,
    release: String,
    config: String,
}

/// Returns a note for each codec of a target that a kernel of the system does not have, or may not have.
///
/// # Errors
/// A layer that cannot be read.
pub(super) fn notes(
    store: &Store,
    manifest: &SystemManifest,
) -> Result<Vec<(TargetName, String)>, KernelsError> {
    let mut images = Vec::new();
    for (name, target) in &manifest.targets {
        images.push((name, store.image(&target.digest)?.layers));
    }
    let mut codecs = Vec::new();
    for (name, layers) in &images {
        let found = uncommon(store, layers).map_err(|source| failed(name, source))?;
        codecs.extend(found.into_iter().map(|codec| (*name, codec)));
    }
    if codecs.is_empty() {
        return Ok(Vec::new());
    }
    let mut kernels = Vec::new();
    for (name, layers) in &images {
        if let Some(view) = View::open(store, layers).map_err(|source| failed(name, source))? {
            look(&view, name, &mut kernels).map_err(|source| failed(name, source))?;
        }
    }
    Ok(codecs.into_iter().filter_map(|(name, codec)| Some((name.clone(), note(codec, &kernels)?))).collect())
}

fn failed(target: &TargetName, source: ConvertError) -> KernelsError {
    KernelsError::Layer { target: target.clone(), source }
}

/// The kernel's option for a codec that not every kernel with squashfs has.
fn option(codec: Compressor) -> Option<&'static str> {
    match codec {
        Compressor::Lz4 => Some("CONFIG_SQUASHFS_LZ4"),
        Compressor::Lzo => Some("CONFIG_SQUASHFS_LZO"),
        Compressor::Xz => Some("CONFIG_SQUASHFS_XZ"),
        // The default of kernels, the default of mosfs, and what no kernel has.
        Compressor::Gzip | Compressor::Zstd | Compressor::Lzma => None,
    }
}

/// The codecs of an image's layers that have an [`option`].
fn uncommon(store: &Store, layers: &[LayerDescriptor]) -> Result<BTreeSet<Compressor>, ConvertError> {
    let mut found = BTreeSet::new();
    for layer in layers.iter().filter(|layer| layer.image().is_some_and(|image| image.kernel == "squashfs")) {
        let Some(source) = open_verified(store, layer)? else { continue };
        let superblock = Squashfs::read_superblock(&source)
            .map_err(|source| ConvertError::Below { layer: layer.digest, source: Box::new(source) })?;
        found.extend(option(superblock.compressor).map(|_| superblock.compressor));
    }
    Ok(found)
}

/// Adds the kernels of an image whose configuration it has.
fn look(view: &View, target: &TargetName, kernels: &mut Vec<Kernel>) -> Result<(), ConvertError> {
    let mut paths = Vec::new();
    for name in view.names(b"boot", MAX_NAMES)? {
        if let Some(release) = name.strip_prefix(b"config-") {
            paths.push((release.to_vec(), [b"boot/", &name[..]].concat()));
        }
    }
    for folder in ["usr/lib/modules", "lib/modules"] {
        for release in view.names(folder.as_bytes(), MAX_NAMES)? {
            let path = [folder.as_bytes(), b"/", &release[..], b"/config"].concat();
            paths.push((release, path));
        }
    }
    for (release, path) in paths.into_iter().take(MAX_KERNELS) {
        let release = one_line(&String::from_utf8_lossy(&release)).into_owned();
        let known = |kernel: &Kernel| kernel.target == *target && kernel.release == release;
        if kernels.iter().any(known) {
            continue;
        }
        if let Some(config) = view.read_file(&path, MAX_CONFIG_BYTES)? {
            let config = String::from_utf8_lossy(&config).into_owned();
            kernels.push(Kernel { target: target.clone(), release, config });
        }
    }
    Ok(())
}

/// What to say of a codec, if anything.
fn note(codec: Compressor, kernels: &[Kernel]) -> Option<String> {
    let option = option(codec)?;
    let name = codec.name();
    if kernels.is_empty() {
        return Some(format!(
            "{name} layers: dm-verity requires a kernel with {option}; no image of the system contains a kernel configuration to check"
        ));
    }
    let has = |kernel: &&Kernel| {
        kernel.config.lines().any(|line| line.strip_prefix(option).is_some_and(|value| value == "=y"))
    };
    let without: Vec<String> = kernels
        .iter()
        .filter(|kernel| !has(kernel))
        .map(|kernel| format!("{} of target `{}`", kernel.release, kernel.target))
        .collect();
    (!without.is_empty()).then(|| {
        format!(
            "{name} layers: kernel {} lacks {option}, so it mounts them only through FUSE",
            without.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(config: &str) -> Kernel {
        Kernel { target: "os".parse().unwrap(), release: "6.1.0".into(), config: config.into() }
    }

    #[test]
    fn a_note_names_the_kernel_that_lacks_the_codec() {
        let (with, without) =
            (kernel("CONFIG_SQUASHFS_LZ4=y\n"), kernel("# CONFIG_SQUASHFS_LZ4 is not set\n"));
        assert_eq!(note(Compressor::Lz4, &[kernel("CONFIG_SQUASHFS_LZ4=y")]), None);
        assert_eq!(note(Compressor::Zstd, &[]), None);
        let said = note(Compressor::Lz4, &[with, without]).unwrap();
        assert!(said.contains("6.1.0 of target `os`") && said.contains("CONFIG_SQUASHFS_LZ4"), "{said}");
        // Another option that begins alike does not count.
        assert!(note(Compressor::Xz, &[kernel("CONFIG_SQUASHFS_XZ_FAST=y\n")]).is_some());
        assert!(note(Compressor::Lzo, &[]).unwrap().contains("CONFIG_SQUASHFS_LZO"));
    }
}
