//! Errors of the floor.

use std::io;
use std::path::PathBuf;

use uuid::Uuid;

use super::digests::Name;
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
    /// The device has no TPM, or it cannot be reached.
    #[error("no TPM answers at {tcti}: {source}")]
    NoTpm {
        /// Where mosfs looked for it.
        tcti: Tcti,
        /// The error of the operating system.
        source: io::Error,
    },
    /// tpm2-tss is missing.
    #[error("cannot load the TPM library: {message}")]
    NoLibrary {
        /// The message of the dynamic loader.
        message: String,
    },
    /// The floor's index does not exist.
    #[error("the TPM at {tcti} has no floor: NV index {index:#010x} does not exist")]
    NotProvisioned {
        /// Where the TPM is.
        tcti: Tcti,
        /// The missing index.
        index: u32,
    },
    /// The floor's index exists but was never written.
    #[error(
        "the floor in the TPM at {tcti} is not ready: NV index {index:#010x} was defined, but never written"
    )]
    ProvisionIncomplete {
        /// Where the TPM is.
        tcti: Tcti,
        /// The index.
        index: u32,
    },
    /// The floor's handle holds an index with other attributes, another policy or another size.
    #[error(
        "NV index {index:#010x} of the TPM at {tcti} is not this product's floor: \
         its Name is {found}, expected {expected}"
    )]
    FloorIndexTampered {
        /// Where the TPM is.
        tcti: Tcti,
        /// The index.
        index: u32,
        /// The Name that follows from the floor key and the product.
        expected: Name,
        /// The Name that the TPM returns, in hex digits.
        found: String,
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
    /// The raise succeeded, but the floor reads lower.
    #[error("the floor in the TPM at {tcti} reads {floor} after it was raised to {version}")]
    NotRaised {
        /// Where the TPM is.
        tcti: Tcti,
        /// The version that was written.
        version: u64,
        /// The floor that was read back.
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
    /// The session does not satisfy the floor's policy.
    #[error("the TPM at {tcti} does not take the policy for {what}: response {code:#x}")]
    PolicyMismatch {
        /// Where the TPM is.
        tcti: Tcti,
        /// What was to be written.
        what: String,
        /// The TPM's response code.
        code: u32,
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
    /// The TPM has no room for the index.
    #[error("the TPM at {tcti} has no room for NV index {index:#010x}")]
    NvFull {
        /// Where the TPM is.
        tcti: Tcti,
        /// The index.
        index: u32,
    },
    /// A floor already exists.
    #[error("{place} has its floor already")]
    AlreadyProvisioned {
        /// The TPM and the index, or the file.
        place: String,
    },
    /// The owner hierarchy has an authorization value.
    #[error(
        "the TPM at {tcti} asks for the owner's authorization to define NV index {index:#010x}: \
         expected an empty one"
    )]
    OwnerAuthNeeded {
        /// Where the TPM is.
        tcti: Tcti,
        /// The index.
        index: u32,
    },
    /// The TPM did not respond in time.
    #[error("{0}")]
    TpmBusy(#[source] TpmError),
    /// Any other failure of the TPM.
    #[error("{0}")]
    Tpm(#[source] TpmError),
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

/// A TPM error that has no specific meaning at the place where it occurred.
impl From<TpmError> for FloorError {
    fn from(error: TpmError) -> Self {
        match error {
            TpmError::Absent { tcti, source } => FloorError::NoTpm { tcti, source },
            TpmError::Library { message } => FloorError::NoLibrary { message },
            busy @ (TpmError::Timeout { .. } | TpmError::Busy { .. }) => FloorError::TpmBusy(busy),
            other => FloorError::Tpm(other),
        }
    }
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
