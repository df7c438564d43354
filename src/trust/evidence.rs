//! Verifies a manifest that comes with many signatures and certificates, of which one pair must be valid.
//!
//! A publisher signs a manifest again when a certificate is renewed or a CA replaced, and anyone who can
//! write to a registry can add any number of bad signatures to the good one. So all are examined, but the
//! work is still bounded: each certificate's chain is checked once, and only signatures of a certificate that
//! this device trusts are computed.

use super::{Anchor, Certificate, Dates, Signed, TrustError, Verified, at_most, signature};
use super::{MAX_CERTIFICATE_BYTES, MAX_SIGNATURE_BYTES};
use crate::sorting;

/// Maximum number of signatures, and of certificates, that are examined.
pub const MAX_ALTERNATIVES: usize = 1024;
/// Maximum number of trusted certificates whose signatures are searched. An attacker cannot create one.
const MAX_SIGNERS: usize = 16;

/// Which signature and which certificate were used, as positions in the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChosenPair {
    /// The position of the signature.
    pub signature: usize,
    /// The position of the certificate.
    pub certificate: usize,
}

/// Verifies a manifest with a valid pair of signature and certificate from those given.
///
/// If several certificates are valid, the one that is valid longest is used, so a renewed certificate wins
/// over the one that it renews. The certificate in the result is written anew and holds only certificates.
///
/// # Errors
/// The error of the first certificate if none is trusted, else of the first signature.
pub fn verify_any(
    manifest: &[u8],
    signatures: &[Vec<u8>],
    certificates: &[Vec<u8>],
    floor_signature: Option<Vec<u8>>,
    anchor: &Anchor,
    dates: Dates,
) -> Result<Option<(Verified, ChosenPair)>, TrustError> {
    let mut first = None;
    let mut signers = Vec::new();
    for (at, pem) in certificates.iter().take(MAX_ALTERNATIVES).enumerate() {
        match trusted(pem, anchor, dates) {
            Ok(certificate) => signers.push((at, certificate)),
            Err(error) => first = first.or(Some(error)),
        }
    }
    // A stable sort: of two that expire together, the first one given comes first.
    sorting::sort_by(&mut signers, |(_, one), (_, other)| other.compare_end(one));
    signers.truncate(MAX_SIGNERS);
    if !signers.is_empty() {
        // Errors of untrusted certificates do not matter if there is a trusted one.
        first = None;
    }
    for (at, signer) in &signers {
        for (which, bytes) in signatures.iter().take(MAX_ALTERNATIVES).enumerate() {
            let checked = at_most("signature", bytes, MAX_SIGNATURE_BYTES)
                .and_then(|()| signature::check(signer, manifest, bytes));
            if let Err(error) = checked {
                first = first.or(Some(error));
                continue;
            }
            let signed = Signed {
                manifest: manifest.to_vec(),
                signature: bytes.clone(),
                certificate: signer.to_pem()?,
                floor_signature,
            };
            // The verification loop makes the final decision.
            let verified = signed.verify(anchor, dates)?;
            return Ok(Some((verified, ChosenPair { signature: which, certificate: *at })));
        }
    }
    match first {
        Some(error) => Err(error),
        None => Ok(None),
    }
}

fn trusted(pem: &[u8], anchor: &Anchor, dates: Dates) -> Result<Certificate, TrustError> {
    at_most("certificate", pem, MAX_CERTIFICATE_BYTES)?;
    let certificate = Certificate::from_pem(pem)?;
    certificate.check_chain(anchor, dates)?;
    let product = certificate.binding()?.product;
    if product != anchor.product() {
        return Err(TrustError::OtherProduct { certificate: product, device: anchor.product() });
    }
    Ok(certificate)
}
