//! Whole-file locks between processes: flock(2), through the standard library.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::file;

/// How often a lock that is waited for is tried.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longest list of locks that is read, in bytes.
const MAX_LOCKS: u64 = 4 << 20;

/// A lock on a file; dropping it, or the end of the process, releases it.
///
/// The file is created if missing (mode 0600) and is never removed: otherwise two processes could lock two
/// files of the same name.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// Waits until no other process holds the lock.
    pub fn exclusive(path: &Path) -> io::Result<Self> {
        wait(open(path)?, File::lock)
    }

    /// Waits until no process holds the lock exclusively.
    pub fn shared(path: &Path) -> io::Result<Self> {
        wait(open(path)?, File::lock_shared)
    }

    /// Waits until no other process holds the lock of a folder: for a file system on which no file can be
    /// created.
    pub fn of_folder(path: &Path) -> io::Result<Self> {
        wait(file::open_folder(path)?, File::lock)
    }

    /// Waits until no other process holds the lock, at most for `limit`; `None` if one holds it even then.
    pub fn exclusive_within(path: &Path, limit: Duration) -> io::Result<Option<Self>> {
        let end = Instant::now() + limit;
        loop {
            match Self::try_exclusive(path)? {
                None if Instant::now() < end => std::thread::sleep(LOOK_EVERY),
                taken => return Ok(taken),
            }
        }
    }

    /// Takes the lock if no other process holds it.
    pub fn try_exclusive(path: &Path) -> io::Result<Option<Self>> {
        let file = open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Keeps the lock until this process ends, also where another program takes its place (execve(2)). The processes that it
    /// starts from here on have the lock, too.
    pub fn keep(self) -> io::Result<()> {
        let fd = self.file.into_raw_fd();
        // SAFETY: F_SETFD takes a number and no pointer; the descriptor is open, and is never closed.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// Returns the id of a process that holds a lock of this file, where the kernel names it (proc(5), `/proc/locks`).
pub fn holder(path: &Path) -> Option<u32> {
    let file = std::fs::metadata(path).ok()?;
    let (major, minor) = (libc::major(file.dev()), libc::minor(file.dev()));
    let object = format!("{major:02x}:{minor:02x}:{}", file.ino());
    let list = file::read_named(Path::new("/proc/locks"), MAX_LOCKS).ok()?;
    String::from_utf8_lossy(&list).lines().find_map(|line| {
        // `1: FLOCK  ADVISORY  WRITE 1234 08:02:131 0 EOF`; those that wait have `->` as their second word.
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, _, process, held, ..] = words[..] else { return None };
        (held == object).then(|| process.parse().ok()).flatten()
    })
}

fn open(path: &Path) -> io::Result<File> {
    // The caller names the path.
    file::open_lock_file(path).map_err(|error| error.source)
}

fn wait(file: File, lock: impl Fn(&File) -> io::Result<()>) -> io::Result<Lock> {
    loop {
        match lock(&file) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map(|()| Lock { file }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn only_one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _lock = Lock::exclusive(&path).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
    }

    #[test]
    fn a_lock_that_is_not_released_is_named_with_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert!(holder(&path).is_none());
        let held = Lock::exclusive(&path).unwrap();
        assert_eq!(holder(&path), Some(std::process::id()));
        assert!(Lock::exclusive_within(&path, Duration::from_millis(1)).unwrap().is_none());
        drop(held);
        assert_eq!(holder(&path), None);
        assert!(Lock::exclusive_within(&path, Duration::ZERO).unwrap().is_some());
    }

    #[test]
    fn shared_holders_keep_an_exclusive_one_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let (one, two) = (Lock::shared(&path).unwrap(), Lock::shared(&path).unwrap());
        assert!(Lock::try_exclusive(&path).unwrap().is_none());
        drop(one);
        assert!(Lock::try_exclusive(&path).unwrap().is_none());
        drop(two);
        assert!(Lock::try_exclusive(&path).unwrap().is_some());
        std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
        assert!(Lock::exclusive(&dir.path().join("link")).is_err(), "no link is followed");
    }
}
