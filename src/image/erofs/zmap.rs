//! Which cluster holds a byte of a compressed file.
//!
//! A file is cut into logical clusters of equal size (a block, usually), and, independently, into extents,
//! each of which one stored cluster holds. An index has a row for each logical cluster; *head* rows say where
//! an extent begins in theirs and where it is stored, the other rows how far away the heads are.
//!
//! ```text
//! after inode and xattrs, aligned to 8 bytes: the header
//!   0 fragment offset u32, or 2 bytes of the inline cluster u16, or extents u32 (lower bits)
//!   4 advice u16   6 algorithms u8 (bits 0..3 of heads 1, 4..7 of heads 2)
//!   7 logical cluster u8 (log2, above that of blocks; bit 7: the other 63 bits are the offset of a fragment
//!     that is the whole file)                                   6..7 extents u16 (upper bits)
//!
//! full index, 8 bytes after the header, a row of 8 bytes
//!   advice u16 (bits 0..1 kind, 15 prefix), begin in the logical cluster u16,
//!   block u32 (a head), or rows back to the head u16 and on to the next head u16
//!
//! compact index, after the header, packs: 2 rows in 8 bytes, or 16 rows in 32 bytes if they start at a
//! multiple of 32 and the advice says so; rows of 16 or 14 bits, then a block u32
//!   a row: kind (upper 2 bits); of a head where it begins, else rows back to the head; of the last row of a
//!   pack: rows on to the next head. A head's block is the pack's, plus the blocks of the heads before it.
//!
//! extents, after the header, aligned to their size of 4, 8, 16 or 32 bytes
//!   stored bytes and code u32, offset u64 (8: its lower half; 4: only of the first extent),
//!   begin in the file u32 or u64; extents of 4 and 8 bytes are logical clusters
//! ```
//!
//! Kinds: 0 plain, 1 head of the first algorithm, 2 no head, 3 head of the second algorithm. Where clusters
//! have many blocks, the row after a head has bit 11 set and their number instead of the way back.
//!
//! # Invariants
//! Each step back or on from row to row moves strictly, and an extent spans at most [`DECODED_BYTES_MAX`]:
//! so no walk is longer than that.

use super::Erofs;
use super::codec::{Code, DECODED_BYTES_MAX, Stored};
use super::error::corrupt;
use super::inode::{Inode, Layout};
use super::superblock::STORED_BYTES_MAX;
use crate::image::LayerError;
use crate::image::fields::{u16_at, u32_at, u64_at};

/// The name of indexes in errors.
const TABLE: &str = "cluster index";

/// Size of the header, in bytes.
const HEADER_BYTES: u64 = 8;

/// Bit of the header: the whole file is a fragment.
const WHOLE_FRAGMENT: u64 = 1 << 63;

/// Advice: 2-byte rows.
const COMPACT_2B: u16 = 1;
/// Advice for a full index: it is made of extents.
const EXTENTS: u16 = 1;
/// Advice: clusters of many blocks, for heads of the first and of the second algorithm.
const BIG_1: u16 = 2;
const BIG_2: u16 = 4;
/// Advice: the last cluster follows the index.
const INLINE: u16 = 8;
/// Advice: plain clusters begin at the place in a block that they have in the file.
const INTERLACED: u16 = 0x10;
/// Advice: the last extent is a fragment.
const FRAGMENT: u16 = 0x20;

/// Bit of the advice of a row: the cluster holds more than this extent.
const ROW_PREFIX: u16 = 1 << 15;
/// Bit of the way back: it is a number of blocks.
const ROW_BLOCKS: u32 = 1 << 11;

/// Bit of an extent: the cluster holds more than this extent.
const EXTENT_PREFIX: u32 = 1 << 27;
/// Where the code of an extent begins.
const EXTENT_CODE: u32 = 28;
/// Bits of an extent for the bytes stored.
const EXTENT_BYTES: u32 = 2 * STORED_BYTES_MAX - 1;

/// An extent of a compressed file: bytes `begin` to `end`.
pub(super) struct Run {
    pub begin: u64,
    pub end: u64,
    pub data: Data,
}

/// What holds an extent.
pub(super) enum Data {
    Hole,
    /// Bytes of the packed file, from this offset on.
    Fragment(u64),
    /// A cluster; what it decodes to begins with the extent.
    Stored(Stored),
}

/// The header of an index of rows.
struct Index<'a> {
    inode: &'a Inode,
    /// Where it is, in bytes.
    at: u64,
    advice: u16,
    /// Numbers of the algorithms.
    algorithms: [u8; 2],
    /// Size of a logical cluster (log2).
    log: u32,
    /// Bytes of the inline cluster; 0: there is none.
    inline: u64,
    /// Where the fragment begins (lower 32 bits).
    fragment: u64,
}

/// What a row is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Head1,
    Head2,
    /// No head: rows back to the head (or to a row closer to it), and to the next one.
    Body {
        back: u64,
        on: u64,
        blocks: Option<u64>,
    },
}

/// A row of an index.
#[derive(Clone, Copy)]
struct Row {
    number: u64,
    kind: Kind,
    /// Of a head: where the extent begins in the logical cluster.
    begin: u64,
    /// Of a head: where it is stored.
    block: u64,
    prefix: bool,
    /// Where the row (or its pack) ends, in bytes.
    end: u64,
}

impl Index<'_> {
    fn corrupt(&self, why: impl Into<String>) -> LayerError {
        corrupt(TABLE, self.at, why)
    }

    /// How many rows an extent can span.
    fn rows_max(&self) -> u64 {
        (u64::from(DECODED_BYTES_MAX) >> self.log) + 2
    }

    fn offset(&self, row: &Row) -> u64 {
        (row.number << self.log) + row.begin
    }

    /// Whether clusters of such a head may have many blocks.
    fn is_big(&self, kind: Kind) -> bool {
        self.advice & if kind == Kind::Head1 { BIG_1 } else { BIG_2 } != 0
    }
}

/// The `bits` bits of a row of a pack, and its kind.
fn packed_row(pack: &[u8], row_bits: u32, bits: u32, number: u32) -> (u32, u32) {
    let at = row_bits * number;
    let word = u32_at(pack, (at / 8) as usize) >> (at & 7);
    (word & ((1 << bits) - 1), word >> bits & 3)
}

/// The kind of rows that are no heads.
const BODY: u32 = 2;

impl Erofs {
    /// Returns the extent that holds the byte at `offset` of a compressed file; `offset` is below its size.
    pub(super) fn run(&self, inode: &Inode, offset: u64) -> Result<Run, LayerError> {
        let at = inode.end().next_multiple_of(8);
        let header = u64::from_le_bytes(self.array(inode.space, at)?);
        if header & WHOLE_FRAGMENT != 0 {
            return Ok(Run { begin: 0, end: inode.size, data: Data::Fragment(header & !WHOLE_FRAGMENT) });
        }
        let bytes = header.to_le_bytes();
        let advice = u16_at(&bytes, 4);
        let index = Index {
            inode,
            at,
            advice,
            algorithms: [bytes[6] & 15, bytes[6] >> 4],
            log: self.superblock.block_log + u32::from(bytes[7] & 15),
            inline: if advice & (FRAGMENT | INLINE) == INLINE { u16_at(&bytes, 2).into() } else { 0 },
            fragment: u32_at(&bytes, 0).into(),
        };
        let full = inode.layout == Layout::CompressedFull;
        if !full && (advice & BIG_1 != 0) != (advice & BIG_2 != 0) {
            return Err(index.corrupt(format!("advice is {advice:#x}, expected bits 1 and 2 to be equal")));
        }
        let run = if full && advice & EXTENTS != 0 {
            let count = u64::from(u32_at(&bytes, 0)) | u64::from(u16_at(&bytes, 6)) << 32;
            self.extent_run(&index, count, offset)?
        } else {
            self.row_run(&index, offset)?
        };
        // Rows that lead back to a head and rows that lead on from it can contradict each other.
        if offset < run.begin || offset >= run.end || run.end > inode.size {
            let (begin, end) = (run.begin, run.end);
            return Err(index.corrupt(format!("the extent of the byte at {offset} is {begin} to {end}")));
        }
        Ok(run)
    }

    fn row_run(&self, index: &Index<'_>, offset: u64) -> Result<Run, LayerError> {
        let size = index.inode.size;
        let (_, head) = self.head(index, offset)?;
        let begin = index.offset(&head);
        let mut tail = None;
        if index.inline > 0 || index.advice & FRAGMENT != 0 {
            let (last, tail_head) = self.head(index, size - 1)?;
            tail = (tail_head.number == head.number).then_some(last.end);
        }
        let mut run = Run { begin, end: size, data: Data::Hole };
        let (stored_at, stored_bytes, metadata);
        match tail {
            Some(_) if index.advice & FRAGMENT != 0 => {
                let high = if index.inode.layout == Layout::CompressedFull { head.block << 32 } else { 0 };
                run.data = Data::Fragment(high | index.fragment);
                return Ok(run);
            }
            Some(at) => {
                let block = u64::from(self.superblock.block_bytes());
                if at % block + index.inline > block {
                    let bytes = index.inline;
                    return Err(
                        index.corrupt(format!("{bytes} inline bytes at {at}, expected them in one block"))
                    );
                }
                (stored_at, stored_bytes, metadata) = (at, index.inline, Some(index.inode.space));
            }
            None => {
                run.end = self.next_begin(index, &head)?;
                let blocks = self.stored_blocks(index, &head)?;
                let log = self.superblock.block_log;
                (stored_at, stored_bytes, metadata) = (head.block << log, blocks << log, None);
            }
        }
        let code = match head.kind {
            Kind::Plain => Code::Raw,
            Kind::Head1 => self.code(index, index.algorithms[0])?,
            _ => self.code(index, index.algorithms[1])?,
        };
        let bytes = bounded(index, stored_bytes, &run)?;
        let stored = Stored { at: stored_at, bytes, code, prefix: head.prefix, metadata };
        self.hold(index, run, stored, index.advice & INTERLACED != 0, offset)
    }

    fn code(&self, index: &Index<'_>, number: u8) -> Result<Code, LayerError> {
        let allowed = self.superblock.algorithms >> number & 1 != 0;
        match Code::of_algorithm(number, self.superblock.is_zero_padded()) {
            Some(code) if allowed => Ok(code),
            _ => {
                let known = self.superblock.algorithms;
                Err(index.corrupt(format!("algorithm {number}, the superblock names those in {known:#x}")))
            }
        }
    }

    /// Finishes an extent: one that is stored as it is has no more bytes than it decodes to, and may lie in
    /// two places.
    fn hold(
        &self,
        index: &Index<'_>,
        mut run: Run,
        stored: Stored,
        interlaced: bool,
        offset: u64,
    ) -> Result<Run, LayerError> {
        if stored.code != Code::Raw {
            run.data = Data::Stored(stored);
            return Ok(run);
        }
        let len = run.end - run.begin;
        if len > stored.bytes.into() {
            let bytes = stored.bytes;
            return Err(index.corrupt(format!("{len} bytes stored as they are in {bytes}")));
        }
        let mut at = stored.at;
        if interlaced {
            // The block that the extent begins in comes last, and what is before that place in it holds the end.
            let block = u64::from(self.superblock.block_bytes());
            let within = run.begin % block;
            let first = len.min(block - within);
            if offset - run.begin < first {
                at = at.saturating_add(u64::from(stored.bytes).max(block) - block + within);
                run.end = run.begin + first;
            } else {
                run.begin += first;
            }
        }
        let len = (run.end - run.begin) as u32;
        run.data = Data::Stored(Stored { metadata: stored.metadata, ..Stored::raw(at, len) });
        Ok(run)
    }

    /// Returns the row of the byte at `offset`, and the head of the extent that holds it.
    fn head(&self, index: &Index<'_>, offset: u64) -> Result<(Row, Row), LayerError> {
        let number = offset >> index.log;
        let row = self.row(index, number)?;
        let mut back = match row.kind {
            Kind::Body { back, .. } => back,
            _ if index.offset(&row) <= offset => return Ok((row, row)),
            _ => 1,
        };
        let mut at = number;
        loop {
            if back == 0 || back > at || number - (at - back) > index.rows_max() {
                return Err(index.corrupt(format!("row {at} says that its head is {back} rows before it")));
            }
            at -= back;
            let head = self.row(index, at)?;
            match head.kind {
                Kind::Body { back: more, .. } => back = more,
                _ => return Ok((row, head)),
            }
        }
    }

    /// Returns where the extent after that of a head begins.
    fn next_begin(&self, index: &Index<'_>, head: &Row) -> Result<u64, LayerError> {
        let size = index.inode.size;
        let mut at = head.number + 1;
        while at << index.log < size {
            let row = self.row(index, at)?;
            match row.kind {
                // The first writers left 0 for 1.
                Kind::Body { on, .. } => at += on.max(1),
                _ => {
                    let end = index.offset(&row);
                    if end > size {
                        return Err(index.corrupt(format!("an extent begins at {end} of {size} bytes")));
                    }
                    return Ok(end);
                }
            }
            if at - head.number > index.rows_max() {
                return Err(index.corrupt(format!("the extent of row {} does not end", head.number)));
            }
        }
        Ok(size)
    }

    /// Returns how many blocks the cluster of a head takes.
    fn stored_blocks(&self, index: &Index<'_>, head: &Row) -> Result<u64, LayerError> {
        let next = head.number + 1;
        if !index.is_big(head.kind) || next << index.log >= index.inode.size {
            return Ok(1);
        }
        match self.row(index, next)?.kind {
            Kind::Body { blocks: Some(blocks), .. } if blocks > 0 => Ok(blocks),
            Kind::Body { .. } => {
                Err(index.corrupt(format!("row {next} follows a head, expected a number of blocks")))
            }
            _ => Ok(1),
        }
    }

    /// Returns a row.
    fn row(&self, index: &Index<'_>, number: u64) -> Result<Row, LayerError> {
        let row = match index.inode.layout {
            Layout::CompressedFull => self.full_row(index, number)?,
            _ => self.compact_row(index, number)?,
        };
        if !matches!(row.kind, Kind::Body { .. }) && row.begin >> index.log != 0 {
            let begin = row.begin;
            return Err(index.corrupt(format!("row {number} begins at {begin} of its logical cluster")));
        }
        Ok(row)
    }

    fn full_row(&self, index: &Index<'_>, number: u64) -> Result<Row, LayerError> {
        let at = (index.at + HEADER_BYTES + 8).saturating_add(number.saturating_mul(8));
        let bytes: [u8; 8] = self.array(index.inode.space, at)?;
        let advice = u16_at(&bytes, 0);
        let kind = match advice & 3 {
            0 => Kind::Plain,
            1 => Kind::Head1,
            3 => Kind::Head2,
            _ => {
                let (back, on) = (u32::from(u16_at(&bytes, 4)), u16_at(&bytes, 6).into());
                self.body(index, number, back, on)?
            }
        };
        Ok(Row {
            number,
            kind,
            begin: u16_at(&bytes, 2).into(),
            block: u32_at(&bytes, 4).into(),
            prefix: advice & ROW_PREFIX != 0,
            end: at + 8,
        })
    }

    fn body(&self, index: &Index<'_>, number: u64, back: u32, on: u64) -> Result<Kind, LayerError> {
        if back & ROW_BLOCKS == 0 {
            return Ok(Kind::Body { back: back.into(), on, blocks: None });
        }
        if index.advice & (BIG_1 | BIG_2) == 0 {
            return Err(
                index.corrupt(format!("row {number} has a number of blocks, expected clusters of one"))
            );
        }
        Ok(Kind::Body { back: 1, on, blocks: Some((back & !ROW_BLOCKS).into()) })
    }

    fn compact_row(&self, index: &Index<'_>, number: u64) -> Result<Row, LayerError> {
        let rows = index.inode.size.div_ceil(self.superblock.block_bytes().into());
        if number >= rows || index.log > 14 {
            let log = index.log;
            return Err(
                index.corrupt(format!("row {number} of {rows}, of logical clusters of 2^{log} bytes"))
            );
        }
        let base = index.at + HEADER_BYTES;
        // Rows of 4 bytes up to where packs of 32 bytes can begin, then those, then rows of 4 bytes again.
        let first = (32 - base % 32) % 32 / 4;
        let small = match index.advice & COMPACT_2B != 0 && first < rows {
            true => (rows - first) / 16 * 16,
            false => 0,
        };
        let (at, wide) = match number.checked_sub(first) {
            None => (base + 4 * number, true),
            Some(after) if after < small => (base + 4 * first + 2 * after, false),
            Some(after) => (base + 4 * first + 2 * small + 4 * (after - small), true),
        };
        if !wide && index.log > 12 {
            return Err(index.corrupt(format!("2-byte rows for logical clusters of 2^{} bytes", index.log)));
        }
        let (pack_bytes, count, unit) = if wide { (8, 2, 4) } else { (32, 16, 2) };
        let start = at / pack_bytes * pack_bytes;
        let pack = self.bytes(index.inode.space, start, pack_bytes as usize)?;
        let pack = pack.bytes();
        let bits = index.log.max(12);
        let row_bits = (pack_bytes as u32 - 4) * 8 / count;
        let here = ((at - start) / unit) as u32;
        let get = |number: u32| packed_row(pack, row_bits, bits, number);
        let (low, kind) = get(here);
        let mut row = Row {
            number,
            kind: Kind::Plain,
            begin: low.into(),
            block: 0,
            prefix: false,
            end: start + pack_bytes,
        };
        if kind == BODY {
            let on = rows_on(get, here, count);
            // The last row of a pack has the way on; the way back is one more than that of the row before.
            let back = match low & ROW_BLOCKS == 0 && here + 1 == count {
                false => low,
                true => match get(here - 1) {
                    (_, kind) if kind != BODY => 1,
                    (low, _) if low & ROW_BLOCKS != 0 => 2,
                    (low, _) => low + 1,
                },
            };
            row.kind = self.body(index, number, back, on)?;
            return Ok(row);
        }
        row.kind = match kind {
            0 => Kind::Plain,
            1 => Kind::Head1,
            _ => Kind::Head2,
        };
        let before = self.blocks_before(index, get, here)?;
        row.block = u64::from(u32_at(pack, pack_bytes as usize - 4)) + before;
        Ok(row)
    }

    /// How many blocks of a pack come before those of its head number `here`, counted from the pack's.
    fn blocks_before(
        &self,
        index: &Index<'_>,
        get: impl Fn(u32) -> (u32, u32),
        here: u32,
    ) -> Result<u64, LayerError> {
        let mut at = i64::from(here);
        let big = index.advice & BIG_1 != 0;
        let mut blocks = u64::from(!big);
        while at > 0 {
            at -= 1;
            let (low, kind) = get(at as u32);
            match (kind == BODY, big) {
                (false, _) => blocks += 1,
                (true, false) => {
                    at -= i64::from(low);
                    blocks += u64::from(at >= 0);
                }
                (true, true) if low & ROW_BLOCKS != 0 => {
                    at -= 1;
                    blocks += u64::from(low & !ROW_BLOCKS);
                }
                (true, true) if low > 1 => at -= i64::from(low) - 2,
                (true, true) => {
                    return Err(index.corrupt("a row after a head, expected a number of blocks"));
                }
            }
        }
        Ok(blocks)
    }

    /// Looks up an index of extents.
    fn extent_run(&self, index: &Index<'_>, count: u64, offset: u64) -> Result<Run, LayerError> {
        let record = 4u64 << (index.advice >> 1 & 3);
        let base = (index.at + HEADER_BYTES).next_multiple_of(record);
        let size = index.inode.size;
        let (begin, end, last, word, at);
        if record <= 8 {
            let number = offset >> index.log;
            let read = |at: u64| self.bytes(index.inode.space, at, record as usize);
            if record == 8 {
                let bytes = read(base.saturating_add(8 * number))?;
                (word, at) = (u32_at(bytes.bytes(), 0), u64::from(u32_at(bytes.bytes(), 4)));
            } else {
                (word, at) = self.summed(index, base, number)?;
            }
            begin = number << index.log;
            end = begin.saturating_add(1 << index.log).min(size);
            last = end == size;
        } else {
            let (mut low, mut high) = (0, count);
            let (mut found, mut after) = (None, size);
            while low < high {
                let middle = low + (high - low) / 2;
                let place = base.saturating_add(middle.saturating_mul(record));
                let bytes = self.bytes(index.inode.space, place, record as usize)?;
                let bytes = bytes.bytes();
                let mut start = u64::from(u32_at(bytes, 12));
                if record > 16 {
                    start |= u64::from(u32_at(bytes, 16)) << 32;
                }
                if start > offset {
                    if start > after {
                        return Err(
                            index.corrupt(format!("extent {middle} begins at {start}, after {after}"))
                        );
                    }
                    (high, after) = (middle, start);
                } else {
                    low = middle + 1;
                    found = Some((start, u32_at(bytes, 0), u64_at(bytes, 4)));
                }
            }
            let Some((start, stored, place)) = found else {
                return Err(index.corrupt(format!("no extent holds the byte at {offset}")));
            };
            (begin, end, last, word, at) = (start, after, low >= count, stored, place);
        }
        let mut run = Run { begin, end, data: Data::Hole };
        if last && index.advice & FRAGMENT != 0 {
            let high = if record > 4 { at << 32 } else { 0 };
            run.data = Data::Fragment(high | u64::from(word));
            return Ok(run);
        }
        if word & EXTENT_BYTES == 0 {
            return Ok(run);
        }
        let bytes = bounded(index, (word & EXTENT_BYTES).into(), &run)?;
        let code = match word >> EXTENT_CODE {
            0 => Code::Raw,
            number => self.code(index, number as u8 - 1)?,
        };
        let block = u64::from(self.superblock.block_bytes());
        let interlaced = index.advice & INTERLACED != 0 && (at | u64::from(bytes)).is_multiple_of(block);
        let stored = Stored { at, bytes, code, prefix: word & EXTENT_PREFIX != 0, metadata: None };
        self.hold(index, run, stored, interlaced, offset)
    }

    /// Finds an extent of 4 bytes: it lies behind all those before it. Returns its word and place.
    fn summed(&self, index: &Index<'_>, base: u64, number: u64) -> Result<(u32, u64), LayerError> {
        let space = index.inode.space;
        let mut at = u64::from_le_bytes(self.array(space, base)?);
        let words = base + 8;
        let mut next = 0;
        loop {
            let place = words.saturating_add(next * 4);
            let here = ((4096 - place % 4096) / 4).min(number + 1 - next);
            let bytes = self.bytes(space, place, (here * 4) as usize)?;
            let mut sum = 0u64;
            for word in bytes.bytes().chunks_exact(4) {
                let word = u32_at(word, 0);
                if next == number {
                    return Ok((word, at.saturating_add(sum)));
                }
                sum += u64::from(word & EXTENT_BYTES);
                next += 1;
            }
            at = at.saturating_add(sum);
        }
    }
}

/// How many rows it is from a row of a pack that is no head to the next head.
fn rows_on(get: impl Fn(u32) -> (u32, u32), here: u32, count: u32) -> u64 {
    let mut rows = 0;
    for number in here..count {
        let (low, kind) = get(number);
        if kind != BODY {
            return rows;
        }
        rows += 1;
        if number + 1 == count && low & ROW_BLOCKS == 0 {
            rows += u64::from(low).saturating_sub(1);
        }
    }
    rows
}

/// Checks the size of a cluster and of what it decodes to.
fn bounded(index: &Index<'_>, bytes: u64, run: &Run) -> Result<u32, LayerError> {
    let len = run.end - run.begin;
    match u32::try_from(bytes) {
        Ok(bytes) if (1..=STORED_BYTES_MAX).contains(&bytes) && len <= DECODED_BYTES_MAX.into() => Ok(bytes),
        _ => Err(index.corrupt(format!(
            "{len} bytes stored in {bytes}, expected up to {DECODED_BYTES_MAX} in up to {STORED_BYTES_MAX}"
        ))),
    }
}
