//! Detached signatures over a manifest's bytes, as `openssl dgst -sha256 -sign` makes them:
//! SHA-256 with RSA PKCS#1 v1.5 (RFC 8017, section 8.2; the bare integer, as long as the
//! modulus) or ECDSA on P-256 (FIPS 186-5; DER of r and s, RFC 3279, section 2.2.3).

use openssl::ecdsa::EcdsaSig;
use openssl::hash::MessageDigest;
use openssl::sign::Verifier;

use super::algorithm::Algorithm;
use super::{Certificate, TrustError};
use crate::digest::Digest;

/// Checks the signature of a certificate's key over bytes, and returns the digest of the bytes.
///
/// # Errors
/// [`TrustError::UnsupportedKey`], [`TrustError::TruncatedSignature`],
/// [`TrustError::MalformedSignature`], [`TrustError::BadSignature`].
pub(super) fn check(certificate: &Certificate, bytes: &[u8], signature: &[u8]) -> Result<Digest, TrustError> {
    let key = certificate.key()?;
    let algorithm = Algorithm::of(&key).map_err(|found| TrustError::UnsupportedKey { found })?;
    let expected = match algorithm {
        Algorithm::Rsa => key.size(),
        // SEQUENCE, then a length below 128: P-256 needs 72 bytes at most.
        Algorithm::EcdsaP256 => match signature {
            [0x30, length @ 0..0x80, ..] => 2 + usize::from(*length),
            _ => key.size(),
        },
    };
    if signature.len() < expected {
        return Err(TrustError::TruncatedSignature { expected, found: signature.len() });
    }
    let malformed = TrustError::MalformedSignature { algorithm: algorithm.name() };
    if signature.len() > expected
        || (algorithm == Algorithm::EcdsaP256 && EcdsaSig::from_der(signature).is_err())
    {
        return Err(malformed);
    }
    let openssl = |operation| move |source| TrustError::Openssl { operation, source };
    let mut verifier =
        Verifier::new(MessageDigest::sha256(), &key).map_err(openssl("prepare a verification"))?;
    // OpenSSL returns an error here if, for example, the integers are out of range.
    match verifier.verify_oneshot(signature, bytes) {
        Ok(true) => Ok(Digest::of(bytes)),
        Ok(false) | Err(_) => Err(TrustError::BadSignature { manifest: Digest::of(bytes) }),
    }
}
