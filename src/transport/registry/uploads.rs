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

impl Uploads {
    /// Sends a request that may begin an upload; `upload` finds it in the answer. Returns `None` if uploads are ended:
    /// whoever ended them cancels this one too.
    pub(super) fn begin<T, E>(
        &self,
        ask: impl FnOnce() -> Result<T, E>,
        upload: impl FnOnce(&T) -> Option<Upload>,
    ) -> Option<Result<T, E>> {
        let mut state = locks::lock(&self.state);
        if state.ended {
            return None;
        }
        state.beginning += 1;
        drop(state);
        let answer = ask();
        state = locks::lock(&self.state);
        state.beginning -= 1;
        state.open.extend(answer.as_ref().ok().and_then(upload));
        self.answered.notify_all();
        (!state.ended).then_some(answer)
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
        let until = Instant::now() + patience;
        let mut state = locks::lock(&self.state);
        state.ended = true;
        loop {
            let open = std::mem::take(&mut state.open);
            if open.is_empty() {
                let left = until.saturating_duration_since(Instant::now());
                if state.beginning == 0 || left.is_zero() {
                    return;
                }
                (state, _) = locks::wait_for(&self.answered, state, left);
                continue;
            }
            drop(state);
            thread::scope(|scope| {
                for upload in &open {
                    scope.spawn(|| cancel(upload));
                }
            });
            state = locks::lock(&self.state);
        }
    }
}
