//! The ids and addresses that containers were given since the boot.
//!
//! ```text
//! RUN/given.json    {"format":1, "ids":[{"group":"web","shared":false,"first":524288}], "addresses":{"web":"10.0.3.2"}}
//! ```
//! An activation writes it before it starts anything, in one rename. Whoever reads it and knows the signed manifest comes to
//! the same ids and addresses, so a start reads it and writes nothing. A file that is missing, malformed or of another
//! format is none: all of them are given anew, and what then has others is restarted.
//!
//! **Rule:** what runs and has not changed is not restarted. Ids and addresses that depended on all targets of the system
//! would change with each that comes or goes.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::ids::{self, Range};
use super::places::{Places, write_note};
use crate::error::{IoContext as _, IoError};
use crate::manifest::{SystemManifest, addresses};
use crate::sys::file;

/// The format that this version writes and reads.
const FORMAT: u32 = 1;

/// Most bytes that are read: those of as many groups and addresses as a manifest can have targets.
const MAX_BYTES: u64 = 16 << 20;

/// What containers were given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Given {
    format: u32,
    /// The ids of groups.
    pub ids: Vec<Range>,
    /// The addresses of targets with network `simple`.
    pub addresses: BTreeMap<String, Ipv4Addr>,
}

impl Given {
    /// Reads what was given since the boot.
    pub fn load(places: &Places) -> Self {
        let path = places.given();
        let found = file::find_regular(&path, file::Links::Refused, MAX_BYTES).unwrap_or_else(|error| {
            log::warn!("{error}: containers are given other ids and addresses");
            None
        });
        let Some(bytes) = found else { return Self::default() };
        match serde_json::from_slice::<Self>(&bytes) {
            Ok(given) if given.format == FORMAT => given,
            Ok(given) => {
                log::warn!("{}: format {}, expected {FORMAT}", path.display(), given.format);
                Self::default()
            }
            Err(error) => {
                log::warn!("{}: {error}", path.display());
                Self::default()
            }
        }
    }

    /// What the containers of a system have, where this is what was given before. What cannot be given stays as it is.
    fn to(&self, manifest: &SystemManifest) -> Self {
        let networks = manifest.targets.iter().map(|(name, one)| (name, &one.network));
        let addresses = addresses::assign(networks, &self.addresses);
        Self {
            format: FORMAT,
            ids: ids::assign(manifest, &self.ids).unwrap_or_else(|_| self.ids.clone()),
            addresses: addresses.map_or_else(
                |_| self.addresses.clone(),
                |all| all.of.iter().map(|(name, address)| (name.to_string(), *address)).collect(),
            ),
        }
    }

    /// Notes what the containers of a system have, and returns it. With `others`, those that it does not have keep what they
    /// have, for they may run.
    ///
    /// # Errors
    /// [`IoError`] with the path.
    pub fn note(places: &Places, manifest: &SystemManifest, others: bool) -> Result<Self, IoError> {
        let before = Self::load(places);
        let now = before.to(manifest);
        let mut noted = now.clone();
        if others {
            let is_new = |range: &&Range| now.ids.iter().all(|one| one.first != range.first);
            noted.ids.extend(before.ids.iter().filter(is_new).cloned());
            let is_new = |address: &Ipv4Addr| now.addresses.values().all(|one| one != address);
            for (name, address) in before.addresses.iter().filter(|(_, address)| is_new(address)) {
                noted.addresses.entry(name.clone()).or_insert(*address);
            }
        }
        if noted != before {
            file::create_folders(&places.run)?;
            let path = places.given();
            write_note(&path, &serde_json::to_string(&noted).map_err(io::Error::other).on("write", &path)?)?;
        }
        Ok(now)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::run::tests::system;

    fn places(dir: &tempfile::TempDir) -> Places {
        Places { run: dir.path().join("run"), system: dir.path().into() }
    }

    fn of(names: &[&str]) -> SystemManifest {
        let fields: Vec<_> =
            names.iter().map(|name| (*name, "service_type: container, network: {type: simple}")).collect();
        system(&fields)
    }

    /// Name, number of its ids, last octet of its address.
    fn words(given: &Given) -> Vec<String> {
        let ids: BTreeMap<_, _> = given.ids.iter().map(|one| (one.group.as_str(), one.first)).collect();
        let line = |(name, address): (&String, &Ipv4Addr)| {
            let number = (ids[name.as_str()] - ids::FIRST) / ids::COUNT;
            format!("{name} {number} {}", address.octets()[3])
        };
        given.addresses.iter().map(line).collect()
    }

    #[test]
    fn what_is_noted_is_kept_until_the_target_goes() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(&dir);
        assert_eq!(Given::load(&places), Given::default());
        Given::note(&places, &of(&["b", "c"]), false).unwrap();
        assert_eq!(words(&Given::load(&places)), ["b 0 2", "c 1 3"]);
        // A part of the targets: what else runs keeps what it has.
        Given::note(&places, &of(&["a", "c"]), true).unwrap();
        assert_eq!(words(&Given::load(&places)), ["a 2 4", "b 0 2", "c 1 3"]);
        Given::note(&places, &of(&["a", "c"]), false).unwrap();
        assert_eq!(words(&Given::load(&places)), ["a 2 4", "c 1 3"]);
        Given::note(&places, &of(&["a", "aa", "c"]), false).unwrap();
        assert_eq!(words(&Given::load(&places)), ["a 2 4", "aa 0 2", "c 1 3"]);
        // Nothing else lies there.
        let list: Vec<_> =
            fs::read_dir(&places.run).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(list, ["given.json"]);
    }

    #[test]
    fn a_file_that_is_none_gives_all_anew() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(&dir);
        fs::create_dir(&places.run).unwrap();
        for text in [
            "",
            "{",
            r#"{"format":2,"ids":[],"addresses":{}}"#,
            r#"{"format":1,"ids":[],"addresses":{},"more":1}"#,
            r#"{"format":1,"ids":[{"group":"b","shared":false,"first":-1}],"addresses":{}}"#,
            r#"{"format":1,"ids":[],"addresses":{"b":"10.0.3"}}"#,
        ] {
            fs::write(places.given(), text).unwrap();
            assert_eq!(Given::load(&places), Given::default(), "{text}");
            Given::note(&places, &of(&["b", "c"]), true).unwrap();
            assert_eq!(words(&Given::load(&places)), ["b 0 2", "c 1 3"], "{text}");
        }
    }
}
