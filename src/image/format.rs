//! The table of layer formats. No code outside this module knows a media type.
//!
//! | kind of layer | how it is verified | what mounts it |
//! | --- | --- | --- |
//! | [`Content::Tar`] | as a whole, when it is converted | nothing |
//! | [`Content::Image`]: one file that holds a file system | block by block, under a root hash | the kernel; FUSE where there is a reader |
//! | [`Content::Chunked`]: one blob of metadata that names others | each blob by its digest | FUSE where there is a reader |
//!
//! A new format takes one folder beside this file, which implements [`Layer`], and one row in [`TABLE`]. A
//! media type is parsed once, together with the manifest ([`super::oci::OciImage::parse`]).

use std::fmt;
use std::sync::Arc;

pub use super::chunked::{ChunkedLayer, Chunks, TwoSizes};
use super::erofs::{self, Erofs};
use super::layer::{Layer, LayerError};
use super::puzzlefs::{self, Puzzlefs};
use super::source::Source;
use super::squashfs::Squashfs;

/// The format of a layer: a row of the table.
#[derive(Clone, Copy)]
pub struct LayerFormat(&'static Row);

struct Row {
    /// The format's name in messages.
    name: &'static str,
    media_types: &'static [MediaType],
    content: Content,
}

/// How a media type identifies a format.
#[derive(Debug, Clone, Copy)]
enum MediaType {
    /// Exactly this text.
    Exact(&'static str),
    /// This text, optionally followed by `+` and more (`+zstd`, `+gzip+verity` …).
    Prefix(&'static str),
}

impl MediaType {
    fn text(self) -> &'static str {
        let (Self::Exact(text) | Self::Prefix(text)) = self;
        text
    }

    fn matches(self, text: &str) -> bool {
        match self {
            Self::Exact(name) => text == name,
            Self::Prefix(name) => {
                text.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('+'))
            }
        }
    }
}

/// What the bytes of a layer contain.
#[derive(Debug, Clone, Copy)]
pub enum Content {
    /// A stream, to be converted.
    Tar(Compression),
    /// One file that holds a file system.
    Image(ImageFormat),
    /// One blob of metadata that names others, the chunks, by their digests.
    Chunked(ChunkedFormat),
}

/// How a tar layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, one or many members.
    Gzip,
    /// zstd, one or many frames.
    Zstd,
}

/// A file system in one file.
#[derive(Debug, Clone, Copy)]
pub struct ImageFormat {
    /// The kernel's name of the file system.
    pub kernel: &'static str,
    /// Returns the size in bytes of the image that begins with these bytes; `None` if they are not such an
    /// image.
    data_bytes: fn(&[u8]) -> Option<u64>,
    /// Opens the image for reading in user space; `None` if there is no reader.
    pub open: Option<fn(Arc<dyn Source>) -> Result<Arc<dyn Layer>, LayerError>>,
}

/// A file system in many blobs.
#[derive(Debug, Clone, Copy)]
pub struct ChunkedFormat {
    /// The media types of the manifest's other entries.
    chunks: &'static [MediaType],
    /// Opens the layer for reading in user space; `None` if there is no reader.
    pub open: Option<fn(&ChunkedLayer) -> Result<Arc<dyn Layer>, LayerError>>,
}

/// All formats.
const TABLE: &[Row] = &[
    Row {
        name: "squashfs",
        media_types: &[MediaType::Prefix("application/vnd.stacker.image.layer.squashfs")],
        content: Content::Image(ImageFormat {
            kernel: "squashfs",
            data_bytes: squashfs_bytes,
            open: Some(|source| Ok(Arc::new(Squashfs::open(source)?))),
        }),
    },
    Row {
        name: "erofs",
        media_types: &[MediaType::Prefix("application/vnd.stacker.image.layer.erofs")],
        content: Content::Image(ImageFormat {
            kernel: "erofs",
            data_bytes: erofs::image_bytes,
            open: Some(|source| Ok(Arc::new(Erofs::open(source)?))),
        }),
    },
    Row {
        name: "puzzlefs",
        media_types: &[MediaType::Exact(puzzlefs::ROOTFS)],
        content: Content::Chunked(ChunkedFormat {
            chunks: &[MediaType::Prefix(puzzlefs::FILEDATA), MediaType::Exact(puzzlefs::FILEDATA_ZSTD)],
            open: Some(|layer| Ok(Arc::new(Puzzlefs::open(layer)?))),
        }),
    },
    Row {
        name: "tar",
        media_types: &[
            MediaType::Exact("application/vnd.oci.image.layer.v1.tar"),
            MediaType::Exact("application/vnd.oci.image.layer.nondistributable.v1.tar"),
            MediaType::Exact("application/vnd.docker.image.rootfs.diff.tar"),
            MediaType::Exact("application/vnd.docker.image.rootfs.foreign.diff.tar"),
        ],
        content: Content::Tar(Compression::None),
    },
    Row {
        name: "tar with gzip",
        media_types: &[
            MediaType::Exact("application/vnd.oci.image.layer.v1.tar+gzip"),
            MediaType::Exact("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
            MediaType::Exact("application/vnd.docker.image.rootfs.diff.tar.gzip"),
            MediaType::Exact("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
        ],
        content: Content::Tar(Compression::Gzip),
    },
    Row {
        name: "tar with zstd",
        media_types: &[
            MediaType::Exact("application/vnd.oci.image.layer.v1.tar+zstd"),
            MediaType::Exact("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"),
            MediaType::Exact("application/vnd.docker.image.rootfs.diff.tar.zstd"),
        ],
        content: Content::Tar(Compression::Zstd),
    },
];

impl LayerFormat {
    /// Returns the format that a media type identifies, or `None` if mosfs does not know it.
    pub fn of(media_type: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.media_types.iter().any(|one| one.matches(media_type))).map(Self)
    }

    /// Returns the format of the file system image that begins with `head`, and the image's size in bytes, both by
    /// its magic; `None` for an unknown one.
    ///
    /// 4096 bytes are enough. If they are not verified, neither is the result.
    pub fn of_image(head: &[u8]) -> Option<(Self, u64)> {
        TABLE.iter().find_map(|row| match row.content {
            Content::Image(format) => (format.data_bytes)(head).map(|bytes| (Self(row), bytes)),
            _ => None,
        })
    }

    /// Returns whether a media type is that of a format's chunks, which belong to a layer but are not layers
    /// themselves.
    pub fn is_chunk(media_type: &str) -> bool {
        TABLE.iter().any(|row| match row.content {
            Content::Chunked(format) => format.chunks.iter().any(|one| one.matches(media_type)),
            _ => false,
        })
    }

    /// Returns the constant that is equal to a media type of chunks, where the table has one.
    pub(super) fn constant(chunk_type: &str) -> Option<&'static str> {
        let chunks = TABLE.iter().filter_map(|row| match row.content {
            Content::Chunked(format) => Some(format.chunks),
            _ => None,
        });
        chunks.flatten().map(|one| one.text()).find(|text| *text == chunk_type)
    }

    /// The format's name, for messages.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// What the bytes of a layer of this format contain.
    pub fn content(self) -> Content {
        self.0.content
    }

    /// How to read the file system, if this is a format of a file system in one file.
    pub fn image(self) -> Option<ImageFormat> {
        match self.0.content {
            Content::Image(format) => Some(format),
            _ => None,
        }
    }

    /// Whether a layer of this format consists of many blobs.
    pub fn is_chunked(self) -> bool {
        matches!(self.0.content, Content::Chunked(_))
    }
}

/// The same row.
impl PartialEq for LayerFormat {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl Eq for LayerFormat {}

impl fmt::Debug for LayerFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name)
    }
}

/// Returns the size in bytes of the file system image that begins with `head`, by its magic; `None` for an
/// unknown one.
///
/// 4096 bytes are enough. They are not verified.
pub fn image_bytes(head: &[u8]) -> Option<u64> {
    LayerFormat::of_image(head).map(|(_, bytes)| bytes)
}

fn at<const N: usize>(head: &[u8], offset: usize) -> Option<[u8; N]> {
    head.get(offset..)?.first_chunk().copied()
}

/// squashfs 4.0: magic at 0, bytes_used at 40 (linux/fs/squashfs/squashfs_fs.h, squashfs_super_block).
fn squashfs_bytes(head: &[u8]) -> Option<u64> {
    (at(head, 0)? == *b"hsqs").then(|| at(head, 40).map(u64::from_le_bytes))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_media_types_of_layers() {
        let name = |media_type: &str| LayerFormat::of(media_type).map(LayerFormat::name);
        let squashfs = "application/vnd.stacker.image.layer.squashfs";
        for tail in ["", "+zstd", "+gzip", "+zstd+verity", "+verity"] {
            assert_eq!(name(&format!("{squashfs}{tail}")), Some("squashfs"));
        }
        assert_eq!(name("application/vnd.stacker.image.layer.erofs+lz4hc"), Some("erofs"));
        let tar = "application/vnd.oci.image.layer.v1.tar";
        for (tail, expected) in
            [("", Compression::None), ("+gzip", Compression::Gzip), ("+zstd", Compression::Zstd)]
        {
            let format = LayerFormat::of(&format!("{tar}{tail}")).unwrap();
            assert!(matches!(format.content(), Content::Tar(found) if found == expected), "{format:?}");
        }
        for unknown in
            [format!("{tar}+gzip+encrypted"), format!("{squashfs}x"), format!("{tar}+xz"), "".into()]
        {
            assert_eq!(name(&unknown), None, "{unknown}");
        }
    }

    #[test]
    fn a_chunk_is_no_layer() {
        let rootfs = "application/vnd.puzzlefs.image.rootfs.v1";
        assert!(LayerFormat::of(rootfs).unwrap().is_chunked());
        assert!(!LayerFormat::is_chunk(rootfs));
        for chunk in
            ["application/vnd.puzzlefs.image.filedata.v1", "application/vnd.puzzlefs.image.filedata.v1+zstd"]
        {
            assert!(LayerFormat::is_chunk(chunk) && LayerFormat::of(chunk).is_none());
        }
        assert_eq!(LayerFormat::of(&format!("{rootfs}+zstd")), None, "metadata is never compressed");
        assert!(!LayerFormat::is_chunk("application/vnd.puzzlefs.image.filedata.v12"));
    }

    #[test]
    fn the_kernel_mounts_what_is_one_file() {
        let kernel = |media_type| LayerFormat::of(media_type)?.image().map(|format| format.kernel);
        assert_eq!(kernel("application/vnd.stacker.image.layer.squashfs+zstd"), Some("squashfs"));
        assert_eq!(kernel("application/vnd.stacker.image.layer.erofs+lz4hc"), Some("erofs"));
        assert_eq!(kernel("application/vnd.puzzlefs.image.rootfs.v1"), None);
        assert_eq!(kernel("application/vnd.oci.image.layer.v1.tar"), None);
    }

    #[test]
    fn an_image_is_known_by_its_magic() {
        let mut head = vec![0; 4096];
        assert_eq!(image_bytes(&head), None);
        head[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        head[1036] = 12;
        head[1060..1064].copy_from_slice(&7_u32.to_le_bytes());
        assert_eq!(image_bytes(&head), Some(7 * 4096));
        // Numbers of 48 bits: the upper ones of the blocks are in the root's place.
        head[1104] = 0x80;
        head[1038] = 3;
        assert_eq!(image_bytes(&head), Some(7 * 4096), "without a wide root");
        head[1136] = 1;
        assert_eq!(image_bytes(&head), Some((3 << 32 | 7) * 4096));
        head[1036] = 60;
        assert_eq!(image_bytes(&head), None);
        head[..4].copy_from_slice(b"hsqs");
        head[40..48].copy_from_slice(&5000_u64.to_le_bytes());
        assert_eq!(image_bytes(&head), Some(5000));
        assert_eq!(image_bytes(&head[..47]), None);
    }
}
