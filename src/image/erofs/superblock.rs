//! The superblock, at byte 1024 of an image, and what follows it.
//!
//! ```text
//!   0 magic u32, 4 checksum u32, 8 compatible features u32
//!  12 block size (log2) u8, 13 extension slots u8: the superblock has 128 + 16 x slots bytes
//!  14 root node u16, or the upper bits of the number of blocks (48-bit)
//!  16 inodes u64, 24 epoch u64, 32 its nanoseconds u32, 36 blocks u32
//!  40 first metadata block u32, 44 first block of shared xattrs u32, 48 UUID, 64 volume name
//!  80 incompatible features u32, 84 algorithms u16 (a bit each), 86 further devices u16, 88 their slot u16
//!  90 directory block size (log2, above that of blocks) u8
//!  91 count of name prefixes u8, 92 their start u32 (in 4 bytes), 96 packed node u64
//! 112 root node u64 (48-bit), 128 metabox node u64 (in the first extension slot)
//! then, for each algorithm, the length of its options u16 and the options, aligned to 4 bytes
//! ```
//!
//! The checksum is CRC-32C without the final inversion, from byte 1024 to the end of the first block (of
//! the block, where blocks are not larger than 1 KiB), with the checksum itself as 0.

use super::error::corrupt;
use crate::image::fields::{u16_at, u32_at, u64_at};
use crate::image::{LayerError, Source};

/// The magic of an image.
pub(super) const MAGIC: u32 = 0xe0f5_e1e2;

/// Where the superblock is, in bytes.
pub(super) const START: u64 = 1024;

/// Binary logarithms of the block sizes that there are.
const BLOCK_LOGS: std::ops::RangeInclusive<u32> = 9..=16;

/// Size of the superblock without extension slots, in bytes.
const BYTES: usize = 128;

/// The name of the superblock in errors.
const TABLE: &str = "superblock";

/// Compatible feature: the superblock has a checksum.
const COMPAT_CHECKSUM: u32 = 1;
/// Compatible feature: shared xattrs are in the metabox.
const COMPAT_SHARED_IN_METABOX: u32 = 8;
/// Compatible feature: name prefixes are in the image itself.
const COMPAT_PLAIN_PREFIXES: u32 = 0x10;

/// Compressed data ends where its blocks end, with zeros before it.
const ZERO_PADDING: u32 = 1;
/// Options of the algorithms follow; clusters of more than one block.
const COMPRESSION_OPTIONS: u32 = 2;
/// Files in chunks.
const CHUNKED_FILE: u32 = 4;
/// More devices, or a second algorithm in a file: the two share a bit.
const DEVICE_TABLE_OR_HEAD2: u32 = 8;
/// The last cluster of a file is beside its inode.
const TAIL_PACKING: u32 = 0x10;
/// Fragments, or clusters that several extents share: the two share a bit.
const FRAGMENTS_OR_DEDUPE: u32 = 0x20;
/// Prefixes of names of attributes.
const XATTR_PREFIXES: u32 = 0x40;
/// Block numbers of 48 bits.
const WIDE: u32 = 0x80;
/// Compressed metadata.
const METABOX: u32 = 0x100;

/// All incompatible features that this reader knows.
const KNOWN: u32 = ZERO_PADDING
    | COMPRESSION_OPTIONS
    | CHUNKED_FILE
    | DEVICE_TABLE_OR_HEAD2
    | TAIL_PACKING
    | FRAGMENTS_OR_DEDUPE
    | XATTR_PREFIXES
    | WIDE
    | METABOX;

/// Bit of a node number: the node is in the metabox.
pub(super) const IN_METABOX: u64 = 1 << 63;

/// The most bytes of a cluster's stored form, in bytes.
pub(super) const STORED_BYTES_MAX: u32 = 1 << 20;

/// How many algorithms there are: lz4, lzma, deflate, zstd.
const ALGORITHMS: u32 = 4;

/// The fields of the superblock, checked against each other and against the size of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Superblock {
    /// Binary logarithm of the block size: 9 to 16.
    pub block_log: u32,
    /// Size of the image, in bytes: all its blocks.
    pub bytes: u64,
    /// Number of files.
    pub inodes: u64,
    /// Compatible features, as stored.
    pub compatible: u32,
    /// Incompatible features, as stored.
    pub incompatible: u32,
    /// Bit N: algorithm N may be used (0 lz4, 1 lzma, 2 deflate, 3 zstd).
    pub algorithms: u16,
    /// Largest stored cluster that lz4 uses, in blocks; 1 where the image does not say.
    pub lz4_blocks: u16,
    /// Number of the root node.
    pub(super) root: u64,
    /// Seconds since 1970 that times of compact inodes are relative to.
    pub(super) epoch: i64,
    /// The nanoseconds of all times of compact inodes.
    pub(super) epoch_nanos: u32,
    /// Where the inodes begin, in bytes.
    pub(super) metadata: u64,
    /// Where shared xattrs begin, in bytes.
    pub(super) shared_xattrs: u64,
    /// How many name prefixes there are.
    pub(super) prefixes: u8,
    /// Where they are, in bytes.
    pub(super) prefixes_at: u64,
    /// Number of the node that holds fragments.
    pub(super) packed: Option<u64>,
    /// Number of the node that holds compressed metadata.
    pub(super) metabox: Option<u64>,
}

/// The number of the root node, and how many blocks the image has: with wide numbers one takes the place of the other.
fn root_and_blocks(head: &[u8]) -> (u64, u64) {
    let (short, low) = (u64::from(u16_at(head, 14)), u64::from(u32_at(head, 36)));
    match u64_at(head, 112) {
        root if u32_at(head, 80) & WIDE != 0 && root != 0 => (root, short << 32 | low),
        _ => (short, low),
    }
}

/// Returns the size in bytes of the image that begins with these bytes; `None` if they are not an erofs image.
pub fn image_bytes(head: &[u8]) -> Option<u64> {
    let head = head.get(START as usize..)?.get(..BYTES)?;
    let block_log = u32::from(head[12]);
    if u32_at(head, 0) != MAGIC || !BLOCK_LOGS.contains(&block_log) {
        return None;
    }
    root_and_blocks(head).1.checked_mul(1 << block_log)
}

impl Superblock {
    /// Size of a block, in bytes.
    pub(super) fn block_bytes(&self) -> u32 {
        1 << self.block_log
    }

    /// Whether files may be compressed. The first images with lz4 do not say.
    pub(super) fn has_clusters(&self) -> bool {
        self.incompatible & (ZERO_PADDING | COMPRESSION_OPTIONS) != 0
    }

    /// Whether compressed data is at the end of its blocks.
    pub(super) fn is_zero_padded(&self) -> bool {
        self.incompatible & ZERO_PADDING != 0
    }

    /// Whether shared xattrs are in the metabox.
    pub(super) fn shared_in_metabox(&self) -> bool {
        self.metabox.is_some() && self.compatible & COMPAT_SHARED_IN_METABOX != 0
    }

    /// Whether name prefixes are in the image itself, even if there is a metabox or packed node.
    pub(super) fn plain_prefixes(&self) -> bool {
        self.compatible & COMPAT_PLAIN_PREFIXES != 0
    }

    /// Reads and checks the superblock.
    ///
    /// # Errors
    /// [`LayerError::Corrupt`] with table `superblock` and the offset of the field in the image;
    /// [`LayerError::Read`] if the source cannot return the bytes.
    pub(super) fn read(source: &dyn Source) -> Result<Self, LayerError> {
        let size = source.size_bytes();
        let bad = |at: u64, why: String| Err(corrupt(TABLE, START + at, why));
        if size < START + BYTES as u64 {
            return bad(0, format!("the image has {size} bytes, expected at least {}", START + BYTES as u64));
        }
        let mut scratch = Vec::new();
        let head = source.read(START, BYTES, &mut scratch)?;
        let magic = u32_at(head, 0);
        if magic != MAGIC {
            return bad(0, format!("magic is {magic:#010x}, expected {MAGIC:#010x} (erofs)"));
        }
        let block_log = u32::from(head[12]);
        if !BLOCK_LOGS.contains(&block_log) {
            return bad(12, format!("block size is 2^{block_log}, expected 2^9 to 2^16"));
        }
        let block_bytes = 1u64 << block_log;
        let compatible = u32_at(head, 8);
        let incompatible = u32_at(head, 80);
        let unknown = incompatible & !KNOWN;
        if unknown != 0 {
            return bad(
                80,
                format!("the image requires feature {:#x}, which mosfs does not know", lowest(unknown)),
            );
        }
        let superblock_bytes = BYTES as u64 + 16 * u64::from(head[13]);
        // What the checksum covers.
        let covered = if block_bytes > START { block_bytes - START } else { block_bytes };
        if superblock_bytes > size - START {
            return bad(13, format!("{superblock_bytes} bytes, expected within the {size} of the image"));
        }
        if head[90] != 0 {
            return bad(
                90,
                format!("directory blocks are {} times larger, expected 1", 1u64 << (head[90] & 63)),
            );
        }
        let devices = u16_at(head, 86);
        if incompatible & DEVICE_TABLE_OR_HEAD2 != 0 && devices != 0 {
            return bad(
                86,
                format!("{devices} further devices hold data, expected none: one image is one file"),
            );
        }
        let (root, blocks) = root_and_blocks(head);
        let bytes =
            blocks.checked_mul(block_bytes).filter(|bytes| *bytes <= size.next_multiple_of(block_bytes));
        let Some(bytes) = bytes.filter(|bytes| *bytes >= START + superblock_bytes) else {
            return bad(36, format!("{blocks} blocks of {block_bytes} bytes, the source has {size} bytes"));
        };
        let packed = u64_at(head, 96);
        let packed = (incompatible & FRAGMENTS_OR_DEDUPE != 0 && packed != 0).then_some(packed);
        let mut superblock = Self {
            block_log,
            bytes,
            inodes: u64_at(head, 16),
            compatible,
            incompatible,
            // Without options lz4 is the only one.
            algorithms: if incompatible & COMPRESSION_OPTIONS != 0 { u16_at(head, 84) } else { 1 },
            lz4_blocks: 1,
            root,
            epoch: u64_at(head, 24).cast_signed(),
            epoch_nanos: u32_at(head, 32),
            metadata: u64::from(u32_at(head, 40)) * block_bytes,
            shared_xattrs: u64::from(u32_at(head, 44)) * block_bytes,
            prefixes: if incompatible & XATTR_PREFIXES != 0 { head[91] } else { 0 },
            prefixes_at: u64::from(u32_at(head, 92)) * 4,
            packed,
            metabox: None,
        };
        if superblock.epoch_nanos >= 1_000_000_000 {
            return bad(32, format!("{} nanoseconds, expected below 10^9", superblock.epoch_nanos));
        }
        for (at, what, node) in [(14, "root", Some(root)), (96, "packed", packed)] {
            // Each of them must be found without the metabox.
            if node.is_some_and(|node| node & IN_METABOX != 0) && what == "packed" {
                return bad(at, format!("the {what} node is in the metabox, expected it outside"));
            }
        }
        if superblock.metadata >= bytes {
            let why = format!("metadata starts at {}, expected below {bytes}", superblock.metadata);
            return bad(40, why);
        }
        let unknown = superblock.algorithms & !((1 << ALGORITHMS) - 1);
        if unknown != 0 {
            let number = unknown.trailing_zeros();
            return bad(84, format!("the image uses algorithm {number}, which mosfs does not know"));
        }
        if compatible & COMPAT_CHECKSUM != 0 {
            if covered > size - START {
                return bad(4, format!("the checksum covers {covered} bytes, the source has {size}"));
            }
            let mut bytes = source.read(START, covered as usize, &mut scratch)?.to_vec();
            let expected = u32_at(&bytes, 4);
            bytes[4..8].fill(0);
            let found = crc32c(&bytes);
            if found != expected {
                return bad(4, format!("checksum is {expected:#010x}, the superblock has {found:#010x}"));
            }
        }
        if incompatible & METABOX != 0 {
            if superblock_bytes < BYTES as u64 + 16 {
                return bad(13, "the image has compressed metadata, and no field that names its node".into());
            }
            let node = u64_at(source.read(START + BYTES as u64, 8, &mut scratch)?, 0);
            if node & IN_METABOX != 0 {
                return bad(128, "the metabox node is in the metabox, expected it outside".into());
            }
            superblock.metabox = Some(node);
        }
        if incompatible & COMPRESSION_OPTIONS != 0 && superblock.algorithms & 1 != 0 {
            superblock.lz4_blocks = lz4_blocks(source, START + superblock_bytes)?.max(1);
        }
        Ok(superblock)
    }
}

/// Reads the largest stored cluster from the options of lz4, which come first: in blocks.
fn lz4_blocks(source: &dyn Source, at: u64) -> Result<u16, LayerError> {
    let mut scratch = Vec::new();
    let at = at.next_multiple_of(4);
    let options = source.read(at, 6, &mut scratch)?;
    let length = u16_at(options, 0);
    if length < 14 {
        let why = format!("the options of lz4 have {length} bytes, expected at least 14");
        return Err(corrupt(TABLE, at, why));
    }
    Ok(u16_at(options, 4))
}

/// The lowest bit that is set.
fn lowest(bits: u32) -> u32 {
    bits & bits.wrapping_neg()
}

/// CRC-32C (Castagnoli), without the final inversion.
fn crc32c(bytes: &[u8]) -> u32 {
    /// The polynomial, with its bits in reverse order.
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (POLYNOMIAL * (crc & 1)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_rfc_3720() {
        // RFC 3720, appendix B.4: 32 bytes of zeros, and the numbers from 0 to 31.
        assert_eq!(!crc32c(&[0; 32]), 0x8a91_36aa);
        let counted: Vec<u8> = (0..32).collect();
        assert_eq!(!crc32c(&counted), 0x46dd_794e);
        assert_eq!(lowest(0x600), 0x200);
    }
}
