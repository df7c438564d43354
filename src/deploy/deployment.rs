//! A deployment's folder: a signed system manifest on a device.
//!
//! ```text
//! SYSTEM/deployments/200-HEX/
//!   manifest.json   the stored bytes that were signed
//!   manifest.sig    detached signature over them
//!   cert.pem        the signer's certificate, then intermediates
//!   floor.sig       the floor key's signature of the version; absent where the publisher made none
//! ```
//!
//! Invariants: a folder appears whole, by rename, and is replaced whole, by exchange, if the signature or
//! certificate changes (a renewed certificate) or is corrupt. Nothing in it is trusted before
//! [`Signed::verify`] has passed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::System;
use super::error::DeployError;
use super::id::DeploymentId;
use crate::error::{IoContext, IoError};
use crate::floor::{self, Policy};
use crate::sorting;
use crate::sys::atomic;
use crate::sys::failpoint;
use crate::sys::file::{self, Links};
use crate::trust::{Anchor, Dates, Signed, Verified};

/// Maximum size of a system manifest, in bytes (its reader has the same bound).
pub(super) const MAX_MANIFEST: u64 = 4 << 20;
/// Maximum size of a signature or certificate chain, in bytes.
const MAX_SMALL: u64 = 1 << 16;

const MANIFEST: &str = "manifest.json";
const SIGNATURE: &str = "manifest.sig";
const CERTIFICATE: &str = "cert.pem";
const FLOOR_SIGNATURE: &str = "floor.sig";

/// Reads a deployment's folder. Nothing is verified yet.
pub fn read(system: &System, id: &DeploymentId) -> Result<Signed, DeployError> {
    let folder = system.deployment_dir(id);
    let read = |name: &str, max| file::read_regular(&folder.join(name), Links::Refused, max);
    let floor_signature = file::find_regular(&folder.join(FLOOR_SIGNATURE), Links::Refused, MAX_SMALL)?;
    Ok(Signed {
        manifest: read(MANIFEST, MAX_MANIFEST)?,
        signature: read(SIGNATURE, MAX_SMALL)?,
        certificate: read(CERTIFICATE, MAX_SMALL)?,
        floor_signature,
    })
}

/// Reads a deployment and verifies it: signature, certificate, product, and that the folder's name matches.
pub fn verify(
    system: &System,
    id: &DeploymentId,
    anchor: &Anchor,
    dates: Dates,
) -> Result<Verified, DeployError> {
    let verified = read(system, id)?.verify(anchor, dates)?;
    let (version, digest) = (verified.manifest().version, verified.digest());
    if (version, digest) != (id.version, id.digest) {
        return Err(DeployError::OtherManifest { id: *id, version, digest });
    }
    Ok(verified)
}

/// The content of a deployment's folder, each part separately: for a folder that may be damaged.
pub struct Parts {
    /// The bytes of the manifest.
    pub manifest: Option<Vec<u8>>,
    /// The signature.
    pub signature: Option<Vec<u8>>,
    /// The certificates.
    pub certificate: Option<Vec<u8>>,
    /// The floor signature.
    pub floor_signature: Option<Vec<u8>>,
}

/// Reads the readable parts of a deployment's folder.
pub fn parts(system: &System, id: &DeploymentId) -> Parts {
    let folder = system.deployment_dir(id);
    let file = |name: &str, max| file::read_regular(&folder.join(name), Links::Refused, max).ok();
    Parts {
        manifest: file(MANIFEST, MAX_MANIFEST),
        signature: file(SIGNATURE, MAX_SMALL),
        certificate: file(CERTIFICATE, MAX_SMALL),
        floor_signature: file(FLOOR_SIGNATURE, MAX_SMALL),
    }
}

/// Returns the files of a deployment that must be replaced by those of an offer of the same system: files
/// that are missing or damaged, a certificate that differs, a signature that is not valid with it, and an
/// invalid floor signature if the offer's is valid.
pub fn differences(
    system: &System,
    offer: &Verified,
    anchor: &Anchor,
    policy: Option<&Policy>,
) -> Vec<&'static str> {
    let id = DeploymentId { version: offer.manifest().version, digest: offer.digest() };
    let found = parts(system, &id);
    let mut differ = Vec::new();
    if found.manifest.as_deref() != Some(offer.bytes()) {
        differ.push(MANIFEST);
    }
    if found.certificate.as_deref() != Some(offer.certificate()) {
        differ.push(CERTIFICATE);
    }
    // Two signatures of one manifest by one key may differ and both be valid.
    if found.signature.as_deref() != Some(offer.signature())
        && (!differ.is_empty() || verify(system, &id, anchor, Dates::LogOnly).is_err())
    {
        differ.push(SIGNATURE);
    }
    if found.floor_signature.as_deref()
        != better_floor_signature(offer, found.floor_signature.as_deref(), policy)
    {
        differ.push(FLOOR_SIGNATURE);
    }
    differ
}

/// Chooses between the floor signature of an offer and the existing one.
fn better_floor_signature<'a>(
    offer: &'a Verified,
    here: Option<&'a [u8]>,
    policy: Option<&Policy>,
) -> Option<&'a [u8]> {
    let version = offer.manifest().version;
    let holds = |signature: Option<&[u8]>| match (signature, policy) {
        (Some(signature), Some(policy)) => floor::check_signature(policy, version, signature).is_ok(),
        (signature, _) => signature.is_some(),
    };
    let offered = offer.floor_signature();
    if holds(here) || (!holds(offered) && here.is_some()) { here } else { offered }
}

/// Writes a verified system as a deployment's folder, synced. The caller holds the exclusive lock.
///
/// A folder left half-written by a crash is started over. An existing folder is replaced as a whole, by
/// exchange, if [`differences`] finds any.
pub fn write(
    system: &System,
    verified: &Verified,
    anchor: &Anchor,
    policy: Option<&Policy>,
) -> Result<DeploymentId, DeployError> {
    let id = DeploymentId { version: verified.manifest().version, digest: verified.digest() };
    let folder = system.deployment_dir(&id);
    let there = folder.symlink_metadata().is_ok();
    if there && differences(system, verified, anchor, policy).is_empty() {
        return Ok(id);
    }
    let here = parts(system, &id).floor_signature;
    let mut files: Vec<(&'static str, &[u8])> = vec![
        (MANIFEST, verified.bytes()),
        (SIGNATURE, verified.signature()),
        (CERTIFICATE, verified.certificate()),
    ];
    if let Some(signature) = better_floor_signature(verified, here.as_deref(), policy) {
        files.push((FLOOR_SIGNATURE, signature));
    }
    let parent = system.deployments_dir();
    let temporary = parent.join(format!(".new-{id}"));
    remove_if_there(&temporary)?;
    let written = write_files(&temporary, &files);
    if let Err(error) = written {
        let _ = fs::remove_dir_all(&temporary);
        return Err(error.into());
    }
    failpoint::hit("deploy.folder.written");
    if there {
        atomic::exchange(&temporary, &folder).on("exchange", &folder)?;
        atomic::sync_folder(&parent).on("sync", &parent)?;
        remove_if_there(&temporary)?;
    } else {
        fs::rename(&temporary, &folder).on("rename", &temporary)?;
    }
    failpoint::hit("deploy.folder.renamed");
    atomic::sync_folder(&parent).on("sync", &parent)?;
    Ok(id)
}

fn write_files(folder: &Path, files: &[(&'static str, &[u8])]) -> Result<(), IoError> {
    file::create_folder(folder, 0o755)?;
    for (name, bytes) in files {
        let path = folder.join(name);
        atomic::write_new(&path, bytes, 0o644).on("write", &path)?;
    }
    atomic::sync_folder(folder).on("sync", folder)
}

/// Removes a folder, or whatever else has its name.
fn remove_if_there(folder: &Path) -> Result<(), IoError> {
    let is_folder = folder.symlink_metadata().is_ok_and(|data| data.is_dir());
    match if is_folder { fs::remove_dir_all(folder) } else { fs::remove_file(folder) } {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).on("remove", folder),
        _ => Ok(()),
    }
}

/// Lists the folder of deployments: complete ones, and what crashes left behind.
pub fn list(system: &System) -> Result<(Vec<DeploymentId>, Vec<PathBuf>), DeployError> {
    let parent = system.deployments_dir();
    let entries = match fs::read_dir(&parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), Vec::new())),
        Err(error) => return Err(IoError::new("list", &parent, error).into()),
    };
    let (mut whole, mut left) = (Vec::new(), Vec::new());
    for entry in entries {
        let entry = entry.on("list", &parent)?;
        match entry.file_name().to_str().map(str::parse) {
            Some(Ok(id)) => whole.push(id),
            _ if entry.file_name().as_encoded_bytes().starts_with(b".new-") => left.push(entry.path()),
            _ => {}
        }
    }
    sorting::sort(&mut whole);
    sorting::sort(&mut left);
    Ok((whole, left))
}

/// Removes a folder that a crash left behind. The caller holds the exclusive lock.
pub fn remove_leftover(system: &System, path: &Path) -> Result<(), DeployError> {
    remove_if_there(path)?;
    let parent = system.deployments_dir();
    Ok(atomic::sync_folder(&parent).on("sync", &parent)?)
}

/// Removes a deployment that no state names. The caller holds the exclusive lock.
///
/// It is renamed first: a crash leaves either the whole folder or one that `list` reports as left over.
pub fn remove(system: &System, id: &DeploymentId) -> Result<(), DeployError> {
    let folder = system.deployment_dir(id);
    let parent = system.deployments_dir();
    let doomed = parent.join(format!(".new-{id}"));
    remove_if_there(&doomed)?;
    fs::rename(&folder, &doomed).on("rename", &folder)?;
    failpoint::hit("deploy.folder.removing");
    remove_if_there(&doomed)?;
    atomic::sync_folder(&parent).on("sync", &parent)?;
    Ok(())
}
