//! Network `simple` with the real `ip`, `nft` and crun: from outside, from the host, between targets, and after a crash.
//!
//! All of it runs in a network namespace of the test's own, which is "the host"; another one is the outside.

#[path = "common/container.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod container;
#[path = "common/networks.rs"]
mod networks;

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use container::World;
use networks::{Networks, Running, output, wait_until};

/// A command that prints what a web server answers. Not busybox: its static libc loads the host's modules for names.
fn fetch(address: &str, seconds: u32) -> String {
    format!(
        "python3 -c 'import urllib.request as r; \
         print(r.urlopen(\"http://{address}/\", timeout={seconds}).read().decode(), end=\"\")'"
    )
}

#[test]
fn targets_are_reached_over_their_published_ports_and_reach_each_other_by_name() {
    let mut world = World::new();
    world.script(
        "web",
        "mkdir /tmp/www && echo \"this is web\" > /tmp/www/index.html && httpd -f -p 8080 -h /tmp/www",
    );
    world.script("idle", "while :; do sleep 0.1; done");
    let health = "health: {command: [/bin/wget, -q, -O, /dev/null, 'http://127.0.0.1:8080/'], interval: 1s}";
    let web = format!("network: {{type: simple, ports: [{{host: 80, container: 8080}}]}}, {health}");
    world.install(&[
        ("idle_2.b", "idle", "network: {type: simple, ipv4: 10.0.3.99/24}"),
        ("lonely", "idle", "network: {type: none}"),
        ("web", "web", &web),
    ]);
    let networks = Networks::new();
    let web = Running::start(&networks, &world, "web");
    let idle = Running::start(&networks, &world, "idle_2.b");
    let _lonely = Running::start(&networks, &world, "lonely");
    let fetch = |address: &str| fetch(address, 20);
    // From outside; from the host, to its address and to its loopback.
    assert_eq!(networks.outside(&fetch("192.0.2.1")), "this is web\n");
    assert_eq!(networks.on_host(&fetch("192.0.2.1")), "this is web\n");
    assert_eq!(networks.on_host(&fetch("127.0.0.1")), "this is web\n");
    let exec = |target: &str, script: &str| {
        output(&mut networks.mosfs(&world, &["exec", target, "--", "sh", "-c", script]))
    };
    // From another target by name, to the published port, and from itself to its own published port.
    // (addresses and ports as numbers: see `fetch`)
    let by_name = "set -- $(grep -w web /etc/hosts); wget -q -O - http://$1:8080/";
    assert_eq!(exec("idle_2.b", by_name), "this is web\n");
    assert_eq!(exec("idle_2.b", "wget -q -O - http://192.0.2.1:80/"), "this is web\n");
    assert_eq!(exec("web", "wget -q -O - http://192.0.2.1:80/"), "this is web\n");
    // A name with all that names may have, which is also the name of its host.
    assert_eq!(exec("idle_2.b", "hostname"), "idle_2.b\n");
    assert_eq!(exec("web", "grep -w idle_2.b /etc/hosts"), "10.0.3.99 idle_2.b\n");
    // To the outside, behind the host's address.
    std::fs::write(world.path("index.html"), "this is outside\n").unwrap();
    let mut server = Networks::enter(&networks.outside);
    server.args([
        "python3",
        "-m",
        "http.server",
        "--bind",
        "192.0.2.2",
        "8000",
        "--directory",
        &world.dir(""),
    ]);
    let mut server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("a server outside", || {
        let client = "wget -q -O - http://192.0.2.2:8000/index.html || true";
        exec("idle_2.b", client) == "this is outside\n"
    });
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(exec("idle_2.b", "ip address show dev eth0").contains("10.0.3.99/24"));
    assert_eq!(exec("lonely", "ls /sys/class/net"), "lo\n");
    // Not published: not reached, although the outside has a route.
    let web_itself = self::fetch("10.0.3.2:8080", 3);
    let direct = networks
        .outside(&format!("ip route add 10.0.3.0/24 via 192.0.2.1; {web_itself} 2>/dev/null || echo no"));
    assert!(direct.ends_with("no\n") && !direct.contains("this is web"), "{direct}");
    // The rules of another program's flush come back with the next start; nothing is left of a killed one.
    networks.on_host("nft flush ruleset");
    drop(web);
    let links = || networks.on_host("ls /sys/class/net | grep -c ^mosfs- || true");
    wait_until("the end of the killed container's link", || links() == "1\n");
    let web = Running::start(&networks, &world, "web");
    // At once: whoever has cached its hardware address reaches the new one.
    assert_eq!(exec("idle_2.b", "cat /proc/net/arp | grep -c 02:6d:0a:00:03:02"), "1\n");
    assert_eq!(exec("web", "cat /sys/class/net/eth0/address"), "02:6d:0a:00:03:02\n");
    assert_eq!(networks.outside(&fetch("192.0.2.1")), "this is web\n");
    assert_eq!(links(), "2\n");
    let table = networks.on_host("nft list ruleset");
    assert_eq!(table.matches("dport 80 dnat").count(), 2, "{table}");
    // The clean-up of one leaves the network to the other. The other's was killed, too, and keeps nothing.
    let clean = |target: &str| output(&mut networks.mosfs(&world, &["run-target", "--clean", target]));
    let bridge = || networks.on_host("ls /sys/class/net | grep -c '^mosfs0$' || true");
    drop(web);
    clean("web");
    assert_eq!(bridge(), "1\n");
    drop(idle);
    assert_eq!(bridge(), "1\n");
    // Without a mark of its own, it has nothing to leave.
    clean("web");
    assert_eq!(bridge(), "1\n");
    let web = Running::start(&networks, &world, "web");
    assert_eq!(networks.outside(&fetch("192.0.2.1")), "this is web\n");
    drop(web);
    clean("web");
    assert_eq!((bridge().as_str(), links().as_str()), ("0\n", "0\n"));
    assert!(!networks.on_host("nft list ruleset").contains("mosfs"));
    let left = std::fs::read_dir(world.path("run/notes")).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().ends_with(".network")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_published_port_that_a_program_of_the_host_listens_on_is_noted() {
    let mut world = World::new();
    world.script("web", "exit 0");
    let ports = "{host: 80, container: 80}, {host: 81, container: 81, address: 192.0.2.1}, {host: 82, container: 82}, \
                 {host: 83, container: 83, address: 192.0.2.1}, {host: 84, container: 84, protocol: udp}";
    world.install(&[
        ("plain", "web", "network: {type: none}"),
        ("other", "web", "network: {type: simple, ports: [{host: 85, container: 85}]}"),
        ("web", "web", &format!("network: {{type: simple, ports: [{ports}]}}")),
    ]);
    let networks = Networks::new();
    let said = |target: &str| {
        let output = networks.mosfs(&world, &["run-target", target]).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        said
    };
    assert_eq!(said("web"), "");
    // 81: another address than the published one. 82: the other protocol. 85: of another target.
    let server = "import socket, sys, time\n\
        held = []\n\
        for kind, address, port in [('t', '127.0.0.1', 80), ('t', '127.0.0.1', 81), ('u', '0.0.0.0', 82), \
                                    ('t', '::', 83), ('u', '192.0.2.1', 84), ('t', '0.0.0.0', 85)]:\n    \
            family = socket.AF_INET6 if ':' in address else socket.AF_INET\n    \
            one = socket.socket(family, socket.SOCK_STREAM if kind == 't' else socket.SOCK_DGRAM)\n    \
            one.bind((address, port))\n    \
            if kind == 't': one.listen()\n    \
            held.append(one)\n\
        print('ready', flush=True)\n\
        time.sleep(3600)";
    let mut holder = Networks::enter(&networks.host);
    holder.args(["python3", "-c", server]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut holder = holder.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let noted: String = [("80/tcp", "127.0.0.1:80"), ("83/tcp", "0.0.0.0:83"), ("84/udp", "192.0.2.1:84")]
        .iter()
        .map(|(port, listener)| {
            format!(
                "mosfs: note: target web publishes port {port}, and a program of the host listens on {listener}: what is \
                 sent there reaches the target instead\n"
            )
        })
        .collect();
    let found = [said("web"), said("plain")];
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!(found, [noted, String::new()]);
    assert_eq!(said("web"), "");
}

#[test]
fn a_port_of_udp_is_published_too() {
    let mut world = World::new();
    // A program of the host's Python, which has sockets of all kinds.
    let server = "import socket\n\
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
        one.bind(('0.0.0.0', 5353))\n\
        while True:\n    \
            data, peer = one.recvfrom(100)\n    \
            one.sendto(b'heard ' + data, peer)";
    let config = serde_json::json!({ "Cmd": ["/usr/bin/python3", "-I", "-c", server] });
    world.image("dns", &config, |root| container::busybox(root, |_| ()));
    let bind = |path: &str| format!("{{destination: {path}, source: {path}, options: [ro]}}");
    let mounts = ["/usr", "/lib", "/lib64"].map(bind).join(", ");
    let network = "network: {type: simple, ports: [{host: 53, container: 5353, protocol: udp}]}";
    world.install(&[("dns", "dns", &format!("{network}, mounts: [{mounts}]"))]);
    let networks = Networks::new();
    let _dns = Running::start(&networks, &world, "dns");
    let ask = "python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(1); \
               s.sendto(b\"you\", (\"192.0.2.1\", 53)); print(s.recv(100).decode())' 2>/dev/null || true";
    // Until the program listens.
    wait_until("an answer outside", || networks.outside(ask) == "heard you\n");
    wait_until("an answer on the host", || networks.on_host(ask) == "heard you\n");
    // The same number of the other protocol is not published.
    let tcp = "python3 -c 'import socket; socket.create_connection((\"192.0.2.1\", 53), 3)' 2>&1 | tail -n 1";
    assert!(networks.outside(tcp).contains("refused"));
}

#[test]
fn the_examples_of_the_page_run() {
    let page = include_str!("../docs/containers.md");
    let examples: String =
        page.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    let mut world = World::new();
    world.script(
        "web",
        "echo \"starts\" >> /data/log; cp /data/log /tmp/index.html; httpd -f -p 8080 -h /tmp",
    );
    world.script("db", "echo yes > /tmp/ready; while :; do sleep 0.1; done");
    world.script("app", "while :; do sleep 0.1; done");
    world.script("job", "false");
    let import = world.manifest(1, &[]);
    let indented: String = examples.lines().map(|line| format!("  {line}\n")).collect();
    let layout = world.images.url("");
    let yaml = std::fs::read_to_string(&import).unwrap() + &indented.replace("oci:/srv/layout:", &layout);
    std::fs::write(&import, yaml).unwrap();
    world.install_file(&import);
    let networks = Networks::new();
    output(&mut networks.mosfs(&world, &["run-target", "job"]));
    assert_eq!(std::fs::read_to_string(world.path("system/volumes/log/log")).unwrap(), "cleaned\n");
    for starts in 1..=2 {
        let _web = Running::start(&networks, &world, "web");
        let text = networks.outside(&fetch("192.0.2.1", 20));
        assert_eq!(text, "starts\n".repeat(starts), "the volume stays");
    }
    let _db = Running::start(&networks, &world, "db");
    let _app = Running::start(&networks, &world, "app");
    let names = output(&mut networks.mosfs(&world, &["exec", "app", "--", "cat", "/etc/hosts"]));
    for line in ["10.0.3.2 app", "10.0.3.3 db", "10.0.3.4 web"] {
        assert!(names.lines().any(|one| one == line), "{line}: {names}");
    }
}
