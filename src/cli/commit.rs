//! `mosfs commit`: this boot is healthy.

use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::esp::EspArgs;
use super::{FloorArgs, Global, device, output};
use crate::deploy::booted;
use crate::deploy::commit::{self, RunningBoot};
use crate::error::AnyError;
use crate::trust::Anchor;

/// Mark this boot as healthy: make its deployment current, then raise the floor to its version.
///
/// Refused if it is not known which deployment this boot runs. Afterwards, everything that is no longer needed is
/// removed, including the previous deployment once it is below the floor.
#[derive(Debug, Args)]
pub(super) struct CommitArgs {
    /// For a machine that mosfs does not boot: commit the pending deployment, or the current one.
    #[arg(long)]
    unbooted: bool,
    /// How long to wait for another mosfs that changes the system, and for the device of the EFI system partition, in
    /// seconds each.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=3600), value_name = "SECONDS")]
    wait: u64,
    #[command(flatten)]
    floor: FloorArgs,
    #[command(flatten)]
    esp: EspArgs,
}

/// Runs `mosfs commit`.
pub(super) fn run(args: &CommitArgs, global: &Global) -> Result<(), AnyError> {
    super::log::show(global);
    let anchor = Anchor::load(&global.config)?;
    let mut floor = args.floor.open(global)?;
    let ran = match booted::deployment()? {
        Some(deployment) => RunningBoot::This(deployment),
        // The development floor can be lowered again, so that a guess can be undone.
        None => RunningBoot::Unknown { take_pending: args.unbooted || args.floor.in_file() },
    };
    let system = device::system(global);
    let patience = Duration::from_secs(args.wait);
    let place = args.esp.find(global, patience)?;
    let esp = place.esp.as_ref();
    let waiting = device::waiting(global);
    let done = commit::commit(&system, &anchor, floor.as_mut(), ran, esp, patience, waiting)?;
    // A TPM behind a socket takes one connection at a time.
    drop((floor, place));
    device::tidy(&system, Some(done.floor_after), patience, global);
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
