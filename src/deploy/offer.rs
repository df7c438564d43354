//! Finds the systems at a source, and chooses the one to use.
//!
//! Names in an index are not signed, so they are only hints: every system that a source lists is examined,
//! those with the highest names first, and the highest version that *verifies* is used. A system that does
//! not verify, cannot be read, or does not match its name is skipped and reported, so that a stray or planted
//! name hides nothing. A name given by the user must match the system.
//!
//! The work is bounded ([`MAX_SYSTEMS`], [`MAX_BYTES`]); once a system that verifies has been found, only
//! [`LOOK_ON`] others are examined, because the rest claim lower versions. Only small documents are read, in
//! memory.

use std::collections::BTreeMap;

use super::error::DeployError;
use crate::digest::Digest;
use crate::floor::{self, Policy};
use crate::image::oci::{Descriptor, SYSTEM_REPOSITORY};
use crate::manifest::{SYSTEM_MEDIA_TYPE, SystemManifest};
use crate::sorting;
use crate::store::{SYSTEM_PREFIX, version_name};
use crate::transport::{Transport, TransportError};
use crate::trust::evidence::{ChosenPair, MAX_ALTERNATIVES, verify_any};
use crate::trust::{Anchor, CERTIFICATE_TYPE, Dates, FLOOR_SIGNATURE_TYPE, SIGNATURE_TYPE, Verified, p256};

/// Maximum size of a system manifest, in bytes.
const MAX_SYSTEM: u64 = 4 << 20;
/// Maximum size of a signature or certificate chain, in bytes.
const MAX_SMALL: u64 = 1 << 16;
/// Maximum number of systems of a source that are examined.
const MAX_SYSTEMS: usize = 4096;
/// Maximum total size of the system manifests that are read, in bytes.
const MAX_BYTES: u64 = 256 << 20;
/// How many more systems are examined after one that verifies.
const LOOK_ON: usize = 64;

/// A small document that refers to a system manifest, and its origin.
struct Part {
    /// Its artifact at the source; none if it is a file of a deployment.
    artifact: Option<Descriptor>,
    content: Vec<u8>,
}

/// A signed system at a source, not yet verified.
pub struct Offer {
    /// The system manifest's artifact.
    pub artifact: Descriptor,
    /// The names that lead to it, which are not trusted.
    names: Vec<String>,
    /// The system manifest's bytes.
    manifest: Vec<u8>,
    signatures: Vec<Part>,
    certificates: Vec<Part>,
    floor_signatures: Vec<Part>,
}

/// What a device checks an offer against.
#[derive(Clone, Copy)]
pub struct Judge<'a> {
    /// Its trust anchor.
    pub anchor: &'a Anchor,
    /// How to treat validity dates.
    pub dates: Dates,
    /// What floor signatures are checked against, if the device has a floor.
    pub policy: Option<&'a Policy>,
}

/// An offer that verifies.
pub struct Accepted {
    /// The system manifest's artifact.
    pub artifact: Descriptor,
    /// The artifacts of the signature, the certificate and the floor signature that are used.
    pub referrers: Vec<Descriptor>,
    /// The verified system.
    pub verified: Verified,
}

/// A system that was examined and skipped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedSystem {
    /// Its name at the source, or its digest.
    pub object: String,
    /// Why, as a sentence.
    pub why: String,
}

/// The system chosen from a source.
pub struct FoundSystem<T> {
    /// The chosen system.
    pub taken: T,
    /// The skipped systems.
    pub passed_over: Vec<SkippedSystem>,
}

/// Finds the system with the given name or, without a name, the highest version that verifies.
///
/// `name` is a full name, a version or `sha256:HEX`.
///
/// # Errors
/// [`DeployError::NotASystem`] if the source lists no system; [`DeployError::OtherThanNamed`] if a name given
/// by the user leads elsewhere; else why the first one, by name, is refused.
pub fn find(
    from: &dyn Transport,
    name: Option<&str>,
    judge: &Judge<'_>,
) -> Result<FoundSystem<Accepted>, DeployError> {
    look(from, name, &mut |offer| {
        offer.fetch_parts(from)?;
        offer.verify(judge)
    })
}

/// Finds an unverified system in the same way; returns the bytes of the system manifest.
///
/// # Errors
/// As [`find`].
pub fn find_unverified(from: &dyn Transport, name: Option<&str>) -> Result<Vec<u8>, DeployError> {
    Ok(look(from, name, &mut |offer| Ok(offer.manifest.clone()))?.taken)
}

/// A system of which nothing is verified, with everything that says something about it: to be copied whole.
pub struct Whole {
    /// The system manifest's artifact.
    pub artifact: Descriptor,
    /// The artifacts of all its signatures, certificates and floor signatures.
    pub referrers: Vec<Descriptor>,
    /// The system manifest's bytes.
    pub manifest: Vec<u8>,
}

/// Finds, in the same way, a system to copy. Rule: one without a signature and a certificate is none,
/// wherever it is copied to.
///
/// # Errors
/// As [`find`]; [`DeployError::NotSigned`].
pub fn find_whole(from: &dyn Transport, name: Option<&str>) -> Result<Whole, DeployError> {
    let whole = look(from, name, &mut |offer| {
        offer.fetch_parts(from)?;
        for (found, missing) in [(&offer.signatures, "signature"), (&offer.certificates, "certificate")] {
            if found.is_empty() {
                return Err(DeployError::NotSigned { digest: offer.digest(), missing });
            }
        }
        let parts = offer.signatures.iter().chain(&offer.certificates).chain(&offer.floor_signatures);
        let referrers = parts.filter_map(|part| part.artifact.clone()).collect();
        Ok(Whole { artifact: offer.artifact.clone(), referrers, manifest: offer.manifest.clone() })
    })?;
    Ok(whole.taken)
}

/// The systems of a source, each once, with the names that lead to it.
struct Candidate {
    artifact: Descriptor,
    names: Vec<String>,
}

impl Candidate {
    /// The highest version among its names.
    fn claim(&self) -> Option<u64> {
        self.names.iter().filter_map(|name| version_of(name)).max()
    }

    fn object(&self) -> String {
        match self.names.first() {
            Some(name) => format!("{name} ({})", self.artifact.digest),
            None => self.artifact.digest.to_string(),
        }
    }
}

/// Returns the version that a name claims.
fn version_of(name: &str) -> Option<u64> {
    name.strip_prefix(SYSTEM_PREFIX)?.parse().ok()
}

fn look<T>(
    from: &dyn Transport,
    name: Option<&str>,
    judge: &mut dyn FnMut(&mut Offer) -> Result<T, DeployError>,
) -> Result<FoundSystem<T>, DeployError> {
    if name.is_none() && from.is_remote() {
        return look_by_tags(from, judge);
    }
    let wanted = name.map(full_name);
    let candidates = candidates(from, wanted.as_deref())?;
    if candidates.is_empty() {
        return Err(match wanted {
            Some(name) => {
                TransportError::NameMissing { location: from.location(), name, available: Vec::new() }.into()
            }
            None => DeployError::NotASystem {
                object: from.location(),
                why: format!("it has no name that begins with {SYSTEM_PREFIX} and ends in a version"),
            },
        });
    }
    let mut best: Option<(u64, T)> = None;
    let mut passed_over = Vec::new();
    let mut first = None;
    let (mut bytes, mut more) = (0_u64, LOOK_ON);
    for candidate in candidates.iter().take(MAX_SYSTEMS) {
        if bytes > MAX_BYTES || (best.is_some() && more == 0) {
            log::warn!("{}: it lists more systems than are looked at", from.location());
            break;
        }
        if best.is_some() {
            more -= 1;
        }
        let outcome = (|| {
            let mut offer = Offer::read(from, candidate)?;
            bytes = bytes.saturating_add(offer.manifest.len() as u64);
            let manifest = SystemManifest::parse(&offer.manifest).map_err(|error| DeployError::NotASystem {
                object: candidate.object(),
                why: error.to_string(),
            });
            // The judge refuses signed but unusable systems; what cannot be a system is detected here.
            let version = match &manifest {
                Ok(manifest) => Some(manifest.version),
                Err(_) => None,
            };
            if best.as_ref().is_some_and(|(best, _)| version.is_none_or(|version| version <= *best)) {
                return match manifest {
                    Ok(_) => Ok(None),
                    Err(error) => Err(error),
                };
            }
            offer.check_name(wanted.as_deref(), version)?;
            let taken = judge(&mut offer)?;
            Ok(Some((manifest?.version, taken)))
        })();
        match outcome {
            Ok(None) => {}
            Ok(Some(taken)) => {
                if candidate.claim().is_some_and(|claim| claim != taken.0) {
                    let why = format!("it is version {}, whatever its name says", taken.0);
                    passed_over.push(SkippedSystem { object: candidate.object(), why });
                }
                best = Some(taken);
            }
            Err(error) => {
                passed_over.push(SkippedSystem { object: candidate.object(), why: error.to_string() });
                first = first.or(Some(error));
            }
        }
    }
    match (best, first) {
        (Some((_, taken)), _) => Ok(FoundSystem { taken, passed_over }),
        (None, Some(error)) => Err(error),
        // Every candidate ended in one of the two.
        (None, None) => Err(DeployError::NotASystem {
            object: from.location(),
            why: "none of the systems that it lists can be read".into(),
        }),
    }
}

/// The same for a registry, whose systems are listed by their tags: the highest version is looked at first,
/// and the first one that verifies is taken. Its tag must be true: a registry that plants names could
/// as well leave some out, and all of them would have to be fetched to find out.
fn look_by_tags<T>(
    from: &dyn Transport,
    judge: &mut dyn FnMut(&mut Offer) -> Result<T, DeployError>,
) -> Result<FoundSystem<T>, DeployError> {
    let mut versions: Vec<u64> =
        from.tags(SYSTEM_REPOSITORY)?.iter().filter_map(|tag| tag.parse().ok()).collect();
    sorting::sort_by(&mut versions, |one, other| other.cmp(one));
    versions.dedup();
    let mut passed_over = Vec::new();
    let mut first = None;
    for version in versions.into_iter().take(LOOK_ON) {
        match look(from, Some(&version.to_string()), judge) {
            Ok(FoundSystem { taken, passed_over: more }) => {
                passed_over.extend(more);
                return Ok(FoundSystem { taken, passed_over });
            }
            // The next one would fail as well, and an older system is not what was asked for.
            Err(DeployError::Transport(error)) if error.is_temporary() => return Err(error.into()),
            Err(error) => {
                passed_over.push(SkippedSystem { object: version_name(version), why: error.to_string() });
                first = first.or(Some(error));
            }
        }
    }
    Err(first.unwrap_or_else(|| DeployError::NotASystem {
        object: from.location(),
        why: format!("it has no repository {SYSTEM_REPOSITORY} with a tag that is a version"),
    }))
}

/// Returns the full name for the user's input.
pub(super) fn full_name(name: &str) -> String {
    match name.strip_prefix("sha256:") {
        _ if name.starts_with(SYSTEM_PREFIX) => name.to_string(),
        Some(hex) => format!("{SYSTEM_PREFIX}sha256/{hex}"),
        None => format!("{SYSTEM_PREFIX}{name}"),
    }
}

/// Returns the systems that a source lists, those with the highest names first.
fn candidates(from: &dyn Transport, wanted: Option<&str>) -> Result<Vec<Candidate>, DeployError> {
    let entries = match wanted {
        Some(name) => from.lookup(name)?,
        None => from.entries()?,
    };
    let mut found: BTreeMap<Digest, Candidate> = BTreeMap::new();
    for entry in entries {
        let name = match (entry.ref_name(), wanted) {
            (_, Some(wanted)) => Some(wanted.to_string()),
            (Some(name), None) if name.starts_with(SYSTEM_PREFIX) => Some(name.to_string()),
            // A system that has lost its name to another.
            (_, None) if entry.artifact_type.as_deref() == Some(SYSTEM_MEDIA_TYPE) => None,
            _ => continue,
        };
        let candidate = found
            .entry(entry.digest)
            .or_insert_with(|| Candidate { artifact: entry.clone(), names: Vec::new() });
        candidate.names.extend(name);
    }
    let mut all: Vec<Candidate> = found.into_values().collect();
    for candidate in &mut all {
        // The version first: it is the name that people know.
        sorting::sort_by_key(&mut candidate.names, |name| {
            (std::cmp::Reverse(version_of(name)), name.clone())
        });
    }
    sorting::sort_by_key(&mut all, |candidate| std::cmp::Reverse(candidate.claim()));
    Ok(all)
}

/// Returns the only layer of an artifact.
fn content(from: &dyn Transport, artifact: &Descriptor, max: u64) -> Result<Vec<u8>, DeployError> {
    let manifest = from.manifest(artifact)?;
    let [layer] = manifest.layers.as_slice() else {
        return Err(DeployError::NotASystem {
            object: artifact.digest.to_string(),
            why: format!("the artifact has {} layers, expected 1", manifest.layers.len()),
        });
    };
    Ok(from.fetch(layer, max)?)
}

impl Offer {
    fn read(from: &dyn Transport, candidate: &Candidate) -> Result<Self, DeployError> {
        // A registry keeps a system's own blobs in a repository of their own.
        let place = from.within(SYSTEM_REPOSITORY)?;
        let manifest = content(place.as_ref(), &candidate.artifact, MAX_SYSTEM)?;
        Ok(Self {
            artifact: candidate.artifact.clone(),
            names: candidate.names.clone(),
            manifest,
            signatures: Vec::new(),
            certificates: Vec::new(),
            floor_signatures: Vec::new(),
        })
    }

    /// Returns an offer of a local manifest, such as one in a deployment's folder.
    pub fn of(artifact: Descriptor, manifest: Vec<u8>) -> Self {
        Self {
            artifact,
            names: Vec::new(),
            manifest,
            signatures: Vec::new(),
            certificates: Vec::new(),
            floor_signatures: Vec::new(),
        }
    }

    /// Adds the content of a deployment's folder; missing parts are skipped.
    pub fn add_files(
        &mut self,
        signature: Option<Vec<u8>>,
        certificate: Option<Vec<u8>>,
        floor_signature: Option<Vec<u8>>,
    ) {
        let part = |content| Part { artifact: None, content };
        self.signatures.extend(signature.map(part));
        self.certificates.extend(certificate.map(part));
        self.floor_signatures.extend(floor_signature.map(part));
    }

    /// Fetches signatures, certificates and floor signatures. An unreadable one does not hide others.
    ///
    /// # Errors
    /// If the source cannot list them.
    pub fn fetch_parts(&mut self, from: &dyn Transport) -> Result<(), DeployError> {
        let place = from.within(SYSTEM_REPOSITORY)?;
        let from = place.as_ref();
        let of_type = |artifact_type: &str| -> Result<Vec<Part>, DeployError> {
            let mut found = from.referrers(&self.artifact.digest, Some(artifact_type))?;
            sorting::sort_by_key(&mut found, |one| one.digest);
            found.dedup_by_key(|one| one.digest);
            if found.len() > MAX_ALTERNATIVES {
                log::warn!(
                    "{}: only {MAX_ALTERNATIVES} of {} {artifact_type} are looked at",
                    from.location(),
                    found.len()
                );
                found.truncate(MAX_ALTERNATIVES);
            }
            let mut parts = Vec::new();
            for artifact in found {
                match content(from, &artifact, MAX_SMALL) {
                    Ok(content) => parts.push(Part { artifact: Some(artifact), content }),
                    Err(error) => log::warn!("{} is passed over: {error}", artifact.digest),
                }
            }
            Ok(parts)
        };
        let (signatures, certificates) = (of_type(SIGNATURE_TYPE)?, of_type(CERTIFICATE_TYPE)?);
        let floor_signatures = of_type(FLOOR_SIGNATURE_TYPE)?;
        self.signatures.extend(signatures);
        self.certificates.extend(certificates);
        self.floor_signatures.extend(floor_signatures);
        Ok(())
    }

    /// The digest of the offered system manifest's bytes.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// Rule: a name given by the user must match the system: `VERSION`, or the manifest's digest.
    fn check_name(&self, wanted: Option<&str>, version: Option<u64>) -> Result<(), DeployError> {
        let Some(name) = wanted else { return Ok(()) };
        let digest = name.strip_prefix(SYSTEM_PREFIX).and_then(|name| name.strip_prefix("sha256/"));
        let wrong = match (version_of(name), digest) {
            (Some(claim), _) => version.is_some_and(|version| version != claim),
            (None, Some(hex)) => hex != self.digest().hex(),
            (None, None) => false,
        };
        if wrong {
            let found =
                version.map_or_else(|| "no version".to_string(), |version| format!("version {version}"));
            return Err(DeployError::OtherThanNamed {
                name: name.to_string(),
                found: format!("{found}, {}", self.digest()),
            });
        }
        Ok(())
    }

    /// Verifies signature, certificate and product; of several signatures a valid one is used, and of several
    /// floor signatures one that is valid on this device.
    ///
    /// # Errors
    /// [`DeployError::NotSigned`], and [`DeployError::Trust`] if no signature and certificate are valid.
    pub fn verify(&self, judge: &Judge<'_>) -> Result<Accepted, DeployError> {
        let contents = |parts: &[Part]| parts.iter().map(|part| part.content.clone()).collect::<Vec<_>>();
        let (signatures, certificates) = (contents(&self.signatures), contents(&self.certificates));
        let missing = |missing| DeployError::NotSigned { digest: self.digest(), missing };
        if signatures.is_empty() {
            return Err(missing("signature"));
        }
        // The version is in the signed bytes: if these do not parse, no signature helps.
        let version = SystemManifest::parse(&self.manifest).ok().map(|manifest| manifest.version);
        let floor = self.floor_signature(judge.policy, version);
        let floor_bytes = floor.map(|part| part.content.clone());
        let found =
            verify_any(&self.manifest, &signatures, &certificates, floor_bytes, judge.anchor, judge.dates)?;
        let (verified, ChosenPair { signature, certificate }) =
            found.ok_or_else(|| missing("certificate"))?;
        let used = [self.signatures.get(signature), self.certificates.get(certificate), floor];
        let referrers = used.into_iter().flatten().filter_map(|part| part.artifact.clone()).collect();
        if let Some(label) = certificates.get(certificate).and_then(|pem| crate::trust::pem::private_key(pem))
        {
            log::warn!(
                "the published certificate holds a private key ({label}): anybody can sign for this product"
            );
        }
        Ok(Accepted { artifact: self.artifact.clone(), referrers, verified })
    }

    /// Returns a valid floor signature, else the first one, so that its error can be reported.
    fn floor_signature(&self, policy: Option<&Policy>, version: Option<u64>) -> Option<&Part> {
        let holds = |part: &&Part| match (policy, version) {
            (Some(policy), Some(version)) => floor::check_signature(policy, version, &part.content).is_ok(),
            _ => part.content.len() == std::mem::size_of::<p256::Signature>(),
        };
        self.floor_signatures.iter().find(holds).or_else(|| self.floor_signatures.first())
    }
}

impl std::fmt::Debug for Offer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offer").field("artifact", &self.artifact.digest).field("names", &self.names).finish()
    }
}
