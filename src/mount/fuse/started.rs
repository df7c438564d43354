//! Knows when all threads of a connection serve it.
//!
//! A thread that was asked for may not start (RLIMIT_NPROC, a pids cgroup), and fuser starts its threads only when it
//! serves. So each of them is made to take a request: as many questions are asked of the mount at once as there
//! are threads, and no answer is given before each thread has one. Until then nobody has been told of a mount.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::mount::MountError;
use crate::sys;

/// Starts a thread of a daemon.
pub fn spawn<T: Send + 'static>(
    name: &'static str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, MountError> {
    let builder = std::thread::Builder::new().name(name.into()).stack_size(128 << 10);
    builder.spawn(run).map_err(|source| MountError::System { operation: "start a thread", source })
}

/// How many threads have taken their first request.
#[derive(Debug)]
pub struct Started {
    threads: usize,
    arrived: Mutex<usize>,
    changed: Condvar,
    /// All have, or no more will.
    is_over: AtomicBool,
}

impl Started {
    /// Of so many threads, none.
    pub fn new(threads: usize) -> Self {
        let (arrived, changed) = (Mutex::new(0), Condvar::new());
        Self { threads, arrived, changed, is_over: AtomicBool::new(false) }
    }

    /// Called by a thread for each request: the first time it waits for the others.
    pub fn arrive(&self) {
        // Acquire: of no matter for what it guards, and free on x86.
        if self.is_over.load(Ordering::Acquire) {
            return;
        }
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        *arrived += 1;
        if *arrived >= self.threads {
            self.is_over.store(true, Ordering::Release);
            self.changed.notify_all();
        }
        self.until_over(arrived);
    }

    /// No more threads will come: whoever waits goes on.
    pub fn give_up(&self) {
        let _arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_over.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits, and says whether all threads are there.
    fn wait(&self) -> bool {
        let arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        self.until_over(arrived) >= self.threads
    }

    fn until_over(&self, mut arrived: std::sync::MutexGuard<'_, usize>) -> usize {
        while !self.is_over.load(Ordering::Acquire) {
            arrived = self.changed.wait(arrived).unwrap_or_else(PoisonError::into_inner);
        }
        *arrived
    }

    /// Asks the mount until all threads are there, and has it say the attributes of its root: overlayfs copies them
    /// from the kernel's inode, which knows but the type of a root that nobody has looked at.
    ///
    /// Returns whether all threads are there. The questions of a mount whose threads did not all start may stay
    /// unanswered; they end with the process.
    pub fn ask(&self, root: OwnedFd) -> Result<bool, MountError> {
        let root = Arc::new(root);
        let question = |number: usize| {
            let root = root.clone();
            spawn("question", move || match number {
                0 => sys::fuse::refresh(root.as_fd()),
                _ => sys::fuse::ask(root.as_fd()),
            })
        };
        let questions: Vec<JoinHandle<io::Result<()>>> =
            (0..self.threads).map(question).collect::<Result<_, _>>()?;
        if !self.wait() {
            return Ok(false);
        }
        for question in questions {
            match question.join() {
                Ok(answer) => {
                    answer.map_err(|source| MountError::System { operation: "ask the new mount", source })?
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_requests_wait_for_the_last_thread_and_later_ones_for_nobody() {
        let started = Started::new(3);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2).map(|_| scope.spawn(|| started.arrive())).collect();
            let all = scope.spawn(|| started.wait());
            while *started.arrived.lock().unwrap() < 2 {
                std::thread::yield_now();
            }
            assert!(threads.iter().all(|thread| !thread.is_finished()) && !all.is_finished());
            started.arrive();
            assert!(all.join().unwrap());
        });
        started.arrive();
        assert_eq!(*started.arrived.lock().unwrap(), 3);
    }

    #[test]
    fn where_a_thread_did_not_start_nobody_waits_for_ever() {
        let started = Started::new(2);
        std::thread::scope(|scope| {
            let one = scope.spawn(|| started.arrive());
            let all = scope.spawn(|| started.wait());
            while *started.arrived.lock().unwrap() < 1 {
                std::thread::yield_now();
            }
            started.give_up();
            one.join().unwrap();
            assert!(!all.join().unwrap());
        });
    }
}
