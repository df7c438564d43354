//! `mosfs commit`: this boot is healthy.
//!
//! Rule (docs/design.md, bless first): bless the deployment first, then raise the floor, then read it
//! back. Until the floor is raised, falling back to the previous deployment is legal. Each step
//! may be cut off and run again: blessing twice changes nothing, and a floor that is at the
//! version already is a success.
//!
//! Rule: a floor in a TPM never falls again, so that nothing is blessed on a guess. What this boot runs is said by
//! the record of the boot. Where that cannot be seen (a chroot, a container, a rescue system), a commit is refused.
//! Only on a machine that mosfs has never started can the pending deployment be meant: where it is asked for
//! in so many words, or where the floor is the development floor, which can be lowered again. Even there it
//! must have tries left, and be complete.

use super::booted;
use super::error::DeployError;
use super::id::DeploymentId;
use super::state::State;
use super::{System, check_complete, deployment};
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

/// What is known of the boot that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ran {
    /// The record of this boot names the deployment that runs.
    This(DeploymentId),
    /// There is no record.
    Unknown {
        /// Whether the pending deployment may be meant, on a machine that mosfs has never started.
        take_pending: bool,
    },
}

/// Blesses the deployment that runs and raises the floor to its version.
///
/// # Errors
/// [`DeployError::BootUnknown`] where it is not known what runs; [`DeployError::NoTriesLeft`] where the
/// pending deployment would be taken and has failed; [`DeployError::Floor`] with `Rollback` where the version is
/// below the floor (nothing is changed in these cases); any error of the floor after the blessing leaves the
/// deployment blessed and the floor to be raised by the next commit.
pub fn commit(
    system: &System,
    anchor: &Anchor,
    floor: &mut dyn Floor,
    ran: Ran,
    waiting: impl FnOnce(),
) -> Result<Committed, DeployError> {
    if !system.root().is_dir() {
        return Err(DeployError::NothingInstalled { path: system.root().to_path_buf() });
    }
    let _lock = system.lock(waiting)?;
    let mut state = system.state()?;
    let (id, known) = match ran {
        Ran::This(id) => (id, true),
        Ran::Unknown { take_pending } => (guess(system, &state, take_pending)?, false),
    };
    // What is blessed is what is verified now, not what was verified at boot.
    let verified = deployment::verify(system, &id, anchor, Dates::LogOnly)?;
    if !known {
        check_complete(system, &verified)?;
    }
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
    failpoint::hit("commit.state.blessed");
    if floor_before < id.version {
        let signature = match verified.floor_signature() {
            Some(signature) => signature,
            // The development floor of a device without a floor key asks for none.
            None if !floor.needs_signature() => &[],
            None => return Err(FloorError::NoFloorSignature { version: id.version }.into()),
        };
        floor.raise(id.version, signature)?;
    }
    failpoint::hit("commit.floor.raised");
    // Rule: then read it back. A raise that did not take is an error of the floor already.
    let floor_after = floor.read()?;
    Ok(Committed { deployment: id, blessed, floor_before, floor_after })
}

/// What is meant on a machine that mosfs has never started.
fn guess(system: &System, state: &State, take_pending: bool) -> Result<DeploymentId, DeployError> {
    let unknown = |why: &str| Err(DeployError::BootUnknown { path: booted::path(), why: why.to_string() });
    if state.last_boot.is_some() {
        return unknown("mosfs has started this machine before");
    }
    if !take_pending {
        return unknown("mosfs did not start this machine");
    }
    match (&state.pending, state.current) {
        (Some(pending), _) if pending.tries_left == 0 => {
            Err(DeployError::NoTriesLeft { id: pending.deployment })
        }
        (Some(pending), _) => Ok(pending.deployment),
        (None, Some(current)) => Ok(current),
        (None, None) => Err(DeployError::NothingInstalled { path: system.root().to_path_buf() }),
    }
}
