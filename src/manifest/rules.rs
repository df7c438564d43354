//! Rules for single values of a manifest. Pure checks, shared by both formats.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use uuid::Uuid;

use super::MAX_INTEGER;
use crate::digest::Digest;
use crate::text::one_line;

/// A value that a rule refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("allowed: {allowed}")]
pub struct Refused {
    /// What the rule allows.
    pub allowed: &'static str,
}

const fn refused(allowed: &'static str) -> Refused {
    Refused { allowed }
}

/// Maximum length of a name, in characters.
pub const MAX_NAME: usize = 63;
/// Maximum length of a path, a mount source or an option (`PATH_MAX` of linux/limits.h).
pub const MAX_PATH: usize = 4096;

/// Returns whether a string contains control characters, which RFC 8785 and OLPC canonical JSON encode
/// differently and no manifest needs.
pub fn has_control(text: &str) -> bool {
    text.chars().any(char::is_control)
}

/// Returns at most `max` characters of a string, for messages: untrusted text goes to terminals and logs, so
/// it is escaped ([`one_line`]).
pub fn printable(text: &str, max: usize) -> String {
    let short: String = text.chars().take(max).collect();
    let mut short = one_line(&short).into_owned();
    if text.chars().nth(max).is_some() {
        short.push('…');
    }
    short
}

/// A name: `[a-z0-9]+([._-][a-z0-9]+)*`, at most 63 characters.
pub fn name(text: &str) -> Result<(), Refused> {
    let part =
        |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if text.len() <= MAX_NAME && text.split(['.', '_', '-']).all(part) {
        return Ok(());
    }
    Err(refused("[a-z0-9]+([._-][a-z0-9]+)*, at most 63 characters"))
}

/// A namespace group: empty, or a name.
pub fn nsgroup(text: &str) -> Result<(), Refused> {
    if text.is_empty() || name(text).is_ok() {
        return Ok(());
    }
    Err(refused("nothing, or [a-z0-9]+([._-][a-z0-9]+)*, at most 63 characters"))
}

/// The version of a target: text of 1 to 128 characters out of `A-Z a-z 0-9 . _ + ~ -` that
/// begins with a letter or a digit.
pub fn target_version(text: &str) -> Result<(), Refused> {
    let first = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if first && text.len() <= 128 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._+~-".contains(&b))
    {
        return Ok(());
    }
    Err(refused("1 to 128 characters of A-Z a-z 0-9 . _ + ~ -, first a letter or digit"))
}

/// A UUID in its usual form (RFC 9562, section 4): 36 characters with hyphens, either case.
pub fn uuid(text: &str) -> Result<Uuid, Refused> {
    let wrong = refused("a UUID such as de6c82c5-2e01-4c92-949b-a6545d30fc06");
    // `Uuid` also reads braces, `urn:uuid:` and 32 bare digits, which have another length.
    if text.len() != 36 {
        return Err(wrong);
    }
    Uuid::try_parse(text).map_err(|_| wrong)
}

/// A port number.
pub fn port(number: u64) -> Result<u16, Refused> {
    match u16::try_from(number) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(refused("an integer from 1 to 65535")),
    }
}

/// `ADDRESS` or `ADDRESS/BITS`, or nothing.
fn address<T: std::str::FromStr>(text: &str, max_bits: u8) -> bool {
    let Some((address, bits)) = text.split_once('/') else {
        return text.is_empty() || text.parse::<T>().is_ok();
    };
    let digits = !bits.is_empty() && bits.bytes().all(|b| b.is_ascii_digit());
    let plain = digits && (bits == "0" || !bits.starts_with('0'));
    address.parse::<T>().is_ok() && plain && bits.parse::<u8>().is_ok_and(|bits| bits <= max_bits)
}

/// An IPv4 address, with or without prefix length, or nothing.
pub fn ipv4(text: &str) -> Result<(), Refused> {
    if address::<Ipv4Addr>(text, 32) {
        return Ok(());
    }
    Err(refused("an IPv4 address such as 10.0.3.99 or 10.0.3.99/24, or nothing"))
}

/// An IPv6 address, with or without prefix length, or nothing.
pub fn ipv6(text: &str) -> Result<(), Refused> {
    if address::<Ipv6Addr>(text, 128) {
        return Ok(());
    }
    Err(refused("an IPv6 address such as fd00::99 or fd00::99/64, or nothing"))
}

/// A mount point: an absolute path without `..`, so that it stays inside the target.
pub fn destination(text: &str) -> Result<(), Refused> {
    let inside = text.starts_with('/') && !text.split('/').any(|part| part == "..");
    if inside && text.len() <= MAX_PATH && !has_control(text) {
        return Ok(());
    }
    Err(refused("an absolute path without `..` or control characters, at most 4096 bytes"))
}

/// The source of a mount, or one of its options.
pub fn mount_text(text: &str) -> Result<(), Refused> {
    if !text.is_empty() && text.len() <= MAX_PATH && !has_control(text) {
        return Ok(());
    }
    Err(refused("1 to 4096 bytes without control characters"))
}

/// The type of a mount.
pub fn mount_type(text: &str) -> Result<(), Refused> {
    let word = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if !text.is_empty() && text.len() <= MAX_NAME && word {
        return Ok(());
    }
    Err(refused("1 to 63 characters of A-Z a-z 0-9 . _ -, such as bind or tmpfs"))
}

/// A time: a number and `s`, `m` or `h`; at most a day.
pub fn time(text: &str) -> Result<Duration, Refused> {
    let seconds = [('s', 1), ('m', 60), ('h', 3600)]
        .into_iter()
        .find_map(|(unit, seconds)| number(text.strip_suffix(unit)?)?.checked_mul(seconds))
        .filter(|seconds| (1..=86400).contains(seconds));
    seconds.map(Duration::from_secs).ok_or(refused("a time of 1s to 24h, such as 10s, 2m or 1h"))
}

/// A size in bytes, or with `K`, `M`, `G` or `T` (powers of 1024).
pub fn size(text: &str) -> Result<u64, Refused> {
    let unit = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];
    let (digits, shift) = unit
        .into_iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, shift)))
        .unwrap_or((text, 0));
    let bytes = number(digits).and_then(|count| count.checked_mul(1 << shift));
    bytes
        .filter(|bytes| *bytes <= MAX_INTEGER)
        .ok_or(refused("a number of bytes, or with K, M, G or T: 256M"))
}

/// Whether programs read a name as an IPv4 address (inet_aton(3)), such as `10.0.3.9`, `127.1` or `0x7f`.
pub fn is_address(name: &str) -> bool {
    let number = |part: &str| {
        let (digits, radix) = part.strip_prefix("0x").map_or((part, 10), |hex| (hex, 16));
        // A leading 0 is one of octal numbers, which have no other digits than decimal ones.
        !digits.is_empty() && digits.chars().all(|digit| digit.is_digit(radix))
    };
    name.split('.').count() <= 4 && name.split('.').all(number)
}

/// A positive number in decimal digits, without a leading zero.
fn number(digits: &str) -> Option<u64> {
    let plain = !digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit());
    if plain { digits.parse().ok() } else { None }
}

/// The size of a writable root: `size=SIZE`. Returns the size as written.
pub fn writable(text: &str) -> Result<String, Refused> {
    let size_of = text.strip_prefix("size=").filter(|text| size(text).is_ok());
    size_of.map(str::to_string).ok_or(refused("true, false, or size= and a size such as 64M"))
}

/// A part of the processors: a positive number and `%`, at most 100000.
pub fn percent(text: &str) -> Result<(), Refused> {
    let percent = text.strip_suffix('%').and_then(number);
    if percent.is_some_and(|percent| percent <= 100_000) {
        return Ok(());
    }
    Err(refused("a number and %, such as 150% for one and a half processors"))
}

/// A count that is at most 1000.
pub fn up_to_1000(number: u64) -> Result<u64, Refused> {
    if number <= 1000 { Ok(number) } else { Err(refused("an integer from 1 to 1000")) }
}

/// The seconds of `stop_seconds`.
pub fn stop_seconds(number: u64) -> Result<u64, Refused> {
    if number <= 3600 { Ok(number) } else { Err(refused("an integer from 1 to 3600")) }
}

/// A program, an argument or the value of a variable.
pub fn argument(text: &str) -> Result<(), Refused> {
    if text.len() <= MAX_PATH && !has_control(text) {
        return Ok(());
    }
    Err(refused("at most 4096 bytes without control characters"))
}

/// The name of an environment variable.
pub fn variable(text: &str) -> Result<(), Refused> {
    let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    if first && text.len() <= 255 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return Ok(());
    }
    Err(refused("[A-Za-z_][A-Za-z0-9_]*, at most 255 characters"))
}

/// All capabilities (capabilities(7)), without `CAP_`.
pub const CAPABILITIES: [&str; 41] = [
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// A capability, without `CAP_`.
pub fn capability(text: &str) -> Result<(), Refused> {
    if CAPABILITIES.contains(&text) {
        return Ok(());
    }
    Err(refused("a name of capabilities(7) without CAP_, such as NET_ADMIN"))
}

/// A device of the host: a path below `/dev/`.
pub fn device(text: &str) -> Result<(), Refused> {
    let below = text
        .strip_prefix("/dev/")
        .is_some_and(|rest| rest.split('/').all(|part| !part.is_empty() && part != "." && part != ".."));
    if below && text.len() <= MAX_PATH && !has_control(text) {
        return Ok(());
    }
    Err(refused("a path below /dev/, without `.` and `..`"))
}

/// The address of a published port: one IPv4 address of the host.
pub fn host_address(text: &str) -> Result<(), Refused> {
    match text.parse::<Ipv4Addr>() {
        Ok(_) => Ok(()),
        Err(_) => Err(refused("an IPv4 address of the host, such as 192.0.2.7")),
    }
}

/// The block sizes of new squashfs layers, in bytes, each with its word.
pub const BLOCK_SIZES: [(&str, u32); 7] = [
    ("16K", 16 << 10),
    ("32K", 32 << 10),
    ("64K", 64 << 10),
    ("128K", 128 << 10),
    ("256K", 256 << 10),
    ("512K", 512 << 10),
    ("1M", 1 << 20),
];

/// A block size of new squashfs layers. Returns it in bytes.
pub fn block_size(text: &str) -> Result<u32, Refused> {
    let known = BLOCK_SIZES.iter().find(|(word, _)| *word == text);
    known.map(|(_, bytes)| *bytes).ok_or(refused("16K, 32K, 64K, 128K, 256K, 512K, 1M"))
}

/// A digest in OCI form.
pub fn digest(text: &str) -> Result<Digest, Refused> {
    text.parse().map_err(|_| refused("sha256: and 64 lower-case hex digits"))
}
