//! What the first process of a machine does: load modules of the kernel, move mounts, set the clock, restart the machine.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use super::file::{Links, open_regular};
use super::mountapi::{CallError, mount_legacy};

/// finit_module(2) of a file, without parameters. A module that is loaded already is no error.
pub fn load_module(path: &Path) -> io::Result<()> {
    let (file, _) = open_regular(path, Links::Refused).map_err(|error| error.source)?;
    // SAFETY: the descriptor is open, and the parameters are an empty string that ends with a zero byte.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        error => Err(error),
    }
}

/// Moves a mount, which may be the one that becomes the root: mount(2) with `MS_MOVE`.
pub fn move_mount(from: &str, to: &Path) -> Result<(), CallError> {
    mount_legacy(from, to, "", libc::MS_MOVE, "")
}

/// How a machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It starts again.
    Restart,
    /// It stops, and stays on where it cannot be switched off.
    Halt,
    /// It is switched off.
    PowerOff,
}

/// Writes everything to the disks and ends the machine. Returns only if the kernel refuses.
pub fn end(end: End) -> io::Error {
    let command = match end {
        End::Restart => libc::RB_AUTOBOOT,
        End::Halt => libc::RB_HALT_SYSTEM,
        End::PowerOff => libc::RB_POWER_OFF,
    };
    // SAFETY: sync(2) and reboot(2) take no pointers.
    unsafe {
        libc::sync();
        libc::reboot(command);
    }
    io::Error::last_os_error()
}

/// Sets the clock of the system to a time in seconds since 1970: clock_settime(2). The machine's own clock keeps its
/// time.
///
/// # Errors
/// Those of the call.
pub fn set_clock(seconds: i64) -> io::Result<()> {
    let time = libc::timespec { tv_sec: seconds, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec for the length of the call.
    match unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
