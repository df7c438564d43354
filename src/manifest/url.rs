//! The location of an image in an import manifest.
//!
//! ```text
//! oci:PATH[:REF]  oci://PATH[:REF]                 PATH ends at the first `:`
//! docker://HOST[:PORT]/NAME[:TAG | @DIGEST]        not both of tag and digest
//! ```
//!
//! Grammar of host, name and tag: the distribution project's reference grammar. Grammar of REF:
//! OCI image-spec, annotations, `org.opencontainers.image.ref.name`.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use super::rules::{MAX_PATH, Refused, has_control};
use crate::digest::Digest;

/// The location of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageUrl {
    /// A folder that is an OCI image layout.
    Oci {
        /// The folder, absolute or relative to the working directory.
        path: String,
        /// The name in the layout; without one, the layout must hold only one image.
        reference: Option<String>,
    },
    /// A registry.
    Docker {
        /// Host name or address, with `[ ]` around IPv6.
        host: String,
        /// Port, if it is not the default.
        port: Option<u16>,
        /// The repository.
        name: String,
        /// Tag or digest.
        reference: Option<DockerReference>,
    },
}

/// The part after the name of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DockerReference {
    /// `:TAG`.
    Tag(String),
    /// `@sha256:HEX`.
    Digest(Digest),
}

/// The allowed forms.
const ALLOWED: &str = "oci:PATH[:REF], oci://PATH:REF or docker://HOST[:PORT]/NAME[:TAG|@DIGEST]";

impl FromStr for ImageUrl {
    type Err = Refused;

    fn from_str(text: &str) -> Result<Self, Refused> {
        if has_control(text) || text.len() > MAX_PATH {
            return Err(Refused { allowed: ALLOWED });
        }
        if let Some(rest) = text.strip_prefix("docker://") {
            return docker(rest);
        }
        if let Some(rest) = text.strip_prefix("oci://").or_else(|| text.strip_prefix("oci:")) {
            return oci(rest);
        }
        Err(Refused { allowed: ALLOWED })
    }
}

fn oci(rest: &str) -> Result<ImageUrl, Refused> {
    let (path, reference) = match rest.split_once(':') {
        Some((path, reference)) => (path, Some(reference)),
        None => (rest, None),
    };
    if path.is_empty() {
        return Err(Refused { allowed: "oci:PATH[:REF] with a PATH that is not empty" });
    }
    if reference.is_some_and(|reference| !is_oci_reference(reference)) {
        return Err(Refused {
            allowed: "oci:PATH[:REF] with REF as in the OCI image-spec: parts of A-Z a-z 0-9, joined by one of -._:@/+",
        });
    }
    Ok(ImageUrl::Oci { path: path.to_string(), reference: reference.map(Into::into) })
}

/// `component ("/" component)*`, component `alphanum (separator alphanum)*`, separator `[-._:@+]` or `--`.
fn is_oci_reference(text: &str) -> bool {
    text.split('/').all(|component| {
        // `--` is one separator.
        component
            .replace("--", "-")
            .split(['-', '.', '_', ':', '@', '+'])
            .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()))
    })
}

fn docker(rest: &str) -> Result<ImageUrl, Refused> {
    let (authority, path) = rest.split_once('/').ok_or(Refused { allowed: ALLOWED })?;
    let (host, port) = split_host(authority).ok_or(Refused {
        allowed: "docker://HOST[:PORT]/… with a host name or address and a port from 1 to 65535",
    })?;
    let (name, reference) = match path.split_once('@') {
        Some((name, _)) if name.contains(':') => {
            return Err(Refused {
                allowed: "docker://HOST[:PORT]/NAME[:TAG|@DIGEST], not both of tag and digest",
            });
        }
        Some((name, digest)) => {
            let digest = digest
                .parse()
                .map_err(|_| Refused { allowed: "after @, sha256: and 64 lower-case hex digits" })?;
            (name, Some(DockerReference::Digest(digest)))
        }
        None => match path.split_once(':') {
            Some((name, tag)) if is_tag(tag) => (name, Some(DockerReference::Tag(tag.to_string()))),
            Some(_) => {
                return Err(Refused {
                    allowed: "a tag of 1 to 128 characters of A-Z a-z 0-9 . _ -, not first . or -",
                });
            }
            None => (path, None),
        },
    };
    if name.len() > 255 || !name.split('/').all(is_repository_part) {
        return Err(Refused {
            allowed: "a repository name of parts of a-z 0-9 joined by one of . _ __ or by hyphens, at most 255 characters",
        });
    }
    Ok(ImageUrl::Docker { host, port, name: name.to_string(), reference })
}

fn split_host(authority: &str) -> Option<(String, Option<u16>)> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (address, after) = rest.split_once(']')?;
        address.parse::<Ipv6Addr>().ok()?;
        (
            &authority[..address.len() + 2],
            if after.is_empty() { None } else { Some(after.strip_prefix(':')?) },
        )
    } else {
        match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    let label = |label: &str| {
        let inner = label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        !label.is_empty() && inner && !label.starts_with('-') && !label.ends_with('-')
    };
    let name = host.len() <= 253 && host.split('.').all(label);
    if !name && !host.starts_with('[') {
        return None;
    }
    let port = match port {
        Some(port) if port.bytes().all(|b| b.is_ascii_digit()) => {
            Some(port.parse::<u16>().ok().filter(|port| *port > 0)?)
        }
        Some(_) => return None,
        None => None,
    };
    Some((host.to_string(), port))
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= 128
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
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

impl fmt::Display for ImageUrl {
    /// The form that [`FromStr`] parses back to the same value: `oci:PATH[:REF]` or `docker://…`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // `oci:` before a path that begins with two slashes would parse as `oci://`.
            Self::Oci { path, reference } => {
                f.write_str(if path.starts_with("//") { "oci://" } else { "oci:" })?;
                f.write_str(path)?;
                reference.iter().try_for_each(|reference| write!(f, ":{reference}"))
            }
            Self::Docker { host, port, name, reference } => {
                write!(f, "docker://{host}")?;
                port.iter().try_for_each(|port| write!(f, ":{port}"))?;
                write!(f, "/{name}")?;
                match reference {
                    Some(DockerReference::Tag(tag)) => write!(f, ":{tag}"),
                    Some(DockerReference::Digest(digest)) => write!(f, "@{digest}"),
                    None => Ok(()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_written_back() {
        let digest = Digest::of(b"");
        for (text, back) in [
            ("oci:/srv/layout", None),
            ("oci:dir:mos/images/hostfs:sha256/abc", None),
            ("oci:///srv/layout:latest", Some("oci:/srv/layout:latest")),
            ("oci://layout:v1.0+build", Some("oci:layout:v1.0+build")),
            ("oci:////layout:a", None),
            ("docker://some.url/puzzlefs/hostfs:latest", None),
            ("docker://localhost:5000/a__b/c---d", None),
            ("docker://[::1]:5000/a", None),
            (&format!("docker://10.0.0.1/a.b@{digest}"), None),
        ] {
            let url: ImageUrl = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(url.to_string(), back.unwrap_or(text));
            assert_eq!(url.to_string().parse::<ImageUrl>(), Ok(url));
        }
    }

    #[test]
    fn the_path_of_a_layout_ends_at_the_first_colon() {
        let url: ImageUrl = "oci:/d:mos/images/a:sha256/b".parse().unwrap();
        let reference = Some("mos/images/a:sha256/b".to_string());
        assert_eq!(url, ImageUrl::Oci { path: "/d".into(), reference });
    }

    #[test]
    fn all_else_is_refused() {
        let digest = Digest::of(b"");
        let long = format!("docker://h/{}", "a".repeat(256));
        let long_tag = format!("docker://h/a:{}", "t".repeat(129));
        for text in [
            "",
            "oci",
            "oci:",
            "oci::ref",
            "oci://",
            "oci:/d:",
            "oci:/d:a//b",
            "oci:/d:.a",
            "oci:/d:a b",
            "oci:/d\n",
            "dir:/d",
            "docker:h/a",
            "docker://",
            "docker://h",
            "docker://h/",
            "docker:///a",
            "docker://h:/a",
            "docker://h:0/a",
            "docker://h:65536/a",
            "docker://h:+1/a",
            "docker://-h/a",
            "docker://h./a",
            "docker://h/A",
            "docker://h/a/",
            "docker://h/a..b",
            "docker://h/a___b",
            "docker://h/a._b",
            "docker://h/a:",
            "docker://h/a:.t",
            "docker://h/a@sha256:00",
            "docker://h/a@",
            "docker://u@h/a",
            "docker://[::1/a",
            "docker://[x]/a",
            &format!("docker://h/a:tag@{digest}"),
            &long,
            &long_tag,
            "http://h/a",
        ] {
            assert!(text.parse::<ImageUrl>().is_err(), "{text}");
        }
    }
}
