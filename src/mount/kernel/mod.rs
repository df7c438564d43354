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

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use self::dm_verity::{DmVerity, DmVerityError};
use self::overlay::Upper;
use crate::failpoint;
use crate::mount::backend::{DM_VERITY, FUSE, OVERLAY_SOURCE_PREFIX};
use crate::mount::table::{self, DaemonRecord, MountRecord};
use crate::mount::{MountError, MountFlags, MountPlan};
use crate::sys::{self, file, mountapi};

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
    let layers = backend.layers(&plan.layers)?;
    let with_layers = begin.elapsed();
    let tree = dm_verity::assemble(&layers, upper, &source, attributes(flags))?;
    Ok((tree, with_layers))
}

/// Attaches what [`assemble`] made, and records it.
pub fn attach(tree: OwnedFd, plan: &MountPlan, target: &Path) -> Result<(), MountError> {
    let target = mount_point(target)?;
    mountapi::attach(tree, &target).map_err(DmVerityError::Mount)?;
    failpoint::hit("kernel.tree.attached");
    record(plan, &target, DM_VERITY, None)
}

/// Puts a writable layer over a FUSE mount, which `mount_lower` makes at the folder given, and attaches that at
/// `target`. Returns how long the lower mount took.
///
/// The FUSE mount is made at a folder in [`sys::run_dir`] and taken out of the tree as soon as the overlay
/// has a mount of its own of it; so it lives exactly as long as the overlay, and so does its daemon.
pub fn attach_over_fuse(
    plan: &MountPlan,
    upper: &Upper,
    target: &Path,
    flags: &MountFlags,
    mount_lower: impl FnOnce(&Path) -> Result<(), MountError>,
) -> Result<Duration, MountError> {
    let target = mount_point(target)?;
    let begin = Instant::now();
    let lower = LowerFolder::new()?;
    mount_lower(&lower.0)?;
    let with_lower = begin.elapsed();
    let made = mountapi::clone_mount(&lower.0).and_then(|mount| {
        let source = format!("{OVERLAY_SOURCE_PREFIX}{}", plan.source);
        overlay::assemble(&[mount.as_fd()], Some(upper), &source, attributes(flags))
    });
    let daemon = table::mounts()?.into_iter().find(|one| one.target == lower.0).and_then(|one| one.daemon);
    let _ = mountapi::unmount(&lower.0, true);
    mountapi::attach(made.map_err(DmVerityError::Mount)?, &target).map_err(DmVerityError::Mount)?;
    record(plan, &target, FUSE, daemon)?;
    Ok(with_lower)
}

/// An empty folder in [`sys::run_dir`] that is removed again.
struct LowerFolder(PathBuf);

impl LowerFolder {
    fn new() -> Result<Self, MountError> {
        let parent = sys::run_dir().join("lower");
        file::create_folders(&parent)?;
        let mut number = 0;
        loop {
            let path = parent.join(format!("{}-{number}", std::process::id()));
            match file::create_folder(&path, 0o700) {
                Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists && number < 1000 => {
                    number += 1
                }
                result => {
                    result?;
                    return Ok(Self(path));
                }
            }
        }
    }
}

impl Drop for LowerFolder {
    fn drop(&mut self) {
        let _ = mountapi::unmount(&self.0, true);
        let _ = fs::remove_dir(&self.0);
    }
}

/// The mount point as the kernel will list it.
///
/// # Errors
/// [`MountError::Target`] where it is no folder.
pub fn mount_point(target: &Path) -> Result<PathBuf, MountError> {
    let wrong = |source| MountError::Target { target: target.to_path_buf(), source };
    let target = target.canonicalize().map_err(wrong)?;
    if !target.is_dir() {
        return Err(wrong(io::Error::from_raw_os_error(libc::ENOTDIR)));
    }
    Ok(target)
}

fn attributes(flags: &MountFlags) -> u64 {
    [
        (flags.nosuid, libc::MOUNT_ATTR_NOSUID),
        (flags.nodev, libc::MOUNT_ATTR_NODEV),
        (flags.noexec, libc::MOUNT_ATTR_NOEXEC),
    ]
    .iter()
    .filter(|(wanted, _)| *wanted)
    .fold(0, |all, (_, bit)| all | bit)
}

/// Writes the record of a mount; undoes the mount where that fails.
fn record(
    plan: &MountPlan,
    target: &Path,
    backend: &str,
    daemon: Option<DaemonRecord>,
) -> Result<(), MountError> {
    let written = fs::metadata(target)
        .map_err(|source| MountError::Target { target: target.to_path_buf(), source })
        .and_then(|metadata| {
            let dev = metadata.dev();
            let device = (libc::major(dev), libc::minor(dev));
            Ok(table::write(&MountRecord::new(plan, target, backend, device, daemon))?)
        });
    written.inspect_err(|_| {
        let _ = mountapi::unmount(target, true);
    })
}
