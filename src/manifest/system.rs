//! The system manifest: what is signed and what runs (docs/design.md, canonical form).
//!
//! ```text
//! {"mediatype":"application/vnd.mos.system.manifest.v1","product":UUID,
//!  "targets":{NAME:{"digest":…,"mounts":[…],"network":{…},"nsgroup":…,"service_type":…,"size":…,"version":…},…},
//!  "version":N}
//! ```
//!
//! It is one line of reproducible JSON ([`super::json`]). `mounts` and `nsgroup` are optional. Its bytes are
//! its identity: a reader accepts only the canonical form.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::decode::{Decoder, Dialect, Path, Problem, service_tree};
use super::tree::{Entry, Node, Position, Value};
use super::{Mount, Network, SYSTEM_MEDIA_TYPE, ServiceType, TargetName, Workload, json, rules, workload};
use crate::digest::Digest;
use crate::error::{Class, Classified};

/// The manifest of a system that runs on devices.
///
/// ```
/// use mosfs::SystemManifest;
///
/// let json = br#"{
///     "mediatype": "application/vnd.mos.system.manifest.v1",
///     "product": "de6c82c5-2e01-4c92-949b-a6545d30fc06",
///     "targets": {"web": {
///         "digest": "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
///         "network": {"type": "host"}, "service_type": "container", "size": 3, "version": "1.2.0"
///     }},
///     "version": 7
/// }"#;
/// let manifest = SystemManifest::parse_loose(json)?;
/// assert_eq!(manifest.targets["web"].version, "1.2.0");
///
/// // What is signed and run has one form only.
/// assert!(SystemManifest::parse(json).is_err());
/// assert_eq!(SystemManifest::parse(&manifest.canonical())?, manifest);
/// # Ok::<(), mosfs::SystemError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemManifest {
    /// The version of the whole system, 1 to 2^53-1.
    pub version: u64,
    /// The product that the system is for.
    pub product: Uuid,
    /// The targets by name; at least one.
    pub targets: BTreeMap<TargetName, Target>,
}

/// One target of a system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Digest of the OCI manifest of its image.
    pub digest: Digest,
    /// Size of that manifest in bytes.
    pub size: u64,
    /// Its version.
    pub version: String,
    /// How it is used.
    pub service_type: ServiceType,
    /// Its network.
    pub network: Network,
    /// The group of targets whose ids are mapped alike.
    pub nsgroup: Option<String>,
    /// Mounts inside it.
    pub mounts: Option<Vec<Mount>>,
    /// What a container runs, and how it is kept running.
    pub workload: Workload,
}

/// Why bytes are not a system manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SystemError {
    /// Not JSON, or JSON outside of the reproducible subset.
    #[error("the system manifest is not reproducible JSON at byte {}: {_0}", _0.at.offset)]
    Json(Problem),
    /// Fields that are missing, unknown or wrong.
    #[error("the system manifest is wrong at {}", list(_0))]
    Fields(Vec<Problem>),
    /// A correct manifest that is not in canonical form.
    #[error("the system manifest is not in canonical form at byte {}: found {found}, expected {expected}", at.offset)]
    NotCanonical {
        /// The first byte that differs.
        at: Position,
        /// What was found there.
        found: String,
        /// What was expected there.
        expected: String,
    },
}

fn list(problems: &[Problem]) -> String {
    let one = |problem: &Problem| format!("byte {}: {problem}", problem.at.offset);
    problems.iter().map(one).collect::<Vec<_>>().join("; at ")
}

impl Classified for SystemError {
    fn class(&self) -> Class {
        Class::Input
    }
}

const FIELDS: &[&str] = &["mediatype", "product", "targets", "version"];
const TARGET_FIELDS: &[&str] = &["digest", "mounts", "network", "nsgroup", "service_type", "size", "version"];

impl SystemManifest {
    /// Parses a manifest from its signed bytes. Call it on verified bytes ([`crate::trust::Signed::verify`])
    /// unless the manifest is only displayed.
    ///
    /// # Errors
    /// [`SystemError`] for anything but the canonical form of a correct manifest.
    pub fn parse(bytes: &[u8]) -> Result<Self, SystemError> {
        let manifest = Self::parse_loose(bytes)?;
        // Rule (docs/design.md, canonical form): the bytes are the canonical form of what was parsed.
        let canonical = manifest.canonical();
        if canonical != bytes {
            let same = canonical.iter().zip(bytes).take_while(|(a, b)| a == b).count();
            let rest = |bytes: &[u8]| match bytes.get(same..) {
                None | Some([]) => "the end".to_string(),
                Some(rest) => format!("`{}`", rest[..rest.len().min(24)].escape_ascii()),
            };
            let (found, expected) = (rest(bytes), rest(&canonical));
            return Err(SystemError::NotCanonical { at: Position::of_byte(bytes, same), found, expected });
        }
        Ok(manifest)
    }

    /// Parses a manifest in any JSON form, such as one formatted for people. Never use it for a manifest that
    /// is verified or run.
    ///
    /// # Errors
    /// [`SystemError::Json`] and [`SystemError::Fields`].
    pub fn parse_loose(bytes: &[u8]) -> Result<Self, SystemError> {
        let root = json::read(bytes).map_err(SystemError::Json)?;
        let mut decoder = Decoder::new(Dialect::Json);
        let manifest = decode(&mut decoder, &root);
        let problems = decoder.into_problems();
        match manifest {
            Some(manifest) if problems.is_empty() => Ok(manifest),
            _ => Err(SystemError::Fields(problems)),
        }
    }

    /// Returns the bytes to sign: always the same for the same manifest.
    pub fn canonical(&self) -> Vec<u8> {
        let product = self.product.to_string();
        let digests: Vec<_> = self.targets.values().map(|target| target.digest.to_string()).collect();
        let targets = Value::map(self.targets.iter().zip(&digests).map(|((name, target), digest)| {
            let Target { size, version, service_type, network, nsgroup, mounts, workload, .. } = target;
            let own = [("digest", Some(Value::text(digest))), ("size", Some(Value::integer(*size)))];
            let service = service_tree(version, *service_type, network, nsgroup, mounts, workload);
            (name.as_str(), Some(Value::map(own.into_iter().chain(service))))
        }));
        let root = Value::map([
            ("mediatype", Some(Value::text(SYSTEM_MEDIA_TYPE))),
            ("product", Some(Value::text(&product))),
            ("targets", Some(targets)),
            ("version", Some(Value::integer(self.version))),
        ]);
        json::write(&root.into())
    }

    /// Returns the digest that identifies this system: SHA-256 of the canonical bytes.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.canonical())
    }
}

fn decode(decoder: &mut Decoder, root: &Node<'_>) -> Option<SystemManifest> {
    let path = &Path::ROOT;
    let fields = decoder.fields(root, root.at, path, FIELDS)?;
    let media_type = decoder.required(&fields, path, "mediatype", SYSTEM_MEDIA_TYPE).and_then(|node| {
        let known = |word: &str| (word == SYSTEM_MEDIA_TYPE).then_some(());
        decoder.word(node, &path.field("mediatype"), &[SYSTEM_MEDIA_TYPE], known)
    });
    let product = decoder
        .required(&fields, path, "product", "the UUID of the product")
        .and_then(|node| decoder.text_as(node, &path.field("product"), rules::uuid));
    let targets = decoder
        .required(&fields, path, "targets", "a mapping of target names to targets")
        .and_then(|node| decoder.targets(node, &path.field("targets"), target));
    let version = decoder
        .required(&fields, path, "version", "an integer from 1 to 9007199254740991")
        .and_then(|node| decoder.integer(node, &path.field("version")));
    media_type?;
    Some(SystemManifest { version: version?, product: product?, targets: targets? })
}

fn target(decoder: &mut Decoder, entry: &Entry<'_>, path: &Path<'_>) -> Option<Target> {
    let fields = decoder.fields(&entry.node, entry.at, path, &[TARGET_FIELDS, &workload::FIELDS].concat())?;
    let digest = decoder
        .required(&fields, path, "digest", "the digest of the OCI manifest")
        .and_then(|node| decoder.text_as(node, &path.field("digest"), rules::digest));
    let size = decoder
        .required(&fields, path, "size", "the size of the OCI manifest in bytes")
        .and_then(|node| decoder.integer(node, &path.field("size")));
    let service = decoder.service(&fields, path)?;
    Some(Target {
        digest: digest?,
        size: size?,
        version: service.version,
        service_type: service.service_type,
        network: service.network,
        nsgroup: service.nsgroup,
        mounts: service.mounts,
        workload: service.workload,
    })
}
