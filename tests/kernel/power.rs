//! Power cuts while a version with another kernel comes and is committed, on a disk that loses what was not flushed.
//!
//! The disk has both partitions, and the server's flushes are the disk's. ext4 stands for FAT on the first one: the kernel
//! that runs the tests need not have FAT. After each cut the machine must start as systemd-boot would start it: a kernel
//! that is whole, and a version that it boots; 202 once its commit has said that it is done.
//!
//! `make campaign` cuts 200 times, or MOSFS_POWER_CUTS times; MOSFS_SEED gives the same moments and losses again, as far as
//! the order of writes is the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::esp::{Device, kernel_ids, name, update};
use super::nbd;
use super::plugged::{Chance, PAUSE, Plugged, cuts_and_seed};
use super::tools::{need_root, run, run_any};

/// Where the two partitions begin and end, in MiB.
const PARTITIONS: [(u64, u64); 2] = [(1, 33), (33, 127)];
const DISK_MIB: u64 = 128;

/// The partitions of the disk, mounted where the device has them.
struct Mounted {
    /// Loop devices, and where they are mounted.
    parts: Vec<(String, PathBuf)>,
    plugged: Plugged,
}

impl Mounted {
    fn new(server: &nbd::Disk, device: &Device, is_new: bool) -> Self {
        let plugged = Plugged::new(server, DISK_MIB << 20);
        let mut parts = Vec::new();
        for ((begin, end), place) in PARTITIONS.into_iter().zip([device.esp(), device.system()]) {
            let mut command = Command::new("losetup");
            command.args(["--find", "--show", "--offset", &(begin << 20).to_string()]);
            command.args(["--sizelimit", &((end - begin) << 20).to_string()]).arg(plugged.file());
            let part = run(&mut command).trim().to_string();
            if is_new {
                run(Command::new("mke2fs").args(["-q", "-t", "ext4", &part]));
            }
            fs::create_dir_all(&place).unwrap();
            run(Command::new("mount").arg(&part).arg(&place));
            parts.push((part, place));
        }
        Self { parts, plugged }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for (part, place) in &self.parts {
            // Its disk may be gone; what cannot be written is lost.
            let _ = run_any(Command::new("umount").arg(place));
            let _ = run_any(Command::new("losetup").args(["-d", part]));
        }
    }
}

/// Brings version 202 and commits it, as far as the disk lets it; returns the steps that said that they are done.
fn update_and_commit(device: &Device) -> u32 {
    let done = |words: &[String]| run_any(&mut device.command(words)).status.success();
    if !done(&update(202)) {
        return 0;
    }
    if device.boot(Some(kernel_ids()[1])).map(|(version, _)| version) != Ok(202) {
        return 1;
    }
    device.record(202);
    if done(&["commit".into()]) { 3 } else { 2 }
}

/// Acceptance: whatever a power cut loses of an update with a kernel change and its commit, something good starts.
#[test]
fn a_power_cut_in_a_change_of_kernels_leaves_a_machine_that_starts() {
    need_root();
    let (cuts, seed) = cuts_and_seed(3);
    let mut chance = Chance::new(seed);
    let device = Device::new();
    let socket = device.dir.path().join("disk.sock");
    let server = nbd::Disk::serve(vec![0; (DISK_MIB << 20) as usize], &socket);
    // Version 200, committed; then how many writes and flushes a change takes that nothing disturbs.
    let mounted = Mounted::new(&server, &device, true);
    device.run(&device.install());
    device.record(200);
    device.commit();
    drop(mounted);
    server.cut(|_| 0);
    let base = server.image();
    let before = server.cut(|_| 0).operations;
    let mounted = Mounted::new(&server, &device, false);
    assert_eq!(update_and_commit(&device), 3);
    device.expect(&[&name(202, 1, "")]);
    drop(mounted);
    let whole = server.cut(|_| 0).operations - before;
    let (mut cached, mut lost) = (0, 0);
    let mut steps = BTreeMap::<(u32, u64), u32>::new();
    for number in 1..=cuts {
        server.put_back(&base);
        let mounted = Mounted::new(&server, &device, false);
        let operation = 1 + chance.below(whole);
        let file = device.dir.path().join(format!("cut-{number}"));
        server.cut_after(operation, &file);
        let ended = AtomicBool::new(false);
        let done = thread::scope(|scope| {
            scope.spawn(|| {
                while !file.exists() && !ended.load(Ordering::SeqCst) {
                    thread::sleep(PAUSE);
                }
                mounted.plugged.unplug();
            });
            let done = update_and_commit(&device);
            ended.store(true, Ordering::SeqCst);
            done
        });
        drop(mounted);
        let loss = server.cut(|limit| chance.below(limit));
        (cached, lost) = (cached + loss.cached, lost + loss.lost);
        let mounted = Mounted::new(&server, &device, false);
        device.expect_whole();
        let names = device.names();
        let (version, _) = device.start_as_the_loader_does().unwrap_or_else(|error| {
            panic!("cut {number} at {operation} after {done} steps, {names:?}: {error}")
        });
        println!(
            "FIGURE seed {seed} cut {number}: at operation {operation} of {whole}, after {done} steps: {version} starts, \
             {} of {} sectors lost, {names:?}",
            loss.lost, loss.cached
        );
        *steps.entry((done, version)).or_default() += 1;
        // An update that said that it is done is tried, and what was committed stays.
        assert!(
            version == 202 || done == 0 && version == 200,
            "cut {number}: {done} steps, {version} starts"
        );
        // The next commands finish it.
        if device.state()["current"].as_str().is_some_and(|current| current.starts_with("200-")) {
            assert_eq!(update_and_commit(&device), 3, "cut {number}");
        } else {
            device.record(202);
            device.commit();
        }
        device.expect(&[&name(202, 1, "")]);
        drop(mounted);
    }
    println!(
        "FIGURE {cuts} power cuts, (steps done, version that starts): {steps:?}, {lost} of {cached} sectors lost"
    );
    assert!(cached > 0, "the disk had nothing to lose, so that nothing was tested");
}
