//! `mosfs umount`: unmounts what `mosfs mount` has mounted.

use std::path::PathBuf;

use clap::Args;

use super::Global;
use crate::error::AnyError;
use crate::mount;

/// Unmount, and wait until nothing is left of the mount.
#[derive(Debug, Args)]
pub struct UmountArgs {
    /// The folder that it is mounted at.
    #[arg(value_name = "DIR")]
    target: PathBuf,
    /// Take it out of the tree now, and end it when its last user is gone.
    #[arg(long, short)]
    lazy: bool,
    /// Only if its daemon is dead, and then lazily; anything else is left alone and no failure.
    #[arg(long, conflicts_with = "lazy")]
    dead: bool,
    /// Unmount nothing: only fail where a mount of mosfs is whose daemon lives.
    #[arg(long, hide = true, conflicts_with_all = ["lazy", "dead"])]
    vacant: bool,
}

/// Runs `mosfs umount`.
pub fn run(args: &UmountArgs, _: &Global) -> Result<(), AnyError> {
    if args.vacant {
        return Ok(mount::check_vacant(&args.target)?);
    }
    if args.dead {
        mount::unmount_dead(&args.target)?;
        return Ok(());
    }
    Ok(mount::unmount(&args.target, args.lazy)?)
}
