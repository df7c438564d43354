//! Writes the image of a medium: ISO 9660 with the names of Rock Ridge, and behind it an EFI system partition. It starts
//! from a CD (El Torito) and from a disk (GPT).
//!
//! ```text
//! 0          MBR: protective, with a program for a firmware without UEFI that says what is wrong; GPT
//! 32 KiB     volume descriptors: primary, boot record, terminator
//!            path tables (little and big endian), boot catalog, folders, files in the order of their paths
//! N MiB      EFI system partition
//!            300 KiB of zeros for drives that read ahead, and in their last 16.5 KiB the backup of the GPT
//! ```
//!
//! Source: ECMA-119 (ISO 9660); the Rock Ridge Interchange Protocol 1.09 and SUSP 1.10 (names, modes); El Torito 1.0; UEFI
//! 2.10, sections 5 (GPT) and 13.3.2 (El Torito).
//!
//! **Every byte is accounted for.** All but the content of files and partition follows from their names, their sizes and
//! the identifiers: [`Image::new`] is a function of these, so the same content gives the same bytes on every machine, and
//! a medium can be compared with what it must be ([`super::check()`]). That is why no program is called for it: what
//! another version of one writes would be as good, and differ.

use std::collections::BTreeMap;
use std::io;

use uuid::Uuid;

use super::layout::{self, Medium};

/// The sectors of ISO 9660, in bytes.
pub(super) const SECTOR: u64 = 2048;
/// The sectors of the partition table, in bytes.
const LBA: u64 = 512;
/// The first volume descriptor, in sectors; before it is the system area.
pub(super) const DESCRIPTORS_AT: u64 = 16;
/// Where the EFI system partition may begin, in bytes.
const ESP_ALIGN: u64 = 1 << 20;
/// What follows the EFI system partition, in bytes. A drive that reads ahead at the end of a track would report an error.
const TAIL: u64 = 150 * SECTOR;
/// Entries of the partition table, each of 128 bytes.
const GPT_ENTRIES: u64 = 128;
/// The partition table's entries, in sectors.
const GPT_SECTORS: u64 = GPT_ENTRIES * 128 / LBA;
/// Most files and folders.
pub(super) const MAX_ENTRIES: usize = 1 << 18;
/// Most folders: path tables number them in 16 bits.
const MAX_FOLDERS: usize = 1000;
/// Deepest folder (ECMA-119, 6.8.2.1).
pub(super) const MAX_DEPTH: usize = 8;
/// Largest section of a file, in bytes: its size has 32 bits, and it ends with a sector unless it is the last.
const MAX_SECTION: u64 = 0xffff_f800;
/// Largest image, in bytes: sectors are numbered in 32 bits.
const MAX_IMAGE: u64 = SECTOR << 32;
/// Longest name, in bytes: what is left of a record of 255 bytes.
const MAX_NAME: usize = 100;
/// Longest identifier, in characters (ECMA-119, 7.5.1).
const MAX_IDENTIFIER: usize = 30;

/// `S_IFDIR` and `S_IFREG` with what anybody may do: read.
const FOLDER_MODE: u32 = 0o040_555;
const FILE_MODE: u32 = 0o100_444;
/// 1 January 1980, 0:00 UTC, in a folder's record: year since 1900, month, day, hour, minute, second, zone.
const DATE: [u8; 7] = [80, 1, 1, 0, 0, 0, 0];
/// The same in a volume descriptor.
const LONG_DATE: &[u8; 17] = b"1980010100000000\0";

/// Types of partitions (UEFI 2.10, section 5.3.3; UAPI Discoverable Partitions).
const ESP_TYPE: Uuid = Uuid::from_u128(0xc12a_7328_f81f_11d2_ba4b_00a0_c93e_c93b);
const LINUX_TYPE: Uuid = Uuid::from_u128(0x0fc6_3daf_8483_4772_8e79_3d69_d847_7de4);
/// Attributes of the partition that covers ISO 9660: required, and not to be written to.
const READ_ONLY: u64 = 1 << 60 | 1;

/// The program in the MBR, for a firmware without UEFI: prints the text behind it, and stops.
const MBR_PROGRAM: [u8; 25] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0xfc, // cld
    0xbe, 0x19, 0x7c, // mov si, 0x7c19: the text
    0xac, // lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x09, // jz, to hlt
    0xb4, 0x0e, // mov ah, 0x0e: write a character
    0xbb, 0x07, 0x00, // mov bx, 7
    0xcd, 0x10, // int 0x10
    0xeb, 0xf2, // jmp, to lodsb
    0xf4, // hlt
    0xeb, 0xfd, // jmp, to hlt
];
const MBR_TEXT: &[u8] =
    b"This medium requires UEFI firmware. In the firmware's setup, turn BIOS (CSM, legacy) boot off.\r\n\0";

/// Where the bytes of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first one, in bytes.
    pub at: u64,
    /// How many.
    pub size: u64,
}

/// What an image is to be.
#[derive(Debug)]
pub struct Image {
    /// The size of the image in bytes.
    pub size: u64,
    /// All that is not zero and not content, by its place in bytes, in ascending order.
    pub pieces: Vec<(u64, Vec<u8>)>,
    /// The files, by their paths with `/`.
    pub files: BTreeMap<String, Extent>,
    /// The EFI system partition.
    pub esp: Extent,
}

/// A folder or a file.
struct Node {
    name: String,
    identifier: String,
    parent: usize,
    children: Vec<usize>,
    is_folder: bool,
    depth: usize,
    /// Its first sector.
    sector: u64,
    /// Its size in bytes.
    size: u64,
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

impl Image {
    /// Returns the image with files of these sizes, by their paths, and an EFI system partition of `esp_bytes`, a multiple
    /// of 2048.
    ///
    /// # Errors
    /// `InvalidInput` for a name or a size that cannot be.
    pub fn new(files: &BTreeMap<String, u64>, esp_bytes: u64, medium: &Medium) -> io::Result<Self> {
        let too_large =
            || invalid("the image would have more than 8 TiB, more than ISO 9660 can have".into());
        // Before records are made: a file has one for each 4 GiB.
        let content = files.values().try_fold(0_u64, |sum, size| sum.checked_add(*size));
        content.filter(|content| *content <= MAX_IMAGE).ok_or_else(too_large)?;
        let (mut nodes, order) = tree(files)?;
        let path_table = path_table_bytes(&nodes, &order);
        let table_sectors = path_table.div_ceil(SECTOR);
        let tables_at = DESCRIPTORS_AT + 3;
        let catalog_at = tables_at + 2 * table_sectors;
        let mut next = catalog_at + 1;
        for number in &order {
            let size = folder_bytes(&nodes, *number);
            nodes[*number].size = size;
            nodes[*number].sector = next;
            next += size / SECTOR;
        }
        let mut placed = BTreeMap::new();
        for ((path, size), number) in files.iter().zip(files_of(&nodes)) {
            nodes[number].sector = next;
            placed.insert(path.clone(), Extent { at: next * SECTOR, size: *size });
            next += size.div_ceil(SECTOR);
        }
        if esp_bytes == 0 || !esp_bytes.is_multiple_of(SECTOR) {
            return Err(invalid(format!("an EFI system partition of {esp_bytes} bytes")));
        }
        let esp_at = next.checked_mul(SECTOR).and_then(|at| at.checked_next_multiple_of(ESP_ALIGN));
        let size =
            esp_at.and_then(|at| at.checked_add(esp_bytes)?.checked_add(TAIL)).ok_or_else(too_large)?;
        let (Some(esp_at), Ok(_)) = (esp_at, u32::try_from(size / SECTOR)) else { return Err(too_large()) };
        let esp = Extent { at: esp_at, size: esp_bytes };

        let mut pieces = Vec::new();
        pieces.push((0, mbr(size)));
        let table = partitions(esp, medium);
        let last = size / LBA - 1;
        pieces.push((LBA, gpt_header(1, last, 2, medium, &table)));
        pieces.push((2 * LBA, table.clone()));
        let volume = primary(size, &nodes[0], path_table, tables_at, table_sectors);
        pieces.push((DESCRIPTORS_AT * SECTOR, volume));
        pieces.push(((DESCRIPTORS_AT + 1) * SECTOR, boot_record(catalog_at)));
        pieces.push(((DESCRIPTORS_AT + 2) * SECTOR, descriptor(255)));
        for (copy, big_endian) in [(0, false), (1, true)] {
            let at = (tables_at + copy * table_sectors) * SECTOR;
            pieces.push((at, write_path_table(&nodes, &order, big_endian)));
        }
        pieces.push((catalog_at * SECTOR, boot_catalog(esp)));
        for number in &order {
            pieces.push((nodes[*number].sector * SECTOR, write_folder(&nodes, *number)));
        }
        pieces.push((size - (GPT_SECTORS + 1) * LBA, table.clone()));
        pieces.push((size - LBA, gpt_header(last, 1, last - GPT_SECTORS, medium, &table)));
        Ok(Self { size, pieces, files: placed, esp })
    }
}

/// The folders and files, the root folder first; and the numbers of the folders, level by level.
fn tree(files: &BTreeMap<String, u64>) -> io::Result<(Vec<Node>, Vec<usize>)> {
    let node = |name: &str, parent, is_folder, depth, size| Node {
        name: name.into(),
        identifier: identifier(name, is_folder),
        parent,
        children: Vec::new(),
        is_folder,
        depth,
        sector: 0,
        size,
    };
    let mut nodes = vec![node("", 0, true, 1, 0)];
    let mut known: BTreeMap<(usize, String), usize> = BTreeMap::new();
    for (path, size) in files {
        let mut parent = 0;
        let parts: Vec<&str> = path.split('/').collect();
        for (number, name) in parts.iter().enumerate() {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            let is_name = !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(plain);
            if !is_name || name.starts_with('.') || parts.len() > MAX_DEPTH {
                return Err(invalid(format!("{path}: a name that mosfs does not write to a medium")));
            }
            let is_folder = number + 1 < parts.len();
            let next = known.get(&(parent, (*name).to_string())).copied();
            let next = match next {
                Some(next) if nodes[next].is_folder && is_folder => next,
                Some(_) => return Err(invalid(format!("{path}: a folder and a file of one name"))),
                None => {
                    let size = if is_folder { 0 } else { *size };
                    nodes.push(node(name, parent, is_folder, nodes[parent].depth + 1, size));
                    let next = nodes.len() - 1;
                    nodes[parent].children.push(next);
                    known.insert((parent, (*name).to_string()), next);
                    next
                }
            };
            parent = next;
        }
    }
    let folders = nodes.iter().filter(|node| node.is_folder).count();
    if folders > MAX_FOLDERS {
        return Err(invalid(format!("{folders} folders, expected at most {MAX_FOLDERS}")));
    }
    if nodes.len() > MAX_ENTRIES {
        return Err(invalid(format!("{} files and folders, expected at most {MAX_ENTRIES}", nodes.len())));
    }
    // Rule (ECMA-119, 9.3): the records of a folder are in the order of their identifiers.
    for number in 0..nodes.len() {
        let mut children = std::mem::take(&mut nodes[number].children);
        children.sort_by(|a, b| nodes[*a].identifier.cmp(&nodes[*b].identifier));
        if let Some(pair) =
            children.windows(2).find(|pair| nodes[pair[0]].identifier == nodes[pair[1]].identifier)
        {
            let (one, other) = (&nodes[pair[0]].name, &nodes[pair[1]].name);
            return Err(invalid(format!("{one} and {other}: the same name in ISO 9660")));
        }
        nodes[number].children = children;
    }
    // Rule (ECMA-119, 6.9.1): path tables are in the order of the levels, parents, and identifiers.
    let mut order = vec![0];
    let mut at = 0;
    while let Some(number) = order.get(at).copied() {
        order.extend(nodes[number].children.iter().copied().filter(|child| nodes[*child].is_folder));
        at += 1;
    }
    Ok((nodes, order))
}

/// The numbers of the files, in the order of their paths, in which they were added.
fn files_of(nodes: &[Node]) -> Vec<usize> {
    (0..nodes.len()).filter(|number| !nodes[*number].is_folder).collect()
}

/// The name in the characters of ISO 9660, for readers that do not know Rock Ridge.
fn identifier(name: &str, is_folder: bool) -> String {
    let plain = |text: &str| -> String {
        text.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
    };
    if is_folder {
        return plain(name).chars().take(MAX_IDENTIFIER).collect();
    }
    let (base, extension) = name.rsplit_once('.').unwrap_or((name, ""));
    let extension: String = plain(extension).chars().take(8).collect();
    let base: String = plain(base).chars().take(MAX_IDENTIFIER - extension.len()).collect();
    format!("{base}.{extension};1")
}

/// A number of 32 bits in both orders of bytes (ECMA-119, 7.3.3).
fn both(value: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&value.to_le_bytes());
    bytes[4..].copy_from_slice(&value.to_be_bytes());
    bytes
}

/// A number of 16 bits in both orders of bytes (ECMA-119, 7.2.3).
fn both16(value: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (value.to_le_bytes(), value.to_be_bytes());
    [a, b, c, d]
}

/// A record of a folder (ECMA-119, 9.1).
fn record(identifier: &[u8], sector: u64, size: u64, flags: u8, system_use: &[u8]) -> Vec<u8> {
    let mut record = vec![0, 0];
    // Both fit: the size of the image is checked.
    record.extend_from_slice(&both(sector as u32));
    record.extend_from_slice(&both(size as u32));
    record.extend_from_slice(&DATE);
    record.extend_from_slice(&[flags, 0, 0]);
    record.extend_from_slice(&both16(1));
    record.push(identifier.len() as u8);
    record.extend_from_slice(identifier);
    if !record.len().is_multiple_of(2) {
        record.push(0);
    }
    record.extend_from_slice(system_use);
    if !record.len().is_multiple_of(2) {
        record.push(0);
    }
    // At most 33 + 35 + 36 + 105: names are bounded.
    record[0] = record.len() as u8;
    record
}

/// Flags of a record (ECMA-119, 9.1.6).
const IS_FOLDER: u8 = 2;
pub(super) const IS_CONTINUED: u8 = 0x80;

/// Rock Ridge's `PX`: mode, links, owner, group.
fn px(mode: u32, links: u32) -> Vec<u8> {
    let mut field = b"PX\x24\x01".to_vec();
    [mode, links, 0, 0].into_iter().for_each(|value| field.extend_from_slice(&both(value)));
    field
}

fn px_of(nodes: &[Node], number: usize) -> Vec<u8> {
    let node = &nodes[number];
    let folders = node.children.iter().filter(|child| nodes[**child].is_folder).count();
    if node.is_folder { px(FOLDER_MODE, 2 + folders as u32) } else { px(FILE_MODE, 1) }
}

/// Rock Ridge's `NM`: the name.
fn nm(name: &str) -> Vec<u8> {
    let mut field = b"NM\0\x01\0".to_vec();
    field.extend_from_slice(name.as_bytes());
    field[2] = field.len() as u8;
    field
}

/// What the first record of the root folder says: that there is SUSP (`SP`) and Rock Ridge (`ER`).
fn susp() -> Vec<u8> {
    const ID: &[u8] = b"RRIP_1991A";
    const TEXT: &[u8] =
        b"THE ROCK RIDGE INTERCHANGE PROTOCOL PROVIDES SUPPORT FOR POSIX FILE SYSTEM SEMANTICS";
    let mut fields = b"SP\x07\x01\xbe\xef\0".to_vec();
    let length = 8 + ID.len() + TEXT.len();
    fields.extend_from_slice(b"ER");
    fields.extend_from_slice(&[length as u8, 1, ID.len() as u8, TEXT.len() as u8, 0, 1]);
    fields.extend_from_slice(ID);
    fields.extend_from_slice(TEXT);
    fields
}

/// The records of a folder.
fn records(nodes: &[Node], number: usize) -> Vec<Vec<u8>> {
    let folder = &nodes[number];
    let parent = &nodes[folder.parent];
    let mut own = if number == 0 { susp() } else { Vec::new() };
    own.extend_from_slice(&px_of(nodes, number));
    let mut all = vec![
        record(&[0], folder.sector, folder.size, IS_FOLDER, &own),
        record(&[1], parent.sector, parent.size, IS_FOLDER, &px_of(nodes, folder.parent)),
    ];
    for child in &folder.children {
        let node = &nodes[*child];
        let mut fields = px_of(nodes, *child);
        fields.extend_from_slice(&nm(&node.name));
        let name = node.identifier.as_bytes();
        if node.is_folder {
            all.push(record(name, node.sector, node.size, IS_FOLDER, &fields));
            continue;
        }
        let (mut sector, mut left) = (node.sector, node.size);
        loop {
            let size = left.min(MAX_SECTION);
            left -= size;
            let flags = if left > 0 { IS_CONTINUED } else { 0 };
            all.push(record(name, sector, size, flags, &fields));
            sector += size / SECTOR;
            if left == 0 {
                break;
            }
        }
    }
    all
}

/// Rule (ECMA-119, 6.8.1.1): a record ends in the sector in which it begins.
fn write_folder(nodes: &[Node], number: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    for record in records(nodes, number) {
        let room = (bytes.len() as u64).next_multiple_of(SECTOR) - bytes.len() as u64;
        if (record.len() as u64) > room && room > 0 {
            bytes.resize((bytes.len() as u64 + room) as usize, 0);
        }
        bytes.extend_from_slice(&record);
    }
    bytes.resize((bytes.len() as u64).next_multiple_of(SECTOR) as usize, 0);
    bytes
}

fn folder_bytes(nodes: &[Node], number: usize) -> u64 {
    // The places in the records do not change their length.
    write_folder(nodes, number).len() as u64
}

fn path_table_bytes(nodes: &[Node], order: &[usize]) -> u64 {
    write_path_table(nodes, order, false).len() as u64
}

/// A path table (ECMA-119, 9.4). Linux does not read it.
fn write_path_table(nodes: &[Node], order: &[usize], big_endian: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let places: BTreeMap<usize, u16> = order.iter().copied().zip(1..).collect();
    for number in order {
        let node = &nodes[*number];
        let name = if *number == 0 { b"\0".as_slice() } else { node.identifier.as_bytes() };
        let parent = places.get(&node.parent).copied().unwrap_or(1);
        bytes.extend_from_slice(&[name.len() as u8, 0]);
        let sector = node.sector as u32;
        if big_endian {
            bytes.extend_from_slice(&sector.to_be_bytes());
            bytes.extend_from_slice(&parent.to_be_bytes());
        } else {
            bytes.extend_from_slice(&sector.to_le_bytes());
            bytes.extend_from_slice(&parent.to_le_bytes());
        }
        bytes.extend_from_slice(name);
        if !name.len().is_multiple_of(2) {
            bytes.push(0);
        }
    }
    bytes
}

/// A volume descriptor without content (ECMA-119, 8.1).
fn descriptor(kind: u8) -> Vec<u8> {
    let mut bytes = vec![0; SECTOR as usize];
    bytes[..7].copy_from_slice(&[kind, b'C', b'D', b'0', b'0', b'1', 1]);
    bytes
}

/// The primary volume descriptor (ECMA-119, 8.4).
fn primary(size: u64, root: &Node, path_table: u64, tables_at: u64, table_sectors: u64) -> Vec<u8> {
    let mut bytes = descriptor(1);
    let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
    let text = |length: usize, text: &str| format!("{text:length$}").into_bytes();
    put(8, &text(32, "LINUX"));
    put(40, &text(32, layout::LABEL));
    put(80, &both((size / SECTOR) as u32));
    put(120, &both16(1));
    put(124, &both16(1));
    put(128, &both16(SECTOR as u16));
    put(132, &both(path_table as u32));
    put(140, &(tables_at as u32).to_le_bytes());
    put(148, &((tables_at + table_sectors) as u32).to_be_bytes());
    put(156, &record(&[0], root.sector, root.size, IS_FOLDER, &[]));
    for (at, length, name) in [(190, 128, ""), (318, 128, ""), (446, 128, "MOSFS"), (574, 128, "MOSFS")] {
        put(at, &text(length, name));
    }
    [702, 739, 776].into_iter().for_each(|at| put(at, &text(37, "")));
    [813, 830].into_iter().for_each(|at| put(at, LONG_DATE));
    // No date of expiry, and none from which it may be used.
    [847, 864].into_iter().for_each(|at| put(at, b"0000000000000000\0"));
    put(881, &[1]);
    bytes
}

/// El Torito's boot record, which leads to the boot catalog.
fn boot_record(catalog_at: u64) -> Vec<u8> {
    let mut bytes = descriptor(0);
    bytes[7..30].copy_from_slice(b"EL TORITO SPECIFICATION");
    bytes[71..75].copy_from_slice(&(catalog_at as u32).to_le_bytes());
    bytes
}

/// The boot catalog: one entry, for UEFI.
fn boot_catalog(esp: Extent) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[..2].copy_from_slice(&[1, 0xef]);
    bytes[30..32].copy_from_slice(&[0x55, 0xaa]);
    // The sum of all 16-bit words of the first entry is 0.
    let sum = bytes[..32]
        .chunks(2)
        .fold(0_u16, |sum, word| sum.wrapping_add(u16::from_le_bytes([word[0], word[1]])));
    bytes[28..30].copy_from_slice(&sum.wrapping_neg().to_le_bytes());
    bytes[32] = 0x88;
    // UEFI 2.10, section 13.3.2.1: 0 stands for all up to the end of the medium.
    let sectors = u16::try_from(esp.size / LBA).unwrap_or(0);
    bytes[38..40].copy_from_slice(&sectors.to_le_bytes());
    bytes[40..44].copy_from_slice(&((esp.at / SECTOR) as u32).to_le_bytes());
    bytes
}

/// The protective MBR (UEFI 2.10, table 5.4).
fn mbr(size: u64) -> Vec<u8> {
    let mut bytes = vec![0; LBA as usize];
    bytes[..MBR_PROGRAM.len()].copy_from_slice(&MBR_PROGRAM);
    bytes[MBR_PROGRAM.len()..][..MBR_TEXT.len()].copy_from_slice(MBR_TEXT);
    bytes[446..454].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff]);
    bytes[454..458].copy_from_slice(&1_u32.to_le_bytes());
    let sectors = u32::try_from(size / LBA - 1).unwrap_or(u32::MAX);
    bytes[458..462].copy_from_slice(&sectors.to_le_bytes());
    bytes[510..].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

/// The entries of the partition table (UEFI 2.10, table 5.6).
fn partitions(esp: Extent, medium: &Medium) -> Vec<u8> {
    let mut bytes = vec![0; (GPT_SECTORS * LBA) as usize];
    let iso = Extent { at: DESCRIPTORS_AT * SECTOR, size: esp.at - DESCRIPTORS_AT * SECTOR };
    let rows = [
        (LINUX_TYPE, medium.iso_guid(), iso, READ_ONLY, "mosfs-install"),
        (ESP_TYPE, medium.esp_guid(), esp, 0, "mosfs-install-esp"),
    ];
    for (number, (kind, id, extent, attributes, name)) in rows.into_iter().enumerate() {
        let mut put = |at: usize, part: &[u8]| bytes[number * 128 + at..][..part.len()].copy_from_slice(part);
        put(0, &kind.to_bytes_le());
        put(16, &id.to_bytes_le());
        put(32, &(extent.at / LBA).to_le_bytes());
        put(40, &((extent.at + extent.size) / LBA - 1).to_le_bytes());
        put(48, &attributes.to_le_bytes());
        let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
        put(56, &name);
    }
    bytes
}

/// A header of the partition table (UEFI 2.10, table 5.5).
fn gpt_header(own: u64, other: u64, entries_at: u64, medium: &Medium, table: &[u8]) -> Vec<u8> {
    let last = own.max(other);
    let mut bytes = vec![0; LBA as usize];
    let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
    put(0, b"EFI PART\0\0\x01\0\x5c\0\0\0");
    put(24, &own.to_le_bytes());
    put(32, &other.to_le_bytes());
    put(40, &(2 + GPT_SECTORS).to_le_bytes());
    put(48, &(last - GPT_SECTORS - 1).to_le_bytes());
    put(56, &medium.disk_guid().to_bytes_le());
    put(72, &entries_at.to_le_bytes());
    put(80, &(GPT_ENTRIES as u32).to_le_bytes());
    put(84, &128_u32.to_le_bytes());
    put(88, &crc32(table).to_le_bytes());
    let sum = crc32(&bytes[..92]);
    bytes[16..20].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// CRC-32 as in IEEE 802.3, which UEFI takes.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| sum >> 1 ^ if sum & 1 == 1 { 0xedb8_8320 } else { 0 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn new(files: &[(&str, u64)], esp: u64) -> io::Result<Image> {
        let product = "de6c82c5-2e01-4c92-949b-a6545d30fc06".parse().unwrap();
        let medium = Medium { product, version: 200, system: Digest::of(b"system") };
        let files = files.iter().map(|(path, size)| ((*path).to_string(), *size)).collect();
        Image::new(&files, esp, &medium)
    }

    #[test]
    fn crc_32_is_that_of_the_standard() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn what_no_medium_has_is_an_error() {
        let long = "a".repeat(101);
        for (files, esp) in [
            (vec![("", 1)], 1 << 20),
            (vec![("a//b", 1)], 1 << 20),
            (vec![("a/../b", 1)], 1 << 20),
            (vec![(".a", 1)], 1 << 20),
            (vec![("a b", 1)], 1 << 20),
            (vec![("ä", 1)], 1 << 20),
            (vec![(long.as_str(), 1)], 1 << 20),
            (vec![("1/2/3/4/5/6/7/8/9", 1)], 1 << 20),
            (vec![("a", 1), ("a/b", 1)], 1 << 20),
            // One name in ISO 9660.
            (vec![("a-b", 1), ("a_b", 1)], 1 << 20),
            (vec![("a", 1 << 43)], 1 << 20),
            (vec![("a", u64::MAX)], 1 << 20),
            (vec![("a", u64::MAX - 5000), ("b", u64::MAX - 5000)], 1 << 20),
            (vec![("a", 1)], 0),
            (vec![("a", 1)], 1000),
            (vec![("a", 1)], u64::MAX - 2047),
        ] {
            let error = new(&files, esp).expect_err(&format!("{files:?} {esp}"));
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
        new(&[("a", 1), ("b/c", 0)], 1 << 20).unwrap();
    }

    #[test]
    fn the_pieces_are_in_order_and_do_not_touch_the_files() {
        let image = new(&[("a", 1), ("b/c", 5000), ("b/d", 0)], 1 << 20).unwrap();
        let mut regions: Vec<_> = image.pieces.iter().map(|(at, bytes)| (*at, bytes.len() as u64)).collect();
        regions.extend(image.files.values().chain([&image.esp]).map(|extent| (extent.at, extent.size)));
        regions.sort_unstable();
        assert!(regions.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{regions:?}");
        assert_eq!(image.size % SECTOR, 0);
        assert_eq!(image.esp.at % ESP_ALIGN, 0);
    }
}
