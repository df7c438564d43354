//! `mosfs gc`: remove what no deployment needs.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{Global, device, output};
use crate::deploy::booted::{self, BootRecord};
use crate::deploy::gc::{self, GcPlan};
use crate::error::AnyError;
use crate::mount::table;
use crate::store::Store;

/// Removes deployments that are neither current, pending nor previous, and what only they need.
#[derive(Debug, Args)]
pub struct Gc {
    /// Only print what would be removed.
    #[arg(long)]
    dry_run: bool,
    /// Collect in this store instead of the deployed system: what no name reaches goes.
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
}

/// Runs `mosfs gc`.
pub fn run(args: &Gc, global: &Global) -> Result<(), AnyError> {
    let plan = match &args.store {
        Some(dir) => {
            let store = Store::open(dir)?;
            let collector = store.collector()?;
            let plan = GcPlan { store: collector.plan(&[], &[])?, ..GcPlan::default() };
            if !args.dry_run {
                collector.apply(&plan.store)?;
            }
            plan
        }
        None => {
            let system = device::system(global);
            let store = Store::open(&system.store_dir())?;
            let lock = system.lock(device::waiting(global))?;
            let collector = store.collector()?;
            let booted = BootRecord::load(&booted::path())?.map(|record| record.deployment);
            let mounts = table::mounts()?;
            let mounted: Vec<_> = mounts.iter().filter_map(|mount| mount.digest).collect();
            let plan = gc::plan(&system, &lock, &collector, &store, booted, &mounted)?;
            if !args.dry_run {
                gc::apply(&system, &lock, &collector, &plan)?;
            }
            plan
        }
    };
    if global.json {
        return output::json(&json!({ "dry_run": args.dry_run, "removed": plan }));
    }
    let verb = if args.dry_run { "would remove" } else { "removed" };
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
