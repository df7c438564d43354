//! Containers that cannot start, and what is said and left of those that have ended, with the real crun.

#[path = "common/container.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod container;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::process::Stdio;
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
        let why = format!("the program {program} of its image {digest} {why}");
        let line = format!("target {target}: {why}");
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
        // The name is there once.
        assert!(listed.lines().any(|one| one == format!("{target}: {why}")), "{line}: {listed}");
        let status = world.ok(&["status"]);
        assert!(status.lines().any(|one| one.ends_with(&format!(": stopped ({why})"))), "{line}: {status}");
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
    let (file, socket) = (world.dir("file"), world.dir("socket"));
    fs::write(&file, "of the host").unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(&socket).unwrap();
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
         {{destination: /new/file, source: {file}}}, {{destination: /run/x, type: tmpfs}}, \
         {{destination: /new/socket, source: {socket}}}"
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
        let why = format!("cannot mount {why}");
        let line = format!("target {target}: {why}");
        world.refused(&["run-target", target], 2, &[&format!("mosfs: {line}\nhint: ")]);
        assert!(world.ok(&["ps"]).lines().any(|one| one == format!("{target}: {why}")), "{line}");
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
    assert!(listed.contains(&format!("web: the runtime cannot run it: {said}")), "{listed}: {said}");
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
    let said = "its program ended with exit code 3";
    let listed: Value = serde_json::from_str(&world.ok(&["ps", "--json"])).unwrap();
    assert_eq!(listed["containers"][0]["error"], said, "{listed}");
    assert!(world.ok(&["status"]).contains(said));
    // Twice is once, and a reason is not replaced by a later one of the same run.
    clean("signal", "killed", "KILL");
    assert!(world.ok(&["ps"]).ends_with(&format!("web: {said}\n")));
    // A run that ends well has none.
    assert_eq!(world.run(&["run-target", "web"]).status.code(), Some(3));
    clean("success", "exited", "0");
    assert!(!world.ok(&["ps"]).contains("exit code"));
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

#[test]
fn output_and_errors_in_one_file_are_all_there_in_order_and_so_is_what_others_write_there() {
    let mut world = World::new();
    // More than a pipe holds at once, so that copies begin before all is written.
    let script = "i=0; while [ $i -lt 3000 ]; do echo \"out $i .......................\"; \
                  echo \"err $i .......................\" >&2; i=$((i+1)); done";
    world.script("talks", script);
    world.script("errors", "echo alone >&2");
    world.script("waits", "cat /go; exit 9");
    let go = format!("mounts: [{{destination: /go, source: {}}}]", world.dir("go"));
    world.install(&[("errors", "errors", ""), ("talks", "talks", ""), ("waits", "waits", &go)]);
    let into_file = |target: &str, open: &fs::OpenOptions| {
        let path = world.path(&format!("{target}.log"));
        let _ = fs::remove_file(&path);
        let mut log = open.open(&path).unwrap();
        log.write_all(b"before\n").unwrap();
        let mut command = world.command(&["run-target", target]);
        command.stdout(log.try_clone().unwrap()).stderr(log.try_clone().unwrap());
        assert!(command.status().unwrap().success(), "{}", fs::read_to_string(&path).unwrap());
        // As a shell does for the next command of a script whose output is in this file.
        log.write_all(b"after\n").unwrap();
        fs::read_to_string(path).unwrap()
    };
    let lines: String = (0..3000)
        .map(|i| format!("out {i} .......................\nerr {i} .......................\n"))
        .collect();
    let (mut shared, mut appended) = (fs::OpenOptions::new(), fs::OpenOptions::new());
    shared.write(true).create(true);
    appended.append(true).create(true);
    for open in [&shared, &appended] {
        assert_eq!(into_file("errors", open), "before\nalone\nafter\n");
        let whole = into_file("talks", open);
        assert!(whole == format!("before\n{lines}after\n"), "{} bytes", whole.len());
    }
    // What stays to copy is the small program.
    let fifo = world.path("go");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let log = shared.open(world.path("waits.log")).unwrap();
    let mut command = world.command(&["run-target", "waits"]);
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    let mut running = command.spawn().unwrap();
    // Opens once the container reads.
    let mut go = fs::OpenOptions::new().write(true).open(&fifo).unwrap();
    let copier = fs::read_link(format!("/proc/{}/exe", running.id())).unwrap();
    assert_eq!(copier, std::path::Path::new(env!("CARGO_BIN_EXE_mosfs")).canonicalize().unwrap());
    go.write_all(b"go\n").unwrap();
    drop(go);
    assert_eq!(running.wait().unwrap().code(), Some(9));
    assert_eq!(fs::read_to_string(world.path("waits.log")).unwrap(), "go\n");
    // One stream in a file to which another program writes meanwhile.
    let path = world.path("one.log");
    let mut log = shared.open(&path).unwrap();
    let mut command = world.command(&["run-target", "errors"]);
    command.stdout(log.try_clone().unwrap()).stderr(Stdio::piped());
    let mut running = command.spawn().unwrap();
    // It runs until its errors are at their end.
    let mut said = String::new();
    running.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    log.write_all(b"meanwhile\n").unwrap();
    assert!(running.wait().unwrap().success());
    log.write_all(b"after\n").unwrap();
    assert_eq!(
        (said.as_str(), fs::read_to_string(path).unwrap().as_str()),
        ("alone\n", "meanwhile\nafter\n")
    );
}

#[test]
fn a_full_file_system_is_named_and_all_works_again_once_there_is_room() {
    let mut world = World::new();
    world.script("job", "echo done > /data/log");
    world.script("idle", "while :; do sleep 0.1; done");
    // Small file systems in memory for what mosfs writes: SYSTEM, then /run/mosfs.
    let (system, run) = (world.path("system"), world.path("run"));
    let small = |path: &std::path::Path, size: &str| {
        fs::create_dir(path).unwrap();
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("mode=0755,nr_inodes=2000,size={size}"), "none"]).arg(path);
        assert!(mount.status().unwrap().success());
    };
    small(&system, "32M");
    small(&run, "1M");
    let volume = "mounts: [{destination: /data, type: volume, source: log}], nsgroup: none";
    world.install(&[("idle", "idle", ""), ("job", "job", volume)]);
    let fill = |folder: &std::path::Path| {
        let mut file = fs::File::create(folder.join("fill")).unwrap();
        // One page after the other, to the last one.
        while file.write_all(&[1; 4096]).is_ok() {}
    };
    let free = |folder: &std::path::Path| fs::remove_file(folder.join("fill")).unwrap();
    let activate = ["activate", "--floor", "file", "--backend", "fuse", "--daemon", "fork"];
    let files = |folder: &std::path::Path| {
        let output = std::process::Command::new("find").arg(folder).args(["-printf", "%P %s\n"]).output();
        let mut names: Vec<_> =
            String::from_utf8(output.unwrap().stdout).unwrap().lines().map(String::from).collect();
        names.sort();
        names
    };

    // No room for another file or folder.
    let names = system.join("names");
    fs::create_dir(&names).unwrap();
    let all = (0..).take_while(|number| fs::create_dir(names.join(number.to_string())).is_ok()).count();
    assert!(all > 1000, "{all}");
    let line = format!("target job: cannot make volume {}/volumes/log: No space left", system.display());
    world.refused(&["run-target", "job"], 1, &[&line]);
    assert!(!system.join("volumes").exists());
    world.ok(&activate);
    fs::remove_dir_all(&names).unwrap();
    // A folder of a tmpfs takes no page, so the volume is made, and its program has no room.
    fill(&system);
    assert_eq!(world.run(&["run-target", "job"]).status.code(), Some(1));
    assert_eq!(fs::read(world.path("system/volumes/log/log")).unwrap(), b"");
    world.ok(&["ps"]);
    world.ok(&["status"]);
    free(&system);
    assert_eq!(world.ok(&["run-target", "job"]), "");
    assert_eq!(fs::read_to_string(world.path("system/volumes/log/log")).unwrap(), "done\n");

    // Before it runs: a second start does not take part, and leaves no reason.
    let starting = fs::File::create(world.path("run/notes/idle.lock")).unwrap();
    starting.lock().unwrap();
    let said = format!("target idle: its container is being started by process {}", std::process::id());
    world.refused(&["run-target", "idle"], 1, &[&said]);
    assert!(!world.path("run/notes/idle.error").exists());
    drop(starting);
    let mut idle = world.command(&["run-target", "idle"]);
    let mut idle = idle.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let begin = std::time::Instant::now();
    while !world.run(&["exec", "idle", "--", "true"]).status.success() {
        assert!(begin.elapsed() < Duration::from_secs(60), "idle does not run");
        std::thread::sleep(Duration::from_millis(100));
    }
    // A second one does not end it.
    world.refused(&["run-target", "idle"], 1, &["target idle: its container runs already, as process "]);
    assert_eq!(world.ok(&["exec", "idle", "--", "echo", "runs"]), "runs\n");
    assert!(world.ok(&["ps"]).lines().any(|line| line.starts_with("idle") && line.contains(" running ")));
    let before = files(&run);
    fill(&run);
    let place = format!("cannot keep its state in {}", run.display());
    world.refused(&["run-target", "job"], 1, &["target job: ", &place, "bytes free, expected at least"]);
    let prefix =
        format!("target idle: cannot say what is to run: cannot write {}/containers/.idle.", run.display());
    world.refused(&["exec", "idle", "--", "true"], 1, &[&prefix, "No space left on device"]);
    // No empty reason, and no part of a file.
    let listed = world.ok(&["ps"]);
    assert!(listed.lines().all(|line| !line.ends_with(':') && !line.ends_with(": ")), "{listed}");
    let unmounted = std::process::Command::new("umount").arg(world.path("run/targets/job")).status().unwrap();
    assert!(unmounted.success());
    let record = format!("cannot write {}/mounts/", run.display());
    world.refused(&activate, 1, &["target job: ", &record, ".json: No space left on device"]);
    free(&run);
    world.ok(&activate);
    assert_eq!(world.ok(&["exec", "idle", "--", "echo", "again"]), "again\n");
    // But for the files of the mount that was made anew.
    let others = |names: Vec<String>| -> Vec<String> {
        names.into_iter().filter(|name| !name.starts_with("mounts")).collect()
    };
    assert_eq!(others(files(&run)), others(before));
    assert!(files(&run).iter().all(|name| !name.starts_with("mounts/.")), "{:?}", files(&run));
    assert_eq!(world.ok(&["run-target", "job"]), "");
    idle.kill().unwrap();
    idle.wait().unwrap();
}
