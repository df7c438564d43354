//! Names of things in a registry: `HOST[:PORT]/REPOSITORY[:TAG | @DIGEST]`.
//!
//! ```text
//! HOST         a host name, an IPv4 address, or [IPv6]
//! REPOSITORY   parts of [a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*, joined by /, at most 255 characters
//! TAG          [A-Za-z0-9_][A-Za-z0-9._-]{0,127}
//! DIGEST       sha256:HEX
//! ```
//!
//! Grammar: the distribution-spec, "Pulling manifests". Whatever passes here can stand in a URL and
//! in a message as it is. `oci_spec::distribution::Reference` reads no IPv6 address and brings a
//! megabyte of regular expressions, so it is not used.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use crate::digest::Digest;

/// The longest repository name, in characters.
const MAX_REPOSITORY: usize = 255;
/// The longest tag, in characters.
const MAX_TAG: usize = 128;

/// What is wrong with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// There is no `/` after the host.
    NoRepository,
    /// The host or its port.
    Host,
    /// The repository.
    Repository,
    /// The tag.
    Tag,
    /// The digest.
    Digest,
    /// A tag and a digest.
    Both,
}

impl Malformed {
    /// What is allowed instead.
    pub const fn allowed(self) -> &'static str {
        match self {
            Self::NoRepository => "expected docker://HOST[:PORT]/NAME[:TAG|@DIGEST]",
            Self::Host => "expected a host name or address, and a port from 1 to 65535",
            Self::Repository => {
                "expected a repository name of parts of a-z 0-9 joined by one of . _ __ or by hyphens, at most 255 characters"
            }
            Self::Tag => "expected a tag of 1 to 128 characters of A-Z a-z 0-9 . _ -, not first . or -",
            Self::Digest => "expected sha256: and 64 lower-case hex digits after the @",
            Self::Both => "expected a tag or a digest, not both",
        }
    }
}

/// A host and its port.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Host {
    /// Host name or address, with `[ ]` around IPv6.
    pub name: String,
    /// Port, if it is not the scheme's own.
    pub port: Option<u16>,
}

impl Host {
    /// Reads `HOST[:PORT]`.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, port) = if let Some(rest) = text.strip_prefix('[') {
            let (address, after) = rest.split_once(']')?;
            address.parse::<Ipv6Addr>().ok()?;
            let port = if after.is_empty() { None } else { Some(after.strip_prefix(':')?) };
            (&text[..address.len() + 2], port)
        } else {
            match text.split_once(':') {
                Some((name, port)) => (name, Some(port)),
                None => (text, None),
            }
        };
        let label = |label: &str| {
            let inner = label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
            !label.is_empty() && inner && !label.starts_with('-') && !label.ends_with('-')
        };
        let is_name = name.len() <= 253 && name.split('.').all(label);
        if !is_name && !name.starts_with('[') {
            return None;
        }
        let port = match port {
            Some(port) if port.bytes().all(|b| b.is_ascii_digit()) => {
                Some(port.parse::<u16>().ok().filter(|port| *port > 0)?)
            }
            Some(_) => return None,
            None => None,
        };
        Some(Self { name: name.to_string(), port })
    }

    /// The address, if the host is written as one.
    pub fn address(&self) -> Option<IpAddr> {
        self.name.trim_start_matches('[').trim_end_matches(']').parse().ok()
    }

    /// Whether the host is this machine by what is written: `localhost`, 127.0.0.0/8 or `[::1]`.
    pub fn is_loopback(&self) -> bool {
        self.name.eq_ignore_ascii_case("localhost")
            || self.address().is_some_and(|address| address.is_loopback())
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.port.iter().try_for_each(|port| write!(f, ":{port}"))
    }
}

/// A tag, or a digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TagOrDigest {
    /// `:TAG`.
    Tag(String),
    /// `@sha256:HEX`.
    Digest(Digest),
}

impl TagOrDigest {
    /// Reads a tag, or `sha256:HEX`.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        if text.contains(':') {
            return text.parse().map(Self::Digest).map_err(|_| Malformed::Digest);
        }
        if is_tag(text) { Ok(Self::Tag(text.to_string())) } else { Err(Malformed::Tag) }
    }
}

impl fmt::Display for TagOrDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => write!(f, "{digest}"),
        }
    }
}

/// A repository of a registry, and what is meant there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The registry.
    pub host: Host,
    /// The repository.
    pub repository: String,
    /// Tag or digest, where one is given.
    pub which: Option<TagOrDigest>,
}

impl Reference {
    /// Reads `HOST[:PORT]/REPOSITORY[:TAG|@DIGEST]`.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let (host, path) = text.split_once('/').ok_or(Malformed::NoRepository)?;
        let host = Host::parse(host).ok_or(Malformed::Host)?;
        let (repository, which) = match path.split_once('@') {
            Some((repository, _)) if repository.contains(':') => return Err(Malformed::Both),
            Some((repository, digest)) => {
                let digest = digest.parse().map_err(|_| Malformed::Digest)?;
                (repository, Some(TagOrDigest::Digest(digest)))
            }
            None => match path.split_once(':') {
                Some((repository, tag)) if is_tag(tag) => {
                    (repository, Some(TagOrDigest::Tag(tag.to_string())))
                }
                Some(_) => return Err(Malformed::Tag),
                None => (path, None),
            },
        };
        if !is_repository(repository) {
            return Err(Malformed::Repository);
        }
        Ok(Self { host, repository: repository.to_string(), which })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        match &self.which {
            Some(TagOrDigest::Tag(tag)) => write!(f, ":{tag}"),
            Some(TagOrDigest::Digest(digest)) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

/// Whether the text is a tag.
pub fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// Whether the text is the name of a repository.
pub fn is_repository(name: &str) -> bool {
    name.len() <= MAX_REPOSITORY && name.split('/').all(is_repository_part)
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_repository_part(part: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    if !bytes.first().copied().is_some_and(word) || !bytes.last().copied().is_some_and(word) {
        return false;
    }
    part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|separator| matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-'))
}

/// Splits what follows `docker:` of a source into `HOST[:PORT]/REPOSITORY` and a tag or digest.
///
/// A tag cannot hold the `+` of a version such as `1.2+3`. It stands as `_`, as Helm has it.
pub(super) fn split(rest: &str) -> Result<super::NamedLocation, &'static str> {
    let rest = rest.strip_prefix("//").ok_or(Malformed::NoRepository.allowed())?;
    let reference = match rest.contains('@') {
        true => Reference::parse(rest),
        false => Reference::parse(&rest.replace('+', "_")),
    };
    let reference = reference.map_err(Malformed::allowed)?;
    let location = format!("{}/{}", reference.host, reference.repository);
    Ok((location, reference.which.map(|which| which.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_this_machine() {
        for text in ["localhost", "localhost:5000", "127.0.0.1:80", "127.9.9.9", "[::1]:5000", "LOCALHOST"] {
            assert!(Host::parse(text).unwrap().is_loopback(), "{text}");
        }
        for text in
            ["localhost.example", "128.0.0.1", "[::2]", "10.0.0.1", "example.org:127", "127.0.0.1.nip.io"]
        {
            assert!(!Host::parse(text).unwrap().is_loopback(), "{text}");
        }
    }

    #[test]
    fn what_comes_from_outside_cannot_leave_its_place_in_a_url() {
        let long = "a".repeat(256);
        for bad in ["../x", "a/../b", "a//b", "%2e%2e", "a\r\nb", "a b", "A", "", &long, "a?x", "a#x", "/a"] {
            assert!(!is_repository(bad), "{bad:?}");
        }
        for bad in ["", "../x", "a/b", "%41", "a\r\nHost: b", "é", &"t".repeat(129), "a?b"] {
            assert!(!is_tag(bad), "{bad:?}");
        }
    }

    #[test]
    fn the_plus_of_a_version_is_an_underscore_in_its_tag() {
        let place = split("//h:5000/p/q:1.2+3").unwrap();
        assert_eq!(place, ("h:5000/p/q".to_string(), Some("1.2_3".to_string())));
    }
}
