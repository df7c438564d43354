//! Unmounts what a test has read from.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// Runs a command that unmounts, and again while the mount is busy; it must succeed.
///
/// A program that another test is starting holds what was open in this process until it is executed, and on a busy machine that
/// may take long.
pub fn unmount(command: &mut Command) {
    let begin = Instant::now();
    loop {
        let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; install `mount`"));
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return;
        }
        let waits = said.contains("busy") && begin.elapsed() < Duration::from_secs(300);
        assert!(waits, "{command:?}: {}: {said}", output.status);
        thread::sleep(Duration::from_millis(50));
    }
}
