//! The user and group ids of targets (`nsgroup`).
//!
//! Each group of targets has 65536 ids of the host for its ids 0 to 65535. After a boot, group N of the sorted groups begins
//! at 524288 + 65536 N. A group keeps its ids until the next boot (given.rs), so that an update that adds or removes others
//! does not restart it. The range of systemd's containers begins at 524288; the ranges of users in /etc/subuid end before.
//!
//! | `nsgroup` | ids |
//! | --- | --- |
//! | not written | a group of the target's own |
//! | `""` or `none` | the host's ids |
//! | a name | a group that all targets with this name share |
//!
//! Nothing on disk has these ids: images and volumes keep theirs, and are mounted with the map.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::manifest::{ServiceType, SystemManifest, Target, TargetName};
use crate::sorting;

/// The first id of the host that a group has.
pub const FIRST: u32 = 0x8_0000;
/// The number of ids of a group.
pub const COUNT: u32 = 0x1_0000;
/// The number of groups that fit below 1879048192, where the range of systemd's containers ends.
pub const MOST_GROUPS: usize = ((0x7000_0000 - FIRST) / COUNT) as usize;

/// The word for the host's ids, besides nothing.
const HOST: &str = "none";

/// The group of a target: its name, and whether other targets may have it. None for the host's ids.
fn group<'a>(name: &'a TargetName, target: &'a Target) -> Option<(&'a str, bool)> {
    match target.nsgroup.as_deref() {
        None => Some((name.as_str(), false)),
        Some("" | HOST) => None,
        Some(group) => Some((group, true)),
    }
}

/// The groups of the containers of a system, sorted.
fn groups(manifest: &SystemManifest) -> Vec<(&str, bool)> {
    let containers = manifest.targets.iter().filter(|(_, one)| one.service_type == ServiceType::Container);
    sorting::set(containers.filter_map(|(name, one)| group(name, one))).into_iter().collect()
}

/// The ids of a group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// The name of the group.
    pub group: String,
    /// Whether targets share it by `nsgroup`; otherwise it is the own one of the target with this name.
    pub shared: bool,
    /// The host's id of its id 0.
    pub first: u32,
}

impl Range {
    /// Whether it is one of those that [`assign`] gives.
    fn is_one(&self) -> bool {
        let end = FIRST + COUNT * MOST_GROUPS as u32;
        (FIRST..end).contains(&self.first) && (self.first - FIRST).is_multiple_of(COUNT)
    }
}

/// Gives each group of a system its ids: those that it has already, in `before`, or the lowest that no other has. What a
/// group had that the system no longer has comes last, as its containers may still be stopping.
///
/// # Errors
/// The number of groups, if there are more than [`MOST_GROUPS`].
pub fn assign(manifest: &SystemManifest, before: &[Range]) -> Result<Vec<Range>, usize> {
    let groups = groups(manifest);
    if groups.len() > MOST_GROUPS {
        return Err(groups.len());
    }
    let mut given: BTreeMap<(&str, bool), u32> = BTreeMap::new();
    let mut taken = BTreeSet::new();
    for range in before.iter().filter(|range| range.is_one()) {
        let group = (range.group.as_str(), range.shared);
        if let Ok(at) = groups.binary_search(&group)
            && !given.contains_key(&group)
            && taken.insert(range.first)
        {
            given.insert(groups[at], range.first);
        }
    }
    let left: BTreeSet<u32> = before.iter().map(|range| range.first).collect();
    let all = || (0..MOST_GROUPS as u32).map(|index| FIRST + COUNT * index);
    let mut free =
        all().filter(|first| !left.contains(first)).chain(all().filter(|first| left.contains(first)));
    Ok(groups
        .iter()
        .map(|&(group, shared)| {
            // There are as many ranges as groups may be.
            let first = given.get(&(group, shared)).copied();
            let first = first.or_else(|| free.find(|first| taken.insert(*first))).unwrap_or(FIRST);
            Range { group: group.into(), shared, first }
        })
        .collect())
}

/// Returns the host's id of a target's id 0; `None` if the target has the host's ids.
pub fn base(ranges: &[Range], name: &TargetName, target: &Target) -> Option<u32> {
    let (own, shared) = group(name, target)?;
    ranges.iter().find(|range| range.group == own && range.shared == shared).map(|range| range.first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::tests::system;

    /// What is written of each range, with its number.
    fn words(ranges: &[Range]) -> Vec<String> {
        let words = ranges.iter().map(|range| {
            let shared = if range.shared { " shared" } else { "" };
            format!("{}{shared} {}", range.group, f64::from(range.first - FIRST) / f64::from(COUNT))
        });
        words.collect()
    }

    #[test]
    fn groups_have_ranges_that_do_not_meet() {
        let manifest = system(&[
            ("data", "service_type: fs-only, nsgroup: other"),
            ("web", "service_type: container"),
            ("db", "service_type: container, nsgroup: backend"),
            ("cache", "service_type: container, nsgroup: backend"),
            ("host", "service_type: container, nsgroup: ''"),
            ("none", "service_type: container, nsgroup: none"),
            // Its group is not the one of target `web`, which is of that target's own.
            ("other", "service_type: container, nsgroup: web"),
        ]);
        let ranges = assign(&manifest, &[]).unwrap();
        let bases: Vec<_> = manifest
            .targets
            .iter()
            .filter(|(_, target)| target.service_type == ServiceType::Container)
            .map(|(name, target)| (name.as_str(), base(&ranges, name, target)))
            .collect();
        assert_eq!(
            bases,
            [
                ("cache", Some(524_288)),
                ("db", Some(524_288)),
                ("host", None),
                ("none", None),
                ("other", Some(524_288 + 2 * 65_536)),
                ("web", Some(524_288 + 65_536)),
            ]
        );
    }

    #[test]
    fn a_group_keeps_its_ids_when_others_come_and_go() {
        let of = |names: &[&str]| {
            let fields: Vec<_> = names.iter().map(|name| (*name, "service_type: container")).collect();
            system(&fields)
        };
        let first = assign(&of(&["b", "d", "f"]), &[]).unwrap();
        assert_eq!(words(&first), ["b 0", "d 1", "f 2"]);
        // One goes, and two come: what it had is not given to others while it may still run.
        let second = assign(&of(&["a", "b", "e", "f"]), &first).unwrap();
        assert_eq!(words(&second), ["a 3", "b 0", "e 4", "f 2"]);
        let third = assign(&of(&["a", "b", "c", "e", "f"]), &second).unwrap();
        assert_eq!(words(&third), ["a 3", "b 0", "c 1", "e 4", "f 2"]);
        // A shared group is not the own one of the target with its name.
        let shared = system(&[("x", "service_type: container, nsgroup: b")]);
        assert_eq!(words(&assign(&shared, &first).unwrap()), ["b shared 3"]);
    }

    #[test]
    fn ranges_that_cannot_be_are_not_kept() {
        let manifest = system(&[("a", "service_type: container"), ("b", "service_type: container")]);
        let range = |group: &str, first| Range { group: group.into(), shared: false, first };
        let end = FIRST + COUNT * MOST_GROUPS as u32;
        for bad in [0, 1000, FIRST - COUNT, FIRST + 1, end, u32::MAX] {
            let found = assign(&manifest, &[range("a", bad), range("b", FIRST + COUNT)]).unwrap();
            assert_eq!(words(&found), ["a 0", "b 1"], "{bad}");
        }
        // Two with the same ids, and one group twice.
        let twice = [range("a", FIRST), range("b", FIRST), range("a", FIRST + COUNT)];
        assert_eq!(words(&assign(&manifest, &twice).unwrap()), ["a 0", "b 2"]);
    }

    #[test]
    fn what_groups_had_that_are_gone_is_given_last() {
        let manifest = system(&[("a", "service_type: container")]);
        let gone = |first| Range { group: "gone".into(), shared: false, first };
        let all: Vec<_> = (0..MOST_GROUPS as u32).map(|index| gone(FIRST + COUNT * index)).collect();
        assert_eq!(words(&assign(&manifest, &all).unwrap()), ["a 0"]);
        assert_eq!(words(&assign(&manifest, &all[..MOST_GROUPS - 1]).unwrap()), ["a 28663"]);
    }
}
