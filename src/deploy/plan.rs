//! What an install or an update would do, found out before anything is fetched or written.
//!
//! The checks, in their order (docs/design.md, three checks, newer only): signature, certificate and
//! product; `version > current`; `version > floor`; the floor signature; free space. Only the
//! signed manifest, its referrers and the targets' OCI manifests are read, in memory and bounded.

use serde::Serialize;

use super::error::DeployError;
use super::state::{DeploymentId, State};
use super::{FloorGate, System};
use crate::digest::Digest;
use crate::floor::{self, FloorError};
use crate::image::oci::{Descriptor, MANIFEST, MAX_MANIFEST_BYTES, OciImage};
use crate::store::{SYSTEM_PREFIX, Store, image_name, system_name, version_name};
use crate::sys::file;
use crate::transport::{Transport, TransportError};
use crate::trust::{
    Anchor, CERTIFICATE_TYPE, Dates, FLOOR_SIGNATURE_TYPE, SIGNATURE_TYPE, Signed, TrustError, Verified,
};

/// No system manifest is longer, in bytes.
const MAX_SYSTEM: u64 = 4 << 20;
/// No signature or certificate chain is longer, in bytes.
const MAX_SMALL: u64 = 1 << 16;
/// A publisher may have signed a manifest again, with a renewed certificate or another key: how
/// many signatures and certificates are looked at.
const MAX_ALTERNATIVES: usize = 8;
/// Blobs take whole blocks of the file system, in bytes.
const BLOCK: u64 = 4096;
/// What the folder, the index and the state file need beside the blobs, in bytes.
const RESERVE: u64 = 1 << 20;

/// A signed system at a source, of which nothing is verified yet.
pub struct Offer {
    /// The system manifest's artifact.
    pub artifact: Descriptor,
    /// Its signature, certificate and floor signature artifacts.
    pub referrers: Vec<Descriptor>,
    /// The system manifest's bytes.
    manifest: Vec<u8>,
    signatures: Vec<Vec<u8>>,
    certificates: Vec<Vec<u8>>,
    floor_signatures: Vec<Vec<u8>>,
}

/// Fetches a signed system, small parts only.
///
/// `name` is a full name, a version or `sha256/HEX`; without one the highest version is taken.
pub fn fetch_offer(from: &dyn Transport, name: Option<&str>) -> Result<Offer, DeployError> {
    let name = match name {
        Some(name) if name.starts_with(SYSTEM_PREFIX) => name.to_string(),
        Some(name) => match name.strip_prefix("sha256:") {
            Some(hex) => format!("{SYSTEM_PREFIX}sha256/{hex}"),
            None => format!("{SYSTEM_PREFIX}{name}"),
        },
        None => highest(from)?,
    };
    let found = from.lookup(&name)?;
    let Some(artifact) = found.into_iter().next() else {
        let missing = TransportError::NameMissing { location: from.location(), name, available: Vec::new() };
        return Err(missing.into());
    };
    let content = |artifact: &Descriptor, max: u64| -> Result<Vec<u8>, DeployError> {
        let manifest = from.manifest(artifact)?;
        let [layer] = manifest.layers.as_slice() else {
            return Err(DeployError::NotASystem {
                object: format!("{name} ({})", artifact.digest),
                why: format!("the artifact has {} layers, expected 1", manifest.layers.len()),
            });
        };
        Ok(from.fetch(layer, max)?)
    };
    let manifest = content(&artifact, MAX_SYSTEM)?;
    let mut referrers = Vec::new();
    let mut of_type = |artifact_type: &str| -> Result<Vec<Vec<u8>>, DeployError> {
        let mut found = from.referrers(&artifact.digest, Some(artifact_type))?;
        found.truncate(MAX_ALTERNATIVES);
        let contents = found.iter().map(|one| content(one, MAX_SMALL)).collect();
        referrers.append(&mut found);
        contents
    };
    let signatures = of_type(SIGNATURE_TYPE)?;
    let certificates = of_type(CERTIFICATE_TYPE)?;
    let floor_signatures = of_type(FLOOR_SIGNATURE_TYPE)?;
    Ok(Offer { artifact, referrers, manifest, signatures, certificates, floor_signatures })
}

/// The name of the highest version that a place lists.
fn highest(from: &dyn Transport) -> Result<String, DeployError> {
    let entries = from.entries()?;
    let versions =
        entries.iter().filter_map(|one| one.ref_name()?.strip_prefix(SYSTEM_PREFIX)?.parse::<u64>().ok());
    match versions.max() {
        Some(version) => Ok(version_name(version)),
        None => Err(DeployError::NotASystem {
            object: from.location(),
            why: format!("it has no name that begins with {SYSTEM_PREFIX} and ends in a version"),
        }),
    }
}

impl Offer {
    /// The bytes of the offered system manifest. Nobody has vouched for them yet.
    pub fn manifest_bytes(&self) -> &[u8] {
        &self.manifest
    }

    /// The digest of the offered system manifest's bytes.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// Verifies signature, certificate and product; of several signatures one that holds is taken.
    ///
    /// # Errors
    /// The error of the first signature and certificate where none holds.
    pub fn verify(&self, anchor: &Anchor, dates: Dates) -> Result<Verified, DeployError> {
        let mut first: Option<TrustError> = None;
        for certificate in &self.certificates {
            for signature in &self.signatures {
                let signed = Signed {
                    manifest: self.manifest.clone(),
                    signature: signature.clone(),
                    certificate: certificate.clone(),
                    floor_signature: self.floor_signatures.first().cloned(),
                };
                match signed.verify(anchor, dates) {
                    Ok(verified) => return Ok(verified),
                    Err(error) => first = first.or(Some(error)),
                }
            }
        }
        Err(match first {
            Some(error) => error.into(),
            None => DeployError::NotSigned {
                digest: self.digest(),
                missing: if self.signatures.is_empty() { "signature" } else { "certificate" },
            },
        })
    }
}

/// How an offer relates to what is installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is current already: nothing to do.
    UpToDate,
    /// It is pending already and has tries left: nothing to do.
    AlreadyPending,
    /// It will be the first deployment.
    Install,
    /// It will be pending.
    Update,
}

/// A blob that is to be fetched.
#[derive(Debug, Clone, PartialEq)]
pub struct Fetch {
    /// The target that needs it.
    pub target: String,
    /// The blob.
    pub blob: Descriptor,
}

/// What an install or an update would do.
pub struct Plan {
    /// The verified system.
    pub verified: Verified,
    /// Which deployment it will be.
    pub id: DeploymentId,
    /// How it relates to what is installed.
    pub verdict: Verdict,
    /// The blobs to fetch, none of which is in the store.
    pub fetch: Vec<Fetch>,
    /// The system manifest's artifact.
    pub artifact: Descriptor,
    /// Its signature, certificate and floor signature artifacts.
    pub referrers: Vec<Descriptor>,
    /// The targets' OCI manifests, with the names that they get.
    pub images: Vec<(String, Descriptor)>,
    /// What `fetch` takes on the disk, in bytes.
    pub needed_bytes: u64,
}

/// Checks an offer against the device and plans what to do.
///
/// # Errors
/// In the order of the checks: [`DeployError::Trust`]; [`DeployError::SameVersionOtherDigest`] and
/// `FloorError::NotNewer`; `FloorError::Rollback` and what else the floor says;
/// `FloorError::NoFloorSignature` and `BadFloorSignature`; [`DeployError::NoSpace`].
pub fn plan(
    system: &System,
    state: &State,
    from: &dyn Transport,
    offer: &Offer,
    anchor: &Anchor,
    dates: Dates,
    gate: &mut FloorGate<'_>,
) -> Result<Plan, DeployError> {
    let verified = offer.verify(anchor, dates)?;
    let id = DeploymentId { version: verified.manifest().version, digest: verified.digest() };
    let verdict = relation(state, &id)?;
    if matches!(verdict, Verdict::Install | Verdict::Update) {
        check_floor(&id, state.current.map(|current| current.version), &verified, gate)?;
    }
    let mut plan = Plan {
        verified,
        id,
        verdict,
        fetch: Vec::new(),
        artifact: offer.artifact.clone(),
        referrers: offer.referrers.clone(),
        images: Vec::new(),
        needed_bytes: 0,
    };
    if matches!(verdict, Verdict::Install | Verdict::Update) {
        plan_blobs(&mut plan, system, from)?;
        check_space(system, plan.needed_bytes)?;
    }
    Ok(plan)
}

/// Rules: `version > current`; same version and same digest: nothing to do; same version, other
/// digest: refused (docs/design.md, one version, one system).
fn relation(state: &State, id: &DeploymentId) -> Result<Verdict, DeployError> {
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
        Some(pending) if pending.deployment == *id && pending.tries_left > 0 => Ok(Verdict::AlreadyPending),
        _ => Ok(Verdict::Update),
    }
}

/// Rules (docs/design.md, newer only, floor signature): `version > current` and `version > floor`; a device whose floor is
/// provisioned refuses a system that has no valid floor signature, which is checked in software.
fn check_floor(
    id: &DeploymentId,
    current: Option<u64>,
    verified: &Verified,
    gate: &mut FloorGate<'_>,
) -> Result<(), DeployError> {
    let FloorGate::Enforced { floor, policy } = gate else { return Ok(()) };
    floor::check_update(*floor, id.version, current)?;
    if let Some(policy) = policy {
        let signature =
            verified.floor_signature().ok_or(FloorError::NoFloorSignature { version: id.version })?;
        floor::check_signature(policy, id.version, signature)?;
    }
    Ok(())
}

/// Finds the blobs that the store lacks. The OCI manifests are read from the source, in memory.
fn plan_blobs(plan: &mut Plan, system: &System, from: &dyn Transport) -> Result<(), DeployError> {
    let store = Store::open(&system.store_dir()).ok();
    let here = |blob: &Descriptor| store.as_ref().is_some_and(|store| store.has(blob));
    let mut seen = std::collections::BTreeSet::new();
    for (name, target) in &plan.verified.manifest().targets {
        let manifest = Descriptor::new(MANIFEST, target.digest, target.size);
        let bytes = from.fetch(&manifest, MAX_MANIFEST_BYTES)?;
        let image = OciImage::parse(&bytes)?;
        let config = image.manifest.config.clone();
        for blob in image.manifest.layers.iter().cloned().chain([config, manifest.clone()]) {
            if seen.insert(blob.digest) && !here(&blob) {
                plan.needed_bytes =
                    plan.needed_bytes.saturating_add(blob.size.div_ceil(BLOCK).saturating_mul(BLOCK));
                plan.fetch.push(Fetch { target: name.to_string(), blob });
            }
        }
        plan.images.push((image_name(name.as_str(), &target.digest), manifest));
    }
    Ok(())
}

/// Rule: free space is checked before the first blob is fetched.
fn check_space(system: &System, needed_bytes: u64) -> Result<(), DeployError> {
    let mut folder = system.root();
    // The system folder may not be there yet: ask the nearest one that is.
    while !folder.exists() {
        folder = match folder.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => std::path::Path::new("."),
        };
    }
    let available = file::available_bytes(folder).map_err(|source| crate::error::IoError {
        operation: "stat",
        path: folder.to_path_buf(),
        source,
    })?;
    let needed = needed_bytes.saturating_add(RESERVE);
    if needed > available {
        return Err(DeployError::NoSpace { path: system.root().to_path_buf(), needed, available });
    }
    Ok(())
}

/// The names that a system gets in the store.
pub(super) fn names(plan: &Plan) -> [String; 2] {
    [system_name(&plan.id.digest), version_name(plan.id.version)]
}
