//! How long `mosfs activate` takes, through dm-verity and through FUSE, beside a script that opens and mounts the same
//! layers by hand.
//!
//! Not a test of speed: it prints a table for docs/benchmarks.md, and fails only where a target does not show its files.
//!
//! ```text
//! cargo test --test boot -- --ignored --exact activation::activation_times --nocapture
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::device::{MOSFS, superblock};
use super::figures::{guest_initrd, mounted, timed, undo};
use super::machine::{Machine, median, noise, squashfs};
use super::publish::{PRODUCT, Publisher};

/// How often each way is taken.
const ROUNDS: usize = 5;
/// Numbers of targets that are activated at once.
const COUNTS: [usize; 3] = [1, 10, 50];
/// The ways.
const WAYS: [&str; 3] = ["dm-verity", "fuse", "by hand"];

/// What somebody would write who trusts the disk: each layer through dm-verity, once, and an overlay for each target.
/// `$1` lists `NAME DIGEST OFFSET ROOTHASH` of the shared layer, and then of each target's own.
const BY_HAND: &str = r#"#!/bin/sh
set -e
export DM_DISABLE_UDEV=1
number=0
while read -r name digest offset root; do
    file=/device/system/store/blobs/sha256/$digest
    layer=/run/layer$number
    veritysetup open "$file" "layer$number" "$file" "$root" --hash-offset="$offset"
    mkdir -p "$layer"
    mount -t squashfs -o ro "/dev/mapper/layer$number" "$layer"
    if [ $number -gt 0 ]; then
        mkdir -p "/run/by-hand/$name"
        mount -t overlay overlay -o "ro,lowerdir=$layer:/run/layer0" "/run/by-hand/$name"
    fi
    number=$((number + 1))
done <"$1"
"#;

fn target(number: usize) -> String {
    format!("t{number:02}")
}

#[test]
#[ignore = "prints figures"]
fn activation_times() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name);
    let publisher = Publisher::new(dir.path());
    let layer = |name: &str, size: usize| {
        let (tree, image) = (path("trees").join(name), path(&format!("{name}.squashfs")));
        fs::create_dir_all(tree.join(name)).expect("a folder");
        fs::write(tree.join(name).join("file"), name).expect("a file");
        fs::write(tree.join(name).join("noise"), noise(size, 1)).expect("a file");
        squashfs(&tree, &image, &[]);
        publisher.add_image(&image)
    };
    let base = layer("base", 1 << 20);
    let names: Vec<String> = (1..=COUNTS[2]).map(target).collect();
    let own: Vec<_> = names.iter().map(|name| layer(name, 1000)).collect();
    let mut targets: Vec<_> = names
        .iter()
        .zip(&own)
        .map(|(name, own)| (name.as_str(), "fs-only", vec![base.clone(), own.clone()]))
        .collect();
    targets.push(("hostfs", "hostfs", vec![base.clone()]));
    publisher.publish_targets(1, &targets, true);
    let device = path("device");
    let installed = Command::new(MOSFS)
        .args(["install", &publisher.source(), "--product", PRODUCT, "--floor", "file", "--ca"])
        .arg(publisher.key("ca.pem"))
        .arg("--system")
        .arg(device.join("system"))
        .arg("--config")
        .arg(device.join("config"))
        .output()
        .expect("mosfs");
    assert!(installed.status.success(), "{installed:?}");

    let line = |name: &str, layer: &mosfs::internals::image::oci::Descriptor| {
        let file = device.join("system/store/blobs/sha256").join(layer.digest.hex());
        let root = &layer.annotations[mosfs::internals::image::oci::ROOT_HASH];
        format!("{name} {} {} {root}\n", layer.digest.hex(), superblock(&file))
    };
    let list: String = [line("base", &base)]
        .into_iter()
        .chain(names.iter().zip(&own).map(|(name, own)| line(name, own)))
        .collect();
    fs::write(path("layers"), list).expect("the list");
    fs::write(path("by-hand"), BY_HAND).expect("the script");
    guest_initrd(
        &path("initrd"),
        "activation::guest_activation_times",
        &[(&device, "/device"), (&path("layers"), "/layers"), (&path("by-hand"), "/by-hand")],
    );
    let ended = Machine { memory: 1024, ..Machine::new(&path("initrd")) }.expect(0, &["FIGURE"]);
    for figure in ended.after("FIGURE ") {
        println!("{figure}");
    }
}

/// The processes that serve mounts, and their anonymous memory in bytes, shared pages by their part.
fn servers() -> (usize, u64) {
    let (mut count, mut bytes) = (0, 0);
    for entry in fs::read_dir("/proc").expect("processes").flatten() {
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if !comm.starts_with("mosfs") {
            continue;
        }
        let Ok(text) = fs::read_to_string(entry.path().join("smaps_rollup")) else { continue };
        let Some(field) = text.lines().find_map(|line| line.strip_prefix("Pss_Anon:")) else { continue };
        let kib: u64 = field.split_whitespace().next().and_then(|kib| kib.parse().ok()).expect("a number");
        (count, bytes) = (count + 1, bytes + kib * 1024);
    }
    (count, bytes)
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_activation_times() {
    let before = mounted();
    let layers = fs::read_to_string("/layers").expect("this test runs inside the machine");
    println!("FIGURE ms, median of {ROUNDS}");
    for count in COUNTS {
        let names: Vec<String> = (1..=count).map(target).collect();
        let list: Vec<&str> = layers.split_inclusive('\n').take(count + 1).collect();
        fs::write("/tmp/layers", list.concat()).expect("a list");
        let mut times: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        let mut served = BTreeMap::new();
        for _ in 0..ROUNDS {
            for way in WAYS {
                let (mut command, folder) = match way {
                    "by hand" => {
                        let mut command = Command::new("/bin/sh");
                        command.args(["/by-hand", "/tmp/layers"]);
                        (command, "/run/by-hand")
                    }
                    backend => {
                        let mut command = Command::new("mosfs");
                        command.args([
                            "activate",
                            "--backend",
                            backend,
                            "--daemon",
                            "fork",
                            "--floor",
                            "file",
                        ]);
                        command.args(["--system", "/device/system", "--config", "/device/config"]);
                        command.args(&names);
                        (command, "/run/mosfs/targets")
                    }
                };
                let (time, _) = timed(&mut command);
                times.entry(way).or_default().push(time.as_secs_f64() * 1e3);
                served.insert(way, servers());
                for name in &names {
                    for file in ["base/file".to_string(), format!("{name}/file")] {
                        let path = Path::new(folder).join(name).join(&file);
                        let text =
                            fs::read_to_string(&path).unwrap_or_else(|e| panic!("{way}: {path:?}: {e}"));
                        assert_eq!(file, format!("{text}/file"), "{way}: {path:?}");
                    }
                }
                undo(&before);
            }
        }
        let [one, two, three] = WAYS.map(|way| median(&times[way]));
        println!("FIGURE | {count} | {one:.0} | {two:.0} | {three:.0} |");
        for way in WAYS {
            let (processes, bytes) = served[way];
            println!("FIGURE {count}, {way}: {processes} processes, {:.1} MB", bytes as f64 / 1e6);
        }
    }
}
