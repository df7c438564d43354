//! `mosfs activate` under systemd: a Debian in a virtual machine, installed with `make install`.
//!
//! The targets are mounted at boot by mosfs-activate.service, FUSE daemons live in units of their own,
//! come back when they are killed, and do not keep the machine from shutting down in order.
//! What the booted system does is a script in its image (steps.rs); each of its steps prints a line, and the
//! verdict is that of the first step that failed.

#[path = "../common/device.rs"]
mod device;
#[path = "../common/machine.rs"]
mod machine;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../common/publish.rs"]
mod publish;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../common/swtpm.rs"]
mod swtpm;

mod steps;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use device::{Device, MOSFS, START, no_login, put, strip};
use machine::{
    Ended, Machine, debian_13_image, debian_image, make_initrd, script, script_path, source_file, squashfs,
    tool,
};
use publish::Publisher;
use steps::{
    ALL_STOPS, ALL_THROUGH_FUSE, CONTAINERS, DEBIAN_13, HELPERS, OUTSIDE, REBOOTED, SHIFTED, STEPS,
    THROUGH_DM_VERITY, THROUGH_FUSE, UPDATED_CONTAINERS,
};

/// Runs when multi-user.target is reached; `/usr/local/bin/vm-steps` does what is tested.
const VERDICT_UNIT: &str = "[Unit]\nDefaultDependencies=no\nAfter=multi-user.target\n\
    [Service]\nType=oneshot\nStandardOutput=tty\nStandardError=tty\nTTYPath=/dev/ttyS0\n\
    ExecStart=/bin/sh /usr/local/bin/vm-verdict\n\
    [Install]\nWantedBy=multi-user.target\n";

/// Reports what is not as it should be, and goes down in order: systemd ends all that runs, and the log of the
/// shutdown is on the console.
const VERDICT: &str = r#"
code=0
sh /usr/local/bin/vm-steps || code=$?
if [ $code -ne 0 ]; then
    journalctl --no-pager -b -o cat -u 'mosfs*' -u 'mnt-*' | tail -n 60
    systemctl --no-pager --no-legend list-units 'mosfs*' 'mnt-*' 'run-mosfs-targets-*'
    mosfs status
fi
echo "MOSFS-VM-VERDICT: $code"
systemctl --no-block poweroff
"#;

/// The version that is published and booted.
const VERSION: u64 = 200;
/// The version after it, in which one target has another image and one another port.
const NEXT: u64 = 201;
/// A version with a target that does not get healthy.
const SICK: u64 = 202;

/// The folders of modules that containers with network `simple` require.
const MODULES: [&str; 9] = [
    "kernel/drivers/net",
    "kernel/lib",
    "kernel/net/802",
    "kernel/net/bridge",
    "kernel/net/ipv4/netfilter",
    "kernel/net/ipv6/netfilter",
    "kernel/net/llc",
    "kernel/net/netfilter",
    "kernel/crypto",
];

/// Puts these modules of one of Debian's kernels into a tree.
fn put_modules(kernel: &str, top: &Path) {
    let modules = script_path(script("kernel").arg(kernel)).join("lib/modules");
    let release = fs::read_dir(&modules).unwrap().next().unwrap().unwrap().file_name();
    let (from, to) = (modules.join(&release), top.join("usr/lib/modules").join(&release));
    let copy = |from: &Path, to: &Path| {
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        tool("coreutils", Command::new("cp").arg("-rT").args([from, to]));
    };
    for folder in MODULES.iter().filter(|folder| from.join(folder).exists()) {
        copy(&from.join(folder), &to.join(folder));
    }
    for file in fs::read_dir(&from).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file())
    {
        copy(&file, &to.join(file.file_name().unwrap()));
    }
}

/// Publishes a Debian with what `make install` installs, targets, and two later versions of them. Files are made in `dir`.
fn publish(publisher: &Publisher, dir: &Path, debian: &Path, kernel: &str, steps: &str) {
    let top = &dir.join("top");
    let stripped = dir.join("mosfs");
    strip(START, &stripped);
    strip(MOSFS, &dir.join("mosfs-full"));
    let mut install = Command::new("make");
    install.arg("--silent").arg("install").current_dir(source_file(""));
    install.arg(format!("DESTDIR={}", top.display())).arg(format!("MOSFS={}", stripped.display()));
    tool("make", &mut install);
    put(top, "etc/machine-id", "0123456789abcdef0123456789abcdef\n");
    put(top, "etc/systemd/system/vm-verdict.service", VERDICT_UNIT);
    // An emulated machine beside others takes much longer to start a container than any real one.
    let slow = "[Service]\nTimeoutStartSec=15min\n";
    put(top, "etc/systemd/system/mosfs-target@.service.d/slow.conf", slow);
    put(top, "usr/local/bin/vm-verdict", VERDICT);
    put(top, "usr/local/bin/vm-steps", steps);
    put(
        top,
        "etc/fstab",
        "app /mnt/early mosfs backend=fuse,system=/run/mosfs/system,config=/run/mosfs/config,ro 0 0\n\
         app /mnt/late mosfs _netdev,x-systemd.after=mosfs-activate.service,backend=fuse,nosuid 0 0\n",
    );
    for folder in ["etc/mosfs", "var/lib/mosfs", "mnt/early", "mnt/late", "mnt/none"] {
        fs::create_dir_all(top.join(folder)).unwrap();
    }
    let units = top.join("etc/systemd/system");
    let enable = |unit: &str, target: &str, from: &str| {
        let folder = units.join(target);
        fs::create_dir_all(&folder).unwrap();
        symlink(format!("{from}/{unit}"), folder.join(unit)).unwrap();
    };
    enable("vm-verdict.service", "multi-user.target.wants", "..");
    for unit in ["mosfs-activate.service", "mosfs-commit.service"] {
        enable(unit, "multi-user.target.wants", "/usr/lib/systemd/system");
    }
    enable("mosfs-activate.service", "boot-complete.target.requires", "/usr/lib/systemd/system");
    no_login(top);
    put_modules(kernel, top);
    put(
        top,
        "usr/local/bin/busybox",
        fs::read("/bin/busybox").expect("/bin/busybox (Debian package busybox-static)"),
    );
    fs::set_permissions(top.join("usr/local/bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    let image = dir.join("top.squashfs");
    squashfs(top, &image, &["-all-root"]);
    let host = vec![publisher.add_image(debian), publisher.add_image(&image)];
    let target = |name: &str| vec![publisher.add_layer(name)];
    let tree = dir.join("busybox");
    put(
        &tree,
        "bin/busybox",
        fs::read("/bin/busybox").expect("/bin/busybox (Debian package busybox-static)"),
    );
    fs::set_permissions(tree.join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    for applet in ["sh", "cat", "date", "grep", "ls", "sleep", "touch", "id", "test"] {
        symlink("busybox", tree.join("bin").join(applet)).unwrap();
    }
    let image = dir.join("busybox.squashfs");
    squashfs(&tree, &image, &["-all-root"]);
    let busybox = vec![publisher.add_image(&image)];
    let targets = [
        ("hostfs", "hostfs", host),
        ("app", "fs-only", target("app")),
        ("data-set", "fs-only", target("data-set")),
        // Its daemon stays as long as a container mounts it, whatever is unmounted on the host.
        ("shared", "fs-only", target("shared")),
        ("bomb", "container", busybox.clone()),
        ("db", "container", busybox.clone()),
        ("hog", "container", [&busybox[..], &target("first")].concat()),
        ("job", "container", busybox.clone()),
        ("web", "container", busybox.clone()),
    ];
    let shell = |script: &str| serde_json::json!({ "Cmd": ["/bin/sh", "-c", script] });
    let sleeps = "trap 'exit 0' TERM; while :; do sleep 1; done";
    publisher.container("db", "network: {type: none}", &shell(sleeps));
    let web = |health: &str| {
        let fields = format!(
            "network: {{type: simple, ports: [{{host: 80, container: 8080}}]}}, needs: [db, job], health: {{{health}}}, \
             resources: {{memory: 64M, tasks: 50}}, mounts: [{{destination: /data, type: volume, source: web}}, \
             {{destination: /set, type: target, source: shared}}, {{destination: /job, type: volume, source: job}}]"
        );
        let script = "cat /job/state > /tmp/job; echo \"started $(cat /set/content)\"; date >> /data/starts; \
                      echo 'this is web' > /tmp/index.html; /bin/busybox httpd -p 8080 -h /tmp; sleep 2; \
                      echo yes > /tmp/up; trap 'exit 0' TERM; while :; do sleep 1; done";
        publisher.container("web", &fields, &shell(script));
    };
    // However slow the machine is, what is up is healthy.
    // Each check starts the runtime, which takes much of a second in an emulated machine.
    web("command: [/bin/cat, /tmp/up], interval: 3s, timeout: 60s");
    // Both wait until they are asked.
    let asked = "until test -e /go/go; do sleep 1; done";
    let volume = "mounts: [{destination: /go, type: volume, source: go}]";
    publisher.container(
        "hog",
        &format!(
            "network: {{type: none}}, run: {{restart: no, stop_seconds: 5}}, {volume}, resources: {{memory: 32M}}"
        ),
        &shell(&format!("{asked}; exec /bin/busybox tail /dev/zero")),
    );
    let bomb = |port: u16| {
        let ports = format!("ports: [{{host: {}, container: {port}}}]", port - 8000);
        let fields = format!(
            "network: {{type: simple, {ports}}}, run: {{restart: no, stop_seconds: 4}}, {volume}, \
             resources: {{tasks: 30}}"
        );
        // When it is stopped it has not done its work, and is started again.
        let script = format!("trap 'exit 9' TERM; {asked}; while :; do sleep 1000 & done");
        publisher.container("bomb", &fields, &shell(&script));
    };
    bomb(8081);
    publisher.container(
        "job",
        "network: {type: none}, run: {restart: no}, mounts: [{destination: /data, type: volume, source: job}]",
        &shell(
            "echo begun > /data/state; echo run >> /data/runs; sleep 2; test ! -e /data/fail || exit 7; \
             echo finished > /data/state",
        ),
    );
    publisher.publish_targets(VERSION, &targets, true);
    bomb(8082);
    let changed = |(name, kind, layers): &(&'static str, &'static str, Vec<_>)| match *name {
        "hog" => (*name, *kind, [&busybox[..], &target("second")].concat()),
        _ => (*name, *kind, layers.clone()),
    };
    let mut next: Vec<_> = targets.iter().map(changed).collect();
    let api = "echo 'this is api' > /tmp/index.html; /bin/busybox httpd -p 8080 -h /tmp";
    publisher.container("api", "network: {type: simple}", &shell(&format!("{api}; {sleeps}")));
    next.push(("api", "container", busybox.clone()));
    publisher.publish_targets(NEXT, &next, true);
    bomb(8081);
    web("command: [/bin/false], interval: 1s, start: 1s, retries: 1");
    publisher.publish_targets(SICK, &targets, true);
}

/// Boots a device with this Debian and this kernel, which does `steps`; wants verdict 0 and these words on the console.
fn boots(debian: &Path, kernel: &'static str, steps: &str, cmdline: &str, words: &[&str]) -> Ended {
    let dir = tempfile::tempdir().unwrap();
    let (_device, machine) = machine_of(dir.path(), debian, kernel, steps, cmdline);
    machine.expect(0, words)
}

/// Makes a device with this Debian and this kernel, which does `steps`, and the machine that boots it.
fn machine_of(
    dir: &Path,
    debian: &Path,
    kernel: &'static str,
    steps: &str,
    cmdline: &str,
) -> (Device, Machine) {
    let publisher = Publisher::new(dir);
    publish(&publisher, dir, debian, kernel, steps);
    let device = Device::of(publisher, VERSION);
    carry_targets(&dir.join("store"), &device);
    let initrd = device.path("initrd");
    let mut machine = Machine { kernel, ..device.machine_with(&initrd) };
    make_initrd(&initrd, "initramfs-tools", machine.kernel, device.config());
    machine.cmdline += &format!(" loglevel=6 {cmdline}");
    machine.timeout *= if is_long() { 8 } else { 1 };
    (device, machine)
}

/// Puts the publisher's store onto the partition, for updates in the machine, but for the large blobs that it has.
fn carry_targets(store: &Path, device: &Device) {
    let to = device.system().join("vm-source");
    tool("coreutils", Command::new("cp").arg("-rT").args([store, &to]));
    for entry in fs::read_dir(to.join("blobs/sha256")).unwrap().map(|entry| entry.unwrap()) {
        if entry.metadata().unwrap().len() > 4 << 20 {
            fs::remove_file(entry.path()).unwrap();
        }
    }
}

/// Whether campaigns are long (`make campaign`).
fn is_long() -> bool {
    std::env::var("MOSFS_CAMPAIGN").is_ok_and(|value| value == "long")
}

/// What systemd and the kernel say at the end of a shutdown in order.
const IN_ORDER: &str = "reboot: Power down";

#[test]
fn containers_are_updated_and_leave_nothing() {
    // Restarts, with an activation after each fifth one.
    let rounds = if is_long() { "500" } else { "5" };
    let mut containers = UPDATED_CONTAINERS.replace("ROUNDS", rounds);
    for (name, version) in [("NEXT", NEXT), ("SICK", SICK), ("VERSION", VERSION)] {
        containers = containers.replace(name, &version.to_string());
    }
    let steps = format!("{THROUGH_DM_VERITY}{HELPERS}{OUTSIDE}{containers}{ALL_STOPS}");
    let words = ["vm: step 26", "vm: step 29", "vm: step 31", IN_ORDER];
    without_failures(&boots(debian_image(), "6.12", &steps, "", &words));
}

#[test]
fn active_targets_are_there_at_boot_and_their_daemons_come_back() {
    let steps = format!("{THROUGH_DM_VERITY}{HELPERS}{STEPS}{THROUGH_FUSE}{ALL_STOPS}");
    let words = ["vm: step 18", "vm: step 31", "data-set (fuse): verified", IN_ORDER];
    without_failures(&boots(debian_image(), "6.12", &steps, "", &words));
}

fn without_failures(ended: &Ended) {
    ended.without(&["I/O error"]);
    // What systemd says of any unit, but for containers that are to fail.
    let failed = |line: &&str| line.contains("Failed to start") && !line.contains("Target ");
    assert_eq!(ended.console.lines().find(failed), None);
}

#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn containers_run_on_debian_13_through_both_backends() {
    let steps =
        format!("{HELPERS}{DEBIAN_13}{OUTSIDE}{CONTAINERS}{ALL_THROUGH_FUSE}{THROUGH_FUSE}{ALL_STOPS}");
    let words = ["vm: step 9", "vm: step 25", "vm: step 31", IN_ORDER];
    without_failures(&boots(&debian_13_image(), "6.12", &steps, "", &words));
}

/// Linux 6.1 maps no ids of squashfs either: dm-verity serves the host's mounts, and daemons move the ids of containers.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn containers_run_on_linux_6_1_beside_mounts_through_dm_verity() {
    let mounted = r#"for name in app web; do want grep -q " $targets/$name overlay ro,nosuid,nodev" /proc/self/mounts; done"#;
    let steps = format!("{HELPERS}{mounted}\n{OUTSIDE}{CONTAINERS}{SHIFTED}{ALL_STOPS}");
    let words = ["vm: step 25", "vm: step 41", "vm: step 31", IN_ORDER];
    without_failures(&boots(debian_image(), "6.1", &steps, "", &words));
}

/// The first boot goes down with all of them running.
#[test]
fn containers_start_in_order_keep_their_volumes_over_a_reboot_and_are_kept_running() {
    let dir = tempfile::tempdir().unwrap();
    let more = format!("test $boot = 2 || exit 0\n{THROUGH_DM_VERITY}{OUTSIDE}{CONTAINERS}{ALL_STOPS}");
    let steps = format!("{HELPERS}{REBOOTED}{more}");
    let (device, mut machine) = machine_of(dir.path(), debian_image(), "6.12", &steps, "");
    machine.disk = Some(device.path("disk.qcow2"));
    for (boot, words) in
        [("vm: boot 1 is done", &[][..]), ("vm: boot 2 is done", &["vm: step 25", "vm: step 31"])]
    {
        let ended = machine.expect(0, &[&[boot, IN_ORDER], words].concat());
        without_failures(&ended);
        // The devices of the images are there until the last container has ended.
        ended.without(&["Input/output error", "Failed to execute shutdown"]);
        machine.system = None;
    }
}

#[test]
fn the_root_through_fuse_serves_to_the_end_of_an_orderly_shutdown() {
    let root = "mosfs activate --backend fuse || exit 3\n\
         pid=$(pgrep -f '^@mosfs') || pid=$(grep -l '^@mosfs' /proc/[0-9]*/cmdline | head -n 1 | cut -d/ -f3)\n\
         test -n \"$pid\" || exit 4\n\
         echo \"vm: the root's daemon is $pid: $(tr '\\0' ' ' </proc/$pid/cmdline)\"\n\
         test \"$(cat /run/mosfs/targets/app/content)\" = app || exit 5\n";
    let steps = format!("{HELPERS}{SHIFTED}{root}");
    let words = ["vm: step 41", "vm: the root's daemon is ", IN_ORDER];
    // Debian 12's own kernel.
    let ended = boots(debian_image(), "6.1", &steps, "mosfs.backend=fuse", &words);
    // A root whose daemon was killed would have said so here.
    ended.without(&[
        "Transport endpoint is not connected",
        "Input/output error",
        "Failed to execute shutdown",
    ]);
}
