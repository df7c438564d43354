//! The place that missing bytes come from, and how long it is waited for.
//!
//! A reader's request is sent again until its time is over ([`Link::patience`]); then the link counts as broken:
//! reads of what is not here fail at once, and one request at a time is tried, after 1 s, 2 s, 4 s, then every 5 s,
//! by the next reader or by the background. The first that succeeds mends the link. What is here is read
//! throughout, because it does not come this way.
//!
//! A request of the background that fails breaks nothing: a reader may be answered where it was not. The background
//! rests for as long as a broken link does.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use crate::image::oci::Descriptor;
use crate::sys::locks;
use crate::transport::{RangeAsk, Transport, TransportError};

/// The first pause before the same request is sent again. Each is four times the one before.
const PAUSE: Duration = Duration::from_millis(200);
/// The longest pause of a broken link.
const LONGEST: Duration = Duration::from_secs(5);
/// How often a broken link is written to the log.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// Why bytes cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum LinkError {
    /// The last request failed a moment ago, and nothing has succeeded since.
    #[error("not fetched yet, and its source does not answer: {0}")]
    Broken(String),
    /// This request failed.
    #[error("{0}")]
    Failed(String),
    /// The place sends whole blobs only.
    #[error("{0}")]
    NoRanges(String),
}

/// How urgent a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    /// A reader waits for it.
    Reader,
    /// Nobody waits for it yet; it is sent once.
    Background,
}

/// The place that missing bytes come from.
pub(super) struct Link {
    from: Box<dyn Transport>,
    patience: Duration,
    state: Mutex<State>,
    /// How many readers wait.
    waiting: AtomicUsize,
    no_ranges: AtomicBool,
}

struct State {
    /// Requests that have failed since the last success: while there are any, the link is broken.
    broken: Failures,
    /// Requests of the background that have failed while the link counted as good: it rests.
    resting: Failures,
    last_error: Option<String>,
    said: Option<Instant>,
    /// When a reader last waited.
    last_wait: Option<Instant>,
}

/// Failures in a row, and the pause after them.
#[derive(Clone, Copy, Default)]
struct Failures {
    count: u32,
    /// Nothing is asked before this; nothing without a failure.
    until: Option<Instant>,
}

impl Failures {
    fn any(&self) -> bool {
        self.count > 0
    }

    /// Counts one more, after which nothing is asked for 1, 2, 4 and then [`LONGEST`] seconds.
    fn add(&mut self) {
        let pause = Duration::from_secs(1 << self.count.min(3)).min(LONGEST);
        self.count = self.count.saturating_add(1);
        self.pause(pause);
    }

    fn pause(&mut self, pause: Duration) {
        self.until = Some(Instant::now() + pause);
    }

    /// How long nothing is asked.
    fn left(&self) -> Duration {
        self.until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
    }
}

/// A reader that waits; counted until it is dropped.
pub(super) struct Waiting<'a>(&'a Link);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.lock().last_wait = Some(Instant::now());
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Link {
    /// A link that has not asked anything. `patience` is how long a reader waits.
    pub(super) fn new(from: Box<dyn Transport>, patience: Duration) -> Self {
        let (broken, resting) = (Failures::default(), Failures::default());
        let state = State { broken, resting, last_error: None, said: None, last_wait: None };
        Self {
            from,
            patience,
            state: Mutex::new(state),
            waiting: AtomicUsize::new(0),
            no_ranges: AtomicBool::new(false),
        }
    }

    /// The place.
    pub(super) fn from(&self) -> &dyn Transport {
        self.from.as_ref()
    }

    /// How long a reader waits.
    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// The last error, if nothing has succeeded since.
    pub(super) fn last_error(&self) -> Option<String> {
        self.lock().last_error.clone()
    }

    /// Whether the place sends whole blobs only.
    pub(super) fn has_no_ranges(&self) -> bool {
        self.no_ranges.load(Ordering::Relaxed)
    }

    /// Counts a reader that waits.
    pub(super) fn wait(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        Waiting(self)
    }

    /// Whether no reader waits, and none has for `quiet`.
    pub(super) fn is_idle_for(&self, quiet: Duration) -> bool {
        self.waiting.load(Ordering::Acquire) == 0
            && self.lock().last_wait.is_none_or(|last| last.elapsed() >= quiet)
    }

    /// Forgets what was said in the log of another process.
    pub(super) fn say_again(&self) {
        self.lock().said = None;
    }

    /// How long nothing should be asked in the background; zero if the link is good.
    pub(super) fn closed_for(&self) -> Duration {
        let state = self.lock();
        if state.broken.any() { state.broken.left() } else { state.resting.left() }
    }

    /// Whether the last request failed.
    pub(super) fn is_broken(&self) -> bool {
        self.lock().broken.any()
    }

    /// Fills `buffer` with a part of a blob, unverified.
    ///
    /// # Errors
    /// [`LinkError`]. A reader waits for at most about [`Link::patience`].
    pub(super) fn fetch(
        &self,
        blob: &Descriptor,
        offset: u64,
        buffer: &mut [u8],
        urgency: Urgency,
        distrusted: bool,
    ) -> Result<(), LinkError> {
        let once = {
            let mut state = self.lock();
            if state.broken.any() {
                if !state.broken.left().is_zero() {
                    return Err(LinkError::Broken(state.last_error.clone().unwrap_or_default()));
                }
                // This is the one that tries; others fail until it is known how it ended.
                state.broken.pause(self.patience);
            }
            state.broken.any() || urgency == Urgency::Background
        };
        let deadline = Instant::now() + self.patience;
        let mut pause = PAUSE;
        loop {
            let error = match self.from.read_range(blob, offset, buffer, &RangeAsk { deadline, distrusted }) {
                Ok(()) => {
                    self.succeeded();
                    return Ok(());
                }
                Err(error) => error,
            };
            if let TransportError::NoRanges { .. } = error {
                if !self.no_ranges.swap(true, Ordering::Relaxed) {
                    log::warn!("{error}: its blobs are fetched whole");
                }
                return Err(LinkError::NoRanges(error.to_string()));
            }
            let jitter =
                pause.mul_f64(0.5 + (RandomState::new().build_hasher().finish() % 512) as f64 / 1024.0);
            if once || !error.is_temporary() || Instant::now() + jitter > deadline {
                self.failed(&error, urgency);
                return Err(LinkError::Failed(error.to_string()));
            }
            log::info!("{error}; asking again");
            thread::sleep(jitter);
            pause = pause.saturating_mul(4).min(LONGEST);
        }
    }

    /// Notes that the place answers.
    pub(super) fn succeeded(&self) {
        let mut state = self.lock();
        if state.broken.any() && state.said.is_some() {
            log::info!("{} answers again", self.from.location());
        }
        (state.broken, state.resting) = (Failures::default(), Failures::default());
        (state.last_error, state.said) = (None, None);
    }

    /// Notes that a request failed, and says so in the log.
    pub(super) fn failed(&self, error: &TransportError, urgency: Urgency) {
        let mut state = self.lock();
        state.last_error = Some(error.to_string());
        if urgency == Urgency::Background && !state.broken.any() {
            state.resting.add();
            match state.resting.count {
                1 => log::warn!("{error}"),
                _ => log::info!("{error}"),
            }
            return;
        }
        state.broken.add();
        if state.said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
            state.said = Some(Instant::now());
            log::error!("{error}; reads of what is not here fail until {} answers", self.from.location());
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        locks::lock(&self.state)
    }
}
