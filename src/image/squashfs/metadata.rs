//! Reads, caches and walks metadata blocks.
//!
//! ```text
//! header (2 bytes, little-endian): bit 15 set: not compressed; bits 0..14: size on disk, 1..8192
//! that many bytes, which decode to 1..8192 bytes; to 8192 unless the block is the last of its table
//! next header ...
//! ```
//!
//! A structure may begin in one block and end in the next. The next block begins where the previous one ends,
//! so a walk moves strictly forward and ends at the end of its table. A block that is not full and not the
//! last one is an error: no writer makes one, and refusing it preserves the relation between a position in
//! the decoded table and the number of its block.

use std::sync::{Arc, Mutex};

use super::compress::{Compressor, Scratch, with_scratch};
use super::error::corrupt;
use crate::image::cache::Cache;
use crate::image::fields::field;
use crate::image::{LayerError, Source};
use crate::sys::locks;

/// Size of a full metadata block when it is decoded, in bytes.
pub const METADATA_BYTES: usize = 8192;

/// Size of a header, in bytes.
const HEADER_BYTES: u64 = 2;

/// The unit in which a verified source reads, in bytes.
const PAGE_BYTES: u64 = 4096;

/// Bit of a header: the block is not compressed.
pub const STORED: u16 = 1 << 15;

/// A part of the image that consists of consecutive metadata blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Region {
    /// Its name in errors.
    pub table: &'static str,
    /// Offset in the image of the first block, in bytes.
    pub start: u64,
    /// Offset in the image of the end of the last block, or an upper bound.
    pub end: u64,
}

/// A decoded block.
#[derive(Debug, Clone)]
pub(super) struct Block {
    /// The content: 1 to 8192 bytes.
    pub data: Arc<[u8]>,
    /// Offset in the image of the next block, in bytes.
    pub next: u64,
}

/// Reads metadata blocks of one image.
pub(super) struct Metadata {
    pub source: Arc<dyn Source>,
    pub compressor: Compressor,
    /// The decoded blocks, by their offset in the image.
    pub cache: Cache<Block>,
}

impl Metadata {
    /// Returns the block of `region` whose header is at `at` in the image.
    pub(super) fn block(&self, region: &Region, at: u64) -> Result<Block, LayerError> {
        let out_of_table = |end: u64| {
            let Region { start, end: limit, .. } = region;
            let why = format!("a metadata block at {at} to {end}, expected within {start} to {limit}");
            Err(corrupt(region.table, at, why))
        };
        // The smallest block has a header and one byte.
        if at < region.start || at >= region.end || region.end - at < 3 {
            return out_of_table(at.saturating_add(3));
        }
        let block = match self.cache.get(at) {
            Some(block) => block,
            None => {
                let block = with_scratch(|scratch| self.load(region, at, scratch))?;
                self.cache.put(at, block.clone());
                block
            }
        };
        if block.next > region.end { out_of_table(block.next) } else { Ok(block) }
    }

    fn load(&self, region: &Region, at: u64, scratch: &mut Scratch) -> Result<Block, LayerError> {
        let Scratch { input, metadata, codecs } = scratch;
        // Most blocks are shorter than a verity data block and are read at once. No read goes beyond the
        // bytes needed, so damage after them does not matter here.
        let room = (METADATA_BYTES as u64 + HEADER_BYTES).min(region.end - at);
        let mut page = PAGE_BYTES - at % PAGE_BYTES;
        if page < HEADER_BYTES {
            page += PAGE_BYTES;
        }
        let mut bytes = self.source.read(at, page.min(room) as usize, input)?;
        let header = u16::from_le_bytes(field(bytes, 0));
        let size = usize::from(header & !STORED);
        let end = size + HEADER_BYTES as usize;
        if size == 0 || size > METADATA_BYTES || end as u64 > room {
            let why = format!("a metadata block of {size} bytes, expected 1 to {}", room - HEADER_BYTES);
            return Err(corrupt(region.table, at, why));
        }
        if bytes.len() < end {
            bytes = self.source.read(at, end, input)?;
        }
        let stored = bytes.get(HEADER_BYTES as usize..end).unwrap_or_default();
        let data: Arc<[u8]> = if header & STORED != 0 {
            Arc::from(stored)
        } else {
            codecs
                .decompress(self.compressor, stored, metadata, METADATA_BYTES)
                .map_err(|why| corrupt(region.table, at, why))?;
            if metadata.is_empty() {
                return Err(corrupt(
                    region.table,
                    at,
                    "a metadata block decodes to nothing, expected 1 to 8192 bytes",
                ));
            }
            Arc::from(metadata.as_slice())
        };
        Ok(Block { data, next: at + end as u64 })
    }

    /// Returns a cursor at byte `offset` of the decoded block of `region` at `at`.
    pub(super) fn cursor(&self, region: Region, at: u64, offset: usize) -> Result<Cursor<'_>, LayerError> {
        let block = self.block(&region, at)?;
        if offset >= block.data.len() {
            let why = format!("offset {offset} in a metadata block of {} bytes", block.data.len());
            return Err(corrupt(region.table, at, why));
        }
        Ok(Cursor { metadata: self, region, block, at, offset })
    }
}

/// A position in the decoded bytes of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    /// Offset of the block's header in the image, in bytes.
    pub at: u64,
    /// Offset in the decoded block, in bytes; at most 8192, where it means the start of the next block.
    pub offset: usize,
}

/// Reads the decoded bytes of a table in order.
pub(super) struct Cursor<'a> {
    metadata: &'a Metadata,
    region: Region,
    block: Block,
    at: u64,
    offset: usize,
}

impl Cursor<'_> {
    /// Returns the position of the next byte.
    pub(super) fn position(&self) -> Position {
        Position { at: self.at, offset: self.offset }
    }

    /// Returns an error about the structure at this position.
    pub(super) fn corrupt(&self, why: impl Into<String>) -> LayerError {
        corrupt(
            self.region.table,
            self.at,
            format!("{} (byte {} of the metadata block)", why.into(), self.offset),
        )
    }

    /// Moves to another position in the same table.
    pub(super) fn jump(&mut self, to: Position) -> Result<(), LayerError> {
        if to.at != self.at {
            self.block = self.metadata.block(&self.region, to.at)?;
            self.at = to.at;
        }
        if to.offset > self.block.data.len() {
            return Err(self.corrupt(format!("offset {} is beyond the metadata block", to.offset)));
        }
        self.offset = to.offset;
        Ok(())
    }

    /// Returns the rest of the block, or the whole next block if nothing is left; never empty.
    #[inline]
    pub(super) fn rest(&mut self) -> Result<&[u8], LayerError> {
        if self.offset >= self.block.data.len() {
            self.next_block()?;
        }
        Ok(self.block.data.get(self.offset..).unwrap_or_default())
    }

    fn next_block(&mut self) -> Result<(), LayerError> {
        let len = self.block.data.len();
        if len != METADATA_BYTES {
            return Err(corrupt(
                self.region.table,
                self.at,
                format!(
                    "a structure goes on after a metadata block of {len} bytes, expected {METADATA_BYTES} in any but the last"
                ),
            ));
        }
        let next = self.block.next;
        self.block = self.metadata.block(&self.region, next)?;
        self.at = next;
        self.offset = 0;
        Ok(())
    }

    /// Advances by `len` bytes of what `rest` returned; `len` is at most the length of that.
    #[inline]
    pub(super) fn consume(&mut self, len: usize) {
        self.offset = (self.offset + len).min(self.block.data.len());
    }

    /// Fills `out` with the next bytes.
    #[inline]
    pub(super) fn read(&mut self, out: &mut [u8]) -> Result<(), LayerError> {
        if let Some(bytes) = self.block.data.get(self.offset..self.offset + out.len()) {
            out.copy_from_slice(bytes);
            self.offset += out.len();
            return Ok(());
        }
        self.read_slowly(out)
    }

    fn read_slowly(&mut self, out: &mut [u8]) -> Result<(), LayerError> {
        let mut left = out;
        while !left.is_empty() {
            let rest = self.rest()?;
            let now = rest.len().min(left.len());
            let (first, more) = left.split_at_mut(now);
            first.copy_from_slice(&rest[..now]);
            self.consume(now);
            left = more;
        }
        Ok(())
    }

    /// Returns the next `N` bytes.
    #[inline]
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], LayerError> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    /// Returns the next `len` bytes: in place, or assembled in `buffer`, which has at least `len` bytes.
    #[inline]
    pub(super) fn slice<'b>(&'b mut self, len: usize, buffer: &'b mut [u8]) -> Result<&'b [u8], LayerError> {
        let from = self.offset;
        if from + len <= self.block.data.len() {
            self.offset += len;
            return Ok(self.block.data.get(from..from + len).unwrap_or_default());
        }
        let buffer = buffer.get_mut(..len).unwrap_or_default();
        self.read_slowly(buffer)?;
        Ok(buffer)
    }

    /// Appends the next `len` bytes to `out`. The caller has bounded `len`.
    pub(super) fn append(&mut self, len: usize, out: &mut Vec<u8>) -> Result<(), LayerError> {
        out.reserve_exact(len);
        let mut left = len;
        while left > 0 {
            let rest = self.rest()?;
            let now = rest.len().min(left);
            out.extend_from_slice(&rest[..now]);
            self.consume(now);
            left -= now;
        }
        Ok(())
    }

    /// Skips the next `len` bytes.
    pub(super) fn skip(&mut self, len: u64) -> Result<(), LayerError> {
        let mut left = len;
        while left > 0 {
            let now = (self.rest()?.len() as u64).min(left);
            self.consume(now as usize);
            left -= now;
        }
        Ok(())
    }
}

/// A position worth caching.
#[derive(Debug, Clone, Copy)]
pub(super) struct CachedPosition {
    /// The item at that position: the number of a block of the file, or the offset in the listing, in bytes.
    pub item: u64,
    /// The position in the table.
    pub position: Position,
    /// For a file: the offset in the image of the data of that block.
    pub data: u64,
}

/// Most positions cached for one file or folder.
pub(super) const PLACES: u64 = 2048;

/// Number of sets of [`Places`], and of files in each.
const PLACE_SETS: usize = 8;
const PLACE_WAYS: usize = 4;

/// Caches positions in the block lists of large files and in the listings of large folders, so that they are
/// not walked again from their start.
///
/// At most 8 x 4 nodes with [`PLACES`] places of 32 bytes each: 2 MiB. It affects only the speed, never the
/// result.
#[derive(Default)]
pub(super) struct Places {
    sets: [Mutex<PlaceSet>; PLACE_SETS],
}

#[derive(Default)]
struct PlaceSet {
    nodes: Vec<(u64, Vec<CachedPosition>)>,
    next: usize,
}

impl Places {
    fn set(&self, node: u64) -> &Mutex<PlaceSet> {
        &self.sets[(node.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61) as usize % PLACE_SETS]
    }

    /// Returns the last position of that node at or before `item`.
    pub(super) fn before(&self, node: u64, item: u64) -> Option<CachedPosition> {
        let set = locks::lock(self.set(node));
        let (_, places) = set.nodes.iter().find(|(id, _)| *id == node)?;
        let count = places.partition_point(|place| place.item <= item);
        places.get(count.checked_sub(1)?).copied()
    }

    /// Caches positions of that node, in ascending order; those not after the known ones are ignored.
    pub(super) fn remember(&self, node: u64, found: &[CachedPosition]) {
        if found.is_empty() {
            return;
        }
        let mut set = locks::lock(self.set(node));
        let set = &mut *set;
        let way = match set.nodes.iter().position(|(id, _)| *id == node) {
            Some(way) => way,
            None if set.nodes.len() < PLACE_WAYS => {
                set.nodes.push((node, Vec::new()));
                set.nodes.len() - 1
            }
            None => {
                let way = set.next % PLACE_WAYS;
                set.next = (way + 1) % PLACE_WAYS;
                set.nodes[way] = (node, Vec::new());
                way
            }
        };
        let places = &mut set.nodes[way].1;
        for place in found {
            if (places.len() as u64) < PLACES && places.last().is_none_or(|last| last.item < place.item) {
                places.push(*place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_sorted() {
        let places = Places::default();
        let place = |item| CachedPosition { item, position: Position { at: item, offset: 0 }, data: 0 };
        places.remember(7, &[place(10), place(20)]);
        places.remember(7, &[place(15), place(30)]);
        assert!(places.before(7, 9).is_none());
        assert_eq!(places.before(7, 19).unwrap().item, 10);
        assert_eq!(places.before(7, 1000).unwrap().item, 30);
        assert!(places.before(8, 1000).is_none());
        let many: Vec<_> = (0..2 * PLACES).map(place).collect();
        for node in 0..1000 {
            places.remember(node, &many);
        }
        let (nodes, kept) = places.sets.iter().fold((0, 0), |(nodes, kept), set| {
            let set = locks::lock(set);
            (nodes + set.nodes.len(), kept + set.nodes.iter().map(|(_, places)| places.len()).sum::<usize>())
        });
        assert!(nodes <= PLACE_SETS * PLACE_WAYS && kept <= nodes * PLACES as usize);
    }
}
