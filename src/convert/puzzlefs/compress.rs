//! Compressed chunks: independent zstd frames with a table, as the puzzlefs tool writes them.
//!
//! ```text
//! frame      4,096 decoded bytes (the last one less), level 3, no checksum, no content size
//! ...
//! table      a skippable frame (0x184D2A5E): for each frame u32 stored and u32 decoded size;
//!            u32 count, u8 0, u32 0x8F92EAB1
//! ```
//! Source of the table: zstd, contrib/seekable_format, "zstd seekable format". The bytes are part of the format in
//! practice: a chunk's digest is that of its stored bytes, and only equal bytes are stored once. So level, frame size
//! and the way that a frame is ended (an empty last block, no content size) do not change.

use std::io;

use zstd::stream::raw::{CParameter, Encoder, InBuffer, Operation, OutBuffer};

/// Decoded bytes of a frame.
const FRAME_BYTES: usize = 4096;
/// zstd's level.
const LEVEL: i32 = 3;
/// A chunk whose compressed form is longer is stored as it is: a reader that many use stops at frames beyond
/// this many bytes of a chunk (rorosen/zeekstd#14).
const MAX_COMPRESSED_BYTES: usize = 131_072;

/// A compressor of chunks, for one thread.
pub struct Compressor {
    encoder: Encoder<'static>,
}

impl Compressor {
    /// A compressor.
    pub fn new() -> io::Result<Self> {
        let mut encoder = Encoder::new(LEVEL)?;
        encoder.set_parameter(CParameter::ChecksumFlag(false))?;
        Ok(Self { encoder })
    }

    /// The compressed form of a chunk; `None` where it is to be stored as it is.
    pub fn compress(&mut self, chunk: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut stored = Vec::with_capacity(chunk.len() + chunk.len() / 64 + 4096);
        let mut table = Vec::new();
        for frame in chunk.chunks(FRAME_BYTES) {
            let start = stored.len();
            self.frame(frame, &mut stored)?;
            table.extend_from_slice(&((stored.len() - start) as u32).to_le_bytes());
            table.extend_from_slice(&(frame.len() as u32).to_le_bytes());
        }
        let frames = table.len() / 8;
        stored.extend_from_slice(&0x184D_2A5Eu32.to_le_bytes());
        stored.extend_from_slice(&(table.len() as u32 + 9).to_le_bytes());
        stored.extend_from_slice(&table);
        stored.extend_from_slice(&(frames as u32).to_le_bytes());
        stored.push(0);
        stored.extend_from_slice(&0x8F92_EAB1u32.to_le_bytes());
        let small = stored.len() < chunk.len() && stored.len() <= MAX_COMPRESSED_BYTES;
        Ok(small.then_some(stored))
    }

    fn frame(&mut self, bytes: &[u8], stored: &mut Vec<u8>) -> io::Result<()> {
        self.encoder.reinit()?;
        let mut room = [0; 2 * FRAME_BYTES];
        let mut input = InBuffer::around(bytes);
        while input.pos() < bytes.len() {
            let mut output = OutBuffer::around(&mut room[..]);
            self.encoder.run(&mut input, &mut output)?;
            stored.extend_from_slice(output.as_slice());
        }
        loop {
            let mut output = OutBuffer::around(&mut room[..]);
            let left = self.encoder.finish(&mut output, true)?;
            stored.extend_from_slice(output.as_slice());
            if left == 0 {
                return Ok(());
            }
        }
    }
}
