//! The user and group ids of targets (`nsgroup`).
//!
//! Each group of targets has 65536 ids of the host for its ids 0 to 65535: group N of the sorted groups begins at
//! 524288 + 65536 N. The range of systemd's containers begins there; the ranges of users in /etc/subuid end before.
//!
//! | `nsgroup` | ids |
//! | --- | --- |
//! | not written | a group of the target's own |
//! | `""` or `none` | the host's ids |
//! | a name | a group that all targets with this name share |
//!
//! Nothing on disk has these ids: images and volumes keep theirs, and are mounted with the map.

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

/// Returns the host's id of a target's id 0; `None` if the target has the host's ids.
///
/// # Errors
/// The number of groups, if there are more than [`MOST_GROUPS`].
pub fn base(manifest: &SystemManifest, name: &TargetName, target: &Target) -> Result<Option<u32>, usize> {
    let Some(own) = group(name, target) else { return Ok(None) };
    let containers = manifest.targets.iter().filter(|(_, one)| one.service_type == ServiceType::Container);
    let groups = sorting::set(containers.filter_map(|(name, one)| group(name, one)));
    if groups.len() > MOST_GROUPS {
        return Err(groups.len());
    }
    let index = groups.iter().position(|one| *one == own).unwrap_or_default();
    Ok(Some(FIRST + COUNT * index as u32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::tests::system;

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
        let bases: Vec<_> = manifest
            .targets
            .iter()
            .filter(|(_, target)| target.service_type == ServiceType::Container)
            .map(|(name, target)| (name.as_str(), base(&manifest, name, target).unwrap()))
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
}
