//! Trust: from bytes that anyone could have written to a manifest that may run.
//!
//! ```text
//! CONFIG/manifestCA.pem --> certificate chain --> key --> signature over the stored bytes
//! CONFIG/product ---------> CN `manifest NAME:UUID` ----> product of the manifest
//! ```
//!
//! [`Signed::verify`] is the only verification loop; install, update, boot, mount and the command line all
//! use it. It returns a [`Verified`], which nothing else can construct and which is all that its callers
//! accept. The order of checks is fixed, and nothing is trusted before the check above it has passed:
//!
//! 1. the certificate chains to the manifest CA of the device ([`certificate`]), and no link of the chain is
//!    revoked ([`crl`]); [`Dates`] controls the check of dates
//! 2. its CN names the product of the device
//! 3. the signature was made by its key over the stored bytes ([`signature`])
//! 4. the bytes are the canonical form of a system manifest
//! 5. that manifest is for the product of the certificate
//!
//! OpenSSL is initialised on first use here, never before: commands that verify no signature do not pay for
//! it. The system's trust store is never read.

mod algorithm;
pub mod anchor;
pub mod certificate;
pub mod config;
pub mod crl;
mod der;
mod ecdsa;
pub mod evidence;
pub mod keys;
pub mod p256;
pub mod pem;
pub mod signature;
mod x509;

use std::time::SystemTime;

use openssl::asn1::Asn1Time;
use openssl::error::ErrorStack;
use uuid::Uuid;

pub use anchor::Anchor;
pub use certificate::{Binding, Certificate};
pub use config::ConfigError;
pub use keys::{KeyError, SigningKey};

use crate::digest::Digest;
use crate::error::{Class, Classified};
use crate::manifest::{SystemError, SystemManifest, json};

/// Artifact type of a system manifest's signature (docs/format.md, The store).
pub const SIGNATURE_TYPE: &str = "application/vnd.mos.system.signature.v1";
/// Artifact type of a system manifest's certificate.
pub const CERTIFICATE_TYPE: &str = "application/vnd.mos.system.certificate.v1";
/// Artifact type of a system manifest's floor signature.
pub const FLOOR_SIGNATURE_TYPE: &str = "application/vnd.mos.system.floor-signature.v1";

/// Maximum size of a certificate file, in bytes.
pub const MAX_CERTIFICATE_BYTES: usize = 64 << 10;
/// Maximum size of a signature, in bytes; an RSA signature of 16384 bits has 2048.
pub const MAX_SIGNATURE_BYTES: usize = 4 << 10;

/// Returns a time in seconds since 1970 as a date for people, in UTC.
pub fn date(seconds: i64) -> String {
    Asn1Time::from_unix(seconds).map_or_else(|_| format!("{seconds} s since 1970"), |time| time.to_string())
}

/// How to treat validity dates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dates {
    /// Refuse a certificate that is not valid at this time: build, install, update.
    Check(SystemTime),
    /// Only log it. No clock is trusted in early boot.
    LogOnly,
}

impl Dates {
    /// Enforces dates by the clock of this machine.
    pub fn check_now() -> Self {
        Self::Check(SystemTime::now())
    }
}

/// A system manifest with its signature, not yet verified.
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
/// use std::fs;
///
/// use mosfs::{Anchor, CaFile, Dates, Signed, SigningKey, SystemManifest, TrustError};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let Example { keys, store, product, .. } = &Example::publish()?;
/// # let manifest = mosfs::find_system(
/// #     store.transport(),
/// #     None,
/// #     &mosfs::Judge {
/// #         anchor: &Anchor::new(CaFile::load(&keys.join("ca.pem"))?, *product),
/// #         dates: Dates::check_now(),
/// #         policy: None,
/// #     },
/// # )?;
/// # let manifest: &SystemManifest = manifest.taken.verified.manifest();
/// // The publisher signs a manifest ...
/// let key = SigningKey::load(&keys.join("signer.key"))?;
/// let certificate = fs::read(keys.join("signer.pem"))?;
/// let signed = Signed::create(manifest, &key, &certificate, Dates::check_now())?;
///
/// // ... and a device verifies it.
/// let anchor = Anchor::new(CaFile::load(&keys.join("ca.pem"))?, manifest.product);
/// let verified = signed.clone().verify(&anchor, Dates::check_now())?;
/// assert_eq!(verified.manifest(), manifest);
///
/// let mut forged = signed;
/// forged.manifest = SystemManifest { version: 8, ..manifest.clone() }.canonical();
/// let error = forged.verify(&anchor, Dates::check_now()).unwrap_err();
/// assert!(matches!(error, TrustError::BadSignature { .. }));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// The stored bytes of the manifest.
    pub manifest: Vec<u8>,
    /// The detached signature over them.
    pub signature: Vec<u8>,
    /// The signer's certificate in PEM; certificates that lead from it to the CA may follow.
    pub certificate: Vec<u8>,
    /// The floor signature of the manifest's version, which is checked elsewhere
    /// ([`Verified::floor_signature`]).
    pub floor_signature: Option<Vec<u8>>,
}

/// A system manifest verified by its signature, its certificate and the device's anchor. Only
/// [`Signed::verify`] constructs it.
#[derive(Debug, Clone)]
pub struct Verified {
    signed: Signed,
    manifest: SystemManifest,
    digest: Digest,
    signer: Binding,
}

/// Why a manifest is not trusted. Each variant names the attack it indicates, with both values.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// A part of a signed manifest that exceeds its size limit.
    #[error("the {what} has more than the {max} bytes that it may have")]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// The limit, in bytes.
        max: usize,
    },
    /// Not PEM certificates: cut short, or something else.
    #[error("the certificate cannot be read: {reason}")]
    UnreadableCertificate {
        /// What is wrong with it.
        reason: String,
    },
    /// A self-signed certificate.
    #[error(
        "the certificate `{certificate}` is self-signed; expected one that the manifest CA `{ca}` issued"
    )]
    SelfSigned {
        /// Its subject.
        certificate: String,
        /// The subject of the CA.
        ca: String,
    },
    /// A certificate of another CA, which may carry the name of the right one.
    #[error("the certificate `{certificate}` was issued by another `{issuer}` than the manifest CA `{ca}`")]
    UntrustedCertificate {
        /// Subject of the certificate.
        certificate: String,
        /// Its issuer.
        issuer: String,
        /// The subject of the device's CA.
        ca: String,
    },
    /// The chain ends before it reaches the CA.
    #[error(
        "the certificate `{certificate}` was issued by `{issuer}`, which is neither the manifest CA `{ca}` nor among the certificates that came with it"
    )]
    IncompleteChain {
        /// Subject of the last certificate of the chain.
        certificate: String,
        /// Its issuer.
        issuer: String,
        /// The subject of the device's CA.
        ca: String,
    },
    /// A certificate that issued another one without being a CA.
    #[error("the certificate `{certificate}` has issued another, but is not a CA")]
    NotACa {
        /// Subject of the issuer.
        certificate: String,
    },
    /// A key or a digest in the chain that is too weak.
    #[error("the certificate `{certificate}` is too weak: {reason}")]
    WeakCertificate {
        /// Its subject.
        certificate: String,
        /// What is weak.
        reason: String,
    },
    /// Anything else that X.509 forbids.
    #[error("the certificate `{certificate}` is not valid: {reason}")]
    BadChain {
        /// Its subject.
        certificate: String,
        /// What OpenSSL says.
        reason: String,
    },
    /// A certificate that has expired.
    #[error("the certificate `{certificate}` expired at {not_after}")]
    Expired {
        /// Its subject.
        certificate: String,
        /// The end of its validity.
        not_after: String,
    },
    /// A certificate that is not yet valid.
    #[error("the certificate `{certificate}` is not valid before {not_before}")]
    NotYetValid {
        /// Its subject.
        certificate: String,
        /// The start of its validity.
        not_before: String,
    },
    /// A certificate for other uses, such as TLS.
    #[error("the certificate `{certificate}` is not for signing: its {extension} lacks {lacks}")]
    WrongUsage {
        /// Its subject.
        certificate: String,
        /// The extension that restricts its use.
        extension: &'static str,
        /// What the extension lacks.
        lacks: &'static str,
    },
    /// A certificate that its issuer has revoked.
    #[error("the certificate `{certificate}` was revoked by `{issuer}` at {since}")]
    Revoked {
        /// Its subject.
        certificate: String,
        /// Who issued and revoked it.
        issuer: String,
        /// When, according to the list.
        since: String,
    },
    /// A file of certificates with a private key in it: it must not be published.
    #[error("the certificate file holds a private key (`{label}`) beside the certificates")]
    PrivateKey {
        /// The label of the PEM block.
        label: String,
    },
    /// A certificate that names no product.
    #[error(
        "the subject `{certificate}` of the certificate names no product: expected one CN `manifest NAME:UUID`"
    )]
    NoProduct {
        /// Its subject.
        certificate: String,
    },
    /// A certificate of another product, under the same CA.
    #[error("the certificate is for product {certificate}, this device is product {device}")]
    OtherProduct {
        /// The product in the certificate's CN.
        certificate: Uuid,
        /// The product of the device.
        device: Uuid,
    },
    /// A kind of key whose signatures are not accepted.
    #[error("the certificate's key is {found}; expected RSA of 2048 bits or more, or ECDSA on P-256")]
    UnsupportedKey {
        /// What it is.
        found: String,
    },
    /// A truncated signature.
    #[error("the signature is cut short: it has {found} bytes of {expected}")]
    TruncatedSignature {
        /// How many bytes it should have.
        expected: usize,
        /// How many it has.
        found: usize,
    },
    /// Bytes that are not a signature of this kind of key.
    #[error("the signature is not one of {algorithm}")]
    MalformedSignature {
        /// The kind of the certificate's key.
        algorithm: &'static str,
    },
    /// A signature of another file or of another key.
    #[error("the signature does not match the manifest {manifest} and the certificate's key")]
    BadSignature {
        /// Digest of the bytes that it should cover.
        manifest: Digest,
    },
    /// Signed bytes that are not a system manifest.
    #[error(transparent)]
    Manifest(#[from] SystemError),
    /// A manifest of another product, signed by this product's signer.
    #[error("the manifest is for product {manifest}, its certificate for product {certificate}")]
    ManifestOtherProduct {
        /// The product in the manifest.
        manifest: Uuid,
        /// The product in the certificate's CN.
        certificate: Uuid,
    },
    /// OpenSSL failed for a reason unrelated to the input.
    #[error("OpenSSL cannot {operation}: {source}")]
    Openssl {
        /// The operation.
        operation: &'static str,
        /// What it says.
        source: ErrorStack,
    },
}

impl Classified for TrustError {
    fn class(&self) -> Class {
        match self {
            TrustError::Openssl { .. } => Class::Failure,
            TrustError::PrivateKey { .. } => Class::Input,
            _ => Class::Verification,
        }
    }
}

impl Signed {
    /// Verifies a manifest.
    ///
    /// # Errors
    /// The first check that fails, in the order of the module's documentation.
    pub fn verify(self, anchor: &Anchor, dates: Dates) -> Result<Verified, TrustError> {
        at_most("manifest", &self.manifest, json::MAX_BYTES)?;
        at_most("certificate", &self.certificate, MAX_CERTIFICATE_BYTES)?;
        at_most("signature", &self.signature, MAX_SIGNATURE_BYTES)?;

        // Rule (docs/design.md, three checks): the signer's certificate must chain to the device's manifest CA.
        let certificate = Certificate::from_pem(&self.certificate)?;
        certificate.check_chain(anchor, dates)?;
        // "its subject's CN must be `manifest PRODUCT:UUID` with UUID equal to" ... "the device's product"
        let signer = certificate.binding()?;
        if signer.product != anchor.product() {
            return Err(TrustError::OtherProduct { certificate: signer.product, device: anchor.product() });
        }
        // "A reader checks the signature over the stored bytes first, then parses"
        let digest = signature::check(&certificate, &self.manifest, &self.signature)?;
        let manifest = SystemManifest::parse(&self.manifest)?;
        // "UUID equal to the manifest's `product`"
        if manifest.product != signer.product {
            return Err(TrustError::ManifestOtherProduct {
                manifest: manifest.product,
                certificate: signer.product,
            });
        }
        Ok(Verified { signed: self, manifest, digest, signer })
    }

    /// Signs a manifest: the publisher's side.
    ///
    /// Refuses what no device would accept: a key that is not the certificate's, or a certificate that is of
    /// another product, out of date, or not for signing. Only devices know whether it chains to their CA.
    /// Only the certificates of the certificate file are kept, written anew; a private key in it is an error.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn create(
        manifest: &SystemManifest,
        key: &SigningKey,
        certificate: &[u8],
        dates: Dates,
    ) -> Result<Self, SignError> {
        let signer = signer_for(manifest, certificate, dates)?;
        if !signer.has_key(key) {
            return Err(SignError::KeyMismatch { certificate: signer.subject() });
        }
        let bytes = manifest.canonical();
        let signature = key.sign(&bytes)?;
        Ok(Self { manifest: bytes, signature, certificate: signer.to_pem()?, floor_signature: None })
    }

    /// Combines a manifest with a signature made elsewhere: the publisher's side, if the key is in a token or
    /// on another machine. Refuses the same as [`Signed::create`].
    ///
    /// # Errors
    /// [`SignError`], with the reason if the signature was not made by the certificate's key over the
    /// manifest's canonical bytes.
    pub fn attach(
        manifest: &SystemManifest,
        signature: &[u8],
        certificate: &[u8],
        dates: Dates,
    ) -> Result<Self, SignError> {
        let signer = signer_for(manifest, certificate, dates)?;
        at_most("signature", signature, MAX_SIGNATURE_BYTES)?;
        let bytes = manifest.canonical();
        signature::check(&signer, &bytes, signature)?;
        let (signature, certificate) = (signature.to_vec(), signer.to_pem()?);
        Ok(Self { manifest: bytes, signature, certificate, floor_signature: None })
    }
}

/// Returns a certificate that may sign for the product of a manifest, as far as the publisher can know.
///
/// # Errors
/// [`SignError::Certificate`].
pub fn signer_for(
    manifest: &SystemManifest,
    certificate: &[u8],
    dates: Dates,
) -> Result<Certificate, SignError> {
    at_most("certificate", certificate, MAX_CERTIFICATE_BYTES)?;
    if let Some(label) = pem::private_key(certificate) {
        return Err(TrustError::PrivateKey { label }.into());
    }
    let signer = Certificate::from_pem(certificate)?;
    signer.check_usage()?;
    signer.check_dates(dates)?;
    let binding = signer.binding()?;
    if binding.product != manifest.product {
        return Err(SignError::Certificate(TrustError::ManifestOtherProduct {
            manifest: manifest.product,
            certificate: binding.product,
        }));
    }
    Ok(signer)
}

fn at_most(what: &'static str, bytes: &[u8], max: usize) -> Result<(), TrustError> {
    if bytes.len() > max {
        return Err(TrustError::TooLarge { what, max });
    }
    Ok(())
}

impl Verified {
    /// The manifest.
    pub fn manifest(&self) -> &SystemManifest {
        &self.manifest
    }

    /// Digest of the manifest's bytes, which identifies the system.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The signer: the product in the certificate's CN.
    pub fn signer(&self) -> &Binding {
        &self.signer
    }

    /// The bytes that were signed.
    pub fn bytes(&self) -> &[u8] {
        &self.signed.manifest
    }

    /// The signature over them.
    pub fn signature(&self) -> &[u8] {
        &self.signed.signature
    }

    /// The verified certificate, with those supplied with it.
    pub fn certificate(&self) -> &[u8] {
        &self.signed.certificate
    }

    /// The floor signature that came with the manifest. It is not checked yet: that requires the floor's
    /// public key.
    pub fn floor_signature(&self) -> Option<&[u8]> {
        self.signed.floor_signature.as_deref()
    }
}

/// Why a manifest cannot be signed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignError {
    /// The certificate is unusable: devices would refuse it.
    #[error(transparent)]
    Certificate(#[from] TrustError),
    /// The key is unusable.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Key and certificate do not match.
    #[error("the private key is not the one of the certificate `{certificate}`")]
    KeyMismatch {
        /// Subject of the certificate.
        certificate: String,
    },
}

impl Classified for SignError {
    /// This is not an attack: the publisher gave the wrong files. Only dates, products and a signature made
    /// elsewhere are verified, as on a device.
    fn class(&self) -> Class {
        match self {
            SignError::Certificate(
                error @ (TrustError::Expired { .. }
                | TrustError::NotYetValid { .. }
                | TrustError::ManifestOtherProduct { .. }
                | TrustError::BadSignature { .. }
                | TrustError::MalformedSignature { .. }
                | TrustError::TruncatedSignature { .. }
                | TrustError::Openssl { .. }),
            ) => error.class(),
            SignError::Certificate(_) | SignError::KeyMismatch { .. } => Class::Input,
            SignError::Key(error) => error.class(),
        }
    }
}
