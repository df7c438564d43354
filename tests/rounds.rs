//! Many restarts of a container and activations of two versions in turn: what is left afterwards, on this machine, with
//! the real crun, `ip` and `nft`. `MOSFS_CAMPAIGN=long` makes it 500 and 100 (`make campaign`).

#[path = "common/container.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod container;
#[path = "common/networks.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod networks;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use container::World;
use networks::{Networks, Running, output, wait_until};

/// The number of rounds.
fn rounds(short: usize, long: usize) -> usize {
    if std::env::var("MOSFS_CAMPAIGN").is_ok_and(|length| length == "long") { long } else { short }
}

/// All paths below a folder, but for the numbers of processes in them.
fn paths(folder: &Path, into: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        into.push(entry.path().display().to_string());
        // What is mounted is counted as a mount.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !entry.path().ends_with("targets") {
            paths(&entry.path(), into);
        }
    }
}

/// The processes that were started with a path of this world: how many, and their memory in bytes, without that of files.
fn processes(word: &str) -> (usize, u64) {
    let mut all = (0, 0);
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        // What mosfs has started, daemons too, has its folders in the environment.
        if !["cmdline", "environ"].iter().any(|name| String::from_utf8_lossy(&read(name)).contains(word)) {
            continue;
        }
        let status = String::from_utf8_lossy(&read("status")).into_owned();
        let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = anonymous.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
        all = (all.0 + 1, all.1 + kib.unwrap_or(0) * 1024);
    }
    all
}

/// All that a container or a mount of a target could leave.
fn left(networks: &Networks, world: &World) -> BTreeMap<&'static str, Vec<String>> {
    let own = world.dir("");
    let lines = |text: String| text.lines().map(str::to_string).collect::<Vec<_>>();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mounts = mounts.lines().filter(|line| line.contains(&own)).filter_map(|line| line.split(' ').nth(4));
    let mut files = Vec::new();
    paths(&world.path("run"), &mut files);
    // Records of mounts are named by their devices, whose numbers the kernel gives to all mounts of the machine.
    let records = world.dir("run/mounts/");
    for file in &mut files {
        if let Some(name) = file.strip_prefix(&records) {
            *file = format!("{records}{}", name.replace(|c: char| c.is_ascii_digit(), ""));
        }
    }
    files.sort();
    let loops = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let backing = loops.filter_map(|entry| fs::read_to_string(entry.path().join("loop/backing_file")).ok());
    BTreeMap::from([
        ("mounts", mounts.map(str::to_string).collect()),
        ("interfaces", lines(networks.on_host("ls /sys/class/net"))),
        ("rules", lines(networks.on_host("nft list ruleset"))),
        ("files", files),
        ("loops", backing.filter(|path| path.contains(&own)).collect()),
        ("processes", vec![processes(&own).0.to_string()]),
    ])
}

#[test]
fn restarts_and_activations_leave_nothing_and_the_memory_of_daemons_is_flat() {
    let mut world = World::new();
    for (image, word) in [("first", "one"), ("second", "two")] {
        world.script(
            image,
            &format!("echo {word} >/data/word; trap 'exit 0' TERM; while :; do sleep 0.1; done"),
        );
    }
    let fields = "network: {type: simple, ports: [{host: 80, container: 8080}]}, \
                  mounts: [{destination: /data, type: volume, source: data}]";
    let files = ("files", "first", "service_type: fs-only");
    world.install(&[("web", "first", fields), files]);
    let import = world.manifest(2, &[("web", "second", fields), files]);
    let (store, key, cert) = (world.dir("store"), world.dir("keys/signer.key"), world.dir("keys/signer.pem"));
    world.ok(&["build", &import, "--store", &store, "--key", &key, "--cert", &cert]);
    world.ok(&["update", &format!("oci:{store}"), "--floor", "file"]);
    let deployments: Vec<String> = ["1-", "2-"]
        .map(|version| {
            let all = fs::read_dir(world.path("system/deployments")).unwrap();
            let mut names = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            names.find(|name| name.starts_with(version)).unwrap()
        })
        .to_vec();
    let networks = Networks::new();
    let clean = || _ = output(&mut networks.mosfs(&world, &["run-target", "--clean", "web"]));
    let links = || networks.on_host("ls /sys/class/net | grep -c ^mosfs- || true");
    // As after a reboot into that version, without one.
    let activate = |version: usize| {
        let record =
            serde_json::json!({ "deployment": deployments[version], "backend": "fuse", "phases_ms": [] });
        fs::write(world.path("run/boot.json"), record.to_string()).unwrap();
        world.ok(&["activate", "--floor", "file", "--backend", "fuse", "--daemon", "fork"]);
    };
    let word = world.path("system/volumes/data/word");
    let run_once = |number: usize| {
        let _ = fs::remove_file(&word);
        let mut web = Running::start(&networks, &world, "web");
        wait_until("its program", || fs::read(&word).is_ok_and(|text| text.ends_with(b"\n")));
        if number.is_multiple_of(2) {
            // In order: until its program has set its trap, it ignores the signal.
            while web.child.try_wait().unwrap().is_none() {
                let pid = web.child.id().to_string();
                assert!(std::process::Command::new("kill").arg(pid).status().unwrap().success());
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        // Or killed, with all that it has started.
        drop(web);
        clean();
        wait_until("the end of the container's link", || links() == "0\n");
    };
    let word = || fs::read_to_string(&word).unwrap();
    // The first rounds fill caches, and make what stays.
    activate(1);
    run_once(0);
    assert_eq!(word(), "two\n");
    activate(0);
    run_once(1);
    run_once(0);
    assert_eq!(word(), "one\n");
    let before = left(&networks, &world);
    // Each of the two targets has a daemon, and nothing else of this test runs.
    assert_eq!(before["processes"], ["2"]);
    assert_eq!(before["mounts"].len(), 2, "{before:?}");
    let memory = processes(&world.dir("")).1;
    for number in 0..rounds(6, 500) {
        run_once(number);
    }
    for number in 0..rounds(4, 100) {
        let version = (number + 1) % 2;
        // One that runs keeps the image that it was started from, and its daemon.
        let old = number.is_multiple_of(4).then(|| Running::start(&networks, &world, "web"));
        activate(version);
        if old.is_some() {
            drop(old);
            clean();
        }
        if number % 10 < 2 {
            run_once(number);
            assert_eq!(word(), ["one\n", "two\n"][version]);
        }
    }
    wait_until("the same as before", || left(&networks, &world) == before);
    assert_eq!(left(&networks, &world), before);
    let after = processes(&world.dir("")).1;
    println!("memory of daemons: {memory} bytes before, {after} after");
    assert!(after <= memory + (8 << 20), "the memory of daemons grew from {memory} to {after} bytes");
}
