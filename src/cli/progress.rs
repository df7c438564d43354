//! Showing progress: a line on a terminal, JSON lines to a file descriptor, or plain lines with `-v`.
//!
//! One JSON object a line, `--progress-fd N`:
//!
//! ```text
//! {"event":"start","id":1,"step":"convert","object":"sha256:…","total_bytes":53000000}
//! {"event":"advance","id":1,"bytes":1048576}        total so far; at most ten a second a task
//! {"event":"done","id":1}
//! ```

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Global, output};
use crate::error::{AnyError, IoContext};
use crate::progress::{Event, Progress, Sink};

/// How often a task is drawn, or told of, at the most.
const INTERVAL: Duration = Duration::from_millis(100);
/// Columns of a line on the terminal.
const WIDTH: usize = 78;

/// The progress that this command line asked for.
pub fn of(global: &Global) -> Result<Progress, AnyError> {
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

struct Running {
    step: String,
    object: String,
    total_bytes: Option<u64>,
    bytes: u64,
    told: Instant,
    begun: Instant,
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
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match event {
            Event::Start { id, step, object, total_bytes } => {
                state.tell(&json!({
                    "event": "start", "id": id, "step": step, "object": object, "total_bytes": total_bytes,
                }));
                state.say(|| format!("{step} {object}"));
                let (step, object) = (step.to_string(), object.to_string());
                state
                    .tasks
                    .insert(id, Running { step, object, total_bytes, bytes: 0, told: now, begun: now });
            }
            Event::Advance { id, bytes } => {
                let Some(task) = state.tasks.get_mut(&id) else { return };
                task.bytes = task.bytes.saturating_add(bytes);
                if now.duration_since(task.told) >= INTERVAL {
                    task.told = now;
                    let bytes = task.bytes;
                    state.tell(&json!({ "event": "advance", "id": id, "bytes": bytes }));
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
        let Some(task) = self.tasks.values().next_back() else {
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
        let object: String = task.object.chars().take(24).collect();
        let line: String = format!("{} {object} {done}", task.step).chars().take(WIDTH).collect();
        output::draw(&line);
        self.drawn = Some(now);
    }
}
