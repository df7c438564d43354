//! `mosfs-full`: every command of `mosfs`.

use std::process::ExitCode;

fn main() -> ExitCode {
    mosfs::programs::mosfs_full()
}
