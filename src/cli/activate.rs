//! `mosfs activate`: mounts the targets of the running deployment.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::lazy_target::LazyTargets;
use super::{FloorArgs, Global, RegistryArgs, containers, device, mount, output};
use crate::deploy::activate::{
    self, Action, ActivationPlan, ActivationRequest, CompletedStep, MountOptions, Outcome,
};
use crate::deploy::{DeploymentId, booted, target};
use crate::error::{AnyError, IoContext};
use crate::image::oci::OciImage;
use crate::manifest::system::Target;
use crate::mount::Backend;
use crate::mount::units::{self, Keeper, Unit};
use crate::run::shifted;
use crate::store::Store;
use crate::transport::SourceRef;
use crate::trust::Anchor;
use crate::trust::config::find_floor_key;

/// Mount the targets of the running deployment and run its containers; change only what differs.
///
/// Targets are mounted at /run/mosfs/targets/NAME. A mount in use is left alone; the command names its users and exits
/// with code 1. Targets with service_type container are then started, each in a systemd unit, mosfs-target@NAME.service;
/// those whose image or fields have changed are restarted. The deployment is verified again, and its version is compared
/// with the floor if this device has one.
#[derive(Debug, Args)]
pub(super) struct ActivateArgs {
    /// The targets [default: all but the root; targets that the deployment no longer has are unmounted].
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// The backend of the mounts: auto, dm-verity or fuse.
    #[arg(long, default_value = "auto", value_name = "NAME")]
    backend: Backend,
    /// How to run the daemons of FUSE mounts: auto, unit (one systemd unit each) or fork.
    #[arg(long, default_value = "auto", value_name = "HOW")]
    daemon: Keeper,
    /// Mount targets whose blobs are not all in the store, too: what is read is fetched from the registry that the
    /// system came from, verified and kept, and the rest is fetched in the background. Uses the FUSE backend for them.
    #[arg(long)]
    lazy: bool,
    /// The registry for `--lazy`, `docker://HOST[:PORT]/PREFIX` [default: the one that the system was installed from].
    #[arg(long, value_name = "SOURCE", requires = "lazy")]
    from: Option<SourceRef>,
    /// Only print what would be done.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    floor: FloorArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// Runs `mosfs activate`.
pub(super) fn run(args: &ActivateArgs, global: &Global) -> Result<(), AnyError> {
    let run = booted::run_dir();
    let run = std::path::absolute(&run).on("find", &run)?;
    let in_unit = units::wanted(args.daemon)?;
    // Before anything is looked at: two at once would both mount what is missing.
    let _lock = if args.dry_run { None } else { Some(activate::lock(&run)?) };
    let plan = plan(args, global, &run)?;
    let containers = containers::plan(global, &args.targets)?;
    let deployment = plan.deployment;
    if args.dry_run {
        return output::answer(
            global,
            || plan_json(&plan, &containers.steps),
            || plan_text(&plan, &containers.steps),
        );
    }
    let (system, config) = (
        std::path::absolute(&global.system).on("find", &global.system)?,
        std::path::absolute(&global.config).on("find", &global.config)?,
    );
    let targets = LazyTargets::new(&system, args.from.as_ref(), &args.registry);
    let unit = |target: &str, place: &Path| {
        let mut arguments =
            mount::foreground_arguments(target.as_ref(), place, &system, &config, &activate::flags());
        if args.lazy {
            // Before the source and the folder, which stand behind `--`.
            arguments.splice(1..1, targets.arguments());
        }
        let needs = vec![system.clone()];
        in_unit.then(|| Unit { source: target.into(), target: place.into(), needs, arguments })
    };
    let blobs = |target: &str, image: &OciImage| match args.lazy {
        true => targets.blobs(&deployment, target, image, args.backend, true),
        false => Ok(None),
    };
    let taken =
        activate::apply(plan, &run, &MountOptions { backend: args.backend, unit: &unit, blobs: &blobs })?;
    let verdict = activate::verdict(&taken);
    // What is not mounted as it should be cannot run as it should, and its container says so; the others run.
    let done = containers::apply(containers, global)?;
    if global.json {
        let targets: Vec<_> = taken.iter().map(taken_json).collect();
        let ran: Vec<_> = done.iter().map(containers::done_json).collect();
        let answer = json!({
            "deployment": deployment, "version": deployment.version, "targets": targets, "containers": ran,
        });
        output::json(&answer)?;
    } else {
        for one in taken.iter().filter(|one| matches!(one.outcome, Outcome::Done(_))) {
            output::line(done_text(one))?;
        }
        for one in done.iter().filter(|one| one.outcome.is_ok()) {
            output::line(containers::done_text(one))?;
        }
    }
    // A container whose image is not mounted has that reason; the reasons of all others count besides.
    let is_mounted =
        |name: &str| taken.iter().all(|one| one.target != name || matches!(one.outcome, Outcome::Done(_)));
    match verdict {
        Ok(()) => Ok(containers::verdict(&done)?),
        Err(mut both) => {
            let others: Vec<_> = done.into_iter().filter(|one| is_mounted(&one.name)).collect();
            if let Err(more) = containers::verdict(&others) {
                both.add(more.reasons, more.class);
            }
            Err(both.into())
        }
    }
}

fn plan(args: &ActivateArgs, global: &Global, run: &Path) -> Result<ActivationPlan, AnyError> {
    let anchor = Anchor::load(&global.config)?;
    let booted = booted::deployment()?;
    // A device without a floor key has no floor yet: there is nothing to compare with.
    let has_floor = args.floor.in_file() || find_floor_key(&global.config)?.is_some();
    let mut floor = if has_floor { Some(args.floor.open(global)?) } else { None };
    let system = device::system(global);
    let floor = floor.as_mut().map(|floor| floor.as_mut() as _);
    let targets = LazyTargets::new(&global.system, args.from.as_ref(), &args.registry);
    let image = |store: &Store, id: &DeploymentId, name: &str, target: &Target| match args.lazy {
        true => targets.image(store, id, name, target),
        false => Ok(target::image_of(store, name, target)?),
    };
    let asked = ActivationRequest { backend: args.backend, names: &args.targets, image: &image };
    Ok(activate::plan(&system, run, booted, &anchor, floor, &asked)?)
}

fn verb(action: Action) -> &'static str {
    match action {
        Action::Keep => "keep",
        Action::Mount => "mount",
        Action::Remount => "remount",
        Action::Mend => "mend",
        Action::Unmount => "unmount",
        Action::Refuse => "leave alone",
    }
}

fn plan_json(plan: &ActivationPlan, containers: &[containers::Step]) -> Value {
    let step = |step: &activate::Step| json!({ "target": step.target, "path": step.path, "action": step.action, "why": step.why });
    let targets: Vec<_> = plan.steps.iter().map(step).collect();
    let of_container = |step: &containers::Step| json!({ "target": step.name, "action": step.action.as_str(), "why": step.why });
    let containers: Vec<_> = containers.iter().map(of_container).collect();
    json!({
        "dry_run": true, "deployment": plan.deployment, "version": plan.deployment.version, "targets": targets,
        "containers": containers,
    })
}

fn plan_text(plan: &ActivationPlan, containers: &[containers::Step]) -> Vec<String> {
    let line = |step: &activate::Step| {
        let why = if step.why.is_empty() { String::new() } else { format!(": {}", step.why) };
        format!("would {} {} at {}{why}", verb(step.action), step.target, step.path.display())
    };
    let mut lines: Vec<_> = plan.steps.iter().map(line).collect();
    lines.extend(containers.iter().map(|step| {
        let why = if step.why.is_empty() { String::new() } else { format!(": {}", step.why) };
        format!("would {} the container of {}{why}", step.action.as_str(), step.name)
    }));
    if lines.is_empty() { vec!["nothing to do: the deployment has the root alone".into()] } else { lines }
}

fn taken_json(taken: &CompletedStep) -> Value {
    let mut value = json!({ "target": taken.target, "path": taken.path, "action": taken.action });
    let (outcome, key, what) = match &taken.outcome {
        Outcome::Done(backend) => ("done", "backend", json!(backend)),
        Outcome::Busy(users) => ("busy", "users", json!(users)),
        Outcome::Failed(error) => ("failed", "error", json!(error.chain())),
    };
    value["outcome"] = json!(outcome);
    value[key] = what;
    value
}

fn done_text(taken: &CompletedStep) -> String {
    let CompletedStep { target, path, action, outcome } = taken;
    let backend = match outcome {
        Outcome::Done(Some(backend)) => format!(" ({backend})"),
        _ => String::new(),
    };
    let what = match action {
        Action::Keep => "is mounted already",
        Action::Mount => "mounted",
        Action::Remount => "remounted",
        Action::Mend => "mounted again",
        Action::Unmount => "unmounted (no longer part of the deployment)",
        Action::Refuse => "left alone",
    };
    format!("{target} {what} at {}{backend}", path.display())
}

/// Returns whether a target would be mounted at this path. Other commands name `mosfs activate` in their advice then.
pub(super) fn is_target(path: &Path) -> bool {
    let folder = activate::targets_dir(&booted::run_dir());
    let folder: PathBuf = folder.canonicalize().unwrap_or(folder);
    let shifted = shifted::folder(&booted::run_dir());
    let shifted: PathBuf = shifted.canonicalize().unwrap_or(shifted);
    path.parent() == Some(&folder) || path.ancestors().nth(2) == Some(&shifted)
}
