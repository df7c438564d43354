//! Deployments: signed systems on a device, and which of them runs.
//!
//! ```text
//! SYSTEM/
//!   store/          the blobs (crate::store)
//!   deployments/    one folder a signed system (deployment.rs)
//!   state.json      which is current, pending, previous (state.rs): the one source of truth
//!   floor.json      the development floor of `--floor file`
//!   scratch/TARGET/ writable upper layers
//!   lock            flock: exclusive for whatever changes the above, shared for readers that
//!                   need two of them to agree
//! ```
//!
//! Invariants: what changes the disk is planned first ([`plan`]) and then applied ([`apply`]) in
//! the order blobs, deployment folder, state file, each synced before the next begins; so a crash
//! leaves the old state, plus blobs and folders that `gc` removes, or the new one. Nothing on the
//! device is trusted: a deployment is verified afresh each time that it is used. The lock order is
//! the system's lock, then the store's.

pub mod apply;
pub mod choice;
pub mod commit;
pub mod deployment;
pub mod error;
pub mod gc;
pub mod plan;
pub mod state;
pub mod status;

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

pub use error::DeployError;
pub use state::{DeploymentId, State};

use crate::error::IoContext;
use crate::sys::flock;

/// The folder on a device where the deployed system lives.
#[derive(Debug, Clone)]
pub struct System {
    root: PathBuf,
}

/// The system's lock, held until it is dropped.
#[derive(Debug)]
pub struct SystemLock(#[allow(dead_code, reason = "closing the file releases the lock")] File);

impl System {
    /// The system at this folder, which need not exist yet.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the blobs are.
    pub fn store_dir(&self) -> PathBuf {
        self.root.join("store")
    }

    /// Where the deployments' folders are.
    pub fn deployments_dir(&self) -> PathBuf {
        self.root.join("deployments")
    }

    /// One deployment's folder.
    pub fn deployment_dir(&self, id: &DeploymentId) -> PathBuf {
        self.deployments_dir().join(id.to_string())
    }

    /// The state file.
    pub fn state_path(&self) -> PathBuf {
        self.root.join("state.json")
    }

    /// Where a target's writable upper layer is kept.
    pub fn scratch_dir(&self, target: &str) -> PathBuf {
        self.root.join("scratch").join(target)
    }

    /// Makes the folders that are missing.
    pub fn create(&self) -> Result<(), DeployError> {
        for folder in [self.root.clone(), self.deployments_dir()] {
            fs::create_dir_all(&folder).on("create", &folder)?;
        }
        Ok(())
    }

    /// Takes the system's lock for a change; waits for whoever holds it, after telling `waiting`.
    pub fn lock(&self, waiting: impl FnOnce()) -> Result<SystemLock, DeployError> {
        let path = self.root.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .on("open", &path)?;
        if !flock::try_exclusive(&file).on("lock", &path)? {
            waiting();
            flock::exclusive(&file).on("lock", &path)?;
        }
        Ok(SystemLock(file))
    }

    /// The state as it is on disk.
    pub fn state(&self) -> Result<State, DeployError> {
        State::load(&self.state_path())
    }
}
