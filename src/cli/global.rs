//! Options that every command takes.

use std::path::PathBuf;

use clap::Args;

/// Options that every command takes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Use the deployed system in this folder.
    #[arg(long, global = true, env = "MOSFS_SYSTEM", default_value = "/var/lib/mosfs", value_name = "DIR")]
    pub system: PathBuf,
    /// Use the trusted configuration in this folder (manifestCA.pem, product, floor.pub).
    #[arg(long, global = true, env = "MOSFS_CONFIG", default_value = "/etc/mosfs", value_name = "DIR")]
    pub config: PathBuf,
    /// Print the answer as JSON.
    #[arg(long, global = true)]
    pub json: bool,
    /// Log more; twice, log everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Write progress to this open file descriptor, as JSON lines.
    #[arg(long, global = true, value_name = "N")]
    pub progress_fd: Option<i32>,
}
