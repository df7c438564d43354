//! P-256 keys and their signatures: the floor key, and the keys that provision floors.
//!
//! PEM: SubjectPublicKeyInfo (public), PKCS#8 or SEC1 (private, mode 0600).

use std::path::Path;

use openssl::bn::{BigNum, BigNumContext};
use openssl::ec::{EcGroup, EcKey, EcKeyRef};
use openssl::ecdsa::EcdsaSig;
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::pkey::{HasPublic, PKey, PKeyRef, Private, Public};

use super::ecdsa;
use super::keys::{KeyError, SigningKey, openssl};
use super::pem::public_only;
use super::x509::reason;
use crate::digest::Digest;
use crate::sys::file::read_named;

/// A floor signature, a provision signature or an authorization: `r ‖ s`.
pub type Signature = [u8; 64];

/// Maximum size of a key file, in bytes.
const MAX_KEY_BYTES: usize = 64 << 10;

/// The public half of a P-256 key: a point on the curve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct P256PublicKey {
    x: [u8; 32],
    y: [u8; 32],
}

const PUBLIC: &str = "a P-256 public key in PEM";
const PRIVATE: &str = "a P-256 private key in PEM";

impl P256PublicKey {
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
        self.pkey().and_then(|key| key.public_key_to_pem()).map_err(openssl("encode a public key"))
    }

    /// Returns the SHA-256 of the key in DER, by which messages identify it: that of
    /// `openssl pkey -pubin -outform DER`.
    pub fn digest(&self) -> Result<Digest, KeyError> {
        let der = self.pkey().and_then(|key| key.public_key_to_der());
        Ok(Digest::of(&der.map_err(openssl("encode a public key"))?))
    }

    fn pkey(&self) -> Result<PKey<Public>, ErrorStack> {
        PKey::from_ec_key(self.ec()?)
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
}

/// A P-256 private key; `Debug` does not print its secret.
pub struct P256PrivateKey {
    key: EcKey<Private>,
    public: P256PublicKey,
}

impl P256PrivateKey {
    /// Reads a private key from a PEM file that only its owner can read.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        // Rule (docs/design.md, private keys): others than the owner must not be able to read it.
        Self::from_pkey(SigningKey::load(path)?.pkey(), path)
    }

    /// Parses the private key of a PEM text; `path` is for the error.
    pub fn from_pem(pem: &[u8], path: &Path) -> Result<Self, KeyError> {
        let key = PKey::private_key_from_pem_callback(pem, |_| Err(ErrorStack::get()));
        let unreadable = |error| KeyError::Unreadable { path: path.to_path_buf(), reason: reason(&error) };
        let key = key.map_err(unreadable)?;
        Self::from_pkey(&key, path)
    }

    fn from_pkey(key: &PKeyRef<Private>, path: &Path) -> Result<Self, KeyError> {
        let wrong = |found: String| KeyError::Unusable { path: path.to_path_buf(), expected: PRIVATE, found };
        let key = key.ec_key().map_err(|_| wrong(format!("a key of type {:?}", key.id())))?;
        let public = P256PublicKey::from_ec(key.as_ref()).map_err(wrong)?;
        Ok(Self { key, public })
    }

    /// Generates a key.
    pub fn generate() -> Result<Self, KeyError> {
        let generate = || {
            let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
            let key = EcKey::generate(&group)?;
            let public = P256PublicKey::coordinates(key.as_ref())?;
            Ok(Self { key, public })
        };
        generate().map_err(openssl("generate a key"))
    }

    /// The public half.
    pub fn public(&self) -> &P256PublicKey {
        &self.public
    }

    /// Signs a SHA-256 digest. The same digest has the same signature.
    pub fn sign(&self, digest: &[u8; 32]) -> Result<Signature, KeyError> {
        Ok(ecdsa::sign(&self.key, digest)?)
    }
}

/// Returns the `r ‖ s` of a signature.
pub fn raw(signature: &EcdsaSig) -> Result<Signature, ErrorStack> {
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
