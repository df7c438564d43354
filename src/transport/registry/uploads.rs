//! The uploads of a command, in all repositories of a registry: so that a command that ends leaves none behind.
//!
//! An upload exists at the registry from its answer to the request that begins it, of which this side knows nothing yet.
//! Such requests are counted therefore, and whoever ends the uploads waits for their answers. Nothing begins after that.

use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::settings::Endpoint;
use super::url::Url;
use crate::sys::locks;

/// Where an upload goes: the registry, and the place that it named.
pub(super) type Upload = (Endpoint, Url);

#[derive(Default)]
pub(super) struct Uploads {
    state: Mutex<State>,
    /// Notified when a request that begins an upload is answered.
    answered: Condvar,
}

#[derive(Default)]
struct State {
    /// Requests that begin an upload and are not answered.
    beginning: usize,
    /// Uploads that have begun and have not ended.
    open: Vec<Upload>,
    /// Nothing begins any more.
    ended: bool,
}

/// A request that may begin an upload, until it is answered.
pub(super) struct Beginning<'a>(&'a Uploads);

impl Drop for Beginning<'_> {
    fn drop(&mut self) {
        locks::lock(&self.0.state).beginning -= 1;
        self.0.answered.notify_all();
    }
}

impl Uploads {
    /// Counts a request that may begin an upload. Returns `None` if uploads are ended.
    pub(super) fn begin(&self) -> Option<Beginning<'_>> {
        let mut state = locks::lock(&self.state);
        if state.ended {
            return None;
        }
        state.beginning += 1;
        Some(Beginning(self))
    }

    /// Adds an upload that has begun. Returns whether it may be filled: whoever ended the uploads cancels this one too.
    pub(super) fn add(&self, upload: Upload) -> bool {
        let mut state = locks::lock(&self.state);
        state.open.push(upload);
        !state.ended
    }

    /// Notes that an upload has ended, or is given up. Returns whether it was open: it is not where uploads are ended, and
    /// it is cancelled then.
    pub(super) fn remove(&self, upload: &Upload) -> bool {
        let open = &mut locks::lock(&self.state).open;
        let before = open.len();
        open.retain(|one| one != upload);
        open.len() < before
    }

    /// Ends all uploads: calls `cancel` for each, also for those whose beginning is answered within `patience`.
    pub(super) fn end(&self, patience: Duration, cancel: impl Fn(&Upload) + Sync) {
        let (until, cancel) = (Instant::now() + patience, &cancel);
        thread::scope(|scope| {
            let mut state = locks::lock(&self.state);
            state.ended = true;
            loop {
                for upload in std::mem::take(&mut state.open) {
                    scope.spawn(move || cancel(&upload));
                }
                let left = until.saturating_duration_since(Instant::now());
                if state.beginning == 0 || left.is_zero() {
                    return;
                }
                (state, _) = locks::wait_for(&self.answered, state, left);
            }
        });
    }
}
