//! The start of `mosfs`: mounts an image by itself, and leaves everything else to the full program.
//!
//! Most of what it takes to start the full program is the loading of libcrypto: 1.2 ms and 270 page faults, twice
//! what mounting takes. To mount an image nobody asks for a signature, so the program that is
//! installed as `mosfs` is one without it, and runs [`FULL`] in its place for all other commands, for
//! help, and for a command line that it does not understand.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};

use super::mount::MountArgs;
use super::plain::MountSource;
use super::{Global, mount, output, squashfuse};
use crate::error::{AnyError, Class, Classified};
use crate::run::stdio;

/// The file name of the full program.
const FULL: &str = "mosfs-full";

/// The part of the command line that is run here: the same words, the same meaning.
#[derive(Debug, Parser)]
#[command(name = "mosfs")]
struct Start {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: StartCommand,
}

#[derive(Debug, Subcommand)]
enum StartCommand {
    Mount(MountArgs),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    if squashfuse::is_called(&args) {
        return squashfuse::run(&args);
    }
    if let [name, command @ ..] = &*args
        && name == stdio::COPIER
    {
        return copy_streams(command);
    }
    if let Some(done) = mount_unsigned(&args) {
        return output::exit_code(done);
    }
    let tried = full_programs();
    for program in &tried {
        let error = replace(program, &args);
        if error.kind() != io::ErrorKind::NotFound {
            return output::exit_code(
                Err(StartError::Run { program: program.clone(), source: error }.into()),
            );
        }
    }
    output::exit_code(Err(StartError::Missing { tried }.into()))
}

/// Runs a command that must not have the streams of this process: the runtime of a container.
fn copy_streams(words: &[OsString]) -> ExitCode {
    let Some((program, arguments)) = words.split_first() else { return ExitCode::from(2) };
    let mut command = Command::new(program);
    command.args(arguments);
    match stdio::run(command) {
        Ok(status) => std::process::exit(stdio::exit_code(status)),
        Err(source) => {
            output::exit_code(Err(StartError::Run { program: PathBuf::from(program), source }.into()))
        }
    }
}

/// Why the full program cannot be run.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("cannot run {}: {source}", program.display())]
    Run { program: PathBuf, source: io::Error },
    #[error("the program {FULL} is not installed; looked for {}", tried.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" and "))]
    Missing { tried: Vec<PathBuf> },
}

impl Classified for StartError {
    fn class(&self) -> Class {
        Class::Failure
    }
}

/// Runs the command line, if it is one of `mosfs mount` with an image of a layout or a plain file.
fn mount_unsigned(args: &[OsString]) -> Option<Result<(), AnyError>> {
    // Saves the parsing where it is plain that it is another.
    if !args.iter().any(|arg| arg == "mount") {
        return None;
    }
    let Start { global, command: StartCommand::Mount(mount) } = Start::try_parse_from(args).ok()?;
    match mount.asked() {
        MountSource::Image(source) => Some(mount::mount_image(&mount, source, &global)),
        MountSource::File(path) => Some(mount::mount_file(&mount, path, &global)),
        MountSource::Target(_) | MountSource::Registry(_) => None,
    }
}

/// Where the full program may be: beside this one, and where it is installed.
fn full_programs() -> Vec<PathBuf> {
    let own = crate::sys::process::own_program().unwrap_or_default();
    let folder = own.parent().unwrap_or(Path::new("/usr/bin"));
    vec![folder.join(FULL), folder.join("../libexec/mosfs").join(FULL)]
}

/// Runs another program in place of this one; returns only where that cannot be.
fn replace(program: &Path, args: &[OsString]) -> io::Error {
    let name = args.first().map_or(OsStr::new("mosfs"), OsString::as_os_str);
    Command::new(program).arg0(name).args(args.iter().skip(1)).exec()
}
