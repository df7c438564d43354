//! `mosfs install`: the first deployment of a device. `mosfs update`: the next one.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use uuid::Uuid;

use super::esp::{ESP_PATIENCE, EspArgs};
use super::offered::{UpdateRequest, failed_before, find, plan_update, print_plan, registry_of, say};
use super::{FloorArgs, Global, RegistryArgs, device, lazy_update, output, progress};
use crate::deploy::plan::{self, PlanOptions, Verdict};
use crate::deploy::{DeployError, System, apply, fetching};
use crate::error::AnyError;
use crate::transport::{SourceRef, Transport, TransportError};
use crate::trust::Anchor;
use crate::trust::config::CaFile;

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
    #[arg(required_unless_present = "finish")]
    source: Option<SourceRef>,
    /// Make the version pending at once, and fetch its blobs in the background. It is tried at the first boot after all
    /// of it is here; until then the current version boots. Requires docker://.
    #[arg(long, conflicts_with = "check")]
    lazy: bool,
    /// Fetch the rest of the version that `--lazy` has made pending, wait until all of it is here, and let it boot.
    #[arg(long, conflicts_with_all = ["source", "lazy", "check", "again", "dry_run"])]
    finish: bool,
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
        let source = registry_of(&args.source);
        let options = PlanOptions {
            again: false,
            read_blobs: true,
            source: source.as_deref(),
            esp: place.esp.as_ref(),
            kernel: place.kernel,
            progress: &progress,
        };
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
    let options = lazy_update::Options { registry: &args.registry, floor: &args.floor, esp: &args.esp };
    let Some(source) = &args.source else {
        return lazy_update::finish(&options, global, &system);
    };
    if args.lazy && !source.is_registry() {
        let why = "expected a registry, docker://HOST[:PORT]/PREFIX[:VERSION], for --lazy";
        return Err(TransportError::BadSource { found: source.to_string(), why }.into());
    }
    let from = source.open(&args.registry.access(global))?;
    if args.check {
        let outcome = check(args, source, global, &system, from.as_ref());
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
    let asked =
        UpdateRequest { source, again: args.again, read_blobs: true, floor: &args.floor, esp: &args.esp };
    let outcome = plan_update(&asked, global, &system, from.as_ref(), |plan| {
        if args.dry_run {
            return print_plan(plan, global);
        }
        if args.lazy && fetching::is_for_later(&system, plan) {
            return lazy_update::begin(&options, global, &system, &lock, from.as_ref(), plan);
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
    source: &SourceRef,
    global: &Global,
    system: &System,
    from: &dyn Transport,
) -> Result<(Verdict, u64), AnyError> {
    if let Some(unchanged) = plan::unchanged(system, &system.state()?, from, source.name.as_deref())? {
        return Ok(unchanged);
    }
    let mut found = None;
    let asked =
        UpdateRequest { source, again: args.again, read_blobs: false, floor: &args.floor, esp: &args.esp };
    plan_update(&asked, global, system, from, |plan| {
        found = Some((plan.verdict, plan.id.version));
        Ok(())
    })?;
    found.ok_or_else(|| DeployError::NothingInstalled { path: system.root().to_path_buf() }.into())
}

fn check_answer(verdict: Verdict, version: u64) -> serde_json::Value {
    let update = matches!(verdict, Verdict::Install | Verdict::Update);
    json!({ "update": update, "verdict": verdict, "version": version })
}
