//! Mounts: what is planned, the backends that do it, and the register of what is mounted.
//!
//! ```text
//! plan.rs       MountPlan (pure): layers with their root hashes, from a checked manifest
//! engine/       reads a merged view: block cache, errors. Free of FUSE
//! fuse/         backend: the engine as a FUSE mount with a daemon of its own
//! kernel/       backend: dm-verity layers under the kernel's overlayfs
//! units.rs      daemons in units of systemd
//! table.rs      /run/mosfs/mounts: what is mounted, by whom, how it is
//! holders.rs    who uses a mount that is busy
//! log.rs        where daemons write
//! ```
//! A backend is one file and one row in [`Backend`].

pub mod engine;
pub mod fuse;
pub mod holders;
pub mod kernel;
mod log;
mod plan;
pub mod table;
pub mod units;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

pub use plan::{MountPlan, PlannedLayer};
pub use table::{Health, MountRecord, mounts};

use crate::digest::Digest;
use crate::error::{Class, Classified, IoError};
use crate::image::layer::LayerError;
use crate::image::overlay::OverlayError;
use crate::image::source::ReadError;
use crate::image::verity::VerityError;
use crate::sys;

/// Who serves a mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Backend {
    /// dm-verity where the user is root and the kernel can, else FUSE.
    #[default]
    Auto,
    /// The kernel: loop, dm-verity, squashfs or erofs, overlayfs.
    DmVerity,
    /// A daemon that reads and verifies in user space.
    Fuse,
}

impl Backend {
    /// The names that `--backend` takes.
    pub const NAMES: [(&'static str, Backend); 3] =
        [("auto", Backend::Auto), ("dm-verity", Backend::DmVerity), ("fuse", Backend::Fuse)];
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        by_name(&Self::NAMES, text, "is not a backend")
    }
}

/// The value of that name; else a sentence with the names that there are.
fn by_name<T: Copy>(names: &[(&str, T)], text: &str, wrong: &str) -> Result<T, String> {
    names.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(|| {
        let (last, others) = names.split_last().map_or(("", names), |((last, _), others)| (*last, others));
        let others: Vec<&str> = others.iter().map(|(name, _)| *name).collect();
        format!("`{text}` {wrong}; expected {} or {last}", others.join(", "))
    })
}

/// A backend that can be used here and now.
enum Chosen {
    Kernel(kernel::dm_verity::DmVerity),
    Fuse,
}

/// Picks the backend: `auto` is dm-verity for root where the kernel has it and knows all the layers'
/// formats, else FUSE. Both verify every block.
fn choose(backend: Backend, plan: &MountPlan) -> Result<Chosen, MountError> {
    if backend == Backend::Fuse {
        return Ok(Chosen::Fuse);
    }
    let kernel = || {
        if sys::daemon::effective_ids().0 != 0 {
            return Err("it takes root".to_string());
        }
        if !plan.is_verified() {
            return Err("it always verifies, and a layer has no root hash".to_string());
        }
        kernel::dm_verity::DmVerity::open(Path::new(kernel::RUN_DIR)).map_err(|error| error.to_string())
    };
    match (kernel(), backend) {
        (Ok(open), _) => Ok(Chosen::Kernel(open)),
        (Err(_), Backend::Auto) => Ok(Chosen::Fuse),
        (Err(why), _) => Err(MountError::NoBackend { backend: kernel::NAME, why }),
    }
}

/// Mounts a plan at `target` and returns when the mount is ready.
///
/// # Errors
/// Everything that can be wrong with the image, the target or the system; nothing stays mounted then.
pub fn mount(
    plan: &MountPlan,
    target: &Path,
    backend: Backend,
    options: &fuse::FuseOptions,
) -> Result<(), MountError> {
    match choose(backend, plan)? {
        Chosen::Kernel(open) => kernel::mount(&open, plan, None, target, &options.flags).map(|_| ()),
        Chosen::Fuse => fuse::mount(plan, target, options),
    }
}

/// A mount that is checked, and as far made as it can be without its mount point.
///
/// With it a mount can be replaced with little risk: what is wrong with the new image is found while
/// the old one is still there.
pub struct Prepared {
    plan: MountPlan,
    flags: MountFlags,
    /// The tree, where the kernel serves it. FUSE opens the layers once more when it is attached.
    tree: Option<OwnedFd>,
}

/// Opens and checks all of a plan.
///
/// # Errors
/// Everything that can be wrong with the image; nothing is left then, or when it is dropped.
pub fn prepare(plan: MountPlan, backend: Backend, flags: &MountFlags) -> Result<Prepared, MountError> {
    let tree = match choose(backend, &plan)? {
        Chosen::Kernel(open) => Some(kernel::assemble(&open, &plan, None, flags)?.0),
        Chosen::Fuse => {
            fuse::prepare(&plan, &fuse::FuseOptions::default())?;
            None
        }
    };
    Ok(Prepared { plan, flags: flags.clone(), tree })
}

impl Prepared {
    /// Mounts it; gives the backend's name. `unit` makes the unit of a FUSE daemon; without it the daemon is forked.
    pub fn attach(self, target: &Path, unit: Option<units::Unit>) -> Result<&'static str, MountError> {
        match (self.tree, unit) {
            (Some(tree), _) => kernel::attach(tree, &self.plan, target).map(|()| kernel::NAME),
            (None, Some(unit)) => unit.start().map(|()| fuse::NAME),
            (None, None) => {
                // Locks and sockets of this process are not the daemon's to keep.
                let inherited = sys::daemon::open_descriptors();
                let options =
                    fuse::FuseOptions { flags: self.flags, inherited, ..fuse::FuseOptions::default() };
                fuse::mount(&self.plan, target, &options).map(|()| fuse::NAME)
            }
        }
    }
}

/// As [`mount`], with a writable layer above: the kernel's overlayfs, over either backend.
///
/// Gives the name of the backend. Over FUSE the image's own mount shows nowhere; it ends with the
/// overlay, and its daemon with it.
///
/// # Errors
/// [`MountError::NoBackend`] for users other than root; else as [`mount`].
pub fn mount_writable(
    plan: &MountPlan,
    target: &Path,
    backend: Backend,
    options: &fuse::FuseOptions,
    upper: &kernel::overlay::Upper,
) -> Result<&'static str, MountError> {
    if sys::daemon::effective_ids().0 != 0 {
        let why = "a writable mount is an overlay of the kernel, which takes root".to_string();
        return Err(MountError::NoBackend { backend: "overlayfs", why });
    }
    match choose(backend, plan)? {
        Chosen::Kernel(open) => {
            kernel::mount(&open, plan, Some(upper), target, &options.flags)?;
            Ok(kernel::NAME)
        }
        Chosen::Fuse => {
            kernel::mount_over_fuse(plan, upper, target, options)?;
            Ok(fuse::NAME)
        }
    }
}

/// Mounts a plan with a unit for its FUSE daemon. Where the kernel serves it, there is no daemon and no unit.
pub fn mount_in_unit(
    plan: &MountPlan,
    backend: Backend,
    flags: &MountFlags,
    unit: units::Unit,
) -> Result<(), MountError> {
    let target = unit.target.clone();
    prepare(plan.clone(), backend, flags)?.attach(&target, Some(unit)).map(|_| ())
}

/// As [`mount`], but serves the mount in this process until it is unmounted. `terminal` gets the log;
/// `ready` is called when the mount is ready.
pub fn mount_in_foreground(
    plan: &MountPlan,
    target: &Path,
    backend: Backend,
    options: &fuse::FuseOptions,
    terminal: Box<dyn io::Write + Send>,
    ready: &mut dyn FnMut(),
) -> Result<(), MountError> {
    // Rule: what was asked for is used or refused, never replaced without a word.
    if backend == Backend::DmVerity {
        let why = "a mount of the kernel has no process that could stay in the foreground".into();
        return Err(MountError::NoBackend { backend: kernel::NAME, why });
    }
    fuse::mount_in_foreground(plan, target, options, terminal, ready)
}

/// How long [`unmount`] waits for a daemon to end.
const END_WITHIN: Duration = Duration::from_secs(10);

/// Unmounts the mount at `target`, and waits until its daemon has ended and nothing is left. `lazy`
/// takes it out of the tree now and does not wait for those who still use it.
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
    if !found.as_ref().is_some_and(table::Mounted::is_ours) && record.is_none() {
        return Err(MountError::NotOurs { target, found: found.map(|found| found.kind) });
    }
    let as_root = sys::daemon::effective_ids().0 == 0;
    let done = if as_root {
        sys::fuse::unmount(&target, lazy)
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

/// Takes a mount whose daemon is dead out of the tree; gives whether there was one.
///
/// # Errors
/// [`MountError::Unmount`].
pub fn unmount_dead(target: &Path) -> Result<bool, MountError> {
    let Some(found) = table::mounted_at(target)? else { return Ok(false) };
    let record = table::mounts()?.into_iter().find(|one| one.target == target && one.device == found.device);
    let is_dead = match record {
        Some(record) => record.health() == Health::DaemonDead,
        // The daemon took its record away, or never wrote one: ask the mount itself.
        None => {
            found.kind == fuse::KIND
                && std::fs::metadata(target).is_err_and(|error| {
                    matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
                })
        }
    };
    if is_dead {
        unmount(target, true)?;
    }
    Ok(is_dead)
}

/// What a mount does to the file system as a whole, of what `-o` can ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountFlags {
    /// No setuid, setgid and file capabilities.
    pub nosuid: bool,
    /// No device nodes.
    pub nodev: bool,
    /// No programs.
    pub noexec: bool,
    /// All users may enter a mount that an ordinary user made (root's always are open to all).
    pub allow_other: bool,
}

impl MountFlags {
    /// Takes over a list of options as mount(8) gives it.
    ///
    /// Options for mount(8) and systemd alone (`x-…`, `_netdev`, `nofail` …) are passed over. The
    /// tree is read-only always, so `rw` is refused.
    pub fn apply(&mut self, options: &str) -> Result<(), MountError> {
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option {
                "nosuid" => self.nosuid = true,
                "suid" => self.nosuid = false,
                "nodev" => self.nodev = true,
                "dev" => self.nodev = false,
                "noexec" => self.noexec = true,
                "exec" => self.noexec = false,
                "allow_other" => self.allow_other = true,
                "ro"
                | "defaults"
                | "auto"
                | "noauto"
                | "nofail"
                | "_netdev"
                | "noatime"
                | "relatime"
                | "nodiratime"
                | "default_permissions" => {}
                other if other.starts_with("x-") || other.starts_with("comment=") => {}
                other => return Err(MountError::Option { option: other.to_string() }),
            }
        }
        Ok(())
    }
}

/// Why something cannot be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The image has nothing to mount.
    #[error("image {image} has no layers")]
    NoLayers {
        /// Digest of its manifest.
        image: Digest,
    },
    /// The manifest names no root hash, so nothing could be verified.
    #[error("layer {layer} has no root hash: it cannot be verified")]
    NoRootHash {
        /// Digest of the layer.
        layer: Digest,
    },
    /// The number of pins is not that of the layers.
    #[error("expected {expected} root hashes, one for each layer, found {found}")]
    PinCount {
        /// Number of layers.
        expected: usize,
        /// Number of pins.
        found: usize,
    },
    /// A pin is not what the manifest says.
    #[error("layer {layer}: the manifest has root hash {found}, expected {expected}")]
    Pin {
        /// Digest of the layer.
        layer: Digest,
        /// What the user gave.
        expected: Digest,
        /// What the manifest says.
        found: Digest,
    },
    /// The backend cannot read erofs.
    #[error("layer {layer}: the fuse backend cannot read erofs yet")]
    Erofs {
        /// Digest of the layer.
        layer: Digest,
    },
    /// No backend can read it.
    #[error("layer {layer}: media type `{media_type}` cannot be mounted, expected a squashfs layer")]
    Format {
        /// Digest of the layer.
        layer: Digest,
        /// Its media type.
        media_type: String,
    },
    /// The layer's file cannot be opened.
    #[error("layer {layer}: cannot open {}: {source}", path.display())]
    LayerFile {
        /// Digest of the layer.
        layer: Digest,
        /// Its file.
        path: PathBuf,
        /// What the operating system answered.
        source: io::Error,
    },
    /// The layer's verity data is missing, malformed, or not under its root hash.
    #[error("layer {layer} ({}): {source}", path.display())]
    LayerVerity {
        /// Digest of the layer.
        layer: Digest,
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        source: VerityError,
    },
    /// The layer cannot be read, or makes no sense.
    #[error("layer {layer} ({}): {source}", path.display())]
    LayerRead {
        /// Digest of the layer.
        layer: Digest,
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        source: LayerError,
    },
    /// The layers do not make a tree.
    #[error(transparent)]
    Tree(#[from] OverlayError),
    /// The root folder cannot be served.
    #[error("the root folder of {mount_source} cannot be read: {why}")]
    Root {
        /// What was to be mounted.
        mount_source: String,
        /// What is wrong, as it is in the log.
        why: String,
    },
    /// There is no folder to mount at.
    #[error("cannot mount at {}: {source}", target.display())]
    Target {
        /// Where.
        target: PathBuf,
        /// What the operating system answered.
        source: io::Error,
    },
    /// /dev/fuse cannot be used.
    #[error("cannot open /dev/fuse: {0}")]
    Device(#[source] io::Error),
    /// There is no fusermount3, which an ordinary user needs.
    #[error("cannot run fusermount3 (package fuse3), which mounts for users other than root")]
    NoHelper,
    /// mount(2) or fusermount3 refused.
    #[error("cannot mount at {}: {source}", target.display())]
    Mount {
        /// Where.
        target: PathBuf,
        /// What the kernel, or the helper, answered.
        source: io::Error,
    },
    /// The daemon could not begin to serve.
    #[error("the daemon for {} failed: {why}", target.display())]
    Daemon {
        /// Where.
        target: PathBuf,
        /// What it said.
        why: String,
    },
    /// The operating system refused what starting a daemon takes.
    #[error("cannot {operation}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// What it answered.
        source: io::Error,
    },
    /// A mount option is unknown.
    #[error("mount option `{option}` is not known")]
    Option {
        /// The option.
        option: String,
    },
    /// A backend was asked for that this system does not have.
    #[error("backend {backend} is not available: {why}")]
    NoBackend {
        /// The backend.
        backend: &'static str,
        /// Why not.
        why: String,
    },
    /// There is no mount of ours.
    #[error("{} is not a mount of mosfs{}", target.display(), found.as_ref().map_or(String::new(), |kind| format!(", found {kind}")))]
    NotOurs {
        /// Where.
        target: PathBuf,
        /// The type of what is mounted there.
        found: Option<String>,
    },
    /// umount(2) or fusermount3 refused.
    #[error("cannot unmount {}: {source}", target.display())]
    Unmount {
        /// Where.
        target: PathBuf,
        /// What the kernel, or the helper, answered.
        source: io::Error,
    },
    /// A file in the register of mounts.
    #[error(transparent)]
    Register(#[from] IoError),
    /// A unit for the daemon was asked for and cannot be had.
    #[error("no unit of systemd can keep the mount's daemon: {why}")]
    NoUnit {
        /// What is missing.
        why: String,
    },
    /// The unit of a daemon did not start.
    #[error("unit {unit} did not mount: {why}")]
    Unit {
        /// Its name.
        unit: String,
        /// What systemd said.
        why: String,
    },
    /// The kernel's backend failed.
    #[error(transparent)]
    DmVerity(Box<kernel::dm_verity::DmVerityError>),
}

impl From<kernel::dm_verity::DmVerityError> for MountError {
    fn from(error: kernel::dm_verity::DmVerityError) -> Self {
        Self::DmVerity(Box::new(error))
    }
}

impl Classified for MountError {
    fn class(&self) -> Class {
        match self {
            Self::LayerVerity { source, .. } => source.class(),
            Self::DmVerity(source) => source.class(),
            Self::LayerRead { source, .. } | Self::Tree(OverlayError::Layer { source, .. }) => {
                layer_class(source)
            }
            Self::Pin { .. } | Self::NoRootHash { .. } | Self::Root { .. } => Class::Verification,
            Self::NoLayers { .. }
            | Self::PinCount { .. }
            | Self::Erofs { .. }
            | Self::Format { .. }
            | Self::Option { .. }
            | Self::NoUnit { .. }
            | Self::NotOurs { .. } => Class::Input,
            _ => Class::Failure,
        }
    }
}

/// The class of a layer's error: what does not verify is [`Class::Verification`].
pub fn layer_class(error: &LayerError) -> Class {
    match error {
        LayerError::Read(ReadError::Verity { .. } | ReadError::Length { .. }) => Class::Verification,
        _ => Class::Failure,
    }
}
