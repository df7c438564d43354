//! `mosfs gc` on a device: removes what no deployment needs. `install`, `update` and `commit` do the same at
//! their end.
//!
//! It keeps current, pending and previous, what this boot runs, and everything that is mounted. It does not
//! keep:
//!
//! - a pending deployment that has used up its tries and does not run: the state file remembers that it failed
//! - a previous deployment below the floor, which can never boot
//! - a previous deployment that cannot be read
//!
//! The order keeps a crash harmless: the state file first, then folders (nothing names them), then the names
//! in the store, then the blobs that no name reaches. Names that are not mosfs' own (`mos/…`) belong to
//! others and stay.
//!
//! Damage does not stop the collection. A deployment's needs are read from its folder, else from the store,
//! whose blobs are named by their digests; if neither can be read, every name stays. Damage is reported and
//! determines the exit code.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Serialize;

use super::booted;
use super::deployment;
use super::error::DeployError;
use super::id::DeploymentId;
use super::incoming;
use super::state::State;
use super::{System, SystemLock};
use crate::digest::Digest;
use crate::manifest::SystemManifest;
use crate::mount::table;
use crate::sorting;
use crate::store::gc::{Collector, Removal};
use crate::store::{Store, image_name, system_name, version_name};
use crate::sys::failpoint;

/// What must stay in addition to what the state file names.
#[derive(Debug, Clone, Default)]
pub struct Needs {
    /// The deployment that this boot runs, if known.
    pub booted: Option<DeploymentId>,
    /// The OCI manifests of mounted images.
    pub mounted: Vec<Digest>,
    /// The floor, if known: nothing below it can boot.
    pub floor: Option<u64>,
    /// Blobs that will be needed soon.
    pub keep: Vec<Digest>,
}

impl Needs {
    /// Returns what this boot runs and has mounted.
    ///
    /// # Errors
    /// If that cannot be read: then it is unknown what must stay.
    pub fn of_this_boot() -> Result<Self, DeployError> {
        let booted = booted::deployment()?;
        let mounted = table::mounts()?.iter().filter_map(|mount| mount.digest).collect();
        Ok(Self { booted, mounted, ..Self::default() })
    }
}

/// A deployment to be removed from the state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DroppedDeployment {
    /// Which one.
    pub deployment: DeploymentId,
    /// Why, as a sentence.
    pub why: String,
}

/// The objects that `gc` would remove.
#[derive(Debug, Clone, Default, Serialize)]
pub struct GcPlan {
    /// The previous deployment, if it can no longer be used.
    pub dropped: Vec<DroppedDeployment>,
    /// Deployments that are not needed.
    pub deployments: Vec<DeploymentId>,
    /// Folders that crashes left behind.
    pub leftovers: Vec<PathBuf>,
    /// Names, blobs and temporary files of the store.
    pub store: Removal,
    /// Damage that was skipped, each item as a sentence.
    pub damaged: Vec<String>,
}

/// Finds what can be removed. The system should be locked, and its store is.
///
/// # Errors
/// A state file or an index that cannot be read: then it is unknown what is needed.
pub fn plan(
    system: &System,
    collector: &Collector<'_>,
    store: &Store,
    needs: &Needs,
) -> Result<GcPlan, DeployError> {
    let state = system.state()?;
    let mut plan = GcPlan::default();
    let mut kept = sorting::set(needs.booted.into_iter().chain(state.current));
    kept.extend(pending_to_keep(&state, needs));
    if let Some(previous) = state.previous.filter(|previous| !kept.contains(previous)) {
        match useless(system, &previous, needs) {
            Some(why) => plan.dropped.push(DroppedDeployment { deployment: previous, why }),
            None => {
                kept.insert(previous);
            }
        }
    }
    let mut names = Some(BTreeSet::new());
    let mut roots: Vec<Digest> = needs.mounted.iter().chain(&needs.keep).copied().collect();
    for id in &kept {
        if state.fetching() == Some(*id) && needs.booted != Some(*id) {
            // It has no folder and no names yet. What came of it stays, as far as that is known.
            roots.extend(incoming::roots(store, id));
            continue;
        }
        let (manifest, damage) = manifest_of(system, store, id);
        plan.damaged.extend(damage);
        match (manifest, &mut names) {
            (Some(manifest), Some(names)) => {
                names.insert(system_name(&id.digest));
                names.insert(version_name(manifest.version));
                let images = manifest.targets.iter();
                names.extend(images.map(|(name, target)| image_name(name.as_str(), &target.digest)));
            }
            // Its needs are unknown: they may include everything that has a name.
            _ => names = None,
        }
    }
    let (mut deployments, leftovers) = deployment::list(system)?;
    deployments.retain(|id| !kept.contains(id));
    let mut unneeded = Vec::new();
    if let Some(names) = names {
        let all = store.names()?.into_iter().map(|(name, _)| name);
        unneeded.extend(all.filter(|name| name.starts_with("mos/") && !names.contains(name)));
    }
    plan.store = collector.plan(&unneeded, &roots)?;
    plan.damaged.extend(plan.store.damaged.iter().cloned());
    (plan.deployments, plan.leftovers) = (deployments, leftovers);
    Ok(plan)
}

/// Returns the pending deployment, while it may be started or may be running.
fn pending_to_keep(state: &State, needs: &Needs) -> Option<DeploymentId> {
    let pending = state.pending.as_ref()?;
    // Its last try may be the current boot: without a record of the boot, it stays.
    let failed = pending.tries_left == 0 && needs.booted.is_some_and(|booted| booted != pending.deployment);
    (!failed).then_some(pending.deployment)
}

/// Returns why the previous deployment cannot be used, if that is so.
fn useless(system: &System, id: &DeploymentId, needs: &Needs) -> Option<String> {
    // Rule: boot: `version >= floor` (docs/design.md, floor at boot).
    if let Some(floor) = needs.floor.filter(|floor| id.version < *floor) {
        return Some(format!("version {} is below the floor {floor}: it can never be booted", id.version));
    }
    match deployment::read(system, id) {
        Ok(signed) if Digest::of(&signed.manifest) == id.digest => None,
        Ok(signed) => Some(format!("its manifest has the digest {}", Digest::of(&signed.manifest))),
        Err(error) => Some(error.to_string()),
    }
}

/// Returns a deployment's manifest, from its folder or from the store, and what is wrong with the folder.
fn manifest_of(
    system: &System,
    store: &Store,
    id: &DeploymentId,
) -> (Option<SystemManifest>, Option<String>) {
    let said = |why: String| Some(format!("deployment {id}: {why}"));
    let damage = match deployment::read(system, id) {
        Ok(signed) if Digest::of(&signed.manifest) == id.digest => {
            match SystemManifest::parse(&signed.manifest) {
                Ok(manifest) => return (Some(manifest), None),
                Err(error) => said(error.to_string()),
            }
        }
        Ok(signed) => said(format!("its manifest has the digest {}", Digest::of(&signed.manifest))),
        Err(error) => said(error.to_string()),
    };
    let stored = store.get(&id.digest, deployment::MAX_MANIFEST).ok();
    (stored.and_then(|bytes| SystemManifest::parse(&bytes).ok()), damage)
}

/// Removes what [`plan`] found under the same locks; returns what is damaged or could not be removed.
///
/// # Errors
/// If the state file cannot be written; then nothing is removed.
pub fn apply(
    system: &System,
    _lock: &SystemLock,
    collector: &Collector<'_>,
    plan: GcPlan,
) -> Result<Vec<String>, DeployError> {
    if !plan.dropped.is_empty() {
        let mut state = system.state()?;
        state.previous = state.previous.filter(|id| !plan.dropped.iter().any(|gone| gone.deployment == *id));
        state.save(&system.state_path())?;
        failpoint::hit("deploy.previous.dropped");
    }
    let mut problems = plan.damaged;
    let folders = plan.leftovers.iter().map(|folder| deployment::remove_leftover(system, folder));
    let deployments = plan.deployments.iter().map(|id| deployment::remove(system, id));
    problems.extend(folders.chain(deployments).filter_map(Result::err).map(|error| error.to_string()));
    failpoint::hit("deploy.gc.folders");
    problems.extend(collector.apply(&plan.store)?);
    Ok(problems)
}
