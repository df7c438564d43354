//! Files: sharing of blocks.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Makes `to` share all blocks of `from`, copy on write (`FICLONE`, ioctl_ficlone(2)).
///
/// # Errors
/// `EOPNOTSUPP`, `EXDEV`, `EINVAL` and others where the file system cannot: then copy.
pub fn reflink(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: FICLONE takes a file descriptor by value, no pointer; both are open for the call.
    match unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
