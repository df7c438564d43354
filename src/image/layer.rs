//! The interface of a layer to the merged view, independent of its format.

use super::source::ReadError;

/// A file of a layer, as that layer numbers it.
///
/// It is stable for the life of the image, can be used again without any state, fits in 48 bits, and is the
/// same for all hard links of a file. In squashfs it is the inode reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

/// The type of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileType {
    /// A folder.
    Directory,
    /// A regular file.
    Regular,
    /// A symbolic link.
    Symlink,
    /// A block device.
    BlockDevice,
    /// A character device. One with number 0:0 is a whiteout to the merged view.
    CharDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// What stat(2) shows of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// The type.
    pub kind: FileType,
    /// The permission bits with setuid, setgid and sticky: the low 12 bits of st_mode.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes: of a file its content, of a link its target, of a folder whatever the format stores.
    pub size_bytes: u64,
    /// Space used, in units of 512 bytes.
    pub blocks_512: u64,
    /// Time of the last change of the content, in seconds since 1970; also reported as atime and ctime.
    pub mtime: i64,
    /// The nanoseconds of `mtime`.
    pub mtime_nanos: u32,
    /// Number of hard links, as the layer stores it.
    pub nlink: u32,
    /// Device number of a device node, in the kernel's encoding for user space (`makedev`).
    pub rdev: u32,
    /// Whether the file may have extended attributes; `false` saves a look-up.
    pub has_xattrs: bool,
}

/// One name in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name: any bytes but NUL and `/`, 1 to 255 of them, never `.` or `..`.
    pub name: Vec<u8>,
    /// The file.
    pub node: NodeId,
    /// The file's type.
    pub kind: FileType,
    /// Pass it to `read_dir` to continue after this entry. Never 0, and at most 2^56.
    pub next: u64,
}

/// What statfs(2) shows of a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StatFs {
    /// Size of the layer, in bytes.
    pub bytes: u64,
    /// Number of files.
    pub files: u64,
    /// Preferred size of a read, in bytes.
    pub block_bytes: u32,
}

/// Why a layer cannot serve a request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The bytes cannot be read, or do not verify.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The bytes are verified (or verification is off) but malformed.
    #[error("corrupt {table} at {offset}: {why}")]
    Corrupt {
        /// Which structure: `superblock`, `inode table`, `directory table`, `data block` …
        table: &'static str,
        /// Where, as an offset in the image or in that structure, in bytes.
        offset: u64,
        /// What was expected and what was found.
        why: String,
    },
    /// The node has another type than the operation requires (such as a folder, to read content from).
    #[error("node {0:#x} is not of the type that the operation needs", node.0)]
    WrongType {
        /// The node.
        node: NodeId,
    },
}

/// A range of a file that is stored as one decodable unit.
///
/// The engine decodes, caches and shares work in this unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the file where the extent begins, in bytes.
    pub file_offset: u64,
    /// How many bytes of the file it covers.
    pub len: u32,
    /// What holds them.
    pub place: Place,
}

/// What holds an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nothing: the bytes are zero (a hole).
    Hole,
    /// A stored block, all of which is this extent.
    Block(BlockId),
    /// A part of a stored block shared with other files (a squashfs fragment).
    Shared {
        /// The stored block.
        block: BlockId,
        /// Where in the decoded block the extent begins, in bytes.
        offset: u32,
    },
}

/// A stored block of a layer, enough to decode it without any other state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId {
    /// Offset in the image, in bytes.
    pub start: u64,
    /// Size word as the format stores it (squashfs: bit 24 set means not compressed). The reader uses bits
    /// that the format leaves at 0: only use a `BlockId` that `extent` returned.
    pub size_word: u32,
    /// Most bytes that it decodes to; a data block decodes to exactly its extent's length.
    pub decoded_max: u32,
}

/// Extended attributes: full name (`user.a`) and value.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// A file system image that can be a layer of a merged view.
///
/// All methods may be called from many threads. No result depends on an earlier call. A hostile image causes
/// an error: no panic, no endless loop, no memory beyond the stated bound.
pub trait Layer: Send + Sync {
    /// The root folder.
    fn root(&self) -> NodeId;

    /// What stat(2) shows of a file.
    fn attr(&self, node: NodeId) -> Result<Attr, LayerError>;

    /// Returns the entry of that name in a folder.
    fn lookup(&self, dir: NodeId, name: &[u8]) -> Result<Option<DirEntry>, LayerError>;

    /// Calls `each` for the entries of a folder in byte order of their names, starting at `cookie` (0: at the
    /// start, else the `next` of an earlier entry), until it returns false.
    fn read_dir(
        &self,
        dir: NodeId,
        cookie: u64,
        each: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Result<(), LayerError>;

    /// The target of a symbolic link.
    fn read_link(&self, node: NodeId) -> Result<Vec<u8>, LayerError>;

    /// All extended attributes with their full names (`user.x`), in the order of the image.
    fn xattrs(&self, node: NodeId) -> Result<Xattrs, LayerError>;

    /// Returns the extent that holds the byte at `offset` of a regular file; `offset` is below its size.
    fn extent(&self, node: NodeId, offset: u64) -> Result<Extent, LayerError>;

    /// Reads, verifies and decodes a stored block into `out` (which is cleared first).
    ///
    /// `out` never grows beyond `block.decoded_max`. Scratch memory is the calling thread's.
    fn decode(&self, block: BlockId, out: &mut Vec<u8>) -> Result<(), LayerError>;

    /// Whether any file of the image has extended attributes.
    fn has_xattrs(&self) -> bool;

    /// Whether any file of the image may have an extended attribute of that name. True where that is not known, or
    /// would take long to find out. May read from the image.
    fn may_have_xattr(&self, name: &[u8]) -> bool {
        let _ = name;
        self.has_xattrs()
    }

    /// Sizes, for statfs(2).
    fn stat_fs(&self) -> StatFs;

    /// A bound that is above all numbers of files, at most 2^48: the smaller it is, the more layers have inode
    /// numbers of 32 bits. The same at every call.
    fn numbers(&self) -> u64 {
        1 << 48
    }

    /// The number of a file: below [`Layer::numbers`], the same for all its hard links, and at every time.
    fn number(&self, node: NodeId) -> Result<u64, LayerError> {
        Ok(node.0)
    }

    /// The file with that number.
    fn node(&self, number: u64) -> Result<NodeId, LayerError> {
        Ok(NodeId(number))
    }
}
