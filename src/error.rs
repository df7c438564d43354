//! The common interface of all errors of the library.
//!
//! Each module has its own error type, whose text names the object (target, digest, path), what was expected
//! and what was found. Every error has a [`Class`]; the command line converts the class to an exit code
//! (docs/design.md, exit codes) and adds advice.

use std::io;
use std::path::{Path, PathBuf};

/// The kinds of failure that a caller can distinguish by the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Class {
    /// Anything without a specific code, such as an I/O error. Exit code 1.
    Failure,
    /// The user's arguments or input files are wrong. Exit code 2.
    Input,
    /// Signature, digest, verity or product do not match. Exit code 3.
    Verification,
    /// A version older than the device may run. Exit code 4.
    Rollback,
    /// The TPM is missing, not provisioned, or was tampered with. Exit code 5.
    Tpm,
}

impl Class {
    /// Returns the process exit code of this class (docs/design.md, exit codes).
    pub const fn exit_code(self) -> u8 {
        match self {
            Class::Failure => 1,
            Class::Input => 2,
            Class::Verification => 3,
            Class::Rollback => 4,
            Class::Tpm => 5,
        }
    }

    /// Returns the class of another process of mosfs, by its exit code; any other code is a failure.
    pub(crate) fn of_exit_code(code: Option<i32>) -> Self {
        let all = [Class::Input, Class::Verification, Class::Rollback, Class::Tpm];
        all.into_iter().find(|one| code == Some(one.exit_code().into())).unwrap_or(Class::Failure)
    }
}

/// An error that has a class.
///
/// ```
/// use mosfs::{Class, Classified, SystemManifest};
///
/// let error = SystemManifest::parse(b"{}").unwrap_err();
/// assert_eq!(error.class(), Class::Input);
/// assert_eq!(error.class().exit_code(), 2);
/// ```
pub trait Classified: std::error::Error + Send + Sync + 'static {
    /// Which exit code this error leads to.
    fn class(&self) -> Class;
}

/// Any error of the library, for callers that only report errors.
///
/// ```
/// use std::path::Path;
///
/// use mosfs::{AnyError, Class, Store, TransportError};
///
/// fn names(store: &Path) -> Result<usize, AnyError> {
///     Ok(Store::open(store)?.names()?.len())
/// }
///
/// let error = names(Path::new("/nowhere")).unwrap_err();
/// assert_eq!(error.class(), Class::Input);
/// assert!(error.to_string().contains("/nowhere"), "{error}");
/// ```
#[derive(Debug)]
pub struct AnyError(Box<dyn Classified>);

impl AnyError {
    /// Which exit code this error leads to.
    pub fn class(&self) -> Class {
        self.0.class()
    }

    /// Returns the error itself, to inspect its concrete type with `downcast_ref`.
    pub fn inner(&self) -> &(dyn std::error::Error + 'static) {
        // Upcast from `Classified` to its supertrait.
        &*self.0 as &(dyn std::error::Error + 'static)
    }

    /// Returns the error's text with the texts of its causes, joined by `: `.
    ///
    /// A cause is not repeated if the error's text already ends with it.
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

/// The text holds the causes already, so there is no `source`; [`AnyError::inner`] has them.
impl std::error::Error for AnyError {}

impl<E: Classified> From<E> for AnyError {
    fn from(error: E) -> Self {
        Self(Box::new(error))
    }
}

/// An operation of the operating system that failed on a named object.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {}: {source}", path.display())]
pub struct IoError {
    /// The operation, as a verb: `open`, `rename`, `sync`.
    pub operation: &'static str,
    /// The object of the operation.
    pub path: PathBuf,
    /// The error of the operating system.
    pub source: io::Error,
}

impl IoError {
    /// Creates an error of an operation on this object.
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
    /// Converts the error to an [`IoError`] that names `operation` and `path`.
    fn on(self, operation: &'static str, path: impl AsRef<Path>) -> Result<T, IoError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn on(self, operation: &'static str, path: impl AsRef<Path>) -> Result<T, IoError> {
        self.map_err(|source| IoError::new(operation, path, source))
    }
}

/// The words of an error about a target, after the target's name: for a place that states the name itself.
pub fn without_target<'a>(target: &str, words: &'a str) -> &'a str {
    let rest = words.strip_prefix("target ").and_then(|rest| rest.strip_prefix(target));
    let rest = rest.and_then(|rest| rest.strip_prefix(": ").or_else(|| rest.strip_prefix(", ")));
    rest.unwrap_or(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_named_once() {
        for (words, rest) in [
            ("target web: it failed", "it failed"),
            ("target web, network.type: found x", "network.type: found x"),
            ("target web-2: it failed", "target web-2: it failed"),
            ("target db: it failed", "target db: it failed"),
            ("cannot write /x", "cannot write /x"),
            ("target web: target web: it failed", "target web: it failed"),
        ] {
            assert_eq!(without_target("web", words), rest);
        }
    }
}
