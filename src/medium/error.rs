//! Why there is no medium.

use std::path::PathBuf;

use crate::deploy::DeployError;
use crate::digest::Digest;
use crate::error::{Class, Classified, IoError};
use crate::image::files::FilesError;
use crate::manifest::SystemError;
use crate::store::StoreError;
use crate::store::view::ViewError;
use crate::transport::TransportError;
use crate::trust::pem::SecretInPublic;

/// Why a medium cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum MediumError {
    /// The system has no kernel that a medium could start.
    #[error("version {version} has no kernel that an install medium could start: {why}")]
    NoKernel {
        /// The version of the system.
        version: u64,
        /// What it lacks.
        why: &'static str,
    },
    /// What is signed is not a system manifest.
    #[error("{object}: {source}")]
    NotASystem {
        /// Where it is.
        object: String,
        /// What is wrong with it.
        source: SystemError,
    },
    /// The output exists and is something else than a file.
    #[error("{}: expected the path of a regular file or a new one, found {found}", path.display())]
    Output {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// A file with a key to enroll is missing or is not what the firmware accepts.
    #[error("{}: {why}", path.display())]
    Enroll {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A private key would be on the medium.
    #[error(transparent)]
    Secret(#[from] SecretInPublic),
    /// A blob is not what the system says.
    #[error("blob {digest}: {why}")]
    Blob {
        /// The blob.
        digest: Digest,
        /// What is wrong.
        why: String,
    },
    /// There is no system to write.
    #[error(transparent)]
    Deploy(#[from] DeployError),
    /// The layout cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The layout cannot be read.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The target `boot` cannot be read.
    #[error("target `boot`: {0}")]
    View(#[from] ViewError),
    /// A file of the target `boot` cannot be read.
    #[error("target `boot`: {0}")]
    Files(#[from] FilesError),
    /// A file cannot be read or written.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for MediumError {
    fn class(&self) -> Class {
        match self {
            Self::NoKernel { .. }
            | Self::NotASystem { .. }
            | Self::Output { .. }
            | Self::Enroll { .. }
            | Self::Secret(_) => Class::Input,
            Self::Blob { .. } => Class::Verification,
            Self::Deploy(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Transport(error) => error.class(),
            Self::View(error) => error.class(),
            // Every block of it is verified when it is read.
            Self::Files(_) => Class::Verification,
            Self::Io(error) => error.class(),
        }
    }
}
