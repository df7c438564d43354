//! Printing: errors with advice, and answers.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use uuid::Uuid;

use super::Global;
use crate::deploy::DeployError;
use crate::error::{AnyError, Class, Classified, IoContext};
use crate::manifest::rules;
use crate::manifest::{ImportErrors, SystemError};
use crate::publish::keys::GenerateError;
use crate::trust::{AnchorError, KeyError, SignError, TrustError};

/// Prints an error to stderr: one line of what and why, then advice.
pub fn report(error: &AnyError) {
    eprintln!("mosfs: {error}");
    if let Some(advice) = advice(error) {
        eprintln!("hint: {advice}");
    }
}

/// Prints how a command ended, if it failed, and returns its exit code (docs/design.md, exit codes).
pub fn exit_code(done: Result<(), AnyError>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(error.class().exit_code())
        }
    }
}

/// Prints a remark to stderr: something that is not wrong, but worth knowing.
pub fn note(text: impl Display) {
    eprintln!("mosfs: note: {text}");
}

/// What a user can do about an error, if there is something. The library's errors say what is
/// wrong; only here is it said what to run.
///
/// An error type with advice has a function below and a row here. A type that wraps another one
/// as `#[error(transparent)]` is looked through by its own function, because `source` skips it.
fn advice(error: &AnyError) -> Option<&'static str> {
    let mut cause = Some(error.inner());
    while let Some(this) = cause {
        let found = None
            .or_else(|| this.downcast_ref().and_then(super::floor::advice))
            .or_else(|| this.downcast_ref().and_then(super::floor::for_key))
            .or_else(|| this.downcast_ref().and_then(super::activate::advice))
            .or_else(|| this.downcast_ref().and_then(for_deploy))
            .or_else(|| this.downcast_ref().and_then(for_trust))
            .or_else(|| this.downcast_ref().and_then(for_anchor))
            .or_else(|| this.downcast_ref().and_then(for_key))
            .or_else(|| this.downcast_ref().and_then(for_generate))
            .or_else(|| this.downcast_ref().and_then(for_sign))
            .or_else(|| this.downcast_ref().and_then(for_system))
            .or_else(|| this.downcast_ref().and_then(for_import));
        if found.is_some() {
            return found;
        }
        cause = this.source();
    }
    None
}

fn for_trust(error: &TrustError) -> Option<&'static str> {
    Some(match error {
        TrustError::Expired { .. } => {
            "ask the publisher for a system signed with a renewed certificate, or check this machine's clock"
        }
        TrustError::NotYetValid { .. } => "check this machine's clock",
        TrustError::IncompleteChain { .. } => {
            "append the certificates between the signer and the CA to the certificate file"
        }
        TrustError::SelfSigned { .. } | TrustError::UntrustedCertificate { .. } => {
            "do not install this system unless its publisher confirms the certificate"
        }
        TrustError::OtherProduct { .. } | TrustError::ManifestOtherProduct { .. } => {
            "this system was made for other devices"
        }
        TrustError::BadSignature { .. } => {
            "fetch the system again; if it fails again, its bytes were changed after signing"
        }
        TrustError::TruncatedSignature { .. } | TrustError::UnreadableCertificate { .. } => {
            "fetch the file again"
        }
        _ => return None,
    })
}

fn for_deploy(error: &DeployError) -> Option<&'static str> {
    Some(match error {
        DeployError::Trust(error) => return for_trust(error),
        DeployError::Floor(error) => return super::floor::advice(error),
        DeployError::NothingInstalled { .. } => "run `mosfs install` first, or give --system",
        DeployError::AlreadyInstalled { .. } => "run `mosfs update` for the next version",
        DeployError::SameVersionOtherDigest { .. } => "build the other system with a higher version",
        DeployError::NoSpace { .. } => "run `mosfs gc`, or free space otherwise; nothing was fetched",
        DeployError::MissingBlob { .. } => "run `mosfs verify`; then install or update again",
        DeployError::NotSigned { .. } => {
            "copy the whole system: its signature and certificate are artifacts of their own"
        }
        DeployError::State { .. } => "run the mosfs that wrote the file, or a later one",
        _ => return None,
    })
}

pub(super) fn for_anchor(error: &AnchorError) -> Option<&'static str> {
    Some(match error {
        AnchorError::Missing { .. } => {
            "give --ca and --product to `mosfs install`, or --config if the configuration is elsewhere"
        }
        AnchorError::OtherCa { .. } | AnchorError::OtherProduct { .. } => {
            "leave out --ca and --product to use what this device trusts"
        }
        _ => return None,
    })
}

pub(super) fn for_key(error: &KeyError) -> Option<&'static str> {
    Some(match error {
        KeyError::OpenToOthers { .. } => "run `chmod 600` on it, and consider whether someone has read it",
        KeyError::Unsupported { .. } => "make a key with `mosfs keys generate`",
        _ => return None,
    })
}

fn for_generate(error: &GenerateError) -> Option<&'static str> {
    match error {
        GenerateError::Exists { .. } => Some("choose another folder"),
        _ => None,
    }
}

fn for_sign(error: &SignError) -> Option<&'static str> {
    match error {
        SignError::KeyMismatch { .. } => Some("give --key and --cert of the same signer"),
        SignError::Certificate(error) => for_trust(error),
        SignError::Key(error) => for_key(error),
    }
}

fn for_system(error: &SystemError) -> Option<&'static str> {
    match error {
        SystemError::NotCanonical { .. } => Some("`mosfs manifest canonical FILE` prints the canonical form"),
        _ => None,
    }
}

fn for_import(errors: &ImportErrors) -> Option<&'static str> {
    Some(match errors.class() {
        Class::Verification => {
            "another image is there than the one that was pinned; look at it before changing the pin"
        }
        _ => "`mosfs manifest check FILE` checks a manifest without building it",
    })
}

/// Prints one line of an answer to stdout.
///
/// # Errors
/// If stdout cannot be written, such as a full disk.
pub fn line(text: impl Display) -> Result<(), AnyError> {
    written(writeln!(io::stdout().lock(), "{text}"))
}

/// A reader that has seen enough (`| head`) is not a failure.
fn written(outcome: io::Result<()>) -> Result<(), AnyError> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => Ok(outcome.on("write", "stdout")?),
    }
}

/// Prints an answer to stdout as it is.
///
/// # Errors
/// As [`line`].
pub fn bytes(bytes: &[u8]) -> Result<(), AnyError> {
    let mut out = io::stdout().lock();
    written(out.write_all(bytes).and_then(|()| out.flush()))
}

/// Prints an answer to stdout as one line of JSON.
///
/// # Errors
/// As [`line`].
pub fn json(answer: &serde_json::Value) -> Result<(), AnyError> {
    line(answer)
}

/// Prints an answer: JSON with `--json`, else text.
///
/// # Errors
/// As [`line`].
pub fn answer(
    global: &Global,
    json: impl FnOnce() -> serde_json::Value,
    text: impl FnOnce() -> String,
) -> Result<(), AnyError> {
    if global.json { self::json(&json()) } else { line(text()) }
}

/// Reads a UUID of the command line, in the one form that manifests take.
pub fn uuid(text: &str) -> Result<Uuid, String> {
    rules::uuid(text).map_err(|refused| format!("expected {}", refused.allowed))
}
