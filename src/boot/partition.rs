//! Finding the system partition by the label or UUID of its file system, and mounting it.
//!
//! udev's links are used where they are there; else the block devices themselves are looked at, so
//! that an initramfs needs no udev. Nothing on the partition is trusted: a wrong one leads to a
//! refusal, not to a wrong boot.
//!
//! | file system | magic at | label at | UUID at | source |
//! | --- | --- | --- | --- | --- |
//! | ext4 (and 2, 3) | 0x438: `53 ef` | 0x478, 16 bytes | 0x468 | kernel, fs/ext4/ext4.h, struct ext4_super_block |
//! | xfs | 0: `XFSB` | 108, 12 bytes | 32 | fs/xfs/libxfs/xfs_format.h, struct xfs_dsb |
//! | btrfs | 0x10040: `_BHRfS_M` | 0x1012b, 256 bytes | 0x10020 | include/uapi/linux/btrfs_tree.h, struct btrfs_super_block |

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::cmdline::Partition;

/// How often the devices are looked at while they appear.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The file systems that a system partition may have.
const FILE_SYSTEMS: [Layout; 3] = [
    Layout {
        name: "ext4",
        magic_at: 0x438,
        magic: &[0x53, 0xef],
        label_at: 0x478,
        label_bytes: 16,
        uuid_at: 0x468,
    },
    Layout { name: "xfs", magic_at: 0, magic: b"XFSB", label_at: 108, label_bytes: 12, uuid_at: 32 },
    Layout {
        name: "btrfs",
        magic_at: 0x1_0040,
        magic: b"_BHRfS_M",
        label_at: 0x1_012b,
        label_bytes: 256,
        uuid_at: 0x1_0020,
    },
];

struct Layout {
    name: &'static str,
    magic_at: u64,
    magic: &'static [u8],
    label_at: u64,
    label_bytes: usize,
    uuid_at: u64,
}

/// A block device with a file system that we know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its node.
    pub device: PathBuf,
    /// The kernel's name of its file system.
    pub file_system: &'static str,
    /// The label of the file system.
    pub label: String,
    /// The UUID of the file system, as lower-case text with hyphens.
    pub uuid: String,
}

/// Looks at what is on a device; `None` where it is no file system that we know.
pub fn probe(device: &Path) -> io::Result<Option<Found>> {
    let file = File::open(device)?;
    for layout in &FILE_SYSTEMS {
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, at).map(|()| bytes)
        };
        match read(layout.magic_at, layout.magic.len()) {
            Ok(magic) if magic == layout.magic => {}
            Ok(_) => continue,
            // A device that is too short for this one may be long enough for another.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
            Err(error) => return Err(error),
        }
        let label = read(layout.label_at, layout.label_bytes)?;
        let label = label.split(|&b| b == 0).next().unwrap_or_default();
        let uuid: [u8; 16] = read(layout.uuid_at, 16)?.try_into().unwrap_or_default();
        return Ok(Some(Found {
            device: device.to_path_buf(),
            file_system: layout.name,
            label: String::from_utf8_lossy(label).into_owned(),
            uuid: uuid::Uuid::from_bytes(uuid).hyphenated().to_string(),
        }));
    }
    Ok(None)
}

/// Waits until the system partition is there, at most `patience`.
///
/// Where several devices answer to the same label, the first by name is taken: they are all
/// equally untrusted, and a second disk must not be able to stop the boot.
pub fn find(wanted: &Partition, patience: Duration) -> Option<Found> {
    let end = Instant::now() + patience;
    loop {
        if let Some(found) = look(wanted) {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn look(wanted: &Partition) -> Option<Found> {
    let try_one = |device: &Path| probe(device).ok().flatten();
    match wanted {
        Partition::Device(path) => {
            let is_block = fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
            is_block.then(|| try_one(Path::new(path))).flatten()
        }
        Partition::Label(label) => {
            block_devices().iter().filter_map(|d| try_one(d)).find(|f| f.label == *label)
        }
        Partition::Uuid(uuid) => block_devices().iter().filter_map(|d| try_one(d)).find(|f| f.uuid == *uuid),
    }
}

/// The nodes of all disks and partitions, by name; loop, RAM and device-mapper devices last.
fn block_devices() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/sys/class/block") else { return Vec::new() };
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    let is_virtual = |name: &str| ["loop", "ram", "dm-", "zram"].iter().any(|p| name.starts_with(p));
    names.sort_by(|a, b| (is_virtual(a), a).cmp(&(is_virtual(b), b)));
    // sysfs writes the `/` of a node's name as `!`.
    names.into_iter().map(|name| Path::new("/dev").join(name.replace('!', "/"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn make(package: &str, command: &mut Command) {
        let status = command.status().unwrap_or_else(|e| panic!("{command:?}: {e}; install {package}"));
        assert!(status.success(), "{command:?}");
    }

    #[test]
    fn file_systems_of_the_real_tools_are_known() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = "6d1f6e2a-0c5c-4b0a-9d2e-0a1b2c3d4e5f";
        let image = dir.path().join("ext4");
        File::create(&image).unwrap().set_len(4 << 20).unwrap();
        make(
            "e2fsprogs",
            Command::new("mke2fs").args(["-q", "-t", "ext4", "-L", "mosfs", "-U", uuid]).arg(&image),
        );
        let found = probe(&image).unwrap().unwrap();
        assert_eq!((found.file_system, found.label.as_str(), found.uuid.as_str()), ("ext4", "mosfs", uuid));
    }

    #[test]
    fn other_content_is_not_a_file_system() {
        let dir = tempfile::tempdir().unwrap();
        for len in [0, 2, 0x43a, 0x440, 1 << 20] {
            let image = dir.path().join("x");
            fs::write(&image, vec![0; len]).unwrap();
            assert_eq!(probe(&image).unwrap(), None, "{len}");
        }
        // The magic alone, at the very end of the device.
        let image = dir.path().join("x");
        let mut bytes = vec![0; 0x43a];
        bytes[0x438..].copy_from_slice(&[0x53, 0xef]);
        fs::write(&image, bytes).unwrap();
        assert!(probe(&image).is_err());
    }

    #[test]
    fn a_partition_that_never_comes_ends_the_wait() {
        assert_eq!(find(&Partition::Device("/dev/no-such-disk".into()), Duration::ZERO), None);
        assert_eq!(find(&Partition::Label("no such label".into()), Duration::ZERO), None);
    }
}
