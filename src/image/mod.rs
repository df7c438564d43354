//! Images: file formats of layers, how their bytes are verified, and how layers are merged.
//!
//! A format is one file or folder here and one row in its table. Parsers take bytes from a
//! [`Source`] and never do I/O of their own, so that the same reader serves a verified file, a
//! device, memory and a fuzzer.

pub mod blobs;
pub mod bytes;
pub mod layer;
pub mod oci;
pub mod overlay;
pub mod puzzlefs;
pub mod source;
pub mod squashfs;
pub mod verified;
pub mod verity;

pub use blobs::Blobs;
pub use layer::{Attr, DirEntry, FileType, Layer, LayerError, NodeId, StatFs, Xattrs};
pub use source::{MemorySource, ReadError, Source};
