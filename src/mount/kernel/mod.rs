//! Mounting a plan through the kernel: dm-verity layers, overlayfs, a record in the table of mounts.
//!
//! ```text
//! dm_verity.rs       a layer: loop device, dm-verity device, the file system on it
//! overlay.rs         the layers under one overlay, with a writable layer where one is asked for
//! through_device.rs  a layer that the FUSE engine reads from the kernel's dm-verity device
//! ```
//!
//! Also the writable layer over a FUSE mount, which is the kernel's overlayfs too.

pub mod dm_verity;
pub mod overlay;
pub mod through_device;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use self::dm_verity::{DmVerity, DmVerityError};
use self::overlay::Upper;
use crate::mount::backend::{DM_VERITY, FUSE, OVERLAY_SOURCE_PREFIX};
use crate::mount::fuse::Served;
use crate::mount::table::{self, DaemonRecord, MountRecord};
use crate::mount::{MountError, MountFlags, MountPlan};
use crate::sys;
use crate::sys::failpoint;
use crate::sys::mountapi::{self, MountPoint};

/// The tree of a plan, attached nowhere, and how long its layers took. Dropping it frees everything.
///
/// With `upper` the tree is writable. Attached, a plain umount(8) frees everything.
pub fn assemble(
    backend: &DmVerity,
    plan: &MountPlan,
    upper: Option<&Upper>,
    flags: &MountFlags,
) -> Result<(OwnedFd, Duration), MountError> {
    let source = format!("{OVERLAY_SOURCE_PREFIX}{}", plan.source);
    let begin = Instant::now();
    let layers = backend.layers(plan.layers())?;
    let with_layers = begin.elapsed();
    let tree = dm_verity::assemble(&layers, upper, &source, flags.attributes())?;
    Ok((tree, with_layers))
}

/// Attaches what [`assemble`] made, and records it.
pub fn attach(tree: OwnedFd, plan: &MountPlan, point: &MountPoint) -> Result<(), MountError> {
    attach_recorded(tree, plan, point, DM_VERITY, None)
}

/// Puts a writable layer over a FUSE mount that is attached nowhere, and attaches that.
///
/// overlayfs has a mount of its own of what is below it, so the FUSE mount lives exactly as long as the overlay, and so
/// does its daemon.
pub fn attach_over_fuse(
    plan: &MountPlan,
    upper: &Upper,
    point: &MountPoint,
    flags: &MountFlags,
    served: Served,
) -> Result<(), MountError> {
    let source = format!("{OVERLAY_SOURCE_PREFIX}{}", plan.source);
    let lower: Vec<_> = served.mount().into_iter().collect();
    let tree = overlay::assemble(&lower, Some(upper), &source, flags.attributes());
    let tree = tree.map_err(DmVerityError::Mount)?;
    let daemon = served.daemon();
    drop(served);
    attach_recorded(tree, plan, point, FUSE, daemon)
}

fn attach_recorded(
    tree: OwnedFd,
    plan: &MountPlan,
    point: &MountPoint,
    backend: &str,
    daemon: Option<DaemonRecord>,
) -> Result<(), MountError> {
    let failed = |source| MountError::Mount { target: point.path().to_path_buf(), source };
    let device = sys::fuse::device_of_fd(tree.as_fd()).map_err(failed)?;
    point.attach(tree).map_err(DmVerityError::Mount)?;
    failpoint::hit("kernel.tree.attached");
    table::write(&MountRecord::new(plan, point.path(), backend, device, daemon)).map_err(|error| {
        let _ = mountapi::unmount(point.path(), true);
        MountError::Register(error)
    })
}

/// The folder to mount at.
///
/// # Errors
/// [`MountError::Target`] where it is no folder.
pub fn mount_point(target: &Path) -> Result<MountPoint, MountError> {
    MountPoint::open(target).map_err(|source| MountError::Target { target: target.to_path_buf(), source })
}
