//! What the commands of a device share: its system, its anchor, its floor.

use std::time::Duration;

use super::esp::{ESP_PATIENCE, EspArgs};
use super::{FloorArgs, Global, output};
use crate::deploy::gc::Needs;
use crate::deploy::{FloorGate, System, space};
use crate::deploy::{booted, esp};
use crate::error::AnyError;
use crate::floor::{self, Floor};
use crate::trust::config::find_floor_key;

/// The system folder of the command line.
pub(super) fn system(global: &Global) -> System {
    System::at(&global.system)
}

/// Says that the command waits for another one, once.
pub(super) fn waiting(global: &Global) -> impl FnOnce() + use<> {
    let path = global.system.clone();
    move || output::message(format_args!("waiting for another mosfs that changes {}", path.display()))
}

/// Runs `job` with what an install or an update asks of the floor.
///
/// A device whose CONFIG has no floor key has no floor yet. A first install may go on there, as
/// there is nothing to provision for before it, and says so; everything else is refused by the
/// floor itself.
pub(super) fn with_gate<T>(
    args: &FloorArgs,
    global: &Global,
    first_install: bool,
    job: impl FnOnce(&mut FloorGate<'_>) -> Result<T, AnyError>,
) -> Result<T, AnyError> {
    if first_install && !args.in_file() && find_floor_key(&global.config)?.is_none() {
        output::warning(
            "this device has no floor yet: nothing stops an older version from being put back before \
             `mosfs floor provision` has run",
        );
        return job(&mut FloorGate::Unprovisioned);
    }
    let mut floor: Box<dyn Floor> = args.open(global)?;
    let policy = floor::find_policy(&global.config)?;
    job(&mut FloorGate::Enforced { floor: floor.as_mut(), policy })
}

/// The floor, for what may go without it: `None` where it cannot be read.
pub(super) fn floor_if_known(args: &FloorArgs, global: &Global) -> Option<u64> {
    let read = || -> Result<u64, AnyError> { Ok(args.open_quietly(global)?.read()?) };
    read().inspect_err(|error| log::info!("the floor is not known: {error}")).ok()
}

/// Removes what nothing needs, after a command that has done its work: what stands in the way of that is said, and is
/// no failure of the command.
pub(super) fn tidy(system: &System, floor: Option<u64>, patience: Duration, global: &Global) {
    let tidied = || {
        let lock = system.lock_within(patience, waiting(global))?;
        space::tidy(system, &lock, &Needs { floor, ..Needs::of_this_boot()? })
    };
    match tidied() {
        Ok(problems) => problems.iter().for_each(output::note),
        Err(error) => output::note(format_args!("what nothing needs is not removed: {error}")),
    }
}

/// Brings the kernels on the EFI system partition up to date, where this machine has some there.
pub(super) fn sync_esp(
    system: &System,
    args: &EspArgs,
    floor: Option<u64>,
    global: &Global,
) -> Result<(), AnyError> {
    super::log::show(global);
    let place = args.find(global, ESP_PATIENCE)?;
    let Some(esp) = &place.esp else { return Ok(()) };
    let _lock = system.lock(waiting(global))?;
    esp::sync(system, esp, booted::deployment()?, floor)?.report();
    Ok(())
}
