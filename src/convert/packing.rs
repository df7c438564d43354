//! How a new image is packed: its format, codec, level and block size.
//!
//! All four decide the bytes of the image, and so its digest. Of squashfs, data blocks and tables use the same codec:
//!
//! | codec | number in the superblock | levels | options behind the superblock |
//! | --- | --- | --- | --- |
//! | zstd | 6 | 1 to 22 | none |
//! | lz4 | 5 | 1 to 12, all of lz4hc | `1 1`: blocks without a frame, compressed by lz4hc |
//!
//! The kernel's squashfs mounts no lz4 image without these options (linux/fs/squashfs/lz4_wrapper.c).
//!
//! Of erofs ([`super::erofs`]), the size is that of a physical cluster, and metadata is not compressed.

use std::io;

use crate::error::{Class, Classified};
use crate::image::oci::{EROFS_LZ4, EROFS_ZSTD, SQUASHFS_LZ4, SQUASHFS_ZSTD};

/// The block sizes that mosfs writes, in bytes: powers of two from 16 KiB to the largest of squashfs and erofs. Smaller
/// blocks compress badly: of 4 KiB blocks each takes a page anyway.
pub const BLOCK_SIZES: std::ops::RangeInclusive<u32> = (16 << 10)..=(1 << 20);

/// The format of a new image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum ImageKind {
    /// squashfs, by mosfs itself.
    #[default]
    Squashfs,
    /// erofs, by `mkfs.erofs`.
    Erofs,
}

impl ImageKind {
    /// The codec where none is chosen. Linux reads lz4 in erofs since 4.19, zstd since 6.10.
    pub fn default_codec(self) -> Codec {
        match self {
            Self::Squashfs => Codec::Zstd,
            Self::Erofs => Codec::Lz4,
        }
    }

    /// Size of a block where none is chosen, in bytes: 128 KiB is mksquashfs' default (docs/benchmarks.md compares them).
    pub fn default_block_bytes(self) -> u32 {
        match self {
            Self::Squashfs => 128 << 10,
            Self::Erofs => 64 << 10,
        }
    }

    /// The level of a codec where none is chosen.
    ///
    /// Of squashfs those of mksquashfs with `-comp zstd` and `-comp lz4 -Xhc`. With zstd, of a Debian root, level 9
    /// takes a seventh of the time for 6 % more space, level 3 a twenty-fifth for 14 %. Of erofs those of mkfs.erofs,
    /// which compresses each cluster many times to fill it.
    pub fn default_level(self, codec: Codec) -> i32 {
        match (self, codec) {
            (Self::Squashfs, Codec::Zstd) => 15,
            (Self::Squashfs, Codec::Lz4) => 12,
            (Self::Erofs, Codec::Zstd) => 3,
            (Self::Erofs, Codec::Lz4) => 9,
        }
    }
}

/// What compresses the blocks of an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Codec {
    /// zstd, by libzstd.
    #[default]
    Zstd,
    /// LZ4 blocks without a frame, compressed by liblz4's high-compression mode.
    Lz4,
}

/// Format, codec, level and block size of an image. Constructed by [`Packing::new`] and [`Packing::of`], which check
/// them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    kind: ImageKind,
    codec: Codec,
    level: i32,
    block_bytes: u32,
}

/// A level that its codec does not have, or a block size that images are not written with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PackingError {
    /// The level is out of the codec's range.
    #[error("level {found}: {} has the levels {} to {}", codec.name(), codec.levels().start(), codec.levels().end())]
    Level {
        /// The codec.
        codec: Codec,
        /// The level.
        found: i32,
    },
    /// The block size is not a power of two from 16 KiB to 1 MiB.
    #[error("blocks of {found} bytes: expected a power of two from {} to {}", BLOCK_SIZES.start(), BLOCK_SIZES.end())]
    BlockSize {
        /// The block size, in bytes.
        found: u32,
    },
}

impl Codec {
    /// The codec's name, in manifests and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
        }
    }

    /// The levels that it has.
    pub fn levels(self) -> std::ops::RangeInclusive<i32> {
        match self {
            Self::Zstd => 1..=22,
            // LZ4HC_CLEVEL_MAX of lz4hc.h.
            Self::Lz4 => 1..=12,
        }
    }

    /// The codec's number in the superblock (linux/squashfs_fs.h).
    pub(super) fn id(self) -> u16 {
        match self {
            Self::Zstd => 6,
            Self::Lz4 => 5,
        }
    }

    /// The options behind the superblock.
    pub(super) fn options(self) -> &'static [u8] {
        match self {
            Self::Zstd => &[],
            // LZ4_LEGACY and LZ4_HC of squashfs-tools' lz4_wrapper.h, as 32-bit numbers.
            Self::Lz4 => &[1, 0, 0, 0, 1, 0, 0, 0],
        }
    }
}

impl Classified for PackingError {
    fn class(&self) -> Class {
        Class::Input
    }
}

impl Default for Packing {
    fn default() -> Self {
        let (kind, codec) = (ImageKind::Squashfs, Codec::Zstd);
        Self { kind, codec, level: kind.default_level(codec), block_bytes: kind.default_block_bytes() }
    }
}

impl Packing {
    /// Returns the packing of squashfs with that codec, level and size of blocks in bytes; without a level, the codec's
    /// default.
    ///
    /// # Errors
    /// A level or a block size out of range.
    pub fn new(codec: Codec, level: Option<i32>, block_bytes: u32) -> Result<Self, PackingError> {
        Self::of(ImageKind::Squashfs, Some(codec), level, Some(block_bytes))
    }

    /// Returns the packing of a format; what is not chosen is the format's default.
    ///
    /// # Errors
    /// A level or a block size out of range.
    pub fn of(
        kind: ImageKind,
        codec: Option<Codec>,
        level: Option<i32>,
        block_bytes: Option<u32>,
    ) -> Result<Self, PackingError> {
        let codec = codec.unwrap_or_else(|| kind.default_codec());
        let level = level.unwrap_or_else(|| kind.default_level(codec));
        let block_bytes = block_bytes.unwrap_or_else(|| kind.default_block_bytes());
        if !codec.levels().contains(&level) {
            return Err(PackingError::Level { codec, found: level });
        }
        if !block_bytes.is_power_of_two() || !BLOCK_SIZES.contains(&block_bytes) {
            return Err(PackingError::BlockSize { found: block_bytes });
        }
        Ok(Self { kind, codec, level, block_bytes })
    }

    /// Returns this packing with what a target chooses otherwise. Another codec comes with its default level, another
    /// format with all of its defaults.
    ///
    /// # Errors
    /// A block size out of range.
    pub fn with(
        self,
        kind: Option<ImageKind>,
        codec: Option<Codec>,
        block_bytes: Option<u32>,
    ) -> Result<Self, PackingError> {
        match kind {
            Some(kind) if kind != self.kind => Self::of(kind, codec, None, block_bytes),
            _ => {
                let codec = codec.unwrap_or(self.codec);
                let level = (codec == self.codec).then_some(self.level);
                Self::of(self.kind, Some(codec), level, Some(block_bytes.unwrap_or(self.block_bytes)))
            }
        }
    }

    /// The packing of images that live until their layers are merged or packed again: fast.
    pub(super) fn temporary() -> Self {
        Self { level: 1, ..Self::default() }
    }

    /// This packing, or the default one where this is not squashfs.
    pub(crate) fn squashfs(self) -> Self {
        match self.kind {
            ImageKind::Squashfs => self,
            ImageKind::Erofs => Self::default(),
        }
    }

    /// The format.
    pub fn kind(&self) -> ImageKind {
        self.kind
    }

    /// The codec.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// The codec's level.
    pub(super) fn level(&self) -> i32 {
        self.level
    }

    /// Size of a block, in bytes.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes as usize
    }

    /// The media type of layers that are packed so.
    pub fn media_type(&self) -> &'static str {
        match (self.kind, self.codec) {
            (ImageKind::Squashfs, Codec::Zstd) => SQUASHFS_ZSTD,
            (ImageKind::Squashfs, Codec::Lz4) => SQUASHFS_LZ4,
            (ImageKind::Erofs, Codec::Zstd) => EROFS_ZSTD,
            (ImageKind::Erofs, Codec::Lz4) => EROFS_LZ4,
        }
    }

    /// A compressor for one thread.
    pub(super) fn compressor(&self) -> io::Result<Compressor> {
        Ok(match self.codec {
            Codec::Zstd => Compressor::Zstd(Box::new(zstd::bulk::Compressor::new(self.level)?)),
            Codec::Lz4 => Compressor::Lz4(self.level),
        })
    }
}

/// Compresses blocks one after the other. What it returns for a block depends on that block alone.
pub(super) enum Compressor {
    Zstd(Box<zstd::bulk::Compressor<'static>>),
    Lz4(i32),
}

impl Compressor {
    /// Returns the block compressed, or `None` where that saves nothing and the block is stored as it is.
    pub(super) fn compress(&mut self, block: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let packed = match self {
            Self::Zstd(compressor) => compressor.compress(block)?,
            Self::Lz4(level) => {
                let mode = lz4::block::CompressionMode::HIGHCOMPRESSION(*level);
                lz4::block::compress(block, Some(mode), false)?
            }
        };
        Ok((packed.len() < block.len()).then_some(packed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_block_sizes_have_bounds() {
        for codec in [Codec::Zstd, Codec::Lz4] {
            for level in [0, codec.levels().end() + 1, -1] {
                let error = Packing::new(codec, Some(level), 128 << 10).unwrap_err();
                assert_eq!(error, PackingError::Level { codec, found: level });
            }
            assert!(Packing::new(codec, None, 128 << 10).is_ok());
        }
        for found in [0, 4096, 8192, 100_000, 2 << 20, u32::MAX] {
            let error = Packing::new(Codec::Zstd, None, found).unwrap_err();
            assert_eq!(error, PackingError::BlockSize { found });
        }
        assert_eq!(Packing::new(Codec::Zstd, Some(15), 128 << 10).unwrap(), Packing::default());
    }

    #[test]
    fn a_target_that_chooses_another_format_gets_its_defaults() {
        let erofs = Packing::of(ImageKind::Erofs, None, None, None).unwrap();
        assert_eq!((erofs.codec(), erofs.level(), erofs.block_bytes()), (Codec::Lz4, 9, 64 << 10));
        let base = Packing::new(Codec::Zstd, Some(7), 1 << 20).unwrap();
        assert_eq!(base.with(Some(ImageKind::Erofs), None, None).unwrap(), erofs);
        let chosen = base.with(Some(ImageKind::Erofs), Some(Codec::Zstd), Some(16 << 10)).unwrap();
        assert_eq!((chosen.codec(), chosen.level(), chosen.block_bytes()), (Codec::Zstd, 3, 16 << 10));
        assert_eq!(base.with(Some(ImageKind::Squashfs), None, None).unwrap(), base);
        assert_eq!(base.with(None, Some(Codec::Lz4), None).unwrap().level(), 12);
    }

    #[test]
    fn blocks_that_do_not_shrink_are_stored_as_they_are() {
        for codec in [Codec::Zstd, Codec::Lz4] {
            let mut compressor = Packing::new(codec, None, 16 << 10).unwrap().compressor().unwrap();
            assert_eq!(compressor.compress(b"ab").unwrap(), None, "{}", codec.name());
            assert!(compressor.compress(&[7; 4096]).unwrap().unwrap().len() < 64, "{}", codec.name());
        }
    }
}
