//! Block devices: sizes, exclusive use, and their partitions (<linux/fs.h>).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// `BLKRRPART` in <linux/fs.h>.
const BLKRRPART: libc::Ioctl = 0x125F as libc::Ioctl;
/// `BLKSSZGET` in <linux/fs.h>.
const BLKSSZGET: libc::Ioctl = 0x1268 as libc::Ioctl;
/// `BLKGETSIZE64` in <linux/fs.h>.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;

/// `BLKPG` in <linux/blkpg.h>.
const BLKPG: libc::Ioctl = 0x1269 as libc::Ioctl;
/// `BLKPG_ADD_PARTITION` in <linux/blkpg.h>.
const BLKPG_ADD_PARTITION: libc::c_int = 1;

/// Opens a block device that nobody else uses: no mount, no swap, no volume, no other such opening.
///
/// # Errors
/// `EBUSY` if it or a part of it is in use.
pub fn open_exclusive(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC | libc::O_NONBLOCK).open(path)
}

/// Opens a block device to read it, whoever uses it.
pub fn open_to_read(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK).open(path)
}

/// Returns the size of a block device in bytes.
pub fn size_bytes(device: &File) -> io::Result<u64> {
    let mut size = 0_u64;
    // SAFETY: BLKGETSIZE64 writes one u64 to the pointer, which is valid for the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut size) } {
        0 => Ok(size),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the size of a block device's logical sectors in bytes.
pub fn sector_bytes(device: &File) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int to the pointer, which is valid for the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKSSZGET, &raw mut size) } {
        0 => u32::try_from(size).map_err(|_| io::ErrorKind::InvalidData.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has the kernel read the partition table of a disk again.
///
/// # Errors
/// `EBUSY` if a partition is in use, or is being looked at; `EINVAL` if the kernel reads no tables of this device.
pub fn read_partitions_again(device: &File) -> io::Result<()> {
    // SAFETY: BLKRRPART takes no argument.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKRRPART) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `struct blkpg_partition` of <linux/blkpg.h>.
#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: libc::c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

/// `struct blkpg_ioctl_arg` of <linux/blkpg.h>.
#[repr(C)]
struct BlkpgArgument {
    operation: libc::c_int,
    flags: libc::c_int,
    length: libc::c_int,
    data: *mut BlkpgPartition,
}

/// Tells the kernel of a partition, which it does not learn from the table by itself where it was built without that.
/// Nothing is written.
///
/// # Errors
/// `EBUSY` if it knows a partition of this number, or one at this place.
pub fn add_partition(device: &File, number: u32, start_bytes: u64, size_bytes: u64) -> io::Result<()> {
    let (Ok(start), Ok(length), Ok(number)) =
        (i64::try_from(start_bytes), i64::try_from(size_bytes), libc::c_int::try_from(number))
    else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut partition = BlkpgPartition { start, length, number, device_name: [0; 64], volume_name: [0; 64] };
    let argument = BlkpgArgument {
        operation: BLKPG_ADD_PARTITION,
        flags: 0,
        length: size_of::<BlkpgPartition>() as libc::c_int,
        data: &raw mut partition,
    };
    // SAFETY: BLKPG reads the argument and the partition that it points to; both outlive the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKPG, &raw const argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Keeps udev from looking into a disk as long as the file is open (systemd, "Locking Block Device Access").
///
/// # Errors
/// `EWOULDBLOCK` if another program has locked it.
pub fn lock(device: &File) -> io::Result<()> {
    // SAFETY: flock takes a descriptor by value, no pointer.
    match unsafe { libc::flock(device.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The folder of sysfs about the block device that a node, or a link to one, stands for; `None` where there is none.
pub fn sysfs(node: &Path) -> Option<PathBuf> {
    let metadata = node.metadata().ok().filter(|metadata| metadata.file_type().is_block_device())?;
    let (major, minor) = numbers(metadata.rdev());
    Some(format!("/sys/dev/block/{major}:{minor}").into())
}

/// Returns major and minor number of a device.
pub fn numbers(device: u64) -> (u32, u32) {
    (libc::major(device), libc::minor(device))
}
