//! Targets of a deployment: from a signed manifest to what is mounted.

use super::error::DeployError;
use super::state::DeploymentId;
use super::{System, deployment};
use crate::image::oci::OciImage;
use crate::manifest::system::Target;
use crate::mount::{MountPlan, Verification};
use crate::store::Store;
use crate::trust::{Anchor, Dates, Verified};

/// The mount of a signed target whose image is in the store.
///
/// # Errors
/// [`DeployError::OtherSize`], [`DeployError::Plan`], and what the store says of the OCI manifest, which it checks against
/// the digest in the signed manifest.
pub fn plan(store: &Store, name: &str, target: &Target) -> Result<MountPlan, DeployError> {
    let image = image_of(store, name, target)?;
    Ok(MountPlan::new(name, &image, &store.blobs(), Verification::default())?)
}

/// The image of a target of a deployment: the running one where mosfs booted this machine, else the
/// current one. The deployment is verified afresh.
///
/// # Errors
/// [`DeployError::NothingInstalled`], [`DeployError::NoSuchTarget`] with the targets that there
/// are, and whatever verification says.
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

/// The deployment that runs, verified afresh: the booted one where mosfs booted this machine, else the
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

/// The target of that name.
///
/// # Errors
/// [`DeployError::NoSuchTarget`] with the targets that there are.
pub fn find<'a>(id: &DeploymentId, verified: &'a Verified, name: &str) -> Result<&'a Target, DeployError> {
    let targets = &verified.manifest().targets;
    let found = targets.iter().find(|(known, _)| known.as_str() == name).map(|(_, target)| target);
    found.ok_or_else(|| {
        let known = targets.keys().map(ToString::to_string).collect();
        DeployError::NoSuchTarget { id: *id, target: name.to_string(), known }
    })
}

/// The image of a target, its OCI manifest checked by digest and size.
pub fn image_of(store: &Store, name: &str, target: &Target) -> Result<OciImage, DeployError> {
    let image = store.image(&target.digest)?;
    check_size(name, target, &image)?;
    Ok(image)
}

/// Rule: a target is told by digest and size (docs/design.md, targets by digest).
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
