//! The FUSE backend: a merged view, served to the kernel by a daemon of its own.
//!
//! ```text
//! limits.rs       what is asked of the kernel, each with its reason
//! filesystem.rs   requests -> engine -> replies
//! pool.rs         threads for requests that wait for another machine
//! started.rs      knows when all threads serve
//! prefill.rs      decoded bytes that nobody asked for yet, put into the page cache
//! spin.rs         --spin
//! lead.rs         which thread reads requests, and when it polls, where cores may not be kept awake
//! ```
//!
//! # Life of a mount
//! 1. `mosfs mount` (one thread) opens and checks the layers, reads the root folder, and makes a mount: who may,
//!    with fsmount(2), one that is attached nowhere; others through `fusermount3`, which mounts at the target. All that
//!    can be wrong with an image or a folder is found here, with its own error.
//! 2. It forks, while it still has one thread. The daemon leaves the session, answers the kernel's INIT, writes
//!    the record of the mount, starts all its threads, and says `ready` through a pipe. Only then the mount is attached
//!    to its target, and `mosfs mount` returns. What fails before leaves nothing: a mount that is attached
//!    nowhere ends with its last descriptor, and one of `fusermount3` is unmounted.
//! 3. The daemon serves until the mount is gone: a plain `umount` ends the connection, each thread's read
//!    of /dev/fuse fails with ENODEV, the record and the log are removed, and the process ends.
//! 4. SIGTERM, SIGINT and SIGHUP unmount. Where the mount is in use, it leaves the tree at once (lazily) and
//!    the daemon serves those that are in it until the last one is gone; a second signal ends
//!    it at once, and they get ENOTCONN.

mod filesystem;
mod lead;
mod limits;
mod pool;
mod prefill;
mod spin;
mod started;

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fuser::{Config, Session, SessionACL};

pub use limits::DEFAULT_CACHE_MIB;
pub use spin::Spin;

use self::filesystem::{Tree, View, check_root};
use self::lead::Lead;
use self::prefill::Siblings;
use self::spin::Pulse;
use self::started::{OnDemand, all_serve, spawn};
use super::backend::FUSE;
use super::engine::Engine;
use super::open::open;
use super::table::{self, DaemonRecord, MountRecord};
use super::{MountError, MountFlags, MountPlan, log as daemon_log, source_name};
use crate::failpoint;
use crate::image::blobs::Blobs;
use crate::image::overlay::{Merged, ROOT};
use crate::sys;
use crate::sys::daemon::{Forked, Signals};
use crate::sys::locks;
use crate::sys::mountapi::{self, FsContext, MountPoint};

/// How often the error counts in a mount's record are brought up to date, at the most.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// How a mount is served.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FuseOptions {
    /// Threads that answer requests; 0 picks a number for this machine.
    pub threads: usize,
    /// Bound of the cache of decoded blocks, in MiB; `None` is 6.
    pub cache_mib: Option<usize>,
    /// When to keep cores awake while requests come close together.
    pub spin: Spin,
}

/// A connection to the kernel that has a mount and is not yet served.
struct Connection {
    fd: OwnedFd,
    /// The mount.
    mount: OwnedFd,
    /// Whether `fusermount3` has attached it to its target already.
    by_helper: bool,
    target: PathBuf,
    device: (u32, u32),
}

impl Connection {
    /// Makes a connection and its mount; nothing in it can be used before it is served.
    ///
    /// `source` is what the kernel lists as the mount's source.
    fn new(
        source: &str,
        engine: &Engine,
        point: &MountPoint,
        flags: &MountFlags,
    ) -> Result<Self, MountError> {
        let target = point.path().to_path_buf();
        let failed = |source: io::Error| MountError::Mount { target: target.clone(), source };
        let by_helper = sys::daemon::effective_ids().0 != 0;
        let (fd, mount) = if by_helper {
            let fd = mount_by_helper(source, &target, flags)?;
            match MountPoint::open(&target) {
                Ok(mounted) => (fd, mounted.into()),
                Err(source) => {
                    let _ = sys::fuse::unmount_with_helper(&target, true);
                    return Err(failed(source));
                }
            }
        } else {
            let fd = sys::fuse::open_device().map_err(MountError::Device)?;
            let mount = mount_nowhere(source, engine, &fd, flags).map_err(|error| failed(error.into()))?;
            (fd, mount)
        };
        let device = sys::fuse::device_of_fd(mount.as_fd()).map_err(failed)?;
        Ok(Self { fd, mount, by_helper, target, device })
    }
}

fn unmount_at(target: &Path, by_helper: bool, lazy: bool) -> io::Result<()> {
    if by_helper {
        sys::fuse::unmount_with_helper(target, lazy)
    } else {
        mountapi::unmount(target, lazy).map_err(|error| error.source)
    }
}

/// A mount of a connection that is attached nowhere.
fn mount_nowhere(
    source: &str,
    engine: &Engine,
    fd: &OwnedFd,
    flags: &MountFlags,
) -> Result<OwnedFd, mountapi::CallError> {
    let context = FsContext::open("fuse")?;
    // It names the mount for people, and nothing is found by it.
    let name = source_name::cut(source, source_name::FSCONFIG_BYTES_MAX);
    context.set_string("source", name.as_bytes())?;
    context.set_string("subtype", b"mosfs")?;
    context.set_string("fd", fd.as_raw_fd().to_string().as_bytes())?;
    // default_permissions: the kernel checks modes and owners as on any file system, and POSIX ACLs where a
    // layer may have them (limits.rs).
    let read_bytes = limits::READ_BYTES.to_string();
    // In octal. The whole mode: an overlay may be made of the mount before somebody asks for it.
    let mode = engine.attr(ROOT).map_or(0, |attr| attr.permissions);
    let mode = format!("{:o}", libc::S_IFDIR | libc::mode_t::from(mode));
    for (key, value) in
        [("rootmode", mode.as_str()), ("user_id", "0"), ("group_id", "0"), ("max_read", read_bytes.as_str())]
    {
        context.set_string(key, value.as_bytes())?;
    }
    for key in ["default_permissions", "allow_other", "ro"] {
        context.set_flag(key)?;
    }
    context.mount(libc::MOUNT_ATTR_RDONLY | flags.attributes())
}

fn mount_by_helper(source: &str, target: &Path, flags: &MountFlags) -> Result<OwnedFd, MountError> {
    // fusermount3 always sets nosuid and nodev for users.
    let source = source_name::cut(source, source_name::MOUNT_BYTES_MAX);
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
    if plan.blobs.is_remote() {
        view.number_files();
    }
    let names = plan.layers.iter().map(|layer| layer.descriptor.digest.to_string()).collect();
    let cache_bytes = options.cache_mib.unwrap_or(DEFAULT_CACHE_MIB).saturating_mul(1 << 20);
    let engine = Engine::new(view, names, cache_bytes);
    if check_root(&engine).is_err() {
        let why = engine.troubles().counts().last.unwrap_or_else(|| "it is not a folder".into());
        return Err(MountError::Root { mount_source: plan.source.clone(), why });
    }
    Ok(engine)
}

/// A mount that a daemon serves. Dropping it ends both, unless it was attached.
#[derive(Debug)]
pub struct Served {
    /// `None` where `fusermount3` has attached it.
    mount: Option<OwnedFd>,
    device: (u32, u32),
    undo: Option<PathBuf>,
}

impl Served {
    /// The mount, attached nowhere. Only root has one.
    pub fn mount(&self) -> Option<BorrowedFd<'_>> {
        self.mount.as_ref().map(AsFd::as_fd)
    }

    /// Has the daemon say the attributes of the root. overlayfs copies them from the kernel's inode, which knows no more
    /// than the mount's options of a root that nobody has looked at.
    fn look_at_root(&self, target: &Path) -> Result<(), MountError> {
        let done = match &self.mount {
            Some(mount) => sys::fuse::refresh(mount.as_fd()),
            None => target.metadata().map(|_| ()),
        };
        done.map_err(|source| MountError::Mount { target: target.to_path_buf(), source })
    }

    /// The record of its daemon.
    pub fn daemon(&self) -> Option<DaemonRecord> {
        table::find(self.device)?.daemon
    }

    /// Attaches it to its target.
    pub fn attach(mut self, point: &MountPoint) -> Result<(), MountError> {
        if let Some(mount) = self.mount.take() {
            let failed = |source: mountapi::CallError| MountError::Mount {
                target: point.path().to_path_buf(),
                source: source.into(),
            };
            point.attach(mount).map_err(failed)?;
        }
        failpoint::hit("fuse.tree.attached");
        self.undo = None;
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(target) = &self.undo {
            let _ = sys::fuse::unmount_with_helper(target, true);
        }
    }
}

/// Starts a daemon that serves what [`prepare`] made of a plan, and returns when it does. The daemon closes the
/// descriptors in `foreign`.
pub fn start(
    plan: &MountPlan,
    engine: Engine,
    point: &MountPoint,
    flags: &MountFlags,
    options: &FuseOptions,
    foreign: &[RawFd],
) -> Result<Served, MountError> {
    let connection = Connection::new(&plan.source, &engine, point, flags)?;
    failpoint::hit("fuse.tree.made");
    let Connection { by_helper, device, .. } = connection;
    let mut served = Served { mount: None, device, undo: by_helper.then(|| connection.target.clone()) };
    let failed = |operation| move |source| MountError::System { operation, source };
    let (reader, writer) = io::pipe().map_err(failed("make a pipe"))?;
    match sys::daemon::fork().map_err(failed("fork"))? {
        Forked::Child => {
            drop(reader);
            // The folder below the mount is the parent's matter; a daemon that holds it keeps its file system busy.
            let foreign = [foreign, &[point.as_fd().as_raw_fd()]].concat();
            daemon(plan, connection, engine, options, &foreign, writer)
        }
        Forked::Parent(_) => {
            // The connection is the daemon's alone: if it dies, the mount must not hang on us.
            let Connection { mount, fd, .. } = connection;
            drop((writer, fd));
            served.mount = (!by_helper).then_some(mount);
            // Its pages are shared with the daemon: to free what is in them would copy them first.
            std::mem::forget(engine);
            wait_until_ready(reader, point.path())?;
            served.look_at_root(point.path())?;
            Ok(served)
        }
    }
}

/// Mounts what [`prepare`] made of a plan and serves it in this process until it is unmounted. Calls `ready` when it
/// is ready.
pub fn serve_here(
    plan: &MountPlan,
    engine: Engine,
    point: &MountPoint,
    flags: &MountFlags,
    options: &FuseOptions,
    ready: &mut dyn FnMut(),
) -> Result<(), MountError> {
    let connection = Connection::new(&plan.source, &engine, point, flags)?;
    let mut served = Some(Served {
        mount: None,
        device: connection.device,
        undo: connection.by_helper.then(|| connection.target.clone()),
    });
    let files = table::files_of(connection.device)?;
    let record = enter(files.as_deref())?.then(|| record(plan, &connection, files.as_deref(), false));
    serve(plan, connection, engine, options, record, &mut |mount| {
        if let Some(mut served) = served.take() {
            served.mount = mount;
            served.attach(point)?;
        }
        ready();
        Ok(())
    })
}

/// Enters the folder of a mount's files, if it has one.
fn enter(files: Option<&Path>) -> Result<bool, MountError> {
    match files.and_then(Path::parent) {
        Some(folder) => table::enter(folder).map(|()| true).map_err(MountError::from),
        None => Ok(false),
    }
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
    connection: Connection,
    engine: Engine,
    options: &FuseOptions,
    foreign: &[RawFd],
    pipe: PipeWriter,
) -> ! {
    let mut pipe = Some(pipe);
    let done = sys::daemon::detach(foreign)
        .map_err(|source| MountError::System { operation: "detach from the terminal", source })
        .and_then(|()| {
            let files = table::files_of(connection.device)?;
            let is_recorded = enter(files.as_deref())?;
            let log = files.as_ref().map(|files| files.with_extension("log"));
            // By its name in that folder, which goes along when the root is switched.
            daemon_log::install(log.as_deref().and_then(Path::file_name).map(Path::new), true, None);
            let record = is_recorded.then(|| record(plan, &connection, files.as_deref(), true));
            serve(plan, connection, engine, options, record, &mut |mount| {
                // The process that attaches it has a descriptor of its own; with this one nobody could unmount it.
                drop(mount);
                match pipe.take() {
                    // Dropping the writing end is what lets the reader go on.
                    Some(mut pipe) => pipe.write_all(READY).map_err(|source| MountError::System {
                        operation: "say that the mount is ready",
                        source,
                    }),
                    None => Ok(()),
                }
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

fn record(plan: &MountPlan, connection: &Connection, files: Option<&Path>, has_log: bool) -> MountRecord {
    let pid = std::process::id();
    let start_ticks = table::start_ticks(pid).unwrap_or(0);
    let file = |ending| files.map(|files| files.with_extension(ending));
    let (log, lock) = (has_log.then(|| file("log")).flatten(), file("lock"));
    let daemon = DaemonRecord { pid, start_ticks, log, lock, errors: Default::default() };
    MountRecord::new(plan, &connection.target, FUSE, connection.device, Some(daemon))
}

/// Serves a connection until its mount is gone, from the folder of records ([`table::enter`]) where there is a record.
///
/// Calls `ready` when all threads run, with the mount where it is still to be attached. Its last error ends all.
///
/// Blocks SIGTERM, SIGINT and SIGHUP in this process; each of them triggers an unmount.
fn serve(
    plan: &MountPlan,
    connection: Connection,
    mut engine: Engine,
    options: &FuseOptions,
    record: Option<MountRecord>,
    ready: &mut dyn FnMut(Option<OwnedFd>) -> Result<(), MountError>,
) -> Result<(), MountError> {
    let failed = |operation| move |source| MountError::System { operation, source };
    let Connection { fd, mount, target, device, by_helper } = connection;
    let signals = Signals::block().map_err(failed("block signals"))?;
    let (queue, store, news) = prefill::queue();
    engine.set_surplus(Box::new(queue));
    engine.set_before_decoding(lead::decoding);
    let engine = Arc::new(engine);
    let siblings = Arc::new(Siblings::default());
    let (pulse, when) = (Arc::new(Pulse::default()), options.spin);
    let threads = if options.threads == 0 { limits::default_threads() } else { options.threads };
    let turns = Arc::new(Lead::default());
    let view = Arc::new(View { engine: engine.clone(), siblings: siblings.clone() });
    let pool = plan.blobs.is_remote().then(Arc::default);
    let tree = Tree { view, pulse: pulse.clone(), lead: turns.clone(), pool };

    let mut config = Config::default();
    config.n_threads = Some(threads);
    config.clone_fd = true;
    // Who may enter is the kernel's decision (allow_other); fuser need not decide again.
    let session =
        Session::from_fd(tree, fd, SessionACL::All, config).map_err(failed("answer the kernel's INIT"))?;
    if !by_helper {
        limits::raise_read_ahead(device);
    }
    let _alive = record.as_ref().map(table::register_here).transpose()?;
    let kept = Kept(Arc::new(Mutex::new(record)));
    let _clean = Clean(kept.clone());

    // But for the one that serves, none of these threads is waited for: they end with the process. Those on demand
    // are not there while nobody uses the mount.
    let notifier = session.notifier();
    let (stored, troubled, copy) = (Arc::clone(&engine), Arc::downgrade(&engine), session.as_fd());
    let copy = copy.try_clone_to_owned().map_err(failed("copy the connection"))?;
    let works = Arc::clone(&turns);
    let _ = store.set(OnDemand::new("store", move || {
        prefill::run(&news, &stored, &siblings, &notifier, &works);
    }));
    let (fetched, blobs) = (kept.clone(), Arc::clone(&plan.blobs));
    if blobs.is_remote() {
        spawn("progress", move || report_progress(blobs.as_ref(), &fetched))?;
    }
    let reporter = OnDemand::new("report", move || {
        if let Some(engine) = troubled.upgrade() {
            report(&engine, &kept);
        }
    });
    engine.troubles().on_error(move || reporter.start());
    let beats = Arc::clone(&pulse);
    pulse.on_first(OnDemand::new("spin", move || {
        spin::run(&beats, when);
        turns.begin(copy);
    }));
    spawn("signals", move || obey(&signals, &target, device, by_helper))?;
    plan.blobs.start().map_err(failed("start a thread"))?;
    let serving = spawn("serve", move || session.run())?;
    if all_serve(threads, &serving) {
        // Where it is attached already, a descriptor of it would keep it from being unmounted.
        ready((!by_helper).then_some(mount))?;
    }
    match serving.join() {
        Ok(done) => done.map_err(failed("serve requests")),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The record of a mount while it lasts; removed, once and for all, when this is dropped.
#[derive(Clone)]
struct Kept(Arc<Mutex<Option<MountRecord>>>);

impl Drop for Clean {
    fn drop(&mut self) {
        if let Some(record) = locks::lock(&self.0.0).take() {
            table::remove_here(&record);
        }
    }
}

struct Clean(Kept);

/// Unmounts when a signal asks for it. See the module's comment.
fn obey(signals: &Signals, target: &Path, device: (u32, u32), by_helper: bool) {
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
        let done = unmount_at(target, by_helper, false).or_else(|_| {
            log::info!("{} is in use: unmounting lazily", target.display());
            unmount_at(target, by_helper, true)
        });
        if let Err(error) = done {
            log::error!("cannot unmount {}: {error}", target.display());
            asked = false;
        }
    }
}

/// Keeps the record up to date on how much is here of what comes from another machine.
fn report_progress(blobs: &dyn Blobs, kept: &Kept) {
    loop {
        let progress = blobs.progress();
        let is_whole = progress.iter().all(|one| one.state == "complete");
        if let Some(record) = locks::lock(&kept.0).as_mut()
            && record.lazy != progress
        {
            record.lazy = progress;
            if let Err(error) = table::write_here(record) {
                log::warn!("{error}");
            }
        }
        if is_whole {
            return;
        }
        std::thread::sleep(REPORT_EVERY);
    }
}

/// Keeps the error counts of the mount's record up to date.
fn report(engine: &Engine, kept: &Kept) {
    let mut told = 0;
    loop {
        engine.troubles().wait_beyond(told);
        let counts = engine.troubles().counts();
        told = counts.total();
        if let Some(record) = locks::lock(&kept.0).as_mut() {
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
