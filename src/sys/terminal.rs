//! Terminals that are not the one of this process: the consoles of a machine (termios(3)).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a terminal to read and write, without making it that of this process.
///
/// # Errors
/// Those of open(2).
pub fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC).open(path)
}

/// Sets a serial line to 115,200 bits a second, 8 bits, no parity. What is no serial line does not care.
///
/// # Errors
/// Those of tcgetattr(3) and tcsetattr(3).
pub fn set_fast(terminal: &File) -> io::Result<()> {
    // SAFETY: termios is plain data, for which zeros are a valid value; the descriptor is open, and the pointer valid,
    // for the length of each call.
    let done = unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        libc::tcgetattr(terminal.as_raw_fd(), &raw mut settings) == 0
            && libc::cfsetspeed(&raw mut settings, libc::B115200) == 0
            && libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &raw const settings) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Waits until a terminal has sent all that was written to it.
///
/// # Errors
/// Those of tcdrain(3).
pub fn drain(terminal: &File) -> io::Result<()> {
    // SAFETY: no pointers; the descriptor is open.
    match unsafe { libc::tcdrain(terminal.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
