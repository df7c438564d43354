//! Rebuilds the state from the deployments on the disk if the state file cannot be read.
//!
//! Nothing in the file is trusted, so everything in it can be recovered from the deployments, except what was
//! tried and failed. There are two entry points:
//!
//! - [`by_name`], for commands: the deployments on the disk, unverified. Each of them verifies what it uses.
//!   It is written by the next command that takes the system's lock ([`super::System::lock`]); the old file
//!   stays as `state.json.unread`.
//! - [`for_boot`]: what verifies and is not below the floor, the highest version first. A version above the
//!   floor was never committed, so it is pending, with its tries counted, as long as there is another one to
//!   fall back to. Nothing is written over a file of another format: the system that boots may know it.

use std::fs;
use std::path::Path;

use super::deployment;
use super::error::DeployError;
use super::state::{Damage, DeploymentId, Refusal, State, TRIES, clip};
use super::{System, booted::BootRecord};
use crate::digest::Digest;
use crate::error::{Class, Classified};
use crate::floor::FloorError;
use crate::trust::{Anchor, Dates};

/// Returns the state on disk, or one rebuilt from the deployments.
pub(super) fn by_name(system: &System, damage: Damage) -> Result<State, DeployError> {
    let (mut found, _) = deployment::list(system)?;
    // A folder with a missing or different manifest is a deployment damaged by the same fault.
    found.retain(|id| {
        deployment::read(system, id).is_ok_and(|signed| Digest::of(&signed.manifest) == id.digest)
    });
    found.reverse();
    let booted = BootRecord::load(&super::booted::path()).ok().flatten().map(|record| record.deployment);
    let current = booted.filter(|id| found.contains(id)).or(found.first().copied());
    let previous = found.iter().copied().find(|id| Some(*id) < current);
    let mut state = State::anew(damage, found);
    (state.current, state.previous) = (current, previous);
    Ok(state)
}

/// Writes a rebuilt state, and keeps the file that could not be read.
pub(super) fn write(state: &State, path: &Path) -> Result<(), DeployError> {
    let mut kept = path.as_os_str().to_os_string();
    kept.push(".unread");
    let _ = fs::remove_file(&kept);
    // Best effort: it must not block the new file.
    if fs::hard_link(path, &kept).is_err() && path.is_dir() {
        let _ = fs::rename(path, &kept);
    }
    Ok(state.save(path)?)
}

/// What a boot finds if the state file cannot be read.
pub(super) struct Recovered {
    /// What may be tried.
    pub state: State,
    /// Deployments that do not verify or are below the floor, with the class of each reason.
    pub refused: Vec<(Refusal, Class)>,
}

/// The state of all deployments that verify and are not below the floor.
///
/// # Errors
/// If the deployments cannot be listed.
pub(super) fn for_boot(
    system: &System,
    anchor: &Anchor,
    lowest: u64,
    damage: Damage,
) -> Result<Recovered, DeployError> {
    let (listed, _) = deployment::list(system)?;
    let mut refused = Vec::new();
    let mut sound: Vec<DeploymentId> = Vec::new();
    for id in listed.into_iter().rev() {
        let verdict = deployment::verify(system, &id, anchor, Dates::LogOnly).and_then(|_| {
            // Rule: boot: `version >= floor`.
            if id.version < lowest {
                return Err(FloorError::Rollback { version: id.version, floor: lowest }.into());
            }
            Ok(())
        });
        match verdict {
            Ok(()) => sound.push(id),
            Err(error) => {
                refused.push((Refusal::new(id, clip(&error.to_string())), error.class()));
            }
        }
    }
    let at = |place: usize| sound.get(place).copied();
    let mut state = State::anew(damage.clone(), sound.clone());
    if let [highest, _, ..] = sound[..]
        && highest.version > lowest
        && !matches!(damage, Damage::OtherFormat(_))
    {
        state.set_pending(highest);
        (state.current, state.previous) = (at(1), at(2));
        // A try that cannot be counted is not granted: then the highest one counts as committed.
        if write(&state, &system.state_path()).is_ok() {
            return Ok(Recovered { state, refused });
        }
        state.pending = None;
    }
    (state.current, state.previous) = (at(0), at(1));
    Ok(Recovered { state, refused })
}

const _: () = assert!(TRIES > 1, "a pending deployment that was made anew has a try to spend");
