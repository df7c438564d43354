//! SHA-256 digests in OCI form: `sha256:` and 64 lower-case hex digits.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use sha2::Digest as _;

/// The SHA-256 digest of a blob, a manifest or a block.
///
/// Text form: `sha256:HEX` (OCI image-spec, descriptor, section "Digests"), strict: lower case only.
///
/// ```
/// use mosfs::Digest;
///
/// let digest = Digest::of(b"abc");
/// assert_eq!(digest.to_string().parse(), Ok(digest));
/// assert_eq!(digest.hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(into = "String")]
pub struct Digest([u8; 32]);

/// The error for a string that is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{found}` is not a digest: expected `sha256:` and 64 lower-case hex digits")]
pub struct DigestError {
    /// The given string.
    pub found: String,
}

impl Digest {
    /// Returns the digest of bytes in memory.
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// Creates a digest from its 32 raw bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 raw bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Its first 64 bits, which are in the same order as digests.
    #[inline(always)]
    pub(crate) fn first_bits(&self) -> u64 {
        self.0.first_chunk().map_or(0, |first| u64::from_be_bytes(*first))
    }

    /// The 64 hex digits, without the `sha256:` prefix.
    pub fn hex(&self) -> String {
        hex(&self.0)
    }

    /// Parses 64 lower-case hex digits without a prefix.
    pub fn from_hex(text: &str) -> Result<Self, DigestError> {
        let mut bytes = [0; 32];
        let (digits, rest) = text.as_bytes().as_chunks::<2>();
        // Whether any is no digit is asked once: an image may list 26,000 digests.
        let mut all = 0;
        for (byte, [high, low]) in bytes.iter_mut().zip(digits) {
            let (high, low) = (VALUES[usize::from(*high)], VALUES[usize::from(*low)]);
            all |= high | low;
            *byte = high << 4 | low;
        }
        if digits.len() != bytes.len() || !rest.is_empty() || all > 15 {
            return Err(DigestError { found: text.chars().take(100).collect() });
        }
        Ok(Self(bytes))
    }
}

/// The value of each byte that is a lower-case hex digit; 255 for others.
const VALUES: [u8; 256] = {
    let mut values = [255; 256];
    let mut value = 0;
    while value < DIGITS.len() {
        values[DIGITS[value] as usize] = value as u8;
        value += 1;
    }
    values
};

/// The lower-case hex digits.
const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// Splits `TEXT@sha256:HEX`: what names a thing by its digest. `None` where the end is no digest.
pub fn split_pin(text: &str) -> Option<(&str, Digest)> {
    let (before, digest) = text.rsplit_once('@')?;
    Some((before, digest.parse().ok()?))
}

/// Formats bytes as lower-case hex digits.
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)] as char);
        text.push(DIGITS[usize::from(byte & 15)] as char);
    }
    text
}

impl Ord for Digest {
    /// In the order of the bytes. Two digests differ in their first eight.
    fn cmp(&self, other: &Self) -> Ordering {
        self.first_bits().cmp(&other.first_bits()).then_with(|| self.0.cmp(&other.0))
    }
}

impl PartialOrd for Digest {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let wrong = || DigestError { found: text.chars().take(100).collect() };
        Self::from_hex(text.strip_prefix("sha256:").ok_or_else(wrong)?).map_err(|_| wrong())
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_str(Text)
    }
}

/// Reads the text form where it is, without a copy.
struct Text;

impl Visitor<'_> for Text {
    type Value = Digest;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Digest, E> {
        text.parse().map_err(E::custom)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// An incremental hasher, which also counts its input.
#[derive(Clone, Default)]
pub struct Hasher {
    inner: sha2::Sha256,
    bytes: u64,
}

impl Hasher {
    /// Creates a hasher without input.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.inner.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    /// Returns the number of bytes added.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the digest of all input.
    pub fn finish(self) -> Digest {
        Digest(self.inner.finalize().into())
    }
}

impl std::io::Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answer_and_round_trip() {
        // FIPS 180-4, the one-block example "abc".
        let digest = Digest::of(b"abc");
        let text = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest.to_string(), text);
        assert_eq!(text.parse::<Digest>().unwrap(), digest);
        let mut hasher = Hasher::new();
        hasher.update(b"a");
        hasher.update(b"bc");
        assert_eq!(hasher.bytes(), 3);
        assert_eq!(hasher.finish(), digest);
    }

    #[test]
    fn only_the_strict_form_is_read() {
        let good = Digest::of(b"").to_string();
        let upper = format!("sha256:{}", good[7..].to_uppercase());
        let (short, long) = (good[..70].to_string(), format!("{good}0"));
        let sha512 = good.replace("256", "512");
        for bad in [&upper, &short, &long, &sha512, "", "sha256:", "sha256:é"] {
            assert_eq!(bad.parse::<Digest>(), Err(DigestError { found: bad.to_string() }));
        }
    }

    #[test]
    fn each_digit_has_its_value_and_nothing_else_has_one() {
        let good = Digest::of(b"");
        for at in [0, 1, 63] {
            for c in 0..128u8 {
                let mut text = good.hex().into_bytes();
                text[at] = c;
                let text = String::from_utf8(text).unwrap();
                let value = (c as char).to_digit(16).filter(|_| !c.is_ascii_uppercase());
                let read = Digest::from_hex(&text).ok().map(|digest| {
                    assert_eq!(digest.hex(), text);
                    u32::from(digest.0[at / 2] >> (4 * (1 - at % 2)) & 15)
                });
                assert_eq!(read, value, "{text}");
            }
        }
    }

    #[test]
    fn they_are_in_the_order_of_their_bytes() {
        let mut digests: Vec<_> = (0..50u8).map(|n| Digest::of(&[n])).collect();
        let twins: Vec<_> = digests
            .iter()
            .map(|digest| {
                let mut bytes = digest.0;
                bytes[31] ^= 0x80;
                Digest(bytes)
            })
            .collect();
        digests.extend(twins);
        for (a, b) in digests.iter().flat_map(|a| digests.iter().map(move |b| (a, b))) {
            assert_eq!(a.cmp(b), a.0.as_slice().cmp(b.0.as_slice()));
        }
    }

    #[test]
    fn json_has_the_text_form_alone() {
        let digest = Digest::of(b"abc");
        let json = serde_json::to_string(&digest).unwrap();
        assert_eq!(json, format!("\"{digest}\""));
        assert_eq!(serde_json::from_str::<Digest>(&json).unwrap(), digest);
        let escaped = json.replace("sha", "\\u0073ha");
        assert_eq!(serde_json::from_str::<Digest>(&escaped).unwrap(), digest);
        let value = serde_json::Value::String(digest.to_string());
        assert_eq!(serde_json::from_value::<Digest>(value).unwrap(), digest);
        for (bad, said) in [
            ("7", "invalid type: integer `7`, expected a string"),
            ("\"sha256:\"", "`sha256:` is not a digest"),
        ] {
            let error = serde_json::from_str::<Digest>(bad).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
