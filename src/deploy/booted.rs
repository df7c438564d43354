//! The record of this boot: `/run/mosfs/boot.json`, written by `mosfs boot`, read by `mosfs commit` and
//! `mosfs status`. It is in memory (tmpfs), so it never outlives the boot that it describes.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::id::DeploymentId;
use crate::error::{Class, Classified, IoContext, IoError};
use crate::sys::atomic;
use crate::sys::file::{self, Links};
pub use crate::sys::run_dir;

/// Path of the file below the run folder.
const FILE: &str = "boot.json";
/// Maximum size of the file, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// The record of this boot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BootRecord {
    /// The deployment that was booted.
    pub deployment: DeploymentId,
    /// How its root is mounted: `dm-verity` or `fuse`.
    pub backend: String,
    /// How long each phase took, in order: name and milliseconds.
    pub phases_ms: Vec<(String, f64)>,
}

/// Why the record of this boot cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BootRecordError {
    /// It is not a record that this program can read.
    #[error("{} is not a record of a boot: {why}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        why: String,
    },
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for BootRecordError {
    fn class(&self) -> Class {
        match self {
            Self::Malformed { .. } => Class::Failure,
            Self::Io(error) => error.class(),
        }
    }
}

/// Returns the path of the record, in [`run_dir`].
pub fn path() -> PathBuf {
    run_dir().join(FILE)
}

/// Returns the deployment that this boot runs; `None` if mosfs did not boot this machine.
///
/// # Errors
/// As [`BootRecord::load`].
pub fn deployment() -> Result<Option<DeploymentId>, BootRecordError> {
    Ok(BootRecord::load(&path())?.map(|record| record.deployment))
}

impl BootRecord {
    /// Reads the record of this boot; `None` if mosfs did not boot this machine.
    ///
    /// # Errors
    /// [`BootRecordError::Malformed`], [`BootRecordError::Io`].
    pub fn load(path: &Path) -> Result<Option<Self>, BootRecordError> {
        let wrong = |why: String| BootRecordError::Malformed { path: path.to_path_buf(), why };
        let Some(bytes) = file::find_regular(path, Links::Refused, MAX_BYTES)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| wrong(error.to_string()))
    }

    /// Writes the record of this boot.
    ///
    /// # Errors
    /// The folder cannot be created, or the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), IoError> {
        if let Some(folder) = path.parent() {
            file::create_folders(folder)?;
        }
        let bytes = serde_json::to_vec(self).map_err(io::Error::from).on("write", path)?;
        atomic::replace(path, &bytes, 0o644, "boot.record").on("write", path)
    }
}
