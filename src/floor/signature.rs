//! The floor's keys and signatures, in software: ECDSA over P-256 with SHA-256.
//!
//! ```text
//! floor signature     64 bytes: r ‖ s, 32 bytes each, big-endian, over H(bump(V) ‖ ref)
//! provision message   36 bytes: the session's nonce ‖ 00000000 (expiration); its SHA-256 is signed
//! provision signature 64 bytes, r ‖ s
//! authorization       r ‖ s over H(first write ‖ ref), as a PEM block after a provisioning key:
//!                     -----BEGIN MOSFS FIRST WRITE AUTHORIZATION----- base64 -----END ...-----
//! keys                PEM: SubjectPublicKeyInfo (public), PKCS#8 or SEC1 (private, mode 0600)
//! ```
//!
//! For the provision message, which a person may have signed with `openssl dgst -sha256 -sign`, a DER
//! signature (70 to 72 bytes) is accepted as well.

use std::path::{Path, PathBuf};

use openssl::bn::{BigNum, BigNumContext};
use openssl::ec::{EcGroup, EcKey, EcKeyRef};
use openssl::ecdsa::EcdsaSig;
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::pkey::{HasPublic, PKey, PKeyRef, Private, Public};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::digests::{MAX_VERSION, Policy};
use super::error::FloorError;
use crate::error::{Class, Classified, IoError};
use crate::sys::file::read_named;
use crate::trust::keys;
use crate::trust::pem::{SecretInPublic, public_only};

/// A floor signature, a provision signature or an authorization: `r ‖ s`.
pub type Signature = [u8; 64];

/// Maximum size of a key file, in bytes.
const MAX_KEY_BYTES: usize = 64 << 10;
/// The length of a provision message, in bytes: a SHA-256 session's nonce and an expiration.
pub const PROVISION_MESSAGE_BYTES: usize = 36;
/// The label of the PEM block that authorizes a provisioning key.
const AUTHORIZATION: &str = "MOSFS FIRST WRITE AUTHORIZATION";

/// A key file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The file holds no private key, or others can read it.
    #[error(transparent)]
    Private(#[from] keys::KeyError),
    /// The file holds another kind of key.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What was expected.
        expected: &'static str,
        /// What is wrong with the content.
        found: String,
    },
    /// A private key in a file that is public.
    #[error(transparent)]
    Secret(#[from] SecretInPublic),
    /// OpenSSL refused to sign.
    #[error("cannot sign: {0}")]
    Sign(#[from] ErrorStack),
    /// The file cannot be read.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for KeyError {
    fn class(&self) -> Class {
        match self {
            KeyError::Private(error) => error.class(),
            KeyError::Io(error) => error.class(),
            KeyError::Sign(_) => Class::Failure,
            KeyError::Unusable { .. } => Class::Input,
            KeyError::Secret(error) => error.class(),
        }
    }
}

/// The public half of a P-256 key: a point on the curve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKey {
    x: [u8; 32],
    y: [u8; 32],
}

const PUBLIC: &str = "a P-256 public key in PEM";
const PRIVATE: &str = "a P-256 private key in PEM";

impl PublicKey {
    /// Reads a public key from a given PEM file.
    ///
    /// # Errors
    /// [`KeyError::Secret`] if the file also holds a private key.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let pem = read_named(path, MAX_KEY_BYTES as u64)?;
        public_only(&pem, path)?;
        Self::from_pem(&pem, path)
    }

    /// Parses the public key of a PEM text; `path` is for the error.
    pub fn from_pem(pem: &[u8], path: &Path) -> Result<Self, KeyError> {
        let wrong = |found: String| KeyError::Unusable { path: path.to_path_buf(), expected: PUBLIC, found };
        let key = PKey::public_key_from_pem(pem).map_err(|_| wrong("no PEM public key".into()))?;
        Self::from_ec(key.ec_key().map_err(|_| wrong(format!("a key of type {:?}", key.id())))?.as_ref())
            .map_err(wrong)
    }

    fn from_ec<T: HasPublic>(key: &EcKeyRef<T>) -> Result<Self, String> {
        // Rule: both keys are P-256; another curve would have another Name, or none.
        if key.group().curve_name() != Some(Nid::X9_62_PRIME256V1) {
            return Err(format!(
                "a key of the curve {:?}",
                key.group().curve_name().map(|nid| nid.short_name())
            ));
        }
        // Refuses points that are not on the curve.
        key.check_key()
            .and_then(|()| Self::coordinates(key))
            .map_err(|error| format!("a point that is not on the curve ({error})"))
    }

    fn coordinates<T: HasPublic>(key: &EcKeyRef<T>) -> Result<Self, ErrorStack> {
        let (mut x, mut y) = (BigNum::new()?, BigNum::new()?);
        let mut context = BigNumContext::new()?;
        key.public_key().affine_coordinates(key.group(), &mut x, &mut y, &mut context)?;
        Ok(Self { x: fixed(&x)?, y: fixed(&y)? })
    }

    /// Returns the key in PEM, as `openssl pkey -pubout` writes it.
    pub fn to_pem(&self) -> Result<Vec<u8>, KeyError> {
        Ok(PKey::from_ec_key(self.ec()?)?.public_key_to_pem()?)
    }

    /// The x coordinate, big-endian.
    pub fn x(&self) -> &[u8; 32] {
        &self.x
    }

    /// The y coordinate, big-endian.
    pub fn y(&self) -> &[u8; 32] {
        &self.y
    }

    fn ec(&self) -> Result<EcKey<Public>, ErrorStack> {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
        EcKey::from_public_key_affine_coordinates(
            &group,
            BigNum::from_slice(&self.x)?.as_ref(),
            BigNum::from_slice(&self.y)?.as_ref(),
        )
    }

    /// Returns whether the key made this signature over this digest.
    pub fn verifies(&self, digest: &[u8; 32], signature: &[u8]) -> bool {
        let Ok(signature) = <&Signature>::try_from(signature) else { return false };
        let (r, s) = signature.split_at(32);
        let check = || -> Result<bool, ErrorStack> {
            let signature =
                EcdsaSig::from_private_components(BigNum::from_slice(r)?, BigNum::from_slice(s)?)?;
            signature.verify(digest, self.ec()?.as_ref())
        };
        check().unwrap_or(false)
    }

    /// Checks a floor signature, with `self` as the floor key.
    ///
    /// # Errors
    /// [`FloorError::BadFloorSignature`], including for a signature of another length.
    pub fn check(&self, product: &Uuid, version: u64, signature: &[u8]) -> Result<(), FloorError> {
        check_signature(&Policy::new(*self, *product), version, signature).map(|_| ())
    }
}

/// A P-256 private key; `Debug` does not print its secret.
pub struct PrivateKey {
    key: EcKey<Private>,
    public: PublicKey,
}

impl PrivateKey {
    /// Reads a private key from a PEM file that only its owner can read.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        // Rule (issue of the floor): private keys are refused when others can read them.
        Self::from_pkey(keys::PrivateKey::load(path)?.pkey(), path)
    }

    /// Parses the private key of a PEM text; `path` is for the error.
    pub fn from_pem(pem: &[u8], path: &Path) -> Result<Self, KeyError> {
        let key = PKey::private_key_from_pem_callback(pem, |_| Err(ErrorStack::get()))?;
        Self::from_pkey(&key, path)
    }

    fn from_pkey(key: &PKeyRef<Private>, path: &Path) -> Result<Self, KeyError> {
        let wrong = |found: String| KeyError::Unusable { path: path.to_path_buf(), expected: PRIVATE, found };
        let key = key.ec_key().map_err(|_| wrong(format!("a key of type {:?}", key.id())))?;
        let public = PublicKey::from_ec(key.as_ref()).map_err(wrong)?;
        Ok(Self { key, public })
    }

    /// Generates a key.
    pub fn generate() -> Result<Self, KeyError> {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
        let key = EcKey::generate(&group)?;
        let public = PublicKey::coordinates(key.as_ref())?;
        Ok(Self { key, public })
    }

    /// The public half.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    fn sign(&self, digest: &[u8; 32]) -> Result<Signature, KeyError> {
        Ok(sign(&self.key, digest)?)
    }
}

fn sign(key: &EcKeyRef<Private>, digest: &[u8; 32]) -> Result<Signature, ErrorStack> {
    raw(&EcdsaSig::sign(digest, key)?)
}

/// `r ‖ s` of a signature.
fn raw(signature: &EcdsaSig) -> Result<Signature, ErrorStack> {
    let mut raw = [0; 64];
    let (r, s) = raw.split_at_mut(32);
    r.copy_from_slice(&fixed(signature.r())?);
    s.copy_from_slice(&fixed(signature.s())?);
    Ok(raw)
}

/// Encodes a number in 32 bytes, big-endian.
fn fixed(number: &openssl::bn::BigNumRef) -> Result<[u8; 32], ErrorStack> {
    let bytes = number.to_vec_padded(32)?;
    // `to_vec_padded` returns 32 bytes or an error.
    Ok(bytes.try_into().unwrap_or_default())
}

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
pub fn sign_version(key: &PrivateKey, product: &Uuid, version: u64) -> Result<Signature, FloorError> {
    check_version(version)?;
    let policy = Policy::new(key.public, *product);
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
    key: &PrivateKey,
    product: &Uuid,
    provision_key: &PublicKey,
) -> Result<Signature, FloorError> {
    let policy = Policy::new(key.public, *product);
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
    provision_key: &PublicKey,
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
pub fn sign_provision(key: &PrivateKey, message: &[u8], path: &Path) -> Result<Signature, KeyError> {
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
    provision_key: &PublicKey,
    message: &[u8],
    signature: &[u8],
) -> Result<Signature, FloorError> {
    let raw = match Signature::try_from(signature) {
        Ok(raw) => Ok(raw),
        Err(_) => EcdsaSig::from_der(signature).and_then(|der| self::raw(&der)),
    };
    match raw {
        Ok(raw) if provision_key.verifies(&Sha256::digest(message).into(), &raw) => Ok(raw),
        _ => Err(FloorError::BadProvisionSignature),
    }
}
