//! Systems whose layers are erofs images: built with mkfs.erofs, installed, mounted, updated, activated, booted, verified
//! and collected by the commands that people run.

#[path = "deploy/device.rs"]
#[allow(dead_code, reason = "the tests of deployments use the rest")]
mod device;
#[path = "common/mkfs_erofs.rs"]
mod mkfs_erofs;
#[path = "common/publish.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod publish;
#[path = "common/swtpm.rs"]
#[allow(dead_code, reason = "the floor's own tests use the rest")]
mod swtpm;
#[path = "common/tar_images.rs"]
mod tar_images;
#[path = "common/tarball.rs"]
mod tarball;
#[path = "common/tools.rs"]
mod tools;
#[path = "common/unmount.rs"]
mod unmount;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mosfs::internals::image::oci::{EROFS_LZ4, EROFS_ZSTD, SQUASHFS_ZSTD};
use mosfs::internals::store::Store;
use serde_json::Value;

use device::{Device, text};
use mkfs_erofs::{mkfs_erofs, path_with, program};
use tar_images::Fixture;
use tarball::Tarball;
use tools::{run, run_any};
use unmount::unmount;

impl Fixture {
    /// Makes an image of two layers: the second deletes a file of the first, hides a folder, and has `own`.
    fn image(&self, name: &str, own: &[u8]) {
        let large: Vec<u8> = (0..900_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let mut bottom = Tarball::default();
        bottom
            .dir("etc")
            .file("etc/gone", b"deleted above")
            .dir("hidden")
            .file("hidden/old", b"hidden above")
            .file("large", &large)
            .link(b'1', "also-large", "large")
            .link(b'2', "etc/link", "../large");
        let mut top = Tarball::default();
        top.dir("etc").file("etc/.wh.gone", b"").file("etc/own", own);
        top.dir("hidden").file("hidden/.wh..wh..opq", b"").file("hidden/new", b"new");
        self.image_of_layers(name, &[bottom, top]);
    }

    /// `mosfs build` into a store, with the program `mkfs.erofs` of that folder. Each target has an image, and more lines.
    fn build(
        &self,
        version: u64,
        store: &str,
        bin: &Path,
        targets: &[(&str, &str, &str, &str)],
        options: &[&str],
    ) -> Command {
        self.import(version, "", targets);
        let mut command = self.build_into(store);
        command.args(options).env("PATH", path_with(bin));
        command
    }
}

const EROFS: &[&str] = &["--layer-format", "erofs"];

/// The choice of the command line, and that of a target; the same input gives the same digest, whatever the machine does.
#[test]
fn layers_are_what_was_chosen_and_the_same_each_time() {
    let (fixture, bin) = (Fixture::new(), mkfs_erofs());
    fixture.image("v1", b"one");
    let targets = [
        ("hostfs", "hostfs", "v1", ""),
        ("small", "fs-only", "v1", "    layer: {format: erofs, compression: zstd, block_size: 16K}\n"),
        ("usual", "fs-only", "v1", "    layer: {format: squashfs}\n"),
    ];
    let digest = |store: &str, options: &[&str], zone: &str| {
        let mut command = fixture.build(200, store, &bin, &targets, &[EROFS, options].concat());
        run(command.env("TZ", zone).env("SOURCE_DATE_EPOCH", "12345"))
    };
    let first = digest("store", &["--jobs", "1"], "UTC");
    for (target, media_type) in [("hostfs", EROFS_LZ4), ("small", EROFS_ZSTD), ("usual", SQUASHFS_ZSTD)] {
        let image = fixture.image_in("store", target);
        assert_eq!(image.layers.len(), 2);
        for layer in &image.layers {
            assert_eq!(layer.media_type(), media_type, "{target}");
            assert!(layer.trust.root_hash().is_some());
        }
    }
    assert_eq!(digest("again", &["--jobs", "3"], "Asia/Tokyo"), first);
    // What is erofs already stays as it is.
    let image = fixture.image_in("store", "hostfs");
    let manifest = fs::read_to_string(fixture.path("import.yaml")).unwrap();
    let name = format!("oci:store:mos/images/hostfs:sha256/{}", image.digest.hex());
    fs::write(fixture.path("kept.yaml"), manifest.replace("oci:images:v1", &name)).unwrap();
    let mut kept = Command::new(env!("CARGO_BIN_EXE_mosfs"));
    kept.current_dir(fixture.dir.path()).args(["build", "kept.yaml", "--store", "kept"]);
    run(kept.args(["--key", "keys/signer.key", "--cert", "keys/signer.pem"]));
    assert_eq!(fixture.image_in("kept", "small").digest, image.digest);
}

/// A program that is not there, is too old, fails, or makes an image that is not what it was given.
#[test]
fn a_program_that_cannot_do_it_is_refused() {
    let (fixture, bin) = (Fixture::new(), mkfs_erofs());
    fixture.image("v1", b"one");
    let other = fixture.path("bin");
    fs::create_dir(&other).unwrap();
    let refused = |script: &str, words: &[&str]| {
        program(&other.join("mkfs.erofs"), script);
        let mut command = fixture.build(200, "store", &other, &[("hostfs", "hostfs", "v1", "")], EROFS);
        let output = run_any(&mut command);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{script}: {said}");
        for word in words {
            assert!(said.contains(word), "`{word}` is missing: {said}");
        }
        let store = Store::open(&fixture.path("store"));
        assert!(store.map_or(true, |store| store.names().unwrap().is_empty()));
    };
    refused(
        "#!/bin/sh\necho mkfs.erofs 1.5\nexit 1\n",
        &["layer 1 of 2", "mkfs.erofs has version 1.5, expected 1.8 or newer", "install erofs-utils 1.8"],
    );
    refused("#!/bin/sh\n", &["version unknown, expected 1.8 or newer"]);
    let version = "#!/bin/sh\n[ \"$1\" != -V ] || { echo 'mkfs.erofs (erofs-utils) 1.9.1'; exit 0; }\n";
    refused(
        &format!("{version}cat >/dev/null; echo no space >&2; exit 3\n"),
        &["mkfs.erofs failed", "no space"],
    );
    refused(&format!("{version}exit 4\n"), &["mkfs.erofs failed (exit status: 4)"]);
    refused(&format!("{version}cat >/dev/null\n"), &["cannot be opened"]);
    let real = bin.join("mkfs.erofs");
    let with = |option: &str| format!("{version}exec {} \"$@\" {option}\n", real.display());
    refused(&with("--all-time"), &["`/hidden`: the time is 0, expected 1000000000"]);
    let edited = |script: &str| format!("{version}sed '{script}' | {} \"$@\"\n", real.display());
    refused(
        &edited("s/opaque=y/opaque=n/"),
        &["attributes is trusted.overlay.opaque=n, expected trusted.overlay.opaque=y"],
    );
    refused(
        &edited("s/deleted above/deleted abovE/"),
        &["`/etc/gone`: the content is 0x45 at 12, expected 0x65 at 12", "has a fault"],
    );
}

/// Unmounts what a test mounted below a folder, the last one first.
struct Mounts(PathBuf);

impl Drop for Mounts {
    fn drop(&mut self) {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4));
        let points: Vec<_> = points.filter(|point| Path::new(point).starts_with(&self.0)).collect();
        for point in points.into_iter().rev() {
            let _ = mosfs::internals::sys::mountapi::unmount(Path::new(point), true);
        }
    }
}

#[test]
fn a_device_installs_mounts_updates_activates_boots_and_collects() {
    let (fixture, bin) = (Fixture::new(), mkfs_erofs());
    for (version, name) in [(200, "v1"), (201, "v2")] {
        fixture.image(name, name.as_bytes());
        let targets = [("hostfs", "hostfs", name, ""), ("app", "container", name, "")];
        run(&mut fixture.build(version, "store", &bin, &targets, EROFS));
    }
    let device = Device::with_file_floor();
    let _mounts = Mounts(device.dir.canonicalize().unwrap());
    device.install(&fixture.publisher, 200);
    let at = device.dir.join("at");
    fs::create_dir(&at).unwrap();
    let at_text = at.to_str().unwrap();
    device.ok(&["mount", "--backend", "fuse", "hostfs", at_text]);
    assert_eq!(fs::read(at.join("etc/own")).unwrap(), b"v1");
    assert_eq!(fs::read(at.join("also-large")).unwrap().len(), 3_600_000);
    assert!(!at.join("etc/gone").exists() && !at.join("hidden/old").exists());
    assert_eq!(fs::read(at.join("hidden/new")).unwrap(), b"new");
    unmount(&mut device.command(&["umount", at_text]));

    device.ok(&["activate", "--backend", "fuse"]);
    let app = device.dir.join("run/targets/app/etc/own");
    assert_eq!(fs::read(&app).unwrap(), b"v1");
    device.ok(&["update", &fixture.publisher.source_of(201)]);
    device.ok(&["commit"]);
    device.ok(&["activate", "--backend", "fuse"]);
    assert_eq!(fs::read(&app).unwrap(), b"v2");
    assert!(device.ok(&["verify"]).contains("good"));
    assert!(device.ok(&["verify", "hostfs"]).contains("good"));
    let stats: Value = serde_json::from_str(&device.ok(&["store", "stats", "--json"])).unwrap();
    assert!(stats.to_string().contains("\"erofs\""), "{stats}");
    device.ok(&["gc"]);
    assert!(device.ok(&["verify"]).contains("good"));

    let (sysroot, cmdline) = (device.dir.join("sysroot"), device.dir.join("cmdline"));
    fs::create_dir(&sysroot).unwrap();
    fs::write(&cmdline, "quiet root=mosfs mosfs.backend=fuse\n").unwrap();
    let (sysroot_text, cmdline) = (sysroot.to_str().unwrap(), cmdline.to_str().unwrap());
    let booted =
        device.ok(&["boot", "--floor", "file", "--sysroot", sysroot_text, "--cmdline", cmdline, "--json"]);
    let booted: Value = serde_json::from_str(&booted).unwrap();
    assert_eq!((&booted["version"], &booted["backend"]), (&201.into(), &"fuse".into()));
    assert_eq!(fs::read(sysroot.join("etc/own")).unwrap(), b"v2");
}
