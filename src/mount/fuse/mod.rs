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
//! idle.rs         unmounts what nobody uses
//! ```
//!
//! # Life of a mount
//! 1. `mosfs mount` (one thread) opens and checks the layers, reads the root folder, and makes a mount: who may,
//!    with fsmount(2), one that is attached nowhere; others through `fusermount3`, which mounts at the target. All that
//!    can be wrong with an image or a folder is found here, with its own error.
//! 2. It forks, while it still has one thread. The daemon leaves the session, answers the kernel's INIT, starts
//!    all its threads, writes the record of the mount meanwhile, and says `ready` through a pipe. Only then the mount is
//!    attached to its target, and `mosfs mount` returns. What fails before leaves nothing: a mount that is attached
//!    nowhere ends with its last descriptor, and one of `fusermount3` is unmounted.
//! 3. The daemon serves until the mount is gone: a plain `umount` ends the connection, each thread's read
//!    of /dev/fuse fails with ENODEV, the record and the log are removed, and the process ends.
//! 4. SIGTERM, SIGINT and SIGHUP unmount. Where the mount is in use, it leaves the tree at once (lazily) and
//!    the daemon serves those that are in it until the last one is gone; a second signal ends
//!    it at once, and they get ENOTCONN.

mod filesystem;
mod idle;
mod lead;
mod limits;
mod pool;
mod prefill;
mod spin;
mod started;

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use fuser::{Config, Session, SessionACL};

pub use limits::{CACHE_MIB, CHUNKS_CACHE_MIB, THREADS};
pub use spin::Spin;

use self::filesystem::{Tree, View, check_root};
use self::idle::Opens;
use self::lead::Lead;
use self::prefill::Siblings;
use self::spin::RequestCounter;
use self::started::{OnDemand, SERVE, all_serve, spawn};
use super::backend::FUSE;
use super::engine::Engine;
use super::open::{names, open};
use super::table::{self, DaemonRecord, MountRecord};
use super::{Access, IdShift, MountError, MountFlags, MountPlan, log as daemon_log, source_name};
use crate::image::blobs::Blobs;
use crate::image::overlay::ROOT;
use crate::sys;
use crate::sys::daemon::{Forked, Signals};
use crate::sys::failpoint;
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
    /// Show user and group ids moved to this range.
    pub shift: Option<IdShift>,
    /// Unmount after so long without a request and without an open file.
    pub idle: Option<Duration>,
    /// How long a signal waits before it unmounts, so that a program that was started just before it can open a file.
    pub grace: Duration,
}

/// A connection to the kernel that has a mount and is not yet served.
struct Connection {
    fd: OwnedFd,
    /// The mount, where it is still to be attached.
    mount: Option<OwnedFd>,
    place: Attachment,
    acl: SessionACL,
    /// Whether the kernel compares modes and owners, which it must where ids may be mapped.
    is_checked: bool,
}

/// Where a mount of ours is, or will be.
#[derive(Debug, Clone)]
struct Attachment {
    target: PathBuf,
    device: (u32, u32),
    /// Whether `fusermount3` has attached it.
    by_helper: bool,
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
        let fd = sys::fuse::open_device().map_err(MountError::Device)?;
        // An ordinary user may have the capability, in a user namespace where fusermount3 is not setuid.
        let (fd, mount, by_helper) = match mount_nowhere(source, engine, &fd, flags) {
            Ok(mount) => (fd, mount, false),
            Err(error) if is_for_helper(&error) => {
                drop(fd);
                let fd = mount_by_helper(source, &target, flags)?;
                match MountPoint::open(&target) {
                    Ok(mounted) => (fd, mounted.into(), true),
                    Err(source) => {
                        let _ = sys::fuse::unmount_with_helper(&target, true);
                        return Err(failed(source));
                    }
                }
            }
            Err(error) => return Err(failed(error.into())),
        };
        let device = sys::fuse::device_of_fd(mount.as_fd()).map_err(failed)?;
        // Where it is attached already, a descriptor of it would keep it from being unmounted.
        let mount = (!by_helper).then_some(mount);
        let is_checked = flags.access == Access::Checked;
        Ok(Self { fd, mount, place: Attachment { target, device, by_helper }, acl: acl(flags), is_checked })
    }
}

/// Whether an ordinary user is to mount with `fusermount3`.
fn is_for_helper(error: &mountapi::CallError) -> bool {
    // ENOSYS: before Linux 5.2, or under a filter of system calls.
    let is_refused = matches!(error.source.raw_os_error(), Some(libc::EPERM | libc::ENOSYS));
    is_refused && sys::daemon::effective_ids().0 != 0
}

/// Who of those whom the kernel lets in is served. The kernel knows no mount for root and the mounter alone.
fn acl(flags: &MountFlags) -> SessionACL {
    if flags.allow_root && !flags.allow_other { SessionACL::RootAndOwner } else { SessionACL::All }
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
    let (user, group) = sys::daemon::effective_ids();
    for (key, value) in [
        ("rootmode", mode),
        ("user_id", user.to_string()),
        ("group_id", group.to_string()),
        ("max_read", read_bytes),
    ] {
        context.set_string(key, value.as_bytes())?;
    }
    context.set_flag("ro")?;
    let is_checked = flags.access == Access::Checked;
    for (key, is_set) in [
        ("default_permissions", is_checked),
        ("allow_other", is_checked || flags.allow_other || flags.allow_root),
    ] {
        if is_set {
            context.set_flag(key)?;
        }
    }
    context.mount(libc::MOUNT_ATTR_RDONLY | flags.attributes())
}

fn mount_by_helper(source: &str, target: &Path, flags: &MountFlags) -> Result<OwnedFd, MountError> {
    // fusermount3 always sets nosuid and nodev for users.
    let source = source_name::cut(source, source_name::MOUNT_BYTES_MAX);
    let name = source.replace('\\', "\\\\").replace(',', "\\,");
    let mut options = format!("ro,nosuid,nodev,subtype=mosfs,fsname={name},max_read={}", limits::READ_BYTES);
    if flags.access == Access::Checked {
        options.push_str(",default_permissions");
    }
    if flags.noexec {
        options.push_str(",noexec");
    }
    if flags.allow_other || flags.allow_root {
        options.push_str(",allow_other");
    }
    sys::fuse::mount_with_helper(target, &options).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => MountError::NoHelper,
        _ => MountError::Mount { target: target.to_path_buf(), source },
    })
}

/// Opens what a plan has, checks the root folder, and makes an engine of it.
pub fn prepare(plan: &MountPlan, options: &FuseOptions) -> Result<Engine, MountError> {
    let view = open(plan)?;
    if plan.remote().is_some() {
        view.number_files();
    }
    let cache_bytes =
        options.cache_mib.unwrap_or_else(|| limits::default_cache_mib(plan)).saturating_mul(1 << 20);
    let engine = Engine::new(view, names(plan), cache_bytes);
    if check_root(&engine).is_err() {
        let why = engine.troubles().counts().last.unwrap_or_else(|| "it is not a folder".into());
        return Err(MountError::Root { mount_source: plan.source.clone(), why });
    }
    // To read all metadata of such an image takes some megabytes; others free little.
    if limits::has_chunks(plan) {
        sys::daemon::return_freed_memory();
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
    let Attachment { by_helper, device, .. } = connection.place;
    let mut served = Served { mount: None, device, undo: by_helper.then(|| connection.place.target.clone()) };
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
            served.mount = mount;
            // Its pages are shared with the daemon: to free what is in them would copy them first.
            std::mem::forget(engine);
            // Asked at once, and answered by the first thread that serves, while the daemon does the rest. If the daemon
            // ends before, the kernel ends the request with its connection, and the daemon's own error is reported.
            let looked = served.look_at_root(point.path());
            wait_until_ready(reader, point.path())?;
            looked?;
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
        device: connection.place.device,
        undo: connection.place.by_helper.then(|| connection.place.target.clone()),
    });
    let Connection { fd, mut mount, place, acl, is_checked } = connection;
    let files = table::files_of(place.device)?;
    let record = enter(files.as_deref())?.then(|| record(plan, &place, options, files.as_deref(), false));
    serve(plan, Link { fd, place: Some(place), acl, is_checked }, engine, options, record, &mut || {
        if let Some(mut served) = served.take() {
            served.mount = mount.take();
            served.attach(point)?;
        }
        ready();
        Ok(())
    })
}

/// Serves a plan to a connection of FUSE that the caller has mounted, in this process, until the caller ends it. Calls
/// `ready` when it is ready. There is no record of the mount: it is the caller's.
///
/// # Errors
/// As [`prepare`], and a number that is no connection.
pub fn serve_connection(
    plan: &MountPlan,
    number: RawFd,
    flags: &MountFlags,
    options: &FuseOptions,
    terminal: Box<dyn Write + Send>,
    ready: &mut dyn FnMut(),
) -> Result<(), MountError> {
    daemon_log::install(None, false, Some(terminal));
    sys::daemon::lean_allocator();
    let fd = sys::fuse::take_connection(number).map_err(MountError::Device)?;
    let engine = prepare(plan, options)?;
    // With what options the caller has mounted it is not known here.
    let link = Link { fd, place: None, acl: acl(flags), is_checked: false };
    serve(plan, link, engine, options, None, &mut || {
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
            let Connection { fd, mut mount, place, acl, is_checked } = connection;
            let files = table::files_of(place.device)?;
            let is_recorded = enter(files.as_deref())?;
            let log = files.as_ref().map(|files| files.with_extension("log"));
            // By its name in that folder, which goes along when the root is switched.
            daemon_log::install(log.as_deref().and_then(Path::file_name).map(Path::new), true, None);
            let record = is_recorded.then(|| record(plan, &place, options, files.as_deref(), true));
            serve(
                plan,
                Link { fd, place: Some(place), acl, is_checked },
                engine,
                options,
                record,
                &mut || {
                    // The process that attaches it has a descriptor of its own; with this one nobody could unmount it.
                    drop(mount.take());
                    match pipe.take() {
                        // Dropping the writing end is what lets the reader go on.
                        Some(mut pipe) => pipe.write_all(READY).map_err(|source| MountError::System {
                            operation: "say that the mount is ready",
                            source,
                        }),
                        None => Ok(()),
                    }
                },
            )
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

fn record(
    plan: &MountPlan,
    place: &Attachment,
    options: &FuseOptions,
    files: Option<&Path>,
    has_log: bool,
) -> MountRecord {
    let pid = std::process::id();
    let start_ticks = sys::process::started_at(pid).unwrap_or(0);
    let file = |ending| files.map(|files| files.with_extension(ending));
    let (log, lock) = (has_log.then(|| file("log")).flatten(), file("lock"));
    let daemon = DaemonRecord { pid, start_ticks, log, lock, errors: Default::default() };
    let record = MountRecord::new(plan, &place.target, FUSE, place.device, Some(daemon));
    MountRecord { shift: options.shift, ..record }
}

/// A connection that is to be served.
struct Link {
    fd: OwnedFd,
    /// Where its mount is; `None` where the mount is the caller's own.
    place: Option<Attachment>,
    acl: SessionACL,
    is_checked: bool,
}

/// Serves a connection until its mount is gone, from the folder of records ([`table::enter`]) where there is a record.
///
/// Calls `ready` when all threads run. Its last error ends all.
///
/// Blocks SIGTERM, SIGINT and SIGHUP in this process; each of them triggers an unmount. Where the mount
/// is the caller's own, a signal ends the process.
fn serve(
    plan: &MountPlan,
    link: Link,
    mut engine: Engine,
    options: &FuseOptions,
    record: Option<MountRecord>,
    ready: &mut dyn FnMut() -> Result<(), MountError>,
) -> Result<(), MountError> {
    let failed = |operation| move |source| MountError::System { operation, source };
    let Link { fd, place, acl, is_checked } = link;
    let signals = Signals::block().map_err(failed("block signals"))?;
    let (queue, store, news) = prefill::queue();
    engine.set_surplus(Box::new(queue));
    engine.set_before_decoding(lead::decoding);
    let engine = Arc::new(engine);
    let siblings = Arc::new(Siblings::default());
    let (pulse, when) = (Arc::new(RequestCounter::default()), options.spin);
    let threads = if options.threads == 0 { limits::default_threads() } else { options.threads };
    let turns = Arc::new(Lead::default());
    let view = Arc::new(View {
        engine: engine.clone(),
        siblings: siblings.clone(),
        shift: options.shift,
        acls: OnceLock::new(),
    });
    let pool = plan.remote().map(|_| Arc::default());
    let opens = options.idle.map(|_| Arc::new(Opens::default()));
    let tree = Tree {
        view,
        pulse: pulse.clone(),
        lead: turns.clone(),
        opens: opens.clone(),
        pool,
        // Ids that are moved already are not for another map.
        maps_ids: is_checked && options.shift.is_none(),
    };

    let mut config = Config::default();
    config.n_threads = Some(threads);
    config.clone_fd = true;
    // Who may enter is the kernel's decision (allow_other); fuser need not decide again.
    let session = Session::from_fd(tree, fd, acl, config).map_err(failed("answer the kernel's INIT"))?;
    let kept = SharedRecord(Arc::new(Mutex::new(record)));

    // But for the one that serves, none of these threads is waited for: they end with the process. Those on demand
    // are not there while nobody uses the mount.
    let notifier = session.notifier();
    let (stored, troubled, copy) = (Arc::clone(&engine), Arc::downgrade(&engine), session.as_fd());
    let copy = copy.try_clone_to_owned().map_err(failed("copy the connection"))?;
    let works = Arc::clone(&turns);
    let _ = store.set(OnDemand::new("store", move || {
        prefill::run(&news, &stored, &siblings, &notifier, &works);
    }));
    let reported = kept.clone();
    let reporter = OnDemand::new("report", move || {
        if let Some(engine) = troubled.upgrade() {
            report(&engine, &reported);
        }
    });
    engine.troubles().on_error(move || reporter.start());
    let beats = Arc::clone(&pulse);
    pulse.on_first(OnDemand::new("spin", move || {
        spin::run(&beats, when);
        turns.begin(copy);
    }));
    // Held until the record is registered, so that no count of errors is written before it.
    let registering = locks::lock(&kept.0);
    // The threads start while this one does the rest. Nobody can use the mount before it is attached; where `fusermount3`
    // has attached it, all that answers requests is ready.
    let serving = spawn(SERVE, move || session.run())?;
    if let Some(Attachment { device, by_helper: false, .. }) = place {
        limits::raise_read_ahead(device);
    }
    let _alive = registering.as_ref().map(table::register_here).transpose()?;
    drop(registering);
    let _clean = RemoveOnDrop(kept.clone());
    if let Some(blobs) = plan.remote().cloned() {
        let fetched = kept.clone();
        spawn("progress", move || report_progress(blobs.as_ref(), &fetched))?;
    }
    if let (Some(opens), Some(idle)) = (opens, options.idle) {
        let (place, pulse) = (place.clone(), pulse.clone());
        spawn("idle", move || {
            idle::run(idle, &pulse, &opens, &mut || match &place {
                Some(place) => place.unmount(false),
                // The caller's mount ends with its connection.
                None => std::process::exit(0),
            })
        })?;
    }
    let grace = options.grace;
    spawn("signals", move || obey(&signals, place.as_ref(), grace))?;
    if let Some(blobs) = plan.remote() {
        blobs.start().map_err(failed("start a thread"))?;
    }
    if all_serve(threads, &serving) {
        ready()?;
    }
    match serving.join() {
        Ok(done) => done.map_err(failed("serve requests")),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The record of a mount while it lasts; removed, once and for all, when this is dropped.
#[derive(Clone)]
struct SharedRecord(Arc<Mutex<Option<MountRecord>>>);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        if let Some(record) = locks::lock(&self.0.0).take() {
            table::remove_here(&record);
        }
    }
}

struct RemoveOnDrop(SharedRecord);

/// Unmounts when a signal asks for it. See the module's comment.
fn obey(signals: &Signals, place: Option<&Attachment>, grace: Duration) {
    let mut asked = false;
    while let Ok(signal) = signals.wait() {
        let Some(place) = place else { std::process::exit(0) };
        if asked {
            log::warn!("signal {signal} again: ending at once");
            std::process::exit(1);
        }
        asked = true;
        std::thread::sleep(grace);
        let done = place.unmount(false).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Err(error),
            _ => {
                log::info!("{} is in use: unmounting lazily", place.target.display());
                place.unmount(true)
            }
        });
        if let Err(error) = done {
            log::error!("signal {signal}: cannot unmount {}: {error}", place.target.display());
            asked = false;
        }
    }
}

impl Attachment {
    /// Unmounts what this process serves. `NotFound` where it is not there any more, or is below another mount.
    fn unmount(&self, lazy: bool) -> io::Result<()> {
        // Somebody may have mounted something else on top since.
        if sys::fuse::device_of(&self.target).is_ok_and(|found| found == self.device) {
            return unmount_at(&self.target, self.by_helper, lazy);
        }
        let why = "it is not our mount any more, or another is on it";
        Err(io::Error::new(io::ErrorKind::NotFound, why))
    }
}

/// Keeps the record up to date on how much is here of what comes from another machine.
fn report_progress(blobs: &dyn Blobs, kept: &SharedRecord) {
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
fn report(engine: &Engine, kept: &SharedRecord) {
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
