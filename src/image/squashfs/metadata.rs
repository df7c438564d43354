//! Metadata blocks: how they are read, kept, and walked.
//!
//! ```text
//! header (2 bytes, little-endian): bit 15 set: stored as it is; bits 0..14: size on disk, 1..8192
//! that many bytes, which decode to 1..8192 bytes; to 8192 unless the block is the last of its table
//! next header ...
//! ```
//!
//! A structure may begin in one block and end in the next. The next block begins where the one
//! before ends, so a walk moves strictly forward and ends at the end of its table. A block that is
//! not full and is not the last one is an error: no other writer makes it, and it keeps the
//! relation between a position in the decoded table and the number of its block.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::compress::{Compressor, Scratch, with_scratch};
use super::error::corrupt;
use super::superblock::field;
use crate::image::{LayerError, Source};

/// Size of a full metadata block when it is decoded, in bytes.
pub const METADATA_BYTES: usize = 8192;

/// Size of a header, in bytes.
const HEADER_BYTES: u64 = 2;

/// The unit in which a verified source reads, in bytes.
const PAGE_BYTES: u64 = 4096;

/// Bit of a header: the block is stored as it is.
const STORED: u16 = 1 << 15;

/// Number of blocks in a set of the cache. Their keys fit in four cache lines.
const WAYS: usize = 32;

/// A part of the image in which metadata blocks lie one after the other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Region {
    /// The name that errors give to it.
    pub table: &'static str,
    /// Offset in the image of the first block, in bytes.
    pub start: u64,
    /// Offset in the image where the last block ends, or a bound on it.
    pub end: u64,
}

/// A decoded block.
#[derive(Debug, Clone)]
pub(super) struct Block {
    /// The content: 1 to 8192 bytes.
    pub data: Arc<[u8]>,
    /// Offset in the image where the next block begins, in bytes.
    pub next: u64,
}

/// A set of the cache: at most [`WAYS`] blocks, replaced by the clock algorithm.
#[derive(Default)]
struct Set {
    keys: Vec<u64>,
    blocks: Vec<Block>,
    /// Bit N: block N was used since the hand last passed.
    used: u32,
    hand: usize,
}

/// The decoded metadata blocks of an image, found by their offset in the image.
///
/// Each set has a lock of its own, held for the time of a look-up only. Two threads that miss the same block at the
/// same time both decode it, which takes less time than to wake a thread that waits.
pub(super) struct Cache {
    sets: Box<[Mutex<Set>]>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the locks guard is whole between any two statements that can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cache {
    /// A cache that holds at most about `bytes` bytes of blocks (and at least one set of 256 KiB).
    pub fn new(bytes: usize) -> Cache {
        let sets = (bytes / (METADATA_BYTES * WAYS)).max(1);
        Cache { sets: (0..sets).map(|_| Mutex::default()).collect() }
    }

    fn set(&self, at: u64) -> &Mutex<Set> {
        // Fibonacci hashing: the high bits of the product depend on all bits of the key.
        let hash = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        &self.sets[(hash as usize) % self.sets.len()]
    }

    fn get(&self, at: u64) -> Option<Block> {
        let mut set = lock(self.set(at));
        let way = set.keys.iter().position(|&key| key == at)?;
        set.used |= 1 << way;
        set.blocks.get(way).cloned()
    }

    fn put(&self, at: u64, block: Block) {
        let mut set = lock(self.set(at));
        let set = &mut *set;
        if set.keys.contains(&at) {
            return;
        }
        if set.keys.len() < WAYS {
            set.keys.push(at);
            set.blocks.push(block);
            return;
        }
        while set.used & (1 << set.hand) != 0 {
            set.used &= !(1 << set.hand);
            set.hand = (set.hand + 1) % WAYS;
        }
        set.keys[set.hand] = at;
        set.blocks[set.hand] = block;
        set.hand = (set.hand + 1) % WAYS;
    }

    /// How many bytes the blocks in the cache have.
    pub fn bytes(&self) -> usize {
        self.sets.iter().map(|set| lock(set).blocks.iter().map(|block| block.data.len()).sum::<usize>()).sum()
    }
}

/// Reads metadata blocks of one image.
pub(super) struct Metadata {
    pub source: Arc<dyn Source>,
    pub compressor: Compressor,
    pub cache: Cache,
}

impl Metadata {
    /// The block of `region` whose header is at `at` in the image.
    pub fn block(&self, region: &Region, at: u64) -> Result<Block, LayerError> {
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
        // Most blocks are shorter than a block of the verity data below, and are read in one go. No read goes
        // beyond what is needed: what is broken there does not matter here.
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

    /// A cursor at byte `offset` of the decoded block of `region` at `at`.
    pub fn cursor(&self, region: Region, at: u64, offset: usize) -> Result<Cursor<'_>, LayerError> {
        let block = self.block(&region, at)?;
        if offset >= block.data.len() {
            let why = format!("offset {offset} in a metadata block of {} bytes", block.data.len());
            return Err(corrupt(region.table, at, why));
        }
        Ok(Cursor { metadata: self, region, block, at, offset })
    }
}

/// A place in the decoded bytes of a table.
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
    /// Where the next byte is.
    pub fn position(&self) -> Position {
        Position { at: self.at, offset: self.offset }
    }

    /// An error about the structure at this place.
    pub fn corrupt(&self, why: impl Into<String>) -> LayerError {
        corrupt(
            self.region.table,
            self.at,
            format!("{} (byte {} of the metadata block)", why.into(), self.offset),
        )
    }

    /// Goes to another place in the same table.
    pub fn jump(&mut self, to: Position) -> Result<(), LayerError> {
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

    /// What is left of the block, or the whole next block where nothing is left; never empty.
    #[inline]
    pub fn rest(&mut self) -> Result<&[u8], LayerError> {
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

    /// Goes over `len` bytes of what `rest` answered; `len` is at most the length of that.
    #[inline]
    pub fn consume(&mut self, len: usize) {
        self.offset = (self.offset + len).min(self.block.data.len());
    }

    /// Fills `out` with the next bytes.
    #[inline]
    pub fn read(&mut self, out: &mut [u8]) -> Result<(), LayerError> {
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

    /// The next `N` bytes.
    #[inline]
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], LayerError> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    /// The next `len` bytes: where they lie, or put together in `buffer`, which has at least `len` bytes.
    #[inline]
    pub fn slice<'b>(&'b mut self, len: usize, buffer: &'b mut [u8]) -> Result<&'b [u8], LayerError> {
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
    pub fn append(&mut self, len: usize, out: &mut Vec<u8>) -> Result<(), LayerError> {
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

    /// Goes over the next `len` bytes.
    pub fn skip(&mut self, len: u64) -> Result<(), LayerError> {
        let mut left = len;
        while left > 0 {
            let now = (self.rest()?.len() as u64).min(left);
            self.consume(now as usize);
            left -= now;
        }
        Ok(())
    }
}

/// A place that is worth to be remembered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// What is there: the number of a block of the file, or the offset in the listing, in bytes.
    pub item: u64,
    /// Where it is.
    pub position: Position,
    /// Of a file: where in the image the data of that block begins.
    pub data: u64,
}

/// How many places are remembered of one file or folder, at the most.
pub(super) const PLACES: u64 = 2048;

/// Number of sets of [`Places`], and of files in each.
const PLACE_SETS: usize = 8;
const PLACE_WAYS: usize = 4;

/// Places in the block lists of large files and in the listings of large folders, so that what was walked
/// once is not walked again from its start.
///
/// At most 8 x 4 nodes with [`PLACES`] places of 32 bytes each: 2 MiB. It changes how fast an answer is, never the answer.
#[derive(Default)]
pub(super) struct Places {
    sets: [Mutex<PlaceSet>; PLACE_SETS],
}

#[derive(Default)]
struct PlaceSet {
    nodes: Vec<(u64, Vec<Place>)>,
    next: usize,
}

impl Places {
    fn set(&self, node: u64) -> &Mutex<PlaceSet> {
        &self.sets[(node.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61) as usize % PLACE_SETS]
    }

    /// The last place of that node at or before `item`.
    pub fn before(&self, node: u64, item: u64) -> Option<Place> {
        let set = lock(self.set(node));
        let (_, places) = set.nodes.iter().find(|(id, _)| *id == node)?;
        let count = places.partition_point(|place| place.item <= item);
        places.get(count.checked_sub(1)?).copied()
    }

    /// Remembers places of that node, in rising order; those that are not after the ones known are left out.
    pub fn remember(&self, node: u64, found: &[Place]) {
        if found.is_empty() {
            return;
        }
        let mut set = lock(self.set(node));
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

    fn block(byte: u8) -> Block {
        Block { data: Arc::from(vec![byte; METADATA_BYTES]), next: 0 }
    }

    #[test]
    fn cache_is_bounded_and_finds_what_it_holds() {
        let cache = Cache::new(1 << 20);
        for at in 0..10_000u64 {
            cache.put(at * 777, block(at as u8));
            assert_eq!(cache.get(at * 777).unwrap().data[0], at as u8);
        }
        assert!(cache.bytes() <= 1 << 20, "{} bytes", cache.bytes());
        assert!(cache.bytes() > 900 << 10, "{} bytes", cache.bytes());
    }

    #[test]
    fn a_used_block_outlives_unused_ones() {
        let cache = Cache::new(0);
        cache.put(1, block(1));
        for at in 2..500 {
            cache.put(at, block(0));
            assert!(cache.get(1).is_some(), "lost after {at}");
        }
        assert!(cache.get(2).is_none());
    }

    #[test]
    fn places_are_bounded_and_sorted() {
        let places = Places::default();
        let place = |item| Place { item, position: Position { at: item, offset: 0 }, data: 0 };
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
            let set = lock(set);
            (nodes + set.nodes.len(), kept + set.nodes.iter().map(|(_, places)| places.len()).sum::<usize>())
        });
        assert!(nodes <= PLACE_SETS * PLACE_WAYS && kept <= nodes * PLACES as usize);
    }
}
