//! A boot needs no more than it must: a state file that cannot be used, a disk that cannot be written, images of
//! others that are damaged.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use mosfs::internals::deploy::choice::Role;
use mosfs::internals::deploy::state::Damage;

use crate::device::{Device, text};
use crate::publish::Publisher;
use crate::swtpm::Swtpm;

fn published(versions: &[u64]) -> (tempfile::TempDir, Publisher) {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    for version in versions {
        publisher.publish(*version, &format!("content of {version}"));
    }
    (dir, publisher)
}

/// A device with version 200 current and 201 on the disk as well, both committed.
fn committed(publisher: &Publisher) -> Device {
    let device = Device::with_file_floor();
    device.install(publisher, 200);
    device.ok(&["update", &publisher.source_of(201)]);
    device.ok(&["commit"]);
    device
}

/// Every way in which the file is of no use.
fn damages(path: &Path) -> Vec<(&'static str, Vec<u8>)> {
    let good = fs::read(path).unwrap();
    let with = |from: &str, to: &str| text(&good).replace(from, to).into_bytes();
    vec![
        ("empty", Vec::new()),
        ("zeros", vec![0; 512]),
        ("half of it", good[..good.len() / 2].to_vec()),
        ("another format", with("\"format\":1", "\"format\":2,\"new\":{}")),
        ("no format", with("\"format\":1", "\"x\":1")),
        ("a name that is none", with("201-", "0201-")),
        ("tries that are none", with("\"pending\":null", "\"pending\":{\"tries_left\":-1}")),
        ("far too long", vec![b' '; 2 << 20]),
        ("another thing", b"[1]".to_vec()),
    ]
}

#[test]
fn a_state_file_that_cannot_be_used_stops_no_boot_and_the_next_command_writes_it_anew() {
    let (_dir, publisher) = published(&[200, 201]);
    let device = committed(&publisher);
    let path = device.system().join("state.json");
    let good = fs::read(&path).unwrap();
    for (what, bytes) in damages(&path) {
        fs::write(&path, &bytes).unwrap();
        let status = device.ok(&["status"]);
        assert!(status.contains("the state file cannot be read"), "{what}: {status}");
        assert_eq!(fs::read(&path).unwrap(), bytes, "{what}: a query changes nothing");
        // The floor stands at 201: this version was committed.
        let booted = device.boot_if(|_| true).unwrap();
        assert_eq!((booted.deployment.version, booted.role), (201, Role::Current), "{what}");
        assert_eq!(fs::read(&path).unwrap(), bytes, "{what}: there is nothing to count");
        if what == "another format" {
            assert_eq!(booted.damage, Some(Damage::OtherFormat(2)));
        } else {
            assert!(matches!(booted.damage, Some(Damage::Unreadable(_))), "{what}: {:?}", booted.damage);
        }
        device.ok(&["gc"]);
        let state = device.state();
        assert_eq!((state.current.unwrap().version, state.damage), (201, None), "{what}");
        assert_eq!(fs::read(device.system().join("state.json.unread")).unwrap(), bytes, "{what}");
        fs::write(&path, &good).unwrap();
    }
}

#[test]
fn each_command_that_changes_something_mends_the_file() {
    let (_dir, publisher) = published(&[200, 201, 202]);
    for command in [
        vec!["gc".to_string()],
        vec!["commit".into()],
        vec!["install".into(), publisher.source_of(201)],
        vec!["update".into(), publisher.source_of(201)],
        vec!["update".into(), publisher.source_of(202)],
    ] {
        let device = committed(&publisher);
        let folders = || device.system().join("deployments").read_dir().unwrap().count();
        let before = folders();
        fs::write(device.system().join("state.json"), "").unwrap();
        let arguments: Vec<&str> = command.iter().map(String::as_str).collect();
        device.ok(&arguments);
        let state = device.state();
        assert_eq!((state.current.unwrap().version, &state.damage), (201, &None), "{command:?}");
        assert_eq!(state.pending.is_some(), command.last().unwrap().ends_with(":202"), "{command:?}");
        assert!(folders() >= before, "{command:?}: gc took what may be needed");
    }
}

#[test]
fn what_is_no_file_is_no_state() {
    let (_dir, publisher) = published(&[200, 201]);
    let device = committed(&publisher);
    let path = device.system().join("state.json");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_eq!(device.boot().0, 201);
    device.ok(&["commit"]);
    assert_eq!(device.state().current.unwrap().version, 201);
    fs::remove_file(&path).unwrap();
    symlink("elsewhere", &path).unwrap();
    assert_eq!(device.boot().0, 201);
    fs::remove_file(&path).unwrap();
    let booted = device.boot_if(|_| true).unwrap();
    assert_eq!((booted.deployment.version, booted.damage), (201, Some(Damage::Missing)));
}

#[test]
fn an_uncommitted_version_has_its_tries_counted_also_where_the_file_was_lost() {
    let (_dir, publisher) = published(&[200, 201]);
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    device.ok(&["commit"]);
    device.ok(&["update", &publisher.source_of(201)]);
    fs::write(device.system().join("state.json"), "").unwrap();
    for left in [2, 1, 0] {
        assert_eq!(device.boot(), (201, Role::Pending));
        assert_eq!(device.state().pending.unwrap().tries_left, left);
    }
    assert_eq!(device.boot(), (200, Role::Current), "it was never committed");
}

#[test]
fn the_highest_that_verifies_and_is_not_below_the_floor_is_taken() {
    let (_dir, publisher) = published(&[199, 200, 201]);
    let tpm = Swtpm::start();
    let device = Device::with_tpm(&tpm);
    device.install(&publisher, 199);
    device.provision(&publisher);
    let folder = |version: u64| {
        let list = fs::read_dir(device.system().join("deployments")).unwrap();
        let prefix = format!("{version}-");
        list.map(|entry| entry.unwrap().path())
            .find(|path| path.file_name().unwrap().to_string_lossy().starts_with(&prefix))
            .unwrap()
    };
    // A commit drops what the floor has left behind; somebody puts it back.
    let (old, kept) = (folder(199), tempfile::tempdir().unwrap());
    let copy = |from: &Path, to: &Path| {
        assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
    };
    copy(&old, kept.path());
    device.boot();
    device.ok(&["commit"]);
    for version in [200, 201] {
        device.ok(&["update", &publisher.source_of(version)]);
        if version == 200 {
            device.boot();
            device.ok(&["commit"]);
        }
    }
    assert!(!old.exists());
    copy(&kept.path().join(old.file_name().unwrap()), &old);
    let path = device.system().join("state.json");
    fs::write(&path, "").unwrap();
    // 201 does not verify any more, 199 is below the floor.
    fs::write(folder(201).join("manifest.sig"), "nonsense").unwrap();
    let booted = device.boot_if(|_| true).unwrap();
    assert_eq!(booted.deployment.version, 200);
    let refused: Vec<_> = booted.refused.iter().map(|one| one.deployment.version).collect();
    assert_eq!(refused, [201, 199]);
    assert!(booted.refused[1].why.contains("below the floor"), "{}", booted.refused[1].why);
    // Without it only one below the floor is left, and one that does not verify: nothing boots, with the gravest reason.
    fs::remove_dir_all(folder(200)).unwrap();
    fs::write(&path, "").unwrap();
    let error = device.boot_if(|_| true).unwrap_err();
    assert_eq!(mosfs::internals::error::Classified::class(&error).exit_code(), 4, "{error}");
}

#[test]
fn nothing_but_the_root_must_be_complete() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    let writer = |content: &str| publisher.layer(&publisher.store().writer().unwrap(), content);
    let (host, app) = (writer("host"), writer("app"));
    publisher.publish_targets(
        200,
        &[("hostfs", "hostfs", vec![host.clone()]), ("app", "fs-only", vec![app.clone()])],
        true,
    );
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    let blob = |digest: &mosfs::internals::digest::Digest| {
        device.system().join("store/blobs/sha256").join(digest.hex())
    };
    fs::remove_file(blob(&app.digest)).unwrap();
    assert_eq!(device.boot(), (200, Role::Current));
    fs::remove_file(blob(&host.digest)).unwrap();
    let error = device.boot_if(|_| true).unwrap_err();
    assert!(error.to_string().contains("is not in the store"), "{error}");
}
