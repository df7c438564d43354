//! Bytes that are being fetched: one thread fetches them, and all who need them wait for it.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use super::link::LinkError;
use crate::sys::locks::{self, lock};

/// The bytes, or why they did not come.
pub(super) type Fetched = Result<Arc<Vec<u8>>, LinkError>;

/// A fetch that others may wait for.
#[derive(Default)]
pub(super) struct Flight {
    outcome: Mutex<Option<Fetched>>,
    landed: Condvar,
}

impl Flight {
    /// Waits for the outcome; `None` where it does not come in time.
    pub(super) fn wait(&self, deadline: Instant) -> Option<Fetched> {
        let mut outcome = lock(&self.outcome);
        loop {
            if let Some(known) = &*outcome {
                return Some(known.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            outcome = locks::wait_for(&self.landed, outcome, left).0;
        }
    }

    /// Fetches the bytes and wakes all who wait. `forget` runs first, so that a later reader begins a flight of its
    /// own.
    pub(super) fn fly(&self, fetch: impl FnOnce() -> Fetched, forget: impl Fn()) -> Fetched {
        struct Landing<'a, F: Fn()>(&'a Flight, F, Fetched);
        impl<F: Fn()> Drop for Landing<'_, F> {
            fn drop(&mut self) {
                (self.1)();
                *lock(&self.0.outcome) = Some(self.2.clone());
                self.0.landed.notify_all();
            }
        }
        // Lands also where a thread panics, so that nobody waits for ever.
        let ended = Err(LinkError::Failed("the thread that fetched it ended".into()));
        let mut landing = Landing(self, forget, ended);
        landing.2 = fetch();
        landing.2.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn all_who_wait_get_the_outcome_also_that_of_a_thread_that_panicked() {
        let far = Instant::now() + Duration::from_secs(600);
        let (good, bad, forgotten) = (Flight::default(), Flight::default(), AtomicU32::new(0));
        let forget = || {
            forgotten.fetch_add(1, Ordering::Relaxed);
        };
        assert!(good.wait(Instant::now()).is_none());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| good.wait(far));
            assert_eq!(*good.fly(|| Ok(Arc::new(vec![7])), forget).unwrap(), [7]);
            assert_eq!(*waiting.join().unwrap().unwrap().unwrap(), [7]);
        });
        let outcome = catch_unwind(AssertUnwindSafe(|| bad.fly(|| panic!("while it fetches"), forget)));
        assert!(outcome.is_err());
        let error = bad.wait(far).unwrap().unwrap_err();
        assert_eq!(error.to_string(), "the thread that fetched it ended");
        assert_eq!(forgotten.into_inner(), 2);
    }
}
