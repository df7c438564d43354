//! Inodes.
//!
//! ```text
//!         compact, 32 bytes                       extended, 64 bytes
//!  0      format u16: bit 0 extended, bits 1..3 layout, bit 4 see below
//!  2      xattrs u16: 0 none, else they have 12 + 4 x (n - 1) bytes, after the inode
//!  4      mode u16
//!  6      links u16, or upper bits of the block    upper bits of the block u16
//!  8      size u32, 12 mtime u32 (+ epoch)        size u64
//! 16      first block, device, blocks of a compressed file, or format of the chunks: u32
//! 20      number u32 (not used)                   the same
//! 24      uid u16, 26 gid u16, 28 reserved        uid u32, 28 gid u32, 32 mtime u64, 40 its nanoseconds u32,
//!                                                 44 links u32, 48 reserved
//! then the xattrs, then what the layout says
//! ```
//!
//! Bit 4 of the format of a compact inode that is no folder: there is one link, and the field of links holds
//! the upper bits of the block. Of a folder: its listing has no `.`.
//!
//! Layouts: 0 in blocks; 1 compressed, full index; 2 in blocks, with the end after the inode; 3 compressed,
//! compact index; 4 chunks.
//!
//! A node's number is the place of its inode in the metadata, in units of 32 bytes. A [`NodeId`] is that
//! number; nodes in the metabox follow those of the image.

use super::error::corrupt;
use super::metadata::Space;
use super::superblock::IN_METABOX;
use super::{Erofs, NodeId};
use crate::image::fields::{u16_at, u32_at, u64_at};
use crate::image::{FileType, LayerError};

/// The name of inodes in errors.
pub(super) const TABLE: &str = "inode";

/// Size of a place for an inode, in bytes.
pub(super) const SLOT_BYTES: u64 = 32;

/// The longest target of a symbolic link, in bytes (PATH_MAX).
pub(super) const SYMLINK_BYTES_MAX: u64 = 4096;

/// Size of a compact inode, in bytes.
pub(super) const COMPACT_BYTES: usize = 32;
/// Size of an extended inode, in bytes.
pub(super) const EXTENDED_BYTES: usize = 64;

/// Bit of the format: extended.
const EXTENDED: u16 = 1;
/// Bit of the format: one link, or a listing without `.`.
const ONE_LINK: u16 = 1 << 4;

/// How the content of a file is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// In consecutive blocks; `None`: it is a hole.
    Plain(Option<u64>),
    /// In consecutive blocks but for the end, which follows the inode.
    Inline(u64),
    /// In clusters, with an index of 8 bytes each, or with extents.
    CompressedFull,
    /// In clusters, with an index of 2 or 4 bytes each.
    CompressedCompact,
    /// In chunks of this format.
    Chunks(u16),
}

/// An inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Inode {
    pub kind: FileType,
    pub permissions: u16,
    pub uid: u32,
    pub gid: u32,
    /// Size of the content, in bytes.
    pub size: u64,
    /// Seconds since 1970.
    pub mtime: i64,
    pub mtime_nanos: u32,
    pub nlink: u32,
    /// Device number of a device node.
    pub rdev: u32,
    pub layout: Layout,
    /// How many blocks a compressed file takes.
    pub blocks: Option<u64>,
    /// Where the inode is.
    pub space: Space,
    pub at: u64,
    /// Size of the inode without xattrs, in bytes.
    pub bytes: u64,
    /// Size of the xattrs after it, in bytes.
    pub xattr_bytes: u64,
}

impl Inode {
    /// Where the bytes after inode and xattrs are.
    pub(super) fn end(&self) -> u64 {
        self.at + self.bytes + self.xattr_bytes
    }

    /// Whether its content is compressed.
    pub(super) fn is_compressed(&self) -> bool {
        matches!(self.layout, Layout::CompressedFull | Layout::CompressedCompact)
    }

    /// Returns an error about this inode.
    pub(super) fn corrupt(&self, why: impl Into<String>) -> LayerError {
        corrupt(TABLE, self.at, why)
    }
}

/// Whether the inode that begins with these bytes is an extended one.
pub(super) fn is_extended(bytes: &[u8]) -> bool {
    u16_at(bytes, 0) & EXTENDED != 0
}

/// Returns the type that the upper bits of a mode stand for.
fn file_type(mode: u16) -> Option<FileType> {
    Some(match mode >> 12 {
        0o01 => FileType::Fifo,
        0o02 => FileType::CharDevice,
        0o04 => FileType::Directory,
        0o06 => FileType::BlockDevice,
        0o10 => FileType::Regular,
        0o12 => FileType::Symlink,
        0o14 => FileType::Socket,
        _ => return None,
    })
}

impl Erofs {
    /// Returns the node with a number as the image has it.
    pub(super) fn node_at(&self, number: u64) -> Result<NodeId, LayerError> {
        let (number, first, slots) = match number & IN_METABOX {
            0 => (number, 0, self.image_slots),
            _ => (number & !IN_METABOX, self.image_slots, self.metabox_slots),
        };
        if number >= slots {
            return Err(corrupt(TABLE, number, format!("node {number}, expected below {slots}")));
        }
        Ok(NodeId(first + number))
    }

    /// Returns the inode of a node.
    pub(super) fn inode(&self, node: NodeId) -> Result<Inode, LayerError> {
        match node.0.checked_sub(self.image_slots) {
            None => self.inode_at(Space::Image, self.superblock.metadata + node.0 * SLOT_BYTES),
            Some(number) if number < self.metabox_slots => self.inode_at(Space::Metabox, number * SLOT_BYTES),
            Some(_) => {
                let nodes = self.image_slots + self.metabox_slots;
                Err(corrupt(TABLE, node.0, format!("node {}, expected below {nodes}", node.0)))
            }
        }
    }

    /// Returns the inode at a place.
    pub(super) fn inode_at(&self, space: Space, at: u64) -> Result<Inode, LayerError> {
        let head = self.bytes(space, at, COMPACT_BYTES)?;
        if !is_extended(head.bytes()) {
            return self.parse(space, at, head.bytes());
        }
        let whole = self.bytes(space, at, EXTENDED_BYTES)?;
        self.parse(space, at, whole.bytes())
    }

    /// Returns the inode with these bytes, all of it.
    pub(super) fn parse(&self, space: Space, at: u64, bytes: &[u8]) -> Result<Inode, LayerError> {
        let bad = |why: String| Err(corrupt(TABLE, at, why));
        let (format, extended) = (u16_at(bytes, 0), is_extended(bytes));
        if format >> 5 != 0 {
            return bad(format!("format is {format:#x}, expected bits 5 to 15 clear"));
        }
        let mode = u16_at(bytes, 4);
        let Some(kind) = file_type(mode) else { return bad(format!("mode is {mode:#o}, which is no type")) };
        // The upper bits of the block share a field with the count of links.
        let one_link = !extended && kind != FileType::Directory && format & ONE_LINK != 0;
        let (high, mask) = if extended || one_link {
            (u16_at(bytes, 6), (1u64 << 48) - 1)
        } else {
            (0, u64::from(u32::MAX))
        };
        let word = u32_at(bytes, 16);
        let block = u64::from(high) << 32 | u64::from(word);
        let layout = match format >> 1 & 7 {
            0 => Layout::Plain((block & mask != mask).then_some(block)),
            1 => Layout::CompressedFull,
            2 => Layout::Inline(block),
            3 => Layout::CompressedCompact,
            4 => Layout::Chunks(word as u16),
            other => return bad(format!("layout is {other}, expected 0 to 4")),
        };
        let (size, uid, gid, mtime, mtime_nanos, nlink);
        if extended {
            size = u64_at(bytes, 8);
            (uid, gid) = (u32_at(bytes, 24), u32_at(bytes, 28));
            (mtime, mtime_nanos) = (u64_at(bytes, 32).cast_signed(), u32_at(bytes, 40));
            nlink = u32_at(bytes, 44);
        } else {
            size = u32_at(bytes, 8).into();
            (uid, gid) = (u16_at(bytes, 24).into(), u16_at(bytes, 26).into());
            mtime = self.superblock.epoch.wrapping_add(u32_at(bytes, 12).into());
            mtime_nanos = self.superblock.epoch_nanos;
            nlink = if one_link { 1 } else { u16_at(bytes, 6).into() };
        }
        if i64::try_from(size).is_err() {
            return bad(format!("a file of {size} bytes, expected at most {}", i64::MAX));
        }
        if mtime_nanos >= 1_000_000_000 {
            return bad(format!("{mtime_nanos} nanoseconds, expected below 10^9"));
        }
        if kind == FileType::Symlink && size > SYMLINK_BYTES_MAX {
            return bad(format!(
                "a link with a target of {size} bytes, expected at most {SYMLINK_BYTES_MAX}"
            ));
        }
        let device = matches!(kind, FileType::BlockDevice | FileType::CharDevice);
        let xattrs = u64::from(u16_at(bytes, 2));
        let mut inode = Inode {
            kind,
            permissions: mode & 0o7777,
            uid,
            gid,
            size,
            mtime,
            mtime_nanos,
            nlink,
            rdev: if device { word } else { 0 },
            layout,
            blocks: None,
            space,
            at,
            bytes: if extended { EXTENDED_BYTES } else { COMPACT_BYTES } as u64,
            xattr_bytes: if xattrs == 0 { 0 } else { 12 + 4 * (xattrs - 1) },
        };
        if inode.is_compressed() {
            inode.blocks = Some(block);
        }
        Ok(inode)
    }
}
