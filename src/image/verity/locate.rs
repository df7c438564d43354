//! Finds an image's verity data, and checks whether it can belong to the image.
//!
//! This is the only place that decides it: mounts of both backends, `mosfs verify` and `mosfs build` use it.
//!
//! ```text
//! first block       the file system's superblock states where the data ends (a hint, see data_bytes)
//! end of the data   nothing, or padding                                  -> Absent
//!                   the signature of a verity superblock                 -> Present, or an error
//! ```
//!
//! Rule (docs/design.md, verity location): the file ends with the hash tree. No hash covers bytes after it,
//! so they are refused, like a truncated tree.

use super::{BLOCK_BYTES, Geometry, SIGNATURE, Superblock, VerityError, data_bytes};
use crate::image::bytes::{ReadAt, len, read_exact};

/// Verity data that is complete and fits its image. Nothing has been hashed: only the root hash decides
/// whether it is valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerityData {
    /// The superblock: only its salt and its number of data blocks are used.
    pub superblock: Superblock,
    /// Where data and tree lie.
    pub geometry: Geometry,
}

/// What follows the data of an image.
#[derive(Debug)]
pub enum Located {
    /// No verity data.
    Absent {
        /// End of the image, in bytes: verity data can be appended there.
        image_bytes: u64,
        /// The error for a caller that requires verity data.
        why: VerityError,
    },
    /// Verity data.
    Present(VerityData),
}

impl Located {
    /// Returns the verity data, for a caller that requires it.
    ///
    /// # Errors
    /// [`VerityError::Missing`], [`VerityError::FileSize`] or [`VerityError::Superblock`] if there is none.
    pub fn required(self) -> Result<VerityData, VerityError> {
        match self {
            Self::Present(found) => Ok(found),
            Self::Absent { why, .. } => Err(why),
        }
    }
}

/// Finds the verity data of an image, and checks everything in it that no hash covers.
///
/// # Errors
/// [`VerityError::UnknownImage`] and [`VerityError::DataSize`] if the end of the image is not known;
/// [`VerityError::FileSize`] if the image is truncated, or if the file does not end with the tree;
/// [`VerityError::Superblock`] for a field with an invalid value; [`VerityError::Read`].
pub fn locate(bytes: &impl ReadAt) -> Result<Located, VerityError> {
    let mut head = [0; BLOCK_BYTES];
    let head = &mut head[..(BLOCK_BYTES as u64).min(len(bytes)?) as usize];
    read_exact(bytes, 0, head)?;
    locate_behind(bytes, data_bytes(head)?)
}

/// Like [`locate`], for an image whose data area is known to have `data_bytes` bytes.
///
/// # Errors
/// As [`locate`].
pub fn locate_behind(bytes: &impl ReadAt, data_bytes: u64) -> Result<Located, VerityError> {
    const BLOCK: u64 = BLOCK_BYTES as u64;
    const WHOLE: &str = "data, verity superblock and tree";
    let geometry = Geometry::new(data_bytes)?;
    let (found, expected) = (len(bytes)?, geometry.file_bytes());
    // The image may end inside the last block, but not before it.
    if found <= data_bytes - BLOCK {
        return Err(VerityError::FileSize { what: "the file system image", found, expected: data_bytes });
    }
    let mut signature = [0; SIGNATURE.len()];
    if found >= data_bytes + SIGNATURE.len() as u64 {
        read_exact(bytes, data_bytes, &mut signature)?;
    }
    if signature != *SIGNATURE {
        let why = if found == data_bytes {
            VerityError::Missing { data_bytes }
        } else if found < expected {
            VerityError::FileSize { what: WHOLE, found, expected }
        } else {
            Superblock::wrong_signature(&signature)
        };
        return Ok(Located::Absent { image_bytes: data_bytes.min(found), why });
    }
    if found != expected {
        return Err(VerityError::FileSize { what: WHOLE, found, expected });
    }
    let mut block = [0; BLOCK_BYTES];
    read_exact(bytes, data_bytes, &mut block)?;
    let superblock = Superblock::parse(&block)?;
    // Rule: the root hash does not cover this number, so it must equal the number of blocks before the
    // superblock. A smaller number would leave data unverified, and any other would shift the levels of the
    // tree.
    if superblock.data_blocks != geometry.data_blocks() {
        return Err(VerityError::Superblock {
            field: "data_blocks",
            found: superblock.data_blocks.to_string(),
            expected: format!("{}, the blocks before it", geometry.data_blocks()),
        });
    }
    Ok(Located::Present(VerityData { superblock, geometry }))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::error::{Class, Classified};

    fn why(file: &File) -> VerityError {
        locate(file).and_then(Located::required).unwrap_err()
    }

    #[test]
    fn each_rule_has_a_file_that_breaks_it() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(why(&file), VerityError::UnknownImage { .. }));
        file.set_len(8192).unwrap();
        assert!(matches!(why(&file), VerityError::UnknownImage { .. }));
        file.write_all_at(b"hsqs", 0).unwrap();
        file.write_all_at(&[4, 0, 0, 0], 28).unwrap();
        file.write_all_at(&5000u64.to_le_bytes(), 40).unwrap();
        assert!(matches!(why(&file), VerityError::Missing { data_bytes: 8192 }));
        file.set_len(4096).unwrap();
        assert!(matches!(why(&file), VerityError::FileSize { found: 4096, expected: 8192, .. }));
        // The last block may be cut short: mksquashfs -nopad.
        file.set_len(5000).unwrap();
        assert!(matches!(locate(&file), Ok(Located::Absent { image_bytes: 5000, .. })));
        // Two data blocks, the superblock, one block of hashes.
        file.set_len(12288).unwrap();
        assert!(matches!(why(&file), VerityError::FileSize { found: 12288, expected: 16384, .. }));
        file.set_len(16384).unwrap();
        assert!(matches!(locate(&file), Ok(Located::Absent { image_bytes: 8192, .. })));
        assert!(matches!(why(&file), VerityError::Superblock { field: "signature", .. }));
        let superblock = Superblock { uuid: [0; 16], salt: vec![7; 32], data_blocks: 3 };
        file.write_all_at(&superblock.to_block(), 8192).unwrap();
        assert!(matches!(why(&file), VerityError::Superblock { field: "data_blocks", .. }));
        let superblock = Superblock { data_blocks: 2, ..superblock };
        file.write_all_at(&superblock.to_block(), 8192).unwrap();
        let found = locate(&file).and_then(Located::required).unwrap();
        assert_eq!((found.superblock, found.geometry.file_bytes()), (superblock, 16384));
        file.write_all_at(&u64::MAX.to_le_bytes(), 40).unwrap();
        assert!(matches!(why(&file), VerityError::DataSize { .. }));
    }

    #[test]
    fn the_file_ends_with_the_tree() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16384).unwrap();
        file.write_all_at(b"hsqs", 0).unwrap();
        file.write_all_at(&8192u64.to_le_bytes(), 40).unwrap();
        let superblock = Superblock { uuid: [0; 16], salt: vec![7; 32], data_blocks: 2 };
        file.write_all_at(&superblock.to_block(), 8192).unwrap();
        assert!(matches!(locate(&file), Ok(Located::Present(_))));
        for bytes in [16385, 16384 + 4096, 1 << 30, 16383, 12288, 8200] {
            file.set_len(bytes).unwrap();
            let error = locate(&file).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "the image file has {bytes} bytes, expected 16384 (data, verity superblock and tree)"
                )
            );
            assert_eq!(error.class(), Class::Verification);
            // The truncated part is restored as zeros.
            file.set_len(16384).unwrap();
            file.write_all_at(&superblock.to_block(), 8192).unwrap();
        }
    }
}
