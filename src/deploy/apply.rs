//! Carries out a [`Plan`]: blobs, then the deployment's folder, then the state file, each synced
//! before the next begins.

use super::booted::{self, BootRecord};
use super::error::DeployError;
use super::plan::{Plan, Verdict, names};
use super::state::{LastUpdate, clip};
use super::{System, SystemLock, deployment, gc};
use crate::failpoint;
use crate::image::format::LayerFormat;
use crate::mount::table;
use crate::progress::Progress;
use crate::store::Store;
use crate::transport::Transport;

/// Chunks up to this size are held in memory while they are checked and written, in bytes.
const SMALL_BYTES: u64 = 1 << 20;

/// Carries out a plan. The caller holds the system's lock since before it made the plan.
///
/// On an error the running deployment is untouched, and the space of what was fetched is given
/// back.
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
    if outcome.is_err()
        && let Err(error) = give_back(system, lock)
    {
        // What stays is removed by the next `mosfs gc`.
        log::warn!("the space of the failed update is not given back: {error}");
    }
    outcome
}

/// Removes what no deployment needs, as `mosfs gc` does.
fn give_back(system: &System, lock: &SystemLock) -> Result<(), DeployError> {
    let store = Store::open(&system.store_dir())?;
    let collector = store.collector()?;
    let booted = BootRecord::load(&booted::path())?.map(|record| record.deployment);
    let mounted: Vec<_> = table::mounts()?.iter().filter_map(|mount| mount.digest).collect();
    let plan = gc::plan(system, lock, &collector, &store, booted, &mounted)?;
    gc::apply(system, lock, &collector, &plan)
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
        let mut batch = writer.batch();
        for fetch in &plan.fetch {
            let object = format!("{} {}", fetch.target, fetch.blob.digest);
            let task = progress.task("fetch", &object, Some(fetch.blob.size));
            if LayerFormat::is_chunk(&fetch.blob.media_type) && fetch.blob.size <= SMALL_BYTES {
                // There are thousands of them, so they are synced together. Size and digest are checked on the way.
                batch.put(&fetch.blob.digest, &from.fetch(&fetch.blob, fetch.blob.size)?)?;
                task.advance(fetch.blob.size);
            } else {
                writer.fetch(from, &fetch.blob, &task)?;
            }
            failpoint::hit("deploy.blob.fetched");
        }
        batch.finish()?;
        let quiet = Progress::silent().task("fetch", "", None);
        for artifact in std::iter::once(&plan.artifact).chain(&plan.referrers) {
            let manifest = from.manifest(artifact)?;
            for blob in manifest.layers.iter().chain([&manifest.config, artifact]) {
                writer.fetch(from, blob, &quiet)?;
            }
        }
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
