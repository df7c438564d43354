//! `mosfs gc` on a device: what no deployment needs goes.
//!
//! Kept: current, pending and previous, and whatever is mounted. The order keeps a crash
//! harmless: folders first (nothing names them), then the names in the store, then the blobs that
//! no name reaches.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Serialize;

use super::deployment;
use super::error::DeployError;
use super::state::DeploymentId;
use super::{System, SystemLock};
use crate::digest::Digest;
use crate::failpoint;
use crate::store::gc::Removal;
use crate::store::{Store, image_name, system_name, version_name};

/// What `gc` would remove.
#[derive(Debug, Clone, Default, Serialize)]
pub struct GcPlan {
    /// Deployments that no state names.
    pub deployments: Vec<DeploymentId>,
    /// Folders that crashes left behind.
    pub leftovers: Vec<PathBuf>,
    /// Names in the store that no kept deployment has.
    pub names: Vec<String>,
    /// Blobs and temporary files of the store.
    pub store: Removal,
}
