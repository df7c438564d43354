//! dm-verity: the format that authenticates an image block by block.
//!
//! Source: the kernel's `Documentation/admin-guide/device-mapper/verity.rst` and cryptsetup's `DMVerity`
//! specification. Of the forms that these allow, exactly one is read and written here: superblock version 1,
//! hash type 1, SHA-256, blocks of 4096 bytes for data and hashes, a salt of 32 bytes. Stacker and atomfs use
//! the same form, and `veritysetup format --hash-offset` writes the same bytes.
//!
//! ```text
//! an image file, in blocks of 4096 bytes; n = number of data blocks
//!
//! 0 .. n          data: the file system image, then zeros up to a whole block
//! n               superblock: 512 bytes, then zeros
//! n + 1           the tree's top level: one block
//! ...             the levels below it, down to
//! ...             level 0: the hashes of the data blocks
//! end of the file
//!
//! hash block      128 hashes of 32 bytes; the last one of a level is filled up with zeros
//! hash            SHA-256(salt | block), of a data block or of a hash block one level below
//! root hash       the hash of the top block; of the data block itself where there is only one,
//!                 for then there is no tree
//! ```
//!
//! The root hash comes from a signed manifest and covers all data and the whole tree. **It does not cover the
//! superblock.** So nothing in the superblock is trusted: each field must have its only allowed value
//! ([`Superblock::parse`]), the number of data blocks must match the position of the superblock, and a wrong
//! salt makes every hash wrong, including the root hash. The UUID has no effect.
//!
//! # Reproducible images
//! The same image must produce the same blob, so salt and UUID are not random but derive from the SHA-256
//! digest of the data area, padding included ([`Superblock::for_data`]):
//!
//! ```text
//! salt = SHA-256("mosfs-verity-salt-v1" 0x00 digest)
//! uuid = the first 16 bytes of SHA-256("mosfs-verity-uuid-v1" 0x00 digest), marked as version 8 (RFC 9562)
//! ```
//!
//! So the tree cannot be built while the data is written: its first hash needs the digest of all data. That
//! costs little. A squashfs writer returns to offset 0 to write its superblock when everything else is
//! written, so there is no stream of final bytes to hash. And the blob's own SHA-256, which the store needs,
//! is a serial pass over the same bytes in any case: [`seal`] makes that pass once, takes the data's digest
//! from it on the way, and continues over superblock and tree to the blob's digest. The tree is the only
//! extra pass: over the page cache, on all cores, two streams per core ([`crate::sys::sha256`]).

mod geometry;
mod locate;
pub(super) mod parallel;
mod tree;

use std::ops::RangeInclusive;

use super::format::image_bytes;
use super::source::ReadError;
use crate::digest::{Digest, Hasher};
use crate::error::{Class, Classified};

pub use geometry::{Geometry, Level, MAX_DATA_BLOCKS};
pub use locate::{Located, VerityData, locate, locate_behind};
#[cfg(feature = "internals")]
pub use tree::Tree;
pub use tree::{Sealed, seal};

/// Bytes of a data block, and of a hash block.
pub const BLOCK_BYTES: usize = 4096;

/// Hashes in a hash block.
pub const HASHES_PER_BLOCK: usize = 128;

/// Bytes of the salt of a layer.
pub const SALT_BYTES: usize = 32;

/// Most bytes of a salt (cryptsetup's `struct verity_sb`).
pub const SALT_BYTES_MAX: usize = 256;

/// The signature at the start of a superblock.
pub const SIGNATURE: &[u8; 8] = b"verity\0\0";

/// A block of the tree, as its hashes.
pub type HashBlock = [[u8; 32]; HASHES_PER_BLOCK];

/// Why an image's verity data cannot be used, found, or created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerityError {
    /// The size of the file system image cannot be determined.
    #[error("cannot tell where the image ends: {found}, expected a squashfs or erofs superblock")]
    UnknownImage {
        /// What was found instead.
        found: String,
    },
    /// The data area has no blocks, or more than can be addressed.
    #[error("a data area of {found} bytes: expected 1 to {} blocks of {BLOCK_BYTES} bytes", MAX_DATA_BLOCKS)]
    DataSize {
        /// Its size, in bytes.
        found: u64,
    },
    /// The image file is too short or too long for its content.
    #[error("the image file has {found} bytes, expected {expected} ({what})")]
    FileSize {
        /// What the file should contain.
        what: &'static str,
        /// Its size, in bytes.
        found: u64,
        /// The expected size, in bytes.
        expected: u64,
    },
    /// The file ends with the data: there is no superblock and no tree.
    #[error(
        "the image has no verity data: the file ends at {data_bytes}, where the verity superblock should be"
    )]
    Missing {
        /// Size of the data area and of the file, in bytes.
        data_bytes: u64,
    },
    /// A field of the superblock has an invalid value.
    #[error("verity superblock: {field} is {found}, expected {expected}")]
    Superblock {
        /// Name of the field, as in cryptsetup's `struct verity_sb`.
        field: &'static str,
        /// Its value.
        found: String,
        /// The value or values that are allowed.
        expected: String,
    },
    /// A part of the file cannot be read, or does not match its hash.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The verity data cannot be written.
    #[error("cannot write verity data at {offset}: {source}")]
    Write {
        /// Offset in the image file, in bytes.
        offset: u64,
        /// The error of the operating system.
        source: std::io::Error,
    },
}

impl Classified for VerityError {
    fn class(&self) -> Class {
        match self {
            Self::Read(ReadError::Io { .. }) | Self::Write { .. } => Class::Failure,
            _ => Class::Verification,
        }
    }
}

/// The variable part of a superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// A name for people and udev; nothing depends on it.
    pub uuid: [u8; 16],
    /// The salt, hashed before every block: [`SALT_BYTES`] in a layer, at most [`SALT_BYTES_MAX`] anywhere.
    pub salt: Vec<u8>,
    /// Number of data blocks.
    pub data_blocks: u64,
}

/// Offsets in the superblock, in bytes: cryptsetup's `struct verity_sb`. Numbers are little-endian.
mod field {
    use std::ops::Range;

    pub(super) const SIGNATURE: Range<usize> = 0..8;
    pub(super) const VERSION: Range<usize> = 8..12;
    pub(super) const HASH_TYPE: Range<usize> = 12..16;
    pub(super) const UUID: Range<usize> = 16..32;
    pub(super) const ALGORITHM: Range<usize> = 32..64;
    pub(super) const DATA_BLOCK_SIZE: Range<usize> = 64..68;
    pub(super) const HASH_BLOCK_SIZE: Range<usize> = 68..72;
    pub(super) const DATA_BLOCKS: Range<usize> = 72..80;
    pub(super) const SALT_SIZE: Range<usize> = 80..82;
    pub(super) const SALT: Range<usize> = 88..88 + super::SALT_BYTES_MAX;
    /// The superblock ends here. `veritysetup` writes no more, and a layer has zeros up to the end of the block.
    pub(super) const END: usize = 512;
}

impl Superblock {
    /// Returns the superblock for data with this digest (of the whole data area); see the module
    /// documentation.
    pub fn for_data(digest: &Digest, data_blocks: u64) -> Self {
        let derive = |label: &[u8]| {
            let mut hasher = Hasher::new();
            hasher.update(label);
            hasher.update(&[0]);
            hasher.update(digest.as_bytes());
            *hasher.finish().as_bytes()
        };
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&derive(b"mosfs-verity-uuid-v1")[..16]);
        let uuid = uuid::Builder::from_custom_bytes(uuid).into_uuid().into_bytes();
        Self { uuid, salt: derive(b"mosfs-verity-salt-v1").to_vec(), data_blocks }
    }

    /// Parses the superblock of a layer from its block.
    ///
    /// Every byte except UUID, salt and the number of data blocks must match what [`Superblock::to_block`]
    /// writes for a salt of [`SALT_BYTES`].
    ///
    /// # Errors
    /// [`VerityError::Superblock`] names the first field that is wrong.
    pub fn parse(block: &[u8; BLOCK_BYTES]) -> Result<Self, VerityError> {
        Self::parse_with(block, SALT_BYTES..=SALT_BYTES, BLOCK_BYTES)
    }

    /// Parses a superblock as `veritysetup format` writes it with SHA-256, hash type 1 and blocks of 4096
    /// bytes: with any salt, or none, and whatever bytes between its end and the end of its block.
    ///
    /// # Errors
    /// As [`Superblock::parse`].
    pub fn parse_any_salt(block: &[u8; BLOCK_BYTES]) -> Result<Self, VerityError> {
        Self::parse_with(block, 0..=SALT_BYTES_MAX, field::END)
    }

    /// `salts` are the lengths of a salt that are allowed, in bytes; `checked_bytes` is how much of the block
    /// must be as [`Superblock::to_block`] writes it.
    fn parse_with(
        block: &[u8; BLOCK_BYTES],
        salts: RangeInclusive<usize>,
        checked_bytes: usize,
    ) -> Result<Self, VerityError> {
        let wrong =
            |field, found: String, expected: String| VerityError::Superblock { field, found, expected };
        let salt_bytes = usize::from(u16::from_le_bytes(bytes(block, field::SALT_SIZE)));
        let salt = block[field::SALT].get(..salt_bytes).unwrap_or_default().to_vec();
        let parsed = Self {
            uuid: bytes(block, field::UUID),
            salt,
            data_blocks: u64::from_le_bytes(bytes(block, field::DATA_BLOCKS)),
        };
        let only = parsed.to_block();
        if block[field::SIGNATURE] != only[field::SIGNATURE] {
            return Err(Self::wrong_signature(&block[field::SIGNATURE]));
        }
        let number = |block: &[u8; BLOCK_BYTES], range| u32::from_le_bytes(bytes(block, range));
        for (name, range) in [
            ("version", field::VERSION),
            ("hash_type", field::HASH_TYPE),
            ("data_block_size", field::DATA_BLOCK_SIZE),
            ("hash_block_size", field::HASH_BLOCK_SIZE),
        ] {
            let (found, expected) = (number(block, range.clone()), number(&only, range));
            if found != expected {
                return Err(wrong(name, found.to_string(), expected.to_string()));
            }
        }
        if block[field::ALGORITHM] != only[field::ALGORITHM] {
            let name = block[field::ALGORITHM].split(|&byte| byte == 0).next().unwrap_or_default();
            let found = format!("`{}`", name.escape_ascii());
            return Err(wrong("algorithm", found, "`sha256`, filled up with zeros".to_string()));
        }
        if !salts.contains(&salt_bytes) {
            let (least, most) = (salts.start(), salts.end());
            let expected = if least == most { most.to_string() } else { format!("{least} to {most}") };
            return Err(wrong("salt_size", salt_bytes.to_string(), expected));
        }
        if let Some(at) = (0..checked_bytes).find(|&at| block[at] != only[at]) {
            return Err(wrong("padding", format!("{:#04x} at byte {at}", block[at]), "zero".to_string()));
        }
        Ok(parsed)
    }

    /// The error for a block without the signature.
    fn wrong_signature(found: &[u8]) -> VerityError {
        VerityError::Superblock {
            field: "signature",
            found: format!("`{}`", found.escape_ascii()),
            expected: "`verity\\x00\\x00`".to_string(),
        }
    }

    /// Returns the superblock's block as stored.
    pub fn to_block(&self) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        let mut put = |range: std::ops::Range<usize>, bytes: &[u8]| {
            block[range.start..range.start + bytes.len()].copy_from_slice(bytes);
        };
        put(field::SIGNATURE, SIGNATURE);
        put(field::VERSION, &1_u32.to_le_bytes());
        put(field::HASH_TYPE, &1_u32.to_le_bytes());
        put(field::UUID, &self.uuid);
        put(field::ALGORITHM, b"sha256");
        put(field::DATA_BLOCK_SIZE, &(BLOCK_BYTES as u32).to_le_bytes());
        put(field::HASH_BLOCK_SIZE, &(BLOCK_BYTES as u32).to_le_bytes());
        put(field::DATA_BLOCKS, &self.data_blocks.to_le_bytes());
        // A longer one cannot be stored, and is not made or read.
        let salt = self.salt.get(..SALT_BYTES_MAX).unwrap_or(&self.salt);
        put(field::SALT_SIZE, &(salt.len() as u16).to_le_bytes());
        put(field::SALT, salt);
        block
    }
}

/// Returns the bytes of a field. The field has `N` bytes and lies within the block.
fn bytes<const N: usize>(block: &[u8; BLOCK_BYTES], range: std::ops::Range<usize>) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&block[range]);
    field
}

/// Returns the size of the data area (bytes of the file system, rounded up to a whole block), according to
/// the file system's own superblock.
///
/// `head` is the beginning of the image file; 4096 bytes are enough. They are not yet verified, so the result
/// is only a hint where to look for the verity superblock: the root hash decides.
///
/// # Errors
/// [`VerityError::UnknownImage`] if it is not a known image; [`VerityError::DataSize`] if the size is
/// invalid.
pub fn data_bytes(head: &[u8]) -> Result<u64, VerityError> {
    let Some(image) = image_bytes(head) else {
        let found =
            format!("it begins with `{}`", head.get(..head.len().min(8)).unwrap_or(head).escape_ascii());
        return Err(VerityError::UnknownImage { found });
    };
    let data = image.checked_next_multiple_of(BLOCK_BYTES as u64).unwrap_or(u64::MAX);
    Geometry::new(data)
        .map(|geometry| geometry.data_bytes())
        .map_err(|_| VerityError::DataSize { found: image })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_upset_the_parsers(
            garbage in prop::collection::vec(any::<u8>(), 0..2000),
            at in 0_usize..600,
            magic in any::<bool>(),
        ) {
            let mut head = garbage.clone();
            if magic && head.len() > 4 {
                head[..4].copy_from_slice(b"hsqs");
            }
            if let Ok(size) = data_bytes(&head) {
                prop_assert!(Geometry::new(size).is_ok());
            }
            // A valid superblock with garbage in it: accepted values are written back unchanged.
            let mut block = sample().to_block();
            let len = garbage.len().min(40);
            block[at..at + len].copy_from_slice(&garbage[..len]);
            if let Ok(parsed) = Superblock::parse(&block) {
                prop_assert_eq!(parsed.to_block(), block);
            }
        }
    }

    fn sample() -> Superblock {
        Superblock::for_data(&Digest::of(b"data"), 7)
    }

    #[test]
    fn derivation_is_stable() {
        // Digest stability: other values here mean that the same image no longer produces the same blob.
        let superblock = sample();
        assert_eq!(
            crate::digest::hex(&superblock.salt),
            "29fcc3d9cbe20ae6133f1949ef12da80da34825c8d34a2f82ee2e429a5781082"
        );
        assert_eq!(
            uuid::Uuid::from_bytes(superblock.uuid).to_string(),
            "d3b9c484-6278-8ab5-b3eb-80009c235e6c"
        );
    }

    #[test]
    fn every_byte_matters_but_uuid_salt_and_blocks() {
        let good = sample().to_block();
        assert_eq!(Superblock::parse(&good).unwrap(), sample());
        for at in 0..BLOCK_BYTES {
            let mut block = good;
            block[at] ^= 0x20;
            let salt = field::SALT.start..field::SALT.start + SALT_BYTES;
            let free = [field::UUID, salt, field::DATA_BLOCKS].iter().any(|range| range.contains(&at));
            match Superblock::parse(&block) {
                Ok(parsed) => assert!(free && parsed != sample(), "byte {at} was let through"),
                Err(VerityError::Superblock { .. }) => assert!(!free, "byte {at} was refused"),
                Err(other) => panic!("byte {at}: {other}"),
            }
        }
    }

    #[test]
    fn a_plain_file_may_have_any_salt() {
        for salt in [vec![], vec![1], vec![2; 32], vec![3; SALT_BYTES_MAX]] {
            let superblock = Superblock { salt, ..sample() };
            let mut block = superblock.to_block();
            // What was in the file before.
            block[field::END..].fill(0xee);
            assert_eq!(Superblock::parse_any_salt(&block).unwrap(), superblock);
            assert!(Superblock::parse(&block).is_err());
        }
        let mut block = sample().to_block();
        block[field::SALT_SIZE].copy_from_slice(&257_u16.to_le_bytes());
        let error = Superblock::parse_any_salt(&block).unwrap_err().to_string();
        assert_eq!(error, "verity superblock: salt_size is 257, expected 0 to 256");
    }

    #[test]
    fn errors_name_field_found_and_expected() {
        let text = |at: usize, value: &[u8]| {
            let mut block = sample().to_block();
            block[at..at + value.len()].copy_from_slice(value);
            Superblock::parse(&block).unwrap_err().to_string()
        };
        assert_eq!(
            text(0, b"x"),
            r"verity superblock: signature is `xerity\x00\x00`, expected `verity\x00\x00`"
        );
        assert_eq!(text(8, &[2]), "verity superblock: version is 2, expected 1");
        assert_eq!(text(12, &[0]), "verity superblock: hash_type is 0, expected 1");
        assert!(text(32, b"sha512").contains("algorithm is `sha512"));
        assert_eq!(
            text(64, &512_u32.to_le_bytes()),
            "verity superblock: data_block_size is 512, expected 4096"
        );
        assert_eq!(text(68, &[0xff; 4]), "verity superblock: hash_block_size is 4294967295, expected 4096");
        assert_eq!(text(80, &[0, 1]), "verity superblock: salt_size is 256, expected 32");
        assert_eq!(text(511, &[3]), "verity superblock: padding is 0x03 at byte 511, expected zero");
    }

    #[test]
    fn the_end_of_an_image_is_a_checked_hint() {
        let mut squashfs = vec![0; 96];
        squashfs[..4].copy_from_slice(b"hsqs");
        for (used, expected) in [(1_u64, Some(4096)), (4096, Some(4096)), (4097, Some(8192)), (0, None)] {
            squashfs[40..48].copy_from_slice(&used.to_le_bytes());
            assert_eq!(data_bytes(&squashfs).ok(), expected, "{used}");
        }
        for used in [u64::MAX, u64::MAX - 4096, 1 << 63] {
            squashfs[40..48].copy_from_slice(&used.to_le_bytes());
            assert!(matches!(data_bytes(&squashfs), Err(VerityError::DataSize { found }) if found == used));
        }
        for head in [&b""[..], b"hsqs", &[0; 4096]] {
            assert!(matches!(data_bytes(head), Err(VerityError::UnknownImage { .. })));
        }
    }
}
