//! Carries out a [`Plan`]: blobs, then the deployment's folder, then the state file, each synced
//! before the next begins.

use std::collections::BTreeMap;

use super::booted;
use super::error::DeployError;
use super::plan::{Fetch, Plan, Verdict, names};
use super::state::{LastUpdate, clip};
use super::{System, SystemLock, deployment, gc};
use crate::failpoint;
use crate::image::oci::{Descriptor, SYSTEM_REPOSITORY};
use crate::mount::table;
use crate::progress::Progress;
use crate::store::{FetchJob, Store, StoreError, Writer, image_repository};
use crate::transport::Transport;

/// Carries out a plan. The caller holds the system's lock since before it made the plan.
///
/// On an error the running deployment is untouched, and the space of what was fetched is given
/// back, unless it is the network that failed: then the next run goes on where this one ended.
pub fn apply(
    system: &System,
    lock: &SystemLock,
    from: &dyn Transport,
    plan: &Plan,
    progress: &Progress,
) -> Result<(), DeployError> {
    if matches!(plan.verdict, Verdict::UpToDate | Verdict::AlreadyPending) {
        return Ok(());
    }
    let outcome = fetch_and_switch(system, from, plan, progress);
    if let Err(error) = &outcome
        && !may_go_on(error)
        && let Err(error) = give_back(system, lock)
    {
        // What stays is removed by the next `mosfs gc`.
        log::warn!("the space of the failed update is not given back: {error}");
    }
    outcome
}

/// Whether the network failed: then what came so far is kept, and the next run goes on there.
fn may_go_on(error: &DeployError) -> bool {
    match error {
        DeployError::Transport(error) | DeployError::Store(StoreError::Transport(error)) => {
            error.is_temporary()
        }
        _ => false,
    }
}

/// Removes what no deployment needs, as `mosfs gc` does.
fn give_back(system: &System, lock: &SystemLock) -> Result<(), DeployError> {
    let store = system.store()?;
    let collector = store.collector()?;
    let booted = booted::deployment()?;
    let mounted: Vec<_> = table::mounts()?.iter().filter_map(|mount| mount.digest).collect();
    let plan = gc::plan(system, lock, &collector, &store, booted, &mounted)?;
    gc::apply(system, lock, &collector, &plan)
}

/// The artifacts of a system: its manifest, and what says something about it.
pub(super) struct SystemBlobs<'a> {
    pub artifact: &'a Descriptor,
    pub referrers: &'a [Descriptor],
}

/// Fetches what a system consists of. Nothing has a name yet.
pub(super) fn receive(
    writer: &Writer<'_>,
    from: &dyn Transport,
    blobs: &[Fetch],
    system: &SystemBlobs<'_>,
    progress: &Progress,
) -> Result<(), DeployError> {
    let mut places = BTreeMap::new();
    for fetch in blobs {
        if !places.contains_key(fetch.target.as_str()) {
            places.insert(fetch.target.as_str(), from.within(&image_repository(&fetch.target))?);
        }
    }
    let job = |fetch: &'_ Fetch| {
        let object = format!("{} {}", fetch.target, fetch.blob.digest);
        Some((places.get(fetch.target.as_str())?.as_ref(), object))
    };
    let jobs: Vec<_> = blobs
        .iter()
        .filter_map(|fetch| job(fetch).map(|(from, object)| FetchJob { from, blob: &fetch.blob, object }))
        .collect();
    writer.fetch_all(&jobs, progress)?;
    let from = from.within(SYSTEM_REPOSITORY)?;
    let quiet = Progress::silent().task("fetch", "", None);
    for artifact in std::iter::once(system.artifact).chain(system.referrers) {
        let manifest = from.manifest(artifact)?;
        for blob in manifest.layers.iter().chain([&manifest.config, artifact]) {
            writer.fetch(from.as_ref(), blob, &quiet)?;
        }
    }
    Ok(())
}

fn fetch_and_switch(
    system: &System,
    from: &dyn Transport,
    plan: &Plan,
    progress: &Progress,
) -> Result<(), DeployError> {
    system.create()?;
    let store = Store::create(&system.store_dir())?;
    {
        let writer = store.writer()?;
        let system_blobs = SystemBlobs { artifact: &plan.artifact, referrers: &plan.referrers };
        receive(&writer, from, &plan.fetch, &system_blobs, progress)?;
        failpoint::hit("deploy.blobs.fetched");
        let [by_digest, by_version] = names(plan);
        let mut entries: Vec<_> =
            plan.images.iter().map(|(name, image)| (Some(name.as_str()), image)).collect();
        entries.push((Some(&by_digest), &plan.artifact));
        entries.push((Some(&by_version), &plan.artifact));
        entries.extend(plan.referrers.iter().map(|one| (None, one)));
        writer.set_entries(&entries)?;
    }
    failpoint::hit("deploy.names.set");
    let id = deployment::write(system, &plan.verified)?;
    let mut state = system.state()?;
    if plan.verdict == Verdict::Install {
        state.current = Some(id);
    } else {
        state.set_pending(id);
    }
    state.last_update = Some(LastUpdate { version: Some(id.version), error: None });
    state.save(&system.state_path())
}

/// Keeps why an install or an update failed, for `mosfs status`. Best effort: the disk may be full.
pub fn record_failure(system: &System, why: &str) {
    let Ok(mut state) = system.state() else { return };
    if state.current.is_none() {
        return;
    }
    state.last_update = Some(LastUpdate { version: None, error: Some(clip(why)) });
    if let Err(more) = state.save(&system.state_path()) {
        log::warn!("the reason of the failed update is not recorded: {more}");
    }
}
