//! Room on the disk: asked for before the first blob is fetched, and made where it is lacking.
//!
//! Rule: an update frees what nothing needs before it says that room is lacking, and what it leaves behind goes by
//! itself: nobody has to run `mosfs gc` on a device.

use std::path::Path;

use super::error::DeployError;
use super::gc::{self, Needs};
use super::plan::Plan;
use super::{System, SystemLock};
use crate::digest::Digest;
use crate::error::IoError;
use crate::sys::file;

/// What the folder, the index and the state file need beside the blobs, in bytes.
const RESERVE: u64 = 1 << 20;

/// Requires that a plan has room, with what [`make`] would free counted in.
///
/// # Errors
/// [`DeployError::NoSpace`].
pub(super) fn check(system: &System, plan: &Plan) -> Result<(), DeployError> {
    let available = available(system)?;
    if needed(plan) <= available {
        return Ok(());
    }
    require(system, plan, available.saturating_add(reclaimable(system, plan).unwrap_or(0)))
}

/// Makes room for a plan: removes what nothing needs, where there is too little. The caller holds
/// the lock.
///
/// # Errors
/// [`DeployError::NoSpace`] where that is not enough.
pub(super) fn make(system: &System, lock: &SystemLock, plan: &Plan) -> Result<(), DeployError> {
    if needed(plan) <= available(system)? {
        return Ok(());
    }
    if let Err(error) = needs(plan).and_then(|needs| tidy(system, lock, &needs)) {
        log::warn!("no space is freed: {error}");
    }
    require(system, plan, available(system)?)
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
fn needs(plan: &Plan) -> Result<Needs, DeployError> {
    let keep: Vec<Digest> = plan.blobs.iter().map(|blob| blob.digest).collect();
    Ok(Needs { floor: plan.floor, keep, ..Needs::of_this_boot()? })
}

fn reclaimable(system: &System, plan: &Plan) -> Result<u64, DeployError> {
    let store = system.store()?;
    let collector = store.collector()?;
    Ok(gc::plan(system, &collector, &store, &needs(plan)?)?.store.bytes)
}

fn needed(plan: &Plan) -> u64 {
    plan.needed_bytes.saturating_add(RESERVE)
}

fn require(system: &System, plan: &Plan, available: u64) -> Result<(), DeployError> {
    let needed = needed(plan);
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
