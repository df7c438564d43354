//! Daemonizes a process and receives its termination signals.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

/// The side of a fork(2).
pub enum Forked {
    /// The parent, with the id of the new process.
    Parent(u32),
    /// The new process.
    Child,
}

/// The name of a thread that may wait forever in one system call, and that [`fork`] does not count: it holds no lock.
pub const ABANDONED: &str = "abandoned";

/// How long [`fork`] waits for threads to leave the process, in steps of 10 ms. The kernel lists a thread for a moment
/// after it was joined.
const STEPS: u32 = 200;

/// The number of threads of this process, without [`ABANDONED`] ones; 0 without /proc (a bare chroot), where nobody
/// counts them.
fn threads() -> usize {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0 };
    let counts = |task: io::Result<std::fs::DirEntry>| {
        // A thread that has gone meanwhile has no name any more.
        task.ok().and_then(|task| std::fs::read(task.path().join("comm")).ok())
    };
    tasks.filter_map(counts).filter(|name| name.trim_ascii_end() != ABANDONED.as_bytes()).count()
}

/// fork(2). Only for a process with one thread; refused otherwise.
pub fn fork() -> io::Result<Forked> {
    let mut steps = 0;
    while threads() > 1 {
        if steps == STEPS {
            return Err(io::Error::other("fork in a process with several threads"));
        }
        steps += 1;
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    // SAFETY: there is one thread, so no lock can be held by a thread that the child lacks.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(pid as u32)),
    }
}

/// Leaves the session, the working folder and the terminal of the process that started this one.
///
/// `inherited` are descriptors that the process was started with and that no code in it owns.
pub fn detach(inherited: &[RawFd]) -> io::Result<()> {
    // SAFETY: no arguments; fails only for a leader of a process group, which a forked child is not.
    if unsafe { libc::setsid() } < 0 {
        return Err(io::Error::last_os_error());
    }
    std::env::set_current_dir("/")?;
    let null: File = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    for standard in 0..3 {
        // SAFETY: both are open descriptors; the standard ones are owned by no value in Rust.
        if unsafe { libc::dup2(null.as_raw_fd(), standard) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    for &fd in inherited.iter().filter(|&&fd| fd > 2) {
        // SAFETY: the caller guarantees that no code in this process owns it. EBADF does no harm.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

/// Where there is no /proc, inherited descriptors are looked for below this number.
const MOST_DESCRIPTORS: RawFd = 4096;

/// The descriptors above 2 that are open now. At the start of a process: those that it inherited.
pub fn open_descriptors() -> Vec<RawFd> {
    let mut all: Vec<RawFd> = match std::fs::read_dir("/proc/self/fd") {
        Ok(list) => list
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|&fd| fd > 2)
            .collect(),
        // Without /proc each number is tried.
        Err(_) => (3..MOST_DESCRIPTORS).collect(),
    };
    // The one that lists the folder is among them and is closed again by now.
    // SAFETY: F_GETFD on any number is harmless.
    all.retain(|&fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0);
    all
}

/// Signals that are received with [`Signals::wait`] instead of ending the process.
pub struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks SIGTERM, SIGINT and SIGHUP in this thread and in all threads that it starts from now on.
    pub fn block() -> io::Result<Self> {
        Self::block_these(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])
    }

    /// Blocks these signals in the same way.
    pub fn block_these(signals: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set before it is used.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            set.assume_init_mut();
            for signal in signals {
                libc::sigaddset(set.as_mut_ptr(), *signal);
            }
            set.assume_init()
        };
        // SAFETY: `set` is initialised; the old mask is not requested.
        match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } {
            0 => Ok(Self(set)),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Blocks those of SIGTERM, SIGINT and SIGHUP that would end the process: not those that are ignored, as nohup(1) has
    /// it for SIGHUP.
    pub fn block_not_ignored() -> io::Result<Self> {
        let is_ignored = |signal: i32| {
            let mut action = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: no new action is set, and `action` has room for the present one.
            let asked = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
            // SAFETY: sigaction has filled it, and zeros are valid.
            asked == 0 && unsafe { action.assume_init_ref() }.sa_sigaction == libc::SIG_IGN
        };
        let all = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
        let signals: Vec<i32> = all.into_iter().filter(|signal| !is_ignored(*signal)).collect();
        Self::block_these(&signals)
    }

    /// Waits for one of them, and returns which.
    pub fn wait(&self) -> io::Result<i32> {
        self.wait_from().map(|(signal, _)| signal)
    }

    /// Waits for one of them, and returns which, and whether a process has sent it and not the kernel (a terminal).
    pub fn wait_from(&self) -> io::Result<(i32, bool)> {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        loop {
            // SAFETY: the set is initialised, and `info` has room for the result.
            let signal = unsafe { libc::sigwaitinfo(&self.0, info.as_mut_ptr()) };
            if signal > 0 {
                // SAFETY: sigwaitinfo has filled it.
                let code = unsafe { info.assume_init_ref() }.si_code;
                // sigaction(2): SI_USER and other codes of processes are not above 0.
                return Ok((signal, code <= 0));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// Returns the number of cores that this thread may run on.
pub fn usable_cores() -> usize {
    // SAFETY: cpu_set_t is plain data, for which zeros are a valid value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` has the given size; 0 means this thread.
    let done = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) };
    // SAFETY: counts bits of an initialised set. More cores than fit in the set are an error above.
    if done == 0 { unsafe { libc::CPU_COUNT(&set) as usize } } else { 2 }
}

/// The number of runnable threads of this machine, from /proc/loadavg (proc(5)).
pub struct Load(File);

impl Load {
    /// Opens it; an error without /proc.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/loadavg").map(Self)
    }

    /// The number of threads that are runnable now, with the one that asks: the fourth word, before its slash.
    pub fn runnable(&self) -> Option<usize> {
        let mut text = [0; 64];
        let len = self.0.read_at(&mut text, 0).ok()?;
        let words = std::str::from_utf8(text.get(..len)?).ok()?;
        words.split(' ').nth(3)?.split('/').next()?.parse().ok()
    }
}

/// Returns the effective user id and group id.
pub fn effective_ids() -> (u32, u32) {
    // SAFETY: no arguments, cannot fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// The number that this user id has outside of this user namespace, as far as /proc says it; else the number itself.
pub fn outer_uid(uid: u32) -> u32 {
    // user_namespaces(7): lines of first id inside, first id outside, count.
    let map = super::file::read_named("/proc/self/uid_map".as_ref(), 1 << 16).unwrap_or_default();
    let map = String::from_utf8_lossy(&map);
    let outside = map.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace().map_while(|field| field.parse::<u32>().ok());
        let (inside, outside, count) = (fields.next()?, fields.next()?, fields.next()?);
        let offset = uid.checked_sub(inside).filter(|offset| *offset < count)?;
        outside.checked_add(offset)
    });
    outside.unwrap_or(uid)
}

/// Real user id and group id.
pub fn real_ids() -> (u32, u32) {
    // SAFETY: no arguments, cannot fail.
    unsafe { (libc::getuid(), libc::getgid()) }
}

/// Returns what was freed to the system. Opening an image may take some megabytes more than serving it.
pub fn return_freed_memory() {
    // SAFETY: no pointer goes in or out; whatever is in use stays where it is.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Prevents the allocator from creating an arena per thread and from mapping large buffers anew each time: a
/// bounded number of threads with their own buffers needs neither.
pub fn lean_allocator() {
    // SAFETY: mallopt only sets parameters of the allocator; before threads are started.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 20);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 4 << 20);
    }
}
