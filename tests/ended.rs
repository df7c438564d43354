//! Containers that cannot start, and what is said and left of those that have ended, with the real crun.

#[path = "common/container.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod container;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::time::Duration;

use container::{World, busybox};
use serde_json::{Value, json};

#[test]
fn a_program_that_cannot_run_is_named_with_its_image() {
    let mut world = World::new();
    world.image("app", &json!({ "Entrypoint": ["/srv/app"] }), |root| {
        busybox(root, |root| {
            fs::create_dir_all(root.join("srv")).unwrap();
            fs::write(root.join("srv/script"), "#!/bin/bash\necho hello\n").unwrap();
            fs::set_permissions(root.join("srv/script"), fs::Permissions::from_mode(0o755)).unwrap();
            fs::write(root.join("srv/good"), "#!/bin/sh\necho hello\n").unwrap();
            fs::set_permissions(root.join("srv/good"), fs::Permissions::from_mode(0o755)).unwrap();
            // A program of another processor: the header of this machine's, with another number.
            let mut foreign = fs::read("/bin/busybox").unwrap();
            foreign[18] = if cfg!(target_arch = "aarch64") { 62 } else { 183 };
            fs::write(root.join("srv/foreign"), foreign).unwrap();
            fs::set_permissions(root.join("srv/foreign"), fs::Permissions::from_mode(0o755)).unwrap();
        });
    });
    let volume = "mounts: [{destination: /data, type: volume, source: v.1_a-b}, \
                  {destination: //data/./b/, type: volume, source: v.1_a-b}]";
    let through = format!("run: {{command: [/data/b/own]}}, {volume}");
    world.install(&[
        ("app", "app", ""),
        ("closed", "app", "run: {command: [/etc/passwd]}"),
        ("foreign", "app", "run: {command: [/srv/foreign]}"),
        ("good", "app", "run: {command: [good], environment: {PATH: '/bin:/srv'}}"),
        ("lost", "app", "run: {command: [/srv/script]}"),
        ("nowhere", "app", "run: {command: [nothing], environment: {PATH: '/bin:/srv'}}"),
        ("through", "app", &through),
    ]);
    let source = format!("oci:{}", world.dir("store"));
    let shown: Value = serde_json::from_str(&world.ok(&["manifest", "show", &source])).unwrap();
    let digest = shown["targets"]["app"]["digest"].as_str().unwrap();
    let machine = if cfg!(target_arch = "aarch64") { "x86_64" } else { "aarch64" };
    let foreign = format!("is a program for {machine}, and this machine is {}", std::env::consts::ARCH);
    for (target, program, why) in [
        ("app", "/srv/app", "does not exist"),
        ("closed", "/etc/passwd", "is not executable by user 0 (mode 0644)"),
        ("foreign", "/srv/foreign", foreign.as_str()),
        ("lost", "/srv/script", "requires the interpreter /bin/bash, which does not exist"),
        ("nowhere", "nothing", "is in no folder of PATH (/bin:/srv)"),
        // The volume is there, and has no such program yet.
        ("through", "/data/b/own", "does not exist"),
    ] {
        let line = format!("target {target}: the program {program} of its image {digest} {why}");
        let output = world.run(&["run-target", target]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(
            (output.status.code(), said.lines().next()),
            (Some(2), Some(format!("mosfs: {line}").as_str())),
            "{said}"
        );
        // The wait for its health does not replace the reason.
        let waited =
            world.command(&["run-target", "--wait-healthy", target]).env("MAINPID", "999999999").output();
        assert_eq!(waited.unwrap().status.code(), Some(1));
        let listed = world.ok(&["ps"]);
        assert!(listed.lines().any(|one| one == format!("{target}: {line}")), "{line}: {listed}");
    }
    assert_eq!(world.ok(&["run-target", "good"]), "hello\n");
    // One volume at two places, one below the other; the program comes from there.
    let volume = world.path("system/volumes/v.1_a-b");
    symlink("/data/script", volume.join("own")).unwrap();
    world.refused(&["run-target", "through"], 2, &["/data/b/own", "does not exist"]);
    fs::write(volume.join("here"), "once ").unwrap();
    fs::write(volume.join("script"), "#!/bin/sh\ncat /data/here /data/b/here\n").unwrap();
    fs::set_permissions(volume.join("script"), fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(world.ok(&["run-target", "through"]), "once once ");
}

#[test]
fn what_cannot_be_mounted_is_named_with_its_place_and_its_target() {
    let mut world = World::new();
    world.image("app", &json!({ "Cmd": ["/bin/echo", "hello"] }), |root| {
        busybox(root, |root| {
            fs::write(root.join("srv"), "a file").unwrap();
            fs::create_dir(root.join("data")).unwrap();
            symlink("/nowhere", root.join("lost")).unwrap();
            symlink("/circle", root.join("circle")).unwrap();
            symlink("data", root.join("linked")).unwrap();
        });
    });
    let file = world.dir("file");
    fs::write(&file, "of the host").unwrap();
    let mounts = |all: &str| format!("mounts: [{all}]");
    let targets = [
        (
            "below",
            mounts("{destination: /srv/x/y, type: tmpfs}"),
            "a folder at /srv/x/y: a part of that path is a file in its image",
        ),
        (
            "circle",
            mounts("{destination: /circle, type: tmpfs}"),
            "a folder at /circle: its image has links on that path which lead in a circle",
        ),
        (
            "file",
            mounts(&format!("{{destination: /data, source: {file}}}")),
            "a file at /data: its image has a folder there",
        ),
        (
            "folder",
            mounts("{destination: /etc/passwd, type: volume, source: v}"),
            "a folder at /etc/passwd: its image has a file there",
        ),
        (
            "lost",
            mounts("{destination: /lost/x, type: tmpfs}"),
            "a folder at /lost/x: its image has a link on that path which leads nowhere",
        ),
        (
            "memory",
            mounts("{destination: /srv, type: tmpfs}"),
            "a folder at /srv: its image has a file there",
        ),
    ];
    // What is there, what a link leads to, what is below another mount, and what the image does not have.
    let good = mounts(&format!(
        "{{destination: /linked, type: tmpfs}}, {{destination: /new/folder, type: volume, source: v}}, \
         {{destination: /new/folder/below/it, type: tmpfs}}, {{destination: /etc/passwd, source: {file}}}, \
         {{destination: /new/file, source: {file}}}, {{destination: /run/x, type: tmpfs}}"
    ));
    let missing = mounts("{destination: /data, source: /no/such/folder}");
    let mut all: Vec<_> = targets.iter().map(|(name, mounts, _)| (*name, "app", mounts.as_str())).collect();
    all.extend([("good", "app", good.as_str()), ("missing", "app", missing.as_str())]);
    all.push(("owned", "app", "mounts: [{destination: /data, type: volume, source: owned}]"));
    all.push((
        "owned-host",
        "app",
        "nsgroup: none, mounts: [{destination: /data, type: volume, source: owned}]",
    ));
    world.install(&all);
    for (target, _, why) in &targets {
        let line = format!("target {target}: cannot mount {why}");
        world.refused(&["run-target", target], 2, &[&format!("mosfs: {line}\nhint: ")]);
        assert!(world.ok(&["ps"]).contains(&line), "{line}");
    }
    assert_eq!(world.ok(&["run-target", "good"]), "hello\n");
    let line = "mosfs: target missing: cannot bind /no/such/folder of the host: No such file or directory";
    world.refused(&["run-target", "missing"], 1, &[line]);
    // A volume that was copied from elsewhere, with ids that no container with ids of its own has.
    assert_eq!(world.ok(&["run-target", "owned"]), "hello\n");
    let volume = world.path("system/volumes/owned");
    for (uid, gid, who) in [(524_288, 0, "user 524288"), (65_535, 65_536, "group 65536")] {
        chown(&volume, Some(uid), Some(gid)).unwrap();
        let line =
            format!("target owned: volume {} belongs to {who}, expected an id below 65536", volume.display());
        world.refused(&["run-target", "owned"], 1, &[&line, "hint: change the owner"]);
        assert_eq!(world.ok(&["run-target", "owned-host"]), "hello\n");
    }
    chown(&volume, Some(65_535), Some(1000)).unwrap();
    assert_eq!(world.ok(&["run-target", "owned"]), "hello\n");
}

#[test]
fn what_the_runtime_cannot_run_says_so_and_not_that_its_program_has_failed() {
    let mut world = World::new();
    world.script("web", "exit 0");
    world.install(&[("web", "web", "")]);
    // Where something else is mounted in the place of the control groups, the runtime gives up.
    let script = "mount -t ramfs none /sys/fs/cgroup && exec \"$@\"";
    let mosfs = env!("CARGO_BIN_EXE_mosfs");
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "--propagation", "slave", "sh", "-c", script, "sh", mosfs, "run-target", "web"]);
    for name in ["system", "config", "run"] {
        command.env(format!("MOSFS_{}", name.to_uppercase()), world.path(name));
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!said.is_empty());
    let clean = |result: &str, how: &str, status: &str| {
        let mut clean = world.command(&["run-target", "--clean", "web"]);
        clean.env("SERVICE_RESULT", result).env("EXIT_CODE", how).env("EXIT_STATUS", status);
        assert!(clean.status().unwrap().success());
        world.ok(&["ps"])
    };
    let listed = clean("exit-code", "exited", "1");
    let said = said.lines().last().unwrap();
    assert!(
        listed.contains(&format!("web: target web: the runtime cannot run it: {said}")),
        "{listed}: {said}"
    );
    // The next run begins anew.
    assert_eq!(world.ok(&["run-target", "web"]), "");
    assert!(!clean("success", "exited", "0").contains("runtime"));
}

#[test]
fn a_machine_without_a_journal_and_a_container_that_does_not_run_are_said_so() {
    let mut world = World::new();
    world.script("web", "exit 0");
    world.install(&[("web", "web", "")]);
    world.refused(&["exec", "web", "--", "ls"], 1, &["its container is not running", "hint: `mosfs ps`"]);
    world.refused(&["exec", "wbe", "--", "ls"], 2, &["no target `wbe`", "hint: if a newer version has it"]);
    // Where systemd does not run, an empty journal says nothing of the container.
    let output = world.run(&["logs", "web"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let is_booted = std::path::Path::new("/run/systemd/system").is_dir();
    assert_eq!(said.contains("mosfs: note: systemd does not run this machine"), !is_booted, "{said}");
}

#[test]
fn the_clean_up_asks_for_more_time_than_the_program_has_to_stop_and_says_why_it_ended() {
    let mut world = World::new();
    world.script("web", "exit 3");
    world.install(&[("web", "web", "run: {stop_seconds: 1}")]);
    let path = world.path("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(world.run(&["run-target", "web"]).status.code(), Some(3));
    // What the runtime would leave if it were killed.
    fs::create_dir_all(world.path("run/crun/web")).unwrap();
    let clean = |result: &str, how: &str, status: &str| {
        let mut clean = world.command(&["run-target", "--clean", "web"]);
        clean.env("NOTIFY_SOCKET", &path).env("SERVICE_RESULT", result);
        let output = clean.env("EXIT_CODE", how).env("EXIT_STATUS", status).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut message = [0; 100];
        let length = socket.recv(&mut message).unwrap();
        assert_eq!(&message[..length], b"EXTEND_TIMEOUT_USEC=90000000");
    };
    clean("exit-code", "exited", "3");
    assert!(!world.path("run/crun/web").exists());
    let said = "target web: its program ended with exit code 3";
    let listed: Value = serde_json::from_str(&world.ok(&["ps", "--json"])).unwrap();
    assert_eq!(listed["containers"][0]["error"], said, "{listed}");
    assert!(world.ok(&["status"]).contains(said));
    // Twice is once, and a reason is not replaced by a later one of the same run.
    clean("signal", "killed", "KILL");
    assert!(world.ok(&["ps"]).ends_with(&format!("web: {said}\n")));
    // A run that ends well has none.
    assert_eq!(world.run(&["run-target", "web"]).status.code(), Some(3));
    clean("success", "exited", "0");
    assert!(!world.ok(&["ps"]).contains("target web"));
}

#[test]
fn what_no_container_can_have_is_refused_before_anything_is_built() {
    let world = World::new();
    let import = world.manifest(
        1,
        &[
            ("a", "host", "network: {type: simple, ports: [{host: 80, container: 1, address: 0.0.0.0}]}"),
            ("b", "host", "resources: {memory: 1K, tasks: 1}, needs: [b, x]"),
            ("localhost", "host", "network: {type: simple, ipv4: 127.0.0.9/24}"),
            ("v", "host", "mounts: [{destination: /d, type: volume, source: ../d}], secrets: [s, s]"),
        ],
    );
    let (store, key, cert) = (world.dir("store"), world.dir("keys/signer.key"), world.dir("keys/signer.pem"));
    // Line, what is written there, field, and the message.
    const SUBNET: &str =
        "a subnet for hosts, such as 10.0.3.0/24: not 0.0.0.0/8, 127.0.0.0/8 or one from 224.0.0.0 on";
    const NAME: &str = "a name that other targets can look up: not localhost, and not an address or a number";
    let subnet = format!("found the subnet 127.0.0.0/24; allowed: {SUBNET}");
    let name = format!("found type simple for a target with the name `localhost`; allowed: {NAME}");
    let expected = [
        (
            5,
            "0.0.0.0",
            "a.network.ports[0].address",
            "found `0.0.0.0`; allowed: an address of the host; leave `address` out for all of them",
        ),
        (6, "1K", "b.resources.memory", "found `1K`; allowed: at least 1M"),
        (6, "1}", "b.resources.tasks", "found `1`; allowed: an integer from 4 to 4194304"),
        (6, "b,", "b.needs[0]", "found `b`, which needs `b`; allowed: targets that do not need this one"),
        (6, "x]", "b.needs[1]", "found `x`; allowed: a target of this system"),
        (7, "simple", "localhost.network.type", name.as_str()),
        (7, "127.0.0.9/24", "localhost.network.ipv4", subnet.as_str()),
        (
            8,
            "../d",
            "v.mounts[0].source",
            "found `../d`; allowed: the name of a volume: [a-z0-9]+([._-][a-z0-9]+)*, at most 63 characters",
        ),
        (8, "s]", "v.secrets[1]", "found `s` a second time; allowed: each once"),
    ];
    let text = fs::read_to_string(&import).unwrap();
    for command in [
        &["build", &import, "--store", &store, "--key", &key, "--cert", &cert][..],
        &["manifest", "check", &import],
    ] {
        let output = world.run(command);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        let mut lines = said.lines();
        assert_eq!(lines.next(), Some("mosfs: the import manifest has 9 errors"));
        for (line, written, field, message) in expected {
            let one = lines.next().unwrap();
            let rest =
                one.strip_prefix(&format!("{import}:{line}:")).unwrap_or_else(|| panic!("{line}: {one}"));
            let (column, rest) = rest.split_once(": ").unwrap();
            let at = &text.lines().nth(line - 1).unwrap()[column.parse::<usize>().unwrap() - 1..];
            assert!(at.starts_with(written), "{one}: {at}");
            assert_eq!(rest, format!("targets.{field}: {message}"));
        }
        assert!(!world.path("store").exists());
    }
}
