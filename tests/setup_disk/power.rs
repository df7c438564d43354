//! Power cuts during a setup, on a disk that loses what was not flushed.
//!
//! ```text
//! mosfs setup -> loop device -> file of qemu-storage-daemon (FUSE) -> NBD server in memory (common/nbd.rs)
//! ```
//!
//! A flush of the loop device is one of the server's. At the cut the server stops answering, and of what was in its cache
//! chance decides what is on the disk. Then the same setup runs again on what is left, without `--wipe`.
//!
//! `make campaign` cuts 50 times, or MOSFS_POWER_CUTS times. MOSFS_SEED gives the same moments and losses again, as far as
//! the order of writes is the same.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use super::nbd;
use super::tools::{need_root, run};
use super::{Disk, MIB, Machine, attach};

/// How often something is looked for.
const PAUSE: Duration = Duration::from_millis(2);

/// Numbers by chance, the same for the same seed (xorshift64).
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        // The low bits of this generator are its weakest.
        (self.0 >> 16) % limit.max(1)
    }
}

/// The server's disk as a block device.
struct Plugged {
    disk: Option<Disk>,
    daemon: Child,
    file: PathBuf,
    _dir: TempDir,
}

impl Plugged {
    fn new(server: &nbd::Disk) -> Self {
        need_root();
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
            panic!("cannot run qemu-storage-daemon: {error}; install the Debian package qemu-utils")
        });
        while fs::metadata(&file).unwrap().len() != MIB << 20 {
            let ended = daemon.try_wait().unwrap();
            assert!(ended.is_none(), "qemu-storage-daemon ended: {ended:?}");
            thread::sleep(PAUSE);
        }
        let device = attach(&file, &["--partscan"]);
        let disk = Disk { _dir: TempDir::new().unwrap(), image: file.clone(), device };
        let this = Self { disk: Some(disk), daemon, file, _dir: dir };
        // A setup that is continued needs the partitions of before.
        drop(this.disk().held());
        this
    }

    fn disk(&self) -> &Disk {
        self.disk.as_ref().unwrap()
    }

    /// Whatever waits for the disk fails.
    fn unplug(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }

    fn is_mounted(&self) -> bool {
        let file = self.file.to_str().unwrap();
        fs::read_to_string("/proc/self/mounts").unwrap().split_whitespace().any(|word| word == file)
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        // The loop device goes when nobody has it open any more.
        drop(self.disk.take());
        while self.is_mounted() {
            let _ = Command::new("umount").arg(&self.file).stderr(Stdio::null()).status();
            thread::sleep(PAUSE);
        }
        self.unplug();
    }
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Acceptance: a power cut at any moment of a setup, and the same setup succeeds without `--wipe`.
#[test]
fn a_setup_after_a_power_cut_needs_no_word() {
    let campaign = std::env::var("MOSFS_CAMPAIGN").is_ok_and(|value| value == "long");
    let cuts = from_environment("MOSFS_POWER_CUTS").unwrap_or(if campaign { 50 } else { 3 });
    let seed = from_environment("MOSFS_SEED").unwrap_or(15);
    let mut chance = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let machine = Machine::provisioned();
    let setup = |disk: &Disk| machine.setup(200, &["--disk", &disk.device]);
    let place = TempDir::new().unwrap();
    // A setup that nothing disturbs: how many writes and flushes it has.
    let empty = vec![0; (MIB << 20) as usize];
    let server = nbd::Disk::serve(empty.clone(), &place.path().join("disk.sock"));
    let plugged = Plugged::new(&server);
    run(&mut setup(plugged.disk()));
    plugged.disk().expect_installed(200);
    drop(plugged);
    let whole = server.cut(|_| 0);
    assert_eq!(whole.cached, 0, "what is said to be installed is on the disk");
    let (mut cached, mut lost) = (0, 0);
    let mut steps = BTreeMap::<String, u32>::new();
    for number in 1..=cuts {
        server.put_back(&empty);
        let mut plugged = Plugged::new(&server);
        let operation = 1 + chance.below(whole.operations);
        let file = place.path().join(format!("cut-{number}"));
        server.cut_after(operation, &file);
        let mut command = setup(plugged.disk());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        // It may need fewer operations this time.
        while !file.exists() && child.try_wait().unwrap().is_none() {
            thread::sleep(PAUSE);
        }
        let _ = child.kill();
        plugged.unplug();
        let said = child.wait_with_output().unwrap().stdout;
        drop(plugged);
        let loss = server.cut(|limit| chance.below(limit));
        let said = String::from_utf8_lossy(&said);
        let step = said.lines().last().and_then(|line| line.split(':').next()).unwrap_or_default();
        println!(
            "FIGURE seed {seed} cut {number}: at operation {operation} of {}, in `{step}`: {} of {} sectors lost",
            whole.operations, loss.lost, loss.cached
        );
        *steps.entry(step.to_string()).or_default() += 1;
        (cached, lost) = (cached + loss.cached, lost + loss.lost);
        let plugged = Plugged::new(&server);
        let said = run(&mut setup(plugged.disk()));
        assert!(said.contains("MOSFS-INSTALL-VERDICT: 0 "), "{said}");
        plugged.disk().expect_installed(200);
        drop(plugged);
        // Nothing of it is in a cache alone.
        assert_eq!(server.cut(|_| 0).cached, 0);
    }
    println!("FIGURE {cuts} power cuts in {steps:?}, {lost} of {cached} sectors lost");
    assert!(cached > 0, "the disk had nothing to lose, so that nothing was tested");
    assert_eq!(machine.floor(), 0);
}
