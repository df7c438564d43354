//! The end of what a command writes.

use std::io::{self, PipeWriter, Read};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::locks;

/// Most bytes that are kept: the last ones.
const MAX_BYTES: usize = 512;
/// How long a command that has ended is given to be read to its end, and the time between two looks.
const READ_WITHIN: Duration = Duration::from_millis(200);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// The end of what a command writes, which a thread reads.
#[derive(Debug)]
pub struct Said {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: JoinHandle<()>,
}

impl Said {
    /// Returns it with the stream to write to, for stdout or stderr of a command. Whoever keeps that open is waited for.
    ///
    /// # Errors
    /// [`io::Error`] of pipe(2).
    pub fn new() -> io::Result<(Self, PipeWriter)> {
        let (mut reader, writer) = io::pipe()?;
        let bytes: Arc<Mutex<Vec<u8>>> = Arc::default();
        let kept = Arc::clone(&bytes);
        let thread = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                let mut kept = locks::lock(&kept);
                kept.extend_from_slice(buffer.get(..length).unwrap_or_default());
                let surplus = kept.len().saturating_sub(MAX_BYTES);
                kept.drain(..surplus);
            }
        });
        Ok((Self { bytes, thread }, writer))
    }

    /// The last line, in parentheses after a space: for the end of a sentence. Empty if there is none.
    ///
    /// What the command has left running is not waited for.
    pub fn last_line(&self) -> String {
        let begin = Instant::now();
        while !self.thread.is_finished() && begin.elapsed() < READ_WITHIN {
            thread::sleep(LOOK_EVERY);
        }
        let text = String::from_utf8_lossy(&locks::lock(&self.bytes)).into_owned();
        let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty());
        line.map(|line| format!(" ({line})")).unwrap_or_default()
    }
}
