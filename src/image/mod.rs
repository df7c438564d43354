//! Images: file formats of layers, how their bytes are verified, and how layers are merged.
//!
//! ```text
//! oci.rs        the documents: which layers an image has; index.rs: which images there are
//! format.rs     THE table of formats: media types, magic, reader, what the kernel calls it
//! bytes.rs      ReadAt: unchecked bytes of a file, a device, a blob elsewhere
//! blobs.rs      Blobs: whole blobs by digest, and where the bytes of a layer are; ahead.rs: read before they are asked for
//! verity/       the hash tree: locate, build; verified.rs reads through it
//! source.rs     Source: bytes that are checked, or that nobody asked to check
//! layer.rs      Layer: the files of a layer, whatever its format
//! squashfs/     a reader; each format has a folder of its own: erofs/, puzzlefs/
//! cache.rs      pieces of metadata that readers keep
//! fields.rs     little-endian fields of their structures
//! plain.rs      an image in a plain file, with its hash tree wherever it is
//! overlay/      the merged view of layers
//! files.rs      files of the merged view by their paths
//! boot.rs       what the image of the target `boot` has in it
//! ```
//!
//! A format is one folder here and one row in [`mod@format`]. Parsers take bytes from a [`Source`] and never do I/O of
//! their own, so that the same reader serves a verified file, a device, memory and a fuzzer.

pub mod ahead;
pub mod blobs;
pub mod boot;
pub mod bytes;
mod cache;
pub mod check;
pub mod chunked;
pub mod erofs;
pub(crate) mod fields;
pub mod files;
pub mod format;
pub mod index;
pub mod layer;
pub mod oci;
pub mod overlay;
pub mod plain;
pub mod platform;
pub mod puzzlefs;
pub mod source;
pub mod squashfs;
pub mod verified;
pub mod verity;

pub use layer::{Attr, DirEntry, FileType, Layer, LayerError, NodeId};
pub use source::{MemorySource, ReadError, Source};
