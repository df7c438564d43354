//! Power cuts while a version with another kernel comes and is committed, with the EFI system partition on FAT itself.
//!
//! A machine runs the update and the commit with Linux's own FAT, once for each way to mount the partition, on a disk whose
//! server writes down every write and flush ([`super::nbd`]). The power cuts are made afterwards, from that record: at any
//! operation, with any loss of what was not flushed. mtools and fsck.fat read what is left, as firmware would; ext4 is
//! checked as a boot checks it, and mounted.
//!
//! `make campaign` makes 200 cuts for each way, or MOSFS_POWER_CUTS; MOSFS_SEED gives the same chance.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mosfs::internals::boot::e2fsck;

use super::esp::{Device, kernel_ids, name, store, update};
use super::machine::{Machine, mini_initrd};
use super::nbd::{self, Operation};
use super::plugged::{Chance, cuts_and_seed};
use super::tools::{need_root, run, run_any, sh};

const KERNEL: &str = "6.12";
/// Where the two partitions begin and end, in MiB. What follows them is read by the guest, to say how far it is.
const ESP: (u64, u64) = (1, 49);
const SYSTEM: (u64, u64) = (49, 126);
const DISK_MIB: u64 = 128;
/// Where the guest reads when the update is done, and when the commit is, in KiB. No read-ahead is as long as between them.
const DONE: [u64; 2] = [(DISK_MIB - 1) * 1024 - 512, (DISK_MIB - 1) * 1024 + 256];

const INIT: &str = r#"#!/bin/sh
export PATH=/bin:/usr/bin
end() { echo "MOSFS-VM-VERDICT: $1"; poweroff -f; }
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs tmp /tmp
while read -r module; do insmod /modules/$module || echo "cannot load $module"; done </modules.list
mkdir -p /esp /system /source /run/mosfs
mount -t vfat -o "$(cat /options)" /dev/vda1 /esp || end 20
mount -t ext4 /dev/vda2 /system || end 21
mount -t ext4 -o ro /dev/vdb /source || end 22
export MOSFS_SYSTEM=/system MOSFS_CONFIG=/config MOSFS_RUN=/run/mosfs MOSFS_ESP=/esp
done_at() { dd if=/dev/vda of=/dev/null bs=1024 skip=$1 count=4 2>/dev/null || end 23; }
mosfs update oci:/source:mos/system/system:202 --floor file || end 24
done_at $(cat /done0)
for folder in /system/deployments/202-*; do new=${folder##*/}; done
echo "{\"deployment\":\"$new\",\"backend\":\"fuse\",\"phases_ms\":[]}" >/run/mosfs/boot.json
mosfs commit --floor file || end 25
done_at $(cat /done1)
ls /esp/EFI/Linux
end 0
"#;

/// A file with part of a disk.
fn part(image: &[u8], (begin, end): (u64, u64), path: &Path) {
    fs::write(path, &image[(begin << 20) as usize..(end << 20) as usize]).unwrap();
}

/// A disk with both partitions as a device has them.
fn disk_of(device: &Device) -> Vec<u8> {
    let path = |name: &str| device.dir.path().join(name).display().to_string();
    let script = format!(
        "truncate -s {esp_mib}M esp.img; mkfs.vfat -F 32 -s 1 esp.img >/dev/null; mcopy -s -i esp.img {esp}/EFI ::
         truncate -s {system_mib}M system.img; mke2fs -q -t ext4 -d {system} system.img
         truncate -s {DISK_MIB}M disk.img
         printf 'label: dos\n{esp_at}MiB,{esp_mib}MiB,ef\n{system_at}MiB,{system_mib}MiB\n' | sfdisk -q disk.img",
        esp = path("esp"),
        system = path("system"),
        esp_at = ESP.0,
        esp_mib = ESP.1 - ESP.0,
        system_at = SYSTEM.0,
        system_mib = SYSTEM.1 - SYSTEM.0,
    );
    sh(device.dir.path(), &script);
    let disk = File::options().read(true).write(true).open(path("disk.img")).unwrap();
    for (name, (begin, _)) in [("esp.img", ESP), ("system.img", SYSTEM)] {
        disk.write_all_at(&fs::read(path(name)).unwrap(), begin << 20).unwrap();
    }
    fs::read(path("disk.img")).unwrap()
}

/// What a machine asks of a disk while it updates to version 202 and commits it, and how far it was with each operation.
fn recorded(device: &Device, image: &[u8], options: &str) -> (Vec<Operation>, Vec<usize>) {
    let file = |name: &str, text: &str| -> PathBuf {
        let path = device.dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let files = [
        (device.dir.path().join("config"), "/config"),
        (file("options", options), "/options"),
        (file("done0", &DONE[0].to_string()), "/done0"),
        (file("done1", &DONE[1].to_string()), "/done1"),
    ];
    let files: Vec<_> = files.iter().map(|(path, to)| (path.as_path(), *to)).collect();
    let initrd = device.dir.path().join("initrd");
    let program = Path::new(super::fixture::MOSFS);
    mini_initrd(&initrd, KERNEL, INIT, &[(program, "/usr/bin/mosfs")], &files);
    let source = device.dir.path().join("source.img");
    sh(device.dir.path(), &format!("mke2fs -q -t ext4 -d {} {} 128M", store().display(), source.display()));
    let server = nbd::Disk::serve(image.to_vec(), &device.dir.path().join(format!("{}.sock", options.len())));
    server.record();
    let machine = Machine {
        nbd: Some(server.socket().into()),
        second: vec![source],
        kernel: KERNEL,
        ..Machine::new(&initrd)
    };
    machine.expect(0, &[&name(202, 1, "")]);
    let operations = server.recorded();
    let is_at = |at: u64, kib: u64| at == kib << 10;
    let done = DONE.map(|kib| {
        let read = |one: &Operation| matches!(one, Operation::Read(at) if is_at(*at, kib));
        operations.iter().position(read).unwrap_or_else(|| panic!("the guest did not read at {kib} KiB"))
    });
    (operations, done.to_vec())
}

/// Puts what is on a disk where the device has its folders. FAT is read without a kernel, and ext4 is mounted.
struct Left<'a> {
    device: &'a Device,
    /// Whether e2fsck found something to correct besides its journal.
    corrected: bool,
}

impl<'a> Left<'a> {
    fn new(device: &'a Device, image: &[u8], cut: &str, done: usize) -> Self {
        let path = |name: &str| device.dir.path().join(name);
        part(image, ESP, &path("esp.img"));
        part(image, SYSTEM, &path("system.img"));
        fs::remove_dir_all(device.esp()).unwrap();
        fs::create_dir_all(device.esp()).unwrap();
        let list = run(Command::new("mdir").args(["-/", "-b", "-i"]).arg(path("esp.img")).arg("::"));
        for name in
            list.lines().filter_map(|line| line.strip_prefix("::/")).filter(|name| !name.ends_with('/'))
        {
            let to = device.esp().join(name);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            let mut copy = Command::new("mcopy");
            let copied =
                run_any(copy.args(["-n", "-i"]).arg(path("esp.img")).arg(format!("::/{name}")).arg(&to));
            // What was being written, or removed, may have no blocks as far as the disk knows.
            if !copied.status.success() {
                let is_removed = done > 0 && name.contains("/mosfs-200-");
                assert!(is_removed || name.ends_with(".new"), "{cut}: {name}: {copied:?}");
                let _ = fs::remove_file(&to);
            }
        }
        // As a boot does: a superblock of ext4 has two sectors, and one that is torn between them is not mounted.
        let program = e2fsck::program().expect("e2fsck, of the package e2fsprogs");
        let (image, patience) = (path("system.img"), Duration::from_secs(60));
        let check = e2fsck::Check { program, device: &image, patience, watchdog: None };
        let corrected = check.make().unwrap_or_else(|why| panic!("{cut}: {why}"));
        run(Command::new("mount").args(["-o", "loop"]).arg(path("system.img")).arg(device.system()));
        Self { device, corrected }
    }
}

impl Drop for Left<'_> {
    fn drop(&mut self) {
        let _ = run_any(Command::new("umount").arg(self.device.system()));
    }
}

/// Acceptance: whatever a power cut loses of an update with a kernel change and its commit, something good starts.
#[test]
fn a_power_cut_leaves_a_machine_that_starts_from_fat_itself() {
    need_root();
    let (cuts, seed) = cuts_and_seed(10);
    let mut chance = Chance::new(seed);
    let device = Device::installed();
    device.record(200);
    device.commit();
    let base = disk_of(&device);
    // As mosfs mounts it itself (src/deploy/esp.rs), and as others have it in fstab.
    for options in ["umask=077,dirsync", "umask=077"] {
        let (operations, done_at) = recorded(&device, &base, options);
        let (mut cached, mut lost, mut shared, mut doubled, mut emptied, mut corrected) = (0, 0, 0, 0, 0, 0);
        let mut steps = BTreeMap::<(usize, u64), u32>::new();
        for number in 1..=cuts {
            // Reads are not counted: they do not change what a cut leaves.
            let at = loop {
                let at = chance.below(operations.len() as u64) as usize;
                if !matches!(operations[at], Operation::Read(_)) {
                    break at;
                }
            };
            let (image, loss) = nbd::cut_at(&base, &operations[..=at], |limit| chance.below(limit));
            let done = done_at.iter().filter(|done| at > **done).count();
            let cut =
                format!("{options}: seed {seed} cut {number} at {at} of {}, {done} done", operations.len());
            (cached, lost) = (cached + loss.cached, lost + loss.lost);
            let left = Left::new(&device, &image, &cut, done);
            corrected += u32::from(left.corrected);
            let esp = device.dir.path().join("esp.img");
            let check = run_any(Command::new("fsck.fat").arg("-n").arg(&esp)).stdout;
            shared += u32::from(String::from_utf8_lossy(&check).contains("share clusters"));
            // A cut inside a rename leaves the new name empty, and the old one whole. The boot loader passes over a file
            // that is no program.
            let empty =
                |name: &&String| fs::metadata(device.esp().join("EFI/Linux").join(name)).unwrap().len() == 0;
            let nothing: Vec<String> = device.names().iter().filter(empty).cloned().collect();
            for name in &nothing {
                fs::rename(device.esp().join("EFI/Linux").join(name), device.dir.path().join(name)).unwrap();
            }
            emptied += u32::from(!nothing.is_empty());
            device.expect_whole();
            let names = device.names();
            let (version, _) =
                device.start_as_the_loader_does().unwrap_or_else(|error| panic!("{cut}: {names:?}: {error}"));
            println!(
                "FIGURE {cut}: {version} starts, {} of {} sectors lost, {names:?}",
                loss.lost, loss.cached
            );
            assert!(version == 202 || done == 0 && version == 200, "{cut}: {version} starts");
            *steps.entry((done, version)).or_default() += 1;
            // The next commands finish it.
            for name in &nothing {
                fs::rename(device.dir.path().join(name), device.esp().join("EFI/Linux").join(name)).unwrap();
            }
            if device.state()["current"].as_str().is_some_and(|current| current.starts_with("200-")) {
                device.run(&update(202));
                assert_eq!(device.boot(Some(kernel_ids()[1])).map(|(version, _)| version), Ok(202), "{cut}");
            }
            device.record(202);
            device.commit();
            device.expect_whole();
            // A cut inside a rename leaves both names with one content, and neither is removed (src/deploy/esp.rs).
            let is_new = |name: &&String| name.starts_with("mosfs-202-");
            let (finished, kept) = (device.names(), names.iter().filter(is_new).count());
            assert!(finished.contains(&name(202, 1, "")), "{cut}: {names:?}, then {finished:?}");
            assert!(finished.iter().all(|name| is_new(&name)), "{cut}: {names:?}, then {finished:?}");
            assert!(finished.len() <= kept.max(1), "{cut}: {names:?}, then {finished:?}");
            doubled += u32::from(finished.len() > 1);
            assert_eq!(device.start_as_the_loader_does().map(|(version, _)| version), Ok(202), "{cut}");
            drop(left);
        }
        println!(
            "FIGURE {options}: {cuts} power cuts over {} operations, (steps done, version that starts): {steps:?}, {lost} of \
             {cached} sectors lost, {shared} times fsck.fat saw files share clusters, {emptied} times a new name was empty, {doubled} times two names stayed, {corrected} times e2fsck corrected something",
            operations.len()
        );
        assert!(cached > 0, "the disk had nothing to lose, so that nothing was tested");
    }
}
