//! Numbers of tar headers and extended headers.

use super::{BLOCK, Problem, show};

/// A field of a header; the places are constants within it.
pub(super) fn field(header: &[u8; BLOCK], offset: usize, len: usize) -> &[u8] {
    &header[offset..offset + len]
}

/// The bytes before the first NUL.
pub(super) fn cut(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Says that a field is not the number it should be.
pub(super) fn bad_number(field: &'static str, found: &[u8]) -> Problem {
    Problem::Number { field, found: show(found) }
}

/// A number in a header, as GNU tar reads it (its `from_header`): one NUL may stand before it ("buggy tar of unknown
/// vintage"), then blanks; then octal digits up to a NUL, a blank or the end of the field, or GNU's base 256,
/// which begins with the byte 0x80, or 0xff below zero. What follows the end of the number does not
/// count. A field without a number is 0, as Go's reader has it; GNU tar complains and takes -1.
///
/// Its base 64 (`+` or `-` before letters) is not read: only test versions of 1999 wrote it, and a `-1` is more
/// likely a minus sign.
pub(super) fn number(name: &'static str, text: &[u8]) -> Result<i128, Problem> {
    match octal(text) {
        Some(value) => Ok(value),
        None => base_256(text).ok_or_else(|| bad_number(name, text)),
    }
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}

/// What of a field is not before the number.
fn start(text: &[u8]) -> &[u8] {
    let text = text.strip_prefix(b"\0").unwrap_or(text);
    &text[text.iter().take_while(|byte| is_blank(**byte)).count()..]
}

/// A number in octal digits; `None` where something else stands there.
pub(super) fn octal(text: &[u8]) -> Option<i128> {
    let text = start(text);
    let digits = text.iter().take_while(|byte| (b'0'..=b'7').contains(*byte)).count();
    let ends = text.get(digits).is_none_or(|byte| *byte == 0 || is_blank(*byte));
    // 12 digits of 3 bits fit.
    ends.then(|| text[..digits].iter().fold(0, |sum, digit| sum << 3 | i128::from(digit - b'0')))
}

fn base_256(text: &[u8]) -> Option<i128> {
    let (first, rest) = start(text).split_first()?;
    let sign = match first {
        0x80 => 0,
        0xff => -1,
        _ => return None,
    };
    // At most 11 more bytes: 88 bits.
    Some(rest.iter().fold(sign, |sum, byte| sum << 8 | i128::from(*byte)))
}

/// Checks the sum of a header's bytes, the field itself taken as blanks; old tools added signed bytes.
pub(super) fn check_sum(header: &[u8; BLOCK]) -> Result<(), Problem> {
    let text = field(header, 148, 8);
    let byte = |(place, byte): (usize, &u8)| if (148..156).contains(&place) { b' ' } else { *byte };
    let found: i128 = header.iter().enumerate().map(byte).map(i128::from).sum();
    let signed: i128 = header.iter().enumerate().map(byte).map(|byte| i128::from(byte as i8)).sum();
    match octal(text) {
        Some(expected) if expected == found || expected == signed => Ok(()),
        _ => Err(Problem::Checksum { expected: show(text), found: found as u64 }),
    }
}

/// Decimal digits and nothing else.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds of a PAX time, `[-]SECONDS[.FRACTION]`, rounded down.
pub(super) fn seconds(text: &[u8]) -> Option<i64> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let whole = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let down = negative && fraction.iter().any(|digit| *digit != b'0');
    if negative { (-whole).checked_sub(i64::from(down)) } else { Some(whole) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let value = |text: &[u8]| number("x", text).ok();
        for text in
            [&b"0000644\0"[..], b"   644 \0", b"\0 644\0xx", b"644 7 8 ", b"\t\n644\0\0\0", b"00000644"]
        {
            assert_eq!(value(text), Some(0o644), "{}", text.escape_ascii());
        }
        for text in [&b"\0\0\0\0"[..], b"        ", b"\0       ", b""] {
            assert_eq!(value(text), Some(0), "{}", text.escape_ascii());
        }
        assert_eq!(value(b"\x80\0\0\0\0\x40\0\0"), Some(0x40_0000));
        assert_eq!(value(b"\0 \x80\0\0\x40\0\0"), Some(0x40_0000));
        assert_eq!(value(&[0xff; 12]), Some(-1));
        for text in [
            &b"0009\0"[..],
            b"-1\0",
            b"+1\0",
            b"0x1\0",
            b"12,3\0",
            b"\0\x000644\0x9",
            b"\x81\0\0\0\0\0\0\0",
            b"\xc0\0",
        ] {
            let expected = text.starts_with(b"\0\0").then_some(0);
            assert_eq!(value(text), expected, "{}", text.escape_ascii());
        }
    }

    #[test]
    fn times_are_rounded_down() {
        for (text, expected) in [
            ("0", 0),
            ("1.9", 1),
            ("-1", -1),
            ("-1.0", -1),
            ("-1.5", -2),
            ("-0.1", -1),
            ("12345678901.5", 12345678901),
        ] {
            assert_eq!(seconds(text.as_bytes()), Some(expected), "{text}");
        }
        for bad in ["", "-", "1.x", "1e5", "--1", "99999999999999999999"] {
            assert_eq!(seconds(bad.as_bytes()), None, "{bad}");
        }
    }
}
