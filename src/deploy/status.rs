//! The stable view of a device that `mosfs status --json` prints.
//!
//! Fields are only ever added. Everything here is read without the lock and without verification: it reports
//! what is on the disk, not what would be allowed to boot.

use serde::Serialize;

use super::System;
use super::deployment;
use super::error::DeployError;
use super::incoming;
use super::state::{DeploymentId, LastBoot, LastUpdate, State};
use crate::image::blobs::BlobProgress;

/// A deployment in the output of `mosfs status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeploymentStatus {
    /// Its name, `VERSION-HEX`.
    pub id: DeploymentId,
    /// The version of the system.
    pub version: u64,
    /// The digest of its system manifest.
    pub digest: crate::digest::Digest,
    /// How many tries it has left; only for a pending one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tries_left: Option<u32>,
}

impl DeploymentStatus {
    fn of(id: DeploymentId) -> Self {
        Self { id, version: id.version, digest: id.digest, tries_left: None }
    }
}

/// What is installed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Installed {
    /// The deployment that has proved healthy last.
    pub current: Option<DeploymentStatus>,
    /// The deployment to try at the next boot.
    pub pending: Option<DeploymentStatus>,
    /// The deployment that was current before.
    pub previous: Option<DeploymentStatus>,
    /// Deployments on the disk that no state names: `mosfs gc` removes them.
    pub unused: Vec<DeploymentId>,
    /// How much is here of each layer of the pending deployment, while it is being fetched.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fetching: Vec<BlobProgress>,
    /// How the last boot choice ended.
    pub last_boot: Option<LastBoot>,
    /// How the last install or update ended.
    pub last_update: Option<LastUpdate>,
    /// Why the state file cannot be read: then the above is what the disk holds, and the next command that
    /// changes something writes the file anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_error: Option<String>,
}

/// Reads what is installed.
pub fn installed(system: &System) -> Result<Installed, DeployError> {
    let state: State = system.state()?;
    let named = state.named();
    let fetching = incoming::progress(system, &state);
    let (whole, _) = deployment::list(system)?;
    Ok(Installed {
        current: state.current.map(DeploymentStatus::of),
        pending: state.pending.as_ref().map(|pending| DeploymentStatus {
            tries_left: Some(pending.tries_left),
            ..DeploymentStatus::of(pending.deployment)
        }),
        previous: state.previous.map(DeploymentStatus::of),
        unused: whole.into_iter().filter(|id| !named.contains(id)).collect(),
        fetching,
        last_boot: state.last_boot,
        last_update: state.last_update,
        state_error: state.damage.map(|damage| damage.to_string()),
    })
}
