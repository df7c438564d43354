//! The root file system of a container: its verified image, over a skeleton of what every container needs.
//!
//! ```text
//! image's layers (ids mapped)   top    read-only; the image wins
//! skeleton                      bottom folders and empty files to mount at, where the image has none
//! memory                        above both with run.writable
//! ```
//!
//! Through FUSE, the tree is the mount that activation made, as it is served by one daemon. Through dm-verity the
//! layers are mounted again, from the same devices: the kernel maps the ids of a layer, but not those of an overlay.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use super::{Container, RunError};
use crate::error::without_target;
use crate::mount::kernel::dm_verity::{DmVerity, DmVerityError};
use crate::mount::kernel::overlay::{self, Upper};
use crate::mount::table::{self, LayerRecord};
use crate::mount::{Health, MountPlan, backend};
use crate::sys::mountapi::{self, FsContext};
use crate::sys::{self, file};

/// Returns the trees of an image that is mounted at `place`, bottom first, attached nowhere, with their ids mapped.
///
/// # Errors
/// [`RunError::NotMounted`] where another image or nothing is mounted; [`RunError::NoIdMap`] where the kernel cannot map
/// the ids.
pub fn trees(
    target: &str,
    plan: &MountPlan,
    place: &Path,
    ids: Option<BorrowedFd<'_>>,
) -> Result<Vec<OwnedFd>, RunError> {
    let not_mounted = |why: &str| {
        Err(RunError::NotMounted {
            target: target.into(),
            image: plan.digest().map_or_else(|| plan.source.clone(), |digest| digest.to_string()),
            path: place.to_path_buf(),
            why: why.into(),
        })
    };
    // As the kernel lists it.
    let place = &place.canonicalize().unwrap_or_else(|_| place.to_path_buf());
    let Some(mounted) = table::mounted_at(place)? else { return not_mounted("nothing is mounted there") };
    let records = table::mounts()?;
    let record = records.iter().find(|one| one.target == *place && one.device == mounted.device);
    let Some(record) = record else { return not_mounted("it has no record of a mount") };
    // Rule (docs/design.md, what runs is signed): the image of the signed manifest, mounted verified.
    if record.digest != plan.digest() || record.layers != LayerRecord::of(plan) || !record.verified {
        return not_mounted("another image is mounted there");
    }
    if record.shift.is_some() {
        return not_mounted("it is mounted with other ids");
    }
    if record.health() == Health::DaemonDead {
        return not_mounted("the daemon of its mount has died");
    }
    let (trees, what) = if record.backend == backend::DM_VERITY {
        let open = DmVerity::open(&sys::run_dir()).map_err(crate::mount::MountError::from)?;
        let layers = open.layers(plan.layers()).map_err(crate::mount::MountError::from)?;
        let kind = plan.layers().first().map_or("", |layer| layer.descriptor.media_type());
        (layers.into_iter().map(OwnedFd::from).collect(), format!("a layer of type {kind}"))
    } else {
        let tree = mountapi::clone_mount(place).map_err(step(target, "copy the mount of the image"))?;
        let device =
            sys::fuse::device_of_fd(tree.as_fd()).map_err(step(target, "look at the mount of the image"))?;
        if format!("{}:{}", device.0, device.1) != record.device {
            return not_mounted("it was replaced meanwhile");
        }
        (vec![tree], "a FUSE mount".to_string())
    };
    if let Some(ids) = ids {
        for tree in &trees {
            mountapi::map_ids(tree.as_fd(), ids).map_err(|source| RunError::NoIdMap {
                target: target.into(),
                what: what.clone(),
                source,
            })?;
        }
    }
    Ok(trees)
}

/// Returns a function that makes an error of a step that failed.
pub fn step<E: std::fmt::Display>(target: &str, step: &str) -> impl FnOnce(E) -> RunError + use<E> {
    let (target, step) = (target.to_string(), step.to_string());
    move |error| {
        let why = without_target(&target, &error.to_string()).to_string();
        RunError::Step { target, step, why }
    }
}

/// An overlay's error as one of a mount.
fn overlaid(error: sys::mountapi::CallError) -> RunError {
    crate::mount::MountError::from(DmVerityError::Mount(error)).into()
}

/// Returns one read-only tree of these, attached nowhere.
pub fn read_only(source: &str, trees: &[OwnedFd]) -> Result<OwnedFd, RunError> {
    let lowers: Vec<_> = trees.iter().map(AsFd::as_fd).collect();
    overlay::assemble(&lowers, None, source, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV)
        .map_err(overlaid)
}

/// Something to mount at, which the skeleton has if the image does not.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Its absolute path in the container, without `..`.
    pub path: PathBuf,
    /// Whether it is a file.
    pub is_file: bool,
}

/// Mounts an empty tmpfs, for the owner root.
pub fn mount_tmpfs(target: &str, place: &Path, mode: &str, size: Option<u64>) -> Result<(), RunError> {
    mount_memory(target, place, mode, size, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV)
}

/// Mounts an empty tmpfs in which nodes of devices work.
pub fn mount_devices(target: &str, place: &Path) -> Result<(), RunError> {
    mount_memory(target, place, "0711", Some(1 << 20), libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC)
}

fn mount_memory(
    target: &str,
    place: &Path,
    mode: &str,
    size: Option<u64>,
    attributes: u64,
) -> Result<(), RunError> {
    let make = || {
        let context = FsContext::open("tmpfs")?;
        context.set_string("mode", mode.as_bytes())?;
        if let Some(size) = size {
            context.set_string("size", size.to_string().as_bytes())?;
        }
        mountapi::attach(context.mount(attributes)?, place)
    };
    make().map_err(step(target, &format!("mount a tmpfs at {}", place.display())))
}

/// Makes a folder of mode 0755, with the owner that a container's root has; one that is there stays.
fn make_folder(path: &Path, owner: u32, mode: u32) -> std::io::Result<()> {
    match file::create_folder(path, mode) {
        Err(error) if error.source.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
        other => other.map_err(|error| error.source)?,
    }
    chown(path, Some(owner), Some(owner))
}

/// Fills a skeleton with the places to mount at and the folders above them.
fn fill_skeleton(skeleton: &Path, owner: u32, places: &[Place]) -> std::io::Result<()> {
    chown(skeleton, Some(owner), Some(owner))?;
    for Place { path, is_file } in places {
        let below = path.strip_prefix("/").unwrap_or(path);
        let mut at = skeleton.to_path_buf();
        let parts: Vec<_> = below.components().collect();
        for (number, part) in parts.iter().enumerate() {
            at.push(part);
            if *is_file && number + 1 == parts.len() {
                if !at.exists() {
                    fs::write(&at, b"")?;
                    fs::set_permissions(&at, fs::Permissions::from_mode(0o644))?;
                    chown(&at, Some(owner), Some(owner))?;
                }
            } else {
                make_folder(&at, owner, 0o755)?;
            }
        }
    }
    Ok(())
}

/// The folders that the runtime mounts at, or that are in memory.
const FOLDERS: [&str; 6] = ["proc", "sys", "dev", "etc", "run", "tmp"];

/// Mounts the root of a container at `work`/root and returns its path.
///
/// Only for a process in a mount namespace of its own. `work` is its tmpfs.
///
/// # Errors
/// [`RunError::NoFolder`] for an image whose /proc, /sys or /dev is a link or a file: the runtime would follow it.
pub fn assemble(
    container: &Container,
    trees: Vec<OwnedFd>,
    places: &[Place],
    work: &Path,
    size: Option<Option<u64>>,
) -> Result<PathBuf, RunError> {
    let target = container.name.as_str();
    let failed = |what: &str| step::<std::io::Error>(target, what);
    let owner = container.base.unwrap_or(0);
    let skeleton = work.join("skeleton");
    file::create_folder(&skeleton, 0o755)?;
    mount_tmpfs(target, &skeleton, "0755", Some(1 << 20))?;
    let mut all: Vec<Place> =
        FOLDERS.iter().map(|name| Place { path: Path::new("/").join(name), is_file: false }).collect();
    all.extend_from_slice(places);
    fill_skeleton(&skeleton, owner, &all).map_err(failed("make the skeleton"))?;
    let bottom = mountapi::clone_mount(&skeleton).map_err(step(target, "copy the skeleton"))?;
    let lowers: Vec<_> = std::iter::once(bottom.as_fd()).chain(trees.iter().map(AsFd::as_fd)).collect();
    let upper = match size {
        None => None,
        Some(size) => {
            let folder = work.join("writes");
            file::create_folder(&folder, 0o700)?;
            mount_tmpfs(target, &folder, "0700", size)?;
            Some(Upper::Folder { upper: folder.join("upper"), work: folder.join("work") })
        }
    };
    let source = format!("mosfs:{target}");
    let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    let tree = overlay::assemble(&lowers, upper.as_ref(), &source, attributes).map_err(overlaid)?;
    let root = work.join("root");
    file::create_folder(&root, 0o755)?;
    mountapi::attach(tree, &root).map_err(step(target, "attach the root"))?;
    // Rule: the runtime mounts at these, and an image must not lead it elsewhere.
    for folder in ["proc", "sys", "dev"] {
        let metadata =
            fs::symlink_metadata(root.join(folder)).map_err(failed("look at the image's folders"))?;
        if !metadata.is_dir() {
            let found = if metadata.is_symlink() { "a link" } else { "no folder" };
            return Err(RunError::NoFolder { target: target.to_string(), folder, found });
        }
    }
    Ok(root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skeleton_has_the_places_and_what_is_above_them() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let place = |path: &str, is_file| Place { path: path.into(), is_file };
        let places = [place("/etc/hosts", true), place("/var/lib/data", false), place("/etc", false)];
        fill_skeleton(dir.path(), 7, &places).unwrap();
        for (path, mode) in
            [("etc", 0o40755), ("etc/hosts", 0o100644), ("var/lib", 0o40755), ("var/lib/data", 0o40755)]
        {
            let metadata = fs::metadata(dir.path().join(path)).unwrap();
            assert_eq!((metadata.mode(), metadata.uid(), metadata.gid()), (mode, 7, 7), "{path}");
        }
    }
}
