//! `mosfs commit`: this boot is healthy.

use clap::Args;
use serde_json::json;

use super::{FloorArgs, Global, device, output};
use crate::deploy::booted;
use crate::deploy::commit;
use crate::error::AnyError;
use crate::trust::Anchor;

/// Say that this boot is healthy: bless its deployment, then raise the floor to its version.
#[derive(Debug, Args)]
pub struct CommitArgs {
    #[command(flatten)]
    floor: FloorArgs,
}

/// Runs `mosfs commit`.
pub fn run(args: &CommitArgs, global: &Global) -> Result<(), AnyError> {
    let anchor = Anchor::load(&global.config)?;
    let mut floor = args.floor.open(global)?;
    let booted = booted::deployment()?;
    let done =
        commit::commit(&device::system(global), &anchor, floor.as_mut(), booted, device::waiting(global))?;
    output::answer(
        global,
        || {
            json!({
                "deployment": done.deployment, "version": done.deployment.version, "blessed": done.blessed,
                "floor_before": done.floor_before, "floor": done.floor_after,
            })
        },
        || {
            let version = done.deployment.version;
            let blessed = if done.blessed { "is current now" } else { "was current already" };
            let floor = if done.floor_before == done.floor_after {
                format!("the floor stays at {}", done.floor_after)
            } else {
                format!("the floor rose from {} to {}", done.floor_before, done.floor_after)
            };
            format!("version {version} {blessed}; {floor}")
        },
    )
}
