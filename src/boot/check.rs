//! Whether an initramfs could boot: asked when it is made, while the one before it is still there.

use std::path::Path;

use super::BootError;
use super::settings::Settings;
use crate::floor::{self, FloorError};
use crate::sys::{blkid, tpm};
use crate::trust::Anchor;

/// Checks what a boot with this CONFIG needs and that is not on a disk: CONFIG itself, and the libraries that are
/// loaded when they are first used, which nothing that lists libraries sees. `with_tpm`: the floor is in a TPM.
///
/// # Errors
/// What such a boot would fail with.
pub fn check(config: &Path, with_tpm: bool) -> Result<(), BootError> {
    Settings::load(config)?;
    Anchor::load(config)?;
    // Without a TPM, CONFIG may lack a floor key, but not hold a malformed one.
    floor::find_policy(config)?;
    if with_tpm {
        floor::policy(config)?;
        tpm::check_library().map_err(FloorError::from)?;
    }
    blkid::load().map_err(BootError::NoBlkid)
}
