//! What a device trusts, in CONFIG. This module alone reads and writes these files.
//!
//! ```text
//! CONFIG/manifestCA.pem     one certificate or several, any of which may end a chain
//! CONFIG/crl.pem            the certificates that these CAs have revoked (crl.rs); optional, never written here
//! CONFIG/product            the UUID, one line
//! CONFIG/floor.pub          the public half of the floor key, PEM
//! ```
//!
//! Rule (docs/design.md, first given, then kept): a given value is written if CONFIG has none, and refused if
//! it has another. A file is written whole or not at all, and never replaced (`sys::atomic`).

use std::fmt;
use std::path::{Path, PathBuf};

use openssl::error::ErrorStack;
use openssl::x509::X509;
use uuid::Uuid;

use super::MAX_CERTIFICATE_BYTES;
use super::keys::KeyError;
use super::p256::P256PublicKey;
use super::pem::{SecretInPublic, private_key, public_only};
use super::x509::{name_text, read_pem, reason};
use crate::digest::Digest;
use crate::error::{Class, Classified, IoError};
use crate::manifest::rules;
use crate::sys::atomic::{self, NewFile};
use crate::sys::failpoint;
use crate::sys::file::{self, Links};

/// Name of the CA's file in CONFIG.
pub const CA_FILE: &str = "manifestCA.pem";
/// Name of the product's file in CONFIG.
pub const PRODUCT_FILE: &str = "product";
/// Name of the floor key's file in CONFIG.
pub const FLOOR_KEY_FILE: &str = "floor.pub";

/// Maximum size of the floor key's file, in bytes.
const MAX_KEY_BYTES: u64 = 64 << 10;
/// Maximum size of the product's file, in bytes.
const MAX_PRODUCT_BYTES: u64 = 4 << 10;

/// Why CONFIG cannot be used, or not be given a value.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// CONFIG lacks a file: nothing can be trusted.
    #[error("{} is missing: this device trusts no {what}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// Not a CA certificate.
    #[error("{} is not a CA certificate: {reason}", path.display())]
    BadCa {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Not revocation lists, or not signed by the CA that they name.
    #[error("{} holds no usable certificate revocation list: {reason}", path.display())]
    BadCrl {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A private key in a file that is public.
    #[error(transparent)]
    Secret(#[from] SecretInPublic),
    /// Not a UUID.
    #[error("{} is not a product: found `{found}`, expected a UUID", path.display())]
    BadProduct {
        /// The file.
        path: PathBuf,
        /// The first characters of its content.
        found: String,
    },
    /// The device already has another CA.
    #[error("this device trusts the CA {has} ({}), not the given {given}", path.display())]
    OtherCa {
        /// The file with the present one.
        path: PathBuf,
        /// Subject and digest of the present one.
        has: String,
        /// Subject and digest of the given one.
        given: String,
    },
    /// The device already belongs to another product.
    #[error("this device is product {has} ({}), not the given {given}", path.display())]
    OtherProduct {
        /// The file with the present one.
        path: PathBuf,
        /// The present one.
        has: Uuid,
        /// The given one.
        given: Uuid,
    },
    /// The device already has another floor key.
    #[error("{}: this device has another floor key: found {has}, given {given}", path.display())]
    OtherFloorKey {
        /// The file with the present one.
        path: PathBuf,
        /// SHA-256 of the present one in DER.
        has: Digest,
        /// SHA-256 of the given one in DER.
        given: Digest,
    },
    /// Not a floor key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A file that cannot be read or written.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for ConfigError {
    fn class(&self) -> Class {
        match self {
            // docs/design.md, three checks: if any of the three fails, the system is refused.
            ConfigError::Missing { .. }
            // docs/design.md, first given, then kept: others are refused.
            | ConfigError::OtherCa { .. }
            | ConfigError::OtherProduct { .. }
            | ConfigError::OtherFloorKey { .. } => Class::Verification,
            ConfigError::BadCa { .. } | ConfigError::BadCrl { .. } | ConfigError::BadProduct { .. } => {
                Class::Input
            }
            ConfigError::Secret(error) => error.class(),
            ConfigError::Key(error) => error.class(),
            ConfigError::Io(error) => error.class(),
        }
    }
}

/// Returns the manifest CA in CONFIG, if there is one.
pub fn find_ca(config: &Path) -> Result<Option<CaFile>, ConfigError> {
    CaFile::find(&config.join(CA_FILE))
}

/// Returns the product in CONFIG, if there is one.
pub fn find_product(config: &Path) -> Result<Option<Uuid>, ConfigError> {
    let path = config.join(PRODUCT_FILE);
    let Some(bytes) = file::find_regular(&path, Links::Followed, MAX_PRODUCT_BYTES)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes);
    match rules::uuid(text.trim_end()) {
        Ok(product) => Ok(Some(product)),
        Err(_) => Err(ConfigError::BadProduct { path, found: rules::printable(&text, 40) }),
    }
}

/// Returns the floor key in CONFIG, if there is one.
pub fn find_floor_key(config: &Path) -> Result<Option<P256PublicKey>, ConfigError> {
    let path = config.join(FLOOR_KEY_FILE);
    let pem = file::find_regular(&path, Links::Followed, MAX_KEY_BYTES)?;
    Ok(pem.map(|pem| P256PublicKey::from_pem(&pem, &path)).transpose()?)
}

/// Values that CONFIG will have, before they are written.
///
/// Each method takes the value that was given for a file, if one was, and returns the value that the device
/// will have: the present one, else the given one. Nothing is written before [`Self::apply`].
pub struct ConfigPlan {
    folder: PathBuf,
    files: Vec<NewFile>,
}

impl ConfigPlan {
    /// Returns a plan that changes nothing.
    pub fn new(config: &Path) -> Self {
        Self { folder: config.to_path_buf(), files: Vec::new() }
    }

    /// Plans the manifest CA.
    ///
    /// # Errors
    /// [`ConfigError::OtherCa`] if CONFIG has another one.
    pub fn ca(&mut self, given: Option<CaFile>) -> Result<Option<CaFile>, ConfigError> {
        let path = self.folder.join(CA_FILE);
        match (find_ca(&self.folder)?, given) {
            (Some(has), Some(given)) if has.digests() != given.digests() => {
                Err(ConfigError::OtherCa { path, has: has.to_string(), given: given.to_string() })
            }
            (None, Some(given)) => {
                let pem = given.to_pem();
                let pem = pem.map_err(|error| ConfigError::BadCa { path, reason: reason(&error) })?;
                self.write(CA_FILE, pem);
                Ok(Some(given))
            }
            (has, _) => Ok(has),
        }
    }

    /// Plans the product.
    ///
    /// # Errors
    /// [`ConfigError::OtherProduct`] if CONFIG has another one.
    pub fn product(&mut self, given: Option<Uuid>) -> Result<Option<Uuid>, ConfigError> {
        match (find_product(&self.folder)?, given) {
            (Some(has), Some(given)) if has != given => {
                Err(ConfigError::OtherProduct { path: self.folder.join(PRODUCT_FILE), has, given })
            }
            (None, Some(given)) => {
                self.write(PRODUCT_FILE, format!("{given}\n").into_bytes());
                Ok(Some(given))
            }
            (has, _) => Ok(has),
        }
    }

    /// Plans the floor key.
    ///
    /// # Errors
    /// [`ConfigError::OtherFloorKey`] if CONFIG has another one.
    pub fn floor_key(&mut self, given: Option<P256PublicKey>) -> Result<Option<P256PublicKey>, ConfigError> {
        match (find_floor_key(&self.folder)?, given) {
            (Some(has), Some(given)) if has != given => Err(ConfigError::OtherFloorKey {
                path: self.folder.join(FLOOR_KEY_FILE),
                has: has.digest()?,
                given: given.digest()?,
            }),
            (None, Some(given)) => {
                self.write(FLOOR_KEY_FILE, given.to_pem()?);
                Ok(Some(given))
            }
            (has, _) => Ok(has),
        }
    }

    fn write(&mut self, name: &'static str, bytes: Vec<u8>) {
        self.files.push(NewFile { name, bytes, mode: 0o644 });
    }

    /// The files that [`Self::apply`] will write.
    pub fn writes(&self) -> Vec<PathBuf> {
        self.files.iter().map(|file| self.folder.join(file.name)).collect()
    }

    /// Writes the missing files of CONFIG. A crash leaves each file whole or absent, and applying the same
    /// plan again completes them.
    ///
    /// # Errors
    /// [`ConfigError::Io`], including if a file has appeared since the plan was made.
    pub fn apply(self) -> Result<(), ConfigError> {
        if self.files.is_empty() {
            return Ok(());
        }
        atomic::create(&self.folder, &self.files, |name| match name {
            PRODUCT_FILE => failpoint::hit("config.product.linked"),
            FLOOR_KEY_FILE => failpoint::hit("config.floor.linked"),
            _ => failpoint::hit("config.ca.linked"),
        })?;
        Ok(())
    }
}

/// One or more CA certificates.
#[derive(Clone)]
pub struct CaFile {
    pub(super) certificates: Vec<X509>,
    /// The same certificates in DER.
    der: Vec<Vec<u8>>,
}

impl CaFile {
    /// Reads a given PEM file, which must hold certificates and no private key.
    ///
    /// # Errors
    /// [`ConfigError::BadCa`], [`ConfigError::Secret`], [`ConfigError::Io`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let bytes = file::read_named(path, MAX_CERTIFICATE_BYTES as u64)?;
        public_only(&bytes, path)?;
        Self::parse(&bytes, path)
    }

    /// Reads the CA of CONFIG; returns `None` if there is no such file.
    fn find(path: &Path) -> Result<Option<Self>, ConfigError> {
        let bytes = file::find_regular(path, Links::Followed, MAX_CERTIFICATE_BYTES as u64)?;
        // A device that already runs with such a file keeps running: refusing would undo nothing.
        if let Some(label) = bytes.as_deref().and_then(private_key) {
            log::warn!("{} holds a private key ({label}): anyone who has read it can sign", path.display());
        }
        bytes.map(|bytes| Self::parse(&bytes, path)).transpose()
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Self, ConfigError> {
        let bad = |reason| ConfigError::BadCa { path: path.to_path_buf(), reason };
        if bytes.len() > MAX_CERTIFICATE_BYTES {
            return Err(bad(format!("it has more than {MAX_CERTIFICATE_BYTES} bytes")));
        }
        let certificates = read_pem(bytes).map_err(bad)?;
        let der = certificates.iter().map(|ca| ca.to_der()).collect::<Result<_, _>>();
        Ok(Self { certificates, der: der.map_err(|error| bad(reason(&error)))? })
    }

    /// Returns the certificates in PEM, and nothing else of the file.
    pub(crate) fn to_pem(&self) -> Result<Vec<u8>, ErrorStack> {
        self.certificates.iter().try_fold(Vec::new(), |mut all, ca| {
            all.extend(ca.to_pem()?);
            Ok(all)
        })
    }

    /// Returns when the last of the certificates becomes valid, in seconds since 1970.
    pub(crate) fn valid_from(&self) -> Result<i64, ErrorStack> {
        super::x509::valid_from(self.certificates.iter())
    }

    /// Identifies a file by the digests of its certificates, in any order.
    fn digests(&self) -> Vec<Digest> {
        let mut all: Vec<_> = self.der.iter().map(|der| Digest::of(der)).collect();
        all.sort();
        all
    }
}

impl fmt::Display for CaFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one =
            |(ca, der): (&X509, &Vec<u8>)| format!("`{}` {}", name_text(ca.subject_name()), Digest::of(der));
        f.write_str(&self.certificates.iter().zip(&self.der).map(one).collect::<Vec<_>>().join(", "))
    }
}
