//! Deployments: signed systems on a device, and which of them runs.
//!
//! ```text
//! SYSTEM/
//!   store/          the blobs (crate::store)
//!   deployments/    one folder per signed system (deployment.rs)
//!   state.json      which is current, pending, previous (state.rs): the one source of truth
//!   floor.json      the development floor of `--floor file`
//!   scratch/TARGET/ writable upper layers
//!   fetch.lock      flock: held by the process that fetches the rest of a pending deployment (fetching.rs)
//!   lock            flock: exclusive for whatever changes the above, shared for readers that
//!                   need two of them to agree
//! ```
//!
//! Invariants: a change to the disk is planned first ([`plan`]) and then applied ([`apply`]) in the order
//! blobs, deployment folder, state file, each synced before the next begins; so a crash leaves the old state,
//! plus blobs and folders that `gc` removes, or the new one. Nothing on the device is trusted: a deployment
//! is verified each time it is used. The lock order is the system's lock, then the store's.

pub mod activate;
pub mod apply;
pub mod booted;
pub mod check;
pub mod choice;
pub mod commit;
pub mod deployment;
pub mod error;
pub mod esp;
mod esp_error;
pub mod fetching;
pub mod gc;
pub mod id;
mod incoming;
pub mod kernel;
pub mod offer;
pub mod plan;
pub mod pull;
#[cfg(feature = "registry")]
pub mod push;
mod recover;
pub mod repair;
pub mod space;
pub mod state;
pub mod status;
pub mod target;

use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use error::DeployError;
pub use id::DeploymentId;
pub use state::State;

use crate::digest::Digest;
use crate::error::{IoContext, IoError};
use crate::floor::{Floor, Policy};
use crate::manifest::Target;
use crate::store::{Store, StoreError};
use crate::sys::file::{self, Links};
use crate::sys::flock::{self, Lock};
use crate::transport::TransportError;
use crate::trust::Verified;

/// The folder of the deployed system on a device.
#[derive(Debug, Clone)]
pub struct System {
    root: PathBuf,
}

/// The system's lock, held until it is dropped.
#[derive(Debug)]
pub struct SystemLock(#[allow(dead_code, reason = "dropping it releases the lock")] Lock);

impl System {
    /// Returns the system in this folder, which need not exist yet.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the folder of the store.
    pub fn store_dir(&self) -> PathBuf {
        self.root.join("store")
    }

    /// Opens the store. Nothing in it is a link.
    ///
    /// # Errors
    /// [`StoreError::Transport`] if it is not a layout.
    pub fn store(&self) -> Result<Store, StoreError> {
        Store::open_with(&self.store_dir(), Links::Refused)
    }

    /// Returns the folder that holds the deployments' folders.
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

    /// Returns the folder of a target's writable upper layer.
    pub fn scratch_dir(&self, target: &str) -> PathBuf {
        self.root.join("scratch").join(target)
    }

    /// Creates missing folders.
    pub fn create(&self) -> Result<(), DeployError> {
        for folder in [self.root.clone(), self.deployments_dir()] {
            file::create_folders(&folder)?;
        }
        Ok(())
    }

    /// Takes the system's lock for a change. If another process holds it, calls `waiting` and waits.
    ///
    /// A state file that cannot be read is written anew ([`recover`]).
    pub fn lock(&self, waiting: impl FnOnce()) -> Result<SystemLock, DeployError> {
        self.renew_state(self.lock_as_it_is(waiting)?)
    }

    /// Does what [`System::lock`] does, and waits at most for `patience`.
    ///
    /// # Errors
    /// [`DeployError::Locked`] with the process that holds the lock.
    pub fn lock_within(&self, patience: Duration, waiting: impl FnOnce()) -> Result<SystemLock, DeployError> {
        let path = self.root.join("lock");
        let at_once = Lock::exclusive_within(&path, Duration::ZERO).on("lock", &path)?;
        let lock = match at_once {
            Some(lock) => Some(lock),
            None => {
                waiting();
                Lock::exclusive_within(&path, patience).on("lock", &path)?
            }
        };
        let Some(lock) = lock else {
            return Err(DeployError::Locked { holder: flock::holder(&path), path, waited: patience });
        };
        self.renew_state(SystemLock(lock))
    }

    /// Writes a state file that cannot be read anew.
    fn renew_state(&self, lock: SystemLock) -> Result<SystemLock, DeployError> {
        let state = self.state()?;
        if let Some(damage) = &state.damage {
            let path = self.state_path();
            match recover::write(&state, &path) {
                Ok(()) => log::warn!("{} is written anew: {damage}", path.display()),
                // Whatever this command is to write fails with a reason of its own.
                Err(error) => log::warn!("{} is not written anew: {error}", path.display()),
            }
        }
        Ok(lock)
    }

    /// Does what [`System::lock`] does, and leaves the state file as it is.
    pub fn lock_as_it_is(&self, waiting: impl FnOnce()) -> Result<SystemLock, DeployError> {
        let path = self.root.join("lock");
        match Lock::try_exclusive(&path) {
            Ok(Some(lock)) => return Ok(SystemLock(lock)),
            Ok(None) => {}
            // Nobody can change a disk that cannot be written; those who read it may as well agree.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                return Ok(SystemLock(Lock::of_folder(&self.root).on("lock", &self.root)?));
            }
            Err(error) => return Err(IoError::new("lock", &path, error).into()),
        }
        waiting();
        Ok(SystemLock(Lock::exclusive(&path).on("lock", &path)?))
    }

    /// The state as it is on disk; where the file cannot be read, one made anew from the deployments
    /// ([`State::damage`] says why).
    pub fn state(&self) -> Result<State, DeployError> {
        match State::read(&self.state_path()) {
            Ok(state) => Ok(state.unwrap_or_default()),
            Err(damage) => recover::by_name(self, damage),
        }
    }
}

/// Returns the number of threads that this machine runs in parallel.
fn threads() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// What an install or an update requires of the floor.
#[allow(clippy::large_enum_variant, reason = "there is one, on the stack, for the length of a command")]
pub enum FloorGate<'a> {
    /// The device has no floor yet (CONFIG has no `floor.pub`): only a first install may proceed, so that
    /// there is something to provision for.
    Unprovisioned,
    /// The floor is read, and the system must not be below it.
    Enforced {
        /// The floor.
        floor: &'a mut dyn Floor,
        /// What a version's floor signature is checked against; if it is set, a system requires a signature.
        policy: Option<Policy>,
    },
}

/// Checks that the images of all targets of a deployment are in the store, as [`check_images`] does.
///
/// # Errors
/// As [`check_images`].
pub fn check_complete(system: &System, verified: &Verified) -> Result<(), DeployError> {
    check_images(system, verified, |_| true)
}

/// Checks that the images of those targets that `needed` names are in the store: the OCI manifests by digest
/// and size, the blobs by size (their content is verified as it is read).
///
/// # Errors
/// [`DeployError::MissingBlob`] and [`DeployError::OtherSize`], naming the target.
pub fn check_images(
    system: &System,
    verified: &Verified,
    needed: impl Fn(&Target) -> bool,
) -> Result<(), DeployError> {
    let store = system.store()?;
    for (name, target) in verified.manifest().targets.iter().filter(|(_, target)| needed(target)) {
        let missing = |digest| DeployError::MissingBlob { target: name.to_string(), digest };
        let open = |digest: &Digest| match store.transport().open_blob(digest) {
            Err(TransportError::BlobMissing { .. }) => Err(missing(*digest)),
            opened => Ok(opened.map_err(StoreError::from)?),
        };
        open(&target.digest)?;
        let image = store.image(&target.digest)?;
        target::check_size(name.as_str(), target, &image)?;
        for blob in &image.manifest.layers {
            let (_, found) = open(&blob.digest)?;
            if found != blob.size {
                return Err(missing(blob.digest));
            }
        }
    }
    Ok(())
}
