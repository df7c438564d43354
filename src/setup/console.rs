//! The consoles of a machine that is being set up: what is said is on all of them, and whoever types on one is heard.
//!
//! Each console has a thread that writes, so that one which does not take text (a serial line with nobody at its other
//! end, a screen that somebody has stopped with Ctrl-S) holds up nothing, and a thread that reads lines.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use crate::sys::file::read_named;
use crate::sys::terminal;
use crate::text;

/// The consoles of the kernel, by their names.
const ACTIVE: &str = "/sys/class/tty/console/active";
/// Longest such list, in bytes.
const MAX_LIST: u64 = 4 << 10;
/// How long the consoles may take to show what was said, before the machine ends.
const SHOWN_WITHIN: Duration = Duration::from_secs(5);

/// What a console's thread is to do.
enum Order {
    /// Write this.
    Write(Vec<u8>),
    /// Say that everything before it has been shown.
    Drain(Sender<()>),
}

/// What shows text on all consoles.
#[derive(Clone)]
pub(super) struct Screens(Vec<Sender<Order>>);

impl Screens {
    /// Shows bytes as they are.
    pub(super) fn write(&self, bytes: &[u8]) {
        for writer in &self.0 {
            // One whose thread has ended shows nothing any more.
            let _ = writer.send(Order::Write(bytes.to_vec()));
        }
    }
}

/// The consoles.
pub(super) struct Consoles {
    screens: Screens,
    lines: Receiver<String>,
}

impl Consoles {
    /// Opens the consoles of the kernel, and one more.
    pub(super) fn open(more: Option<&str>) -> Self {
        let active = read_named(Path::new(ACTIVE), MAX_LIST).unwrap_or_default();
        let active = String::from_utf8_lossy(&active).into_owned();
        let mut names: BTreeSet<&str> = active.split_whitespace().collect();
        if names.is_empty() {
            names.insert("console");
        }
        let added = more.filter(|name| names.insert(name));
        let open = |name: &&str| {
            let terminal = terminal::open(&PathBuf::from("/dev").join(name)).ok()?;
            if Some(*name) == added {
                // The kernel has not set its speed. What is no serial line refuses.
                let _ = terminal::set_fast(&terminal);
            }
            Some(terminal)
        };
        Self::of(names.iter().filter_map(open).collect())
    }

    /// No console at all.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self::of(Vec::new())
    }

    fn of(terminals: Vec<File>) -> Self {
        let (typed, lines) = mpsc::channel();
        let mut writers = Vec::new();
        for terminal in terminals {
            let (orders, taken) = mpsc::channel();
            if let Ok(terminal) = terminal.try_clone() {
                thread::spawn(move || write(terminal, &taken));
                writers.push(orders);
            }
            let typed = typed.clone();
            thread::spawn(move || {
                for line in BufReader::new(terminal).lines() {
                    let Ok(line) = line else { break };
                    if typed.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Self { screens: Screens(writers), lines }
    }

    /// Returns what shows text on them, for another thread.
    pub(super) fn screens(&self) -> Screens {
        self.screens.clone()
    }

    /// Shows a line.
    pub(super) fn say(&self, line: &str) {
        self.screens.write(format!("{}\n", text::one_line(line)).as_bytes());
    }

    /// Returns the next line that somebody types, if it comes within `patience`.
    pub(super) fn line(&self, patience: Duration) -> Option<String> {
        match self.lines.recv_timeout(patience) {
            Ok(line) => Some(line),
            Err(mpsc::RecvTimeoutError::Timeout) => None,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                // There is no console that could be typed on.
                thread::sleep(patience);
                None
            }
        }
    }

    /// Forgets what was typed before.
    pub(super) fn forget(&self) {
        while self.lines.try_recv().is_ok() {}
    }

    /// Waits until everything is shown, within bounds.
    pub(super) fn drain(&self) {
        let (done, shown) = mpsc::channel();
        for writer in &self.screens.0 {
            let _ = writer.send(Order::Drain(done.clone()));
        }
        drop(done);
        let end = Instant::now() + SHOWN_WITHIN;
        while shown.recv_timeout(end.saturating_duration_since(Instant::now())).is_ok() {}
    }
}

fn write(mut terminal: File, orders: &Receiver<Order>) {
    for order in orders {
        match order {
            Order::Write(bytes) => {
                let _ = terminal.write_all(&bytes);
            }
            Order::Drain(done) => {
                let _ = terminal::drain(&terminal);
                let _ = done.send(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use std::os::unix::fs::OpenOptionsExt;

    #[test]
    fn every_console_shows_what_is_said_and_one_that_blocks_holds_up_nothing() {
        let mut shown = tempfile::tempfile().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stuck");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        // A pipe that nobody empties: more than it takes blocks its writer.
        let stuck = File::options().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(&path).unwrap();
        let consoles = Consoles::of(vec![shown.try_clone().unwrap(), stuck]);
        consoles.screens().write(&vec![b'x'; 1 << 20]);
        consoles.say("a line\u{1b}[2J");
        let mut text = String::new();
        while !text.ends_with('\n') {
            thread::sleep(Duration::from_millis(5));
            text.clear();
            shown.rewind().unwrap();
            let _ = shown.read_to_string(&mut text);
        }
        let line = text.trim_start_matches('x').trim_end();
        assert!(line.starts_with("a line") && !line.contains('\u{1b}'), "{line:?}");
    }

    #[test]
    fn a_line_is_heard_from_any_console() {
        let mut typed = tempfile::tempfile().unwrap();
        typed.write_all(b"\n2\n").unwrap();
        typed.rewind().unwrap();
        let consoles = Consoles::of(vec![typed]);
        let line = || consoles.line(Duration::from_secs(600));
        assert_eq!([line(), line()], [Some(String::new()), Some("2".into())]);
        assert_eq!(consoles.line(Duration::from_millis(1)), None);
    }
}
