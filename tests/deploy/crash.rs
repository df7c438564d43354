//! A power cut anywhere leaves a system in which boot choice finds a good deployment, and running
//! the command again finishes the job.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use crate::device::Device;
use crate::publish::Publisher;

/// Every commit point of install, update and commit, and how often it may be passed.
const FAILPOINTS: &[(&str, u64)] = &[
    ("store.blob.written", 8),
    ("store.blob.synced", 8),
    ("store.blob.renamed", 8),
    ("store.index.written", 3),
    ("store.index.renamed", 3),
    ("store.blob.fetched", 3),
    ("deploy.blobs.fetched", 1),
    ("deploy.names.set", 1),
    ("deploy.folder.written", 1),
    ("deploy.folder.renamed", 1),
    ("deploy.state.written", 1),
    ("deploy.state.renamed", 1),
    ("commit.state.blessed", 1),
    ("commit.floor.raised", 1),
    ("deploy.previous.dropped", 1),
    ("deploy.folder.removing", 1),
    ("deploy.gc.folders", 1),
    ("store.gc.names", 1),
    ("store.gc.blob", 2),
];

struct World {
    _dir: tempfile::TempDir,
    publisher: Publisher,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let publisher = Publisher::new(dir.path());
        publisher.publish(200, "the first");
        publisher.publish(201, "the second");
        Self { _dir: dir, publisher }
    }

    fn install_args(&self) -> Vec<String> {
        let ca = self.publisher.key("ca.pem");
        ["install", &self.publisher.source_of(200), "--ca", ca.to_str().unwrap()]
            .into_iter()
            .chain(["--product", crate::publish::PRODUCT])
            .map(String::from)
            .collect()
    }

    fn update_args(&self) -> Vec<String> {
        vec!["update".into(), self.publisher.source_of(201)]
    }
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// After a crash of `install`: nothing is installed, or all of it; and again finishes it.
fn check_install(world: &World, device: &Device, what: &str) {
    if device.system().join("state.json").exists() && device.state().current.is_some() {
        assert_eq!(device.boot().0, 200, "{what}");
    }
    device.ok(&strs(&world.install_args()));
    assert_eq!(device.boot().0, 200, "{what}");
}

/// After a crash of `update`: the old one boots, or the new one as pending; again finishes it.
fn check_update(world: &World, device: &Device, what: &str) {
    let (version, _) = device.boot();
    assert!(version == 200 || version == 201, "{what}: {version}");
    // Whatever was cut off, the deployment that ran is there to fall back to.
    let fallback = device.boot_if(|version| version == 200).unwrap();
    assert_eq!(fallback.deployment.version, 200, "{what}");
    device.ok(&strs(&world.update_args()));
    // Not booted again: each boot above may have spent a try. But `commit` comes after a boot.
    let pending = device.state().pending.expect("an update is pending");
    assert_eq!(pending.deployment.version, 201, "{what}");
    assert!(pending.tries_left > 0, "{what}");
    device.record_boot(pending.deployment);
}

/// After a crash of `commit`: 201 boots; again finishes it.
fn check_commit(device: &Device, what: &str) {
    assert_eq!(device.boot().0, 201, "{what}");
    device.ok(&["commit"]);
    let status: serde_json::Value = serde_json::from_str(&device.ok(&["status", "--json"])).unwrap();
    assert_eq!(status["current"]["version"], 201, "{what}");
    assert_eq!(status["floor"]["version"], 201, "{what}");
}

#[test]
fn a_crash_at_each_commit_point_leaves_a_system_that_boots_and_can_go_on() {
    let world = World::new();
    let mut died = std::collections::BTreeSet::new();
    for (point, times) in FAILPOINTS {
        for time in 1..=*times {
            let what = format!("{point}:{time}");
            let mut die = |device: &Device, args: &[String]| {
                let output =
                    device.command(&strs(args)).env("MOSFS_FAILPOINT", &what).output().expect("mosfs runs");
                // SIGKILL: no exit code.
                if output.status.code().is_none() {
                    died.insert(*point);
                }
            };
            let device = Device::with_file_floor();
            die(&device, &world.install_args());
            check_install(&world, &device, &format!("install at {what}"));
            die(&device, &world.update_args());
            check_update(&world, &device, &format!("update at {what}"));
            die(&device, &["commit".into()]);
            check_commit(&device, &format!("commit at {what}"));
        }
    }
    let all: std::collections::BTreeSet<_> = FAILPOINTS.iter().map(|(point, _)| *point).collect();
    assert_eq!(died, all, "each failpoint stands where something passes");
}

#[test]
fn a_kill_at_a_random_time_leaves_a_system_that_boots_and_can_go_on() {
    let world = World::new();
    let runs = if std::env::var_os("MOSFS_CAMPAIGN").is_some() { 1200 } else { 120 };
    // A fixed sequence of parts of a time, so that a failure can be looked at again: a linear congruential generator
    // (Knuth, MMIX).
    let mut seed = 20_261_123_u64;
    let mut part = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 11) as f64 / (1_u64 << 53) as f64
    };
    // How long each command may run at most. It follows the time that the command takes on this machine, so that on
    // a fast one and on a busy one most of them are killed, and at any moment.
    let mut limits = BTreeMap::<String, Duration>::new();
    let mut killed = 0;
    for run in 0..runs / 4 {
        let device = Device::with_file_floor();
        let mut kill = |args: &[String]| {
            let limit = limits.entry(args[0].clone()).or_insert(Duration::from_millis(60));
            let delay = limit.mul_f64(part());
            let mut child =
                device.command(&strs(args)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            std::thread::sleep(delay);
            let _ = child.kill();
            let was_killed = child.wait().unwrap().code().is_none();
            *limit = if was_killed { *limit * 5 / 4 } else { delay.max(Duration::from_millis(1)) };
            killed += u32::from(was_killed);
        };
        kill(&world.install_args());
        check_install(&world, &device, &format!("install, run {run}"));
        kill(&world.update_args());
        check_update(&world, &device, &format!("update, run {run}"));
        kill(&["commit".into()]);
        check_commit(&device, &format!("commit, run {run}"));
        kill(&["gc".into()]);
        device.ok(&["verify"]);
        device.ok(&["gc"]);
        check_commit(&device, &format!("gc, run {run}"));
    }
    assert!(killed > runs / 10, "only {killed} of {runs} commands were cut off");
}
