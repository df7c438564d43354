//! Everything that can be refused, and then the steps of a setup.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::disk::{self, Choice, Disk};
use super::error::SetupError;
use super::floor::FloorPlan;
use super::layout::{self, ESP_AT, ESP_BYTES, SYSTEM_AT, TAIL_BYTES};
use crate::deploy::esp::{self, Esp};
use crate::deploy::offer::Accepted;
use crate::deploy::plan::{self, PlanOptions};
use crate::deploy::{DeploymentId, FloorGate, System, apply, check};
use crate::error::{AnyError, IoContext, IoError};
use crate::image::oci::{Descriptor, MANIFEST};
use crate::medium::fat::{self, Volume};
use crate::progress::Progress;
use crate::store::{fsck, image_repository};
use crate::sys::blkid::{self, Content};
use crate::sys::disk::{
    add_partition, lock, open_exclusive, open_to_read, read_partitions_again, sector_bytes,
};
use crate::sys::failpoint;
use crate::sys::file;
use crate::sys::mountapi::FsContext;
use crate::transport::{OciDir, Transport};
use crate::trust::Anchor;

/// The label of the system partition.
const LABEL: &str = "mosfs";
/// The file system of the system partition.
const FILE_SYSTEM: &str = "ext4";
/// Space that a system partition has beyond the blobs of the first system, in bytes: the journal and other data of the
/// file system.
const RESERVE: u64 = 64 << 20;
/// How long the kernel may take to show new partitions, and udev to look at the disk.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often they are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Whether a disk may be erased.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wipe {
    /// Only if it is empty.
    No,
    /// The one that the choice means.
    Chosen,
    /// This one.
    Disk(PathBuf),
}

/// What is to be set up.
pub struct Request<'a> {
    /// Where the system comes from.
    pub from: &'a dyn Transport,
    /// The same, if it is a layout of this machine: its blobs are checked before anything is written.
    pub layout: Option<&'a OciDir>,
    /// The system, verified.
    pub offer: Accepted,
    /// What it was verified against.
    pub anchor: &'a Anchor,
    /// The floor.
    pub floor: FloorPlan<'a>,
    /// The disk.
    pub choice: Choice,
    /// Whether it may be erased.
    pub wipe: Wipe,
    /// The kernel's name of the disk that the system comes from, if it comes from one.
    pub medium: Option<String>,
    /// Where to report progress.
    pub progress: &'a Progress,
}

/// How a setup ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The deployment.
    pub id: DeploymentId,
    /// The disk.
    pub disk: PathBuf,
    /// Whether it was there already, and nothing was written.
    pub already: bool,
}

/// What is on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
enum OnDisk {
    /// Nothing, or what may be lost.
    Free,
    /// What an interrupted setup left, before it had installed the system.
    UnderWay,
    /// The system, by an interrupted setup.
    NotFinished,
    /// The system.
    Installed,
}

/// A setup that nothing speaks against.
pub struct Prepared<'a> {
    request: Request<'a>,
    disk: Disk,
    found: OnDisk,
    id: DeploymentId,
}

/// Checks everything that can be refused. Nothing is written.
///
/// # Errors
/// [`SetupError`]; `NotWhole` if the source's blobs are not what was signed.
pub fn prepare<'a>(request: Request<'a>, say: &dyn Fn(&str, &str)) -> Result<Prepared<'a>, AnyError> {
    let manifest = request.offer.verified.manifest();
    let id = DeploymentId { version: manifest.version, digest: request.offer.verified.digest() };
    let bytes = check_source(&request)?;
    let checked = if request.layout.is_some() { ", every block verified" } else { "" };
    let text = format!("version {} ({}), {}{checked}", id.version, id.digest, disk::size(bytes));
    say("medium", &text);
    let is_ours = |disk: &Disk| matches!(on_disk(disk, &id), Ok((Some(_), _)));
    let disk = disk::choose(&request.choice, request.medium.as_deref(), is_ours)?;
    let found = check_disk(&request, &disk, &id, bytes)?;
    let what = match found {
        OnDisk::Free => disk
            .holds
            .as_ref()
            .map_or("is empty".into(), |holds| format!("holds {holds}, and will be erased")),
        OnDisk::UnderWay => "has an interrupted setup, which begins again".into(),
        OnDisk::NotFinished => "has the system of an interrupted setup, which is continued".into(),
        OnDisk::Installed => format!("has version {} already", id.version),
    };
    say("disk", &format!("{} ({}) {what}", disk.path.display(), disk::size(disk.size_bytes)));
    say("floor", &request.floor.sentence());
    Ok(Prepared { request, disk, found, id })
}

/// Reads every blob of the system where that is possible; returns how many bytes it has.
fn check_source(request: &Request<'_>) -> Result<u64, AnyError> {
    // Targets share layers, and what is shared is there once.
    let mut blobs = BTreeMap::new();
    for (name, target) in &request.offer.verified.manifest().targets {
        let image = Descriptor::new(MANIFEST, target.digest, target.size);
        let place = request.from.within(&image_repository(name.as_str()))?;
        let read = place.as_ref().image(&image)?;
        blobs.extend(read.manifest.layers.iter().map(|layer| (layer.digest, layer.size)));
        if let Some(layout) = request.layout {
            let object = format!("target `{name}`");
            fsck::check_image(layout, &image, &object, fsck_threads(), request.progress)?.verdict(&object)?;
        }
    }
    Ok(blobs.into_values().fold(0, u64::saturating_add))
}

fn fsck_threads() -> std::num::NonZeroUsize {
    thread::available_parallelism().unwrap_or(std::num::NonZeroUsize::MIN)
}

/// Rules: the module of [`disk`] lists them.
fn check_disk(request: &Request<'_>, disk: &Disk, id: &DeploymentId, bytes: u64) -> Result<OnDisk, AnyError> {
    let path = disk.path.clone();
    if disk.is_medium {
        return Err(SetupError::Medium { path }.into());
    }
    if let Some(by) = disk.used_by.clone() {
        return Err(SetupError::InUse { path, by }.into());
    }
    if disk.read_only {
        return Err(SetupError::ReadOnly { path }.into());
    }
    let device = open_exclusive(&path).map_err(|error| in_use(&path, error))?;
    let found = sector_bytes(&device).on("measure", &path)?;
    if found != 512 && found != 4096 {
        return Err(SetupError::Sectors { path, found }.into());
    }
    drop(device);
    let needed = (SYSTEM_AT + TAIL_BYTES + RESERVE).saturating_add(bytes).saturating_add(bytes / 16);
    if disk.size_bytes < needed {
        return Err(SetupError::TooSmall { path, found: disk.size_bytes, needed }.into());
    }
    if let Wipe::Disk(wipe) = &request.wipe
        && disk::name_of(wipe)? != disk.name
    {
        return Err(SetupError::OtherWipe { path, wipe: wipe.clone() }.into());
    }
    let (found, holds) = on_disk(disk, id)?;
    match (found, &request.wipe) {
        (Some(found), _) => Ok(found),
        (None, Wipe::No) => Err(SetupError::NotEmpty { path, holds }.into()),
        (None, _) => Ok(OnDisk::Free),
    }
}

fn in_use(path: &Path, error: io::Error) -> AnyError {
    if error.raw_os_error() == Some(libc::EBUSY) {
        let by = "another program has opened it for itself alone".to_string();
        return SetupError::InUse { path: path.to_path_buf(), by }.into();
    }
    IoError::new("open", path, error).into()
}

/// What is on a disk that nobody uses; `None`, and what it is, if it must not be lost.
fn on_disk(disk: &Disk, id: &DeploymentId) -> Result<(Option<OnDisk>, String), AnyError> {
    let Some(holds) = disk.holds.clone() else { return Ok((Some(OnDisk::Free), String::new())) };
    let device = open_to_read(&disk.path).on("open", &disk.path)?;
    let mark = layout::mark(&device).on("read", &disk.path)?;
    let whole = blkid::probe(&device).on("identify", &disk.path)?;
    if matches!(whole, Content::Superblock(_)) {
        return Ok((None, holds));
    }
    let ours = match mark {
        Some(mark) => layout::is_ours(&device, disk.size_bytes, mark).on("read", &disk.path)?,
        None => false,
    };
    drop(device);
    let installed = match disk.partition(2).filter(|(_, start)| *start == SYSTEM_AT) {
        Some((name, _)) => current_of(&Path::new("/dev").join(name)),
        None => None,
    };
    Ok(match (ours, installed) {
        (true, None) => (Some(OnDisk::UnderWay), holds),
        (true, Some(current)) if current == *id => (Some(OnDisk::NotFinished), holds),
        (false, Some(current)) if current == *id && mark.is_none() => (Some(OnDisk::Installed), holds),
        (_, Some(current)) => (None, format!("mosfs, version {}", current.version)),
        (false, None) => (None, holds),
    })
}

/// The current deployment of a system partition, if it is one. Nothing is written to it.
fn current_of(partition: &Path) -> Option<DeploymentId> {
    let device = open_to_read(partition).ok()?;
    match blkid::probe(&device).ok()? {
        Content::Superblock(found) if found.kind == FILE_SYSTEM && found.label == LABEL => {}
        _ => return None,
    }
    drop(device);
    let mounted = Mounted::new(partition, true).ok()?;
    System::at(&mounted.path).state().ok()?.current
}

/// A file system that is mounted for this process alone: it goes with it.
struct Mounted {
    _mount: OwnedFd,
    path: PathBuf,
}

impl Mounted {
    fn new(partition: &Path, read_only: bool) -> Result<Self, SetupError> {
        let mounted = || {
            let context = FsContext::open(FILE_SYSTEM)?;
            context.set_string("source", partition.as_os_str().as_encoded_bytes())?;
            let mut flags = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
            if read_only {
                // Without it, the journal would be replayed.
                context.set_flag("noload")?;
                context.set_flag("ro")?;
                flags |= libc::MOUNT_ATTR_RDONLY;
            }
            context.mount(flags)
        };
        let mount =
            mounted().map_err(|source| SetupError::Mount { path: partition.to_path_buf(), source })?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
        Ok(Self { _mount: mount, path })
    }
}

impl Prepared<'_> {
    /// How it would end if nothing was done.
    pub fn planned(&self) -> Outcome {
        let already = self.found == OnDisk::Installed;
        Outcome { id: self.id, disk: self.disk.path.clone(), already }
    }

    /// Sets up the disk. `say` gets each step with a sentence.
    ///
    /// # Errors
    /// [`SetupError`] and those of an installation. The next setup begins again or goes on.
    pub fn run(self, say: &dyn Fn(&str, &str)) -> Result<Outcome, AnyError> {
        let outcome = self.planned();
        if outcome.already {
            return Ok(outcome);
        }
        let Self { mut request, disk, found, id } = self;
        // Before the disk is written: a TPM that refuses leaves it as it was.
        request.floor.provision()?;
        let path = &disk.path;
        let guard = File::options().read(true).write(true).open(path).on("open", path)?;
        lock_disk(&guard, path)?;
        if found != OnDisk::NotFinished {
            say("partition", &format!("{}: an EFI system partition, and the system's", path.display()));
            let alone = open_exclusive(path).map_err(|error| in_use(path, error))?;
            layout::write(&alone, &disk)?;
            show_partitions(&alone, &disk)?;
        }
        let esp = partition(&disk, 1, ESP_AT)?;
        let system = partition(&disk, 2, SYSTEM_AT)?;
        if found != OnDisk::NotFinished {
            say("mkfs", &format!("{FILE_SYSTEM}, labelled {LABEL}, on {}", system.display()));
            make_file_system(&system)?;
            failpoint::hit("setup.filesystem.made");
            say("install", &format!("version {} on {}", id.version, system.display()));
            install(&mut request, &system)?;
            failpoint::hit("setup.system.installed");
        }
        say("verify", &format!("every block on {}", system.display()));
        verify(&request, &system)?;
        let files = kernels(&request, &system)?;
        let text = match files.keys().find(|name| name.starts_with("EFI/Linux/")) {
            Some(kernel) => format!("{kernel} on {}", esp.display()),
            None => format!("{} stays without a kernel: the system has none of its own", esp.display()),
        };
        say("esp", &text);
        write_esp(&esp, &files)?;
        failpoint::hit("setup.esp.written");
        layout::finish(&guard).on("write", path)?;
        failpoint::hit("setup.mark.removed");
        Ok(outcome)
    }
}

/// Locks a disk, which keeps udev away from it. udev itself holds a lock for a moment, while it looks at a disk that has just
/// appeared or changed (<https://systemd.io/BLOCK_DEVICE_LOCKING/>).
fn lock_disk(guard: &File, path: &Path) -> Result<(), AnyError> {
    let end = Instant::now() + PATIENCE;
    loop {
        match lock(guard) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                return Err(IoError::new("lock", path, error).into());
            }
            Err(_) if Instant::now() < end => thread::sleep(LOOK_EVERY),
            Err(_) => {
                let by = "another program has locked it".to_string();
                return Err(SetupError::InUse { path: path.to_path_buf(), by }.into());
            }
            Ok(()) => return Ok(()),
        }
    }
}

/// Has the kernel show the new partitions. One that reads no GPT, or none of this device, is told of them.
fn show_partitions(device: &File, disk: &Disk) -> Result<(), IoError> {
    let end = Instant::now() + PATIENCE;
    loop {
        match read_partitions_again(device) {
            // udev may be looking into a partition of before.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => {
                thread::sleep(LOOK_EVERY);
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            result => {
                result.on("read the partition table of", &disk.path)?;
                break;
            }
        }
    }
    for (number, begin, end) in layout::partitions(disk.size_bytes) {
        if disk.partition(number).is_none() {
            add_partition(device, number, begin, end - begin).on("add a partition of", &disk.path)?;
        }
    }
    Ok(())
}

/// Waits for the device of a partition.
fn partition(disk: &Disk, number: u32, start: u64) -> Result<PathBuf, SetupError> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some((name, found)) = disk.partition(number)
            && found == start
        {
            let device = Path::new("/dev").join(name);
            if device.exists() {
                return Ok(device);
            }
        }
        if Instant::now() >= end {
            let waited = PATIENCE.as_secs();
            return Err(SetupError::PartitionMissing { path: disk.path.clone(), number, start, waited });
        }
        thread::sleep(LOOK_EVERY);
    }
}

fn make_file_system(partition: &Path) -> Result<(), SetupError> {
    const PROGRAM: &str = "mke2fs";
    let failed = |why: String| SetupError::Program { program: PROGRAM, path: partition.to_path_buf(), why };
    let output = Command::new(PROGRAM)
        .args(["-q", "-F", "-t", FILE_SYSTEM, "-L", LABEL, "-m", "1"])
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1"])
        .arg(partition)
        .env_clear()
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(failed(format!("{}: {}", output.status, said.trim())))
}

fn install(request: &mut Request<'_>, partition: &Path) -> Result<(), AnyError> {
    let mounted = Mounted::new(partition, false)?;
    let system = System::at(&mounted.path);
    system.create()?;
    let lock = system.lock(|| {})?;
    let state = system.state()?;
    let mut opened = request.floor.open(&mounted.path);
    let mut gate = match &mut opened {
        Some((floor, policy)) => FloorGate::Enforced { floor: floor.as_mut(), policy: Some(policy.clone()) },
        None => FloorGate::Unprovisioned,
    };
    // The kernel is put onto its partition when everything else is there.
    let options = PlanOptions {
        again: false,
        read_blobs: true,
        esp: None,
        kernel: None,
        source: None,
        progress: request.progress,
    };
    let offer = Accepted {
        artifact: request.offer.artifact.clone(),
        referrers: request.offer.referrers.clone(),
        verified: request.offer.verified.clone(),
    };
    let plan = plan::plan(&system, &state, request.from, offer, request.anchor, &mut gate, &options)?;
    apply::apply(&system, &lock, request.from, &plan, request.progress)?;
    let folder = file::open_folder(&mounted.path).on("open", partition)?;
    file::sync_file_system(&folder).on("sync", partition)?;
    Ok(())
}

/// Reads everything from the disk: the file system was unmounted in between, so nothing of it is in memory.
fn verify(request: &Request<'_>, partition: &Path) -> Result<(), AnyError> {
    let mounted = Mounted::new(partition, false)?;
    let system = System::at(&mounted.path);
    let not_good = |problem: String| SetupError::NotGood { path: partition.to_path_buf(), problem };
    let checked = check::check(&system, request.anchor, request.floor.policy());
    if let Some(problem) = checked.problems.first() {
        return Err(not_good(problem.clone()).into());
    }
    let report = fsck::check(&system.store()?, fsck_threads(), request.progress)?;
    match report.problems.first() {
        Some(problem) => Err(not_good(problem.to_string()).into()),
        None => Ok(()),
    }
}

/// The files of the EFI system partition, by their paths.
fn kernels(
    request: &Request<'_>,
    partition: &Path,
) -> Result<std::collections::BTreeMap<String, Vec<u8>>, AnyError> {
    let mounted = Mounted::new(partition, false)?;
    let system = System::at(&mounted.path);
    let _lock = system.lock(|| {})?;
    let folder = mounted.path.join("esp.new");
    remove(&folder)?;
    file::create_folder(&folder, 0o700)?;
    let floor = request.floor.open(&mounted.path).and_then(|(mut floor, _)| floor.read().ok());
    esp::sync(&system, &Esp::at(&folder), None, floor)?.report();
    let files = fat::files(&folder)?;
    remove(&folder)?;
    Ok(files)
}

fn remove(folder: &Path) -> Result<(), IoError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(IoError::new("remove", folder, error)),
        _ => Ok(()),
    }
}

fn write_esp(
    partition: &Path,
    files: &std::collections::BTreeMap<String, Vec<u8>>,
) -> Result<(), SetupError> {
    let device = open_exclusive(partition).on("open", partition)?;
    let sector_bytes = sector_bytes(&device).on("measure", partition)?;
    let id = Uuid::new_v4().as_fields().0;
    let volume = Volume { size_bytes: ESP_BYTES, sector_bytes, id };
    let mut points = ["setup.esp.cleared", "setup.esp.laid", "setup.esp.named"].into_iter();
    let settle = |device: &mut &File| {
        device.sync_all()?;
        points.next().into_iter().for_each(failpoint::hit);
        Ok(())
    };
    fat::write(&device, volume, files, settle).on("write", partition)?;
    drop(device);
    // Nothing of a device stays in memory when the last one closes it.
    let device = open_exclusive(partition).on("open", partition)?;
    if !fat::is_on(&device, volume, files).on("read", partition)? {
        return Err(SetupError::ReadBack { path: partition.to_path_buf() });
    }
    Ok(())
}
