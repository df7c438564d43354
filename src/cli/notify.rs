//! `-o notify_pipe=PATH`: notifies the reader of a pipe that a mount is ready, or that it failed.
//!
//! As squashfuse does it: the path is a named pipe, one byte is written to it, `s` for success or `f` for
//! failure. Who waits may open the pipe before or after; the byte waits for them for a minute, in a
//! process or a thread of its own, so that nobody else waits.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use super::output;
use crate::error::{AnyError, Class, Classified, IoContext};
use crate::sys;
use crate::sys::daemon::Forked;
use crate::sys::locks;

/// The mount is ready.
pub(super) const SUCCESS: u8 = b's';
/// There will be no mount.
pub(super) const FAILURE: u8 = b'f';

/// How long the byte waits for a reader.
const PATIENCE: Duration = Duration::from_secs(60);
/// The option, up to its value.
const OPTION: &str = "notify_pipe=";

/// Whether a mount option is this one.
pub(super) fn is_option(option: &str) -> bool {
    option.starts_with(OPTION)
}

/// What was given is no named pipe.
#[derive(Debug, thiserror::Error)]
#[error("notify_pipe={}: expected a named pipe (mkfifo), found another kind of file", path.display())]
struct NotAPipe {
    path: PathBuf,
}

impl Classified for NotAPipe {
    fn class(&self) -> Class {
        Class::Input
    }
}

/// The pipe, if there is one, until a byte was written to it: there is one byte a mount.
#[derive(Debug)]
pub(super) struct Pipe(Mutex<Option<PathBuf>>);

impl Pipe {
    /// Finds the option among those of `-o`; the last one counts.
    ///
    /// # Errors
    /// The path does not exist or is not a pipe, so there cannot be a reader.
    pub(super) fn of(options: &[String]) -> Result<Self, AnyError> {
        let path = options.iter().filter_map(|option| option.strip_prefix(OPTION)).next_back();
        let Some(path) = path.map(Path::new) else { return Ok(Self(Mutex::new(None))) };
        // The daemon's working folder is another.
        let path = std::path::absolute(path).on("find", path)?;
        if !sys::notify::is_pipe(&path).on("look at", &path)? {
            return Err(NotAPipe { path }.into());
        }
        Ok(Self(Mutex::new(Some(path))))
    }

    fn take(&self) -> Option<PathBuf> {
        locks::lock(&self.0).take()
    }

    /// Writes the byte, and waits for its reader.
    pub(super) fn say(&self, byte: u8) {
        if let Some(path) = self.take() {
            write(&path, byte);
        }
    }

    /// Writes the byte from another process where nobody reads the pipe yet.
    pub(super) fn say_in_background(&self, byte: u8) {
        let Some(path) = self.take() else { return };
        if sys::notify::write_to_pipe(&path, byte, Duration::ZERO).is_ok() {
            return;
        }
        match sys::daemon::fork() {
            Ok(Forked::Parent(_)) => {}
            Ok(Forked::Child) => {
                let _ = sys::daemon::detach(&sys::daemon::open_descriptors());
                let code = sys::notify::write_to_pipe(&path, byte, PATIENCE).is_err();
                std::process::exit(code.into());
            }
            Err(_) => write(&path, byte),
        }
    }

    /// Writes the byte from a thread.
    pub(super) fn say_from_thread(&self, byte: u8) {
        if let Some(path) = self.take() {
            std::thread::spawn(move || write(&path, byte));
        }
    }
}

fn write(path: &Path, byte: u8) {
    if let Err(error) = sys::notify::write_to_pipe(path, byte, PATIENCE) {
        output::note(format_args!("the pipe {} was not notified: {error}", path.display()));
    }
}
