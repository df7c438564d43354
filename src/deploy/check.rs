//! Checks deployments for `mosfs verify`: the state file, and each deployment from its certificate to the
//! presence of its images. [`crate::store::fsck`] checks the content of the blobs.

use super::error::DeployError;
use super::id::DeploymentId;
use super::state::{Pending, State};
use super::{System, check_complete, deployment};
use crate::floor::{self, FloorError, Policy};
use crate::trust::{Anchor, Dates};

/// The result of the check.
#[derive(Debug, Default)]
pub struct Checked {
    /// How many deployments were checked.
    pub deployments: usize,
    /// The problems, each with its deployment, as a sentence.
    pub problems: Vec<String>,
}

/// Checks the state file and every deployment that it names.
pub fn check(system: &System, anchor: &Anchor, policy: Option<&Policy>) -> Checked {
    let mut checked = Checked::default();
    let ids = match system.state() {
        Ok(state) => of_state(&state),
        Err(error) => {
            checked.problems.push(error.to_string());
            deployment::list(system).map(|(whole, _)| whole).unwrap_or_default()
        }
    };
    for id in ids {
        checked.deployments += 1;
        if let Err(error) = one(system, &id, anchor, policy) {
            checked.problems.push(format!("deployment {id}: {error}"));
        }
    }
    checked
}

/// The deployments that may be started: a pending one that failed, or that is still being fetched, need not be
/// complete.
pub(super) fn of_state(state: &State) -> Vec<DeploymentId> {
    let is_out = |pending: &&Pending| pending.tries_left == 0 || pending.fetching;
    let out = state.pending.as_ref().filter(is_out).map(|pending| pending.deployment);
    state.named().into_iter().filter(|id| Some(*id) != out).collect()
}

/// Checks one deployment: signature, certificate, product, name, floor signature, images.
///
/// # Errors
/// The first check that fails.
pub(super) fn one(
    system: &System,
    id: &DeploymentId,
    anchor: &Anchor,
    policy: Option<&Policy>,
) -> Result<(), DeployError> {
    let verified = deployment::verify(system, id, anchor, Dates::LogOnly)?;
    if let Some(policy) = policy {
        let signature =
            verified.floor_signature().ok_or(FloorError::NoFloorSignature { version: id.version })?;
        floor::check_signature(policy, id.version, signature)?;
    }
    check_complete(system, &verified)
}
