//! Inodes.
//!
//! ```text
//! all      type u16, mode u16, uid u16, gid u16 (both: index in the id table), mtime u32, number u32   16 bytes
//!  1 dir     listing block u32, nlink u32, size u16, listing offset u16, parent u32                    32
//!  2 file    data start u32, fragment u32, fragment offset u32, size u32, then u32 x blocks            32 +
//!  3 symlink nlink u32, size u32, then the target                                                      24 +
//!  4 blk, 5 chr  nlink u32, device u32                                                                 24
//!  6 fifo, 7 socket  nlink u32                                                                         20
//!  8 dir     nlink u32, size u32, listing block u32, parent u32, index count u16, listing offset u16,
//!            xattr u32, then the index                                                                 40 +
//!  9 file    data start u64, size u64, sparse u64, nlink u32, fragment u32, fragment offset u32,
//!            xattr u32, then u32 x blocks                                                              56 +
//! 10 symlink as 3, then xattr u32;   11..14 as 4..7, then xattr u32
//! ```

use super::error::corrupt;
use super::metadata::Cursor;
use super::{NodeId, Squashfs};
use crate::image::fields::{u16_at, u32_at, u64_at};
use crate::image::{FileType, LayerError};

/// The name of the inode table in errors.
pub(super) const TABLE: &str = "inode table";

/// The longest target of a symbolic link, in bytes (PATH_MAX; the kernel's reader has the same limit).
pub(super) const SYMLINK_BYTES_MAX: u32 = 4096;

/// "None", in a field that holds the number of a fragment or of a set of xattrs.
pub(super) const NONE: u32 = u32::MAX;

/// Size of the header common to all inodes, in bytes.
const COMMON_BYTES: usize = 16;

/// The longest fixed part, in bytes.
const FIXED_BYTES_MAX: usize = 56;

/// The fixed part of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Inode {
    pub kind: FileType,
    /// Whether it has one of the types 8 to 14.
    pub extended: bool,
    pub permissions: u16,
    /// Index in the id table.
    pub uid: u16,
    /// Index in the id table.
    pub gid: u16,
    /// Seconds since 1970.
    pub mtime: u32,
    /// Number of the inode, from 1.
    pub number: u32,
    pub nlink: u32,
    /// Number of the set of xattrs, or [`NONE`].
    pub xattr: u32,
    pub data: Data,
}

/// The fields specific to each type of inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Data {
    Directory(Directory),
    File(File),
    /// A link whose target has this many bytes.
    Symlink(u32),
    /// A device with this number.
    Device(u32),
    /// A fifo or a socket.
    Nothing,
}

/// A folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Directory {
    /// Metadata block of the listing, from the start of the directory table, in bytes.
    pub block: u32,
    /// Offset of the listing in the decoded block, in bytes.
    pub offset: u16,
    /// Size of the listing in bytes, plus 3.
    pub size: u32,
    /// Inode number of the parent folder.
    pub parent: u32,
    /// Number of entries of the index.
    pub index: u16,
}

/// A regular file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct File {
    /// Offset in the image of the first data block, in bytes.
    pub start: u64,
    /// Size of the content, in bytes.
    pub size: u64,
    /// Bytes of the content that are in holes.
    pub sparse: u64,
    /// Number of the fragment block that holds the end, or [`NONE`].
    pub fragment: u32,
    /// Where the end begins in the decoded fragment block, in bytes.
    pub fragment_offset: u32,
}

/// Returns the type that a number stands for (1 to 7, in inodes and listings).
pub(super) fn file_type(number: u16) -> Option<FileType> {
    Some(match number {
        1 => FileType::Directory,
        2 => FileType::Regular,
        3 => FileType::Symlink,
        4 => FileType::BlockDevice,
        5 => FileType::CharDevice,
        6 => FileType::Fifo,
        7 => FileType::Socket,
        _ => return None,
    })
}

/// Returns the length of the fixed part of an inode of that type, in bytes.
fn fixed_bytes(kind: u16) -> Option<usize> {
    Some(match kind {
        1 | 2 => 32,
        3..=5 | 10 => 24,
        6 | 7 => 20,
        8 => 40,
        9 => 56,
        11 | 12 => 28,
        13 | 14 => 24,
        _ => return None,
    })
}

impl Inode {
    /// Reads the fixed part of an inode; `bytes` is as long as [`fixed_bytes`] says.
    ///
    /// The xattrs of a link are stored after its target and are not read here.
    fn parse(bytes: &[u8]) -> Result<Inode, String> {
        let number = u16_at(bytes, 0);
        let extended = number > 7;
        let kind = file_type(if extended { number.wrapping_sub(7) } else { number });
        let Some(kind) = kind else { return Err(format!("inode type is {number}, expected 1 to 14")) };
        let u16 = |at| u16_at(bytes, at);
        let u32 = |at| u32_at(bytes, at);
        let u64 = |at| u64_at(bytes, at);
        let (nlink, xattr, data) = match (kind, extended) {
            (FileType::Directory, false) => {
                let size = u32::from(u16(24));
                (
                    u32(20),
                    NONE,
                    Data::Directory(Directory {
                        block: u32(16),
                        offset: u16(26),
                        size,
                        parent: u32(28),
                        index: 0,
                    }),
                )
            }
            (FileType::Directory, true) => {
                let folder = Directory {
                    block: u32(24),
                    offset: u16(34),
                    size: u32(20),
                    parent: u32(28),
                    index: u16(32),
                };
                (u32(16), u32(36), Data::Directory(folder))
            }
            (FileType::Regular, false) => {
                let file = File {
                    start: u32(16).into(),
                    size: u32(28).into(),
                    sparse: 0,
                    fragment: u32(20),
                    fragment_offset: u32(24),
                };
                (1, NONE, Data::File(file))
            }
            (FileType::Regular, true) => {
                let file = File {
                    start: u64(16),
                    size: u64(24),
                    sparse: u64(32),
                    fragment: u32(44),
                    fragment_offset: u32(48),
                };
                (u32(40), u32(52), Data::File(file))
            }
            (FileType::Symlink, _) => (u32(16), NONE, Data::Symlink(u32(20))),
            (FileType::BlockDevice | FileType::CharDevice, _) => {
                (u32(16), if extended { u32(24) } else { NONE }, Data::Device(u32(20)))
            }
            (FileType::Fifo | FileType::Socket, _) => {
                (u32(16), if extended { u32(20) } else { NONE }, Data::Nothing)
            }
        };
        match data {
            Data::Symlink(size) if size > SYMLINK_BYTES_MAX => {
                return Err(format!(
                    "a link with a target of {size} bytes, expected at most {SYMLINK_BYTES_MAX}"
                ));
            }
            Data::File(File { size, .. }) if i64::try_from(size).is_err() => {
                return Err(format!("a file of {size} bytes, expected at most {}", i64::MAX));
            }
            Data::Directory(Directory { offset, .. }) if usize::from(offset) >= super::METADATA_BYTES => {
                return Err(format!("a listing at offset {offset} of a metadata block, expected below 8192"));
            }
            _ => {}
        }
        Ok(Inode {
            kind,
            extended,
            permissions: u16(2) & 0o7777,
            uid: u16(4),
            gid: u16(6),
            mtime: u32(8),
            number: u32(12),
            nlink,
            xattr,
            data,
        })
    }
}

impl Squashfs {
    /// Returns the inode of a node, and a cursor at the bytes after its fixed part.
    pub(super) fn inode(&self, node: NodeId) -> Result<(Inode, Cursor<'_>), LayerError> {
        let at = self.superblock.inode_table.saturating_add(node.0 >> 16);
        let mut cursor = self.metadata.cursor(self.inode_region(), at, (node.0 & 0xffff) as usize)?;
        let begin = cursor.position();
        let bad =
            |why| corrupt(TABLE, begin.at, format!("{why} (byte {} of the metadata block)", begin.offset));
        let mut bytes = [0; FIXED_BYTES_MAX];
        cursor.read(&mut bytes[..COMMON_BYTES])?;
        let number = u16_at(&bytes, 0);
        let Some(len) = fixed_bytes(number) else {
            return Err(bad(format!("inode type is {number}, expected 1 to 14")));
        };
        cursor.read(&mut bytes[COMMON_BYTES..len])?;
        let inode = Inode::parse(&bytes[..len]).map_err(bad)?;
        Ok((inode, cursor))
    }

    /// Returns the number of the set of xattrs of an inode, or [`NONE`]; the cursor must be after the fixed
    /// part.
    pub(super) fn xattr_number(&self, inode: &Inode, cursor: &mut Cursor<'_>) -> Result<u32, LayerError> {
        match inode.data {
            Data::Symlink(size) if inode.extended => {
                cursor.skip(size.into())?;
                Ok(u32::from_le_bytes(cursor.array()?))
            }
            _ => Ok(inode.xattr),
        }
    }
}
