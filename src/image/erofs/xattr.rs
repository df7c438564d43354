//! Extended attributes.
//!
//! ```text
//! after an inode   filter u32, count of shared ones u8, 7 reserved, u32 for each shared one, then entries
//! shared one       its number times 4, from where shared ones begin, is the place of its entry
//! entry            length of the name u8, prefix u8, length of the value u16, name, value; aligned to 4 bytes
//! prefix           1 user., 2 and 3 the ACLs, 4 trusted., 5 Lustre's, 6 security.; bit 7: a long prefix by
//!                  its number
//! long prefix      length u16, a prefix as above u8, what follows that; aligned to 4 bytes
//! ```
//!
//! The bounds are those of Linux, and [`VALUES_BYTES_MAX`] for all values of a file.

use super::Erofs;
use super::error::corrupt;
use super::inode::Inode;
use super::metadata::Space;
use crate::image::LayerError;
use crate::image::fields::u16_at;
use crate::image::layer::Xattrs;

/// The name of xattrs in errors.
const TABLE: &str = "xattr table";

/// Size of the header after an inode, in bytes.
const HEADER_BYTES: u64 = 12;

/// Size of an entry without name and value, in bytes.
const ENTRY_BYTES: u64 = 4;

/// The longest name with its prefix (XATTR_NAME_MAX), in bytes.
const NAME_BYTES_MAX: usize = 255;

/// The longest list of names (XATTR_LIST_MAX), in bytes.
const LIST_BYTES_MAX: usize = 64 << 10;

/// The most that all values of one file may take, in bytes.
pub(super) const VALUES_BYTES_MAX: usize = 4 << 20;

/// Bit of a prefix: a long one.
const LONG: u8 = 0x80;

/// What the names of attributes begin with; `None` for those that Linux does not show.
fn short_prefix(index: u8) -> Option<&'static [u8]> {
    Some(match index {
        1 => b"user.",
        2 => b"system.posix_acl_access",
        3 => b"system.posix_acl_default",
        4 => b"trusted.",
        6 => b"security.",
        _ => return None,
    })
}

/// A long prefix; `None` where it begins with one that Linux does not show.
pub(super) type Prefix = Option<Vec<u8>>;

/// What was found of a file so far.
#[derive(Default)]
struct Found {
    xattrs: Xattrs,
    names: usize,
    values: usize,
}

impl Erofs {
    /// Reads the long prefixes of names.
    pub(super) fn read_prefixes(&self) -> Result<Vec<Prefix>, LayerError> {
        let mut prefixes = Vec::new();
        let mut at = self.superblock.prefixes_at;
        let holder = match (self.superblock.plain_prefixes(), self.metabox, self.packed) {
            (false, Some(metabox), _) => Some(metabox),
            (false, None, Some(packed)) => Some(packed),
            _ => None,
        };
        let read = |at: u64, len: usize| {
            let mut bytes = Vec::new();
            match &holder {
                Some(inode) => self.append(inode, at, len, &mut bytes)?,
                None => self.append_metadata(Space::Image, at, len, &mut bytes)?,
            }
            Ok::<_, LayerError>(bytes)
        };
        for number in 0..self.superblock.prefixes {
            at = at.next_multiple_of(4);
            let len = usize::from(u16_at(&read(at, 2)?, 0));
            if len == 0 || len > NAME_BYTES_MAX + 1 {
                let why = format!("prefix {number} has {len} bytes, expected 1 to {}", NAME_BYTES_MAX + 1);
                return Err(corrupt(TABLE, at, why));
            }
            let bytes = read(at + 2, len)?;
            let (base, infix) = bytes.split_first().unwrap_or((&0, &[]));
            prefixes.push(short_prefix(*base).map(|base| [base, infix].concat()));
            at += 2 + len as u64;
        }
        Ok(prefixes)
    }

    /// Returns the attributes of a file.
    pub(super) fn xattrs_of(&self, inode: &Inode) -> Result<Xattrs, LayerError> {
        let mut found = Found::default();
        if inode.xattr_bytes == 0 {
            return Ok(found.xattrs);
        }
        let begin = inode.at + inode.bytes;
        let bad = |why: String| Err(corrupt(TABLE, begin, why));
        let header: [u8; HEADER_BYTES as usize] = self.array(inode.space, begin)?;
        let shared = u64::from(header[4]);
        let head = HEADER_BYTES + 4 * shared;
        if head > inode.xattr_bytes {
            return bad(format!("{shared} shared attributes, expected them in {} bytes", inode.xattr_bytes));
        }
        let (mut at, end) = (begin + head, begin + inode.xattr_bytes);
        while at < end {
            let size = self.xattr_at(inode.space, at, &mut found)?;
            if size > end - at {
                return bad(format!("an entry of {size} bytes at {at}, expected it to end at {end}"));
            }
            at += size;
        }
        let space = if self.superblock.shared_in_metabox() { Space::Metabox } else { Space::Image };
        for number in 0..shared {
            let id = u32::from_le_bytes(self.array(inode.space, begin + HEADER_BYTES + 4 * number)?);
            self.xattr_at(space, self.superblock.shared_xattrs + 4 * u64::from(id), &mut found)?;
        }
        Ok(found.xattrs)
    }

    /// Reads an entry, and returns the size that it takes, in bytes.
    fn xattr_at(&self, space: Space, at: u64, found: &mut Found) -> Result<u64, LayerError> {
        let bad = |why: String| Err(corrupt(TABLE, at, why));
        let entry: [u8; ENTRY_BYTES as usize] = self.array(space, at)?;
        let (name_len, value_len) = (usize::from(entry[0]), usize::from(u16_at(&entry, 2)));
        let size = (ENTRY_BYTES + (name_len + value_len) as u64).next_multiple_of(4);
        let prefix = if entry[1] & LONG == 0 {
            short_prefix(entry[1])
        } else {
            let number = usize::from(entry[1] & !LONG);
            match self.prefixes.get(number) {
                Some(prefix) => prefix.as_deref(),
                None => return bad(format!("prefix {number}, the image has {}", self.prefixes.len())),
            }
        };
        let Some(prefix) = prefix else { return Ok(size) };
        let mut name = prefix.to_vec();
        self.append_metadata(space, at + ENTRY_BYTES, name_len, &mut name)?;
        if name.len() > NAME_BYTES_MAX || name.contains(&0) {
            let why =
                format!("a name of {} bytes, expected at most {NAME_BYTES_MAX} without NUL", name.len());
            return bad(why);
        }
        found.names += name.len() + 1;
        found.values += value_len;
        if found.names > LIST_BYTES_MAX || found.values > VALUES_BYTES_MAX {
            return bad(format!(
                "{} bytes of names and {} of values for one file, expected at most {LIST_BYTES_MAX} and {VALUES_BYTES_MAX}",
                found.names, found.values
            ));
        }
        let mut value = Vec::new();
        self.append_metadata(space, at + ENTRY_BYTES + name_len as u64, value_len, &mut value)?;
        found.xattrs.push((name, value));
        Ok(size)
    }
}
