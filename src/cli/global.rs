//! Options that every command takes.

use std::path::PathBuf;

use clap::Args;

/// Options that every command takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Where the deployed system lives.
    #[arg(long, global = true, env = "MOSFS_SYSTEM", default_value = "/var/lib/mosfs", value_name = "DIR")]
    pub system: PathBuf,
    /// Where the trusted configuration lives (manifestCA.pem, product, floor.pub).
    #[arg(long, global = true, env = "MOSFS_CONFIG", default_value = "/etc/mosfs", value_name = "DIR")]
    pub config: PathBuf,
    /// Print the answer as JSON.
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more; twice, say everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Write progress as JSON lines to this open file descriptor.
    #[arg(long, global = true, value_name = "N")]
    pub progress_fd: Option<i32>,
}
