//! The runtime, crun(1): its commands, and what it knows of the containers that it runs.
//!
//! Its state is in RUN/crun/NAME, by target. A container that it runs has it as its parent: it stays in the foreground,
//! and ends with the container.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::Deserialize;

use super::places::Places;
use super::programs;
use crate::sys::file;

/// Most bytes of a file of /proc that are read.
const MAX_PROC: u64 = 64 << 10;

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

/// The process 1 of a running container, as the host numbers it.
pub fn pid(places: &Places, target: &str) -> Option<u32> {
    /// A container as `crun state` prints it (OCI runtime specification, "State").
    #[derive(Deserialize)]
    struct State {
        status: String,
        #[serde(default)]
        pid: u32,
    }
    // Without it, the runtime would make the folder and those above it, closed to all others.
    if !places.runtime().join(target).exists() {
        return None;
    }
    let mut command = runtime(places);
    command.args(["state", target]).stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().ok()?;
    let state: State = serde_json::from_slice(&output.stdout).ok()?;
    (state.status == "running" && state.pid > 0).then_some(state.pid)
}

/// Whether the parent of a container's process 1 is a runtime, which keeps it in order and ends with it.
pub fn is_kept(pid: u32) -> bool {
    let read = |path: String| file::read_named(Path::new(&path), MAX_PROC).unwrap_or_default();
    // proc_pid_status(5).
    let status = read(format!("/proc/{pid}/status"));
    let status = String::from_utf8_lossy(&status);
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap_or_default().trim();
    read(format!("/proc/{parent}/comm")).trim_ascii() == programs::RUNTIME.0.as_bytes()
}

/// Removes the runtime's state of a container that has ended; with `force`, ends one that runs.
///
/// What the runtime says goes nowhere: mostly there is nothing to remove, which is an error for it.
///
/// # Errors
/// Those of starting the runtime.
pub fn delete(places: &Places, target: &str, force: bool) -> std::io::Result<()> {
    let mut delete = runtime(places);
    delete.arg("delete");
    if force {
        delete.arg("--force");
    }
    delete.arg(target).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    delete.status().map(drop)
}
