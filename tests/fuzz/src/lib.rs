//! The entry functions of the fuzz targets, one row for each in [`TARGETS`].
//!
//! `tests/fuzz_corpus.rs` includes this file and runs each function over its corpus, on any toolchain.

pub mod build;
pub mod erofs;
pub mod manifest;
pub mod medium;
pub mod puzzlefs;
pub mod registry;
pub mod squashfs;
pub mod trust;
pub mod verity;

/// A target's name, which is that of its binary and of its folder in `corpus`, and its entry function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("squashfs_superblock", squashfs::superblock),
    ("squashfs_inodes", squashfs::inodes),
    ("squashfs_directory", squashfs::directory),
    ("squashfs_tables", squashfs::tables),
    ("squashfs_xattrs", squashfs::xattrs),
    ("squashfs_data", squashfs::data),
    ("squashfs_image", squashfs::image),
    ("erofs_image", erofs::image),
    ("erofs_cluster", erofs::cluster),
    ("manifest_import", manifest::import),
    ("manifest_system", manifest::system),
    ("medium_image", medium::image),
    ("puzzlefs_metadata", puzzlefs::metadata),
    ("puzzlefs_chunk", puzzlefs::chunk),
    ("registry_headers", registry::headers),
    ("registry_documents", registry::documents),
    ("registry_source", registry::source),
    ("trust_certificate", trust::certificate),
    ("verity_superblock", verity::superblock),
    ("verity_tree", verity::tree),
];
