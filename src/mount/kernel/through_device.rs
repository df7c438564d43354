//! A layer that is read through the kernel's dm-verity device, where there is one.
//!
//! Where the kernel has mounted a layer already, FUSE reads it from that device: its blocks are in the
//! page cache once, for both, and each was hashed when it came from the disk, so it is not hashed
//! again. The device is used only if it has our name for the root hash, a live read-only table equal to the
//! one that this layer takes, and status V ([`DmVerity::existing`]). It is held open, so that it
//! stays; only root can change the table of a device, and root could change this process as well.
//!
//! **What does not match** is EIO from the device, without a word of what was found. Such a read is done
//! again from the file, under the root hash, by our own reader: it says which block is bad and what was
//! expected, or has the right bytes after all. So the answer never depends on the device: whatever
//! it returns was checked by the kernel or is checked here.
//!
//! Users other than root may not open the device, and read the file.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::dm_verity::DmVerity;
use crate::image::source::{ReadError, Source, check_range};
use crate::image::verified::VerifiedSource;
use crate::mount::plan::PlannedLayer;

/// A layer's data on its device, and the file behind it.
pub struct DeviceSource {
    device: File,
    verified: VerifiedSource,
}

/// Whether the kernel has a device for this layer: then what reads from it, else `verified` itself.
pub fn through_device(
    layer: &PlannedLayer,
    verified: VerifiedSource,
) -> Result<DeviceSource, VerifiedSource> {
    match DmVerity::existing(layer) {
        Some(device) => Ok(DeviceSource { device, verified }),
        None => Err(verified),
    }
}

impl Source for DeviceSource {
    fn size_bytes(&self) -> u64 {
        self.verified.size_bytes()
    }

    fn read<'a>(&'a self, offset: u64, len: usize, scratch: &'a mut Vec<u8>) -> Result<&'a [u8], ReadError> {
        check_range(offset, len as u64, self.size_bytes())?;
        // A copy in memory of our own, as from the file: what is decoded is what was read once.
        if scratch.len() < len {
            scratch.resize(len, 0);
        }
        match self.device.read_exact_at(&mut scratch[..len], offset) {
            Ok(()) => Ok(&scratch[..len]),
            Err(_) => self.verified.read(offset, len, scratch),
        }
    }
}
