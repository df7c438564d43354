//! The `mosfs` command: see [`mosfs::cli::start`].

use std::process::ExitCode;

fn main() -> ExitCode {
    mosfs::cli::start::main()
}
