//! A disk that is full, and commands that run at once.

use std::path::Path;
use std::process::Command;

use crate::device::{Device, text};
use crate::publish::Publisher;

/// A small file system at the device's system folder, unmounted on drop.
pub struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    /// Mounts it.
    pub fn mount(device: &Device, megabytes: u64) -> Self {
        let at = device.system();
        std::fs::create_dir_all(&at).unwrap();
        tool("mount", &["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "tmpfs"], &at);
        Self(at)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        tool("umount", &[], &self.0);
    }
}

fn tool(name: &str, args: &[&str], path: &Path) {
    let done = Command::new(name)
        .args(args)
        .arg(path)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {name}: {error}; install the Debian package `mount`"));
    assert!(done.status.success(), "{name}: {} (this test must run as root)", text(&done.stderr));
}

/// Text that does not compress.
pub fn noise(bytes: usize, mut seed: u64) -> String {
    let mut text = String::with_capacity(bytes);
    while text.len() < bytes {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.push(char::from(33 + (seed >> 57) as u8 % 90));
    }
    text
}

#[test]
fn too_little_space_is_found_before_anything_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    publisher.publish(200, "small");
    publisher.publish(201, &noise(12 << 20, 1));
    let device = Device::with_file_floor();
    let _disk = SmallDisk::mount(&device, 8);
    device.install(&publisher, 200);
    let before = device.snapshot();
    device.refused(&["update", &publisher.source_of(201)], 1, &["needs", "bytes", "are free"]);
    let rest = |files: Vec<(std::path::PathBuf, Vec<u8>)>| {
        files.into_iter().filter(|(path, _)| !path.ends_with("state.json")).collect::<Vec<_>>()
    };
    assert_eq!(rest(device.snapshot()), rest(before));
    assert_eq!(device.boot().0, 200);
    let status = device.ok(&["status"]);
    assert!(status.contains("last update failed"), "{status}");
}

#[test]
fn two_updates_at_once_are_as_if_one_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    publisher.publish(200, "first");
    publisher.publish(201, "second");
    publisher.publish(202, "third");
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    let both: Vec<_> = [201, 202]
        .map(|version| device.command(&["update", &publisher.source_of(version)]).spawn().unwrap())
        .into();
    for mut one in both {
        assert!(one.wait().unwrap().success());
    }
    // Either order is right; each leaves a whole deployment that boots.
    let (version, _) = device.boot();
    assert!([201, 202].contains(&version));
    device.ok(&["commit"]);
    assert_eq!(device.state().current.unwrap().version, version);
}

#[test]
fn a_write_that_fails_leaves_the_running_deployment_and_gives_the_space_back() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    publisher.publish(200, "small");
    publisher.publish(201, &noise(2 << 20, 2));
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    let rest = |files: Vec<(std::path::PathBuf, Vec<u8>)>| {
        files.into_iter().filter(|(path, _)| !path.ends_with("state.json")).collect::<Vec<_>>()
    };
    let before = rest(device.snapshot());
    // No file may grow beyond 256 KiB (units of 512 bytes), and the signal that says so is ignored.
    let update = device.command(&["update", &publisher.source_of(201)]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 512; exec \"$@\"", "sh"]).arg(update.get_program());
    limited.args(update.get_args());
    for (name, value) in update.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    let output = limited.output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot write") && said.contains("File too large"), "{said}");
    assert_eq!(rest(device.snapshot()), before);
    assert_eq!(device.boot().0, 200);
    // With room, the same command finishes.
    device.ok(&["update", &publisher.source_of(201)]);
    assert_eq!(device.boot().0, 201);
}

#[test]
fn gc_keeps_current_pending_and_previous_and_a_crash_of_it_can_be_run_again() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    let device = Device::with_file_floor();
    for version in 200..=203 {
        publisher.publish(version, &format!("content of {version}"));
    }
    device.install(&publisher, 200);
    device.ok(&["update", &publisher.source_of(201)]);
    // Blessed, and cut off before the floor rose: 200 may still be booted.
    let cut = device.command(&["commit"]).env("MOSFS_FAILPOINT", "commit.state.blessed").output().unwrap();
    assert!(!cut.status.success());
    device.ok(&["update", &publisher.source_of(202)]);
    assert_eq!(device.versions(), [200, 201, 202]);
    let state = device.state();
    let version = |id: Option<mosfs::internals::deploy::DeploymentId>| id.map(|id| id.version);
    assert_eq!((version(state.previous), version(state.current)), (Some(200), Some(201)));
    // An update that was cut off before the state named its deployment.
    let cut = device.command(&["update", &publisher.source_of(203)]);
    let cut = { cut }.env("MOSFS_FAILPOINT", "deploy.folder.renamed").output().unwrap();
    assert!(!cut.status.success());
    assert_eq!(device.versions(), [200, 201, 202, 203]);
    let before = device.snapshot();
    let said = device.ok(&["gc", "--dry-run"]);
    assert!(said.contains("would remove deployment 203-"), "{said}");
    assert_eq!(device.snapshot(), before);
    for point in ["deploy.folder.removing", "deploy.gc.folders", "store.gc.names", "store.gc.blob"] {
        let cut = device.command(&["gc"]).env("MOSFS_FAILPOINT", point).output().unwrap();
        assert!(!cut.status.success(), "{point}");
        device.ok(&["verify"]);
        assert_eq!(device.state(), state, "{point}");
    }
    device.ok(&["gc"]);
    assert_eq!(device.versions(), [200, 201, 202]);
    device.ok(&["verify"]);
    let said = device.ok(&["gc"]);
    assert!(said.contains("removed 0 blobs"), "{said}");
    assert_eq!(device.boot().0, 202);
}

#[test]
fn a_disk_with_any_amount_of_room_is_updated_or_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    publisher.publish(200, "small");
    publisher.publish(201, &noise(1 << 20, 3));
    let (mut refused, mut done) = (0, 0);
    for free_kib in (0..3072).step_by(256) {
        let device = Device::with_file_floor();
        let _disk = SmallDisk::mount(&device, 8);
        device.install(&publisher, 200);
        let ballast = device.system().join("ballast");
        let room = mosfs::internals::sys::file::available_bytes(&device.system()).unwrap();
        let fill = room.saturating_sub(free_kib * 1024);
        std::fs::write(&ballast, vec![1; usize::try_from(fill).unwrap()]).unwrap();
        let output = device.run(&["update", &publisher.source_of(201)]);
        if output.status.success() {
            done += 1;
        } else {
            refused += 1;
            assert_eq!(output.status.code(), Some(1), "{free_kib} KiB: {}", text(&output.stderr));
            assert_eq!(device.state().current.unwrap().version, 200);
            device.ok(&["verify"]);
            std::fs::remove_file(&ballast).unwrap();
            device.ok(&["update", &publisher.source_of(201)]);
        }
        assert_eq!(device.boot().0, 201, "{free_kib} KiB");
    }
    assert!(refused > 0 && done > 0, "{refused} refused, {done} done: the amounts do not reach both");
}
