//! Boot: from the initramfs, choose a deployment, verify it, check the floor, mount the root.
//!
//! ```text
//! floor       wait for the TPM and read it; its index must have the expected Name
//! partition   find the system partition, check it (e2fsck) and mount it (untrusted: nosuid, nodev, noexec); the next
//!             one where this one boots nothing
//! read        state, try spent where it is a pending one, images complete
//! signature   manifest, signature, certificate, product; then version >= floor
//! layers      loop and dm-verity devices, or the start of the FUSE daemon
//! tree        overlay, attached at the sysroot
//! hand over   SYSTEM and CONFIG where the booted system finds them; /run/mosfs/boot.json
//! measure     extend PCR 15 with what was booted
//! ```
//!
//! The choice itself, with its fallback, is [`crate::deploy::choice`].
//!
//! **Trust.** CONFIG lies in the initramfs, which whoever signs the kernel vouches for. The partition
//! and the kernel command line are anybody's ([`cmdline`]).
//!
//! **The PCR.** A boot that is handed over extends PCR 15 once with what it is, as the last step before anything of
//! it runs; whoever calls [`boot`] extends it with [`measure::REFUSED`] where that fails ([`refuse`]).
//! PCRs 0 to 7 are the firmware's, 8 to 14 those of boot loader, kernel and IMA; 16 and 23 can be reset at run
//! time. So a key that is sealed to PCR 15 opens only for one signed system in one form, and an attestation
//! shows which one ran ([`mod@measure`]).
//!
//! **Waiting.** TPM and system partition are waited for together, [`Setup::patience`] in all. Each device that may be
//! the partition is tried once ([`candidates`]).

pub mod candidates;
pub mod check;
pub mod cmdline;
pub mod e2fsck;
pub mod event_log;
pub mod init;
pub mod measure;
pub mod settings;

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candidates::{Candidate, PassedOver, Search};
use cmdline::{BootOptions, Overlay};
use measure::{Identity, MeasureError};
use settings::{Settings, SettingsError};

use crate::deploy::booted::BootRecord;
use crate::deploy::choice;
use crate::deploy::kernel::{self, RunningKernelError};
use crate::deploy::state::Refusal;
use crate::deploy::{DeployError, DeploymentId, System, check_images, target};
use crate::digest::Digest;
use crate::error::{AnyError, Class, Classified, IoContext, IoError};
use crate::floor::{self, Floor, FloorError, FloorLocation};
use crate::mount::kernel::overlay::Upper;
use crate::mount::{Request, Timing};
use crate::sys::failpoint;
use crate::sys::file;
use crate::sys::mountapi::{self, CallError};
use crate::sys::tpm::TpmError;
use crate::trust::{Anchor, ConfigError, Verified};

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
    pub floor: FloorLocation,
    /// How long to wait for the TPM and the system partition.
    pub patience: Duration,
    /// The watchdog that was started, which is fed while a file system is checked.
    pub watchdog: Option<PathBuf>,
}

/// The longest time that the TPM is given to appear, and to take the measurement of a boot that failed.
const REFUSE_WITHIN: Duration = Duration::from_secs(10);

/// A boot that is ready to be handed over to.
#[derive(Debug)]
pub struct Report {
    /// The deployment that runs.
    pub deployment: DeploymentId,
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
    #[error(
        "no system partition: {partition} with an ext4, xfs or btrfs file system did not appear within {} s{}",
        waited.as_secs(), list(passed_over)
    )]
    NoPartition {
        /// What was looked for.
        partition: String,
        /// How long it was waited for.
        waited: Duration,
        /// Devices that were not taken.
        passed_over: Vec<PassedOver>,
    },
    /// A device with the right name holds no system that can be booted.
    #[error("{}: {why}", device.display())]
    BadPartition {
        /// Its node.
        device: PathBuf,
        /// Why it was passed over.
        why: String,
    },
    /// Devices cannot be looked at.
    #[error("cannot load libblkid, which identifies what is on a disk: {0}")]
    NoBlkid(std::io::Error),
    /// The kernel refused a mount.
    #[error("cannot mount {what}: {source}")]
    Mount {
        /// What was to be mounted.
        what: String,
        /// The call that failed.
        source: CallError,
    },
    /// The trusted configuration says something else.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The anchor cannot be had.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The floor cannot be opened.
    #[error(transparent)]
    Floor(#[from] FloorError),
    /// No deployment could be started.
    #[error(transparent)]
    Deploy(#[from] DeployError),
    /// The boot could not be measured.
    #[error(transparent)]
    Measure(#[from] MeasureError),
    /// It is not known which kernel runs.
    #[error(transparent)]
    Kernel(#[from] RunningKernelError),
    /// A file could not be used.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for BootError {
    fn class(&self) -> Class {
        match self {
            Self::Config(error) => error.class(),
            Self::Floor(error) => error.class(),
            Self::Deploy(error) => error.class(),
            Self::Settings(error) => error.class(),
            Self::Measure(error) => error.class(),
            Self::Kernel(error) => error.class(),
            Self::NoPartition { .. }
            | Self::BadPartition { .. }
            | Self::NoBlkid(_)
            | Self::Mount { .. }
            | Self::Io(_) => Class::Failure,
        }
    }
}

fn list(passed_over: &[PassedOver]) -> String {
    passed_over.iter().map(|one| format!("; {} was passed over: {}", one.device.display(), one.why)).collect()
}

/// The result of mounting a deployment's root.
struct Started {
    digest: Digest,
    target: String,
    backend: &'static str,
    layers: Duration,
    tree: Duration,
}

/// Boots: all that is between the initramfs and switch_root. `say` gets a sentence for each thing that goes another
/// way than usual, when it happens.
///
/// # Errors
/// Where no deployment can be started. Nothing is left at the sysroot then, and PCR 15 is not extended unless
/// its extension itself is what failed: see [`refuse`].
pub fn boot(setup: &Setup, options: &BootOptions, say: &dyn Fn(&str)) -> Result<Report, BootError> {
    let clock = Instant::now();
    // What is wrong with the trusted configuration is said before a device is waited for.
    let settings = Settings::load(&setup.config)?;
    let overlay = settings.overlay(options.overlay)?;
    let anchor = Anchor::load(&setup.config)?;
    let config = measure::config_digest(&setup.config)?;
    let kernel = kernel::running(&setup.config)?;
    let mut floor = floor::open(&setup.floor, &setup.config)?;
    if let Some(warning) = floor.warning() {
        say(warning);
    }
    let floor_time = Cell::new(Duration::ZERO);
    let mut patient = PatientFloor { inner: floor.as_mut(), time: &floor_time, end: clock + setup.patience };
    if matches!(setup.floor, FloorLocation::Tpm(..)) {
        // What cannot be trusted stops the boot, whatever is on the disks.
        patient.read()?;
    }
    let mut attempt = Attempt {
        setup,
        options,
        settings: &settings,
        overlay,
        anchor: &anchor,
        floor: &mut patient,
        kernel,
        say,
    };
    let (chosen, partition) = find_and_choose(&mut attempt, clock)?;
    // A TPM behind a socket takes one connection at a time.
    drop(floor);

    let begin = Instant::now();
    let started = &chosen.booted.started;
    let identity = Identity { manifest: started.digest, target: &started.target, overlay, config };
    let mut phases = vec![
        ("partition", partition),
        ("floor", floor_time.get()),
        ("read", chosen.reading.saturating_sub(floor_time.get())),
        ("signature", chosen.booted.verifying),
        ("layers", started.layers),
        ("tree", started.tree),
    ];
    let done = hand_over(setup).and_then(|()| {
        let record = BootRecord {
            deployment: chosen.booted.deployment,
            backend: started.backend.into(),
            phases_ms: phases
                .iter()
                .map(|(name, time)| (name.to_string(), time.as_secs_f64() * 1e3))
                .collect(),
        };
        record.save(&setup.run_dir.join("boot.json"))?;
        // Last: nothing can fail once the PCR says that this system runs.
        measure(setup, &identity, say)
    });
    if let Err(error) = done {
        undo(setup);
        return Err(error);
    }
    phases.push(("measure and hand over", begin.elapsed()));
    phases.push(("all", clock.elapsed()));
    failpoint::hit("boot.root.ready");
    Ok(Report {
        deployment: chosen.booted.deployment,
        refused: chosen.booted.refused,
        target: chosen.booted.started.target,
        backend: chosen.booted.started.backend,
        overlay,
        phases,
    })
}

/// Closes PCR 15 after a boot that failed: an attacker who gets at the machine now cannot make it claim that a good system runs.
///
/// A TPM that is not there yet is waited for, at most `patience`: what fails at once must not be faster than its driver.
///
/// # Errors
/// Where the TPM did not take it.
pub fn refuse(place: &FloorLocation, patience: Duration) -> Result<(), BootError> {
    let FloorLocation::Tpm(tcti, budget) = place else { return Ok(()) };
    let end = Instant::now() + patience.min(REFUSE_WITHIN);
    loop {
        match measure::extend(tcti, (*budget).min(REFUSE_WITHIN), measure::REFUSED) {
            Err(MeasureError::Tpm { source: TpmError::Absent { .. } }) if Instant::now() < end => {
                std::thread::sleep(LOOK_FOR_TPM_EVERY);
            }
            result => return Ok(result.map(|_| ())?),
        }
    }
}

/// What the choice of a deployment needs.
struct Attempt<'a, 'f> {
    setup: &'a Setup,
    options: &'a BootOptions,
    settings: &'a Settings,
    overlay: Overlay,
    anchor: &'a Anchor,
    floor: &'a mut PatientFloor<'f>,
    kernel: Option<Digest>,
    say: &'a dyn Fn(&str),
}

/// A deployment whose root is mounted.
struct Chosen {
    booted: choice::Booted<Started>,
    /// How long everything but verifying and mounting took.
    reading: Duration,
}

impl Attempt<'_, '_> {
    /// Chooses among the deployments of what is mounted at SYSTEM.
    fn choose(&mut self) -> Result<Chosen, BootError> {
        let system = System::at(&self.setup.system);
        let begin = Instant::now();
        let verified_at = Cell::new(begin);
        let (setup, settings, options, overlay) = (self.setup, self.settings, self.options, self.overlay);
        let booted = choice::choose(&system, self.anchor, self.floor, self.kernel, |verified, _| {
            verified_at.set(Instant::now());
            start(setup, &system, settings, options, overlay, verified)
        })?;
        if let Some(damage) = &booted.damage {
            let path = system.state_path();
            (self.say)(&format!(
                "{} cannot be used: {damage}; the highest version that verifies is taken",
                path.display()
            ));
        }
        let reading = (verified_at.get() - begin).saturating_sub(booted.verifying);
        Ok(Chosen { booted, reading })
    }

    /// Mounts a candidate at SYSTEM and chooses among its deployments. It stays mounted only where one is started.
    fn try_candidate(&mut self, candidate: &Candidate) -> Result<Chosen, BootError> {
        let place = &self.setup.system;
        let bad = |why| BootError::BadPartition { device: candidate.device.clone(), why };
        let mounted =
            candidate.mount(self.setup.patience, self.setup.watchdog.as_deref(), self.say).map_err(bad)?;
        if mounted.read_only {
            (self.say)(&format!(
                "{} cannot be written: a pending version, whose tries are counted there, is not tried",
                candidate.device.display()
            ));
        }
        file::create_folders(place)?;
        mountapi::attach(mounted.mount, place)
            .map_err(|source| BootError::Mount { what: candidate.device.display().to_string(), source })?;
        self.choose().inspect_err(|_| {
            let _ = mountapi::unmount(place, true);
        })
    }
}

/// Finds a system partition with a deployment that can be started, and starts it. With it comes how long the
/// partition took.
fn find_and_choose(attempt: &mut Attempt<'_, '_>, clock: Instant) -> Result<(Chosen, Duration), BootError> {
    let setup = attempt.setup;
    // Somebody has mounted it: then that is the one.
    if ["state.json", "deployments"].iter().any(|name| setup.system.join(name).symlink_metadata().is_ok()) {
        let partition = clock.elapsed();
        return Ok((attempt.choose()?, partition));
    }
    let wanted = &attempt.options.partition;
    let mut search = Search::new(wanted, clock, setup.patience).map_err(BootError::NoBlkid)?;
    let mut gravest: Option<BootError> = None;
    for candidate in search.by_ref() {
        let partition = clock.elapsed();
        log::info!("system partition: {} ({}), {wanted}", candidate.device.display(), candidate.file_system);
        let error = match attempt.try_candidate(&candidate) {
            Ok(chosen) => return Ok((chosen, partition)),
            // A floor that cannot be trusted is not the disk's fault.
            Err(BootError::Deploy(DeployError::Floor(error))) => return Err(error.into()),
            Err(error) => error,
        };
        (attempt.say)(&match &error {
            error @ BootError::BadPartition { .. } => format!("{error}; looking for another one"),
            error => format!("{}: {error}; looking for another one", candidate.device.display()),
        });
        let is_graver = |before: &BootError| choice::graver(before.class(), error.class()) != before.class();
        if gravest.as_ref().is_none_or(is_graver) {
            gravest = Some(error);
        }
    }
    Err(gravest.unwrap_or_else(|| BootError::NoPartition {
        partition: wanted.to_string(),
        waited: setup.patience,
        passed_over: search.passed_over(),
    }))
}

/// Takes away what was mounted at the sysroot. The daemon of a FUSE root ends with it.
fn undo(setup: &Setup) {
    for (_, place) in HANDED_OVER {
        if is_plain_folder(&setup.sysroot, place) {
            let _ = mountapi::unmount(&setup.sysroot.join(place), true);
        }
    }
    let _ = mountapi::unmount(&setup.sysroot, true);
}

/// Mounts the root of a verified deployment at the sysroot.
fn start(
    setup: &Setup,
    system: &System,
    settings: &Settings,
    options: &BootOptions,
    overlay: Overlay,
    verified: &Verified,
) -> Result<Started, AnyError> {
    let (name, signed) = settings.root(verified.manifest(), options.target.as_deref())?;
    // The images of others may be damaged: that is no reason to have no system at all.
    check_images(system, verified, |other| std::ptr::eq(other, signed))?;
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
fn measure(setup: &Setup, identity: &Identity<'_>, say: &dyn Fn(&str)) -> Result<(), BootError> {
    let FloorLocation::Tpm(tcti, budget) = &setup.floor else { return Ok(()) };
    if let Some(error) = measure::extend(tcti, *budget, &identity.event())? {
        say(&format!("the measurement is not in the event log: {error}"));
    }
    Ok(())
}

/// Where the booted system finds what it was booted with: whether it is CONFIG (else SYSTEM), and where below its root.
const HANDED_OVER: [(bool, &str); 2] = [(false, "var/lib/mosfs"), (true, "etc/mosfs")];

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
    for (is_config, place) in HANDED_OVER {
        let from = if is_config { &config } else { &setup.system };
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

/// Waits for the TPM, as for the disk, and counts the time that the floor takes.
struct PatientFloor<'a> {
    inner: &'a mut dyn Floor,
    time: &'a Cell<Duration>,
    /// Until when a TPM that is not there is waited for.
    end: Instant,
}

/// How often a TPM that is not there is looked for.
const LOOK_FOR_TPM_EVERY: Duration = Duration::from_millis(50);

impl Floor for PatientFloor<'_> {
    fn read(&mut self) -> Result<u64, FloorError> {
        let begin = Instant::now();
        // Drivers of TPMs behind SPI, or in firmware, find theirs when the disks are long there.
        let result = loop {
            match self.inner.read() {
                Err(FloorError::Tpm(TpmError::Absent { .. })) if Instant::now() < self.end => {
                    std::thread::sleep(LOOK_FOR_TPM_EVERY);
                }
                result => break result,
            }
        };
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
