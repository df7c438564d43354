//! Boot: from the initramfs, choose a deployment, verify it, check the floor, mount the root.
//!
//! ```text
//! partition   find the system partition and mount it (untrusted: nosuid, nodev, noexec)
//! floor       read it from the TPM; its index must have the expected Name
//! read        state, try spent where it is a pending one, images complete
//! signature   manifest, signature, certificate, product; then version >= floor
//! layers      loop and dm-verity devices, or the start of the FUSE daemon
//! tree        overlay, attached at the sysroot
//! measure     extend PCR 15 with the manifest's digest
//! hand over   SYSTEM and CONFIG where the booted system finds them; /run/mosfs/boot.json
//! ```
//!
//! The choice itself, with its fallback, is [`crate::deploy::choice`].
//!
//! **Trust.** CONFIG lies in the initramfs, which whoever signs the kernel vouches for. The partition
//! and the kernel command line are anybody's ([`cmdline`]).
//!
//! **The PCR.** It is number 15, in the SHA-256 bank, extended once with the digest H3 of the system
//! manifest. The Linux TPM PCR registry gives 15 to the "system identity": what the initramfs found the
//! root file system to be. PCRs 0 to 7 are the firmware's, 8 to 14 those of boot loader, kernel and
//! IMA; 16 and 23 can be reset at run time. So a key that is sealed to PCR 15 opens only for one
//! signed system, and an attestation shows which one ran. It is extended after the root is mounted and
//! before anything of it runs.

pub mod cmdline;
pub mod partition;

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cmdline::{BootOptions, Overlay};

use crate::deploy::booted::BootRecord;
use crate::deploy::choice::{self, Role};
use crate::deploy::state::Refusal;
use crate::deploy::{DeployError, DeploymentId, System, target};
use crate::error::{AnyError, Class, Classified, IoContext, IoError};
use crate::failpoint;
use crate::floor::{self, Config, Floor, FloorError, Place};
use crate::manifest::ServiceType;
use crate::mount::kernel::overlay::Upper;
use crate::mount::{Request, Timing};
use crate::sys::file::{self, Links};
use crate::sys::mountapi::{self, FsContext, MountError as CallError};
use crate::sys::tpm::{Tpm, TpmError};
use crate::trust::{Anchor, AnchorError, Verified};

/// The PCR that is extended with the manifest's digest (see the module's text).
pub const PCR: u32 = 15;

/// Where a boot finds and leaves things.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Where the system partition is mounted, or is to be.
    pub system: PathBuf,
    /// The trusted configuration.
    pub config: PathBuf,
    /// Where the root is mounted for switch_root.
    pub sysroot: PathBuf,
    /// The folder of what lives as long as this boot (`/run/mosfs`).
    pub run_dir: PathBuf,
    /// Where the floor is.
    pub floor: Place,
    /// How long to wait for the system partition.
    pub patience: Duration,
}

/// A boot that is ready to be handed over to.
#[derive(Debug)]
pub struct Report {
    /// The deployment that runs.
    pub deployment: DeploymentId,
    /// In which capacity.
    pub role: Role,
    /// The deployments that were refused before it, and why.
    pub refused: Vec<Refusal>,
    /// The target that is the root.
    pub target: String,
    /// Who serves it: `dm-verity` or `fuse`.
    pub backend: &'static str,
    /// Where writes to it go.
    pub overlay: Overlay,
    /// How long each phase took.
    pub phases: Vec<(&'static str, Duration)>,
}

/// Why a system is not booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The system partition did not appear.
    #[error("no system partition: {partition} with an ext4, xfs or btrfs file system did not appear within {} s", waited.as_secs())]
    NoPartition {
        /// What was looked for.
        partition: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The kernel refused a mount.
    #[error("cannot mount {what}: {source}")]
    Mount {
        /// What was to be mounted.
        what: String,
        /// The call that failed.
        source: CallError,
    },
    /// The trusted configuration names no overlay that we know.
    #[error("{}: `{found}` is not an overlay; expected scratch, tmpfs or ro", path.display())]
    BadOverlay {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: String,
    },
    /// The command line asks for less than the trusted configuration demands.
    #[error(
        "kernel command line: mosfs.overlay={asked}: the product's configuration allows nothing less strict than {allowed}"
    )]
    LaxOverlay {
        /// What the command line asks for.
        asked: &'static str,
        /// What CONFIG/overlay says, or the default.
        allowed: &'static str,
    },
    /// The system has no such target.
    #[error("the system has no target {wanted}, found {found}")]
    NoTarget {
        /// The name, or `of service type hostfs`.
        wanted: String,
        /// The names that it has.
        found: String,
    },
    /// The anchor cannot be had.
    #[error(transparent)]
    Anchor(#[from] AnchorError),
    /// The floor cannot be opened.
    #[error(transparent)]
    Floor(#[from] FloorError),
    /// No deployment could be started.
    #[error(transparent)]
    Deploy(#[from] DeployError),
    /// The TPM did not take the measurement.
    #[error("cannot extend PCR {PCR} with {digest}: {source}")]
    Measure {
        /// The digest of the system manifest.
        digest: crate::digest::Digest,
        /// The TPM's answer.
        source: TpmError,
    },
    /// A file could not be used.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for BootError {
    fn class(&self) -> Class {
        match self {
            Self::Anchor(error) => error.class(),
            Self::Floor(error) => error.class(),
            Self::Deploy(error) => error.class(),
            Self::Measure { .. } => Class::Tpm,
            Self::BadOverlay { .. } | Self::LaxOverlay { .. } | Self::NoTarget { .. } => Class::Input,
            Self::NoPartition { .. } | Self::Mount { .. } | Self::Io(_) => Class::Failure,
        }
    }
}

/// What mounting a deployment's root gives.
struct Started {
    digest: crate::digest::Digest,
    target: String,
    backend: &'static str,
    layers: Duration,
    tree: Duration,
}

/// Boots: all that is between the initramfs and switch_root.
///
/// # Errors
/// Where no deployment can be started. Nothing is left at the sysroot then.
pub fn boot(setup: &Setup, options: &BootOptions) -> Result<Report, BootError> {
    let clock = Instant::now();
    let overlay = overlay(&setup.config, options.overlay)?;
    // What is wrong with the trusted configuration is said before a disk is waited for.
    let anchor = Anchor::load(&setup.config)?;
    let mut floor = floor::open(&setup.floor, &Config::load(&setup.config)?)?;
    if let Some(warning) = floor.warning() {
        log::warn!("{warning}");
    }
    mount_partition(setup, options)?;
    let partition = clock.elapsed();

    let floor_time = Cell::new(Duration::ZERO);
    let verified_at = Cell::new(clock);
    let system = System::at(&setup.system);
    let mut timed = TimedFloor { inner: floor.as_mut(), time: &floor_time };
    let begin = Instant::now();
    let booted = choice::choose(&system, &anchor, &mut timed, |verified, _| {
        verified_at.set(Instant::now());
        start(setup, &system, options, overlay, verified)
    })?;
    let read = (verified_at.get() - begin).saturating_sub(floor_time.get() + booted.verifying);
    // A TPM behind a socket takes one connection at a time.
    drop(floor);

    let begin = Instant::now();
    let done = measure(setup, &booted.started.digest).and_then(|()| hand_over(setup));
    if let Err(error) = done {
        let _ = mountapi::unmount(&setup.sysroot, true);
        return Err(error);
    }
    let phases = vec![
        ("partition", partition),
        ("floor", floor_time.get()),
        ("read", read),
        ("signature", booted.verifying),
        ("layers", booted.started.layers),
        ("tree", booted.started.tree),
        ("measure and hand over", begin.elapsed()),
        ("all", clock.elapsed()),
    ];
    let record = BootRecord {
        deployment: booted.deployment,
        backend: booted.started.backend.into(),
        phases_ms: phases.iter().map(|(name, time)| (name.to_string(), time.as_secs_f64() * 1e3)).collect(),
    };
    record.save(&setup.run_dir.join("boot.json"))?;
    failpoint::hit("boot.root.ready");
    Ok(Report {
        deployment: booted.deployment,
        role: booted.role,
        refused: booted.refused,
        target: booted.started.target,
        backend: booted.started.backend,
        overlay,
        phases,
    })
}

/// No file CONFIG/overlay is longer, in bytes.
const MAX_OVERLAY_BYTES: u64 = 4096;

/// The overlay: what CONFIG/overlay says (default tmpfs), or something stricter that the command line asks for.
fn overlay(config: &Path, asked: Option<Overlay>) -> Result<Overlay, BootError> {
    let path = config.join("overlay");
    let allowed = match file::find_regular(&path, Links::Followed, MAX_OVERLAY_BYTES)? {
        Some(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let found = || text.trim().chars().take(40).collect();
            Overlay::parse(text.trim()).ok_or_else(|| BootError::BadOverlay { path, found: found() })?
        }
        None => Overlay::Tmpfs,
    };
    match asked {
        // Rule (docs/design.md, kernel command line): no word can lower what CONFIG demands.
        Some(asked) if asked < allowed => {
            Err(BootError::LaxOverlay { asked: asked.name(), allowed: allowed.name() })
        }
        Some(asked) => Ok(asked),
        None => Ok(allowed),
    }
}

/// Finds the system partition and mounts it, unless something is mounted there already.
fn mount_partition(setup: &Setup, options: &BootOptions) -> Result<(), BootError> {
    if setup.system.join("state.json").exists() {
        return Ok(());
    }
    let wanted = &options.partition;
    let found = partition::find(wanted, setup.patience)
        .ok_or_else(|| BootError::NoPartition { partition: wanted.to_string(), waited: setup.patience })?;
    log::info!("system partition: {} ({}), {wanted}", found.device.display(), found.file_system);
    file::create_folders(&setup.system)?;
    let mount = || {
        let context = FsContext::open(found.file_system)?;
        context.set_string("source", found.device.as_os_str().as_encoded_bytes())?;
        // Nothing on it is trusted: no programs, no devices, no setuid. What is executed comes
        // from verified layers, whose devices and modes are those of the layer's own mount.
        let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
        mountapi::attach(context.mount(attributes)?, &setup.system)
    };
    mount().map_err(|source| BootError::Mount { what: found.device.display().to_string(), source })
}

/// Mounts the root of a verified deployment at the sysroot.
fn start(
    setup: &Setup,
    system: &System,
    options: &BootOptions,
    overlay: Overlay,
    verified: &Verified,
) -> Result<Started, AnyError> {
    let targets = &verified.manifest().targets;
    let found = match &options.target {
        Some(name) => targets.get_key_value(name.as_str()),
        None => targets.iter().find(|(_, target)| target.service_type == ServiceType::Hostfs),
    };
    let (name, signed) = found.ok_or_else(|| BootError::NoTarget {
        wanted: options.target.clone().unwrap_or_else(|| "of service type hostfs".into()),
        found: targets.keys().map(|name| name.as_str()).collect::<Vec<_>>().join(", "),
    })?;
    let name = name.as_str();
    let store = system.store()?;
    let plan = target::plan(&store, name, signed)?;
    let upper = match overlay {
        Overlay::ReadOnly => None,
        Overlay::Tmpfs => Some(Upper::Memory),
        Overlay::Scratch => {
            let folder = system.scratch_dir(name);
            Some(Upper::Folder { upper: folder.join("upper"), work: folder.join("work") })
        }
    };
    file::create_folders(&setup.sysroot)?;
    let request =
        Request { backend: options.backend, upper: upper.as_ref(), ..Request::new(&plan, &setup.sysroot) };
    let mounted = request.run()?;
    if let Some(why) = &mounted.not_dm_verity {
        log::warn!("dm-verity is not used: {why}");
    }
    let Timing { layers, tree } = mounted.timing;
    let (digest, target) = (verified.digest(), name.to_string());
    Ok(Started { digest, target, backend: mounted.backend, layers, tree })
}

/// Extends the PCR. The development floor stands for a machine without a TPM.
fn measure(setup: &Setup, digest: &crate::digest::Digest) -> Result<(), BootError> {
    let Place::Tpm(tcti, budget) = &setup.floor else { return Ok(()) };
    Tpm::open(tcti, *budget)
        .and_then(|tpm| tpm.pcr_extend(PCR, digest.as_bytes()))
        .map_err(|source| BootError::Measure { digest: *digest, source })
}

/// Shows SYSTEM and CONFIG to the booted system: both live on in `/run`, and are mounted at their
/// usual places where the image has folders for them.
fn hand_over(setup: &Setup) -> Result<(), BootError> {
    let config = setup.run_dir.join("config");
    file::create_folders(&config)?;
    for entry in fs::read_dir(&setup.config).on("list", &setup.config)? {
        let entry = entry.on("list", &setup.config)?;
        if entry.file_type().on("look at", entry.path())?.is_file() {
            let to = config.join(entry.file_name());
            fs::copy(entry.path(), &to).on("copy", entry.path())?;
        }
    }
    for (from, place) in [(&setup.system, "var/lib/mosfs"), (&config, "etc/mosfs")] {
        let to = setup.sysroot.join(place);
        if !is_plain_folder(&setup.sysroot, place) {
            log::info!("{} is not in the image: see {}", to.display(), from.display());
            continue;
        }
        mountapi::clone_mount(from)
            .and_then(|mount| mountapi::attach(mount, &to))
            .map_err(|source| BootError::Mount { what: to.display().to_string(), source })?;
    }
    Ok(())
}

/// Whether every part of the path is a folder, not a link that would lead out of the sysroot.
fn is_plain_folder(root: &Path, place: &str) -> bool {
    let mut path = root.to_path_buf();
    place.split('/').all(|part| {
        path.push(part);
        fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir())
    })
}

/// Counts the time that the floor takes.
struct TimedFloor<'a> {
    inner: &'a mut dyn Floor,
    time: &'a Cell<Duration>,
}

impl Floor for TimedFloor<'_> {
    fn read(&mut self) -> Result<u64, FloorError> {
        let begin = Instant::now();
        let result = self.inner.read();
        self.time.set(self.time.get() + begin.elapsed());
        result
    }

    fn raise(&mut self, version: u64, signature: &[u8]) -> Result<(), FloorError> {
        self.inner.raise(version, signature)
    }

    fn needs_signature(&self) -> bool {
        self.inner.needs_signature()
    }

    fn place(&self) -> String {
        self.inner.place()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_can_only_be_stricter_than_the_configuration() {
        use Overlay::{ReadOnly, Scratch, Tmpfs};
        let dir = tempfile::tempdir().unwrap();
        let of = |asked| overlay(dir.path(), asked);
        assert_eq!(of(None).unwrap(), Tmpfs);
        assert_eq!(of(Some(ReadOnly)).unwrap(), ReadOnly);
        let error = of(Some(Scratch)).unwrap_err();
        assert!(matches!(error, BootError::LaxOverlay { asked: "scratch", allowed: "tmpfs" }));
        assert_eq!(error.class(), Class::Input);
        fs::write(dir.path().join("overlay"), "scratch\n").unwrap();
        assert_eq!(of(None).unwrap(), Scratch);
        assert_eq!(of(Some(Tmpfs)).unwrap(), Tmpfs);
        fs::write(dir.path().join("overlay"), "ro").unwrap();
        assert!(matches!(of(Some(Tmpfs)).unwrap_err(), BootError::LaxOverlay { .. }));
        fs::write(dir.path().join("overlay"), "rw").unwrap();
        assert!(matches!(of(None).unwrap_err(), BootError::BadOverlay { .. }));
    }

    #[test]
    fn links_do_not_lead_out_of_the_sysroot() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("var/lib/mosfs")).unwrap();
        fs::create_dir_all(dir.path().join("out/mosfs")).unwrap();
        std::os::unix::fs::symlink("out", dir.path().join("etc")).unwrap();
        assert!(is_plain_folder(dir.path(), "var/lib/mosfs"));
        assert!(!is_plain_folder(dir.path(), "etc/mosfs"));
        assert!(!is_plain_folder(dir.path(), "none"));
    }
}
