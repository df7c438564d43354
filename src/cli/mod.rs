//! The command line: parse, run, print. The only code that prints.
//!
//! A command is one file here with a `clap::Args` struct and a `run` function, and one row in
//! [`Command`] and in [`run`].

mod activate;
mod advice;
mod boot;
mod build;
mod commit;
mod containers;
mod device;
mod esp;
mod floor;
mod gc;
mod generate;
mod global;
mod help;
mod init;
mod install;
mod iso;
mod kernel;
mod keys;
mod lazy;
mod lazy_target;
mod lazy_update;
mod log;
mod manifest;
mod mount;
mod notify;
mod offered;
pub mod output;
mod plain;
mod progress;
#[cfg(feature = "registry")]
mod push;
mod registry;
mod repair;
mod run_target;
mod setup;
mod shifted_unit;
mod squashfuse;
pub mod start;
mod status;
mod store;
#[cfg(feature = "registry")]
mod trace;
mod umount;
mod verify;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{FromArgMatches, Parser, Subcommand};

use floor::FloorArgs;
pub use global::Global;
use registry::RegistryArgs;

use crate::error::AnyError;

/// Turn a list of OCI images into a signed, verified, running Linux system
#[derive(Debug, Parser)]
#[command(name = "mosfs", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Build(Box<build::Build>),
    Iso(Box<iso::IsoArgs>),
    Keys(keys::Keys),
    Manifest(manifest::Manifest),
    #[cfg(feature = "registry")]
    Push(push::PushArgs),
    #[cfg(feature = "registry")]
    Pull(push::PullArgs),
    Install(install::InstallArgs),
    Update(install::UpdateArgs),
    Setup(Box<setup::SetupArgs>),
    Commit(commit::CommitArgs),
    Status(status::StatusArgs),
    Floor(floor::FloorCommand),
    #[command(hide = true)]
    Generate(generate::Generate),
    Activate(activate::ActivateArgs),
    Ps(containers::PsArgs),
    Exec(containers::ExecArgs),
    Logs(containers::LogsArgs),
    RunTarget(run_target::RunTargetArgs),
    Boot(boot::BootArgs),
    Mount(mount::MountArgs),
    #[cfg(feature = "registry")]
    Trace(trace::TraceArgs),
    Umount(umount::UmountArgs),
    Verify(verify::Verify),
    Repair(repair::RepairArgs),
    Gc(gc::Gc),
    Store(store::StoreCommand),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    if crate::boot::init::is_init() {
        init::main();
    }
    // Before there are threads: it changes the environment.
    crate::sys::tpm::silence_library();
    let args: Vec<OsString> = std::env::args_os().collect();
    if squashfuse::is_called(&args) { squashfuse::run(&args) } else { run_with(args) }
}

/// Runs a command line; prints, and returns the exit code (docs/design.md, exit codes).
pub fn run_with(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let parsed =
        help::command().try_get_matches_from(args).and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => return output::usage(&error),
    };
    output::exit_code(run(&cli))
}

fn run(cli: &Cli) -> Result<(), AnyError> {
    match &cli.command {
        Command::Build(args) => build::run(args, &cli.global),
        Command::Iso(args) => iso::run(args, &cli.global),
        Command::Keys(args) => keys::run(args, &cli.global),
        Command::Manifest(args) => manifest::run(args, &cli.global),
        #[cfg(feature = "registry")]
        Command::Push(args) => push::push(args, &cli.global),
        #[cfg(feature = "registry")]
        Command::Pull(args) => push::pull(args, &cli.global),
        Command::Install(args) => install::install(args, &cli.global),
        Command::Update(args) => install::update(args, &cli.global),
        Command::Setup(args) => setup::run(args, &cli.global),
        Command::Commit(args) => commit::run(args, &cli.global),
        Command::Status(args) => status::run(args, &cli.global),
        Command::Floor(args) => floor::run(args, &cli.global),
        Command::Generate(args) => generate::run(args, &cli.global),
        Command::Activate(args) => activate::run(args, &cli.global),
        Command::Ps(args) => containers::ps(args, &cli.global),
        Command::Exec(args) => containers::exec(args, &cli.global),
        Command::Logs(args) => containers::logs(args, &cli.global),
        Command::RunTarget(args) => run_target::run(args, &cli.global),
        Command::Boot(args) => boot::run(args, &cli.global),
        Command::Mount(args) => mount::run(args, &cli.global),
        #[cfg(feature = "registry")]
        Command::Trace(args) => trace::run(args, &cli.global),
        Command::Umount(args) => umount::run(args, &cli.global),
        Command::Verify(args) => verify::run(args, &cli.global),
        Command::Repair(args) => repair::run(args, &cli.global),
        Command::Gc(args) => gc::run(args, &cli.global),
        Command::Store(args) => store::run(args, &cli.global),
    }
}
