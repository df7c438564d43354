//! Why an install, an update, a boot choice or a commit was refused or failed.

use std::path::PathBuf;
use std::time::Duration;

use super::booted::BootRecordError;
use super::esp_error::EspError;
use super::id::{DeploymentId, Refusal};
use crate::digest::Digest;
use crate::error::{Class, Classified, IoError};
use crate::floor::FloorError;
use crate::image::oci::OciError;
use crate::mount::PlanError;
use crate::store::StoreError;
use crate::transport::TransportError;
use crate::trust::TrustError;

/// Why an install, an update, a boot choice or a commit was refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeployError {
    /// An error of the operating system.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The store failed or refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The source could not be read, or has the wrong content.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// An OCI manifest of a target is malformed.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// Signature, certificate or product do not match.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The floor refused, or could not be read.
    #[error(transparent)]
    Floor(#[from] FloorError),
    /// A target's image cannot be mounted as it is signed.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The record of this boot cannot be used.
    #[error(transparent)]
    BootRecord(#[from] BootRecordError),
    /// The manifest in a deployment's folder does not match the folder's name.
    #[error("deployment {id}: its manifest is version {version}, {digest}")]
    OtherManifest {
        /// The name of the deployment.
        id: DeploymentId,
        /// The version that the manifest in the folder has.
        version: u64,
        /// The digest that the manifest in the folder has.
        digest: Digest,
    },
    /// A name given by the user leads to another system than it states.
    #[error("the name {name} leads to another system: {found}")]
    OtherThanNamed {
        /// The name.
        name: String,
        /// Version and digest of the system found.
        found: String,
    },
    /// It is not known which deployment this boot runs, so none can be committed.
    #[error("it is not known which deployment runs: {} is missing, and {why}", path.display())]
    BootUnknown {
        /// The record of this boot.
        path: PathBuf,
        /// Why it cannot be determined otherwise.
        why: String,
    },
    /// A pending deployment that has used up its tries, and that this boot does not run.
    #[error(
        "deployment {id} has no tries left: it was started as often as it may be and never proved healthy"
    )]
    NoTriesLeft {
        /// The deployment.
        id: DeploymentId,
    },
    /// A garbage collection that had to skip damaged objects. Everything else was done.
    #[error("{}: {} damaged or not removed; the first is: {}", path.display(), problems.len(), first(problems))]
    Damaged {
        /// The system folder.
        path: PathBuf,
        /// The damage, each item as a sentence.
        problems: Vec<String>,
    },
    /// A repair that could not fix everything. Everything else was done.
    #[error("{}: {} not mended; the first is: {}", path.display(), problems.len(), first(problems))]
    NotMended {
        /// The system folder.
        path: PathBuf,
        /// What could not be fixed, each item as a sentence.
        problems: Vec<String>,
    },
    /// The system folder already has a deployment: `install` is only for the first one.
    #[error("{} holds deployment {current} already", path.display())]
    AlreadyInstalled {
        /// The system folder.
        path: PathBuf,
        /// The existing deployment.
        current: DeploymentId,
    },
    /// Another process did not release the system's lock in time.
    #[error("{} was not released within {} s by {}", path.display(), waited.as_secs(), process(*holder))]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
        /// The process that holds it, if the kernel names it.
        holder: Option<u32>,
    },
    /// Nothing is installed, but a deployment is required.
    #[error("{} holds no deployment", path.display())]
    NothingInstalled {
        /// The system folder.
        path: PathBuf,
    },
    /// Rule: same version, other digest: refused (docs/design.md, one version, one system).
    #[error("version {version} was offered as {offered}, but {installed} has that version here")]
    SameVersionOtherDigest {
        /// The version that both claim.
        version: u64,
        /// The system manifest that was offered.
        offered: Digest,
        /// The system manifest that is installed.
        installed: Digest,
    },
    /// What was found at a source is not a system manifest.
    #[error("{object} is not a system: {why}")]
    NotASystem {
        /// The source, or the name and digest there.
        object: String,
        /// What was expected and found.
        why: String,
    },
    /// Rule: a version stands for one system, in a registry too.
    #[error("{location} has another system of version {version}: {found}, expected {expected}")]
    VersionElsewhere {
        /// The repository.
        location: String,
        /// The version.
        version: u64,
        /// The OCI manifest that it stands for there.
        found: Digest,
        /// The OCI manifest that was to be pushed.
        expected: Digest,
    },
    /// A system manifest has no signature, or no certificate for it.
    #[error("system manifest {digest} comes without a {missing}")]
    NotSigned {
        /// The system manifest.
        digest: Digest,
        /// What is missing.
        missing: &'static str,
    },
    /// A blob of a deployment is not in the store.
    #[error("target {target}: blob {digest} is not in the store")]
    MissingBlob {
        /// The target.
        target: String,
        /// The blob.
        digest: Digest,
    },
    /// Rule: whole before it boots (docs/design.md): a deployment is used once all of its blobs are here.
    #[error("deployment {id} is still being fetched, and not all of it is here")]
    StillFetching {
        /// The deployment.
        id: DeploymentId,
    },
    /// Nothing says which registry has the blobs of a deployment.
    #[error("no registry is known for deployment {id}")]
    NoSource {
        /// The deployment.
        id: DeploymentId,
    },
    /// The OCI manifest of a target has another size than the system manifest says.
    #[error("target {target}: {digest} has {found} bytes, the system manifest says {expected}")]
    OtherSize {
        /// The target.
        target: String,
        /// The OCI manifest's digest.
        digest: Digest,
        /// The size in the system manifest, in bytes.
        expected: u64,
        /// The size that was found, in bytes.
        found: u64,
    },
    /// There is too little space, detected before anything was fetched.
    #[error("{}: the update needs {needed} bytes, {available} are free", path.display())]
    NoSpace {
        /// The system folder.
        path: PathBuf,
        /// The space that the missing blobs need, with some reserve, in bytes.
        needed: u64,
        /// The free space of the file system, in bytes.
        available: u64,
    },
    /// The running deployment has no such target.
    #[error("deployment {id} has no target `{target}`; it has: {}", known.join(", "))]
    NoSuchTarget {
        /// The deployment.
        id: DeploymentId,
        /// The requested target.
        target: String,
        /// The targets that exist.
        known: Vec<String>,
    },
    /// The EFI system partition cannot take a kernel.
    #[error(transparent)]
    Esp(#[from] EspError),
    /// A system whose kernel is not the running one.
    #[error("its kernel is not running: the system requires {required}, {}", runs(running))]
    OtherKernel {
        /// The id of the kernel that the system names.
        required: Digest,
        /// The id of the running one, if it has one.
        running: Option<Digest>,
    },
    /// The image of the target `boot` names a kernel by something else than a digest.
    #[error("the image {image} of the target boot names the kernel `{found}`, expected a digest")]
    BadKernelId {
        /// The image's OCI manifest.
        image: Digest,
        /// What it names.
        found: String,
    },
    /// The root is mounted by `mosfs boot`, not by `mosfs activate`.
    #[error("target {target} of deployment {id} is the root (service type hostfs): it is mounted at boot")]
    IsHostfs {
        /// The running deployment.
        id: DeploymentId,
        /// The requested target.
        target: String,
    },
    /// No deployment on the device can be booted.
    #[error("no deployment can be booted: {}", list(refused))]
    NoneLeft {
        /// Each deployment and why it was refused.
        refused: Vec<Refusal>,
        /// The class of the most serious reason.
        class: Class,
    },
}

fn first(problems: &[String]) -> &str {
    problems.first().map_or("", String::as_str)
}

fn list(refused: &[Refusal]) -> String {
    if refused.is_empty() {
        return "none is installed".to_string();
    }
    refused
        .iter()
        .map(|refusal| format!("{}: {}", refusal.deployment, refusal.why))
        .collect::<Vec<_>>()
        .join("; ")
}

fn runs(running: &Option<Digest>) -> String {
    running.map_or_else(|| "the running kernel has no id".into(), |id| format!("{id} is running"))
}

impl Classified for DeployError {
    fn class(&self) -> Class {
        match self {
            Self::Io(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Transport(error) => error.class(),
            Self::Oci(error) => error.class(),
            Self::Trust(error) => error.class(),
            Self::Floor(error) => error.class(),
            Self::Plan(error) => error.class(),
            Self::BootRecord(error) => error.class(),
            Self::Esp(error) => error.class(),
            Self::NoneLeft { class, .. } => *class,
            Self::OtherManifest { .. } | Self::OtherThanNamed { .. } | Self::OtherSize { .. } => {
                Class::Verification
            }
            Self::Damaged { .. } | Self::NotMended { .. } => Class::Verification,
            Self::OtherKernel { .. } | Self::BadKernelId { .. } => Class::Verification,
            Self::MissingBlob { .. } | Self::NotSigned { .. } => Class::Verification,
            Self::SameVersionOtherDigest { .. } => Class::Rollback,
            Self::NoSuchTarget { .. }
            | Self::IsHostfs { .. }
            | Self::NotASystem { .. }
            | Self::VersionElsewhere { .. } => Class::Input,
            Self::BootUnknown { .. }
            | Self::NoTriesLeft { .. }
            | Self::StillFetching { .. }
            | Self::NoSource { .. }
            | Self::AlreadyInstalled { .. }
            | Self::NothingInstalled { .. }
            | Self::Locked { .. }
            | Self::NoSpace { .. } => Class::Failure,
        }
    }
}

fn process(id: Option<u32>) -> String {
    id.map_or_else(|| "another process".into(), |id| format!("process {id}"))
}
