//! The `mosfs` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    mosfs::cli::main()
}
