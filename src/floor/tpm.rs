//! The floor in a TPM: read, raise, provision.

use std::time::Duration;

use super::Floor;
use super::digests::{ATTRIBUTES, DATA_BYTES, INDEX, Name, Policy};
use super::error::{FloorError, TpmFloorProblem};
use super::signature::{check_provision, check_signature, provision_message};
use crate::digest::hex;
use crate::sys::failpoint;
use crate::sys::tpm::{NvArea, NvIndex, PublicPoint, Session, Tcti, Tpm, TpmError};
use crate::sys::{self, file};
use crate::trust::p256::{P256PublicKey, Signature};

/// The lock file in the run folder, held while a floor is raised.
const LOCK_FILE: &str = "tpm.lock";

// Response codes (TPM 2.0 part 2, section "TPM_RC"; docs/design.md, the table of the floor).
/// The handle does not exist (first handle).
const RC_NO_HANDLE: u32 = 0x18b;
const RC_NV_UNINITIALIZED: u32 = 0x14a;
const RC_NV_SPACE: u32 = 0x14b;
const RC_NV_DEFINED: u32 = 0x14c;
/// The condition of a policy is not met.
const RC_POLICY: u32 = 0x126;
/// A signature does not verify: VerifySignature's second parameter.
const RC_SIGNATURE_2: u32 = 0x2db;
/// A signature does not verify: PolicySigned's fifth parameter.
const RC_SIGNATURE_5: u32 = 0x5db;
/// The session's policy differs from the object's (first session).
const RC_POLICY_FAIL: u32 = 0x99d;
/// PolicyAuthorize: the policy is not the approved one (first parameter); the ticket is invalid (fourth).
const RC_VALUE_1: u32 = 0x1c4;
const RC_VALUE_4: u32 = 0x4c4;
/// A wrong auth value (first session).
const RC_BAD_AUTH: u32 = 0x9a2;

/// The floor in a TPM.
///
/// It connects on first use and keeps the connection; an error closes it, and the next use reconnects.
pub struct TpmFloor {
    policy: Policy,
    tcti: Tcti,
    budget: Duration,
    tpm: Option<Tpm>,
}

impl TpmFloor {
    /// Returns the floor of a product in the TPM at `tcti`; `budget` bounds each use of it.
    pub fn new(policy: Policy, tcti: Tcti, budget: Duration) -> Self {
        Self { policy, tcti, budget, tpm: None }
    }

    /// Returns the public area of whatever is at the floor's index, for display.
    pub fn area(&mut self) -> Result<NvArea, FloorError> {
        self.with(|connection| connection.find()?.area().map_err(FloorError::from))
    }

    fn with<T>(
        &mut self,
        act: impl FnOnce(&Connection<'_>) -> Result<T, FloorError>,
    ) -> Result<T, FloorError> {
        let tpm = match self.tpm.take() {
            Some(tpm) => {
                tpm.restart_clock();
                tpm
            }
            None => Tpm::open(&self.tcti, self.budget)?,
        };
        let result = act(&Connection { tpm: &tpm, policy: &self.policy, tcti: &self.tcti });
        if result.is_ok() {
            self.tpm = Some(tpm);
        }
        result
    }

    /// Begins provisioning: defines the index and draws the nonce that the provisioning key must sign.
    ///
    /// An index that an earlier, interrupted provisioning defined is reused.
    ///
    /// # Errors
    /// [`FloorError::AlreadyProvisioned`], [`FloorError::FirstWriteNotAuthorized`], [`FloorError::InTpm`] with
    /// [`TpmFloorProblem::IndexTampered`], [`TpmFloorProblem::NvFull`] or [`TpmFloorProblem::OwnerAuthNeeded`].
    pub fn provision(
        &self,
        provision_key: &P256PublicKey,
        authorization: &Signature,
    ) -> Result<Provisioning, FloorError> {
        let digest = self.policy.to_sign(&self.policy.first_write(provision_key));
        if !self.policy.key().verifies(&digest, authorization) {
            return Err(FloorError::FirstWriteNotAuthorized {
                object: "the authorization".into(),
                product: self.policy.product(),
                found: "another signature".into(),
            });
        }
        let tpm = Tpm::open(&self.tcti, self.budget)?;
        let connection = Connection { tpm: &tpm, policy: &self.policy, tcti: &self.tcti };
        let (index, defined_here) = match connection.find() {
            Ok(index) => match connection.check_name(&index) {
                Ok(()) => return Err(connection.already_provisioned()),
                Err(FloorError::InTpm { problem: TpmFloorProblem::ProvisionIncomplete, .. }) => {
                    (index, false)
                }
                Err(error) => return Err(error),
            },
            Err(FloorError::InTpm { problem: TpmFloorProblem::NotProvisioned, .. }) => {
                (connection.define()?, true)
            }
            Err(error) => return Err(error),
        };
        failpoint::hit("floor.index.defined");
        let mut begun = Provisioning {
            session: None,
            nonce: Vec::new(),
            defined_here,
            index: Some(index),
            tpm,
            policy: self.policy.clone(),
            tcti: self.tcti.clone(),
            provision_key: *provision_key,
            authorization: *authorization,
        };
        // From here on, an error deletes the index again if it did not exist before.
        let session = begun.tpm.policy_session()?;
        begun.nonce = session.nonce()?;
        begun.session = Some(session);
        Ok(begun)
    }
}

impl Floor for TpmFloor {
    fn read(&mut self) -> Result<u64, FloorError> {
        self.with(|connection| connection.read())
    }

    fn raise(&mut self, version: u64, signature: &[u8]) -> Result<(), FloorError> {
        let signature = check_signature(&self.policy, version, signature)?;
        self.with(|connection| connection.raise(version, &signature))
    }

    fn needs_signature(&self) -> bool {
        true
    }

    fn place(&self) -> String {
        format!("NV index {INDEX:#010x} of the TPM at {}", self.tcti)
    }
}

/// A connection to a TPM, and the floor that it should hold.
struct Connection<'a> {
    tpm: &'a Tpm,
    policy: &'a Policy,
    tcti: &'a Tcti,
}

impl Connection<'_> {
    fn problem(&self, problem: TpmFloorProblem) -> FloorError {
        FloorError::InTpm { tcti: self.tcti.clone(), problem }
    }

    fn already_provisioned(&self) -> FloorError {
        FloorError::AlreadyProvisioned { place: format!("the TPM at {} (NV index {INDEX:#010x})", self.tcti) }
    }

    fn find(&self) -> Result<NvIndex, FloorError> {
        step(self.tpm.nv_index(INDEX), |code| match code {
            RC_NO_HANDLE => Some(self.problem(TpmFloorProblem::NotProvisioned)),
            _ => None,
        })
    }

    /// Rule (docs/design.md, floor at boot): the index's Name must be the expected constant.
    fn check_name(&self, index: &NvIndex) -> Result<(), FloorError> {
        let found = index.name()?;
        let is = |name: Name| found.as_slice() == name.as_bytes().as_slice();
        if is(self.policy.name_written()) {
            Ok(())
        } else if is(self.policy.name_unwritten()) {
            Err(self.problem(TpmFloorProblem::ProvisionIncomplete))
        } else {
            let expected = self.policy.name_written();
            Err(self.problem(TpmFloorProblem::IndexTampered { expected, found: hex(&found) }))
        }
    }

    fn read_index(&self, index: &NvIndex) -> Result<u64, FloorError> {
        let data = step(index.read(DATA_BYTES), |code| match code {
            RC_NV_UNINITIALIZED => Some(self.problem(TpmFloorProblem::ProvisionIncomplete)),
            _ => None,
        })?;
        let data: [u8; 8] = data.as_slice().try_into().map_err(|_| {
            FloorError::Tpm(TpmError::Garbled {
                tcti: self.tcti.clone(),
                operation: "read an NV index",
                found: format!("{} bytes, expected {DATA_BYTES}", data.len()),
            })
        })?;
        Ok(u64::from_be_bytes(data))
    }

    fn read(&self) -> Result<u64, FloorError> {
        let index = self.find()?;
        self.check_name(&index)?;
        self.read_index(&index)
    }

    fn raise(&self, version: u64, signature: &Signature) -> Result<(), FloorError> {
        // A socket to a simulator is exclusive anyway: a client that waited there for the lock would prevent
        // its holder from being served.
        let _lock = match self.tcti {
            Tcti::Device(_) => {
                let folder = sys::run_dir();
                file::create_folders(&folder)?;
                Some(self.tpm.lock(&folder.join(LOCK_FILE))?)
            }
            _ => None,
        };
        let index = self.find()?;
        self.check_name(&index)?;
        if self.read_index(&index)? >= version {
            return Ok(());
        }
        let bump = self.policy.bump(version);
        let operand = version.to_be_bytes();
        let session = self.tpm.policy_session()?;
        if let Err(error) = session.policy_nv_less_than(&index, &operand) {
            if error.code() != Some(RC_POLICY) {
                return Err(error.into());
            }
            // The TPM reports that the floor is not below the version: another process was faster.
            let floor = self.read_index(&index)?;
            return if floor >= version { Ok(()) } else { Err(FloorError::RaiseRefused { version, floor }) };
        }
        session.policy_cp_hash(&self.policy.write_parameters(version))?;
        let bad_signature = || FloorError::BadFloorSignature { version, product: self.policy.product() };
        self.authorize(&session, &bump, signature, bad_signature, || format!("version {version}"))?;
        failpoint::hit("floor.session.authorized");
        self.write(&index, &session, &operand, || format!("version {version}"))?;
        failpoint::hit("floor.index.written");
        // Rule (docs/design.md, bless first): raise the floor, then read it back. The Name as well: it
        // distinguishes the floor from a look-alike. ESYS has one handle per index: release the old one
        // first.
        drop(index);
        let floor = self.read()?;
        if floor < version {
            return Err(self.problem(TpmFloorProblem::NotRaised { version, floor }));
        }
        Ok(())
    }

    /// PolicyAuthorize of the session's policy, with the floor key's signature.
    fn authorize(
        &self,
        session: &Session,
        policy: &[u8; 32],
        signature: &Signature,
        bad_signature: impl FnOnce() -> FloorError,
        what: impl FnOnce() -> String,
    ) -> Result<(), FloorError> {
        let key = self.policy.key();
        let name = Name::of_key(key);
        let ticket = {
            let loaded = self.tpm.load_public(&point(key))?;
            step(loaded.verify(&self.policy.to_sign(policy), signature), |code| match code {
                RC_SIGNATURE_2 => Some(bad_signature()),
                _ => None,
            })?
        };
        let authorized = session.policy_authorize(policy, self.policy.reference(), name.as_bytes(), &ticket);
        step(authorized, |code| match code {
            RC_VALUE_1 | RC_VALUE_4 => {
                Some(self.problem(TpmFloorProblem::PolicyMismatch { what: what(), code }))
            }
            _ => None,
        })
    }

    fn write(
        &self,
        index: &NvIndex,
        session: &Session,
        data: &[u8; 8],
        what: impl FnOnce() -> String,
    ) -> Result<(), FloorError> {
        step(index.write(session, data), |code| match code {
            RC_POLICY_FAIL => Some(self.problem(TpmFloorProblem::PolicyMismatch { what: what(), code })),
            _ => None,
        })
    }

    fn define(&self) -> Result<NvIndex, FloorError> {
        let area = NvArea {
            index: INDEX,
            attributes: ATTRIBUTES,
            policy: self.policy.auth_policy().to_vec(),
            bytes: DATA_BYTES,
        };
        step(self.tpm.nv_define(&area), |code| match code {
            RC_NV_SPACE => Some(self.problem(TpmFloorProblem::NvFull)),
            RC_NV_DEFINED => Some(self.already_provisioned()),
            RC_BAD_AUTH => Some(self.problem(TpmFloorProblem::OwnerAuthNeeded)),
            _ => None,
        })
    }
}

/// Ends a step of the protocol: `meaning` returns what a response code means at this step, if it means
/// something there; any other failure is an error of the TPM.
fn step<T>(
    result: Result<T, TpmError>,
    meaning: impl FnOnce(u32) -> Option<FloorError>,
) -> Result<T, FloorError> {
    result.map_err(|error| error.code().and_then(meaning).unwrap_or_else(|| error.into()))
}

fn point(key: &P256PublicKey) -> PublicPoint {
    PublicPoint { x: *key.x(), y: *key.y() }
}

/// A provisioning that waits for the provisioning key's signature; its session stays open in the TPM.
///
/// If dropped before it is finished, it deletes the index that it defined.
pub struct Provisioning {
    // The order matters: objects in the TPM are flushed before the connection closes.
    session: Option<Session>,
    index: Option<NvIndex>,
    nonce: Vec<u8>,
    /// Whether the index did not exist before.
    defined_here: bool,
    policy: Policy,
    tcti: Tcti,
    provision_key: P256PublicKey,
    authorization: Signature,
    tpm: Tpm,
}

impl Provisioning {
    /// Returns what the provisioning key must sign: 36 bytes, the session's nonce and an expiration of 0.
    pub fn message(&self) -> Vec<u8> {
        provision_message(&self.nonce)
    }

    /// Writes 0, with the provisioning key's signature (64 bytes, or DER); the floor can be used from then on.
    ///
    /// # Errors
    /// [`FloorError::BadProvisionSignature`] for a signature of another key or of another session's nonce.
    pub fn finish(mut self, signature: &[u8]) -> Result<(), FloorError> {
        let signature = check_provision(&self.provision_key, &self.message(), signature)?;
        self.finish_unchecked(&signature)
    }

    /// Does the same, but leaves checking the signature to the TPM: for tests of what the TPM refuses.
    #[doc(hidden)]
    pub fn finish_unchecked(&mut self, signature: &Signature) -> Result<(), FloorError> {
        self.tpm.restart_clock();
        let connection = Connection { tpm: &self.tpm, policy: &self.policy, tcti: &self.tcti };
        let (Some(session), Some(index)) = (&self.session, &self.index) else {
            return Err(connection.problem(TpmFloorProblem::ProvisionIncomplete));
        };
        session.policy_nv_unwritten()?;
        {
            let key = self.tpm.load_public(&point(&self.provision_key))?;
            step(session.policy_signed(&key, &self.nonce, signature), |code| match code {
                RC_SIGNATURE_5 => Some(FloorError::BadProvisionSignature),
                _ => None,
            })?;
        }
        session.policy_cp_hash(&self.policy.first_write_parameters())?;
        let not_authorized = || FloorError::FirstWriteNotAuthorized {
            object: "the authorization".into(),
            product: self.policy.product(),
            found: "another signature".into(),
        };
        let policy = self.policy.first_write(&self.provision_key);
        connection
            .authorize(session, &policy, &self.authorization, not_authorized, || "the first write".into())?;
        connection.write(index, session, &[0; 8], || "the first write".into())?;
        // The index is written: it is the floor now and stays.
        self.defined_here = false;
        failpoint::hit("floor.index.provisioned");
        self.index = None;
        let connection = Connection { tpm: &self.tpm, policy: &self.policy, tcti: &self.tcti };
        // Rule (docs/design.md, provisioning): write 0, check the Name.
        connection.read().map(|_| ())
    }
}

impl Drop for Provisioning {
    fn drop(&mut self) {
        self.session = None;
        if let (true, Some(index)) = (self.defined_here, self.index.take()) {
            self.tpm.restart_clock();
            if let Err(error) = self.tpm.nv_undefine(index) {
                log::warn!("a provisioning failed, and its index stays: {error}");
            }
        }
    }
}
