//! What the kernels of a system cannot mount of it.
//!
//! dm-verity hands blocks to the kernel's squashfs or erofs, which decodes only what it was built for:
//! `CONFIG_SQUASHFS_LZ4`, `CONFIG_EROFS_FS_ZIP_ZSTD` and their like. Every kernel that mounts squashfs layers has zstd and
//! zlib, every kernel with erofs lz4; of others each target gets a note where a kernel of the system cannot decode them,
//! or where no kernel's configuration is there to look into. FUSE decodes them all.
//!
//! ```text
//! /boot/config-RELEASE              Debian and its relatives
//! /usr/lib/modules/RELEASE/config   Fedora and its relatives (also below /lib)
//! ```

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::convert::{ConvertError, View, open_verified};
use crate::error::{Class, Classified};
use crate::image::erofs::{Algorithm, Erofs};
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
    let mut needs = Vec::new();
    for (name, layers) in &images {
        let found = uncommon(store, layers).map_err(|source| failed(name, source))?;
        needs.extend(found.into_iter().map(|need| (*name, need)));
    }
    if needs.is_empty() {
        return Ok(Vec::new());
    }
    let mut kernels = Vec::new();
    for (name, layers) in &images {
        if let Some(view) = View::open(store, layers).map_err(|source| failed(name, source))? {
            look(&view, name, &mut kernels).map_err(|source| failed(name, source))?;
        }
    }
    Ok(needs.into_iter().filter_map(|(name, need)| Some((name.clone(), note(need, &kernels)?))).collect())
}

fn failed(target: &TargetName, source: ConvertError) -> KernelsError {
    KernelsError::Layer { target: target.clone(), source }
}

/// What a kernel needs to mount a layer, and not every kernel with verified layers has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Need {
    /// What the layers are called.
    layers: &'static str,
    /// The kernel's option.
    option: &'static str,
}

/// What squashfs layers with a codec need.
fn need_of_squashfs(codec: Compressor) -> Option<Need> {
    let option = match codec {
        Compressor::Lz4 => "CONFIG_SQUASHFS_LZ4",
        Compressor::Lzo => "CONFIG_SQUASHFS_LZO",
        Compressor::Xz => "CONFIG_SQUASHFS_XZ",
        // The default of kernels, the default of mosfs, and what no kernel has.
        Compressor::Gzip | Compressor::Zstd | Compressor::Lzma => return None,
    };
    Some(Need { layers: codec.name(), option })
}

/// What erofs layers need, besides what clusters with each algorithm need.
const EROFS: Need = Need { layers: "erofs", option: "CONFIG_EROFS_FS" };

/// What erofs layers with an algorithm need.
fn need_of_erofs(algorithm: Algorithm) -> Option<Need> {
    Some(match algorithm {
        // fs/erofs/Kconfig: EROFS_FS_ZIP is on by default, and brings lz4.
        Algorithm::Lz4 => return None,
        Algorithm::Lzma => Need { layers: "erofs lzma", option: "CONFIG_EROFS_FS_ZIP_LZMA" },
        Algorithm::Deflate => Need { layers: "erofs deflate", option: "CONFIG_EROFS_FS_ZIP_DEFLATE" },
        Algorithm::Zstd => Need { layers: "erofs zstd", option: "CONFIG_EROFS_FS_ZIP_ZSTD" },
    })
}

/// What the layers of an image need.
fn uncommon(store: &Store, layers: &[LayerDescriptor]) -> Result<BTreeSet<Need>, ConvertError> {
    let mut found = BTreeSet::new();
    for layer in layers {
        let Some(kernel) = layer.image().map(|image| image.kernel) else { continue };
        let Some(source) = open_verified(store, layer)? else { continue };
        let below = |source| ConvertError::Below { layer: layer.digest, source: Box::new(source) };
        match kernel {
            "squashfs" => {
                let superblock = Squashfs::read_superblock(&source).map_err(below)?;
                found.extend(need_of_squashfs(superblock.compressor));
            }
            "erofs" => {
                let image = Erofs::open(Arc::new(source)).map_err(below)?;
                found.insert(EROFS);
                found.extend(image.algorithms().filter_map(need_of_erofs));
            }
            _ => {}
        }
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

/// What to say of a need, if anything.
fn note(Need { layers: name, option }: Need, kernels: &[Kernel]) -> Option<String> {
    if kernels.is_empty() {
        return Some(format!(
            "{name} layers: dm-verity requires a kernel with {option}; no image of the system contains a kernel configuration to check"
        ));
    }
    let has = |kernel: &&Kernel| {
        kernel
            .config
            .lines()
            .any(|line| line.strip_prefix(option).is_some_and(|value| matches!(value, "=y" | "=m")))
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
        let note = |codec, kernels: &[Kernel]| need_of_squashfs(codec).and_then(|need| note(need, kernels));
        assert_eq!(note(Compressor::Lz4, &[kernel("CONFIG_SQUASHFS_LZ4=y")]), None);
        assert_eq!(note(Compressor::Zstd, &[]), None);
        let said = note(Compressor::Lz4, &[with, without]).unwrap();
        assert!(said.contains("6.1.0 of target `os`") && said.contains("CONFIG_SQUASHFS_LZ4"), "{said}");
        // Another option that begins alike does not count.
        assert!(note(Compressor::Xz, &[kernel("CONFIG_SQUASHFS_XZ_FAST=y\n")]).is_some());
        assert!(note(Compressor::Lzo, &[]).unwrap().contains("CONFIG_SQUASHFS_LZO"));
    }

    #[test]
    fn erofs_needs_a_kernel_with_it_and_with_its_algorithm() {
        let debian_12 =
            kernel("CONFIG_EROFS_FS=m\nCONFIG_EROFS_FS_ZIP=y\n# CONFIG_EROFS_FS_ZIP_LZMA is not set\n");
        assert_eq!(note(EROFS, std::slice::from_ref(&debian_12)), None);
        assert_eq!(need_of_erofs(Algorithm::Lz4), None);
        let said = note(need_of_erofs(Algorithm::Zstd).unwrap(), &[debian_12]).unwrap();
        assert!(
            said.contains("erofs zstd layers: kernel 6.1.0 of target `os` lacks CONFIG_EROFS_FS_ZIP_ZSTD"),
            "{said}"
        );
    }
}
