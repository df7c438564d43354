//! Why `mosfs setup` refuses a disk, or fails.

use std::path::PathBuf;

use crate::deploy::esp::EspError;
use crate::error::{Class, Classified, IoError};
use crate::sys::mountapi::CallError;

/// Why a disk is not set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The answers are not what they should be.
    #[error("{}", problems.join("\n"))]
    Answers {
        /// Each with file, line and column.
        problems: Vec<String>,
    },
    /// Two media of one kind.
    #[error("{} media are labelled {label}: {}; expected one", devices.len(), devices.join(", "))]
    SeveralMedia {
        /// The label.
        label: String,
        /// Their devices.
        devices: Vec<String>,
    },
    /// A medium without what it is for.
    #[error("{}, labelled {label}, has no /{name}", device.display())]
    NotOnMedium {
        /// Its device.
        device: PathBuf,
        /// Its label.
        label: String,
        /// The file.
        name: String,
    },
    /// Nobody named a disk.
    #[error("no disk was named, and nobody can be asked: standard input is no terminal")]
    NotNamed,
    /// Nobody chose a disk from the list.
    #[error("no disk was chosen; nothing was written")]
    NotChosen,
    /// A disk that is no disk.
    #[error("{}: expected a whole disk, found {found}", path.display())]
    NotADisk {
        /// What was named.
        path: PathBuf,
        /// What it is.
        found: String,
    },
    /// Nothing has what the choice asks for.
    #[error("no disk matches `{choice}`; disks of this machine: {}", list(disks))]
    NoMatch {
        /// What was asked for.
        choice: String,
        /// All disks, as sentences.
        disks: Vec<String>,
    },
    /// More than one disk has what the choice asks for.
    #[error("{} disks match `{choice}`: {}", disks.len(), list(disks))]
    Several {
        /// What was asked for.
        choice: String,
        /// The disks that match, as sentences.
        disks: Vec<String>,
    },
    /// The disk holds something, and nobody said that it may be lost.
    #[error("{} is not empty: it holds {holds}", path.display())]
    NotEmpty {
        /// The disk.
        path: PathBuf,
        /// What is on it.
        holds: String,
    },
    /// `--wipe` names another disk.
    #[error("{} may be erased, but the disk to set up is {}", wipe.display(), path.display())]
    OtherWipe {
        /// The disk to set up.
        path: PathBuf,
        /// The disk that may be erased.
        wipe: PathBuf,
    },
    /// The disk that the system comes from.
    #[error("{} holds the medium that the system is installed from", path.display())]
    Medium {
        /// The disk.
        path: PathBuf,
    },
    /// Somebody uses the disk.
    #[error("{} is in use: {by}", path.display())]
    InUse {
        /// The disk.
        path: PathBuf,
        /// Who, as a phrase.
        by: String,
    },
    /// The disk cannot be written.
    #[error("{} is read-only", path.display())]
    ReadOnly {
        /// The disk.
        path: PathBuf,
    },
    /// The disk is too small.
    #[error("{} has {found} bytes; the system needs {needed}", path.display())]
    TooSmall {
        /// The disk.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// What is needed, in bytes.
        needed: u64,
    },
    /// Sectors of a size that the partition table cannot have.
    #[error("{} has sectors of {found} bytes; expected 512 or 4096", path.display())]
    Sectors {
        /// The disk.
        path: PathBuf,
        /// Their size in bytes.
        found: u32,
    },
    /// The kernel does not show the partitions that were written.
    #[error("{}: the kernel does not show partition {number} at byte {start} within {waited} seconds", path.display())]
    PartitionMissing {
        /// The disk.
        path: PathBuf,
        /// The partition's number.
        number: u32,
        /// Where it begins, in bytes.
        start: u64,
        /// How long it was waited for.
        waited: u64,
    },
    /// The partition table cannot be written.
    #[error("{}: cannot write the partition table: {why}", path.display())]
    Table {
        /// The disk.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// A program that makes file systems is missing or failed.
    #[error("{program} failed for {}: {why}", path.display())]
    Program {
        /// Its name.
        program: &'static str,
        /// What it was to make a file system on.
        path: PathBuf,
        /// How it ended.
        why: String,
    },
    /// The TPM has no floor, and nobody said how to make one.
    #[error("the TPM has no floor yet, and no provisioning key was given")]
    NoFloor,
    /// What was read back is not what was written.
    #[error("{}: what was read back is not what was written", path.display())]
    ReadBack {
        /// The partition.
        path: PathBuf,
    },
    /// What is on the new partition is not a good system.
    #[error("{}: {problem}", path.display())]
    NotGood {
        /// The partition.
        path: PathBuf,
        /// The first problem.
        problem: String,
    },
    /// The kernels cannot be had.
    #[error(transparent)]
    Esp(#[from] EspError),
    /// A file system cannot be mounted.
    #[error("cannot mount {}: {source}", path.display())]
    Mount {
        /// The partition.
        path: PathBuf,
        /// The call that failed.
        source: CallError,
    },
    /// A file or device cannot be used.
    #[error(transparent)]
    Io(#[from] IoError),
}

fn list(disks: &[String]) -> String {
    if disks.is_empty() { "none".into() } else { disks.join("; ") }
}

impl Classified for SetupError {
    fn class(&self) -> Class {
        match self {
            Self::Answers { .. }
            | Self::SeveralMedia { .. }
            | Self::NotOnMedium { .. }
            | Self::NotNamed
            | Self::NotADisk { .. }
            | Self::OtherWipe { .. } => Class::Input,
            Self::NoFloor => Class::Tpm,
            Self::ReadBack { .. } | Self::NotGood { .. } => Class::Verification,
            Self::Esp(error) => error.class(),
            _ => Class::Failure,
        }
    }
}
