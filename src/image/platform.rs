//! The platform of an image: `OS/ARCH[/VARIANT]`, in Go's terms.

use std::collections::BTreeMap;

use oci_spec::image::{Arch, Os};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A platform, in Go's terms (image-spec, image-index.md, `platform`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Platform {
    /// `amd64`, `arm64` …
    pub architecture: String,
    /// `linux` …
    pub os: String,
    /// `v8` …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// The fields that mosfs does not know.
    #[serde(flatten)]
    pub extra: BTreeMap<String, Value>,
}

impl Platform {
    /// The platform of this machine.
    pub fn this_machine() -> Self {
        let (architecture, os) = (Arch::default().to_string(), Os::default().to_string());
        Self { architecture, os, variant: None, extra: BTreeMap::new() }
    }

    /// Ranks how well an image for `other` runs on this platform: lower is better, `None` means not at all.
    ///
    /// A variant that requires more than the architecture's baseline is chosen only by its own name.
    pub fn accepts(&self, other: &Platform) -> Option<usize> {
        if (self.os.as_str(), self.architecture.as_str()) != (other.os.as_str(), other.architecture.as_str())
        {
            return None;
        }
        if self.variant.is_some() && self.variant == other.variant {
            return Some(0);
        }
        let baselines: &[&str] = match other.architecture.as_str() {
            "amd64" => &["v1"],
            "arm64" => &["v8", "v8.0"],
            "arm" => &["v6", "v5"],
            _ => &[],
        };
        match other.variant.as_deref() {
            None | Some("") => Some(1),
            Some(variant) => baselines.iter().position(|known| *known == variant).map(|place| place + 2),
        }
    }
}

impl std::str::FromStr for Platform {
    type Err = String;

    /// Reads `OS/ARCH[/VARIANT]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let word = |part: &&str| {
            let known =
                |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-');
            (1..=64).contains(&part.len()) && part.bytes().all(known)
        };
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts.as_slice() {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant.to_string())),
            _ => return Err(format!("`{text}` is not a platform; expected OS/ARCH, as linux/arm64")),
        };
        if !parts.iter().all(word) {
            return Err(format!("`{text}` is not a platform; expected lower-case words, as linux/arm64"));
        }
        Ok(Self {
            architecture: architecture.to_string(),
            os: os.to_string(),
            variant,
            extra: BTreeMap::new(),
        })
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(f, "/{variant}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms() {
        let platform = |architecture: &str, variant: Option<&str>| Platform {
            architecture: architecture.into(),
            os: "linux".into(),
            variant: variant.map(Into::into),
            extra: BTreeMap::new(),
        };
        let amd64 = platform("amd64", None);
        assert_eq!(amd64.accepts(&platform("amd64", None)), Some(1));
        assert_eq!(amd64.accepts(&platform("amd64", Some("v1"))), Some(2));
        assert_eq!(amd64.accepts(&platform("amd64", Some("v3"))), None);
        assert_eq!(amd64.accepts(&platform("arm64", None)), None);
        let v3: Platform = "linux/amd64/v3".parse().unwrap();
        assert_eq!(v3, platform("amd64", Some("v3")));
        assert_eq!(v3.accepts(&platform("amd64", Some("v3"))), Some(0));
        assert_eq!(v3.accepts(&platform("amd64", Some("v2"))), None);
        for bad in ["", "arm64", "linux/", "/arm64", "linux/arm64/v8/x", "Linux/arm64", "linux/arm 64"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }
}
