//! Small numbers for inodes.
//!
//! An inode reference has 48 bits. The number of an inode is its place in the *decoded* inode table:
//! ```text
//! reference   offset of the metadata block in the table << 16 | offset in the decoded block
//! number      number of that block              * 8192        + offset in the decoded block
//! ```
//! All blocks but the last decode to 8192 bytes, so numbers do not collide, and a table of 100,000 files
//! has numbers below some 6 million. Where the blocks begin is found by one walk over their headers, when
//! the first number is needed: 4 bytes are kept for each block, of some 150 inodes.
//!
//! The numbers of the inodes themselves (1 to their count) would be smaller still, but lead back to an inode
//! only through an export table, which an image may lack.
//!
//! A table whose headers cannot be walked, or that is larger than [`TABLE_BYTES_MAX`], has its references for
//! numbers: all that is lost is that they fit 32 bits.

use super::metadata::METADATA_BYTES;
use super::{NodeId, Squashfs, error::corrupt, inode};
use crate::image::LayerError;
use crate::image::fields::u16_at;

/// The largest inode table that is walked, in bytes: some 20 million files.
const TABLE_BYTES_MAX: u64 = 256 << 20;

/// The most metadata blocks whose places are kept (4 bytes each).
const BLOCKS_MAX: usize = 1 << 20;

/// How much is read at a time, in bytes.
const PIECE_BYTES: u64 = 128 << 10;

/// A bit of the header of a metadata block: it is stored as it is.
const STORED: u16 = 1 << 15;

/// One past the largest inode reference.
const REFERENCES: u64 = 1 << 48;

/// Where the metadata blocks of the inode table begin, as offsets in it; `None` where that is not known.
pub(super) type BlockStarts = Option<Box<[u32]>>;

impl Squashfs {
    fn starts(&self) -> Option<&[u32]> {
        self.starts.get_or_init(|| self.walk_headers()).as_deref()
    }

    fn walk_headers(&self) -> BlockStarts {
        let (begin, end) = (self.superblock.inode_table, self.superblock.directory_table);
        if end - begin > TABLE_BYTES_MAX {
            return None;
        }
        let (mut starts, mut scratch) = (Vec::new(), Vec::new());
        let mut at = begin;
        while at < end {
            let length = PIECE_BYTES.min(end - at);
            let piece = self.metadata.source.read(at, length as usize, &mut scratch).ok()?;
            // The header of the last block may reach beyond the piece: the next piece begins with it.
            let mut within = 0usize;
            while let Some(header) = piece.get(within..within + 2) {
                let header = u16_at(header, 0);
                let size = usize::from(header & !STORED);
                if size == 0 || size > METADATA_BYTES || starts.len() == BLOCKS_MAX {
                    return None;
                }
                starts.push(u32::try_from(at - begin + within as u64).ok()?);
                within += 2 + size;
            }
            if within == 0 {
                // One byte is left, which is no header.
                return None;
            }
            at += within as u64;
        }
        (at == end).then(|| starts.into_boxed_slice())
    }

    pub(super) fn number_bound(&self) -> u64 {
        match self.starts() {
            Some(starts) => (starts.len() * METADATA_BYTES) as u64,
            None => REFERENCES,
        }
    }

    pub(super) fn number_of(&self, node: NodeId) -> Result<u64, LayerError> {
        let Some(starts) = self.starts() else { return Ok(node.0 & (REFERENCES - 1)) };
        let (start, offset) = (node.0 >> 16, node.0 & 0xffff);
        let block = u32::try_from(start).ok().and_then(|start| starts.binary_search(&start).ok());
        match block {
            Some(block) if offset < METADATA_BYTES as u64 => Ok((block * METADATA_BYTES) as u64 + offset),
            _ => {
                let at = self.superblock.inode_table.saturating_add(start);
                let why = format!("expected a metadata block at {start}, for the inode at {:#x}", node.0);
                Err(corrupt(inode::TABLE, at, why))
            }
        }
    }

    pub(super) fn node_of(&self, number: u64) -> Result<NodeId, LayerError> {
        let Some(starts) = self.starts() else { return Ok(NodeId(number)) };
        let (block, offset) = (number / METADATA_BYTES as u64, number % METADATA_BYTES as u64);
        match usize::try_from(block).ok().and_then(|block| starts.get(block)) {
            Some(start) => Ok(NodeId(u64::from(*start) << 16 | offset)),
            None => {
                let why = format!("number {number} is asked for, expected below {}", self.number_bound());
                Err(corrupt(inode::TABLE, self.superblock.inode_table, why))
            }
        }
    }
}
