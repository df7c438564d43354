//! Power cuts at random times during update, commit, gc and boot.
//!
//! A small guest with the real command boots a deployment, commits it, collects garbage, updates to the
//! next version and boots that, without an end. Its disk is ext4 on a server that loses what was not
//! flushed ([`super::nbd`]); its TPM is kept. After each cut it must boot again:
//!
//! - a version that verifies, whose whole store verifies, and that was current or pending;
//! - the pending one, where `mosfs update` had said that it is done and tries are left;
//! - none below the floor, which is what the last commit that said it was done made it.
//!
//! `make campaign` cuts 50 times, or MOSFS_POWER_CUTS times. MOSFS_SEED gives the same moments and losses
//! again, as far as a machine's timing can be the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use mosfs::internals::boot::e2fsck;
use mosfs::internals::digest::Digest;
use tempfile::TempDir;

use super::KERNEL;
use super::device::{Device, MOSFS};
use super::machine::{
    Before, Cut, Ended, Machine, RESTARTS, mini_initrd, noise, say_restart, squashfs, tool,
};
use super::nbd::Disk;
use super::publish::Publisher;

/// The size of the disk.
const DISK_BYTES: u64 = 64 << 20;
/// The longest time from a mark on the console to the cut: a whole round and a bit.
const WINDOW_MS: u64 = 4000;
/// The same in writes and flushes of the disk.
const WINDOW_OPERATIONS: u64 = 300;
/// How often a pending deployment is tried (docs/design.md, try first).
const TRIES: u32 = 3;

const INIT: &str = r#"#!/bin/sh
export PATH=/bin:/usr/bin MOSFS_SYSTEM=/run/mosfs/system MOSFS_CONFIG=/etc/mosfs
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs tmp /tmp
mkdir -p /sysroot
while read -r module; do insmod /modules/$module || echo "cannot load $module"; done </modules.list
fail() {
    echo "vm: FAILED: $*"
    dmesg | busybox tail -n 20
    echo "MOSFS-VM-VERDICT: 1"
    poweroff -f
    sleep 1000
}
# Progress would share a line with what is looked for.
quiet() { "$@" >/tmp/out 2>&1 || fail "$*: $?: $(cat /tmp/out)"; }
# Without an end, or one round on what the cuts left, an update, and a round on that.
rounds=0
grep -q vm.do=check /proc/cmdline && rounds=2
echo "vm: starting"
while :; do
    busybox env -i PATH=/bin:/usr/bin mosfs boot --system $MOSFS_SYSTEM --config $MOSFS_CONFIG --sysroot /sysroot ||
        fail "mosfs boot: $?"
    version=$(cat /sysroot/version)
    test "$(busybox sha256sum </sysroot/noise)" = "$(cat /sysroot/sum)  -" || fail "content of $version"
    echo "vm: booted $version"
    echo "vm: floor $(mosfs floor show --json)"
    quiet mosfs verify
    echo "vm: committing $version"
    quiet mosfs commit
    echo "vm: committed $version"
    quiet mosfs gc
    rounds=$((rounds - 1))
    if [ $rounds = 0 ]; then
        quiet mosfs verify
        mosfs status
        echo "MOSFS-VM-VERDICT: 0"
        poweroff -f
        sleep 1000
    fi
    next=$((version + 1))
    echo "vm: updating $next"
    quiet mosfs update oci:/source:mos/system/system:$next
    echo "vm: updated $next"
    # The next boot of this machine, but with what the last one left in memory.
    umount /sysroot || fail "umount: $?"
done
"#;

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

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// A publisher of many versions, and the initramfs with all of them in it.
struct Source {
    dir: TempDir,
    initrd: PathBuf,
}

impl Source {
    fn new(versions: u64) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let publisher = Publisher::new(dir.path());
        for version in 1..=versions {
            let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
            let _ = fs::remove_dir_all(&tree);
            fs::create_dir(&tree).expect("a folder");
            let bytes =
                noise(60_000 + 1000 * (version as usize % 50), version.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            fs::write(tree.join("version"), version.to_string()).expect("a file");
            fs::write(tree.join("sum"), Digest::of(&bytes).hex()).expect("a file");
            fs::write(tree.join("noise"), bytes).expect("a file");
            squashfs(&tree, &image, &["-processors", "1"]);
            let layer = publisher.add_image(&image);
            publisher.publish_layers(version, vec![layer], true);
        }
        let device = Device::of(publisher, 1);
        let initrd = dir.path().join("initrd");
        let libraries = loaded_libraries();
        // As the generators take it along: a cut can tear a superblock of ext4, which has two sectors.
        let e2fsck = e2fsck::program().expect("e2fsck, of the package e2fsprogs");
        let [esys, blkid] = libraries.each_ref().map(|path| (path.as_path(), path.to_str().expect("a path")));
        mini_initrd(
            &initrd,
            KERNEL,
            INIT,
            &[(Path::new(MOSFS), "/usr/bin/mosfs"), (e2fsck, "/usr/sbin/e2fsck"), esys, blkid],
            &[(&dir.path().join("store"), "/source"), (device.config(), "/etc/mosfs")],
        );
        Self { dir, initrd }
    }

    /// Runs a machine; one that its emulator let down starts again with the disk and the TPM as they were.
    ///
    /// The disk has nothing in its cache before: it has just been made or cut.
    fn run(&self, device: &Device, disk: &Disk, machine: impl Fn() -> Machine) -> Ended {
        let (image, tpm) = (disk.image(), Before::new(Some(&device.path("tpm")), None));
        for restart in 1.. {
            let ended = machine().run_once();
            let Some(reason) = ended.let_down().filter(|_| restart <= RESTARTS) else { return ended };
            say_restart(reason, restart);
            disk.put_back(&image);
            tpm.put_back();
        }
        unreachable!("it returns after the last restart")
    }

    /// A device with the first version on a disk that loses its cache.
    fn device(&self) -> (Device, Disk) {
        let device = Device::of(Publisher::again(self.dir.path()), 1);
        let image = device.path("image");
        fs::File::create(&image).and_then(|file| file.set_len(DISK_BYTES)).expect("an image");
        let mut make = Command::new("mke2fs");
        make.args(["-q", "-t", "ext4", "-L", "mosfs", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"]);
        tool("e2fsprogs", make.arg(device.system()).arg(&image));
        let disk = Disk::serve(fs::read(&image).expect("the image"), &device.path("disk.sock"));
        (device, disk)
    }

    fn machine(&self, device: &Device, disk: &Disk) -> Machine {
        Machine {
            nbd: Some(disk.socket().into()),
            tpm: Some(device.path("tpm")),
            cmdline: "root=mosfs".into(),
            ..Machine::new(&self.initrd)
        }
    }
}

/// The libraries that mosfs loads when it asks a TPM, and when it looks for a disk.
pub fn loaded_libraries() -> [PathBuf; 2] {
    let list = tool("libc-bin", Command::new("ldconfig").arg("-p")).stdout;
    let list = String::from_utf8_lossy(&list).into_owned();
    ["libtss2-esys.so.0", "libblkid.so.1"].map(|name| {
        let line = list.lines().find(|line| line.trim_start().starts_with(name));
        line.and_then(|line| Some(line.split_once("=> ")?.1.into()))
            .unwrap_or_else(|| panic!("{name}; install libtss2-dev and libblkid1"))
    })
}

/// What must hold of a device, from what its console has said so far.
#[derive(Debug)]
struct Promised {
    /// The version that was committed last, or installed.
    current: u64,
    /// What the floor is at least.
    floor: u64,
    /// The version that an update began to bring, and whether it said that it is done.
    pending: Option<(u64, bool)>,
    /// How many boots have tried the pending one.
    tried: u32,
    updates: u32,
    commits: u32,
}

impl Promised {
    /// Reads what one run of the machine said, and checks it against what was promised before.
    fn follow(&mut self, ended: &Ended) {
        let fail = |what: String| panic!("{what}; promised: {self:?}\n{}", ended.console);
        if ended.console.contains("vm: FAILED") {
            fail("the machine failed".into());
        }
        let mut next = Self { ..*self };
        for line in whole_lines(&ended.console) {
            let words: Vec<_> = line.split(' ').collect();
            let version = words.get(2).and_then(|word| word.parse::<u64>().ok());
            match (words.first(), words.get(1).copied(), version) {
                (Some(&"vm:"), Some("booted"), Some(version)) => {
                    match next.pending {
                        Some((pending, _)) if version == pending => next.tried += 1,
                        // It said that it was done, so that it survives whatever comes.
                        Some((pending, true)) if next.tried < TRIES => {
                            fail(format!("{version} was booted in place of the pending {pending}"))
                        }
                        _ if version == next.current => {}
                        _ => fail(format!("{version} was booted: {next:?}")),
                    }
                }
                (Some(&"vm:"), Some("floor"), _) => {
                    let json = line.split_once("floor ").map(|(_, json)| json).unwrap_or_default();
                    // A line that the cut left short says nothing.
                    let Ok(value) = serde_json::from_str::<serde_json::Value>(json) else { continue };
                    let floor = value["floor"].as_u64().unwrap_or(0);
                    let most = next.pending.map_or(next.current, |(pending, _)| pending);
                    if floor < next.floor || floor > most {
                        fail(format!("the floor is {floor}: {next:?}"));
                    }
                    next.floor = floor;
                }
                (Some(&"vm:"), Some("committed"), Some(version)) => {
                    (next.current, next.floor) = (version, version);
                    next.pending = None;
                    next.commits += 1;
                }
                // From here on the commit may have taken or not.
                (Some(&"vm:"), Some("updating"), Some(version)) => {
                    next.pending = Some((version, false));
                    next.tried = 0;
                }
                (Some(&"vm:"), Some("updated"), Some(version)) => {
                    next.pending = Some((version, true));
                    next.updates += 1;
                }
                _ => {}
            }
        }
        *self = next;
    }
}

/// The lines of the guest that came through whole: the last one may have been cut.
fn whole_lines(console: &str) -> impl Iterator<Item = &str> {
    // tests/vm/run ends what was shown with an end of line of its own.
    let guest = console.rsplit_once("\ntests/vm/run: ").map_or(console, |(guest, _)| guest);
    guest.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'))
}

/// Cuts the power of one device some times; how many sectors were in the cache then, and how many got lost.
fn chain(source: &Source, cuts: u64, seed: u64) -> (Promised, usize, usize) {
    let mut chance = Chance(seed | 1);
    let (device, disk) = source.device();
    let mut promised = Promised { current: 1, floor: 0, pending: None, tried: 0, updates: 0, commits: 0 };
    let (mut cached, mut lost) = (0, 0);
    for number in 1..=cuts {
        // Half of the cuts come between two operations of the disk, which a moment chosen by time seldom
        // meets; the others while the processor or the TPM works.
        let (cut, operation) = if number % 2 == 1 {
            let file = device.path(&format!("cut-{number}"));
            (Cut::File(file), 1 + chance.below(WINDOW_OPERATIONS))
        } else {
            let text = if chance.below(5) == 0 { "vm: starting" } else { "vm: booted" };
            (Cut::After(text.into(), Duration::from_millis(chance.below(WINDOW_MS))), 0)
        };
        let kind = format!("{cut:?}");
        let ended = source.run(&device, &disk, || {
            if let Cut::File(file) = &cut {
                let _ = fs::remove_file(file);
                disk.cut_after(operation, file);
            }
            Machine { cut: Some(cut.clone()), ..source.machine(&device, &disk) }
        });
        let loss = disk.cut(|limit| chance.below(limit));
        let last = ended
            .after("vm: ")
            .into_iter()
            .rfind(|line| !line.starts_with("floor"))
            .unwrap_or("")
            .to_string();
        println!(
            "FIGURE seed {seed} cut {number}: {kind}, in `{last:.60}`, at operation {}: {} of {} sectors lost",
            loss.operations, loss.lost, loss.cached
        );
        assert_eq!(ended.verdict, 137, "the power was cut\n{}", ended.console);
        promised.follow(&ended);
        cached += loss.cached;
        lost += loss.lost;
    }
    let ended = source.run(&device, &disk, || {
        let mut last = source.machine(&device, &disk);
        last.cmdline += " vm.do=check";
        last
    });
    ended.expect(0, &["vm: committed"]);
    promised.follow(&ended);
    // Nothing but the console was asked so far: the TPM itself, on the host.
    assert_eq!(device.floor(), promised.current, "the floor is what was committed last");
    (promised, cached, lost)
}

#[test]
fn power_cuts_during_update_and_commit_lose_nothing_that_was_promised() {
    let campaign = std::env::var("MOSFS_CAMPAIGN").is_ok_and(|value| value == "long");
    let cuts = from_environment("MOSFS_POWER_CUTS").unwrap_or(if campaign { 50 } else { 4 });
    let seed = from_environment("MOSFS_SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock after 1970");
        now.as_nanos() as u64
    });
    println!("MOSFS_SEED={seed}");
    // Two devices, for two processors.
    let each = cuts.div_ceil(2);
    let source = Source::new(5 + 4 * each);
    let source = &source;
    let all: Vec<_> = std::thread::scope(|scope| {
        let chains =
            [seed, seed ^ 0x5bd1_e995_97f4_a7c5].map(|seed| scope.spawn(move || chain(source, each, seed)));
        chains
            .map(|chain| chain.join())
            .into_iter()
            .map(|ended| ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let sum = |of: fn(&Promised) -> u32| all.iter().map(|(promised, ..)| of(promised)).sum::<u32>();
    let cached: usize = all.iter().map(|(_, cached, _)| cached).sum();
    let lost: usize = all.iter().map(|(_, _, lost)| lost).sum();
    println!(
        "FIGURE {} power cuts, {} updates, {} commits, {lost} of {cached} sectors lost",
        2 * each,
        sum(|one| one.updates),
        sum(|one| one.commits)
    );
    assert!(sum(|one| one.updates) > 0 && sum(|one| one.commits) > 0, "nothing was tested");
    assert!(cached > 0, "the disk had nothing to lose, so that nothing was tested");
}
