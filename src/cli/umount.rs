//! `mosfs umount`: unmounts what `mosfs mount` has mounted.

use std::path::PathBuf;

use clap::Args;

use super::Global;
use crate::error::AnyError;
use crate::mount;

/// Unmount, and wait until nothing is left of the mount.
#[derive(Debug, Args)]
pub(super) struct UmountArgs {
    /// The mount point.
    #[arg(value_name = "DIR")]
    target: PathBuf,
    /// Detach the mount now, and end it when it is no longer in use.
    #[arg(long, short)]
    lazy: bool,
    /// Unmount, lazily, only if the daemon has died; otherwise do nothing and succeed.
    #[arg(long, conflicts_with = "lazy")]
    dead: bool,
    /// Unmount nothing: only fail where a mount of mosfs is whose daemon lives.
    #[arg(long, hide = true, conflicts_with_all = ["lazy", "dead"])]
    vacant: bool,
}

/// Runs `mosfs umount`.
pub(super) fn run(args: &UmountArgs, _: &Global) -> Result<(), AnyError> {
    if args.vacant {
        return Ok(mount::check_vacant(&args.target)?);
    }
    if args.dead {
        mount::unmount_dead(&args.target)?;
        return Ok(());
    }
    Ok(mount::unmount(&args.target, args.lazy)?)
}
