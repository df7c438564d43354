//! Errors of the floor.

use std::path::PathBuf;

use uuid::Uuid;

use super::digests::{INDEX, Name};
use crate::error::{Class, Classified, IoError};
use crate::sys::tpm::{Tcti, TpmError};
use crate::trust::{ConfigError, KeyError};

/// Why a floor cannot be read or raised, or why a version is refused.
///
/// The class is [`Class::Tpm`] (exit code 5) if the floor itself is in question, [`Class::Rollback`] (4) if
/// the floor is sound and refuses, and [`Class::Input`] (2) if the user's arguments or files are wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FloorError {
    /// There is no TPM, or it did not do what it was asked to do.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// The TPM works, but the floor in it cannot be used.
    #[error("{}", problem.text(tcti))]
    InTpm {
        /// Where the TPM is.
        tcti: Tcti,
        /// What is wrong with the floor.
        problem: TpmFloorProblem,
    },
    /// The version is older than the floor.
    #[error("version {version} is below the floor: this device allows version {floor} and up")]
    Rollback {
        /// The requested version.
        version: u64,
        /// The floor.
        floor: u64,
    },
    /// The offered version is not newer.
    #[error("version {version} is not newer than the current version {current}")]
    NotNewer {
        /// The requested version.
        version: u64,
        /// The current version of the device.
        current: u64,
    },
    /// The TPM refused the raise, although the floor reads below the version.
    #[error("the TPM refused to raise the floor to {version}, though it stands at {floor}")]
    RaiseRefused {
        /// The requested version.
        version: u64,
        /// The floor that was read after the refusal.
        floor: u64,
    },
    /// A floor signature that the floor key did not make for this version and product.
    #[error("the floor signature is not the floor key's for version {version} of product {product}")]
    BadFloorSignature {
        /// The version.
        version: u64,
        /// The product.
        product: Uuid,
    },
    /// A system without a floor signature, on a device that requires one.
    #[error("version {version} has no floor signature, and this device has a floor")]
    NoFloorSignature {
        /// The version.
        version: u64,
    },
    /// The provisioning key did not sign this session's nonce.
    #[error("the signature is not the provisioning key's over the nonce of this session")]
    BadProvisionSignature,
    /// The floor key did not authorize this provisioning key for this product.
    #[error(
        "{object}: expected an authorization by the floor key for this provisioning key and product {product}, \
         found {found}"
    )]
    FirstWriteNotAuthorized {
        /// Where mosfs looked for it.
        object: String,
        /// The product.
        product: Uuid,
        /// What was found.
        found: String,
    },
    /// A floor already exists.
    #[error("{place} has its floor already")]
    AlreadyProvisioned {
        /// The TPM and the index, or the file.
        place: String,
    },
    /// The development floor's file does not hold a version.
    #[error("{}: expected a version and a newline, found `{found}`", path.display())]
    FileTampered {
        /// The file.
        path: PathBuf,
        /// Its content, shortened.
        found: String,
    },
    /// A version that no system can have.
    #[error("{version} is not a version: expected 1 to 9007199254740991 (2^53-1)")]
    VersionRange {
        /// The given number.
        version: u64,
    },
    /// CONFIG lacks the floor key or the product.
    #[error("{}: this device has no {what}: CONFIG does not name one", path.display())]
    NotConfigured {
        /// The file that should contain it.
        path: PathBuf,
        /// `floor key` or `product`.
        what: &'static str,
    },
    /// The floor key or the product in CONFIG is malformed, or another one than the given.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A key file that cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A file operation that failed.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for FloorError {
    fn class(&self) -> Class {
        match self {
            FloorError::Rollback { .. } | FloorError::NotNewer { .. } => Class::Rollback,
            FloorError::VersionRange { .. } | FloorError::FirstWriteNotAuthorized { .. } => Class::Input,
            FloorError::Config(error) => error.class(),
            FloorError::Key(error) => error.class(),
            FloorError::Io(error) => error.class(),
            _ => Class::Tpm,
        }
    }
}

/// What is wrong with the floor in a TPM. A TPM has at most one floor, at NV index 0x01500050.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TpmFloorProblem {
    /// The floor's index does not exist.
    NotProvisioned,
    /// The floor's index exists but was never written.
    ProvisionIncomplete,
    /// The floor's handle holds an index with other attributes, another policy or another size.
    IndexTampered {
        /// The Name that follows from the floor key and the product.
        expected: Name,
        /// The Name that the TPM returns, in hex digits.
        found: String,
    },
    /// The raise succeeded, but the floor reads lower.
    NotRaised {
        /// The version that was written.
        version: u64,
        /// The floor that was read back.
        floor: u64,
    },
    /// The session does not satisfy the floor's policy.
    PolicyMismatch {
        /// What was to be written.
        what: String,
        /// The TPM's response code.
        code: u32,
    },
    /// The TPM has no room for the index.
    NvFull,
    /// The owner hierarchy has an authorization value.
    OwnerAuthNeeded,
}

impl TpmFloorProblem {
    fn text(&self, tcti: &Tcti) -> String {
        let index = format!("NV index {INDEX:#010x}");
        match self {
            Self::NotProvisioned => format!("the TPM at {tcti} has no floor: {index} does not exist"),
            Self::ProvisionIncomplete => {
                format!("the floor in the TPM at {tcti} is not ready: {index} was defined, but never written")
            }
            Self::IndexTampered { expected, found } => format!(
                "{index} of the TPM at {tcti} is not this product's floor: its Name is {found}, expected {expected}"
            ),
            Self::NotRaised { version, floor } => {
                format!("the floor in the TPM at {tcti} reads {floor} after it was raised to {version}")
            }
            Self::PolicyMismatch { what, code } => {
                format!("the TPM at {tcti} does not take the policy for {what}: response {code:#x}")
            }
            Self::NvFull => format!("the TPM at {tcti} has no room for {index}"),
            Self::OwnerAuthNeeded => format!(
                "the TPM at {tcti} asks for the owner's authorization to define {index}: expected an empty one"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Policy;
    use super::*;
    use crate::trust::p256::P256PrivateKey;

    #[test]
    fn each_problem_names_the_tpm_and_what_is_wrong() {
        let key = *P256PrivateKey::generate().unwrap().public();
        let expected = Policy::new(key, Uuid::nil()).name_written();
        let tampered = format!(
            "NV index 0x01500050 of the TPM at device:/dev/tpmrm0 is not this product's floor: \
             its Name is 000b00, expected {expected}"
        );
        let what = "version 300".to_string();
        for (problem, text) in [
            (
                TpmFloorProblem::NotProvisioned,
                "the TPM at device:/dev/tpmrm0 has no floor: NV index 0x01500050 does not exist",
            ),
            (
                TpmFloorProblem::ProvisionIncomplete,
                "the floor in the TPM at device:/dev/tpmrm0 is not ready: NV index 0x01500050 was defined, \
                 but never written",
            ),
            (TpmFloorProblem::IndexTampered { expected, found: "000b00".into() }, &tampered),
            (
                TpmFloorProblem::NotRaised { version: 300, floor: 299 },
                "the floor in the TPM at device:/dev/tpmrm0 reads 299 after it was raised to 300",
            ),
            (
                TpmFloorProblem::PolicyMismatch { what, code: 0x99d },
                "the TPM at device:/dev/tpmrm0 does not take the policy for version 300: response 0x99d",
            ),
            (TpmFloorProblem::NvFull, "the TPM at device:/dev/tpmrm0 has no room for NV index 0x01500050"),
            (
                TpmFloorProblem::OwnerAuthNeeded,
                "the TPM at device:/dev/tpmrm0 asks for the owner's authorization to define NV index \
                 0x01500050: expected an empty one",
            ),
        ] {
            let error = FloorError::InTpm { tcti: Tcti::Device("/dev/tpmrm0".into()), problem };
            assert_eq!(error.to_string(), text);
            assert_eq!(error.class(), Class::Tpm);
        }
    }
}
