//! What a device trusts: the manifest CA and its product, in CONFIG.
//!
//! ```text
//! CONFIG/manifestCA.pem     one certificate or several, any of which may end a chain
//! CONFIG/crl.pem            the certificates that they have revoked (crl.rs); optional
//! CONFIG/product            the UUID, one line
//! ```
//!
//! Only the first installation writes CA and product.

use std::fmt;
use std::path::{Path, PathBuf};

use openssl::error::ErrorStack;
use openssl::x509::X509;
use uuid::Uuid;

use super::MAX_CERTIFICATE_BYTES;
use super::certificate::{name_text, read_pem, reason};
use super::crl::Crls;
use super::pem::{SecretInPublic, private_key, public_only};
use crate::digest::Digest;
use crate::error::{Class, Classified, IoError};
use crate::failpoint;
use crate::manifest::rules;
use crate::sys::atomic::{self, NewFile};
use crate::sys::file::{self, Links};

/// Name of the CA's file in CONFIG.
pub const CA_FILE: &str = "manifestCA.pem";
/// Name of the product's file in CONFIG.
pub const PRODUCT_FILE: &str = "product";

/// The manifest CA and the product of a device.
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
/// use mosfs::{Anchor, AnchorError};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let example = Example::publish()?;
/// # let (config, product) = (&example.config, example.product);
/// // /etc/mosfs, with manifestCA.pem and product
/// let anchor = Anchor::load(config)?;
/// assert_eq!(anchor.product(), product);
///
/// let error = Anchor::load("/nowhere".as_ref()).unwrap_err();
/// assert!(matches!(error, AnchorError::Missing { .. }));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Anchor {
    ca: Vec<X509>,
    crls: Crls,
    product: Uuid,
}

/// Why there is no trust anchor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnchorError {
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
    /// A file that cannot be read or written.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for AnchorError {
    fn class(&self) -> Class {
        match self {
            // docs/design.md, three checks: if any of the three fails, the system is refused.
            AnchorError::Missing { .. } | AnchorError::OtherCa { .. } | AnchorError::OtherProduct { .. } => {
                Class::Verification
            }
            AnchorError::BadCa { .. } | AnchorError::BadCrl { .. } | AnchorError::BadProduct { .. } => {
                Class::Input
            }
            AnchorError::Secret(error) => error.class(),
            AnchorError::Io(error) => error.class(),
        }
    }
}

impl fmt::Debug for Anchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Anchor").field("ca", &self.ca_name()).field("product", &self.product).finish()
    }
}

impl Anchor {
    /// Returns an anchor from a CA file and a product, without revocation lists.
    pub fn new(ca: CaFile, product: Uuid) -> Self {
        Self { ca: ca.certificates, crls: Crls::default(), product }
    }

    /// Returns the same anchor with the revocation lists of a file.
    ///
    /// # Errors
    /// [`AnchorError::BadCrl`], [`AnchorError::Io`].
    pub fn with_crls(mut self, path: &Path) -> Result<Self, AnchorError> {
        self.crls = Crls::load(path, &self.ca)?;
        Ok(self)
    }

    /// Returns the same anchor with the revocation lists of CONFIG, if there are any.
    fn with_crls_of(mut self, config: &Path) -> Result<Self, AnchorError> {
        self.crls = Crls::find(config, &self.ca)?;
        Ok(self)
    }

    /// Reads the anchor of a device.
    ///
    /// # Errors
    /// [`AnchorError::Missing`] if CONFIG lacks the CA or the product.
    pub fn load(config: &Path) -> Result<Self, AnchorError> {
        let missing = |file: &str, what| AnchorError::Missing { path: config.join(file), what };
        let ca = CaFile::find(&config.join(CA_FILE))?.ok_or_else(|| missing(CA_FILE, "manifest CA"))?;
        let product = find_product(config)?.ok_or_else(|| missing(PRODUCT_FILE, "product"))?;
        Self::new(ca, product).with_crls_of(config)
    }

    /// Plans the anchor of a first installation: the values of CONFIG, and the given values if CONFIG has
    /// none. Nothing is written before the plan is applied.
    ///
    /// # Errors
    /// [`AnchorError::OtherCa`] and [`AnchorError::OtherProduct`] if CONFIG has other values than those
    /// given; [`AnchorError::Missing`] if a value is in neither.
    pub fn plan(config: &Path, ca: Option<CaFile>, product: Option<Uuid>) -> Result<AnchorPlan, AnchorError> {
        let mut files = Vec::new();
        let recorded = find_product(config)?;
        let missing = || AnchorError::Missing { path: config.join(PRODUCT_FILE), what: "product" };
        let product = agree_on_product(config, recorded, product)?.ok_or_else(missing)?;
        if recorded.is_none() {
            files.push(product_file(product));
        }
        let path = config.join(CA_FILE);
        let ca = match (CaFile::find(&path)?, ca) {
            (Some(has), Some(given)) if has.digests() != given.digests() => {
                return Err(AnchorError::OtherCa { path, has: has.to_string(), given: given.to_string() });
            }
            (Some(has), _) => has,
            (None, Some(given)) => {
                let bytes =
                    given.to_pem().map_err(|error| AnchorError::BadCa { path, reason: reason(&error) })?;
                files.push(NewFile { name: CA_FILE, bytes, mode: 0o644 });
                given
            }
            (None, None) => return Err(AnchorError::Missing { path, what: "manifest CA" }),
        };
        let anchor = Self::new(ca, product).with_crls_of(config)?;
        Ok(AnchorPlan { config: config.to_path_buf(), anchor, files })
    }

    /// The product of the device.
    pub fn product(&self) -> Uuid {
        self.product
    }

    pub(super) fn ca(&self) -> &[X509] {
        &self.ca
    }

    pub(super) fn crls(&self) -> &Crls {
        &self.crls
    }

    /// The subject of the CA, for messages.
    pub fn ca_name(&self) -> String {
        self.ca.iter().map(|ca| name_text(ca.subject_name())).collect::<Vec<_>>().join("` or `")
    }
}

/// The anchor of a first installation, before it is written.
pub struct AnchorPlan {
    config: PathBuf,
    anchor: Anchor,
    files: Vec<NewFile>,
}

impl AnchorPlan {
    /// Returns what the device will trust, to verify the system before anything is written.
    pub fn anchor(&self) -> &Anchor {
        &self.anchor
    }

    /// The files that [`Self::apply`] will write.
    pub fn writes(&self) -> Vec<PathBuf> {
        self.files.iter().map(|file| self.config.join(file.name)).collect()
    }

    /// Writes the missing files of CONFIG. A crash leaves each file whole or absent, and applying the same
    /// plan again completes them.
    ///
    /// # Errors
    /// [`AnchorError::Io`], including if a file has appeared since the plan was made.
    pub fn apply(self) -> Result<(), AnchorError> {
        if self.files.is_empty() {
            return Ok(());
        }
        atomic::create(&self.config, &self.files, |name| match name {
            PRODUCT_FILE => failpoint::hit("config.product.linked"),
            _ => failpoint::hit("config.ca.linked"),
        })?;
        Ok(())
    }
}

/// One or more CA certificates.
#[derive(Clone)]
pub struct CaFile {
    certificates: Vec<X509>,
    /// The same certificates in DER.
    der: Vec<Vec<u8>>,
}

impl CaFile {
    /// Reads a given PEM file, which must hold certificates and no private key.
    ///
    /// # Errors
    /// [`AnchorError::BadCa`], [`AnchorError::Secret`], [`AnchorError::Io`].
    pub fn load(path: &Path) -> Result<Self, AnchorError> {
        let bytes = file::read_named(path, MAX_CERTIFICATE_BYTES as u64)?;
        public_only(&bytes, path)?;
        Self::parse(&bytes, path)
    }

    /// Does the same; returns `None` if there is no such file.
    fn find(path: &Path) -> Result<Option<Self>, AnchorError> {
        let bytes = file::find_regular(path, Links::Followed, MAX_CERTIFICATE_BYTES as u64)?;
        // A device that already runs with such a file keeps running: refusing would undo nothing.
        if let Some(label) = bytes.as_deref().and_then(private_key) {
            log::warn!("{} holds a private key ({label}): whoever has read it can sign", path.display());
        }
        bytes.map(|bytes| Self::parse(&bytes, path)).transpose()
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Self, AnchorError> {
        let bad = |reason| AnchorError::BadCa { path: path.to_path_buf(), reason };
        if bytes.len() > MAX_CERTIFICATE_BYTES {
            return Err(bad(format!("it has more than {MAX_CERTIFICATE_BYTES} bytes")));
        }
        let certificates = read_pem(bytes).map_err(bad)?;
        let der = certificates.iter().map(|ca| ca.to_der()).collect::<Result<_, _>>();
        Ok(Self { certificates, der: der.map_err(|error| bad(reason(&error)))? })
    }

    /// Returns only the certificates, without comments or keys from the file.
    /// Returns the certificates in PEM, and nothing else of the file.
    pub fn to_pem(&self) -> Result<Vec<u8>, ErrorStack> {
        self.certificates.iter().try_fold(Vec::new(), |mut all, ca| {
            all.extend(ca.to_pem()?);
            Ok(all)
        })
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

/// Returns the product that CONFIG has, else the given one.
///
/// Rule (docs/design.md, first given, then kept): a device keeps the product that it has.
///
/// # Errors
/// [`AnchorError::OtherProduct`].
pub(crate) fn agree_on_product(
    config: &Path,
    has: Option<Uuid>,
    given: Option<Uuid>,
) -> Result<Option<Uuid>, AnchorError> {
    match (has, given) {
        (Some(has), Some(given)) if has != given => {
            Err(AnchorError::OtherProduct { path: config.join(PRODUCT_FILE), has, given })
        }
        _ => Ok(has.or(given)),
    }
}

/// Returns the product's file in CONFIG, to be written.
pub(crate) fn product_file(product: Uuid) -> NewFile {
    NewFile { name: PRODUCT_FILE, bytes: format!("{product}\n").into_bytes(), mode: 0o644 }
}

/// Returns the product in CONFIG, if there is one.
pub(crate) fn find_product(config: &Path) -> Result<Option<Uuid>, AnchorError> {
    let path = config.join(PRODUCT_FILE);
    let Some(bytes) = file::find_regular(&path, Links::Followed, 4096)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes);
    match rules::uuid(text.trim_end()) {
        Ok(product) => Ok(Some(product)),
        Err(_) => Err(AnchorError::BadProduct { path, found: rules::printable(&text, 40) }),
    }
}
