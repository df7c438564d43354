//! The standard streams that the runtime is given.
//!
//! crun makes the container's user the owner of its standard streams (fchown(2)), so that a program may open
//! `/dev/stdout` again. Of a file that the caller has redirected to, or of `/dev/null`, that would be the host's file.
//!
//! | stream of this process | what the runtime gets |
//! | --- | --- |
//! | terminal | itself: the runtime leaves it alone |
//! | anonymous pipe, socket (the journal's) | itself: it has no owner that anybody sees |
//! | anything else: a file, a named pipe, a device | a pipe, and this process copies |
//!
//! **Rule:** a file of the host never changes its owner.
//!
//! **Rule:** what is copied to a file is written by write(2), never by splice(2), which io::copy() uses. A splice takes the
//! file's position when it begins to wait, and sets it back to that when it ends: what others have written meanwhile
//! through the same open file, such as the other stream after `> FILE 2>&1`, would be overwritten.

use std::fs::File;
use std::io::{self, IsTerminal, PipeReader, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread::JoinHandle;

use crate::sys::{self, daemon::Signals, disk, streams};

/// The signals that are passed on to the runtime while this process copies.
const PASSED_ON: [i32; 7] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGWINCH];

/// What a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A terminal, an anonymous pipe, or a socket.
    Plain,
    /// The null device.
    Null,
    /// A file of the host that has an owner.
    File,
}

fn kind(stream: BorrowedFd<'_>) -> Kind {
    if stream.is_terminal() {
        return Kind::Plain;
    }
    let Ok(file) = stream.try_clone_to_owned().map(File::from) else { return Kind::Plain };
    let Ok(metadata) = file.metadata() else { return Kind::Plain };
    let kind = metadata.file_type();
    if kind.is_char_device() && disk::numbers(metadata.rdev()) == (1, 3) {
        return Kind::Null;
    }
    // What has no name in a file system is listed as `pipe:[…]` (proc(5)).
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let is_anonymous =
        kind.is_fifo() && link.is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(b"pipe:"));
    if kind.is_socket() || is_anonymous { Kind::Plain } else { Kind::File }
}

/// The kinds of stdin, stdout and stderr.
fn kinds() -> [Kind; 3] {
    streams::standard().map(kind)
}

/// Whether the runtime may have the streams of this process in its place, but for the null device.
pub fn can_be_replaced() -> bool {
    !kinds().contains(&Kind::File)
}

/// Has a command use `null` in place of the host's null device.
///
/// # Errors
/// [`io::Error`] if `null` cannot be opened.
pub fn replace_null(command: &mut Command, null: &dyn Fn() -> io::Result<File>) -> io::Result<()> {
    let [input, output, errors] = kinds();
    if input == Kind::Null {
        command.stdin(null()?);
    }
    if output == Kind::Null {
        command.stdout(null()?);
    }
    if errors == Kind::Null {
        command.stderr(null()?);
    }
    Ok(())
}

/// Returns an input that is at its end.
///
/// # Errors
/// [`io::Error`] of pipe(2).
pub fn ended() -> io::Result<PipeReader> {
    io::pipe().map(|(reader, _)| reader)
}

/// Runs the runtime, copies streams that it must not have, and passes signals on; returns how it ended, when all that it
/// has written is copied.
///
/// Only for the main thread of a process that does nothing else.
///
/// # Errors
/// [`io::Error`] if it cannot be started or waited for.
pub fn run(mut command: Command) -> io::Result<ExitStatus> {
    let [input, output, errors] = kinds();
    match input {
        Kind::Plain => {}
        Kind::Null => drop(command.stdin(ended()?)),
        Kind::File => drop(command.stdin(Stdio::piped())),
    }
    let [own_input, own_output, own_errors] = streams::standard();
    let mut both = None;
    match (output, errors) {
        // One pipe, so that lines keep their order.
        (Kind::Plain, _) | (_, Kind::Plain) => {}
        _ if is_same_file(own_output, own_errors) => {
            let (reader, writer) = io::pipe()?;
            command.stdout(writer.try_clone()?).stderr(writer);
            both = Some(reader);
        }
        _ => {}
    }
    if output != Kind::Plain && both.is_none() {
        command.stdout(Stdio::piped());
    }
    if errors != Kind::Plain && both.is_none() {
        command.stderr(Stdio::piped());
    }
    let signals = Signals::block_these(&PASSED_ON)?;
    let mut child = command.spawn()?;
    // The command holds the other ends of pipes.
    drop(command);
    let pid = child.id();
    std::thread::spawn(move || {
        // What a terminal sends reaches the runtime too, which is in the same group of processes.
        while let Ok((signal, is_from_process)) = signals.wait_from() {
            if is_from_process {
                sys::process::signal(pid, signal);
            }
        }
    });
    if let Some(mut to) = child.stdin.take() {
        let mut from = File::from(own_input.try_clone_to_owned()?);
        // Not waited for: it may read for ever what nobody asks for any more.
        std::thread::spawn(move || write_all_of(&mut from, &mut to));
    }
    let mut copies = Vec::new();
    if let Some(from) = both {
        copies.push(copy(from, own_output)?);
    }
    if let Some(from) = child.stdout.take() {
        copies.push(copy(from, own_output)?);
    }
    if let Some(from) = child.stderr.take() {
        copies.push(copy(from, own_errors)?);
    }
    let status = child.wait()?;
    for copy in copies {
        // A full disk, say. The container has gone on without.
        if let Ok(Err(error)) = copy.join() {
            return Err(io::Error::new(error.kind(), format!("cannot write its output: {error}")));
        }
    }
    Ok(status)
}

/// Copies what the runtime writes in a thread. After an error, it reads on: the container must not wait for ever.
fn copy(
    mut from: impl io::Read + Send + 'static,
    to: BorrowedFd<'_>,
) -> io::Result<JoinHandle<io::Result<()>>> {
    let mut to = File::from(to.try_clone_to_owned()?);
    Ok(std::thread::spawn(move || {
        let copied = write_all_of(&mut from, &mut to);
        if copied.is_err() {
            let _ = io::copy(&mut from, &mut io::sink());
        }
        copied
    }))
}

/// Copies by read(2) and write(2).
fn write_all_of(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return to.flush(),
            Ok(length) => to.write_all(buffer.get(..length).unwrap_or_default())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether two streams are the same file.
fn is_same_file(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    let id = |stream: BorrowedFd<'_>| {
        let metadata = File::from(stream.try_clone_to_owned().ok()?).metadata().ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    id(one).is_some_and(|found| id(other) == Some(found))
}

/// The exit code of the runtime: that of the container, or 128 and the number of the signal that ended it.
pub fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// The host's null device.
pub fn null_device() -> &'static Path {
    Path::new("/dev/null")
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn files_of_the_host_are_told_from_what_has_no_owner() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("log")).unwrap();
        let named = dir.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&named).status().unwrap().success());
        let named = File::options().read(true).write(true).open(named).unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let open = |path: &str| File::options().read(true).write(true).open(path).unwrap();
        for (stream, expected) in [
            (file.as_fd(), Kind::File),
            (named.as_fd(), Kind::File),
            (open("/dev/zero").as_fd(), Kind::File),
            (open("/dev/null").as_fd(), Kind::Null),
            (open("/dev/ptmx").as_fd(), Kind::Plain),
            (reader.as_fd(), Kind::Plain),
            (writer.as_fd(), Kind::Plain),
            (socket.as_fd(), Kind::Plain),
        ] {
            assert_eq!(kind(stream), expected, "{stream:?}");
        }
    }
}
