//! Where a daemon writes its log: a file in the run folder, and the system's log.
//!
//! ```text
//! file    MICROSECONDS-SINCE-1970 LEVEL TEXT, one line each; at most [`MOST_BYTES`], then it starts over
//! syslog  <priority>mosfs[pid]: TEXT to the datagram socket /dev/log (RFC 3164, without a time stamp:
//!         the system's log adds its own)
//! ```

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::sys::file::create_file;
use crate::sys::locks;
use crate::text::one_line;

/// The log file starts over at this many bytes.
const MOST_BYTES: u64 = 256 * 1024;

/// The log of a daemon.
struct DaemonLog {
    path: Option<PathBuf>,
    state: Mutex<State>,
}

struct State {
    /// Opened when the first line is written.
    file: Option<File>,
    written: u64,
    syslog: Option<UnixDatagram>,
    /// Where a foreground process writes.
    terminal: Option<Box<dyn Write + Send>>,
}

/// Sends this process' log to a file (if one is given), the system log, and `terminal`.
///
/// Does nothing if a log has already been set up.
pub(super) fn install(path: Option<&Path>, syslog: bool, terminal: Option<Box<dyn Write + Send>>) {
    let state = State { file: None, written: 0, syslog: syslog.then(open_syslog).flatten(), terminal };
    let log = DaemonLog { path: path.map(Path::to_path_buf), state: Mutex::new(state) };
    if log::set_boxed_logger(Box::new(log)).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

fn open_syslog() -> Option<UnixDatagram> {
    let socket = UnixDatagram::unbound().ok()?;
    socket.connect("/dev/log").ok()?;
    // A hanging system log must not block a read.
    socket.set_nonblocking(true).ok()?;
    Some(socket)
}

impl Log for DaemonLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // A reply that no caller waits for any more (an interrupted request) is not worth logging.
        metadata.level() <= Level::Info && !metadata.target().starts_with("fuser")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // Always a single line, whatever an image or a path contains.
        let text = record.args().to_string();
        let text = one_line(&text);
        let mut state = locks::lock(&self.state);
        if let Some(path) = &self.path {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let line = format!("{}.{:06} {} {text}\n", now.as_secs(), now.subsec_micros(), record.level());
            if state.written > MOST_BYTES {
                (state.file, state.written) = (None, 0);
            }
            if state.file.is_none() {
                state.file = create_file(path, 0o644).ok();
            }
            if let Some(file) = &mut state.file {
                let _ = file.write_all(line.as_bytes());
            }
            state.written += line.len() as u64;
        }
        if let Some(socket) = &state.syslog {
            // Facility daemon (3), severities of RFC 3164.
            let severity = match record.level() {
                Level::Error => 3,
                Level::Warn => 4,
                _ => 6,
            };
            let message = format!("<{}>mosfs[{}]: {text}", 3 << 3 | severity, std::process::id());
            let _ = socket.send(message.as_bytes());
        }
        if let Some(terminal) = &mut state.terminal {
            let _ = writeln!(terminal, "mosfs: {text}");
        }
    }

    fn flush(&self) {}
}
