//! Decodes the beginning of an LZ4 block.
//!
//! ```text
//! sequence   token u8 (bits 4..7 literals, 0..3 match length - 4), more of the literals' length, literals,
//!            distance u16, more of the match's length; the last sequence ends with its literals
//! length     15: add the bytes that follow, up to and with the first that is not 255
//! ```
//! (LZ4 block format description, lz4_Block_format.md.) The lz4 crate decodes whole blocks only. Here, more
//! than is asked for may follow: in the block, which other extents use, or behind it, in images whose
//! clusters do not say where the block ends.

/// Fills `out` with the first bytes that `input` decodes to.
///
/// # Errors
/// What is wrong with the block, or that it holds less.
pub(super) fn decompress_prefix(input: &[u8], out: &mut [u8]) -> Result<(), String> {
    let early = || "the block ends too early".to_string();
    let (mut input, mut at) = (input, 0);
    while at < out.len() {
        let token = take(&mut input).ok_or_else(early)?;
        let literals = length(token >> 4, &mut input).ok_or_else(early)?.min(out.len() - at);
        let (now, rest) = input.split_at_checked(literals).ok_or_else(early)?;
        out[at..at + literals].copy_from_slice(now);
        input = rest;
        at += literals;
        if at == out.len() {
            break;
        }
        let (distance, rest) = input.split_first_chunk().ok_or_else(early)?;
        input = rest;
        let distance = usize::from(u16::from_le_bytes(*distance));
        if distance == 0 || distance > at {
            return Err(format!("a distance of {distance} after {at} bytes"));
        }
        let matched = length(token & 15, &mut input).ok_or_else(early)?.saturating_add(4).min(out.len() - at);
        let start = at - distance;
        if distance >= matched {
            out.copy_within(start..start + matched, at);
        } else {
            // The match goes on in what it writes.
            for number in start..start + matched {
                out[number + distance] = out[number];
            }
        }
        at += matched;
    }
    Ok(())
}

/// Reads the rest of a length; `None` if the input ends in it.
fn length(nibble: u8, input: &mut &[u8]) -> Option<usize> {
    let mut length = usize::from(nibble);
    if nibble == 15 {
        loop {
            let more = take(input)?;
            length = length.saturating_add(more.into());
            if more != 255 {
                break;
            }
        }
    }
    Some(length)
}

/// Reads a byte.
fn take(input: &mut &[u8]) -> Option<u8> {
    let (first, rest) = input.split_first()?;
    *input = rest;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_beginning_of_a_block_is_decoded() {
        let mut text = Vec::new();
        for number in 0..3000u32 {
            text.extend_from_slice(number.wrapping_mul(0x9e37_79b9).to_string().as_bytes());
            text.extend(std::iter::repeat_n(b'a' + (number % 3) as u8, (number % 300) as usize));
        }
        let mut block = lz4_flex::block::compress(&text);
        let whole = block.len();
        block.extend([0; 100]);
        for len in (0..text.len()).step_by(997).chain([1, 2, 13, text.len()]) {
            let mut out = vec![7; len];
            decompress_prefix(&block, &mut out).unwrap();
            assert!(out == text[..len], "{len} bytes");
        }
        let mut out = vec![0; text.len() + 1];
        assert!(decompress_prefix(&block[..whole], &mut out).is_err());
        assert!(decompress_prefix(&[], &mut [0]).is_err());
        assert!(decompress_prefix(&[], &mut []).is_ok());
    }

    #[test]
    fn faults_are_told() {
        let error = |input: &[u8]| decompress_prefix(input, &mut [0; 64]).unwrap_err();
        assert_eq!(error(&[0x10, b'a', 2, 0]), "a distance of 2 after 1 bytes");
        assert_eq!(error(&[0x10, b'a', 0, 0]), "a distance of 0 after 1 bytes");
        for short in [&[0x10][..], &[0xf0, 255], &[0x10, b'a', 1], &[0x1f, b'a', 1, 0, 255]] {
            assert_eq!(error(short), "the block ends too early", "{short:?}");
        }
    }
}
