//! `-o timeout=SECONDS`: unmounts what nobody uses.
//!
//! In use is a mount with an open file, or with a request within the time. Files are opened without a request otherwise
//! (limits.rs): with a timeout, opens are answered and counted. What the kernel answers from its cache alone, such as
//! stat(2) of a file that it knows, is no request and is not seen. A working folder in the mount is in use as well:
//! the kernel refuses to unmount it, and the time begins anew.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::spin::RequestCounter;

/// How often it is looked at, at the most.
const LOOK: Duration = Duration::from_millis(500);

/// How many files and folders are open.
#[derive(Default)]
pub(super) struct Opens(AtomicU64);

impl Opens {
    pub(super) fn opened(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn released(&self) {
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| count.checked_sub(1));
    }
}

/// Waits until nobody has used the mount for `limit`, and unmounts it; ends when it is done or is not needed.
pub(super) fn run(
    limit: Duration,
    pulse: &RequestCounter,
    opens: &Opens,
    unmount: &mut dyn FnMut() -> io::Result<()>,
) {
    let mut seen = pulse.beats();
    let mut since = Instant::now();
    loop {
        std::thread::sleep(LOOK.min(limit));
        let beats = pulse.beats();
        if beats != seen || opens.0.load(Ordering::Acquire) > 0 {
            (seen, since) = (beats, Instant::now());
            continue;
        }
        if since.elapsed() < limit {
            continue;
        }
        match unmount() {
            Ok(()) => return,
            Err(error) => log::debug!("idle, and not unmounted: {error}"),
        }
        since = Instant::now();
    }
}
