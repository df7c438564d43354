//! Network `simple`: a bridge, an address for each target, and published ports.
//!
//! ```text
//! mosfs0         bridge with the first address of the subnet
//! mosfs-XXXXXXXX the host's end of a target's link, by the digest of its name; the other end is the container's eth0
//! inet mosfs     one table of nftables: published ports, the way out, and no other way in
//! ```
//! The table has the rules of all targets, and is replaced whole in one transaction: no rule is ever left of what was.
//! It has a table of its own, so that others may flush theirs. Bridge and table go with the last container that
//! uses them: `RUN/notes/NAME.network` names the process of one, and counts only while that process runs, so that a
//! clean-up that was killed keeps nothing. The link ends with the container's network namespace,
//! and so with the container, however it ends.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Deserialize;

use super::places::{Places, write_note};
use super::programs;
use super::root::step;
use super::{Container, RunError};
use crate::digest::Digest;
use crate::manifest::addresses::Addresses;
use crate::manifest::{Network, Protocol, ServiceType, SystemManifest, TargetName};
use crate::sys::flock::Lock;
use crate::sys::{file, namespace, process};

/// The bridge.
pub const BRIDGE: &str = "mosfs0";
/// The table of nftables.
const TABLE: &str = "inet mosfs";
/// A published port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Who publishes it.
    pub target: TargetName,
    /// The address of the host, all of them if `None`.
    pub address: Option<String>,
    /// The port of the host.
    pub host: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// Address and port of the target.
    pub to: String,
}

/// Returns the published ports of all containers.
pub fn published(manifest: &SystemManifest, addresses: &Addresses) -> Vec<Published> {
    let containers = manifest.targets.iter().filter(|(_, one)| one.service_type == ServiceType::Container);
    let of_one = |(name, target): (&TargetName, &crate::manifest::Target)| {
        let Network::Simple { ports: Some(ports), .. } = &target.network else { return Vec::new() };
        let Some(address) = addresses.of.get(name) else { return Vec::new() };
        let one = |port: &crate::manifest::Port| Published {
            target: name.clone(),
            address: port.address.clone(),
            host: port.host,
            protocol: port.protocol.unwrap_or(Protocol::Tcp),
            to: format!("{address}:{}", port.container),
        };
        ports.iter().map(one).collect()
    };
    containers.flat_map(of_one).collect()
}

/// Returns a sentence for each published port of a container that a program of the host listens on.
///
/// Both may have it: what is sent there goes to the container, and the program is not reached any more.
pub fn taken(container: &Container) -> Vec<String> {
    let own = container.published.iter().filter(|one| one.target == container.name);
    let sentence = |one: &Published| {
        let protocol = one.protocol;
        let tables = ["", "6"].map(|version| format!("/proc/net/{protocol}{version}"));
        let read = |path: &String| String::from_utf8(std::fs::read(path).ok()?).ok();
        let mut listens = tables.iter().filter_map(read).flat_map(|table| listening(&table, protocol));
        let (address, _) = listens.find(|(address, port)| {
            let given = one.address.as_ref().and_then(|text| text.parse::<Ipv4Addr>().ok());
            *port == one.host && (address.is_unspecified() || given.is_none_or(|given| given == *address))
        })?;
        Some(format!(
            "target {} publishes port {}/{protocol}, and a program of the host listens on {address}:{}: what is sent \
             there reaches the target instead",
            one.target, one.host, one.host
        ))
    };
    own.filter_map(sentence).collect()
}

/// The addresses of IPv4 and ports that a table of sockets of the kernel (proc(5), /proc/net/tcp) has listeners for.
fn listening(table: &str, protocol: Protocol) -> Vec<(Ipv4Addr, u16)> {
    // TCP_LISTEN; a socket of UDP that is not connected is in TCP_CLOSE (net/tcp_states.h).
    let state = if protocol == Protocol::Tcp { "0A" } else { "07" };
    let one = |line: &str| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (address, port) = words.next()?.split_once(':')?;
        if words.nth(1)? != state {
            return None;
        }
        // Words of 32 bits, as this machine stores them. Of IPv6, the address of all, and those of IPv4 that are mapped.
        let word = |at: usize| u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok();
        let last = match address.len() {
            8 => word(0)?,
            32 if (word(0)?, word(1)?) == (0, 0) && [0, 0xffff_u32.to_be()].contains(&word(2)?) => word(3)?,
            _ => return None,
        };
        // ::1 is loopback of IPv6 alone.
        let address = Ipv4Addr::from(last.to_ne_bytes());
        if address == Ipv4Addr::new(0, 0, 0, 1) {
            return None;
        }
        Some((address, u16::from_str_radix(port, 16).ok()?))
    };
    table.lines().filter_map(one).collect()
}

/// Returns the whole table, as nft(8) reads it.
pub fn rules(addresses: &Addresses, published: &[Published]) -> String {
    let subnet = addresses.subnet;
    // To add and delete it makes a table that is not there no error.
    let mut text = format!("add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n");
    let mut chain = |name: &str, hook: &str, lines: &[String]| {
        let _ = writeln!(text, "  chain {name} {{\n    type {hook}; policy accept;");
        lines.iter().for_each(|line| _ = writeln!(text, "    {line}"));
        text.push_str("  }\n");
    };
    let forwarded: Vec<String> = published
        .iter()
        .map(|one| {
            let to_host = one.address.as_ref().map_or_else(
                || "meta nfproto ipv4 fib daddr type local".to_string(),
                |address| format!("ip daddr {address}"),
            );
            format!("{to_host} {} dport {} dnat ip to {}", one.protocol, one.host, one.to)
        })
        .collect();
    chain("prerouting", "nat hook prerouting priority dstnat", &forwarded);
    // What the host itself sends does not pass prerouting. The number of dstnat, whose name nft does not know here.
    chain("output", "nat hook output priority -100", &forwarded);
    chain(
        "postrouting",
        "nat hook postrouting priority srcnat",
        &[
            format!("ip saddr {subnet} oifname != \"{BRIDGE}\" masquerade"),
            // From the host's loopback, which has no way back from a container.
            format!("ip saddr 127.0.0.0/8 oifname \"{BRIDGE}\" masquerade"),
            // From a container to a published port: the answer must come back over the host.
            format!("ip saddr {subnet} oifname \"{BRIDGE}\" ct status dnat masquerade"),
        ],
    );
    chain(
        "forward",
        "filter hook forward priority filter",
        &[
            format!("iifname \"{BRIDGE}\" oifname \"{BRIDGE}\" accept"),
            format!("oifname \"{BRIDGE}\" ct state established,related accept"),
            format!("oifname \"{BRIDGE}\" ct status dnat accept"),
            // Rule: from outside, a target is reached over its published ports alone.
            format!("oifname \"{BRIDGE}\" drop"),
        ],
    );
    text.push_str("}\n");
    text
}

/// Runs ip or nft with this text on its standard input.
fn feed(program: &str, arguments: &[&str], text: &str) -> Result<(), String> {
    let path = programs::find(program).ok_or_else(|| format!("the program {program} is not installed"))?;
    let mut command = Command::new(path);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("cannot run {program}: {error}"))?;
    if let Some(mut input) = child.stdin.take() {
        // Where it ends early, its own words say why.
        let _ = input.write_all(text.as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| format!("cannot run {program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

fn exists(interface: &str) -> bool {
    Path::new("/sys/class/net").join(interface).exists()
}

/// Makes the bridge and the table as they should be. May run at any time, also several times at once.
///
/// # Errors
/// What ip(8), nft(8) or the kernel say.
pub fn set_up(addresses: &Addresses, published: &[Published]) -> Result<(), String> {
    if !exists(BRIDGE)
        && let Err(why) = feed("ip", &["-batch", "-"], &format!("link add {BRIDGE} type bridge\n"))
        // Another one may have been faster.
        && !exists(BRIDGE)
    {
        return Err(why);
    }
    let subnet = addresses.subnet;
    let commands = format!(
        "link set {BRIDGE} address {}\naddress replace {}/{} dev {BRIDGE}\nlink set {BRIDGE} up\n",
        hardware_address(subnet.gateway()),
        subnet.gateway(),
        subnet.bits
    );
    feed("ip", &["-batch", "-"], &commands)?;
    // Packets go on from one interface to another, and from the host's loopback to a container.
    for setting in ["ip_forward".to_string(), format!("conf/{BRIDGE}/route_localnet")] {
        let path = format!("/proc/sys/net/ipv4/{setting}");
        if std::fs::read(&path).is_ok_and(|text| text.trim_ascii() == b"1") {
            continue;
        }
        std::fs::write(&path, "1").map_err(|error| format!("cannot write {path}: {error}"))?;
    }
    feed("nft", &["-f", "-"], &rules(addresses, published))
}

/// Makes bridge and table for a container that is about to start in the place of this process, and marks that it uses
/// them.
///
/// # Errors
/// As [`set_up`].
pub fn join(
    places: &Places,
    target: &str,
    addresses: &Addresses,
    published: &[Published],
) -> Result<(), String> {
    let _lock = lock(places)?;
    let mark = places.network(target);
    // The runtime will have the same number, or be a child of this process.
    let pid = std::process::id();
    let started = process::started_at(pid).unwrap_or_default();
    write_note(&mark, &format!("{pid} {started}\n")).map_err(|error| error.to_string())?;
    set_up(addresses, published)
}

/// Notes that a container has ended; removes bridge and table with the last one that used them.
///
/// # Errors
/// As [`tear_down`].
pub fn leave(places: &Places, target: &str) -> Result<(), String> {
    let mark = places.network(target);
    if !mark.exists() {
        return Ok(());
    }
    let _lock = lock(places)?;
    let _ = std::fs::remove_file(&mark);
    if users(places, &mark) == 0 { tear_down() } else { Ok(()) }
}

/// Removes the marks of containers that have ended, and bridge and table if no container uses them.
///
/// # Errors
/// As [`tear_down`].
pub fn tidy(places: &Places) -> Result<(), String> {
    let _lock = lock(places)?;
    if users(places, &places.network("any")) == 0 { tear_down() } else { Ok(()) }
}

/// How many containers use the bridge. Removes the marks of those that have ended; call it under the lock.
fn users(places: &Places, mark: &Path) -> usize {
    let folder = mark.parent().unwrap_or(&places.run);
    let marks = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut count = 0;
    for path in marks.filter(|path| path.extension() == mark.extension()) {
        if is_used(&path) {
            count += 1;
        } else {
            let _ = std::fs::remove_file(&path);
        }
    }
    count
}

/// Whether the process that made this mark still runs. A mark that cannot be read counts.
fn is_used(mark: &Path) -> bool {
    let text = file::find_regular(mark, file::Links::Refused, 200).ok().flatten().unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let numbers = text
        .trim()
        .split_once(' ')
        .and_then(|(pid, started)| Some((pid.parse::<u32>().ok()?, started.parse::<u64>().ok()?)));
    numbers.is_none_or(|(pid, started)| process::started_at(pid) == Some(started))
}

/// So that none joins while the last one leaves.
fn lock(places: &Places) -> Result<Lock, String> {
    let path = places.run.join("network.lock");
    Lock::exclusive(&path).map_err(|error| format!("cannot lock {}: {error}", path.display()))
}

/// Removes bridge and table, where no target has network `simple`.
///
/// # Errors
/// As [`set_up`].
pub fn tear_down() -> Result<(), String> {
    if !exists(BRIDGE) {
        return Ok(());
    }
    feed("nft", &["-f", "-"], &format!("add table {TABLE}\ndelete table {TABLE}\n"))?;
    feed("ip", &["-batch", "-"], &format!("link delete {BRIDGE}\n"))
}

/// The hardware address of an interface, by its IPv4 address.
///
/// What has cached it reaches the next container with the same address at once. With a random one, a restarted container
/// would be out of reach until the caches of its peers expire, up to 45 s (arp(7)); and a bridge without one of its own
/// takes that of a port, and changes it as ports come and go.
fn hardware_address(address: Ipv4Addr) -> String {
    // Locally administered, unicast.
    let [a, b, c, d] = address.octets();
    format!("02:6d:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// The name of the host's end of a target's link: at most 15 characters (IFNAMSIZ).
pub fn link(target: &str) -> String {
    format!("mosfs-{}", &Digest::of(target.as_bytes()).hex()[..8])
}

/// Returns the arguments of `mosfs` that connect a container, for the runtime to call when its namespaces are made.
pub fn connect_arguments(target: &TargetName, addresses: &Addresses) -> Option<Vec<String>> {
    let address = addresses.of.get(target)?;
    let text = format!("{address}/{},{}", addresses.subnet.bits, addresses.subnet.gateway());
    Some(vec!["run-target".into(), "--connect".into(), text, target.to_string()])
}

/// Connects the network namespace of a container that is being made; the runtime calls it, with its state on `input`.
///
/// Only for a process with one thread, which ends afterwards: it moves to that namespace.
///
/// # Errors
/// [`RunError::Step`].
pub fn connect(target: &str, text: &str, input: &mut dyn Read) -> Result<(), RunError> {
    #[derive(Deserialize)]
    struct State {
        pid: u32,
    }
    let failed = |why: String| step::<String>(target, "connect its network")(why);
    let (address, gateway) = text.split_once(',').ok_or_else(|| failed(format!("no address in {text:?}")))?;
    let State { pid } =
        serde_json::from_reader(input.take(1 << 20)).map_err(|error| failed(error.to_string()))?;
    let link = link(target);
    if exists(&link) {
        // Of a container that was killed a moment ago, and that the kernel has not removed yet.
        let _ = feed("ip", &["-batch", "-"], &format!("link delete {link}\n"));
    }
    let own = address.split_once('/').and_then(|(own, _)| own.parse().ok());
    let hardware = hardware_address(own.ok_or_else(|| failed(format!("no address in {text:?}")))?);
    let commands = format!(
        "link add {link} type veth peer name eth0 address {hardware} netns {pid}\nlink set {link} master {BRIDGE}\n\
         link set {link} type bridge_slave hairpin on\nlink set {link} up\n"
    );
    feed("ip", &["-batch", "-"], &commands).map_err(failed)?;
    namespace::enter_network_of(pid).map_err(|error| failed(error.to_string()))?;
    let commands = format!(
        "address add {address} dev eth0\nlink set eth0 up\nlink set lo up\nroute add default via {gateway}\n"
    );
    feed("ip", &["-batch", "-"], &commands).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::manifest::addresses;
    use crate::run::tests::system;

    fn table(targets: &[(&str, &str)]) -> String {
        let manifest = system(targets);
        let networks = manifest.targets.iter().map(|(name, one)| (name, &one.network));
        let addresses = addresses::assign(networks, &BTreeMap::new()).unwrap();
        rules(&addresses, &published(&manifest, &addresses))
    }

    const TARGETS: [(&str, &str); 2] = [
        (
            "dns",
            "service_type: container, network: {type: simple, ports: [{host: 53, container: 5353, protocol: udp}]}",
        ),
        (
            "web",
            "service_type: container, network: {type: simple, ports: [{host: 80, container: 8080}, \
             {host: 81, container: 8081, address: 192.0.2.7}]}",
        ),
    ];

    #[test]
    #[cfg(target_endian = "little")]
    fn listeners_are_read_from_the_kernel_s_tables() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n";
        let tcp = format!(
            "{head}   0: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n\
             \x20  1: 00000000:07E8 00000000:0000 0A 00000000:00000000\n\
             \x20  2: 0100007F:1F90 0100007F:C350 01 00000000:00000000\n  3: broken\n  4: 00:1 0:0 0A\n"
        );
        let all = |table: &str, protocol| -> Vec<String> {
            listening(table, protocol).iter().map(|(address, port)| format!("{address}:{port}")).collect()
        };
        assert_eq!(all(&tcp, Protocol::Tcp), ["127.0.0.1:80", "0.0.0.0:2024"]);
        let tcp6 = format!(
            "{head} 0: 00000000000000000000000000000000:0016 0:0 0A\n 1: 00000000000000000000000001000000:0017 0:0 0A\n\
             \x20 2: 0000000000000000FFFF0000070200C0:0018 0:0 0A\n 3: B80D0120000000000000000001000000:0019 0:0 0A\n"
        );
        assert_eq!(all(&tcp6, Protocol::Tcp), ["0.0.0.0:22", "192.0.2.7:24"]);
        let udp = format!("{head} 0: 3500007F:0035 00000000:0000 07\n 1: 0100007F:0036 0200007F:0035 01\n");
        assert_eq!(all(&udp, Protocol::Udp), ["127.0.0.53:53"]);
    }

    #[test]
    fn the_table_is_replaced_whole_and_lets_nothing_else_in() {
        let text = table(&TARGETS);
        assert!(
            text.starts_with("add table inet mosfs\ndelete table inet mosfs\ntable inet mosfs {\n"),
            "{text}"
        );
        for (line, times) in [
            // For what comes from outside, and for what the host sends.
            ("meta nfproto ipv4 fib daddr type local udp dport 53 dnat ip to 10.0.3.2:5353", 2),
            ("meta nfproto ipv4 fib daddr type local tcp dport 80 dnat ip to 10.0.3.3:8080", 2),
            ("ip daddr 192.0.2.7 tcp dport 81 dnat ip to 10.0.3.3:8081", 2),
            ("ip saddr 10.0.3.0/24 oifname != \"mosfs0\" masquerade", 1),
            ("ip saddr 127.0.0.0/8 oifname \"mosfs0\" masquerade", 1),
            ("ip saddr 10.0.3.0/24 oifname \"mosfs0\" ct status dnat masquerade", 1),
            ("oifname \"mosfs0\" drop", 1),
        ] {
            assert_eq!(text.lines().filter(|one| one.trim() == line).count(), times, "{line}\n{text}");
        }
        // What is refused comes after what is allowed.
        let at = |line: &str| text.find(line).unwrap();
        assert!(at("oifname \"mosfs0\" ct status dnat accept") < at("oifname \"mosfs0\" drop"));
    }

    #[test]
    fn nft_reads_the_table() {
        for targets in [&TARGETS[..], &[("a", "service_type: container")]] {
            let text = table(targets);
            // In a network namespace of its own, which needs no rights on this machine's.
            let mut command = Command::new("unshare");
            command.args(["--net", "nft", "--check", "--file", "-"]);
            command.stdin(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().unwrap();
            child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
            let output = child.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "nft (Debian package nftables): {said}\n{text}");
        }
    }

    #[test]
    fn links_have_names_that_the_kernel_takes() {
        let name = link("a-very-long-name-of-a-target-that-has-63-characters-at-most");
        assert!(name.len() <= 15 && name.starts_with("mosfs-"), "{name}");
        assert_ne!(name, link("web"));
    }
}
