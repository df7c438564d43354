//! The disks of a machine, what is on them, and which one is meant.
//!
//! Rules: a disk is taken only if it was named, or if it is the only one that is empty and `only-empty` was asked for; one
//! on which a setup of the same system has begun, or was done, still counts then, and comes first.
//! One that is in use, read-only, or the medium's own is never taken. One that is not empty is taken only if it is
//! named as the one to erase.
//!
//! *Empty* means: no partition table at either end, no content that libblkid knows, and nothing but zeros in the first
//! and the last MiB.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::error::SetupError;
use crate::error::{IoContext, IoError};
use crate::sorting;
use crate::sys::blkid::{self, Content};
use crate::sys::disk::{self, numbers};
use crate::sys::file::read_named;

/// Bytes at either end of a disk that are looked at, and that are erased.
pub(super) const EDGE: u64 = 1 << 20;
/// Longest file of sysfs or procfs that is read, in bytes.
const MAX_TEXT: u64 = 4 << 20;
/// Disks that nobody installs a system on, by the beginnings of their names.
const NOT_OFFERED: [&str; 8] = ["loop", "ram", "zram", "sr", "fd", "dm-", "md", "nbd"];

/// Which disk to set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// The only disk that is empty.
    OnlyEmpty,
    /// The disk with this serial number.
    Serial(String),
    /// The disk with this World Wide Name.
    Wwn(String),
    /// The disk at this path, which may be a link of udev's.
    Path(PathBuf),
}

impl std::str::FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let valued = |value: &str| !value.trim().is_empty();
        match text.split_once(':') {
            _ if text == "only-empty" => Ok(Self::OnlyEmpty),
            _ if text.starts_with('/') => Ok(Self::Path(text.into())),
            Some(("serial", value)) if valued(value) => Ok(Self::Serial(value.into())),
            Some(("wwn", value)) if valued(value) => Ok(Self::Wwn(value.into())),
            Some(("path", value)) if value.starts_with('/') => Ok(Self::Path(value.into())),
            _ => Err("expected only-empty, serial:S, wwn:W, or the path of a device".into()),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OnlyEmpty => f.write_str("only-empty"),
            Self::Serial(serial) => write!(f, "serial:{serial}"),
            Self::Wwn(wwn) => write!(f, "wwn:{wwn}"),
            Self::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A disk of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The kernel's name for it, such as `sda`.
    pub name: String,
    /// Its device.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its model; empty where it is not known.
    pub model: String,
    /// Its serial number; empty where it is not known.
    pub serial: String,
    /// Its World Wide Name; empty where it is not known.
    pub wwn: String,
    /// What is on it, as a phrase; `None` if it is empty.
    pub holds: Option<String>,
    /// Who uses it, as a phrase.
    pub used_by: Option<String>,
    /// Whether it cannot be written.
    pub read_only: bool,
    /// Whether the medium is on it.
    pub is_medium: bool,
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.path.display(), size(self.size_bytes))?;
        for (name, value) in [("", &self.model), ("serial ", &self.serial)] {
            if !value.is_empty() {
                write!(f, ", {name}{value}")?;
            }
        }
        f.write_str(", ")?;
        match (&self.is_medium, &self.used_by, &self.holds) {
            (true, ..) => f.write_str("the medium")?,
            (_, Some(by), _) => write!(f, "in use: {by}")?,
            _ if self.read_only => f.write_str("read-only")?,
            (_, _, Some(holds)) => f.write_str(holds)?,
            _ => f.write_str("empty")?,
        }
        f.write_str(")")
    }
}

/// A size for people: `512 MiB`, `1.8 TiB`.
pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" || value.fract() == 0.0 {
                format!("{value:.0} {unit}")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// Returns the kernel's name of the disk that a folder is on; `None` if it is on none, or on several.
pub fn of_folder(folder: &Path) -> Option<String> {
    names(fs::metadata(folder).ok()?.dev()).ok().map(|(_, disk)| disk)
}

/// Returns all disks that a system could be installed on, in the order of their names. `medium` is the name of the one
/// that the system comes from.
///
/// # Errors
/// If the kernel does not list them.
pub fn list(medium: Option<&str>) -> Result<Vec<Disk>, SetupError> {
    let folder = Path::new("/sys/block");
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).on("list", folder)? {
        names.extend(entry.on("list", folder)?.file_name().into_string());
    }
    sorting::sort(&mut names);
    names.retain(|name| !NOT_OFFERED.iter().any(|other| name.starts_with(other)));
    let mut disks = Vec::new();
    for name in names {
        match Disk::read(&name, medium) {
            Ok(disk) if disk.size_bytes > 0 => disks.push(disk),
            Ok(_) => {}
            // An empty card reader, a disk that has gone.
            Err(error) => log::info!("the disk {name} is passed over: {error}"),
        }
    }
    Ok(disks)
}

/// Finds the disk that is meant. `is_ours` says whether a disk that is not empty holds what a setup of this system made.
///
/// # Errors
/// [`SetupError::NoMatch`], [`SetupError::Several`], [`SetupError::NotADisk`].
pub fn choose(
    choice: &Choice,
    medium: Option<&str>,
    is_ours: impl Fn(&Disk) -> bool,
) -> Result<Disk, SetupError> {
    if let Choice::Path(path) = choice {
        return Disk::read(&name_of(path)?, medium);
    }
    pick(choice, list(medium)?, is_ours)
}

/// The one disk of a list that a choice other than a path means.
fn pick(choice: &Choice, disks: Vec<Disk>, is_ours: impl Fn(&Disk) -> bool) -> Result<Disk, SetupError> {
    let all: Vec<String> = disks.iter().map(ToString::to_string).collect();
    let usable = |disk: &Disk| !disk.is_medium && disk.used_by.is_none() && !disk.read_only;
    if *choice == Choice::OnlyEmpty {
        // It was empty when a setup began: that one is continued, or there is nothing to do.
        let mut ours = disks.iter().filter(|disk| usable(disk) && disk.holds.is_some() && is_ours(disk));
        if let (Some(one), None) = (ours.next(), ours.next()) {
            return Ok(one.clone());
        }
    }
    let mut found: Vec<Disk> = disks
        .into_iter()
        .filter(|disk| match choice {
            // Rule: only a disk that is empty is taken without being named.
            Choice::OnlyEmpty => usable(disk) && disk.holds.is_none(),
            Choice::Serial(serial) => disk.serial == *serial,
            Choice::Wwn(wwn) => disk.wwn == *wwn,
            Choice::Path(path) => disk.path == *path,
        })
        .collect();
    let choice = choice.to_string();
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(SetupError::NoMatch { choice, disks: all }),
        _ => Err(SetupError::Several { choice, disks: found.iter().map(ToString::to_string).collect() }),
    }
}

/// Returns the kernel's name of the whole disk at a path.
///
/// # Errors
/// [`SetupError::NotADisk`].
pub fn name_of(path: &Path) -> Result<String, SetupError> {
    let found = fs::metadata(path).on("stat", path)?;
    let not = |found: &str| SetupError::NotADisk { path: path.to_path_buf(), found: found.into() };
    if !found.file_type().is_block_device() {
        return Err(not("something that is no block device"));
    }
    let (name, disk) = names(found.rdev())?;
    if name == disk { Ok(name) } else { Err(not(&format!("a partition of /dev/{disk}"))) }
}

/// The kernel's names of a block device and of the disk that it is on.
fn names(device: u64) -> Result<(String, String), IoError> {
    let (major, minor) = numbers(device);
    let link = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let folder = fs::canonicalize(&link).on("find", &link)?;
    let last = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let name = last(&folder);
    if folder.join("partition").exists() {
        return Ok((name, folder.parent().map(last).unwrap_or_default()));
    }
    Ok((name.clone(), name))
}

fn sysfs(name: &str, file: &str) -> String {
    let path = Path::new("/sys/block").join(name).join(file);
    let bytes = read_named(&path, MAX_TEXT).unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim().to_string()
}

impl Disk {
    /// Looks at a disk. Nothing is written, and it may be in use.
    fn read(name: &str, medium: Option<&str>) -> Result<Self, SetupError> {
        let path = Path::new("/dev").join(name);
        let device = disk::open_to_read(&path).on("open", &path)?;
        let size_bytes = disk::size_bytes(&device).on("measure", &path)?;
        let first = |files: &[&str]| {
            files.iter().map(|file| sysfs(name, file)).find(|text| !text.is_empty()).unwrap_or_default()
        };
        let mut serial = first(&["serial", "device/serial"]);
        if serial.is_empty() {
            // SCSI: four bytes of header, then the number (SPC-4, "Unit Serial Number VPD page").
            let page = read_named(&Path::new("/sys/block").join(name).join("device/vpd_pg80"), MAX_TEXT);
            let page = page.unwrap_or_default();
            serial = String::from_utf8_lossy(page.get(4..).unwrap_or_default())
                .trim_matches(|c: char| c.is_whitespace() || c == '\0')
                .to_string();
        }
        let holds = if size_bytes == 0 { None } else { holds(&device, &path, size_bytes)? };
        Ok(Self {
            used_by: user(name)?,
            read_only: sysfs(name, "ro") == "1",
            model: first(&["device/model", "loop/backing_file"]),
            wwn: first(&["wwid", "device/wwid"]),
            name: name.to_string(),
            path,
            size_bytes,
            serial,
            holds,
            is_medium: medium == Some(name),
        })
    }

    /// The folder of a partition in sysfs, by its number.
    pub(super) fn partition(&self, number: u32) -> Option<(String, u64)> {
        let folder = Path::new("/sys/block").join(&self.name);
        let entries = fs::read_dir(&folder).ok()?;
        let mut names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let name =
            names.find(|name| sysfs(&self.name, &format!("{name}/partition")) == number.to_string())?;
        // In units of 512 bytes, whatever the disk's sectors are (Documentation/ABI/stable/sysfs-block of Linux).
        let start: u64 = sysfs(&self.name, &format!("{name}/start")).parse().ok()?;
        Some((name, start * 512))
    }
}

/// Who uses a disk or one of its partitions, as a phrase.
fn user(name: &str) -> Result<Option<String>, IoError> {
    let folder = Path::new("/sys/block").join(name);
    let mut parts = vec![(name.to_string(), folder.clone())];
    for entry in fs::read_dir(&folder).on("list", &folder)?.flatten() {
        if entry.path().join("partition").exists() {
            parts.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
        }
    }
    sorting::sort(&mut parts);
    let mounts = read_named(Path::new("/proc/self/mountinfo"), MAX_TEXT)?;
    let mounts = String::from_utf8_lossy(&mounts);
    let swaps = read_named(Path::new("/proc/swaps"), MAX_TEXT).unwrap_or_default();
    let swaps = String::from_utf8_lossy(&swaps);
    for (part, folder) in parts {
        let number = read_named(&folder.join("dev"), 64).unwrap_or_default();
        let number = String::from_utf8_lossy(&number).trim().to_string();
        // proc(5): mount id, parent id, major:minor, root, mount point.
        let place = mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(2);
            (words.next() == Some(&number)).then(|| words.nth(1).unwrap_or_default().to_string())
        });
        if let Some(place) = place {
            return Ok(Some(format!("/dev/{part} is mounted at {place}")));
        }
        let is_swap = |line: &str| line.split_whitespace().next() == Some(&format!("/dev/{part}"));
        if swaps.lines().any(is_swap) {
            return Ok(Some(format!("/dev/{part} is swap space")));
        }
        if let Ok(mut holders) = fs::read_dir(folder.join("holders"))
            && let Some(Ok(holder)) = holders.next()
        {
            return Ok(Some(format!("/dev/{part} is part of /dev/{}", holder.file_name().to_string_lossy())));
        }
    }
    Ok(None)
}

/// What is on a disk, as a phrase; `None` if it is empty.
fn holds(device: &File, path: &Path, size_bytes: u64) -> Result<Option<String>, IoError> {
    match blkid::probe(device).on("identify", path)? {
        Content::Superblock(found) => {
            let label =
                if found.label.is_empty() { String::new() } else { format!(" labelled {}", found.label) };
            return Ok(Some(format!("{}{label}", found.kind)));
        }
        Content::Ambiguous => return Ok(Some("signatures of several kinds".into())),
        Content::Nothing => {}
    }
    let edge = EDGE.min(size_bytes);
    let (first, last) = (read(device, 0, edge).on("read", path)?, size_bytes - edge);
    let last = read(device, last, edge).on("read", path)?;
    Ok(table(&first, &last).or_else(|| {
        let zeros = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        (!zeros(&first) || !zeros(&last)).then(|| "data of an unknown kind".to_string())
    }))
}

/// What kind of partition table the first and the last MiB of a disk hold.
fn table(first: &[u8], last: &[u8]) -> Option<String> {
    let header = |bytes: &[u8], at: usize| bytes.get(at..at + 8) == Some(GPT_SIGNATURE);
    if header(first, 512) || header(first, 4096) {
        return Some("a GPT partition table".into());
    }
    let end = last.len();
    if [512, 4096].iter().any(|sector| end >= *sector && header(last, end - sector)) {
        return Some("a backup GPT partition table".into());
    }
    (first.get(510..512) == Some(&[0x55, 0xaa])).then(|| "an MBR partition table".into())
}

/// UEFI 2.10, section 5.3.2, "GPT Header".
pub(super) const GPT_SIGNATURE: &[u8] = b"EFI PART";

/// Reads a part of a device.
pub(super) fn read(mut device: &File, at: u64, bytes: u64) -> io::Result<Vec<u8>> {
    device.seek(SeekFrom::Start(at))?;
    let mut content = Vec::new();
    device.take(bytes).read_to_end(&mut content)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(name: &str) -> Disk {
        Disk {
            name: name.into(),
            path: Path::new("/dev").join(name),
            size_bytes: 8 << 30,
            model: "Model".into(),
            serial: format!("S-{name}"),
            wwn: format!("naa.{name}"),
            holds: None,
            used_by: None,
            read_only: false,
            is_medium: false,
        }
    }

    #[test]
    fn only_one_empty_disk_is_taken_without_a_name() {
        let full = Disk { holds: Some("ext4".into()), ..disk("sda") };
        let used = Disk { used_by: Some("/dev/sdb1 is mounted at /".into()), ..disk("sdb") };
        let medium = Disk { is_medium: true, ..disk("sdc") };
        let locked = Disk { read_only: true, ..disk("sdd") };
        let others = vec![full, used, medium, locked];
        let with =
            |more: &[Disk]| pick(&Choice::OnlyEmpty, [others.clone(), more.to_vec()].concat(), |_| false);
        assert_eq!(with(&[disk("sde")]).unwrap().name, "sde");
        let error = with(&[]).unwrap_err().to_string();
        assert_eq!(
            error,
            "no disk matches `only-empty`; disks of this machine: /dev/sda (8 GiB, Model, serial S-sda, ext4); \
             /dev/sdb (8 GiB, Model, serial S-sdb, in use: /dev/sdb1 is mounted at /); \
             /dev/sdc (8 GiB, Model, serial S-sdc, the medium); /dev/sdd (8 GiB, Model, serial S-sdd, read-only)"
        );
        let error = with(&[disk("sde"), disk("sdf")]).unwrap_err().to_string();
        assert_eq!(
            error,
            "2 disks match `only-empty`: /dev/sde (8 GiB, Model, serial S-sde, empty); \
             /dev/sdf (8 GiB, Model, serial S-sdf, empty)"
        );
    }

    #[test]
    fn the_only_empty_disk_is_still_meant_when_a_setup_has_begun_on_it() {
        let begun = |name: &str| Disk { holds: Some("a GPT partition table".into()), ..disk(name) };
        let is_ours = |disk: &Disk| disk.name != "sda";
        let pick = |disks: &[Disk]| pick(&Choice::OnlyEmpty, disks.to_vec(), is_ours);
        assert_eq!(pick(&[begun("sda"), begun("sdb")]).unwrap().name, "sdb");
        assert_eq!(pick(&[begun("sda"), begun("sdb"), disk("sdc")]).unwrap().name, "sdb");
        // Two of them: neither, and never one that cannot be used.
        assert!(matches!(pick(&[begun("sdb"), begun("sdc")]), Err(SetupError::NoMatch { .. })));
        let medium = Disk { is_medium: true, ..begun("sdb") };
        assert!(matches!(pick(&[begun("sda"), medium]), Err(SetupError::NoMatch { .. })));
        let used = Disk { used_by: Some("/dev/sdb1 is mounted at /".into()), ..begun("sdb") };
        assert!(matches!(pick(&[begun("sda"), used]), Err(SetupError::NoMatch { .. })));
    }

    #[test]
    fn a_serial_number_or_name_means_one_disk_in_any_order() {
        let disks = vec![disk("sda"), disk("sdb")];
        let reversed: Vec<_> = disks.iter().rev().cloned().collect();
        for list in [disks.clone(), reversed] {
            assert_eq!(pick(&Choice::Serial("S-sdb".into()), list.clone(), |_| true).unwrap().name, "sdb");
            assert_eq!(pick(&Choice::Wwn("naa.sda".into()), list.clone(), |_| true).unwrap().name, "sda");
            assert!(matches!(
                pick(&Choice::Serial("S-sd".into()), list, |_| true),
                Err(SetupError::NoMatch { .. })
            ));
        }
        let twins = vec![disk("sda"), Disk { serial: "S-sda".into(), ..disk("sdb") }];
        assert!(matches!(
            pick(&Choice::Serial("S-sda".into()), twins, |_| true),
            Err(SetupError::Several { .. })
        ));
    }

    #[test]
    fn choices_are_read_and_nothing_else() {
        for text in ["only-empty", "serial:A:B", "wwn:naa.5", "/dev/sda"] {
            assert_eq!(text.parse::<Choice>().unwrap().to_string(), text);
        }
        assert_eq!("path:/dev/sda".parse(), Ok(Choice::Path("/dev/sda".into())));
        for text in ["", "sda", "serial:", "path:sda", "any", "only-empty "] {
            assert!(text.parse::<Choice>().is_err(), "{text}");
        }
    }

    #[test]
    fn partition_tables_at_either_end_are_found() {
        let empty = vec![0; EDGE as usize];
        assert_eq!(table(&empty, &empty), None);
        for (at, sector) in [(512, 512), (4096, 4096)] {
            let mut first = empty.clone();
            first[at..at + 8].copy_from_slice(GPT_SIGNATURE);
            assert_eq!(table(&first, &empty).unwrap(), "a GPT partition table");
            let mut last = empty.clone();
            let end = last.len() - sector;
            last[end..end + 8].copy_from_slice(GPT_SIGNATURE);
            assert_eq!(table(&empty, &last).unwrap(), "a backup GPT partition table");
        }
        let mut first = empty.clone();
        first[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(table(&first, &empty).unwrap(), "an MBR partition table");
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(
            [size(512), size(8 << 30), size(1_500_000_000), size(2 << 40)],
            ["512 B", "8 GiB", "1.4 GiB", "2.0 TiB"]
        );
    }
}
