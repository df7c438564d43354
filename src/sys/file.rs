//! Files: sharing of blocks, space, syncing.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

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

/// How many bytes the file system of `path` still has for this user (statvfs(3), `f_bavail`).
pub fn available_bytes(path: &std::path::Path) -> io::Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut answer = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path is NUL-terminated and outlives the call; statvfs fills `answer` on success.
    let answer = unsafe {
        if libc::statvfs(path.as_ptr(), answer.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        answer.assume_init()
    };
    Ok(answer.f_bavail.saturating_mul(answer.f_frsize))
}

/// Writes everything that the file system of `file` holds in memory to its disk (syncfs(2)).
pub fn sync_file_system(file: &File) -> io::Result<()> {
    // SAFETY: syncfs takes a file descriptor by value, no pointer; it is open for the call.
    match unsafe { libc::syncfs(file.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Opens a file of an open folder for reading (openat(2)).
///
/// O_NONBLOCK: opening a pipe that nobody writes to must not hang. It means nothing for files.
pub fn open_at(folder: &File, name: &str) -> io::Result<File> {
    let name = std::ffi::CString::new(name)?;
    let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the name is NUL-terminated and outlives the call; the folder is open for it.
    match unsafe { libc::openat(folder.as_raw_fd(), name.as_ptr(), flags) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: openat has just returned this descriptor, which nobody else has.
        descriptor => Ok(File::from(unsafe { OwnedFd::from_raw_fd(descriptor) })),
    }
}
