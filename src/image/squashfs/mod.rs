//! A reader of squashfs 4.0.
//!
//! ```text
//! 0              superblock, 96 bytes                                        superblock.rs
//! 96             compressor options, a metadata block, if a flag says so     compress.rs
//!                data blocks and fragment blocks of the files                file.rs
//! inode_table    inodes                                                      inode.rs
//! directory_table  listings of the folders                                   directory.rs
//! ...            for fragments, export, ids, xattrs, each where it exists:   tables.rs, xattr.rs
//!                metadata blocks, then the pointers to them
//! bytes_used     padding; verity data may follow
//! ```
//!
//! All numbers are little-endian. Everything from the inode table on is stored in metadata blocks of up to 8
//! KiB (metadata.rs). A node's id is its inode reference: the offset of a metadata block from `inode_table`,
//! times 65536, plus the offset in the decoded block.
//!
//! # Invariants
//! - Opening reads the superblock and the root inode. Everything else is read and checked when it is needed:
//!   whatever the bytes are, a result is correct or a [`LayerError`].
//! - A walk over metadata moves strictly forward in its table and crosses only full blocks. So there are no
//!   loops, and the work of a call is bounded by the size of the table that it reads. The caller must detect
//!   loops of folders; [`Squashfs::check_all`] does.
//! - No value from an image determines the size of an allocation before it has been compared with a bound.
//!
//! # Memory
//! Per image: decoded metadata blocks ([`Options::metadata_cache_bytes`], 4 MiB by default); positions in
//! large files and folders (2 MiB); ids (256 KiB); pointers of tables (64 KiB for each of four); positions of
//! inode blocks (numbers.rs, 4 bytes for about 150 files). Per thread: see compress.rs, at most 1.3 MiB, and
//! 4 MiB more while it decodes xz or lzma. Per result: a name of 255 bytes, a link of 4 KiB, the xattrs of
//! one file (4 MiB of values, 64 KiB of names), one decoded block.
//!
//! # Locks
//! One per set of the cache of metadata blocks and of the positions, each held for a look-up only, never
//! while reading or decoding, never two at a time.

mod check;
mod compress;
mod directory;
mod error;
mod file;
mod inode;
mod lzo;
mod metadata;
mod numbers;
mod superblock;
mod tables;
mod xattr;

use std::collections::HashSet;
use std::sync::{Arc, OnceLock};

pub use check::Event;
pub use compress::Compressor;
pub use file::STORED as BLOCK_STORED;
pub use metadata::{METADATA_BYTES, STORED as METADATA_STORED};
pub use superblock::{FLAG_COMPRESSOR_OPTIONS, SUPERBLOCK_BYTES, Superblock};

use super::cache::Cache;
use super::fields::field;
use super::layer::{Attr, BlockId, DirEntry, Extent, FileType, Layer, LayerError, NodeId, StatFs, Xattrs};
use super::source::Source;
use error::corrupt;
use inode::{Data, NONE};
use metadata::{Metadata, Places, Region};
use tables::Table;
use xattr::XattrTable;

/// Options for reading an image.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Most bytes of decoded metadata blocks to cache (at least 256 KiB).
    pub metadata_cache_bytes: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { metadata_cache_bytes: 4 << 20 }
    }
}

/// An open image.
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
/// use std::fs::File;
/// use std::sync::Arc;
///
/// use mosfs::layers::{Layer, Place, Squashfs, VerifiedSource};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let example = Example::publish()?;
/// # let store = &example.store;
/// # let (name, _) = store.names()?.into_iter().find(|(name, _)| name.starts_with("mos/images/")).unwrap();
/// # let image = store.image(&store.resolve(&name)?.digest)?;
/// # let layer = &image.layers[0];
/// # let (path, root_hash) = (store.blob_path(&layer.digest), layer.trust.root_hash().unwrap());
/// // Every block is verified against the root hash when it is read.
/// let source = VerifiedSource::open(File::open(path)?, root_hash)?;
/// let image = Squashfs::open(Arc::new(source))?;
///
/// let mut node = image.root();
/// for name in ["usr", "lib", "os-release"] {
///     node = image.lookup(node, name.as_bytes())?.ok_or("no such file")?.node;
/// }
/// let extent = image.extent(node, 0)?;
/// let Place::Shared { block, offset } = extent.place else { panic!("a small file shares its block") };
/// let mut bytes = Vec::new();
/// image.decode(block, &mut bytes)?;
/// assert_eq!(&bytes[offset as usize..][..extent.len as usize], b"NAME=example\n");
/// # Ok(())
/// # }
/// ```
pub struct Squashfs {
    superblock: Superblock,
    metadata: Metadata,
    places: Places,
    id_table: Table,
    ids: OnceLock<Box<[u32]>>,
    fragments: Table,
    export: Option<Table>,
    xattr_table: OnceLock<XattrTable>,
    xattr_names: OnceLock<Option<HashSet<Vec<u8>>>>,
    starts: OnceLock<numbers::BlockStarts>,
}

impl Squashfs {
    /// Opens an image: reads and checks the superblock and the root inode.
    ///
    /// # Errors
    /// [`LayerError::Read`] if the source cannot return the bytes, [`LayerError::Corrupt`] if they are
    /// malformed.
    pub fn open(source: Arc<dyn Source>) -> Result<Squashfs, LayerError> {
        Squashfs::open_with(source, Options::default())
    }

    /// Opens an image as `open` does, with other bounds.
    ///
    /// # Errors
    /// As `open`.
    pub fn open_with(source: Arc<dyn Source>, options: Options) -> Result<Squashfs, LayerError> {
        let superblock = Squashfs::read_superblock(&*source)?;
        let lowest = superblock.directory_table;
        let table = |name, entries: u32, at| Table::new(name, entries.into(), at, lowest);
        let image = Squashfs {
            id_table: table("id table", superblock.ids.into(), superblock.id_table),
            fragments: match superblock.fragment_table {
                Some(at) => table("fragment table", superblock.fragments, at),
                None => table("fragment table", 0, superblock.directory_table),
            },
            export: superblock.export_table.map(|at| table("export table", superblock.inodes, at)),
            metadata: Metadata {
                source,
                compressor: superblock.compressor,
                cache: Cache::new(options.metadata_cache_bytes, METADATA_BYTES),
            },
            superblock,
            places: Places::default(),
            ids: OnceLock::new(),
            xattr_table: OnceLock::new(),
            xattr_names: OnceLock::new(),
            starts: OnceLock::new(),
        };
        let (root, _) = image.inode(superblock.root)?;
        if root.kind != FileType::Directory {
            let at = superblock.inode_table + (superblock.root.0 >> 16);
            return Err(corrupt(
                inode::TABLE,
                at,
                format!("the root inode is of type {:?}, expected Directory", root.kind),
            ));
        }
        Ok(image)
    }

    /// Reads and checks the superblock alone.
    ///
    /// # Errors
    /// As `open`.
    pub fn read_superblock(source: &dyn Source) -> Result<Superblock, LayerError> {
        let mut scratch = Vec::new();
        let size = source.size_bytes();
        if size < SUPERBLOCK_BYTES as u64 {
            return Err(corrupt(
                "superblock",
                0,
                format!("the image has {size} bytes, expected at least {SUPERBLOCK_BYTES}"),
            ));
        }
        let bytes = source.read(0, SUPERBLOCK_BYTES, &mut scratch)?;
        Superblock::parse(&field(bytes, 0), size)
    }

    /// The superblock.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Returns how many bytes of decoded metadata blocks are cached now.
    pub fn metadata_cache_bytes(&self) -> usize {
        self.metadata.cache.sum(|block| block.data.len())
    }

    /// Returns the stored compressor options, if there are any. No compressor needs them to decode.
    ///
    /// # Errors
    /// As `open`.
    pub fn compressor_options(&self) -> Result<Option<Vec<u8>>, LayerError> {
        if !self.superblock.has_compressor_options() {
            return Ok(None);
        }
        let start = SUPERBLOCK_BYTES as u64;
        let region = Region { table: "compressor options", start, end: self.superblock.inode_table };
        Ok(Some(self.metadata.block(&region, start)?.data.to_vec()))
    }

    fn inode_region(&self) -> Region {
        Region {
            table: inode::TABLE,
            start: self.superblock.inode_table,
            end: self.superblock.directory_table,
        }
    }
}

impl Layer for Squashfs {
    fn root(&self) -> NodeId {
        self.superblock.root
    }

    fn attr(&self, node: NodeId) -> Result<Attr, LayerError> {
        let (inode, mut cursor) = self.inode(node)?;
        let has_xattrs =
            self.superblock.xattr_table.is_some() && self.xattr_number(&inode, &mut cursor)? != NONE;
        let (size_bytes, blocks_512, rdev) = match inode.data {
            // The size of the listing plus 3, as the kernel reports it.
            Data::Directory(folder) => (folder.size.into(), 0, 0),
            Data::File(file) => (file.size, file.size.saturating_sub(file.sparse).div_ceil(512), 0),
            Data::Symlink(size) => (size.into(), 0, 0),
            // The encoding on disk is that of user space: minor bits 0..7 and 20..31, major bits 8..19.
            Data::Device(number) => (0, 0, number),
            Data::Nothing => (0, 0, 0),
        };
        Ok(Attr {
            kind: inode.kind,
            permissions: inode.permissions,
            uid: self.id(inode.uid)?,
            gid: self.id(inode.gid)?,
            size_bytes,
            blocks_512,
            mtime: inode.mtime.into(),
            mtime_nanos: 0,
            nlink: inode.nlink,
            rdev,
            has_xattrs,
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
        self.read_listing(dir, cookie, each)
    }

    fn read_link(&self, node: NodeId) -> Result<Vec<u8>, LayerError> {
        let (inode, mut cursor) = self.inode(node)?;
        let Data::Symlink(size) = inode.data else { return Err(LayerError::WrongType { node }) };
        let mut target = Vec::new();
        cursor.append(size as usize, &mut target)?;
        if target.contains(&0) {
            return Err(cursor.corrupt("the target of a link has a NUL byte in it"));
        }
        Ok(target)
    }

    fn xattrs(&self, node: NodeId) -> Result<Xattrs, LayerError> {
        self.read_xattrs(node)
    }

    fn extent(&self, node: NodeId, offset: u64) -> Result<Extent, LayerError> {
        self.find_extent(node, offset)
    }

    fn decode(&self, block: BlockId, out: &mut Vec<u8>) -> Result<(), LayerError> {
        self.decode_block(block, out)
    }

    fn has_xattrs(&self) -> bool {
        self.superblock.xattr_table.is_some()
    }

    fn may_have_xattr(&self, name: &[u8]) -> bool {
        self.has_xattrs() && self.may_have_xattr_named(name)
    }

    fn stat_fs(&self) -> StatFs {
        StatFs {
            bytes: self.superblock.bytes_used,
            files: self.superblock.inodes.into(),
            block_bytes: self.superblock.block_bytes,
        }
    }

    fn numbers(&self) -> u64 {
        self.number_bound()
    }

    fn number(&self, node: NodeId) -> Result<u64, LayerError> {
        self.number_of(node)
    }

    fn node(&self, number: u64) -> Result<NodeId, LayerError> {
        self.node_of(number)
    }
}
