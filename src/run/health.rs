//! Commands inside a running container: `mosfs exec`, and the health of a target.
//!
//! A target is healthy when its container runs and, if the manifest has `health`, when that command has succeeded once.
//! Its unit is active from then on, and what needs it is started. The command is then repeated by a process of the unit
//! ([`watch`]), which keeps the unit's watchdog (WatchdogSec= in systemd.service(5)) from acting as long as the command succeeds:
//!
//! ```text
//! success            WATCHDOG=1          RUN/notes/NAME.unhealthy is removed
//! failure            WATCHDOG=1          ... has the reason
//! `retries` in a row WATCHDOG=trigger    systemd sends the stop signal, and starts the target again as `restart` says
//! no process of ours                     the watchdog acts by itself, some time later
//! ```

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use super::places::{Places, write_note};
use super::root::step;
use super::runtime::{pid, runtime};
use super::{Container, RunError, bundle, program, stdio, units, user};
use crate::error::{IoContext, IoError, without_target};
use crate::manifest::rules;
use crate::manifest::workload::{Health, Restart};
use crate::sys::said::Said;
use crate::sys::{file, notify};

/// Time between two looks at something that has no event to wait for.
const LOOK: Duration = Duration::from_millis(50);
/// Longest time between two attempts while failures do not count.
const START_INTERVAL: Duration = Duration::from_secs(1);

/// What is run in a container besides its own command.
#[derive(Debug, Clone, Copy)]
pub struct Other<'a> {
    /// The command and its arguments.
    pub command: &'a [String],
    /// As whom, in place of the image's user.
    pub user: Option<&'a str>,
    /// Whether it has a terminal.
    pub terminal: bool,
}

/// Returns the runtime's command that runs another command in a container, and the file that it reads.
///
/// # Errors
/// [`RunError::NotRunning`]; [`RunError::User`].
fn command(
    container: &Container,
    places: &Places,
    other: &Other<'_>,
) -> Result<(Command, ProcessFile), RunError> {
    let target = container.name.as_str();
    let Some(pid) = pid(places, target) else {
        return Err(RunError::NotRunning { target: target.into() });
    };
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let root = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(&root)
        .map_err(step(target, "open the root of its container"))?;
    let text = other.user.or(container.image.user.as_deref()).unwrap_or_default();
    let user = user::find(root.as_fd(), text).map_err(|why| RunError::User {
        target: target.into(),
        user: text.into(),
        why,
    })?;
    let mut environment = bundle::environment(&container.target, &container.image, &user);
    if other.terminal
        && let Ok(terminal) = std::env::var("TERM")
    {
        environment.push(format!("TERM={terminal}"));
    }
    let process = bundle::process(
        &container.target,
        &container.image,
        &user,
        other.command,
        &environment,
        other.terminal,
    );
    let file = ProcessFile::new(places, target, process.to_string().as_bytes())
        .map_err(step(target, "say what is to run"))?;
    let mut command = runtime(places);
    command.arg("exec").arg("--process").arg(&file.path);
    Ok((command, file))
}

/// A file for the runtime, which is removed when it is dropped.
#[derive(Debug)]
struct ProcessFile {
    path: PathBuf,
}

impl ProcessFile {
    fn new(places: &Places, target: &str, text: &[u8]) -> Result<Self, IoError> {
        let name = format!("containers/.{target}.{}", std::process::id());
        let path = places.run.join(name);
        let _ = fs::remove_file(&path);
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let mut file: File = file.on("write", &path)?;
        let made = Self { path };
        file.write_all(text).on("write", &made.path)?;
        Ok(made)
    }
}

impl Drop for ProcessFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Runs a command in a container; returns its exit code when it has ended.
///
/// # Errors
/// As [`command`], and those of starting the runtime; [`RunError::Command`] if the program cannot run.
pub fn run(container: &Container, places: &Places, other: &Other<'_>) -> Result<i32, RunError> {
    let target = container.name.as_str();
    let (mut command, _file) = command(container, places, other)?;
    // Before the runtime would say it in its own words.
    if let Some((program, why)) = unrunnable(container, places, other) {
        return Err(RunError::Command { target: target.into(), program, why });
    }
    command.arg(target);
    let status = stdio::run(command).map_err(step(target, "run crun exec"))?;
    Ok(stdio::exit_code(status))
}

/// Waits until a target is healthy: called by its unit after the container was started.
///
/// `main` is the process of the runtime, if it is known: when it ends, the target will never be healthy.
///
/// # Errors
/// [`RunError::Unit`] with the reason.
pub fn wait(container: &Container, places: &Places, main: Option<u32>) -> Result<(), RunError> {
    let target = container.name.as_str();
    let is_gone = || main.is_some_and(is_gone);
    let ended = || {
        // systemd knows the exit code, and whether it means success.
        match container.target.workload.run().restart {
            None | Some(Restart::Always) => {
                Err(RunError::Unit { target: target.into(), why: units::ENDED_EARLY.into() })
            }
            Some(_) => Ok(()),
        }
    };
    while pid(places, target).is_none() {
        if is_gone() {
            return ended();
        }
        say("WATCHDOG=1");
        std::thread::sleep(LOOK);
    }
    let Some(health) = &container.target.workload.health else {
        // What needs a job starts when its work is done; how it has ended is what systemd knows.
        while container.is_awaited && main.is_some() && !is_gone() {
            std::thread::sleep(LOOK);
        }
        return Ok(());
    };
    let begin = Instant::now();
    let mut failures = 0;
    loop {
        if is_gone() {
            return ended();
        }
        say("WATCHDOG=1");
        match ask_once(container, places, health) {
            Ok(()) => return Ok(()),
            Err(why) => {
                let starting = begin.elapsed() < health.start();
                if !starting {
                    failures += 1;
                }
                log::info!("target {target} is not healthy: {why}");
                if failures >= health.retries() {
                    let why = format!(
                        "it is not healthy: {failures} failures in a row after its {} s to start; the last: {why}",
                        health.start().as_secs()
                    );
                    return Err(RunError::Unit { target: target.into(), why });
                }
                let pause = if starting { health.interval().min(START_INTERVAL) } else { health.interval() };
                std::thread::sleep(pause);
            }
        }
    }
}

/// Whether a process has ended.
fn is_gone(pid: u32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}

/// Repeats the command of `health` of a target that has been healthy, as long as its runtime, the process `main`, runs.
///
/// Returns at once where there is nothing to repeat.
pub fn watch(container: &Container, places: &Places, main: Option<u32>) {
    let target = container.name.as_str();
    let Some(health) = &container.target.workload.health else { return };
    let note = places.unhealthy(target);
    let mut failures = 0;
    loop {
        std::thread::sleep(health.interval());
        // Where it has done its work, its unit stays, and does not end this process.
        if main.is_some_and(is_gone) {
            return;
        }
        // It is stopping, or systemd is about to start it again: neither is a matter of its health.
        if pid(places, target).is_none() {
            continue;
        }
        let Err(why) = ask_once(container, places, health) else {
            failures = 0;
            let _ = fs::remove_file(&note);
            say("WATCHDOG=1");
            continue;
        };
        failures += 1;
        let why = format!("it is not healthy: failure {failures} of {} in a row: {why}", health.retries());
        log::warn!("target {target}: {why}");
        if let Err(error) = write_note(&note, &why) {
            log::warn!("target {target}: {error}");
        }
        if failures >= health.retries() {
            let error = RunError::Unit { target: target.into(), why };
            units::note_error(places, target, &error.to_string());
            say("WATCHDOG=trigger");
            // The signal comes to all of the unit.
            failures = 0;
        } else {
            say("WATCHDOG=1");
        }
    }
}

/// Requires that a target that runs is healthy now: that one of `retries` attempts succeeds.
///
/// # Errors
/// [`RunError::Unit`] with the reason of the last attempt.
pub fn ask(container: &Container, places: &Places) -> Result<(), RunError> {
    let Some(health) = &container.target.workload.health else { return Ok(()) };
    let mut attempt = 1;
    loop {
        let Err(why) = ask_once(container, places, health) else { return Ok(()) };
        if attempt >= health.retries() {
            let why = format!("it is not healthy: {attempt} failures in a row; the last: {why}");
            return Err(RunError::Unit { target: container.name.to_string(), why });
        }
        attempt += 1;
        std::thread::sleep(health.interval());
    }
}

fn ask_once(container: &Container, places: &Places, health: &Health) -> Result<(), String> {
    let other = Other { command: &health.command, user: None, terminal: false };
    attempt(container, places, &other, health.timeout())
}

/// Sends the service manager a state, if there is one.
fn say(state: &str) {
    if let Err(error) = notify::service_says(state) {
        log::warn!("cannot send {state} to the service manager: {error}");
    }
}

/// The program of a command and why it cannot run in a running container, if that is so.
fn unrunnable(container: &Container, places: &Places, other: &Other<'_>) -> Option<(String, String)> {
    let program = other.command.first()?;
    // With all that is mounted there.
    let path = PathBuf::from(format!("/proc/{}/root", pid(places, container.name.as_str())?));
    let text = other.user.or(container.image.user.as_deref()).unwrap_or_default();
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let root = fs::OpenOptions::new().read(true).custom_flags(flags).open(&path).ok()?;
    let user = user::find(root.as_fd(), text).ok()?;
    let environment = bundle::environment(&container.target, &container.image, &user);
    let tree = program::Tree::of(container, &path, &[], &user);
    let why = program::problem(&tree, program, &environment)?;
    Some((rules::printable(program, 200), rules::printable(&why, 1000)))
}

/// Connects a command to what reads the end of both of its outputs. Its input is at its end.
fn said_by(command: &mut Command) -> std::io::Result<Said> {
    let (said, writer) = Said::new()?;
    command.stdin(stdio::ended()?).stdout(writer.try_clone()?).stderr(writer);
    Ok(said)
}

/// Runs the command of `health` once.
fn attempt(
    container: &Container,
    places: &Places,
    other: &Other<'_>,
    timeout: Duration,
) -> Result<(), String> {
    let target = container.name.as_str();
    let (mut command, file) = command(container, places, other)
        .map_err(|error| without_target(target, &error.to_string()).to_string())?;
    // The process in the container, which does not end with the runtime that started it.
    let pid_file = file.path.with_extension("pid");
    let _ = fs::remove_file(&pid_file);
    command.arg("--pid-file").arg(&pid_file).arg(target);
    let said = said_by(&mut command).map_err(|error| format!("cannot make a pipe: {error}"))?;
    let mut child = command.spawn().map_err(|error| format!("cannot run crun exec: {error}"))?;
    // It holds the writing ends.
    drop(command);
    let outcome = wait_for(&mut child, timeout);
    if outcome.is_none() {
        end(&mut child, &pid_file);
    }
    let _ = fs::remove_file(&pid_file);
    match outcome {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(match unrunnable(container, places, other) {
            Some((program, why)) => format!("its health command cannot run: the program {program} {why}"),
            None => format!("its health command ended with {status}{}", said.last_line()),
        }),
        None => {
            Err(format!("its health command took longer than {} s{}", timeout.as_secs(), said.last_line()))
        }
    }
}

/// How long the runtime may take to say which process it has started, and to end with it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Ends a command in a container that has taken too long: the process inside, then the runtime that waits for it.
fn end(child: &mut Child, pid_file: &Path) {
    let read = || {
        let text = file::find_regular(pid_file, file::Links::Refused, 100).ok()??;
        String::from_utf8(text).ok()?.trim().parse::<u32>().ok()
    };
    let begin = Instant::now();
    // Where the machine is slow, the command may not even have been started.
    while read().is_none() && begin.elapsed() < PATIENCE && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(LOOK);
    }
    if let Some(inner) = read() {
        crate::sys::process::kill(inner);
        if wait_for(child, PATIENCE).is_some() {
            return;
        }
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// Waits for a child; `None` if it still runs after this time.
fn wait_for(child: &mut Child, timeout: Duration) -> Option<std::process::ExitStatus> {
    let end = Instant::now() + timeout;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < end => std::thread::sleep(LOOK),
            _ => return None,
        }
    }
}
