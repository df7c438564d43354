//! Processes: signals to oneself, core dumps, and where one's own program is.

use std::ffi::{CStr, OsStr};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

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

/// Ends this process by a signal that it blocks, as if it had never been blocked, so that shells see why it ended.
pub fn end_by(signal: i32) -> ! {
    // SAFETY: the set is initialised before it is used; the old action and mask are not requested.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::signal(signal, libc::SIG_DFL);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        libc::raise(signal);
    }
    std::process::exit(128 + signal)
}

/// What of a process is in its core dump: a number in hex (core(5)).
const DUMP_FILTER: &CStr = c"/proc/self/coredump_filter";
/// The headers of ELF files, by which a dump names the program and its libraries, and no memory that was written to.
const NO_MEMORY: &str = "0x10";

/// What [`DUMP_FILTER`] was before [`leave_memory_out_of_dumps`]; nothing without /proc.
static FILTER_BEFORE: OnceLock<Option<String>> = OnceLock::new();

/// Leaves the memory of this process out of its core dumps from now on, for a process that is about to hold a secret. The
/// kernel and gcore(1) obey the filter; processes that this one forks inherit it, and so do programs that it starts
/// ([`with_whole_dumps`]). Without /proc there are no core dumps at all.
pub fn leave_memory_out_of_dumps() {
    FILTER_BEFORE.get_or_init(|| {
        let path = OsStr::from_bytes(DUMP_FILTER.to_bytes());
        let before = super::file::read_named(path.as_ref(), 64).ok();
        let before = before.map(|text| format!("0x{}", String::from_utf8_lossy(&text).trim()));
        if before.is_none() || fs::write(path, NO_MEMORY).is_err() {
            // SAFETY: no pointers.
            unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
        }
        before
    });
}

/// Undoes [`leave_memory_out_of_dumps`] for a program of the user's.
pub fn with_whole_dumps(command: &mut Command) -> &mut Command {
    let Some(before) = FILTER_BEFORE.get().cloned().flatten() else { return command };
    let restore = move || {
        // SAFETY: the path ends with a NUL, and `before` has as many bytes as are written. All three calls are
        // async-signal-safe, as they must be after fork(2). An error leaves dumps without memory.
        unsafe {
            let file = libc::open(DUMP_FILTER.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            libc::write(file, before.as_ptr().cast(), before.len());
            libc::close(file);
        }
        Ok(())
    };
    // SAFETY: the closure allocates nothing and takes no lock.
    unsafe { command.pre_exec(restore) }
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
    let [ticks] = stat_fields(pid, [22])?;
    Some(ticks)
}

/// How long a process has computed, in clock ticks (fields 14 and 15); `None` as for [`started_at`].
pub fn computed(pid: u32) -> Option<u64> {
    let [user, kernel] = stat_fields(pid, [14, 15])?;
    user.checked_add(kernel)
}

/// Some of the numbers of /proc/PID/stat, by their number in proc(5), from 4 on; `None` as for [`started_at`].
fn stat_fields<const N: usize>(pid: u32, numbers: [usize; N]) -> Option<[u64; N]> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses that may hold anything; what counts follows the last one.
    let end = stat.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    if *fields.first()? == "Z" {
        return None;
    }
    let mut found = [0; N];
    for (number, found) in numbers.iter().zip(&mut found) {
        // The first one is field 3.
        *found = fields.get(number.checked_sub(3)?)?.parse().ok()?;
    }
    Some(found)
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

    #[test]
    fn memory_is_left_out_of_dumps_and_the_users_programs_have_theirs() {
        let before = fs::read_to_string("/proc/self/coredump_filter").unwrap();
        leave_memory_out_of_dumps();
        leave_memory_out_of_dumps();
        assert_eq!(fs::read_to_string("/proc/self/coredump_filter").unwrap().trim(), "00000010");
        let filter_of = |command: &mut Command| {
            let output = command.arg("/proc/self/coredump_filter").output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(filter_of(&mut Command::new("cat")).trim(), "00000010", "it is inherited");
        assert_eq!(filter_of(with_whole_dumps(&mut Command::new("cat"))), before);
    }
}
