//! Starts the threads of a daemon, and knows when those that serve run.
//!
//! A thread that was asked for may not start (RLIMIT_NPROC, a pids cgroup), and fuser starts its threads only when it
//! serves. They are counted by their names. The mount itself is not asked from here: a process that waits for an answer
//! of its own cannot be killed while it has to give it.

use std::fs;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::mount::MountError;
use crate::sys::locks;

/// What the names of fuser's threads begin with.
const PREFIX: &str = "fuser-";
/// Without /proc nobody counts threads: those that cannot start have failed by then.
const FAILED_WITHIN: Duration = Duration::from_millis(50);

/// Starts a thread of a daemon.
pub(super) fn spawn<T: Send + 'static>(
    name: &'static str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, MountError> {
    let builder = std::thread::Builder::new().name(name.into()).stack_size(128 << 10);
    builder.spawn(run).map_err(|source| MountError::System { operation: "start a thread", source })
}

/// A thread of a daemon that is started when it is first needed: a mount that nobody uses has none of them.
pub(super) struct OnDemand {
    name: &'static str,
    is_waiting: AtomicBool,
    run: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl OnDemand {
    /// A thread that is not started yet.
    pub(super) fn new(name: &'static str, run: impl FnOnce() + Send + 'static) -> Self {
        Self { name, is_waiting: AtomicBool::new(true), run: Mutex::new(Some(Box::new(run))) }
    }

    /// Starts it, unless it was. One that cannot start is logged: the mount works without it.
    pub(super) fn start(&self) {
        if !self.is_waiting.swap(false, Ordering::AcqRel) {
            return;
        }
        let run = locks::lock(&self.run).take();
        if let Some(Err(error)) = run.map(|run| spawn(self.name, run)) {
            log::warn!("{} ({error})", self.name);
        }
    }
}

/// Waits until so many threads serve. False where `serving`, which starts them, ends before.
pub(super) fn all_serve<T>(threads: usize, serving: &JoinHandle<T>) -> bool {
    let begin = Instant::now();
    while !serving.is_finished() {
        let are_there = match count() {
            Ok(found) => found >= threads,
            Err(_) => begin.elapsed() > FAILED_WITHIN,
        };
        if are_there {
            return true;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    false
}

/// How many of fuser's threads there are.
fn count() -> io::Result<usize> {
    let names =
        fs::read_dir("/proc/self/task")?.filter_map(|task| fs::read(task.ok()?.path().join("comm")).ok());
    Ok(names.filter(|name| name.starts_with(PREFIX.as_bytes())).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_on_demand_starts_once() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = OnDemand::new("demand", move || sender.send(()).unwrap());
        assert!(receiver.try_recv().is_err());
        thread.start();
        thread.start();
        receiver.recv().unwrap();
        assert!(receiver.recv().is_err(), "it has run once, and its sender is gone");
    }

    #[test]
    fn threads_that_serve_are_counted_and_one_that_does_not_start_ends_the_wait() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let wait = move || {
            let _ = receiver.recv();
        };
        let builder = std::thread::Builder::new().name(format!("{PREFIX}0"));
        let one = builder.spawn(wait).unwrap();
        assert!(all_serve(1, &one));
        drop(sender);
        assert!(!all_serve(1000, &one));
        one.join().unwrap();
    }
}
