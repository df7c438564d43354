//! The state file: which deployment is current, which is pending, which was previous.
//!
//! ```text
//! SYSTEM/state.json
//! {"format":1,
//!  "current":"200-HEX",                                   or null
//!  "pending":{"deployment":"201-HEX","tries_left":3},     or null
//!                                                         "fetching":true beside them while not all of it is here
//!  "previous":"199-HEX",                                  or null
//!  "last_boot":{"chosen":"200-HEX","refused":[{"deployment":"201-HEX","why":"…"}]},   or null
//!  "last_update":{"version":201,"error":"…"},             or null
//!  "sources":{"201-HEX":"docker://HOST/PREFIX"}}          absent where there are none
//! ```
//!
//! Invariants: it is the one source of truth on what may run; it changes only by atomic replace, under the
//! exclusive lock of the system folder ([`super::System::lock`]). Fields that this program does not know are
//! kept where they are, at every level, so that a later mosfs finds them again. It is not signed and not
//! trusted: everything that it names is verified again before it is used, so an attacker who can write it can
//! only choose among systems that the product's owner signed and the floor allows.
//!
//! For the same reason an unreadable file stops nothing: if it is damaged, empty, or of another format, it is
//! rebuilt from the deployments on the disk ([`super::recover`]).

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use super::id::{DeploymentId, Refusal};
use crate::error::{IoContext, IoError};
use crate::sorting;
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
pub struct Pending {
    /// Which one.
    pub deployment: DeploymentId,
    /// How many tries it has left. A try is spent, and synced, before it is used.
    pub tries_left: u32,
    /// Whether blobs of it are still missing ([`super::fetching`]). It has no folder yet, and is not tried.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fetching: bool,
    /// Fields that a later mosfs wrote.
    #[serde(flatten)]
    pub later: Map<String, Value>,
}

/// How the last boot choice ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastBoot {
    /// The deployment that was booted; none if all were refused.
    pub chosen: Option<DeploymentId>,
    /// Those that were refused before it, in order.
    pub refused: Vec<Refusal>,
    /// Fields that a later mosfs wrote.
    #[serde(flatten)]
    pub later: Map<String, Value>,
}

/// How the last install or update ended, if it failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastUpdate {
    /// The version to be installed, if known.
    pub version: Option<u64>,
    /// The error's text; none after a success.
    pub error: Option<String>,
    /// Fields that a later mosfs wrote.
    #[serde(flatten)]
    pub later: Map<String, Value>,
}

/// The content of `state.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The registries that deployments came from, as `docker://HOST/PREFIX`. Blobs that are missing are fetched there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sources: BTreeMap<DeploymentId, String>,
    /// The reason, if the file could not be read. Not written.
    #[serde(skip)]
    pub damage: Option<Damage>,
    /// The deployments on the disk, highest version first, if the file could not be read. Not written.
    #[serde(skip)]
    pub found: Vec<DeploymentId>,
    /// Fields that a later mosfs wrote.
    #[serde(flatten)]
    pub later: Map<String, Value>,
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
            sources: BTreeMap::new(),
            damage: None,
            found: Vec::new(),
            later: Map::new(),
        }
    }
}

impl LastUpdate {
    /// How an update ended.
    pub fn new(version: Option<u64>, error: Option<String>) -> Self {
        Self { version, error, later: Map::new() }
    }
}

/// Why a state file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// Another mosfs wrote it.
    #[error("format {0} was found, this mosfs knows format {FORMAT} only")]
    OtherFormat(u32),
    /// It is not a state, or it cannot be read from the disk.
    #[error("{0}")]
    Unreadable(String),
    /// It is missing, although there are deployments.
    #[error("it is missing")]
    Missing,
}

impl State {
    /// Begins a state that is rebuilt from these deployments, because the file cannot be used.
    pub(super) fn anew(damage: Damage, found: Vec<DeploymentId>) -> Self {
        Self { damage: Some(damage), found, ..Self::default() }
    }

    /// Reads the state; `None` if there is no file.
    ///
    /// # Errors
    /// Why the file is not a state that this program can use.
    pub fn read(path: &Path) -> Result<Option<Self>, Damage> {
        match file::find_regular(path, Links::Refused, MAX_BYTES) {
            Ok(bytes) => bytes.map(|bytes| Self::parse(&bytes)).transpose(),
            Err(error) => Err(Damage::Unreadable(error.source.to_string())),
        }
    }

    fn parse(bytes: &[u8]) -> Result<Self, Damage> {
        // The format number comes first, so that a later format is named as such and not as
        // whatever it lacks.
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let unreadable = |error: serde_json::Error| Damage::Unreadable(error.to_string());
        let Format { format } = serde_json::from_slice(bytes).map_err(unreadable)?;
        if format != FORMAT {
            return Err(Damage::OtherFormat(format));
        }
        serde_json::from_slice(bytes).map_err(unreadable)
    }

    /// Writes the state by atomic replace, synced. The caller holds the system's exclusive lock.
    pub fn save(&self, path: &Path) -> Result<(), IoError> {
        // A state is plain data: serializing strings, numbers and options cannot fail.
        let mut bytes = serde_json::to_vec(self).expect("plain data");
        bytes.push(b'\n');
        atomic::replace(path, &bytes, 0o644, "deploy.state").on("replace", path)
    }

    /// Returns every deployment that the state names: those that `gc` must keep. If the file could not be
    /// read, these are all that were found.
    pub fn named(&self) -> Vec<DeploymentId> {
        let pending = self.pending.as_ref().map(|pending| pending.deployment);
        let mut all: Vec<_> = [self.current, pending, self.previous].into_iter().flatten().collect();
        all.extend(&self.found);
        sorting::sort(&mut all);
        all.dedup();
        all
    }

    /// Makes `id` the deployment to try at the next boot.
    pub fn set_pending(&mut self, id: DeploymentId) {
        self.pending =
            Some(Pending { deployment: id, tries_left: TRIES, fetching: false, later: Map::new() });
    }

    /// Makes `id` the deployment to try at the first boot after all of it is here.
    pub fn set_fetching(&mut self, id: DeploymentId) {
        self.set_pending(id);
        if let Some(pending) = &mut self.pending {
            pending.fetching = true;
        }
    }

    /// The pending deployment, if blobs of it are still missing.
    pub fn fetching(&self) -> Option<DeploymentId> {
        self.pending.as_ref().filter(|pending| pending.fetching).map(|pending| pending.deployment)
    }

    /// Notes the registry that a deployment came from, and forgets those of deployments that are gone.
    pub fn set_source(&mut self, id: DeploymentId, source: Option<&str>) {
        let named = self.named();
        self.sources.retain(|known, _| named.contains(known) && *known != id);
        if let Some(source) = source {
            self.sources.insert(id, source.to_string());
        }
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
    fn another_format_is_named_as_such() {
        let later = State::parse(br#"{"format":2,"new":1}"#).unwrap_err();
        assert_eq!(later, Damage::OtherFormat(2));
        assert_eq!(later.to_string(), "format 2 was found, this mosfs knows format 1 only");
    }

    #[test]
    fn fields_of_a_later_mosfs_are_kept_at_every_level() {
        let [one, two] = [id(1).to_string(), id(2).to_string()];
        let text = format!(
            "{{\"format\":1,\"current\":\"{one}\",\"pending\":{{\"deployment\":\"{two}\",\"tries_left\":3,\"a\":[1]}},\
             \"previous\":null,\"last_boot\":{{\"chosen\":null,\"refused\":[{{\"deployment\":\"{two}\",\"why\":\"w\",\"b\":{{}}}}],\"c\":1}},\
             \"last_update\":{{\"version\":2,\"error\":null,\"d\":\"x\"}},\"e\":{{\"f\":null}}}}"
        );
        let mut state = State::parse(text.as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&state).unwrap(), text);
        if let Some(pending) = &mut state.pending {
            pending.tries_left -= 1;
        }
        let spent = text.replace("\"tries_left\":3", "\"tries_left\":2");
        assert_eq!(serde_json::to_string(&state).unwrap(), spent);
    }

    #[test]
    fn what_is_fetched_and_where_from_is_kept() {
        let mut state = State { current: Some(id(1)), ..State::default() };
        state.set_fetching(id(2));
        state.set_source(id(2), Some("docker://host/p"));
        let text = serde_json::to_string(&state).unwrap();
        assert!(text.contains("\"tries_left\":3,\"fetching\":true"), "{text}");
        assert!(text.ends_with(&format!(",\"sources\":{{\"{}\":\"docker://host/p\"}}}}", id(2))), "{text}");
        assert_eq!(State::parse(text.as_bytes()).unwrap(), state);
        assert_eq!(state.fetching(), Some(id(2)));
        // Another version in its place: nothing of it is left.
        state.set_pending(id(3));
        state.set_source(id(3), None);
        assert_eq!((state.fetching(), state.sources.len()), (None, 0));
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
