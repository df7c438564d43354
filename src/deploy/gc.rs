//! `mosfs gc` on a device: what no deployment needs goes.
//!
//! Kept: current, pending and previous, what this boot runs, and whatever is mounted. The order
//! keeps a crash harmless: folders first (no state names them), then the names in the store, then
//! the blobs that no name reaches.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Serialize;

use super::deployment;
use super::error::DeployError;
use super::state::DeploymentId;
use super::{System, SystemLock};
use crate::digest::Digest;
use crate::failpoint;
use crate::manifest::SystemManifest;
use crate::store::gc::Removal;
use crate::store::{Store, image_name, system_name, version_name};

/// Names of ours in the store begin so; others are somebody else's and stay.
const PREFIX: &str = "mos/";

/// What `gc` removes, or would remove.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GcPlan {
    /// Deployments that no state names.
    pub deployments: Vec<DeploymentId>,
    /// Folders that crashes left behind.
    pub leftovers: Vec<PathBuf>,
    /// Names, blobs and temporary files of the store.
    pub store: Removal,
}

/// Collects what no deployment needs; with `dry_run`, only says what that is.
///
/// `running` is what this boot runs, `mounted` the OCI manifests of what is mounted.
///
/// # Errors
/// Nothing is removed where a deployment that is kept cannot be read: what it needs is not known.
pub fn collect(
    system: &System,
    _lock: &SystemLock,
    running: Option<DeploymentId>,
    mounted: &[Digest],
    dry_run: bool,
) -> Result<GcPlan, DeployError> {
    let mut keep = system.state()?.named();
    keep.extend(running);
    let (whole, leftovers) = deployment::list(system)?;
    let deployments = whole.into_iter().filter(|id| !keep.contains(id)).collect();
    let mut plan = GcPlan { deployments, leftovers, ..GcPlan::default() };
    if !dry_run {
        for id in &plan.deployments {
            deployment::remove(system, id)?;
        }
        for path in &plan.leftovers {
            deployment::remove_leftover(system, path)?;
        }
    }
    let store_dir = system.store_dir();
    if !store_dir.exists() {
        return Ok(plan);
    }
    let store = Store::open(&store_dir)?;
    let kept_names = kept_names(system, &keep)?;
    let collector = store.collector()?;
    let unneeded: Vec<_> = store
        .names()?
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| name.starts_with(PREFIX) && !kept_names.contains(name))
        .collect();
    plan.store = collector.plan(&unneeded, mounted)?;
    if !dry_run {
        failpoint::hit("gc.planned");
        collector.apply(&plan.store)?;
    }
    Ok(plan)
}

/// The names in the store that the kept deployments need.
fn kept_names(system: &System, keep: &[DeploymentId]) -> Result<BTreeSet<String>, DeployError> {
    let mut names = BTreeSet::new();
    for id in keep {
        // Read for what it needs, not believed: nothing is started by it.
        let manifest = deployment::read(system, id)?.manifest;
        let manifest = SystemManifest::parse(&manifest).map_err(crate::trust::TrustError::from)?;
        names.insert(system_name(&id.digest));
        names.insert(version_name(id.version));
        names.extend(manifest.targets.iter().map(|(name, target)| image_name(name.as_str(), &target.digest)));
    }
    Ok(names)
}
