//! Mounts: what is planned, the backends that do it, and the table of what is mounted.
//!
//! ```text
//! plan.rs       MountPlan (pure): layers, what verifies them, where their bytes are
//! request.rs    Request: the one way to mount a plan
//! open.rs       opens the layers of a plan for a reader in this process
//! engine/       reads a merged view: block cache, errors. Free of FUSE
//! fuse/         backend: the engine as a FUSE mount with a daemon of its own
//! kernel/       backend: dm-verity layers under the kernel's overlayfs
//! backend.rs    the backends, and their names in records and in the kernel's lists
//! flags.rs      nosuid, nodev, ...
//! ids.rs        user and group ids moved to another range
//! units.rs      daemons in units of systemd
//! unmount.rs    ends a mount
//! table.rs      /run/mosfs/mounts: what is mounted, by whom, how it is
//! holders.rs    who uses a mount that is busy
//! source_name.rs  what the mount table shows as the source
//! log.rs        where daemons write
//! error.rs      MountError
//! ```

pub mod backend;
pub mod engine;
mod error;
mod flags;
pub mod fuse;
pub mod holders;
mod ids;
pub mod kernel;
mod log;
mod open;
mod plan;
mod request;
mod source_name;
pub mod table;
pub mod units;
mod unmount;

pub use backend::Backend;
pub use error::MountError;
pub use flags::{Access, MountFlags};
pub use ids::IdShift;
pub use open::open as open_tree;
pub use plan::{LayerBytes, MountPlan, PlanError, Planned, PlannedLayer, Verification};
pub use request::{Daemon, Mounted, Prepared, Request, Timing};
pub use table::{Health, MountRecord, mounts};
pub use unmount::{check_vacant, unmount, unmount_dead};
