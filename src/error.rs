//! What every error of the library can tell about itself.
//!
//! Each module has its own error type, whose text names the object (target, digest, path), what
//! was expected and what was found. All of them say which [`Class`] they belong to; the command
//! line turns the class into an exit code (docs/design.md, exit codes) and adds advice.

use std::io;
use std::path::{Path, PathBuf};

/// The kinds of failure that a caller can tell apart by the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Anything without a code of its own, such as an I/O error. Exit code 1.
    Failure,
    /// The user's words or the user's file are wrong. Exit code 2.
    Input,
    /// Signature, digest, verity or product do not match. Exit code 3.
    Verification,
    /// A version that is older than what the device may run. Exit code 4.
    Rollback,
    /// The TPM is missing, not provisioned, or was tampered with. Exit code 5.
    Tpm,
}

impl Class {
    /// The process exit code of this class (docs/design.md, exit codes).
    pub const fn exit_code(self) -> u8 {
        match self {
            Class::Failure => 1,
            Class::Input => 2,
            Class::Verification => 3,
            Class::Rollback => 4,
            Class::Tpm => 5,
        }
    }
}

/// An error that knows its class.
pub trait Classified: std::error::Error + Send + Sync + 'static {
    /// Which exit code this error leads to.
    fn class(&self) -> Class;
}

/// Any error of the library, for callers that only report it.
#[derive(Debug)]
pub struct AnyError(Box<dyn Classified>);

impl AnyError {
    /// Which exit code this error leads to.
    pub fn class(&self) -> Class {
        self.0.class()
    }

    /// The error itself, to look at its concrete type with `downcast_ref`.
    pub fn inner(&self) -> &(dyn std::error::Error + 'static) {
        // Upcast from `Classified` to its supertrait.
        &*self.0 as &(dyn std::error::Error + 'static)
    }

    /// The error's text with the texts of its causes, joined by `: `.
    ///
    /// A cause whose text the error already ends with is not repeated.
    pub fn chain(&self) -> String {
        let mut text = self.0.to_string();
        let mut cause = self.0.source();
        while let Some(next) = cause {
            let more = next.to_string();
            if !text.contains(&more) {
                text.push_str(": ");
                text.push_str(&more);
            }
            cause = next.source();
        }
        text
    }
}

impl std::fmt::Display for AnyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.chain())
    }
}

impl<E: Classified> From<E> for AnyError {
    fn from(error: E) -> Self {
        Self(Box::new(error))
    }
}

/// An operation of the operating system that failed on a named object.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {}: {source}", path.display())]
pub struct IoError {
    /// What was tried, as a verb: `open`, `rename`, `sync`.
    pub operation: &'static str,
    /// The object that it was tried on.
    pub path: PathBuf,
    /// What the operating system answered.
    pub source: io::Error,
}

impl IoError {
    /// An operation that failed on this object.
    pub fn new(operation: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        Self { operation, path: path.as_ref().to_path_buf(), source }
    }
}

impl Classified for IoError {
    fn class(&self) -> Class {
        Class::Failure
    }
}

/// Names the operation and the object of an `io::Result`.
pub trait IoContext<T> {
    /// Turns the error into an [`IoError`] that names `operation` and `path`.
    fn on(self, operation: &'static str, path: impl AsRef<Path>) -> Result<T, IoError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn on(self, operation: &'static str, path: impl AsRef<Path>) -> Result<T, IoError> {
        self.map_err(|source| IoError::new(operation, path, source))
    }
}
