//! The floor of a machine that is being set up.
//!
//! A kernel that `mosfs build` made starts nothing on a machine without a floor, so a machine gets one when it is set
//! up, if CONFIG has a floor key. A TPM that has it already is asked whether it allows the version.

use std::path::{Path, PathBuf};

use super::error::SetupError;
use crate::error::AnyError;
use crate::floor::signature::{self, find_authorization, sign_provision};
use crate::floor::{self, FileFloor, Floor, FloorError, FloorLocation, Policy, TpmFloor, TpmFloorProblem};
use crate::sys::file::read_named;
use crate::trust::Verified;
use crate::trust::p256::{P256PrivateKey, Signature};

/// No file with a key and its authorization is longer, in bytes.
const MAX_KEY_BYTES: u64 = 1 << 20;

/// What is known of the floor before anything is written.
pub struct FloorPlan {
    policy: Option<Policy>,
    place: FloorLocation,
    /// The version that the floor is at, if there is one.
    at: Option<u64>,
    provision: Option<Provision>,
}

struct Provision {
    file: PathBuf,
    key: P256PrivateKey,
    authorization: Signature,
}

impl FloorPlan {
    /// Asks the TPM, and reads the key that a floor is provisioned with. Nothing is changed.
    ///
    /// # Errors
    /// [`FloorError::Rollback`] if the floor is above the version; [`SetupError::NoFloor`] if there is none, and no
    /// key; [`FloorError::NoFloorSignature`] if the system could never raise it; whatever else the floor says.
    pub fn new(
        policy: Option<Policy>,
        place: FloorLocation,
        key: Option<&Path>,
        verified: &Verified,
    ) -> Result<Self, AnyError> {
        let version = verified.manifest().version;
        let mut plan = Self { policy, place, at: None, provision: None };
        let Some(policy) = &plan.policy else { return Ok(plan) };
        // Rule (docs/design.md, floor signature): a device with a floor refuses a system without one.
        let floor_signature = verified.floor_signature().ok_or(FloorError::NoFloorSignature { version })?;
        floor::check_signature(policy, version, floor_signature)?;
        let FloorLocation::Tpm(tcti, budget) = &plan.place else { return Ok(plan) };
        let mut tpm = TpmFloor::new(policy.clone(), tcti.clone(), *budget);
        match floor::check(&mut tpm, version) {
            Ok(at) => plan.at = Some(at),
            Err(FloorError::InTpm {
                problem: TpmFloorProblem::NotProvisioned | TpmFloorProblem::ProvisionIncomplete,
                ..
            }) => {
                let file = key.ok_or(SetupError::NoFloor)?;
                let key = P256PrivateKey::read(file)?;
                let text = read_named(file, MAX_KEY_BYTES)?;
                let object = file.display().to_string();
                let authorization = find_authorization(policy, key.public(), &text, &object)?;
                plan.provision = Some(Provision { file: file.to_path_buf(), key, authorization });
            }
            Err(error) => return Err(error.into()),
        }
        Ok(plan)
    }

    /// Returns what is going to be done, as a sentence.
    pub fn sentence(&self) -> String {
        match (&self.policy, &self.provision, self.at) {
            (None, ..) => "the machine has no floor: the configuration has no floor key".into(),
            (_, Some(provision), _) => {
                format!("the TPM gets a floor with the key {}", provision.file.display())
            }
            (_, None, Some(at)) => format!("the TPM has its floor, at {at}"),
            (_, None, None) => "the floor is kept in a file on the disk, for development".into(),
        }
    }

    /// Provisions the floor if the TPM has none.
    ///
    /// # Errors
    /// [`FloorError`].
    pub(super) fn provision(&mut self) -> Result<(), AnyError> {
        let (Some(policy), Some(provision), FloorLocation::Tpm(tcti, budget)) =
            (&self.policy, self.provision.take(), &self.place)
        else {
            return Ok(());
        };
        let mut tpm = TpmFloor::new(policy.clone(), tcti.clone(), *budget);
        let begun = tpm.provision(provision.key.public(), &provision.authorization)?;
        let signature = sign_provision(&provision.key, &begun.message(), &provision.file)?;
        signature::check_provision(provision.key.public(), &begun.message(), &signature)?;
        begun.finish(&signature)?;
        self.at = Some(tpm.read()?);
        Ok(())
    }

    /// Opens the floor for an installation into this folder; `None` if the machine has none.
    pub(super) fn open(&self, system: &Path) -> Option<(Box<dyn Floor>, Policy)> {
        let policy = self.policy.clone()?;
        let floor: Box<dyn Floor> = match &self.place {
            FloorLocation::Tpm(tcti, budget) => {
                Box::new(TpmFloor::new(policy.clone(), tcti.clone(), *budget))
            }
            FloorLocation::File(_) => Box::new(FileFloor::new(system.join("floor"), Some(policy.clone()))),
        };
        Some((floor, policy))
    }

    /// What floor signatures are checked against.
    pub(super) fn policy(&self) -> Option<&Policy> {
        self.policy.as_ref()
    }
}
