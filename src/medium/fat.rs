//! Writes an EFI system partition: a FAT file system with the files of a folder.
//!
//! ```text
//! boot sector, for FAT32 also FSInfo and a copy    two FATs    FAT16: the root folder    clusters
//! ```
//!
//! Source: Microsoft's FAT specification (fatgen103). The file system is made at once: every file has its clusters in a
//! row. No tool and no kernel with vfat is required, and the same files give the same bytes: files in the order of their
//! names, one date, and an identifier that the caller names. (The crate fatfs 0.3.6 makes folders that fsck.fat
//! rejects.)

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::error::{IoContext, IoError};
use crate::sys::file::{Links, read_regular};

/// Largest file that is written, in bytes.
const MAX_FILE: u64 = 512 << 20;
/// Smallest sector, in bytes.
const SECTOR: u32 = 512;
/// From this size on a file system is FAT32, in bytes: with clusters of 4 KiB it has the 65,525 that make it one.
const FAT32_FROM: u64 = 260 << 20;
/// Clusters of FAT32, in bytes.
const CLUSTER: u64 = 4096;
/// Most and fewest clusters of FAT16, with a distance to the limits of the specification, 65,524 and 4,085.
const FAT16: std::ops::Range<u64> = 4200..65_000;
/// Entries of the root folder of FAT16.
const ROOT_ENTRIES: u64 = 512;
/// Size of an entry of a folder, in bytes.
const ENTRY: u64 = 32;
/// 1 January 1980, the first day that FAT knows.
const DATE: u16 = 0x21;
const FOLDER: u8 = 0x10;
const ARCHIVE: u8 = 0x20;
const LABEL: u8 = 0x08;
const LONG_NAME: u8 = 0x0f;

/// Returns all files below a folder, by their paths with `/`, in the order of these.
///
/// # Errors
/// If a file cannot be read, or is no regular file.
pub fn files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>, IoError> {
    let mut found = BTreeMap::new();
    let mut todo = vec![String::new()];
    while let Some(below) = todo.pop() {
        let place = folder.join(&below);
        for entry in fs::read_dir(&place).on("list", &place)? {
            let entry = entry.on("list", &place)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let name = if below.is_empty() { name } else { format!("{below}/{name}") };
            if entry.file_type().on("stat", &place)?.is_dir() {
                todo.push(name);
            } else {
                found.insert(name.clone(), read_regular(&folder.join(&name), Links::Refused, MAX_FILE)?);
            }
        }
    }
    Ok(found)
}

/// What a file system is to be.
#[derive(Debug, Clone, Copy)]
pub struct Volume {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The sectors of the device, in bytes.
    pub sector_bytes: u32,
    /// Its identifier.
    pub id: u32,
}

/// Makes a file system on a device, with these files. `settle` returns when all that was written so far is on the device.
///
/// **Crashes.** The first sector goes before anything else and comes back after everything else: without it there is no file
/// system, so that nothing starts from a kernel or a loader that is there in part.
///
/// # Errors
/// Those of the device; `StorageFull` if the files do not fit; `InvalidInput` for a size or a name that cannot be.
pub fn write<D: Write + Seek>(
    mut device: D,
    volume: Volume,
    files: &BTreeMap<String, Vec<u8>>,
    mut settle: impl FnMut(&mut D) -> io::Result<()>,
) -> io::Result<()> {
    let pieces = pieces(volume, files)?;
    let (first, others): (Vec<_>, Vec<_>) = pieces.into_iter().partition(|(at, _)| *at == 0);
    let nothing = first.iter().map(|(at, bytes)| (*at, vec![0; bytes.len()])).collect();
    for step in [nothing, others, first] {
        for (at, bytes) in step {
            device.seek(SeekFrom::Start(at))?;
            device.write_all(&bytes)?;
        }
        settle(&mut device)?;
    }
    Ok(())
}

/// Returns whether a device has exactly the file system that [`write()`] makes.
///
/// # Errors
/// Those of the device, and of [`write()`].
pub fn is_on(
    mut device: impl Read + Seek,
    volume: Volume,
    files: &BTreeMap<String, Vec<u8>>,
) -> io::Result<bool> {
    for (at, bytes) in pieces(volume, files)? {
        device.seek(SeekFrom::Start(at))?;
        let mut found = vec![0; bytes.len()];
        device.read_exact(&mut found)?;
        if found != bytes {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Where what is.
struct Shape {
    sector: u64,
    cluster: u64,
    total_sectors: u64,
    reserved: u64,
    fat_sectors: u64,
    root_sectors: u64,
    clusters: u64,
    is_fat32: bool,
}

impl Shape {
    fn new(volume: Volume) -> io::Result<Self> {
        let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why.to_string());
        let sector = u64::from(volume.sector_bytes.max(SECTOR));
        if ![512, 1024, 2048, 4096].contains(&sector) {
            return Err(invalid("sectors of a size that FAT cannot have"));
        }
        let is_fat32 = volume.size_bytes >= FAT32_FROM;
        let mut cluster = if is_fat32 { CLUSTER } else { sector.max(1024) };
        while !is_fat32 && volume.size_bytes / cluster >= FAT16.end {
            cluster *= 2;
        }
        let total_sectors = volume.size_bytes / sector;
        let entry = if is_fat32 { 4 } else { 2 };
        let fat_sectors = ((volume.size_bytes / cluster + 2) * entry).div_ceil(sector);
        let reserved = if is_fat32 { 32 } else { 1 };
        let root_sectors = if is_fat32 { 0 } else { (ROOT_ENTRIES * ENTRY).div_ceil(sector) };
        let used = reserved + 2 * fat_sectors + root_sectors;
        let clusters = total_sectors.saturating_sub(used) * sector / cluster;
        let fits = if is_fat32 { (65_525..1 << 28).contains(&clusters) } else { FAT16.contains(&clusters) };
        if !fits || total_sectors > u64::from(u32::MAX) {
            return Err(invalid("a size that the file system cannot have"));
        }
        Ok(Self { sector, cluster, total_sectors, reserved, fat_sectors, root_sectors, clusters, is_fat32 })
    }

    fn fat_at(&self, number: u64) -> u64 {
        (self.reserved + number * self.fat_sectors) * self.sector
    }

    fn data_at(&self) -> u64 {
        (self.reserved + 2 * self.fat_sectors + self.root_sectors) * self.sector
    }

    fn boot_sector(&self, id: u32) -> Vec<u8> {
        let mut boot = vec![0; self.sector as usize];
        let mut put = |at: usize, bytes: &[u8]| boot[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, if self.is_fat32 { &[0xeb, 0x58, 0x90] } else { &[0xeb, 0x3c, 0x90] });
        put(3, b"MOSFS   ");
        put(11, &(self.sector as u16).to_le_bytes());
        put(13, &[(self.cluster / self.sector) as u8]);
        put(14, &(self.reserved as u16).to_le_bytes());
        put(16, &[2]);
        let root_entries = if self.is_fat32 { 0 } else { ROOT_ENTRIES as u16 };
        put(17, &root_entries.to_le_bytes());
        // FAT16 of fewer sectors has their number in the older field.
        match u16::try_from(self.total_sectors) {
            Ok(sectors) if !self.is_fat32 => put(19, &sectors.to_le_bytes()),
            _ => put(32, &(self.total_sectors as u32).to_le_bytes()),
        }
        put(21, &[0xf8]);
        put(24, &32_u16.to_le_bytes());
        put(26, &64_u16.to_le_bytes());
        let tail = if self.is_fat32 {
            put(36, &(self.fat_sectors as u32).to_le_bytes());
            // The root folder's cluster, FSInfo, the copy of this sector.
            put(44, &2_u32.to_le_bytes());
            put(48, &1_u16.to_le_bytes());
            put(50, &6_u16.to_le_bytes());
            64
        } else {
            put(22, &(self.fat_sectors as u16).to_le_bytes());
            36
        };
        put(tail, &[0x80, 0, 0x29]);
        put(tail + 3, &id.to_le_bytes());
        put(tail + 7, VOLUME_LABEL);
        put(tail + 18, if self.is_fat32 { b"FAT32   " } else { b"FAT16   " });
        put(510, &[0x55, 0xaa]);
        boot
    }

    fn info(&self, used: u64) -> Vec<u8> {
        let mut info = vec![0; self.sector as usize];
        let mut put = |at: usize, number: u32| info[at..at + 4].copy_from_slice(&number.to_le_bytes());
        put(0, 0x4161_5252);
        put(484, 0x6141_7272);
        put(488, (self.clusters - used) as u32);
        put(492, (used + 2) as u32);
        put(508, 0xaa55_0000);
        info
    }
}

const VOLUME_LABEL: &[u8; 11] = b"MOSFS-ESP  ";

/// A folder or a file, and where its clusters begin.
struct Node<'a> {
    name: String,
    parent: usize,
    content: Option<&'a [u8]>,
    children: Vec<usize>,
    first: u64,
    clusters: u64,
}

/// Every part of the file system that is not free, with its place in bytes.
pub(super) fn pieces(volume: Volume, files: &BTreeMap<String, Vec<u8>>) -> io::Result<Vec<(u64, Vec<u8>)>> {
    let shape = Shape::new(volume)?;
    let mut nodes = tree(files)?;
    let mut next = 2;
    for (number, node) in nodes.iter_mut().enumerate() {
        let bytes = match node.content {
            Some(content) => content.len() as u64,
            // Two entries of a folder's own, or the label; a name of 255 characters has 20 parts.
            None => (2 + node.children.len() as u64 * 21) * ENTRY,
        };
        node.clusters = if number == 0 && !shape.is_fat32 { 0 } else { bytes.div_ceil(shape.cluster) };
        node.first = if node.clusters == 0 { 0 } else { next };
        next += node.clusters;
    }
    let used = next - 2;
    if used > shape.clusters {
        let why = format!("the files need {used} clusters, and the file system has {}", shape.clusters);
        return Err(io::Error::new(io::ErrorKind::StorageFull, why));
    }
    let mut fat = vec![0; (shape.fat_sectors * shape.sector) as usize];
    let mut set = |cluster: u64, value: u32| {
        if shape.is_fat32 {
            fat[cluster as usize * 4..][..4].copy_from_slice(&(value & 0x0fff_ffff).to_le_bytes());
        } else {
            fat[cluster as usize * 2..][..2].copy_from_slice(&(value as u16).to_le_bytes());
        }
    };
    set(0, 0xffff_fff8);
    set(1, u32::MAX);
    for node in &nodes {
        for number in 0..node.clusters {
            let last = number + 1 == node.clusters;
            let cluster = node.first + number;
            set(cluster, if last { u32::MAX } else { cluster as u32 + 1 });
        }
    }
    let mut pieces = vec![(0, shape.boot_sector(volume.id))];
    if shape.is_fat32 {
        pieces.push((shape.sector, shape.info(used)));
        pieces.push((6 * shape.sector, shape.boot_sector(volume.id)));
        pieces.push((7 * shape.sector, shape.info(used)));
    }
    pieces.push((shape.fat_at(0), fat.clone()));
    pieces.push((shape.fat_at(1), fat));
    for (number, node) in nodes.iter().enumerate() {
        let (at, size) = if number == 0 && !shape.is_fat32 {
            (shape.fat_at(2), (shape.root_sectors * shape.sector) as usize)
        } else {
            let at = shape.data_at() + node.first.saturating_sub(2) * shape.cluster;
            (at, (node.clusters * shape.cluster) as usize)
        };
        let mut bytes = match node.content {
            Some(content) => content.to_vec(),
            None => entries(&nodes, number),
        };
        if bytes.len() > size {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "too many files in the root folder"));
        }
        bytes.resize(size, 0);
        pieces.push((at, bytes));
    }
    Ok(pieces)
}

/// The folders and files; the root folder is the first.
fn tree(files: &BTreeMap<String, Vec<u8>>) -> io::Result<Vec<Node<'_>>> {
    let node = |name: &str, parent, content| Node {
        name: name.into(),
        parent,
        content,
        children: Vec::new(),
        first: 0,
        clusters: 0,
    };
    let mut nodes = vec![node("", 0, None)];
    for (path, content) in files {
        let mut parent = 0;
        let parts: Vec<&str> = path.split('/').collect();
        for (number, name) in parts.iter().enumerate() {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.+~".contains(c);
            if name.is_empty()
                || name.len() > 255
                || name.starts_with('.')
                || name.ends_with('.')
                || !name.chars().all(plain)
            {
                let why = format!("{path}: a name that mosfs does not write to FAT");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
            }
            let content = (number + 1 == parts.len()).then_some(content.as_slice());
            let known = nodes[parent].children.iter().copied().find(|child| nodes[*child].name == *name);
            parent = match known {
                Some(child) => child,
                None => {
                    nodes.push(node(name, parent, content));
                    let child = nodes.len() - 1;
                    nodes[parent].children.push(child);
                    child
                }
            };
        }
    }
    Ok(nodes)
}

/// The entries of a folder.
fn entries(nodes: &[Node<'_>], number: usize) -> Vec<u8> {
    let folder = &nodes[number];
    let mut bytes = Vec::new();
    if number == 0 {
        entry(&mut bytes, VOLUME_LABEL, LABEL, 0, 0);
    } else {
        entry(&mut bytes, b".          ", FOLDER, folder.first, 0);
        // Rule (fatgen103): the root folder is cluster 0 here.
        let parent = if folder.parent == 0 { 0 } else { nodes[folder.parent].first };
        entry(&mut bytes, b"..         ", FOLDER, parent, 0);
    }
    for (place, child) in folder.children.iter().enumerate() {
        let child = &nodes[*child];
        let short = short_name(&child.name).unwrap_or_else(|| {
            let short = made_up(&child.name, place + 1);
            long_name(&mut bytes, &child.name, &short);
            short
        });
        let kind = if child.content.is_some() { ARCHIVE } else { FOLDER };
        let size = child.content.map_or(0, <[u8]>::len);
        entry(&mut bytes, &short, kind, child.first, size);
    }
    bytes
}

fn entry(bytes: &mut Vec<u8>, name: &[u8; 11], kind: u8, first: u64, size: usize) {
    let mut entry = [0; ENTRY as usize];
    let mut put = |at: usize, part: &[u8]| entry[at..at + part.len()].copy_from_slice(part);
    put(0, name);
    put(11, &[kind]);
    // Created, accessed, modified.
    [16, 18, 24].into_iter().for_each(|at| put(at, &DATE.to_le_bytes()));
    put(20, &((first >> 16) as u16).to_le_bytes());
    put(26, &(first as u16).to_le_bytes());
    put(28, &(size as u32).to_le_bytes());
    bytes.extend_from_slice(&entry);
}

/// The name as 8 and 3 characters, if it is one of these.
fn short_name(name: &str) -> Option<[u8; 11]> {
    let (base, extension) = name.split_once('.').unwrap_or((name, ""));
    let plain = |part: &str| {
        part.bytes()
            .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == b'-' || c == b'_' || c == b'~')
    };
    if base.len() > 8 || extension.len() > 3 || !plain(base) || !plain(extension) {
        return None;
    }
    let mut short = [b' '; 11];
    short[..base.len()].copy_from_slice(base.as_bytes());
    short[8..8 + extension.len()].copy_from_slice(extension.as_bytes());
    Some(short)
}

/// A short name for a long one: no two of a folder have the same place in it.
fn made_up(name: &str, place: usize) -> [u8; 11] {
    let letters: Vec<u8> =
        name.bytes().filter(u8::is_ascii_alphanumeric).map(|c| c.to_ascii_uppercase()).collect();
    let number = format!("~{place}");
    let mut short = [b' '; 11];
    let keep = letters.len().min(8 - number.len());
    short[..keep].copy_from_slice(&letters[..keep]);
    short[keep..keep + number.len()].copy_from_slice(number.as_bytes());
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    let extension =
        extension.bytes().filter(u8::is_ascii_alphanumeric).take(3).map(|c| c.to_ascii_uppercase());
    for (at, c) in (8..).zip(extension) {
        short[at] = c;
    }
    short
}

/// The parts of a long name, 13 characters each, the last one first.
fn long_name(bytes: &mut Vec<u8>, name: &str, short: &[u8; 11]) {
    let sum = short.iter().fold(0_u8, |sum, c| sum.rotate_right(1).wrapping_add(*c));
    let mut units: Vec<u16> = name.encode_utf16().collect();
    if !units.len().is_multiple_of(13) {
        units.push(0);
        units.resize(units.len().next_multiple_of(13), 0xffff);
    }
    let parts: Vec<&[u16]> = units.chunks(13).collect();
    for (number, part) in parts.iter().enumerate().rev() {
        let mut entry = [0; ENTRY as usize];
        // A name of 255 characters has 20 of them.
        entry[0] = (number + 1) as u8 | if number + 1 == parts.len() { 0x40 } else { 0 };
        entry[11] = LONG_NAME;
        entry[13] = sum;
        let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain((28..32).step_by(2));
        for (at, unit) in places.zip(*part) {
            entry[at..at + 2].copy_from_slice(&unit.to_le_bytes());
        }
        bytes.extend_from_slice(&entry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn tree() -> BTreeMap<String, Vec<u8>> {
        let kernel: Vec<u8> = (0..3_000_000_u32).map(|i| ((i * 7) >> 3) as u8).collect();
        BTreeMap::from([
            ("EFI/BOOT/BOOTX64.EFI".to_string(), b"loader".to_vec()),
            ("EFI/Linux/mosfs-200-0123456789ab.efi".to_string(), kernel),
            ("EFI/mosfs/loader".to_string(), Vec::new()),
        ])
    }

    #[test]
    fn the_same_files_are_the_same_bytes_and_another_byte_is_seen() {
        for (mib, sector_bytes) in [(8, 512), (40, 512), (300, 512), (512, 4096)] {
            let volume = Volume { size_bytes: mib << 20, sector_bytes, id: 7 };
            let mut image = Cursor::new(vec![0xa5; (mib << 20) as usize]);
            write(&mut image, volume, &tree(), |_| Ok(())).unwrap();
            assert!(is_on(&mut image, volume, &tree()).unwrap(), "{mib} MiB");
            let other = Volume { id: 8, ..volume };
            assert!(!is_on(&mut image, other, &tree()).unwrap());
            let mut files = tree();
            files.get_mut("EFI/BOOT/BOOTX64.EFI").unwrap()[5] ^= 1;
            assert!(!is_on(&mut image, volume, &files).unwrap());
        }
    }

    /// Whatever a power cut leaves of what was written since the last time that all of it settled, there is no file system until
    /// everything else is there.
    #[test]
    fn the_first_sector_is_the_last_that_is_written() {
        let volume = Volume { size_bytes: 40 << 20, sector_bytes: 512, id: 7 };
        let mut image = Cursor::new(Vec::new());
        write(&mut image, volume, &tree(), |_| Ok(())).unwrap();
        let whole = image.get_ref().clone();
        let mut files = tree();
        files.get_mut("EFI/BOOT/BOOTX64.EFI").unwrap()[5] ^= 1;
        let mut settled = Vec::new();
        write(&mut image, volume, &files, |image| {
            settled.push(image.get_ref().clone());
            Ok(())
        })
        .unwrap();
        let [cleared, others, all] = &settled[..] else { panic!("{} times", settled.len()) };
        assert!(cleared[..512] == [0; 512] && cleared[512..] == whole[512..]);
        assert!(others[..512] == [0; 512] && others[512..] == all[512..]);
        assert!(all[..512] == whole[..512] && all[512..] != whole[512..]);
        assert!(is_on(&mut image, volume, &files).unwrap());
    }

    #[test]
    fn what_cannot_be_is_an_error() {
        let mut image = Cursor::new(Vec::new());
        let volume = |mib: u64| Volume { size_bytes: mib << 20, sector_bytes: 512, id: 7 };
        for mib in [0, 2, 1 << 24] {
            assert_eq!(
                write(&mut image, volume(mib), &tree(), |_| Ok(())).unwrap_err().kind(),
                io::ErrorKind::InvalidInput
            );
        }
        let big = BTreeMap::from([("a".to_string(), vec![0; 9 << 20])]);
        assert_eq!(
            write(&mut image, volume(8), &big, |_| Ok(())).unwrap_err().kind(),
            io::ErrorKind::StorageFull
        );
        for name in ["", "a//b", ".", "a/..", "a b", "ü", "a."] {
            let files = BTreeMap::from([(name.to_string(), Vec::new())]);
            let error = write(&mut image, volume(8), &files, |_| Ok(())).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}");
        }
    }

    /// mtools and fsck.fat read it.
    #[test]
    fn others_read_it() {
        use std::process::Command;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("esp");
        for (mib, sector_bytes) in [(8, 512), (40, 512), (512, 512), (512, 4096)] {
            let file =
                fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
            file.set_len(mib << 20).unwrap();
            write(&file, Volume { size_bytes: mib << 20, sector_bytes, id: 7 }, &tree(), |_| Ok(())).unwrap();
            let check = Command::new("fsck.fat").arg("-nv").arg(&path).output().expect("install dosfstools");
            let said = String::from_utf8_lossy(&check.stdout).into_owned();
            assert!(check.status.success(), "{mib} {sector_bytes}: {said}");
            for (name, content) in tree() {
                let copy = dir.path().join("copy");
                let mut command = Command::new("mcopy");
                command.arg("-n").arg("-i").arg(&path).arg(format!("::{name}")).arg(&copy);
                assert!(command.status().expect("install mtools").success(), "{name}");
                assert!(fs::read(&copy).unwrap() == content, "{name}");
                fs::remove_file(copy).unwrap();
            }
        }
    }
}
