//! `mosfs commit`: this boot is healthy.
//!
//! Rule (docs/design.md, bless first): bless the deployment first, then raise the floor, then read it
//! back. Until the floor is raised, falling back to the previous deployment is legal. Each step
//! may be cut off and run again: blessing twice changes nothing, and a floor that is at the
//! version already is a success.

use super::System;
use super::deployment;
use super::error::DeployError;
use super::state::DeploymentId;
use crate::failpoint;
use crate::floor::{Floor, FloorError};
use crate::trust::{Anchor, Dates};

/// What a commit did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    /// The deployment that is current now.
    pub deployment: DeploymentId,
    /// Whether it was blessed by this call (`false`: it was current before).
    pub blessed: bool,
    /// The floor before.
    pub floor_before: u64,
    /// The floor now, as read back.
    pub floor_after: u64,
}

/// Blesses the deployment that runs and raises the floor to its version.
///
/// `booted` is the deployment that this boot runs, where that is known; else the pending one is
/// taken, else the current one.
///
/// # Errors
/// [`DeployError::Floor`] with `Rollback` where the version is below the floor (nothing is
/// changed then); any error of the floor after the blessing leaves the deployment blessed and the
/// floor to be raised by the next commit.
pub fn commit(
    system: &System,
    anchor: &Anchor,
    floor: &mut dyn Floor,
    booted: Option<DeploymentId>,
    waiting: impl FnOnce(),
) -> Result<Committed, DeployError> {
    if !system.root().is_dir() {
        return Err(DeployError::NothingInstalled { path: system.root().to_path_buf() });
    }
    let _lock = system.lock(waiting)?;
    let mut state = system.state()?;
    let pending = state.pending.as_ref().map(|pending| pending.deployment);
    let id = booted
        .or(pending)
        .or(state.current)
        .ok_or_else(|| DeployError::NothingInstalled { path: system.root().to_path_buf() })?;
    // What is blessed is what is verified now, not what was verified at boot.
    let verified = deployment::verify(system, &id, anchor, Dates::LogOnly)?;
    let floor_before = floor.read()?;
    // Rule: `version >= floor`; a deployment below it must not have booted, and is not blessed.
    if id.version < floor_before {
        return Err(FloorError::Rollback { version: id.version, floor: floor_before }.into());
    }
    let before = state.clone();
    state.bless(id);
    let blessed = state != before;
    if blessed {
        state.save(&system.state_path())?;
    }
    failpoint::hit("commit.blessed");
    if floor_before < id.version {
        let signature = match verified.floor_signature() {
            Some(signature) => signature,
            // The development floor of a device without a floor key asks for none.
            None if !floor.needs_signature() => &[],
            None => return Err(FloorError::NoFloorSignature { version: id.version }.into()),
        };
        floor.raise(id.version, signature)?;
    }
    failpoint::hit("commit.raised");
    // Rule: then read it back. A raise that did not take is an error of the floor already.
    let floor_after = floor.read()?;
    Ok(Committed { deployment: id, blessed, floor_before, floor_after })
}
