//! The install medium that a machine was started from, and the media beside it.
//!
//! Rule: a machine installs only if the firmware started it from an install medium. The boot loader's variable
//! `LoaderDevicePartUUID` names the partition that it was started from: the disk with that partition must be an ISO 9660
//! file system of the right label, with [`layout::MEDIUM_FILE`]. A CD has no partition, and no variable: without it, the
//! optical drives are looked at. Nothing else counts, and nothing on the kernel command line.
//!
//! A disk that does not answer must not stop a boot, so a process of its own looks at each ([`Helper`]), and is left
//! behind. When it is clear that the machine installs, it has one thing to do, and looks by itself.
//!
//! Two more media may be there, each found by its label, on a disk or on a partition of one: [`layout::ANSWERS_LABEL`]
//! with `/answers.yaml`, [`layout::PROVISION_LABEL`] with `/provision.key`, or with a nonce and its signature. They are ISO
//! 9660, ext4 or FAT. A FAT label has room for 11 characters, so there it is the first 11.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::error::SetupError;
use crate::error::IoContext;
use crate::medium::layout;
use crate::sorting;
use crate::sys::atomic;
use crate::sys::blkid::{self, Content};
use crate::sys::disk::open_to_read;
use crate::sys::file::{self, Links};
use crate::sys::helper::Helper;
use crate::sys::mountapi::{self, CallError, FsContext};

/// Where the kernel lists block devices.
const SYSFS: &str = "/sys/class/block";
/// How long the disk that the machine was started from may take to appear.
const DISK_WITHIN: Duration = Duration::from_secs(30);
/// How long an optical drive may take to appear, and to read its medium.
const DRIVE_WITHIN: Duration = Duration::from_secs(15);
/// How often devices are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How often a drive without a medium is asked again.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// How long a disk may take to answer that has answered before.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// How long a mount of before may take to be gone.
const FREE_WITHIN: Duration = Duration::from_secs(5);
/// How long no device may have appeared before all are taken to be there, and how long that is waited for.
const SETTLED_AFTER: Duration = Duration::from_secs(3);
const SETTLE_WITHIN: Duration = Duration::from_secs(30);
/// Devices that no medium is on, by the beginnings of their names.
const NO_MEDIA: [&str; 7] = ["loop", "ram", "zram", "fd", "dm-", "md", "nbd"];
/// The file systems that a medium may have: what libblkid calls them, and what the kernel calls their driver.
const FILE_SYSTEMS: [(&str, &str); 5] =
    [("iso9660", "iso9660"), ("vfat", "vfat"), ("ext4", "ext4"), ("ext3", "ext4"), ("ext2", "ext4")];

/// An install medium.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Medium {
    /// Its device: a whole disk, or an optical drive.
    pub device: PathBuf,
    /// Whether it is a disk, such as a USB stick, which the firmware may prefer to the disk that was installed on.
    pub is_disk: bool,
}

/// What a process found out about a device.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Said {
    /// The partition's UUID in the partition table.
    partition: Option<String>,
    /// The file system on it, and its label.
    holds: Option<(String, String)>,
}

impl Said {
    fn of(device: &Path) -> io::Result<Self> {
        let device = open_to_read(device)?;
        let partition = blkid::partition_uuid(&device)?;
        let holds = match blkid::probe(&device)? {
            Content::Superblock(found) => Some((found.kind, found.label)),
            Content::Nothing | Content::Ambiguous => None,
        };
        Ok(Self { partition, holds })
    }

    fn is_medium(&self) -> bool {
        self.holds.as_ref().is_some_and(|(kind, label)| kind == "iso9660" && label == layout::LABEL)
    }
}

/// Finds the install medium that the firmware started this machine from; `None` if it did not. `partition` is what the boot
/// loader's variable names.
pub fn find(partition: Option<&str>, say: &dyn Fn(&str)) -> Option<Medium> {
    if let Err(error) = blkid::load() {
        say(&format!("cannot load libblkid, so no install medium is looked for: {error}"));
        return None;
    }
    let Some(uuid) = partition else {
        let optical = |name: &str| name.starts_with("sr");
        let name = search(DRIVE_WITHIN, optical, true, |said| said.is_medium())?;
        return Some(Medium { device: Path::new("/dev").join(name), is_disk: false });
    };
    let is_partition = |name: &str| Path::new(SYSFS).join(name).join("partition").exists();
    let Some(name) = search(DISK_WITHIN, is_partition, false, |said| said.partition.as_deref() == Some(uuid))
    else {
        say(&format!(
            "the partition {uuid}, which the firmware started this machine from, did not appear within {} s",
            DISK_WITHIN.as_secs()
        ));
        return None;
    };
    // A partition is in the folder of its disk.
    let disk = fs::canonicalize(Path::new(SYSFS).join(&name)).ok()?;
    let disk = disk.parent()?.file_name()?.to_str()?.to_string();
    let said = ask(&disk).ok()?.answer(ANSWER_WITHIN).ok()??;
    read_answer(&said.bytes)?.is_medium().then(|| Medium { device: node(&disk), is_disk: true })
}

/// The node of a device. sysfs writes the `/` of its name as `!`.
fn node(name: &str) -> PathBuf {
    Path::new("/dev").join(name.replace('!', "/"))
}

fn ask(name: &str) -> io::Result<Helper> {
    let node = node(name);
    Helper::start(move || (serde_json::to_vec(&Said::of(&node).ok()).unwrap_or_default(), None))
}

fn read_answer(bytes: &[u8]) -> Option<Said> {
    serde_json::from_slice(bytes).ok().flatten()
}

/// Asks all devices of a kind as they appear, until one is what is looked for. Those of a kind whose media are put in
/// later are asked again.
fn search(
    within: Duration,
    is_of_kind: impl Fn(&str) -> bool,
    again: bool,
    is_wanted: impl Fn(&Said) -> bool,
) -> Option<String> {
    let end = Instant::now() + within;
    // What was asked, and when.
    let mut asked: BTreeMap<String, (Option<Helper>, Instant)> = BTreeMap::new();
    loop {
        let names = devices().into_iter().filter(|name| is_of_kind(name));
        for name in names {
            let is_due = asked
                .get(&name)
                .is_none_or(|(helper, when)| again && helper.is_none() && when.elapsed() >= ASK_EVERY);
            if is_due {
                let helper = ask(&name).ok();
                asked.insert(name, (helper, Instant::now()));
            }
        }
        for (name, (asking, _)) in &mut asked {
            let Some(helper) = asking else { continue };
            let said = match helper.answer(Duration::ZERO) {
                Ok(None) => continue,
                Ok(Some(answer)) => read_answer(&answer.bytes),
                // It has died on this device.
                Err(_) => None,
            };
            *asking = None;
            if said.is_some_and(|said| is_wanted(&said)) {
                return Some(name.clone());
            }
        }
        if Instant::now() >= end {
            return None;
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// The names of all block devices, in order.
fn devices() -> Vec<String> {
    let Ok(entries) = fs::read_dir(SYSFS) else { return Vec::new() };
    let mut names: Vec<_> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    sorting::sort(&mut names);
    names
}

/// Waits until no more devices appear: disks and media that are slower than the install medium.
pub fn settle() {
    let (begin, mut last, mut since) = (Instant::now(), devices(), Instant::now());
    while since.elapsed() < SETTLED_AFTER && begin.elapsed() < SETTLE_WITHIN {
        thread::sleep(LOOK_EVERY * 5);
        let now = devices();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
}

impl Medium {
    /// Mounts it for reading at a folder, and returns what it says of itself. `None`, and nothing is mounted, if it is no
    /// install medium after all.
    ///
    /// # Errors
    /// [`SetupError::Mount`], [`SetupError::Io`].
    pub fn mount(&self, folder: &Path) -> Result<Option<Vec<u8>>, SetupError> {
        file::create_folders(folder)?;
        let mount = mount(&self.device, "iso9660", Access::Read)?;
        let path = through(&mount).join(layout::MEDIUM_FILE);
        let max = layout::MAX_MEDIUM_FILE as u64;
        let Some(description) = file::find_regular(&path, Links::Refused, max)? else { return Ok(None) };
        mountapi::attach(mount, folder)
            .map_err(|source| SetupError::Mount { path: self.device.clone(), source })?;
        Ok(Some(description))
    }
}

/// A medium beside the install medium.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Second {
    /// Its device.
    pub device: PathBuf,
    /// What the kernel calls the driver of its file system.
    pub driver: &'static str,
}

/// Reads a file of the medium with this label; `None` if there is no such medium.
///
/// # Errors
/// [`SetupError::SeveralMedia`]; [`SetupError::NotOnMedium`] if it lacks the file.
pub fn read(label: &str, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, SetupError> {
    let Some(medium) = second(label)? else { return Ok(None) };
    let missing =
        || SetupError::NotOnMedium { device: medium.device.clone(), label: label.into(), name: name.into() };
    medium.read(name, max_bytes)?.ok_or_else(missing).map(Some)
}

/// Finds the medium with this label.
///
/// # Errors
/// [`SetupError::SeveralMedia`].
pub fn second(label: &str) -> Result<Option<Second>, SetupError> {
    let mut found: BTreeMap<PathBuf, (PathBuf, &'static str)> = BTreeMap::new();
    for name in devices() {
        if NO_MEDIA.iter().any(|other| name.starts_with(other)) {
            continue;
        }
        let device = node(&name);
        let Ok(Said { holds: Some((kind, on_it)), .. }) = Said::of(&device) else { continue };
        let Some(driver) = driver_of(&kind, &on_it, label) else { continue };
        // A disk and its first partition may both be the one ISO 9660 file system.
        let folder = fs::canonicalize(Path::new(SYSFS).join(&name)).unwrap_or_default();
        let disk =
            if folder.join("partition").exists() { folder.parent().map(Path::to_path_buf) } else { None };
        found.entry(disk.unwrap_or(folder)).or_insert((device, driver));
    }
    let mut media = found.into_values().map(|(device, driver)| Second { device, driver });
    match (media.next(), media.next()) {
        (one, None) => Ok(one),
        (one, other) => {
            let all = one.into_iter().chain(other).chain(media);
            let devices = all.map(|medium| medium.device.display().to_string()).collect();
            Err(SetupError::SeveralMedia { label: label.into(), devices })
        }
    }
}

impl Second {
    /// Reads a file of it, if it has that.
    ///
    /// # Errors
    /// [`SetupError::Mount`], [`SetupError::Io`].
    pub fn read(&self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, SetupError> {
        let mount = mount(&self.device, self.driver, Access::Read)?;
        Ok(file::find_regular(&through(&mount).join(name), Links::Refused, max_bytes)?)
    }

    /// Writes a file onto it, whole or not at all, and removes another one, which is of an earlier time. Both have happened
    /// when this returns, and the medium may be taken out.
    ///
    /// # Errors
    /// [`SetupError::ReadOnly`], [`SetupError::Mount`], [`SetupError::Io`].
    pub fn write(&self, name: &str, bytes: &[u8], other: &str) -> Result<(), SetupError> {
        let read_only = || SetupError::ReadOnly { path: self.device.clone() };
        if self.driver == "iso9660" {
            return Err(read_only());
        }
        let mount = match mount(&self.device, self.driver, Access::Write) {
            Err(SetupError::Mount { source, .. }) if matches!(source.errno(), libc::EROFS | libc::EACCES) => {
                return Err(read_only());
            }
            mount => mount?,
        };
        let (path, other) = (through(&mount).join(name), through(&mount).join(other));
        file::remove_if_there(&other)?;
        atomic::replace(&path, bytes, 0o644, "installer.nonce").on("write", &path)?;
        let folder = file::open_folder(&through(&mount)).on("open", &self.device)?;
        Ok(file::sync_file_system(&folder).on("sync", &self.device)?)
    }
}

/// How a file system is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

/// The driver of a file system that is the medium with this label.
fn driver_of(kind: &str, found: &str, label: &str) -> Option<&'static str> {
    let driver = FILE_SYSTEMS.iter().find(|(name, _)| *name == kind).map(|(_, driver)| *driver);
    driver.filter(|_| layout::is_labelled(found, label))
}

/// Mounts a device, attached nowhere. It is unmounted when the descriptor is closed.
fn mount(device: &Path, driver: &str, access: Access) -> Result<OwnedFd, SetupError> {
    let mounted = || -> Result<OwnedFd, CallError> {
        let context = FsContext::open(driver)?;
        context.set_string("source", device.as_os_str().as_encoded_bytes())?;
        let mut flags = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
        if access == Access::Read {
            context.set_flag("ro")?;
            flags |= libc::MOUNT_ATTR_RDONLY;
            if driver == "ext4" {
                // Without it, the journal would be replayed.
                context.set_flag("noload")?;
            }
        }
        context.mount(flags)
    };
    let end = Instant::now() + FREE_WITHIN;
    loop {
        match mounted() {
            // It is mounted for the other kind of use until the last copy of that mount's descriptor is closed, and a program
            // that is just being started by this one has a copy.
            Err(error) if error.errno() == libc::EBUSY && Instant::now() < end => thread::sleep(LOOK_EVERY),
            mounted => {
                return mounted.map_err(|source| SetupError::Mount { path: device.to_path_buf(), source });
            }
        }
    }
}

fn through(mount: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()))
}

/// Whether a medium has been taken out.
pub fn is_gone(medium: &Medium) -> bool {
    let name = medium.device.file_name().unwrap_or_default();
    medium.is_disk && !Path::new(SYSFS).join(name).exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn image(kind: &str, label: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::File::create(&image).unwrap().set_len(4 << 20).unwrap();
        let mut command = match kind {
            "vfat" => Command::new("mkfs.vfat"),
            "ext4" => Command::new("mke2fs"),
            _ => Command::new("xorriso"),
        };
        match kind {
            "vfat" => command.args(["-n", label]),
            "ext4" => command.args(["-q", "-t", "ext4", "-L", label]),
            _ => {
                fs::remove_file(&image).unwrap();
                fs::create_dir(dir.path().join("tree")).unwrap();
                command.args(["-as", "mkisofs", "-quiet", "-r", "-V", label, "-o"])
            }
        };
        command.arg(&image);
        if kind == "iso9660" {
            command.arg(dir.path().join("tree"));
        }
        let output = command
            .output()
            .unwrap_or_else(|e| panic!("{command:?}: {e}; install dosfstools, e2fsprogs and xorriso"));
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        (dir, image)
    }

    fn said(kind: &str, label: &str) -> Said {
        Said::of(&image(kind, label).1).unwrap()
    }

    #[test]
    fn an_iso_9660_file_system_with_the_label_is_the_medium_and_nothing_else() {
        assert!(said("iso9660", layout::LABEL).is_medium());
        assert!(!said("iso9660", "MOSFS-INSTALLER").is_medium());
        assert!(!said("ext4", layout::LABEL).is_medium());
        assert!(!Said::default().is_medium());
    }

    #[test]
    fn a_second_medium_is_known_by_its_label() {
        for label in [layout::ANSWERS_LABEL, layout::PROVISION_LABEL] {
            for (kind, driver) in [("iso9660", "iso9660"), ("ext4", "ext4"), ("vfat", "vfat")] {
                let short = if kind == "vfat" { &label[..11] } else { label };
                let (name, found) = said(kind, short).holds.unwrap();
                assert_eq!(driver_of(&name, &found, label), Some(driver), "{label} {kind}");
                assert_eq!(driver_of(&name, &found, layout::LABEL), None);
            }
        }
        assert_eq!(driver_of("ext4", "MOSFS", layout::ANSWERS_LABEL), None);
        assert_eq!(driver_of("xfs", layout::ANSWERS_LABEL, layout::ANSWERS_LABEL), None);
    }
}
