//! A bounded reader of Cap'n Proto messages: as much of the encoding as PuzzleFS' metadata uses.
//!
//! ```text
//! u32 segments - 1, u32 words of each segment, padding to 8 bytes, then the segments
//!
//! pointer   bits 0..1   0 struct, 1 list, 2 far, 3 other (refused)
//! struct    2..31 offset in words from the pointer's end, signed; 32..47 data words; 48..63 pointers
//! list      2..31 the same; 32..34 size of an element: 2 is bytes, 7 is structs; 35..63 count (7: words)
//! far       2 double; 3..31 word in the segment; 32..63 segment
//! ```
//! Source: <https://capnproto.org/encoding.html>. A list of structs begins with a tag, which has the form of a
//! struct pointer and the count in place of the offset.
//!
//! # Bounds
//! Every place is checked against its segment before it is read. Each word that is reached is paid for from a
//! budget of the message's own size, and an element without words costs one: no writer lets two pointers lead to one
//! object, and a message in which they do would otherwise be larger when read than it is. Nothing is allocated but
//! the table of segments ([`MAX_SEGMENTS`]). Nothing recurses.
//!
//! What is read for each file is compiled into the walks: a result that goes through memory, as most do here, costs more
//! time than what it holds.
//!
//! The reader is our own: the `capnp` crate counts every read of a message's life against one limit, needs a
//! compiler of schemas of the same version at build time, and its generated code for these 12 structs is longer
//! than this file by a factor of ten.

use std::cell::Cell;

use super::corrupt;
use crate::image::LayerError;

/// The most segments that a message may have, as in the reference implementation.
pub(super) const MAX_SEGMENTS: usize = 512;

/// Bytes of a word.
const WORD: usize = 8;

/// A segment, in words of the message.
#[derive(Debug, Clone, Copy)]
struct Segment {
    start: usize,
    end: usize,
}

/// A message in memory.
pub(super) struct Message<'a> {
    bytes: &'a [u8],
    segments: Vec<Segment>,
    /// How many words may still be read.
    budget: Cell<u64>,
}

/// A struct in a message. Fields beyond its end have their default, zero.
#[derive(Clone, Copy)]
pub(super) struct Struct<'m> {
    message: &'m Message<'m>,
    segment: usize,
    at: usize,
    data_words: usize,
    pointers: usize,
}

/// A list of structs.
#[derive(Clone, Copy)]
pub(super) struct List<'m> {
    message: &'m Message<'m>,
    segment: usize,
    at: usize,
    data_words: usize,
    pointers: usize,
    len: usize,
}

/// What a pointer leads to: where the content begins, and the word that says what it is.
struct Target {
    segment: usize,
    at: usize,
    tag: u64,
}

impl<'a> Message<'a> {
    /// Reads the table of segments. The message may be read once from here on.
    pub(super) fn open(bytes: &'a [u8]) -> Result<Self, LayerError> {
        let word = |at: usize| -> Result<usize, LayerError> {
            let bytes =
                bytes.get(at..at + 4).ok_or_else(|| corrupt(at, "the table of segments is cut off"))?;
            Ok(u32::from_le_bytes(bytes.try_into().unwrap_or_default()) as usize)
        };
        let count = word(0)?.saturating_add(1);
        if count > MAX_SEGMENTS {
            return Err(corrupt(0, format!("{count} segments, expected at most {MAX_SEGMENTS}")));
        }
        let mut start = (4 + count * 4).div_ceil(WORD);
        let mut segments = Vec::with_capacity(count);
        for number in 0..count {
            // Neither sum can overflow: 512 times 2^32.
            let end = start + word(4 + number * 4)?;
            if end * WORD > bytes.len() {
                let why =
                    format!("segment {number} ends at {}, the message has {} bytes", end * WORD, bytes.len());
                return Err(corrupt(4 + number * 4, why));
            }
            segments.push(Segment { start, end });
            start = end;
        }
        Ok(Self { bytes, segments, budget: Cell::new((bytes.len() / WORD) as u64) })
    }

    /// The root struct.
    pub(super) fn root(&self) -> Result<Struct<'_>, LayerError> {
        let Some(first) = self.segments.first().filter(|first| first.end > first.start) else {
            return Err(corrupt(0, "the first segment is empty"));
        };
        self.pointed_struct(0, first.start)?.ok_or_else(|| corrupt(first.start * WORD, "no root struct"))
    }

    #[inline(always)]
    fn word(&self, at: usize) -> u64 {
        match self.bytes.get(at * WORD..at * WORD + WORD) {
            Some(bytes) => u64::from_le_bytes(bytes.try_into().unwrap_or_default()),
            None => 0,
        }
    }

    /// How many words may still be read.
    pub(super) fn left(&self) -> u64 {
        self.budget.get()
    }

    /// Pays for `words` words at the byte `offset`, which an earlier walk has read in place of this one.
    pub(super) fn pay(&self, offset: usize, words: usize) -> Result<(), LayerError> {
        self.charge(offset / WORD, words)
    }

    #[inline(always)]
    fn charge(&self, at: usize, words: usize) -> Result<(), LayerError> {
        match self.budget.get().checked_sub(words as u64) {
            Some(left) => {
                self.budget.set(left);
                Ok(())
            }
            None => Err(wrong(at, "several pointers lead to the same bytes")),
        }
    }

    /// Checks that `words` words at `at` are in the segment.
    #[inline(always)]
    fn within(&self, segment: usize, at: usize, words: usize) -> Result<(), LayerError> {
        match self.segments.get(segment) {
            Some(bounds) if at >= bounds.start && at <= bounds.end && words <= bounds.end - at => Ok(()),
            bounds => Err(outside(segment, bounds, at, words)),
        }
    }

    /// Follows the pointer in the word at `at`; `None` for a null pointer.
    #[inline(always)]
    fn follow(&self, segment: usize, at: usize) -> Result<Option<Target>, LayerError> {
        let pointer = self.word(at);
        if pointer == 0 {
            return Ok(None);
        }
        if pointer & 3 == 2 { self.follow_far(at, pointer) } else { self.near(segment, at, pointer) }
            .map(Some)
    }

    /// Follows the far pointer in the word at `at`. Few pointers lead to another segment.
    #[inline(never)]
    fn follow_far(&self, at: usize, pointer: u64) -> Result<Target, LayerError> {
        let (pad_segment, pad) = self.far(at, pointer)?;
        let double = pointer & 4 != 0;
        self.within(pad_segment, pad, if double { 2 } else { 1 })?;
        self.charge(pad, if double { 2 } else { 1 })?;
        let landing = self.word(pad);
        if !double {
            if landing & 3 == 2 || landing == 0 {
                return Err(corrupt(pad * WORD, "a far pointer leads to no struct or list"));
            }
            return self.near(pad_segment, pad, landing);
        }
        if landing & 7 != 2 {
            return Err(corrupt(pad * WORD, "a double far pointer does not lead to a far pointer"));
        }
        let (content_segment, content) = self.far(pad, landing)?;
        self.within(content_segment, content, 0)?;
        Ok(Target { segment: content_segment, at: content, tag: self.word(pad + 1) })
    }

    /// Where a far pointer leads: the segment, and the word in the message.
    fn far(&self, at: usize, pointer: u64) -> Result<(usize, usize), LayerError> {
        let segment = (pointer >> 32) as usize;
        match self.segments.get(segment) {
            Some(bounds) => Ok((segment, bounds.start + (pointer as u32 >> 3) as usize)),
            None => Err(corrupt(at * WORD, format!("there is no segment {segment}"))),
        }
    }

    #[inline(always)]
    fn near(&self, segment: usize, at: usize, pointer: u64) -> Result<Target, LayerError> {
        if pointer & 3 == 3 {
            return Err(wrong(at, "a pointer of an unknown kind"));
        }
        let offset = i64::from(pointer as u32 as i32 >> 2);
        let target = (at as i64 + 1).checked_add(offset).and_then(|target| usize::try_from(target).ok());
        let Some(target) = target else { return Err(wrong(at, "a pointer leads out of its segment")) };
        self.within(segment, target, 0)?;
        Ok(Target { segment, at: target, tag: pointer })
    }

    #[inline(always)]
    fn pointed_struct(&self, segment: usize, at: usize) -> Result<Option<Struct<'_>>, LayerError> {
        let Some(target) = self.follow(segment, at)? else { return Ok(None) };
        if target.tag & 3 != 0 {
            return Err(wrong(at, "expected a struct, found a list"));
        }
        let (data_words, pointers) = sizes(target.tag);
        self.within(target.segment, target.at, data_words + pointers)?;
        self.charge(target.at, (data_words + pointers).max(1))?;
        let Target { segment, at, .. } = target;
        Ok(Some(Struct { message: self, segment, at, data_words, pointers }))
    }

    #[inline(always)]
    fn pointed_list(&self, segment: usize, at: usize) -> Result<List<'_>, LayerError> {
        let empty = List { message: self, segment: 0, at: 0, data_words: 0, pointers: 0, len: 0 };
        let Some((element, count, target)) = self.list(segment, at)? else { return Ok(empty) };
        match element {
            7 => {}
            _ if count == 0 => return Ok(empty),
            _ => return Err(wrong(at, "expected a list of structs")),
        }
        self.within(target.segment, target.at, count + 1)?;
        let tag = self.word(target.at);
        let (data_words, pointers) = sizes(tag);
        let len = (tag as u32 >> 2) as usize;
        if tag & 3 != 0 || len.saturating_mul(data_words + pointers) > count {
            return Err(wrong(target.at, "the tag of a list does not fit the list"));
        }
        self.charge(target.at, (count + 1).max(len))?;
        let Target { segment, at, .. } = target;
        Ok(List { message: self, segment, at: at + 1, data_words, pointers, len })
    }

    #[inline(always)]
    fn pointed_bytes(&self, segment: usize, at: usize) -> Result<&[u8], LayerError> {
        let Some((element, count, target)) = self.list(segment, at)? else { return Ok(&[]) };
        if element != 2 && count > 0 {
            return Err(wrong(at, "expected a list of bytes"));
        }
        let words = count.div_ceil(WORD);
        self.within(target.segment, target.at, words)?;
        self.charge(target.at, words.max(1))?;
        Ok(self.bytes.get(target.at * WORD..target.at * WORD + count).unwrap_or_default())
    }

    /// The list that a pointer leads to: the code of its elements' size, and its count.
    #[inline(always)]
    fn list(&self, segment: usize, at: usize) -> Result<Option<(u64, usize, Target)>, LayerError> {
        let Some(target) = self.follow(segment, at)? else { return Ok(None) };
        if target.tag & 3 != 1 {
            return Err(wrong(at, "expected a list, found a struct"));
        }
        Ok(Some((target.tag >> 32 & 7, (target.tag >> 35) as usize, target)))
    }
}

/// The word at `at` is wrong. Errors are made apart from what finds them, so that the walks stay small.
#[cold]
fn wrong(at: usize, why: &'static str) -> LayerError {
    corrupt(at * WORD, why)
}

/// Words that are not in their segment, or in none that there is.
#[cold]
fn outside(segment: usize, bounds: Option<&Segment>, at: usize, words: usize) -> LayerError {
    match bounds {
        None => corrupt(at * WORD, format!("there is no segment {segment}")),
        Some(_) => corrupt(at * WORD, format!("{words} words are not within segment {segment}")),
    }
}

/// Data words and pointers of a struct, from its pointer or tag.
#[inline(always)]
fn sizes(tag: u64) -> (usize, usize) {
    ((tag >> 32 & 0xffff) as usize, (tag >> 48) as usize)
}

impl<'m> Struct<'m> {
    /// Offset in the message, in bytes, for errors.
    pub(super) fn offset(&self) -> usize {
        self.at * WORD
    }

    /// The data word of that number.
    #[inline(always)]
    pub(super) fn u64(&self, word: usize) -> u64 {
        if word < self.data_words { self.message.word(self.at + word) } else { 0 }
    }

    /// The 32 bits from bit `bit` of the data on; a multiple of 32.
    #[inline(always)]
    pub(super) fn u32(&self, bit: usize) -> u32 {
        (self.u64(bit / 64) >> (bit % 64)) as u32
    }

    /// The 16 bits from bit `bit` of the data on; a multiple of 16.
    #[inline(always)]
    pub(super) fn u16(&self, bit: usize) -> u16 {
        (self.u64(bit / 64) >> (bit % 64)) as u16
    }

    /// One bit of the data.
    #[inline(always)]
    pub(super) fn bit(&self, bit: usize) -> bool {
        self.u64(bit / 64) >> (bit % 64) & 1 != 0
    }

    /// Where a pointer of it stands; `None` where the struct does not have it.
    #[inline(always)]
    fn pointer(&self, number: usize) -> Option<usize> {
        (number < self.pointers).then(|| self.at + self.data_words + number)
    }

    /// The struct that a pointer leads to; `None` for a null pointer.
    #[inline(always)]
    pub(super) fn child(&self, number: usize) -> Result<Option<Struct<'m>>, LayerError> {
        match self.pointer(number) {
            Some(at) => self.message.pointed_struct(self.segment, at),
            None => Ok(None),
        }
    }

    /// The list of structs that a pointer leads to.
    #[inline(always)]
    pub(super) fn list(&self, number: usize) -> Result<List<'m>, LayerError> {
        match self.pointer(number) {
            Some(at) => self.message.pointed_list(self.segment, at),
            None => Ok(List { message: self.message, segment: 0, at: 0, data_words: 0, pointers: 0, len: 0 }),
        }
    }

    /// The bytes that a pointer leads to.
    #[inline(always)]
    pub(super) fn bytes(&self, number: usize) -> Result<&'m [u8], LayerError> {
        match self.pointer(number) {
            Some(at) => self.message.pointed_bytes(self.segment, at),
            None => Ok(&[]),
        }
    }
}

impl<'m> List<'m> {
    /// How many elements it has.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The element of that number, which is below `len`.
    #[inline(always)]
    pub(super) fn get(&self, number: usize) -> Struct<'m> {
        let List { message, segment, data_words, pointers, .. } = *self;
        Struct { message, segment, at: self.at + number * (data_words + pointers), data_words, pointers }
    }

    /// All elements.
    pub(super) fn iter(&self) -> impl Iterator<Item = Struct<'m>> + use<'m> {
        let list = *self;
        (0..list.len).map(move |number| list.get(number))
    }
}
