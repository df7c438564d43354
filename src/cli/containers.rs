//! `mosfs ps`, `exec` and `logs`: the containers of this device; and what `mosfs activate` and `mosfs commit` do with them.

use std::io::IsTerminal;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::{Global, device, output, run_target, shifted_unit};
use crate::deploy::{booted, target};
use crate::error::{AnyError, Class, Classified, without_target};
use crate::manifest::{Network, Protocol, ServiceType, SystemManifest, TargetName};
use crate::mount::{table, units as daemons};
use crate::run::given::Given;
use crate::run::health::{self, Other};
use crate::run::places::Places;
use crate::run::units::{self, Action, Settings, State};
use crate::run::{self, Container, RunError, network, programs, root, runtime, shifted};
use crate::run::{leftovers, mounts};
use crate::store::Store;
use crate::sys;
use crate::trust::Anchor;

/// List the containers of the running deployment.
#[derive(Debug, Args)]
pub(super) struct PsArgs {}

/// Run a command in a running container.
///
/// It runs as the user of the image, with the environment and the privileges of the container.
#[derive(Debug, Args)]
pub(super) struct ExecArgs {
    /// Give the command a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Run as another user: `USER[:GROUP]`, by name or number.
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// The target.
    #[arg(value_name = "NAME")]
    target: String,
    /// The command and its arguments.
    #[arg(value_name = "COMMAND", required = true, last = true)]
    command: Vec<String>,
}

/// Show the output of a container: the journal of its unit.
#[derive(Debug, Args)]
pub(super) struct LogsArgs {
    /// The target.
    #[arg(value_name = "NAME")]
    target: String,
    /// Go on with what comes.
    #[arg(short, long)]
    follow: bool,
    /// Show only the last N lines.
    #[arg(short = 'n', long, value_name = "N")]
    lines: Option<u32>,
}

/// One row of `mosfs ps`.
struct Row {
    name: TargetName,
    version: String,
    state: &'static str,
    unit: State,
    ports: Vec<String>,
    address: Option<String>,
    error: Option<String>,
}

/// Runs `mosfs ps`.
pub(super) fn ps(_: &PsArgs, global: &Global) -> Result<(), AnyError> {
    let rows = rows(global)?;
    output::answer(
        global,
        || json!({ "containers": rows.iter().map(row_json).collect::<Vec<_>>() }),
        || table_of(&rows),
    )
}

/// The containers of the running deployment, for `mosfs status`.
pub(super) struct Containers(Vec<Row>);

impl Containers {
    /// Looks at all of them.
    pub(super) fn of(global: &Global) -> Result<Self, AnyError> {
        rows(global).map(Self)
    }

    /// As `mosfs ps --json` shows them.
    pub(super) fn json(&self) -> Value {
        self.0.iter().map(row_json).collect()
    }

    /// One line each.
    pub(super) fn lines(&self) -> Vec<String> {
        self.0.iter().map(row_line).collect()
    }
}

fn row_line(row: &Row) -> String {
    let Row { name, version, state, unit, ports, error, .. } = row;
    let restarts = match unit.restarts {
        0 => String::new(),
        1 => ", restarted once".to_string(),
        n => format!(", restarted {n} times"),
    };
    let ports = if ports.is_empty() { String::new() } else { format!(", {}", ports.join(", ")) };
    let error = error.as_ref().map_or(String::new(), |error| format!(" ({error})"));
    format!("{name} {version}: {state}{restarts}{ports}{error}")
}

fn rows(global: &Global) -> Result<Vec<Row>, AnyError> {
    let places = run_target::places(global)?;
    let (store, manifest) = running(global)?;
    let given = Given::load(&places);
    let has_systemd = daemons::available().is_ok();
    let containers = manifest.targets.iter().filter(|(_, one)| one.service_type == ServiceType::Container);
    containers
        .map(|(name, signed)| {
            let container = run::container(&store, &manifest, name, &given);
            let unit = if has_systemd { units::state(name.as_str())? } else { State::default() };
            let state = word(&places, name, &unit, container.as_ref().ok());
            let (mut ports, mut address) = (Vec::new(), None);
            if let Network::Simple { ports: written, .. } = &signed.network {
                let assigned = container.as_ref().ok().and_then(|one| one.addresses.of.get(name));
                address = assigned.map(ToString::to_string);
                ports = written.iter().flatten().map(port_text).collect();
            }
            let failed = || match state {
                "running" | "outdated" | "done" => None,
                "unhealthy" => units::last_unhealthy(&places, name.as_str()),
                _ => units::why_not(&places, name.as_str(), &unit),
            };
            let error = match &container {
                Ok(container) if has_systemd => units::missing_need(container, &unit)?.or_else(failed),
                Ok(_) => failed(),
                Err(error) => Some(error.to_string()),
            };
            Ok(Row {
                name: name.clone(),
                version: signed.version.clone(),
                state,
                unit,
                ports,
                address,
                error: error.map(|error| without_target(name.as_str(), &error).to_string()),
            })
        })
        .collect()
}

fn port_text(port: &crate::manifest::Port) -> String {
    let address = port.address.as_deref().map(|address| format!("{address}:")).unwrap_or_default();
    format!("{address}{}->{}/{}", port.host, port.container, port.protocol.unwrap_or(Protocol::Tcp))
}

/// The state of a container in one word.
fn word(places: &Places, name: &TargetName, unit: &State, container: Option<&Container>) -> &'static str {
    let started = units::started_key(places, name.as_str());
    match unit.active.as_str() {
        "active" if unit.is_done() && container.is_none_or(|one| started == Some(one.key)) => "done",
        "active" | "reloading" if container.is_some_and(|one| started != Some(one.key)) => "outdated",
        "active" | "reloading" if units::last_unhealthy(places, name.as_str()).is_some() => "unhealthy",
        "active" | "reloading" => "running",
        "activating" if unit.sub == "auto-restart" => "restarting",
        "activating" => "starting",
        "deactivating" => "stopping",
        "failed" => "failed",
        // Without a unit: `mosfs run-target` in the foreground.
        _ if runtime::pid(places, name.as_str()).is_some() => "running",
        // It starts when what it needs is healthy, or has done its work.
        "inactive" if unit.has_job => "waiting",
        _ => "stopped",
    }
}

fn row_json(row: &Row) -> Value {
    json!({
        "target": row.name.as_str(), "version": row.version, "state": row.state, "restarts": row.unit.restarts,
        "pid": row.unit.pid, "unit": units::name(row.name.as_str()), "ports": row.ports, "address": row.address,
        "error": row.error,
    })
}

fn table_of(rows: &[Row]) -> Vec<String> {
    if rows.is_empty() {
        return vec!["the running deployment has no containers".into()];
    }
    let cells: Vec<[String; 5]> =
        std::iter::once(["NAME", "VERSION", "STATE", "RESTARTS", "PORTS"].map(str::to_string))
            .chain(rows.iter().map(|row| {
                let restarts = row.unit.restarts.to_string();
                [row.name.to_string(), row.version.clone(), row.state.into(), restarts, row.ports.join(", ")]
            }))
            .collect();
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2), width(3)];
    let line = |row: &[String; 5]| {
        let padded: String = widths.iter().zip(row).map(|(width, cell)| format!("{cell:width$}  ")).collect();
        format!("{padded}{}", row[4]).trim_end().to_string()
    };
    let mut lines: Vec<String> = cells.iter().map(line).collect();
    lines.extend(rows.iter().filter_map(|row| Some(format!("{}: {}", row.name, row.error.as_ref()?))));
    lines
}

/// The running deployment, verified again.
fn running(global: &Global) -> Result<(Store, SystemManifest), AnyError> {
    let anchor = Anchor::load(&global.config)?;
    let system = device::system(global);
    let (_, verified) = target::running(&system, booted::deployment()?, &anchor)?;
    Ok((system.store()?, verified.manifest().clone()))
}

/// A command in a container that ended with another code than 0.
#[derive(Debug, thiserror::Error)]
#[error("the command in target {target} ended with exit code {code}")]
struct Ended {
    target: String,
    code: i32,
}

impl Classified for Ended {
    fn class(&self) -> Class {
        Class::Failure
    }
}

/// A terminal was asked for where there is none.
#[derive(Debug, thiserror::Error)]
#[error("--tty requires a terminal, and standard input is none")]
struct NoTerminal;

impl Classified for NoTerminal {
    fn class(&self) -> Class {
        Class::Input
    }
}

/// Runs `mosfs exec`.
pub(super) fn exec(args: &ExecArgs, global: &Global) -> Result<(), AnyError> {
    if args.tty && !std::io::stdin().is_terminal() {
        return Err(NoTerminal.into());
    }
    let places = run_target::places(global)?;
    let container = run_target::container(&args.target, global)?;
    let other = Other { command: &args.command, user: args.user.as_deref(), terminal: args.tty };
    match health::run(&container, &places, &other)? {
        0 => Ok(()),
        code => Err(Ended { target: args.target.clone(), code }.into()),
    }
}

/// Runs `mosfs logs`.
pub(super) fn logs(args: &LogsArgs, global: &Global) -> Result<(), AnyError> {
    // A misspelt name would show an empty journal, and so does a machine where nothing writes one.
    run_target::container(&args.target, global)?;
    if !daemons::is_booted() {
        output::note(
            "systemd does not run this machine, so there is no journal of it; the output of a container is that of \
             `mosfs run-target`",
        );
    }
    let mut command = Command::new("journalctl");
    command.arg("--unit").arg(units::name(&args.target)).arg("--output=cat");
    if args.follow {
        command.arg("--follow");
    }
    if let Some(lines) = args.lines {
        command.arg(format!("--lines={lines}"));
    }
    Err(root::step(&args.target, "run journalctl")(command.exec()).into())
}

/// What activation does with one container.
pub(super) struct Step {
    /// The target.
    pub name: String,
    /// What is done.
    pub action: Action,
    /// Why, if it is not plain.
    pub why: String,
    /// The container, or why it cannot run. None for one that is stopped.
    container: Option<Result<Container, AnyError>>,
}

/// What activation would do with the containers of the running deployment.
pub(super) struct Plan {
    /// One for each container that is meant; none where systemd does not run.
    pub steps: Vec<Step>,
    /// The running deployment's.
    manifest: SystemManifest,
    /// Whether other containers than those of the deployment end.
    is_whole: bool,
}

/// Plans what activation does with these targets, or with all of them.
pub(super) fn plan(global: &Global, names: &[String]) -> Result<Plan, AnyError> {
    let (store, manifest) = running(global)?;
    let is_container = |name: &str| {
        manifest
            .targets
            .iter()
            .any(|(known, one)| known.as_str() == name && one.service_type == ServiceType::Container)
    };
    let is_meant = |name: &str| names.is_empty() || names.iter().any(|one| one == name);
    if let Err(why) = daemons::available() {
        if manifest.targets.keys().any(|name| is_container(name.as_str()) && is_meant(name.as_str())) {
            output::note(format_args!("containers are mounted and not started: {why}"));
        }
        // What runs in the foreground is not known.
        return Ok(Plan { steps: Vec::new(), manifest, is_whole: false });
    }
    let places = run_target::places(global)?;
    let given = Given::load(&places);
    let mut steps = Vec::new();
    for name in manifest.targets.keys().filter(|name| is_container(name.as_str()) && is_meant(name.as_str()))
    {
        let target = name.to_string();
        let container = run::container(&store, &manifest, name, &given).map_err(AnyError::from);
        let (action, why) = match &container {
            Ok(container) => {
                let started = units::started_key(&places, &target);
                units::decide(&units::state(&target)?, started, container.key)
            }
            // What runs stays until there is something to replace it.
            Err(_) => (Action::Keep, "it cannot run"),
        };
        steps.push(Step { name: target, action, why: why.into(), container: Some(container) });
    }
    if names.is_empty() {
        for name in units::known()?.into_iter().filter(|name| !is_container(name)) {
            let why = "the running deployment has no such container".into();
            steps.push(Step { name, action: Action::Stop, why, container: None });
        }
    }
    Ok(Plan { steps, manifest, is_whole: names.is_empty() })
}

/// What was done with one container.
pub(super) struct Done {
    /// The target.
    pub name: String,
    /// What was done.
    pub action: Action,
    /// How it ended.
    pub outcome: Result<State, AnyError>,
}

/// Does what was planned, after the targets are mounted.
pub(super) fn apply(plan: Plan, global: &Global) -> Result<Vec<Done>, AnyError> {
    let Plan { mut steps, manifest, is_whole } = plan;
    for step in &mut steps {
        if let Some(Ok(container)) = &step.container
            && let Err(error) = programs::check(container)
        {
            step.container = Some(Err(error.into()));
        }
    }
    let places = run_target::places(global)?;
    let config = std::path::absolute(&global.config).unwrap_or_else(|_| global.config.clone());
    let in_unit = shifted_unit::of(true, global)?;
    for step in &mut steps {
        let Some(Ok(container)) = &step.container else { continue };
        let is_there = || shifted::places_of(container, &places.run).iter().any(|place| place.exists());
        // What runs and is kept has none, or has those that are there.
        if (step.action != Action::Keep || is_there())
            && let Err(error) = shifted::ensure(container, &places, &in_unit)
        {
            step.container = Some(Err(error.into()));
        }
    }
    let program = sys::process::program();
    let run_dir = std::env::var_os("MOSFS_RUN");
    let mut texts = Vec::new();
    let (mut start, mut restart, mut stop) = (Vec::new(), Vec::new(), Vec::new());
    for step in &steps {
        match &step.container {
            Some(Ok(container)) => {
                let daemons = daemons_of(container, &places)?;
                let settings = Settings {
                    program: &program,
                    system: &places.system,
                    config: &config,
                    run: run_dir.as_deref(),
                    daemons: &daemons,
                };
                texts.push((step.name.as_str(), units::text(container, &settings)));
            }
            Some(Err(_)) => continue,
            None => {}
        }
        match step.action {
            Action::Keep => {}
            Action::Start => start.push(step.name.as_str()),
            Action::Restart => restart.push(step.name.as_str()),
            Action::Stop => stop.push(step.name.as_str()),
        }
    }
    units::stop(&places, &stop)?;
    let given = Given::note(&places, &manifest, !is_whole)?;
    mounts::follow_hosts(&places, &manifest, &given.addresses)?;
    if units::write(&texts)? || !stop.is_empty() {
        units::reload()?;
    }
    // Without it, what has another network is started all the same.
    let network = networks(&steps, &manifest);
    let mut begin = [restart, start].concat();
    if network.is_err() {
        begin.retain(|name| on_bridge(&steps).all(|one| one.name.as_str() != *name));
    }
    // One job for all that is new, so that systemd orders them by what they need.
    units::run("restart", &begin)?;
    tidy_shifted(&steps, &places, &manifest);
    if let Err(why) = leftovers::tidy(&places) {
        output::note(format_args!("the network of containers is not removed: {why}"));
    }
    let done = steps.into_iter().map(|step| {
        let not_begun = |error: AnyError| {
            // No start of its own has noted why.
            if matches!(step.action, Action::Start | Action::Restart) {
                units::note_error(&places, &step.name, &error.chain());
            }
            Err(error)
        };
        let outcome = match (step.container, &network) {
            (None, _) => Ok(State::default()),
            (Some(Err(error)), _) => not_begun(error),
            (Some(Ok(container)), Err(why)) if container.is_simple() => {
                not_begun(root::step(&step.name, "set up its network")(why).into())
            }
            (Some(Ok(container)), _) => units::check(&places, &container).map_err(AnyError::from),
        };
        Done { name: step.name, action: step.action, outcome }
    });
    Ok(done.collect())
}

/// The containers with network `simple`.
fn on_bridge(steps: &[Step]) -> impl Iterator<Item = &Container> {
    let containers = steps.iter().filter_map(|step| step.container.as_ref()?.as_ref().ok());
    containers.filter(|one| one.is_simple())
}

/// Makes the network of the targets with network `simple` what it should be; rules that somebody has flushed come back.
/// Removes it where no target has one.
///
/// # Errors
/// Why it cannot be made.
fn networks(steps: &[Step], manifest: &SystemManifest) -> Result<(), String> {
    if let Some(container) = on_bridge(steps).next() {
        on_bridge(steps).for_each(run_target::note_ports);
        return network::set_up(&container.addresses, &container.published);
    }
    let is_simple = |one: &crate::manifest::Target| {
        one.service_type == ServiceType::Container && matches!(one.network, Network::Simple { .. })
    };
    if !manifest.targets.values().any(is_simple)
        && let Err(why) = network::tear_down()
    {
        output::note(format_args!("the network of containers is not removed: {why}"));
    }
    Ok(())
}

/// Unmounts trees that no container of the deployment is made of any more.
fn tidy_shifted(steps: &[Step], places: &Places, manifest: &SystemManifest) {
    if !shifted::folder(&places.run).exists() {
        return;
    }
    let all = manifest.targets.values().filter(|one| one.service_type == ServiceType::Container).count();
    let known: Vec<_> = steps.iter().filter_map(|step| step.container.as_ref()?.as_ref().ok()).collect();
    // What one that cannot run now is made of is not known.
    if known.len() == all {
        let wanted: Vec<_> = known.iter().flat_map(|one| shifted::places_of(one, &places.run)).collect();
        shifted::tidy(&places.run, &wanted);
    }
}

/// One line about what was done with a container that is as it should be.
pub(super) fn done_text(done: &Done) -> String {
    let ended = done.outcome.as_ref().is_ok_and(State::is_done);
    let what = match done.action {
        Action::Keep if ended => "has done its work",
        Action::Keep => "runs already",
        Action::Start | Action::Restart if ended => "has run and done its work",
        Action::Start => "started",
        Action::Restart => "restarted",
        Action::Stop => "stopped: the deployment no longer has it",
    };
    format!("container of {} {what}", done.name)
}

/// The same for programs.
pub(super) fn done_json(done: &Done) -> Value {
    let mut value = json!({
        "target": done.name, "action": done.action.as_str(), "unit": units::name(&done.name),
        "outcome": if done.outcome.is_ok() { "done" } else { "failed" },
    });
    if let Err(error) = &done.outcome {
        value["error"] = json!(error.chain());
    }
    value
}

/// The units of the daemons that serve what a container is made of.
fn daemons_of(container: &Container, places: &Places) -> Result<Vec<String>, AnyError> {
    let folder = crate::deploy::activate::targets_dir(&places.run);
    let folder = folder.canonicalize().unwrap_or(folder);
    let records = table::mounts()?;
    let mut found = Vec::new();
    let names = std::iter::once(container.name.as_str()).chain(container.mounted.keys().map(String::as_str));
    let shifted = shifted::places_of(container, &places.run);
    let shifted = shifted.into_iter().map(|place| place.canonicalize().unwrap_or(place));
    for place in names.map(|name| folder.join(name)).chain(shifted) {
        let daemon =
            records.iter().find(|record| record.target == place).and_then(|record| record.daemon.as_ref());
        if let Some(daemon) = daemon
            && let Some(unit) = daemons::keeper_of(&place, daemon.pid)
        {
            found.push(unit.to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

/// Containers that do not run as they should.
#[derive(Debug, thiserror::Error)]
#[error("{}", reasons.join("; "))]
pub(super) struct NotRunning {
    /// One sentence each.
    pub reasons: Vec<String>,
    /// That of the most serious one.
    pub class: Class,
}

impl Classified for NotRunning {
    fn class(&self) -> Class {
        self.class
    }
}

/// One sentence, which names the target once.
fn reason(target: &str, error: &AnyError) -> String {
    format!("target {target}: {}", without_target(target, &error.to_string()))
}

/// Requires that all containers are as they should be.
pub(super) fn verdict(done: &[Done]) -> Result<(), NotRunning> {
    let failed: Vec<_> =
        done.iter().filter_map(|one| Some((&one.name, one.outcome.as_ref().err()?))).collect();
    if failed.is_empty() {
        return Ok(());
    }
    let is_verification = failed.iter().any(|(_, error)| error.class() == Class::Verification);
    let class = if is_verification { Class::Verification } else { Class::Failure };
    Err(NotRunning { reasons: failed.iter().map(|(name, error)| reason(name, error)).collect(), class })
}

/// How long a container must have been running before it is called healthy.
const STEADY: Duration = Duration::from_secs(10);

/// Requires that every container of the running deployment is healthy, and has been for a while: for `mosfs commit`.
pub(super) fn check_health(global: &Global) -> Result<(), AnyError> {
    if daemons::available().is_err() {
        return Ok(());
    }
    let places = run_target::places(global)?;
    let (store, manifest) = running(global)?;
    let given = Given::load(&places);
    let mut reasons = Vec::new();
    for (name, _) in manifest.targets.iter().filter(|(_, one)| one.service_type == ServiceType::Container) {
        let target = name.as_str();
        let healthy = || -> Result<(), AnyError> {
            let container = run::container(&store, &manifest, name, &given)?;
            if units::started_key(&places, target) != Some(container.key) {
                let why = "it does not run what the deployment has; `mosfs activate` starts it".to_string();
                return Err(RunError::Unit { target: target.into(), why }.into());
            }
            let mut state = units::check(&places, &container)?;
            // Rule (docs/design.md, containers are healthy): what has just started may still fail.
            let first = state.clone();
            while state.active == "active" && !state.is_done() {
                let age = sys::process::monotonic().saturating_sub(Duration::from_micros(state.active_since));
                if age >= STEADY {
                    break;
                }
                std::thread::sleep(STEADY - age);
                state = units::check(&places, &container)?;
            }
            if state.restarts > first.restarts {
                let why = "it was started again while `mosfs commit` waited".to_string();
                return Err(RunError::Unit { target: target.into(), why }.into());
            }
            if !state.is_done() {
                health::ask(&container, &places)?;
            }
            Ok(())
        };
        if let Err(error) = healthy() {
            reasons.push(reason(target, &error));
        }
    }
    if reasons.is_empty() { Ok(()) } else { Err(NotRunning { reasons, class: Class::Failure }.into()) }
}
