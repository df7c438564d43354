//! Checks whether a certificate is marked as a CA, which the OpenSSL crate does not expose.
//!
//! Layout (RFC 5280, section 4.1; DER tags in hex):
//! ```text
//! 30 Certificate { 30 TBSCertificate { …, a3 { 30 { 30 Extension { 06 id, [01 critical,] 04 value }, … } } }, … }
//! value of 2.5.29.19: 30 BasicConstraints { [01 cA,] [02 pathLen] }
//! ```
//! OpenSSL has already parsed the same bytes, so a full parser is not needed; anything unrecognised counts as
//! "no".

/// An element: its tag, its content, and what follows it.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        // Certificates are far below 16 MiB: at most three bytes of length.
        0x81..=0x83 => {
            let (length, rest) = rest.split_at_checked(usize::from(first - 0x80))?;
            (length.iter().fold(0, |sum, &byte| sum << 8 | usize::from(byte)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

/// Returns the content of the first element of `bytes`, if it has this tag.
fn expect(tag: u8, bytes: &[u8]) -> Option<&[u8]> {
    element(bytes).filter(|(found, ..)| *found == tag).map(|(_, content, _)| content)
}

/// Iterates over consecutive elements.
fn elements(mut bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let (tag, content, rest) = element(bytes)?;
        bytes = rest;
        Some((tag, content))
    })
}

/// Returns whether a certificate has basic constraints with cA = TRUE.
pub(super) fn is_marked_ca(certificate: &[u8]) -> bool {
    marked_ca(certificate).unwrap_or(false)
}

fn marked_ca(certificate: &[u8]) -> Option<bool> {
    /// 2.5.29.19, id-ce-basicConstraints (RFC 5280, section 4.2.1.9).
    const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
    let to_be_signed = expect(0x30, expect(0x30, certificate)?)?;
    let (_, extensions) = elements(to_be_signed).find(|(tag, _)| *tag == 0xa3)?;
    let (_, extension) = elements(expect(0x30, extensions)?)
        .find(|(_, extension)| expect(0x06, extension) == Some(BASIC_CONSTRAINTS))?;
    let (_, value) = elements(extension).find(|(tag, _)| *tag == 0x04)?;
    // DER encodes TRUE as ff; FALSE is the default and is omitted.
    Some(expect(0x01, expect(0x30, value)?)? == [0xff])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_understood_is_no_ca() {
        for bytes in [
            &b""[..],
            b"\x30",
            b"\x30\x80",
            b"\x30\x84\xff\xff\xff\xff",
            b"\x30\x83\xff\xff\xff",
            &[0x30; 99],
        ] {
            assert!(!is_marked_ca(bytes), "{bytes:x?}");
        }
    }
}
