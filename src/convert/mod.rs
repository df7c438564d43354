//! Layers into verified layers: a squashfs image with a verity tree.
//!
//! ```text
//! tar stream -> decompress -> TarReader ─┬─ content ──> Packer ──> data blocks ─┐
//!                                        └─ the rest ─> Tree ───> tables ───────┴─> image -> seal
//! ```
//!
//! One pass over the stream: squashfs keeps its tables behind the content, so the tree can stay in
//! memory, where later entries still change it, until the stream has ended. The writer is our own
//! (see [`packing`] for its codecs): `sqfstar` (squashfs-tools 4.5.1 of Debian 12, 4.6.1 of Debian 13) writes
//! entries as they come, and so cannot make a folder opaque by an entry behind it, keeps the first of two
//! entries of a name, drops a hard link to a later name and exits with 0, loses owner, mode and time of
//! the root folder, puts the current time in its place, takes owners by the names of the build
//! machine's users, refuses times before 1970, and has a race that reads freed memory on hard links
//! (fixed after 4.6.1); `tar2sqfs` refuses a second entry of a name. Both give other bytes with another
//! version of the tool.
//!
//! As erofs images they are packed by a program: see [`erofs`]. With `storage_type: puzzlefs` the layers are merged and packed instead: see [`puzzlefs`].
//!
//! Digest of the compressed blob and of the uncompressed stream (`diff_id`) are checked on the way;
//! what was written before a mismatch shows never leaves its temporary file.

pub mod erofs;
pub mod image;
mod inspect;
pub mod job;
mod lower;
mod pack;
pub mod packing;
pub mod puzzlefs;
pub mod reuse;
mod sniff;
mod squashfs;
mod tar;
mod tree;

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::num::NonZeroUsize;

pub use lower::{View, open_verified};
pub use packing::{Codec, ImageKind, Packing, PackingError};
pub use tar::{Problem, TarError};
pub use tree::{LowerEntry, Meta};

use crate::digest::{Digest, Hasher};
use crate::error::{Class, Classified};
use crate::image::LayerError;
use crate::image::format::Compression;
use crate::image::source::ReadError;
use crate::image::verified::VerifiedSource;
use crate::image::verity::{self, Located, Sealed, VerityError, locate};
use crate::progress::{Progress, Task};

/// The most memory for what is not content, roughly, in bytes.
const MAX_METADATA_BYTES: u64 = 512 << 20;

/// How a layer is made. Only the packing changes what comes out.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// How many threads work at a time.
    pub threads: NonZeroUsize,
    /// Codec, level and block size of a new image.
    pub packing: Packing,
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

/// What the layers below have at a path (`/usr/lib`; the root is empty).
pub type LowerLookup<'a> = dyn FnMut(&[u8]) -> Result<LowerEntry, ConvertError> + 'a;

/// Converts a tar layer into a squashfs image with a verity tree, in `to`, an empty file.
///
/// Nothing is synced.
///
/// # Errors
/// See [`ConvertError`]; what `to` then holds is of no use.
pub fn convert_tar(
    mut from: impl Read,
    layer: &TarLayer,
    to: &File,
    effort: Effort,
    below: &mut LowerLookup<'_>,
    progress: &Progress,
) -> Result<Converted, ConvertError> {
    let (image_bytes, notes) = write_squashfs(&mut from, layer, to, effort, below, progress)?;
    let sealed = verity::seal(to, image_bytes, effort.threads, progress)?;
    Ok(Converted { sealed, notes })
}

/// Converts a tar layer into a squashfs image without a verity tree. Returns its size in bytes, and notes.
fn write_squashfs(
    from: &mut dyn Read,
    layer: &TarLayer,
    to: &File,
    effort: Effort,
    below: &mut LowerLookup<'_>,
    progress: &Progress,
) -> Result<(u64, Vec<String>), ConvertError> {
    let task = progress.task("convert", &layer.digest.to_string(), Some(layer.size));
    let mut blob = Hashing { from, hasher: Hasher::new(), limit: layer.size, task: Some(&task) };
    let content = squashfs::write_options(to, effort.packing).map_err(ConvertError::Write)?;
    let mut packer = pack::Packer::new(to.try_clone()?, content, effort)?;
    let mut tree = tree::Tree::default();

    let mut head = Vec::new();
    (&mut blob).take(sniff::HEAD_BYTES as u64).read_to_end(&mut head)?;
    let read = match sniff::other_than(layer.compression, &head, tar::begins(&head)) {
        Some(found) => Err(ConvertError::Compression { expected: sniff::name(layer.compression), found }),
        None => decompress(&mut head.as_slice().chain(&mut blob), &mut packer, &mut tree, layer),
    };
    // A blob with a wrong digest explains whatever else went wrong, so it is reported first.
    check_blob(blob, layer)?;
    read?;

    tree.finish(below)?;
    let packed = packer.finish()?;
    let image_bytes = squashfs::write_tables(&tree, &packed, to, effort.packing)?;
    let mut notes = tree.notes;
    if tree.notes_total > notes.len() {
        notes.push(format!("and {} more of the kind", tree.notes_total - notes.len()));
    }
    Ok((image_bytes, notes))
}

/// Reads a blob through its decompressor. The readers of tar are large, and one of them serves every decompressor.
fn decompress(
    blob: &mut dyn Read,
    packer: &mut pack::Packer,
    tree: &mut tree::Tree,
    layer: &TarLayer,
) -> Result<(), ConvertError> {
    let mut buffered = BufReader::with_capacity(128 << 10, blob);
    match layer.compression {
        Compression::None => read_stream(&mut buffered, packer, tree, layer),
        Compression::Gzip => {
            read_stream(&mut flate2::bufread::MultiGzDecoder::new(buffered), packer, tree, layer)
        }
        // Windows above 128 MiB are refused by the library's default.
        Compression::Zstd => {
            read_stream(&mut zstd::stream::read::Decoder::with_buffer(buffered)?, packer, tree, layer)
        }
    }
}

/// Reads a tar stream to its very end, and checks the stream's digest.
fn read_stream(
    stream: &mut dyn Read,
    packer: &mut pack::Packer,
    tree: &mut tree::Tree,
    layer: &TarLayer,
) -> Result<(), ConvertError> {
    let mut stream = Hashing { from: stream, hasher: Hasher::new(), limit: u64::MAX, task: None };
    let mut tar = tar::TarReader::new(&mut stream);
    while let Some(entry) = tar.next_entry()? {
        let data = match entry.kind {
            tar::EntryKind::File => {
                let done = packer.file(entry.size).and_then(|mut file| {
                    tar.content(|content| file.write(content))?;
                    file.finish()
                });
                // The packer knows no names.
                Some(done.map_err(|error| match error {
                    ConvertError::TooMuch { entries, bytes, .. } => {
                        ConvertError::TooMuch { path: tar::show(&entry.path), entries, bytes }
                    }
                    other => other,
                })?)
            }
            _ => None,
        };
        tree.add(entry, data)?;
    }
    tree.take_notes(tar.take_notes());
    // Writers pad the end; it belongs to the digests.
    let offset = tar.offset();
    let mut place = tar.fail(Problem::Read { what: "the padding", offset, source: io::Error::other("") });
    io::copy(&mut stream, &mut io::sink()).map_err(|source| {
        place.problem = Problem::Read { what: "the padding", offset, source };
        place
    })?;
    let found = stream.hasher.finish();
    match layer.diff_id {
        Some(expected) if expected != found => Err(ConvertError::DiffId { expected, found }),
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
        return Err(ConvertError::Size { expected: layer.size, found: size });
    }
    if found != layer.digest {
        return Err(ConvertError::Digest { expected: layer.digest, found });
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
    root_hash: Option<Digest>,
    threads: NonZeroUsize,
    progress: &Progress,
) -> Result<Ready, ConvertError> {
    let verity = |source| ConvertError::Verity { source };
    match root_hash {
        Some(root_hash) => {
            let source = VerifiedSource::open(image.try_clone()?, root_hash).map_err(verity)?;
            match source.verify_all(threads, progress).bad.into_iter().next() {
                Some(source) => Err(ConvertError::Corrupt { source }),
                None => Ok(Ready::Untouched),
            }
        }
        None => match locate(image).map_err(verity)? {
            Located::Present(_) => Err(ConvertError::TreeWithoutRootHash),
            Located::Absent { image_bytes, .. } => Ok(Ready::NeedsTree(image_bytes)),
        },
    }
}

/// Why a layer cannot be converted. It does not say which: the caller knows the layer's place in the image.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The stream is not a tar that can be read.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// The blob is compressed in another way than its media type says, or not at all.
    #[error("the content is {found}, its media type says {expected}")]
    Compression {
        /// What the media type says.
        expected: &'static str,
        /// What the first bytes say.
        found: &'static str,
    },
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
        "tar: `{path}`: the layer has too many names, attributes or blocks ({entries} entries, {bytes} bytes of them)"
    )]
    TooMuch {
        /// The entry that was too much.
        path: String,
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
    #[error("the blob has digest {found}, expected {expected}")]
    Digest {
        /// The digest expected.
        expected: Digest,
        /// The digest found.
        found: Digest,
    },
    /// The blob is longer or shorter than its descriptor says.
    #[error("the blob has {found} bytes, expected {expected}")]
    Size {
        /// The size expected, in bytes.
        expected: u64,
        /// The size found, in bytes.
        found: u64,
    },
    /// The uncompressed stream is not the one that the image's config names.
    #[error("the uncompressed stream has digest {found}, the image's config says {expected}")]
    DiffId {
        /// What the config says.
        expected: Digest,
        /// The digest found.
        found: Digest,
    },
    /// There is a verity tree, but nothing to check it against.
    #[error("it has a verity tree but no root hash; either both or none")]
    TreeWithoutRootHash,
    /// The verity data is missing or malformed.
    #[error("{source}")]
    Verity {
        /// What is wrong.
        source: VerityError,
    },
    /// A block is not what the root hash promises.
    #[error("{source}")]
    Corrupt {
        /// The first such block.
        source: ReadError,
    },
    /// The image of a file system is what its digest says, but makes no sense.
    #[error("the file system image cannot be read: `{path}`: {source}{}", more(*others))]
    Unreadable {
        /// The first file that is hit.
        path: String,
        /// What is wrong with it.
        source: LayerError,
        /// How many more faults there are.
        others: u64,
    },
    /// The kernel's driver cannot read the image, so that one backend could not mount it.
    #[error("the kernel cannot mount the file system image: {why}")]
    NotForKernel {
        /// What it cannot do.
        why: String,
    },
    /// A file whose content overlayfs would look for elsewhere in the stack.
    #[error(
        "`{path}` has the attribute {name}: mounts do not follow it, so the file would not be the intended one"
    )]
    Steers {
        /// The file.
        path: String,
        /// The attribute.
        name: String,
    },
    /// A layer below, which is asked what it has at a path, cannot be read.
    #[error("the layer {layer} below it: {source}")]
    Below {
        /// The layer below.
        layer: Digest,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The image of a layer cannot be packed as erofs.
    #[error(transparent)]
    Erofs(#[from] erofs::ErofsError),
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

fn more(others: u64) -> String {
    match others {
        0 => String::new(),
        1 => " (and one more fault)".into(),
        others => format!(" (and {others} more faults)"),
    }
}

impl Classified for ConvertError {
    fn class(&self) -> Class {
        match self {
            Self::Digest { .. }
            | Self::Size { .. }
            | Self::DiffId { .. }
            | Self::TreeWithoutRootHash
            | Self::Corrupt { .. } => Class::Verification,
            Self::Verity { source } => source.class(),
            // The publisher's input is what it says it is, and no good.
            Self::Tar(_)
            | Self::Compression { .. }
            | Self::Entry { .. }
            | Self::HardLink { .. }
            | Self::TooMuch { .. }
            | Self::TooManyIds
            | Self::TableTooBig { .. }
            | Self::Unreadable { .. }
            | Self::NotForKernel { .. }
            | Self::Steers { .. } => Class::Input,
            Self::Erofs(error) => error.class(),
            Self::Below { .. } | Self::Seal(_) | Self::Write(_) | Self::Io(_) => Class::Failure,
        }
    }
}
