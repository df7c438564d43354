//! Folders.
//!
//! ```text
//! content of a folder   blocks, each with its own entries, then their names; the last one is shorter
//! entry, 12 bytes       node u64, offset of the name in the block u16, type u8, reserved u8
//! name                  up to the name of the next entry; the last one up to a NUL or the end of the block
//! ```
//!
//! The first name begins where the entries end, which determines how many there are. Names are sorted by byte
//! within a block and from block to block, `.` and `..` among them. A look-up relies on that, and a listing
//! checks it. A cookie is the number of a block times 2^16, plus the number of the entry after the one that
//! it was given with.

use super::error::corrupt;
use super::inode::{Inode, Layout};
use super::metadata::Piece;
use super::{Erofs, NodeId};
use crate::image::fields::{u16_at, u64_at};
use crate::image::{DirEntry, FileType, LayerError};

/// The name of folders in errors.
const TABLE: &str = "folder";

/// Size of an entry without its name, in bytes.
pub(super) const ENTRY_BYTES: usize = 12;

/// The longest name, in bytes (NAME_MAX).
const NAME_BYTES_MAX: usize = 255;

/// The largest folder, in bytes: so that a cookie has at most 56 bits.
const FOLDER_BYTES_MAX: u64 = 1 << 48;

/// Bits of a cookie for the number of an entry in its block.
const ENTRY_BITS: u32 = 16;

/// A block of a folder, whose entries are counted.
struct Block {
    piece: Piece,
    count: usize,
    /// Where the folder is, for errors: its inode.
    at: u64,
}

/// An entry of a block.
struct Entry<'a> {
    name: &'a [u8],
    number: u64,
    kind: u8,
}

impl Block {
    fn corrupt(&self, why: impl Into<String>) -> LayerError {
        corrupt(TABLE, self.at, why)
    }

    /// Returns the entry of that number, which is below the count.
    fn entry(&self, number: usize) -> Result<Entry<'_>, LayerError> {
        let bytes = self.piece.bytes();
        let at = number * ENTRY_BYTES;
        let from = usize::from(u16_at(bytes, at + 8));
        let last = number + 1 == self.count;
        let to = if last { bytes.len() } else { usize::from(u16_at(bytes, at + ENTRY_BYTES + 8)) };
        let Some(mut name) = bytes.get(from..to) else {
            let why = format!("the name of entry {number} is at {from} to {to} of {} bytes", bytes.len());
            return Err(self.corrupt(why));
        };
        if last {
            name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        }
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            let why = format!("a name of {} bytes, expected 1 to {NAME_BYTES_MAX}", name.len());
            return Err(self.corrupt(why));
        }
        if name.iter().any(|byte| matches!(byte, 0 | b'/')) {
            return Err(self.corrupt("a name with a NUL byte or a slash in it"));
        }
        Ok(Entry { name, number: u64_at(bytes, at), kind: bytes[at + 10] })
    }
}

fn is_dot(name: &[u8]) -> bool {
    matches!(name, b"." | b"..")
}

impl Erofs {
    fn folder(&self, node: NodeId) -> Result<Inode, LayerError> {
        let inode = self.inode(node)?;
        if inode.kind != FileType::Directory {
            return Err(LayerError::WrongType { node });
        }
        if inode.size > FOLDER_BYTES_MAX {
            return Err(inode.corrupt(format!("a folder of {} bytes", inode.size)));
        }
        Ok(inode)
    }

    fn folder_blocks(&self, folder: &Inode) -> u64 {
        folder.size.div_ceil(self.superblock.block_bytes().into())
    }

    /// Returns a block of a folder.
    fn folder_block(&self, folder: &Inode, number: u64) -> Result<Block, LayerError> {
        let log = self.superblock.block_log;
        let offset = number << log;
        let len = folder.size.saturating_sub(offset).min(1 << log) as usize;
        let piece = match folder.layout {
            // Where it lies as it is, it shares the cache of metadata.
            Layout::Plain(Some(_)) | Layout::Inline(_) => {
                let (space, at) = self.flat_place(folder, offset, len)?;
                self.bytes(space, at, len)?
            }
            _ => self.content_piece(folder, offset, len)?,
        };
        let bytes = piece.bytes();
        let names = usize::from(u16_at(bytes, 8));
        let block = |count| Block { count, at: folder.at, piece };
        if len < ENTRY_BYTES || names % ENTRY_BYTES != 0 || names < ENTRY_BYTES || names >= len {
            let why = format!("the names of block {number} start at {names} of {len} bytes");
            return Err(block(0).corrupt(why));
        }
        Ok(block(names / ENTRY_BYTES))
    }

    fn dir_entry(&self, block: u64, number: usize, entry: &Entry<'_>) -> Result<DirEntry, LayerError> {
        let node = self.node_at(entry.number)?;
        let kind = match entry.kind {
            1 => FileType::Regular,
            2 => FileType::Directory,
            3 => FileType::CharDevice,
            4 => FileType::BlockDevice,
            5 => FileType::Fifo,
            6 => FileType::Socket,
            7 => FileType::Symlink,
            // Unknown: the inode says it.
            _ => self.inode(node)?.kind,
        };
        let next = block << ENTRY_BITS | (number as u64 + 1);
        Ok(DirEntry { name: entry.name.to_vec(), node, kind, next })
    }

    /// Returns the entry of that name in a folder.
    pub(super) fn find(&self, dir: NodeId, name: &[u8]) -> Result<Option<DirEntry>, LayerError> {
        let folder = self.folder(dir)?;
        if is_dot(name) {
            return Ok(None);
        }
        // The last block whose first name is not after the name.
        let (mut low, mut high) = (0, self.folder_blocks(&folder));
        let mut found = None;
        while low < high {
            let middle = low + (high - low) / 2;
            let block = self.folder_block(&folder, middle)?;
            if block.entry(0)?.name <= name {
                low = middle + 1;
                found = Some((middle, block));
            } else {
                high = middle;
            }
        }
        let Some((number, block)) = found else { return Ok(None) };
        let (mut low, mut high) = (0, block.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = block.entry(middle)?;
            match entry.name.cmp(name) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Equal => return self.dir_entry(number, middle, &entry).map(Some),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// Calls `each` for the entries of a folder from a cookie on, until it returns false.
    pub(super) fn list(
        &self,
        dir: NodeId,
        cookie: u64,
        each: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Result<(), LayerError> {
        let folder = self.folder(dir)?;
        let mut skip = usize::try_from(cookie & ((1 << ENTRY_BITS) - 1)).unwrap_or(usize::MAX);
        let mut before: Vec<u8> = Vec::new();
        for number in cookie >> ENTRY_BITS..self.folder_blocks(&folder) {
            let block = self.folder_block(&folder, number)?;
            for at in skip..block.count {
                let entry = block.entry(at)?;
                if entry.name <= before.as_slice() {
                    let (name, before) = (show(entry.name), show(&before));
                    return Err(block.corrupt(format!("{name:?} comes after {before:?}, expected before it")));
                }
                before.clear();
                before.extend_from_slice(entry.name);
                if !is_dot(entry.name) && !each(self.dir_entry(number, at, &entry)?) {
                    return Ok(());
                }
            }
            skip = 0;
        }
        Ok(())
    }
}

/// A name for an error.
fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
