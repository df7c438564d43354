//! `mosfs install`: the first deployment of a device. `mosfs update`: the next one.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use uuid::Uuid;

use super::esp::{ESP_PATIENCE, EspArgs};
use super::{FloorArgs, Global, RegistryArgs, device, output, progress};
use crate::deploy::offer::{self, Accepted, Found, Judge};
use crate::deploy::plan::{self, Options, Plan, Verdict};
use crate::deploy::state::TRIES;
use crate::deploy::{DeployError, State, System, apply};
use crate::error::AnyError;
use crate::floor;
use crate::transport::{SourceRef, Transport};
use crate::trust::config::CaFile;
use crate::trust::{Anchor, Dates};

/// Install the first deployment of this device.
///
/// If the system is already installed, each file and blob is compared with the source, and replaced if it differs.
#[derive(Debug, Args)]
pub(super) struct InstallArgs {
    /// The signed system, `oci:DIR[:NAME]` or `docker://HOST[:PORT]/PREFIX[:VERSION]`; without a name or version, the
    /// highest version there that verifies.
    source: SourceRef,
    /// The manifest CA that this device will trust; saved in CONFIG.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The product of this device; saved in CONFIG.
    #[arg(long, value_name = "UUID")]
    product: Option<Uuid>,
    /// Print what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    floor: FloorArgs,
    #[command(flatten)]
    esp: EspArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// Install the next deployment; it is tried at the next boot.
///
/// If the version is already installed, each file and blob is compared with the source, and replaced if it differs. A
/// version that failed before is tried again only with --again.
#[derive(Debug, Args)]
pub(super) struct UpdateArgs {
    /// The signed system, `oci:DIR[:NAME]` or `docker://HOST[:PORT]/PREFIX[:VERSION]`; without a name or version, the
    /// highest version there that verifies.
    source: SourceRef,
    /// Report whether an update is available that this device would install, and change nothing.
    #[arg(long)]
    check: bool,
    /// Try a version again that used up its boot attempts without a commit.
    #[arg(long)]
    again: bool,
    /// Print what would be done, and change nothing.
    #[arg(long, conflicts_with = "check")]
    dry_run: bool,
    #[command(flatten)]
    floor: FloorArgs,
    #[command(flatten)]
    esp: EspArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// Runs `mosfs install`.
pub(super) fn install(args: &InstallArgs, global: &Global) -> Result<(), AnyError> {
    let system = device::system(global);
    let ca = args.ca.as_deref().map(CaFile::load).transpose()?;
    let trust = Anchor::plan(&global.config, ca, args.product)?;
    let from = args.source.open(&args.registry.access(global))?;
    // A refused system leaves not even a folder behind.
    let offer = find(&args.source, from.as_ref(), trust.anchor(), global)?;
    if !args.dry_run {
        system.create()?;
    }
    let lock = (!args.dry_run).then(|| system.lock(device::waiting(global))).transpose()?;
    let state = system.state()?;
    if let Some(current) = state.current
        && current.digest != offer.verified.digest()
    {
        return Err(DeployError::AlreadyInstalled { path: system.root().to_path_buf(), current }.into());
    }
    let progress = progress::of(global)?;
    let place = args.esp.find(global, ESP_PATIENCE)?;
    device::with_gate(&args.floor, global, true, |gate| {
        let (esp, kernel) = (place.esp.as_ref(), place.kernel);
        let options = Options { again: false, read_blobs: true, esp, kernel, progress: &progress };
        let anchor = trust.anchor();
        let plan = plan::plan(&system, &state, from.as_ref(), offer, anchor, gate, &options)?;
        let Some(lock) = &lock else { return print_plan(&plan, global) };
        trust.apply()?;
        apply::apply(&system, lock, from.as_ref(), &plan, &progress)?;
        say(&plan, global)
    })
}

/// Runs `mosfs update`.
pub(super) fn update(args: &UpdateArgs, global: &Global) -> Result<(), AnyError> {
    let system = device::system(global);
    let from = args.source.open(&args.registry.access(global))?;
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
                    Verdict::FailedBefore => failed_before(version),
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
    if let Some(unchanged) = plan::unchanged(system, &system.state()?, from, args.source.name.as_deref())? {
        return Ok(unchanged);
    }
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

/// Finds what is offered; says what was passed over on the way.
pub(super) fn find(
    source: &SourceRef,
    from: &dyn Transport,
    anchor: &Anchor,
    global: &Global,
) -> Result<Accepted, AnyError> {
    let policy = floor::find_policy(&global.config)?;
    let judge = Judge { anchor, dates: Dates::check_now(), policy: policy.as_ref() };
    let Found { taken, passed_over } = offer::find(from, source.name.as_deref(), &judge)?;
    const SHOWN: usize = 10;
    for one in passed_over.iter().take(SHOWN) {
        output::note(format_args!("{} is passed over: {}", one.object, one.why));
    }
    if passed_over.len() > SHOWN {
        output::note(format_args!("{} more are passed over", passed_over.len() - SHOWN));
    }
    Ok(taken)
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
    let offer = find(&args.source, from, &anchor, global)?;
    let progress = progress::of(global)?;
    let place = args.esp.find(global, ESP_PATIENCE)?;
    device::with_gate(&args.floor, global, false, |gate| {
        let (esp, kernel) = (place.esp.as_ref(), place.kernel);
        // Whether there is an update can be said without reading every blob.
        let (again, read_blobs) = (args.again, !args.check);
        let options = Options { again, read_blobs, esp, kernel, progress: &progress };
        then(&plan::plan(system, &state, from, offer, &anchor, gate, &options)?)
    })
}

fn failed_before(version: u64) -> String {
    format!(
        "version {version} was started {TRIES} times and never proved healthy: it is not tried again; \
         another version replaces it, and `mosfs update --again` tries it once more"
    )
}

/// What is mended of a system that is installed already, as the end of a sentence; nothing where nothing is.
fn mended(plan: &Plan) -> String {
    let mut parts = Vec::new();
    if !plan.renew.is_empty() {
        parts.push(format!("{} replaced", plan.renew.join(", ")));
    }
    match plan.fetch.len() {
        0 => {}
        1 => parts.push("1 blob fetched again".to_string()),
        n => parts.push(format!("{n} blobs fetched again")),
    }
    parts.join("; ")
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
                "fetch": blobs(), "renew": plan.renew, "needed_bytes": plan.needed_bytes,
            })
        },
        || {
            let version = plan.id.version;
            let mut lines = vec![match plan.verdict {
                Verdict::UpToDate | Verdict::AlreadyPending => {
                    let state = if plan.verdict == Verdict::UpToDate { "installed" } else { "pending" };
                    match plan.renew.is_empty() && plan.fetch.is_empty() {
                        true => format!("version {version} is {state}: nothing to do"),
                        false => format!("version {version} is {state}, and would be mended"),
                    }
                }
                Verdict::FailedBefore => failed_before(version),
                Verdict::Install => format!("would install version {version}"),
                Verdict::Update => {
                    format!("would install version {version}, to be tried at the next boot")
                }
            }];
            lines.extend(plan.renew.iter().map(|file| format!("would replace {file}")));
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
    let mended = mended(plan);
    output::answer(
        global,
        || {
            json!({
                "deployment": plan.id, "version": plan.id.version, "verdict": plan.verdict,
                "renewed": plan.renew, "fetched": plan.fetch.len(),
            })
        },
        || {
            let version = plan.id.version;
            match plan.verdict {
                Verdict::UpToDate if mended.is_empty() => {
                    format!("version {version} is installed already: nothing to do")
                }
                Verdict::UpToDate => format!("version {version} is installed already, and mended: {mended}"),
                Verdict::AlreadyPending if mended.is_empty() => {
                    format!("version {version} is pending already: it is tried at the next boot")
                }
                Verdict::AlreadyPending => {
                    format!(
                        "version {version} is pending already, and mended: {mended}; it is tried at the next boot"
                    )
                }
                Verdict::FailedBefore => failed_before(version),
                Verdict::Install => format!("installed version {version} ({})", plan.id.digest),
                Verdict::Update => {
                    format!("version {version} ({}) is pending: it is tried at the next boot", plan.id.digest)
                }
            }
        },
    )
}
