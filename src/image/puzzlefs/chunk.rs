//! Chunks: read whole, checked, decoded.
//!
//! ```text
//! stored as it is   the decoded bytes
//! compressed        zstd frames of 4,096 decoded bytes each, then a skippable frame with a table of them
//! ```
//! The metadata says which of the two it is, for each use of a chunk. The table of frames serves readers of parts;
//! this one decodes a chunk whole, and the decoder skips it.

use std::cell::RefCell;

use zstd::bulk::Decompressor;

use crate::digest::Digest;
use crate::image::LayerError;
use crate::image::blobs::{BlobError, Blobs};
use crate::image::source::ReadError;

/// Flag of a chunk: its stored bytes are zstd frames.
pub(super) const COMPRESSED: u32 = 1;

/// A chunk that files use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunk {
    /// SHA-256 of the stored bytes.
    pub digest: Digest,
    /// How many stored bytes there are.
    pub stored_bytes: u32,
    /// How many bytes it decodes to: the end of its last stretch that any file uses.
    pub decoded_bytes: u32,
    /// Whether the stored bytes are zstd frames.
    pub compressed: bool,
}

impl Chunk {
    /// Its flags, as a block's size word has them.
    pub(super) fn flags(&self) -> u32 {
        if self.compressed { COMPRESSED } else { 0 }
    }
}

/// The memory of a thread.
#[derive(Default)]
struct Scratch {
    stored: Vec<u8>,
    zstd: Option<Decompressor<'static>>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Reads, checks and decodes a chunk into `out`, which is empty. `number` is the chunk's, for errors.
///
/// Rule (docs/design.md, chunks by digest): stored bytes are read whole into private memory, length and SHA-256 are
/// checked, and only that copy is decoded, every time.
pub(super) fn decode(
    blobs: &dyn Blobs,
    chunk: &Chunk,
    number: u64,
    out: &mut Vec<u8>,
) -> Result<(), LayerError> {
    SCRATCH.with(|scratch| match scratch.try_borrow_mut() {
        Ok(mut scratch) => decode_with(&mut scratch, blobs, chunk, number, out),
        // A source of blobs that itself reads such an image in the same thread gets fresh memory.
        Err(_) => decode_with(&mut Scratch::default(), blobs, chunk, number, out),
    })
}

fn decode_with(
    scratch: &mut Scratch,
    blobs: &dyn Blobs,
    chunk: &Chunk,
    number: u64,
    out: &mut Vec<u8>,
) -> Result<(), LayerError> {
    let named = |error| read_error(error, "chunk", number, chunk.stored_bytes.into());
    let max = chunk.decoded_bytes as usize;
    let wrong = |why: String| {
        let why = format!("{}: {why}", chunk.digest);
        LayerError::Corrupt { table: "chunk", offset: number, why }
    };
    out.reserve_exact(max);
    let Scratch { stored, zstd } = scratch;
    let found = if chunk.compressed {
        stored.clear();
        stored.reserve_exact(chunk.stored_bytes as usize);
        blobs.read(&chunk.digest, chunk.stored_bytes.into(), stored).map_err(named)?;
        out.resize(max, 0);
        // All frames in one call; it fails where they hold more than the room that there is.
        let decoded =
            zstd.get_or_insert_with(Decompressor::default).decompress_to_buffer(stored, out.as_mut_slice());
        match decoded {
            Ok(found) => found,
            Err(error) => {
                out.clear();
                return Err(wrong(format!("zstd: {error}, expected {max} decoded bytes")));
            }
        }
    } else {
        // Other lengths are refused before anything is read, so that `out` stays within its bound.
        if chunk.stored_bytes != chunk.decoded_bytes {
            return Err(wrong(format!("it holds {} bytes, expected {max}", chunk.stored_bytes)));
        }
        // The bytes are what was hashed, in memory that nobody else has. `out` has room for them and needs no more: a
        // reader finds the end of a blob without it (std::io::Read::read_to_end).
        blobs.read(&chunk.digest, chunk.stored_bytes.into(), out).map_err(named)?;
        out.len()
    };
    if found != max {
        out.clear();
        return Err(wrong(format!("it decodes to {found} bytes, expected {max}")));
    }
    Ok(())
}

/// The error of a blob as one of a layer. `what` is its part in the image, `number` the chunk's.
pub(super) fn read_error(error: BlobError, what: &str, number: u64, stored_bytes: u64) -> LayerError {
    LayerError::Read(match error {
        BlobError::Io { source, .. } => {
            ReadError::Io { offset: 0, len: usize::try_from(stored_bytes).unwrap_or(usize::MAX), source }
        }
        BlobError::Size { digest, expected, found } => ReadError::Length { blob: digest, expected, found },
        BlobError::Content { expected, found } => {
            ReadError::Verity { what: what.into(), block: number, expected, found }
        }
    })
}
