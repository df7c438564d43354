//! Printing: errors with advice, remarks, and answers. The only file that writes to stdout or stderr.
//!
//! Text is escaped here ([`crate::text`]), whoever it comes from. A reader of stdout that has seen
//! enough is no failure; a stdout that cannot be written is one. What cannot be written to stderr is
//! lost: there is nowhere to say so, and it changes no exit code. Nothing here panics. (Descriptors 0
//! to 2 that are closed at the start are opened at /dev/null by Rust's runtime, so no file gets their
//! numbers.)

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use uuid::Uuid;

use super::{Global, advice};
use crate::error::{AnyError, IoContext};
use crate::manifest::{ImportErrors, rules};
use crate::text;

/// Writes one line to stderr.
fn say(line: impl Display) {
    let line = line.to_string();
    let _ = writeln!(io::stderr().lock(), "{}", text::one_line(&line));
}

/// Prints an error to stderr: one line of what and why, then advice.
pub fn report(error: &AnyError) {
    for line in error_lines(error) {
        say(line);
    }
    if let Some(advice) = advice::of(error) {
        say(format_args!("hint: {advice}"));
    }
}

/// The text of an error: one line, but for a manifest's errors, which have a line each.
fn error_lines(error: &AnyError) -> Vec<String> {
    let text = format!("mosfs: {error}");
    let mut cause = Some(error.inner());
    while let Some(this) = cause {
        if let Some(errors) = this.downcast_ref::<ImportErrors>()
            && errors.0.len() > 1
            && let Some((before, after)) = text.split_once(&errors.to_string())
        {
            let mut lines = vec![format!("{before}the import manifest has {} errors", errors.0.len())];
            lines.extend(errors.0.iter().map(ToString::to_string));
            if let Some(last) = lines.last_mut() {
                last.push_str(after);
            }
            return lines;
        }
        cause = this.source();
    }
    vec![text]
}

/// Prints how a command ended, if it failed, and returns its exit code (docs/design.md, exit codes).
pub fn exit_code(done: Result<(), AnyError>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(error.class().exit_code())
        }
    }
}

/// Prints help, or what is wrong with a command line, as clap says it; returns the exit code.
pub fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // Help and version: written by the program's author, with the terminal's styles.
        return match written(error.print().and_then(|()| io::stdout().flush())) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failed) => exit_code(Err(failed)),
        };
    }
    // It quotes the command line, which a script may have had from anybody.
    error.render().to_string().trim_end().lines().for_each(say);
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// Prints a message to stderr: something that happens, or that went otherwise than hoped.
pub fn message(text: impl Display) {
    say(format_args!("mosfs: {text}"));
}

/// Prints a line of help to stderr, as it is.
pub fn plain(text: impl Display) {
    say(text);
}

/// Prints a remark to stderr: something that is not wrong, but worth knowing.
pub fn note(text: impl Display) {
    say(format_args!("mosfs: note: {text}"));
}

/// Prints a warning to stderr.
pub fn warning(text: impl Display) {
    say(format_args!("mosfs: warning: {text}"));
}

/// Where a process in the foreground writes its log. Its lines are escaped by the log.
pub fn log() -> Box<dyn Write + Send> {
    Box::new(io::stderr())
}

/// Where a program that a command runs prints: not to stdout, which has the command's answer.
pub fn of_child() -> std::process::Stdio {
    io::stderr().into()
}

/// Draws a line on the terminal in place of the one before; an empty one leaves nothing.
pub fn draw(line: &str) {
    let mut terminal = io::stderr().lock();
    let _ = write!(terminal, "\r\x1b[K{}", text::one_line(line));
    let _ = terminal.flush();
}

/// Whether stderr is a terminal.
pub fn draws() -> bool {
    io::stderr().is_terminal()
}

/// Prints one line of an answer to stdout.
///
/// # Errors
/// If stdout cannot be written, such as a full disk.
pub fn line(text: impl Display) -> Result<(), AnyError> {
    let text = text.to_string();
    put(format!("{}\n", text::one_line(&text)).as_bytes())
}

/// An answer in lines.
pub trait Lines {
    /// The lines, without their ends.
    fn lines(self) -> Vec<String>;
}

impl Lines for String {
    fn lines(self) -> Vec<String> {
        vec![self]
    }
}

impl Lines for Vec<String> {
    fn lines(self) -> Vec<String> {
        self
    }
}

fn put(bytes: &[u8]) -> Result<(), AnyError> {
    let mut out = io::stdout().lock();
    written(out.write_all(bytes).and_then(|()| out.flush()))
}

/// A reader that has seen enough (`| head`) is not a failure.
fn written(outcome: io::Result<()>) -> Result<(), AnyError> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => Ok(outcome.on("write", "stdout")?),
    }
}

/// Prints a document to stdout: byte for byte, but for a terminal, which gets lines that are escaped.
///
/// # Errors
/// As [`line()`].
pub fn document(bytes: &[u8]) -> Result<(), AnyError> {
    if !io::stdout().is_terminal() {
        return put(bytes);
    }
    String::from_utf8_lossy(bytes).lines().try_for_each(line)
}

/// Prints a signature or another binary answer to stdout; in hex to a terminal.
///
/// # Errors
/// As [`line()`].
pub fn binary(bytes: &[u8]) -> Result<(), AnyError> {
    let text = bytes.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace());
    if io::stdout().is_terminal() && !text { line(crate::digest::hex(bytes)) } else { document(bytes) }
}

/// Prints an answer to stdout as one line of JSON.
///
/// # Errors
/// As [`line()`].
pub fn json(answer: &serde_json::Value) -> Result<(), AnyError> {
    put(format!("{}\n", text::json(&answer.to_string())).as_bytes())
}

/// Prints an answer: JSON with `--json`, else text.
///
/// # Errors
/// As [`line()`].
pub fn answer<T: Lines>(
    global: &Global,
    json: impl FnOnce() -> serde_json::Value,
    text: impl FnOnce() -> T,
) -> Result<(), AnyError> {
    if global.json { self::json(&json()) } else { text().lines().iter().try_for_each(line) }
}

/// Reads a UUID of the command line, in the one form that manifests take.
pub fn uuid(text: &str) -> Result<Uuid, String> {
    rules::uuid(text).map_err(|refused| format!("expected {}", refused.allowed))
}
