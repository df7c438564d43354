//! mosfs turns a list of OCI images into a signed, verified, running Linux system.
//!
//! A publisher builds a system ([`build`]): layers in a [`Store`], and a [`SystemManifest`] with a signature. A device
//! finds it ([`find_system`]), verifies it against what it trusts ([`Anchor`]), and mounts its targets
//! ([`MountRequest`]). Whatever a mount shows has been verified, block by block, up to that signature.
//!
//! ```
//! # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
//! use std::path::Path;
//!
//! use mosfs::{Anchor, AnyError, Dates, Judge, MountPlan, Store, find_system, plan_target};
//!
//! /// Verifies the newest system in a store, and plans the mount of each of its targets.
//! fn newest(store: &Path, config: &Path) -> Result<Vec<MountPlan>, AnyError> {
//!     let store = Store::open(store)?;
//!     let anchor = Anchor::load(config)?;
//!     let judge = Judge { anchor: &anchor, dates: Dates::check_now(), policy: None };
//!     let found = find_system(store.transport(), None, &judge)?;
//!     let targets = &found.taken.verified.manifest().targets;
//!     Ok(targets.iter().map(|(name, target)| plan_target(&store, name.as_str(), target)).collect::<Result<_, _>>()?)
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let example = Example::publish()?;
//! let plans = newest(example.store.dir(), &example.config)?;
//! assert_eq!(plans.len(), 1);
//! assert!(plans[0].is_verified());
//! # Ok(())
//! # }
//! ```
//!
//! Every error has a [`Class`], and each class is an exit code of the programs. The library prints nothing: long
//! operations report to a [`Progress`], warnings go to the `log` crate.
//!
//! # The source
//!
//! All modules are private; what is public is named here. Three groups of modules carry the rest. A module may use
//! those below and to its left (a table in `tests/architecture.rs` enforces it):
//!
//! ```text
//! bytes    image <- mount                             what is read, and how it is presented
//! places   image <- transport <- store <- convert     where images come from and go to
//! belief   manifest <- trust <- floor                 what is trusted, and why
//!
//! deploy (all three) <- boot, run     on a device
//! deploy <- medium <- setup           on a device that is to become one
//! publish (places, belief)            on the publisher's machine
//! cli                                 parse, run, print
//! ```
//!
//! All of them use `digest`, `error`, `progress` and `sys`.

#![cfg_attr(feature = "internals", warn(unreachable_pub))]
#![cfg_attr(not(feature = "registry"), allow(dead_code, reason = "what only the client of registries uses"))]

mod boot;
mod cli;
mod convert;
mod deploy;
mod digest;
mod error;
mod floor;
mod image;
mod manifest;
mod medium;
mod mount;
mod progress;
mod publish;
mod run;
mod setup;
mod sorting;
mod store;
#[allow(unsafe_code)]
mod sys;
mod text;
mod transport;
mod trust;

pub use uuid::Uuid;

pub use digest::Digest;
pub use error::{AnyError, Class, Classified, IoError};
pub use progress::{Event as ProgressEvent, Progress, Sink as ProgressSink};

// Manifests.
pub use manifest::{
    ImageType, ImageUrl, ImportError, ImportErrors, ImportManifest, ImportTarget, LayerChoice,
    LayerCompression, Mount as TargetMount, Network, Pin, Port, Position, Problem as ManifestProblem,
    ProblemKind, Protocol, Resolved, ServiceType, StorageType, SystemError, SystemManifest, Target,
    TargetName,
};

// Signed systems, and what verifies them.
pub use deploy::DeployError;
pub use deploy::offer::{Accepted, FoundSystem, Judge, find as find_system};
pub use deploy::target::plan as plan_target;
pub use floor::{FloorError, Policy as FloorPolicy, TpmFloorProblem};
pub use trust::config::CaFile;
pub use trust::p256::P256PublicKey as FloorKey;
pub use trust::{
    Anchor, Binding, ConfigError, Dates, KeyError, SignError, Signed, SigningKey, TrustError, Verified,
};

// Publishing them.
pub use convert::{Codec, Effort, Packing, PackingError};
pub use publish::build::{BuildError, Built, Signer, Sources as BuildSources, build};
pub use publish::keys::{GenerateError, Request as KeyRequest, generate as generate_keys};

// The store, and other places of images.
pub use image::oci::{Descriptor, Manifest as OciManifest, OciError, OciImage};
pub use image::platform::Platform;
pub use store::fsck::{Problem as StoreProblem, Report as StoreReport, check as check_store};
pub use store::{Store, StoreError, Writer};
pub use transport::{Access, RangeAsk, SourceRef, Transport, TransportError};

// Mounts.
pub use mount::fuse::{FuseOptions, Spin};
pub use mount::kernel::overlay::Upper;
pub use mount::{
    Access as MountAccess, Backend, Daemon, Health, MountError, MountFlags, MountPlan, MountRecord, Mounted,
    PlanError, Prepared, Request as MountRequest, Verification, mounts, unmount,
};

/// Layers: their formats, the bytes below them, and readers that need no mount.
///
/// [`open`](layers::open) opens what a [`MountPlan`] has, each layer with the reader of its format, and shows it as one
/// tree, [`Merged`](layers::Merged).
pub mod layers {
    pub use crate::convert::ImageKind;
    pub use crate::image::blobs::{Blob, BlobError, BlobProgress, Blobs};
    pub use crate::image::bytes::ReadAt;
    pub use crate::image::erofs::Erofs;
    pub use crate::image::format::{ChunkedLayer, Chunks, LayerFormat, TwoSizes};
    pub use crate::image::layer::{BlockId, Extent, Place, StatFs, Xattrs};
    pub use crate::image::oci::{LayerDescriptor, Trust};
    pub use crate::image::overlay::{Entry, Merged, OverlayError, Shown};
    pub use crate::image::plain::{Check, PlainError, PlainFile, TreePlace};
    pub use crate::image::puzzlefs::Puzzlefs;
    pub use crate::image::squashfs::Squashfs;
    pub use crate::image::verified::VerifiedSource;
    pub use crate::image::verity::VerityError;
    pub use crate::image::{
        Attr, DirEntry, FileType, Layer, LayerError, MemorySource, NodeId, ReadError, Source,
    };
    pub use crate::manifest::LayerKind;
    pub use crate::mount::{LayerBytes, Planned, PlannedLayer, open_tree as open};
}

/// The entries of the two programs, `mosfs` and `mosfs-full`.
#[doc(hidden)]
pub mod programs {
    pub use crate::cli::main as mosfs_full;
    pub use crate::cli::start::main as mosfs;
}

/// All modules, for the tests, benches and fuzz targets of this package. It promises nothing to others.
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals {
    macro_rules! modules {
        ($($name:ident)*) => {
            $(pub mod $name {
                pub use crate::$name::*;
            })*
        };
    }

    modules! {
        boot cli convert deploy digest error floor image manifest medium mount progress publish run setup sorting
        store sys text transport trust
    }
}
