//! What setup writes to a disk before there is a file system on it.
//!
//! ```text
//! 0           protective MBR, GPT
//! 512 KiB     while a setup is under way: the mark
//! 1 MiB       partition 1, `mosfs-esp`: EFI system partition, 512 MiB
//! 513 MiB     partition 2, `mosfs`: ext4, to the last MiB
//! ...         backup GPT
//!
//! the mark: one sector, `mosfs-setup-under-way-v1 UUID` and a newline, UUID that of the partition table to come
//! ```
//!
//! **Crashes.** The mark is the first thing that is written to a disk, and the last that is removed. A disk with a mark
//! is taken again without being erased explicitly, unless something else has been put onto it since: a partition table
//! with another UUID, a file system on the whole disk, or a system that is not the one to install.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};

use gpt::disk::LogicalBlockSize;
use gpt::mbr::ProtectiveMBR;
use gpt::partition_types;
use uuid::Uuid;

use super::disk::{Disk, EDGE, GPT_SIGNATURE, read};
use super::error::SetupError;
use crate::error::IoContext;
use crate::sys::disk;
use crate::sys::failpoint;

/// Where the mark is, in bytes.
const MARK_AT: u64 = 512 << 10;
/// Size of the mark in bytes: the smallest sector, which a disk writes whole or not at all.
const MARK_BYTES: usize = 512;
/// What it begins with.
const MARK: &str = "mosfs-setup-under-way-v1 ";
/// Where the EFI system partition begins, in bytes.
pub(super) const ESP_AT: u64 = 1 << 20;
/// Size of the EFI system partition in bytes: three kernels, and room for the firmware's own updates.
pub(super) const ESP_BYTES: u64 = 512 << 20;
/// Where the system partition begins, in bytes.
pub(super) const SYSTEM_AT: u64 = ESP_AT + ESP_BYTES;
/// What follows it, in bytes: the backup of the partition table.
pub(super) const TAIL_BYTES: u64 = 1 << 20;

/// Returns the UUID of the mark on a disk, if there is one.
pub(super) fn mark(device: &File) -> io::Result<Option<Uuid>> {
    let sector = read(device, MARK_AT, MARK_BYTES as u64)?;
    let text = sector.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    Ok(text.strip_prefix(MARK).and_then(|uuid| Uuid::try_parse(uuid).ok()))
}

/// Whether a disk has nothing but what an interrupted setup with this mark left, or could have left.
///
/// A partition table that is half written has no header, or one with the UUID of the mark.
pub(super) fn is_ours(device: &File, size_bytes: u64, mark: Uuid) -> io::Result<bool> {
    let edge = EDGE.min(size_bytes);
    let (first, last) = (read(device, 0, edge)?, read(device, size_bytes - edge, edge)?);
    let mut headers = Vec::new();
    for sector in [512, 4096] {
        headers.push(first.get(sector..));
        headers.push(last.len().checked_sub(sector).and_then(|at| last.get(at..)));
    }
    // UEFI 2.10, section 5.3.2: the disk's UUID is at byte 56, its first three fields in little-endian order.
    let ours = |header: &[u8]| header.get(56..72) == Some(&mark.to_bytes_le()[..]);
    let foreign = |header: &[u8]| header.starts_with(GPT_SIGNATURE) && !ours(header);
    if headers.into_iter().flatten().any(foreign) {
        return Ok(false);
    }
    // UEFI 2.10, table 5.4: a protective MBR has one record, of type 0xEE. Types are at 450 + 16 n.
    let has_mbr = first.get(510..512) == Some(&[0x55, 0xaa]);
    let types: Vec<u8> = (0..4).filter_map(|n| first.get(450 + 16 * n).copied()).collect();
    Ok(!has_mbr || types == [0xee, 0, 0, 0])
}

/// Writes the mark, erases both ends of the disk, and writes the partition table.
///
/// # Errors
/// [`SetupError::Table`], [`SetupError::Io`].
pub(super) fn write(device: &File, disk: &Disk) -> Result<(), SetupError> {
    let uuid = Uuid::new_v4();
    let path = &disk.path;
    let mut sector = format!("{MARK}{uuid}\n").into_bytes();
    sector.resize(MARK_BYTES, 0);
    put(device, MARK_AT, &sector).on("write", path)?;
    failpoint::hit("setup.mark.written");
    let after = MARK_AT + MARK_BYTES as u64;
    put(device, 0, &vec![0; MARK_AT as usize]).on("erase", path)?;
    put(device, after, &vec![0; (EDGE - after) as usize]).on("erase", path)?;
    put(device, disk.size_bytes - EDGE, &vec![0; EDGE as usize]).on("erase", path)?;
    // The first blocks of the partitions, so that nothing finds an older file system there.
    put(device, SYSTEM_AT, &vec![0; EDGE as usize]).on("erase", path)?;
    put(device, ESP_AT, &vec![0; EDGE as usize]).on("erase", path)?;
    failpoint::hit("setup.disk.erased");
    table(device, disk, uuid)?;
    device.sync_all().on("sync", path)?;
    failpoint::hit("setup.table.written");
    Ok(())
}

/// The partitions of a disk of this size: number, begin and end in bytes.
pub(super) fn partitions(size_bytes: u64) -> [(u32, u64, u64); 2] {
    let end = (size_bytes - TAIL_BYTES) & !(EDGE - 1);
    [(1, ESP_AT, SYSTEM_AT), (2, SYSTEM_AT, end)]
}

fn table(mut device: &File, disk: &Disk, uuid: Uuid) -> Result<(), SetupError> {
    let wrong =
        |why: &dyn std::fmt::Display| SetupError::Table { path: disk.path.clone(), why: why.to_string() };
    let found = disk::sector_bytes(device).on("measure", &disk.path)?;
    let (sector, kind) = match found {
        512 => (512, LogicalBlockSize::Lb512),
        4096 => (4096, LogicalBlockSize::Lb4096),
        _ => return Err(SetupError::Sectors { path: disk.path.clone(), found }),
    };
    let copy = device.try_clone().on("open", &disk.path)?;
    let config = gpt::GptConfig::new().writable(true).logical_block_size(kind);
    let mut table = config.create_from_device(copy, Some(uuid)).map_err(|error| wrong(&error))?;
    let kinds = [("mosfs-esp", partition_types::EFI), ("mosfs", partition_types::LINUX_FS)];
    for ((number, begin, end), (name, kind)) in partitions(disk.size_bytes).into_iter().zip(kinds) {
        table
            .add_partition_at(name, number, begin / sector, (end - begin) / sector, kind, 0)
            .map_err(|error| wrong(&error))?;
    }
    table.write().map_err(|error| wrong(&error))?;
    // Last: with it, other systems take the disk for one with a partition table.
    let sectors = u32::try_from(disk.size_bytes / sector - 1).unwrap_or(u32::MAX);
    ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(&mut device).map_err(|error| wrong(&error))?;
    Ok(())
}

/// Removes the mark: the disk is set up.
pub(super) fn finish(device: &File) -> io::Result<()> {
    put(device, MARK_AT, &[0; MARK_BYTES])
}

fn put(mut device: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
    device.seek(SeekFrom::Start(at))?;
    device.write_all(bytes)?;
    device.sync_all()
}
