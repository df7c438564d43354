//! Which EFI system partition the kernels of a system are on.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::Global;
use crate::deploy::esp::{self, Esp};
use crate::deploy::kernel;
use crate::digest::Digest;
use crate::error::AnyError;
use crate::sys::mountapi;

/// How long the partition's device is waited for.
pub(super) const ESP_PATIENCE: Duration = Duration::from_secs(30);

/// Which EFI system partition to use.
#[derive(Debug, Args)]
pub(super) struct EspArgs {
    /// Keep the kernels of the system on the EFI system partition that is mounted here [default: the one that this
    /// machine was started from, if its kernel is one of mosfs build]
    #[arg(long, value_name = "DIR", env = "MOSFS_ESP")]
    esp: Option<PathBuf>,
}

/// The EFI system partition of a command, and the kernel that runs.
#[derive(Debug)]
pub(super) struct Place {
    /// The partition, if there is one to use.
    pub esp: Option<Esp>,
    /// The id of the running kernel, if it has one.
    pub kernel: Option<Digest>,
    /// Where this command mounted it.
    mounted: Option<PathBuf>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(place) = &self.mounted {
            let _ = mountapi::unmount(place, true);
        }
    }
}

impl EspArgs {
    /// The folder that the command line or the environment names.
    pub(super) fn folder(&self) -> Option<&Path> {
        self.esp.as_deref()
    }

    /// Finds the partition; one whose device is not there yet is waited for, at most for `patience`. One that is not
    /// mounted is mounted as long as the returned value lives.
    pub(super) fn find(&self, global: &Global, patience: Duration) -> Result<Place, AnyError> {
        let kernel = kernel::running(&global.config)?;
        let mut place = Place { esp: None, kernel, mounted: None };
        if let Some(folder) = &self.esp {
            place.esp = Some(Esp::at(folder));
        } else if kernel.is_some() {
            // Only a machine that such a kernel started: elsewhere the partition is of others.
            place.esp = esp::mounted();
            if place.esp.is_none()
                && let Some(folder) = mount(patience)?
            {
                place.esp = Some(Esp::at(&folder));
                place.mounted = Some(folder);
            }
        }
        Ok(place)
    }
}

/// Mounts the partition that the firmware started this machine from; `None` if it is not known.
fn mount(patience: Duration) -> Result<Option<PathBuf>, AnyError> {
    let Some(device) = esp::device_of_this_boot(patience)? else { return Ok(None) };
    let folder = crate::sys::run_dir().join("esp");
    esp::mount(&device, Path::new(&folder))?;
    Ok(Some(folder))
}
