//! ECDSA signatures on P-256 that are the same for the same key and digest (RFC 6979), so that the same input builds the
//! same system. OpenSSL 3.0 draws a new random number for each signature.

use openssl::ec::EcKeyRef;
use openssl::error::ErrorStack;
use openssl::pkey::Private;
use p256::ecdsa::signature::hazmat::PrehashSigner;
use p256::ecdsa::{self, SigningKey};

/// Why there is no signature.
#[derive(Debug, thiserror::Error)]
pub enum EcdsaError {
    /// OpenSSL does not release the key.
    #[error("OpenSSL cannot release the private key: {0}")]
    Key(#[from] ErrorStack),
    /// The key is no number that P-256 has keys for.
    #[error("the private key cannot sign: {0}")]
    Sign(#[from] ecdsa::Error),
}

/// Signs a SHA-256 digest with a key of P-256; returns `r ‖ s`.
pub(super) fn sign(key: &EcKeyRef<Private>, digest: &[u8; 32]) -> Result<[u8; 64], EcdsaError> {
    let secret = key.private_key().to_vec_padded(32)?;
    let signature: ecdsa::Signature = SigningKey::from_slice(&secret)?.sign_prehash(digest)?;
    Ok(signature.to_bytes().into())
}

#[cfg(test)]
mod tests {
    use openssl::bn::BigNum;
    use openssl::ec::{EcGroup, EcKey, EcPoint};
    use openssl::nid::Nid;
    use sha2::{Digest, Sha256};

    use super::*;

    /// RFC 6979, A.2.5: the key, and the signature of "sample" with SHA-256.
    #[test]
    fn the_signature_is_that_of_rfc_6979() {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        let number = |hex: &str| BigNum::from_hex_str(hex).unwrap();
        let mut public = EcPoint::new(&group).unwrap();
        public
            .set_affine_coordinates_gfp(
                &group,
                &number("60FED4BA255A9D31C961EB74C6356D68C049B8923B61FA6CE669622E60F29FB6"),
                &number("7903FE1008B8BC99A41AE9E95628BC64F2F1B20C2D7E9F5177A3C294D4462299"),
                &mut openssl::bn::BigNumContext::new().unwrap(),
            )
            .unwrap();
        let secret = number("C9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721");
        let key = EcKey::from_private_components(&group, &secret, &public).unwrap();
        let signature = sign(&key, &Sha256::digest(b"sample").into()).unwrap();
        let expected = number(
            "EFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716\
             F7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8",
        );
        assert_eq!(signature[..], expected.to_vec());
    }
}
