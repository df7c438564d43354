//! Room on the disk: asked for before the first blob is fetched, and made where it is lacking.
//!
//! Rule: an update frees what nothing needs before it says that room is lacking, and what it leaves behind goes by
//! itself: nobody has to run `mosfs gc` on a device.

use std::path::Path;

use super::error::DeployError;
use super::gc::{self, Needs};
use super::{System, SystemLock};
use crate::digest::Digest;
use crate::error::IoError;
use crate::sys::file;

/// What the folder, the index and the state file need beside the blobs, in bytes.
const RESERVE: u64 = 1 << 20;

/// What a plan needs room for.
pub(super) struct Want {
    /// What is to be fetched, in bytes.
    pub(super) bytes: u64,
    /// What has to stay, because the plan has found it in the store already.
    pub(super) keep: Vec<Digest>,
    /// The floor, where it is known.
    pub(super) floor: Option<u64>,
}

/// Requires that a plan has room, with what [`make`] would free counted in.
///
/// # Errors
/// [`DeployError::NoSpace`].
pub(super) fn check(system: &System, want: &Want) -> Result<(), DeployError> {
    let available = available(system)?;
    if needed(want) <= available {
        return Ok(());
    }
    require(system, want, available.saturating_add(reclaimable(system, want).unwrap_or(0)))
}

/// Makes room for a plan: removes what nothing needs, where there is too little. The caller holds
/// the lock.
///
/// # Errors
/// [`DeployError::NoSpace`] where that is not enough.
pub(super) fn make(system: &System, lock: &SystemLock, want: &Want) -> Result<(), DeployError> {
    if needed(want) <= available(system)? {
        return Ok(());
    }
    if let Err(error) = needs(want).and_then(|needs| tidy(system, lock, &needs)) {
        log::warn!("no space is freed: {error}");
    }
    require(system, want, available(system)?)
}

/// Removes what nothing needs, as `mosfs gc` does; what it could not look through or remove is returned.
///
/// # Errors
/// See [`gc::plan`]. Where somebody writes to the store nothing is done, and that is no error.
pub fn tidy(system: &System, lock: &SystemLock, needs: &Needs) -> Result<Vec<String>, DeployError> {
    let store = system.store()?;
    let collector = store.collector()?;
    let plan = gc::plan(system, &collector, &store, needs)?;
    gc::apply(system, lock, &collector, plan)
}

/// What has to stay for a plan beside what runs: what it has found in the store already.
fn needs(want: &Want) -> Result<Needs, DeployError> {
    Ok(Needs { floor: want.floor, keep: want.keep.clone(), ..Needs::of_this_boot()? })
}

fn reclaimable(system: &System, want: &Want) -> Result<u64, DeployError> {
    let store = system.store()?;
    let collector = store.collector()?;
    Ok(gc::plan(system, &collector, &store, &needs(want)?)?.store.bytes)
}

fn needed(want: &Want) -> u64 {
    want.bytes.saturating_add(RESERVE)
}

fn require(system: &System, want: &Want, available: u64) -> Result<(), DeployError> {
    let needed = needed(want);
    if needed > available {
        return Err(DeployError::NoSpace { path: system.root().to_path_buf(), needed, available });
    }
    Ok(())
}

/// What the file system of the system folder has for us, in bytes.
fn available(system: &System) -> Result<u64, DeployError> {
    let mut folder = system.root();
    // The system folder may not be there yet: ask the nearest one that is.
    while !folder.exists() {
        folder = match folder.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
    }
    file::available_bytes(folder)
        .map_err(|source| IoError { operation: "stat", path: folder.to_path_buf(), source }.into())
}
