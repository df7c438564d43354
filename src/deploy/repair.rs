//! `mosfs repair`: repairs a damaged device from its other files, or from a source.
//!
//! ```text
//! state.json      cannot be read: written anew; current is what runs, else the highest deployment that verifies
//! index.json      cannot be read: recreated; the names of the deployments are set again
//! deployment      a part is missing or damaged: copied from the store or the source
//! store           a system's own artifacts: copied from the deployment's folder; names that are missing: set again
//! blob            missing or damaged: fetched from the source
//! ```
//!
//! Rule: nothing is trusted that does not verify: a deployment is repaired only with parts that verify
//! together under the device's anchor, and a blob only with bytes of its digest. Repair covers the
//! deployments that the state file names and never makes another version current. Each step is atomic (atomic
//! replace, exchange of a folder), so a crash leaves a state that a second repair, or the next update,
//! completes.

use super::booted;
use super::check;
use super::deployment;
use super::error::DeployError;
use super::id::DeploymentId;
use super::offer::{Accepted, Judge, Offer};
use super::plan::names;
use super::recover;
use super::state::State;
use super::{System, SystemLock};
use crate::digest::Digest;
use crate::error::without_target;
use crate::floor::Policy;
use crate::image::oci::{Descriptor, MANIFEST, MAX_MANIFEST_BYTES, OciImage, SYSTEM_REPOSITORY};
use crate::manifest::SYSTEM_MEDIA_TYPE;
use crate::progress::Progress;
use crate::sorting;
use crate::store::{Store, StoreError, Writer, fsck, image_name, image_repository, system_name};
use crate::sys::failpoint;
use crate::transport::Transport;
use crate::trust::{Anchor, CERTIFICATE_TYPE, Dates, FLOOR_SIGNATURE_TYPE, SIGNATURE_TYPE, Verified};

/// The result of a repair.
#[derive(Debug, Default)]
pub struct Repaired {
    /// What was repaired, each item as a sentence.
    pub mended: Vec<String>,
    /// What is still damaged, each item as a sentence.
    pub problems: Vec<String>,
}

/// The inputs of a repair.
pub struct RepairInputs<'a> {
    /// The device's trust anchor.
    pub anchor: &'a Anchor,
    /// What floor signatures are checked against, if the device has a floor.
    pub policy: Option<&'a Policy>,
    /// The floor, if known.
    pub floor: Option<u64>,
    /// The source of parts and blobs that are not on the device.
    pub source: Option<&'a dyn Transport>,
    /// Where to report progress.
    pub progress: &'a Progress,
}

/// Repairs what can be repaired. The caller holds the system's lock.
///
/// # Errors
/// If nothing can be written, or nothing is installed. What cannot be repaired is in the result.
pub fn repair(
    system: &System,
    _lock: &SystemLock,
    means: &RepairInputs<'_>,
) -> Result<Repaired, DeployError> {
    let mut done = Repaired::default();
    let state = state(system, means, &mut done)?;
    let ids = check::of_state(&state);
    if ids.is_empty() {
        return Err(DeployError::NothingInstalled { path: system.root().to_path_buf() });
    }
    let store = Store::create(&system.store_dir())?;
    let writer = store.writer()?;
    if writer.mend_index()? {
        done.mended.push(format!("{}: begun anew", store.dir().join("index.json").display()));
    }
    for id in ids {
        match folder(system, &store, &id, means, &mut done) {
            Ok(verified) => {
                if let Err(error) = images(&writer, &id, &verified, means, &mut done) {
                    done.problems.push(format!("deployment {id}: {error}"));
                }
            }
            Err(error) => done.problems.push(format!("deployment {id}: {error}")),
        }
    }
    Ok(done)
}

/// Returns the state, written anew if it cannot be read.
fn state(system: &System, means: &RepairInputs<'_>, done: &mut Repaired) -> Result<State, DeployError> {
    let why = match State::read(&system.state_path()) {
        Ok(Some(state)) if state.current.is_some() => return Ok(state),
        Ok(_) => "it names no deployment".to_string(),
        Err(damage) => damage.to_string(),
    };
    let mut state = State::default();
    state.current = best(system, means)?;
    if state.current.is_none() {
        return Ok(state);
    }
    recover::write(&state, &system.state_path())?;
    failpoint::hit("repair.state.written");
    done.mended.push(format!("{}: written anew ({why})", system.state_path().display()));
    Ok(state)
}

/// Determines the current deployment without a state file: what runs, else the highest version that verifies
/// and is not below the floor.
fn best(system: &System, means: &RepairInputs<'_>) -> Result<Option<DeploymentId>, DeployError> {
    let booted = booted::deployment().ok().flatten();
    let (mut ids, _) = deployment::list(system)?;
    ids.retain(|id| means.floor.is_none_or(|floor| id.version >= floor));
    // What runs first, then the highest version.
    sorting::sort_by_key(&mut ids, |id| (Some(*id) == booted, id.version));
    Ok(ids.into_iter().rev().find(|id| deployment::verify(system, id, means.anchor, Dates::LogOnly).is_ok()))
}

/// Repairs a deployment's folder.
fn folder(
    system: &System,
    store: &Store,
    id: &DeploymentId,
    means: &RepairInputs<'_>,
    done: &mut Repaired,
) -> Result<Verified, DeployError> {
    let verified = deployment::verify(system, id, means.anchor, Dates::LogOnly);
    let floor_holds = |verified: &Verified| match (means.policy, verified.floor_signature()) {
        (Some(policy), Some(signature)) => {
            crate::floor::check_signature(policy, id.version, signature).is_ok()
        }
        (Some(_), None) => false,
        (None, _) => true,
    };
    let why = match verified {
        Ok(verified) if floor_holds(&verified) => return Ok(verified),
        Ok(_) => "its floor signature does not hold".to_string(),
        Err(error) => error.to_string(),
    };
    let accepted = gather(system, store, id, means)?;
    if !floor_holds(&accepted.verified) {
        done.problems.push(format!("deployment {id}: no floor signature that holds was found"));
    }
    let before = deployment::differences(system, &accepted.verified, means.anchor, means.policy);
    if !before.is_empty() {
        deployment::write(system, &accepted.verified, means.anchor, means.policy)?;
        failpoint::hit("repair.folder.replaced");
        done.mended.push(format!("deployment {id}: {} replaced ({why})", before.join(", ")));
    }
    Ok(accepted.verified)
}

/// Finds parts of a deployment that verify together, from its folder, the store and the source.
fn gather(
    system: &System,
    store: &Store,
    id: &DeploymentId,
    means: &RepairInputs<'_>,
) -> Result<Accepted, DeployError> {
    let found = deployment::parts(system, id);
    let is_it = |bytes: &Vec<u8>| Digest::of(bytes) == id.digest;
    let sources = || std::iter::once(store.transport() as &dyn Transport).chain(means.source);
    let manifest = found.manifest.filter(is_it).or_else(|| {
        sources().find_map(|from| {
            let entries = from.lookup(&system_name(&id.digest)).ok()?;
            let from = from.within(SYSTEM_REPOSITORY).ok()?;
            let layers = from.manifest(entries.first()?).ok()?.layers;
            let layer = layers.into_iter().find(|layer| layer.digest == id.digest)?;
            from.fetch(&layer, deployment::MAX_MANIFEST).ok()
        })
    });
    let manifest = manifest.or_else(|| store.get(&id.digest, deployment::MAX_MANIFEST).ok()).ok_or(
        DeployError::NotASystem {
            object: format!("deployment {id}"),
            why: "its manifest is neither in its folder nor in the store".into(),
        },
    )?;
    let artifact = system_artifact(&manifest);
    let mut offer = Offer::of(artifact, manifest);
    offer.add_files(found.signature, found.certificate, found.floor_signature);
    for from in sources() {
        if let Err(error) = offer.fetch_parts(from) {
            log::warn!("{} is passed over: {error}", from.location());
        }
    }
    offer.verify(&Judge { anchor: means.anchor, dates: Dates::LogOnly, policy: means.policy })
}

/// Returns the artifact of a system manifest, which is determined by the bytes.
fn system_artifact(manifest: &[u8]) -> Descriptor {
    use crate::image::oci::Manifest;
    let layer = Descriptor::of(SYSTEM_MEDIA_TYPE, manifest);
    let bytes = Manifest::artifact(SYSTEM_MEDIA_TYPE, layer, None).to_bytes();
    Descriptor { artifact_type: Some(SYSTEM_MEDIA_TYPE.into()), ..Descriptor::of(MANIFEST, &bytes) }
}

/// Repairs a deployment's objects in the store: its own artifacts, its images, their names.
fn images(
    writer: &Writer<'_>,
    id: &DeploymentId,
    verified: &Verified,
    means: &RepairInputs<'_>,
    done: &mut Repaired,
) -> Result<(), DeployError> {
    let store = writer.store();
    let artifact = writer.put_artifact(SYSTEM_MEDIA_TYPE, verified.bytes(), None)?;
    let mut referrers = vec![
        writer.put_artifact(SIGNATURE_TYPE, verified.signature(), Some(&artifact))?,
        writer.put_artifact(CERTIFICATE_TYPE, verified.certificate(), Some(&artifact))?,
    ];
    if let Some(signature) = verified.floor_signature() {
        referrers.push(writer.put_artifact(FLOOR_SIGNATURE_TYPE, signature, Some(&artifact))?);
    }
    let mut entries: Vec<(Option<String>, Descriptor)> = Vec::new();
    let mut whole = true;
    for (target, image) in &verified.manifest().targets {
        let manifest = Descriptor::new(MANIFEST, image.digest, image.size);
        match image_blobs(writer, target.as_str(), &manifest, means, done) {
            Ok(()) => entries.push((Some(image_name(target.as_str(), &image.digest)), manifest)),
            Err(error) => {
                whole = false;
                let error = error.to_string();
                let why = without_target(target.as_str(), &error);
                done.problems.push(format!("deployment {id}: target {target}: {why}"));
            }
        }
    }
    // A name is set once everything that it reaches exists.
    if whole {
        entries.extend(names(id).map(|name| (Some(name), artifact.clone())));
        let known: Vec<Digest> = [SIGNATURE_TYPE, CERTIFICATE_TYPE, FLOOR_SIGNATURE_TYPE]
            .iter()
            .filter_map(|kind| store.referrers(&artifact.digest, Some(kind)).ok())
            .flatten()
            .map(|one| one.digest)
            .collect();
        entries.extend(referrers.iter().map(|one| (None, one.clone())));
        let missing = |(name, entry): &&(Option<String>, Descriptor)| match name {
            Some(name) => store.resolve(name).map_or(true, |found| found.digest != entry.digest),
            None => !known.contains(&entry.digest),
        };
        let unset: Vec<_> = entries.iter().filter(missing).map(|(name, _)| name.clone()).collect();
        if !unset.is_empty() {
            let all: Vec<_> = entries.iter().map(|(name, entry)| (name.as_deref(), entry)).collect();
            writer.replace_entries(&known, &all, &[])?;
            failpoint::hit("repair.names.set");
            let said = unset.iter().flatten().map(|name| format!("name {name}: set again"));
            done.mended.extend(said);
        }
    }
    Ok(())
}

/// Repairs the blobs of an image.
fn image_blobs(
    writer: &Writer<'_>,
    target: &str,
    manifest: &Descriptor,
    means: &RepairInputs<'_>,
    done: &mut Repaired,
) -> Result<(), DeployError> {
    let store = writer.store();
    mend(writer, target, std::slice::from_ref(manifest), means, done)?;
    let image = OciImage::parse(&store.get(&manifest.digest, MAX_MANIFEST_BYTES)?)?;
    let mut blobs = image.manifest.layers.clone();
    blobs.push(image.manifest.config);
    mend(writer, target, &blobs, means, done)
}

/// Fetches those of these blobs that are missing or damaged.
fn mend(
    writer: &Writer<'_>,
    target: &str,
    blobs: &[Descriptor],
    means: &RepairInputs<'_>,
    done: &mut Repaired,
) -> Result<(), DeployError> {
    let lacking = fsck::lacking(writer.store(), blobs, super::threads(), means.progress);
    let mut first: Option<DeployError> = None;
    for blob in blobs.iter().filter(|blob| lacking.contains(&blob.digest)) {
        let fetched = match means.source {
            None => Err(DeployError::MissingBlob { target: target.to_string(), digest: blob.digest }),
            Some(from) => {
                let object = format!("{target} {}", blob.digest);
                let task = means.progress.task("fetch", &object, Some(blob.size));
                from.within(&image_repository(target))
                    .map_err(StoreError::from)
                    .and_then(|from| writer.refetch(from.as_ref(), blob, &task))
                    .map_err(DeployError::from)
            }
        };
        match fetched {
            Ok(()) => {
                failpoint::hit("repair.blob.fetched");
                done.mended.push(format!("target {target}: blob {} fetched again", blob.digest));
            }
            Err(error) => first = first.or(Some(error)),
        }
    }
    first.map_or(Ok(()), Err)
}
