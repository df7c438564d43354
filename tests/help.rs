//! The examples at the end of each command's help work: each is run as it stands, in the order in which a publisher and a
//! device come to it.

// Each test file uses a part of the helpers.
#[allow(dead_code)]
#[path = "registry/debian.rs"]
mod debian;
#[allow(dead_code)]
#[path = "kernel/fixture.rs"]
mod fixture;
#[allow(dead_code)]
#[path = "common/swtpm.rs"]
mod swtpm;
#[path = "common/tools.rs"]
mod tools;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use debian::{Config, Debian};
use fixture::Publisher;
use swtpm::Swtpm;

const FULL: &str = env!("CARGO_BIN_EXE_mosfs-full");
const START: &str = env!("CARGO_BIN_EXE_mosfs");

/// The commands with examples, in the order in which they are run.
const ORDER: &[&str] = &[
    "keys generate",
    "manifest check",
    "build",
    "manifest show",
    "manifest canonical",
    "manifest sign",
    "manifest verify",
    "iso",
    "push",
    "pull",
    "floor sign",
    "floor authorize",
    "floor provision",
    "floor show",
    "floor sign-provision",
    "install",
    "update",
    "setup",
    "status",
    "store stats",
    "mount",
    "umount",
    "trace",
    "boot",
    "commit",
    "activate",
    "run-target",
    "ps",
    "exec",
    "logs",
    "verify",
    "repair",
    "gc",
];

fn help(words: &[&str]) -> String {
    let output = Command::new(FULL).args(words).arg("--help").output().unwrap();
    assert!(output.status.success(), "{words:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The command lines at the end of a command's help. A line that goes on is indented like the others and does not
/// begin with `mosfs`.
fn examples(command: &str) -> Vec<String> {
    let words: Vec<&str> = command.split(' ').collect();
    let text = help(&words);
    let mut lines: Vec<String> = Vec::new();
    let after = text.lines().skip_while(|line| !matches!(*line, "Example:" | "Examples:")).skip(1);
    for line in after.map(str::trim).filter(|line| !line.is_empty()) {
        match lines.last_mut() {
            Some(last) if !line.starts_with("mosfs ") => {
                last.push(' ');
                last.push_str(line);
            }
            _ => lines.push(line.to_string()),
        }
    }
    assert!(!lines.is_empty() && lines.len() <= 2, "{command}: one or two examples, found {lines:?}");
    lines
}

/// What a command does is a request, as in `Show …`; never `Shows …`.
#[test]
fn each_command_is_described_in_the_imperative() {
    let entries = |text: &str| -> Vec<String> {
        let entry = |line: &str| {
            let (name, about) = line.strip_prefix("  ")?.split_once("  ")?;
            let about = about.trim_start();
            (!name.is_empty() && !name.starts_with([' ', '-']) && !about.is_empty())
                .then(|| format!("{name}: {about}"))
        };
        text.lines().take_while(|line| !line.contains("--")).filter_map(entry).collect()
    };
    let mut all = entries(&help(&[]));
    for name in ["keys", "manifest", "floor", "store"] {
        all.extend(entries(&help(&[name])));
    }
    assert!(all.len() >= listed().len(), "{all:?}");
    // `mosfs boot` says first where it runs.
    for entry in all {
        let text = entry.split_once(": ").unwrap().1;
        let text = text.strip_prefix("From the initramfs: ").unwrap_or(text);
        let verb = text.split(' ').next().unwrap().trim_end_matches(',');
        assert!(!verb.ends_with('s') && verb != "The" && verb != "A", "{entry}");
    }
}

/// The commands that the help lists, with those below them.
fn listed() -> BTreeSet<String> {
    let commands = |text: &str| -> Vec<String> {
        let entry = |line: &str| {
            let rest = line.strip_prefix("  ")?;
            let name = rest.split(' ').next()?;
            let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '-');
            (plain && !name.starts_with('-')).then(|| name.to_string())
        };
        text.lines().take_while(|line| !line.ends_with("ptions:")).filter_map(entry).collect()
    };
    let mut all = BTreeSet::new();
    for name in commands(&help(&[])) {
        let below: Vec<String> = match help(&[&name]).split_once("Commands:\n") {
            Some((_, below)) => commands(below).into_iter().filter(|one| one != "help").collect(),
            None => Vec::new(),
        };
        if below.is_empty() {
            all.insert(name);
        } else {
            all.extend(below.iter().map(|one| format!("{name} {one}")));
        }
    }
    all
}

struct World<'a> {
    dir: &'a Path,
    path: String,
    tpm: String,
    registry: u16,
}

impl World<'_> {
    fn shell(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    fn command(&self, line: &str) -> Command {
        let line = line.replace("127.0.0.1:5000", &format!("127.0.0.1:{}", self.registry));
        let mut command = Command::new("sh");
        command
            .args(["-c", &line])
            .current_dir(self.dir)
            .env("PATH", &self.path)
            .env("MOSFS_SYSTEM", self.dir.join("system"))
            .env("MOSFS_CONFIG", self.dir.join("config"))
            .env("MOSFS_RUN", self.dir.join("run"))
            .env("MOSFS_TPM", &self.tpm);
        command
    }

    /// A container of target web that stays, once it runs: the runtime's process.
    fn running(&self) -> std::process::Child {
        let line = format!("exec {UNIFIED} mosfs run-target web");
        let child = self.command(&line).spawn().unwrap();
        self.ok(&format!("MAINPID={} {UNIFIED} mosfs run-target --wait-healthy web", child.id()));
        child
    }

    fn ok(&self, line: &str) -> String {
        let output = self.shell(line);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{line}\nexit {:?}: {said}", output.status.code());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// Unmounts what a failed test leaves below its folder, deepest first.
struct Mounts<'a>(&'a Path);

impl Drop for Mounts<'_> {
    fn drop(&mut self) {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let below = table
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|at| Path::new(at).starts_with(self.0));
        for at in below.collect::<Vec<_>>().into_iter().rev() {
            let _ = Command::new("umount").args(["--lazy", at]).status();
        }
    }
}

#[test]
fn every_command_is_in_the_order_below() {
    let order: BTreeSet<String> = ORDER.iter().map(|command| command.to_string()).collect();
    assert_eq!(listed(), order);
}

#[test]
fn the_examples_work() {
    let dir = tempfile::tempdir().unwrap();
    let _mounts = Mounts(dir.path());
    let bin = dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    symlink(START, bin.join("mosfs")).unwrap();
    symlink(FULL, bin.join("mosfs-full")).unwrap();
    let (tpm, registry) = (Swtpm::start(), Debian::start(&Config::default()));
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let world = World { dir: dir.path(), path, tpm: tpm.tcti().to_string(), registry: registry.port };
    // What the examples name: an image, an import manifest, a mount point, a nonce, a command line.
    world.ok(
        "mkdir -p mnt root/etc root/sbin sysroot && echo hello > root/etc/motd && echo init > root/sbin/init",
    );
    world.ok("umoci init --layout images && umoci new --image images:debian");
    world.ok("umoci insert --image images:debian root / 2>/dev/null");
    // A container that runs while other examples enter it, and then ends.
    world.ok(
        "mkdir -p web/bin web/etc web/tmp && cp /bin/busybox web/bin/busybox && ln -s busybox web/bin/sh",
    );
    world.ok("for name in ls id sleep; do ln -s busybox web/bin/$name; done");
    world.ok("echo app:x:1000:1000::/:/bin/sh > web/etc/passwd");
    world.ok("umoci new --image images:web && umoci insert --image images:web web / 2>/dev/null");
    world.ok("umoci config --image images:web --config.cmd /bin/sh --config.cmd -c \
         --config.cmd 'trap \"exit 0\" TERM; while :; do sleep 0.1; done'");
    fs::write(
        dir.path().join("import.yaml"),
        "version: 200\nproduct: de6c82c5-2e01-4c92-949b-a6545d30fc06\ntargets:\n  \
         hostfs: {url: 'oci:images:debian', version: 1.0.0, service_type: hostfs, network: {type: host}}\n  \
         web: {url: 'oci:images:web', version: 1.0.0, service_type: container, network: {type: none}}\n",
    )
    .unwrap();
    world.ok("head -c 32 /dev/urandom > nonce && head -c 4 /dev/zero >> nonce");
    world.ok("echo 'root=mosfs mosfs.backend=fuse mosfs.overlay=ro' > cmdline");
    // A system with a kernel of its own, for a medium.
    let kernels = Publisher::new();
    kernels.put("usr/sbin/mke2fs", fs::read("/bin/true").unwrap());
    kernels.image();
    kernels.build(200, "store", &[]);
    let disk = Loop(world.ok("truncate -s 640M disk && losetup --find --show --partscan disk"));
    for command in ORDER {
        if *command == "mount" {
            // An image that can be mounted as it is: with verity data.
            let list = world.ok("skopeo inspect oci:store >/dev/null 2>&1; cat store/index.json");
            let name = list.split('"').find(|text| text.starts_with("mos/images/hostfs:")).unwrap();
            world.ok(&format!("skopeo copy --quiet 'oci:store:{name}' oci:images:tools"));
        }
        // A container that sleeps, to enter.
        let mut running = (*command == "exec").then(|| world.running());
        for example in examples(command) {
            assert!(example.starts_with(&format!("mosfs {command}")), "{example}");
            let said = if example == "mosfs run-target web" {
                // It stays until it is stopped.
                stop(&mut world.running());
                String::new()
            } else if ["run-target", "exec"].contains(command) {
                world.ok(&format!("{UNIFIED} {example}"))
            } else if *command == "iso" {
                world.ok(&format!("cd {} && {example}", kernels.dir().display()))
            } else {
                world.ok(&example.replace("/dev/sdb", disk.0.trim()))
            };
            if example.starts_with("mosfs mount ") {
                assert_eq!(
                    fs::read_to_string(dir.path().join("mnt/etc/motd")).unwrap(),
                    "hello\n",
                    "{example}"
                );
                // The example of umount finds the last of these mounts.
                if example.contains("hostfs") {
                    world.ok("mosfs umount mnt");
                }
            }
            match *command {
                "exec" if example.contains("id") => assert!(said.contains("uid=1000(app)"), "{said}"),
                "ps" => assert!(said.contains("web"), "{said}"),
                "floor show" => assert!(said.contains('0'), "{said}"),
                "setup" => assert!(said.contains("MOSFS-INSTALL-VERDICT: 0"), "{said}"),
                "umount" => assert!(!dir.path().join("mnt/etc").exists()),
                "commit" => assert!(world.ok("mosfs floor show").contains("200")),
                _ => {}
            }
        }
        if let Some(running) = &mut running {
            stop(running);
        }
    }
}

/// A loop device, which goes whatever becomes of the test.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", self.0.trim()]).status();
    }
}

/// Stops a container as systemd does: by a signal to its runtime.
fn stop(running: &mut std::process::Child) {
    let end = Instant::now() + Duration::from_secs(60);
    let status = loop {
        // Process 1 ignores a signal that it has no handler for yet: a shell that has just started sets its trap later.
        let asked = Command::new("kill").arg(running.id().to_string()).status().unwrap();
        assert!(asked.success());
        std::thread::sleep(Duration::from_millis(100));
        if let Some(status) = running.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < end, "the container did not stop");
    };
    assert!(status.success());
}

/// Where the one hierarchy of control groups is mounted, as crun requires it.
const UNIFIED: &str = "unshare --mount --propagation slave sh -c \
    'test -e /sys/fs/cgroup/cgroup.controllers || mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\"' sh";
