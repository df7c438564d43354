//! The kinds of key that sign manifests.

use openssl::nid::Nid;
use openssl::pkey::{HasPublic, Id, PKeyRef};

/// Minimum bits of an RSA key (docs/design.md, signatures).
const MIN_RSA_BITS: u32 = 2048;

/// The kinds of key whose signatures are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// RSA PKCS#1 v1.5 of 2048 bits or more, with SHA-256.
    Rsa,
    /// ECDSA on the curve P-256, with SHA-256.
    EcdsaP256,
}

impl Algorithm {
    /// Returns the algorithm of a key.
    ///
    /// # Errors
    /// A description of the key, if its kind is not accepted.
    pub fn of<T: HasPublic>(key: &PKeyRef<T>) -> Result<Self, String> {
        match key.id() {
            Id::RSA if key.bits() >= MIN_RSA_BITS => Ok(Algorithm::Rsa),
            Id::RSA => Err(format!("RSA of {} bits", key.bits())),
            Id::EC => {
                let curve = key.ec_key().ok().and_then(|key| key.group().curve_name());
                match curve {
                    Some(Nid::X9_62_PRIME256V1) => Ok(Algorithm::EcdsaP256),
                    Some(curve) => Err(format!("ECDSA on {}", curve.short_name().unwrap_or("another curve"))),
                    None => Err("ECDSA on a curve without a name".into()),
                }
            }
            Id::RSA_PSS => Err("RSA-PSS".into()),
            Id::ED25519 => Err("Ed25519".into()),
            Id::ED448 => Err("Ed448".into()),
            Id::DSA => Err("DSA".into()),
            other => Err(format!("of another kind ({})", other.as_raw())),
        }
    }

    /// Its name, for messages.
    pub const fn name(self) -> &'static str {
        match self {
            Algorithm::Rsa => "RSA PKCS#1 v1.5",
            Algorithm::EcdsaP256 => "ECDSA P-256",
        }
    }
}
