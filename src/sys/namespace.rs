//! Namespaces: a user namespace that maps ids, and a mount namespace of one's own.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use super::daemon::{self, Forked};
use super::mountapi::{self, CallError};

/// Creates a user namespace whose ids 0 to `count - 1` are the host's ids from `base` on; users and groups alike.
///
/// It lasts as long as the descriptor, or what is mounted or runs with it. Only for a process with one thread.
///
/// # Errors
/// Those of fork(2), unshare(2) and of writing the maps (user_namespaces(7)).
pub fn user_namespace(base: u32, count: u32) -> io::Result<OwnedFd> {
    let (ready, mut ready_in) = pipe()?;
    let (hold_out, hold) = pipe()?;
    match daemon::fork()? {
        Forked::Child => {
            drop((ready, hold));
            // SAFETY: no pointers; this process has one thread, which unshare(2) requires for CLONE_NEWUSER.
            let code = unsafe { libc::unshare(libc::CLONE_NEWUSER) };
            let byte =
                if code == 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap_or(1) as u8 };
            let _ = io::Write::write_all(&mut ready_in, &[byte]);
            // Until the parent has opened the namespace.
            let mut hold_out = hold_out;
            let _ = hold_out.read(&mut [0]);
            // SAFETY: ends this process without running anything else of it.
            unsafe { libc::_exit(0) }
        }
        Forked::Parent(pid) => {
            drop((ready_in, hold_out));
            let namespace = open_mapped(ready, pid, base, count);
            drop(hold);
            let mut status = 0;
            // SAFETY: the pointer is to a local integer; the process is our child, and ends now.
            unsafe { libc::waitpid(pid as libc::pid_t, &raw mut status, 0) };
            namespace
        }
    }
}

fn open_mapped(mut ready: File, pid: u32, base: u32, count: u32) -> io::Result<OwnedFd> {
    let mut byte = [0];
    ready.read_exact(&mut byte)?;
    if byte[0] != 0 {
        return Err(io::Error::from_raw_os_error(byte[0].into()));
    }
    for name in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{pid}/{name}"), format!("0 {base} {count}\n"))?;
    }
    Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
}

fn pipe() -> io::Result<(File, File)> {
    let mut ends = [-1; 2];
    // SAFETY: the array has room for the two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both are open, and nothing else owns them.
    Ok(unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) })
}

/// Moves the calling thread to a mount namespace of its own, whose mounts no other one gets.
///
/// What is unmounted elsewhere is unmounted here, too, where mounts are shared (systemd sees to that): else the copies here
/// would keep disks and devices of the host in use as long as the namespace lasts.
pub fn enter_mount_namespace() -> Result<(), CallError> {
    // SAFETY: no pointers. CLONE_FS makes root and working folder the thread's own.
    if unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) } != 0 {
        return Err(CallError::last("unshare(CLONE_FS|CLONE_NEWNS)".into()));
    }
    mountapi::end_exchange(libc::MS_SLAVE)
}

/// Opens a path below a folder as if the folder were the root: links, `..` and mounts cannot lead out of it.
///
/// `flags` are those of open(2). Linux 5.6.
pub fn open_in_root(root: BorrowedFd<'_>, path: &Path, flags: libc::c_int) -> io::Result<File> {
    let path = std::ffi::CString::new(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()))?;
    // SAFETY: open_how is plain data, for which zeros are a valid value.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: the path is NUL-terminated and `how` is ours and has the given size; both outlive the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            root.as_raw_fd(),
            path.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { File::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns where a link leads that was opened with O_PATH and O_NOFOLLOW.
pub fn link_of(link: BorrowedFd<'_>) -> io::Result<std::path::PathBuf> {
    let mut text = vec![0_u8; libc::PATH_MAX as usize];
    // SAFETY: the empty name is NUL-terminated; the buffer has the length that is passed.
    let length =
        unsafe { libc::readlinkat(link.as_raw_fd(), c"".as_ptr(), text.as_mut_ptr().cast(), text.len()) };
    let Ok(length) = usize::try_from(length) else { return Err(io::Error::last_os_error()) };
    text.truncate(length);
    let text: std::ffi::OsString = std::os::unix::ffi::OsStringExt::from_vec(text);
    Ok(text.into())
}

/// Moves the calling process to the network namespace of another one.
pub fn enter_network_of(pid: u32) -> io::Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    // SAFETY: setns takes no pointers; the descriptor is open.
    if unsafe { libc::setns(namespace.as_fd().as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
