//! A reader of PuzzleFS images (manifest version 3).
//!
//! ```text
//! OCI manifest     layers: one `…rootfs.v1`, the metadata; the others `…filedata.v1[+zstd]`, the chunks
//! metadata blob    one Cap'n Proto message: inodes, folders, links, attributes, and         message.rs, inodes.rs
//!                  for each file the stretches of chunks that it consists of                parts.rs, table.rs
//! chunk blob       stored bytes: decoded ones as they are, or zstd frames                   chunk.rs
//! ```
//!
//! # Trust
//! OCI manifest (its digest is checked by whoever read it) → digest of the metadata blob → digests of the chunks,
//! which the metadata names. The manifest's list of chunks serves transport and garbage collection and says how
//! long each stored chunk is. Rule: the stored bytes of a blob are read into memory of this process, length and
//! SHA-256 are checked, and only that copy is decoded, every time that a chunk is decoded ([`Blobs`]).
//!
//! # What is kept
//! The message is read once, checked, and dropped. A [`table::Table`] stays: inodes in the order of their
//! numbers, entries of folders in the order of their names, stretches of files with running sums, and the chunks in
//! the order of their first use. A node's id is its inode number. A block's id is the number of its chunk.
//!
//! # What the format does not hold
//! Times: every file shows [`MTIME`]. Holes: they are zeros. Sizes of folders: 0.
//!
//! # Deltas
//! The metadata may have several lists of inodes, the newest first. A number is looked up in each, and the first
//! list that has it counts; a name whose inode is a whiteout there does not exist. mosfs itself writes one list.
//!
//! # Memory
//! While an image is opened: its metadata blob ([`MAX_METADATA_BYTES`]), 52 bytes for each inode, 16 for each stretch,
//! about 140 for each chunk, and the table. Then the table alone: 32 bytes an inode (48 where no number follows the one
//! before), 12 an entry and its name, 16 a stretch, 44 a chunk. For a thread: a stored chunk that is compressed
//! ([`MAX_CHUNK_BYTES`]) and a zstd context (160 KiB). Nothing is locked.

mod chunk;
mod inodes;
mod message;
mod parts;
mod table;

use std::sync::Arc;

use super::blobs::{BlobError, Blobs};
use super::chunked::ChunkedLayer;
pub use super::chunked::MAX_METADATA_BYTES;
use super::layer::{
    Attr, BlockId, DirEntry, Extent, FileType, Layer, LayerError, NodeId, Place, StatFs, Xattrs,
};
use super::source::ReadError;
use inodes::{ROOT, Tag};
use table::{Inode, Table};

/// Media type of the metadata. It is never compressed.
pub const ROOTFS: &str = "application/vnd.puzzlefs.image.rootfs.v1";
/// Media type of a chunk.
pub const FILEDATA: &str = "application/vnd.puzzlefs.image.filedata.v1";
/// Media type of a chunk in an image that was built with compression, also where the chunk is stored as it is: the
/// metadata says which.
pub const FILEDATA_ZSTD: &str = "application/vnd.puzzlefs.image.filedata.v1+zstd";
/// Annotation of the metadata's descriptor: the fs-verity digest of that blob, in hex.
pub const VERITY_ANNOTATION: &str = "io.puzzlefsoci.puzzlefs.puzzlefs_verity_root_hash";

/// The only version of the metadata that is read.
pub const MANIFEST_VERSION: u64 = 3;
/// The most bytes that a chunk may have, stored or decoded. Writers make chunks of at most 256 KiB.
pub const MAX_CHUNK_BYTES: u32 = 1 << 20;
/// The time that every file shows, in seconds since 1970: the format holds none.
pub const MTIME: i64 = 0;
/// Inode numbers are below this.
pub const MAX_INO: u64 = 1 << 48;
/// What statfs(2) shows as the preferred size of a read: the largest chunk that writers make, in bytes.
const BLOCK_BYTES: u32 = 256 << 10;

/// The name that errors give to the metadata.
const METADATA: &str = "puzzlefs metadata";

/// The metadata makes no sense at this offset, in bytes.
fn corrupt(offset: usize, why: impl Into<String>) -> LayerError {
    LayerError::Corrupt { table: METADATA, offset: offset as u64, why: why.into() }
}

/// An open image.
pub struct Puzzlefs {
    blobs: Arc<dyn Blobs>,
    table: Table,
}

impl Puzzlefs {
    /// Opens an image: reads its metadata whole, and checks it.
    ///
    /// `layer` is what the manifest lists, whose digest the caller has checked.
    ///
    /// # Errors
    /// [`LayerError::Read`] where the metadata cannot be read or does not have its digest;
    /// [`LayerError::Corrupt`] where it makes no sense, needs a chunk that is not listed, or is larger than
    /// 256 MiB.
    pub fn open(layer: &ChunkedLayer) -> Result<Puzzlefs, LayerError> {
        if layer.size > MAX_METADATA_BYTES {
            let why = format!("{} bytes, expected at most {MAX_METADATA_BYTES}", layer.size);
            return Err(corrupt(0, why));
        }
        let mut bytes = Vec::new();
        let read = layer.blobs.read(&layer.digest, layer.size, &mut bytes);
        read.map_err(|error| chunk::read_error(error, METADATA, 0, layer.size))?;
        let image = Puzzlefs { blobs: Arc::clone(&layer.blobs), table: Table::read(&bytes, &layer.chunks)? };
        drop(bytes);
        image.refuse_wrong_sizes()?;
        Ok(image)
    }

    /// Refuses an image whose manifest has the decoded sizes of compressed chunks, as puzzlefs 0.2.0 wrote them.
    ///
    /// Rule (OCI descriptors): `size` is the size in bytes of the raw content, and content of another size is not
    /// trusted. One chunk shows it; any other fault of that chunk is left to those who read it.
    fn refuse_wrong_sizes(&self) -> Result<(), LayerError> {
        let Some(chunk) = self.table.chunks.iter().find(|chunk| chunk.compressed) else { return Ok(()) };
        let mut stored = Vec::new();
        match self.blobs.read(&chunk.digest, chunk.stored_bytes.into(), &mut stored) {
            Err(BlobError::Size { digest, expected, found })
                if found < expected && expected == u64::from(chunk.decoded_bytes) =>
            {
                Err(corrupt(
                    0,
                    format!(
                        "the manifest says that chunk {digest} has {expected} bytes, which is its size before \
                         compression; it has {found}. puzzlefs 0.2.0 wrote such manifests: build the image \
                         again with a newer version"
                    ),
                ))
            }
            _ => Ok(()),
        }
    }

    /// How many chunks the files use.
    pub fn chunk_count(&self) -> usize {
        self.table.chunks.len()
    }

    /// The chunk of that number, in the order of first use, to decode it.
    pub fn chunk(&self, number: usize) -> Option<BlockId> {
        let chunk = self.table.chunks.get(number)?;
        Some(BlockId { start: number as u64, size_word: chunk.flags(), decoded_max: chunk.decoded_bytes })
    }

    fn inode(&self, node: NodeId) -> Result<&Inode, LayerError> {
        self.table
            .inode(node.0)
            .ok_or_else(|| corrupt(0, format!("there is no inode {}, or it has no name", node.0)))
    }

    fn folder(&self, node: NodeId) -> Result<&[table::Entry], LayerError> {
        match self.inode(node)? {
            inode if inode.tag == Tag::Dir => Ok(self.table.entries_of(inode)),
            _ => Err(LayerError::WrongType { node }),
        }
    }

    fn entry(&self, folder: &[table::Entry], at: usize) -> Option<DirEntry> {
        let entry = folder.get(at)?;
        let inode = self.table.inodes.get(entry.inode as usize)?;
        let name = self.table.name(entry).to_vec();
        Some(DirEntry {
            name,
            node: NodeId(self.table.number(entry.inode)),
            kind: inode.tag.kind(),
            next: at as u64 + 1,
        })
    }
}

impl Layer for Puzzlefs {
    fn root(&self) -> NodeId {
        NodeId(ROOT)
    }

    fn attr(&self, node: NodeId) -> Result<Attr, LayerError> {
        let inode = self.inode(node)?;
        let kind = inode.tag.kind();
        let rdev = match kind {
            FileType::BlockDevice | FileType::CharDevice => inode.first,
            _ => 0,
        };
        let (uid, gid) = self.table.owner(inode);
        Ok(Attr {
            kind,
            permissions: inode.permissions,
            uid,
            gid,
            size_bytes: inode.size,
            blocks_512: if kind == FileType::Regular { inode.size.div_ceil(512) } else { 0 },
            mtime: MTIME,
            mtime_nanos: 0,
            nlink: inode.nlink,
            rdev,
            has_xattrs: inode.has_xattrs,
        })
    }

    fn lookup(&self, dir: NodeId, name: &[u8]) -> Result<Option<DirEntry>, LayerError> {
        let folder = self.folder(dir)?;
        let found = folder.binary_search_by(|entry| self.table.name(entry).cmp(name));
        Ok(found.ok().and_then(|at| self.entry(folder, at)))
    }

    fn read_dir(
        &self,
        dir: NodeId,
        cookie: u64,
        each: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Result<(), LayerError> {
        let folder = self.folder(dir)?;
        for at in usize::try_from(cookie).unwrap_or(usize::MAX)..folder.len() {
            let Some(entry) = self.entry(folder, at) else { break };
            if !each(entry) {
                break;
            }
        }
        Ok(())
    }

    fn read_link(&self, node: NodeId) -> Result<Vec<u8>, LayerError> {
        match self.inode(node)? {
            inode if inode.tag == Tag::Symlink => {
                Ok(self.table.bytes(inode.first, inode.size as usize).to_vec())
            }
            _ => Err(LayerError::WrongType { node }),
        }
    }

    fn xattrs(&self, node: NodeId) -> Result<Xattrs, LayerError> {
        self.inode(node)?;
        let each = |xattr: &table::Xattr| {
            let name = self.table.bytes(xattr.name, xattr.name_len.into());
            (name.to_vec(), self.table.bytes(xattr.value, xattr.value_len as usize).to_vec())
        };
        Ok(self.table.xattrs_of(node.0).iter().map(each).collect())
    }

    fn extent(&self, node: NodeId, offset: u64) -> Result<Extent, LayerError> {
        let inode = self.inode(node)?;
        if inode.tag != Tag::File {
            return Err(LayerError::WrongType { node });
        }
        let stretches = self.table.stretches_of(inode);
        let at = stretches.partition_point(|stretch| stretch.start <= offset);
        let found = at.checked_sub(1).and_then(|at| stretches.get(at)).filter(|_| offset < inode.size);
        let Some(stretch) = found else {
            return Err(ReadError::OutOfRange { offset, len: 1, size: inode.size }.into());
        };
        let end = stretches.get(at).map_or(inode.size, |next| next.start);
        // At most MAX_CHUNK_BYTES: the table was made of such lengths.
        let len = (end - stretch.start) as u32;
        let block = self
            .chunk(stretch.chunk as usize)
            .ok_or_else(|| corrupt(0, format!("there is no chunk {}", stretch.chunk)))?;
        let place = if stretch.offset == 0 && len == block.decoded_max {
            Place::Block(block)
        } else {
            Place::Shared { block, offset: stretch.offset }
        };
        Ok(Extent { file_offset: stretch.start, len, place })
    }

    fn decode(&self, block: BlockId, out: &mut Vec<u8>) -> Result<(), LayerError> {
        out.clear();
        let chunk = usize::try_from(block.start).ok().and_then(|number| self.table.chunks.get(number));
        match chunk {
            Some(chunk) if self.chunk(block.start as usize) == Some(block) => {
                chunk::decode(&*self.blobs, chunk, block.start, out)
            }
            _ => Err(corrupt(0, format!("{block:?} is not a chunk of this image"))),
        }
    }

    fn has_xattrs(&self) -> bool {
        !self.table.xattrs.is_empty()
    }

    fn may_have_xattr(&self, name: &[u8]) -> bool {
        self.table.has_xattr_named(name)
    }

    fn stat_fs(&self) -> StatFs {
        StatFs {
            bytes: self.table.chunks.iter().map(|chunk| u64::from(chunk.stored_bytes)).sum(),
            files: self.table.inodes.len() as u64,
            block_bytes: BLOCK_BYTES,
        }
    }
}
