//! Progress reports of long operations. The library never prints: it sends events to a [`Sink`], which the
//! command line displays on a terminal or writes as JSON lines (`--progress-fd`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The object of a task that others are part of.
pub const ALL: &str = "all";

/// An event of a task. Tasks run in parallel and are identified by `id`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// A task begins.
    Start {
        /// Unique within the process.
        id: u64,
        /// The operation, as a verb: `fetch`, `convert`, `hash`, `verify`.
        step: &'a str,
        /// The object of the operation: a target, a digest or a path.
        object: &'a str,
        /// The total number of bytes, if known.
        total_bytes: Option<u64>,
    },
    /// More bytes of a task are done.
    Advance {
        /// The task.
        id: u64,
        /// How many bytes were done since the last event of this task.
        bytes: u64,
    },
    /// A task has ended, successfully or not.
    Done {
        /// The task.
        id: u64,
    },
}

/// A receiver of progress events.
pub trait Sink: Send + Sync {
    /// Handles one event; called from any thread.
    fn event(&self, event: Event<'_>);
}

/// A handle that is passed to long operations. The default one is silent.
///
/// ```
/// use std::sync::{Arc, Mutex};
///
/// use mosfs::{Progress, ProgressEvent, ProgressSink};
///
/// /// Notes the steps that were begun.
/// #[derive(Default)]
/// struct Steps(Mutex<Vec<String>>);
///
/// impl ProgressSink for Steps {
///     fn event(&self, event: ProgressEvent<'_>) {
///         if let ProgressEvent::Start { step, object, .. } = event {
///             self.0.lock().unwrap().push(format!("{step} {object}"));
///         }
///     }
/// }
///
/// let steps = Arc::new(Steps::default());
/// let progress = Progress::new(steps.clone());
/// progress.task("fetch", "web", Some(100)).advance(100);
/// assert_eq!(*steps.0.lock().unwrap(), ["fetch web"]);
/// ```
#[derive(Clone, Default)]
pub struct Progress {
    sink: Option<Arc<dyn Sink>>,
}

impl Progress {
    /// Returns a handle that reports to `sink`.
    pub fn new(sink: Arc<dyn Sink>) -> Self {
        Self { sink: Some(sink) }
    }

    /// Returns a handle that reports nothing.
    pub fn silent() -> Self {
        Self::default()
    }

    /// Begins a task; it ends when the returned value is dropped.
    pub fn task(&self, step: &str, object: &str, total_bytes: Option<u64>) -> Task {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        if let Some(sink) = &self.sink {
            sink.event(Event::Start { id, step, object, total_bytes });
        }
        Task { id, sink: self.sink.clone(), whole: None }
    }
}

/// A running task of a [`Progress`].
pub struct Task {
    id: u64,
    sink: Option<Arc<dyn Sink>>,
    whole: Option<Arc<Task>>,
}

impl Task {
    /// Makes this task a part of another one, which advances with it.
    pub fn part_of(self, whole: &Arc<Task>) -> Self {
        let mut this = self;
        this.whole = Some(whole.clone());
        this
    }

    /// Reports that `bytes` more are done. Cheap enough for every 128 KiB, not for every 4 KiB.
    pub fn advance(&self, bytes: u64) {
        if let Some(sink) = &self.sink {
            sink.event(Event::Advance { id: self.id, bytes });
        }
        if let Some(whole) = &self.whole {
            whole.advance(bytes);
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if let Some(sink) = &self.sink {
            sink.event(Event::Done { id: self.id });
        }
    }
}
