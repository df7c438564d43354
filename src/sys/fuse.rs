//! Mounts FUSE: /dev/fuse and mount(2) for root, `fusermount3` for other users.

use std::ffi::{CString, OsStr};
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Opens a new, not yet mounted connection to the kernel's FUSE.
pub fn open_device() -> io::Result<OwnedFd> {
    let mut options = std::fs::OpenOptions::new();
    Ok(options.read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/fuse")?.into())
}

/// mount(2) with a string of options.
pub fn mount(source: &OsStr, target: &Path, kind: &str, flags: libc::c_ulong, data: &str) -> io::Result<()> {
    let source = CString::new(source.as_bytes())?;
    let target = CString::new(target.as_os_str().as_bytes())?;
    let kind = CString::new(kind)?;
    let data = CString::new(data)?;
    // SAFETY: all four are NUL-terminated strings that outlive the call.
    let done =
        unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// umount2(2) of the topmost mount at `target`, which must not be a symbolic link. `lazy` detaches it at once
/// and ends it when its last user is gone (MNT_DETACH).
pub fn unmount(target: &Path, lazy: bool) -> io::Result<()> {
    let target = CString::new(target.as_os_str().as_bytes())?;
    let flags = libc::UMOUNT_NOFOLLOW | if lazy { libc::MNT_DETACH } else { 0 };
    // SAFETY: `target` is a NUL-terminated string that outlives the call.
    if unsafe { libc::umount2(target.as_ptr(), flags) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Returns the device number (major, minor) of the file system at `path` without querying the file system
/// itself (AT_STATX_DONT_SYNC), so a file system that does not respond yet cannot block the caller.
pub fn device_of(path: &Path) -> io::Result<(u32, u32)> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT | libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: `path` is NUL-terminated, `stat` has room for one statx; no field is requested.
    let done = unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, 0, stat.as_mut_ptr()) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all bytes were zeroed above and the kernel filled in what it has; all patterns are valid.
    let stat = unsafe { stat.assume_init() };
    Ok((stat.stx_dev_major, stat.stx_dev_minor))
}

/// Runs `fusermount3` to mount at `target`, and returns the connection that it opens (the protocol of
/// libfuse: a socket in `_FUSE_COMMFD`, over which it sends one descriptor with SCM_RIGHTS).
///
/// # Errors
/// `NotFound` if there is no `fusermount3`; `Other` with its message if it refuses.
pub fn mount_with_helper(target: &Path, options: &str) -> io::Result<OwnedFd> {
    let (ours, theirs) = socket_pair()?;
    // SAFETY: `theirs` is an open descriptor of ours. It must outlive the exec in the child; in this
    // process it is closed as soon as the child runs.
    if unsafe { libc::fcntl(theirs.as_raw_fd(), libc::F_SETFD, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let child = Command::new("fusermount3")
        .args(["-o", options, "--"])
        .arg(target)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    drop(theirs);
    let child = child?;
    let fd = receive_fd(&ours);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(said.trim().trim_start_matches("fusermount3: ").to_string()));
    }
    fd
}

/// Runs `fusermount3` to unmount `target`.
pub fn unmount_with_helper(target: &Path, lazy: bool) -> io::Result<()> {
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if lazy {
        command.arg("-z");
    }
    let output = command.arg("--").arg(target).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().trim_start_matches("fusermount3: ");
    // The helper prints strerror's text for EBUSY; callers distinguish it by kind.
    if said.contains("Device or resource busy") {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    Err(io::Error::other(said.to_string()))
}

fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut pair: [RawFd; 2] = [-1; 2];
    // SAFETY: `pair` has room for the two descriptors.
    let done = unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0, pair.as_mut_ptr())
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both are open, and nothing else owns them.
    Ok(unsafe { (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1])) })
}

/// Receives one descriptor over a socket.
fn receive_fd(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let mut byte = [0u8; 1];
    let mut iov = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // Room for one descriptor, aligned as a cmsghdr must be.
    let mut control = [0u64; 8];
    // SAFETY: msghdr is plain data, for which zeros are a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of::<[u64; 8]>() as _;
    loop {
        // SAFETY: `message` points to one iovec and to `control`, which both outlive the call.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
        if got >= 0 {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    // SAFETY: recvmsg has set the length of `control` in `message`; CMSG_FIRSTHDR checks it.
    let header = unsafe { libc::CMSG_FIRSTHDR(&message) };
    // SAFETY: where it is not null, CMSG_FIRSTHDR points to a whole cmsghdr within `control`.
    let Some(header) = (unsafe { header.as_ref() }) else {
        return Err(io::Error::other("the helper sent no connection"));
    };
    // SAFETY: arithmetic alone.
    let wanted = unsafe { libc::CMSG_LEN(size_of::<RawFd>() as u32) } as usize;
    if header.cmsg_level != libc::SOL_SOCKET
        || header.cmsg_type != libc::SCM_RIGHTS
        || header.cmsg_len < wanted
    {
        return Err(io::Error::other("the helper sent something else than a connection"));
    }
    // SAFETY: the header says that at least one descriptor follows it, within `control`; the kernel has
    // opened it for this process and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned()) })
}
