//! `mosfs repair`: mend what is damaged on this device.

use clap::Args;
use serde_json::json;

use super::{FloorArgs, Global, RegistryArgs, device, output, progress};
use crate::deploy::DeployError;
use crate::deploy::repair::{self, RepairInputs};
use crate::error::AnyError;
use crate::floor;
use crate::transport::SourceRef;
use crate::trust::Anchor;

/// Repair the state file, deployments and names; with a source, also missing or damaged blobs.
///
/// Without a source, the command restores what it can from this device: the manifest and signatures of a deployment are
/// both in its folder and in the store. Blobs of images that are missing or damaged are listed, and the exit code is 3.
/// Nothing is accepted that does not verify, and the current version stays the same.
#[derive(Debug, Args)]
pub(super) struct RepairArgs {
    /// Where to fetch what this device no longer has: `oci:DIR` or `docker://HOST[:PORT]/PREFIX`, any source that has
    /// the same systems.
    source: Option<SourceRef>,
    #[command(flatten)]
    floor: FloorArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// Runs `mosfs repair`.
pub(super) fn run(args: &RepairArgs, global: &Global) -> Result<(), AnyError> {
    let system = device::system(global);
    if !system.root().is_dir() {
        return Err(DeployError::NothingInstalled { path: system.root().to_path_buf() }.into());
    }
    let anchor = Anchor::load(&global.config)?;
    let policy = floor::find_policy(&global.config)?;
    let source = args.source.as_ref().map(|source| source.open(&args.registry.access(global))).transpose()?;
    let progress = progress::of(global)?;
    let lock = system.lock_as_it_is(device::waiting(global))?;
    let means = RepairInputs {
        anchor: &anchor,
        policy: policy.as_ref(),
        floor: device::floor_if_known(&args.floor, global),
        source: source.as_deref(),
        progress: &progress,
    };
    let done = repair::repair(&system, &lock, &means)?;
    if global.json {
        output::json(&json!({ "mended": done.mended, "problems": done.problems }))?;
    } else {
        done.mended.iter().try_for_each(|what| output::line(format_args!("mended {what}")))?;
        done.problems.iter().for_each(output::note);
        if done.mended.is_empty() && done.problems.is_empty() {
            output::line("nothing is damaged")?;
        }
    }
    if done.problems.is_empty() {
        return Ok(());
    }
    Err(DeployError::NotMended { path: system.root().to_path_buf(), problems: done.problems }.into())
}
