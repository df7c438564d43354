//! The kernel of a system: which one it requires, and which one runs.
//!
//! A system with a target `boot` names the id of its kernel there ([`crate::image::boot`]). A kernel image that `mosfs
//! build` made has its own id in CONFIG (`kernel`), which whoever signs the kernel vouches for. So a system starts only
//! under its own kernel, and an old kernel, which may be signed for Secure Boot for ever, starts only old systems:
//! those the floor refuses.
//!
//! A system that names no kernel starts under any, and a kernel without an id starts only such systems.

use std::path::{Path, PathBuf};

use super::error::DeployError;
use super::id::DeploymentId;
use super::{System, deployment, target};
use crate::digest::Digest;
use crate::error::{Class, Classified, IoError};
use crate::image::boot::{self, KERNEL_FILE};
use crate::manifest::SystemManifest;
use crate::sys::file::{self, Links};

/// No such file is longer, in bytes.
const MAX_BYTES: u64 = 1 << 10;

/// Why it is not known which kernel runs.
#[derive(Debug, thiserror::Error)]
pub enum RunningKernelError {
    /// Not a digest.
    #[error("{}: found `{found}`, expected the id of the kernel: `sha256:` and 64 lower-case hex digits", path.display())]
    BadId {
        /// The file.
        path: PathBuf,
        /// Its content, shortened.
        found: String,
    },
    /// The file cannot be read.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for RunningKernelError {
    fn class(&self) -> Class {
        match self {
            Self::BadId { .. } => Class::Input,
            Self::Io(error) => error.class(),
        }
    }
}

/// Returns the id of the running kernel; `None` if it was not made by `mosfs build`.
///
/// # Errors
/// [`RunningKernelError`].
pub fn running(config: &Path) -> Result<Option<Digest>, RunningKernelError> {
    let path = config.join(KERNEL_FILE);
    let Some(bytes) = file::find_regular(&path, Links::Followed, MAX_BYTES)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes).into_owned();
    match text.trim().parse() {
        Ok(id) => Ok(Some(id)),
        Err(_) => {
            let found = text.trim().chars().take(100).flat_map(char::escape_debug).collect();
            Err(RunningKernelError::BadId { path, found })
        }
    }
}

/// Returns the id of the kernel that a system requires; `None` if it starts under any.
///
/// # Errors
/// An image of the target `boot` that is not in the store or not the signed one, or whose id is no digest.
pub fn required(system: &System, manifest: &SystemManifest) -> Result<Option<Digest>, DeployError> {
    let Some((name, target)) = manifest.targets.iter().find(|(name, _)| name.as_str() == boot::TARGET) else {
        return Ok(None);
    };
    let image = target::image_of(&system.store()?, name.as_str(), target)?;
    boot::kernel_id(&image)
        .map_err(|error| DeployError::BadKernelId { image: image.digest, found: error.found })
}

/// Rule (docs/design.md, kernel of the system): a system that names a kernel starts only under that one.
///
/// # Errors
/// [`DeployError::OtherKernel`].
pub fn check(required: Option<Digest>, running: Option<Digest>) -> Result<(), DeployError> {
    match required {
        Some(required) if running != Some(required) => Err(DeployError::OtherKernel { required, running }),
        _ => Ok(()),
    }
}

/// Whether a deployment says that it requires another kernel than the running one. Nothing is verified: it may be
/// passed over for that, but never be started.
pub(super) fn says_other(
    system: &System,
    id: &DeploymentId,
    running: Option<Digest>,
) -> Result<(), DeployError> {
    let Ok(signed) = deployment::read(system, id) else { return Ok(()) };
    let Ok(manifest) = SystemManifest::parse(&signed.manifest) else { return Ok(()) };
    check(required(system, &manifest).unwrap_or(None), running)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_that_names_a_kernel_starts_under_that_one_alone() {
        let [one, two] = [Digest::of(b"1"), Digest::of(b"2")];
        for (required, running, starts) in [
            (None, None, true),
            (None, Some(one), true),
            (Some(one), Some(one), true),
            (Some(one), Some(two), false),
            (Some(one), None, false),
        ] {
            let result = check(required, running);
            assert_eq!(result.is_ok(), starts, "{required:?} {running:?}");
            if let Err(error) = result {
                assert_eq!(error.class(), Class::Verification);
            }
        }
    }

    #[test]
    fn what_runs_is_read_from_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(running(dir.path()).unwrap(), None);
        let id = Digest::of(b"kernel");
        std::fs::write(dir.path().join(KERNEL_FILE), format!("{id}\n")).unwrap();
        assert_eq!(running(dir.path()).unwrap(), Some(id));
        std::fs::write(dir.path().join(KERNEL_FILE), "6.12\n").unwrap();
        let error = running(dir.path()).unwrap_err();
        assert!(error.to_string().contains("found `6.12`, expected the id of the kernel"), "{error}");
        assert_eq!(error.class(), Class::Input);
    }
}
