//! The state file: which deployment is current, which is pending, which was previous.
//!
//! ```text
//! SYSTEM/state.json
//! {"format":1,
//!  "current":"200-HEX",                                   or null
//!  "pending":{"deployment":"201-HEX","tries_left":3},     or null
//!  "previous":"199-HEX",                                  or null
//!  "last_boot":{"chosen":"200-HEX","refused":[{"deployment":"201-HEX","why":"…"}]},   or null
//!  "last_update":{"version":201,"error":"…"}}             or null
//! ```
//!
//! Invariants: it is the one source of truth on what may run; it changes only by atomic replace, under the
//! exclusive lock of the system folder ([`super::System::lock`]); a file with another format number or an
//! unknown field is refused, not guessed at. It is not signed and not trusted: everything that it names is
//! verified again before it is used, so an attacker who can write it can only choose among systems that the
//! product's owner signed and the floor allows.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::DeployError;
pub use super::id::{BadDeploymentId, DeploymentId, Refusal};
use crate::error::IoContext;
use crate::sys::atomic;
use crate::sys::file::{self, Links};

/// The format number that this program writes and reads.
pub const FORMAT: u32 = 1;
/// How often a pending deployment may be tried before it is skipped.
pub const TRIES: u32 = 3;
/// Maximum size of a state file, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// Maximum length of a stored error text, in characters.
const MAX_WHY: usize = 2000;

/// A deployment that was installed by an update and has not yet proved healthy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pending {
    /// Which one.
    pub deployment: DeploymentId,
    /// How many tries it has left. A try is spent, and synced, before it is used.
    pub tries_left: u32,
}

/// How the last boot choice ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LastBoot {
    /// The deployment that was booted; none if all were refused.
    pub chosen: Option<DeploymentId>,
    /// Those that were refused before it, in order.
    pub refused: Vec<Refusal>,
}

/// How the last install or update ended, if it failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LastUpdate {
    /// The version to be installed, if known.
    pub version: Option<u64>,
    /// The error's text; none after a success.
    pub error: Option<String>,
}

/// The content of `state.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    format: u32,
    /// The deployment that has proved healthy last, or the first one installed.
    pub current: Option<DeploymentId>,
    /// The deployment to try at the next boot.
    pub pending: Option<Pending>,
    /// The deployment that was current before `current`.
    pub previous: Option<DeploymentId>,
    /// How the last boot choice ended.
    pub last_boot: Option<LastBoot>,
    /// How the last install or update ended.
    pub last_update: Option<LastUpdate>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            format: FORMAT,
            current: None,
            pending: None,
            previous: None,
            last_boot: None,
            last_update: None,
        }
    }
}

impl State {
    /// Reads the state; a missing file is the state of a system with nothing installed.
    ///
    /// # Errors
    /// [`DeployError::State`] if the file is not a state file of a known format.
    pub fn load(path: &Path) -> Result<Self, DeployError> {
        let Some(bytes) = file::find_regular(path, Links::Refused, MAX_BYTES)? else {
            return Ok(Self::default());
        };
        Self::parse(&bytes).map_err(|why| DeployError::State { path: path.to_path_buf(), why })
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        // Check the format number first, so that a later format is reported as such and not as an unknown
        // field.
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let Format { format } = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if format != FORMAT {
            return Err(format!("format {format} was found, this mosfs knows format {FORMAT} only"));
        }
        serde_json::from_slice(bytes).map_err(|error| error.to_string())
    }

    /// Writes the state by atomic replace, synced. The caller holds the system's exclusive lock.
    pub fn save(&self, path: &Path) -> Result<(), DeployError> {
        // A state is plain data: serializing strings, numbers and options cannot fail.
        let mut bytes = serde_json::to_vec(self).expect("plain data");
        bytes.push(b'\n');
        Ok(atomic::replace(path, &bytes, 0o644, "deploy.state").on("replace", path)?)
    }

    /// Returns every deployment that the state names: those that `gc` must keep.
    pub fn named(&self) -> Vec<DeploymentId> {
        let pending = self.pending.as_ref().map(|pending| pending.deployment);
        let mut all: Vec<_> = [self.current, pending, self.previous].into_iter().flatten().collect();
        all.sort();
        all.dedup();
        all
    }

    /// Makes `id` the deployment to try at the next boot.
    pub fn set_pending(&mut self, id: DeploymentId) {
        self.pending = Some(Pending { deployment: id, tries_left: TRIES });
    }

    /// Makes `id` current; the former current one becomes previous. Blessing twice changes nothing.
    pub fn bless(&mut self, id: DeploymentId) {
        if self.current != Some(id) {
            self.previous = self.current.replace(id);
        }
        if self.pending.as_ref().is_some_and(|pending| pending.deployment == id) {
            self.pending = None;
        }
    }
}

/// Shortens an error's text to the length that the state file stores.
pub fn clip(why: &str) -> String {
    why.chars().take(MAX_WHY).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn id(version: u64) -> DeploymentId {
        DeploymentId { version, digest: Digest::of(&version.to_be_bytes()) }
    }

    #[test]
    fn a_name_has_one_spelling() {
        let name = id(200).to_string();
        assert_eq!(name.parse::<DeploymentId>().unwrap(), id(200));
        for bad in
            ["", "200", "200-", "-1-00", &name.replace("200-", "0200-"), &name.replace("200-", "+200-")]
        {
            assert!(bad.parse::<DeploymentId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_stored_form_is_stable() {
        let mut state = State { current: Some(id(1)), ..State::default() };
        state.set_pending(id(2));
        let hex = |version| id(version).digest.hex();
        let expected = format!(
            "{{\"format\":1,\"current\":\"1-{}\",\"pending\":{{\"deployment\":\"2-{}\",\"tries_left\":3}},\
             \"previous\":null,\"last_boot\":null,\"last_update\":null}}",
            hex(1),
            hex(2)
        );
        assert_eq!(serde_json::to_string(&state).unwrap(), expected);
        assert_eq!(State::parse(expected.as_bytes()).unwrap(), state);
    }

    #[test]
    fn unknown_fields_and_formats_are_refused() {
        let later = State::parse(br#"{"format":2,"new":1}"#).unwrap_err();
        assert_eq!(later, "format 2 was found, this mosfs knows format 1 only");
        let unknown = State::parse(
            br#"{"format":1,"current":null,"pending":null,"previous":null,"last_boot":null,"last_update":null,"x":1}"#,
        );
        assert!(unknown.unwrap_err().contains("unknown field `x`"));
    }

    #[test]
    fn blessing_twice_changes_nothing() {
        let mut state = State { current: Some(id(1)), ..State::default() };
        state.set_pending(id(2));
        state.bless(id(2));
        let once = state.clone();
        state.bless(id(2));
        assert_eq!(state, once);
        assert_eq!((state.current, state.previous, &state.pending), (Some(id(2)), Some(id(1)), &None));
    }
}
