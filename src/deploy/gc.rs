//! `mosfs gc` on a device: what no deployment needs goes.
//!
//! Kept: current, pending and previous, what this boot runs, and whatever is mounted. The order keeps a crash
//! harmless: folders first (nothing names them), then the names in the store, then the blobs that
//! no name reaches. Names that are not mosfs' own (`mos/…`) are somebody else's and stay.

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
use crate::store::gc::{Collector, Removal};
use crate::store::{Store, image_name, system_name, version_name};

/// What `gc` would remove.
#[derive(Debug, Clone, Default, Serialize)]
pub struct GcPlan {
    /// Deployments that no state names.
    pub deployments: Vec<DeploymentId>,
    /// Folders that crashes left behind.
    pub leftovers: Vec<PathBuf>,
    /// Names, blobs and temporary files of the store.
    pub store: Removal,
}

/// Looks what can go. The system is locked, and its store too. `mounted` are the OCI manifests of
/// what is mounted.
///
/// # Errors
/// A deployment that is kept but cannot be read: what it needs is not known then.
pub fn plan(
    system: &System,
    _lock: &SystemLock,
    collector: &Collector<'_>,
    store: &Store,
    booted: Option<DeploymentId>,
    mounted: &[Digest],
) -> Result<GcPlan, DeployError> {
    let mut kept = system.state()?.named();
    kept.extend(booted);
    let mut names = BTreeSet::new();
    for id in &kept {
        let signed = deployment::read(system, id)?;
        let manifest = SystemManifest::parse(&signed.manifest).map_err(|source| DeployError::State {
            path: system.deployment_dir(id),
            why: source.to_string(),
        })?;
        names.insert(system_name(&id.digest));
        names.insert(version_name(manifest.version));
        names.extend(manifest.targets.iter().map(|(name, target)| image_name(name.as_str(), &target.digest)));
    }
    let (mut deployments, leftovers) = deployment::list(system)?;
    deployments.retain(|id| !kept.contains(id));
    let dropped: Vec<String> = store
        .names()?
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| name.starts_with("mos/") && !names.contains(name))
        .collect();
    Ok(GcPlan { deployments, leftovers, store: collector.plan(&dropped, mounted)? })
}

/// Removes what [`plan`] found under the same locks.
pub fn apply(
    system: &System,
    _lock: &SystemLock,
    collector: &Collector<'_>,
    plan: &GcPlan,
) -> Result<(), DeployError> {
    for folder in &plan.leftovers {
        deployment::remove_leftover(system, folder)?;
    }
    for id in &plan.deployments {
        deployment::remove(system, id)?;
    }
    failpoint::hit("deploy.gc.folders");
    Ok(collector.apply(&plan.store)?)
}
