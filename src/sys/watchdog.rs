//! The watchdog of a machine, which restarts it unless somebody writes to it in time (Documentation/watchdog of Linux).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

/// The first watchdog of a machine.
pub const DEVICE: &str = "/dev/watchdog";
/// `WDIOC_SETTIMEOUT`, `_IOWR('W', 6, int)` of linux/watchdog.h.
const SET_TIMEOUT: libc::Ioctl = 0xc004_5706_u32 as libc::Ioctl;

/// Starts a watchdog, and leaves it running: the machine restarts if nobody opens and feeds it within its time. Returns
/// that time in seconds, which the hardware may have rounded.
///
/// # Errors
/// `NotFound` if there is no such device, and those of open(2) and of the ioctl.
pub fn start(device: &Path, seconds: u32) -> io::Result<u32> {
    // Opening it starts it. The letter V, which would stop it when it is closed, is never written.
    let file = OpenOptions::new().write(true).open(device)?;
    let mut timeout = libc::c_int::try_from(seconds).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the descriptor is open, and the kernel reads and writes one int at this pointer.
    if unsafe { libc::ioctl(file.as_raw_fd(), SET_TIMEOUT, &raw mut timeout) } != 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(timeout).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// A watchdog that runs, and that is fed while something else than the system keeps the machine busy.
#[derive(Debug)]
pub struct Fed(File);

impl Fed {
    /// Opens one that was started; this feeds it. One that was not started is started by it.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn open(device: &Path) -> io::Result<Self> {
        OpenOptions::new().write(true).open(device).map(Self)
    }

    /// Feeds it. What is dropped leaves it running.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn feed(&mut self) -> io::Result<()> {
        // Any byte feeds it, but for V, which would stop it at the end.
        self.0.write_all(b"\0")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_watchdog_is_an_error() {
        let missing = start(Path::new("/dev/no-such-watchdog"), 60).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let null = start(Path::new("/dev/null"), 60).unwrap_err();
        assert_eq!(null.raw_os_error(), Some(libc::ENOTTY));
    }
}
