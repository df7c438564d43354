//! `mosfs generate`: shell completions and man pages, for packages and `make install`.
//!
//! Hidden from the help: it is for whoever builds, not for users.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use clap_complete::Shell;

use super::{Global, help, output};
use crate::error::{AnyError, IoContext};

/// Write shell completions or man pages.
#[derive(Debug, Args)]
pub(super) struct Generate {
    #[command(subcommand)]
    what: Output,
}

#[derive(Debug, Subcommand)]
enum Output {
    /// Print the completions of a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Write one man page for each command into a folder.
    Man {
        /// The folder, which must exist.
        dir: PathBuf,
    },
}

/// Runs the command.
///
/// # Errors
/// Whatever writing the output gives.
pub(super) fn run(args: &Generate, _: &Global) -> Result<(), AnyError> {
    match &args.what {
        Output::Completions { shell } => {
            // Into memory first: clap_complete panics where its writer fails, and a pipe may.
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut help::command(), "mosfs", &mut text);
            output::document(&text)?;
        }
        Output::Man { dir } => {
            clap_mangen::generate_to(help::without_help_commands(), dir).on("write man pages in", dir)?
        }
    }
    Ok(())
}
