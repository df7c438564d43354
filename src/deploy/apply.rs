//! Carries out a [`Plan`]: blobs, then the deployment's folder, then the state file, each synced
//! before the next begins.

use std::collections::BTreeMap;

use super::error::DeployError;
use super::esp;
use super::gc::Needs;
use super::plan::{Fetch, Plan, Verdict, names};
use super::state::{LastUpdate, clip};
use super::{System, SystemLock, deployment, space};
use crate::digest::Digest;
use crate::image::oci::{Descriptor, SYSTEM_REPOSITORY};
use crate::progress::Progress;
use crate::store::{FetchJob, Store, StoreError, Writer, image_repository};
use crate::sys::failpoint;
use crate::transport::Transport;
use crate::trust::{CERTIFICATE_TYPE, FLOOR_SIGNATURE_TYPE, SIGNATURE_TYPE};

/// Carries out a plan. The caller has held the system's lock since before it made the plan.
///
/// On an error the running deployment is untouched, and the space of fetched blobs is freed, unless the
/// network failed: then the next run continues there. On success, everything that is no longer needed is
/// removed.
pub fn apply(
    system: &System,
    lock: &SystemLock,
    from: &dyn Transport,
    plan: &Plan,
    progress: &Progress,
) -> Result<(), DeployError> {
    let outcome = match plan.verdict {
        Verdict::FailedBefore => Ok(()),
        _ => fetch_and_switch(system, lock, from, plan, progress),
    };
    if !outcome.as_ref().is_err_and(may_go_on) {
        tidy(system, lock, plan);
    }
    outcome
}

/// Whether the network failed: then what came so far is kept, and the next run goes on there.
pub(super) fn may_go_on(error: &DeployError) -> bool {
    match error {
        DeployError::Transport(error) | DeployError::Store(StoreError::Transport(error)) => {
            error.is_temporary()
        }
        _ => false,
    }
}

/// Removes what nothing needs after a plan was carried out, or failed. Problems are logged: the next command that collects
/// garbage removes the rest.
pub(super) fn tidy(system: &System, lock: &SystemLock, plan: &Plan) {
    if !system.store_dir().join("oci-layout").exists() {
        return;
    }
    let tidied = Needs::of_this_boot()
        .and_then(|needs| space::tidy(system, lock, &Needs { floor: plan.floor, ..needs }));
    match tidied {
        Ok(problems) => problems.iter().for_each(|problem| log::warn!("{problem}")),
        Err(error) => log::warn!("what nothing needs is not removed: {error}"),
    }
}

fn fetch_and_switch(
    system: &System,
    lock: &SystemLock,
    from: &dyn Transport,
    plan: &Plan,
    progress: &Progress,
) -> Result<(), DeployError> {
    system.create()?;
    let store = Store::create(&system.store_dir())?;
    if !plan.fetch.is_empty() {
        space::make(system, lock, &plan.want())?;
    }
    {
        let writer = store.writer()?;
        // The plan has checked: the store's files of these names are not those blobs.
        fetch_blobs(&writer, from, &plan.fetch, true, progress)?;
        for artifact in std::iter::once(&plan.artifact).chain(&plan.referrers) {
            fetch_artifact(&writer, from, artifact)?;
        }
        failpoint::hit("deploy.blobs.fetched");
        set_names(&writer, plan)?;
    }
    failpoint::hit("deploy.names.set");
    let (anchor, policy) = &plan.trust;
    let id = deployment::write(system, &plan.verified, anchor, policy.as_ref())?;
    let booted = Needs::of_this_boot()?.booted;
    if matches!(plan.verdict, Verdict::UpToDate | Verdict::AlreadyPending) {
        if let Some(esp) = &plan.esp {
            esp::sync(system, esp, booted, plan.floor)?.report();
        }
        return Ok(());
    }
    let mut state = system.state()?;
    if plan.verdict == Verdict::Install {
        state.current = Some(id);
    } else {
        state.set_pending(id);
    }
    state.set_source(id, plan.source.as_deref());
    state.last_update = Some(LastUpdate::new(Some(id.version), None));
    let Some(esp) = &plan.esp else { return Ok(state.save(&system.state_path())?) };
    // Rule (docs/design.md, kernel of the system): a kernel is on the partition, whole and read back, before the state
    // file names its deployment; and it can be started only afterwards.
    let kernels = esp.plan(system, &state, booted, plan.floor, true)?;
    esp.stage(&store, &kernels)?;
    state.save(&system.state_path())?;
    esp.switch(&store, &kernels)?.report();
    Ok(())
}

/// Fetches blobs of targets, several at a time; `again` whatever has their names in the store.
pub(super) fn fetch_blobs(
    writer: &Writer<'_>,
    from: &dyn Transport,
    blobs: &[Fetch],
    again: bool,
    progress: &Progress,
) -> Result<(), DeployError> {
    // A registry keeps each target's blobs in a repository of their own.
    let mut places = BTreeMap::new();
    for fetch in blobs {
        if !places.contains_key(fetch.target.as_str()) {
            places.insert(fetch.target.as_str(), from.within(&image_repository(&fetch.target))?);
        }
    }
    let jobs: Vec<_> = blobs
        .iter()
        .filter_map(|fetch| {
            let object = format!("{} {}", fetch.target, fetch.blob.digest);
            let from = places.get(fetch.target.as_str())?.as_ref();
            Some(FetchJob { from, blob: &fetch.blob, again, object })
        })
        .collect();
    Ok(writer.fetch_all(&jobs, progress)?)
}

/// Stores an artifact and its parts. It is small, so its content is compared, not its size.
pub(super) fn fetch_artifact(
    writer: &Writer<'_>,
    from: &dyn Transport,
    artifact: &Descriptor,
) -> Result<(), DeployError> {
    let quiet = Progress::silent().task("fetch", "", None);
    let place = from.within(SYSTEM_REPOSITORY)?;
    let from = place.as_ref();
    let manifest = from.manifest(artifact)?;
    for blob in manifest.layers.iter().chain([&manifest.config, artifact]) {
        let good = writer.store().has(blob) && writer.store().get(&blob.digest, blob.size).is_ok();
        if !good {
            writer.refetch(from, blob, &quiet)?;
        }
    }
    Ok(())
}

/// Sets the names of the system, its images and its signatures, and removes previous signatures.
fn set_names(writer: &Writer<'_>, plan: &Plan) -> Result<(), DeployError> {
    let names = names(&plan.id);
    let mut entries: Vec<_> = plan.images.iter().map(|(name, image)| (Some(name.as_str()), image)).collect();
    entries.extend(names.iter().map(|name| (Some(name.as_str()), &plan.artifact)));
    entries.extend(plan.referrers.iter().map(|one| (None, one)));
    let replaced = replaced(writer, &plan.artifact.digest, &plan.referrers)?;
    Ok(writer.replace_entries(&replaced, &entries, &[])?)
}

/// Returns the store's referrers of a system that are not among `referrers`, of the same kinds.
fn replaced(
    writer: &Writer<'_>,
    artifact: &Digest,
    referrers: &[Descriptor],
) -> Result<Vec<Digest>, DeployError> {
    let mut replaced = Vec::new();
    for kind in [SIGNATURE_TYPE, CERTIFICATE_TYPE, FLOOR_SIGNATURE_TYPE] {
        let here = writer.store().referrers(artifact, Some(kind))?;
        // A source without a floor signature does not affect the existing one.
        let offered = referrers.iter().any(|one| one.artifact_type.as_deref() == Some(kind));
        if offered {
            replaced.extend(here.iter().map(|one| one.digest));
        }
    }
    replaced.retain(|digest| !referrers.iter().any(|one| one.digest == *digest));
    Ok(replaced)
}

/// Records why an install or an update failed, for `mosfs status`. Best effort: the disk may be full.
pub fn record_failure(system: &System, why: &str) {
    let Ok(mut state) = system.state() else { return };
    if state.current.is_none() {
        return;
    }
    state.last_update = Some(LastUpdate::new(None, Some(clip(why))));
    if let Err(more) = state.save(&system.state_path()) {
        log::warn!("the reason of the failed update is not recorded: {more}");
    }
}
