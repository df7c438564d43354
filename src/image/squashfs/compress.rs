//! The six compressors of squashfs 4.0.
//!
//! Contexts and buffers belong to the thread and are reused. They take at most one compressed block (1 MiB +
//! 8 KiB) of scratch memory, 160 KiB for zstd, 50 KiB for zlib and, during one call, [`XZ_MEMORY_BYTES`] for
//! xz and lzma.

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};
use liblzma::stream::{Action, Status as XzStatus, Stream};
use zstd::bulk::Decompressor;

use super::lzo;

/// How much memory xz and lzma may use, in bytes.
///
/// A dictionary larger than a block has no benefit, and no writer makes one; this is four times the largest
/// block.
pub(super) const XZ_MEMORY_BYTES: u64 = 4 << 20;

/// How the blocks of an image are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Compressor {
    /// zlib streams (id 1).
    Gzip,
    /// Streams of the first LZMA format, with their 13-byte header (id 2).
    Lzma,
    /// LZO1X blocks (id 3).
    Lzo,
    /// xz streams, with or without a filter for machine code (id 4).
    Xz,
    /// LZ4 blocks without a frame (id 5).
    Lz4,
    /// zstd frames (id 6).
    Zstd,
}

impl Compressor {
    /// Returns the compressor with that number in the superblock, or the number if there is none.
    pub fn from_id(id: u16) -> Result<Compressor, u16> {
        Ok(match id {
            1 => Compressor::Gzip,
            2 => Compressor::Lzma,
            3 => Compressor::Lzo,
            4 => Compressor::Xz,
            5 => Compressor::Lz4,
            6 => Compressor::Zstd,
            other => return Err(other),
        })
    }

    /// Its name in the tools.
    pub fn name(self) -> &'static str {
        match self {
            Compressor::Gzip => "gzip",
            Compressor::Lzma => "lzma",
            Compressor::Lzo => "lzo",
            Compressor::Xz => "xz",
            Compressor::Lz4 => "lz4",
            Compressor::Zstd => "zstd",
        }
    }
}

/// The contexts of a thread, created when first needed.
#[derive(Default)]
pub(super) struct Codecs {
    zstd: Option<Decompressor<'static>>,
    zlib: Option<Decompress>,
}

/// The memory of a thread.
#[derive(Default)]
pub(super) struct Scratch {
    /// Bytes read from the source.
    pub input: Vec<u8>,
    /// A decoded metadata block.
    pub metadata: Vec<u8>,
    /// The contexts.
    pub codecs: Codecs,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Calls `work` with the memory of this thread.
///
/// A source that itself reads a squashfs image in the same thread gets fresh memory.
pub(super) fn with_scratch<R>(work: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with(|scratch| match scratch.try_borrow_mut() {
        Ok(mut scratch) => work(&mut scratch),
        Err(_) => work(&mut Scratch::default()),
    })
}

impl Codecs {
    /// Decodes `input` into `out`, replacing its content. On success it holds at most `max` bytes; it never
    /// grows beyond `max`.
    ///
    /// The error describes what is wrong with the stream.
    pub(super) fn decompress(
        &mut self,
        compressor: Compressor,
        input: &[u8],
        out: &mut Vec<u8>,
        max: usize,
    ) -> Result<(), String> {
        let done = match compressor {
            Compressor::Zstd => self.zstd(input, out, max),
            Compressor::Gzip => self.zlib(input, out, max),
            Compressor::Lz4 => lz4(input, out, max),
            Compressor::Lzo => {
                empty(out, max);
                lzo::decompress(input, out, max).map_err(|error| error.to_string())
            }
            Compressor::Xz => xz(Stream::new_stream_decoder(XZ_MEMORY_BYTES, 0), input, out, max),
            Compressor::Lzma => xz(Stream::new_lzma_decoder(XZ_MEMORY_BYTES), input, out, max),
        };
        let done = match done {
            // The vector may already have had a larger capacity.
            Ok(()) if out.len() > max => Err("the stream holds more than expected".into()),
            other => other,
        };
        done.map_err(|why| {
            out.clear();
            format!("{}: {why}", compressor.name())
        })
    }

    fn zstd(&mut self, input: &[u8], out: &mut Vec<u8>, max: usize) -> Result<(), String> {
        empty(out, max);
        self.zstd
            .get_or_insert_with(Decompressor::default)
            .decompress_to_buffer(input, out)
            .map(drop)
            .map_err(|error| error.to_string())
    }

    fn zlib(&mut self, input: &[u8], out: &mut Vec<u8>, max: usize) -> Result<(), String> {
        empty(out, max);
        let context = self.zlib.get_or_insert_with(|| Decompress::new(true));
        context.reset(true);
        match context.decompress_vec(input, out, FlushDecompress::Finish) {
            Ok(Status::StreamEnd) => Ok(()),
            Ok(_) => Err(unfinished(out, max)),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Empties the vector and ensures room for `max` bytes.
fn empty(out: &mut Vec<u8>, max: usize) {
    out.clear();
    out.reserve_exact(max);
}

fn unfinished(out: &[u8], max: usize) -> String {
    if out.len() >= max {
        "the stream holds more than expected".into()
    } else {
        "the stream ends too early".into()
    }
}

fn lz4(input: &[u8], out: &mut Vec<u8>, max: usize) -> Result<(), String> {
    // The decoder takes a slice, which must be initialized. The bytes of an earlier call suffice, so it is
    // not cleared again.
    if out.len() < max {
        out.reserve_exact(max - out.len());
        out.resize(max, 0);
    }
    out.truncate(max);
    match lz4_flex::block::decompress_into(input, out) {
        Ok(len) => {
            out.truncate(len);
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    }
}

fn xz(
    stream: Result<Stream, liblzma::stream::Error>,
    input: &[u8],
    out: &mut Vec<u8>,
    max: usize,
) -> Result<(), String> {
    let mut stream = stream.map_err(|error| error.to_string())?;
    empty(out, max);
    loop {
        let before = (stream.total_in(), stream.total_out());
        let rest = usize::try_from(before.0).ok().and_then(|at| input.get(at..)).unwrap_or_default();
        match stream.process_vec(rest, out, Action::Finish) {
            Ok(XzStatus::StreamEnd) => return Ok(()),
            Ok(_) if (stream.total_in(), stream.total_out()) != before && out.len() <= max => {}
            Ok(_) => return Err(unfinished(out, max)),
            Err(error) => return Err(error.to_string()),
        }
    }
}
