//! A disk of [`super::nbd`] as a file, for loop devices: what they flush, the server flushes.
//!
//! ```text
//! loop device -> file of qemu-storage-daemon (FUSE) -> NBD server in memory
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use super::nbd;

/// How often something is looked for.
pub const PAUSE: Duration = Duration::from_millis(2);

/// The file. Whatever uses it must be gone before this is.
pub struct Plugged {
    daemon: Mutex<Child>,
    file: PathBuf,
    _dir: TempDir,
}

impl Plugged {
    /// Plugs in a disk of so many bytes.
    pub fn new(server: &nbd::Disk, bytes: u64) -> Self {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("disk");
        File::create(&file).unwrap();
        let (socket, place) = (server.socket().display(), file.display());
        let mut command = Command::new("qemu-storage-daemon");
        command.arg("--blockdev");
        command.arg(format!("driver=nbd,node-name=disk,server.type=unix,server.path={socket}"));
        command.arg("--export");
        command.arg(format!("type=fuse,id=disk,node-name=disk,mountpoint={place},writable=on"));
        let mut daemon = command.stdin(Stdio::null()).spawn().unwrap_or_else(|error| {
            panic!("cannot run qemu-storage-daemon: {error}; install the Debian package qemu-system-common")
        });
        while fs::metadata(&file).unwrap().len() != bytes {
            let ended = daemon.try_wait().unwrap();
            assert!(ended.is_none(), "qemu-storage-daemon ended: {ended:?}");
            thread::sleep(PAUSE);
        }
        Self { daemon: Mutex::new(daemon), file, _dir: dir }
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Whatever waits for the disk fails.
    pub fn unplug(&self) {
        let mut daemon = self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = daemon.kill();
        let _ = daemon.wait();
    }

    fn is_mounted(&self) -> bool {
        let file = self.file.to_str().unwrap();
        fs::read_to_string("/proc/self/mounts").unwrap().split_whitespace().any(|word| word == file)
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        // A loop device goes when nobody has it open any more.
        while self.is_mounted() {
            let _ = Command::new("umount").arg(&self.file).stderr(Stdio::null()).status();
            thread::sleep(PAUSE);
        }
        self.unplug();
    }
}

/// Numbers by chance, the same for the same seed (xorshift64).
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        // The low bits of this generator are its weakest.
        (self.0 >> 16) % limit.max(1)
    }
}

/// How often the power is cut, and the seed: MOSFS_POWER_CUTS and MOSFS_SEED; with `make campaign` 200 times.
pub fn cuts_and_seed(few: u64) -> (u64, u64) {
    let number = |name: &str| {
        let text = std::env::var(name).ok()?;
        Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
    };
    let campaign = std::env::var("MOSFS_CAMPAIGN").is_ok_and(|value| value == "long");
    (
        number("MOSFS_POWER_CUTS").unwrap_or(if campaign { 200 } else { few }),
        number("MOSFS_SEED").unwrap_or(15),
    )
}
