//! Signed systems whose targets are PuzzleFS images: built, compared, installed, updated, activated, booted, verified
//! and collected by the commands that people run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mosfs::internals::image::oci::{CONFIG, OciImage};
use mosfs::internals::image::puzzlefs::ROOTFS;
use mosfs::internals::store::Store;
use serde_json::Value;

use crate::debian::{Config, Debian};
use crate::device::{Device, text};
use crate::publish::PRODUCT;
use crate::tar_images::Fixture;
use crate::tarball::Tarball;
use crate::tools::{run, run_any, sh};
use crate::unmount::unmount;

/// Text that compresses and has no repeats that are as long as a chunk.
fn words(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut text = Vec::new();
    while text.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        text.extend(format!("{} ", state % 65_536).into_bytes());
    }
    text.truncate(len);
    text
}

impl Fixture {
    /// Makes an image of two layers: the second deletes a file of the first, and has `own` as its content.
    fn image(&self, name: &str, own: &[u8]) {
        let mut bottom = Tarball::default();
        bottom
            .dir("etc")
            .file("etc/gone", b"deleted above")
            .file("large", &words(1, 900_000))
            .link(b'1', "also-large", "large")
            .link(b'2', "etc/link", "../large");
        let mut top = Tarball::default();
        top.dir("etc").file("etc/.wh.gone", b"").file("etc/own", own);
        self.image_of_layers(name, &[bottom, top]);
        sh(
            self.dir.path(),
            &format!(
                "umoci config --image images:{name} --config.entrypoint /bin/app --config.env A=b --config.user 7:8"
            ),
        );
    }

    /// `mosfs build` of a system of these targets: name, service type, image.
    fn build(&self, version: u64, storage: &str, targets: &[(&str, &str, &str)], more: &[&str]) -> Command {
        let targets: Vec<_> =
            targets.iter().map(|&(name, service, image)| (name, service, image, "")).collect();
        self.import(version, &format!("storage_type: {storage}\n"), &targets);
        let mut command = self.build_into("store");
        command.args(["--level", "1"]).args(more);
        command
    }

    fn image_of(&self, target: &str) -> OciImage {
        self.image_in("store", target)
    }

    fn stats(&self) -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mosfs"));
        let said = run(command.args(["store", "stats", "--json", "--store"]).arg(self.path("store")));
        serde_json::from_str(&said).unwrap()
    }
}

#[test]
fn layers_become_one_image_with_the_config_of_the_source() {
    let fixture = Fixture::new();
    fixture.image("v1", b"one");
    let built = run_any(&mut fixture.build(200, "puzzlefs", &[("hostfs", "hostfs", "v1")], &[]));
    let notes = text(&built.stderr);
    assert!(built.status.success(), "{notes}");
    let times = notes.lines().filter(|line| line.contains("1970-01-01 00:00:00 UTC")).count();
    assert_eq!(times, 1, "{notes}");
    let image = fixture.image_of("hostfs");
    assert_eq!(image.manifest.layers[0].media_type, ROOTFS);
    assert!(image.manifest.layers.len() > 5);
    assert_eq!(image.manifest.config.media_type, CONFIG);
    let store = Store::open(&fixture.path("store")).unwrap();
    let config: Value =
        serde_json::from_slice(&store.get(&image.manifest.config.digest, 1 << 20).unwrap()).unwrap();
    assert_eq!(config["config"]["Entrypoint"], serde_json::json!(["/bin/app"]));
    assert_eq!(config["config"]["User"], "7:8");
    assert!(config["config"]["Env"].as_array().unwrap().contains(&"A=b".into()));
    assert_eq!(config["rootfs"]["diff_ids"], serde_json::json!([]));
    // A copy by another tool is whole.
    let copy = format!("oci:{}:copy", fixture.path("copy").display());
    let name =
        store.names().unwrap().into_iter().find(|(name, _)| name.starts_with("mos/images/")).unwrap().0;
    let from = format!("oci:{}:{name}", fixture.path("store").display());
    run(Command::new("skopeo").args(["copy", "--quiet", &from, &copy]));
    run(Command::new(env!("CARGO_BIN_EXE_mosfs")).args(["verify", &copy]));

    // Such an image is a source too, of either storage type, and stays what it is.
    for storage in ["puzzlefs", "atomfs"] {
        let other = fixture.path(storage);
        let manifest = fs::read_to_string(fixture.path("import.yaml")).unwrap();
        let manifest = manifest
            .replace("oci:images:v1", &copy)
            .replace("storage_type: puzzlefs", &format!("storage_type: {storage}"));
        fs::write(fixture.path("again.yaml"), manifest).unwrap();
        let mut again = fixture.build(200, storage, &[("hostfs", "hostfs", "v1")], &[]);
        fs::rename(fixture.path("again.yaml"), fixture.path("import.yaml")).unwrap();
        let mut args: Vec<_> = again.get_args().map(|arg| arg.to_os_string()).collect();
        let place = args.iter().position(|arg| arg == "store").unwrap();
        args[place] = other.clone().into();
        again = Command::new(env!("CARGO_BIN_EXE_mosfs"));
        run(again.current_dir(fixture.dir.path()).args(args));
        let kept = Store::open(&other).unwrap();
        assert!(kept.names().unwrap().iter().any(|(_, entry)| entry.digest == image.digest), "{storage}");
    }
}

#[test]
fn versions_and_targets_share_chunks_and_stats_say_how_much() {
    let fixture = Fixture::new();
    fixture.image("v1", b"one");
    fixture.image("v2", b"two");
    run(&mut fixture.build(200, "puzzlefs", &[("hostfs", "hostfs", "v1")], &[]));
    let alone = fixture.stats();
    assert_eq!(alone["images"], 1);
    assert_eq!(alone["saved_bytes"], 0);
    let targets = [("hostfs", "hostfs", "v2"), ("other", "fs-only", "v2")];
    let built = run_any(&mut fixture.build(201, "puzzlefs", &targets, &["--base", "200"]));
    let notes = text(&built.stderr);
    assert!(built.status.success(), "{notes}");
    assert_eq!(notes.lines().filter(|line| line.contains("are those of 200")).count(), 2, "{notes}");
    let stats = fixture.stats();
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{value}"));
    assert_eq!(stats["images"], 3);
    let [hostfs, other] = &stats["targets"].as_array().unwrap()[..] else { panic!("{stats}") };
    assert_eq!(hostfs["images"][0]["formats"], serde_json::json!(["puzzlefs"]));
    // Nine tenths of an image are a file that did not change; two targets have the same image.
    assert!(number(&hostfs["saved_bytes"]) > number(&alone["stored_bytes"]) / 2, "{stats}");
    assert_eq!(other["shared_with_targets_bytes"], other["stored_bytes"]);
    let sum = number(&hostfs["sum_bytes"]) + number(&other["sum_bytes"]);
    assert_eq!(number(&stats["sum_bytes"]), sum);
    assert_eq!(number(&stats["stored_bytes"]), sum - number(&stats["saved_bytes"]));
    let words = run(Command::new(env!("CARGO_BIN_EXE_mosfs"))
        .args(["store", "stats", "--store"])
        .arg(fixture.path("store")));
    assert!(words.contains("hostfs: 2 images (puzzlefs): "), "{words}");
    // A base that is not there is refused before anything is built.
    let refused = run_any(&mut fixture.build(202, "puzzlefs", &targets, &["--base", "199"]));
    assert!(!refused.status.success() && text(&refused.stderr).contains("mos/system/system:199"));
    assert_eq!(fixture.stats(), stats);
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
    let fixture = Fixture::new();
    fixture.image("v1", b"one");
    fixture.image("v2", b"two");
    run(&mut fixture.build(200, "puzzlefs", &[("hostfs", "hostfs", "v1"), ("app", "container", "v1")], &[]));
    run(&mut fixture.build(201, "puzzlefs", &[("hostfs", "hostfs", "v2"), ("app", "container", "v2")], &[]));
    let device = Device::with_file_floor();
    let _mounts = Mounts(device.dir.canonicalize().unwrap());
    device.install(&fixture.publisher, 200);
    let at = device.dir.join("at");
    fs::create_dir(&at).unwrap();
    let at_text = at.to_str().unwrap();
    // `auto` finds that the kernel cannot, and takes FUSE.
    device.ok(&["mount", "hostfs", at_text]);
    assert_eq!(fs::read(at.join("etc/own")).unwrap(), b"one");
    assert_eq!(fs::read(at.join("also-large")).unwrap(), words(1, 900_000));
    assert!(!at.join("etc/gone").exists());
    unmount(&mut device.command(&["umount", at_text]));
    device.refused(&["mount", "--backend", "dm-verity", "hostfs", at_text], 1, &["is made of chunks"]);

    device.ok(&["activate"]);
    let app = device.dir.join("run/targets/app/etc/own");
    assert_eq!(fs::read(&app).unwrap(), b"one");
    device.ok(&["update", &fixture.publisher.source_of(201)]);
    device.ok(&["commit"]);
    device.ok(&["activate"]);
    assert_eq!(fs::read(&app).unwrap(), b"two");
    assert!(device.ok(&["verify"]).contains("good"));
    assert!(device.ok(&["verify", "hostfs"]).contains("good"));
    device.ok(&["store", "stats"]);
    device.ok(&["gc"]);
    assert!(device.ok(&["verify"]).contains("good"));

    let (sysroot, cmdline) = (device.dir.join("sysroot"), device.dir.join("cmdline"));
    fs::create_dir(&sysroot).unwrap();
    fs::write(&cmdline, "quiet root=mosfs mosfs.backend=fuse\n").unwrap();
    let booted = device.ok(&[
        "boot",
        "--floor",
        "file",
        "--sysroot",
        sysroot.to_str().unwrap(),
        "--cmdline",
        cmdline.to_str().unwrap(),
        "--json",
    ]);
    let booted: Value = serde_json::from_str(&booted).unwrap();
    assert_eq!((&booted["version"], &booted["backend"]), (&201.into(), &"fuse".into()));
    assert_eq!(fs::read(sysroot.join("etc/own")).unwrap(), b"two");
}

/// A chunk that is damaged on the publisher's side is not installed, and the error names it.
#[test]
fn a_damaged_chunk_is_not_installed() {
    let fixture = Fixture::new();
    fixture.image("v1", b"one");
    run(&mut fixture.build(200, "puzzlefs", &[("hostfs", "hostfs", "v1")], &[]));
    let image = fixture.image_of("hostfs");
    let chunk = &image.manifest.layers[2];
    let path = fixture.path("store").join("blobs/sha256").join(chunk.digest.hex());
    let mut bytes = fs::read(&path).unwrap();
    bytes[100] ^= 1;
    fs::remove_file(&path).unwrap();
    fs::write(&path, &bytes).unwrap();
    let device = Device::with_file_floor();
    let (ca, source) = (fixture.publisher.key("ca.pem"), fixture.publisher.source_of(200));
    let install = ["install", &source, "--ca", ca.to_str().unwrap(), "--product", PRODUCT];
    device.refused(&install, 3, &[&chunk.digest.to_string()]);
    bytes[100] ^= 1;
    fs::write(&path, &bytes).unwrap();
    device.ok(&install);
}

/// How many blobs a `push` or `pull` says it moved, and how many bytes.
fn moved(said: &str, word: &str) -> u64 {
    let before = said.split(word).next().unwrap().trim_end();
    let number = before.rsplit(' ').next().unwrap();
    number.parse().unwrap_or_else(|_| panic!("`{said}` names no number before `{word}`"))
}

/// The way of an image over Debian's docker-registry: pushed, read by skopeo, pulled, installed, updated, collected. What
/// versions share is moved once.
#[test]
fn a_registry_holds_puzzlefs_images_and_moves_what_is_new_alone() {
    let fixture = Fixture::new();
    let registry = Debian::start(&Config::default());
    fixture.image("v1", b"one");
    fixture.image("v2", b"two");
    let (store, place) = (fixture.path("store").display().to_string(), registry.source("fleet/puzzle"));
    let device = Device::with_file_floor();
    let _mounts = Mounts(device.dir.canonicalize().unwrap());
    run(&mut fixture.build(200, "puzzlefs", &[("hostfs", "hostfs", "v1")], &[]));
    let image = fixture.image_of("hostfs");
    let first = moved(&device.ok(&["push", "--store", &store, &place]), "blobs sent");
    assert!(first > image.manifest.layers.len() as u64, "{first}");

    // skopeo copies the image out of the registry and into it: all chunks, the same manifest.
    let from = format!("docker://{}/fleet/puzzle/mos/images/hostfs:{}", registry.host(), image.digest.hex());
    let copy = format!("oci:{}:copy", fixture.path("copy").display());
    run(Command::new("skopeo").args(["copy", "--quiet", "--src-tls-verify=false", &from, &copy]));
    assert!(device.ok(&["verify", &copy]).contains("good"));
    let to = format!("docker://{}/by/skopeo:1", registry.host());
    run(Command::new("skopeo").args(["copy", "--quiet", "--dest-tls-verify=false", &copy, &to]));
    let pulled = fixture.path("pulled").display().to_string();
    device.ok(&["pull", "--image", &registry.source("by/skopeo:1"), "--store", &pulled]);
    assert!(device.ok(&["verify", &format!("oci:{pulled}")]).contains("good"));

    // The whole system, pulled and installed.
    let mirror = fixture.path("mirror").display().to_string();
    let fetched = moved(&device.ok(&["pull", &place, "--store", &mirror]), "blobs fetched");
    assert!(fetched > image.manifest.layers.len() as u64, "{fetched}");
    assert!(device.ok(&["verify", &format!("oci:{mirror}")]).contains("good"));
    let ca = fixture.publisher.key("ca.pem");
    device.ok(&["install", &place, "--ca", ca.to_str().unwrap(), "--product", PRODUCT]);

    // The next version: a few chunks, the metadata and the documents of the system are new.
    run(&mut fixture.build(201, "puzzlefs", &[("hostfs", "hostfs", "v2")], &[]));
    let again = moved(&device.ok(&["push", "--store", &store, &place]), "blobs sent");
    // Of the image: its metadata, its config, and the chunks at the change.
    let documents = |all: u64| all - image.manifest.layers.len() as u64;
    assert!(again <= documents(first) + 4, "{again} blobs were sent for a few bytes, {first} for all");
    let again = moved(&device.ok(&["pull", &place, "--store", &mirror]), "blobs fetched");
    assert!(again <= documents(fetched) + 4, "{again} blobs were fetched for a few bytes, {fetched} for all");
    device.ok(&["update", &place]);
    device.ok(&["commit"]);
    let at = device.dir.join("at");
    fs::create_dir(&at).unwrap();
    device.ok(&["mount", "hostfs", at.to_str().unwrap()]);
    assert_eq!(fs::read(at.join("etc/own")).unwrap(), b"two");
    assert_eq!(fs::read(at.join("also-large")).unwrap(), words(1, 900_000));
    unmount(&mut device.command(&["umount", at.to_str().unwrap()]));
    device.ok(&["gc"]);
    assert!(device.ok(&["verify"]).contains("good"));
}
