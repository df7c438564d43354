//! The floor: the lowest version that a device still runs, stored in its TPM.
//!
//! Versions increase by any amount, so a TPM counter, which increases by one, cannot hold the version. The
//! floor is an NV index of 8 bytes that can only increase, which the TPM enforces:
//!
//! ```text
//! write policy of the index   PolicyAuthorize(floor key F, ref of the product)
//!   what F signs for version V    the index is below V (PolicyNV), and the command is NV_Write of V (PolicyCpHash)
//!   what F signs once per product never written yet (PolicyNvWritten), and the provisioning key P signed this
//!                                session's nonce (PolicySigned), and the command is NV_Write of 0 (PolicyCpHash)
//!
//! publisher, offline    sign_version(F, product, V) ──> 64 bytes, shipped with the system
//! factory               provision: define, session, P signs the nonce, write 0, check the Name
//! update                version > current, version > floor, floor signature checked in software; no write
//! boot                  Name of the index is the expected one, then version >= floor
//! commit                bless the deployment, raise the floor, read it back
//! ```
//!
//! [`digests`] defines the exact bytes; [`signature`] defines what is signed and how it is stored.
//!
//! Invariants: a device never provisions itself; only a failed provisioning deletes an index, and only one
//! that it defined; a floor is trusted only after the index's Name has been compared; every session and key
//! in the TPM is flushed on every path. The TPM's responses are hostile input, bounded in size and time.
//!
//! Locks: [`Floor::raise`] holds a lock file (`RUN/tpm.lock`) from the comparison to the read-back, because a
//! session that passed PolicyNV stays valid while another one writes; the development floor has its own lock
//! file.

mod config;
pub mod digests;
mod error;
mod file;
pub mod signature;
mod tpm;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use config::{find_policy, policy, policy_of};
pub use digests::Policy;
pub use error::{FloorError, TpmFloorProblem};
pub use file::FileFloor;
pub use signature::{check_signature, sign_version};
pub use tpm::TpmFloor;

pub use crate::sys::tpm::Tcti;

/// A floor, which an attacker who can write the disk cannot lower.
///
/// A floor in a TPM keeps its connection from the first use until it is dropped; over a socket to a
/// simulator, no other client can use that TPM meanwhile.
pub trait Floor {
    /// Returns the lowest version that may run; 0 on a provisioned device that has committed nothing.
    fn read(&mut self) -> Result<u64, FloorError>;

    /// Raises the floor to `version`, with the floor key's signature for it, and reads it back.
    ///
    /// If the floor is already at `version` or above, it stays, and the call succeeds: so a raise can be
    /// repeated, run concurrently, and retried after an interruption.
    fn raise(&mut self, version: u64, signature: &[u8]) -> Result<(), FloorError>;

    /// Whether [`raise`](Self::raise) requires a signature. Only the development floor of a device without a
    /// floor key does not.
    fn needs_signature(&self) -> bool;

    /// A warning to print each time, if any.
    fn warning(&self) -> Option<&'static str> {
        None
    }

    /// Where the floor is, for the user.
    fn place(&self) -> String;
}

/// Where a floor is stored, as given on the command line.
#[derive(Debug, Clone)]
pub enum FloorLocation {
    /// In a TPM; the budget bounds each use of it.
    Tpm(Tcti, Duration),
    /// In a file, for development; it protects nothing.
    File(PathBuf),
}

/// Opens the floor of a device. The TPM is not contacted before the floor is first used.
///
/// # Errors
/// [`FloorError::NotConfigured`] if CONFIG lacks the TPM floor's key or product; [`FloorError::Config`].
pub fn open(place: &FloorLocation, config: &Path) -> Result<Box<dyn Floor>, FloorError> {
    match place {
        FloorLocation::Tpm(tcti, budget) => {
            Ok(Box::new(TpmFloor::new(policy(config)?, tcti.clone(), *budget)))
        }
        FloorLocation::File(path) => Ok(Box::new(FileFloor::new(path.clone(), find_policy(config)?))),
    }
}

/// Checks a version at boot; returns the floor.
///
/// # Errors
/// [`FloorError::Rollback`], and errors of reading the floor.
pub fn check(floor: &mut dyn Floor, version: u64) -> Result<u64, FloorError> {
    let lowest = floor.read()?;
    // Rule (docs/design.md, floor at boot): the index's Name must be the expected constant [`read`
    // sees to that]; then `version >= floor`.
    if version < lowest { Err(FloorError::Rollback { version, floor: lowest }) } else { Ok(lowest) }
}

/// Checks a version at update; returns the floor. `current` is `None` at the first install, which may
/// reinstall the version at the floor.
///
/// # Errors
/// [`FloorError::NotNewer`], [`FloorError::Rollback`], and errors of reading the floor.
pub fn check_update(floor: &mut dyn Floor, version: u64, current: Option<u64>) -> Result<u64, FloorError> {
    // Rule (docs/design.md, newer only): `version > current` and `version > floor`.
    if let Some(current) = current
        && version <= current
    {
        return Err(FloorError::NotNewer { version, current });
    }
    let lowest = check(floor, version)?;
    if current.is_some() && version == lowest {
        return Err(FloorError::NotNewer { version, current: lowest });
    }
    Ok(lowest)
}
