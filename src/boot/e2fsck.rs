//! The check of an ext4 file system before a boot mounts it: e2fsck(8), where the initramfs has it.
//!
//! ```text
//! e2fsck -p   replays the journal; repairs, where the file system has a note of errors, what takes no decision
//! e2fsck -y   where that is not enough, and where no superblock can be read: from a copy of it, with every question
//!             answered with yes
//! ```
//!
//! There is nobody to answer a question, and nothing on the partition is trusted: what a repair loses of a system shows
//! when it is verified, and an update fetches it again.
//!
//! **Bounds.** A check may take as long as it computes or its device completes requests, [`MAX_TIME`] at most. As long as it
//! does, the watchdog is fed: a machine that it restarts would check again, and never boot.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::manifest::rules::printable;
use crate::sys::said::Said;
use crate::sys::watchdog::Fed;
use crate::sys::{disk, file, process};

/// Where it is, in an initramfs and on a host.
const PLACES: [&str; 2] = ["/usr/sbin/e2fsck", "/sbin/e2fsck"];
/// How often a check is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// How often the watchdog is fed. A shorter check does not open it.
const FEED_EVERY: Duration = Duration::from_secs(1);
/// How long all of a check may take.
pub const MAX_TIME: Duration = Duration::from_secs(30 * 60);
/// Most characters of what it writes that an error shows.
const MAX_LINE: usize = 300;
/// Longest file of sysfs that is read, in bytes.
const MAX_SYSFS: u64 = 4096;

/// Exit codes (e2fsck(8)), which add up: corrected; corrected, and a mounted one needs a restart.
const CORRECTED: i32 = 1 | 2;

/// The program, if it is there.
pub fn program() -> Option<&'static Path> {
    PLACES.iter().map(Path::new).find(|path| path.is_file())
}

/// A check to be made.
#[derive(Debug)]
pub struct Check<'a> {
    /// e2fsck.
    pub program: &'a Path,
    /// The device of the file system.
    pub device: &'a Path,
    /// How long it may neither compute nor get an answer of the device.
    pub patience: Duration,
    /// The watchdog that was started.
    pub watchdog: Option<&'a Path>,
}

impl Check<'_> {
    /// Checks the file system, and corrects it. Returns whether anything was corrected.
    ///
    /// # Errors
    /// Why it is not known to be whole, as part of a sentence.
    pub fn make(&self) -> Result<bool, String> {
        let end = Instant::now() + MAX_TIME;
        let code = match self.run("-p", end)? {
            (0, _) => return Ok(false),
            (code, _) if code & !CORRECTED == 0 => return Ok(true),
            _ => self.run("-y", end)?,
        };
        match code {
            (code, _) if code & !CORRECTED == 0 => Ok(true),
            (code, said) => Err(format!("e2fsck ends with exit code {code}{said}")),
        }
    }

    /// Runs e2fsck to its end; returns its exit code, and the last line that it wrote to stderr.
    fn run(&self, option: &str, end: Instant) -> Result<(i32, String), String> {
        let Self { program, device, patience, watchdog } = *self;
        let cannot = |error: std::io::Error| format!("{} cannot be run: {error}", program.display());
        let (said, writer) = Said::new().map_err(cannot)?;
        let mut child = Command::new(program)
            .arg(option)
            .arg(device)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(writer)
            .spawn()
            .map_err(cannot)?;
        let statistics = disk::sysfs(device).map(|folder| folder.join("stat"));
        let (pid, read) = (child.id(), |path| file::read_named(path, MAX_SYSFS).ok());
        let read = || (statistics.as_deref().and_then(read), process::computed(pid));
        let (mut before, mut since) = (read(), Instant::now());
        let (mut fed, mut fed_at) = (None, Instant::now());
        loop {
            if let Some(status) = child.try_wait().map_err(cannot)? {
                return match status.code() {
                    // It may quote what is on the disk.
                    Some(code) => Ok((code, printable(&said.last_line(), MAX_LINE))),
                    None => Err(format!("e2fsck ends with {status}")),
                };
            }
            let why = if Instant::now() >= end {
                format!("e2fsck takes longer than {} minutes", MAX_TIME.as_secs() / 60)
            } else if since.elapsed() >= patience {
                format!("it did not answer e2fsck within {} s", patience.as_secs())
            } else {
                thread::sleep(LOOK_EVERY.max(since.elapsed() / 100));
                let now = read();
                if now != before {
                    (before, since) = (now, Instant::now());
                    if fed_at.elapsed() >= FEED_EVERY {
                        fed = fed.or_else(|| Fed::open(watchdog?).ok());
                        // One that cannot be fed restarts the machine; nobody can do anything about it here.
                        let _ = fed.as_mut().map(Fed::feed);
                        fed_at = Instant::now();
                    }
                }
                continue;
            };
            // One that sleeps in the kernel ends when it wakes up; nobody waits for that.
            let _ = child.kill();
            return Err(why);
        }
    }
}

/// Whether nothing can be written to a device.
pub(super) fn is_read_only(device: &Path) -> bool {
    let read = disk::sysfs(device).and_then(|folder| file::read_named(&folder.join("ro"), MAX_SYSFS).ok());
    read.is_some_and(|text| text.trim_ascii() == b"1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_computes_has_its_time_and_one_that_waits_has_not() {
        let dir = tempfile::tempdir().unwrap();
        // A shell in its place, a script in that of the device, and a file in that of the watchdog.
        let (script, watchdog) = (dir.path().join("script"), dir.path().join("watchdog"));
        let begins = |text: &str, end: Duration| {
            std::fs::write(&script, text).unwrap();
            std::fs::write(&watchdog, "").unwrap();
            let (program, patience) = (Path::new("/bin/sh"), Duration::from_secs(2));
            let check = Check { program, device: &script, patience, watchdog: Some(&watchdog) };
            (check.run("-e", Instant::now() + end).unwrap_err(), std::fs::read(&watchdog).unwrap())
        };
        let (computes, fed) = begins("while :; do :; done", Duration::from_secs(6));
        assert_eq!(computes, "e2fsck takes longer than 30 minutes");
        assert!(!fed.is_empty() && fed.iter().all(|&byte| byte != b'V'), "{fed:?}");
        let (waits, fed) = begins("exec sleep 100", Duration::from_secs(600));
        assert_eq!(waits, "it did not answer e2fsck within 2 s");
        assert_eq!(fed, b"", "what hangs is what the watchdog is for");
    }
}
