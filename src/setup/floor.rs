//! The floor of a machine that is being set up.
//!
//! A kernel that `mosfs build` made starts nothing on a machine without a floor, so a machine gets one when it is set
//! up, if CONFIG has a floor key. A TPM that has it already is asked whether it allows the version.

use std::path::{Path, PathBuf};

use super::error::SetupError;
use crate::error::AnyError;
use crate::floor::signature::{check_provision, find_authorization, sign_provision};
use crate::floor::{self, FileFloor, Floor, FloorError, FloorLocation, Policy, TpmFloor, TpmFloorProblem};
use crate::sys::file::read_named;
use crate::trust::Verified;
use crate::trust::p256::{P256PrivateKey, P256PublicKey, Signature};
use crate::trust::pem::public_only;

/// No file with a key and its authorization is longer, in bytes.
const MAX_KEY_BYTES: u64 = 1 << 20;

/// The longest wait for a signature, in seconds: ten years.
pub const LONGEST_WAIT: u64 = 315_360_000;

/// Has the holder of a provisioning key sign a message, and returns the signature.
pub type Sign<'a> = Box<dyn Fn(&P256PublicKey, &[u8]) -> Result<Vec<u8>, AnyError> + 'a>;

/// The key that a floor is provisioned with. Its file also has the floor key's authorization.
pub enum ProvisionKey<'a> {
    /// It is here: the file of its private half.
    Here(&'a Path),
    /// It is elsewhere: the file of its public half, and the way to its holder.
    Elsewhere(&'a Path, Sign<'a>),
}

/// What is known of the floor before anything is written.
pub struct FloorPlan<'a> {
    policy: Option<Policy>,
    place: FloorLocation,
    /// The version that the floor is at, if there is one.
    at: Option<u64>,
    provision: Option<AuthorizedKey<'a>>,
}

/// A provisioning key that the floor key has authorized.
pub struct AuthorizedKey<'a> {
    file: PathBuf,
    /// Its public half.
    pub public: P256PublicKey,
    /// The floor key's authorization of it.
    pub authorization: Signature,
    sign: Sign<'a>,
    is_here: bool,
}

impl<'a> FloorPlan<'a> {
    /// Asks the TPM, and reads the key that a floor is provisioned with. Nothing is changed.
    ///
    /// # Errors
    /// [`FloorError::Rollback`] if the floor is above the version; [`SetupError::NoFloor`] if there is none, and no
    /// key; [`FloorError::NoFloorSignature`] if the system could never raise it; whatever else the floor says.
    pub fn new(
        policy: Option<Policy>,
        place: FloorLocation,
        key: Option<ProvisionKey<'a>>,
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
                plan.provision = Some(AuthorizedKey::new(policy, key.ok_or(SetupError::NoFloor)?, None)?);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(plan)
    }

    /// Returns what is going to be done, as a sentence.
    pub fn sentence(&self) -> String {
        match (&self.policy, &self.provision, self.at) {
            (None, ..) => "the machine has no floor: the configuration has no floor key".into(),
            (_, Some(AuthorizedKey { file, is_here, .. }), _) => {
                let when = if *is_here { "" } else { ", once it has signed a nonce" };
                format!("the TPM gets a floor with the key {}{when}", file.display())
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
        let begun = tpm.provision(&provision.public, &provision.authorization)?;
        let signature = provision.sign(&begun.message())?;
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

impl<'a> AuthorizedKey<'a> {
    /// Reads the key and finds its authorization, in its own file where no other is given.
    ///
    /// # Errors
    /// Those of the files; [`FloorError`] if there is no authorization by the floor key.
    pub fn new(
        policy: &Policy,
        key: ProvisionKey<'a>,
        authorization: Option<&Path>,
    ) -> Result<Self, AnyError> {
        let (file, public, sign, is_here): (_, _, Sign<'a>, _) = match key {
            ProvisionKey::Here(file) => {
                let key = P256PrivateKey::read(file)?;
                let public = *key.public();
                let sign = move |_: &P256PublicKey, message: &[u8]| {
                    Ok(sign_provision(&key, message, file)?.to_vec())
                };
                (file, public, Box::new(sign), true)
            }
            ProvisionKey::Elsewhere(file, sign) => (file, P256PublicKey::read(file)?, sign, false),
        };
        let source = authorization.unwrap_or(file);
        let text = read_named(source, MAX_KEY_BYTES)?;
        if authorization.is_some() || !is_here {
            public_only(&text, source)?;
        }
        let authorization = find_authorization(policy, &public, &text, &source.display().to_string())?;
        Ok(Self { file: file.to_path_buf(), public, authorization, sign, is_here })
    }

    /// Has the key sign the message of the TPM's session, and checks the signature.
    ///
    /// # Errors
    /// Those of the holder of the key; [`FloorError::BadProvisionSignature`].
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, AnyError> {
        let signature = (self.sign)(&self.public, message)?;
        check_provision(&self.public, message, &signature)?;
        Ok(signature)
    }
}
