//! The one way to mount a plan.
//!
//! ```text
//! prepare   choose the backend; open and check the layers       nothing shows, dropping it frees everything
//! attach    mount what was prepared, write its record
//! ```
//! [`Request::run`] is both. Between them a caller may unmount what is to be replaced: what is wrong with the new image
//! is found while the old one is still there.

use std::io::Write;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use super::MountError;
use super::backend::{self, Backend};
use super::engine::Engine;
use super::flags::MountFlags;
use super::fuse::{self, FuseOptions};
use super::kernel::dm_verity::DmVerity;
use super::kernel::overlay::Upper;
use super::kernel::{self, mount_point};
use super::log as daemon_log;
use super::plan::{LayerBytes, MountPlan, Planned};
use super::units::Unit;
use crate::error::{Class, Classified};
use crate::sys;

/// A mount that is asked for.
///
/// ```no_run
/// use std::path::Path;
///
/// use mosfs::{MountError, MountFlags, MountPlan, MountRequest, unmount};
///
/// fn mount(plan: &MountPlan) -> Result<(), MountError> {
///     let target = Path::new("/mnt");
///     let flags = MountFlags { nodev: true, ..MountFlags::default() };
///     let mounted = MountRequest { flags, ..MountRequest::new(plan, target) }.run()?;
///     assert!(["fuse", "dm-verity"].contains(&mounted.backend));
///     unmount(target, false)
/// }
/// ```
pub struct Request<'a> {
    /// What to mount.
    pub plan: &'a MountPlan,
    /// Where. It must be a folder when the request is attached.
    pub target: &'a Path,
    /// Who serves it.
    pub backend: Backend,
    /// Flags of the mount.
    pub flags: MountFlags,
    /// The writable layer, if the tree is to be written to. It is the kernel's overlayfs over either backend.
    pub upper: Option<&'a Upper>,
    /// How the FUSE backend serves it.
    pub fuse: FuseOptions,
    /// Who keeps the daemon of the FUSE backend. Where the kernel serves the mount, there is no daemon.
    pub daemon: Daemon<'a>,
    /// The descriptors that a forked daemon closes because others opened them; `None`: all that are open when the
    /// mount is prepared. A caller whose plan has descriptors of its own lists those that were open before.
    pub foreign: Option<Vec<RawFd>>,
}

/// Who keeps the daemon of a FUSE mount.
pub enum Daemon<'a> {
    /// Nobody: it is forked.
    Forked,
    /// A unit of systemd, which mounts again when it dies.
    Unit(Unit),
    /// There is none: this process serves the mount until it is unmounted.
    Foreground {
        /// Gets the log.
        terminal: Box<dyn Write + Send>,
        /// Called when the mount is ready.
        ready: &'a mut dyn FnMut(),
    },
}

/// A mount that is ready.
#[derive(Debug)]
pub struct Mounted {
    /// Who serves it, by its name in records.
    pub backend: &'static str,
    /// How long it took.
    pub timing: Timing,
    /// Why [`Backend::Auto`] did not choose the kernel's backend, if it did not.
    pub not_dm_verity: Option<String>,
}

/// How long the two parts of a mount took.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Loop and dm-verity devices and mounting the layers; or the start of the FUSE daemon.
    pub layers: Duration,
    /// The overlay, attaching it, and the record.
    pub tree: Duration,
}

/// A mount that is checked, and as far made as it can be without its mount point.
pub struct Prepared<'a> {
    request: Request<'a>,
    made: Backing,
    /// How long that took.
    timing: Timing,
    not_dm_verity: Option<String>,
}

/// What was made.
enum Backing {
    /// The kernel's tree, attached nowhere.
    Tree(OwnedFd),
    /// The engine of a FUSE mount, and the descriptors that its daemon must not keep.
    Engine(Box<Engine>, Vec<RawFd>),
}

impl<'a> Request<'a> {
    /// A request for a plain mount: read-only, without flags, with a daemon that is forked.
    pub fn new(plan: &'a MountPlan, target: &'a Path) -> Self {
        Self {
            plan,
            target,
            backend: Backend::Auto,
            flags: MountFlags::default(),
            upper: None,
            fuse: FuseOptions::default(),
            daemon: Daemon::Forked,
            foreign: None,
        }
    }

    /// Mounts, and returns when the mount is ready; in the foreground, when it has ended.
    ///
    /// # Errors
    /// Everything that can be wrong with the image, the target or the system; nothing stays mounted then.
    pub fn run(self) -> Result<Mounted, MountError> {
        self.check()?;
        // Before anything is made: a target that is no folder is the likeliest mistake.
        mount_point(self.target)?;
        self.prepare()?.attach()
    }

    /// Opens and checks all of the plan.
    ///
    /// # Errors
    /// Everything that can be wrong with the image; nothing is left then.
    pub fn prepare(mut self) -> Result<Prepared<'a>, MountError> {
        self.check()?;
        if let Daemon::Foreground { terminal, .. } = &mut self.daemon {
            // From here on: what the engine says when it opens the layers is for the terminal too.
            let terminal = std::mem::replace(terminal, Box::new(std::io::sink()));
            daemon_log::install(None, false, Some(terminal));
        }
        let begin = Instant::now();
        let (tree, not_dm_verity) = match self.choose()? {
            Chosen::Kernel(open) => match kernel::assemble(&open, self.plan, self.upper, &self.flags) {
                Ok(tree) => (Some(tree), None),
                Err(error) if is_refusal(self.backend, &error) => (None, Some(error.to_string())),
                Err(error) => return Err(error),
            },
            Chosen::Fuse { not_dm_verity } => (None, not_dm_verity),
        };
        let (made, layers) = match tree {
            Some((tree, layers)) => (Backing::Tree(tree), layers),
            None => {
                // What is open now was opened by others: the daemon lives long, and must not keep it. What the engine
                // opens is its own.
                let foreign = self.foreign.take().unwrap_or_else(sys::daemon::open_descriptors);
                // Before the first large buffer: how the allocator keeps memory cannot be changed for what it has.
                sys::daemon::lean_allocator();
                let engine = fuse::prepare(self.plan, &self.fuse)?;
                (Backing::Engine(Box::new(engine), foreign), begin.elapsed())
            }
        };
        let timing = Timing { layers, tree: begin.elapsed().saturating_sub(layers) };
        Ok(Prepared { request: self, made, timing, not_dm_verity })
    }

    /// Rule: what was asked for is used or refused, never replaced without a word.
    fn check(&self) -> Result<(), MountError> {
        let no = |backend, why: &str| Err(MountError::NoBackend { backend, why: why.into() });
        match (&self.daemon, self.upper) {
            (Daemon::Foreground { .. }, Some(_)) => {
                no("overlayfs", "a writable mount has no process that could stay in the foreground")
            }
            (Daemon::Foreground { .. }, None) if self.backend == Backend::DmVerity => no(
                backend::DM_VERITY,
                "a mount of the kernel has no process that could stay in the foreground",
            ),
            (_, Some(_)) if self.fuse.shift.is_some() => {
                no("overlayfs", "ids of a writable mount cannot be shifted")
            }
            (_, None) if self.fuse.shift.is_some() && self.backend == Backend::DmVerity => {
                no(backend::DM_VERITY, "ids are shifted by the fuse backend alone")
            }
            (Daemon::Unit(_), Some(_)) => {
                Err(MountError::NoUnit { why: "a writable mount has its daemon below an overlay".into() })
            }
            (_, Some(_)) if !is_root() => {
                no("overlayfs", "a writable mount is an overlay of the kernel, which takes root")
            }
            _ => Ok(()),
        }
    }

    /// Picks the backend: `auto` is dm-verity for root where the kernel has it and knows all the layers'
    /// formats, else FUSE. Both verify every block.
    fn choose(&self) -> Result<Chosen, MountError> {
        let foreground = matches!(self.daemon, Daemon::Foreground { .. });
        if self.backend == Backend::Fuse || foreground || self.fuse.shift.is_some() {
            return Ok(Chosen::Fuse { not_dm_verity: None });
        }
        let kernel = || {
            if !is_root() {
                return Err("it takes root".to_string());
            }
            if matches!(self.plan.content, Planned::File { .. }) {
                return Err("a plain file is mounted through FUSE alone".to_string());
            }
            if !self.plan.is_verified() {
                return Err("it always verifies, and a layer has no root hash".to_string());
            }
            // Not offered where it cannot be: a layer of many blobs, or of a blob that is elsewhere.
            if let Some(layer) = self.plan.layers().iter().find(|layer| layer.file().is_none()) {
                let why = match layer.bytes {
                    LayerBytes::Chunks(_) => "is made of chunks, which the kernel cannot mount",
                    LayerBytes::One(_) => "is fetched while it is read, which takes the fuse backend",
                };
                return Err(format!("layer {} {why}", layer.descriptor.digest));
            }
            DmVerity::open(&sys::run_dir()).map_err(|error| error.to_string())
        };
        match (kernel(), self.backend) {
            (Ok(open), _) => Ok(Chosen::Kernel(open)),
            (Err(why), Backend::Auto) => Ok(Chosen::Fuse { not_dm_verity: Some(why) }),
            (Err(why), _) => Err(MountError::NoBackend { backend: backend::DM_VERITY, why }),
        }
    }
}

/// A backend that can be used here and now.
enum Chosen {
    Kernel(DmVerity),
    Fuse { not_dm_verity: Option<String> },
}

/// Whether `auto` goes on to FUSE after this error of the kernel's backend.
///
/// Rule: what does not verify is refused, whoever found it. All else is what this kernel cannot, or will not do.
fn is_refusal(backend: Backend, error: &MountError) -> bool {
    backend == Backend::Auto && error.class() == Class::Failure
}

fn is_root() -> bool {
    sys::daemon::effective_ids().0 == 0
}

impl Prepared<'_> {
    /// Mounts it, and returns when the mount is ready; in the foreground, when it has ended.
    ///
    /// # Errors
    /// As [`Request::run`].
    pub fn attach(self) -> Result<Mounted, MountError> {
        let Self { request, made, timing, not_dm_verity } = self;
        let Request { plan, target, flags, upper, fuse: options, daemon, .. } = request;
        let begin = Instant::now();
        // Held from here on: whatever its path leads to later, this folder is mounted at.
        let point = mount_point(target)?;
        let (name, more_for_layers) = match (made, daemon, upper) {
            (Backing::Tree(tree), _, _) => {
                kernel::attach(tree, plan, &point)?;
                (backend::DM_VERITY, Duration::ZERO)
            }
            // The daemon opens the layers itself: what was opened here has shown that it can.
            (Backing::Engine(engine, _), Daemon::Unit(unit), None) => {
                drop((engine, point));
                unit.start()?;
                (backend::FUSE, begin.elapsed())
            }
            (Backing::Engine(engine, _), Daemon::Foreground { ready, .. }, None) => {
                fuse::serve_here(plan, *engine, &point, &flags, &options, ready)?;
                (backend::FUSE, begin.elapsed())
            }
            (Backing::Engine(engine, foreign), _, upper) => {
                let served = fuse::start(plan, *engine, &point, &flags, &options, &foreign)?;
                let with_layers = begin.elapsed();
                match upper {
                    Some(upper) => kernel::attach_over_fuse(plan, upper, &point, &flags, served)?,
                    None => served.attach(&point)?,
                }
                (backend::FUSE, with_layers)
            }
        };
        let tree = begin.elapsed().saturating_sub(more_for_layers);
        let timing = Timing { layers: timing.layers + more_for_layers, tree: timing.tree + tree };
        Ok(Mounted { backend: name, timing, not_dm_verity })
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernel::dm_verity::DmVerityError;
    use super::*;
    use crate::digest::Digest;

    #[test]
    fn auto_goes_on_to_fuse_where_the_kernel_refuses_and_not_where_the_image_is_corrupt() {
        let digest = Digest::of(b"layer");
        let source = std::io::Error::from_raw_os_error(libc::EINVAL);
        let device = "mosfs-0".to_string();
        let refused: MountError =
            DmVerityError::Device { digest, operation: "activate", device: device.clone(), source }.into();
        let corrupt: MountError = DmVerityError::Corrupt { digest, device, root_hash: digest }.into();
        assert!(is_refusal(Backend::Auto, &refused));
        assert!(!is_refusal(Backend::DmVerity, &refused));
        assert!(!is_refusal(Backend::Auto, &corrupt));
    }
}
