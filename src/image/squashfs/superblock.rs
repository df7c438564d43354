//! The first 96 bytes of an image.

use super::compress::Compressor;
use super::error::corrupt;
use super::{METADATA_BYTES, NodeId};
use crate::image::LayerError;
use crate::image::fields::{u16_at, u32_at, u64_at};

/// Size of the superblock on disk, in bytes.
pub const SUPERBLOCK_BYTES: usize = 96;

/// `hsqs`, the magic of a little-endian image.
const MAGIC: u32 = 0x7371_7368;

/// The name of the superblock in errors.
const TABLE: &str = "superblock";

/// "There is no such table", in a field that holds the start of a table.
const NO_TABLE: u64 = u64::MAX;

/// Flag bit: compressor options follow the superblock.
pub const FLAG_COMPRESSOR_OPTIONS: u16 = 1 << 10;

/// The fields of the superblock, checked against each other and against the size of the source.
///
/// All positions are offsets in the image, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// Number of inodes.
    pub inodes: u32,
    /// Creation time of the image, in seconds since 1970.
    pub made: u32,
    /// Size of a data block, in bytes: a power of two from 4 KiB to 1 MiB.
    pub block_bytes: u32,
    /// Binary logarithm of `block_bytes`.
    pub block_log: u16,
    /// Number of fragment blocks.
    pub fragments: u32,
    /// How blocks are compressed.
    pub compressor: Compressor,
    /// The flags as stored.
    pub flags: u16,
    /// Number of entries of the id table.
    pub ids: u16,
    /// The root folder.
    pub root: NodeId,
    /// Size of the file system in bytes, without padding and appended data (a verity tree).
    pub bytes_used: u64,
    /// Where the pointers of the id table are.
    pub id_table: u64,
    /// Where the header of the xattr table is, if there is one.
    pub xattr_table: Option<u64>,
    /// Where the inodes begin. Data blocks lie before.
    pub inode_table: u64,
    /// Where the folders' listings begin. The inodes end here.
    pub directory_table: u64,
    /// Where the pointers of the fragment table are, if there are fragments.
    pub fragment_table: Option<u64>,
    /// Where the pointers of the export table are, if there is one.
    pub export_table: Option<u64>,
    /// Upper bound on the end of the listings.
    pub(super) directory_end: u64,
}

/// Returns the size of a table's list of pointers, in bytes: one pointer per metadata block of entries.
pub(super) fn pointer_bytes(entries: u64, entry_bytes: u64) -> u64 {
    entries.saturating_mul(entry_bytes).div_ceil(METADATA_BYTES as u64).saturating_mul(8)
}

impl Superblock {
    /// Parses the superblock from the first bytes of a source of `source_bytes` bytes.
    ///
    /// # Errors
    /// [`LayerError::Corrupt`] with table `superblock` and the offset of the field.
    pub fn parse(bytes: &[u8; SUPERBLOCK_BYTES], source_bytes: u64) -> Result<Superblock, LayerError> {
        let bad = |offset: u64, why: String| Err(corrupt(TABLE, offset, why));
        let magic = u32_at(bytes, 0);
        if magic != MAGIC {
            return bad(0, format!("magic is {magic:#010x}, expected {MAGIC:#010x} (squashfs)"));
        }
        let (major, minor) = (u16_at(bytes, 28), u16_at(bytes, 30));
        if (major, minor) != (4, 0) {
            return bad(28, format!("version is {major}.{minor}, expected 4.0"));
        }
        let inodes = u32_at(bytes, 4);
        if inodes == 0 {
            return bad(4, "there are no inodes, expected at least the root folder".into());
        }
        let block_bytes = u32_at(bytes, 12);
        if !block_bytes.is_power_of_two() || !(4096..=1 << 20).contains(&block_bytes) {
            return bad(
                12,
                format!("block size is {block_bytes}, expected a power of two from 4096 to 1048576"),
            );
        }
        let block_log = u16_at(bytes, 22);
        if u32::from(block_log) != block_bytes.trailing_zeros() {
            let expected = block_bytes.trailing_zeros();
            return bad(
                22,
                format!("block log is {block_log}, expected {expected} for blocks of {block_bytes}"),
            );
        }
        let compressor = Compressor::from_id(u16_at(bytes, 20))
            .map_err(|found| corrupt(TABLE, 20, format!("compressor is {found}, expected 1 to 6")))?;
        let ids = u16_at(bytes, 26);
        if ids == 0 {
            return bad(26, "the id table has no entries, expected at least 1".into());
        }
        let root = NodeId(u64_at(bytes, 32));
        if root.0 >> 48 != 0 || root.0 & 0xffff >= METADATA_BYTES as u64 {
            return bad(
                32,
                format!(
                    "root inode reference is {:#x}, expected a block below 2^32 and an offset below 8192",
                    root.0
                ),
            );
        }
        let bytes_used = u64_at(bytes, 40);
        if bytes_used < SUPERBLOCK_BYTES as u64 || bytes_used > source_bytes {
            return bad(
                40,
                format!("{bytes_used} bytes used, expected 96 to the {source_bytes} that there are"),
            );
        }

        let id_table = u64_at(bytes, 48);
        let optional = |at: usize| Some(u64_at(bytes, at)).filter(|&start| start != NO_TABLE);
        let xattr_table = optional(56);
        let inode_table = u64_at(bytes, 64);
        let directory_table = u64_at(bytes, 72);
        let fragments = u32_at(bytes, 16);
        let fragment_table = if fragments == 0 { None } else { Some(u64_at(bytes, 80)) };
        let export_table = optional(88);

        // The order of the tables is fixed: inodes, listings, fragments, export, ids, xattrs. Each begins at
        // or after the end of the previous one, so no byte belongs to two of them.
        let mut end = SUPERBLOCK_BYTES as u64;
        let mut last = "superblock";
        let order = [
            (64, "inode table", Some((inode_table, 0))),
            (72, "directory table", Some((directory_table, 0))),
            (80, "fragment table", fragment_table.map(|at| (at, pointer_bytes(fragments.into(), 16)))),
            (88, "export table", export_table.map(|at| (at, pointer_bytes(inodes.into(), 8)))),
            (48, "id table", Some((id_table, pointer_bytes(ids.into(), 4)))),
            (56, "xattr table", xattr_table.map(|at| (at, 16))),
        ];
        for (offset, name, place) in order {
            let Some((start, len)) = place else { continue };
            if start < end {
                return bad(
                    offset,
                    format!("{name} starts at {start}, expected at least {end}, the end of the {last}"),
                );
            }
            match start.checked_add(len) {
                Some(after) if after <= bytes_used => (end, last) = (after, name),
                _ => {
                    return bad(
                        offset,
                        format!(
                            "{name} takes {len} bytes at {start}, expected an end within the {bytes_used} bytes used"
                        ),
                    );
                }
            }
        }
        if inode_table == directory_table {
            return bad(
                72,
                format!(
                    "directory table starts at {directory_table}, as the inode table does, expected room for inodes"
                ),
            );
        }
        let directory_end = fragment_table.or(export_table).unwrap_or(id_table);

        Ok(Superblock {
            inodes,
            made: u32_at(bytes, 8),
            block_bytes,
            block_log,
            fragments,
            compressor,
            flags: u16_at(bytes, 24),
            ids,
            root,
            bytes_used,
            id_table,
            xattr_table,
            inode_table,
            directory_table,
            fragment_table,
            export_table,
            directory_end,
        })
    }

    /// Whether a block of compressor options follows the superblock.
    pub fn has_compressor_options(&self) -> bool {
        self.flags & FLAG_COMPRESSOR_OPTIONS != 0
    }
}
