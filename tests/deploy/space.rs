//! Space comes back by itself, and garbage is collected past what is damaged; `commit` knows what runs.

use std::fs;

use mosfs::internals::deploy::choice::Role;
use mosfs::internals::digest::Digest;

use crate::device::{Device, text};
use crate::limits::{SmallDisk, noise};
use crate::publish::Publisher;
use crate::swtpm::Swtpm;

fn published(versions: &[u64]) -> (tempfile::TempDir, Publisher) {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    for version in versions {
        publisher.publish(*version, &format!("content of version {version}"));
    }
    (dir, publisher)
}

/// A blob that nothing needs.
fn junk(device: &Device) -> std::path::PathBuf {
    let text = noise(10_000, 7);
    let path = device.system().join("store/blobs/sha256").join(Digest::of(text.as_bytes()).hex());
    fs::write(&path, text).unwrap();
    path
}

fn temporary_files(device: &Device) -> usize {
    fs::read_dir(device.system().join("store/.mosfs/tmp")).unwrap().count()
}

#[test]
fn what_interrupted_updates_left_goes_with_the_next_one() {
    let (_dir, publisher) = published(&[200, 201]);
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    let cut = |point: &str| {
        let mut command = device.command(&["update", &publisher.source_of(201)]);
        assert_eq!(command.env("MOSFS_FAILPOINT", point).output().unwrap().status.code(), None, "{point}");
    };
    for time in 1..=3 {
        cut(&format!("store.blob.synced:{time}"));
        // Four blobs are fetched at a time.
        let left = temporary_files(&device);
        assert!((1..=4).contains(&left), "the next writer sweeps before it writes: {left}");
    }
    cut("store.tmp.removed");
    device.ok(&["update", &publisher.source_of(201)]);
    assert_eq!(temporary_files(&device), 0);
    // What nothing needs goes when a command has done its work, also where it had nothing to do.
    for command in [["update", &publisher.source_of(201)], ["install", &publisher.source_of(200)]] {
        let junk = junk(&device);
        device.ok(&command);
        assert!(!junk.exists(), "{command:?}");
    }
    let junk = junk(&device);
    assert_eq!(device.boot(), (201, Role::Pending));
    device.ok(&["commit"]);
    assert!(!junk.exists(), "commit");
    assert_eq!(device.versions(), [201]);
}

#[test]
fn an_update_makes_room_before_it_says_that_there_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    publisher.publish(200, "small");
    publisher.publish(201, &noise(6 << 20, 1));
    publisher.publish(202, &noise(6 << 20, 2));
    let device = Device::with_file_floor();
    let _disk = SmallDisk::mount(&device, 8);
    device.install(&publisher, 200);
    device.ok(&["update", &publisher.source_of(201)]);
    for _ in 0..3 {
        device.boot_if(|version| version == 200).unwrap();
    }
    // 201 has used up its tries: the next update may have its room, and says so before it begins.
    let before = device.snapshot();
    let check = device.ok(&["update", "--check", "--json", &publisher.source()]);
    assert!(check.contains("\"update\":true"), "{check}");
    assert_eq!(device.snapshot(), before, "asking removes nothing");
    device.ok(&["update", &publisher.source()]);
    assert_eq!(device.versions(), [200, 202]);
    assert_eq!(device.boot(), (202, Role::Pending));
    // While it runs, its room is not taken.
    publisher.publish(203, &noise(6 << 20, 3));
    device.refused(&["update", &publisher.source()], 1, &["needs", "bytes, ", "are free"]);
    device.ok(&["verify"]);
}

#[test]
fn gc_goes_on_past_what_is_damaged_and_says_so() {
    let (_dir, publisher) = published(&[200, 201, 202]);
    // Each: what is harmed, and the exit code.
    type Harm = fn(&Device);
    let folder = |device: &Device, id: mosfs::internals::deploy::DeploymentId| {
        device.system().join("deployments").join(id.to_string())
    };
    let harms: [(&str, Harm, i32); 5] = [
        (
            "the folder of previous is gone",
            |device| {
                let id = device.state().previous.unwrap();
                fs::remove_dir_all(device.system().join("deployments").join(id.to_string())).unwrap();
            },
            0,
        ),
        (
            "the manifest of previous has rotted",
            |device| {
                let id = device.state().previous.unwrap();
                let path = device.system().join("deployments").join(id.to_string());
                fs::write(path.join("manifest.json"), "{}").unwrap();
            },
            0,
        ),
        (
            "the manifest of current has rotted",
            |device| {
                let id = device.state().current.unwrap();
                let path = device.system().join("deployments").join(id.to_string());
                fs::write(path.join("manifest.json"), "{}").unwrap();
            },
            3,
        ),
        (
            "the folder of pending is a file",
            |device| {
                let id = device.state().pending.unwrap().deployment;
                let path = device.system().join("deployments").join(id.to_string());
                fs::remove_dir_all(&path).unwrap();
                fs::write(path, "").unwrap();
            },
            3,
        ),
        (
            "an OCI manifest has rotted",
            |device| {
                let store = mosfs::internals::store::Store::open(&device.system().join("store")).unwrap();
                let names = store.names().unwrap();
                let (_, image) = names.iter().find(|(name, _)| name.starts_with("mos/images/")).unwrap();
                let path = store.blob_path(&image.digest);
                fs::remove_file(&path).unwrap();
                fs::write(path, vec![b'x'; image.size as usize]).unwrap();
            },
            3,
        ),
    ];
    for (what, harm, code) in harms {
        let device = Device::with_file_floor();
        device.install(&publisher, 200);
        device.ok(&["update", &publisher.source_of(201)]);
        let mut cut = device.command(&["commit"]);
        assert!(!cut.env("MOSFS_FAILPOINT", "commit.state.blessed").status().unwrap().success());
        device.ok(&["update", &publisher.source_of(202)]);
        harm(&device);
        let junk = junk(&device);
        let leftover = device.system().join("deployments/.new-left by a crash");
        fs::write(&leftover, "no folder").unwrap();
        let gc = device.run(&["gc"]);
        assert_eq!(gc.status.code(), Some(code), "{what}: {}", text(&gc.stderr));
        assert!(!junk.exists() && !leftover.exists(), "{what}");
        let current = device.state().current.unwrap();
        assert!(folder(&device, current).exists(), "{what}: what is current stays");
        if code == 0 {
            assert!(text(&gc.stdout).contains("dropped the previous deployment 200-"), "{what}");
            assert_eq!(device.state().previous, None, "{what}");
        } else {
            assert!(text(&gc.stderr).contains("hint: run `mosfs repair`"), "{what}: {}", text(&gc.stderr));
            device.ok(&["repair", &publisher.source()]);
        }
        device.ok(&["gc"]);
        device.ok(&["verify"]);
        assert_eq!(device.boot(), (202, Role::Pending), "{what}");
    }
}

#[test]
fn commit_blesses_nothing_where_it_is_not_known_what_runs() {
    let (_dir, publisher) = published(&[200, 201]);
    let tpm = Swtpm::start();
    let device = Device::with_tpm(&tpm);
    device.install(&publisher, 200);
    device.provision(&publisher);
    // Rule: a floor in a TPM never falls again: no guess.
    device.refused(&["commit"], 1, &["not known which deployment runs", "boot.json", "--unbooted"]);
    assert_eq!(device.boot(), (200, Role::Current));
    device.ok(&["commit"]);
    device.ok(&["update", &publisher.source_of(201)]);
    fs::remove_file(device.boot_record()).unwrap();
    let before = device.snapshot();
    // As in a chroot or a container with a /run of its own; mosfs has started this machine before.
    for more in [&[][..], &["--unbooted"]] {
        device.refused(&[&["commit"], more].concat(), 1, &["has started this machine before"]);
    }
    assert_eq!(device.snapshot(), before);
    assert_eq!(tpm.tool_ok("tpm2_nvread", &["0x01500050", "-C", "o"]), 200u64.to_be_bytes());
    // What runs is blessed, whatever is pending.
    assert_eq!(device.boot_if(|version| version == 200).unwrap().deployment.version, 200);
    assert!(device.ok(&["commit"]).contains("version 200 was current already"));
    // The last try that works is as good as the first.
    for _ in 0..2 {
        assert_eq!(device.boot(), (201, Role::Pending));
    }
    assert_eq!(device.state().pending.unwrap().tries_left, 0);
    device.ok(&["gc"]);
    assert_eq!(device.versions(), [200, 201], "it runs: it stays");
    assert!(device.ok(&["commit"]).contains("the floor rose from 200 to 201"));
}

#[test]
fn on_a_machine_that_mosfs_never_starts_commit_needs_to_be_told_so() {
    let (_dir, publisher) = published(&[200, 201]);
    let tpm = Swtpm::start();
    let device = Device::with_tpm(&tpm);
    device.install(&publisher, 200);
    device.provision(&publisher);
    assert!(device.ok(&["commit", "--unbooted"]).contains("the floor rose from 0 to 200"));
    device.ok(&["update", &publisher.source_of(201)]);
    device.refused(&["commit"], 1, &["--unbooted"]);
    // Rule: never a deployment that has no tries left.
    let path = device.system().join("state.json");
    let state = fs::read_to_string(&path).unwrap();
    fs::write(&path, state.replace("\"tries_left\":3", "\"tries_left\":0")).unwrap();
    device.refused(&["commit", "--unbooted"], 1, &["has no tries left", "--again"]);
    fs::write(&path, &state).unwrap();
    // Nor one that could not be started.
    let store = mosfs::internals::store::Store::open(&device.system().join("store")).unwrap();
    let id = device.state().pending.unwrap().deployment;
    let manifest = crate::signers::manifest(&store, id.version);
    let image = store.blob_path(&manifest.targets.values().next().unwrap().digest);
    let bytes = fs::read(&image).unwrap();
    fs::remove_file(&image).unwrap();
    device.refused(&["commit", "--unbooted"], 3, &["is not in the store", "mosfs repair SOURCE"]);
    fs::write(&image, bytes).unwrap();
    assert!(device.ok(&["commit", "--unbooted"]).contains("the floor rose from 200 to 201"));
}
