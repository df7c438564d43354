//! `mosfs activate` on this machine: real FUSE mounts below a run folder of the test's own.
//!
//! What needs device-mapper is in tests/vm.rs, what needs systemd in tests/activate_boot/.

#[path = "deploy/device.rs"]
#[allow(dead_code, reason = "the tests of deployments use the rest")]
mod device;
#[path = "common/publish.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod publish;
#[path = "common/swtpm.rs"]
#[allow(dead_code, reason = "the floor's own tests use the rest")]
mod swtpm;
#[path = "common/wait.rs"]
mod wait;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use device::{Device, text};
use mosfs::internals::mount::table::{self, MountRecord};
use mosfs::internals::sys::mountapi;
use publish::Publisher;
use serde_json::Value;
use tempfile::TempDir;
use wait::wait_until;

/// A publisher and a device whose floor is a file; what is mounted goes with it.
struct Fixture {
    publisher: Publisher,
    device: Device,
    _dir: TempDir,
}

impl Fixture {
    /// With version 200: hostfs, `app`, `data` and `web.one`.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let publisher = Publisher::new(dir.path());
        let fixture = Self { publisher, device: Device::with_file_floor(), _dir: dir };
        fixture.publish(
            200,
            &[
                ("app", "container", "app 1"),
                ("data", "fs-only", "data 1"),
                ("web.one", "container", "web 1"),
            ],
        );
        fixture.device.install(&fixture.publisher, 200);
        fixture
    }

    /// Publishes a version of hostfs and these targets: name, service type, content.
    fn publish(&self, version: u64, targets: &[(&str, &str, &str)]) {
        let layer = |content: &str| vec![self.publisher.add_layer(content)];
        let mut all = vec![("hostfs", "hostfs", layer("host"))];
        all.extend(targets.iter().map(|(name, service, content)| (*name, *service, layer(content))));
        self.publisher.publish_targets(version, &all, true);
    }

    /// Brings a published version to the device and makes it current.
    fn update(&self, version: u64) {
        self.device.ok(&["update", &self.publisher.source_of(version)]);
        self.device.ok(&["commit"]);
    }

    fn target(&self, name: &str) -> PathBuf {
        self.device.dir.canonicalize().unwrap().join("run/targets").join(name)
    }

    fn content(&self, name: &str) -> String {
        fs::read_to_string(self.target(name).join("content")).unwrap()
    }

    /// Runs `mosfs activate --json`, which must succeed: what was done, by target.
    fn activate(&self, more: &[&str]) -> BTreeMap<String, String> {
        let arguments = [&["activate", "--json"], more].concat();
        actions(&self.device.ok(&arguments))
    }

    /// The mounts of this device, by target.
    fn mounts(&self) -> BTreeMap<String, MountRecord> {
        let folder = self.target("");
        let records = self.device.dir.join("run/mounts");
        let Ok(list) = fs::read_dir(records) else { return BTreeMap::new() };
        let mounted = table::mounted().unwrap();
        list.map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|ending| ending == "json"))
            .map(|path| serde_json::from_slice(&fs::read(path).unwrap()).unwrap())
            .filter(|record: &MountRecord| mounted.iter().any(|one| one.device == record.device))
            .filter_map(|record| {
                let name = record.target.strip_prefix(&folder).ok()?.to_str()?.to_string();
                Some((name, record))
            })
            .collect()
    }

    fn pid(&self, name: &str) -> u32 {
        self.mounts()[name].daemon.as_ref().unwrap().pid
    }

    /// What the kernel lists below the run folder.
    fn listed(&self) -> Vec<PathBuf> {
        let folder = self.device.dir.canonicalize().unwrap();
        let all = table::mounted().unwrap().into_iter().map(|one| one.target);
        all.filter(|path| path.starts_with(&folder)).collect()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        for path in self.listed().into_iter().rev() {
            let _ = mountapi::unmount(&path, true);
        }
    }
}

/// `action` by target, of an answer in JSON; every outcome must be `done`.
fn actions(answer: &str) -> BTreeMap<String, String> {
    let answer: Value = serde_json::from_str(answer).unwrap();
    let one = |target: &Value| {
        assert_eq!(target["outcome"], "done", "{target}");
        (target["target"].as_str().unwrap().to_string(), target["action"].as_str().unwrap().to_string())
    };
    answer["targets"].as_array().unwrap().iter().map(one).collect()
}

fn expected(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(target, action)| (target.to_string(), action.to_string())).collect()
}

/// A process that is killed when it is dropped.
struct Process(Child);

impl Process {
    /// One that works in this folder.
    fn in_folder(folder: &Path) -> Self {
        let child =
            Command::new("sleep").arg("600").current_dir(folder).stdin(Stdio::null()).spawn().unwrap();
        let cwd = format!("/proc/{}/cwd", child.id());
        // The child changes its folder before it runs sleep, and spawn returns after that.
        assert_eq!(fs::read_link(cwd).unwrap(), folder);
        Self(child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn kill(pid: u32) {
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
    wait_until("the daemon is gone", || mosfs::internals::sys::process::started_at(pid).is_none());
}

const ALL: [&str; 3] = ["app", "data", "web.one"];

#[test]
fn all_targets_but_the_root_are_mounted_and_then_left_alone() {
    let fixture = Fixture::new();
    let done = fixture.activate(&[]);
    assert_eq!(done, expected(&ALL.map(|name| (name, "mount"))));
    assert_eq!(fixture.content("app"), "app 1");
    assert_eq!(fixture.content("web.one"), "web 1");
    assert!(!fixture.target("hostfs").exists());
    let before = fixture.mounts();
    assert_eq!(before.keys().map(String::as_str).collect::<Vec<_>>(), ALL);
    for (name, record) in &before {
        assert_eq!((record.source.as_str(), record.verified), (name.as_str(), true));
    }
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for path in fixture.listed() {
        let line = table.lines().find(|line| line.contains(path.to_str().unwrap())).unwrap();
        assert!(line.contains(" ro,nosuid,nodev,"), "{line}");
    }
    assert_eq!(fixture.activate(&[]), expected(&ALL.map(|name| (name, "keep"))));
    assert_eq!(fixture.mounts(), before, "same devices, same daemons");
}

#[test]
fn only_what_changed_is_remounted() {
    let fixture = Fixture::new();
    fixture.activate(&[]);
    let before = fixture.mounts();
    fixture.publish(
        201,
        &[("app", "container", "app 2"), ("data", "fs-only", "data 1"), ("new", "fs-only", "new 1")],
    );
    fixture.update(201);
    let planned = fixture.device.ok(&["activate", "--dry-run"]);
    for line in
        ["would remount app at ", "would keep data at ", "would mount new at ", "would unmount web.one at "]
    {
        assert!(planned.contains(line), "{planned}");
    }
    assert_eq!(fixture.mounts(), before, "a dry run changes nothing");
    let done = fixture.activate(&[]);
    let all = [("app", "remount"), ("data", "keep"), ("new", "mount"), ("web.one", "unmount")];
    assert_eq!(done, expected(&all));
    let after = fixture.mounts();
    assert_eq!(after["data"], before["data"]);
    assert_eq!(fixture.content("app"), "app 2");
    assert_eq!(fixture.content("new"), "new 1");
    assert!(!fixture.target("web.one").exists());
    assert_eq!(fixture.listed().len(), 3);
}

#[test]
fn what_is_in_use_stays_and_its_users_are_named() {
    let fixture = Fixture::new();
    fixture.activate(&[]);
    fixture.publish(201, &[("app", "container", "app 2"), ("data", "fs-only", "data 2")]);
    fixture.update(201);
    let app = fixture.target("app");
    let holder = Process::in_folder(&app);
    let before = fixture.mounts();
    let who = format!("sleep (pid {}, cwd {})", holder.0.id(), app.display());
    let words = ["target app stays as it was, it is in use by", &who, "hint: stop the processes that use it"];
    fixture.device.refused(&["activate"], 1, &words);
    assert_eq!(fixture.content("app"), "app 1");
    assert_eq!(fixture.mounts()["app"], before["app"]);
    assert_eq!(fixture.content("data"), "data 2", "the others are not held up");
    let output = fixture.device.run(&["activate", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    let users = &answer["targets"][0]["users"]["processes"][0];
    assert_eq!(answer["targets"][0]["outcome"], "busy");
    assert_eq!(
        (users["pid"].as_u64(), users["command"].as_str()),
        (Some(holder.0.id().into()), Some("sleep"))
    );
    assert_eq!(users["path"], app.to_str().unwrap());
    drop(holder);
    assert_eq!(fixture.activate(&[]), expected(&[("app", "remount"), ("data", "keep")]));
    assert_eq!(fixture.content("app"), "app 2");
}

#[test]
fn a_mount_below_a_target_is_named_too() {
    let fixture = Fixture::new();
    fixture.activate(&["data"]);
    fixture.publish(201, &[("data", "fs-only", "data 2")]);
    fixture.update(201);
    let below = fixture.target("data").join("content");
    let file = fixture.device.dir.join("file");
    fs::write(&file, "over it").unwrap();
    assert!(Command::new("mount").arg("--bind").args([&file, &below]).status().unwrap().success());
    let words = format!("in use by the mount at {}", below.display());
    fixture.device.refused(&["activate"], 1, &[&words]);
    mountapi::unmount(&below, false).unwrap();
    assert_eq!(fixture.activate(&[]), expected(&[("data", "remount")]));
}

#[test]
fn a_dead_daemon_is_seen_by_status_and_mended() {
    let fixture = Fixture::new();
    fixture.activate(&[]);
    let before = fixture.mounts();
    // Somebody inside does not keep it from being mended: they can read nothing any more.
    let _inside = Process::in_folder(&fixture.target("app"));
    kill(fixture.pid("app"));
    assert!(fs::read_to_string(fixture.target("app").join("content")).is_err());
    let status = fixture.device.ok(&["status"]);
    let line = format!(
        "{} (fuse): its daemon is gone, nothing can be read: `mosfs activate`",
        fixture.target("app").display()
    );
    assert!(status.contains(&line), "{status}");
    assert!(fixture.device.ok(&["status", "--json"]).contains("daemon-dead"));
    assert_eq!(fixture.activate(&[]), expected(&[("app", "mend"), ("data", "keep"), ("web.one", "keep")]));
    assert_eq!(fixture.content("app"), "app 1");
    assert_eq!(fixture.mounts()["data"], before["data"]);
    assert_eq!(fixture.listed().len(), 3);
    assert!(!fixture.device.ok(&["status"]).contains("daemon is gone"));
}

#[test]
fn umount_dead_takes_only_a_dead_mount() {
    let fixture = Fixture::new();
    fixture.activate(&["app"]);
    let app = fixture.target("app");
    let umount = ["umount", "--dead", app.to_str().unwrap()];
    fixture.device.ok(&umount);
    assert_eq!(fixture.content("app"), "app 1");
    kill(fixture.pid("app"));
    fixture.device.ok(&umount);
    assert_eq!(fixture.listed(), [] as [PathBuf; 0]);
    fixture.device.ok(&umount);
}

#[test]
fn named_targets_alone() {
    let fixture = Fixture::new();
    assert_eq!(fixture.activate(&["data"]), expected(&[("data", "mount")]));
    assert_eq!(fixture.listed(), [fixture.target("data")]);
    fixture.device.refused(&["activate", "nope"], 2, &["has no target `nope`", "app, data, hostfs, web.one"]);
    fixture.device.refused(
        &["activate", "data", "hostfs"],
        2,
        &["target hostfs", "is the root", "mounted at boot"],
    );
    // What the deployment lost goes only where all are meant.
    fixture.publish(201, &[("app", "container", "app 1")]);
    fixture.update(201);
    assert_eq!(fixture.activate(&["app"]), expected(&[("app", "mount")]));
    assert_eq!(fixture.listed().len(), 2);
    assert_eq!(fixture.activate(&[]), expected(&[("app", "keep"), ("data", "unmount")]));
    assert_eq!(fixture.listed(), [fixture.target("app")]);
}

#[test]
fn a_backend_that_is_not_there_is_refused_and_nothing_is_lost() {
    let fixture = Fixture::new();
    fixture.activate(&["--backend", "fuse", "app"]);
    let before = fixture.mounts();
    // This machine has no device-mapper; with one, tests/vm.rs tries the change of backends.
    if mosfs::internals::sys::dm::Control::open().is_err() {
        fixture.device.refused(&["activate", "--backend", "dm-verity", "app"], 1, &["target app: "]);
        assert_eq!(fixture.mounts(), before);
    }
    assert_eq!(fixture.activate(&["--backend", "fuse", "app"]), expected(&[("app", "keep")]));
}

/// Changes one byte of the only file of this name in the deployment of a version.
fn spoil(fixture: &Fixture, version: u64, name: &str) {
    let deployments = fixture.device.system().join("deployments");
    let folder = fs::read_dir(deployments).unwrap().map(|entry| entry.unwrap().path());
    let prefix = format!("{version}-");
    let folder =
        folder.into_iter().find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&prefix));
    let path = folder.unwrap().join(name);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_deployment_that_does_not_verify_is_not_activated() {
    for file in ["manifest.json", "manifest.sig", "cert.pem"] {
        let fixture = Fixture::new();
        fixture.activate(&["data"]);
        let before = fixture.mounts();
        spoil(&fixture, 200, file);
        fixture.device.refused(&["activate"], 3, &[]);
        assert_eq!(fixture.mounts(), before, "{file}: nothing is mounted, nothing is lost");
    }
}

#[test]
fn an_image_that_does_not_verify_leaves_the_old_one_in_place() {
    let fixture = Fixture::new();
    fixture.activate(&[]);
    fixture.publish(
        201,
        &[("app", "container", "app 2"), ("data", "fs-only", "data 2"), ("web.one", "container", "web 2")],
    );
    fixture.update(201);
    let store = fixture.publisher.store();
    let manifest = fixture.device.ok(&["manifest", "show", &fixture.publisher.source_of(201)]);
    let image = store
        .names()
        .unwrap()
        .into_iter()
        .find(|(name, one)| name.starts_with("mos/images/app:") && manifest.contains(&one.digest.hex()))
        .unwrap()
        .1
        .digest;
    let layer = store.image(&image).unwrap().layers[0].digest;
    let blob = fixture.device.system().join("store/blobs/sha256").join(layer.hex());
    let mut bytes = fs::read(&blob).unwrap();
    bytes[200] ^= 1;
    fs::write(&blob, bytes).unwrap();
    let said = fixture.device.refused(&["activate"], 3, &["target app: ", "verity"]);
    assert!(!said.contains("target data"), "{said}");
    assert_eq!(fixture.content("app"), "app 1", "the old one is still there");
    assert_eq!(fixture.content("data"), "data 2");
    assert_eq!(fixture.content("web.one"), "web 2");
    fs::remove_file(&blob).unwrap();
    fixture.device.refused(&["activate"], 1, &["target app: "]);
    assert_eq!(fixture.content("app"), "app 1");
}

#[test]
fn a_disk_that_was_put_back_is_below_the_floor() {
    let fixture = Fixture::new();
    let old = fixture.device.dir.join("old");
    fixture.device.copy_disk(&old);
    fixture.publish(201, &[("app", "container", "app 2")]);
    fixture.update(201);
    let floor = fs::read(fixture.device.system().join("floor")).unwrap();
    fixture.device.restore_disk(&old);
    // The development floor lies on the same disk; a TPM is not put back with it.
    fs::write(fixture.device.system().join("floor"), floor).unwrap();
    fixture.device.refused(&["activate"], 4, &["version 200 is below the floor", "version 201 and up"]);
    assert_eq!(fixture.listed(), [] as [PathBuf; 0]);
}

#[test]
fn a_device_with_a_floor_key_asks_the_tpm() {
    let fixture = Fixture::new();
    let key = fs::read(fixture.publisher.key("floor.pub")).unwrap();
    fs::write(fixture.device.config().join("floor.pub"), key).unwrap();
    let mut command = fixture.device.command(&["status"]);
    command = {
        let mut plain = Command::new(command.get_program());
        plain.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        plain
    };
    let output = command.args(["activate", "--tpm", "device:/dev/no-such-tpm"]).output().unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    assert_eq!(fixture.listed(), [] as [PathBuf; 0]);
}

#[test]
fn the_deployment_that_was_booted_is_what_runs() {
    let fixture = Fixture::new();
    let state = fixture.device.state();
    let id = state.current.unwrap();
    let run = fixture.device.dir.join("run");
    fs::create_dir_all(&run).unwrap();
    let record = format!(r#"{{"deployment":"{id}","backend":"fuse","phases_ms":[]}}"#);
    fixture.publish(201, &[("app", "container", "app 2")]);
    fixture.device.ok(&["update", &fixture.publisher.source_of(201)]);
    // Blessed, and cut off before the floor rose: 200 is still there to fall back to.
    let mut cut = fixture.device.command(&["commit"]);
    assert!(!cut.env("MOSFS_FAILPOINT", "commit.state.blessed").status().unwrap().success());
    assert_eq!(fixture.device.state().current.unwrap().version, 201);
    fs::write(run.join("boot.json"), &record).unwrap();
    fixture.activate(&["app"]);
    assert_eq!(fixture.content("app"), "app 1");
    // It is believed in nothing else: another digest has no deployment that verifies.
    let other = record.replace(&id.digest.hex()[..4], "0000");
    fs::write(run.join("boot.json"), other).unwrap();
    fixture.device.refused(&["activate"], 1, &["200-0000"]);
    assert_eq!(fixture.content("app"), "app 1");
}

#[test]
fn somebody_elses_mount_is_left_alone() {
    let fixture = Fixture::new();
    let place = fixture.device.dir.join("run/targets/app");
    fs::create_dir_all(&place).unwrap();
    assert!(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&place).status().unwrap().success());
    fs::write(place.join("mine"), "x").unwrap();
    fixture.device.refused(&["activate"], 1, &["target app: nothing is mounted at", "type tmpfs"]);
    assert!(place.join("mine").exists());
    assert_eq!(fixture.content("data"), "data 1");
}

/// Crashes an activation at this point, then wants the next one to bring everything about.
fn crash(fixture: &Fixture, point: &str) {
    let output = fixture.device.command(&["activate"]).env("MOSFS_FAILPOINT", point).output().unwrap();
    assert_eq!(output.status.signal(), Some(libc::SIGKILL), "{point}: {}", text(&output.stderr));
    fixture.activate(&[]);
}

#[test]
fn after_a_crash_at_any_step_the_next_activation_mends_all() {
    for number in [1, 2] {
        for point in ["plan.made", "mount.prepared", "place.cleared", "place.made", "mount.attached"]
            .map(|name| format!("activate.{name}"))
        {
            if point == "activate.plan.made" && number > 1 {
                continue;
            }
            mends_after(&format!("{point}:{number}"));
        }
        // The mount is made and attached nowhere; its daemon serves it at its place.
        for point in ["fuse.tree.made", "fuse.tree.attached"] {
            mends_after(&format!("{point}:{number}"));
        }
    }
}

fn mends_after(point: &str) {
    let fixture = Fixture::new();
    crash(&fixture, point);
    for (name, content) in [("app", "app 1"), ("data", "data 1"), ("web.one", "web 1")] {
        assert_eq!(fixture.content(name), content, "{point}");
    }
    assert_eq!(fixture.listed().len(), 3, "{point}");
    assert_eq!(fixture.mounts().len(), 3, "{point}");
    // The same while mounts are replaced, and one goes.
    fixture.publish(201, &[("app", "container", "app 2"), ("data", "fs-only", "data 2")]);
    fixture.update(201);
    crash(&fixture, point);
    for (name, content) in [("app", "app 2"), ("data", "data 2")] {
        assert_eq!(fixture.content(name), content, "{point}");
    }
    assert_eq!(fixture.listed().len(), 2, "{point}");
    assert_eq!(fixture.activate(&[]), expected(&[("app", "keep"), ("data", "keep")]), "{point}");
}

#[test]
fn two_at_once_do_it_once() {
    let fixture = Fixture::new();
    let commands: Vec<_> = (0..4)
        .map(|_| fixture.device.command(&["activate", "--json"]).stdout(Stdio::piped()).spawn().unwrap())
        .collect();
    let mut mounted = 0;
    for command in commands {
        let output = command.wait_with_output().unwrap();
        assert!(output.status.success());
        mounted += actions(&text(&output.stdout)).values().filter(|action| *action == "mount").count();
    }
    assert_eq!(mounted, 3);
    assert_eq!(fixture.listed().len(), 3);
}

#[test]
fn a_unit_that_cannot_be_had_is_said() {
    let fixture = Fixture::new();
    if !Path::new("/run/systemd/system").exists() {
        let words = ["no unit of systemd", "systemd does not run this machine"];
        fixture.device.refused(&["activate", "--daemon", "unit"], 2, &words);
    }
    fixture.device.ok(&["activate", "--daemon", "fork"]);
}
