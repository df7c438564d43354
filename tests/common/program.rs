//! Programs that a test puts somewhere and then runs.

use std::path::Path;
use std::process::Command;

/// Copies a program with its mode.
///
/// Not with `fs::copy`: a child that another thread forks meanwhile has the open file as well, and until that child
/// runs its own program, exec(2) of this one fails with ETXTBSY. A busy machine makes that time long.
pub fn copy_program(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    let (from, to) = (from.as_ref(), to.as_ref());
    let copied = Command::new("cp").args(["--preserve=mode", "--"]).args([from, to]).status();
    assert!(copied.expect("run cp (Debian package coreutils)").success(), "copy {from:?} to {to:?}");
}
