//! The layout of an image file: arithmetic on the number of data blocks alone.

use super::{BLOCK_BYTES, HASHES_PER_BLOCK, VerityError};

/// The most data blocks that are accepted: 2^50, or 4 EiB. Within this bound no offset in a file overflows.
pub const MAX_DATA_BLOCKS: u64 = 1 << 50;

/// One level of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level {
    /// Its first block, counted from the start of the image file.
    pub first_block: u64,
    /// How many blocks it has; never 0.
    pub blocks: u64,
}

/// The layout of an image file with verity data (see the module [`super`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    data_blocks: u64,
    levels: Vec<Level>,
}

impl Geometry {
    /// Returns the geometry for a data area of this size in bytes.
    ///
    /// # Errors
    /// [`VerityError::DataSize`] unless it is 1 to [`MAX_DATA_BLOCKS`] whole blocks.
    pub fn new(data_bytes: u64) -> Result<Self, VerityError> {
        let data_blocks = data_bytes / BLOCK_BYTES as u64;
        if !data_bytes.is_multiple_of(BLOCK_BYTES as u64) || !(1..=MAX_DATA_BLOCKS).contains(&data_blocks) {
            return Err(VerityError::DataSize { found: data_bytes });
        }
        // Sizes from level 0 up to the one that has a single block. At most eight levels.
        let sizes: Vec<u64> = std::iter::successors(Some(data_blocks), |&below| {
            (below > 1).then(|| below.div_ceil(HASHES_PER_BLOCK as u64))
        })
        .skip(1)
        .collect();
        // Positions from the top down, after the superblock. The sum stays below 2^51 blocks.
        let mut next = data_blocks + 1;
        let mut levels: Vec<Level> = sizes
            .iter()
            .rev()
            .map(|&blocks| {
                let level = Level { first_block: next, blocks };
                next += blocks;
                level
            })
            .collect();
        levels.reverse();
        Ok(Self { data_blocks, levels })
    }

    /// Returns the geometry of an image file of this size in bytes, if a file with verity data can have it.
    pub fn of_file(file_bytes: u64) -> Option<Self> {
        // The size grows with the number of data blocks: the tree is at most 1/127 of it.
        let (mut low, mut high) = (1, (file_bytes / BLOCK_BYTES as u64).min(MAX_DATA_BLOCKS));
        while low < high {
            let middle = low + (high - low) / 2;
            let found = Self::new(middle * BLOCK_BYTES as u64).ok()?;
            if found.file_bytes() < file_bytes { low = middle + 1 } else { high = middle }
        }
        Self::new(low * BLOCK_BYTES as u64).ok().filter(|found| found.file_bytes() == file_bytes)
    }

    /// Number of data blocks; never 0.
    pub fn data_blocks(&self) -> u64 {
        self.data_blocks
    }

    /// Size of the data area in bytes; the superblock begins there.
    pub fn data_bytes(&self) -> u64 {
        self.data_blocks * BLOCK_BYTES as u64
    }

    /// The levels of the tree; the first one is level 0, directly above the data, and the last one is the
    /// top. Empty if there is a single data block.
    pub fn levels(&self) -> &[Level] {
        &self.levels
    }

    /// Number of blocks of the tree, all levels together.
    pub fn tree_blocks(&self) -> u64 {
        self.levels.iter().map(|level| level.blocks).sum()
    }

    /// Size of the image file in bytes: data, superblock and tree.
    pub fn file_bytes(&self) -> u64 {
        (self.data_blocks + 1 + self.tree_blocks()) * BLOCK_BYTES as u64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blocks(count: u64) -> Geometry {
        Geometry::new(count * 4096).unwrap()
    }

    #[test]
    fn the_levels_at_their_edges() {
        let sizes = |count| blocks(count).levels().iter().map(|level| level.blocks).collect::<Vec<_>>();
        assert!(sizes(1).is_empty());
        assert_eq!(sizes(2), [1]);
        assert_eq!(sizes(128), [1]);
        assert_eq!(sizes(129), [2, 1]);
        assert_eq!(sizes(16384), [128, 1]);
        assert_eq!(sizes(16385), [129, 2, 1]);
        assert_eq!(sizes(MAX_DATA_BLOCKS).len(), 8);
        assert_eq!(blocks(129).levels()[1], Level { first_block: 130, blocks: 1 });
        assert_eq!(blocks(129).levels()[0], Level { first_block: 131, blocks: 2 });
        assert_eq!(blocks(129).file_bytes(), 133 * 4096);
        assert_eq!(blocks(1).file_bytes(), 2 * 4096);
    }

    #[test]
    fn a_file_tells_its_geometry() {
        for count in [1, 2, 3, 127, 128, 129, 130, 16384, 16385, 1 << 30] {
            let expected = blocks(count);
            assert_eq!(Geometry::of_file(expected.file_bytes()), Some(expected.clone()), "{count}");
            assert_eq!(Geometry::of_file(expected.file_bytes() + 1), None, "{count}");
        }
        // No number of data blocks yields these: with 129 there are two more blocks than with 128.
        for bytes in [0, 1, 4096, 4097, 131 * 4096, 132 * 4096, u64::MAX] {
            assert_eq!(Geometry::of_file(bytes), None, "{bytes}");
        }
    }

    #[test]
    fn sizes_that_make_no_sense() {
        for bytes in [0, 1, 4095, 4097, u64::MAX, u64::MAX - 4095, (MAX_DATA_BLOCKS + 1) * 4096] {
            assert!(
                matches!(Geometry::new(bytes), Err(VerityError::DataSize { found }) if found == bytes),
                "{bytes}"
            );
        }
    }

    proptest! {
        #[test]
        fn levels_lie_behind_one_another_and_hold_all_hashes(
            count in prop_oneof![1_u64..40_000, 1..=MAX_DATA_BLOCKS, (0_u32..50).prop_map(|bit| 1 << bit)],
        ) {
            let geometry = blocks(count);
            let mut next = count + 1;
            for level in geometry.levels().iter().rev() {
                prop_assert_eq!(level.first_block, next);
                next += level.blocks;
            }
            prop_assert_eq!(geometry.file_bytes(), next * 4096);
            prop_assert!(geometry.file_bytes() <= i64::MAX as u64);
            let mut below = count;
            for level in geometry.levels() {
                prop_assert!(below > 1);
                prop_assert!(level.blocks * 128 >= below && (level.blocks - 1) * 128 < below);
                below = level.blocks;
            }
            prop_assert_eq!(below, 1);
        }
    }
}
