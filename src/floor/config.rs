//! The device's floor configuration: `floor.pub` and `product` in CONFIG.
//!
//! ```text
//! CONFIG/floor.pub   PEM, the floor key's public half
//! CONFIG/product     the product ([`crate::trust::anchor`] reads and writes it)
//! ```
//!
//! Rule (docs/design.md, first given, then kept): a given value is written if CONFIG has none, and refused if
//! it has another. A file is written whole or not at all, and never replaced (`sys::atomic`).

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::digests::{Name, Policy};
use super::error::FloorError;
use super::key::PublicKey;
use crate::failpoint;
use crate::sys::atomic::{self, NewFile};
use crate::sys::file::{self, Links};
use crate::trust::anchor::{PRODUCT_FILE, agree_on_product, find_product, product_file};

/// Name of the floor key's file in CONFIG.
pub const FLOOR_KEY_FILE: &str = "floor.pub";
/// Maximum size of that file, in bytes.
const MAX_BYTES: u64 = 64 << 10;

/// The device's floor configuration.
#[derive(Debug, Clone)]
pub struct Config {
    folder: PathBuf,
    /// The floor key's public half.
    pub floor_pub: Option<PublicKey>,
    /// The product.
    pub product: Option<Uuid>,
}

impl Config {
    /// Reads CONFIG; missing files are not an error.
    pub fn load(folder: &Path) -> Result<Self, FloorError> {
        let path = folder.join(FLOOR_KEY_FILE);
        let floor_pub = file::find_regular(&path, Links::Followed, MAX_BYTES)?
            .map(|pem| PublicKey::from_pem(&pem, &path))
            .transpose()?;
        let product = find_product(folder)?;
        Ok(Self { folder: folder.to_path_buf(), floor_pub, product })
    }

    /// Returns the floor that follows from it.
    pub fn policy(&self) -> Result<Policy, FloorError> {
        let missing = |file: &str, what| FloorError::NotConfigured { path: self.folder.join(file), what };
        let key = self.floor_pub.ok_or_else(|| missing(FLOOR_KEY_FILE, "floor key"))?;
        let product = self.product.ok_or_else(|| missing(PRODUCT_FILE, "product"))?;
        Ok(Policy::new(key, product))
    }

    /// Accepts the values of the command line; refuses values that differ from the recorded ones.
    pub fn with(mut self, floor_pub: Option<PublicKey>, product: Option<Uuid>) -> Result<Self, FloorError> {
        match (self.floor_pub, floor_pub) {
            (Some(found), Some(given)) if found != given => {
                return Err(FloorError::ConfigConflict {
                    path: self.folder.join(FLOOR_KEY_FILE),
                    given: Name::of_key(&given),
                    found: Name::of_key(&found),
                });
            }
            (None, given) => self.floor_pub = given,
            _ => {}
        }
        self.product = agree_on_product(&self.folder, self.product, product)?;
        Ok(self)
    }

    /// Writes the values that are not recorded yet.
    pub fn record(&self) -> Result<(), FloorError> {
        let recorded = Self::load(&self.folder)?.with(self.floor_pub, self.product)?;
        let is_missing = |file: &NewFile| !recorded.folder.join(file.name).exists();
        let mut files = Vec::new();
        if let Some(key) = &self.floor_pub {
            files.push(NewFile { name: FLOOR_KEY_FILE, bytes: key.to_pem()?, mode: 0o644 });
        }
        files.extend(self.product.map(product_file));
        files.retain(is_missing);
        if !files.is_empty() {
            atomic::create(&self.folder, &files, |_| failpoint::hit("config.floor.linked"))?;
        }
        Ok(())
    }
}
