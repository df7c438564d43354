//! The images in `tests/puzzlefs/images`: OCI layouts that the puzzlefs tool made (its README there says how),
//! and the trees that a reader must show of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mosfs::internals::image::blobs::BlobFolder;
use mosfs::internals::image::format::ChunkedLayer;
use mosfs::internals::image::index::{Index, MAX_INDEX_BYTES};
use mosfs::internals::image::oci::OciImage;
use mosfs::internals::image::puzzlefs::Puzzlefs;
use mosfs::internals::sys::file::Links;

/// The images: layout, name in it, and the expected tree.
pub const IMAGES: [(&str, &str, &str); 7] = [
    ("odd-raw", "odd", "odd"),
    ("odd-zstd", "odd", "odd"),
    ("socket-raw", "socket", "socket-raw.socket"),
    ("del-raw", "d1", "del-raw.d1"),
    ("del-raw", "d2", "del-raw.d2"),
    ("hard-raw", "h1", "hard-raw.h1"),
    ("hard-raw", "h2", "hard-raw.h2"),
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/puzzlefs/images")
}

/// Unpacks the layout of that name into `to`.
pub fn unpack(layout: &str, to: &Path) {
    let packed = fs::File::open(folder().join(format!("{layout}.tar.zst"))).unwrap();
    tar::Archive::new(zstd::Decoder::new(packed).unwrap()).unpack(to).unwrap();
}

/// The tree that a reader must show.
pub fn expected(name: &str) -> String {
    fs::read_to_string(folder().join(format!("{name}.expected.txt"))).unwrap()
}

/// An image of a layout.
pub fn image(layout: &Path, name: &str) -> OciImage {
    let index = Index::parse(&fs::read(layout.join("index.json")).unwrap(), MAX_INDEX_BYTES).unwrap();
    let entry = index.manifests.iter().find(|entry| entry.ref_name() == Some(name)).unwrap();
    OciImage::parse(&fs::read(layout.join("blobs/sha256").join(entry.digest.hex())).unwrap()).unwrap()
}

/// The one layer of an image.
pub fn layer(layout: &Path, image: &OciImage) -> ChunkedLayer {
    let [rootfs] = &image.layers[..] else { panic!("one layer") };
    ChunkedLayer {
        digest: rootfs.digest,
        size: rootfs.size,
        chunks: Arc::clone(&image.chunks),
        blobs: Arc::new(BlobFolder::of_layout(layout, Links::Refused)),
    }
}

/// Opens an image of a layout.
pub fn open(layout: &Path, name: &str) -> Puzzlefs {
    Puzzlefs::open(&layer(layout, &image(layout, name))).unwrap()
}
