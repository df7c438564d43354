//! Targets of a deployment: from a signed manifest to a mount plan.

use super::error::DeployError;
use super::state::DeploymentId;
use super::{System, deployment};
use crate::image::oci::OciImage;
use crate::manifest::system::Target;
use crate::mount::{MountPlan, Verification};
use crate::store::Store;
use crate::trust::{Anchor, Dates, Verified};

/// Returns the mount plan of a signed target whose image is in the store. The page of the crate has an example.
///
/// # Errors
/// [`DeployError::OtherSize`], [`DeployError::Plan`], and errors of the store, which checks the OCI manifest
/// against the digest in the signed manifest.
pub fn plan(store: &Store, name: &str, target: &Target) -> Result<MountPlan, DeployError> {
    let image = image_of(store, name, target)?;
    Ok(MountPlan::new(name, &image, &store.blobs(), Verification::default())?)
}

/// Returns the image of a target of the running deployment if mosfs booted this machine, else of the current
/// one. The deployment is verified again.
///
/// # Errors
/// [`DeployError::NothingInstalled`], [`DeployError::NoSuchTarget`] with the existing targets, and errors of
/// verification.
pub fn image(
    system: &System,
    booted: Option<DeploymentId>,
    anchor: &Anchor,
    name: &str,
) -> Result<(Store, OciImage), DeployError> {
    let (id, verified) = running(system, booted, anchor)?;
    let target = find(&id, &verified, name)?;
    let store = system.store()?;
    let image = image_of(&store, name, target)?;
    Ok((store, image))
}

/// Returns the running deployment, verified again: the booted one if mosfs booted this machine, else the
/// current one.
pub fn running(
    system: &System,
    booted: Option<DeploymentId>,
    anchor: &Anchor,
) -> Result<(DeploymentId, Verified), DeployError> {
    let id = match booted {
        Some(id) => id,
        None => system
            .state()?
            .current
            .ok_or_else(|| DeployError::NothingInstalled { path: system.root().to_path_buf() })?,
    };
    let verified = deployment::verify(system, &id, anchor, Dates::LogOnly)?;
    Ok((id, verified))
}

/// Returns the target of that name.
///
/// # Errors
/// [`DeployError::NoSuchTarget`] with the existing targets.
pub fn find<'a>(id: &DeploymentId, verified: &'a Verified, name: &str) -> Result<&'a Target, DeployError> {
    let targets = &verified.manifest().targets;
    let found = targets.iter().find(|(known, _)| known.as_str() == name).map(|(_, target)| target);
    found.ok_or_else(|| {
        let known = targets.keys().map(ToString::to_string).collect();
        DeployError::NoSuchTarget { id: *id, target: name.to_string(), known }
    })
}

/// Returns the image of a target, with its OCI manifest checked by digest and size.
pub fn image_of(store: &Store, name: &str, target: &Target) -> Result<OciImage, DeployError> {
    let image = store.image(&target.digest)?;
    check_size(name, target, &image)?;
    Ok(image)
}

/// Rule: a target is identified by digest and size (docs/design.md, targets by digest).
pub(super) fn check_size(name: &str, target: &Target, image: &OciImage) -> Result<(), DeployError> {
    if image.size == target.size {
        return Ok(());
    }
    Err(DeployError::OtherSize {
        target: name.to_string(),
        digest: target.digest,
        expected: target.size,
        found: image.size,
    })
}
