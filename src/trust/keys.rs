//! Loads private keys from PEM files that only their owner can access.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use openssl::bn::BigNum;
use openssl::ecdsa::EcdsaSig;
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, PKeyRef, Private};
use openssl::sign::Signer;
use sha2::{Digest as _, Sha256};

use super::algorithm::Algorithm;
use super::ecdsa::{self, EcdsaError};
use super::pem::SecretInPublic;
use crate::error::{Class, Classified, IoContext, IoError};
use crate::sys::file::read_at_most;

/// Maximum size of a key file, in bytes.
const MAX_KEY_BYTES: usize = 64 << 10;

/// Why a key cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// A private key that others can read or write.
    #[error("the private key {} has mode {mode:04o}: others than its owner may use it", path.display())]
    OpenToOthers {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Not a private key in PEM.
    #[error("{} is not a private key in PEM: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What OpenSSL says.
        reason: String,
    },
    /// A kind of key whose signatures no device accepts.
    #[error("the key {} is {found}; expected RSA of 2048 bits or more, or ECDSA on P-256", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: String,
    },
    /// Another kind of key, or of message, than was expected.
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
    /// A file that cannot be read.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A key cannot make an ECDSA signature.
    #[error(transparent)]
    Ecdsa(#[from] EcdsaError),
    /// OpenSSL failed.
    #[error("OpenSSL cannot {operation}: {source}")]
    Openssl {
        /// The operation.
        operation: &'static str,
        /// What it says.
        source: ErrorStack,
    },
}

impl Classified for KeyError {
    fn class(&self) -> Class {
        match self {
            KeyError::Io(error) => error.class(),
            KeyError::Openssl { .. } | KeyError::Ecdsa(_) => Class::Failure,
            _ => Class::Input,
        }
    }
}

/// A private key whose signatures devices accept.
pub struct SigningKey {
    key: PKey<Private>,
    algorithm: Algorithm,
}

impl SigningKey {
    /// Loads a PEM file that only its owner can access.
    ///
    /// # Errors
    /// [`KeyError::OpenToOthers`], [`KeyError::Unreadable`], [`KeyError::Unsupported`].
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let file = File::open(path).on("open", path)?;
        // Of the open file, not of the path, which could lead elsewhere by now.
        let mode = file.metadata().on("stat", path)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::OpenToOthers { path: path.to_path_buf(), mode });
        }
        let pem = read_at_most(file, path, MAX_KEY_BYTES as u64)?;
        let unreadable = |reason: String| KeyError::Unreadable { path: path.to_path_buf(), reason };
        // Without a callback OpenSSL would prompt for the passphrase on the terminal.
        let mut encrypted = false;
        let key = PKey::private_key_from_pem_callback(&pem, |_| {
            encrypted = true;
            Err(ErrorStack::get())
        });
        let key = key.map_err(|error| {
            unreadable(if encrypted {
                "it is encrypted, which is not supported".into()
            } else {
                super::x509::reason(&error)
            })
        })?;
        let algorithm =
            Algorithm::of(&key).map_err(|found| KeyError::Unsupported { path: path.to_path_buf(), found })?;
        Ok(Self { key, algorithm })
    }

    /// Returns the algorithm of its signatures.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Returns OpenSSL's form of the key, for signatures other than those of manifests.
    pub(crate) fn pkey(&self) -> &PKeyRef<Private> {
        &self.key
    }

    /// Signs bytes as `openssl dgst -sha256 -sign` does, but the same bytes have the same signature.
    ///
    /// # Errors
    /// [`KeyError::Openssl`], [`KeyError::Ecdsa`].
    pub fn sign(&self, bytes: &[u8]) -> Result<Vec<u8>, KeyError> {
        if self.algorithm == Algorithm::EcdsaP256 {
            let key = self.key.ec_key().map_err(openssl("sign"))?;
            let signature = ecdsa::sign(&key, &Sha256::digest(bytes).into())?;
            return der(&signature).map_err(openssl("sign"));
        }
        let mut signer = Signer::new(MessageDigest::sha256(), &self.key).map_err(openssl("sign"))?;
        signer.sign_oneshot_to_vec(bytes).map_err(openssl("sign"))
    }
}

/// Encodes `r ‖ s` as OpenSSL does.
fn der(signature: &[u8; 64]) -> Result<Vec<u8>, ErrorStack> {
    let (r, s) = signature.split_at(32);
    EcdsaSig::from_private_components(BigNum::from_slice(r)?, BigNum::from_slice(s)?)?.to_der()
}

/// Returns what turns an error of OpenSSL in this operation into a [`KeyError`].
pub(super) fn openssl(operation: &'static str) -> impl Fn(ErrorStack) -> KeyError {
    move |source| KeyError::Openssl { operation, source }
}
