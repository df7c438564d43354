//! Containers that cannot start, and what is said and left of those that have ended, with the real crun.

#[path = "common/container.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod container;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
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
    assert_eq!(fs::read_to_string(world.path("run/notes/web.result")).unwrap(), "exit-code\n");
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
