//! The location of an image in an import manifest.
//!
//! ```text
//! oci:PATH[:REF]  oci://PATH[:REF]                 PATH ends at the first `:`
//! oci:PATH@DIGEST                                  anything in the layout, by its digest
//! docker://HOST[:PORT]/NAME[:TAG | @DIGEST]        not both of tag and digest
//! ```
//!
//! Grammar of host, name and tag: [`crate::transport::reference`]. Grammar of REF: OCI image-spec,
//! annotations, `org.opencontainers.image.ref.name`.

use std::fmt;
use std::str::FromStr;

use super::rules::{MAX_PATH, Refused, has_control};
use crate::digest::{Digest, split_pin};
use crate::transport::reference::{Host, Malformed, Reference, TagOrDigest};

/// The location of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageUrl {
    /// A folder that is an OCI image layout.
    Oci {
        /// The folder, absolute or relative to the working directory.
        path: String,
        /// The name in the layout, or `@sha256:HEX`; without one, the layout has to hold one image only.
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
const ALLOWED: &str = "oci:PATH[:REF|@DIGEST], oci://PATH:REF or docker://HOST[:PORT]/NAME[:TAG|@DIGEST]";
/// The same, for what skopeo can make a layout of.
const UNPACK: &str =
    "oci:PATH[:REF|@DIGEST] or docker://…; `skopeo copy SOURCE oci:PATH:REF` makes a layout of it";
/// What skopeo and podman read besides, and mosfs does not.
const FOREIGN: [&str; 7] =
    ["oci-archive:", "docker-archive:", "dir:", "docker-daemon:", "containers-storage:", "ostree:", "sif:"];

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
        if FOREIGN.iter().any(|scheme| text.starts_with(scheme)) {
            return Err(Refused { allowed: UNPACK });
        }
        Err(Refused { allowed: ALLOWED })
    }
}

fn oci(rest: &str) -> Result<ImageUrl, Refused> {
    if let Some((path, digest)) = split_pin(rest)
        && !path.contains(':')
    {
        if path.is_empty() {
            return Err(Refused { allowed: "oci:PATH@DIGEST with a PATH that is not empty" });
        }
        return Ok(ImageUrl::Oci { path: path.to_string(), reference: Some(format!("@{digest}")) });
    }
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
    let Reference { host: Host { name: host, port }, repository: name, which } =
        Reference::parse(rest).map_err(|malformed| Refused {
            allowed: match malformed {
                Malformed::NoRepository => ALLOWED,
                Malformed::Host => {
                    "docker://HOST[:PORT]/… with a host name or address and a port from 1 to 65535"
                }
                Malformed::Both => "docker://HOST[:PORT]/NAME[:TAG|@DIGEST], not both of tag and digest",
                Malformed::Digest => "after @, sha256: and 64 lower-case hex digits",
                Malformed::Tag => "a tag of 1 to 128 characters of A-Z a-z 0-9 . _ -, not first . or -",
                Malformed::Repository => {
                    "a repository name of parts of a-z 0-9 joined by one of . _ __ or by hyphens, at most 255 characters"
                }
            },
        })?;
    let reference = which.map(|which| match which {
        TagOrDigest::Tag(tag) => DockerReference::Tag(tag),
        TagOrDigest::Digest(digest) => DockerReference::Digest(digest),
    });
    Ok(ImageUrl::Docker { host, port, name, reference })
}

impl fmt::Display for ImageUrl {
    /// The form that [`FromStr`] parses back to the same value: `oci:PATH[:REF]` or `docker://…`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // `oci:` before a path that begins with two slashes would parse as `oci://`.
            Self::Oci { path, reference } => {
                f.write_str(if path.starts_with("//") { "oci://" } else { "oci:" })?;
                f.write_str(path)?;
                let mark = |reference: &str| if reference.starts_with('@') { "" } else { ":" };
                reference.iter().try_for_each(|reference| write!(f, "{}{reference}", mark(reference)))
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
            (&format!("oci:/srv/layout@{digest}"), None),
            (&format!("oci:/srv/layout:v1@{digest}"), None),
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
            "oci-archive:/d.tar:x",
            &format!("oci:@{digest}"),
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
