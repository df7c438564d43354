//! What a blob is, by its first bytes: to say so where its media type says something else.

use crate::image::format::Compression;

/// How many first bytes are looked at.
pub(super) const HEAD_BYTES: usize = 512;

/// The name of a compression.
pub(super) fn name(compression: Compression) -> &'static str {
    match compression {
        Compression::None => "an uncompressed tar",
        Compression::Gzip => "gzip",
        Compression::Zstd => "zstd",
    }
}

/// What else a blob is than its media type says, for people; `None` where it may be what it should be.
///
/// `is_tar` says whether the bytes begin a tar stream. Bytes of which nothing is known are no
/// contradiction of "tar": the reader says what is wrong with them.
pub(super) fn other_than(expected: Compression, head: &[u8], is_tar: bool) -> Option<&'static str> {
    // Signatures of the formats: RFC 1952 and 8878 (frames and frames to skip), xz, bzip2, lz4, lzip, squashfs.
    const KNOWN: [(&[u8], &str); 8] = [
        (b"\x1f\x8b", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x2a\x4d\x18", "zstd"),
        (b"\xfd7zXZ\0", "xz"),
        (b"BZh", "bzip2"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"LZIP", "lzip"),
        (b"hsqs", "a squashfs image"),
    ];
    let known = KNOWN.iter().find(|(signature, kind)| match (*kind, signature.len()) {
        // A frame to skip begins with any of 0x50 to 0x5f.
        ("zstd", 3) => head.first().is_some_and(|byte| byte >> 4 == 5) && head.get(1..4) == Some(signature),
        _ => head.starts_with(signature),
    });
    let found = match known {
        _ if is_tar => name(Compression::None),
        Some((_, found)) => found,
        None if head.is_empty() => "empty",
        None => "of no known compression",
    };
    let right = match expected {
        Compression::None => is_tar || known.is_none(),
        Compression::Gzip | Compression::Zstd => found == name(expected),
    };
    (!right).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_told_apart() {
        let (gzip, zstd, skip) = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x5a\x2a\x4d\x18");
        assert_eq!(other_than(Compression::Gzip, gzip, false), None);
        assert_eq!(other_than(Compression::Zstd, zstd, false), None);
        assert_eq!(other_than(Compression::Zstd, skip, false), None);
        assert_eq!(other_than(Compression::Gzip, zstd, false), Some("zstd"));
        assert_eq!(other_than(Compression::None, gzip, false), Some("gzip"));
        // A file whose name begins as gzip does.
        assert_eq!(other_than(Compression::None, gzip, true), None);
        assert_eq!(other_than(Compression::Gzip, b"etc/", true), Some("an uncompressed tar"));
        assert_eq!(other_than(Compression::None, b"hsqs", false), Some("a squashfs image"));
        assert_eq!(other_than(Compression::Gzip, b"", false), Some("empty"));
        assert_eq!(other_than(Compression::None, b"", false), None);
        assert_eq!(other_than(Compression::Zstd, b"xyz", false), Some("of no known compression"));
    }
}
