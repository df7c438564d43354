//! What the signatures of a device's systems are checked against: its manifest CA and its product.

use std::fmt;
use std::path::{Path, PathBuf};

use openssl::x509::X509;
use uuid::Uuid;

use super::config::{self, CA_FILE, CaFile, ConfigError, ConfigPlan, PRODUCT_FILE};
use super::crl::Crls;
use super::x509::name_text;

/// The manifest CA and the product of a device.
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
/// use mosfs::{Anchor, ConfigError};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let example = Example::publish()?;
/// # let (config, product) = (&example.config, example.product);
/// // /etc/mosfs, with manifestCA.pem and product
/// let anchor = Anchor::load(config)?;
/// assert_eq!(anchor.product(), product);
///
/// let error = Anchor::load("/nowhere".as_ref()).unwrap_err();
/// assert!(matches!(error, ConfigError::Missing { .. }));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Anchor {
    ca: Vec<X509>,
    crls: Crls,
    product: Uuid,
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
    /// [`ConfigError::BadCrl`], [`ConfigError::Io`].
    pub fn with_crls(mut self, path: &Path) -> Result<Self, ConfigError> {
        self.crls = Crls::load(path, &self.ca)?;
        Ok(self)
    }

    /// Reads the anchor of a device.
    ///
    /// # Errors
    /// [`ConfigError::Missing`] if CONFIG lacks the CA or the product.
    pub fn load(config: &Path) -> Result<Self, ConfigError> {
        let ca = config::find_ca(config)?.ok_or_else(|| no_ca(config))?;
        let product = config::find_product(config)?.ok_or_else(|| no_product(config))?;
        Self::with_crls_of(config, ca, product)
    }

    /// Returns an anchor with the revocation lists of CONFIG, if there are any.
    fn with_crls_of(config: &Path, ca: CaFile, product: Uuid) -> Result<Self, ConfigError> {
        let crls = Crls::find(config, &ca.certificates)?;
        Ok(Self { crls, ..Self::new(ca, product) })
    }

    /// Plans the anchor of a first installation: the values of CONFIG, and the given values if CONFIG has
    /// none. Nothing is written before the plan is applied.
    ///
    /// # Errors
    /// [`ConfigError::OtherCa`] and [`ConfigError::OtherProduct`] if CONFIG has other values than those
    /// given; [`ConfigError::Missing`] if a value is in neither.
    pub fn plan(config: &Path, ca: Option<CaFile>, product: Option<Uuid>) -> Result<AnchorPlan, ConfigError> {
        let mut plan = ConfigPlan::new(config);
        let product = plan.product(product)?.ok_or_else(|| no_product(config))?;
        let ca = plan.ca(ca)?.ok_or_else(|| no_ca(config))?;
        Ok(AnchorPlan { anchor: Self::with_crls_of(config, ca, product)?, config: plan })
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

fn no_ca(config: &Path) -> ConfigError {
    ConfigError::Missing { path: config.join(CA_FILE), what: "manifest CA" }
}

fn no_product(config: &Path) -> ConfigError {
    ConfigError::Missing { path: config.join(PRODUCT_FILE), what: "product" }
}

/// The anchor of a first installation, before it is written.
pub struct AnchorPlan {
    config: ConfigPlan,
    anchor: Anchor,
}

impl AnchorPlan {
    /// Returns what the device will trust, to verify the system before anything is written.
    pub fn anchor(&self) -> &Anchor {
        &self.anchor
    }

    /// The files that [`Self::apply`] will write.
    pub fn writes(&self) -> Vec<PathBuf> {
        self.config.writes()
    }

    /// Writes the missing files of CONFIG ([`ConfigPlan::apply`]).
    pub fn apply(self) -> Result<(), ConfigError> {
        self.config.apply()
    }
}
