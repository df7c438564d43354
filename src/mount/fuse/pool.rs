//! Threads for requests that wait for another machine.
//!
//! The threads that read requests from the kernel never wait for a network: a request whose bytes are not here
//! goes to this pool, so that what is here is served at once, however many readers wait for the rest. Threads are
//! started when they are needed, at most [`MOST`], and end when they have had nothing to do for a while. A request
//! waits for a bounded time (the `patience` of its source), so the queue moves on.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::sys::locks;

/// The most threads. More requests wait in the queue; the kernel sends no more than there are readers.
const MOST: usize = 32;
/// How long a thread without work stays.
const LINGER: Duration = Duration::from_secs(10);
/// The stack of a thread, in bytes.
const STACK: usize = 256 << 10;

type Work = Box<dyn FnOnce() + Send>;

/// Threads for requests that wait.
#[derive(Default)]
pub(super) struct Pool {
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Work>,
    threads: usize,
    idle: usize,
}

impl Pool {
    /// Has `work` done by one of the threads.
    pub(super) fn submit(self: &Arc<Self>, work: Work) {
        let mut state = locks::lock(&self.state);
        state.queue.push_back(work);
        if state.idle >= state.queue.len() || state.threads >= MOST {
            self.news.notify_one();
            return;
        }
        let pool = Arc::clone(self);
        let builder = std::thread::Builder::new().name("waiting".into()).stack_size(STACK);
        match builder.spawn(move || pool.run()) {
            Ok(_) => state.threads += 1,
            Err(error) if state.threads == 0 => {
                log::error!("no thread can be started for a request that waits: {error}");
                // It is answered all the same, here.
                if let Some(work) = state.queue.pop_back() {
                    drop(state);
                    work();
                }
            }
            Err(_) => {}
        }
    }

    fn run(&self) {
        let mut state = locks::lock(&self.state);
        loop {
            if let Some(work) = state.queue.pop_front() {
                drop(state);
                work();
                state = locks::lock(&self.state);
                continue;
            }
            state.idle += 1;
            let (woken, is_over) = locks::wait_for(&self.news, state, LINGER);
            state = woken;
            state.idle -= 1;
            if is_over && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn each_piece_of_work_is_done_once_by_a_bounded_number_of_threads() {
        let pool = Arc::new(Pool::default());
        let (sender, receiver) = mpsc::channel();
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        for number in 0..MOST * 3 {
            let (sender, gate) = (sender.clone(), Arc::clone(&gate));
            pool.submit(Box::new(move || {
                let mut open = gate.0.lock().unwrap();
                while !*open {
                    open = gate.1.wait(open).unwrap();
                }
                sender.send(number).unwrap();
            }));
        }
        assert_eq!(locks::lock(&pool.state).threads, MOST);
        *gate.0.lock().unwrap() = true;
        gate.1.notify_all();
        drop(sender);
        let mut done: Vec<_> = receiver.iter().collect();
        done.sort_unstable();
        assert_eq!(done, (0..MOST * 3).collect::<Vec<_>>());
    }
}
