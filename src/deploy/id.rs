//! The name of a deployment.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::digest::Digest;

/// A deployment's name: version and the digest of its system manifest. Text form `VERSION-HEX`,
/// which is also the name of its folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeploymentId {
    /// The version of the system.
    pub version: u64,
    /// The digest of the system manifest.
    pub digest: Digest,
}

impl fmt::Display for DeploymentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.version, self.digest.hex())
    }
}

/// A string that is not the name of a deployment.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not the name of a deployment: expected VERSION-HEX")]
pub struct BadDeploymentId(String);

impl FromStr for DeploymentId {
    type Err = BadDeploymentId;

    fn from_str(text: &str) -> Result<Self, BadDeploymentId> {
        let wrong = || BadDeploymentId(text.chars().take(100).collect());
        let (version, digest) = text.split_once('-').ok_or_else(wrong)?;
        let id = Self {
            version: version.parse().map_err(|_| wrong())?,
            digest: Digest::from_hex(digest).map_err(|_| wrong())?,
        };
        // One spelling only: Rust parses "+7" and "007" as numbers, but they are not valid names.
        if id.to_string() == text { Ok(id) } else { Err(wrong()) }
    }
}

impl TryFrom<String> for DeploymentId {
    type Error = BadDeploymentId;

    fn try_from(text: String) -> Result<Self, BadDeploymentId> {
        text.parse()
    }
}

impl From<DeploymentId> for String {
    fn from(id: DeploymentId) -> Self {
        id.to_string()
    }
}

/// A deployment that was not booted, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Which one.
    pub deployment: DeploymentId,
    /// The reason, as a sentence.
    pub why: String,
    /// Fields that a later mosfs wrote.
    #[serde(flatten)]
    pub later: Map<String, Value>,
}

impl Refusal {
    /// A refusal with its reason.
    pub fn new(deployment: DeploymentId, why: String) -> Self {
        Self { deployment, why, later: Map::new() }
    }
}
