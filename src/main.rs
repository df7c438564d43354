//! The `mosfs` command: see `src/cli/start.rs`.

use std::process::ExitCode;

fn main() -> ExitCode {
    mosfs::programs::mosfs()
}
