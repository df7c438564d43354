//! `mosfs commit`: marks this boot as healthy.
//!
//! Rule (docs/design.md, bless first): bless the deployment first, then raise the floor, then read it back.
//! Until the floor is raised, falling back to the previous deployment is legal. Each step may be interrupted
//! and repeated: blessing twice changes nothing, and a floor already at the version is a success.
//!
//! Rule (docs/design.md, kernel of the system): the floor never exceeds what the EFI system partition can start. Between
//! the blessing and the floor, the kernel of the deployment is brought onto it and its boot counter removed; kernels
//! that the floor refuses are removed afterwards.
//!
//! Rule: a floor in a TPM can never be lowered, so nothing is blessed on a guess. The record of the boot
//! states what this boot runs. If it is not visible (a chroot, a container, a rescue system), a commit is
//! refused. Only on a machine that mosfs has never booted can a commit use the pending deployment: if the
//! user requests it explicitly, or if the floor is the development floor, which can be lowered again. Even
//! then it must have tries left and be complete.

use std::time::Duration;

use super::booted;
use super::error::DeployError;
use super::esp::{self, Esp};
use super::id::DeploymentId;
use super::state::State;
use super::{System, check_complete, deployment};
use crate::floor::{Floor, FloorError};
use crate::sys::failpoint;
use crate::trust::{Anchor, Dates};

/// The result of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    /// The deployment that is current now.
    pub deployment: DeploymentId,
    /// Whether this call blessed it (`false`: it was already current).
    pub blessed: bool,
    /// The floor before.
    pub floor_before: u64,
    /// The floor now, as read back.
    pub floor_after: u64,
}

/// What is known about the running boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunningBoot {
    /// The record of this boot names the deployment that runs.
    This(DeploymentId),
    /// There is no record.
    Unknown {
        /// Whether the pending deployment may be used, on a machine that mosfs has never booted.
        take_pending: bool,
    },
}

/// Blesses the running deployment and raises the floor to its version. Another process that changes the system is
/// waited for, at most for `patience`.
///
/// # Errors
/// [`DeployError::Locked`]; [`DeployError::BootUnknown`] if it is not known what runs;
/// [`DeployError::StillFetching`] if the pending deployment would be used and is not all here;
/// [`DeployError::NoTriesLeft`] if the pending deployment would be used but has failed; [`DeployError::Floor`]
/// with `Rollback` if the version is below the floor (in these cases nothing is changed). An error of the EFI
/// system partition or the floor after the blessing leaves the deployment blessed, and the next commit continues
/// there.
pub fn commit(
    system: &System,
    anchor: &Anchor,
    floor: &mut dyn Floor,
    ran: RunningBoot,
    esp: Option<&Esp>,
    patience: Duration,
    waiting: impl FnOnce(),
) -> Result<Committed, DeployError> {
    if !system.root().is_dir() {
        return Err(DeployError::NothingInstalled { path: system.root().to_path_buf() });
    }
    let _lock = system.lock_within(patience, waiting)?;
    let mut state = system.state()?;
    let (id, known) = match ran {
        RunningBoot::This(id) => (id, true),
        RunningBoot::Unknown { take_pending } => (guess(system, &state, take_pending)?, false),
    };
    // Bless what is verified now, not what was verified at boot.
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
    if let Some(esp) = esp {
        esp::sync(system, esp, Some(id), Some(floor_before))?.report();
    }
    failpoint::hit("commit.kernel.blessed");
    if floor_before < id.version {
        let signature = match verified.floor_signature() {
            Some(signature) => signature,
            // The development floor of a device without a floor key requires none.
            None if !floor.needs_signature() => &[],
            None => return Err(FloorError::NoFloorSignature { version: id.version }.into()),
        };
        floor.raise(id.version, signature)?;
    }
    failpoint::hit("commit.floor.raised");
    // Rule: then read it back. A raise without effect is already an error of the floor.
    let floor_after = floor.read()?;
    if let Some(esp) = esp {
        esp::sync(system, esp, Some(id), Some(floor_after))?.report();
    }
    Ok(Committed { deployment: id, blessed, floor_before, floor_after })
}

/// Returns what to commit on a machine that mosfs has never booted.
fn guess(system: &System, state: &State, take_pending: bool) -> Result<DeploymentId, DeployError> {
    let unknown = |why: &str| Err(DeployError::BootUnknown { path: booted::path(), why: why.to_string() });
    if state.last_boot.is_some() {
        return unknown("mosfs has started this machine before");
    }
    if !take_pending {
        return unknown("mosfs did not start this machine");
    }
    match (&state.pending, state.current) {
        (Some(pending), _) if pending.fetching => Err(DeployError::StillFetching { id: pending.deployment }),
        (Some(pending), _) if pending.tries_left == 0 => {
            Err(DeployError::NoTriesLeft { id: pending.deployment })
        }
        (Some(pending), _) => Ok(pending.deployment),
        (None, Some(current)) => Ok(current),
        (None, None) => Err(DeployError::NothingInstalled { path: system.root().to_path_buf() }),
    }
}
