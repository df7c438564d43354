//! Locates the content of files.
//!
//! ```text
//! plain    consecutive blocks
//! inline   consecutive blocks, and the bytes after the last whole block right after inode and xattrs
//! chunks   format u16 in the inode: bits 0..4: log2 of blocks in a chunk, bit 5: 8-byte entries, bit 6: 48-bit
//!          then, aligned to its size, for each chunk: block u32, or upper bits u16, device u16, block u32;
//!          all ones: a hole
//! ```
//!
//! Compressed content is in zmap.rs. Content that is stored as it is has no decodable unit, so it is served
//! in pieces of [`PIECE_BYTES`].

use std::sync::Arc;

use super::Erofs;
use super::codec::{self, Stored};
use super::inode::{Inode, Layout};
use super::metadata::{PAGE_BYTES, Piece, Space};
use super::zmap::Data;
use crate::image::fields::{u16_at, u32_at};
use crate::image::layer::{Extent, Place};
use crate::image::{LayerError, ReadError};

/// Size of an extent of content that is stored as it is, in bytes: a read of 4 KiB verifies four blocks, and a
/// read of 128 KiB takes eight steps.
pub(super) const PIECE_BYTES: u64 = 16 << 10;

/// Bits of a format of chunks: log2 of the blocks in a chunk.
const CHUNK_LOG: u16 = 0x1f;
/// Bit of a format of chunks: entries of 8 bytes.
const CHUNK_INDEXES: u16 = 0x20;
/// Bit of a format of chunks: blocks have 48 bits.
const CHUNK_WIDE: u16 = 0x40;

impl Erofs {
    /// Returns where `len` bytes of a plain or inline file lie; they do not cross from its blocks to its end.
    pub(super) fn flat_place(
        &self,
        inode: &Inode,
        offset: u64,
        len: usize,
    ) -> Result<(Space, u64), LayerError> {
        let (block, inline) = match inode.layout {
            Layout::Plain(Some(block)) => (block, false),
            Layout::Inline(block) => (block, true),
            _ => return Err(inode.corrupt("expected content in blocks")),
        };
        let log = self.superblock.block_log;
        let end = (inode.size.div_ceil(1 << log) << log).saturating_sub(u64::from(inline) << log);
        if offset < end || !inline {
            return Ok((Space::Image, (block << log).saturating_add(offset)));
        }
        let at = inode.end() + (offset - end);
        let within = at & ((1 << log) - 1);
        if within + len as u64 > 1 << log {
            return Err(inode.corrupt(format!("{len} bytes of content at {at}, expected them in one block")));
        }
        Ok((inode.space, at))
    }

    /// Returns the extent that holds the byte at `offset` of a file.
    pub(super) fn extent_of(&self, inode: &Inode, offset: u64) -> Result<Extent, LayerError> {
        if offset >= inode.size {
            return Err(ReadError::OutOfRange { offset, len: 1, size: inode.size }.into());
        }
        match inode.layout {
            Layout::Plain(None) => Ok(hole(0, inode.size, offset)),
            Layout::Plain(Some(_)) => self.flat_extent(inode, offset, inode.size),
            Layout::Inline(_) => {
                let log = self.superblock.block_log;
                let end = (inode.size - 1) >> log << log;
                if offset < end {
                    return self.flat_extent(inode, offset, end);
                }
                let len = (inode.size - end) as u32;
                let (space, at) = self.flat_place(inode, end, len as usize)?;
                let block = Stored::raw(at, len).in_metadata(space).block(len);
                Ok(Extent { file_offset: end, len, place: Place::Block(block) })
            }
            Layout::Chunks(format) => self.chunk_extent(inode, format, offset),
            Layout::CompressedFull | Layout::CompressedCompact => self.compressed_extent(inode, offset),
        }
    }

    fn flat_extent(&self, inode: &Inode, offset: u64, end: u64) -> Result<Extent, LayerError> {
        let (_, at) = self.flat_place(inode, 0, 0)?;
        Ok(piece(0, at, end, offset))
    }

    fn chunk_extent(&self, inode: &Inode, format: u16, offset: u64) -> Result<Extent, LayerError> {
        if format & !(CHUNK_LOG | CHUNK_INDEXES | CHUNK_WIDE) != 0 {
            return Err(
                inode.corrupt(format!("format of chunks is {format:#x}, expected bits 7 to 15 clear"))
            );
        }
        let log = self.superblock.block_log + u32::from(format & CHUNK_LOG);
        let unit = if format & CHUNK_INDEXES != 0 { 8 } else { 4 };
        let number = offset >> log;
        let at = inode.end().next_multiple_of(unit).saturating_add(number.saturating_mul(unit));
        // The entries from here on that are in the same page.
        let chunks = inode.size.div_ceil(1 << log) - number;
        let here = chunks.min((PAGE_BYTES as u64 - at % PAGE_BYTES as u64) / unit).max(1);
        let entries = self.bytes(inode.space, at, (here * unit) as usize)?;
        let block_of = |entry: &[u8]| {
            let (high, low) =
                if unit == 8 { (u16_at(entry, 0), u32_at(entry, 4)) } else { (0, u32_at(entry, 0)) };
            let (mask, high) = if unit == 8 && format & CHUNK_WIDE != 0 {
                ((1u64 << 48) - 1, high)
            } else {
                (u64::from(u32::MAX), 0)
            };
            let block = u64::from(high) << 32 | u64::from(low);
            (block & mask != mask).then_some(block)
        };
        let begin = number << log;
        let mut blocks = entries.bytes().chunks_exact(unit as usize).map(block_of);
        match blocks.next().flatten() {
            None => {
                let holes = 1 + blocks.take_while(Option::is_none).count() as u64;
                Ok(hole(begin, begin.saturating_add(holes << log).min(inode.size), offset))
            }
            Some(block) => {
                let end = begin.saturating_add(1 << log).min(inode.size);
                Ok(piece(begin, block << self.superblock.block_log, end, offset))
            }
        }
    }

    fn compressed_extent(&self, inode: &Inode, offset: u64) -> Result<Extent, LayerError> {
        let run = self.run(inode, offset)?;
        let (begin, end) = (run.begin, run.end);
        match run.data {
            Data::Hole => Ok(hole(begin, end, offset)),
            Data::Fragment(at) => self.fragment_extent(inode, begin, end, at, offset),
            Data::Stored(stored) => {
                // The map has bounded it.
                let len = (end - begin) as u32;
                Ok(Extent { file_offset: begin, len, place: Place::Block(stored.block(len)) })
            }
        }
    }

    /// Bytes `begin` to `end` of a file are in the packed file from `at` on.
    fn fragment_extent(
        &self,
        inode: &Inode,
        begin: u64,
        end: u64,
        at: u64,
        offset: u64,
    ) -> Result<Extent, LayerError> {
        let Some(packed) = self.packed.filter(|packed| packed.at != inode.at || packed.space != inode.space)
        else {
            return Err(inode.corrupt("a fragment, expected an image with a packed file, and not in it"));
        };
        let fits = at.checked_add(end - begin).is_some_and(|end| end <= packed.size);
        if !fits {
            let (len, size) = (end - begin, packed.size);
            return Err(inode.corrupt(format!("a fragment of {len} bytes at {at} of the {size} packed ones")));
        }
        let there = at + (offset - begin);
        if packed.is_compressed() && matches!(self.run(&packed, there)?.data, Data::Fragment(_)) {
            return Err(packed.corrupt("the packed file has a fragment, expected none"));
        }
        let extent = self.extent_of(&packed, there)?;
        // What of the packed file's extent belongs to this file.
        let from = extent.file_offset.max(at);
        let to = extent.file_offset.saturating_add(extent.len.into()).min(at + (end - begin));
        let skip = (from - extent.file_offset) as u32;
        let place = match extent.place {
            Place::Hole => Place::Hole,
            Place::Block(block) => Place::Shared { block, offset: skip },
            Place::Shared { block, offset } => Place::Shared { block, offset: offset.saturating_add(skip) },
        };
        Ok(Extent { file_offset: begin + (from - at), len: (to - from) as u32, place })
    }

    /// Appends `len` bytes of the content of a file to `out`. The caller has bounded `len`.
    pub(super) fn append(
        &self,
        inode: &Inode,
        offset: u64,
        len: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), LayerError> {
        let end = offset.saturating_add(len as u64);
        if end > inode.size {
            return Err(ReadError::OutOfRange { offset, len: len as u64, size: inode.size }.into());
        }
        let (mut at, mut decoded) = (offset, Vec::new());
        while at < end {
            let extent = self.extent_of(inode, at)?;
            let stop = extent.file_offset.saturating_add(extent.len.into()).min(end);
            let (from, to) = ((at - extent.file_offset) as usize, (stop - extent.file_offset) as usize);
            let (block, start) = match extent.place {
                Place::Hole => {
                    out.resize(out.len() + (to - from), 0);
                    at = stop;
                    continue;
                }
                Place::Block(block) => (block, 0),
                Place::Shared { block, offset } => (block, offset as usize),
            };
            codec::decode(self, block, &mut decoded)?;
            match decoded.get(start + from..start + to) {
                Some(bytes) => out.extend_from_slice(bytes),
                None => return Err(inode.corrupt("an extent is longer than its decoded block")),
            }
            at = stop;
        }
        Ok(())
    }

    /// Returns `len` bytes of the content of a file. The caller has bounded `len`.
    pub(super) fn content_piece(&self, inode: &Inode, offset: u64, len: usize) -> Result<Piece, LayerError> {
        let mut bytes = Vec::new();
        self.append(inode, offset, len, &mut bytes)?;
        Ok(Piece::whole(Arc::from(bytes)))
    }

    /// The target of a symbolic link.
    pub(super) fn link_target(&self, inode: &Inode) -> Result<Vec<u8>, LayerError> {
        let len = inode.size as usize;
        let mut target = Vec::new();
        match inode.layout {
            Layout::Inline(_) if len > 0 && inode.size < u64::from(self.superblock.block_bytes()) => {
                let (space, at) = self.flat_place(inode, 0, len)?;
                self.append_metadata(space, at, len, &mut target)?;
            }
            _ => self.append(inode, 0, len, &mut target)?,
        }
        if target.contains(&0) {
            return Err(inode.corrupt("the target of a link has a NUL byte in it"));
        }
        Ok(target)
    }
}

/// A hole from `begin` to `end`, or the part of it around `offset` where it is too long for an extent.
fn hole(begin: u64, end: u64, offset: u64) -> Extent {
    /// The longest extent, in bytes: whole blocks of every size.
    const MAX: u64 = 1 << 31;
    let file_offset = begin + (offset - begin) / MAX * MAX;
    Extent { file_offset, len: (end - file_offset).min(MAX) as u32, place: Place::Hole }
}

/// A part around `offset` of bytes `begin` to `end` of a file, which are stored as they are at `at`.
fn piece(begin: u64, at: u64, end: u64, offset: u64) -> Extent {
    let from = offset / PIECE_BYTES * PIECE_BYTES;
    let from = from.max(begin);
    let to = (offset / PIECE_BYTES + 1).saturating_mul(PIECE_BYTES).min(end);
    let len = (to - from) as u32;
    let block = Stored::raw(at.saturating_add(from - begin), len).block(len);
    Extent { file_offset: from, len, place: Place::Block(block) }
}
