//! `mosfs run-target NAME`: starts a container, in the place of this process.
//!
//! ```text
//! own mount namespace   nothing that is mounted from here on shows on the host, and all of it goes with the last process
//! root, mounts          root.rs, mounts.rs
//! config.json           in the tmpfs of that namespace
//! exec crun run         in the control group of this process: limits of its unit hold for the container
//! ```
//!
//! The runtime stays in the foreground: it forwards signals, and ends with the exit code of the container.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::bundle::{self, Bundle};
use super::mounts::{self, Folders};
use super::root::{self, step};
use super::{Container, RunError, ids, network, programs, user};
use crate::error::IoContext;
use crate::manifest::rules;
use crate::manifest::workload::Writable;
use crate::manifest::{Network, workload::Ready};
use crate::sys::{self, file, namespace};

/// Where Debian's packages put a small init, the first that is there: tini-static, catatonit.
const INITS: [&str; 3] = ["/usr/bin/tini-static", "/usr/bin/catatonit", "/usr/libexec/podman/catatonit"];

/// Where a container is started from.
#[derive(Debug, Clone)]
pub struct Places {
    /// `/run/mosfs`.
    pub run: PathBuf,
    /// SYSTEM.
    pub system: PathBuf,
}

impl Places {
    /// The folder of what runs.
    fn containers(&self) -> PathBuf {
        self.run.join("containers")
    }

    /// The work folder of a container, which is empty outside of its mount namespace.
    fn work(&self, name: &str) -> PathBuf {
        self.containers().join(name)
    }

    /// The file with the run key that a container was started with.
    pub fn key(&self, name: &str) -> PathBuf {
        self.containers().join(format!("{name}.key"))
    }

    /// The file that says how the last run of a container ended.
    pub fn result(&self, name: &str) -> PathBuf {
        self.containers().join(format!("{name}.result"))
    }

    /// The file that says why the last start of a container failed.
    pub fn error(&self, name: &str) -> PathBuf {
        self.containers().join(format!("{name}.error"))
    }

    /// The state of the runtime.
    pub fn runtime(&self) -> PathBuf {
        self.run.join("crun")
    }
}

/// Returns the runtime with the options of each of its commands.
pub fn runtime(places: &Places) -> Command {
    let mut command = Command::new(programs::RUNTIME.0);
    command.arg("--cgroup-manager=disabled").arg("--root").arg(places.runtime());
    // What systemd says to the service is not for the container.
    for name in ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC"] {
        command.env_remove(name);
    }
    command
}

/// Returns the configuration that a container would be started with. Nothing is left of what is made for it.
pub fn print(container: &Container, places: &Places) -> Result<Value, RunError> {
    Ok(make(container, places, false)?.0)
}

/// Starts a container in the place of this process; returns only what went wrong.
///
/// Only for a process with one thread, as root.
pub fn exec(container: &Container, places: &Places) -> RunError {
    match replace(container, places) {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

fn replace(container: &Container, places: &Places) -> Result<std::convert::Infallible, RunError> {
    let target = container.name.as_str();
    programs::check(container)?;
    let (config, work) = make(container, places, true)?;
    let config = serde_json::to_vec_pretty(&config).map_err(step(target, "write the configuration"))?;
    let path = work.join("config.json");
    fs::write(&path, config).on("write", &path)?;
    if let Network::Simple { .. } = container.target.network {
        network::set_up(&container.addresses, &container.published)
            .map_err(step(target, "set up its network"))?;
    }
    // What a runtime that was killed has left: the next start would call it a container that exists.
    let mut delete = runtime(places);
    delete
        .args(["delete", "--force", target])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    delete.status().map_err(step(target, "run crun delete"))?;
    for old in [places.result(target), places.error(target)] {
        let _ = fs::remove_file(old);
    }
    let key = places.key(target);
    fs::write(&key, format!("{}\n", container.key)).on("write", &key)?;
    let mut run = runtime(places);
    run.args(["run", "--bundle"]).arg(&work).arg(target);
    Err(step(target, "run crun")(run.exec()))
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
    // From the host's mounts, which the namespace only has copies of.
    let trees = root::trees(target, &container.tree, &targets.join(target), mapped)?;
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
    let folders =
        Folders { work: &work, targets: &targets, volumes: &volumes, credentials: credentials.as_deref() };
    let prepared = mounts::prepare(container, &folders, &root, &user, mapped, for_real)?;
    let init = init(target, run.init)?;
    let notify = match container.target.workload.ready {
        Some(Ready::Notify) => notify_socket(target, for_real)?,
        None => None,
    };
    let connect = match container.target.network {
        Network::Simple { .. } => network::connect_arguments(&container.name, &container.addresses),
        _ => None,
    };
    let program = sys::process::own_program().unwrap_or_else(|| "/usr/bin/mosfs".into());
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
