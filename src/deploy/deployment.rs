//! A deployment's folder: a signed system manifest on a device.
//!
//! ```text
//! SYSTEM/deployments/200-HEX/
//!   manifest.json   the stored bytes that were signed
//!   manifest.sig    detached signature over them
//!   cert.pem        the signer's certificate, intermediates behind it
//!   floor.sig       the floor key's signature of the version; absent where the publisher made none
//! ```
//!
//! Invariants: a folder appears whole, by rename, and is never changed once it is there. Nothing
//! in it is believed before [`Signed::verify`] has passed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::System;
use super::error::DeployError;
use super::state::DeploymentId;
use crate::error::{IoContext, IoError};
use crate::failpoint;
use crate::sys::atomic;
use crate::sys::file::{self, Links};
use crate::trust::{Anchor, Dates, Signed, Verified};

/// No system manifest is longer, in bytes (its reader has the same bound).
const MAX_MANIFEST: u64 = 4 << 20;
/// No signature or certificate chain is longer, in bytes.
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

/// Reads a deployment and verifies it: signature, certificate, product, and that the folder's
/// name tells the truth.
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

/// Writes a verified system as a deployment's folder, synced. The caller holds the exclusive lock.
///
/// A folder that a crash left half-written is begun again; one that is there already must hold
/// the same bytes.
pub fn write(system: &System, verified: &Verified) -> Result<DeploymentId, DeployError> {
    let id = DeploymentId { version: verified.manifest().version, digest: verified.digest() };
    let mut files: Vec<(&'static str, &[u8])> = vec![
        (MANIFEST, verified.bytes()),
        (SIGNATURE, verified.signature()),
        (CERTIFICATE, verified.certificate()),
    ];
    if let Some(signature) = verified.floor_signature() {
        files.push((FLOOR_SIGNATURE, signature));
    }
    let folder = system.deployment_dir(&id);
    if folder.exists() {
        // ECDSA signatures of the same manifest differ from one signing to the next, and a
        // certificate may be renewed: what is here was verified by whoever wrote it and is
        // verified again at each boot. Only another manifest under this name is an error.
        let found = file::read_regular(&folder.join(MANIFEST), Links::Refused, MAX_MANIFEST)?;
        if found != verified.bytes() {
            return Err(DeployError::OtherContent { id, file: MANIFEST });
        }
        let floor_path = folder.join(FLOOR_SIGNATURE);
        if verified.floor_signature().is_none() || floor_path.exists() {
            return Ok(id);
        }
        // The folder was written without a floor signature and one has come since: replace the
        // folder as a whole, by exchange, rather than changing it in place.
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
    if folder.exists() {
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

fn remove_if_there(folder: &Path) -> Result<(), IoError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).on("remove", folder),
        _ => Ok(()),
    }
}

/// What is in the folder of deployments: those that are whole, and what crashes left behind.
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
    whole.sort();
    left.sort();
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
/// It is renamed first: a crash leaves either the whole folder or one that `list` calls a
/// left-over.
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
