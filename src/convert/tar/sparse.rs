//! The maps of sparse files: which pieces of the file are in the stream.
//!
//! ```text
//! GNU      type S; in the header 4 pieces at 386, a flag at 482, the size at 483; blocks of 21 pieces and a flag at 504
//! star     type S; 4 pieces at 356, a flag at 355, the size at 452; blocks of 21 pieces and a flag at 504
//! PAX 0.0  records GNU.sparse.offset, GNU.sparse.numbytes, … and GNU.sparse.size
//! PAX 0.1  one record GNU.sparse.map: offset,length,…
//! PAX 1.0  decimal lines before the content, padded to a block; GNU.sparse.realsize
//! ```
//! A piece is an offset and a length of 12 bytes each. Pieces are in order and do not overlap.

use std::io::Read;

use super::field::{bad_number, decimal, field, number};
use super::pax::Records;
use super::{BLOCK, MAX_SPARSE_PIECES, Problem, TarReader};

/// A piece of a sparse file that has content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub offset: u64,
    pub len: u64,
}

/// Adds the pieces of a header or block, up to the first that is empty.
fn add_pieces(pieces: &mut Vec<Piece>, bytes: &[u8]) -> Result<(), Problem> {
    for entry in bytes.chunks_exact(24) {
        // GNU tar ends the list here.
        if entry[12] == 0 {
            break;
        }
        let part = |text| {
            let value = number("sparse map", text)?;
            u64::try_from(value).map_err(|_| bad_number("sparse map", text))
        };
        push_piece(pieces, part(&entry[..12])?, part(&entry[12..])?)?;
    }
    Ok(())
}

fn push_piece(pieces: &mut Vec<Piece>, offset: u64, len: u64) -> Result<(), Problem> {
    if pieces.len() >= MAX_SPARSE_PIECES {
        return Err(too_many(pieces.len() as u64 + 1));
    }
    pieces.push(Piece { offset, len });
    Ok(())
}

fn too_many(found: u64) -> Problem {
    let max = MAX_SPARSE_PIECES as u64;
    Problem::TooBig { what: "the number of pieces in the map of a sparse file", found, max }
}

impl<R: Read> TarReader<R> {
    pub(super) fn gnu_sparse(&mut self, header: &[u8; BLOCK]) -> Result<(), Problem> {
        let mut pieces = Vec::new();
        add_pieces(&mut pieces, &header[386..482])?;
        self.more_pieces(&mut pieces, header[482] != 0)?;
        self.set_pieces(pieces, real_size(field(header, 483, 12))?)
    }

    /// Where the place of the first piece has no digit at its end, all pieces are in blocks.
    pub(super) fn star_sparse(&mut self, header: &[u8; BLOCK]) -> Result<(), Problem> {
        let mut pieces = Vec::new();
        let here = header[345] == 0 && header[366] != 0;
        if here {
            add_pieces(&mut pieces, &header[356..452])?;
        }
        self.more_pieces(&mut pieces, !here || header[355] != 0)?;
        self.set_pieces(pieces, real_size(field(header, 452, 12))?)
    }

    /// Reads the blocks of pieces that follow a header.
    fn more_pieces(&mut self, pieces: &mut Vec<Piece>, mut more: bool) -> Result<(), Problem> {
        while more {
            let mut block = [0; BLOCK];
            self.fill(&mut block, "a sparse map")?;
            add_pieces(pieces, &block[..504])?;
            more = block[504] != 0;
        }
        Ok(())
    }

    /// The formats 0.0, 0.1 and 1.0 in extended headers.
    pub(super) fn pax_sparse(&mut self, records: Records<'_>) -> Result<(), Problem> {
        let bad = |why| Problem::Sparse { why };
        let get = |key: &[u8]| match records.get(key) {
            Some(text) => decimal(text).map(Some).ok_or(bad("a number is malformed")),
            None => Ok(None),
        };
        let mut pieces = Vec::new();
        let size = if get(b"GNU.sparse.major")? == Some(1) && get(b"GNU.sparse.minor")? == Some(0) {
            // 1.0: the map stands before the content: decimal lines, padded to a block.
            let count = self.map_number()?;
            if count > MAX_SPARSE_PIECES as u64 {
                return Err(too_many(count));
            }
            for _ in 0..count {
                let (offset, len) = (self.map_number()?, self.map_number()?);
                push_piece(&mut pieces, offset, len)?;
            }
            // To the end of the map's last block; content began on a block boundary.
            let used = self.size - self.content;
            let rest = used.next_multiple_of(BLOCK as u64) - used;
            if rest > self.content {
                return Err(bad("it is longer than the entry"));
            }
            let mut pad = [0; BLOCK];
            self.fill(&mut pad[..rest as usize], "a sparse map")?;
            self.content -= rest;
            get(b"GNU.sparse.realsize")?
        } else if let Some(map) = records.get(b"GNU.sparse.map") {
            let numbers: Option<Vec<u64>> = map.split(|byte| *byte == b',').map(decimal).collect();
            let numbers = numbers.filter(|all| all.len() % 2 == 0).ok_or(bad("a number is malformed"))?;
            for pair in numbers.chunks_exact(2) {
                push_piece(&mut pieces, pair[0], pair[1])?;
            }
            get(b"GNU.sparse.size")?
        } else if records.get(b"GNU.sparse.numblocks").is_some() {
            let mut offset = None;
            for (key, value) in records.all() {
                let number = || decimal(value).ok_or(bad("a number is malformed"));
                match (key.as_slice(), offset) {
                    (b"GNU.sparse.offset", None) => offset = Some(number()?),
                    (b"GNU.sparse.numbytes", Some(start)) => {
                        push_piece(&mut pieces, start, number()?)?;
                        offset = None;
                    }
                    (b"GNU.sparse.offset" | b"GNU.sparse.numbytes", _) => {
                        return Err(bad("it is out of order"));
                    }
                    _ => {}
                }
            }
            get(b"GNU.sparse.size")?
        } else {
            return Ok(());
        };
        self.set_pieces(pieces, size.ok_or(bad("there is no size"))?)
    }

    /// One line of a 1.0 map.
    fn map_number(&mut self) -> Result<u64, Problem> {
        let mut text = Vec::with_capacity(20);
        loop {
            let bad = |why| Problem::Sparse { why };
            if self.content == 0 {
                return Err(bad("it is longer than the entry"));
            }
            let mut byte = [0];
            self.fill(&mut byte, "a sparse map")?;
            self.content -= 1;
            match byte[0] {
                b'\n' => return decimal(&text).ok_or(bad("a number is malformed")),
                _ if text.len() >= 20 => return Err(bad("a number is malformed")),
                digit => text.push(digit),
            }
        }
    }

    /// Takes a map after checking it against what is stored.
    fn set_pieces(&mut self, pieces: Vec<Piece>, size: u64) -> Result<(), Problem> {
        let bad = |why| Problem::Sparse { why };
        let (mut end, mut stored) = (0u64, 0u64);
        for piece in &pieces {
            if piece.offset < end {
                return Err(bad("pieces overlap or are out of order"));
            }
            end = piece.offset.checked_add(piece.len).ok_or(bad("a piece ends beyond 2^64"))?;
            // `end` bounds the sum.
            stored += piece.len;
        }
        if end > size || size > i64::MAX as u64 {
            return Err(bad("a piece ends beyond the file"));
        }
        if stored != self.content {
            return Err(bad("the pieces do not add up to what is stored"));
        }
        (self.pieces, self.size) = (Some(pieces), size);
        Ok(())
    }
}

fn real_size(text: &[u8]) -> Result<u64, Problem> {
    u64::try_from(number("real size", text)?).map_err(|_| bad_number("real size", text))
}
