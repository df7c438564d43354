//! Unmounting: the mount, its daemon, and its record.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::MountError;
use super::backend::FUSE_KIND;
use super::table::{self, Health};
use crate::sys::{self, mountapi};

/// How long [`unmount`] waits for a daemon to end.
const END_WITHIN: Duration = Duration::from_secs(10);
/// The same where the kernel does not say whether it still has something to serve.
const UNCLEAR_WITHIN: Duration = Duration::from_secs(1);

/// Unmounts the mount at `target`, and waits until its daemon has ended and nothing is left. `lazy`
/// takes it out of the tree now and does not wait for those who still use it.
///
/// Copies of the mount in other places or namespaces (a bind mount, a container) are not touched. The daemon serves
/// them until the last one is gone, and nobody waits for that: the name is free.
///
/// # Errors
/// [`MountError::NotOurs`]; [`MountError::Unmount`] where it is in use.
pub fn unmount(target: &Path, lazy: bool) -> Result<(), MountError> {
    // Not `canonicalize`: it asks the mount itself, which fails where the daemon is dead.
    let unclear = |source| MountError::Target { target: target.to_path_buf(), source };
    let absolute = std::path::absolute(target).map_err(unclear)?;
    let target = match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => {
            let plain = parent.canonicalize().map_err(unclear)?.join(name);
            // A link to the mount point is followed; what cannot be read is no link.
            match std::fs::read_link(&plain) {
                Ok(_) => plain.canonicalize().map_err(unclear)?,
                Err(_) => plain,
            }
        }
        _ => absolute,
    };
    let found = table::mounted_at(&target)?;
    let record = table::mounts()?.into_iter().find(|record| {
        record.target == target && found.as_ref().is_some_and(|found| found.device == record.device)
    });
    if !found.as_ref().is_some_and(table::MountinfoEntry::is_ours) && record.is_none() {
        return Err(MountError::NotOurs { target, found: found.map(|found| found.kind) });
    }
    let as_root = sys::daemon::effective_ids().0 == 0;
    let done = if as_root {
        mountapi::unmount(&target, lazy).map_err(|error| error.source)
    } else {
        sys::fuse::unmount_with_helper(&target, lazy)
    };
    done.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound if !as_root => MountError::NoHelper,
        _ => MountError::Unmount { target: target.clone(), source },
    })?;
    let Some(record) = record else { return Ok(()) };
    let begin = Instant::now();
    while !lazy && record.daemon.as_ref().is_some_and(table::DaemonRecord::is_alive) {
        match record.daemon.as_ref().and_then(table::DaemonRecord::is_mounted_somewhere) {
            Some(true) => return Ok(()),
            None if begin.elapsed() > UNCLEAR_WITHIN => return Ok(()),
            _ => {}
        }
        if begin.elapsed() > END_WITHIN {
            let why = format!("it still runs {} s after the mount was ended", END_WITHIN.as_secs());
            return Err(MountError::Daemon { target, why });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if record.daemon.as_ref().is_none_or(|daemon| !daemon.is_alive()) {
        table::remove(&record);
    }
    Ok(())
}

/// Fails where a mount of ours is whose daemon lives.
///
/// # Errors
/// [`MountError::Taken`].
pub fn check_vacant(target: &Path) -> Result<(), MountError> {
    match table::mounted_at(target)? {
        Some(found) if found.is_ours() && !is_dead(target, &found)? => {
            Err(MountError::Taken { target: target.to_path_buf() })
        }
        _ => Ok(()),
    }
}

/// Unmounts a mount whose daemon has died. Returns whether there was one.
///
/// # Errors
/// [`MountError::Unmount`].
pub fn unmount_dead(target: &Path) -> Result<bool, MountError> {
    let Some(found) = table::mounted_at(target)? else { return Ok(false) };
    let is_dead = is_dead(target, &found)?;
    if is_dead {
        unmount(target, true)?;
    }
    Ok(is_dead)
}

fn is_dead(target: &Path, found: &table::MountinfoEntry) -> Result<bool, MountError> {
    let record = table::mounts()?.into_iter().find(|one| one.target == target && one.device == found.device);
    Ok(match record {
        Some(record) => record.health() == Health::DaemonDead,
        // The daemon took its record away, or never wrote one.
        None => found.kind == FUSE_KIND && table::is_served(target) == Some(false),
    })
}
