//! The FUSE backend: a merged view, served to the kernel by a daemon of its own.
//!
//! ```text
//! limits.rs       what is asked of the kernel, each with its reason
//! filesystem.rs   requests -> engine -> replies
//! prefill.rs      decoded bytes that nobody asked for yet, put into the page cache
//! spin.rs         --spin
//! ```
//!
//! # Life of a mount
//! 1. `mosfs mount` (one thread) opens and checks the layers, reads the root folder, and mounts: as root with
//!    mount(2), else through `fusermount3`. All that can be wrong with an image or a folder is found
//!    here, with its own error.
//! 2. It forks, while it still has one thread. The daemon leaves the session, answers the kernel's INIT, writes
//!    the record of the mount, and says `ready` through a pipe. Only then `mosfs mount` returns.
//! 3. The daemon serves until the mount is gone: a plain `umount` ends the connection, each thread's read
//!    of /dev/fuse fails with ENODEV, the record and the log are removed, and the process ends.
//! 4. SIGTERM, SIGINT and SIGHUP unmount. Where the mount is in use, it leaves the tree at once (lazily) and
//!    the daemon serves those that are in it until the last one is gone; a second signal ends
//!    it at once, and they get ENOTCONN.

mod filesystem;
mod limits;
mod prefill;
mod spin;

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuser::{Config, Session, SessionACL};

pub use limits::DEFAULT_CACHE_MIB;
pub use spin::Spin;

use self::filesystem::{Tree, check_root};
use self::prefill::Siblings;
use self::spin::Pulse;
use super::backend::{FUSE, FUSE_KIND};
use super::engine::Engine;
use super::open::open;
use super::table::{self, DaemonRecord, MountRecord};
use super::{MountError, MountFlags, MountPlan, log as daemon_log, source_name};
use crate::failpoint;
use crate::image::overlay::Merged;
use crate::sys;
use crate::sys::daemon::{Forked, Signals};

/// How often the error counts in a mount's record are brought up to date, at the most.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// How a mount is served.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FuseOptions {
    /// Threads that answer requests; 0 picks a number for this machine.
    pub threads: usize,
    /// Bound of the cache of decoded blocks, in MiB; `None` is [`DEFAULT_CACHE_MIB`].
    pub cache_mib: Option<usize>,
    /// When to keep cores awake while requests come close together.
    pub spin: Spin,
}

/// A connection to the kernel that is mounted and not yet served.
pub struct Mounted {
    fd: OwnedFd,
    target: PathBuf,
    device: (u32, u32),
    as_root: bool,
}

impl Mounted {
    /// Mounts an empty connection at `target`; nothing in it can be used before it is served.
    ///
    /// `source` is what the kernel lists as the mount's source, cut where it is too long for that.
    pub fn new(source: &str, target: &Path, flags: &MountFlags) -> Result<Self, MountError> {
        let source = &*source_name::cut(source, source_name::MOUNT_BYTES_MAX);
        // mount(2) follows links, and the record must name what the kernel will list.
        let wrong = |source| MountError::Target { target: target.to_path_buf(), source };
        let target = target.canonicalize().map_err(wrong)?;
        if !target.metadata().map_err(wrong)?.is_dir() {
            return Err(wrong(io::Error::from_raw_os_error(libc::ENOTDIR)));
        }
        let as_root = sys::daemon::effective_ids().0 == 0;
        let fd = if as_root {
            mount_as_root(source, &target, flags)?
        } else {
            mount_as_user(source, &target, flags)?
        };
        let mut mounted = Self { fd, target, device: (0, 0), as_root };
        match sys::fuse::device_of(&mounted.target) {
            Ok(device) => mounted.device = device,
            Err(source) => {
                let _ = mounted.unmount(true);
                return Err(MountError::Mount { target: mounted.target, source });
            }
        }
        Ok(mounted)
    }

    /// Where it is mounted.
    pub fn target(&self) -> &Path {
        &self.target
    }

    fn unmount(&self, lazy: bool) -> io::Result<()> {
        unmount_at(&self.target, self.as_root, lazy)
    }
}

fn unmount_at(target: &Path, as_root: bool, lazy: bool) -> io::Result<()> {
    if as_root { sys::fuse::unmount(target, lazy) } else { sys::fuse::unmount_with_helper(target, lazy) }
}

fn mount_as_root(source: &str, target: &Path, flags: &MountFlags) -> Result<OwnedFd, MountError> {
    use std::os::fd::AsRawFd;
    let fd = sys::fuse::open_device().map_err(MountError::Device)?;
    // default_permissions: the kernel checks modes and owners as on any file system. POSIX ACLs do not
    // exist here: squashfs has no place for them (it stores user, trusted and security attributes).
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={}",
        fd.as_raw_fd(),
        limits::READ_BYTES
    );
    let mut bits = libc::MS_RDONLY;
    for (wanted, bit) in
        [(flags.nosuid, libc::MS_NOSUID), (flags.nodev, libc::MS_NODEV), (flags.noexec, libc::MS_NOEXEC)]
    {
        bits |= if wanted { bit } else { 0 };
    }
    sys::fuse::mount(source.as_ref(), target, FUSE_KIND, bits, &data)
        .map_err(|source| MountError::Mount { target: target.to_path_buf(), source })?;
    Ok(fd)
}

fn mount_as_user(source: &str, target: &Path, flags: &MountFlags) -> Result<OwnedFd, MountError> {
    // fusermount3 always sets nosuid and nodev for users.
    let name = source.replace('\\', "\\\\").replace(',', "\\,");
    let mut options = format!(
        "ro,nosuid,nodev,default_permissions,subtype=mosfs,fsname={name},max_read={}",
        limits::READ_BYTES
    );
    if flags.noexec {
        options.push_str(",noexec");
    }
    if flags.allow_other {
        options.push_str(",allow_other");
    }
    sys::fuse::mount_with_helper(target, &options).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => MountError::NoHelper,
        _ => MountError::Mount { target: target.to_path_buf(), source },
    })
}

/// Opens the layers of a plan, checks the root folder, and makes an engine of them.
pub fn prepare(plan: &MountPlan, options: &FuseOptions) -> Result<Engine, MountError> {
    let view = Merged::new(open(plan)?)?;
    let names = plan.layers.iter().map(|layer| layer.descriptor.digest.to_string()).collect();
    let cache_bytes = options.cache_mib.unwrap_or(DEFAULT_CACHE_MIB).saturating_mul(1 << 20);
    let engine = Engine::new(view, names, cache_bytes);
    if check_root(&engine).is_err() {
        let why = engine.troubles().counts().last.unwrap_or_else(|| "it is not a folder".into());
        return Err(MountError::Root { mount_source: plan.source.clone(), why });
    }
    Ok(engine)
}

/// Mounts what [`prepare`] made of a plan and returns when the mount is ready, leaving a daemon behind. The daemon
/// closes the descriptors in `foreign`.
pub fn mount(
    plan: &MountPlan,
    engine: Engine,
    target: &Path,
    flags: &MountFlags,
    options: &FuseOptions,
    foreign: &[RawFd],
) -> Result<(), MountError> {
    let mounted = Mounted::new(&plan.source, target, flags)?;
    failpoint::hit("fuse.tree.attached");
    let undo = (mounted.target.clone(), mounted.as_root);
    let failed = |operation| move |source| MountError::System { operation, source };
    let (reader, writer) = io::pipe().map_err(failed("make a pipe"))?;
    match sys::daemon::fork().map_err(failed("fork"))? {
        Forked::Child => {
            drop(reader);
            daemon(plan, mounted, engine, options, foreign, writer)
        }
        Forked::Parent(_) => {
            // The connection is the daemon's alone: if it dies, the mount must not hang on us.
            drop((writer, mounted));
            // Its pages are shared with the daemon: to free what is in them would copy them first.
            std::mem::forget(engine);
            let done = wait_until_ready(reader, &undo.0);
            if done.is_err() {
                let _ = unmount_at(&undo.0, undo.1, true);
            }
            done
        }
    }
}

/// Mounts what [`prepare`] made of a plan and serves it in this process until it is unmounted. Calls `ready` when it
/// is ready.
pub fn serve_here(
    plan: &MountPlan,
    engine: Engine,
    target: &Path,
    flags: &MountFlags,
    options: &FuseOptions,
    ready: &mut dyn FnMut(),
) -> Result<(), MountError> {
    let mounted = Mounted::new(&plan.source, target, flags)?;
    let record = record(plan, &mounted, None);
    let undo = (mounted.target.clone(), mounted.as_root);
    let mut is_ready = false;
    let done = table::enter().map_err(MountError::from).and_then(|()| {
        serve(mounted, engine, options, record, &mut || {
            is_ready = true;
            ready();
            Ok(())
        })
    });
    if !is_ready {
        let _ = unmount_at(&undo.0, undo.1, true);
    }
    done
}

/// What the daemon says when it is ready; anything else is why it is not.
const READY: &[u8] = b"ready";

fn wait_until_ready(mut reader: PipeReader, target: &Path) -> Result<(), MountError> {
    let mut said = Vec::new();
    let read = reader.read_to_end(&mut said);
    match read {
        Ok(_) if said == READY => Ok(()),
        Ok(_) if said.is_empty() => {
            Err(MountError::Daemon { target: target.to_path_buf(), why: "it ended without a word".into() })
        }
        Ok(_) => {
            let why = String::from_utf8_lossy(&said).into_owned();
            Err(MountError::Daemon { target: target.to_path_buf(), why })
        }
        Err(source) => Err(MountError::System { operation: "hear from the daemon", source }),
    }
}

/// The forked process: serves, and ends.
fn daemon(
    plan: &MountPlan,
    mounted: Mounted,
    engine: Engine,
    options: &FuseOptions,
    foreign: &[RawFd],
    pipe: PipeWriter,
) -> ! {
    let mut pipe = Some(pipe);
    let done = sys::daemon::detach(foreign)
        .map_err(|source| MountError::System { operation: "detach from the terminal", source })
        .and_then(|()| {
            let log = table::log_path(mounted.device)?;
            // By its name in that folder, which goes along when the root is switched.
            table::enter()?;
            daemon_log::install(log.file_name().map(Path::new), true, None);
            let record = record(plan, &mounted, Some(log));
            serve(mounted, engine, options, record, &mut || match pipe.take() {
                // Dropping the writing end is what lets the reader go on.
                Some(mut pipe) => pipe.write_all(READY),
                None => Ok(()),
            })
        });
    let code = match done {
        Ok(()) => 0,
        Err(error) => {
            log::error!("{error}");
            if let Some(mut pipe) = pipe {
                let _ = pipe.write_all(error.to_string().as_bytes());
            }
            1
        }
    };
    std::process::exit(code)
}

fn record(plan: &MountPlan, mounted: &Mounted, log: Option<PathBuf>) -> MountRecord {
    let pid = std::process::id();
    let start_ticks = table::start_ticks(pid).unwrap_or(0);
    let daemon = DaemonRecord { pid, start_ticks, log, errors: Default::default() };
    MountRecord::new(plan, &mounted.target, FUSE, mounted.device, Some(daemon))
}

/// Serves a mounted connection until it is gone, from the folder of records ([`table::enter`]).
/// Calls `ready` when the kernel's INIT is answered.
///
/// Blocks SIGTERM, SIGINT and SIGHUP in this process; each of them triggers an unmount.
fn serve(
    mounted: Mounted,
    mut engine: Engine,
    options: &FuseOptions,
    record: MountRecord,
    ready: &mut dyn FnMut() -> io::Result<()>,
) -> Result<(), MountError> {
    let failed = |operation| move |source| MountError::System { operation, source };
    let Mounted { fd, target, device, as_root } = mounted;
    let signals = Signals::block().map_err(failed("block signals"))?;
    let (queue, news) = prefill::queue();
    engine.set_surplus(Box::new(queue));
    let engine = Arc::new(engine);
    let siblings = Arc::new(Siblings::default());
    let (pulse, when) = (Arc::new(Pulse::default()), options.spin);
    let tree = Tree { engine: engine.clone(), siblings: siblings.clone(), pulse: pulse.clone() };

    let mut config = Config::default();
    config.n_threads = Some(if options.threads == 0 { limits::default_threads() } else { options.threads });
    config.clone_fd = true;
    // Who may enter is the kernel's decision (allow_other); fuser need not decide again.
    let session =
        Session::from_fd(tree, fd, SessionACL::All, config).map_err(failed("answer the kernel's INIT"))?;
    if as_root {
        limits::raise_read_ahead(device);
    }
    table::write_here(&record)?;
    let kept = Kept(Arc::new(Mutex::new(Some(record))));
    let _clean = Clean(kept.clone());
    ready().map_err(failed("say that the mount is ready"))?;

    // None of these threads is waited for: they end with the process. The first one starts the
    // others, so that the first request waits for one new thread and not for four.
    let notifier = session.notifier();
    let reported = engine.clone();
    spawn("signals", move || {
        let others = spawn("store", move || prefill::run(&news, &engine, &siblings, &notifier))
            .and_then(|()| spawn("report", move || report(&reported, &kept)))
            .and_then(|()| spawn("spin", move || spin::run(&pulse, when)));
        if let Err(error) = others {
            log::warn!("{error}");
        }
        obey(&signals, &target, device, as_root);
    })?;
    session.run().map_err(failed("serve requests"))
}

fn spawn<T: Send + 'static>(
    name: &'static str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<(), MountError> {
    let builder = std::thread::Builder::new().name(name.into()).stack_size(128 << 10);
    builder.spawn(run).map_err(|source| MountError::System { operation: "start a thread", source })?;
    Ok(())
}

/// The record of a mount while it lasts; removed, once and for all, when this is dropped.
#[derive(Clone)]
struct Kept(Arc<Mutex<Option<MountRecord>>>);

impl Drop for Clean {
    fn drop(&mut self) {
        if let Some(record) = lock(&self.0.0).take() {
            table::remove_here(&record);
        }
    }
}

struct Clean(Kept);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Unmounts when a signal asks for it. See the module's comment.
fn obey(signals: &Signals, target: &Path, device: (u32, u32), as_root: bool) {
    let mut asked = false;
    while let Ok(signal) = signals.wait() {
        if asked {
            log::warn!("signal {signal} again: ending at once");
            std::process::exit(1);
        }
        // Somebody may have mounted something else on top since.
        match sys::fuse::device_of(target) {
            Ok(found) if found == device => {}
            _ => {
                log::warn!(
                    "signal {signal}: {} is not our mount any more, or another is on it",
                    target.display()
                );
                continue;
            }
        }
        asked = true;
        let done = unmount_at(target, as_root, false).or_else(|_| {
            log::info!("{} is in use: unmounting lazily", target.display());
            unmount_at(target, as_root, true)
        });
        if let Err(error) = done {
            log::error!("cannot unmount {}: {error}", target.display());
            asked = false;
        }
    }
}

/// Keeps the error counts of the mount's record up to date.
fn report(engine: &Engine, kept: &Kept) {
    let mut told = 0;
    loop {
        engine.troubles().wait_beyond(told);
        let counts = engine.troubles().counts();
        told = counts.total();
        if let Some(record) = lock(&kept.0).as_mut() {
            if let Some(daemon) = &mut record.daemon {
                daemon.errors = counts;
            }
            if let Err(error) = table::write_here(record) {
                log::warn!("{error}");
            }
        }
        std::thread::sleep(REPORT_EVERY);
    }
}
