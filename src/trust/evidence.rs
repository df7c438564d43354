//! Many signatures and certificates of one manifest, of which one pair has to hold.
//!
//! A publisher signs a manifest again when a certificate is renewed or a CA replaced, and whoever can write
//! to a registry can put any number of bad signatures beside the good one. So all are looked at, and the work is
//! bounded all the same: each certificate's chain is checked once, and only signatures of a certificate that this
//! device trusts are computed.

use super::{Anchor, Certificate, Dates, Signed, TrustError, Verified, at_most, signature};
use super::{MAX_CERTIFICATE_BYTES, MAX_SIGNATURE_BYTES};

/// Most signatures, and most certificates, that are looked at.
pub const MAX_ALTERNATIVES: usize = 1024;
/// Most trusted certificates whose signatures are looked for. A stranger cannot make one.
const MAX_SIGNERS: usize = 16;

/// Which signature and which certificate were taken, as positions in what was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The position of the signature.
    pub signature: usize,
    /// The position of the certificate.
    pub certificate: usize,
}

/// Verifies a manifest with the signature and the certificate among those given that hold.
///
/// Where several certificates hold, the one that is valid longest is taken, so that a renewed one wins
/// over the one that it renews. The certificate in the result is written anew: certificates and
/// nothing else.
///
/// # Errors
/// The error of the first certificate where none is trusted, else of the first signature.
pub fn verify_any(
    manifest: &[u8],
    signatures: &[Vec<u8>],
    certificates: &[Vec<u8>],
    floor_signature: Option<Vec<u8>>,
    anchor: &Anchor,
    dates: Dates,
) -> Result<Option<(Verified, Taken)>, TrustError> {
    let mut first = None;
    let mut signers = Vec::new();
    for (at, pem) in certificates.iter().take(MAX_ALTERNATIVES).enumerate() {
        match trusted(pem, anchor, dates) {
            Ok(certificate) => signers.push((at, certificate)),
            Err(error) => first = first.or(Some(error)),
        }
    }
    // A stable sort: of two that end together, the first one given.
    signers.sort_by(|(_, one), (_, other)| other.compare_end(one));
    signers.truncate(MAX_SIGNERS);
    if !signers.is_empty() {
        // What a stranger's certificate says is of no interest where a trusted one is there.
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
            // The one verification loop has the last word.
            let verified = signed.verify(anchor, dates)?;
            return Ok(Some((verified, Taken { signature: which, certificate: *at })));
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
