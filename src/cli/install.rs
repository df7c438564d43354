//! `mosfs install`: the first deployment of a device. `mosfs update`: the next one.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use uuid::Uuid;

use super::{FloorArgs, Global, device, output, progress};
use crate::deploy::plan::{self, Plan, Verdict};
use crate::deploy::{DeployError, State, System, apply};
use crate::error::AnyError;
use crate::transport::{SourceRef, Transport};
use crate::trust::anchor::CaFile;
use crate::trust::{Anchor, Dates};

/// Install the first deployment of this device.
#[derive(Debug, Args)]
pub struct InstallArgs {
    /// Where the signed system is: `oci:DIR[:NAME]`; without a name, the highest version there.
    source: SourceRef,
    /// The manifest CA that this device is to trust; kept in CONFIG.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The product that this device is; kept in CONFIG.
    #[arg(long, value_name = "UUID")]
    product: Option<Uuid>,
    /// Print what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    floor: FloorArgs,
}

/// Install the next deployment; it is tried at the next boot.
#[derive(Debug, Args)]
pub struct UpdateArgs {
    /// Where the signed system is: `oci:DIR[:NAME]`; without a name, the highest version there.
    source: SourceRef,
    /// Say whether there is an update that this device would take, and do nothing.
    #[arg(long)]
    check: bool,
    /// Print what would be done, and do nothing.
    #[arg(long, conflicts_with = "check")]
    dry_run: bool,
    #[command(flatten)]
    floor: FloorArgs,
}

/// Runs `mosfs install`.
pub fn install(args: &InstallArgs, global: &Global) -> Result<(), AnyError> {
    let system = device::system(global);
    let ca = args.ca.as_deref().map(CaFile::load).transpose()?;
    let trust = Anchor::plan(&global.config, ca, args.product)?;
    let from = args.source.open()?;
    let offer = plan::fetch_offer(from.as_ref(), args.source.name.as_deref())?;
    // A refused system leaves not even a folder behind.
    let verified = offer.verify(trust.anchor(), Dates::check_now())?;
    if !args.dry_run {
        system.create()?;
    }
    let lock = (!args.dry_run).then(|| system.lock(device::waiting(global))).transpose()?;
    let state = system.state()?;
    if let Some(current) = state.current
        && current.digest != verified.digest()
    {
        return Err(DeployError::AlreadyInstalled { path: system.root().to_path_buf(), current }.into());
    }
    device::with_gate(&args.floor, global, true, |gate| {
        let plan =
            plan::plan(&system, &state, from.as_ref(), &offer, trust.anchor(), Dates::check_now(), gate)?;
        let Some(lock) = &lock else { return print_plan(&plan, global) };
        trust.apply()?;
        apply::apply(&system, lock, from.as_ref(), &plan, &progress::of(global)?)?;
        say(&plan, global)
    })
}

/// Runs `mosfs update`.
pub fn update(args: &UpdateArgs, global: &Global) -> Result<(), AnyError> {
    let system = device::system(global);
    let from = args.source.open()?;
    if args.check {
        let outcome = check(args, global, &system, from.as_ref());
        return match outcome {
            Ok((verdict, version)) => output::answer(
                global,
                || check_answer(verdict, version),
                || match verdict {
                    Verdict::UpToDate => format!("version {version} is installed: nothing to do"),
                    Verdict::AlreadyPending => {
                        format!("version {version} is pending: it is tried at the next boot")
                    }
                    Verdict::Install | Verdict::Update => format!("version {version} would be installed"),
                },
            ),
            Err(error) => {
                if global.json {
                    output::json(&json!({
                        "update": false, "reason": error.chain(), "exit_code": error.class().exit_code(),
                    }))?;
                }
                Err(error)
            }
        };
    }
    if !system.state_path().exists() {
        return Err(DeployError::NothingInstalled { path: system.root().to_path_buf() }.into());
    }
    let lock = system.lock(device::waiting(global))?;
    let outcome = make_plan(args, global, &system, from.as_ref(), |plan| {
        if args.dry_run {
            return print_plan(plan, global);
        }
        apply::apply(&system, &lock, from.as_ref(), plan, &progress::of(global)?)?;
        say(plan, global)
    });
    if let Err(error) = &outcome
        && !args.dry_run
    {
        apply::record_failure(&system, &error.chain());
    }
    outcome
}

fn check(
    args: &UpdateArgs,
    global: &Global,
    system: &System,
    from: &dyn Transport,
) -> Result<(Verdict, u64), AnyError> {
    let mut found = None;
    make_plan(args, global, system, from, |plan| {
        found = Some((plan.verdict, plan.id.version));
        Ok(())
    })?;
    found.ok_or_else(|| DeployError::NothingInstalled { path: system.root().to_path_buf() }.into())
}

fn check_answer(verdict: Verdict, version: u64) -> serde_json::Value {
    let update = matches!(verdict, Verdict::Install | Verdict::Update);
    json!({ "update": update, "verdict": verdict, "version": version })
}

fn make_plan(
    args: &UpdateArgs,
    global: &Global,
    system: &System,
    from: &dyn Transport,
    then: impl FnOnce(&Plan) -> Result<(), AnyError>,
) -> Result<(), AnyError> {
    let state: State = system.state()?;
    if state.current.is_none() {
        return Err(DeployError::NothingInstalled { path: system.root().to_path_buf() }.into());
    }
    let anchor = Anchor::load(&global.config)?;
    let offer = plan::fetch_offer(from, args.source.name.as_deref())?;
    device::with_gate(&args.floor, global, false, |gate| {
        then(&plan::plan(system, &state, from, &offer, &anchor, Dates::check_now(), gate)?)
    })
}

fn print_plan(plan: &Plan, global: &Global) -> Result<(), AnyError> {
    let blobs = || {
        plan.fetch
            .iter()
            .map(|fetch| json!({ "target": fetch.target, "digest": fetch.blob.digest, "bytes": fetch.blob.size }))
            .collect::<Vec<_>>()
    };
    output::answer(
        global,
        || {
            json!({
                "deployment": plan.id, "version": plan.id.version, "verdict": plan.verdict,
                "fetch": blobs(), "needed_bytes": plan.needed_bytes,
            })
        },
        || {
            let mut lines = vec![match plan.verdict {
                Verdict::UpToDate => format!("version {} is installed: nothing to do", plan.id.version),
                Verdict::AlreadyPending => format!("version {} is pending: nothing to do", plan.id.version),
                Verdict::Install => format!("would install version {}", plan.id.version),
                Verdict::Update => {
                    format!("would install version {}, to be tried at the next boot", plan.id.version)
                }
            }];
            for fetch in &plan.fetch {
                lines.push(format!(
                    "would fetch {} ({} bytes) for {}",
                    fetch.blob.digest, fetch.blob.size, fetch.target
                ));
            }
            lines
        },
    )
}

fn say(plan: &Plan, global: &Global) -> Result<(), AnyError> {
    output::answer(
        global,
        || json!({ "deployment": plan.id, "version": plan.id.version, "verdict": plan.verdict }),
        || match plan.verdict {
            Verdict::UpToDate => format!("version {} is installed already: nothing to do", plan.id.version),
            Verdict::AlreadyPending => {
                format!("version {} is pending already: it is tried at the next boot", plan.id.version)
            }
            Verdict::Install => format!("installed version {} ({})", plan.id.version, plan.id.digest),
            Verdict::Update => {
                format!(
                    "version {} ({}) is pending: it is tried at the next boot",
                    plan.id.version, plan.id.digest
                )
            }
        },
    )
}
