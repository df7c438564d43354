//! Disk space: checked before the first blob is fetched, and freed if there is too little.
//!
//! Rule: an update frees unneeded space before it reports a lack of it, and what it leaves behind is removed
//! automatically: no one has to run `mosfs gc` on a device.

use std::path::Path;

use super::error::DeployError;
use super::gc::{self, Needs};
use super::{System, SystemLock};
use crate::digest::Digest;
use crate::error::IoError;
use crate::sys::file;

/// Space for the folder, the index and the state file in addition to the blobs, in bytes.
const RESERVE: u64 = 1 << 20;

/// The space that a plan needs.
pub(super) struct SpaceNeeded {
    /// The size of the blobs to fetch, in bytes.
    pub(super) bytes: u64,
    /// Blobs that must stay, because the plan relies on their presence in the store.
    pub(super) keep: Vec<Digest>,
    /// The floor, if known.
    pub(super) floor: Option<u64>,
}

/// Requires enough space for a plan, including what [`make`] would free.
///
/// # Errors
/// [`DeployError::NoSpace`].
pub(super) fn check(system: &System, want: &SpaceNeeded) -> Result<(), DeployError> {
    let available = available(system)?;
    if needed(want) <= available {
        return Ok(());
    }
    require(system, want, available.saturating_add(reclaimable(system, want).unwrap_or(0)))
}

/// Frees space for a plan: if there is too little, removes what is not needed. The caller holds the lock.
///
/// # Errors
/// [`DeployError::NoSpace`] if that is not enough.
pub(super) fn make(system: &System, lock: &SystemLock, want: &SpaceNeeded) -> Result<(), DeployError> {
    if needed(want) <= available(system)? {
        return Ok(());
    }
    if let Err(error) = needs(want).and_then(|needs| tidy(system, lock, &needs)) {
        log::warn!("no space is freed: {error}");
    }
    require(system, want, available(system)?)
}

/// Removes what is not needed, as `mosfs gc` does; returns what it could not examine or remove.
///
/// # Errors
/// See [`gc::plan`]. If another process is writing to the store, nothing is done, which is not an error.
pub fn tidy(system: &System, lock: &SystemLock, needs: &Needs) -> Result<Vec<String>, DeployError> {
    let store = system.store()?;
    let collector = store.collector()?;
    let plan = gc::plan(system, &collector, &store, needs)?;
    gc::apply(system, lock, &collector, plan)
}

/// Returns what must stay for a plan in addition to what runs: the blobs that it found in the store.
fn needs(want: &SpaceNeeded) -> Result<Needs, DeployError> {
    Ok(Needs { floor: want.floor, keep: want.keep.clone(), ..Needs::of_this_boot()? })
}

fn reclaimable(system: &System, want: &SpaceNeeded) -> Result<u64, DeployError> {
    let store = system.store()?;
    let collector = store.collector()?;
    Ok(gc::plan(system, &collector, &store, &needs(want)?)?.store.bytes)
}

fn needed(want: &SpaceNeeded) -> u64 {
    want.bytes.saturating_add(RESERVE)
}

fn require(system: &System, want: &SpaceNeeded, available: u64) -> Result<(), DeployError> {
    let needed = needed(want);
    if needed > available {
        return Err(DeployError::NoSpace { path: system.root().to_path_buf(), needed, available });
    }
    Ok(())
}

/// Returns the free space of the file system of the system folder, in bytes.
fn available(system: &System) -> Result<u64, DeployError> {
    let mut folder = system.root();
    // The system folder may not exist yet: use the nearest existing ancestor.
    while !folder.exists() {
        folder = match folder.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
    }
    file::available_bytes(folder)
        .map_err(|source| IoError { operation: "stat", path: folder.to_path_buf(), source }.into())
}
