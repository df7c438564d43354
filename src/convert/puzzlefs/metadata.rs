//! The metadata blob: one Cap'n Proto message of one segment, objects in the order in which a reader meets them.
//!
//! The schema is that of `image/puzzlefs/table.rs`. One list of inodes, entries of folders in the order of their
//! names, attributes in the order of theirs, no whiteouts: the canonical form.

use super::plan::{FileKind, Plan, Planned};
use super::{Chunk, PuzzlefsError};
use crate::image::puzzlefs::{MANIFEST_VERSION, MAX_METADATA_BYTES};
use crate::sorting;

/// Bytes of a word.
const WORD: usize = 8;

/// The words of a segment, with its pointers.
struct Segment(Vec<u64>);

impl Segment {
    fn set(&mut self, at: usize, word: u64) {
        if let Some(place) = self.0.get_mut(at) {
            *place = word;
        }
    }

    /// Appends `words` zeros, and has the pointer at `at` lead to them. Returns where they begin.
    fn append(&mut self, at: usize, kind: u64, upper: u64, words: usize) -> usize {
        let target = self.0.len();
        // Targets lie behind their pointers, and the segment is far below 2^29 words.
        let offset = (target - at - 1) as u64;
        self.set(at, kind | offset << 2 | upper << 32);
        self.0.resize(target + words, 0);
        target
    }

    /// A struct of that many data words and pointers. Returns its first word.
    fn structure(&mut self, at: usize, data: usize, pointers: usize) -> usize {
        self.append(at, 0, (data | pointers << 16) as u64, data + pointers)
    }

    /// A list of structs. Returns the first word of the first element.
    fn list(&mut self, at: usize, count: usize, data: usize, pointers: usize) -> usize {
        let words = count * (data + pointers);
        let tag = self.append(at, 1, 7 | (words as u64) << 3, words + 1);
        self.set(tag, (count as u64) << 2 | ((data | pointers << 16) as u64) << 32);
        tag + 1
    }

    /// A list of bytes.
    fn bytes(&mut self, at: usize, bytes: &[u8]) {
        let start = self.append(at, 1, 2 | (bytes.len() as u64) << 3, bytes.len().div_ceil(WORD));
        for (number, chunk) in bytes.chunks(WORD).enumerate() {
            let mut word = [0; WORD];
            word[..chunk.len()].copy_from_slice(chunk);
            self.set(start + number, u64::from_le_bytes(word));
        }
    }
}

/// Writes the metadata. `chunks` are those of the stream, in its order.
pub(super) fn write(plan: &Plan, chunks: &[Chunk]) -> Result<Vec<u8>, PuzzlefsError> {
    let mut segment = Segment(vec![0]);
    let root = segment.structure(0, 1, 2);
    segment.set(root, MANIFEST_VERSION);
    let lists = segment.list(root + 1, 1, 0, 1);
    let inodes = segment.list(lists, plan.inodes.len(), 3, 2);
    let mut stream = Stream { chunks, number: 0, offset: 0 };
    for (number, planned) in plan.inodes.iter().enumerate() {
        inode(&mut segment, inodes + number * 5, number as u64 + 1, planned, &mut stream);
        if (segment.0.len() * WORD) as u64 > MAX_METADATA_BYTES {
            return Err(PuzzlefsError::Metadata { max: MAX_METADATA_BYTES });
        }
    }
    let verity = sorting::map(chunks.iter().map(|chunk| (chunk.digest, chunk.verity)));
    let list = segment.list(root + 2, verity.len(), 0, 2);
    for (number, (digest, verity)) in verity.iter().enumerate() {
        segment.bytes(list + number * 2, digest.as_bytes());
        segment.bytes(list + number * 2 + 1, verity.as_bytes());
    }
    let mut bytes = Vec::with_capacity((segment.0.len() + 1) * WORD);
    bytes.extend_from_slice(&0u32.to_le_bytes());
    bytes.extend_from_slice(&(segment.0.len() as u32).to_le_bytes());
    segment.0.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
    Ok(bytes)
}

fn inode(segment: &mut Segment, at: usize, ino: u64, planned: &Planned, stream: &mut Stream<'_>) {
    let tag: u64 = match &planned.what {
        FileKind::Fifo => 1,
        FileKind::Char(_) => 2,
        FileKind::Dir(_) => 3,
        FileKind::Block(_) => 4,
        FileKind::File(_) => 5,
        FileKind::Symlink(_) => 6,
        FileKind::Socket => 7,
    };
    segment.set(at, ino);
    segment.set(at + 1, tag | u64::from(planned.permissions) << 16 | u64::from(planned.uid) << 32);
    segment.set(at + 2, planned.gid.into());
    match &planned.what {
        FileKind::Char(rdev) | FileKind::Block(rdev) => {
            let numbers = segment.structure(at + 3, 2, 0);
            segment.set(numbers, (rdev >> 8 & 0xfff).into());
            segment.set(numbers + 1, (rdev & 0xff | rdev >> 12 & 0xf_ff00).into());
        }
        FileKind::Dir(entries) => {
            let dir = segment.structure(at + 3, 1, 1);
            let list = segment.list(dir + 1, entries.len(), 1, 1);
            for (number, (name, child)) in entries.iter().enumerate() {
                segment.set(list + number * 2, u64::from(*child) + 1);
                segment.bytes(list + number * 2 + 1, name);
            }
        }
        FileKind::File(size) => {
            let parts = stream.take(*size);
            let list = segment.list(at + 3, parts.len(), 1, 1);
            for (number, part) in parts.iter().enumerate() {
                segment.set(list + number * 2, part.len);
                let blob = segment.structure(list + number * 2 + 1, 2, 1);
                segment.set(blob, part.offset);
                segment.set(blob + 1, part.chunk.compressed.into());
                segment.bytes(blob + 2, part.chunk.digest.as_bytes());
            }
        }
        FileKind::Fifo | FileKind::Socket | FileKind::Symlink(_) => {}
    }
    let target: &[u8] = match &planned.what {
        FileKind::Symlink(target) => target,
        _ => &[],
    };
    if planned.xattrs.is_empty() && target.is_empty() {
        return;
    }
    let additional = segment.structure(at + 4, 0, 2);
    if !planned.xattrs.is_empty() {
        let list = segment.list(additional, planned.xattrs.len(), 0, 2);
        for (number, (name, value)) in planned.xattrs.iter().enumerate() {
            segment.bytes(list + number * 2, name);
            segment.bytes(list + number * 2 + 1, value);
        }
    }
    if !target.is_empty() {
        segment.bytes(additional + 1, target);
    }
}

/// The stream of all content, while files take their parts of it in its order.
struct Stream<'a> {
    chunks: &'a [Chunk],
    /// The chunk that the next file begins in, and where.
    number: usize,
    offset: u64,
}

/// A part of a file.
struct Part<'a> {
    chunk: &'a Chunk,
    offset: u64,
    len: u64,
}

impl<'a> Stream<'a> {
    /// The parts of the next file, of `size` bytes.
    fn take(&mut self, mut size: u64) -> Vec<Part<'a>> {
        let mut parts = Vec::new();
        while size > 0
            && let Some(chunk) = self.chunks.get(self.number)
        {
            let len = size.min(u64::from(chunk.decoded_bytes) - self.offset);
            parts.push(Part { chunk, offset: self.offset, len });
            size -= len;
            self.offset += len;
            if self.offset == u64::from(chunk.decoded_bytes) {
                (self.number, self.offset) = (self.number + 1, 0);
            }
        }
        parts
    }
}
