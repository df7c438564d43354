//! How large a disk must be.

use std::fs;
use std::process::Command;

use super::tools::{run, run_any};
use super::{Disk, Machine, publisher, refused_untouched};

/// The size, in bytes, that a setup asks for on a disk that is too small.
fn needed(setup: &mut Command) -> u64 {
    let said = String::from_utf8(run_any(setup).stderr).unwrap();
    let needed = said.split("the system needs ").nth(1).unwrap_or_else(|| panic!("{said}"));
    needed.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

/// What targets share is on the disk once, and so is each chunk of an image that is made of chunks.
#[test]
fn each_blob_needs_its_space_once() {
    let (machine, publisher, small) = (Machine::provisioned(), publisher(), Disk::of(500, &[]));
    // What is asked for besides the blobs that are stored.
    let besides = |store: &str, more: &str| {
        publisher.import(200, more);
        run(&mut publisher.command(store, &[]));
        let source = format!("oci:{}:200", publisher.path(store).display());
        let blobs = fs::read_dir(publisher.path(store).join("blobs/sha256")).unwrap();
        let stored: u64 = blobs.map(|blob| blob.unwrap().metadata().unwrap().len()).sum();
        assert!(stored > 1 << 20, "{stored} bytes are too few to tell");
        needed(&mut machine.mosfs(&["setup", &source, "--disk", &small.device])) - stored - stored / 16
    };
    let twin = "  twin:\n    url: \"oci:images:v1\"\n    version: 0.0.1\n    service_type: fs-only\n    \
                network: {type: none}\n";
    let alone = besides("alone", "");
    for (store, more) in [("same", twin), ("chunks", "storage_type: puzzlefs\n")] {
        // Manifests are small, and not asked for.
        let found = besides(store, more);
        assert!(found.abs_diff(alone) < 64 << 10, "{store}: {found} bytes, expected {alone}");
    }
}

/// The size that the error asks for is enough, with sectors of either size, and nothing less is.
#[test]
fn the_smallest_disk_is_set_up() {
    let machine = Machine::provisioned();
    let small = Disk::of(500, &[]);
    let needed = needed(&mut machine.setup(200, &["--disk", &small.device]));
    for sector in [512, 4096] {
        let (bytes, size) = (needed.next_multiple_of(sector), sector.to_string());
        let options = ["--partscan", "--sector-size", &size];
        let disk = Disk::of_bytes(bytes - sector, &options);
        let why = format!("{} has {} bytes; the system needs {needed}", disk.device, bytes - sector);
        refused_untouched(&disk, &mut machine.setup(200, &["--disk", &disk.device]), 1, &why);
        let disk = Disk::of_bytes(bytes, &options);
        machine.ok(200, &["--disk", &disk.device]);
        run(Command::new("e2fsck").args(["-fn", &disk.part(2)]));
        run(Command::new("sfdisk").args(["--verify", &disk.device]));
    }
}
