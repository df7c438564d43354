//! A reader of erofs.
//!
//! ```text
//! 0              unused (boot sectors)
//! 1024           superblock, options of the algorithms                       superblock.rs
//! metadata       inodes, each with its xattrs and what its layout needs      inode.rs, xattr.rs
//!                after it: the end of the content, chunks, an index of
//!                clusters
//! anywhere       blocks: folders, content, shared xattrs                     directory.rs, file.rs, zmap.rs
//! packed file    ends of many files, compressed together                     file.rs
//! metabox        a file that holds metadata, compressed                      metadata.rs
//! ```
//! (The kernel's fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst.) All numbers are little-endian.
//! Everything is there of what Linux 6.18 reads from one file; more devices are refused.
//!
//! # Invariants
//! - Opening reads the superblock, the nodes that it names, and the prefixes of names. Everything else is
//!   read and checked when it is needed: whatever the bytes are, a result is correct or a [`LayerError`].
//! - Metadata in the metabox is found through metadata of the image itself, and a fragment through the packed
//!   file, which has none: no structure leads back to itself. The caller must detect loops of folders.
//! - No value from an image determines the size of an allocation before it has been compared with a bound.
//!
//! # Memory
//! Per image: pages of metadata ([`Options::metadata_cache_bytes`], 4 MiB by default), prefixes of names (64
//! KiB). Per thread: see codec.rs. Per result: one block of a folder (64 KiB), a link of 4 KiB, the xattrs of
//! one file (4 MiB of values, 64 KiB of names), one decoded cluster (12 MiB).
//!
//! # Locks
//! One for each set of the cache of pages, held for a look-up only.

mod codec;
mod directory;
mod error;
mod file;
mod inode;
mod lz4;
mod metadata;
mod names;
mod superblock;
mod xattr;
mod zmap;

use std::collections::HashSet;
use std::sync::{Arc, OnceLock};

use super::cache::Cache;
use super::layer::{Attr, BlockId, DirEntry, Extent, FileType, Layer, LayerError, NodeId, StatFs, Xattrs};
use super::source::Source;
use inode::{Inode, SLOT_BYTES};
use metadata::{PAGE_BYTES, Space};
use superblock::Superblock;
pub use superblock::image_bytes;

/// How a cluster is compressed. Their order is that of the superblock's bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// lz4, also of its high-compression mode.
    Lz4,
    /// MicroLZMA.
    Lzma,
    /// Raw deflate.
    Deflate,
    /// zstd.
    Zstd,
}

/// Options for reading an image.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Most bytes of pages of metadata to cache (at least 128 KiB).
    pub metadata_cache_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options { metadata_cache_bytes: 4 << 20 }
    }
}

/// An open image.
pub struct Erofs {
    source: Arc<dyn Source>,
    superblock: Superblock,
    pages: Cache<Arc<[u8]>>,
    /// How many places for inodes there are in the image, and in the metabox.
    image_slots: u64,
    metabox_slots: u64,
    root: NodeId,
    /// The file that holds fragments.
    packed: Option<Inode>,
    /// The file that holds metadata.
    metabox: Option<Inode>,
    prefixes: Vec<xattr::Prefix>,
    /// The names of all attributes, once read; `None` where they are too many.
    xattr_names: OnceLock<Option<HashSet<Vec<u8>>>>,
}

impl Erofs {
    /// Opens an image.
    ///
    /// # Errors
    /// [`LayerError::Read`] if the source cannot return the bytes, [`LayerError::Corrupt`] if they are
    /// malformed, or of a feature that this reader does not know.
    pub fn open(source: Arc<dyn Source>) -> Result<Self, LayerError> {
        Self::open_with(source, Options::default())
    }

    /// Opens an image as `open` does, with other bounds.
    ///
    /// # Errors
    /// As `open`.
    pub fn open_with(source: Arc<dyn Source>, options: Options) -> Result<Self, LayerError> {
        let superblock = Superblock::read(&*source)?;
        let mut image = Erofs {
            pages: Cache::new(options.metadata_cache_bytes, PAGE_BYTES),
            image_slots: (source.size_bytes().saturating_sub(superblock.metadata)) / SLOT_BYTES,
            metabox_slots: 0,
            source,
            superblock,
            root: NodeId(0),
            packed: None,
            metabox: None,
            prefixes: Vec::new(),
            xattr_names: OnceLock::new(),
        };
        // In this order: each may be needed to read the next.
        image.packed = superblock.packed.map(|number| image.file_inode(number, "packed")).transpose()?;
        if let Some(number) = superblock.metabox {
            let metabox = image.file_inode(number, "metabox")?;
            image.metabox_slots = metabox.size / SLOT_BYTES;
            image.metabox = Some(metabox);
        }
        let slots = image.image_slots.checked_add(image.metabox_slots);
        if slots.is_none_or(|slots| slots > 1 << 48) {
            let size = image.source.size_bytes();
            return Err(error::corrupt("superblock", 0, format!("an image of {size} bytes")));
        }
        image.prefixes = image.read_prefixes()?;
        image.root = image.node_at(superblock.root)?;
        let root = image.inode(image.root)?;
        if root.kind != FileType::Directory {
            return Err(root.corrupt(format!("the root is of type {:?}, expected Directory", root.kind)));
        }
        Ok(image)
    }

    /// The algorithms that clusters of the image may have.
    pub fn algorithms(&self) -> impl Iterator<Item = Algorithm> {
        const ALL: [Algorithm; 4] = [Algorithm::Lz4, Algorithm::Lzma, Algorithm::Deflate, Algorithm::Zstd];
        let bits = self.superblock.algorithms;
        ALL.into_iter()
            .enumerate()
            .filter(move |(bit, _)| bits >> bit & 1 != 0)
            .map(|(_, algorithm)| algorithm)
    }

    /// Returns the inode of a file that the superblock names; it is not in the metabox.
    fn file_inode(&self, number: u64, what: &str) -> Result<Inode, LayerError> {
        let inode = self.inode(self.node_at(number)?)?;
        if inode.kind != FileType::Regular || inode.space != Space::Image {
            return Err(
                inode.corrupt(format!("the {what} node is of type {:?}, expected Regular", inode.kind))
            );
        }
        Ok(inode)
    }

    /// The preferred size of a read, in bytes: about what a cluster decodes to. Caches are sized by it.
    fn read_bytes(&self) -> u32 {
        if !self.superblock.has_clusters() {
            return file::PIECE_BYTES as u32;
        }
        // Only lz4 says how large its clusters are; they decode to about twice that.
        let stored = u32::from(self.superblock.lz4_blocks) << self.superblock.block_log;
        (2 * stored.min(1 << 20)).next_power_of_two().max(128 << 10)
    }

    /// Returns how many bytes of metadata are cached now.
    #[cfg(feature = "internals")]
    pub fn metadata_cache_bytes(&self) -> usize {
        self.pages.sum(|page| page.len())
    }
}

impl Layer for Erofs {
    fn root(&self) -> NodeId {
        self.root
    }

    fn attr(&self, node: NodeId) -> Result<Attr, LayerError> {
        let inode = self.inode(node)?;
        let log = self.superblock.block_log;
        // As the kernel reports it.
        let blocks = inode.blocks.unwrap_or_else(|| inode.size.div_ceil(1 << log));
        let blocks_512 = blocks.saturating_mul(1 << (log - 9));
        Ok(Attr {
            kind: inode.kind,
            permissions: inode.permissions,
            uid: inode.uid,
            gid: inode.gid,
            size_bytes: inode.size,
            blocks_512,
            mtime: inode.mtime,
            mtime_nanos: inode.mtime_nanos,
            nlink: inode.nlink,
            rdev: inode.rdev,
            has_xattrs: inode.xattr_bytes > 0,
        })
    }

    fn lookup(&self, dir: NodeId, name: &[u8]) -> Result<Option<DirEntry>, LayerError> {
        self.find(dir, name)
    }

    fn read_dir(
        &self,
        dir: NodeId,
        cookie: u64,
        each: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Result<(), LayerError> {
        self.list(dir, cookie, each)
    }

    fn read_link(&self, node: NodeId) -> Result<Vec<u8>, LayerError> {
        let inode = self.inode(node)?;
        match inode.kind {
            FileType::Symlink => self.link_target(&inode),
            _ => Err(LayerError::WrongType { node }),
        }
    }

    fn xattrs(&self, node: NodeId) -> Result<Xattrs, LayerError> {
        self.xattrs_of(&self.inode(node)?)
    }

    fn extent(&self, node: NodeId, offset: u64) -> Result<Extent, LayerError> {
        let inode = self.inode(node)?;
        match inode.kind {
            FileType::Regular => self.extent_of(&inode, offset),
            _ => Err(LayerError::WrongType { node }),
        }
    }

    fn decode(&self, block: BlockId, out: &mut Vec<u8>) -> Result<(), LayerError> {
        codec::decode(self, block, out)
    }

    // No field of the superblock says whether there are any.
    fn has_xattrs(&self) -> bool {
        true
    }

    fn may_have_xattr(&self, name: &[u8]) -> bool {
        self.may_have_xattr_named(name)
    }

    fn stat_fs(&self) -> StatFs {
        StatFs { bytes: self.superblock.bytes, files: self.superblock.inodes, block_bytes: self.read_bytes() }
    }

    fn numbers(&self) -> u64 {
        self.image_slots + self.metabox_slots
    }
}
