//! Why the EFI system partition cannot be brought up to date.

use std::path::PathBuf;
use std::time::Duration;

use crate::digest::Digest;
use crate::error::{AnyError, Class, Classified, IoError};
use crate::image::files::FilesError;
use crate::store::StoreError;
use crate::store::view::ViewError;
use crate::sys::mountapi::CallError;

/// Why the EFI system partition cannot be brought up to date.
#[derive(Debug, thiserror::Error)]
pub enum EspError {
    /// It is too full.
    #[error(
        "the EFI system partition {} has {available} bytes free, {needed} are needed for the kernel of version {version}; \
         kernels on it: {}", path.display(), list(kernels)
    )]
    NoSpace {
        /// Where it is mounted.
        path: PathBuf,
        /// How many bytes are needed.
        needed: u64,
        /// How many can be had.
        available: u64,
        /// The version whose kernel does not fit.
        version: u64,
        /// The files in `EFI/Linux` with their sizes in bytes, the largest one first.
        kernels: Vec<(String, u64)>,
    },
    /// A version brings another kernel, and there is no place for it.
    #[error("version {version} has a kernel of its own, and no EFI system partition is mounted to put it on")]
    None {
        /// The version.
        version: u64,
    },
    /// What was written is read back as something else.
    #[error("{} does not hold what was written to it", path.display())]
    ReadBack {
        /// The file.
        path: PathBuf,
    },
    /// The image of the target `boot` lacks a file.
    #[error("the image {image} of the target boot has no /{file}")]
    Missing {
        /// The image's OCI manifest.
        image: Digest,
        /// The file.
        file: &'static str,
    },
    /// The image of the target `boot` cannot be read.
    #[error(transparent)]
    View(#[from] ViewError),
    /// A file of it cannot be read, or does not verify.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The partition that the boot loader names is not there.
    #[error(
        "{} did not appear within {} s: the EFI system partition that this machine was started from",
        device.display(), waited.as_secs()
    )]
    NoDevice {
        /// Its node.
        device: PathBuf,
        /// How long it was waited for.
        waited: Duration,
    },
    /// It cannot be mounted.
    #[error("cannot mount the EFI system partition {}: {source}", device.display())]
    Mount {
        /// The device.
        device: PathBuf,
        /// The call that failed.
        source: CallError,
    },
    /// A deployment cannot be read.
    #[error("{0}")]
    Deploy(AnyError),
    /// A file cannot be read or written.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for EspError {
    fn class(&self) -> Class {
        match self {
            Self::View(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Deploy(error) => error.class(),
            Self::Missing { .. } | Self::Files(_) => Class::Verification,
            Self::NoSpace { .. }
            | Self::None { .. }
            | Self::ReadBack { .. }
            | Self::NoDevice { .. }
            | Self::Mount { .. }
            | Self::Io(_) => Class::Failure,
        }
    }
}

fn list(files: &[(String, u64)]) -> String {
    let names: Vec<_> = files.iter().map(|(name, bytes)| format!("{name} ({bytes} bytes)")).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}
