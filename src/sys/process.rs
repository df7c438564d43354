//! Processes: signals to oneself, and where one's own program is.

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Ends this process at once, as a power cut would: no destructor, no flush. For failpoints alone.
#[cfg(any(feature = "failpoints", debug_assertions))]
pub fn kill_self() -> ! {
    // SAFETY: getpid and kill take no pointers; SIGKILL to oneself does not return.
    unsafe {
        libc::kill(libc::getpid(), libc::SIGKILL);
    }
    std::process::abort()
}

/// Sends SIGKILL to a process. One that has ended meanwhile is no error.
pub fn kill(pid: u32) {
    signal(pid, libc::SIGKILL);
}

/// Sends a signal to a process. One that has ended meanwhile is no error.
pub fn signal(pid: u32, signal: i32) {
    if let Ok(pid @ 1..) = libc::pid_t::try_from(pid) {
        // SAFETY: no pointers.
        unsafe { libc::kill(pid, signal) };
    }
}

/// The time since the start of the machine, without the time that it slept: CLOCK_MONOTONIC.
pub fn monotonic() -> std::time::Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    std::time::Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// When a process was started, in clock ticks since the start of the machine (field 22 of /proc/PID/stat, proc(5)); `None`
/// if there is no such process, or if it has ended and is not reaped yet. With its number, it names a process for as long
/// as the machine runs.
pub fn started_at(pid: u32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses that may hold anything; what counts follows the last one.
    let end = stat.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    // Field 22; the one before was 3.
    fields.nth(18)?.parse().ok()
}

/// The file of this program, for commands that start it again: what a unit starts is the small one where it is installed.
pub fn program() -> PathBuf {
    own_program().unwrap_or_else(|| "/usr/bin/mosfs".into())
}

/// The file of this program; without /proc, as it was named when it was started.
pub fn own_program() -> Option<PathBuf> {
    std::env::current_exe().ok().or_else(|| {
        // SAFETY: getauxval(3) takes no pointer; it returns 0 for what it does not know.
        let name = unsafe { libc::getauxval(libc::AT_EXECFN) } as *const libc::c_char;
        // SAFETY: where it is not null, the kernel has put a NUL-terminated string there, which stays.
        let name = (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) })?;
        Some(OsStr::from_bytes(name.to_bytes()).into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let started = started_at(child.id()).unwrap();
        assert!(started >= started_at(1).unwrap());
        assert_eq!(started_at(child.id()), Some(started));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(started_at(child.id()), None);
    }
}
