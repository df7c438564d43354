//! FUSE: its device, `fusermount3` for users who may not mount, and questions to mounts. Who may mount does it
//! through [`super::mountapi`].

use std::ffi::{CStr, CString};
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

/// Opens a new, not yet mounted connection to the kernel's FUSE.
pub fn open_device() -> io::Result<OwnedFd> {
    let mut options = std::fs::OpenOptions::new();
    Ok(options.read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/fuse")?.into())
}

/// Takes over, by its number, a connection to FUSE that the parent process opened.
///
/// # Errors
/// `EBADF`; `InvalidInput` for a descriptor of something else.
pub fn take_connection(number: RawFd) -> io::Result<OwnedFd> {
    // A duplicate, so that no other value of this process can own it.
    // SAFETY: F_DUPFD_CLOEXEC takes a number and no pointer; a wrong one is EBADF.
    let fd = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: as above; the inherited one is not used by anything else in this process, and keeps the connection open.
    unsafe { libc::close(number) };
    let file = std::fs::File::from(fd);
    let found = file.metadata()?;
    // linux/miscdevice.h: MISC_MAJOR 10, FUSE_MINOR 229.
    if !found.file_type().is_char_device() || found.rdev() != libc::makedev(10, 229) {
        let why = format!("descriptor {number} is not one of /dev/fuse");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    Ok(file.into())
}

/// Whether a read of a connection would return at once, with a request or an error; poll(2) without waiting.
pub fn is_readable(connection: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: connection.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `poll` is one pollfd, which outlives the call.
    unsafe { libc::poll(&mut poll, 1, 0) > 0 }
}

/// Returns the device number (major, minor) of the file system at `path` without querying the file system
/// itself (AT_STATX_DONT_SYNC), so a file system that does not respond yet cannot block the caller.
pub fn device_of(path: &Path) -> io::Result<(u32, u32)> {
    Ok(identity_of(path)?.device)
}

/// [`device_of`] an open file or mount.
pub fn device_of_fd(fd: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    Ok(identity(fd)?.device)
}

/// Which file of which file system something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Device number (major, minor).
    pub device: (u32, u32),
    /// Inode number.
    pub inode: u64,
    /// Whether it is the root of a mount; `None` where the kernel does not say (before Linux 5.8).
    pub is_mount_root: Option<bool>,
}

/// What is at `path`, as the kernel knows it by itself; a symbolic link is not followed.
pub fn identity_of(path: &Path) -> io::Result<Identity> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    Ok(Identity::of(&statx(libc::AT_FDCWD, &path, UNASKED | libc::AT_SYMLINK_NOFOLLOW)?))
}

/// What is open as `fd`, as the kernel knows it by itself.
pub fn identity(fd: BorrowedFd<'_>) -> io::Result<Identity> {
    Ok(Identity::of(&statx(fd.as_raw_fd(), c"", UNASKED | libc::AT_EMPTY_PATH)?))
}

/// Has the file system say the attributes of `fd` now, so that the kernel knows them from then on.
pub fn refresh(fd: BorrowedFd<'_>) -> io::Result<()> {
    statx(fd.as_raw_fd(), c"", libc::AT_STATX_FORCE_SYNC | libc::AT_EMPTY_PATH).map(|_| ())
}

const UNASKED: libc::c_int = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;

impl Identity {
    fn of(stat: &libc::statx) -> Self {
        let root = libc::STATX_ATTR_MOUNT_ROOT as u64;
        let known = stat.stx_attributes_mask & root != 0;
        Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            is_mount_root: known.then_some(stat.stx_attributes & root != 0),
        }
    }
}

fn statx(dir: RawFd, path: &CStr, flags: libc::c_int) -> io::Result<libc::statx> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    let wanted =
        if flags & libc::AT_STATX_DONT_SYNC == 0 { libc::STATX_BASIC_STATS } else { libc::STATX_INO };
    // SAFETY: `path` is NUL-terminated, `stat` has room for one statx.
    let done = unsafe { libc::statx(dir, path.as_ptr(), flags, wanted, stat.as_mut_ptr()) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all bytes were zeroed above and the kernel filled in what it has; all patterns are valid.
    Ok(unsafe { stat.assume_init() })
}

/// Whether the FUSE file system at `path` has a daemon; `None` where it is no FUSE file system.
///
/// A daemon that does not answer blocks the caller.
pub fn is_served(path: &Path) -> io::Result<Option<bool>> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut sizes = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `path` is NUL-terminated, `sizes` has room for one statfs.
    if unsafe { libc::statfs(path.as_ptr(), sizes.as_mut_ptr()) } == 0 {
        // SAFETY: all bytes were zeroed above and the kernel filled it in; all patterns are valid.
        let kind = unsafe { sizes.assume_init() }.f_type;
        return Ok((kind == libc::FUSE_SUPER_MAGIC).then_some(true));
    }
    let error = io::Error::last_os_error();
    // Linux aborts a connection when its last reader closes it, and answers so from then on.
    match error.raw_os_error() {
        Some(libc::ENOTCONN | libc::ECONNABORTED) => Ok(Some(false)),
        _ => Err(error),
    }
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

/// Unmounts `target` for a user who may not call umount(2): with `fusermount3`, or with `umount` where that has no
/// /etc/mtab, as in a chroot. `umount` reads /proc/self/mountinfo, and lets users unmount what they mounted through FUSE.
pub fn unmount_with_helper(target: &Path, lazy: bool) -> io::Result<()> {
    let run = |program: &str, words: &[&str]| {
        Command::new(program).args(words).arg("--").arg(target).stdin(Stdio::null()).output()
    };
    let mut output = run("fusermount3", if lazy { &["-u", "-z"] } else { &["-u"] })?;
    if !output.status.success() && String::from_utf8_lossy(&output.stderr).contains("/etc/mtab") {
        output = run("umount", if lazy { &["-l"] } else { &[] })?;
    }
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().trim_start_matches("fusermount3: ");
    // Both print strerror's text for EBUSY, or "target is busy"; callers distinguish it by kind.
    if said.contains("Device or resource busy") || said.contains("target is busy") {
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
