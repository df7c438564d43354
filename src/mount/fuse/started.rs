//! Starts the threads of a daemon, and knows when those that serve run.
//!
//! A thread that was asked for may not start (RLIMIT_NPROC, a pids cgroup), and fuser starts its threads only when it
//! serves. They are counted by their names. The mount itself is not asked from here: a process that waits for an answer
//! of its own cannot be killed while it has to give it.
//!
//! A thread has the name of the thread that started it (clone(2)) until it first runs and takes its own. fuser starts its
//! threads from [`SERVE`], so both names count: a thread that exists will run, and need not be waited for.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::mount::MountError;
use crate::sys::locks;

/// The name of the thread that starts fuser's threads, and waits for their end.
pub(super) const SERVE: &str = "serve";
/// What the names of fuser's threads begin with.
const PREFIX: &str = "fuser-";
/// For so long the processor is handed on between two looks; a sleep would take longer than most starts.
const YIELD_FOR: Duration = Duration::from_millis(2);
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

/// Waits until so many threads serve. False where `serving`, the thread [`SERVE`], which starts them, ends before.
pub(super) fn all_serve<T>(threads: usize, serving: &JoinHandle<T>) -> bool {
    let begin = Instant::now();
    while !serving.is_finished() {
        let are_there = match count() {
            // One of them has started the others.
            Ok(found) => found > threads,
            Err(_) => begin.elapsed() > FAILED_WITHIN,
        };
        if are_there {
            return true;
        }
        if begin.elapsed() < YIELD_FOR {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
    false
}

/// How many threads there are of fuser, with the one that starts them.
fn count() -> io::Result<usize> {
    let is_of_fuser = |task: &Path| {
        let name = fs::read(task.join("comm")).unwrap_or_default();
        name.trim_ascii_end() == SERVE.as_bytes() || name.starts_with(PREFIX.as_bytes())
    };
    // A thread that has ended since has no name.
    Ok(fs::read_dir("/proc/self/task")?
        .filter(|task| task.as_ref().is_ok_and(|task| is_of_fuser(&task.path())))
        .count())
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
        let (asked, ask) = std::sync::mpsc::channel::<()>();
        let (begun, begin) = std::sync::mpsc::channel();
        let start = move || {
            begun.send(()).unwrap();
            let _ = ask.recv();
            let builder = std::thread::Builder::new().name(format!("{PREFIX}0"));
            builder.spawn(wait).unwrap().join().unwrap();
        };
        let serving = spawn(SERVE, start).unwrap();
        begin.recv().unwrap();
        assert_eq!(count().unwrap(), 1, "the one that starts others is none that serves");
        drop(asked);
        assert!(all_serve(1, &serving));
        drop(sender);
        assert!(!all_serve(1000, &serving));
        serving.join().unwrap();
    }
}
