//! What this boot runs: `/run/mosfs/boot.json`, written by `mosfs boot`, read by `mosfs commit`
//! and `mosfs status`. It lies in memory (tmpfs), so it never outlives the boot that it tells of.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::DeployError;
use super::state::DeploymentId;
use crate::error::IoError;
use crate::sys::atomic;

/// Where the file is, below the run folder.
const FILE: &str = "boot.json";
/// No such file of ours is longer, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// What this boot runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BootRecord {
    /// The deployment that was handed over to.
    pub deployment: DeploymentId,
    /// How its root is mounted: `dm-verity` or `fuse`.
    pub backend: String,
    /// How long each phase took, in order: name and milliseconds.
    pub phases_ms: Vec<(String, f64)>,
}

/// The folder of what lives as long as this boot: `$MOSFS_RUN` or `/run/mosfs`.
pub fn run_dir() -> PathBuf {
    std::env::var_os("MOSFS_RUN").map_or_else(|| PathBuf::from("/run/mosfs"), PathBuf::from)
}

/// Where the record is, in [`run_dir`].
pub fn path() -> PathBuf {
    run_dir().join(FILE)
}

impl BootRecord {
    /// Reads the record of this boot; `None` where mosfs did not boot this machine.
    pub fn load(path: &Path) -> Result<Option<Self>, DeployError> {
        let wrong = |why: String| DeployError::State { path: path.to_path_buf(), why };
        match atomic::read_bounded(path, MAX_BYTES) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| wrong(error.to_string())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(IoError { operation: "read", path: path.to_path_buf(), source }.into()),
        }
    }

    /// Writes the record of this boot.
    pub fn save(&self, path: &Path) -> Result<(), DeployError> {
        let fail = |operation, source| IoError { operation, path: path.to_path_buf(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|source| fail("create", source))?;
        }
        let bytes = serde_json::to_vec(self).map_err(|error| fail("write", error.into()))?;
        Ok(atomic::replace(path, &bytes, 0o644, "boot.record").map_err(|source| fail("write", source))?)
    }
}
