//! Tables with entries of one size: ids, fragments, the export table, and the numbers of xattrs.
//!
//! ```text
//! metadata blocks of entries: id u32 | fragment: start u64, size word u32, unused u32
//!                             | export: inode reference u64 | xattrs: see xattr.rs
//! pointers: u64 for each of those blocks, its offset in the image; the superblock says where they begin
//! ```

use std::sync::OnceLock;

use super::error::corrupt;
use super::metadata::{METADATA_BYTES, Metadata, Region};
use super::superblock::pointer_bytes;
use super::{NodeId, Squashfs};
use crate::image::LayerError;
use crate::image::fields::{u32_at, u64_at};

/// Lists of pointers up to this length are cached once read (64 KiB per table).
const KEPT_POINTERS: u64 = 8192;

/// A table that is accessed through pointers.
pub(super) struct Table {
    /// Its name in errors.
    pub name: &'static str,
    /// Number of entries.
    pub entries: u64,
    /// Offset in the image of the pointers, in bytes.
    pub pointers_at: u64,
    /// Lowest start of the first block, and highest end of the last one.
    pub lowest: u64,
    pub end: u64,
    pub pointers: OnceLock<Box<[u64]>>,
}

impl Table {
    pub(super) fn new(name: &'static str, entries: u64, pointers_at: u64, lowest: u64) -> Table {
        Table { name, entries, pointers_at, lowest, end: pointers_at, pointers: OnceLock::new() }
    }

    /// Returns entry `number`, of `N` bytes.
    pub(super) fn entry<const N: usize>(
        &self,
        metadata: &Metadata,
        number: u32,
    ) -> Result<[u8; N], LayerError> {
        let number = u64::from(number);
        if number >= self.entries {
            let why = format!("entry {number} is asked for, expected below {}", self.entries);
            return Err(corrupt(self.name, self.pointers_at, why));
        }
        let per_block = (METADATA_BYTES / N) as u64;
        let at = self.pointer(metadata, number / per_block, pointer_bytes(self.entries, N as u64))?;
        let region = Region { table: self.name, start: self.lowest, end: self.end };
        metadata.cursor(region, at, (number % per_block) as usize * N)?.array()
    }

    fn pointer(&self, metadata: &Metadata, number: u64, bytes: u64) -> Result<u64, LayerError> {
        if let Some(kept) = self.pointers.get() {
            return Ok(kept.get(number as usize).copied().unwrap_or_default());
        }
        // The range was checked when the image was opened.
        let mut scratch = Vec::new();
        if bytes / 8 > KEPT_POINTERS {
            let at = self.pointers_at.saturating_add(number * 8);
            return Ok(u64_at(metadata.source.read(at, 8, &mut scratch)?, 0));
        }
        let read = metadata.source.read(self.pointers_at, bytes as usize, &mut scratch)?;
        let all: Box<[u64]> = read.chunks_exact(8).map(|pointer| u64_at(pointer, 0)).collect();
        let pointer = all.get(number as usize).copied().unwrap_or_default();
        // Another thread may have been faster, with the same result.
        let _ = self.pointers.set(all);
        Ok(pointer)
    }
}

impl Squashfs {
    /// Returns the user or group id with that index.
    pub(super) fn id(&self, index: u16) -> Result<u32, LayerError> {
        if let Some(id) = self.ids.get().and_then(|ids| ids.get(usize::from(index))) {
            return Ok(*id);
        }
        self.id_slowly(index)
    }

    #[cold]
    fn id_slowly(&self, index: u16) -> Result<u32, LayerError> {
        let count = self.superblock.ids;
        if index >= count {
            let why = format!("entry {index} is asked for, expected below {count}");
            return Err(corrupt(self.id_table.name, self.id_table.pointers_at, why));
        }
        let entry = |number: u16| {
            let entry: [u8; 4] = self.id_table.entry(&self.metadata, number.into())?;
            Ok::<_, LayerError>(u32_at(&entry, 0))
        };
        let id = entry(index)?;
        // At most 65535 ids, 256 KiB. If one of them cannot be read, the others still are.
        if let Ok(ids) = (0..count).map(entry).collect() {
            let _ = self.ids.set(ids);
        }
        Ok(id)
    }

    /// Returns the node with that inode number (from 1) from the export table; `None` if the image has no
    /// such table.
    ///
    /// # Errors
    /// [`LayerError::Corrupt`] if the number is not in the table, or the table is malformed.
    pub fn node_by_number(&self, number: u32) -> Result<Option<NodeId>, LayerError> {
        let Some(export) = &self.export else { return Ok(None) };
        let Some(index) = number.checked_sub(1) else {
            return Err(corrupt(export.name, export.pointers_at, "inode 0 is asked for, expected 1 or more"));
        };
        let entry: [u8; 8] = export.entry(&self.metadata, index)?;
        let node = u64_at(&entry, 0);
        if node >> 48 != 0 || node & 0xffff >= METADATA_BYTES as u64 {
            let why = format!(
                "inode {number} is at {node:#x}, expected a block below 2^32 and an offset below 8192"
            );
            return Err(corrupt(export.name, export.pointers_at, why));
        }
        Ok(Some(NodeId(node)))
    }
}
