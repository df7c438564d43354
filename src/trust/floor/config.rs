//! What a device was told of its floor: `floor.pub` and `product` in CONFIG.
//!
//! ```text
//! CONFIG/floor.pub   PEM, the floor key's public half
//! CONFIG/product     the product's UUID in text, and a newline
//! ```
//!
//! Rule (DESIGN.md, section 3): what is given is written where CONFIG has none, and refused where it has
//! another. A file is written whole or not at all: temporary file, fsync, link without replacing, fsync of the folder.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::digests::Policy;
use super::error::FloorError;
use super::signature::PublicKey;
use crate::error::{IoContext, IoError};
use crate::failpoint;

/// No file of CONFIG that is read here is larger, in bytes.
const MAX_BYTES: u64 = 64 * 1024;

/// What a device was told of its floor.
#[derive(Debug, Clone)]
pub struct Config {
    folder: PathBuf,
    /// The floor key's public half.
    pub floor_pub: Option<PublicKey>,
    /// The product.
    pub product: Option<Uuid>,
}

impl Config {
    /// Reads CONFIG; files that are not there are no error.
    pub fn load(folder: &Path) -> Result<Self, FloorError> {
        let key_path = folder.join("floor.pub");
        let floor_pub = match read(&key_path)? {
            Some(pem) => Some(PublicKey::from_pem(&pem, &key_path)?),
            None => None,
        };
        let product_path = folder.join("product");
        let product = match read(&product_path)? {
            Some(text) => Some(parse_product(&text, &product_path)?),
            None => None,
        };
        Ok(Self { folder: folder.to_path_buf(), floor_pub, product })
    }

    /// The floor that follows from it.
    pub fn policy(&self) -> Result<Policy, FloorError> {
        let missing = |file: &str, what| FloorError::NotConfigured { path: self.folder.join(file), what };
        let key = self.floor_pub.ok_or_else(|| missing("floor.pub", "floor key"))?;
        let product = self.product.ok_or_else(|| missing("product", "product"))?;
        Ok(Policy::new(key, product))
    }

    /// Takes what the command line gives; refuses what differs from what is recorded.
    pub fn with(mut self, floor_pub: Option<PublicKey>, product: Option<Uuid>) -> Result<Self, FloorError> {
        let conflict = |file: &str, what, given: String, found: String| FloorError::ConfigConflict {
            path: self.folder.join(file),
            what,
            given,
            found,
        };
        match (self.floor_pub, floor_pub) {
            (Some(found), Some(given)) if found != given => {
                let name = |key| super::digests::Name::of_key(&key).to_string();
                return Err(conflict("floor.pub", "floor key", name(given), name(found)));
            }
            (None, given) => self.floor_pub = given,
            _ => {}
        }
        match (self.product, product) {
            (Some(found), Some(given)) if found != given => {
                return Err(conflict("product", "product", given.to_string(), found.to_string()));
            }
            (None, given) => self.product = given,
            _ => {}
        }
        Ok(self)
    }

    /// Writes what is not recorded yet.
    pub fn record(&self) -> Result<(), FloorError> {
        fs::create_dir_all(&self.folder).on("create", &self.folder)?;
        if let Some(key) = &self.floor_pub {
            write_new(&self.folder, "floor.pub", &key.to_pem()?)?;
        }
        failpoint::hit("floor.config");
        if let Some(product) = &self.product {
            write_new(&self.folder, "product", format!("{product}\n").as_bytes())?;
        }
        // Whoever came first wins; if that was another process with other values, say so.
        let recorded = Self::load(&self.folder)?;
        recorded.with(self.floor_pub, self.product).map(|_| ())
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, IoError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(IoError { operation: "open", path: path.to_path_buf(), source }),
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).on("read", path)?;
    Ok(Some(bytes))
}

fn parse_product(text: &[u8], path: &Path) -> Result<Uuid, FloorError> {
    let text = String::from_utf8_lossy(text);
    Uuid::parse_str(text.trim()).map_err(|_| {
        IoError {
            operation: "understand the product (expected a UUID) in",
            path: path.to_path_buf(),
            source: io::Error::new(
                io::ErrorKind::InvalidData,
                format!("`{}`", text.trim().chars().take(80).collect::<String>()),
            ),
        }
        .into()
    })
}

/// Writes a file that must not exist yet; one that does is left alone.
fn write_new(folder: &Path, name: &str, content: &[u8]) -> Result<(), IoError> {
    let path = folder.join(name);
    if path.exists() {
        return Ok(());
    }
    let temporary = folder.join(format!(".{name}.{}.tmp", std::process::id()));
    let write = || -> Result<(), IoError> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o644)
            .open(&temporary)
            .on("create", &temporary)?;
        file.write_all(content).on("write", &temporary)?;
        file.sync_all().on("sync", &temporary)?;
        // link(2), unlike rename(2), does not replace what another process wrote meanwhile.
        match fs::hard_link(&temporary, &path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(IoError { operation: "create", path: path.clone(), source }),
        }
        Ok(())
    };
    let written = write();
    let _ = fs::remove_file(&temporary);
    written?;
    File::open(folder).and_then(|folder| folder.sync_all()).on("sync", folder)
}
