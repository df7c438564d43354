//! A file system image in a plain file: no OCI image around it, and perhaps another file.
//!
//! ```text
//! FILE   ... | image | ...            an AppImage or a SIF file has a program, or a header, before the image
//!            ^ offset
//!
//! the hash tree, as `veritysetup format` writes it: superblock, then the tree in the next block
//!   appended       where the image ends, rounded up to 4096 bytes
//!   at an offset   elsewhere in FILE        (`veritysetup format --hash-offset=N FILE FILE`)
//!   in a file      alone, or at an offset   (`veritysetup format FILE TREE`)
//! ```
//! The reader of verified blocks ([`VerifiedSource`]) knows one arrangement: data, superblock, tree. [`Joined`] shows it
//! any other one as that.
//!
//! **Trust.** Only the root hash is trusted, and the user provides it. The superblock says how many blocks of data the tree
//! covers. A false number cannot show a wrong byte: another number of levels, or another block below the root, has
//! another hash; and an image that is longer than what the tree covers is refused. Bytes beyond the data are never
//! served.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bytes::{ReadAt, len, read_exact};
use super::format::LayerFormat;
use super::layer::{Layer, LayerError};
use super::source::{ReadError, Source};
use super::verified::{DEFAULT_CACHE_BYTES, PlainSource, VerifiedSource};
use super::verity::{BLOCK_BYTES, Geometry, Superblock, VerityData, VerityError, data_bytes};
use crate::digest::Digest;
use crate::error::{Class, Classified, IoError};
use crate::sys::file::open_image;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Bytes of a superblock; it begins the tree's area.
const SUPERBLOCK: u64 = 512;

/// An image in a plain file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlainFile {
    /// The file, or a block device.
    pub path: PathBuf,
    /// Where in it the image begins, in bytes.
    pub offset: u64,
    /// What its bytes are verified against.
    pub check: Check,
}

/// What the bytes of a plain file are verified against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// A root hash.
    RootHash {
        /// The root hash that is required.
        root_hash: Digest,
        /// Where the hash tree is.
        tree: TreePlace,
    },
    /// Nothing. Rule (docs/design.md, unverified mounts): only if the user asks for it.
    UnsafeNoVerity,
}

/// Where a hash tree begins, with its superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TreePlace {
    /// Where the image ends, rounded up to a whole block.
    Appended,
    /// At this offset in the image's file, in bytes.
    At(u64),
    /// In a file of its own.
    File {
        /// The file, or a block device.
        path: PathBuf,
        /// Where in it, in bytes.
        offset: u64,
    },
}

/// Why a plain file cannot be opened as an image.
#[derive(Debug, thiserror::Error)]
pub enum PlainError {
    /// A file cannot be opened.
    #[error(transparent)]
    Io(#[from] IoError),
    /// There is no image where it should begin.
    #[error("{}: no file system image at offset {offset}: expected squashfs or erofs, {found}", path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
        /// Where the image should begin, in bytes.
        offset: u64,
        /// What is there.
        found: String,
    },
    /// There is no reader for the format.
    #[error("{}: mosfs cannot read {format} yet", path.display())]
    NoReader {
        /// The file.
        path: PathBuf,
        /// The format's name.
        format: &'static str,
    },
    /// The hash tree is missing, malformed, or not under its root hash.
    #[error("{}: {source}", path.display())]
    Verity {
        /// The file that holds the tree.
        path: PathBuf,
        /// What is wrong.
        source: VerityError,
    },
    /// The hash tree does not cover the whole image.
    #[error("{}: the hash tree covers {covered} bytes, expected at least the {image} bytes of the image", path.display())]
    Uncovered {
        /// The file.
        path: PathBuf,
        /// How many bytes the tree covers.
        covered: u64,
        /// How many bytes the image has.
        image: u64,
    },
    /// The file ends before the image does.
    #[error("{}: the file ends after {found} of the {image} bytes of the image", path.display())]
    CutOff {
        /// The file.
        path: PathBuf,
        /// How many bytes there are from the image's first one on.
        found: u64,
        /// How many bytes the image has.
        image: u64,
    },
    /// The image cannot be read, or makes no sense.
    #[error("{}: {source}", path.display())]
    Layer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: LayerError,
    },
}

impl Classified for PlainError {
    fn class(&self) -> Class {
        match self {
            Self::Unknown { .. } | Self::NoReader { .. } => Class::Input,
            Self::Verity { source, .. } => source.class(),
            Self::Uncovered { .. }
            | Self::Layer { source: LayerError::Read(ReadError::Verity { .. }), .. } => Class::Verification,
            Self::Io(_) | Self::CutOff { .. } | Self::Layer { .. } => Class::Failure,
        }
    }
}

/// Opens the image in a plain file for reading. Everything that is read from it is verified, unless
/// [`Check::UnsafeNoVerity`] says otherwise.
///
/// # Errors
/// [`PlainError`].
pub fn open(plain: &PlainFile) -> Result<Arc<dyn Layer>, PlainError> {
    let path = &plain.path;
    let unreadable = |source: LayerError| PlainError::Layer { path: path.clone(), source };
    let file = open_image(path)?;
    let source: Arc<dyn Source> = match &plain.check {
        Check::UnsafeNoVerity => {
            let part = Part { file, offset: plain.offset };
            Arc::new(PlainSource::unsafe_no_verity(part).map_err(|source| unreadable(source.into()))?)
        }
        Check::RootHash { root_hash, tree } => {
            let (data, joined) = joined(plain, file, tree)?;
            let verified = VerifiedSource::open_found(joined, data, *root_hash, DEFAULT_CACHE_BYTES);
            Arc::new(verified.map_err(|source| PlainError::Verity { path: path.clone(), source })?)
        }
    };
    // Read through the source: what decides here is verified.
    let mut head = Vec::new();
    let head_bytes = source.size_bytes().min(BLOCK) as usize;
    let head = source.read(0, head_bytes, &mut head).map_err(|source| unreadable(source.into()))?;
    let Some((format, image)) = LayerFormat::of_image(head) else { return Err(unknown(plain, head)) };
    let there = source.size_bytes();
    match plain.check {
        Check::RootHash { .. } if image > there => {
            return Err(PlainError::Uncovered { path: path.clone(), covered: there, image });
        }
        // An erofs image may end within its last block.
        Check::UnsafeNoVerity if image > there.next_multiple_of(BLOCK) => {
            return Err(PlainError::CutOff { path: path.clone(), found: there, image });
        }
        _ => {}
    }
    let open = format.image().and_then(|image| image.open);
    let open = open.ok_or_else(|| PlainError::NoReader { path: path.clone(), format: format.name() })?;
    open(source).map_err(unreadable)
}

fn unknown(plain: &PlainFile, head: &[u8]) -> PlainError {
    let found = match head.get(..head.len().min(8)).unwrap_or_default() {
        [] => "found the end of the file".to_string(),
        begin => format!("found `{}`", begin.escape_ascii()),
    };
    PlainError::Unknown { path: plain.path.clone(), offset: plain.offset, found }
}

/// Finds the hash tree of a plain file, and presents both as the one arrangement that is verified.
fn joined(plain: &PlainFile, data: File, place: &TreePlace) -> Result<(VerityData, Joined), PlainError> {
    let offset = plain.offset;
    let bad = |source: VerityError| PlainError::Verity { path: plain.path.clone(), source };
    let too_far = || bad(VerityError::DataSize { found: u64::MAX });
    let data_len = len(&data).map_err(|source| bad(source.into()))?;
    let tree_path: &Path = match place {
        TreePlace::File { path, .. } => path,
        TreePlace::Appended | TreePlace::At(_) => &plain.path,
    };
    let tree_file = open_image(tree_path)?;
    let bad_tree = |source: VerityError| PlainError::Verity { path: tree_path.to_path_buf(), source };
    // Where the superblock is, and from where the blocks of the tree's file are counted.
    let (superblock_at, base, appended) = match place {
        TreePlace::Appended => {
            let mut head = [0; BLOCK_BYTES];
            let head = &mut head[..data_len.saturating_sub(offset).min(BLOCK) as usize];
            read_exact(&data, offset, head).map_err(|source| bad(source.into()))?;
            if LayerFormat::of_image(head).is_none() {
                return Err(unknown(plain, head));
            }
            let bytes = data_bytes(head).map_err(bad)?;
            (offset.checked_add(bytes).ok_or_else(too_far)?, offset, Some(bytes))
        }
        TreePlace::At(at) => (*at, if *at >= offset { offset } else { 0 }, None),
        TreePlace::File { offset, .. } => (*offset, 0, None),
    };
    let tree_len = len(&tree_file).map_err(|source| bad_tree(source.into()))?;
    let superblock =
        read_superblock(&tree_file, superblock_at, tree_len).map_err(|source| match appended {
            // Nothing at all follows the image.
            Some(data_bytes) if tree_len <= superblock_at => bad(VerityError::Missing { data_bytes }),
            _ => bad_tree(source),
        })?;
    let covered = superblock.data_blocks.checked_mul(BLOCK).ok_or_else(too_far)?;
    let geometry = Geometry::new(covered).map_err(bad_tree)?;
    let wrong_count = |expected: String| {
        let found = superblock.data_blocks.to_string();
        bad_tree(VerityError::Superblock { field: "data_blocks", found, expected })
    };
    let data_end = offset.checked_add(covered).ok_or_else(too_far)?;
    match (place, appended) {
        (_, Some(bytes)) if bytes != covered => {
            return Err(wrong_count(format!("{}, the blocks of the image", bytes / BLOCK)));
        }
        (TreePlace::At(at), _) if *at >= offset && data_end > *at => {
            return Err(wrong_count(format!("at most {}, the blocks before it", (*at - offset) / BLOCK)));
        }
        _ if data_end > data_len => {
            let (found, expected) = (data_len, data_end);
            return Err(bad(VerityError::FileSize {
                what: "the data that the hash tree covers",
                found,
                expected,
            }));
        }
        _ => {}
    }
    // cryptsetup, lib/verity/verity.c: the tree begins in the first whole block behind the superblock.
    let tree_at = (superblock_at - base)
        .checked_add(SUPERBLOCK)
        .and_then(|end| end.checked_next_multiple_of(BLOCK))
        .and_then(|end| end.checked_add(base))
        .ok_or_else(too_far)?;
    let tree_end = tree_at.checked_add(geometry.tree_blocks() * BLOCK).ok_or_else(too_far)?;
    // A tree of no blocks ends before the end of its superblock's block.
    let tree_end = if geometry.tree_blocks() == 0 { superblock_at + SUPERBLOCK } else { tree_end };
    // Rule (docs/design.md, verity location): the file ends with the tree. A file that has something before the image
    // may have something behind the tree, and a device is as large as it is.
    let is_whole_file = offset == 0 && appended.is_some() && tree_file.metadata().is_ok_and(|m| m.is_file());
    if tree_len < tree_end || is_whole_file && tree_len > tree_end.next_multiple_of(BLOCK) {
        let what = "data, verity superblock and tree";
        return Err(bad_tree(VerityError::FileSize { what, found: tree_len, expected: tree_end }));
    }
    let joined = Joined { data, offset, tree_file, tree_at, geometry: geometry.clone() };
    Ok((VerityData { superblock, geometry }, joined))
}

/// Reads and checks the superblock at an offset of a file of `len` bytes.
fn read_superblock(file: &File, at: u64, len: u64) -> Result<Superblock, VerityError> {
    let there = len.saturating_sub(at).min(BLOCK);
    if there < SUPERBLOCK {
        let expected = at.saturating_add(SUPERBLOCK);
        return Err(VerityError::FileSize { what: "verity superblock", found: len, expected });
    }
    let mut block = [0; BLOCK_BYTES];
    read_exact(file, at, &mut block[..there as usize])?;
    Superblock::parse_any_salt(&block)
}

/// The rest of a file, from an offset on.
struct Part {
    file: File,
    offset: u64,
}

impl ReadAt for Part {
    fn len(&self) -> io::Result<u64> {
        Ok(ReadAt::len(&self.file)?.saturating_sub(self.offset))
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let at = self.offset.checked_add(offset).ok_or(io::ErrorKind::UnexpectedEof)?;
        ReadAt::read_exact_at(&self.file, buffer, at)
    }
}

/// Data, superblock and tree as one file, wherever they are. Nobody reads the superblock here.
struct Joined {
    data: File,
    /// Where the data begins in its file.
    offset: u64,
    tree_file: File,
    /// Where the tree begins in its file.
    tree_at: u64,
    geometry: Geometry,
}

impl ReadAt for Joined {
    fn len(&self) -> io::Result<u64> {
        Ok(self.geometry.file_bytes())
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let beyond = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let end = offset.checked_add(buffer.len() as u64).ok_or_else(beyond)?;
        let data_bytes = self.geometry.data_bytes();
        if end <= data_bytes {
            let at = self.offset.checked_add(offset).ok_or_else(beyond)?;
            return ReadAt::read_exact_at(&self.data, buffer, at);
        }
        let into_tree = offset.checked_sub(data_bytes + BLOCK).filter(|_| end <= self.geometry.file_bytes());
        let at = into_tree.and_then(|into| self.tree_at.checked_add(into)).ok_or_else(beyond)?;
        ReadAt::read_exact_at(&self.tree_file, buffer, at)
    }
}
