//! Signs EFI programs for Secure Boot, with `sbsign` or with a command of the publisher's, who may have the key in a
//! token.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::pe;
use crate::digest::Digest;
use crate::error::{Class, Classified, IoContext, IoError};
use crate::sys::file::read_named;

/// Largest signed program that is read back, in bytes.
const MAX_BYTES: u64 = 1 << 30;
/// Longest certificate, in bytes.
const MAX_CERTIFICATE: u64 = 1 << 20;

/// Who signs EFI programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EfiSigner {
    /// `sbsign`, with a key and its certificate in PEM.
    Sbsign {
        /// The private key.
        key: PathBuf,
        /// The certificate.
        certificate: PathBuf,
    },
    /// `COMMAND IN OUT`, run by the shell.
    Command(OsString),
}

/// Why a program is not signed.
#[derive(Debug, thiserror::Error)]
pub enum EfiSignError {
    /// The command cannot be run.
    #[error("cannot run {command}: {source}")]
    Run {
        /// The command.
        command: String,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The command failed.
    #[error("{command} failed ({status}): {said}")]
    Failed {
        /// The command.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The last line that it wrote to stderr.
        said: String,
    },
    /// What it wrote is another program than the one to be signed.
    #[error("{command} did not return the program with a signature added")]
    OtherProgram {
        /// The command.
        command: String,
    },
    /// A file that cannot be read or written.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for EfiSignError {
    fn class(&self) -> Class {
        match self {
            Self::OtherProgram { .. } => Class::Verification,
            _ => Class::Failure,
        }
    }
}

impl EfiSigner {
    /// What a signature depends on beside the program: the certificate, or the command.
    ///
    /// # Errors
    /// [`EfiSignError::Io`] if the certificate cannot be read.
    pub fn identity(&self) -> Result<Digest, EfiSignError> {
        Ok(match self {
            Self::Sbsign { certificate, .. } => Digest::of(&read_named(certificate, MAX_CERTIFICATE)?),
            Self::Command(command) => Digest::of(command.as_encoded_bytes()),
        })
    }

    /// Signs a program. `scratch` is a path for files that are removed again.
    ///
    /// # Errors
    /// [`EfiSignError`].
    pub fn sign(&self, program: &[u8], scratch: &Path) -> Result<Vec<u8>, EfiSignError> {
        let beside = |ending: &str| {
            let mut path = scratch.as_os_str().to_os_string();
            path.push(ending);
            PathBuf::from(path)
        };
        let (from, to) = (beside(".unsigned"), beside(".signed"));
        let signed = std::fs::write(&from, program)
            .on("write", &from)
            .map_err(EfiSignError::from)
            .and_then(|()| self.run(&from, &to))
            .and_then(|()| Ok(read_named(&to, MAX_BYTES)?));
        for path in [&from, &to] {
            let _ = std::fs::remove_file(path);
        }
        let signed = signed?;
        // Rule: a signer adds a signature and changes nothing else; what is installed is what was built.
        if !pe::is_signed_form_of(&signed, program) {
            return Err(EfiSignError::OtherProgram { command: self.name() });
        }
        Ok(signed)
    }

    fn name(&self) -> String {
        match self {
            Self::Sbsign { .. } => "sbsign".into(),
            Self::Command(command) => format!("`{}`", command.to_string_lossy()),
        }
    }

    fn run(&self, from: &Path, to: &Path) -> Result<(), EfiSignError> {
        let mut command = match self {
            Self::Sbsign { key, certificate } => {
                let mut command = Command::new("sbsign");
                command.arg("--key").arg(key).arg("--cert").arg(certificate).arg("--output").args([to, from]);
                command
            }
            Self::Command(line) => {
                let mut script = line.clone();
                script.push(OsStr::new(" \"$@\""));
                let mut command = Command::new("sh");
                command.arg("-c").arg(script).arg("sh").args([from, to]);
                command
            }
        };
        let output = command
            .stdin(Stdio::inherit())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .output()
            .map_err(|source| EfiSignError::Run { command: self.name(), source })?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().last().unwrap_or("it says nothing").chars().take(300).collect();
        Err(EfiSignError::Failed { command: self.name(), status: output.status, said })
    }
}
