//! Why something cannot be mounted or unmounted.

use std::io;
use std::path::PathBuf;

use super::kernel::dm_verity::DmVerityError;
use super::plan::PlanError;
use crate::digest::Digest;
use crate::error::{Class, Classified, IoError};
use crate::image::layer::LayerError;
use crate::image::overlay::OverlayError;
use crate::image::plain::PlainError;
use crate::image::source::ReadError;
use crate::image::verity::VerityError;

/// Why something cannot be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// The image cannot be planned.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// There is no reader for the format in user space.
    #[error("layer {layer}: the fuse backend cannot read {format} yet")]
    NoReader {
        /// Digest of the layer.
        layer: Digest,
        /// The format's name.
        format: &'static str,
    },
    /// No backend can read it.
    #[error("layer {layer}: media type `{media_type}` cannot be mounted, expected a squashfs layer")]
    Format {
        /// Digest of the layer.
        layer: Digest,
        /// Its media type.
        media_type: String,
    },
    /// The layer's file cannot be opened.
    #[error("layer {layer}: cannot open {place}: {source}")]
    LayerFile {
        /// Digest of the layer.
        layer: Digest,
        /// Where its blob is.
        place: String,
        /// What the operating system answered.
        source: io::Error,
    },
    /// The layer's verity data is missing, malformed, or not under its root hash.
    #[error("layer {layer} ({place}): {source}")]
    LayerVerity {
        /// Digest of the layer.
        layer: Digest,
        /// Where its blob is.
        place: String,
        /// What is wrong.
        source: VerityError,
    },
    /// The layer cannot be read, or makes no sense.
    #[error("layer {layer} ({place}): {source}")]
    LayerRead {
        /// Digest of the layer.
        layer: Digest,
        /// Where its blob is.
        place: String,
        /// What is wrong.
        source: LayerError,
    },
    /// A plain file cannot be opened as an image.
    #[error(transparent)]
    File(#[from] PlainError),
    /// The layers do not make a tree.
    #[error(transparent)]
    Tree(#[from] OverlayError),
    /// The root folder cannot be served.
    #[error("the root folder of {mount_source} cannot be read: {why}")]
    Root {
        /// What was to be mounted.
        mount_source: String,
        /// What is wrong, as it is in the log.
        why: String,
    },
    /// There is no folder to mount at.
    #[error("cannot mount at {}: {source}", target.display())]
    Target {
        /// Where.
        target: PathBuf,
        /// What the operating system answered.
        source: io::Error,
    },
    /// /dev/fuse cannot be used.
    #[error("cannot open /dev/fuse: {0}")]
    Device(#[source] io::Error),
    /// There is no fusermount3, which an ordinary user needs.
    #[error("cannot run fusermount3 (package fuse3), which mounts for users other than root")]
    NoHelper,
    /// mount(2) or fusermount3 refused.
    #[error("cannot mount at {}: {source}", target.display())]
    Mount {
        /// Where.
        target: PathBuf,
        /// What the kernel, or the helper, answered.
        source: io::Error,
    },
    /// The daemon could not begin to serve.
    #[error("the daemon for {} failed: {why}", target.display())]
    Daemon {
        /// Where.
        target: PathBuf,
        /// What it said.
        why: String,
    },
    /// The operating system refused what starting a daemon takes.
    #[error("cannot {operation}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// What it answered.
        source: io::Error,
    },
    /// A mount option is unknown.
    #[error("mount option `{option}` is not known")]
    Option {
        /// The option.
        option: String,
    },
    /// A backend was asked for that this system does not have.
    #[error("backend {backend} is not available: {why}")]
    NoBackend {
        /// The backend.
        backend: &'static str,
        /// Why not.
        why: String,
    },
    /// There is no mount of ours.
    #[error("{} is not a mount of mosfs{}", target.display(), found.as_ref().map_or(String::new(), |kind| format!(", found {kind}")))]
    NotOurs {
        /// Where.
        target: PathBuf,
        /// The type of what is mounted there.
        found: Option<String>,
    },
    /// A mount of ours is there, and serves.
    #[error("a mount of mosfs is at {} already", target.display())]
    Taken {
        /// Where.
        target: PathBuf,
    },
    /// umount(2) or fusermount3 refused.
    #[error("cannot unmount {}: {source}", target.display())]
    Unmount {
        /// Where.
        target: PathBuf,
        /// What the kernel, or the helper, answered.
        source: io::Error,
    },
    /// A file in the register of mounts.
    #[error(transparent)]
    Register(#[from] IoError),
    /// A unit for the daemon was asked for and cannot be had.
    #[error("no unit of systemd can keep the mount's daemon: {why}")]
    NoUnit {
        /// What is missing.
        why: String,
    },
    /// The unit of a daemon did not start.
    #[error("unit {unit} did not mount: {why}")]
    Unit {
        /// Its name.
        unit: String,
        /// What systemd said.
        why: String,
    },
    /// The kernel's backend failed.
    #[error(transparent)]
    DmVerity(Box<DmVerityError>),
}

impl From<DmVerityError> for MountError {
    fn from(error: DmVerityError) -> Self {
        Self::DmVerity(Box::new(error))
    }
}

impl Classified for MountError {
    fn class(&self) -> Class {
        match self {
            Self::LayerVerity { source, .. } => source.class(),
            Self::DmVerity(source) => source.class(),
            Self::LayerRead { source, .. } | Self::Tree(OverlayError::Layer { source, .. }) => {
                layer_class(source)
            }
            Self::Plan(source) => source.class(),
            Self::File(source) => source.class(),
            Self::Tree(OverlayError::Subdir { .. }) => Class::Input,
            Self::Root { .. } => Class::Verification,
            Self::NoReader { .. }
            | Self::Format { .. }
            | Self::Option { .. }
            | Self::NoUnit { .. }
            | Self::NotOurs { .. } => Class::Input,
            _ => Class::Failure,
        }
    }
}

/// The class of a layer's error: what does not verify is [`Class::Verification`].
pub(super) fn layer_class(error: &LayerError) -> Class {
    match error {
        LayerError::Read(ReadError::Verity { .. } | ReadError::Length { .. }) => Class::Verification,
        _ => Class::Failure,
    }
}
