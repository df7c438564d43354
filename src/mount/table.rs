//! The register of what is mounted: one file for each mount, in a folder that only its owner writes.
//!
//! ```text
//! root      /run/mosfs/mounts/MAJOR-MINOR.json      MAJOR-MINOR.log and MAJOR-MINOR.lock beside it
//! others    $XDG_RUNTIME_DIR/mosfs/mounts/…, or /tmp/mosfs-UID/mounts/… (mode 0700, owned by the user)
//! ```
//! The first of these that can be had is used: the root of a user namespace cannot have `/run/mosfs`. Where none can
//! be had, a mount is made all the same and has no record.
//!
//! A mount is known by its device number, which is its own while it is mounted. A record counts only
//! while the kernel lists a mount of that device at its target (`/proc/self/mountinfo`; without /proc, the target is
//! asked); any other is stale and is removed once its daemon has ended.
//!
//! **Whether a daemon lives** is asked of the mount: a FUSE connection without a daemon returns `ENOTCONN`. Where
//! there is no such mount to ask (the daemon is below an overlay, or serves copies of a mount that was unmounted), it
//! lives while somebody holds its `.lock` (flock). Process numbers are for people: other PID namespaces count otherwise.
//!
//! **Lock.** Device numbers come back too, so a stale record and a new one can have one name. Whoever writes
//! a record, or removes one as stale, holds `lock` (flock) in the folder, and looks again under it.

use std::ffi::OsString;
use std::fs::{self, TryLockError};
use std::io::{self, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::backend::{DM_VERITY, FUSE_KIND, OVERLAY_SOURCE_PREFIX};
use super::engine::trouble::Counts;
use super::ids::IdShift;
use super::kernel::dm_verity;
use super::plan::{MountPlan, Planned, PlannedLayer};
use crate::digest::Digest;
use crate::error::{IoContext, IoError};
use crate::image::blobs::BlobProgress;
use crate::image::oci::LayerDescriptor;
use crate::image::plain::Check;
use crate::sorting;
use crate::sys::file::{self, Links};
use crate::sys::flock::Lock;
use crate::sys::{self};

/// A record is at most this long: 1,000 layers are about 200 KiB.
const MOST_BYTES: u64 = 1 << 20;

/// What is known of one mount. Stable: this is what `mosfs status --json` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRecord {
    /// Version of this format, 1.
    pub format: u32,
    /// What was asked for, as the user wrote it: a target, an OCI source or a file.
    pub source: String,
    /// Where it is mounted. In JSON, bytes that are no UTF-8 and backslashes are `\\OOO`, in octal.
    #[serde(with = "path_text")]
    pub target: PathBuf,
    /// Digest of the image's OCI manifest; a plain file has none.
    pub digest: Option<Digest>,
    /// The layers, the bottom one first.
    pub layers: Vec<LayerRecord>,
    /// Which backend serves it: `fuse` or `dm-verity`.
    pub backend: String,
    /// Whether every block is verified; false with `--unsafe-no-verity`.
    pub verified: bool,
    /// Device number of the mount, `MAJOR:MINOR`.
    pub device: String,
    /// The daemon that serves it, if it has one.
    pub daemon: Option<DaemonRecord>,
    /// Where user and group ids are moved to, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shift: Option<IdShift>,
    /// How much is here of the layers that come from another machine, if any do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lazy: Vec<BlobProgress>,
}

/// A layer of a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerRecord {
    /// Digest of the layer's blob; a plain file has none.
    pub digest: Option<Digest>,
    /// Root hash of its tree; `None` where it is not verified, or verified by the digests of its blobs.
    pub root_hash: Option<Digest>,
}

/// The daemon of a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DaemonRecord {
    /// Its process id.
    pub pid: u32,
    /// When it started, in clock ticks since boot (proc(5), /proc/PID/stat, field 22).
    pub start_ticks: u64,
    /// Its log file.
    pub log: Option<PathBuf>,
    /// The file that it holds a lock of as long as it lives; its name is the device number of its connection.
    #[serde(default)]
    pub lock: Option<PathBuf>,
    /// What went wrong so far.
    pub errors: Counts,
}

/// How a mount is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Nothing is known against it.
    Good,
    /// It is served, and some reads failed.
    Errors,
    /// The kernel met a block of it that its root hash does not cover, and refuses such blocks.
    Corrupt,
    /// The daemon is gone and every access fails; unmount and mount again.
    DaemonDead,
}

impl LayerRecord {
    /// The records of a plan's layers. A plain file is one.
    pub fn of(plan: &MountPlan) -> Vec<Self> {
        let of = |layer: &PlannedLayer| {
            let LayerDescriptor { digest, trust, .. } = &layer.descriptor;
            Self { digest: Some(*digest), root_hash: trust.root_hash() }
        };
        match &plan.content {
            Planned::Image { layers, .. } => layers.iter().map(of).collect(),
            Planned::File { file, .. } => {
                let root_hash = match file.check {
                    Check::RootHash { root_hash, .. } => Some(root_hash),
                    Check::UnsafeNoVerity => None,
                };
                vec![Self { digest: None, root_hash }]
            }
        }
    }
}

impl MountRecord {
    /// The record of a plan that is mounted, with the device number of the mount.
    pub fn new(
        plan: &MountPlan,
        target: &Path,
        backend: &str,
        (major, minor): (u32, u32),
        daemon: Option<DaemonRecord>,
    ) -> Self {
        Self {
            format: 1,
            source: plan.source.clone(),
            target: target.to_path_buf(),
            digest: plan.digest(),
            layers: LayerRecord::of(plan),
            backend: backend.into(),
            verified: plan.is_verified(),
            device: format!("{major}:{minor}"),
            daemon,
            shift: None,
            lazy: plan.remote().map(|blobs| blobs.progress()).unwrap_or_default(),
        }
    }

    /// How the mount is now.
    pub fn health(&self) -> Health {
        match &self.daemon {
            Some(daemon) if !self.is_served(daemon) => Health::DaemonDead,
            Some(daemon) if daemon.errors.total() > 0 => Health::Errors,
            _ if self.corrupt_device().is_some() => Health::Corrupt,
            _ => Health::Good,
        }
    }

    /// Whether somebody answers for the mount.
    fn is_served(&self, daemon: &DaemonRecord) -> bool {
        let is_own = |(major, minor)| self.device == format!("{major}:{minor}");
        // Another mount may lie on top of it.
        let found = sys::fuse::device_of(&self.target).is_ok_and(is_own).then(|| is_served(&self.target));
        found.flatten().unwrap_or_else(|| daemon.is_alive())
    }

    /// Whether both are of one mount, whatever was counted meanwhile.
    fn is_of_same_mount(&self, other: &Self) -> bool {
        let process = |record: &Self| record.daemon.as_ref().map(|daemon| (daemon.pid, daemon.start_ticks));
        (&self.device, &self.target, process(self)) == (&other.device, &other.target, process(other))
    }

    /// The first of its dm-verity devices that has status C; only root can ask for it.
    pub fn corrupt_device(&self) -> Option<String> {
        let hashes = self.layers.iter().filter_map(|layer| layer.root_hash);
        (self.backend == DM_VERITY).then(|| dm_verity::corrupt_device(hashes))?
    }

    /// The name of the record's files, without their endings.
    fn stem(&self) -> String {
        self.device.replace(':', "-")
    }
}

impl DaemonRecord {
    /// Whether that very process still runs.
    pub fn is_alive(&self) -> bool {
        match &self.lock {
            Some(path) => is_locked(path),
            None => sys::process::started_at(self.pid) == Some(self.start_ticks),
        }
    }

    /// Whether its connection to the kernel still has a mount somewhere: the one that it was made for, or a copy in
    /// another place or namespace. `None` where the kernel does not say.
    pub fn is_mounted_somewhere(&self) -> Option<bool> {
        let device = self.lock.as_ref()?.file_stem()?.to_str()?.replace('-', ":");
        // Each FUSE file system has a backing device of its own, which goes with its last mount.
        let folder = Path::new("/sys/class/bdi");
        folder.is_dir().then(|| folder.join(device).exists())
    }
}

/// Whether somebody holds the lock of a file.
fn is_locked(path: &Path) -> bool {
    let Ok((file, _)) = file::open_regular(path, Links::Refused) else { return false };
    matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// How long the daemon of a mount may take to answer whether it is there.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// Whether the FUSE mount at `target` has a daemon; `None` where it is none, or cannot be asked. A daemon that does not
/// answer is there: it may have been stopped, or have much to do.
pub(super) fn is_served(target: &Path) -> Option<bool> {
    let (sender, receiver) = mpsc::channel();
    let question = target.to_path_buf();
    let ask = move || {
        let _ = sender.send(sys::fuse::is_served(&question));
    };
    // Where the daemon never answers, the thread waits in the system call, and is left there.
    let thread = std::thread::Builder::new().name(sys::daemon::ABANDONED.into()).spawn(ask).ok()?;
    match receiver.recv_timeout(ANSWER_WITHIN) {
        Ok(answer) => {
            // A process that forks must not have it any more.
            let _ = thread.join();
            answer.ok().flatten()
        }
        Err(_) => Some(true),
    }
}

/// Where this user's records may be, the best place first.
fn places() -> Vec<PathBuf> {
    let (uid, _) = sys::daemon::effective_ids();
    let mut places = Vec::new();
    if uid == 0 {
        places.push(sys::run_dir().join("mounts"));
    }
    if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute())
    {
        places.push(dir.join("mosfs/mounts"));
    }
    places.push(format!("/tmp/mosfs-{}/mounts", sys::daemon::outer_uid(uid)).into());
    places
}

/// The folders of this user's records that there are.
fn folders() -> impl Iterator<Item = PathBuf> {
    places().into_iter().filter(|folder| check_own(folder).is_ok())
}

/// The folder of this user's records, made where it is missing; `None` where none can be had.
///
/// # Errors
/// Where the last choice is not a folder, belongs to somebody else, or others may write to it: in /tmp anybody
/// can make that name first.
fn own_folder() -> Result<Option<PathBuf>, IoError> {
    let mut last = None;
    for folder in places() {
        match make_own(&folder) {
            Ok(()) => return Ok(Some(folder)),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) if error.source.raw_os_error().is_none() => Err(error),
        Some(error) => {
            log::warn!("there is no place for records of mounts: {error}");
            Ok(None)
        }
        None => Ok(None),
    }
}

fn make_own(folder: &Path) -> Result<(), IoError> {
    let is_of_system = *folder == sys::run_dir().join("mounts");
    if is_of_system && let Some(above) = folder.ancestors().nth(2) {
        file::create_folders(above)?;
    }
    for dir in [folder.parent(), Some(folder)].into_iter().flatten() {
        match file::create_folder(dir, if is_of_system { 0o755 } else { 0o700 }) {
            Err(error) if error.source.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => check_own(dir)?,
        }
    }
    Ok(())
}

/// Rule: records count in a folder that only this user can write.
fn check_own(dir: &Path) -> Result<(), IoError> {
    let (uid, _) = sys::daemon::effective_ids();
    let found = fs::symlink_metadata(dir).on("look at", dir)?;
    if !found.is_dir() || found.uid() != uid || found.mode() & 0o022 != 0 {
        let why = format!(
            "expected a folder of user {uid} that only they can write, found user {}, mode {:o}",
            found.uid(),
            found.mode()
        );
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why)).on("use", dir);
    }
    Ok(())
}

/// Where the files of a mount with this device number go, without their endings; `None` where there is no place.
pub(super) fn files_of((major, minor): (u32, u32)) -> Result<Option<PathBuf>, IoError> {
    Ok(own_folder()?.map(|folder| folder.join(format!("{major}-{minor}"))))
}

/// Writes or replaces the record of a mount, where there is a place for it.
pub fn write(record: &MountRecord) -> Result<(), IoError> {
    match own_folder()? {
        Some(folder) => write_in(&folder, record, &lock(&folder)?),
        None => Ok(()),
    }
}

/// Makes a folder this process' own one, for what is done `here`.
///
/// A daemon that is started in an initramfs stays in it when the root is switched: `/run` moves away
/// from under its path, but a working directory goes along.
pub(super) fn enter(folder: &Path) -> Result<(), IoError> {
    std::env::set_current_dir(folder).on("enter", folder)
}

/// Writes the first record of a daemon's mount after [`enter`], and takes the lock that shows that this process lives.
pub(super) fn register_here(record: &MountRecord) -> Result<Lock, IoError> {
    let here = Path::new(".");
    let all = lock(here)?;
    let path = PathBuf::from(format!("{}.lock", record.stem()));
    // One of an earlier mount of this number; nobody may find that one instead of ours.
    let _ = fs::remove_file(&path);
    let alive = Lock::exclusive(&path).on("lock", &path)?;
    write_in(here, record, &all)?;
    Ok(alive)
}

/// Does what [`write()`] does after [`enter`].
pub(super) fn write_here(record: &MountRecord) -> Result<(), IoError> {
    let here = Path::new(".");
    write_in(here, record, &lock(here)?)
}

/// Does what [`remove`] does after [`enter`].
pub(super) fn remove_here(record: &MountRecord) {
    remove_in(Path::new("."), record);
}

fn write_in(folder: &Path, record: &MountRecord, _: &Lock) -> Result<(), IoError> {
    let path = folder.join(format!("{}.json", record.stem()));
    let temp = folder.join(format!(".{}.{}", record.stem(), std::process::id()));
    let text = serde_json::to_vec(record).map_err(io::Error::other).on("write", &path)?;
    // No fsync: what is mounted is gone after a power cut, and so is /run.
    let written = file::create_file(&temp, 0o644)
        .and_then(|mut file| file.write_all(&text).on("write", &temp))
        .and_then(|()| fs::rename(&temp, &path).on("rename", &temp));
    written.map_err(|error| {
        // A full file system is the likeliest cause.
        let _ = fs::remove_file(&temp);
        // Who reads the error is in another folder.
        let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_path_buf());
        IoError::new("write", folder.join(path.file_name().unwrap_or_default()), error.source)
    })
}

/// The record of the mount with this device number.
pub(super) fn find((major, minor): (u32, u32)) -> Option<MountRecord> {
    folders().find_map(|folder| read(&folder.join(format!("{major}-{minor}.json"))))
}

fn lock(folder: &Path) -> Result<Lock, IoError> {
    let path = folder.join("lock");
    Lock::exclusive(&path).on("lock", &path)
}

/// Removes the record and the log of a mount, unless another mount's record has the name by now.
pub fn remove(record: &MountRecord) {
    folders().for_each(|folder| remove_in(&folder, record));
}

fn remove_in(folder: &Path, record: &MountRecord) {
    // Without the lock nothing is removed: a stale record does no harm.
    let Ok(_lock) = lock(folder) else { return };
    let path = |ending: &str| folder.join(format!("{}.{ending}", record.stem()));
    if read(&path("json")).is_some_and(|found| found.is_of_same_mount(record)) {
        for ending in ["json", "log", "lock"] {
            let _ = fs::remove_file(path(ending));
        }
    }
}

/// The mounts of this user that are mounted now. Stale records are removed on the way.
pub fn mounts() -> Result<Vec<MountRecord>, IoError> {
    let mut all = Vec::new();
    for folder in folders() {
        for entry in fs::read_dir(&folder).on("list", &folder)? {
            let path = entry.on("list", &folder)?.path();
            if path.extension().is_some_and(|ending| ending == "json")
                && let Some(record) = read(&path)
            {
                all.push(record);
            }
        }
    }
    // Read after the records, so that a mount that is just being made is not taken for a stale one.
    let mounted = listed(all.iter().map(|record| record.target.as_path()))?;
    for at in 0..all.len() {
        // The root of a booted system was mounted elsewhere, and moved by switch_root.
        let device = &all[at].device;
        let is_at = |target: &Path| mounted.iter().any(|one| one.device == *device && one.target == target);
        let moved = !is_at(&all[at].target) && is_at(Path::new("/"));
        // A daemon below an overlay counts its errors in the record of its own mount.
        let errors = all[at].daemon.as_ref().and_then(|daemon| {
            let same = |one: &&DaemonRecord| (one.pid, one.start_ticks) == (daemon.pid, daemon.start_ticks);
            let all = all.iter().filter_map(|record| record.daemon.as_ref()).filter(same);
            all.max_by_key(|one| one.errors.total()).map(|one| one.errors.clone())
        });
        let record = &mut all[at];
        if moved {
            record.target = "/".into();
        }
        if let (Some(daemon), Some(errors)) = (&mut record.daemon, errors) {
            daemon.errors = errors;
        }
    }
    all.retain(|record| {
        let live = mounted.iter().any(|one| one.device == record.device && one.target == record.target);
        // A daemon that lives and has no mount any more is about to end, and removes its record itself.
        if !live && !record.daemon.as_ref().is_some_and(DaemonRecord::is_alive) {
            remove(record);
        }
        live
    });
    sorting::sort_by(&mut all, |a, b| a.target.cmp(&b.target));
    Ok(all)
}

fn read(path: &Path) -> Option<MountRecord> {
    let text = file::read_regular(path, Links::Refused, MOST_BYTES).ok()?;
    serde_json::from_slice(&text).ok()
}

/// A path as JSON text without loss.
mod path_text {
    use std::os::unix::ffi::OsStrExt;
    use std::path::{Path, PathBuf};

    use super::{OsString, OsStringExt, unescape};
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        let mut text = String::new();
        for chunk in path.as_os_str().as_bytes().utf8_chunks() {
            text.push_str(&chunk.valid().replace('\\', "\\134"));
            for byte in chunk.invalid() {
                text.push_str(&format!("\\{byte:03o}"));
            }
        }
        to.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        let text = String::deserialize(from)?;
        Ok(OsString::from_vec(unescape(text.as_bytes())).into())
    }
}

/// One line of /proc/self/mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountinfoEntry {
    /// Device number, `MAJOR:MINOR`.
    pub device: String,
    /// Where it is mounted.
    pub target: PathBuf,
    /// Type of the file system, `fuse.mosfs` for ours.
    pub kind: String,
    /// What the mount table shows as its device.
    pub source: String,
}

impl MountinfoEntry {
    /// Whether it looks like a mount that mosfs made, whatever the register says.
    pub fn is_ours(&self) -> bool {
        self.kind == FUSE_KIND || self.kind == "overlay" && self.source.starts_with(OVERLAY_SOURCE_PREFIX)
    }
}

/// What the kernel lists as mounted in this process' name space.
pub fn mounted() -> Result<Vec<MountinfoEntry>, IoError> {
    let path = "/proc/self/mountinfo";
    let text = fs::read(path).on("read", path)?;
    Ok(text.split(|&byte| byte == b'\n').filter_map(parse_mountinfo).collect())
}

/// The topmost mount at `target`.
pub fn mounted_at(target: &Path) -> Result<Option<MountinfoEntry>, IoError> {
    Ok(listed([target])?.into_iter().rfind(|one| one.target == target))
}

/// What the kernel lists as mounted. Without /proc (a bare chroot), the topmost mounts at these targets, whose type and
/// source are then not known.
fn listed<'a>(targets: impl IntoIterator<Item = &'a Path>) -> Result<Vec<MountinfoEntry>, IoError> {
    match mounted() {
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => {}
        result => return result,
    }
    let look = |target: &Path| {
        let found = sys::fuse::identity_of(target).ok().filter(|found| found.is_mount_root == Some(true))?;
        let (major, minor) = found.device;
        let (kind, source) = (String::new(), String::new());
        Some(MountinfoEntry { device: format!("{major}:{minor}"), target: target.into(), kind, source })
    };
    Ok(targets.into_iter().filter_map(look).collect())
}

/// Reads a line of mountinfo (proc(5)): id, parent, device, root, target, options, …, `-`, type, source, options.
fn parse_mountinfo(line: &[u8]) -> Option<MountinfoEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = String::from_utf8(fields.nth(2)?.to_vec()).ok()?;
    let target = unescape(fields.nth(1)?);
    let mut rest = fields.skip_while(|field| *field != b"-");
    rest.next()?;
    let kind = String::from_utf8(rest.next()?.to_vec()).ok()?;
    let source = String::from_utf8_lossy(&unescape(rest.next()?)).into_owned();
    Some(MountinfoEntry { device, target: PathBuf::from(OsString::from_vec(target)), kind, source })
}

/// Undoes the octal escapes of mountinfo: `\040` for a space.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = |digits: &[u8]| {
            digits.iter().try_fold(0u32, |value, &digit| {
                matches!(digit, b'0'..=b'7').then(|| value * 8 + u32::from(digit - b'0'))
            })
        };
        match tail.get(..3).and_then(octal) {
            Some(value @ 0..=255) if first == b'\\' => {
                out.push(value as u8);
                rest = &tail[3..];
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_its_escapes() {
        let line = b"36 35 98:0 /mnt1 /a\\040b\\134\xff rw,noatime master:1 shared:2 - fuse.mosfs oci:x rw";
        let target = OsString::from_vec(b"/a b\\\xff".to_vec()).into();
        let (kind, source) = ("fuse.mosfs".into(), "oci:x".into());
        let expected = MountinfoEntry { device: "98:0".into(), target, kind, source };
        assert!(expected.is_ours());
        assert_eq!(parse_mountinfo(line), Some(expected));
        assert_eq!(parse_mountinfo(b"36 35"), None);
        assert_eq!(unescape(b"\\9\\777\\04"), b"\\9\\777\\04");
    }

    #[test]
    fn a_process_is_known_by_its_start() {
        let me = std::process::id();
        let ticks = sys::process::started_at(me).unwrap();
        let daemon =
            DaemonRecord { pid: me, start_ticks: ticks, log: None, lock: None, errors: Counts::default() };
        assert!(daemon.is_alive());
        assert!(!DaemonRecord { start_ticks: ticks + 1, ..daemon }.is_alive());
    }
}
