//! The development floor: a number in a file of the state folder. It protects nothing.
//!
//! ```text
//! SYSTEM/floor       the version in decimal digits, and a newline; absent: 0
//! SYSTEM/floor.lock  flock, exclusive, while the floor is raised
//! ```
//!
//! The file changes by atomic replace: temporary file, fsync, rename, fsync of the folder.

use std::path::{Path, PathBuf};

use super::Floor;
use super::digests::{MAX_VERSION, Policy};
use super::error::FloorError;
use super::signature::{check_signature, check_version};
use crate::error::{IoContext, IoError};
use crate::sys::atomic;
use crate::sys::file::{self, Links};
use crate::sys::flock::Lock;

/// The warning printed each time the development floor is used.
const FILE_WARNING: &str = "the floor is kept in a file (--floor file): \
     it protects nothing against whoever can write the disk";

/// Maximum size of a floor file, in bytes.
const MAX_BYTES: u64 = 64;

/// The development floor.
#[derive(Debug)]
pub struct FileFloor {
    path: PathBuf,
    policy: Option<Policy>,
}

impl FileFloor {
    /// Returns the floor in this file; with a policy, raising it requires the floor key's signature.
    pub fn new(path: PathBuf, policy: Option<Policy>) -> Self {
        Self { path, policy }
    }

    /// Creates the file with 0.
    ///
    /// # Errors
    /// [`FloorError::AlreadyProvisioned`] if it exists.
    pub fn provision(&self) -> Result<(), FloorError> {
        let _lock = self.lock()?;
        if self.path.exists() {
            return Err(FloorError::AlreadyProvisioned { place: self.path.display().to_string() });
        }
        self.write(0)
    }

    fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("."))
    }

    fn lock(&self) -> Result<Lock, IoError> {
        let path = self.path.with_extension("lock");
        file::create_folders(self.folder())?;
        // The holder keeps it for only one small write.
        Lock::exclusive(&path).on("lock", &path)
    }

    fn write(&self, version: u64) -> Result<(), FloorError> {
        let text = format!("{version}\n");
        Ok(atomic::replace(&self.path, text.as_bytes(), 0o644, "floor.file").on("replace", &self.path)?)
    }
}

impl Floor for FileFloor {
    fn read(&mut self) -> Result<u64, FloorError> {
        let Some(bytes) = file::find_regular(&self.path, Links::Refused, MAX_BYTES)? else { return Ok(0) };
        let text = String::from_utf8_lossy(&bytes);
        let digits =
            text.strip_suffix('\n').filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
        digits.and_then(|digits| digits.parse().ok()).filter(|version| *version <= MAX_VERSION).ok_or_else(
            || FloorError::FileTampered { path: self.path.clone(), found: text.escape_default().to_string() },
        )
    }

    fn raise(&mut self, version: u64, signature: &[u8]) -> Result<(), FloorError> {
        match &self.policy {
            Some(policy) => {
                check_signature(policy, version, signature)?;
            }
            None => check_version(version)?,
        }
        let _lock = self.lock()?;
        if self.read()? < version {
            self.write(version)?;
        }
        Ok(())
    }

    fn needs_signature(&self) -> bool {
        self.policy.is_some()
    }

    fn warning(&self) -> Option<&'static str> {
        Some(FILE_WARNING)
    }

    fn place(&self) -> String {
        self.path.display().to_string()
    }
}
