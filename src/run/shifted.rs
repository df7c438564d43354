//! Trees with the ids of a group, for kernels that cannot map those of the mounted ones.
//!
//! ```text
//! RUN/shifted/FIRST/NAME   the image of target NAME through FUSE, its ids moved to the group that begins at FIRST
//! RUN/shifted/lock         flock: one process at a time mounts there
//! ```
//! Linux maps the ids of FUSE and squashfs from 6.12 on. On earlier kernels a container runs on such a mount, whatever
//! the backend of the target's own one is: the same image, verified by the daemon, which moves the ids of what it
//! shows. On later kernels there are none.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::places::Places;
use super::root::{self, step};
use super::{Container, RunError, ids};
use crate::deploy::activate;
use crate::error::IoContext;
use crate::mount::fuse::FuseOptions;
use crate::mount::table::{self, LayerRecord, MountRecord};
use crate::mount::units::Unit;
use crate::mount::{self, Backend, Daemon, Health, IdShift, MountError, MountPlan, Request};
use crate::sys::flock::Lock;
use crate::sys::mountapi;
use crate::sys::{file, namespace};

/// The folder of these mounts.
pub fn folder(run: &Path) -> PathBuf {
    run.join("shifted")
}

/// The ids of a group that begins at `base`.
fn shift(base: u32) -> IdShift {
    IdShift { first: base, count: ids::COUNT }
}

/// Where the image of a target is with the ids of the group that begins at `base`.
pub fn place(run: &Path, base: u32, name: &str) -> PathBuf {
    folder(run).join(base.to_string()).join(name)
}

/// The trees that a container is made of: its own, and those of targets that it mounts.
fn trees(container: &Container) -> impl Iterator<Item = (&str, &MountPlan)> {
    let mounted = container.mounted.iter().map(|(name, plan)| (name.as_str(), plan));
    std::iter::once((container.name.as_str(), &container.tree)).chain(mounted)
}

/// Where a container's trees are, if its kernel requires it.
pub fn places_of(container: &Container, run: &Path) -> Vec<PathBuf> {
    let Some(base) = container.base else { return Vec::new() };
    trees(container).map(|(name, _)| place(run, base, name)).collect()
}

/// Returns a tree of an image whose ids are moved, if it is mounted.
fn find(plan: &MountPlan, place: &Path, base: u32) -> Option<OwnedFd> {
    record(plan, place, base)?;
    mountapi::clone_mount(place).ok()
}

/// Returns the trees of an image that is mounted at `place`, with the ids of the group that begins at `base`, mapped by the
/// kernel or moved by a daemon.
///
/// # Errors
/// As [`root::trees`].
pub fn trees_of_group(
    target: &str,
    plan: &MountPlan,
    place: &Path,
    shifted: &Path,
    group: Option<(u32, BorrowedFd<'_>)>,
) -> Result<Vec<OwnedFd>, RunError> {
    let Some((base, ids)) = group else { return root::trees(target, plan, place, None) };
    root::trees(target, plan, place, Some(ids)).or_else(|error| match error {
        RunError::NoIdMap { .. } => find(plan, shifted, base).map(|tree| vec![tree]).ok_or(error),
        error => Err(error),
    })
}

/// The record of what is mounted at a place, if it is the image of a plan, verified and served, with these ids.
fn record(plan: &MountPlan, place: &Path, base: u32) -> Option<MountRecord> {
    let place = place.canonicalize().ok()?;
    let mounted = table::mounted_at(&place).ok()??;
    let record =
        table::mounts().ok()?.into_iter().find(|one| one.target == place && one.device == mounted.device)?;
    // Rule (docs/design.md, what runs is signed): the image of the signed manifest, mounted verified.
    let is_it = record.digest == plan.digest()
        && record.layers == LayerRecord::of(plan)
        && record.verified
        && record.shift == Some(shift(base))
        && record.health() != Health::DaemonDead;
    is_it.then_some(record)
}

/// Makes the unit of a daemon: from the name of the target, the place, and where the ids are moved to.
pub type MakeUnit<'a> = &'a dyn Fn(&str, &Path, IdShift) -> Option<Unit>;

/// Mounts what a container requires and is not there. `unit`: who keeps the daemons; nobody where it returns none.
///
/// # Errors
/// [`RunError::Mount`], and those of the folders.
pub fn ensure(container: &Container, places: &Places, unit: MakeUnit<'_>) -> Result<(), RunError> {
    let Some(base) = container.base else { return Ok(()) };
    let targets = activate::targets_dir(&places.run);
    let mut lock = None;
    for (name, plan) in trees(container) {
        let place = place(&places.run, base, name);
        if record(plan, &place, base).is_some() {
            continue;
        }
        // What is there is of no use; without it, the kernel is asked.
        if !place.exists() && can_map(container, name, plan, &targets)? {
            continue;
        }
        if lock.is_none() {
            let folder = folder(&places.run);
            file::create_folders(&folder)?;
            let path = folder.join("lock");
            lock = Some(Lock::exclusive(&path).on("lock", &path)?);
            if record(plan, &place, base).is_some() {
                continue;
            }
        }
        file::create_folders(&place)?;
        let place = place.canonicalize().on("find", &place)?;
        clear(&place)?;
        let unit = unit(name, &place, shift(base));
        let request = Request {
            backend: Backend::Fuse,
            flags: activate::flags(),
            fuse: FuseOptions { shift: Some(shift(base)), ..FuseOptions::default() },
            daemon: unit.map_or(Daemon::Forked, Daemon::Unit),
            ..Request::new(plan, &place)
        };
        request.run()?;
    }
    Ok(())
}

/// Whether the kernel maps the ids of a tree as it is mounted. What is wrong with it is found at the start.
fn can_map(container: &Container, name: &str, plan: &MountPlan, targets: &Path) -> Result<bool, RunError> {
    let target = container.name.as_str();
    let Some(base) = container.base else { return Ok(true) };
    let ids = namespace::user_namespace(base, ids::COUNT).map_err(step(target, "make a user namespace"))?;
    let found = root::trees(target, plan, &targets.join(name), Some(ids.as_fd()));
    Ok(!matches!(found, Err(RunError::NoIdMap { .. })))
}

/// Unmounts what is at a place. What is in use of it stays in use, and is served until it is not.
fn clear(place: &Path) -> Result<(), MountError> {
    while table::mounted_at(place)?.is_some_and(|found| found.is_ours()) {
        match mount::unmount(place, true) {
            Ok(()) | Err(MountError::Daemon { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Unmounts all but these places, as far as it can.
pub fn tidy(run: &Path, wanted: &[PathBuf]) {
    let list = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir()).collect()
    };
    for group in list(&folder(run)) {
        for place in list(&group).into_iter().filter(|place| !wanted.contains(place)) {
            let place = place.canonicalize().unwrap_or(place);
            match clear(&place) {
                Ok(()) => drop(fs::remove_dir(&place)),
                Err(error) => log::warn!("{error}"),
            }
        }
        // Only an empty one.
        let _ = fs::remove_dir(&group);
    }
}
