//! Builds a signed system in a store from an import manifest: the publisher's side.
//!
//! ```text
//! find every image, check every pin ─> store every image ─> system manifest ─> sign ─> names
//! ```
//!
//! Everything that can be refused without fetching is refused first: key and certificate, pins, sources,
//! kinds of layers. The names are set in one step at the end, after everything that they reach, so a store
//! has a system whole or not at all. An interrupted build leaves blobs, which the next one uses or `mosfs gc`
//! removes.
//!
//! A version stands for one system: if `mos/system/system:VERSION` already is another one, the build is
//! refused. Building the same system again produces the same digest and replaces its signature, certificate
//! and floor signature: that is how a system gets a renewed certificate.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::boot::{self, BootTargetError};
use super::kernels::{self, KernelsError};
use crate::convert::image::{check_layers, ingest};
use crate::convert::job::{Ingest, IngestError, Ingested, Storage};
use crate::convert::reuse::{Known, Made};
use crate::convert::{Codec, Effort, ImageKind, PackingError};
use crate::digest::Digest;
use crate::error::{Class, Classified};
use crate::floor::{self, FloorError};
use crate::image::boot as boot_image;
use crate::image::oci::{Descriptor, MANIFEST, OciImage, Platform};
use crate::manifest::import::Resolved;
use crate::manifest::{
    ImageType, ImageUrl, ImportErrors, ImportManifest, ImportTarget, LayerCompression, LayerKind, Network,
    SYSTEM_MEDIA_TYPE, ServiceType, StorageType, SystemManifest, Target, TargetName,
};
use crate::progress::Progress;
use crate::store::{Store, StoreError, Writer, image_name, system_name, version_name};
use crate::sys::failpoint;
use crate::transport::{Access, SourceRef, Transport, TransportError};
use crate::trust::p256::P256PrivateKey;
use crate::trust::{
    CERTIFICATE_TYPE, Dates, FLOOR_SIGNATURE_TYPE, SIGNATURE_TYPE, SignError, Signed, SigningKey,
};

/// Who signs.
pub struct Signer<'a> {
    /// The private key.
    pub key: &'a SigningKey,
    /// Its certificate in PEM, with the intermediates up to the CA.
    pub certificate: &'a [u8],
    /// When the certificate must be valid.
    pub dates: Dates,
    /// The keys that sign the version for the devices' floor; two while one replaces the other.
    pub floor_keys: &'a [P256PrivateKey],
}

/// A built system.
#[derive(Debug)]
pub struct Built {
    /// SHA-256 of the system manifest.
    pub digest: Digest,
    /// The system manifest.
    pub manifest: SystemManifest,
    /// The targets, each with whether its image is the source's own, and what a conversion
    /// changed or dropped.
    pub targets: BTreeMap<TargetName, BuiltTarget>,
}

/// A target of a built system.
#[derive(Debug)]
pub struct BuiltTarget {
    /// Whether manifest and layers are the source's, unchanged.
    pub untouched: bool,
    /// What a conversion changed or dropped, as text.
    pub notes: Vec<String>,
}

/// Where images come from, for what machines, and whether a kernel is made of them.
#[derive(Debug, Clone, Copy)]
pub struct Sources<'a> {
    /// How registries are reached.
    pub access: &'a Access,
    /// Of images for several platforms this one is taken.
    pub platform: &'a Platform,
    /// The target `boot`, if the system is to have its own kernel.
    pub boot: Option<&'a boot::Spec>,
}

/// An image that was found.
struct FoundImage {
    from: Box<dyn Transport>,
    descriptor: Descriptor,
    image: OciImage,
}

/// Builds a system. Of images for several platforms that of `sources` is taken.
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
/// use mosfs::{
///     Access, BuildSources, Dates, Effort, ImportManifest, Packing, Platform, Progress, Signer, SigningKey, Store,
///     build,
/// };
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let example = Example::publish()?;
/// # let (store, keys) = (&example.store, &example.keys);
/// # let yaml = format!(
/// #     "version: 8\nproduct: {}\ntargets:\n  web:\n    url: oci:{}:web\n    version: 1.2.0\n    \
/// #      service_type: container\n    network: {{type: host}}\n",
/// #     example.product,
/// #     example.folder.path().join("images").display()
/// # );
/// let import = ImportManifest::parse("import.yaml".as_ref(), yaml.as_bytes())?;
/// let signer = Signer {
///     key: &SigningKey::load(&keys.join("signer.key"))?,
///     certificate: &std::fs::read(keys.join("signer.pem"))?,
///     dates: Dates::check_now(),
///     floor_keys: &[],
/// };
/// let effort = Effort { threads: std::thread::available_parallelism()?, packing: Packing::default() };
/// let sources = BuildSources { access: &Access::default(), platform: &Platform::this_machine(), boot: None };
/// let built = build(&import, store, &signer, effort, &sources, &Progress::silent())?;
///
/// let image = store.image(&built.manifest.targets["web"].digest)?;
/// assert_eq!(image.layers[0].format()?.name(), "squashfs");
/// # Ok(())
/// # }
/// ```
///
///
/// # Errors
/// See [`BuildError`]. The store has no new name then.
pub fn build(
    import: &ImportManifest,
    store: &Store,
    signer: &Signer<'_>,
    effort: Effort,
    sources: &Sources<'_>,
    progress: &Progress,
) -> Result<Built, BuildError> {
    let trial = |manifest: &SystemManifest| {
        let signed = Signed::create(manifest, signer.key, signer.certificate, signer.dates)?;
        if let Some(spec) = sources.boot {
            // A kernel that does not trust this system's signer would never start it.
            signed.verify(&spec.anchor, signer.dates)?;
        }
        Ok(())
    };
    let writer = store.writer()?;
    let assembled = assemble(import, &writer, trial, effort, sources, progress)?;
    let manifest = &assembled.manifest;
    let signed = Signed::create(manifest, signer.key, signer.certificate, signer.dates)?;
    let mut floor_signatures = Vec::new();
    for key in signer.floor_keys {
        floor_signatures.push(floor::sign_version(key, &manifest.product, manifest.version)?.to_vec());
    }
    publish(&writer, manifest, assembled.names, &signed, &floor_signatures)?;
    Ok(Built { digest: manifest.digest(), manifest: assembled.manifest, targets: assembled.targets })
}

/// Refuses an import manifest that asks for an install medium where none is to be written. One that was asked for and
/// silently not made would be missed on the day of the installation.
///
/// # Errors
/// [`BuildError::NoMedium`].
pub fn check_medium(import: &ImportManifest, is_written: bool) -> Result<(), BuildError> {
    match import.image_type {
        Some(ImageType::Iso) if !is_written => Err(BuildError::NoMedium { file: import.file.clone() }),
        _ => Ok(()),
    }
}

/// Refuses an IPv6 address of a container: no device would run it.
///
/// # Errors
/// [`BuildError::NoIpv6`].
pub fn refuse_ipv6(import: &ImportManifest) -> Result<(), BuildError> {
    let has_ipv6 = |target: &ImportTarget| {
        target.service_type == ServiceType::Container
            && matches!(&target.network, Network::Simple { ipv6: Some(address), .. } if !address.is_empty())
    };
    match import.targets.iter().find(|(_, target)| has_ipv6(target)) {
        Some((target, _)) => Err(BuildError::NoIpv6 { file: import.file.clone(), target: target.clone() }),
        None => Ok(()),
    }
}

/// A system whose images are in the store, not yet signed.
pub(super) struct Assembled {
    pub(super) manifest: SystemManifest,
    /// The images, with their future names.
    pub(super) names: Vec<(String, Descriptor)>,
    pub(super) targets: BTreeMap<TargetName, BuiltTarget>,
}

/// Finds, converts and stores the images of an import manifest.
///
/// `trial` receives the manifest with the sources' digests before anything is fetched.
pub(super) fn assemble(
    import: &ImportManifest,
    writer: &Writer<'_>,
    trial: impl FnOnce(&SystemManifest) -> Result<(), SignError>,
    effort: Effort,
    sources: &Sources<'_>,
    progress: &Progress,
) -> Result<Assembled, BuildError> {
    let storage = match import.storage_type() {
        StorageType::Atomfs => Storage::Atomfs,
        StorageType::Puzzlefs => Storage::Puzzlefs,
    };
    if sources.boot.is_some() {
        if import.targets.keys().any(|name| name.as_str() == boot_image::TARGET) {
            return Err(BootTargetError::Taken.into());
        }
        if !import.targets.values().any(|target| target.service_type == ServiceType::Hostfs) {
            return Err(BootTargetError::NoHostfs.into());
        }
    }
    let mut found = BTreeMap::new();
    let mut resolved = BTreeMap::new();
    for (name, target) in &import.targets {
        let (image, source) = find(import, name, target, sources)?;
        resolved.insert(name.clone(), source);
        found.insert(name.clone(), image);
    }
    // A trial with the sources' digests: refuses an unsuitable key, certificate, product or date.
    trial(&import.to_system(&resolved)?)?;

    let mut targets = BTreeMap::new();
    let mut names = Vec::new();
    // Targets may have the same image, and images the same layers.
    let whole: Known<_, Ingested> = Known::default();
    let made = Made::of(found.values().map(|found| &found.image));
    for (name, image) in &found {
        let effort = effort_for(import.targets.get(name), effort)
            .map_err(|source| BuildError::Packing { target: name.clone(), source })?;
        let key = (image.descriptor.digest, effort.packing);
        let done = whole.get_or_make(key, |_| {
            let (from, platform, made) = (&*image.from, sources.platform, &made);
            let job = Ingest { from, writer, platform, effort, storage, made, progress };
            ingest(&job, &image.descriptor)
                .map_err(|source| BuildError::Image { target: name.clone(), source })
        })?;
        failpoint::hit("build.image.stored");
        resolved.insert(name.clone(), Resolved { digest: done.manifest.digest, size: done.manifest.size });
        names.push((image_name(name.as_str(), &done.manifest.digest), done.manifest));
        targets.insert(name.clone(), BuiltTarget { untouched: done.untouched, notes: done.notes });
    }

    let mut manifest = import.to_system(&resolved)?;
    if let Some(spec) = sources.boot {
        let (name, target, built) = boot_target(&manifest, writer, spec, effort, progress)?;
        names.push((
            image_name(name.as_str(), &target.digest),
            Descriptor::new(MANIFEST, target.digest, target.size),
        ));
        manifest.targets.insert(name.clone(), target);
        targets.insert(name, built);
    }
    for (name, note) in kernels::notes(writer.store(), &manifest)? {
        if let Some(target) = targets.get_mut(&name) {
            target.notes.push(note);
        }
    }
    Ok(Assembled { manifest, names, targets })
}

/// Makes the target `boot` out of the hostfs of a system, whose images are in the store.
fn boot_target(
    manifest: &SystemManifest,
    writer: &Writer<'_>,
    spec: &boot::Spec,
    effort: Effort,
    progress: &Progress,
) -> Result<(TargetName, Target, BuiltTarget), BootTargetError> {
    let hostfs = manifest.targets.values().find(|target| target.service_type == ServiceType::Hostfs);
    let hostfs = hostfs.ok_or(BootTargetError::NoHostfs)?;
    let store = writer.store();
    let files = store.files(&store.image(&hostfs.digest)?)?;
    let programs = boot::programs(&files, spec)?;
    let stored = boot::store(writer, programs, spec.signer.as_ref(), effort, progress)?;
    let target = Target {
        digest: stored.manifest.digest,
        size: stored.manifest.size,
        version: stored.release.clone(),
        service_type: ServiceType::FsOnly,
        network: Network::None,
        nsgroup: None,
        mounts: None,
        workload: Default::default(),
    };
    let signed = match (&spec.signer, stored.reused) {
        (None, _) => "not signed for Secure Boot",
        (Some(_), false) => "signed for Secure Boot",
        (Some(_), true) => "signed for Secure Boot by an earlier build",
    };
    let notes = vec![format!("Linux {}, kernel id {}, {signed}", stored.release, stored.kernel_id)];
    let name = boot_image::TARGET.parse().expect("an allowed name");
    Ok((name, target, BuiltTarget { untouched: false, notes }))
}

/// How the layers of a target are made: as its import manifest says, and otherwise as `effort` does.
fn effort_for(target: Option<&ImportTarget>, effort: Effort) -> Result<Effort, PackingError> {
    let Some(choice) = target.and_then(|target| target.layer) else { return Ok(effort) };
    let codec = choice.compression.map(|compression| match compression {
        LayerCompression::Zstd => Codec::Zstd,
        LayerCompression::Lz4 => Codec::Lz4,
    });
    let kind = choice.format.map(|format| match format {
        LayerKind::Squashfs => ImageKind::Squashfs,
        LayerKind::Erofs => ImageKind::Erofs,
    });
    Ok(Effort { packing: effort.packing.with(kind, codec, choice.block_bytes)?, ..effort })
}

/// Stores a signed system and names it, in one step. Its images are already in the store.
pub(super) fn publish(
    writer: &Writer<'_>,
    manifest: &SystemManifest,
    mut names: Vec<(String, Descriptor)>,
    signed: &Signed,
    floor_signatures: &[Vec<u8>],
) -> Result<(), BuildError> {
    let store = writer.store();
    let digest = manifest.digest();
    let artifact = writer.put_artifact(SYSTEM_MEDIA_TYPE, &signed.manifest, None)?;
    refuse_other(store, manifest.version, &artifact)?;
    let mut referrers = vec![
        writer.put_artifact(SIGNATURE_TYPE, &signed.signature, Some(&artifact))?,
        writer.put_artifact(CERTIFICATE_TYPE, &signed.certificate, Some(&artifact))?,
    ];
    for signature in floor_signatures {
        referrers.push(writer.put_artifact(FLOOR_SIGNATURE_TYPE, signature, Some(&artifact))?);
    }
    names.push((system_name(&digest), artifact.clone()));
    names.push((version_name(manifest.version), artifact.clone()));

    let mut replaced = Vec::new();
    for kind in [SIGNATURE_TYPE, CERTIFICATE_TYPE, FLOOR_SIGNATURE_TYPE] {
        replaced.extend(store.referrers(&artifact.digest, Some(kind))?.iter().map(|old| old.digest));
    }
    let entries: Vec<_> = names
        .iter()
        .map(|(name, entry)| (Some(name.as_str()), entry))
        .chain(referrers.iter().map(|entry| (None, entry)))
        .collect();
    failpoint::hit("build.system.signed");
    // Another build may have used the version meanwhile: it is checked again under the index's lock.
    writer.replace_entries(&replaced, &entries, &[&version_name(manifest.version)])?;
    failpoint::hit("build.system.named");
    Ok(())
}

/// Finds a target's image, and checks everything that does not need its blobs.
fn find(
    import: &ImportManifest,
    name: &TargetName,
    target: &ImportTarget,
    sources: &Sources<'_>,
) -> Result<(FoundImage, Resolved), BuildError> {
    let wrong = |source| BuildError::Source { target: name.clone(), url: target.url.to_string(), source };
    let source = source_of(&target.url).map_err(wrong)?;
    let from = source.open(sources.access).map_err(wrong)?;
    let descriptor = from.find_image(source.name.as_deref(), sources.platform).map_err(wrong)?;
    let resolved = Resolved { digest: descriptor.digest, size: descriptor.size };
    import.check_pins(name, &resolved)?;
    let image = from.image(&descriptor).map_err(wrong)?;
    check_layers(&image).map_err(|source| BuildError::Image { target: name.clone(), source })?;
    Ok((FoundImage { from, descriptor, image }, resolved))
}

/// Returns the place that a URL of an import manifest names.
fn source_of(url: &ImageUrl) -> Result<SourceRef, TransportError> {
    match url {
        ImageUrl::Oci { path, reference } => Ok(SourceRef::oci(Path::new(path), reference.as_deref())),
        ImageUrl::Docker { .. } => url.to_string().parse(),
    }
}

/// Refuses to assign a version to a second system.
fn refuse_other(store: &Store, version: u64, artifact: &Descriptor) -> Result<(), BuildError> {
    let name = version_name(version);
    match store.resolve(&name) {
        Ok(old) if old.digest != artifact.digest => {
            Err(BuildError::VersionTaken { version, found: old.digest, expected: artifact.digest })
        }
        Ok(_) | Err(StoreError::Transport(TransportError::NameMissing { .. })) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Why a system cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The import manifest, or a pin in it, is wrong.
    #[error(transparent)]
    Import(#[from] ImportErrors),
    /// The import manifest asks for an install medium, and nobody said where to write it.
    #[error("{}: image_type: `iso` requires an install medium, and there is no file to write it to", file.display())]
    NoMedium {
        /// The import manifest.
        file: PathBuf,
    },
    /// A container has an IPv6 address.
    #[error(
        "{}: target `{target}`: `ipv6` of network simple, which containers do not support yet",
        file.display()
    )]
    NoIpv6 {
        /// The import manifest.
        file: PathBuf,
        /// The target.
        target: TargetName,
    },
    /// A target's image cannot be fetched.
    #[error("target `{target}`, {url}: {source}")]
    Source {
        /// The target.
        target: TargetName,
        /// Where its image should be.
        url: String,
        /// Why it cannot be fetched.
        source: TransportError,
    },
    /// The target `boot` cannot be made.
    #[error("target `boot`: {0}")]
    Boot(#[from] BootTargetError),
    /// A target's image cannot be stored.
    #[error("target `{target}`: {source}")]
    Image {
        /// The target.
        target: TargetName,
        /// Why.
        source: IngestError,
    },
    /// A target's layers cannot be packed in this way.
    #[error("target `{target}`: {source}")]
    Packing {
        /// The target.
        target: TargetName,
        /// Why.
        source: PackingError,
    },
    /// The kernels of the system cannot be looked at.
    #[error(transparent)]
    Kernels(#[from] KernelsError),
    /// The key or the certificate is unusable.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// A floor signature made elsewhere is invalid.
    #[error("{}: {source}", path.display())]
    FloorSignature {
        /// The file.
        path: PathBuf,
        /// Why.
        source: FloorError,
    },
    /// An image of a system manifest is not in the store: the first half of the build used another store.
    #[error("target `{target}`: {digest} is not in the store {}", store.display())]
    NotInStore {
        /// The target.
        target: TargetName,
        /// The blob.
        digest: Digest,
        /// The store.
        store: PathBuf,
    },
    /// The floor key is unusable.
    #[error(transparent)]
    Floor(#[from] FloorError),
    /// A version stands for one system.
    #[error(
        "version {version} is another system in this store already: its manifest is {found}, the new one's {expected}"
    )]
    VersionTaken {
        /// The version.
        version: u64,
        /// Digest of the OCI manifest of the existing system.
        found: Digest,
        /// Digest of the OCI manifest of the new system.
        expected: Digest,
    },
    /// The store failed or refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Classified for BuildError {
    fn class(&self) -> Class {
        match self {
            Self::Import(error) => error.class(),
            Self::NoMedium { .. }
            | Self::NoIpv6 { .. }
            | Self::VersionTaken { .. }
            | Self::NotInStore { .. } => Class::Input,
            Self::FloorSignature { .. } => Class::Verification,
            Self::Boot(error) => error.class(),
            Self::Source { source, .. } => source.class(),
            Self::Image { source, .. } => source.class(),
            Self::Packing { source, .. } => source.class(),
            Self::Kernels(error) => error.class(),
            Self::Sign(error) => error.class(),
            Self::Floor(error) => error.class(),
            Self::Store(error) => error.class(),
        }
    }
}
