//! The floor's signatures, in software: ECDSA over P-256 with SHA-256 (the keys: [`crate::trust::p256`]).
//!
//! ```text
//! floor signature     64 bytes: r ‖ s, 32 bytes each, big-endian, over H(bump(V) ‖ ref)
//! provision message   36 bytes: the session's nonce ‖ 00000000 (expiration); its SHA-256 is signed
//! provision signature 64 bytes, r ‖ s
//! authorization       r ‖ s over H(first write ‖ ref), as a PEM block after a provisioning key:
//!                     -----BEGIN MOSFS FIRST WRITE AUTHORIZATION----- base64 -----END ...-----
//! ```
//!
//! For the provision message, which a person may have signed with `openssl dgst -sha256 -sign`, a DER
//! signature (70 to 72 bytes) is accepted as well.

use std::path::Path;

use openssl::ecdsa::EcdsaSig;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::digests::{MAX_VERSION, Policy};
use super::error::FloorError;
use crate::trust::KeyError;
use crate::trust::p256::{P256PrivateKey, P256PublicKey, Signature, raw};

/// The length of a provision message, in bytes: a SHA-256 session's nonce and an expiration.
pub const PROVISION_MESSAGE_BYTES: usize = 36;
/// The label of the PEM block that authorizes a provisioning key.
const AUTHORIZATION: &str = "MOSFS FIRST WRITE AUTHORIZATION";

/// Returns what the floor key signs for a version, with SHA-256: for a key in a token, or on another machine.
pub fn version_message(policy: &Policy, version: u64) -> Result<Vec<u8>, FloorError> {
    check_version(version)?;
    Ok(policy.message(&policy.bump(version)))
}

/// Converts a floor signature made elsewhere, raw or DER as openssl writes it, to the form that is shipped.
///
/// # Errors
/// [`FloorError::BadFloorSignature`] if it is neither.
pub fn raw_version(policy_product: Uuid, version: u64, signature: &[u8]) -> Result<Signature, FloorError> {
    match Signature::try_from(signature) {
        Ok(raw) => Ok(raw),
        Err(_) => EcdsaSig::from_der(signature)
            .and_then(|der| raw(&der))
            .map_err(|_| FloorError::BadFloorSignature { version, product: policy_product }),
    }
}

/// Signs a version for every device of a product: the floor signature.
pub fn sign_version(key: &P256PrivateKey, product: &Uuid, version: u64) -> Result<Signature, FloorError> {
    check_version(version)?;
    let policy = Policy::new(*key.public(), *product);
    Ok(key.sign(&policy.to_sign(&policy.bump(version)))?)
}

/// Checks a floor signature in software.
///
/// # Errors
/// [`FloorError::BadFloorSignature`], including for a signature of another length.
pub fn check_signature(policy: &Policy, version: u64, signature: &[u8]) -> Result<Signature, FloorError> {
    check_version(version)?;
    let wrong = FloorError::BadFloorSignature { version, product: policy.product() };
    match Signature::try_from(signature) {
        Ok(fits) if policy.key().verifies(&policy.to_sign(&policy.bump(version)), signature) => Ok(fits),
        _ => Err(wrong),
    }
}

/// Rule (docs/design.md, versions): a version is 1 to 2^53-1.
pub(super) fn check_version(version: u64) -> Result<(), FloorError> {
    if version == 0 || version > MAX_VERSION { Err(FloorError::VersionRange { version }) } else { Ok(()) }
}

/// Authorizes, with the floor key, the holder of a provisioning key to make the first write.
///
/// The signed policy includes PolicySigned over the TPM's own nonce. Rule (docs/design.md, first write): the
/// floor key must never sign a first-write policy that has no nonce; it could be replayed on a deleted and
/// re-created index.
pub fn authorize(
    key: &P256PrivateKey,
    product: &Uuid,
    provision_key: &P256PublicKey,
) -> Result<Signature, FloorError> {
    let policy = Policy::new(*key.public(), *product);
    Ok(key.sign(&policy.to_sign(&policy.first_write(provision_key)))?)
}

/// Encodes an authorization as a PEM block, to be appended to the file of the provisioning key.
pub fn authorization_block(authorization: &Signature) -> String {
    let text = openssl::base64::encode_block(authorization);
    let mut block = format!("-----BEGIN {AUTHORIZATION}-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(64));
        block.push_str(line);
        block.push('\n');
        rest = more;
    }
    block.push_str(&format!("-----END {AUTHORIZATION}-----\n"));
    block
}

/// Finds an authorization of this provisioning key in a text with PEM blocks; `object` is for the error.
pub fn find_authorization(
    policy: &Policy,
    provision_key: &P256PublicKey,
    text: &[u8],
    object: &str,
) -> Result<Signature, FloorError> {
    let text = String::from_utf8_lossy(text);
    let digest = policy.to_sign(&policy.first_write(provision_key));
    let (begin, end) = (format!("-----BEGIN {AUTHORIZATION}-----"), format!("-----END {AUTHORIZATION}-----"));
    let mut blocks = 0_usize;
    for block in text.split(begin.as_str()).skip(1) {
        blocks += 1;
        let base64: String =
            block.split(end.as_str()).next().unwrap_or_default().split_ascii_whitespace().collect();
        let bytes = openssl::base64::decode_block(&base64).unwrap_or_default();
        if let (true, Ok(signature)) = (policy.key().verifies(&digest, &bytes), bytes.as_slice().try_into()) {
            return Ok(signature);
        }
    }
    let found = match blocks {
        0 => "none".to_string(),
        _ => format!("{blocks} for another key or product"),
    };
    Err(FloorError::FirstWriteNotAuthorized { object: object.to_string(), product: policy.product(), found })
}

/// Returns what the provisioning key signs for a session: its nonce and an expiration of 0.
pub fn provision_message(nonce: &[u8]) -> Vec<u8> {
    [nonce, &[0; 4]].concat()
}

/// Signs a provision message.
///
/// # Errors
/// [`KeyError::Unusable`] if it is not a provision message: this key signs nothing else.
pub fn sign_provision(key: &P256PrivateKey, message: &[u8], path: &Path) -> Result<Signature, KeyError> {
    // Rule (docs/design.md, first write): P signs H(nonceTPM ‖ 00000000), and nothing else.
    let (Some(nonce), true) = (message.strip_suffix(&[0; 4]), message.len() == PROVISION_MESSAGE_BYTES)
    else {
        return Err(KeyError::Unusable {
            path: path.to_path_buf(),
            expected: "a nonce of 32 bytes and 4 zero bytes, not",
            found: format!("{} bytes", message.len()),
        });
    };
    key.sign(&Sha256::digest(provision_message(nonce)).into())
}

/// Reads a signature over a provision message, raw or DER, and checks it.
///
/// # Errors
/// [`FloorError::BadProvisionSignature`].
pub fn check_provision(
    provision_key: &P256PublicKey,
    message: &[u8],
    signature: &[u8],
) -> Result<Signature, FloorError> {
    let raw = match Signature::try_from(signature) {
        Ok(raw) => Ok(raw),
        Err(_) => EcdsaSig::from_der(signature).and_then(|der| raw(&der)),
    };
    match raw {
        Ok(raw) if provision_key.verifies(&Sha256::digest(message).into(), &raw) => Ok(raw),
        _ => Err(FloorError::BadProvisionSignature),
    }
}
