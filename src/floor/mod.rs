//! The floor: the lowest version that a device still runs, held by its TPM.
//!
//! A version jumps by any amount, so a TPM counter that steps by one cannot be the version. The floor is an
//! NV index of 8 bytes that only ever rises, and it is the TPM that sees to it:
//!
//! ```text
//! write policy of the index   PolicyAuthorize(floor key F, ref of the product)
//!   what F signs for version V   the index is below V (PolicyNV), and the command is NV_Write of V (PolicyCpHash)
//!   what F signs once a product  never written yet (PolicyNvWritten), and the provisioning key P signed this
//!                                session's nonce (PolicySigned), and the command is NV_Write of 0 (PolicyCpHash)
//!
//! publisher, offline    sign_version(F, product, V) ──> 64 bytes, shipped with the system
//! factory               provision: define, session, P signs the nonce, write 0, check the Name
//! update                version > current, version > floor, floor signature checked in software; no write
//! boot                  Name of the index is the expected one, then version >= floor
//! commit                bless the deployment, raise the floor, read it back
//! ```
//!
//! The exact bytes are in [`digests`]; what is signed, and how it is stored, in [`signature`].
//!
//! Invariants: nothing provisions by itself; nothing deletes an index but a provisioning that failed and had defined
//! it; a floor is believed only after the index's Name was compared; every session and key in the TPM is
//! flushed on every path. The TPM's answers are hostile input, bounded in size and time.
//!
//! Locks: [`Floor::raise`] holds a lock file (`RUN/tpm.lock`) from the comparison to the read-back, because a session
//! that passed PolicyNV stays good while another one writes; the development floor has a lock file.

pub mod config;
pub mod digests;
mod error;
mod file;
pub mod signature;
mod tpm;

use std::path::PathBuf;
use std::time::Duration;

pub use config::Config;
pub use digests::{INDEX, MAX_VERSION, Name, Policy};
pub use error::FloorError;
pub use file::{FILE_WARNING, FileFloor};
pub use signature::{FloorKey, KeyError, PrivateKey, PublicKey, Signature, check_signature, sign_version};
pub use tpm::{DEFAULT_BUDGET, Provisioning, TpmFloor};

pub use crate::sys::tpm::{NvArea, Tcti, TctiError};

/// A floor: what cannot be undone by whoever can write the disk.
///
/// A floor in a TPM keeps its connection from the first use until it is dropped; over a socket to a simulator nobody
/// else can use that TPM meanwhile.
pub trait Floor {
    /// The lowest version that may run; 0 on a device that was provisioned and has committed nothing.
    fn read(&mut self) -> Result<u64, FloorError>;

    /// Raises the floor to `version`, with the floor key's signature for it, and reads it back.
    ///
    /// A floor that is at `version` or above stays where it is, and that is success: so it can be done
    /// twice, at once, and again after it was cut off.
    fn raise(&mut self, version: u64, signature: &[u8]) -> Result<(), FloorError>;

    /// Whether [`raise`](Self::raise) wants a signature. Only the development floor of a device that has no floor key does not.
    fn needs_signature(&self) -> bool;

    /// What to tell the user each time, if anything.
    fn warning(&self) -> Option<&'static str> {
        None
    }

    /// Where the floor is, for the user.
    fn place(&self) -> String;
}

/// Where a floor is kept, as the command line says it.
#[derive(Debug, Clone)]
pub enum Place {
    /// In a TPM; the budget bounds each use of it.
    Tpm(Tcti, Duration),
    /// In a file, for development; it protects nothing.
    File(PathBuf),
}

/// Opens the floor of a device. A TPM is not talked to before the floor is first used.
///
/// # Errors
/// [`FloorError::NotConfigured`] where the TPM floor's key or product are not known.
pub fn open(place: &Place, config: &Config) -> Result<Box<dyn Floor>, FloorError> {
    match place {
        Place::Tpm(tcti, budget) => Ok(Box::new(TpmFloor::new(config.policy()?, tcti.clone(), *budget))),
        Place::File(path) => Ok(Box::new(FileFloor::new(path.clone(), config.policy().ok()))),
    }
}

/// Checks a version at boot; gives the floor.
///
/// # Errors
/// [`FloorError::Rollback`], and whatever reading the floor gives.
pub fn check(floor: &mut dyn Floor, version: u64) -> Result<u64, FloorError> {
    let lowest = floor.read()?;
    // Rule (docs/design.md, floor at boot): the index's Name must be the expected constant [`read`
    // sees to that]; then `version >= floor`.
    if version < lowest { Err(FloorError::Rollback { version, floor: lowest }) } else { Ok(lowest) }
}

/// Checks a version at update; gives the floor. `current` is `None` at the first install, which may put back the
/// version that the floor is at.
///
/// # Errors
/// [`FloorError::NotNewer`], [`FloorError::Rollback`], and whatever reading the floor gives.
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
