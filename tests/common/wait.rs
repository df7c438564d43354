//! Waits for something that has no event.

use std::thread;
use std::time::{Duration, Instant};

/// Waits until something is so, however slow this machine is.
pub fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !so() {
        assert!(begin.elapsed() < Duration::from_secs(300), "waited in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
