//! What the commands of a device share: its system, its anchor, its floor.

use super::{FloorArgs, Global};
use crate::deploy::{FloorGate, System};
use crate::error::AnyError;
use crate::floor::{Config, Floor};

/// The system folder of the command line.
pub fn system(global: &Global) -> System {
    System::at(&global.system)
}

/// Says that the command waits for another one, once.
pub fn waiting(global: &Global) -> impl FnOnce() + use<> {
    let path = global.system.clone();
    move || eprintln!("mosfs: waiting for another mosfs that changes {}", path.display())
}

/// Runs `job` with what an install or an update asks of the floor.
///
/// A device whose CONFIG has no floor key has no floor yet. A first install may go on there, as
/// there is nothing to provision for before it, and says so; everything else is refused by the
/// floor itself.
pub fn with_gate<T>(
    args: &FloorArgs,
    global: &Global,
    first_install: bool,
    job: impl FnOnce(&mut FloorGate<'_>) -> Result<T, AnyError>,
) -> Result<T, AnyError> {
    let config = Config::load(&global.config)?;
    if first_install && config.floor_pub.is_none() && !args.in_file() {
        eprintln!(
            "mosfs: warning: this device has no floor yet: nothing stops an older version from being put back \
             before `mosfs floor provision` has run"
        );
        return job(&mut FloorGate::Unprovisioned);
    }
    let mut floor: Box<dyn Floor> = args.open(global)?;
    let policy = config.policy().ok();
    job(&mut FloorGate::Enforced { floor: floor.as_mut(), policy })
}
