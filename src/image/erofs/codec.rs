//! Stored clusters, and how they are decoded.
//!
//! A [`BlockId`] of this reader:
//! ```text
//! start        offset in the image, or in the metabox, in bytes
//! size_word    bits 0..20 bytes stored, 21..23 code, 24 prefix, 25 in metadata, 26 in the metabox
//! decoded_max  exactly how many bytes it decodes to
//! ```
//! *Prefix*: the cluster may hold more than that, which other extents use.
//!
//! A compressed stream ends where the cluster ends, with zeros before it; no stream begins with a zero. The
//! first images with lz4 have it the other way round: the stream begins where the cluster begins.
//!
//! # Memory
//! Per thread: a stored cluster (1 MiB), 160 KiB for zstd, 50 KiB for deflate; while it decodes lzma, as much
//! again as the cluster decodes to, and 64 KiB.

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};
use liblzma::stream::{Action, Status as LzmaStatus, Stream};
use zstd::bulk::Decompressor;
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};
use zstd::zstd_safe::DParameter;

use super::Erofs;
use super::error::corrupt;
use super::lz4;
use super::metadata::Space;
use super::superblock::STORED_BYTES_MAX;
use crate::image::LayerError;
use crate::image::layer::BlockId;

/// The most that a cluster decodes to, in bytes (Z_EROFS_PCLUSTER_MAX_DSIZE in the kernel's erofs_fs.h).
pub(super) const DECODED_BYTES_MAX: u32 = 12 << 20;

/// The name of clusters in errors.
const TABLE: &str = "data block";

/// Bits of a size word for the bytes stored.
const SIZE_BITS: u32 = 21;
/// Bit of a size word: only a prefix of what the cluster holds.
const PREFIX: u32 = 1 << 24;
/// Bit of a size word: read through the cache of metadata.
const METADATA: u32 = 1 << 25;
/// Bit of a size word: in the metabox.
const METABOX: u32 = 1 << 26;

/// The largest window of a zstd frame whose beginning alone is decoded (log2): what the kernel has memory for.
const ZSTD_WINDOW_LOG: u32 = 20;

/// How a cluster is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    /// As it is.
    Raw,
    /// An LZ4 block without a frame, at the end of the cluster.
    Lz4,
    /// MicroLZMA: LZMA1 whose first byte holds the properties, inverted.
    Lzma,
    /// Raw deflate.
    Deflate,
    /// A zstd frame.
    Zstd,
    /// An LZ4 block at the start of the cluster.
    Lz4AtStart,
}

impl Code {
    /// The code with that number in the format.
    pub(super) fn of_algorithm(number: u8, zero_padded: bool) -> Option<Self> {
        Some(match number {
            0 if zero_padded => Code::Lz4,
            0 => Code::Lz4AtStart,
            1 => Code::Lzma,
            2 => Code::Deflate,
            3 => Code::Zstd,
            _ => return None,
        })
    }

    fn number(self) -> u32 {
        self as u32
    }

    fn from_number(number: u32) -> Option<Self> {
        let all = [Code::Raw, Code::Lz4, Code::Lzma, Code::Deflate, Code::Zstd, Code::Lz4AtStart];
        all.get(number as usize).copied()
    }

    fn name(self) -> &'static str {
        match self {
            Code::Raw => "raw",
            Code::Lz4 | Code::Lz4AtStart => "lz4",
            Code::Lzma => "lzma",
            Code::Deflate => "deflate",
            Code::Zstd => "zstd",
        }
    }
}

/// A stored cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    /// Where it is, in bytes.
    pub at: u64,
    /// How many bytes it takes: 1 to [`STORED_BYTES_MAX`].
    pub bytes: u32,
    pub code: Code,
    /// Whether it may hold more than is used of it here.
    pub prefix: bool,
    /// Where it is read through the cache of metadata.
    pub metadata: Option<Space>,
}

impl Stored {
    /// Bytes that are stored as they are; at most [`STORED_BYTES_MAX`].
    pub(super) fn raw(at: u64, bytes: u32) -> Self {
        Stored { at, bytes, code: Code::Raw, prefix: false, metadata: None }
    }

    /// The same, beside an inode.
    pub(super) fn in_metadata(self, space: Space) -> Self {
        Stored { metadata: Some(space), ..self }
    }

    /// The block of it that decodes to `len` bytes.
    pub(super) fn block(self, len: u32) -> BlockId {
        let mut size_word = self.bytes | self.code.number() << SIZE_BITS;
        if self.prefix {
            size_word |= PREFIX;
        }
        match self.metadata {
            None => {}
            Some(Space::Image) => size_word |= METADATA,
            Some(Space::Metabox) => size_word |= METADATA | METABOX,
        }
        BlockId { start: self.at, size_word, decoded_max: len }
    }

    fn of_block(block: BlockId) -> Option<Self> {
        let word = block.size_word;
        let metadata = match (word & METADATA != 0, word & METABOX != 0) {
            (false, _) => None,
            (true, false) => Some(Space::Image),
            (true, true) => Some(Space::Metabox),
        };
        let stored = Stored {
            at: block.start,
            bytes: word & ((1 << SIZE_BITS) - 1),
            code: Code::from_number(word >> SIZE_BITS & 7)?,
            prefix: word & PREFIX != 0,
            metadata,
        };
        (stored.block(block.decoded_max) == block).then_some(stored)
    }
}

/// The contexts and buffers of a thread.
#[derive(Default)]
struct Scratch {
    input: Vec<u8>,
    zstd: Option<Decompressor<'static>>,
    deflate: Option<Decompress>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Reads and decodes a block into `out`.
pub(super) fn decode(image: &Erofs, block: BlockId, out: &mut Vec<u8>) -> Result<(), LayerError> {
    let len = block.decoded_max;
    let bad = |why: String| Err(corrupt(TABLE, block.start, why));
    let Some(stored) = Stored::of_block(block) else {
        return bad(format!("size word {:#x} is none of this reader", block.size_word));
    };
    if stored.bytes == 0 || stored.bytes > STORED_BYTES_MAX || len > DECODED_BYTES_MAX {
        let bytes = stored.bytes;
        return bad(format!(
            "{bytes} bytes decode to {len}, expected up to {STORED_BYTES_MAX} and {DECODED_BYTES_MAX}"
        ));
    }
    if stored.code == Code::Raw && stored.bytes != len {
        return bad(format!("{} bytes stored as they are, expected {len}", stored.bytes));
    }
    if let Some(space) = stored.metadata {
        if stored.code == Code::Raw {
            out.clear();
            return image.append_metadata(space, stored.at, len as usize, out);
        }
        let piece = image.bytes(space, stored.at, stored.bytes as usize)?;
        return with_scratch(|scratch| scratch.decompress(stored, piece.bytes(), out, len as usize));
    }
    with_scratch(|scratch| {
        // Taken out for the borrow: it comes back unless there is an error.
        let mut input = std::mem::take(&mut scratch.input);
        let bytes = image.source.read(stored.at, stored.bytes as usize, &mut input)?;
        if stored.code == Code::Raw {
            out.clear();
            out.extend_from_slice(bytes);
        } else {
            scratch.decompress(stored, bytes, out, len as usize)?;
        }
        scratch.input = input;
        Ok(())
    })
}

/// Calls `work` with the memory of this thread; a source that itself reads an image gets fresh memory.
fn with_scratch<R>(work: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with(|scratch| match scratch.try_borrow_mut() {
        Ok(mut scratch) => work(&mut scratch),
        Err(_) => work(&mut Scratch::default()),
    })
}

/// The first `len` bytes of `out`, to be overwritten. Bytes of an earlier call stay, so that they are not
/// cleared again.
fn room(out: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if out.len() < len {
        out.reserve_exact(len - out.len());
        out.resize(len, 0);
    }
    out.truncate(len);
    out
}

impl Scratch {
    /// Decodes a compressed cluster to exactly `len` bytes.
    fn decompress(
        &mut self,
        stored: Stored,
        bytes: &[u8],
        out: &mut Vec<u8>,
        len: usize,
    ) -> Result<(), LayerError> {
        let input = match stored.code {
            Code::Lz4AtStart => bytes,
            _ => {
                let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
                bytes.get(zeros..).unwrap_or_default()
            }
        };
        let buffer = room(out, len);
        let prefix = stored.prefix;
        let done = match stored.code {
            _ if input.is_empty() => Err("the cluster is all zeros".into()),
            Code::Lz4 if !prefix => exactly(
                len,
                lz4_flex::block::decompress_into(input, buffer).map_err(|error| error.to_string()),
            ),
            Code::Lz4 | Code::Lz4AtStart => lz4::decompress_prefix(input, buffer),
            Code::Lzma => lzma(input, buffer, prefix),
            Code::Deflate => self.deflate(input, buffer, prefix),
            Code::Zstd => self.zstd(input, buffer, prefix),
            Code::Raw => Err("is not compressed".into()),
        };
        done.map_err(|why: String| {
            out.clear();
            corrupt(TABLE, stored.at, format!("{}: {why}", stored.code.name()))
        })
    }

    fn zstd(&mut self, input: &[u8], out: &mut [u8], prefix: bool) -> Result<(), String> {
        let len = out.len();
        if !prefix {
            let context = self.zstd.get_or_insert_with(Decompressor::default);
            let done = context.decompress_to_buffer(input, out);
            return exactly(len, done.map_err(|error| error.to_string()));
        }
        let mut decoder = Decoder::new().map_err(|error| error.to_string())?;
        decoder
            .set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG))
            .map_err(|error| error.to_string())?;
        let (mut from, mut to) = (InBuffer::around(input), OutBuffer::around(out));
        loop {
            let before = (from.pos(), to.pos());
            let left = decoder.run(&mut from, &mut to).map_err(|error| error.to_string())?;
            if to.pos() == len {
                return Ok(());
            }
            if left == 0 || before == (from.pos(), to.pos()) {
                return Err(format!("decodes to {} bytes, expected {len}", to.pos()));
            }
        }
    }

    fn deflate(&mut self, input: &[u8], out: &mut [u8], prefix: bool) -> Result<(), String> {
        let context = self.deflate.get_or_insert_with(|| Decompress::new(false));
        context.reset(false);
        let status =
            context.decompress(input, out, FlushDecompress::Finish).map_err(|error| error.to_string())?;
        match status {
            Status::StreamEnd => {}
            _ if prefix && context.total_out() == out.len() as u64 => {}
            _ if context.total_out() == out.len() as u64 => {
                return Err("the stream holds more than expected".into());
            }
            _ => return Err("the stream ends too early".into()),
        }
        exactly(out.len(), Ok(context.total_out() as usize))
    }
}

fn exactly(len: usize, done: Result<usize, String>) -> Result<(), String> {
    match done? {
        found if found == len => Ok(()),
        found => Err(format!("decodes to {found} bytes, expected {len}")),
    }
}

/// Decodes MicroLZMA, by way of the format of .lzma files: their header says what this one leaves out.
fn lzma(input: &[u8], out: &mut [u8], prefix: bool) -> Result<(), String> {
    let len = out.len();
    let (properties, rest) = input.split_first().ok_or("the stream is empty")?;
    // The first byte of LZMA1 is always 0, and holds the properties here.
    let mut head = [0; 14];
    head[0] = !properties;
    // No distance is larger than what was decoded before.
    head[1..5].copy_from_slice(&(len.max(4096) as u32).to_le_bytes());
    let size = if prefix { u64::MAX } else { len as u64 };
    head[5..13].copy_from_slice(&size.to_le_bytes());
    let memory = 2 * u64::from(DECODED_BYTES_MAX);
    let mut stream = Stream::new_lzma_decoder(memory).map_err(|error| error.to_string())?;
    let mut parts = [&head[..], rest].into_iter();
    let mut part: &[u8] = parts.next().unwrap_or_default();
    loop {
        let before = (stream.total_in(), stream.total_out());
        let to = out.get_mut(before.1 as usize..).unwrap_or_default();
        // Not `Finish` for the header: more follows it.
        let action = if parts.len() == 0 { Action::Finish } else { Action::Run };
        let status = stream.process(part, to, action).map_err(|error| error.to_string())?;
        part = part.get((stream.total_in() - before.0) as usize..).unwrap_or_default();
        let written = stream.total_out() as usize;
        if status == LzmaStatus::StreamEnd || (prefix && written == len) {
            return exactly(len, Ok(written));
        }
        if part.is_empty()
            && let Some(next) = parts.next()
        {
            part = next;
        } else if before == (stream.total_in(), stream.total_out()) {
            return Err(format!("decodes to {written} bytes, expected {len}"));
        }
    }
}
