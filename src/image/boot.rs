//! The image of the target `boot`: the kernel of a system, and the loader that starts it.
//!
//! ```text
//! OCI manifest   artifactType application/vnd.mos.boot.v1
//!                annotations  vnd.mos.boot.kernel-id       sha256:HEX, of all that the kernel image is made of
//!                             vnd.mos.boot.kernel-release  what `uname -r` prints
//!                             vnd.mos.boot.bytes           the size of the two files together
//!                             vnd.mos.boot.installs        `ext4`, if the kernel image can set up a disk
//! its one layer  mosfs.efi    a unified kernel image
//!                loader.efi   systemd-boot
//! ```
//!
//! A target of this name whose image has no kernel id is a target like any other.

use super::oci::OciImage;
use crate::digest::{Digest, DigestError};

/// The name of the target.
pub const TARGET: &str = "boot";
/// The artifact type of its OCI manifest.
pub const ARTIFACT_TYPE: &str = "application/vnd.mos.boot.v1";
/// The annotation with the kernel id.
pub const KERNEL_ID: &str = "vnd.mos.boot.kernel-id";
/// The annotation with the kernel's release.
pub const KERNEL_RELEASE: &str = "vnd.mos.boot.kernel-release";
/// The annotation with the size of the two files together, in bytes.
pub const BYTES: &str = "vnd.mos.boot.bytes";
/// The annotation with the file system that the kernel image can make on a disk: it installs when it is started from a
/// medium. An image without it was made of a hostfs without mke2fs.
pub const INSTALLS: &str = "vnd.mos.boot.installs";
/// The unified kernel image.
pub const UKI: &str = "mosfs.efi";
/// The boot loader.
pub const LOADER: &str = "loader.efi";
/// Name of the file in CONFIG that holds the id of the kernel that it belongs to: `sha256:HEX` and a newline.
pub const KERNEL_FILE: &str = "kernel";
/// Name of the file in CONFIG with a time that is past, in seconds since 1970: when the last of the certificates that the
/// system was signed with, and of those that the kernel trusts, became valid. A machine whose clock is behind it has a
/// wrong clock.
pub const CLOCK_FILE: &str = "clock";

/// Returns the kernel id that an image names; `None` if it names none.
///
/// # Errors
/// An id that is no digest.
pub fn kernel_id(image: &OciImage) -> Result<Option<Digest>, DigestError> {
    image.manifest.annotations.get(KERNEL_ID).map(|text| text.parse()).transpose()
}
