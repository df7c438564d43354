//! Plans an install or an update before anything is fetched or written.
//!
//! The checks, in their order (docs/design.md, three checks, newer only): signature, certificate and product
//! ([`super::offer`]); `version > current`; `version > floor`; the floor signature; free space. Only the
//! targets' OCI manifests are read from the source, in memory and bounded; of the store, every blob that the
//! system needs is read, because a corrupt blob counts as missing.
//!
//! A name does not prove that two systems are the same: a deployment that is already current or pending is
//! compared with the offer, file by file and blob by blob, and what differs is replaced (a renewed
//! certificate, the signature of another CA, a lost blob).

use std::collections::BTreeMap;

use serde::Serialize;

use super::error::DeployError;
use super::esp::{self, Esp, EspError};
use super::id::DeploymentId;
use super::offer::{self, Accepted};
use super::state::State;
use super::{FloorGate, System, deployment, space};
use crate::digest::Digest;
use crate::floor::{self, FloorError, Policy};
use crate::image::boot;
use crate::image::oci::{Descriptor, MANIFEST, MAX_MANIFEST_BYTES, OciImage, SYSTEM_REPOSITORY};
use crate::progress::Progress;
use crate::store::{fsck, image_name, image_repository, system_name, version_name};
use crate::transport::Transport;
use crate::trust::{Anchor, Verified};

/// Blobs take whole blocks of the file system, in bytes.
const BLOCK: u64 = 4096;

/// How an offer relates to what is installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is already current: nothing to do except repairs.
    UpToDate,
    /// It is already pending and has tries left: nothing to do except repairs.
    AlreadyPending,
    /// It has used up its tries and never proved healthy: it is not tried again automatically.
    FailedBefore,
    /// It will be the first deployment.
    Install,
    /// It will be pending.
    Update,
}

/// A blob to fetch.
#[derive(Debug, Clone, PartialEq)]
pub struct Fetch {
    /// The target that needs it.
    pub target: String,
    /// The blob.
    pub blob: Descriptor,
}

/// The plan of an install or an update.
pub struct Plan {
    /// The verified system.
    pub verified: Verified,
    /// Which deployment it will be.
    pub id: DeploymentId,
    /// How it relates to what is installed.
    pub verdict: Verdict,
    /// The blobs to fetch: the store lacks them, or its copy is damaged.
    pub fetch: Vec<Fetch>,
    /// Files of an already installed deployment that differ from the offer.
    pub renew: Vec<&'static str>,
    /// The system manifest's artifact.
    pub artifact: Descriptor,
    /// The artifacts of its signature, certificate and floor signature.
    pub referrers: Vec<Descriptor>,
    /// The targets' OCI manifests, with their names in the store.
    pub images: Vec<(String, Descriptor)>,
    /// Every blob of the targets, including those in the store.
    pub blobs: Vec<Descriptor>,
    /// The disk space needed for `fetch`, in bytes.
    pub needed_bytes: u64,
    /// The image of the target `boot`, if the system names a kernel of its own.
    pub boot: Option<OciImage>,
    /// The EFI system partition that its kernel is to be on.
    pub esp: Option<Esp>,
    /// The floor, if it was read.
    pub floor: Option<u64>,
    /// The registry that it comes from, as `docker://HOST/PREFIX`: to be noted in the state file.
    pub source: Option<String>,
    /// What the device trusts, and checks floor signatures against.
    pub(super) trust: (Anchor, Option<Policy>),
}

impl Plan {
    /// The space that it needs.
    pub(super) fn want(&self) -> space::SpaceNeeded {
        let keep = self.blobs.iter().map(|blob| blob.digest).collect();
        space::SpaceNeeded { bytes: self.needed_bytes, keep, floor: self.floor }
    }
}

/// How thoroughly to plan.
#[derive(Clone, Copy)]
pub struct PlanOptions<'a> {
    /// Try a version again that failed before.
    pub again: bool,
    /// Read the blobs in the store, rather than rely on their size.
    pub read_blobs: bool,
    /// The EFI system partition of this machine, if its kernels are kept there.
    pub esp: Option<&'a Esp>,
    /// The id of the running kernel, if it has one.
    pub kernel: Option<Digest>,
    /// The registry that the system comes from, as `docker://HOST/PREFIX`, if it comes from one.
    pub source: Option<&'a str>,
    /// Where to report progress.
    pub progress: &'a Progress,
}

/// Checks an offer against the device and plans what to do.
///
/// # Errors
/// In the order of the checks: [`DeployError::SameVersionOtherDigest`] and `FloorError::NotNewer`;
/// `FloorError::Rollback` and what else the floor says; `FloorError::NoFloorSignature` and
/// `BadFloorSignature`; [`DeployError::NoSpace`].
pub fn plan(
    system: &System,
    state: &State,
    from: &dyn Transport,
    offer: Accepted,
    anchor: &Anchor,
    gate: &mut FloorGate<'_>,
    options: &PlanOptions<'_>,
) -> Result<Plan, DeployError> {
    let Accepted { artifact, referrers, verified } = offer;
    let id = DeploymentId { version: verified.manifest().version, digest: verified.digest() };
    let verdict = relation(state, &id, options.again)?;
    let policy = match gate {
        FloorGate::Enforced { policy, .. } => policy.clone(),
        FloorGate::Unprovisioned => None,
    };
    let mut plan = Plan {
        verified,
        id,
        verdict,
        fetch: Vec::new(),
        renew: Vec::new(),
        artifact,
        referrers,
        images: Vec::new(),
        blobs: Vec::new(),
        needed_bytes: 0,
        boot: None,
        esp: options.esp.cloned(),
        floor: None,
        source: options.source.map(str::to_string),
        trust: (anchor.clone(), policy),
    };
    match verdict {
        Verdict::FailedBefore => return Ok(plan),
        Verdict::Install | Verdict::Update => {
            let current = state.current.map(|current| current.version);
            plan.floor = check_floor(&plan.id, current, &plan.verified, gate)?;
        }
        Verdict::UpToDate | Verdict::AlreadyPending => {
            let policy = plan.trust.1.as_ref();
            plan.renew = deployment::differences(system, &plan.verified, anchor, policy);
        }
    }
    plan_blobs(&mut plan, system, from, options)?;
    check_kernel(&plan, system, state, options)?;
    if plan.needed_bytes > 0 {
        space::check(system, &plan.want())?;
    }
    Ok(plan)
}

/// Rules: `version > current`; same version and same digest: nothing to do; same version, other digest:
/// refused (docs/design.md, one version, one system). A version that used up its tries is tried again only if
/// the user requests it.
fn relation(state: &State, id: &DeploymentId, again: bool) -> Result<Verdict, DeployError> {
    for installed in state.named() {
        if installed.version == id.version && installed.digest != id.digest {
            return Err(DeployError::SameVersionOtherDigest {
                version: id.version,
                offered: id.digest,
                installed: installed.digest,
            });
        }
    }
    let Some(current) = state.current else { return Ok(Verdict::Install) };
    if current == *id {
        return Ok(Verdict::UpToDate);
    }
    if id.version <= current.version {
        return Err(FloorError::NotNewer { version: id.version, current: current.version }.into());
    }
    match &state.pending {
        // What began is finished: the whole way, as it has no folder yet.
        Some(pending) if pending.deployment == *id && pending.fetching => Ok(Verdict::Update),
        Some(pending) if pending.deployment == *id && pending.tries_left > 0 => Ok(Verdict::AlreadyPending),
        Some(pending) if pending.deployment == *id && !again => Ok(Verdict::FailedBefore),
        _ => Ok(Verdict::Update),
    }
}

/// Rules (docs/design.md, newer only, floor signature): `version > current` and `version > floor`; a device
/// whose floor is provisioned refuses a system that has no valid floor signature, which is checked in
/// software. Returns the floor.
fn check_floor(
    id: &DeploymentId,
    current: Option<u64>,
    verified: &Verified,
    gate: &mut FloorGate<'_>,
) -> Result<Option<u64>, DeployError> {
    let FloorGate::Enforced { floor, policy } = gate else { return Ok(None) };
    let lowest = floor::check_update(*floor, id.version, current)?;
    if let Some(policy) = policy {
        let signature =
            verified.floor_signature().ok_or(FloorError::NoFloorSignature { version: id.version })?;
        floor::check_signature(policy, id.version, signature)?;
    }
    Ok(Some(lowest))
}

/// Rule (docs/design.md, kernel of the system): the EFI system partition is asked for room before anything is fetched,
/// and an update whose kernel could never be started is refused.
fn check_kernel(
    plan: &Plan,
    system: &System,
    state: &State,
    options: &PlanOptions<'_>,
) -> Result<(), EspError> {
    let version = plan.id.version;
    let id = plan.boot.as_ref().and_then(|image| boot::kernel_id(image).ok().flatten());
    let same =
        || id == options.kernel || state.current.is_some_and(|current| esp::names(system, &current, id));
    match (&plan.boot, options.esp) {
        (Some(image), Some(esp)) if matches!(plan.verdict, Verdict::Install | Verdict::Update) => {
            esp.check_room(version, image)
        }
        (Some(_), None) if plan.verdict == Verdict::Update && !same() => Err(EspError::None { version }),
        _ => Ok(()),
    }
}

/// Finds the blobs that the store lacks or has with the wrong content. The OCI manifests are read from the
/// source, in memory.
fn plan_blobs(
    plan: &mut Plan,
    system: &System,
    from: &dyn Transport,
    options: &PlanOptions<'_>,
) -> Result<(), DeployError> {
    let mut needed: BTreeMap<_, Fetch> = BTreeMap::new();
    let mut order = Vec::new();
    for (name, target) in &plan.verified.manifest().targets {
        let manifest = Descriptor::new(MANIFEST, target.digest, target.size);
        let from = from.within(&image_repository(name.as_str()))?;
        let bytes = from.fetch(&manifest, MAX_MANIFEST_BYTES)?;
        let image = OciImage::parse(&bytes)?;
        let config = image.manifest.config.clone();
        if name.as_str() == boot::TARGET && boot::kernel_id(&image).ok().flatten().is_some() {
            plan.boot = Some(image.clone());
        }
        for blob in image.manifest.layers.iter().cloned().chain([config, manifest.clone()]) {
            let digest = blob.digest;
            if needed.insert(digest, Fetch { target: name.to_string(), blob }).is_none() {
                order.push(digest);
            }
        }
        plan.images.push((image_name(name.as_str(), &target.digest), manifest));
    }
    plan.blobs = needed.values().map(|fetch| fetch.blob.clone()).collect();
    let lacking = match system.store() {
        Ok(store) if options.read_blobs => {
            fsck::lacking(&store, &plan.blobs, super::threads(), options.progress)
        }
        Ok(store) => plan.blobs.iter().filter(|blob| !store.has(blob)).map(|blob| blob.digest).collect(),
        Err(_) => plan.blobs.iter().map(|blob| blob.digest).collect(),
    };
    for digest in order.iter().filter(|digest| lacking.contains(digest)) {
        if let Some(fetch) = needed.remove(digest) {
            let blocks = fetch.blob.size.div_ceil(BLOCK).saturating_mul(BLOCK);
            plan.needed_bytes = plan.needed_bytes.saturating_add(blocks);
            plan.fetch.push(fetch);
        }
    }
    Ok(())
}

/// Whether a registry still offers what is current or pending here, found out by one HEAD (and the
/// list of versions, where none is named); `None` where only the offer itself can tell.
///
/// The registry's word is enough to do nothing: one that lies could as well hide what is new.
pub fn unchanged(
    system: &System,
    state: &State,
    from: &dyn Transport,
    name: Option<&str>,
) -> Result<Option<(Verdict, u64)>, DeployError> {
    let Ok(store) = system.store() else { return Ok(None) };
    if !from.is_remote() {
        return Ok(None);
    }
    let name = match name {
        Some(name) => offer::full_name(name),
        None => match from.tags(SYSTEM_REPOSITORY)?.iter().filter_map(|tag| tag.parse().ok()).max() {
            Some(version) => version_name(version),
            None => return Ok(None),
        },
    };
    let Some(offered) = from.peek(&name)? else { return Ok(None) };
    let pending = state.pending.as_ref().filter(|pending| pending.tries_left > 0);
    let known = state.current.map(|current| (Verdict::UpToDate, current));
    let known = known.into_iter().chain(pending.map(|one| (Verdict::AlreadyPending, one.deployment)));
    for (verdict, deployment) in known {
        let here = store.resolve(&version_name(deployment.version)).ok();
        if here.is_some_and(|here| here.digest == offered) {
            return Ok(Some((verdict, deployment.version)));
        }
    }
    Ok(None)
}

/// Returns the names of a system in the store.
pub(super) fn names(id: &DeploymentId) -> [String; 2] {
    [system_name(&id.digest), version_name(id.version)]
}
