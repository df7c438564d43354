//! Readiness notification: systemd's notification socket, and a named pipe.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::{Duration, Instant};

/// Notifies the service manager, if it waits for that, that this process is ready (sd_notify(3)): `READY=1`
/// as a datagram to `$NOTIFY_SOCKET`, which may be an abstract name (`@…`).
///
/// Returns whether a notification was sent.
pub fn service_is_ready() -> io::Result<bool> {
    service_says("READY=1")
}

/// Sends the service manager a state (sd_notify(3)), such as `WATCHDOG=1`; returns whether there is one to send it to.
pub fn service_says(state: &str) -> io::Result<bool> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(false) };
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        path => SocketAddr::from_pathname(Path::new(std::ffi::OsStr::from_bytes(path)))?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    Ok(true)
}

/// Returns whether a path leads to a named pipe.
pub fn is_pipe(path: &Path) -> io::Result<bool> {
    Ok(std::fs::metadata(path)?.file_type().is_fifo())
}

/// Writes one byte to a named pipe; waits up to `patience` for a reader.
///
/// # Errors
/// `TimedOut` if there is none.
pub fn write_to_pipe(path: &Path, byte: u8, patience: Duration) -> io::Result<()> {
    let end = Instant::now() + patience;
    loop {
        // Without O_NONBLOCK the open would wait for a reader forever.
        match OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path) {
            Ok(mut pipe) => return pipe.write_all(&[byte]),
            // fifo(7): no process has it open for reading.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
                if Instant::now() >= end {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error),
        }
    }
}
