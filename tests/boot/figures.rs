//! How long `mosfs boot` takes, by phase, beside a script that opens and mounts the same layers by hand.
//!
//! Not a test of speed: it prints a table for docs/boot.md, and fails only where the three roots differ.
//!
//! ```text
//! cargo test --release --test boot figures -- --ignored --nocapture
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::KERNEL;
use super::device::{Device, GOOD, MOSFS};
use super::machine::{Machine, median, mini_initrd, tool};
use super::power::loaded_libraries;

/// How often each way is taken.
const ROUNDS: usize = 9;

/// The first process of the machine; `TEST` is what it runs.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin:/usr/bin:/sbin RUST_BACKTRACE=0
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs tmp /tmp
mkdir -p /sysroot /run/mosfs/system
while read -r module; do insmod /modules/$module || echo "cannot load $module"; done </modules.list
/guest --ignored --exact TEST --nocapture
echo "MOSFS-VM-VERDICT: $?"
poweroff -f
"#;

/// What somebody would write who trusts the disk and has no floor: each layer through dm-verity, and
/// an overlay of them. `$1` is the folder for the root; layers and root hashes follow, the top one first.
const BY_HAND: &str = r#"#!/bin/sh
set -e
export DM_DISABLE_UDEV=1
mount -t ext4 -o nosuid,nodev,noexec LABEL=mosfs /run/mosfs/system 2>/dev/null ||
    mount -t ext4 -o nosuid,nodev,noexec /dev/vda /run/mosfs/system
root=$1 lower= number=0
shift
while [ $# -gt 0 ]; do
    file=/run/mosfs/system/store/blobs/sha256/$1
    veritysetup open "$file" "layer$number" "$file" "$3" --hash-offset="$2"
    mkdir -p /run/layer$number
    mount -t squashfs -o ro /dev/mapper/layer$number /run/layer$number
    lower=$lower${lower:+:}/run/layer$number
    number=$((number + 1))
    shift 3
done
mkdir -p /run/upper
mount -t tmpfs upper /run/upper
mkdir /run/upper/upper /run/upper/work
mount -t overlay overlay -o "lowerdir=$lower,upperdir=/run/upper/upper,workdir=/run/upper/work" "$root"
"#;

#[test]
#[ignore = "prints figures, of a release build"]
fn boot_times() {
    let device = Device::with(GOOD);
    let dir = tempfile::tempdir().expect("a folder");
    let (script, layers) = (dir.path().join("by-hand"), dir.path().join("layers"));
    fs::write(&script, BY_HAND).expect("the script");
    let list: Vec<String> = device
        .layers(GOOD)
        .iter()
        .rev()
        .map(|(digest, offset, root)| format!("{digest} {offset} {root}\n"))
        .collect();
    fs::write(&layers, list.concat()).expect("the list");
    let initrd = dir.path().join("initrd");
    guest_initrd(
        &initrd,
        "figures::guest_boot_times",
        &[(device.config(), "/etc/mosfs"), (&script, "/by-hand"), (&layers, "/layers")],
    );
    let machine = Machine {
        system: Some(device.system()),
        tpm: Some(device.path("tpm")),
        cmdline: "root=mosfs".into(),
        memory: 1024,
        ..Machine::new(&initrd)
    };
    let ended = machine.expect(0, &["FIGURE"]);
    for figure in ended.after("FIGURE ") {
        println!("{figure}");
    }
}

/// Packs an initramfs that runs a test of this program beside mosfs and veritysetup.
pub fn guest_initrd(out: &Path, test: &str, files: &[(&Path, &str)]) {
    let (me, libraries) = (std::env::current_exe().expect("this program"), loaded_libraries());
    let [esys, blkid] = libraries.each_ref().map(|path| (path.as_path(), path.to_str().expect("a path")));
    let programs = [
        (Path::new(MOSFS), "/usr/bin/mosfs"),
        (&me, "/guest"),
        (Path::new("/sbin/veritysetup"), "/sbin/veritysetup"),
        esys,
        blkid,
    ];
    mini_initrd(out, KERNEL, &INIT.replace("TEST", test), &programs, files);
}

/// Runs a command that must succeed; how long it took from its start to its end, and what it printed.
pub fn timed(command: &mut Command) -> (Duration, String) {
    let begin = Instant::now();
    let output = tool("", command);
    (begin.elapsed(), String::from_utf8_lossy(&output.stdout).into_owned())
}

pub fn mounted() -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mounts").expect("mounts");
    table.lines().filter_map(|line| line.split(' ').nth(1).map(String::from)).collect()
}

/// Unmounts all of a round, and waits until no device is left.
pub fn undo(before: &[String]) {
    for point in mounted().iter().rev().filter(|point| !before.contains(point)) {
        // The kernel frees devices from a work queue, and a daemon ends after its mount.
        let end = Instant::now() + Duration::from_secs(30);
        while let Err(error) = mosfs::internals::sys::mountapi::unmount(Path::new(point), false) {
            assert!(Instant::now() < end, "{point}: {error}");
            std::thread::sleep(Duration::from_millis(10));
        }
        if let Some(number) = point.strip_prefix("/run/layer") {
            let name = format!("layer{number}");
            timed(Command::new("veritysetup").args(["close", &name]).env("DM_DISABLE_UDEV", "1"));
        }
    }
    let busy = || {
        let list = fs::read_dir("/sys/block").expect("list");
        list.flatten().any(|entry| {
            entry.path().join("loop/backing_file").exists()
                || entry.file_name().to_string_lossy().starts_with("dm-")
        })
    };
    while busy() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = fs::remove_file("/run/mosfs/boot.json");
}

/// What is compared of a root: names, modes, sizes, and the content of small files.
fn tree(root: &Path) -> BTreeMap<String, String> {
    let (_, text) = timed(Command::new("/bin/busybox").args(["find", ".", "-xdev"]).current_dir(root));
    text.lines()
        // The root itself is the upper layer's, made just now; in the others `mosfs boot` shows what belongs
        // to the device.
        .filter(|name| ![".", "./var/lib/mosfs", "./etc/mosfs"].contains(name))
        .map(|name| {
            use std::os::unix::fs::MetadataExt;
            let path = root.join(name);
            let data = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            let size = if data.is_dir() { 0 } else { data.len() };
            (
                name.to_string(),
                format!("{:o} {} {} {size} {}", data.mode(), data.uid(), data.gid(), data.mtime()),
            )
        })
        .collect()
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_boot_times() {
    let before = mounted();
    let layers = fs::read_to_string("/layers").expect("this test runs inside the machine");
    let boot = |backend: &str| {
        let cmdline = format!("/tmp/cmdline-{backend}");
        fs::write(&cmdline, format!("root=mosfs mosfs.backend={backend}\n")).expect("a file");
        let mut command = Command::new("mosfs");
        command.args(["boot", "--json", "--system", "/run/mosfs/system", "--config", "/etc/mosfs"]);
        command.args(["--sysroot", "/sysroot", "--cmdline", &cmdline]);
        command
    };
    let mut all: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut phases: BTreeMap<(&str, String), Vec<f64>> = BTreeMap::new();
    let mut order: Vec<String> = Vec::new();
    let mut trees: BTreeMap<&str, BTreeMap<String, String>> = BTreeMap::new();
    for round in 0..ROUNDS {
        for way in ["dm-verity", "fuse", "by hand"] {
            fs::write("/proc/sys/vm/drop_caches", "3").expect("drop the caches");
            let (time, text) = match way {
                "by hand" => timed(
                    Command::new("/bin/sh").args(["/by-hand", "/sysroot"]).args(layers.split_whitespace()),
                ),
                backend => timed(&mut boot(backend)),
            };
            all.entry(way).or_default().push(time.as_secs_f64() * 1e3);
            if way != "by hand" {
                let answer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
                assert_eq!(answer["backend"], way);
                for phase in answer["phases"].as_array().expect("phases") {
                    let name = phase["phase"].as_str().expect("a name").to_string();
                    if !order.contains(&name) {
                        order.push(name.clone());
                    }
                    phases.entry((way, name)).or_default().push(phase["ms"].as_f64().expect("a number"));
                }
            }
            if round == 0 {
                trees.insert(way, tree(Path::new("/sysroot")));
            }
            undo(&before);
        }
    }
    for way in ["fuse", "by hand"] {
        let (one, two) = (&trees["dm-verity"], &trees[way]);
        let differ: Vec<_> = one.iter().filter(|(name, line)| two.get(*name) != Some(line)).take(5).collect();
        assert!(differ.is_empty() && one.len() == two.len(), "the tree of {way}: {differ:?}");
    }
    println!("FIGURE ms, median of {ROUNDS}, {} files", trees["dm-verity"].len());
    for name in order {
        let [one, two] = ["dm-verity", "fuse"]
            .map(|way| phases.get(&(way, name.clone())).map_or(0.0, |times| median(times)));
        println!("FIGURE | {name} | {one:.1} | {two:.1} | |");
    }
    let [one, two, three] = ["dm-verity", "fuse", "by hand"].map(|way| median(&all[way]));
    println!("FIGURE | process, start to end | {one:.1} | {two:.1} | {three:.1} |");
}
