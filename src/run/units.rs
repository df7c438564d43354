//! The service of systemd that runs a container.
//!
//! ```text
//! /run/systemd/system/mosfs-target@NAME.service    made by activation from the signed manifest; gone with this boot
//! /etc/systemd/system/mosfs-target@NAME.service.d/ local changes, such as limits; they win
//! ```
//! It starts `mosfs run-target NAME`, which verifies everything again: a changed file of the unit changes limits and
//! order, but not what runs.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::places::{Places, write_note};
use super::{Container, RunError};
use crate::digest::Digest;
use crate::error::{IoContext, IoError, without_target};
use crate::manifest::workload::{Ready, Restart};
use crate::sorting;
use crate::sys::atomic;
use crate::sys::failpoint;
use crate::sys::file;

/// Where units of this boot are.
pub const UNITS: &str = "/run/systemd/system";

/// Seconds between the stop signal and SIGKILL, if the manifest states none.
const STOP_SECONDS: u64 = 10;
/// Most processes and threads of a target, if the manifest states none.
const TASKS: u64 = 1024;
/// Seconds that the start of a target may take besides its health.
const START_SECONDS: u64 = 60;

/// The name of a target's unit.
pub fn name(target: &str) -> String {
    format!("mosfs-target@{target}.service")
}

/// The target of a unit of ours.
pub fn target_of(unit: &str) -> Option<&str> {
    unit.strip_prefix("mosfs-target@")?.strip_suffix(".service")
}

/// What a unit is made of besides the container.
#[derive(Debug, Clone)]
pub struct Settings<'a> {
    /// The program mosfs.
    pub program: &'a Path,
    /// SYSTEM.
    pub system: &'a Path,
    /// CONFIG.
    pub config: &'a Path,
    /// `$MOSFS_RUN`, if it is set.
    pub run: Option<&'a OsStr>,
    /// The units of the FUSE daemons that serve its image and the targets that it mounts.
    pub daemons: &'a [String],
}

/// A word as systemd reads it in a unit (systemd.syntax(7), "Quoting"; systemd.unit(5), "Specifiers").
fn quoted(word: &OsStr) -> String {
    let mut out = "\"".to_string();
    for &byte in word.as_bytes() {
        match byte {
            b'"' | b'\\' => out.extend(['\\', byte.into()]),
            b'%' => out.push_str("%%"),
            0x20..=0x7e => out.push(byte.into()),
            other => _ = write!(out, "\\x{other:02x}"),
        }
    }
    out.push('"');
    out
}

/// An argument of a command, in which systemd would replace variables.
fn argument(word: &OsStr) -> String {
    quoted(word).replace('$', "$$")
}

/// Returns the text of a target's unit.
pub fn text(container: &Container, settings: &Settings<'_>) -> String {
    let target = container.name.as_str();
    let workload = &container.target.workload;
    let run = workload.run();
    let mosfs = |more: &str| {
        format!(
            "{} --system {} --config {} run-target {more}{target}",
            argument(settings.program.as_os_str()),
            argument(settings.system.as_os_str()),
            argument(settings.config.as_os_str())
        )
    };
    let mut unit = format!(
        "# Made by `mosfs activate` from the signed manifest, and replaced by it. Local changes belong in\n\
         # /etc/systemd/system/{}.d/.\n[Unit]\nDescription=Target {target} (mosfs)\n\
         Documentation=man:mosfs-run-target(1)\n",
        name(target)
    );
    let restart = run.restart.unwrap_or(Restart::Always);
    // Requires and After: it is restarted with the other, and starts after it. A job that has finished reads nothing any
    // more: it does not run again when the daemon of its image dies.
    let on_daemons = if restart == Restart::No { "Wants" } else { "Requires" };
    for daemon in settings.daemons {
        let _ = writeln!(unit, "{on_daemons}={daemon}\nAfter={daemon}");
    }
    for needed in workload.needs().iter().map(|needed| name(needed.as_str())) {
        let _ = writeln!(unit, "Requires={needed}\nAfter={needed}");
    }
    // A target that always ends at once is given up, so that its state is `failed` and not `restarting` for ever.
    unit += "StartLimitIntervalSec=60\nStartLimitBurst=10\n\n[Service]\nSlice=mosfs.slice\n";
    if let Some(run) = settings.run {
        let mut setting = OsString::from("MOSFS_RUN=");
        setting.push(run);
        let _ = writeln!(unit, "Environment={}", quoted(&setting));
    }
    match workload.ready {
        Some(Ready::Notify) => unit += "Type=notify\n",
        None => unit += "Type=exec\n",
    }
    // The program in the container, or the watch of its health; and in any case the clean-up, which asks for time.
    let has_children = workload.ready.is_some() || workload.health.is_some();
    let _ = writeln!(unit, "NotifyAccess={}", if has_children { "all" } else { "exec" });
    let signal = container.image.stop_signal().unwrap_or_else(|| "SIGTERM".into());
    let stop_seconds = run.stop_seconds.unwrap_or(STOP_SECONDS);
    // All attempts at its health that may fail in a row.
    let attempts = workload
        .health
        .as_ref()
        .map_or(0, |health| health.retries() * (health.interval().as_secs() + health.timeout().as_secs()));
    if workload.health.is_some() {
        // `mosfs run-target --watch-health` triggers it; the time is for when that does not run any more.
        let _ = writeln!(
            unit,
            "WatchdogSec={}\nWatchdogSignal={signal}\nTimeoutAbortSec={stop_seconds}",
            START_SECONDS + 2 * attempts
        );
    }
    let _ = writeln!(unit, "ExecStart={}", mosfs(""));
    if restart != Restart::Always {
        // What has done its work stays active (exited): a start of what needs it is no new start of it.
        unit += "RemainAfterExit=yes\n";
    }
    // The start is done when the container runs and is healthy, or when a job that others need has ended: they wait for
    // that.
    let _ = writeln!(unit, "ExecStartPost={}", mosfs("--wait-healthy "));
    let _ = writeln!(unit, "ExecStopPost=-{}", mosfs("--clean "));
    let _ = writeln!(unit, "KillMode=mixed\nKillSignal={signal}");
    if let Some(number) = container.image.stop_signal_number() {
        // The runtime ends with 128 and the number of the signal that ended the container.
        let _ = writeln!(unit, "SuccessExitStatus={}", 128 + number);
    }
    let _ = writeln!(unit, "TimeoutStopSec={stop_seconds}");
    let start = workload.health.as_ref().map_or(0, |health| health.start().as_secs());
    match container.is_awaited {
        // How long it works is its own matter.
        true => unit += "TimeoutStartSec=infinity\n",
        false => _ = writeln!(unit, "TimeoutStartSec={}", START_SECONDS + start + attempts),
    }
    let _ = writeln!(unit, "Restart={restart}\nRestartSec=1");
    let resources = workload.resources.clone().unwrap_or_default();
    if let Some(memory) = &resources.memory {
        let _ = writeln!(unit, "MemoryMax={memory}\nMemorySwapMax=0");
    }
    let _ = writeln!(unit, "TasksMax={}", resources.tasks.unwrap_or(TASKS));
    if let Some(cpu) = &resources.cpu {
        let _ = writeln!(unit, "CPUQuota={cpu}");
    }
    // The kernel's limits of open files, as those of any service: few at first, as select(2) knows no more.
    unit += "LimitNOFILE=1024:524288\n";
    // Besides the devices of every container: those of dm-verity, which mosfs mounts the image from. A container has
    // no nodes of them, and cannot make any.
    unit += "DevicePolicy=closed\nDeviceAllow=char-pts rw\nDeviceAllow=/dev/ptmx rw\nDeviceAllow=/dev/tty rw\n\
             DeviceAllow=/dev/loop-control rw\nDeviceAllow=/dev/mapper/control rw\nDeviceAllow=block-loop rw\n\
             DeviceAllow=block-device-mapper rw\nDeviceAllow=/dev/fuse rw\n";
    // `m`: mosfs makes a node of each that belongs to the container's user.
    for device in workload.devices.iter().flatten() {
        let _ = writeln!(unit, "DeviceAllow={} rwm", quoted(OsStr::new(device)));
    }
    for secret in workload.secrets.iter().flatten() {
        let _ = writeln!(unit, "LoadCredential={secret}");
    }
    unit
}

/// The state of a unit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// `active`, `activating`, `inactive`, `failed`, …
    pub active: String,
    /// `running`, `start-post`, `auto-restart`, …
    pub sub: String,
    /// `success`, `exit-code`, `timeout`, …
    pub result: String,
    /// Whether the unit is loaded.
    pub loaded: bool,
    /// How often systemd has started it again by itself.
    pub restarts: u64,
    /// The process of the runtime, 0 for none.
    pub pid: u32,
    /// When it became active: microseconds of CLOCK_MONOTONIC, 0 for never.
    pub active_since: u64,
    /// The exit code of the last run.
    pub exit_code: String,
    /// Whether it is about to be started, stopped or restarted.
    pub has_job: bool,
}

impl State {
    /// Whether its program has ended well, and is not to be started again.
    pub fn is_done(&self) -> bool {
        self.active == "active" && self.sub == "exited"
    }

    /// Reads `systemctl show`'s properties.
    fn parse(text: &str) -> Self {
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.unwrap_or_default().to_string()
        };
        State {
            active: value("ActiveState"),
            sub: value("SubState"),
            result: value("Result"),
            loaded: value("LoadState") == "loaded",
            restarts: value("NRestarts").parse().unwrap_or(0),
            pid: value("MainPID").parse().unwrap_or(0),
            active_since: value("ActiveEnterTimestampMonotonic").parse().unwrap_or(0),
            exit_code: value("ExecMainStatus"),
            has_job: !matches!(value("Job").as_str(), "" | "0"),
        }
    }
}

/// Runs systemctl; returns its output.
fn systemctl(arguments: &[&str], units: &[String]) -> Result<std::process::Output, IoError> {
    let mut command = Command::new("systemctl");
    command.args(arguments).arg("--").args(units).stdin(Stdio::null());
    command.output().on("run", Path::new("systemctl"))
}

/// Returns the state of a target's unit.
pub fn state(target: &str) -> Result<State, IoError> {
    const PROPERTIES: &str = "--property=ActiveState,SubState,Result,LoadState,NRestarts,MainPID,\
                              ActiveEnterTimestampMonotonic,ExecMainStatus,Job";
    let output = systemctl(&["show", PROPERTIES], &[name(target)])?;
    Ok(State::parse(&String::from_utf8_lossy(&output.stdout)))
}

/// The run key that a target's container was started with in this boot.
pub fn started_key(places: &Places, target: &str) -> Option<Digest> {
    let text = file::find_regular(&places.key(target), file::Links::Refused, 200).ok()??;
    String::from_utf8(text).ok()?.trim().parse().ok()
}

/// The end of the reason that the wait for its health states when it finds that a container has ended.
pub const ENDED_EARLY: &str = "it ended before it was healthy";

/// Most bytes of the note of an error.
const MAX_ERROR: u64 = 4 << 10;

/// Notes why the start of a container failed, for `mosfs activate` and `mosfs ps`.
pub fn note_error(places: &Places, target: &str, error: &str) {
    // Where it cannot be made, the file says so.
    let _ = places.make_notes();
    let error: String = error.chars().take(1000).collect();
    if let Err(error) = write_note(&places.error(target), &error) {
        log::warn!("target {target}: {error}");
    }
}

/// Why the last start of a container failed, if it did.
pub fn last_error(places: &Places, target: &str) -> Option<String> {
    read_note(&places.error(target))
}

/// Why a container that does not run does not: why its last start failed, or, while systemd starts it once more, the one
/// before.
pub fn why_not(places: &Places, target: &str, state: &State) -> Option<String> {
    let before = || read_note(&places.error_before(target));
    last_error(places, target).or_else(|| if state.active == "activating" { before() } else { None })
}

/// Ends what is known of the last run of a container, which starts now. Why it failed is kept until the next start.
pub fn forget_last_run(places: &Places, target: &str) {
    let (error, before) = (places.error(target), places.error_before(target));
    let _ = fs::remove_file(&before);
    let _ = fs::rename(error, before);
    for old in [places.unhealthy(target), places.runtime_log(target)] {
        let _ = fs::remove_file(old);
    }
}

/// Why the last attempt at the health of a container that runs failed, if it did.
pub fn last_unhealthy(places: &Places, target: &str) -> Option<String> {
    read_note(&places.unhealthy(target))
}

fn read_note(path: &Path) -> Option<String> {
    let text = file::find_regular(path, file::Links::Refused, MAX_ERROR).ok()??;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// What activation does with a target's container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// It runs as it should, or has done its work.
    Keep,
    /// It does not run.
    Start,
    /// It runs, and has changed.
    Restart,
    /// The deployment no longer has it.
    Stop,
}

impl Action {
    /// The word for it in messages.
    pub fn as_str(&self) -> &'static str {
        match self {
            Action::Keep => "keep",
            Action::Start => "start",
            Action::Restart => "restart",
            Action::Stop => "stop",
        }
    }
}

/// Decides what to do with a container: its state, the key that it was started with, and the key that it should have.
pub fn decide(state: &State, started: Option<Digest>, wanted: Digest) -> (Action, &'static str) {
    let same = started == Some(wanted);
    match state.active.as_str() {
        _ if same && state.is_done() => (Action::Keep, "it has done its work"),
        "active" | "activating" | "reloading" if same => (Action::Keep, ""),
        "active" | "activating" | "reloading" => (Action::Restart, "what it runs has changed"),
        "deactivating" => (Action::Restart, "it is stopping"),
        "failed" => (Action::Start, "it has failed"),
        _ => (Action::Start, ""),
    }
}

/// The targets that have a unit of ours in this boot.
pub fn known() -> Result<Vec<String>, IoError> {
    let folder = Path::new(UNITS);
    let list = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.on("list", folder)?,
    };
    let names = list.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut targets: Vec<String> = names.filter_map(|name| target_of(&name).map(str::to_string)).collect();
    sorting::sort(&mut targets);
    Ok(targets)
}

fn path(target: &str) -> PathBuf {
    Path::new(UNITS).join(name(target))
}

/// Writes the units that differ; returns whether systemd must read units.
pub fn write(units: &[(&str, String)]) -> Result<bool, IoError> {
    let mut changed = false;
    for (target, text) in units {
        let path = path(target);
        let present = file::find_regular(&path, file::Links::Refused, 1 << 20)?;
        if present.as_deref() != Some(text.as_bytes()) {
            atomic::replace(&path, text.as_bytes(), 0o644, "run.unit").on("write", &path)?;
            changed = true;
        }
    }
    failpoint::hit("run.units.written");
    Ok(changed || is_reload_needed(units.iter().map(|(target, _)| *target))?)
}

/// Whether systemd has not read the unit of one of these targets as it is now: an earlier activation was killed before.
fn is_reload_needed<'a>(targets: impl Iterator<Item = &'a str>) -> Result<bool, IoError> {
    let units: Vec<String> = targets.map(name).collect();
    if units.is_empty() {
        return Ok(false);
    }
    let output = systemctl(&["show", "--property=NeedDaemonReload"], &units)?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().any(|line| line == "NeedDaemonReload=yes"))
}

/// Has systemd read changed units.
pub fn reload() -> Result<(), IoError> {
    let output = Command::new("systemctl").arg("daemon-reload").stdin(Stdio::null()).output();
    let output = output.on("run", Path::new("systemctl"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
    Err(IoError::new("reload", Path::new("the units of systemd"), std::io::Error::other(said)))
}

/// Stops targets that the deployment no longer has, and removes their units and what is known of them.
pub fn stop(places: &Places, targets: &[&str]) -> Result<(), IoError> {
    if targets.is_empty() {
        return Ok(());
    }
    let units: Vec<String> = targets.iter().map(|target| name(target)).collect();
    systemctl(&["--quiet", "stop"], &units)?;
    for target in targets {
        for file in [path(target), places.key(target), places.hosts(target)]
            .into_iter()
            .chain(places.last_runs(target))
        {
            let _ = fs::remove_file(file);
        }
        let _ = fs::remove_dir(places.work(target));
    }
    systemctl(&["--quiet", "reset-failed"], &units)?;
    failpoint::hit("run.units.stopped");
    Ok(())
}

/// Starts or restarts targets, all at once, and waits until each is healthy or has failed.
pub fn run(verb: &str, targets: &[&str]) -> Result<(), IoError> {
    if targets.is_empty() {
        return Ok(());
    }
    let units: Vec<String> = targets.iter().map(|target| name(target)).collect();
    // So that a limit of starts that was reached before does not count.
    systemctl(&["--quiet", "reset-failed"], &units)?;
    // Its exit code is that of any; each is looked at afterwards.
    systemctl(&["--quiet", verb], &units)?;
    failpoint::hit("run.units.started");
    Ok(())
}

/// What a container that does not run needs and that has failed or is stopped, as the end of a sentence.
///
/// # Errors
/// [`IoError`] if systemctl(1) cannot be run.
pub fn missing_need(container: &Container, state: &State) -> Result<Option<String>, IoError> {
    if state.active != "inactive" || state.has_job {
        return Ok(None);
    }
    for needed in container.target.workload.needs() {
        match self::state(needed.as_str())?.active.as_str() {
            "failed" => return Ok(Some(format!("it needs {needed}, which has failed"))),
            "inactive" => return Ok(Some(format!("it needs {needed}, which is stopped"))),
            _ => {}
        }
    }
    Ok(None)
}

/// Requires that a target runs, or has done its work.
pub fn check(places: &Places, container: &Container) -> Result<State, RunError> {
    let target = container.name.as_str();
    let state = state(target)?;
    if state.active == "active" {
        return Ok(state);
    }
    let mut why = format!("its unit {} is {} ({}", name(target), state.active, state.sub);
    if !matches!(state.result.as_str(), "" | "success") {
        let _ = write!(why, ", {}", state.result);
    }
    if !matches!(state.exit_code.as_str(), "" | "0") {
        let _ = write!(why, ", exit code {}", state.exit_code);
    }
    why.push(')');
    if let Some(needed) = missing_need(container, &state)? {
        let _ = write!(why, "; {needed}");
    } else if let Some(error) = why_not(places, target, &state) {
        let _ = write!(why, "; {}", without_target(target, &error));
    }
    Err(RunError::Unit { target: target.into(), why })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::image::blobs::BlobFolder;
    use crate::manifest::addresses;
    use crate::mount::MountPlan;
    use crate::run::config::ImageConfig;
    use crate::run::tests::system;
    use crate::sys::file::Links;

    fn container(fields: &str) -> Container {
        let manifest = system(&[("db", "service_type: container"), ("web", fields)]);
        let (name, target) = manifest.targets.last_key_value().unwrap();
        Container {
            name: name.clone(),
            target: target.clone(),
            base: Some(524_288),
            image: ImageConfig { stop_signal: Some("SIGQUIT".into()), ..ImageConfig::default() },
            tree: MountPlan::of_layers(
                "web",
                None,
                vec![],
                Arc::new(BlobFolder::of_layout(Path::new("/"), Links::Refused)),
            ),
            mounted: Default::default(),
            addresses: addresses::none(),
            published: vec![],
            is_awaited: false,
            key: Digest::of(b"key"),
        }
    }

    fn unit(fields: &str) -> String {
        unit_of(&container(fields))
    }

    fn unit_of(container: &Container) -> String {
        let daemons = ["mosfs-fuse@run-mosfs-targets-web.service".to_string()];
        let settings = Settings {
            program: Path::new("/opt/my progs/mosfs"),
            system: Path::new("/var/100%/$x"),
            config: Path::new("/etc/mosfs"),
            run: None,
            daemons: &daemons,
        };
        text(container, &settings)
    }

    #[test]
    fn a_unit_starts_what_it_should_and_holds_it_to_its_limits() {
        let text = unit(
            "service_type: container, needs: [db], run: {restart: on-failure, stop_seconds: 7}, \
             resources: {memory: 64M, tasks: 20, cpu: 150%}, devices: [/dev/ttyS0], secrets: [token], \
             health: {command: [/bin/ok], interval: 1s, timeout: 2s, retries: 4, start: 1m}",
        );
        for line in [
            "ExecStart=\"/opt/my progs/mosfs\" --system \"/var/100%%/$$x\" --config \"/etc/mosfs\" run-target web",
            "Requires=mosfs-fuse@run-mosfs-targets-web.service",
            "After=mosfs-fuse@run-mosfs-targets-web.service",
            "Requires=mosfs-target@db.service",
            "After=mosfs-target@db.service",
            "Type=exec",
            "KillSignal=SIGQUIT",
            "SuccessExitStatus=131",
            "TimeoutStopSec=7",
            "Restart=on-failure",
            "MemoryMax=64M",
            "TasksMax=20",
            "CPUQuota=150%",
            "DeviceAllow=\"/dev/ttyS0\" rwm",
            "LoadCredential=token",
            // 60 for the start itself, 60 in which failures do not count, 4 attempts of 3 s.
            "TimeoutStartSec=132",
            // What would not be healthy any more is asked to stop, and restarted as `restart` says.
            "WatchdogSec=84",
            "WatchdogSignal=SIGQUIT",
            "TimeoutAbortSec=7",
            "NotifyAccess=all",
        ] {
            assert!(text.lines().any(|one| one == line), "no `{line}` in\n{text}");
        }
        let plain = unit("service_type: container, ready: notify");
        for line in [
            "Type=notify",
            "NotifyAccess=all",
            "Restart=always",
            "TasksMax=1024",
            "TimeoutStopSec=10",
            "TimeoutStartSec=60",
        ] {
            assert!(plain.lines().any(|one| one == line), "no `{line}` in\n{plain}");
        }
        assert!(!plain.contains("MemoryMax") && !plain.contains("Watchdog"));
        assert!(!plain.contains("RemainAfterExit"), "{plain}");
        // What ends by itself stays active: a start of what needs it is no new start of it.
        let daemon = "mosfs-fuse@run-mosfs-targets-web.service";
        for (restart, on_daemon) in [("no", "Wants"), ("on-failure", "Requires")] {
            let job = unit(&format!("service_type: container, run: {{restart: {restart}}}"));
            for line in ["RemainAfterExit=yes", "TimeoutStartSec=60", &format!("{on_daemon}={daemon}")] {
                assert!(job.lines().any(|one| one == line), "no `{line}` in\n{job}");
            }
            assert_eq!(job.matches(daemon).count(), 2, "{job}");
        }
        let mut job = container("service_type: container, run: {restart: no}");
        job.is_awaited = true;
        let job = unit_of(&job);
        assert!(job.contains("\nTimeoutStartSec=infinity\n"), "its work may take long: {job}");
        // The clean-up may ask for more time than the program has to stop, and the program may not.
        let plain = unit("service_type: container, run: {stop_seconds: 1}");
        assert!(plain.contains("\nNotifyAccess=exec\n") && plain.contains("\nTimeoutStopSec=1\n"), "{plain}");
    }

    #[test]
    fn systemd_reads_the_unit_as_it_is_meant() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings {
            program: Path::new("/bin/true"),
            system: Path::new("/var/100%/$x"),
            config: Path::new("/etc/mosfs"),
            run: Some(OsStr::new("/run/other")),
            daemons: &[],
        };
        let fields = "service_type: container, resources: {memory: 64M, tasks: 20, cpu: 150%}, secrets: [token], \
                      devices: [/dev/ttyS0], ready: notify";
        let path = dir.path().join("mosfs-target@web.service");
        fs::write(&path, text(&container(fields), &settings)).unwrap();
        let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output();
        let output = output.expect("systemd-analyze (Debian package systemd) runs");
        let said = String::from_utf8_lossy(&output.stderr);
        let own: Vec<_> = said.lines().filter(|line| line.contains("mosfs-target@web")).collect();
        assert!(own.is_empty(), "{own:#?}");
    }

    #[test]
    fn only_what_changed_is_restarted() {
        let (old, new) = (Digest::of(b"old"), Digest::of(b"new"));
        let state = |active: &str, since: u64, result: &str| State {
            active: active.into(),
            active_since: since,
            result: result.into(),
            ..State::default()
        };
        let action = |state: &State, started| decide(state, started, new).0;
        assert_eq!(action(&state("active", 1, "success"), Some(new)), Action::Keep);
        assert_eq!(action(&state("activating", 0, "success"), Some(new)), Action::Keep);
        assert_eq!(action(&state("active", 1, "success"), Some(old)), Action::Restart);
        assert_eq!(action(&state("active", 1, "success"), None), Action::Restart);
        assert_eq!(action(&state("failed", 1, "exit-code"), Some(new)), Action::Start);
        // A job that has done its work is not done twice, but again when it has changed.
        let done = State { sub: "exited".into(), ..state("active", 1, "success") };
        assert_eq!(decide(&done, Some(new), new), (Action::Keep, "it has done its work"));
        assert_eq!(action(&done, Some(old)), Action::Restart);
        // What was stopped, a job too, or never started in this boot.
        assert_eq!(action(&state("inactive", 1, "success"), Some(new)), Action::Start);
        assert_eq!(action(&state("", 0, ""), None), Action::Start);
    }

    #[test]
    fn units_are_named_by_their_targets() {
        assert_eq!(target_of(&name("web.one")), Some("web.one"));
        assert_eq!(target_of("mosfs-fuse@web.service"), None);
    }
}
