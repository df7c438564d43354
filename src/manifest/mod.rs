//! Manifests: what a publisher writes and what a device runs (docs/MANIFESTS.md).
//!
//! ```text
//! import manifest (YAML) --yaml.rs--> tree --import.rs--> ImportManifest
//!                                                             | + digest and size of each image
//! system manifest (JSON) <-json.rs--- tree <--system.rs-- SystemManifest
//! ```
//!
//! Both formats are read into one kind of tree of nodes with positions ([`tree`]), and decoded by one decoder
//! ([`decode`]), so each rule is written once. Reading works on bytes and does no I/O. Everything is bounded:
//! bytes, depth and number of nodes.

/// Declares an enumeration whose values are words of a manifest.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$value_doc])* $value,)* }

        impl $name {
            /// All words, in the order of the documentation.
            pub const WORDS: &'static [&'static str] = &[$($word,)*];

            /// Returns the word in a manifest.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$value => $word,)* }
            }

            /// Returns the value of a word, if it is valid.
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$value),)* _ => None }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

pub mod decode;
pub mod import;
pub mod json;
pub mod layer;
pub mod rules;
pub mod system;
pub mod tree;
pub mod url;
pub mod yaml;

use std::fmt;
use std::str::FromStr;

pub use decode::{Problem, ProblemKind};
pub use import::{ImportError, ImportErrors, ImportManifest, ImportTarget, Pin, Resolved};
pub use layer::{LayerChoice, LayerCompression, LayerKind};
pub use rules::Refused;
pub use system::{SystemError, SystemManifest, Target};
pub use tree::Position;
pub use url::ImageUrl;

/// Media type of the import manifest, the value of its optional field `mediatype`.
pub const IMPORT_MEDIA_TYPE: &str = "application/vnd.mos.import.manifest.v1";
/// Media type of the system manifest, the value of its field `mediatype`.
pub const SYSTEM_MEDIA_TYPE: &str = "application/vnd.mos.system.manifest.v1";
/// The largest integer that every JSON reader represents exactly (RFC 8785, appendix D): 2^53 - 1.
pub const MAX_INTEGER: u64 = (1 << 53) - 1;

/// The name of a target: `[a-z0-9]+([._-][a-z0-9]+)*`, at most 63 characters.
///
/// It can therefore be used unchanged as a file name and as part of a store name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TargetName(String);

impl TargetName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TargetName {
    type Err = Refused;

    fn from_str(text: &str) -> Result<Self, Refused> {
        rules::name(text)?;
        Ok(Self(text.to_string()))
    }
}

impl fmt::Display for TargetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::borrow::Borrow<str> for TargetName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

words! {
    /// How a target is used (`service_type`).
    ServiceType {
        /// The root file system. A system has at most one.
        Hostfs = "hostfs",
        /// A service in its own container.
        Container = "container",
        /// A file system that others mount.
        FsOnly = "fs-only",
    }
}

words! {
    /// How a target's images are stored (`storage_type`).
    StorageType {
        /// squashfs layers with a verity tree. The default.
        Atomfs = "atomfs",
        /// PuzzleFS chunks.
        Puzzlefs = "puzzlefs",
    }
}

words! {
    /// What is built from the system for its first installation (`image_type`).
    ImageType {
        /// A bootable install medium.
        Iso = "iso",
    }
}

words! {
    /// The transport protocol of a forwarded port.
    Protocol {
        /// TCP, the default.
        Tcp = "tcp",
        /// UDP.
        Udp = "udp",
    }
}

/// The network of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// The host's own network.
    Host,
    /// Loopback only.
    None,
    /// One interface behind address translation. Omitted fields are `None`.
    Simple {
        /// `A.B.C.D` or `A.B.C.D/BITS`, or empty for none.
        ipv4: Option<String>,
        /// An IPv6 address, with or without `/BITS`, or empty for none.
        ipv6: Option<String>,
        /// Ports of the host that are forwarded to ports of the target.
        ports: Option<Vec<Port>>,
    },
}

impl Network {
    /// The words of the field `type`.
    pub const TYPES: &'static [&'static str] = &["host", "none", "simple"];

    /// The word of the field `type`.
    pub const fn type_name(&self) -> &'static str {
        match self {
            Network::Host => "host",
            Network::None => "none",
            Network::Simple { .. } => "simple",
        }
    }
}

/// A port of the host that is forwarded to a port of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// The port on the host, 1 to 65535.
    pub host: u16,
    /// The port in the target, 1 to 65535.
    pub container: u16,
    /// The protocol; TCP if omitted.
    pub protocol: Option<Protocol>,
}

/// A mount inside a target (OCI runtime-spec, config, section "Mounts").
///
/// There are no fields `uidMappings` and `gidMappings`: the ids of a target follow from its `nsgroup`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Absolute path inside the target, without `..`.
    pub destination: String,
    /// A path, a device or a name that stands for one (`tmpfs`).
    pub source: Option<String>,
    /// The file system (`type`), such as `bind` or `tmpfs`.
    pub kind: Option<String>,
    /// Options, one per element.
    pub options: Option<Vec<String>>,
}
