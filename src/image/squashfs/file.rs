//! Locates the content of files.
//!
//! ```text
//! block list  u32 for each block of the file: bits 0..23 size on disk in bytes, bit 24: not compressed;
//!             0: a hole, nothing on disk. The blocks lie one after the other from the file's data start.
//! end         where the inode names a fragment: the bytes after the last whole block
//! ```
//!
//! A block's offset is the sum of the sizes of the blocks before it. The list of a small file is summed each
//! time. For a large file, positions are cached during the walk.

use super::error::corrupt;
use super::inode::{self, Data, File, NONE};
use super::metadata::{CachedPosition, Cursor, PLACES};
use super::{NodeId, Squashfs};
use crate::image::fields::{u32_at, u64_at};
use crate::image::layer::{BlockId, Extent, Place};
use crate::image::{LayerError, ReadError};

/// The name of a block of a file in errors.
pub(super) const TABLE: &str = "data block";

/// The name of a fragment block in errors.
pub(super) const FRAGMENT_TABLE: &str = "fragment block";

/// Bit of a size word: the block is not compressed.
pub const STORED: u32 = 1 << 24;

/// Bits of a size word that hold the size on disk.
pub(super) const SIZE_MASK: u32 = STORED - 1;

/// Bit that this reader sets in the size word of a fragment block, whose decoded length may be less than
/// `decoded_max`. In the format the bit is 0.
pub(super) const FRAGMENT: u32 = 1 << 31;

/// Block lists up to this length are always walked from their start.
const SMALL_BLOCKS: u64 = 1024;

impl File {
    /// Number of blocks in the list.
    pub(super) fn blocks(&self, block_log: u16) -> u64 {
        if self.fragment == NONE { self.size.div_ceil(1 << block_log) } else { self.size >> block_log }
    }

    /// Size of the part in a fragment, in bytes.
    pub(super) fn tail_bytes(&self, block_log: u16) -> u32 {
        if self.fragment == NONE { 0 } else { (self.size & ((1 << block_log) - 1)) as u32 }
    }
}

/// Walks a block list.
pub(super) struct BlockList<'a> {
    cursor: Cursor<'a>,
    /// Number of the next block.
    index: u64,
    /// Number of blocks in the list.
    count: u64,
    /// Offset in the image of the data of the next block.
    data: u64,
}

impl BlockList<'_> {
    fn out_of_range(&self, word: u32) -> LayerError {
        self.cursor
            .corrupt(format!("size word of block {} is {word:#x}, expected bits 25 to 31 clear", self.index))
    }

    /// Advances to block `index`, and collects a position after each `step` blocks.
    fn go_to(&mut self, index: u64, step: u64, places: &mut Vec<CachedPosition>) -> Result<(), LayerError> {
        while self.index < index {
            // Positions are always at multiples of `step`.
            let stop = (self.index / step + 1).saturating_mul(step).min(index);
            self.skip(stop - self.index)?;
            if self.index.is_multiple_of(step) {
                places.push(CachedPosition {
                    item: self.index,
                    position: self.cursor.position(),
                    data: self.data,
                });
            }
        }
        Ok(())
    }

    /// Skips `count` blocks.
    fn skip(&mut self, count: u64) -> Result<(), LayerError> {
        let mut left = count;
        while left > 0 {
            let rest = self.cursor.rest()?;
            let here = (rest.len() as u64 / 4).min(left);
            if here == 0 {
                // The word spans two blocks of the table.
                self.next()?;
                left -= 1;
                continue;
            }
            let words = rest.get(..here as usize * 4).unwrap_or_default().chunks_exact(4);
            let (mut sum, mut all) = (0u64, 0u32);
            for word in words {
                let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                sum += u64::from(word & SIZE_MASK);
                all |= word;
            }
            if all & !(STORED | SIZE_MASK) != 0 {
                return Err(self.out_of_range(all));
            }
            self.cursor.consume(here as usize * 4);
            self.index += here;
            self.advance(sum)?;
            left -= here;
        }
        Ok(())
    }

    fn advance(&mut self, bytes: u64) -> Result<(), LayerError> {
        self.data = self.data.checked_add(bytes).ok_or_else(|| {
            self.cursor.corrupt("the blocks of a file end beyond 2^64, expected within the image")
        })?;
        Ok(())
    }

    /// Returns the size word of the next block and the offset of its data, and advances past it.
    pub(super) fn next(&mut self) -> Result<(u32, u64), LayerError> {
        let word = u32::from_le_bytes(self.cursor.array()?);
        if word & !(STORED | SIZE_MASK) != 0 {
            return Err(self.out_of_range(word));
        }
        let start = self.data;
        self.index += 1;
        self.advance((word & SIZE_MASK).into())?;
        Ok((word, start))
    }

    /// Returns how many blocks from here on are holes, as far as known without reading more of the table; at
    /// most `max`.
    fn holes(&mut self, max: u64) -> Result<u64, LayerError> {
        let max = max.min(self.count - self.index);
        if max == 0 {
            return Ok(0);
        }
        let rest = self.cursor.rest()?;
        let words = (rest.len() / 4).min(usize::try_from(max).unwrap_or(usize::MAX));
        Ok(rest.chunks_exact(4).take(words).take_while(|word| *word == [0; 4]).count() as u64)
    }
}

impl Squashfs {
    pub(super) fn file(&self, node: NodeId) -> Result<(File, Cursor<'_>), LayerError> {
        let (inode, cursor) = self.inode(node)?;
        match inode.data {
            Data::File(file) => Ok((file, cursor)),
            _ => Err(LayerError::WrongType { node }),
        }
    }

    /// Returns the block list of a file; the cursor must be at it.
    pub(super) fn block_list<'a>(
        &self,
        file: &File,
        cursor: Cursor<'a>,
    ) -> Result<BlockList<'a>, LayerError> {
        let count = file.blocks(self.superblock.block_log);
        // A list that does not fit in the rest of the table is refused before it is walked.
        let left = self.superblock.directory_table.saturating_sub(cursor.position().at);
        let most = (left / 3 + 1).saturating_mul(super::METADATA_BYTES as u64 / 4);
        if count > most {
            return Err(cursor.corrupt(format!(
                "a file of {} bytes has {count} blocks, expected at most the {most} that fit in the table",
                file.size
            )));
        }
        Ok(BlockList { cursor, index: 0, count, data: file.start })
    }

    /// Returns the extent that holds the byte at `offset` of a file.
    pub(super) fn find_extent(&self, node: NodeId, offset: u64) -> Result<Extent, LayerError> {
        let (file, cursor) = self.file(node)?;
        if offset >= file.size {
            return Err(ReadError::OutOfRange { offset, len: 1, size: file.size }.into());
        }
        let log = self.superblock.block_log;
        let index = offset >> log;
        let blocks = file.blocks(log);
        if index >= blocks {
            return self.tail(&file);
        }
        let mut list = self.block_list(&file, cursor)?;
        if blocks <= SMALL_BLOCKS {
            list.skip(index)?;
        } else {
            if let Some(place) = self.places.before(node.0, index) {
                list.cursor.jump(place.position)?;
                list.index = place.item;
                list.data = place.data;
            }
            let step = (blocks / PLACES + 1).max(SMALL_BLOCKS / 2);
            let mut places = Vec::new();
            let result = list.go_to(index, step, &mut places);
            self.places.remember(node.0, &places);
            result?;
        }
        let (word, start) = list.next()?;
        let file_offset = index << log;
        if word == 0 {
            let max = u64::from(u32::MAX >> log) - 1;
            let holes = 1 + list.holes(max)?;
            let len = (file.size - file_offset).min(holes << log);
            return Ok(Extent { file_offset, len: len as u32, place: Place::Hole });
        }
        let len = (file.size - file_offset).min(1 << log) as u32;
        let block = self.stored(TABLE, start, word, len)?;
        Ok(Extent { file_offset, len, place: Place::Block(block) })
    }

    /// Returns the extent of a file that is in a fragment block.
    pub(super) fn tail(&self, file: &File) -> Result<Extent, LayerError> {
        let log = self.superblock.block_log;
        let len = file.tail_bytes(log);
        let fits =
            file.fragment_offset.checked_add(len).is_some_and(|end| end <= self.superblock.block_bytes);
        if !fits {
            return Err(corrupt(
                inode::TABLE,
                self.superblock.inode_table,
                format!(
                    "{len} bytes at {} of fragment block {}, expected within {} bytes",
                    file.fragment_offset, file.fragment, self.superblock.block_bytes
                ),
            ));
        }
        let block = self.fragment(file.fragment)?;
        let place = Place::Shared { block, offset: file.fragment_offset };
        Ok(Extent { file_offset: file.size >> log << log, len, place })
    }

    /// Returns a fragment block by its number.
    pub(super) fn fragment(&self, number: u32) -> Result<BlockId, LayerError> {
        let entry: [u8; 16] = self.fragments.entry(&self.metadata, number)?;
        let word = u32_at(&entry, 8);
        if word & !(STORED | SIZE_MASK) != 0 {
            let why =
                format!("size word of fragment block {number} is {word:#x}, expected bits 25 to 31 clear");
            return Err(corrupt(self.fragments.name, self.fragments.pointers_at, why));
        }
        let block = self.stored(FRAGMENT_TABLE, u64_at(&entry, 0), word, self.superblock.block_bytes)?;
        Ok(BlockId { size_word: word | FRAGMENT, ..block })
    }

    /// Returns a stored block of a file, after checking that its position and size are possible.
    pub(super) fn stored_block(&self, start: u64, word: u32, len: u32) -> Result<BlockId, LayerError> {
        self.stored(TABLE, start, word, len)
    }

    /// Returns a stored block, after checking that its position and size are possible.
    fn stored(
        &self,
        table: &'static str,
        start: u64,
        word: u32,
        decoded_max: u32,
    ) -> Result<BlockId, LayerError> {
        let size = word & SIZE_MASK;
        let end = start.saturating_add(size.into());
        if start < super::SUPERBLOCK_BYTES as u64 || end > self.superblock.inode_table {
            let why = format!(
                "{size} bytes at {start}, expected within 96 to {}, where the inode table starts",
                self.superblock.inode_table
            );
            return Err(corrupt(table, start, why));
        }
        check_size(table, start, word, decoded_max, self.superblock.block_bytes)?;
        Ok(BlockId { start, size_word: word, decoded_max })
    }

    /// Reads and decodes a stored block.
    pub(super) fn decode_block(&self, block: BlockId, out: &mut Vec<u8>) -> Result<(), LayerError> {
        let fragment = block.size_word & FRAGMENT != 0;
        let word = block.size_word & !FRAGMENT;
        let table = if fragment { FRAGMENT_TABLE } else { TABLE };
        let max = block.decoded_max.min(self.superblock.block_bytes);
        check_size(table, block.start, word, max, self.superblock.block_bytes)?;
        super::compress::with_scratch(|scratch| {
            let bytes =
                self.metadata.source.read(block.start, (word & SIZE_MASK) as usize, &mut scratch.input)?;
            if word & STORED != 0 {
                out.clear();
                out.extend_from_slice(bytes);
                return Ok(());
            }
            scratch
                .codecs
                .decompress(self.superblock.compressor, bytes, out, max as usize)
                .map_err(|why| corrupt(table, block.start, why))
        })?;
        let right = if fragment { !out.is_empty() } else { out.len() == max as usize };
        if !right {
            let why = format!("decodes to {} bytes, expected {max}", out.len());
            out.clear();
            return Err(corrupt(table, block.start, why));
        }
        Ok(())
    }
}

/// Checks the size on disk of a block. A block that does not compress is stored uncompressed, so no block is
/// larger than the block size, and the size of an uncompressed block is its decoded size.
fn check_size(
    table: &'static str,
    start: u64,
    word: u32,
    decoded_max: u32,
    block_bytes: u32,
) -> Result<(), LayerError> {
    let size = word & SIZE_MASK;
    let most = if word & STORED != 0 { decoded_max } else { block_bytes };
    if size == 0 || size > most || word & !(STORED | SIZE_MASK) != 0 {
        return Err(corrupt(
            table,
            start,
            format!("takes {size} bytes (size word {word:#x}), expected 1 to {most}"),
        ));
    }
    Ok(())
}
