//! A build in two halves, for a signer's key in a token or on another machine.
//!
//! ```text
//! prepare   import manifest ─> images in the store, with names ─> what is to be signed
//!           (elsewhere: the signer's key signs that, the floor key signs the version)
//! finish    what was signed + signature + certificate + floor signatures ─> checked ─> the system's names
//! ```
//!
//! The second half refuses what no device would accept: a signature that does not cover these bytes, or a
//! certificate of another product. It accepts the import manifest again, which produces the same bytes, or
//! the exact bytes that the first half wrote, whose images must be in the store.

use std::path::{Path, PathBuf};

use super::build::{Assembled, BuildError, Built, Sources, assemble, publish};
use crate::convert::Effort;
use crate::floor::{self, FloorError, Policy, signature};
use crate::image::oci::{Descriptor, MANIFEST};
use crate::manifest::{ImportManifest, SystemManifest};
use crate::progress::Progress;
use crate::store::{Store, Writer, image_name};
use crate::trust::p256::P256PublicKey;
use crate::trust::{Dates, Signed, signer_for};

/// The first half: stores and names the images, but not the system.
///
/// # Errors
/// As for a whole build, except for the key. The certificate is checked if it is given.
pub fn prepare(
    import: &ImportManifest,
    store: &Store,
    certificate: Option<&[u8]>,
    dates: Dates,
    effort: Effort,
    sources: &Sources<'_>,
    progress: &Progress,
) -> Result<Built, BuildError> {
    let trial = |manifest: &SystemManifest| match certificate {
        Some(certificate) => {
            let signer = signer_for(manifest, certificate, dates)?;
            match sources.boot {
                // A kernel that does not trust this system's signer would never start it.
                Some(spec) => Ok(signer.check_chain(&spec.anchor, dates)?),
                None => Ok(()),
            }
        }
        None => Ok(()),
    };
    let writer = store.writer()?;
    let Assembled { manifest, names, targets } = assemble(import, &writer, trial, effort, sources, progress)?;
    // Named, so that they are not collected as garbage before the second half.
    let entries: Vec<_> = names.iter().map(|(name, image)| (Some(name.as_str()), image)).collect();
    writer.set_entries(&entries)?;
    Ok(Built { digest: manifest.digest(), manifest, targets })
}

/// The signatures made elsewhere.
pub struct ExternalSignatures<'a> {
    /// The signature over what [`prepare`] wrote.
    pub signature: &'a [u8],
    /// The signer's certificate, with the intermediates up to the CA.
    pub certificate: &'a [u8],
    /// When the certificate must be valid.
    pub dates: Dates,
    /// Floor signatures of the version, with their files; raw, or DER as openssl writes it.
    pub floor_signatures: &'a [(PathBuf, Vec<u8>)],
    /// The floor keys that must have made these; none to skip the check.
    pub floor_keys: &'a [P256PublicKey],
}

/// The second half, from the import manifest.
///
/// # Errors
/// As for a whole build; [`crate::trust::SignError::Certificate`] if the signature is not valid.
pub fn finish(
    import: &ImportManifest,
    store: &Store,
    made: &ExternalSignatures<'_>,
    effort: Effort,
    sources: &Sources<'_>,
    progress: &Progress,
) -> Result<Built, BuildError> {
    let writer = store.writer()?;
    let trial = |manifest: &SystemManifest| signer_for(manifest, made.certificate, made.dates).map(|_| ());
    let assembled = assemble(import, &writer, trial, effort, sources, progress)?;
    join(&writer, &assembled.manifest, assembled.names, made)?;
    let Assembled { manifest, targets, .. } = assembled;
    Ok(Built { digest: manifest.digest(), manifest, targets })
}

/// The second half, from the output of the first.
///
/// # Errors
/// The same; [`BuildError::NotInStore`].
pub fn finish_prepared(
    manifest: SystemManifest,
    store: &Store,
    made: &ExternalSignatures<'_>,
) -> Result<Built, BuildError> {
    let writer = store.writer()?;
    let mut names = Vec::new();
    for (target, wanted) in &manifest.targets {
        let missing = |digest| BuildError::NotInStore {
            target: target.clone(),
            digest,
            store: store.dir().to_path_buf(),
        };
        let descriptor = Descriptor::new(MANIFEST, wanted.digest, wanted.size);
        if !store.has(&descriptor) {
            return Err(missing(wanted.digest));
        }
        let image = store.image(&wanted.digest)?;
        let blobs = image.manifest.layers.iter().chain([&image.manifest.config]);
        if let Some(blob) = blobs.into_iter().find(|blob| !store.has(blob)) {
            return Err(missing(blob.digest));
        }
        names.push((image_name(target.as_str(), &wanted.digest), descriptor));
    }
    join(&writer, &manifest, names, made)?;
    Ok(Built { digest: manifest.digest(), manifest, targets: Default::default() })
}

fn join(
    writer: &Writer<'_>,
    manifest: &SystemManifest,
    names: Vec<(String, Descriptor)>,
    made: &ExternalSignatures<'_>,
) -> Result<(), BuildError> {
    let signed = Signed::attach(manifest, made.signature, made.certificate, made.dates)?;
    let mut floor_signatures = Vec::new();
    for (path, bytes) in made.floor_signatures {
        floor_signatures.push(floor_signature(manifest, path, bytes, made.floor_keys)?);
    }
    publish(writer, manifest, names, &signed, &floor_signatures)
}

fn floor_signature(
    manifest: &SystemManifest,
    path: &Path,
    bytes: &[u8],
    keys: &[P256PublicKey],
) -> Result<Vec<u8>, BuildError> {
    let wrong = |source: FloorError| BuildError::FloorSignature { path: path.to_path_buf(), source };
    let (product, version) = (manifest.product, manifest.version);
    let raw = signature::raw_version(product, version, bytes).map_err(wrong)?;
    let holds =
        |key: &P256PublicKey| floor::check_signature(&Policy::new(*key, product), version, &raw).is_ok();
    if !keys.is_empty() && !keys.iter().any(holds) {
        return Err(wrong(FloorError::BadFloorSignature { version, product }));
    }
    Ok(raw.to_vec())
}

/// Returns what the floor key must sign for a system.
///
/// # Errors
/// [`FloorError::VersionRange`], which no system manifest has.
pub fn floor_message(manifest: &SystemManifest, key: &P256PublicKey) -> Result<Vec<u8>, FloorError> {
    signature::version_message(&Policy::new(*key, manifest.product), manifest.version)
}
