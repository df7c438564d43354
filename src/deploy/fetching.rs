//! A deployment that is pending while its blobs are still being fetched: `mosfs update --lazy`.
//!
//! ```text
//! begin   system manifest and OCI manifests into the store; state.json: pending, "fetching":true
//! fetch   the blobs, under SYSTEM/fetch.lock; the system's lock is free meanwhile
//! finish  an ordinary update (plan.rs, apply.rs): every blob is read, names, folder, state.json
//! ```
//!
//! Rule (docs/design.md, whole before it boots): until the last step the deployment has no folder, its images have no
//! names, and the boot passes it over without spending a try; so has every earlier mosfs, which finds no folder. A
//! crash leaves the old system, and blobs and partial blobs that garbage collection keeps for the next run.

use super::apply::{fetch_blobs, may_go_on, tidy};
use super::error::DeployError;
use super::plan::{Fetch, Plan, Verdict};
use super::state::LastUpdate;
use super::{System, SystemLock, space};
use crate::error::IoContext;
use crate::manifest::SYSTEM_MEDIA_TYPE;
use crate::progress::Progress;
use crate::store::Store;
use crate::sys::failpoint;
use crate::sys::flock::Lock;
use crate::transport::Transport;

/// Whether a plan can be begun now and finished later. What is pending, current or here already is mended at once.
pub fn is_for_later(system: &System, plan: &Plan) -> bool {
    plan.verdict == Verdict::Update && !plan.fetch.is_empty() && !system.deployment_dir(&plan.id).exists()
}

/// Makes the system of a plan pending, before its blobs are here. The caller has held the system's lock since before
/// it made the plan.
///
/// # Errors
/// [`DeployError::NoSpace`]; what transport and store report.
pub fn begin(
    system: &System,
    lock: &SystemLock,
    from: &dyn Transport,
    plan: &Plan,
    progress: &Progress,
) -> Result<(), DeployError> {
    let begun = note(system, lock, from, plan, progress);
    if begun.as_ref().is_err_and(|error| !may_go_on(error)) {
        tidy(system, lock, plan);
    }
    begun
}

fn note(
    system: &System,
    lock: &SystemLock,
    from: &dyn Transport,
    plan: &Plan,
    progress: &Progress,
) -> Result<(), DeployError> {
    system.create()?;
    let store = Store::create(&system.store_dir())?;
    space::make(system, lock, &plan.want())?;
    let is_manifest = |fetch: &&Fetch| plan.images.iter().any(|(_, image)| image.digest == fetch.blob.digest);
    let manifests: Vec<Fetch> = plan.fetch.iter().filter(is_manifest).cloned().collect();
    {
        let writer = store.writer()?;
        fetch_blobs(&writer, from, &manifests, true, progress)?;
        writer.put_bytes(SYSTEM_MEDIA_TYPE, plan.verified.bytes())?;
    }
    failpoint::hit("deploy.fetching.prepared");
    let mut state = system.state()?;
    state.set_fetching(plan.id);
    state.set_source(plan.id, plan.source.as_deref());
    state.last_update = Some(LastUpdate::new(Some(plan.id.version), None));
    state.save(&system.state_path())?;
    failpoint::hit("deploy.fetching.begun");
    Ok(())
}

/// Takes the task of fetching the rest, until it is dropped; `None` if another process has it.
///
/// # Errors
/// If the lock cannot be taken.
pub fn try_task(system: &System) -> Result<Option<Lock>, DeployError> {
    let path = system.root().join("fetch.lock");
    Ok(Lock::try_exclusive(&path).on("lock", &path)?)
}

/// Fetches the blobs of a plan without the system's lock. Each is complete, with its digest, or not there.
///
/// # Errors
/// What transport and store report; the next run goes on where this one stopped.
pub fn fetch(
    system: &System,
    from: &dyn Transport,
    plan: &Plan,
    progress: &Progress,
) -> Result<(), DeployError> {
    let store = system.store()?;
    let writer = store.writer()?;
    fetch_blobs(&writer, from, &plan.fetch, false, progress)?;
    failpoint::hit("deploy.fetching.fetched");
    Ok(())
}
