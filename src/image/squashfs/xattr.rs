//! Extended attributes.
//!
//! ```text
//! names and values  metadata blocks; a set is a row of entries:
//!                   type u16 (bits 0..7: prefix, bit 8: value is elsewhere), name length u16, name,
//!                   value length u32, value; a value that is elsewhere is an 8-byte reference to a length and a value
//! sets              metadata blocks; for each set: reference u64, entries u32, size of names and values u32
//! header            where the names and values begin u64, number of sets u32, unused u32; here the superblock points to
//! pointers          u64 for each block of sets
//! ```
//!
//! A reference is the offset of a metadata block from the start of names and values, times 65536, plus the
//! offset in the decoded block.
//!
//! The bounds are those of Linux: a name with its prefix has at most 255 bytes, all names of a file (each
//! with a NUL) at most 64 KiB, a value at most 64 KiB. All values of a file have at most
//! [`VALUES_BYTES_MAX`].
//!
//! Files with the same attributes share a set. So a few sets say which names there are in the whole image
//! ([`Squashfs::may_have_xattr_named`]).

use std::collections::HashSet;

use super::error::corrupt;
use super::inode::NONE;
use super::metadata::{Cursor, METADATA_BYTES, Region};
use super::tables::Table;
use super::{NodeId, Squashfs};
use crate::image::LayerError;
use crate::image::fields::{u16_at, u32_at, u64_at};
use crate::image::layer::Xattrs;

/// The name of names and values in errors.
const TABLE: &str = "xattr table";

/// Size of the header, in bytes.
const HEADER_BYTES: usize = 16;

/// The longest name with its prefix (XATTR_NAME_MAX), in bytes.
const NAME_BYTES_MAX: usize = 255;

/// The longest list of names (XATTR_LIST_MAX), in bytes.
const LIST_BYTES_MAX: usize = 64 << 10;

/// The longest value (XATTR_SIZE_MAX), in bytes.
const VALUE_BYTES_MAX: usize = 64 << 10;

/// The most that all values of one file may take, in bytes.
pub(super) const VALUES_BYTES_MAX: usize = 4 << 20;

/// The most sets, and the most bytes of names and values, that are read to find out which names an image has: some
/// milliseconds. A Debian root has a few sets; one with labels on each file may have more.
const SCAN_SETS_MAX: u64 = 1024;
const SCAN_BYTES_MAX: usize = 256 << 10;

/// What names begin with, by their type; names of other types are not shown.
const PREFIXES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];

/// Bit of an entry's type: the value is elsewhere.
const ELSEWHERE: u16 = 1 << 8;

/// The header of the table.
pub(super) struct XattrTable {
    /// Where names and values begin.
    start: u64,
    sets: Table,
}

impl Squashfs {
    /// Returns the table, if the image has one. Its header is read on first use.
    fn xattr_table(&self) -> Result<Option<&XattrTable>, LayerError> {
        let Some(at) = self.superblock.xattr_table else { return Ok(None) };
        if let Some(table) = self.xattr_table.get() {
            return Ok(Some(table));
        }
        let mut scratch = Vec::new();
        let header = self.metadata.source.read(at, HEADER_BYTES, &mut scratch)?;
        let (start, sets) = (u64_at(header, 0), u32_at(header, 8));
        let lowest = self.superblock.id_table;
        if start < lowest || start > at {
            let why = format!(
                "names and values start at {start}, expected {lowest} (the id table) to {at} (the header)"
            );
            return Err(corrupt(TABLE, at, why));
        }
        let pointers_at = at + HEADER_BYTES as u64;
        let len = super::superblock::pointer_bytes(sets.into(), 16);
        if len > self.superblock.bytes_used.saturating_sub(pointers_at) {
            let why = format!(
                "{sets} sets take {len} bytes of pointers, expected to end within {} bytes",
                self.superblock.bytes_used
            );
            return Err(corrupt(TABLE, at, why));
        }
        // The sets end at the start of the header, not of the pointers.
        let sets = Table { end: at, ..Table::new(TABLE, sets.into(), pointers_at, start) };
        let table = XattrTable { start, sets };
        Ok(Some(self.xattr_table.get_or_init(|| table)))
    }

    /// Returns the attributes of a file.
    pub(super) fn read_xattrs(&self, node: NodeId) -> Result<Xattrs, LayerError> {
        let (inode, mut cursor) = self.inode(node)?;
        let number = self.xattr_number(&inode, &mut cursor)?;
        if number == NONE {
            return Ok(Vec::new());
        }
        let Some(table) = self.xattr_table()? else { return Ok(Vec::new()) };
        self.read_set(table, number)
    }

    /// Whether any file may have an attribute of that name. The names are read on first use, where they are few.
    pub(super) fn may_have_xattr_named(&self, name: &[u8]) -> bool {
        if !PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            return false;
        }
        let names = match self.xattr_names.get() {
            Some(names) => names,
            None => match self.read_xattr_names() {
                Ok(names) => self.xattr_names.get_or_init(|| names),
                // The bytes may be there later; and whoever asks for the attributes of a file that has some gets the error.
                Err(LayerError::Read(_)) => return true,
                Err(_) => self.xattr_names.get_or_init(|| None),
            },
        };
        names.as_ref().is_none_or(|names| names.contains(name))
    }

    /// Returns the names of all attributes; `None` where there is too much to read.
    fn read_xattr_names(&self) -> Result<Option<HashSet<Vec<u8>>>, LayerError> {
        let mut names = HashSet::new();
        let Some(table) = self.xattr_table()? else { return Ok(Some(names)) };
        if table.sets.entries > SCAN_SETS_MAX {
            return Ok(None);
        }
        let mut bytes = 0;
        for number in 0..table.sets.entries {
            for (name, value) in self.read_set(table, number as u32)? {
                bytes += name.len() + value.len();
                names.insert(name);
            }
            if bytes > SCAN_BYTES_MAX {
                return Ok(None);
            }
        }
        Ok(Some(names))
    }

    /// Returns the attributes of a set.
    fn read_set(&self, table: &XattrTable, number: u32) -> Result<Xattrs, LayerError> {
        let set: [u8; 16] = table.sets.entry(&self.metadata, number)?;
        let entries = u32_at(&set, 8);
        let mut cursor = self.xattr_at(table, u64_at(&set, 0))?;
        let (mut names, mut values) = (0, 0);
        let mut found: Xattrs = Vec::new();
        for _ in 0..entries {
            let entry: [u8; 4] = cursor.array()?;
            let (kind, len) = (u16_at(&entry, 0), usize::from(u16_at(&entry, 2)));
            // The kernel skips unknown prefixes.
            let prefix = PREFIXES.get(usize::from(kind & !ELSEWHERE)).copied();
            let full = prefix.map_or(0, <[u8]>::len) + len;
            if len == 0 || full > NAME_BYTES_MAX {
                let why = format!(
                    "a name of {full} bytes with its prefix, expected at most {NAME_BYTES_MAX} and a name after the prefix"
                );
                return Err(cursor.corrupt(why));
            }
            // One more byte for the NUL, as in listxattr(2).
            names += full + 1;
            if names > LIST_BYTES_MAX {
                return Err(cursor.corrupt(format!(
                    "names of one file take {names} bytes, expected at most {LIST_BYTES_MAX}"
                )));
            }
            let mut name = prefix.unwrap_or_default().to_vec();
            cursor.append(len, &mut name)?;
            if name.contains(&0) {
                return Err(cursor.corrupt("a name with a NUL byte in it"));
            }
            let stored = u32::from_le_bytes(cursor.array()?);
            let value = if kind & ELSEWHERE == 0 {
                value(&mut cursor, stored, &mut values)?
            } else {
                if stored != 8 {
                    return Err(
                        cursor.corrupt(format!("a reference to a value has {stored} bytes, expected 8"))
                    );
                }
                let mut there = self.xattr_at(table, u64::from_le_bytes(cursor.array()?))?;
                let len = u32::from_le_bytes(there.array()?);
                value(&mut there, len, &mut values)?
            };
            if prefix.is_some() {
                found.push((name, value));
            }
        }
        Ok(found)
    }

    fn xattr_at(&self, table: &XattrTable, reference: u64) -> Result<Cursor<'_>, LayerError> {
        let end = table.sets.end;
        let offset = (reference & 0xffff) as usize;
        let at = table.start.saturating_add(reference >> 16);
        if offset >= METADATA_BYTES {
            return Err(corrupt(
                TABLE,
                at,
                format!("a reference to offset {offset} of a metadata block, expected below 8192"),
            ));
        }
        self.metadata.cursor(Region { table: TABLE, start: table.start, end }, at, offset)
    }
}

/// Reads a value of `len` bytes; `total` counts the bytes of all values.
fn value(cursor: &mut Cursor<'_>, len: u32, total: &mut usize) -> Result<Vec<u8>, LayerError> {
    let len = len as usize;
    *total = total.saturating_add(len);
    if len > VALUE_BYTES_MAX || *total > VALUES_BYTES_MAX {
        let why = format!(
            "a value of {len} bytes ({total} for the file), expected at most {VALUE_BYTES_MAX} ({VALUES_BYTES_MAX})"
        );
        return Err(cursor.corrupt(why));
    }
    let mut value = Vec::new();
    cursor.append(len, &mut value)?;
    Ok(value)
}
