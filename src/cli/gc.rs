//! `mosfs gc`: remove what no deployment needs.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::esp::EspArgs;
use super::{FloorArgs, Global, device, output};
use crate::deploy::DeployError;
use crate::deploy::gc::{self, GcPlan, Needs};
use crate::error::AnyError;
use crate::store::Store;

/// Remove old deployments, and the blobs that only they use.
///
/// Removes each deployment that is neither current, pending nor previous.
/// A previous deployment that can never be booted again is removed too. `install`, `update` and `commit` collect
/// automatically. Damaged files are skipped and listed; the exit code is then 3.
#[derive(Debug, Args)]
pub(super) struct Gc {
    /// Print what would be removed, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Collect in this store instead of the deployed system: remove every blob that no name refers to.
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    #[command(flatten)]
    floor: FloorArgs,
    #[command(flatten)]
    esp: EspArgs,
}

/// Runs `mosfs gc`.
pub(super) fn run(args: &Gc, global: &Global) -> Result<(), AnyError> {
    let mut problems = Vec::new();
    let plan = match &args.store {
        Some(dir) => {
            let store = Store::open(dir)?;
            let collector = store.collector()?;
            // An image that is mounted from here while it is fetched has no name yet.
            let mounted = Needs::of_this_boot()?.mounted;
            let plan = GcPlan { store: collector.plan(&[], &mounted)?, ..GcPlan::default() };
            problems.extend(plan.store.damaged.iter().cloned());
            if !args.dry_run {
                problems.extend(collector.apply(&plan.store)?);
            }
            plan
        }
        None => {
            let system = device::system(global);
            let store = system.store()?;
            let lock = system.lock(device::waiting(global))?;
            let collector = store.collector()?;
            let needs =
                Needs { floor: device::floor_if_known(&args.floor, global), ..Needs::of_this_boot()? };
            let plan = gc::plan(&system, &collector, &store, &needs)?;
            problems = if args.dry_run {
                plan.damaged.clone()
            } else {
                gc::apply(&system, &lock, &collector, plan.clone())?
            };
            plan
        }
    };
    if args.store.is_none() && !args.dry_run {
        let floor = device::floor_if_known(&args.floor, global);
        device::sync_esp(&device::system(global), &args.esp, floor, global)?;
    }
    print(args, &plan, &problems, global)?;
    if problems.is_empty() {
        return Ok(());
    }
    let path = args.store.clone().unwrap_or_else(|| global.system.clone());
    Err(DeployError::Damaged { path, problems }.into())
}

fn print(args: &Gc, plan: &GcPlan, problems: &[String], global: &Global) -> Result<(), AnyError> {
    if global.json {
        return output::json(&json!({ "dry_run": args.dry_run, "removed": plan, "problems": problems }));
    }
    problems.iter().for_each(output::note);
    let verb = if args.dry_run { "would remove" } else { "removed" };
    for dropped in &plan.dropped {
        let verb = if args.dry_run { "would drop" } else { "dropped" };
        output::line(format_args!("{verb} the previous deployment {}: {}", dropped.deployment, dropped.why))?;
    }
    for id in &plan.deployments {
        output::line(format_args!("{verb} deployment {id}"))?;
    }
    for name in &plan.store.names {
        output::line(format_args!("{verb} name {name}"))?;
    }
    for digest in plan.store.referrers.iter().chain(&plan.store.blobs) {
        output::line(format_args!("{verb} {digest}"))?;
    }
    for path in plan.leftovers.iter().chain(&plan.store.files) {
        output::line(format_args!("{verb} {}", path.display()))?;
    }
    output::line(format_args!("{verb} {} blobs, {} bytes in all", plan.store.blobs.len(), plan.store.bytes))
}
