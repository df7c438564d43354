//! LZO1X decompression, in safe code and with a bound on the output.
//!
//! The stream (described in the kernel's Documentation/staging/lzo.rst) is a sequence of instructions. Each
//! copies a match from the output so far, then 0 to 3 literals; two bits of the instruction hold their
//! number. The meaning of instructions below 16 depends on the preceding number of literals: that number is
//! the `state` (4 means "4 or more").

/// Why a stream cannot be decoded.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum LzoError {
    /// The stream ends in the middle of an instruction.
    InputOverrun,
    /// The stream decodes to more than fits.
    OutputOverrun,
    /// A match refers to before the first byte.
    Lookbehind,
    /// The end marker is wrong, or bytes follow it.
    BadEnd,
}

impl std::fmt::Display for LzoError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            LzoError::InputOverrun => "the stream ends too early",
            LzoError::OutputOverrun => "the stream holds more than expected",
            LzoError::Lookbehind => "a match refers to before the beginning",
            LzoError::BadEnd => "the stream does not end where its data does",
        })
    }
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    #[inline]
    fn byte(&mut self) -> Result<usize, LzoError> {
        let (&first, rest) = self.0.split_first().ok_or(LzoError::InputOverrun)?;
        self.0 = rest;
        Ok(usize::from(first))
    }

    #[inline]
    fn pair(&mut self) -> Result<usize, LzoError> {
        Ok(self.byte()? | self.byte()? << 8)
    }

    #[inline]
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], LzoError> {
        let (first, rest) = self.0.split_at_checked(len).ok_or(LzoError::InputOverrun)?;
        self.0 = rest;
        Ok(first)
    }

    /// A length that does not fit in its instruction: 255 for each zero byte, then one byte that is not zero.
    /// It cannot overflow: every zero byte is present in the input.
    fn long_length(&mut self, base: usize) -> Result<usize, LzoError> {
        let mut len = base;
        loop {
            match self.byte()? {
                0 => len += 255,
                last => return Ok(len + last),
            }
        }
    }
}

/// Decodes `input` and appends to `out`, until that holds at most `max` bytes.
pub(super) fn decompress(input: &[u8], out: &mut Vec<u8>, max: usize) -> Result<(), LzoError> {
    let mut input = Input(input);
    let base = out.len();
    let mut state = 0;
    if let Some(&first) = input.0.first()
        && first > 17
    {
        let len = input.byte()? - 17;
        copy_literals(&mut input, out, len, max)?;
        state = len.min(4);
    }
    loop {
        let instruction = input.byte()?;
        let (distance, len, literals);
        match instruction {
            0..16 if state == 0 => {
                let len = if instruction == 0 { input.long_length(15)? } else { instruction };
                copy_literals(&mut input, out, len + 3, max)?;
                state = 4;
                continue;
            }
            0..16 => {
                literals = instruction & 3;
                let high = input.byte()? << 2;
                (distance, len) = if state == 4 {
                    ((instruction >> 2) + high + 0x801, 3)
                } else {
                    ((instruction >> 2) + high + 1, 2)
                };
            }
            16..32 => {
                let short = instruction & 7;
                len = if short == 0 { input.long_length(7)? } else { short } + 2;
                let pair = input.pair()?;
                literals = pair & 3;
                let far = ((instruction & 8) << 11) + (pair >> 2);
                if far == 0 {
                    return if len == 3 && input.0.is_empty() { Ok(()) } else { Err(LzoError::BadEnd) };
                }
                distance = far + 0x4000;
            }
            32..64 => {
                let short = instruction & 31;
                len = if short == 0 { input.long_length(31)? } else { short } + 2;
                let pair = input.pair()?;
                literals = pair & 3;
                distance = (pair >> 2) + 1;
            }
            _ => {
                literals = instruction & 3;
                len = (instruction >> 5) + 1;
                distance = ((instruction >> 2) & 7) + (input.byte()? << 3) + 1;
            }
        }
        copy_match(out, base, distance, len, max)?;
        copy_literals(&mut input, out, literals, max)?;
        state = literals;
    }
}

#[inline]
fn copy_literals(input: &mut Input<'_>, out: &mut Vec<u8>, len: usize, max: usize) -> Result<(), LzoError> {
    let literals = input.bytes(len)?;
    if len > max.saturating_sub(out.len()) {
        return Err(LzoError::OutputOverrun);
    }
    out.extend_from_slice(literals);
    Ok(())
}

#[inline]
fn copy_match(
    out: &mut Vec<u8>,
    base: usize,
    distance: usize,
    len: usize,
    max: usize,
) -> Result<(), LzoError> {
    if len > max.saturating_sub(out.len()) {
        return Err(LzoError::OutputOverrun);
    }
    let start = out.len().checked_sub(distance).filter(|&start| start >= base).ok_or(LzoError::Lookbehind)?;
    // A match can overlap its own output: then the distance is a period, and each round can copy all whole
    // periods written so far.
    let mut left = len;
    while left > 0 {
        let now = left.min(out.len() - start);
        out.extend_from_within(start..start + now);
        left -= now;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(input: &[u8], max: usize) -> Result<Vec<u8>, LzoError> {
        let mut out = Vec::new();
        decompress(input, &mut out, max).map(|()| out)
    }

    #[test]
    fn literals_and_overlapping_match() {
        // 17 + 4 literals, then a match of 2 + 10 bytes at distance 3, no literals, then the end marker.
        let stream = [21, b'x', b'a', b'b', b'c', 32 + 10, 2 << 2, 0, 17, 0, 0];
        assert_eq!(decode(&stream, 16).unwrap(), b"xabcabcabcabcabc");
        assert_eq!(decode(&stream, 15), Err(LzoError::OutputOverrun));
    }

    #[test]
    fn long_literal_run() {
        let mut stream = vec![0, 0, 7];
        stream.extend(std::iter::repeat_n(b'z', 255 + 15 + 7 + 3));
        stream.extend([17, 0, 0]);
        assert_eq!(decode(&stream, 280).unwrap(), vec![b'z'; 280]);
        assert_eq!(decode(&stream, 279), Err(LzoError::OutputOverrun));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(decode(&[], 10), Err(LzoError::InputOverrun));
        assert_eq!(decode(&[21, b'x'], 10), Err(LzoError::InputOverrun));
        assert_eq!(decode(&[18, b'x', 64, 1, 17, 0, 0], 10), Err(LzoError::Lookbehind));
        assert_eq!(decode(&[18, b'x', 17, 0, 0, 9], 10), Err(LzoError::BadEnd));
        assert_eq!(decode(&[18, b'x', 18, 0, 0], 10), Err(LzoError::BadEnd));
        // A sequence of zero bytes declares a long match.
        assert_eq!(decode(&[18, b'x', 32, 0, 0, 0, 1, 0, 0, 17, 0, 0], 100), Err(LzoError::OutputOverrun));
    }
}
