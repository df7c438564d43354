//! Layers into verified layers: a squashfs image with a verity tree.
//!
//! ```text
//! tar stream -> decompress -> TarReader ─┬─ content ──> Packer ──> data blocks ─┐
//!                                        └─ the rest ─> Tree ───> tables ───────┴─> image -> seal
//! ```
//!
//! One pass over the stream: squashfs keeps its tables behind the content, so the tree can stay in
//! memory, where later entries still change it, until the stream has ended. The writer is our own
//! (zstd by libzstd): `sqfstar` (squashfs-tools 4.5.1 of Debian 12, 4.6.1 of Debian 13) writes
//! entries as they come, and so cannot make a folder opaque by an entry behind it, keeps the first of two
//! entries of a name, drops a hard link to a later name and exits with 0, loses owner, mode and time of
//! the root folder, puts the current time in its place, takes owners by the names of the build
//! machine's users, refuses times before 1970, and has a race that reads freed memory on hard links
//! (fixed after 4.6.1); `tar2sqfs` refuses a second entry of a name. Both give other bytes with another
//! version of the tool.
//!
//! With `storage_type: puzzlefs` the layers are merged and packed instead: see [`puzzlefs`].
//!
//! Digest of the compressed blob and of the uncompressed stream (`diff_id`) are checked on the way;
//! what was written before a mismatch shows never leaves its temporary file.

pub mod image;
mod pack;
pub mod puzzlefs;
mod squashfs;
mod tar;
mod tree;

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::num::NonZeroUsize;

pub use tar::TarError;
pub use tree::Meta;

use crate::digest::{Digest, Hasher};
use crate::error::{Class, Classified};
use crate::image::LayerError;
use crate::image::format::Compression;
use crate::image::source::ReadError;
use crate::image::verified::VerifiedSource;
use crate::image::verity::{self, Located, Sealed, VerityError, locate};
use crate::progress::{Progress, Task};

/// zstd's level for content and tables: mksquashfs' default. Of a Debian root, level 9 takes a seventh of
/// the time for 6 % more space, level 3 a twenty-fifth for 14 %.
pub const DEFAULT_LEVEL: i32 = 15;

/// The most memory for what is not content, roughly, in bytes.
const MAX_METADATA_BYTES: u64 = 512 << 20;

/// How hard to work. Only the level changes what comes out.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// How many threads work at a time.
    pub threads: NonZeroUsize,
    /// zstd's level, 1 to 22.
    pub level: i32,
}

/// What is known of a tar layer before it is read.
#[derive(Debug, Clone, Copy)]
pub struct TarLayer {
    /// SHA-256 of the blob.
    pub digest: Digest,
    /// Size of the blob, in bytes.
    pub size: u64,
    /// How the blob is compressed.
    pub compression: Compression,
    /// SHA-256 of the uncompressed stream, where the image's config names it.
    pub diff_id: Option<Digest>,
}

/// A converted layer.
#[derive(Debug)]
pub struct Converted {
    /// Digest, size and root hash of the new blob.
    pub sealed: Sealed,
    /// What was changed or dropped, for people.
    pub notes: Vec<String>,
}

/// What the layers below say of a folder: called with its path (`/usr/lib`; the root is empty).
pub type Below<'a> = dyn FnMut(&[u8]) -> Result<Option<Meta>, ConvertError> + 'a;

/// Converts a tar layer into a squashfs image with a verity tree, in `to`, an empty file.
///
/// Nothing is synced.
///
/// # Errors
/// See [`ConvertError`]; what `to` then holds is of no use.
pub fn convert_tar(
    from: impl Read,
    layer: &TarLayer,
    to: &File,
    effort: Effort,
    below: &mut Below<'_>,
    progress: &Progress,
) -> Result<Converted, ConvertError> {
    let (image_bytes, notes) = write_squashfs(from, layer, to, effort, below, progress)?;
    let sealed = verity::seal(to, image_bytes, effort.threads, progress)?;
    Ok(Converted { sealed, notes })
}

/// Converts a tar layer into a squashfs image without a verity tree. Returns its size in bytes, and notes.
fn write_squashfs(
    from: impl Read,
    layer: &TarLayer,
    to: &File,
    effort: Effort,
    below: &mut Below<'_>,
    progress: &Progress,
) -> Result<(u64, Vec<String>), ConvertError> {
    let task = progress.task("convert", &layer.digest.to_string(), Some(layer.size));
    let mut blob = Hashing { from, hasher: Hasher::new(), limit: layer.size, task: Some(&task) };
    let mut packer = pack::Packer::new(to.try_clone()?, squashfs::SUPERBLOCK_BYTES, effort)?;
    let mut tree = tree::Tree::default();

    let buffered = |blob| BufReader::with_capacity(128 << 10, blob);
    let read = match layer.compression {
        Compression::None => read_stream(&mut blob, &mut packer, &mut tree, layer),
        Compression::Gzip => read_stream(
            flate2::bufread::MultiGzDecoder::new(buffered(&mut blob)),
            &mut packer,
            &mut tree,
            layer,
        ),
        // Windows above 128 MiB are refused by the library's default.
        Compression::Zstd => read_stream(
            zstd::stream::read::Decoder::with_buffer(buffered(&mut blob))?,
            &mut packer,
            &mut tree,
            layer,
        ),
    };
    // A blob that is not the one asked for explains whatever else went wrong, so it is told first.
    check_blob(blob, layer)?;
    read?;

    tree.finish(below)?;
    let packed = packer.finish()?;
    let image_bytes = squashfs::write_tables(&tree, &packed, to, effort.level)?;
    let mut notes = tree.notes;
    if tree.notes_total > notes.len() {
        notes.push(format!("and {} more of the kind", tree.notes_total - notes.len()));
    }
    Ok((image_bytes, notes))
}

/// Reads a tar stream to its very end, and checks the stream's digest.
fn read_stream(
    stream: impl Read,
    packer: &mut pack::Packer,
    tree: &mut tree::Tree,
    layer: &TarLayer,
) -> Result<(), ConvertError> {
    let mut stream = Hashing { from: stream, hasher: Hasher::new(), limit: u64::MAX, task: None };
    let mut tar = tar::TarReader::new(&mut stream);
    while let Some(entry) = tar.next_entry()? {
        let data = match entry.kind {
            tar::EntryKind::File => {
                let mut file = packer.file(entry.size)?;
                tar.content(|content| file.write(content))?;
                Some(file.finish()?)
            }
            _ => None,
        };
        tree.add(entry, data)?;
    }
    let offset = tar.offset();
    // Writers pad the end; it belongs to the digests.
    let read = |source| TarError::Read { what: "padding", offset, source };
    io::copy(&mut stream, &mut io::sink()).map_err(read)?;
    let found = stream.hasher.finish();
    match layer.diff_id {
        Some(expected) if expected != found => {
            Err(ConvertError::DiffId { layer: layer.digest, expected, found })
        }
        _ => Ok(()),
    }
}

/// Checks digest and size of a blob that was read to its end.
fn check_blob<R: Read>(mut blob: Hashing<'_, R>, layer: &TarLayer) -> Result<(), ConvertError> {
    // What is left: nothing, or one byte too many.
    io::copy(&mut blob, &mut io::sink())?;
    let size = blob.hasher.bytes();
    let found = blob.hasher.finish();
    if size != layer.size {
        return Err(ConvertError::Size { layer: layer.digest, expected: layer.size, found: size });
    }
    if found != layer.digest {
        return Err(ConvertError::Digest { layer: layer.digest, found });
    }
    Ok(())
}

/// A stream that is hashed as it is read, to at most one byte beyond `limit`.
struct Hashing<'a, R> {
    from: R,
    hasher: Hasher,
    limit: u64,
    task: Option<&'a Task>,
}

impl<R: Read> Read for Hashing<'_, R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.limit.saturating_add(1).saturating_sub(self.hasher.bytes());
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        let got = self.from.read(&mut bytes[..most])?;
        self.hasher.update(&bytes[..got]);
        if let Some(task) = self.task {
            task.advance(got as u64);
        }
        Ok(got)
    }
}

/// What a layer that is a file system image already needs.
#[derive(Debug)]
pub enum Ready {
    /// Its tree is there and right: it stays as it is.
    Untouched,
    /// It has no tree: its image ends there, in bytes, and one is to be appended.
    NeedsTree(u64),
}

/// Looks whether an image of a file system has a verity tree, and checks all of it if so.
///
/// # Errors
/// docs/design.md, both or neither: a layer has a root hash and a hash tree, or neither:
/// [`ConvertError::TreeWithoutRootHash`], [`ConvertError::Verity`] where a tree is missing, and
/// [`ConvertError::Corrupt`] where a block is not what the root hash names.
pub fn examine(
    image: &File,
    layer: &Digest,
    root_hash: Option<Digest>,
    threads: NonZeroUsize,
    progress: &Progress,
) -> Result<Ready, ConvertError> {
    let verity = |source| ConvertError::Verity { layer: *layer, source };
    match root_hash {
        Some(root_hash) => {
            let source = VerifiedSource::open(image.try_clone()?, root_hash).map_err(verity)?;
            match source.verify_all(threads, progress).bad.into_iter().next() {
                Some(source) => Err(ConvertError::Corrupt { layer: *layer, source }),
                None => Ok(Ready::Untouched),
            }
        }
        None => match locate(image).map_err(verity)? {
            Located::Present(_) => Err(ConvertError::TreeWithoutRootHash { layer: *layer }),
            Located::Absent { image_bytes, .. } => Ok(Ready::NeedsTree(image_bytes)),
        },
    }
}

/// Why a layer cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The stream is not a tar that can be read.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry has no place in a layer.
    #[error("tar: `{path}`: {why}")]
    Entry {
        /// The entry.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A hard link to a file that the layer does not have.
    #[error("tar: `{path}` is a hard link to `{target}`, which is not in this layer")]
    HardLink {
        /// The entry's name.
        path: String,
        /// What it links to.
        target: String,
    },
    /// The layer needs more memory than it may.
    #[error(
        "tar: the layer has too many names, attributes or blocks ({entries} entries, {bytes} bytes of them)"
    )]
    TooMuch {
        /// Entries so far.
        entries: usize,
        /// Bytes so far.
        bytes: u64,
    },
    /// squashfs numbers owners and groups with 16 bits.
    #[error("the layer has more than 65,535 different owners and groups, which squashfs cannot number")]
    TooManyIds,
    /// A table is larger than squashfs can address.
    #[error("the {what} is larger than squashfs can address")]
    TableTooBig {
        /// Which table.
        what: &'static str,
    },
    /// The blob is not the one that was asked for.
    #[error("layer {layer}: the blob has digest {found}")]
    Digest {
        /// The layer: the digest expected.
        layer: Digest,
        /// The digest found.
        found: Digest,
    },
    /// The blob is longer or shorter than its descriptor says.
    #[error("layer {layer}: the blob has {found} bytes, expected {expected}")]
    Size {
        /// The layer.
        layer: Digest,
        /// The size expected, in bytes.
        expected: u64,
        /// The size found, in bytes.
        found: u64,
    },
    /// The uncompressed stream is not the one that the image's config names.
    #[error("layer {layer}: the uncompressed stream has digest {found}, the image's config says {expected}")]
    DiffId {
        /// The layer.
        layer: Digest,
        /// What the config says.
        expected: Digest,
        /// The digest found.
        found: Digest,
    },
    /// There is a verity tree, but nothing to check it against.
    #[error("layer {layer}: it has a verity tree but no root hash; either both or none")]
    TreeWithoutRootHash {
        /// The layer.
        layer: Digest,
    },
    /// The verity data is missing or malformed.
    #[error("layer {layer}: {source}")]
    Verity {
        /// The layer.
        layer: Digest,
        /// What is wrong.
        source: VerityError,
    },
    /// A block is not what the root hash promises.
    #[error("layer {layer}: {source}")]
    Corrupt {
        /// The layer.
        layer: Digest,
        /// The first such block.
        source: ReadError,
    },
    /// A layer below, which is asked for the attributes of a folder, cannot be read.
    #[error("layer {layer}: {source}")]
    Below {
        /// The layer below.
        layer: Digest,
        /// What is wrong with it.
        source: LayerError,
    },
    /// The tree of a new image cannot be made.
    #[error("cannot append the verity tree: {0}")]
    Seal(#[from] VerityError),
    /// The new image cannot be written.
    #[error("cannot write the image: {0}")]
    Write(io::Error),
    /// Another answer of the operating system.
    #[error("cannot convert the layer: {0}")]
    Io(#[from] io::Error),
}

impl Classified for ConvertError {
    fn class(&self) -> Class {
        match self {
            Self::Digest { .. }
            | Self::Size { .. }
            | Self::DiffId { .. }
            | Self::TreeWithoutRootHash { .. }
            | Self::Corrupt { .. } => Class::Verification,
            Self::Verity { source, .. } => source.class(),
            _ => Class::Failure,
        }
    }
}
