//! `mosfs run-target NAME`: starts a container, in the place of this process.
//!
//! ```text
//! own mount namespace   nothing that is mounted from here on shows on the host, and all of it goes with the last process;
//!                       what the host unmounts is unmounted here, too
//! root, mounts          root.rs, mounts.rs
//! config.json           in the tmpfs of that namespace
//! exec crun run         in the control group of this process: limits of its unit hold for the container
//! ```
//!
//! The runtime stays in the foreground: it forwards signals, and ends with the exit code of the container. Where a
//! standard stream is a file, this process stays too, and copies (stdio.rs).

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::bundle::{self, Bundle};
use super::mounts::{self, Folders};
use super::places::{Places, write_note};
use super::program;
use super::root::{self, step};
use super::user::User;
use super::{Container, RunError, ids, network, programs, runtime, shifted, stdio, units, user};
use crate::error::IoContext;
use crate::manifest::rules;
use crate::manifest::workload::Writable;
use crate::manifest::{Network, workload::Ready};
use crate::sys::flock::{self, Lock};
use crate::sys::{self, file, namespace};

/// Where Debian's packages put a small init, the first that is there: tini-static, catatonit.
const INITS: [&str; 3] = ["/usr/bin/tini-static", "/usr/bin/catatonit", "/usr/libexec/podman/catatonit"];

/// Returns the configuration that a container would be started with. Nothing is left of what is made for it.
pub fn print(container: &Container, places: &Places) -> Result<Value, RunError> {
    Ok(make(container, places, false)?.0)
}

/// Mounts the trees of a container whose ids the kernel cannot map, in another process than this one.
pub type MountShifted<'a> = &'a dyn Fn() -> Result<(), RunError>;

/// Starts a container in the place of this process; returns only what went wrong.
///
/// Only for a process with one thread and without children, as root: the runtime would wait for them.
pub fn exec(container: &Container, places: &Places, mount_shifted: MountShifted<'_>) -> RunError {
    match replace(container, places, mount_shifted) {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

fn replace(
    container: &Container,
    places: &Places,
    mount_shifted: MountShifted<'_>,
) -> Result<std::convert::Infallible, RunError> {
    let target = container.name.as_str();
    programs::check(container)?;
    require_room(target, &places.run)?;
    places.make_notes()?;
    let lock = require_ended(places, target)?;
    units::forget_last_run(places, target);
    let (config, work) = match make(container, places, true) {
        // It is found before anything is made.
        Err(RunError::NoIdMap { .. }) => {
            mount_shifted()?;
            make(container, places, true)
        }
        made => made,
    }?;
    let config = serde_json::to_vec_pretty(&config).map_err(step(target, "write the configuration"))?;
    let path = work.join("config.json");
    fs::write(&path, config).on("write", &path)?;
    if container.is_simple() {
        network::join(places, target, &container.addresses, &container.published)
            .map_err(step(target, "set up its network"))?;
    }
    // What a runtime that was killed has left: the next start would call it a container that exists. Mostly there is
    // nothing, and a run of the runtime is a tenth of a start.
    if places.runtime().join(target).exists() {
        runtime::delete(places, target, true).map_err(step(target, "run crun delete"))?;
    }
    let key = places.key(target);
    write_note(&key, &format!("{}\n", container.key)).map_err(step(target, "start"))?;
    let mut run = runtime::runtime(places);
    // Besides its errors on stderr: for `mosfs ps`.
    run.arg("--log-format=json").arg("--log").arg(places.runtime_log(target));
    run.args(["run", "--bundle"]).arg(&work).arg(target);
    if !stdio::can_be_replaced() {
        stdio::replace_by_copier(&run);
        let status = stdio::run(run).map_err(step(target, "run crun"))?;
        std::process::exit(stdio::exit_code(status));
    }
    stdio::replace_null(&mut run, &|| null(target, &work)).map_err(step(target, "make a null device"))?;
    lock.keep().map_err(step(target, "keep its lock"))?;
    Err(step(target, "run crun")(run.exec()))
}

/// Requires that no container of the target starts or runs: the start would end it, as what a killed runtime has left.
/// Returns the lock that keeps others from starting it.
fn require_ended(places: &Places, target: &str) -> Result<Lock, RunError> {
    let path = places.lock(target);
    let lock = Lock::try_exclusive(&path).on("lock", &path)?;
    match (runtime::pid(places, target), lock) {
        // One without a runtime that keeps it in order is what the start removes.
        (Some(pid), _) if runtime::is_kept(pid) => Err(RunError::Running { target: target.into(), pid }),
        (_, None) => Err(RunError::Starting { target: target.into(), pid: flock::holder(&path) }),
        (_, Some(lock)) => Ok(lock),
    }
}

/// Bytes that the runtime and mosfs need in `/run/mosfs` for a container.
const ROOM: u64 = 64 << 10;

/// Requires room for the state of the runtime, which would otherwise state a failed system call and not what is full.
fn require_room(target: &str, run: &Path) -> Result<(), RunError> {
    match file::available_bytes(run) {
        Ok(free) if free < ROOM => {
            let why = format!("its file system has {free} bytes free, expected at least {ROOM}");
            Err(step(target, &format!("keep its state in {}", run.display()))(why))
        }
        _ => Ok(()),
    }
}

/// Opens a null device that is the container's own.
fn null(target: &str, work: &Path) -> io::Result<fs::File> {
    let folder = work.join("null");
    let node = folder.join("null");
    if !node.exists() {
        file::create_folder(&folder, 0o711).map_err(|error| error.source)?;
        root::mount_devices(target, &folder).map_err(io::Error::other)?;
        file::create_device(&node, stdio::null_device(), (0, 0))?;
        fs::set_permissions(&node, fs::Permissions::from_mode(0o666))?;
    }
    fs::File::options().read(true).write(true).open(&node)
}

/// Makes root, mounts and configuration, in a mount namespace of its own.
fn make(container: &Container, places: &Places, for_real: bool) -> Result<(Value, PathBuf), RunError> {
    let target = container.name.as_str();
    let run = container.target.workload.run();
    let containers = places.containers();
    file::create_folders(&containers)?;
    let work = places.work(target);
    file::create_folders(&work)?;
    let ids: Option<OwnedFd> = container
        .base
        .map(|base| namespace::user_namespace(base, ids::COUNT))
        .transpose()
        .map_err(step(target, "make a user namespace"))?;
    let mapped = ids.as_ref().map(AsFd::as_fd);
    let targets = crate::deploy::activate::targets_dir(&places.run);
    // To print, nothing is mounted: then the ids are those of the image.
    let group = container.base.zip(mapped).filter(|_| for_real);
    // From the host's mounts, which the namespace only has copies of.
    let shifted = shifted::place(&places.run, container.base.unwrap_or(0), target);
    let trees = shifted::trees_of_group(target, &container.tree, &targets.join(target), &shifted, group)?;
    namespace::enter_mount_namespace().map_err(step(target, "make a mount namespace"))?;
    root::mount_tmpfs(target, &work, "0711", None)?;
    let size = match &run.writable {
        None | Some(Writable::No) => None,
        Some(Writable::Yes) => Some(None),
        Some(Writable::Size(size)) => Some(rules::size(size).ok()),
    };
    let root = root::assemble(container, trees, &mounts::places(container), &work, size)?;
    let folder = file::open_folder(&root).on("open", &root)?;
    let text = container.image.user.as_deref().unwrap_or_default();
    let user = user::find(folder.as_fd(), text).map_err(|why| RunError::User {
        target: target.into(),
        user: text.into(),
        why,
    })?;
    drop(folder);
    if container.base.is_some() {
        let ids = [user.uid, user.gid].into_iter().chain(user.more_gids.iter().copied());
        if let Some(id) = ids.into_iter().find(|id| *id >= ids::COUNT) {
            let why = format!("id {id} is not below {}, and the target has a group of ids", ids::COUNT);
            return Err(RunError::User { target: target.into(), user: text.into(), why });
        }
    }
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let volumes = places.system.join("volumes");
    let hosts = places.hosts(target);
    let folders = Folders {
        work: &work,
        hosts: &hosts,
        targets: &targets,
        run: &places.run,
        volumes: &volumes,
        credentials: credentials.as_deref(),
    };
    let ids = mapped.filter(|_| for_real);
    let prepared = mounts::prepare(container, &folders, &root, &user, ids, for_real)?;
    if for_real {
        mounts::check_destinations(target, &root, &prepared)?;
        check_program(container, &root, &prepared, &user)?;
    }
    let init = init(target, run.init)?;
    let notify = match container.target.workload.ready {
        Some(Ready::Notify) => notify_socket(target, for_real)?,
        None => None,
    };
    let connect = match container.target.network {
        Network::Simple { .. } => network::connect_arguments(&container.name, &container.addresses),
        _ => None,
    };
    let program = sys::process::program();
    let connect = connect
        .map(|arguments| std::iter::once(program.display().to_string()).chain(arguments).collect::<Vec<_>>());
    let config = bundle::config(&Bundle {
        name: &container.name,
        target: &container.target,
        image: &container.image,
        user: &user,
        base: container.base,
        root: &root,
        mounts: &prepared,
        init: init.as_deref(),
        notify: notify.as_deref(),
        connect: connect.as_deref(),
        unified: Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
    });
    Ok((config, work))
}

/// Requires that the program of a container can be run, as far as that can be known before.
fn check_program(
    container: &Container,
    root: &Path,
    mounts: &[bundle::Prepared],
    user: &User,
) -> Result<(), RunError> {
    let arguments = bundle::command(&container.target, &container.image);
    let Some(program) = arguments.first() else { return Ok(()) };
    let environment = bundle::environment(&container.target, &container.image, user);
    let mut mounts = mounts.to_vec();
    bundle::add_memory(&mut mounts);
    let tree = program::Tree::of(container, root, &mounts, user);
    let Some(why) = program::problem(&tree, program, &environment) else { return Ok(()) };
    Err(RunError::Program {
        target: container.name.to_string(),
        program: rules::printable(program, 200),
        image: container.tree.digest().map_or_else(|| container.tree.source.clone(), |one| one.to_string()),
        why: rules::printable(&why, 1000),
    })
}

/// The init of the host that is process 1, if the manifest asks for one.
fn init(target: &str, wanted: Option<bool>) -> Result<Option<PathBuf>, RunError> {
    if wanted != Some(true) {
        return Ok(None);
    }
    let found = INITS.iter().map(PathBuf::from).find(|path| path.is_file());
    let missing = || RunError::NoProgram {
        target: target.into(),
        program: "tini-static",
        package: "tini or catatonit",
    };
    found.map(Some).ok_or_else(missing)
}

/// The socket where the program reports that it is ready.
fn notify_socket(target: &str, for_real: bool) -> Result<Option<PathBuf>, RunError> {
    match std::env::var_os("NOTIFY_SOCKET").map(PathBuf::from) {
        Some(path) if path.is_absolute() => Ok(Some(path)),
        _ if !for_real => Ok(Some("/run/systemd/notify".into())),
        _ => {
            let why =
                "there is no socket in NOTIFY_SOCKET; a target with `ready: notify` runs as its unit only";
            Err(step(target, "find the service manager")(why))
        }
    }
}
