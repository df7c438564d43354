//! Which modules of the kernel an initramfs has, and in which order they are loaded.
//!
//! An initramfs of mosfs has no program that finds modules by the hardware (udev, modprobe). It loads a fixed list
//! ([`WANTED`]), so that one image boots on machines that its publisher has not seen. `modules.dep` names what each
//! of them needs; a module comes after all that it needs.

use std::collections::BTreeMap;
use std::io::Read;

use crate::image::files::{Files, FilesError};
use crate::sorting;

/// Modules without which no system can be mounted. Each must be a file or built into the kernel.
pub(super) const REQUIRED: &[&str] = &["loop", "dm_mod", "dm_verity", "squashfs", "overlay"];

/// Modules that are taken where the kernel has them, in groups as docs/kernel.md lists them. The order is that of
/// loading.
pub(super) const WANTED: &[(&str, &[&str])] = &[
    // Asked for by name when a file system is mounted, where no program would load them.
    (
        "checksums and ciphers",
        &[
            "crc32c_generic",
            "crc32c_intel",
            "crc32c_cryptoapi",
            "sha256_ssse3",
            "sha256_generic",
            "xxhash_generic",
            "blake2b_generic",
        ],
    ),
    (
        "the system",
        &["loop", "dm_mod", "dm_verity", "squashfs", "erofs", "overlay", "fuse", "ext4", "xfs", "btrfs"],
    ),
    (
        "the EFI system partition",
        &["vfat", "nls_cp437", "nls_ascii", "nls_iso8859_1", "nls_utf8", "efivarfs"],
    ),
    (
        "disks",
        &[
            "sd_mod",
            "sr_mod",
            "nvme",
            "ahci",
            "ata_piix",
            "ata_generic",
            "mmc_block",
            "sdhci_pci",
            "sdhci_acpi",
            "vmd",
            "megaraid_sas",
            "mpt3sas",
            "mpi3mr",
            "aacraid",
            "hpsa",
            "smartpqi",
            "isofs",
        ],
    ),
    ("USB", &["xhci_pci", "ehci_pci", "ohci_pci", "uhci_hcd", "usb_storage", "uas", "usbhid", "hid_generic"]),
    (
        "virtual machines",
        &[
            "virtio_pci",
            "virtio_mmio",
            "virtio_blk",
            "virtio_scsi",
            "vmw_pvscsi",
            "hv_vmbus",
            "hv_storvsc",
            "xen_blkfront",
        ],
    ),
    ("keyboards", &["i8042", "atkbd"]),
    // Loading them starts none. Intel's is found through its SMBus.
    ("watchdogs", &["wdat_wdt", "i2c_i801", "iTCO_wdt", "sp5100_tco", "i6300esb"]),
    ("TPMs", &["tpm_crb", "tpm_tis", "tpm_tis_spi", "tpm_tis_i2c", "tpm_ftpm_tee"]),
];

/// Longest `modules.dep` and `modules.builtin` that are read, in bytes. Debian's have 1 MB.
const MAX_LIST: u64 = 32 << 20;
/// Largest module, in bytes, compressed or not.
const MAX_MODULE: u64 = 64 << 20;

/// Why the modules cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// A file of the image cannot be read.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// A file that the list of modules names, or the list itself.
    #[error("/{path} is missing")]
    Missing {
        /// The path, without the leading slash.
        path: String,
    },
    /// A module without which nothing boots.
    #[error("the kernel {release} has no module {module}, which a boot requires")]
    Required {
        /// The kernel's release.
        release: String,
        /// The module.
        module: String,
    },
    /// `modules.dep` makes no sense.
    #[error("/{path}: line {line}: expected `MODULE: MODULE…`")]
    List {
        /// The path, without the leading slash.
        path: String,
        /// The line, counted from 1.
        line: usize,
    },
    /// A module that cannot be decompressed.
    #[error("/{path}: {why}")]
    Compressed {
        /// The path, without the leading slash.
        path: String,
        /// What is wrong with it.
        why: String,
    },
}

/// A module, decompressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Module {
    /// Its file name, such as `dm-verity.ko`.
    pub name: String,
    /// What finit_module(2) takes.
    pub content: Vec<u8>,
}

/// Returns the modules of a release that an initramfs has, in the order of loading. `folder` is
/// `usr/lib/modules/RELEASE` in the image.
///
/// # Errors
/// [`ModulesError`].
pub(super) fn collect(files: &Files, folder: &str, release: &str) -> Result<Vec<Module>, ModulesError> {
    let read = |name: &str| {
        let path = format!("{folder}/{name}");
        let bytes = files.read(&path, MAX_LIST)?;
        let text = bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        text.ok_or(ModulesError::Missing { path })
    };
    let dependencies = read("modules.dep")?;
    let builtin = read("modules.builtin")?;
    let paths = order(&dependencies, &builtin, release, &format!("{folder}/modules.dep"))?;
    let mut modules = Vec::new();
    for path in paths {
        let path = format!("{folder}/{path}");
        let stored = files.read(&path, MAX_MODULE)?;
        let stored = stored.ok_or_else(|| ModulesError::Missing { path: path.clone() })?;
        let content =
            decompress(&path, stored).map_err(|why| ModulesError::Compressed { path: path.clone(), why })?;
        modules.push(Module { name: format!("{}.ko", stem(&path)), content });
    }
    Ok(modules)
}

/// Returns the paths of all modules that are wanted, each after those that it needs.
fn order(dependencies: &str, builtin: &str, release: &str, path: &str) -> Result<Vec<String>, ModulesError> {
    let mut needs: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (line, text) in (1..).zip(dependencies.lines()) {
        let list = || ModulesError::List { path: path.to_string(), line };
        let (module, needed) = text.split_once(':').ok_or_else(list)?;
        needs.insert(module, needed.split_whitespace().collect());
    }
    let by_name: BTreeMap<String, &str> = sorting::map(needs.keys().map(|path| (name(path), *path)));
    let builtin = sorting::set(builtin.lines().map(|line| name(line.trim())));
    for module in REQUIRED {
        if !by_name.contains_key(*module) && !builtin.contains(*module) {
            return Err(ModulesError::Required { release: release.into(), module: (*module).into() });
        }
    }
    let mut ordered: Vec<String> = Vec::new();
    for wanted in WANTED.iter().flat_map(|(_, modules)| *modules) {
        let Some(path) = by_name.get(*wanted) else { continue };
        // depmod lists all that a module needs, also what those need, so that the last one comes first.
        let needed = needs.get(path).into_iter().flatten().rev();
        for one in needed.chain([path]) {
            if !ordered.iter().any(|known| known == one) {
                ordered.push((*one).to_string());
            }
        }
    }
    Ok(ordered)
}

/// The file name without `.ko` and what follows.
fn stem(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split_once(".ko").map_or(file, |(stem, _)| stem)
}

/// The name of a module: the kernel does not distinguish `-` from `_`.
fn name(path: &str) -> String {
    stem(path).replace('-', "_")
}

fn decompress(path: &str, stored: Vec<u8>) -> Result<Vec<u8>, String> {
    let ending = path.rsplit('.').next().unwrap_or_default();
    let mut content = Vec::new();
    let limited = MAX_MODULE + 1;
    let read = match ending {
        "xz" => liblzma::read::XzDecoder::new(stored.as_slice()).take(limited).read_to_end(&mut content),
        "gz" => flate2::read::MultiGzDecoder::new(stored.as_slice()).take(limited).read_to_end(&mut content),
        "zst" => zstd::stream::read::Decoder::new(stored.as_slice())
            .and_then(|decoder| decoder.take(limited).read_to_end(&mut content)),
        _ => return Ok(stored),
    };
    read.map_err(|error| error.to_string())?;
    if content.len() as u64 > MAX_MODULE {
        return Err(format!("more than {MAX_MODULE} bytes when decompressed"));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUILTIN: &str = "kernel/drivers/md/dm-mod.ko\nkernel/fs/overlayfs/overlay.ko\n";

    #[test]
    fn a_module_comes_after_all_that_it_needs() {
        let dep = "kernel/fs/squashfs/squashfs.ko.xz:\n\
                   kernel/drivers/block/loop.ko:\n\
                   kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz kernel/fs/mbcache.ko.xz kernel/fs/jbd2/jbd2.ko.xz\n\
                   kernel/fs/jbd2/jbd2.ko.xz:\nkernel/lib/crc16.ko.xz:\nkernel/fs/mbcache.ko.xz:\n\
                   kernel/drivers/net/unwanted.ko:\n\
                   kernel/drivers/md/dm-verity.ko.xz: kernel/drivers/md/dm-bufio.ko.xz\n\
                   kernel/drivers/md/dm-bufio.ko.xz:\n";
        let found = order(dep, BUILTIN, "6.1", "modules.dep").unwrap();
        let names: Vec<_> = found.iter().map(|path| stem(path)).collect();
        assert_eq!(names, ["loop", "dm-bufio", "dm-verity", "squashfs", "jbd2", "mbcache", "crc16", "ext4"]);
    }

    #[test]
    fn a_kernel_that_cannot_boot_a_system_is_refused() {
        let dep = "kernel/drivers/block/loop.ko:\nkernel/drivers/md/dm-verity.ko:\n";
        let error = order(dep, BUILTIN, "6.1", "modules.dep").unwrap_err();
        assert_eq!(error.to_string(), "the kernel 6.1 has no module squashfs, which a boot requires");
        let error = order("no colon\n", BUILTIN, "6.1", "m/modules.dep").unwrap_err();
        assert_eq!(error.to_string(), "/m/modules.dep: line 1: expected `MODULE: MODULE…`");
    }

    #[test]
    fn modules_are_decompressed_within_a_bound() {
        let zst = zstd::bulk::compress(b"module", 3).unwrap();
        assert_eq!(decompress("a.ko.zst", zst.clone()).unwrap(), b"module");
        assert_eq!(decompress("a.ko", b"module".to_vec()).unwrap(), b"module");
        assert!(decompress("a.ko.xz", zst.clone()).is_err());
        assert!(decompress("a.ko.gz", zst).is_err());
        let bomb = zstd::bulk::compress(&vec![0; MAX_MODULE as usize + 1], 3).unwrap();
        assert_eq!(decompress("a.ko.zst", bomb).unwrap_err(), "more than 67108864 bytes when decompressed");
    }
}
