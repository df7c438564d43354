//! `mosfs activate`: the targets of the running deployment, mounted where services find them.
//!
//! ```text
//! RUN/targets/NAME    one read-only mount per target except hostfs (the root, which boot mounts)
//! RUN/activate.lock   flock: one activation at a time
//! ```
//! RUN is `/run/mosfs`, or `$MOSFS_RUN`. The mounts are `nosuid` and `nodev`: every user of the host can
//! reach them, and a setuid program of a container was made for another system. A container runtime creates
//! its own mount of the tree, with the flags that it needs.
//!
//! **Trust.** `boot.json` (else `state.json`) says which deployment runs, and nothing else is read from it:
//! signature, certificate and product are verified again, and the version is compared with the floor, if the
//! device has one. On a device that mosfs did not boot this is the only check of the floor; it prevents a
//! restored old disk from activating old targets.
//!
//! **Plan, then apply.** The plan compares what is mounted with what the signed manifest requires; correct
//! mounts are not touched. To replace a mount, the new image is opened and checked while the old one is still
//! mounted; then the old one is unmounted, never lazily while its daemon lives: if it is in use, it stays,
//! and its users are reported. Activation writes only mounts and their records, which do not survive a power
//! cut; the next plan finds what a killed activation left:
//!
//! | killed… | leaves | the next activation |
//! | --- | --- | --- |
//! | before the mount | at most an empty folder | mounts |
//! | after unmounting the old one | nothing mounted | mounts |
//! | between a mount and its record | a mount without a record | replaces it |
//! | after the record | the correct mount | keeps it |

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::error::DeployError;
use super::state::DeploymentId;
use super::{System, target};
use crate::error::{AnyError, Class, Classified, IoContext, IoError, without_target};
use crate::floor::{self, Floor};
use crate::image::blobs::Blobs;
use crate::image::oci::OciImage;
use crate::manifest::ServiceType;
use crate::manifest::system::Target;
use crate::mount::holders::{self, Users};
use crate::mount::table::{self, LayerRecord, MountRecord, MountinfoEntry};
use crate::mount::units::{self, Unit};
use crate::mount::{self, Backend, Daemon, Health, MountError, MountFlags, MountPlan, Request, Verification};
use crate::sorting;
use crate::store::Store;
use crate::sys::failpoint;
use crate::sys::flock::Lock;
use crate::sys::{self, file};
use crate::trust::Anchor;

/// Maximum number of mounts stacked at one place that are unmounted.
const MOST_STACKED: usize = 16;

/// Where the targets of the running deployment are mounted.
pub fn targets_dir(run: &Path) -> PathBuf {
    run.join("targets")
}

/// The action for a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// It is mounted correctly.
    Keep,
    /// Nothing is mounted.
    Mount,
    /// Another image is mounted, or with another backend.
    Remount,
    /// Its mount is unusable: the daemon is dead, or the mount was never finished.
    Mend,
    /// The target is no longer part of the deployment.
    Unmount,
    /// Something is mounted there that mosfs did not mount; it is not touched.
    Refuse,
}

/// What is mounted at a target's path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// The topmost mount there.
    pub mounted: Option<MountinfoEntry>,
    /// Its record.
    pub record: Option<MountRecord>,
    /// Its state, if there is a record.
    pub health: Option<Health>,
}

/// One target of a plan.
#[derive(Debug)]
pub struct Step {
    /// The target.
    pub target: String,
    /// Where it is mounted.
    pub path: PathBuf,
    /// The action.
    pub action: Action,
    /// The reason, if it is not obvious.
    pub why: String,
    /// What should be mounted there, or why that is impossible.
    wanted: Result<Option<(OciImage, MountPlan)>, AnyError>,
}

/// What an activation would do.
#[derive(Debug)]
pub struct ActivationPlan {
    /// The deployment that runs.
    pub deployment: DeploymentId,
    /// Its targets by name, then the mounts to remove.
    pub steps: Vec<Step>,
}

/// The outcome of a step.
#[derive(Debug)]
pub enum Outcome {
    /// It is correct; with the backend, if it is mounted.
    Done(Option<String>),
    /// It is in use and was left in place.
    Busy(Users),
    /// It failed.
    Failed(AnyError),
}

/// A completed step.
#[derive(Debug)]
pub struct CompletedStep {
    /// The target.
    pub target: String,
    /// Where it is mounted.
    pub path: PathBuf,
    /// The action.
    pub action: Action,
    /// Its outcome.
    pub outcome: Outcome,
}

/// Targets that do not match the deployment.
#[derive(Debug, thiserror::Error)]
#[error("{}", reasons.join("; "))]
pub struct NotActive {
    /// One sentence per target.
    pub reasons: Vec<String>,
    /// Whether the only problem is that mounts are in use.
    pub only_busy: bool,
    class: Class,
}

impl Classified for NotActive {
    fn class(&self) -> Class {
        self.class
    }
}

/// Takes the lock for an activation; waits for another one.
pub fn lock(run: &Path) -> Result<Lock, IoError> {
    file::create_folders(run)?;
    let path = run.join("activate.lock");
    Lock::exclusive(&path).on("lock", &path)
}

/// What is asked of an activation.
pub struct ActivationRequest<'a> {
    /// The backend of the mounts.
    pub backend: Backend,
    /// The targets; all if none are named.
    pub names: &'a [String],
    /// Finds the OCI manifest of a signed target.
    pub image: &'a dyn Fn(&Store, &DeploymentId, &str, &Target) -> Result<OciImage, AnyError>,
}

/// Plans an activation of these targets, or of all if none are named. Changes no mount.
///
/// `floor` is read if the device has one.
///
/// # Errors
/// Errors of verifying the running deployment, [`DeployError::Floor`] with `Rollback` for a version below the
/// floor, and names that are not targets of it. A problem of one target's image fails only its own step.
pub fn plan(
    system: &System,
    run: &Path,
    booted: Option<DeploymentId>,
    anchor: &Anchor,
    floor: Option<&mut dyn Floor>,
    asked: &ActivationRequest<'_>,
) -> Result<ActivationPlan, DeployError> {
    let ActivationRequest { backend, names, image } = *asked;
    let (id, verified) = target::running(system, booted, anchor)?;
    if let Some(floor) = floor {
        // Rule (docs/design.md, floor at boot): `version >= floor`.
        floor::check(floor, id.version)?;
    }
    let targets = &verified.manifest().targets;
    for name in names {
        if target::find(&id, &verified, name)?.service_type == ServiceType::Hostfs {
            return Err(DeployError::IsHostfs { id, target: name.clone() });
        }
    }
    let folder = targets_dir(run);
    // As the kernel will list it.
    let folder = folder.canonicalize().unwrap_or(folder);
    let register = table::mounts()?;
    let mounted = table::mounted()?;
    let store = system.store()?;
    let mut steps = Vec::new();
    for (name, signed) in targets {
        let name = name.as_str();
        let is_meant = names.is_empty() || names.iter().any(|meant| meant == name);
        if signed.service_type == ServiceType::Hostfs || !is_meant {
            continue;
        }
        let wanted = image(&store, &id, name, signed).and_then(|image| {
            let plan = MountPlan::new(name, &image, &store.blobs(), Verification::default())?;
            Ok((image, plan))
        });
        let path = folder.join(name);
        let found = find(&path, &mounted, &register);
        let (action, why) = match &wanted {
            Ok((_, plan)) => decide(Some(plan), &found, backend),
            // The present mount stays until there is one to replace it.
            Err(_) if found.mounted.is_some() => (Action::Remount, String::new()),
            Err(_) => (Action::Mount, String::new()),
        };
        steps.push(Step { target: name.into(), path, action, why, wanted: wanted.map(Some) });
    }
    if names.is_empty() {
        let known = |name: &str| {
            targets.iter().any(|(one, t)| one.as_str() == name && t.service_type != ServiceType::Hostfs)
        };
        let mut gone: Vec<(String, PathBuf)> = mounted
            .iter()
            .filter(|one| one.target.parent() == Some(&folder))
            .filter_map(|one| Some((one.target.file_name()?.to_str()?.to_string(), one.target.clone())))
            .filter(|(name, _)| !known(name))
            .collect();
        sorting::sort(&mut gone);
        gone.dedup();
        for (target, path) in gone {
            let found = find(&path, &mounted, &register);
            let (action, why) = decide(None, &found, backend);
            steps.push(Step { target, path, action, why, wanted: Ok(None) });
        }
    }
    Ok(ActivationPlan { deployment: id, steps })
}

fn find(path: &Path, mounted: &[MountinfoEntry], register: &[MountRecord]) -> Found {
    let mounted = mounted.iter().rfind(|one| one.target == path).cloned();
    let device = mounted.as_ref().map(|one| one.device.as_str());
    let record =
        register.iter().find(|one| one.target == path && Some(one.device.as_str()) == device).cloned();
    let health = record.as_ref().map(MountRecord::health);
    Found { mounted, record, health }
}

/// Returns what to do if `found` is mounted and `wanted` should be, and why.
fn decide(wanted: Option<&MountPlan>, found: &Found, backend: Backend) -> (Action, String) {
    let Some(mounted) = &found.mounted else {
        return (if wanted.is_some() { Action::Mount } else { Action::Keep }, String::new());
    };
    if found.record.is_none() && !mounted.is_ours() {
        return (Action::Refuse, format!("a mount of type {} is there, which is not ours", mounted.kind));
    }
    let Some(wanted) = wanted else {
        return (Action::Unmount, "the running deployment has no such target".into());
    };
    let Some(record) = &found.record else {
        return (Action::Mend, "its mount was never finished".into());
    };
    if found.health == Some(Health::DaemonDead) {
        return (Action::Mend, "its daemon is gone".into());
    }
    // Only root can write the records; the layers are still compared, as they are what is verified.
    if record.digest != wanted.digest() || record.layers != LayerRecord::of(wanted) || !record.verified {
        let old = record.digest.map_or("another image".into(), |digest| digest.to_string());
        return (Action::Remount, format!("{old} is mounted"));
    }
    if record.shift.is_some() {
        return (Action::Remount, "it is mounted with other ids".into());
    }
    let other = Backend::NAMES.iter().find(|(_, one)| *one == backend && backend != Backend::Auto);
    match other {
        Some((name, _)) if *name != record.backend => {
            (Action::Remount, format!("it is mounted through {}", record.backend))
        }
        _ => (Action::Keep, String::new()),
    }
}

/// How to mount targets.
pub struct MountOptions<'a> {
    /// The backend.
    pub backend: Backend,
    /// The unit of the daemon of a target's FUSE mount, by name and mount point; none if it is forked.
    pub unit: &'a dyn Fn(&str, &Path) -> Option<Unit>,
    /// The blobs of a target that is about to be mounted, by name and image, if they are not all in the store.
    pub blobs: &'a dyn Fn(&str, &OciImage) -> Result<Option<Arc<dyn Blobs>>, AnyError>,
}

/// Applies the plan, target by target; a failure of one does not stop the others.
///
/// The caller holds the lock.
pub fn apply(
    plan: ActivationPlan,
    run: &Path,
    options: &MountOptions<'_>,
) -> Result<Vec<CompletedStep>, IoError> {
    let folder = targets_dir(run);
    file::create_folders(&folder)?;
    failpoint::hit("activate.plan.made");
    let take = |step: Step| {
        let Step { target, path, action, why, wanted } = step;
        let outcome = match take(&target, &path, action, &why, wanted, &folder, options) {
            Ok(outcome) => outcome,
            Err(error) => Outcome::Failed(error),
        };
        CompletedStep { target, path, action, outcome }
    };
    Ok(plan.steps.into_iter().map(take).collect())
}

fn take(
    target: &str,
    path: &Path,
    action: Action,
    why: &str,
    wanted: Result<Option<(OciImage, MountPlan)>, AnyError>,
    folder: &Path,
    options: &MountOptions<'_>,
) -> Result<Outcome, AnyError> {
    if action == Action::Refuse {
        let path = path.to_path_buf();
        return Err(ForeignMountError { path, why: why.to_string() }.into());
    }
    let wanted = wanted?;
    if action == Action::Keep {
        let register = table::mounts()?;
        let backend = register.into_iter().find(|one| one.target == path).map(|one| one.backend);
        return Ok(Outcome::Done(backend));
    }
    // Find every possible problem of the new image before unmounting the old one. The folder belongs to
    // mosfs, so the target will be at this path even if it is only created below.
    let place = folder.canonicalize().on("find", folder)?.join(target);
    // Whatever is opened for blobs that are fetched is their daemon's.
    let others = sys::daemon::open_descriptors();
    let mut foreign = None;
    let wanted = match wanted {
        Some((image, plan)) => Some(match (options.blobs)(target, &image)? {
            Some(blobs) => {
                foreign = Some(others);
                MountPlan::new(target, &image, &blobs, Verification::default())?
            }
            None => plan,
        }),
        None => None,
    };
    let prepare = |plan| {
        let daemon = (options.unit)(target, &place).map_or(Daemon::Forked, Daemon::Unit);
        let (backend, flags) = (options.backend, flags());
        Request { backend, flags, daemon, foreign, ..Request::new(plan, &place) }.prepare()
    };
    let prepared = wanted.as_ref().map(prepare).transpose()?;
    failpoint::hit("activate.mount.prepared");
    if action != Action::Mount
        && let Some(users) = clear(path, action == Action::Mend)?
    {
        return Ok(Outcome::Busy(users));
    }
    failpoint::hit("activate.place.cleared");
    let Some(prepared) = prepared else {
        // Remove only an empty folder of mosfs.
        let _ = fs::remove_dir(path);
        return Ok(Outcome::Done(None));
    };
    match file::create_folder(&place, 0o755) {
        Err(error) if error.source.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
        _ => {}
    }
    failpoint::hit("activate.place.made");
    let mounted = prepared.attach()?;
    failpoint::hit("activate.mount.attached");
    Ok(Outcome::Done(Some(mounted.backend.to_string())))
}

/// The flags of each target's mount: see the module documentation.
pub fn flags() -> MountFlags {
    MountFlags { nosuid: true, nodev: true, ..MountFlags::default() }
}

/// Unmounts what is mounted at a target's path; returns its users if it is in use.
///
/// `of_no_use`: the mount serves no requests, so it is detached at once, even if files in it are still open.
fn clear(path: &Path, of_no_use: bool) -> Result<Option<Users>, MountError> {
    if of_no_use {
        // First its unit: it would mount again what is unmounted here.
        units::stop(path, None);
    }
    for _ in 0..MOST_STACKED {
        match table::mounted_at(path)? {
            Some(one) if one.is_ours() => {}
            Some(other) => {
                return Err(MountError::NotOurs { target: path.to_path_buf(), found: Some(other.kind) });
            }
            None => return Ok(None),
        }
        match mount::unmount(path, of_no_use) {
            // The place is free; a daemon serves copies of the mount until they go.
            Ok(()) | Err(MountError::Daemon { .. }) => {}
            Err(MountError::Unmount { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {
                return Ok(Some(holders::of(path)));
            }
            Err(error) => return Err(error),
        }
    }
    Err(MountError::NotOurs { target: path.to_path_buf(), found: None })
}

/// A foreign mount is at a target's path.
#[derive(Debug, thiserror::Error)]
#[error("nothing is mounted at {}: {why}", path.display())]
struct ForeignMountError {
    path: PathBuf,
    why: String,
}

impl Classified for ForeignMountError {
    fn class(&self) -> Class {
        Class::Failure
    }
}

impl NotActive {
    /// Adds what else is not as it should be.
    pub fn add(&mut self, reasons: Vec<String>, class: Class) {
        self.reasons.extend(reasons);
        self.class = super::choice::graver(self.class, class);
        self.only_busy = false;
    }
}

/// Requires that every target is correct.
///
/// # Errors
/// [`NotActive`] with the class of the most serious reason.
pub fn verdict(taken: &[CompletedStep]) -> Result<(), NotActive> {
    let mut reasons = Vec::new();
    let mut classes = Vec::new();
    let mut only_busy = true;
    for one in taken {
        match &one.outcome {
            Outcome::Done(_) => {}
            Outcome::Busy(users) => {
                let what = if one.action == Action::Unmount { "stays mounted" } else { "stays as it was" };
                reasons.push(format!("target {} {what}, it is in use by {users}", one.target));
                classes.push(Class::Failure);
            }
            Outcome::Failed(error) => {
                let words = error.to_string();
                reasons.push(format!("target {}: {}", one.target, without_target(&one.target, &words)));
                classes.push(error.class());
                only_busy = false;
            }
        }
    }
    match classes.into_iter().reduce(super::choice::graver) {
        None => Ok(()),
        Some(class) => Err(NotActive { reasons, only_busy, class }),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::digest::Digest;
    use crate::image::blobs::{Blob, BlobFolder};
    use crate::image::oci::{LayerDescriptor, Trust};
    use crate::mount::{LayerBytes, PlannedLayer};
    use crate::sys::file::Links;

    fn wanted() -> MountPlan {
        let media_type = "application/vnd.stacker.image.layer.squashfs+zstd+verity";
        let trust = Trust::RootHash(Digest::of(b"root"));
        let descriptor = LayerDescriptor::new(media_type, Digest::of(b"layer"), 4096, trust);
        let layer = PlannedLayer { descriptor, bytes: LayerBytes::One(Blob::File("/layer".into())) };
        let blobs = Arc::new(BlobFolder::of_layout(Path::new("/"), Links::Refused));
        MountPlan::of_layers("app", Some(Digest::of(b"image")), vec![layer], blobs)
    }

    fn found(change: impl FnOnce(&mut MountRecord)) -> Found {
        let plan = wanted();
        let mut record = MountRecord {
            format: 1,
            source: "app".into(),
            target: "/t/app".into(),
            digest: plan.digest(),
            layers: LayerRecord::of(&plan),
            backend: "fuse".into(),
            verified: true,
            device: "0:9".into(),
            daemon: None,
            shift: None,
            lazy: Vec::new(),
        };
        change(&mut record);
        let mounted = MountinfoEntry {
            device: "0:9".into(),
            target: "/t/app".into(),
            kind: "fuse.mosfs".into(),
            source: "app".into(),
        };
        Found { mounted: Some(mounted), record: Some(record), health: Some(Health::Good) }
    }

    #[test]
    fn only_what_differs_is_remounted() {
        let wanted = wanted();
        let action = |found: &Found, backend| decide(Some(&wanted), found, backend).0;
        assert_eq!(action(&found(|_| ()), Backend::Auto), Action::Keep);
        assert_eq!(action(&found(|_| ()), Backend::Fuse), Action::Keep);
        assert_eq!(action(&found(|_| ()), Backend::DmVerity), Action::Remount);
        assert_eq!(action(&found(|r| r.digest = Some(Digest::of(b"old"))), Backend::Auto), Action::Remount);
        assert_eq!(action(&found(|r| r.layers[0].root_hash = None), Backend::Auto), Action::Remount);
        assert_eq!(action(&found(|r| r.verified = false), Backend::Auto), Action::Remount);
        assert_eq!(action(&Found::default(), Backend::Auto), Action::Mount);
        let errors = Found { health: Some(Health::Errors), ..found(|_| ()) };
        assert_eq!(action(&errors, Backend::Auto), Action::Keep);
        let dead = Found { health: Some(Health::DaemonDead), ..found(|_| ()) };
        assert_eq!(action(&dead, Backend::Auto), Action::Mend);
        let unrecorded = Found { record: None, health: None, ..found(|_| ()) };
        assert_eq!(action(&unrecorded, Backend::Auto), Action::Mend);
        let mut foreign = unrecorded.clone();
        foreign.mounted.as_mut().unwrap().kind = "tmpfs".into();
        assert_eq!(action(&foreign, Backend::Auto), Action::Refuse);
        assert_eq!(decide(None, &found(|_| ()), Backend::Auto).0, Action::Unmount);
        assert_eq!(decide(None, &foreign, Backend::Auto).0, Action::Refuse);
    }

    #[test]
    fn the_gravest_reason_is_the_exit_code() {
        let taken = |outcome| CompletedStep {
            target: "a".into(),
            path: "/a".into(),
            action: Action::Remount,
            outcome,
        };
        assert!(verdict(&[taken(Outcome::Done(None))]).is_ok());
        let busy = verdict(&[taken(Outcome::Busy(Users::default()))]).unwrap_err();
        assert_eq!((busy.class(), busy.only_busy), (Class::Failure, true));
        let bad = DeployError::MissingBlob { target: "a".into(), digest: Digest::of(b"x") };
        let both = [taken(Outcome::Busy(Users::default())), taken(Outcome::Failed(bad.into()))];
        let both = verdict(&both).unwrap_err();
        assert_eq!((both.class(), both.only_busy, both.reasons.len()), (Class::Verification, false, 2));
    }
}
