//! `mosfs run-target` with the real crun: what a container is given, what it is kept from, and what is refused.
//!
//! In the foreground, on this machine; units of systemd are in tests/activate_boot/.

#[path = "common/container.rs"]
mod container;
#[path = "common/idmap.rs"]
mod idmap;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::process::Stdio;
use std::time::Duration;

use container::{World, busybox};
use mosfs::internals::mount::table;
use serde_json::{Value, json};

/// The lines `NAME=VALUE` that a script printed.
fn values(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once('=')).collect()
}

/// What the host sees mounted for this device.
fn mounted(world: &World) -> Vec<String> {
    let own = world.path("");
    let all = table::mounted().unwrap().into_iter().filter(|one| one.target.starts_with(&own));
    all.map(|one| format!("{} {}", one.device, one.target.display())).collect()
}

/// Says what a process is allowed: NAME=VALUE.
const TELL: &str = r#"
echo "id=$(id)"; echo "pwd=$(pwd)"; echo "greeting=$GREETING"; echo "home=$HOME"; echo "pid=$$"
echo "map=$(cat /proc/self/uid_map)"; echo "secret=$(cat /home/app/secret 2>&1)"; echo "host=$(hostname)"
for field in CapEff CapBnd NoNewPrivs Seccomp; do echo "$field=$(grep "^$field:" /proc/self/status)"; done
touch /x 2>/tmp/said && echo "root=writable" || echo "root=$(cat /tmp/said)"
touch /tmp/x /run/y 2>/dev/null && echo "run=$(id -u)" || echo "run=no"
mount -t tmpfs none /tmp 2>/tmp/said || echo "mount=$(cat /tmp/said)"
unshare -m true 2>/tmp/said || echo "unshare=$(cat /tmp/said)"
mknod /tmp/node b 7 0 2>/tmp/said || echo "mknod=$(cat /tmp/said)"
echo "setuid=$(/bin/setuid id)"
echo "kcore=$(cat /proc/kcore 2>&1 | wc -c 2>/dev/null)"
echo 1 2>/dev/null >/proc/sys/kernel/hostname && echo "sysctl=written" || echo "sysctl=no"
echo "net=$(ls /sys/class/net | cat)"
exit 7
"#;

#[test]
fn a_container_runs_as_its_image_says_and_gains_nothing() {
    let mut world = World::new();
    let config = json!({
        "User": "app", "WorkingDir": "/home/app", "Env": ["GREETING=good day = hello"],
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": [TELL],
    });
    world.image("app", &config, |root| {
        busybox(root, |root| {
            fs::copy("/bin/busybox", root.join("bin/setuid")).unwrap();
            fs::set_permissions(root.join("bin/setuid"), fs::Permissions::from_mode(0o4755)).unwrap();
        });
    });
    world.install(&[("app", "app", "run: {restart: no}")]);
    let before = mounted(&world);
    let output = world.run(&["run-target", "app"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "the container's exit code: {said}\n{text}");
    let found = values(&text);
    let is =
        |name: &str, value: &str| assert_eq!(found.get(name).copied(), Some(value), "{name}\n{text}\n{said}");
    is("id", "uid=1000(app) gid=1000(app) groups=29(audio)");
    is("pwd", "/home/app");
    is("greeting", "good day = hello");
    is("home", "/home/app");
    is("host", "app");
    is("pid", "1");
    // A file of mode 0600 of its own is readable, so that ids are mapped on the way from the image.
    is("secret", "mine");
    let map: Vec<&str> = found["map"].split_whitespace().collect();
    assert_eq!(map, ["0", "524288", "65536"]);
    is("CapEff", "CapEff:\t0000000000000000");
    is("CapBnd", "CapBnd:\t0000000000000000");
    is("NoNewPrivs", "NoNewPrivs:\t1");
    is("Seccomp", "Seccomp:\t2");
    assert!(found["root"].contains("Read-only file system"), "{text}");
    // /run belongs to root, /tmp to all.
    is("run", "no");
    for name in ["mount", "unshare", "mknod"] {
        let words = found[name].to_lowercase();
        assert!(words.contains("not permitted") || words.contains("permission denied"), "{name}: {words}");
    }
    assert!(!found["setuid"].contains("euid"), "a setuid program gains nothing: {}", found["setuid"]);
    is("sysctl", "no");
    is("net", "lo");
    assert_eq!(mounted(&world), before, "nothing of a container is mounted on the host");
}

#[test]
fn an_image_of_one_program_without_folders_runs_and_root_has_few_capabilities() {
    let mut world = World::new();
    world.image("scratch", &json!({ "Cmd": ["/busybox", "cat", "/proc/1/status"] }), |root| {
        fs::copy("/bin/busybox", root.join("busybox")).unwrap();
    });
    world.image("link", &json!({ "Cmd": ["/busybox", "true"] }), |root| {
        fs::copy("/bin/busybox", root.join("busybox")).unwrap();
        symlink("/etc", root.join("dev")).unwrap();
    });
    world.image("file", &json!({ "Cmd": ["/busybox", "true"] }), |root| {
        fs::write(root.join("proc"), "").unwrap();
    });
    world.image("empty", &json!({}), |root| fs::write(root.join("content"), "x").unwrap());
    world.image("stranger", &json!({ "Cmd": ["/x"], "User": "nobody-here" }), |root| busybox(root, |_| ()));
    world.image("nothing", &json!({ "Entrypoint": [], "Cmd": [""] }), |root| busybox(root, |_| ()));
    world.image("unset", &json!({ "Cmd": ["/x"], "Env": ["PATH"] }), |root| busybox(root, |_| ()));
    world.image("three", &json!({ "Cmd": ["/x"], "User": "app:audio:x" }), |root| busybox(root, |_| ()));
    world.image("odd", &json!({ "Cmd": ["/x"], "WorkingDir": "../x" }), |root| busybox(root, |_| ()));
    world.install(&[
        ("empty", "empty", ""),
        ("file", "file", ""),
        ("large", "stranger", "run: {command: [/bin/true]}"),
        ("link", "link", ""),
        ("no-program", "nothing", ""),
        ("odd", "odd", ""),
        ("only-files", "empty", "service_type: fs-only"),
        ("scratch", "scratch", ""),
        ("stranger", "stranger", ""),
        ("three", "three", ""),
        ("unset", "unset", ""),
    ]);
    let status = world.ok(&["run-target", "scratch"]);
    // CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID and NET_BIND_SERVICE (capability.h).
    assert!(status.contains("CapEff:\t00000000000004eb\n"), "{status}");
    assert!(status.contains("CapBnd:\t00000000000004eb\n"), "{status}");
    for (target, words) in [
        ("link", &["target link", "/dev of its image is a link"][..]),
        ("file", &["target file", "/proc of its image is no folder"]),
        ("empty", &["target empty: it has no command", "Entrypoint", "run.command"]),
        ("stranger", &["user `nobody-here`", "the image has no user"]),
        ("no-program", &["target no-program: it has no command"]),
        ("unset", &["\"PATH\" in Env is no NAME=VALUE"]),
        ("three", &["target three: user `app:audio:x`", "the image has no group `audio:x`"]),
        ("odd", &["WorkingDir", "the configuration sha256:"]),
    ] {
        world.refused(&["run-target", target], 2, words);
        world.refused(&["run-target", target, "--print"], 2, words);
    }
    world.refused(
        &["run-target", "only-files"],
        2,
        &["its service_type is fs-only", "only a container runs"],
    );
    world.refused(&["run-target", "hostfs"], 2, &["its service_type is hostfs"]);
    world.refused(&["run-target", "nothing"], 2, &["no target `nothing`", "scratch"]);
    world.refused(&["run-target", "../x"], 2, &["../x"]);
}

#[test]
fn what_is_printed_is_what_is_started() {
    let mut world = World::new();
    world.script("app", "true");
    world.install(&[("app", "app", "mounts: [{destination: /data, type: volume, source: data}]")]);
    let before = mounted(&world);
    let printed: Value = serde_json::from_str(&world.ok(&["run-target", "app", "--print"])).unwrap();
    assert_eq!(printed["process"]["args"], json!(["/bin/sh", "-c", "true"]));
    assert_eq!(printed["process"]["noNewPrivileges"], true);
    assert_eq!(printed["linux"]["uidMappings"][0]["hostID"], 524_288);
    assert_eq!(printed["root"]["readonly"], true);
    assert_eq!(mounted(&world), before);
    // To look is not to make: the volume is made by the first start.
    assert!(!world.path("system/volumes").exists());
    world.ok(&["run-target", "app"]);
    assert!(world.path("system/volumes/data").is_dir());
}

#[test]
fn volumes_keep_what_containers_write_with_the_ids_that_they_see() {
    let mut world = World::new();
    let config = |script: &str| json!({ "User": "app", "Cmd": ["/bin/sh", "-c", script] });
    let write = "cat /data/kept /shared/content /host/file 2>&1; echo more >> /data/kept; touch /shared/x; \
                 touch /host/x; stat -c '%u %a' /data; touch /scratch/y && echo scratch";
    let fill = |root: &std::path::Path| {
        busybox(root, |root| {
            fs::create_dir(root.join("data")).unwrap();
            chown(root.join("data"), Some(1000), Some(1000)).unwrap();
            fs::set_permissions(root.join("data"), fs::Permissions::from_mode(0o750)).unwrap();
        });
    };
    world.image("app", &config(write), fill);
    world.image("files", &json!({}), |root| fs::write(root.join("content"), "shared\n").unwrap());
    let host = world.path("host");
    fs::create_dir(&host).unwrap();
    fs::write(host.join("file"), "of the host\n").unwrap();
    let mounts = format!(
        "mounts: [{{destination: /data, type: volume, source: kept}}, {{destination: /shared, type: target, source: files}}, \
         {{destination: /host, source: '{}', options: [ro]}}, {{destination: /scratch, type: tmpfs, options: [mode=1777, size=1M]}}]",
        host.display()
    );
    // A group before it, so that its base is not the first one.
    let other = ("aaa", "app", "");
    world.install(&[other, ("app", "app", &mounts), ("files", "files", "service_type: fs-only")]);
    let first = world.ok(&["run-target", "app"]);
    assert!(first.contains("can't open '/data/kept'"), "{first}");
    assert!(first.contains("shared\nof the host\n") && first.contains("1000 750\nscratch\n"), "{first}");
    let second = world.ok(&["run-target", "app"]);
    assert!(second.starts_with("more\nshared\n"), "{second}");
    let volumes = world.path("system/volumes");
    assert_eq!(fs::metadata(&volumes).unwrap().mode() & 0o7777, 0o700, "out of reach of the host's users");
    for path in [volumes.join("kept"), volumes.join("kept/kept")] {
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(
            (metadata.uid(), metadata.gid()),
            (1000, 1000),
            "{}: none of the host's ids",
            path.display()
        );
    }
    assert_eq!(fs::read_to_string(volumes.join("kept/kept")).unwrap(), "more\nmore\n");
    assert!(!host.join("x").exists());
}

#[test]
fn groups_separate_ids_and_the_host_s_ids_must_be_written() {
    let mut world = World::new();
    world.script(
        "app",
        "echo \"map=$(cat /proc/self/uid_map)\"; touch /x && echo root=writable || echo root=no",
    );
    world.install(&[
        ("alone", "app", ""),
        ("host", "app", "nsgroup: ''"),
        ("one", "app", "nsgroup: both, run: {writable: true}"),
        ("two", "app", "nsgroup: both, run: {writable: size=1M}"),
    ]);
    let run = |target: &str| {
        let text = world.ok(&["run-target", target]);
        let found = values(&text);
        let map: Vec<u64> = found["map"].split_whitespace().map(|number| number.parse().unwrap()).collect();
        (map[1], map[2], found["root"].to_string())
    };
    assert_eq!(run("alone"), (524_288, 65_536, "no".into()));
    assert_eq!(run("one"), (524_288 + 65_536, 65_536, "writable".into()));
    assert_eq!(run("two"), run("one"));
    let (base, count, _) = run("host");
    assert_eq!((base, count), (0, u64::from(u32::MAX)));
}

#[test]
fn a_running_container_is_listed_healthy_and_entered() {
    let mut world = World::new();
    world.script("web", "touch /tmp/up; trap 'exit 0' TERM; while :; do sleep 0.1; done");
    let health = "health: {command: [/bin/ls, /tmp/up], interval: 1s}";
    let never = "health: {command: [/bin/false], interval: 1s, retries: 1, start: 1s}";
    let slow = "health: {command: [/bin/sleep, '1000'], timeout: 1s, interval: 1s, retries: 1, start: 1s}";
    let without = "health: {command: [curl, -f, 'http://127.0.0.1/'], interval: 1s, retries: 1, start: 1s}";
    world.install(&[
        ("never", "web", never),
        ("slow", "web", slow),
        ("web", "web", health),
        ("without", "web", without),
    ]);
    let start = |target: &str| {
        let mut command = world.command(&["run-target", target]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
    };
    let mut web = start("web");
    let waited =
        world.command(&["run-target", "--wait-healthy", "web"]).env("MAINPID", web.id().to_string()).status();
    assert!(waited.unwrap().success());
    let listed: Value = serde_json::from_str(&world.ok(&["ps", "--json"])).unwrap();
    let states: BTreeMap<&str, &str> = listed["containers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["target"].as_str().unwrap(), one["state"].as_str().unwrap()))
        .collect();
    assert_eq!(
        states,
        BTreeMap::from([
            ("never", "stopped"),
            ("slow", "stopped"),
            ("web", "running"),
            ("without", "stopped")
        ])
    );
    // What is entered has no more privileges than what runs.
    let entered = world.ok(&["exec", "web", "--", "sh", "-c", "id -u; cat /proc/self/status; ls /tmp"]);
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t00000000000004eb", "up"] {
        assert!(entered.lines().any(|one| one == line), "{line}: {entered}");
    }
    assert_eq!(world.ok(&["exec", "--user", "app", "web", "--", "id", "-u"]), "1000\n");
    world.refused(&["exec", "web", "--", "false"], 1, &["target web ended with exit code 1"]);
    let missing = "target web: the program nosuch is in no folder of PATH (";
    world.refused(&["exec", "web", "--", "nosuch"], 2, &[missing]);
    world.refused(
        &["exec", "--user", "app", "web", "--", "/etc/passwd"],
        2,
        &["target web: the program /etc/passwd is not executable by user 1000 (mode 0644)"],
    );
    world.refused(&["exec", "never", "--", "true"], 1, &["target never", "is not running"]);
    let no_curl = "cannot run: the program curl is in no folder of PATH (/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)";
    for (target, words) in
        [("never", "1 failures in a row"), ("slow", "took longer than 1 s"), ("without", no_curl)]
    {
        let mut started = start(target);
        let pid = started.id().to_string();
        let output =
            world.command(&["run-target", "--wait-healthy", target]).env("MAINPID", &pid).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(words), "{target}: {said}");
        let listed =
            world.ok(&["exec", target, "--", "sh", "-c", "cat /proc/[0-9]*/comm | grep -c sleep || true"]);
        assert!(listed.trim().parse::<u32>().unwrap() <= 1, "no command of health is left: {listed}");
        stop(&mut started);
    }
    stop(&mut web);
    assert!(world.ok(&["ps"]).contains("web"));
}

/// Asks a container's runtime to stop, as systemd does.
fn stop(child: &mut std::process::Child) {
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while child.try_wait().unwrap().is_none() {
        // Again and again: process 1 ignores a signal that it has no handler for yet.
        let asked = std::process::Command::new("kill").arg(child.id().to_string()).status().unwrap();
        assert!(asked.success());
        assert!(std::time::Instant::now() < end, "the container did not stop");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_lies_on_disk_is_not_trusted() {
    let mut world = World::new();
    world.script("app", "true");
    world.install(&[("app", "app", "")]);
    world.ok(&["run-target", "app"]);
    // The configuration of the image, which says what runs.
    let blobs = world.path("system/store/blobs/sha256");
    let config = fs::read_dir(&blobs)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| fs::read(path).unwrap().windows(12).any(|part| part == b"\"Entrypoint\""))
        .unwrap();
    let whole = fs::read_to_string(&config).unwrap();
    fs::write(&config, whole.replace("true", "evil")).unwrap();
    world.refused(&["run-target", "app"], 3, &["sha256:"]);
    fs::write(&config, whole).unwrap();
    world.ok(&["run-target", "app"]);
    // Another tree at the place of the verified one.
    let place = world.path("run/targets/app");
    let mount = |args: &[&str]| {
        let status = std::process::Command::new("mount").args(args).arg(&place).status().unwrap();
        assert!(status.success());
    };
    mount(&["-t", "tmpfs", "none"]);
    world.refused(&["run-target", "app"], 1, &["target app", "is not mounted at", "no record"]);
}

#[test]
fn secrets_and_devices_belong_to_the_user_and_to_no_other() {
    let mut world = World::new();
    let look = "stat -c 'token=%u:%g:%a' /run/secrets/token; echo content=$(cat /run/secrets/token); \
                echo changed=$(echo x 2>/dev/null > /run/secrets/token || echo no); \
                stat -c 'device=%u:%g:%a:%t:%T' /dev/fuse; exec 3<>/dev/fuse && echo opened=yes; \
                echo other=$(test -e /dev/loop-control && echo there)";
    world.image("app", &json!({ "User": "app", "Cmd": ["/bin/sh", "-c", look] }), |root| {
        busybox(root, |_| ())
    });
    world.install(&[
        ("app", "app", "secrets: [token], devices: [/dev/fuse]"),
        ("missing", "app", "secrets: [other]"),
        ("nowhere", "app", "devices: [/dev/not-there]"),
        ("regular", "app", "devices: [/dev/shm/file]"),
    ]);
    let folder = world.path("credentials");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("token"), "of the host").unwrap();
    fs::set_permissions(folder.join("token"), fs::Permissions::from_mode(0o400)).unwrap();
    let run = |target: &str| {
        world.command(&["run-target", target]).env("CREDENTIALS_DIRECTORY", &folder).output().unwrap()
    };
    let output = run("app");
    let (text, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{text}");
    let found = values(&text);
    let node = fs::metadata("/dev/fuse").unwrap().rdev();
    let device = format!("1000:1000:660:{:x}:{:x}", major(node), minor(node));
    for (name, value) in [
        ("token", "1000:1000:400"),
        ("content", "of the host"),
        ("changed", "no"),
        ("device", &device),
        ("opened", "yes"),
        ("other", ""),
    ] {
        assert_eq!(found.get(name).copied(), Some(value), "{name}: {text}{said}");
    }
    for (target, words) in [
        ("missing", &["target missing", "secret other", "No such file"][..]),
        ("nowhere", &["target nowhere", "add its device /dev/not-there", "No such file"]),
        ("regular", &["target regular", "add its device /dev/shm/file"]),
    ] {
        let output = run(target);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        words.iter().for_each(|word| assert!(said.contains(word), "{word}: {said}"));
    }
    // Without systemd there are none.
    world.refused(&["run-target", "app"], 1, &["target app", "systemd has loaded no credentials"]);
}

/// The parts of a device's number (makedev(3)).
fn major(device: u64) -> u64 {
    (device >> 8) & 0xfff
}

fn minor(device: u64) -> u64 {
    (device & 0xff) | ((device >> 12) & 0xfff00)
}

#[test]
fn an_init_reaps_and_ends_a_program_that_ignores_its_stop_signal() {
    let mut world = World::new();
    // Process 1 ignores signals that it has not asked for; another one ends by them.
    world.script("app", "echo \"one=$(cat /proc/1/comm)\"; echo \"own=$$\"; exec sleep 1000");
    world.install(&[("app", "app", "run: {init: true}")]);
    let mut command = world.command(&["run-target", "app"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    assert_eq!(lines.next().unwrap().unwrap(), "one=mosfs-init");
    assert_ne!(lines.next().unwrap().unwrap(), "own=1");
    stop(&mut child);
}

#[test]
fn a_program_reports_that_it_is_ready_to_the_service_manager() {
    let mut world = World::new();
    // A client of the host's Python: busybox has none for such sockets.
    let client = "import os, socket\n\
        path = os.environ['NOTIFY_SOCKET']\n\
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1', path)\n\
        print('at', path)";
    let config = json!({ "User": "app", "Cmd": ["/usr/bin/python3", "-I", "-c", client] });
    world.image("app", &config, |root| busybox(root, |_| ()));
    let bind = |path: &str| format!("{{destination: {path}, source: {path}, options: [ro]}}");
    let mounts = ["/usr", "/lib", "/lib64"].map(bind).join(", ");
    world.install(&[("app", "app", &format!("ready: notify, mounts: [{mounts}]"))]);
    let path = world.path("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    // As systemd's, for all users.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let output = world.command(&["run-target", "app"]).env("NOTIFY_SOCKET", &path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "at /run/mosfs-notify\n");
    let mut message = [0; 100];
    let length = socket.recv(&mut message).unwrap();
    assert_eq!(&message[..length], b"READY=1");
    // In the foreground, nobody would hear it.
    world.refused(&["run-target", "app"], 1, &["target app", "NOTIFY_SOCKET", "ready: notify"]);
}

#[test]
fn a_flipped_byte_is_an_error_in_the_container_and_never_another_byte() {
    let mut world = World::new();
    // Too large to lie where a program or a table of the file system does; not compressible.
    let content = |seed: u64| -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        };
        (0..8 << 20).map(|_| next()).collect()
    };
    let (own, shared) = (content(1), content(2));
    let look = "for file in /zone /shared/zone; do cat $file > /tmp/copy 2>/tmp/said; \
                echo \"code$file=$? $(cat /tmp/said)\"; stat -c \"size$file=%s\" /tmp/copy; done; \
                echo alive=yes";
    world.image("app", &json!({ "Cmd": ["/bin/sh", "-c", look] }), |root| {
        busybox(root, |root| fs::write(root.join("zone"), &own).unwrap());
    });
    world.image("files", &json!({}), |root| fs::write(root.join("zone"), &shared).unwrap());
    let mounts = "mounts: [{destination: /shared, type: target, source: files}]";
    world.install(&[("app", "app", mounts), ("files", "files", "service_type: fs-only")]);
    // A byte of each large layer, on disk.
    let blobs = fs::read_dir(world.path("system/store/blobs/sha256")).unwrap();
    let large: Vec<_> = blobs
        .map(|entry| entry.unwrap().path())
        .filter(|path| fs::metadata(path).unwrap().len() > 8 << 20)
        .collect();
    assert_eq!(large.len(), 2, "{large:?}");
    for path in large {
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        // In place: the daemon has the file open.
        fs::write(&path, bytes).unwrap();
    }
    let text = world.ok(&["run-target", "app"]);
    let found = values(&text);
    for file in ["/zone", "/shared/zone"] {
        let code = found[&*format!("code{file}")];
        assert!(code.starts_with("1 ") && code.to_lowercase().contains("input/output error"), "{text}");
        let size: usize = found[&*format!("size{file}")].parse().unwrap();
        assert!(size < 8 << 20, "{text}");
    }
    assert_eq!(found["alive"], "yes");
}

#[test]
fn files_of_the_host_keep_their_owner_when_they_are_the_standard_streams() {
    let mut world = World::new();
    let config = json!({ "User": "app", "Cmd": ["/bin/sh", "-c", "cat; echo \"error\" >&2; id -u; exit 3"] });
    world.image("app", &config, |root| busybox(root, |_| ()));
    let wait = json!({ "User": "app", "Cmd": ["/bin/sh", "-c", "while :; do sleep 0.1; done"] });
    world.image("wait", &wait, |root| busybox(root, |_| ()));
    world.install(&[
        ("app", "app", ""),
        ("host", "app", "nsgroup: ''"),
        ("host-wait", "wait", "nsgroup: ''"),
        ("wait", "wait", ""),
    ]);
    let owner = |path: &std::path::Path| {
        let metadata = fs::metadata(path).unwrap();
        (metadata.uid(), metadata.gid(), metadata.mode())
    };
    // A null device of the test's own.
    let null = world.path("null");
    let made = std::process::Command::new("mknod").arg(&null).args(["c", "1", "3"]).status().unwrap();
    assert!(made.success());
    let open_null = || fs::File::options().read(true).write(true).open(&null).unwrap();
    let before = owner(&null);
    assert_eq!((before.0, before.1), (0, 0));
    let file = |name: &str, text: &str| {
        let path = world.path(name);
        fs::write(&path, text).unwrap();
        fs::File::options().read(true).append(true).open(path).unwrap()
    };
    for target in ["app", "host"] {
        let mut command = world.command(&["run-target", target]);
        let name = |stream: &str| format!("{target}.{stream}");
        command.stdin(file(&name("in"), "given\n"));
        command.stdout(file(&name("out"), "before\n")).stderr(file(&name("err"), ""));
        assert_eq!(command.status().unwrap().code(), Some(3), "the container's exit code");
        assert_eq!(fs::read_to_string(world.path(&name("out"))).unwrap(), "before\ngiven\n1000\n");
        assert_eq!(fs::read_to_string(world.path(&name("err"))).unwrap(), "error\n");
        for stream in ["in", "out", "err"] {
            assert_eq!(owner(&world.path(&name(stream))), (0, 0, 0o100_644), "{target}: {stream}");
        }
        // The null device in the place of each.
        let mut command = world.command(&["run-target", target]);
        command.stdin(open_null()).stdout(open_null()).stderr(open_null());
        assert_eq!(command.status().unwrap().code(), Some(3));
        assert_eq!(owner(&null), before);
    }
    for target in ["wait", "host-wait"] {
        let mut running = world.command(&["run-target", target]).stdin(open_null()).spawn().unwrap();
        let output = file(&format!("{target}.exec"), "");
        let words = ["exec", target, "--", "sh", "-c", "cat; id -u; exit 5"];
        let exec = || {
            let mut command = world.command(&words);
            command.stdin(file(&format!("{target}.given"), "given\n")).stdout(output.try_clone().unwrap());
            command.stderr(open_null());
            command.status().unwrap().code()
        };
        // Until it runs.
        while !world.run(&["exec", target, "--", "true"]).status.success() {
            assert!(running.try_wait().unwrap().is_none(), "{target} has ended");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(exec(), Some(1));
        let written = world.path(&format!("{target}.exec"));
        assert_eq!(fs::read_to_string(&written).unwrap(), "given\n1000\n");
        assert_eq!(owner(&written), (0, 0, 0o100_644), "{target}");
        assert_eq!(owner(&world.path(&format!("{target}.given"))), (0, 0, 0o100_644), "{target}");
        assert_eq!(owner(&null), before);
        world.refused(&["exec", "--tty", target, "--", "true"], 2, &["--tty", "terminal"]);
        end(&world, target, &mut running);
    }
}

#[test]
fn what_a_group_may_signal_are_its_own_processes_alone() {
    let mut world = World::new();
    world.script("app", "trap 'exit 0' TERM; while :; do sleep 0.1; done");
    let targets = [
        ("alone", "nsgroup: alone-too"),
        ("first", "nsgroup: both"),
        ("host", "nsgroup: none"),
        ("own", ""),
        ("second", "nsgroup: both"),
    ];
    world.install(&targets.map(|(name, fields)| (name, "app", fields)));
    let mut running: Vec<_> = targets
        .iter()
        .map(|(name, _)| (*name, world.command(&["run-target", name]).stdin(Stdio::null()).spawn().unwrap()))
        .collect();
    // Process 1 of each, as the host numbers it.
    let pid = |name: &str| {
        let path = world.path(&format!("run/crun/{name}/status"));
        while !world.run(&["exec", name, "--", "true"]).status.success() {
            std::thread::sleep(Duration::from_millis(50));
        }
        let status: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        status["pid"].as_u64().unwrap()
    };
    let pids: BTreeMap<&str, u64> = targets.iter().map(|(name, _)| (*name, pid(name))).collect();
    // In no container can the number of another's process be named. Here it can: in the user namespace of one, as its
    // root, with all its capabilities, and the processes of the host.
    let may = |from: &str, to: &str| {
        let mut kill = std::process::Command::new("nsenter");
        kill.arg(format!("--user=/proc/{}/ns/user", pids[from]));
        kill.args(["--setuid", "0", "--setgid", "0", "kill", "-0", &pids[to].to_string()]);
        let output = kill.output().expect("nsenter (Debian package util-linux)");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() || said.contains("Operation not permitted"), "{said}");
        output.status.success()
    };
    for (from, _) in targets.iter().filter(|(name, _)| *name != "host") {
        for (to, _) in &targets {
            let is_own = from == to || ["first", "second"].contains(from) && ["first", "second"].contains(to);
            assert_eq!(may(from, to), is_own, "{from} to {to}");
        }
    }
    for (name, child) in &mut running {
        end(&world, name, child);
    }
}

/// Ends a container whose program has no handler for a signal.
fn end(world: &World, target: &str, running: &mut std::process::Child) {
    let mut crun = std::process::Command::new("crun");
    crun.args(["--cgroup-manager=disabled", "--root"]).arg(world.path("run/crun"));
    // The runtime that runs removes the state, too.
    let _ = crun.args(["delete", "--force", target]).stderr(Stdio::null()).status().unwrap();
    running.wait().unwrap();
}

#[test]
fn a_signal_reaches_a_container_whose_output_goes_to_a_file() {
    let mut world = World::new();
    world.script("app", "trap 'echo asked; exit 4' TERM; echo up; while :; do sleep 0.1; done");
    world.install(&[("app", "app", "")]);
    let log = world.path("log");
    let mut command = world.command(&["run-target", "app"]);
    let mut running = command.stdin(Stdio::null()).stdout(fs::File::create(&log).unwrap()).spawn().unwrap();
    while fs::read_to_string(&log).unwrap() != "up\n" {
        assert!(running.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(std::process::Command::new("kill").arg(running.id().to_string()).status().unwrap().success());
    assert_eq!(running.wait().unwrap().code(), Some(4));
    assert_eq!(fs::read_to_string(&log).unwrap(), "up\nasked\n");
}

/// Puts a mount over a target's whose ids the kernel cannot map: they are mapped already, each to itself.
fn forbid_id_maps(world: &World, target: &str) {
    let place = world.path(&format!("run/targets/{target}"));
    idmap::mount_mapped(&place, &place, 0, 100_000);
}

#[test]
fn where_the_kernel_maps_no_ids_a_container_runs_on_a_tree_whose_ids_are_moved() {
    let mut world = World::new();
    let look = "echo \"secret=$(cat /home/app/secret)\"; stat -c 'owner=%u:%g' /home/app/secret /bin/busybox; \
                echo \"map=$(cat /proc/self/uid_map)\"; echo \"shared=$(stat -c %u:%g /shared/content)\"; \
                echo \"other=$(cat /other 2>&1)\"; touch /data/x && stat -c 'data=%u:%g' /data/x";
    world.image("app", &json!({ "User": "app", "Cmd": ["/bin/sh", "-c", look] }), |root| {
        busybox(root, |root| {
            fs::write(root.join("other"), "beyond the group\n").unwrap();
            fs::set_permissions(root.join("other"), fs::Permissions::from_mode(0o600)).unwrap();
            chown(root.join("other"), Some(70_000), Some(70_000)).unwrap();
            fs::create_dir(root.join("data")).unwrap();
            chown(root.join("data"), Some(1000), Some(1000)).unwrap();
        });
    });
    world.image("files", &json!({}), |root| {
        fs::write(root.join("content"), "shared\n").unwrap();
        chown(root.join("content"), Some(33), Some(34)).unwrap();
    });
    let mounts = "mounts: [{destination: /shared, type: target, source: files}, \
                  {destination: /data, type: volume, source: data}]";
    world.install(&[("app", "app", mounts), ("files", "files", "service_type: fs-only")]);
    let plain = world.ok(&["run-target", "app"]);
    assert!(!world.path("run/shifted").exists(), "the kernel of this machine maps ids");
    for target in ["app", "files"] {
        forbid_id_maps(&world, target);
    }
    // To look mounts nothing.
    world.ok(&["run-target", "app", "--print"]);
    assert!(!world.path("run/shifted").exists());
    // By itself, in a mount namespace that goes with it; and with what is mounted already.
    assert_eq!(world.ok(&["run-target", "app"]), plain, "the container sees no difference");
    world.ok(&["run-target", "app", "--mount-shifted"]);
    assert_eq!(world.ok(&["run-target", "app"]), plain);
    let found = values(&plain);
    assert_eq!((found["secret"], found["shared"], found["data"]), ("mine", "33:34", "1000:1000"));
    assert!(found["other"].to_lowercase().contains("permission denied"), "{plain}");
    let place = world.path("run/shifted/524288/app");
    let owner = |name: &str| {
        let metadata = fs::metadata(place.join(name)).unwrap();
        (metadata.uid(), metadata.gid())
    };
    assert_eq!(owner("home/app/secret"), (525_288, 525_288));
    assert_eq!(owner("bin/busybox"), (524_288, 524_288));
    // None of the group's: the kernel shows its overflow id.
    assert_eq!(owner("other"), (65_534, 65_534));
    let status: Value = serde_json::from_str(&world.ok(&["status", "--json", "--floor", "file"])).unwrap();
    let all = status["mounts"].as_array().unwrap();
    let shifted: Vec<_> = all.iter().filter(|mount| mount["shift"].is_object()).collect();
    assert_eq!(shifted.len(), 2, "{status:#}");
    assert!(shifted.iter().all(|mount| mount["verified"] == true && mount["shift"]["first"] == 524_288));
    // A tree of other ids, or of no image that is signed, is not run.
    let umount = |path: &std::path::Path| {
        assert!(std::process::Command::new("umount").arg(path).status().unwrap().success());
    };
    umount(&place);
    world.ok(&[
        "mount",
        "--backend",
        "fuse",
        "--shift-ids",
        "100000:65536",
        "app",
        &place.display().to_string(),
    ]);
    world.ok(&["run-target", "app", "--mount-shifted"]);
    assert_eq!(owner("bin/busybox"), (524_288, 524_288));
    assert_eq!(world.ok(&["run-target", "app"]), plain);
    // The reason of the process that mounts is the one that is said and kept.
    umount(&place);
    fs::remove_dir(&place).unwrap();
    fs::write(&place, "no folder").unwrap();
    let output = world.run(&["run-target", "app"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let reason = said.lines().next().unwrap().strip_prefix("mosfs: ").unwrap();
    assert!(reason.contains(&place.display().to_string()) && !reason.contains("exit status"), "{said}");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(fs::read_to_string(world.path("run/notes/app.error")).unwrap(), reason);
}

#[test]
fn what_the_host_unmounts_is_not_kept_in_use_by_a_container() {
    let mut world = World::new();
    world.script("app", "while :; do sleep 0.1; done");
    world.install(&[("app", "app", "")]);
    let run = |line: &str| {
        let output = std::process::Command::new("sh").args(["-ec", line]).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    // A disk that is mounted where mounts are shared, as systemd makes all of them.
    let (shared, image) = (world.dir("shared"), world.dir("image"));
    run(&format!(
        "mkdir -p {shared} {shared}.content && mksquashfs {shared}.content {image} -quiet -no-progress && \
         mount --bind {shared} {shared} && mount --make-shared {shared} && mkdir {shared}/disk && \
         mount -t squashfs -o loop,ro {image} {shared}/disk"
    ));
    let mut running = world.command(&["run-target", "app"]).stdin(Stdio::null()).spawn().unwrap();
    while !world.run(&["exec", "app", "--", "true"]).status.success() {
        assert!(running.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_ne!(run(&format!("losetup --associated {image}")), "");
    run(&format!("umount {shared}/disk"));
    let end_of_disk = std::time::Instant::now() + Duration::from_secs(60);
    while !run(&format!("losetup --associated {image}")).is_empty() {
        assert!(std::time::Instant::now() < end_of_disk, "the disk is still in use");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(world.run(&["exec", "app", "--", "true"]).status.success(), "and the container goes on");
    end(&world, "app", &mut running);
}

#[test]
fn a_target_may_have_the_name_of_what_is_noted_of_another() {
    let mut world = World::new();
    world.script("app", "echo run");
    world.install(&[("web", "app", ""), ("web.error", "app", ""), ("web.key", "app", "")]);
    for target in ["web", "web.key", "web.error", "web", "web.key"] {
        assert_eq!(world.ok(&["run-target", target]), "run\n");
    }
}
