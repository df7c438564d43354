//! Errors of a running mount: counted, and logged once each, at a bounded rate.
//!
//! A reader may request a bad block a thousand times a second. Each place (layer and block, or layer and
//! inode if there is no block) is logged once. [`MOST_PLACES`] of them are remembered; beyond that, or beyond
//! [`LINES_A_SECOND`], lines are only counted and the count is logged.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::image::layer::LayerError;
use crate::image::source::ReadError;
use crate::sys::locks;

/// How many bad places are remembered.
pub const MOST_PLACES: usize = 4096;
/// How many lines are logged per second.
pub const LINES_A_SECOND: u32 = 20;

/// Counts of errors by kind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Reads of blocks that do not match the root hash.
    pub verity: u64,
    /// Reads that failed with an error of the operating system.
    pub io: u64,
    /// Reads of malformed structures.
    pub corrupt: u64,
    /// The last line that was logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<String>,
}

impl Counts {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.verity.saturating_add(self.io).saturating_add(self.corrupt)
    }
}

/// The errors of a running mount.
pub struct Troubles {
    names: Vec<String>,
    verity: AtomicU64,
    io: AtomicU64,
    corrupt: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
    hook: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

struct State {
    seen: HashSet<(usize, u64)>,
    second: Instant,
    lines: u32,
    left_out: u64,
    last: Option<String>,
}

impl Troubles {
    /// Starts with no errors. `names` are the layers' names, bottom first.
    pub fn new(names: Vec<String>) -> Self {
        let state = State { seen: HashSet::new(), second: Instant::now(), lines: 0, left_out: 0, last: None };
        Self {
            names,
            verity: AtomicU64::new(0),
            io: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
            state: Mutex::new(state),
            changed: Condvar::new(),
            hook: OnceLock::new(),
        }
    }

    /// Calls `hook` with each error, and at once if there have been errors. A second hook is ignored.
    pub fn on_error(&self, hook: impl Fn() + Send + Sync + 'static) {
        if self.hook.set(Box::new(hook)).is_ok()
            && self.total() > 0
            && let Some(hook) = self.hook.get()
        {
            hook();
        }
    }

    /// The errors so far.
    pub fn counts(&self) -> Counts {
        Counts {
            verity: self.verity.load(Ordering::Relaxed),
            io: self.io.load(Ordering::Relaxed),
            corrupt: self.corrupt.load(Ordering::Relaxed),
            last: locks::lock(&self.state).last.clone(),
        }
    }

    /// Returns the number of errors so far; cheap.
    pub fn total(&self) -> u64 {
        [&self.verity, &self.io, &self.corrupt].iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// Waits until there are more errors than `told`, and returns how many there are.
    pub fn wait_beyond(&self, told: u64) -> u64 {
        let mut state = locks::lock(&self.state);
        while self.total() <= told {
            state = locks::wait(&self.changed, state);
        }
        self.total()
    }

    /// Counts an error of a layer that a read of `ino` encountered, and logs it if it is new.
    pub fn report(&self, layer: usize, ino: u64, error: &LayerError) {
        // A block of the image and an inode cannot be confused: inode numbers are above 2^48, block numbers
        // below.
        let (count, place) = match error {
            LayerError::Read(ReadError::Verity { block, .. }) => (&self.verity, *block),
            LayerError::Read(ReadError::Length { .. }) => (&self.verity, ino),
            LayerError::Read(ReadError::Io { offset, .. }) => (&self.io, offset / 4096),
            LayerError::Read(ReadError::OutOfRange { .. }) => (&self.corrupt, ino),
            LayerError::Corrupt { .. } | LayerError::WrongType { .. } => (&self.corrupt, ino),
        };
        let mut state = locks::lock(&self.state);
        count.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_all();
        if let Some(hook) = self.hook.get() {
            hook();
        }
        if state.seen.contains(&(layer, place)) {
            return;
        }
        if state.second.elapsed() >= Duration::from_secs(1) {
            if state.left_out > 0 {
                log::error!("{} more errors were not logged", state.left_out);
            }
            (state.second, state.lines, state.left_out) = (Instant::now(), 0, 0);
        }
        if state.lines >= LINES_A_SECOND || state.seen.len() >= MOST_PLACES {
            state.left_out += 1;
            return;
        }
        state.lines += 1;
        state.seen.insert((layer, place));
        let name = self.names.get(layer).map_or("?", String::as_str);
        let line = format!("{name}: inode {ino:#x}: {error}");
        log::error!("{line}");
        state.last = Some(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_is_logged_once_and_all_are_counted() {
        let troubles = Troubles::new(vec!["layer sha256:aa".into()]);
        let bad = |block| {
            let (expected, found) = (crate::digest::Digest::of(b"a"), crate::digest::Digest::of(b"b"));
            LayerError::Read(ReadError::Verity { what: "data".into(), block, expected, found })
        };
        for _ in 0..10 {
            troubles.report(0, 1 << 48, &bad(7));
        }
        let counts = troubles.counts();
        assert_eq!((counts.verity, counts.total(), troubles.total()), (10, 10, 10));
        let last = counts.last.unwrap();
        for part in ["layer sha256:aa: inode", "block 7", "expected", "hash"] {
            assert!(last.contains(part), "{last}");
        }
        for block in 0..100_000 {
            troubles.report(0, 1 << 48, &bad(block));
        }
        let state = troubles.state.lock().unwrap();
        assert!(state.seen.len() <= MOST_PLACES && state.left_out > 0);
    }
}
