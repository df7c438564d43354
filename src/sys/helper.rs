//! Runs work that may never end in a separate process.
//!
//! A disk that does not respond blocks its caller, and no signal helps. So a child process accesses an
//! unknown disk and is abandoned when its time is over: a process can be left behind, a thread could not.
//!
//! ```text
//! child -> parent   one packet (SOCK_SEQPACKET): bytes, and at most one descriptor (SCM_RIGHTS)
//! ```

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::daemon::{self, Forked};

/// Maximum size of a reply, in bytes.
const MAX_ANSWER: usize = 16 << 10;

/// What a helper sent back.
#[derive(Debug)]
pub struct Answer {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The descriptor that came with them.
    pub descriptor: Option<OwnedFd>,
}

/// A process that works for this one. Dropping it ends it, if it can be ended.
#[derive(Debug)]
pub struct Helper {
    socket: OwnedFd,
    pid: libc::pid_t,
    /// When it was started.
    pub started: Instant,
}

impl Helper {
    /// Forks a process that does `work` and sends what it returns. Only for a process with one thread.
    ///
    /// # Errors
    /// Those of socketpair(2) and [`daemon::fork`].
    pub fn start(work: impl FnOnce() -> (Vec<u8>, Option<OwnedFd>)) -> io::Result<Self> {
        let (ours, theirs) = socket_pair()?;
        match daemon::fork()? {
            Forked::Parent(pid) => {
                Ok(Self { socket: ours, pid: pid as libc::pid_t, started: Instant::now() })
            }
            Forked::Child => {
                // Nothing of the parent's may run here: no destructors, no unwinding into its callers.
                let done = catch_unwind(AssertUnwindSafe(|| {
                    // If it is left behind forever, it must hold nothing: neither the terminal nor the TPM.
                    daemon::detach(&[])?;
                    close_all_but(theirs.as_raw_fd());
                    let (bytes, descriptor) = work();
                    send(&theirs, &bytes, descriptor.as_ref())
                }));
                // SAFETY: ends this process without running anything else of it.
                unsafe { libc::_exit(i32::from(!matches!(done, Ok(Ok(()))))) }
            }
        }
    }

    /// Returns its reply, if it arrives within `patience`; `None` if the process is still working.
    ///
    /// # Errors
    /// If it ended without a reply.
    pub fn answer(&self, patience: Duration) -> io::Result<Option<Answer>> {
        let end = Instant::now() + patience;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let milliseconds = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
            let mut entry = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: `entry` is one valid pollfd for the length of the call; the socket stays open.
            match unsafe { libc::poll(&raw mut entry, 1, milliseconds) } {
                0 if left.is_zero() || Instant::now() >= end => return Ok(None),
                0 => {}
                -1 => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
                _ => return receive(&self.socket).map(Some),
            }
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // SAFETY: no pointers. The process is our child and was not waited for, so that the number is still its
        // own. One that sleeps in the kernel ends when it wakes up; nobody waits for that.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), libc::WNOHANG);
        }
    }
}

/// Closes all descriptors above 2 but this one: close_range(2), Linux 5.9. On an older kernel they stay open.
fn close_all_but(kept: RawFd) {
    let kept = libc::c_uint::try_from(kept).unwrap_or(3);
    for (first, last) in [(3, kept.saturating_sub(1)), (kept.saturating_add(1), libc::c_uint::MAX)] {
        if first <= last {
            // SAFETY: no pointers. This process runs nothing that uses any of them: it is a child that does its
            // work with what it opens from here on, and ends with _exit.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut pair: [RawFd; 2] = [-1; 2];
    // SAFETY: `pair` has room for the two descriptors.
    let done = unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, pair.as_mut_ptr())
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both are open, and nothing else owns them.
    Ok(unsafe { (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1])) })
}

/// Room for the control message of one descriptor, aligned as a cmsghdr must be.
type Control = [u64; 8];

fn send(socket: &OwnedFd, bytes: &[u8], descriptor: Option<&OwnedFd>) -> io::Result<()> {
    let bytes = bytes.get(..MAX_ANSWER).unwrap_or(bytes);
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control: Control = [0; 8];
    // SAFETY: msghdr is plain data, for which zeros are a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    if let Some(descriptor) = descriptor {
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: arithmetic alone; `control` has room for one descriptor, so that CMSG_FIRSTHDR returns a
        // whole header in it, behind which the descriptor is written.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(descriptor.as_raw_fd());
        }
    }
    // SAFETY: `message` points to one iovec and to `control`, which both outlive the call.
    if unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn receive(socket: &OwnedFd) -> io::Result<Answer> {
    let mut bytes = vec![0u8; MAX_ANSWER];
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control: Control = [0; 8];
    // SAFETY: msghdr is plain data, for which zeros are a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of::<Control>() as _;
    // SAFETY: `message` points to one iovec and to `control`, which both outlive the call.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    if count == 0 {
        return Err(io::Error::other("the process that asked has died"));
    }
    bytes.truncate(count);
    // SAFETY: recvmsg has set the length of `control` in `message`; CMSG_FIRSTHDR checks it, and where it is
    // not null it points to a whole cmsghdr within `control`.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message).as_ref() };
    let descriptor = header
        .filter(|header| header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS)
        .map(|header| {
            // SAFETY: the header says that a descriptor follows it, within `control`; the kernel has opened it
            // for this process and nobody else owns it.
            unsafe { OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned()) }
        });
    Ok(Answer { bytes, descriptor })
}
