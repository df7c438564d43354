//! Showing progress: a line on a terminal, JSON lines to a file descriptor, or plain lines with `-v`.
//!
//! One JSON object a line, `--progress-fd N`:
//!
//! ```text
//! {"event":"start","id":1,"step":"convert","object":"sha256:…","total_bytes":53000000}
//! {"event":"advance","id":1,"bytes":1048576,"bytes_per_second":9437184,"seconds_left":6}
//!                                                   bytes: so far; at most ten a second a task
//! {"event":"done","id":1}
//! ```
//!
//! A task that others are part of, such as all blobs of an update, has the object `all`: its numbers are those of
//! the whole. The rate is that of the last seconds; it and `seconds_left` are missing until they are known.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Global, output};
use crate::error::{AnyError, IoContext};
use crate::progress::{ALL, Event, Progress, Sink};
use crate::sys::locks;

/// The minimum time between two reports of a task.
const INTERVAL: Duration = Duration::from_millis(100);
/// Columns of a line on the terminal.
const WIDTH: usize = 78;

/// The progress that this command line asked for.
pub(super) fn of(global: &Global) -> Result<Progress, AnyError> {
    let form = match global.progress_fd {
        Some(number) => {
            let path = format!("/proc/self/fd/{number}");
            Form::Json(OpenOptions::new().append(true).open(&path).on("write progress to", &path)?)
        }
        None if output::draws() => Form::Terminal,
        None if global.verbose > 0 => Form::Lines,
        None => return Ok(Progress::silent()),
    };
    Ok(Progress::new(Arc::new(Drawer {
        state: Mutex::new(State { form, tasks: BTreeMap::new(), drawn: None }),
    })))
}

enum Form {
    Terminal,
    Json(File),
    Lines,
}

/// Over how many drawings a rate is taken.
const SAMPLES: usize = 30;

/// How fast a task has been of late.
#[derive(Default)]
struct Speed {
    /// Bytes that were done, and when; the oldest first.
    samples: VecDeque<(Instant, u64)>,
}

impl Speed {
    fn note(&mut self, now: Instant, bytes: u64) {
        if self.samples.len() == SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back((now, bytes));
    }

    /// In bytes a second.
    fn rate(&self) -> Option<u64> {
        let ((from, before), (to, after)) = (self.samples.front()?, self.samples.back()?);
        let seconds = to.duration_since(*from).as_secs_f64();
        (seconds > 0.0).then(|| (after.saturating_sub(*before) as f64 / seconds) as u64)
    }

    fn seconds_left(&self, total: Option<u64>) -> Option<u64> {
        let (_, done) = self.samples.back()?;
        let rate = self.rate().filter(|rate| *rate > 0)?;
        Some(total?.saturating_sub(*done).div_ceil(rate))
    }
}

struct Running {
    step: String,
    object: String,
    total_bytes: Option<u64>,
    bytes: u64,
    told: Instant,
    begun: Instant,
    speed: Speed,
}

struct State {
    form: Form,
    tasks: BTreeMap<u64, Running>,
    /// When the terminal's line was drawn, if there is one.
    drawn: Option<Instant>,
}

struct Drawer {
    state: Mutex<State>,
}

impl Sink for Drawer {
    fn event(&self, event: Event<'_>) {
        let mut state = locks::lock(&self.state);
        let now = Instant::now();
        match event {
            Event::Start { id, step, object, total_bytes } => {
                state.tell(&json!({
                    "event": "start", "id": id, "step": step, "object": object, "total_bytes": total_bytes,
                }));
                state.say(|| format!("{step} {object}"));
                let (step, object) = (step.to_string(), object.to_string());
                let mut speed = Speed::default();
                speed.note(now, 0);
                let running = Running { step, object, total_bytes, bytes: 0, told: now, begun: now, speed };
                state.tasks.insert(id, running);
            }
            Event::Advance { id, bytes } => {
                let Some(task) = state.tasks.get_mut(&id) else { return };
                task.bytes = task.bytes.saturating_add(bytes);
                if now.duration_since(task.told) >= INTERVAL {
                    task.told = now;
                    task.speed.note(now, task.bytes);
                    let mut event = json!({ "event": "advance", "id": id, "bytes": task.bytes });
                    if let (Some(rate), Some(fields)) = (task.speed.rate(), event.as_object_mut()) {
                        fields.insert("bytes_per_second".into(), rate.into());
                        let left = task.speed.seconds_left(task.total_bytes);
                        left.iter()
                            .for_each(|left| drop(fields.insert("seconds_left".into(), (*left).into())));
                    }
                    state.tell(&event);
                }
            }
            Event::Done { id } => {
                state.tell(&json!({ "event": "done", "id": id }));
                if let Some(task) = state.tasks.remove(&id) {
                    state.say(|| {
                        format!("{} {}: {:.1} s", task.step, task.object, task.begun.elapsed().as_secs_f64())
                    });
                }
            }
        }
        state.draw(now);
    }
}

impl State {
    /// A reader that went away does not stop the work.
    fn tell(&mut self, value: &serde_json::Value) {
        if let Form::Json(file) = &mut self.form {
            let _ = file.write_all(format!("{value}\n").as_bytes());
        }
    }

    fn say(&self, text: impl FnOnce() -> String) {
        if matches!(self.form, Form::Lines) {
            output::message(text());
        }
    }

    fn draw(&mut self, now: Instant) {
        if !matches!(self.form, Form::Terminal) {
            return;
        }
        // The whole, where there is one.
        let whole = self.tasks.values().find(|task| task.object == ALL);
        let Some(task) = whole.or(self.tasks.values().next_back()) else {
            if self.drawn.take().is_some() {
                output::draw("");
            }
            return;
        };
        if self.drawn.is_some_and(|drawn| now.duration_since(drawn) < INTERVAL) {
            return;
        }
        let done = match task.total_bytes {
            Some(total) if total > 0 => {
                let percent = (u128::from(task.bytes) * 100 / u128::from(total)).min(100);
                format!("{percent:3} % of {} MiB", total >> 20)
            }
            _ => format!("{} MiB", task.bytes >> 20),
        };
        let mut speed =
            task.speed.rate().map(|rate| format!(", {:.1} MB/s", rate as f64 / 1e6)).unwrap_or_default();
        if let Some(left) = task.speed.seconds_left(task.total_bytes) {
            speed += &format!(", {}:{:02} left", left / 60, left % 60);
        }
        let object: String = task.object.chars().take(24).collect();
        let line: String = format!("{} {object} {done}{speed}", task.step).chars().take(WIDTH).collect();
        output::draw(&line);
        self.drawn = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_last_seconds() {
        let mut speed = Speed::default();
        let begun = Instant::now();
        assert_eq!((speed.rate(), speed.seconds_left(Some(1))), (None, None));
        speed.note(begun, 0);
        assert_eq!(speed.rate(), None);
        // A thousand bytes each tenth of a second, then a hundred.
        let at = |tenth: u64| begun + Duration::from_millis(tenth * 100);
        (1..=10).for_each(|tenth| speed.note(at(tenth), tenth * 1000));
        assert_eq!(speed.rate(), Some(10_000));
        assert_eq!(speed.seconds_left(Some(50_000)), Some(4));
        assert_eq!(speed.seconds_left(None), None);
        (11..=60).for_each(|tenth| speed.note(at(tenth), 10_000 + (tenth - 10) * 100));
        assert_eq!(speed.rate(), Some(1000));
        assert_eq!(speed.seconds_left(Some(1)), Some(0));
    }
}
