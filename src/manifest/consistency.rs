//! What the targets of a system must agree on, and what a container may mount.
//!
//! `mosfs manifest check` and `mosfs build` refuse a manifest that breaks a rule here, with the position. A signed
//! system manifest is read without them, since older ones were made without them; a container that breaks one is
//! refused when it is to run.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use super::addresses;
use super::rules;
use super::{Mount, Network, Protocol, ServiceType, Target, TargetName, Workload};
use crate::sorting;

/// What is checked of a target.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// How it is used.
    pub service_type: ServiceType,
    /// Its network.
    pub network: &'a Network,
    /// Its mounts.
    pub mounts: &'a [Mount],
    /// What it runs.
    pub workload: &'a Workload,
}

/// What is checked of a type of target.
macro_rules! view {
    ($type:ty) => {
        impl<'a> From<&'a $type> for $crate::manifest::consistency::View<'a> {
            fn from(target: &'a $type) -> Self {
                Self {
                    service_type: target.service_type,
                    network: &target.network,
                    mounts: target.mounts.as_deref().unwrap_or_default(),
                    workload: &target.workload,
                }
            }
        }
    };
}
pub(super) use view;

view!(Target);

/// A step of the path to a field of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A field of a mapping.
    Field(&'static str),
    /// An item of a list, counted from 0.
    Item(usize),
}

/// A rule that a target breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("target {target}, {}: found {found}; allowed: {allowed}", self.field())]
pub struct Finding {
    /// The target.
    pub target: TargetName,
    /// The field of the target.
    pub path: Vec<Step>,
    /// What was found.
    pub found: String,
    /// What is allowed.
    pub allowed: String,
}

impl Finding {
    /// The path of the field within the target: `network.ports[0].host`.
    pub fn field(&self) -> String {
        self.path.iter().fold(String::new(), |text, step| match step {
            Step::Field(name) if text.is_empty() => (*name).to_string(),
            Step::Field(name) => format!("{text}.{name}"),
            Step::Item(index) => format!("{text}[{index}]"),
        })
    }
}

/// Returns all broken rules, in the order of names.
pub fn check<'a>(targets: impl Iterator<Item = (&'a TargetName, View<'a>)>) -> Vec<Finding> {
    let targets: BTreeMap<&TargetName, View<'_>> = sorting::map(targets);
    let mut findings = Vec::new();
    let mut find = |target: &TargetName, path: Vec<Step>, found: String, allowed: String| {
        findings.push(Finding { target: target.clone(), path, found, allowed });
    };
    ports(&targets, &mut find);
    let networks = targets.iter().map(|(name, view)| (*name, view.network));
    for bad in addresses::assign(networks, &BTreeMap::new()).err().into_iter().flatten() {
        find(&bad.target, vec![Step::Field("network"), Step::Field("ipv4")], bad.found, bad.allowed);
    }
    names(&targets, &mut find);
    needs(&targets, &mut find);
    for (name, view) in targets.iter().filter(|(_, view)| view.service_type == ServiceType::Container) {
        for (path, found, allowed) in workload_problems(view.workload) {
            find(name, path, found, allowed.into());
        }
        let mut destinations = BTreeMap::new();
        for (index, mount) in view.mounts.iter().enumerate() {
            for (field, found, allowed) in mount_problems(mount, &targets) {
                let path = vec![Step::Field("mounts"), Step::Item(index), Step::Field(field)];
                find(name, path, found, allowed);
            }
            if let Some(first) = destinations.insert(normal(&mount.destination), index) {
                let path = vec![Step::Field("mounts"), Step::Item(index), Step::Field("destination")];
                let found = format!("a second mount at {}", mount.destination);
                find(name, path, found, format!("one mount at each place; mounts[{first}] is there"));
            }
        }
    }
    sorting::sort_by(&mut findings, |a, b| a.target.cmp(&b.target));
    findings
}

/// Rule: a port of the host leads to one target.
fn ports(
    targets: &BTreeMap<&TargetName, View<'_>>,
    find: &mut impl FnMut(&TargetName, Vec<Step>, String, String),
) {
    let mut taken: BTreeMap<(u16, Protocol), Vec<(Option<&str>, &TargetName)>> = BTreeMap::new();
    for (name, view) in targets {
        let Network::Simple { ports: Some(ports), .. } = view.network else { continue };
        for (index, port) in ports.iter().enumerate() {
            let protocol = port.protocol.unwrap_or(Protocol::Tcp);
            let address = port.address.as_deref();
            let path = |field| {
                let path = ["network", "ports"].map(Step::Field).into_iter();
                path.chain([Step::Item(index), Step::Field(field)]).collect()
            };
            // Rule: an address of this host, which packets can have been sent to. `0.0.0.0` matches none.
            let parsed = address.and_then(|address| address.parse::<Ipv4Addr>().ok());
            if let Some(address) = parsed.filter(|address| !is_of_host(*address)) {
                let allowed = "an address of the host; leave `address` out for all of them";
                find(name, path("address"), format!("`{address}`"), allowed.into());
            }
            let others = taken.entry((port.host, protocol)).or_default();
            let clash =
                others.iter().find(|(other, _)| other.is_none() || address.is_none() || *other == address);
            if let Some((_, other)) = clash {
                let found = format!("port {}/{protocol}", port.host);
                let allowed = if other == name {
                    "each port of the host once".to_string()
                } else {
                    format!("a port that no other target publishes; {other} publishes it")
                };
                find(name, path("host"), found, allowed);
            }
            others.push((address, name));
        }
    }
}

/// Whether a host may have an address, on whatever interface.
fn is_of_host(address: Ipv4Addr) -> bool {
    address.is_loopback() || addresses::is_for_hosts(address)
}

/// Names that every /etc/hosts has.
const OF_HOSTS: [&str; 3] = ["localhost", "ip6-localhost", "ip6-loopback"];

/// Rule: a target with network `simple` is reached by its name, which therefore means nothing else.
fn names(
    targets: &BTreeMap<&TargetName, View<'_>>,
    find: &mut impl FnMut(&TargetName, Vec<Step>, String, String),
) {
    for (name, view) in targets {
        let text = name.as_str();
        if matches!(view.network, Network::Simple { .. })
            && (OF_HOSTS.contains(&text) || rules::is_address(text))
        {
            let allowed =
                "a name that other targets can look up: not localhost, and not an address or a number";
            find(
                name,
                vec![Step::Field("network"), Step::Field("type")],
                format!("type simple for a target with the name `{text}`"),
                allowed.into(),
            );
        }
    }
}

/// The least memory that a target can be started in, in bytes: the runtime is in the same control group.
const LEAST_MEMORY: u64 = 1 << 20;
/// The fewest processes that a target can be started with: the runtime, the wait for its health, what that runs, and
/// the program.
const FEWEST_TASKS: u64 = 4;
/// The most processes that the kernel counts (PID_MAX_LIMIT in linux/threads.h). It refuses a larger limit, so that there
/// would be none.
const MOST_TASKS: u64 = 4 << 20;

/// Rule: a limit is one that a container can be started with and that the kernel enforces; no list has an entry twice.
fn workload_problems(workload: &Workload) -> Vec<(Vec<Step>, String, &'static str)> {
    let mut problems = Vec::new();
    let resources = workload.resources.clone().unwrap_or_default();
    let path = |field| vec![Step::Field("resources"), Step::Field(field)];
    if let Some(memory) = resources.memory
        && rules::size(&memory).is_ok_and(|bytes| bytes < LEAST_MEMORY)
    {
        problems.push((path("memory"), format!("`{memory}`"), "at least 1M"));
    }
    if let Some(tasks) = resources.tasks.filter(|tasks| !(FEWEST_TASKS..=MOST_TASKS).contains(tasks)) {
        problems.push((path("tasks"), format!("`{tasks}`"), "an integer from 4 to 4194304"));
    }
    for (field, list) in [("devices", &workload.devices), ("secrets", &workload.secrets)] {
        let mut seen = BTreeSet::new();
        for (index, one) in list.iter().flatten().enumerate() {
            if !seen.insert(one) {
                let path = vec![Step::Field(field), Step::Item(index)];
                problems.push((path, format!("`{one}` a second time"), "each once"));
            }
        }
    }
    problems
}

/// Rule: a target needs other containers, and none of them needs it.
fn needs(
    targets: &BTreeMap<&TargetName, View<'_>>,
    find: &mut impl FnMut(&TargetName, Vec<Step>, String, String),
) {
    let of = |name: &TargetName| targets.get(name).map(|view| view.workload.needs()).unwrap_or_default();
    for (name, view) in targets {
        for (index, needed) in view.workload.needs().iter().enumerate() {
            let path = || vec![Step::Field("needs"), Step::Item(index)];
            match targets.get(needed) {
                None => find(name, path(), format!("`{needed}`"), "a target of this system".into()),
                Some(other) if other.service_type != ServiceType::Container => {
                    let found = format!("`{needed}`, which has service_type {}", other.service_type);
                    find(name, path(), found, "a target with service_type container".into());
                }
                Some(_) => {
                    // Everything that is needed, directly or not.
                    let (mut seen, mut left) = (BTreeSet::new(), vec![needed]);
                    while let Some(one) = left.pop() {
                        if seen.insert(one) {
                            left.extend(of(one));
                        }
                    }
                    if seen.contains(name) {
                        let found = format!("`{needed}`, which needs `{name}`");
                        find(name, path(), found, "targets that do not need this one".into());
                    }
                }
            }
        }
    }
}

/// A path without empty parts and `.`.
pub fn normal(path: &str) -> String {
    path.split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .fold(String::new(), |all, part| format!("{all}/{part}"))
}

/// Most bytes of a name in a path (NAME_MAX of linux/limits.h).
const MAX_PART: usize = 255;
/// The types of mounts that a container may have.
const TYPES: &str = "bind, tmpfs, volume, target";
/// Options without a value. `bind` and `rbind` say what type bind does in any case.
const FLAGS: [&str; 7] = ["ro", "rw", "nosuid", "nodev", "noexec", "bind", "rbind"];

/// Rule: a container mounts what mosfs can mount for it, with the options that mosfs knows.
fn mount_problems(
    mount: &Mount,
    targets: &BTreeMap<&TargetName, View<'_>>,
) -> Vec<(&'static str, String, String)> {
    let mut problems = Vec::new();
    let mut problem =
        |field, found: String, allowed: &str| problems.push((field, found, allowed.to_string()));
    let destination = normal(&mount.destination);
    let is_below = |folder: &str| {
        destination.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if destination.is_empty() || ["/proc", "/sys", "/dev"].into_iter().any(is_below) {
        let allowed = "a place other than /, /proc, /sys and /dev and what is below the last three";
        problem("destination", format!("`{}`", mount.destination), allowed);
    }
    if let Some(part) = destination.split('/').find(|part| part.len() > MAX_PART) {
        let found = format!("`{}`, a name of {} bytes", rules::printable(part, 20), part.len());
        problem("destination", found, "names of at most 255 bytes");
    }
    let kind = mount.kind.as_deref().unwrap_or("bind");
    let source = mount.source.as_deref();
    match (kind, source) {
        ("bind", Some(path)) if path.starts_with('/') && !path.split('/').any(|part| part == "..") => {}
        ("bind", found) => {
            let found = found.map_or("nothing".to_string(), |found| format!("`{found}`"));
            problem("source", found, "an absolute path of the host without `..`");
        }
        ("tmpfs", _) => {}
        ("volume", Some(name)) if rules::name(name).is_ok() => {}
        ("volume", found) => {
            let found = found.map_or("nothing".to_string(), |found| format!("`{found}`"));
            problem(
                "source",
                found,
                "the name of a volume: [a-z0-9]+([._-][a-z0-9]+)*, at most 63 characters",
            );
        }
        ("target", found) => {
            let known = found.and_then(|name| name.parse::<TargetName>().ok());
            let view = known.as_ref().and_then(|name| targets.get(name));
            if view.is_none_or(|view| view.service_type != ServiceType::FsOnly) {
                let found = found.map_or("nothing".to_string(), |found| format!("`{found}`"));
                problem("source", found, "the name of a target with service_type fs-only");
            }
        }
        (other, _) => problem("type", format!("`{other}`"), TYPES),
    }
    for option in mount.options.iter().flatten() {
        let tmpfs = kind == "tmpfs";
        let good = match option.split_once('=') {
            Some(("size", size)) if tmpfs => rules::size(size).is_ok(),
            Some(("mode", mode)) if tmpfs => {
                (3..=4).contains(&mode.len()) && mode.bytes().all(|byte| (b'0'..=b'7').contains(&byte))
            }
            Some(_) => false,
            None if kind == "target" => option != "rw" && FLAGS[..5].contains(&option.as_str()),
            None if kind == "bind" => FLAGS.contains(&option.as_str()),
            None => FLAGS[..5].contains(&option.as_str()),
        };
        if !good {
            let allowed = match kind {
                "tmpfs" => "ro, rw, nosuid, nodev, noexec, size=SIZE, mode=OCTAL",
                "target" => "ro, nosuid, nodev, noexec: a target is read-only",
                _ => "ro, rw, nosuid, nodev, noexec",
            };
            problem("options", format!("`{option}` with type {kind}"), allowed);
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::digest::Digest;
    use crate::manifest::{ImportManifest, Resolved, SystemManifest};

    /// Reads a system of these targets, each the fields of a flow mapping: one line a target, from line 4 on.
    fn read(targets: &[&str]) -> Result<ImportManifest, String> {
        let mut yaml = "version: 1\nproduct: de6c82c5-2e01-4c92-949b-a6545d30fc06\ntargets:\n".to_string();
        for target in targets {
            let (name, fields) = target.split_once(' ').unwrap();
            let kind = if fields.contains("service_type") { "" } else { "service_type: container, " };
            let network = if fields.contains("network") { "" } else { "network: {type: none}, " };
            yaml += &format!("  {name}: {{url: 'oci:/x:y', version: '1', {kind}{network}{fields}}}\n");
        }
        ImportManifest::parse(Path::new("m.yaml"), yaml.as_bytes()).map_err(|errors| errors.to_string())
    }

    /// The one error of a system of these targets: it must be at this line and field, and say these words.
    fn refused(targets: &[&str], line: usize, field: &str, words: &[&str]) {
        let said = read(targets).expect_err("the manifest should be refused");
        assert_eq!(said.lines().count(), 1, "{said}");
        let rest =
            said.strip_prefix(&format!("m.yaml:{line}:")).unwrap_or_else(|| panic!("line {line}: {said}"));
        let (column, rest) = rest.split_once(": ").unwrap();
        assert!(column.parse::<usize>().unwrap() > 2, "{said}");
        assert!(rest.starts_with(&format!("targets.{field}: ")), "{field}: {said}");
        for word in words {
            assert!(said.contains(word), "{word}: {said}");
        }
    }

    const ALL: &str = "web network: {type: simple, ports: [{host: 80, container: 8080, address: 192.0.2.7}]}, \
        nsgroup: web, needs: [db], health: {command: [/bin/check, --fast], interval: 5s, timeout: 1m, retries: 2, start: 2h}, \
        run: {command: [/bin/web], environment: {B: '1', A: x y}, init: true, stop_seconds: 20, restart: on-failure, \
        writable: size=64M}, resources: {memory: 256M, tasks: 100, cpu: 150%}, capabilities: [NET_ADMIN], \
        devices: [/dev/ttyUSB0], secrets: [token], \
        mounts: [{destination: /data, type: volume, source: web}, {destination: /cache, type: tmpfs, options: [size=8M, mode=0700]}, \
        {destination: /ro, type: target, source: data}, {destination: /srv, source: /srv/x, options: [rbind, ro]}]";

    #[test]
    fn all_fields_of_a_container_come_out_as_they_were_written() {
        let import =
            read(&["data service_type: fs-only", "db run: {writable: true, restart: no}", ALL]).unwrap();
        let image = Resolved { digest: Digest::of(b"image"), size: 5 };
        let system =
            import.to_system(&import.targets.keys().map(|name| (name.clone(), image)).collect()).unwrap();
        let text = String::from_utf8(system.canonical()).unwrap();
        for part in [
            r#""capabilities":["NET_ADMIN"],"devices":["/dev/ttyUSB0"]"#,
            r#""health":{"command":["/bin/check","--fast"],"interval":"5s","retries":2,"start":"2h","timeout":"1m"}"#,
            r#""needs":["db"]"#,
            r#""ports":[{"address":"192.0.2.7","container":8080,"host":80}]"#,
            r#""resources":{"cpu":"150%","memory":"256M","tasks":100}"#,
            r#""run":{"command":["/bin/web"],"environment":{"A":"x y","B":"1"},"init":true,"restart":"on-failure","stop_seconds":20,"writable":"size=64M"}"#,
            r#""run":{"restart":"no","writable":true}"#,
            r#""secrets":["token"]"#,
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert_eq!(SystemManifest::parse(text.as_bytes()).unwrap(), system);
        // The import manifest's own canonical form has them as well.
        assert!(String::from_utf8(import.canonical()).unwrap().contains(r#""needs":["db"]"#));
    }

    #[test]
    fn fields_of_containers_are_strict() {
        for (fields, field, words) in [
            ("run: {comand: [x]}", "a.run.comand", &["unknown field `comand`", "command, environment"][..]),
            ("run: {command: []}", "a.run.command", &["an empty list"]),
            ("run: {command: ls}", "a.run.command", &["a list"]),
            ("run: {environment: {'A-B': x}}", "a.run.environment.A-B", &["[A-Za-z_]"]),
            ("run: {init: yes}", "a.run.init", &["`yes`", "true, false"]),
            ("run: {stop_seconds: 0}", "a.run.stop_seconds", &["`0`"]),
            ("run: {stop_seconds: 3601}", "a.run.stop_seconds", &["1 to 3600"]),
            ("run: {restart: sometimes}", "a.run.restart", &["always, on-failure, no"]),
            ("run: {writable: size=lots}", "a.run.writable", &["size="]),
            ("health: {interval: 5s}", "a.health.command", &["required"]),
            ("health: {command: [x], interval: 5}", "a.health.interval", &["10s"]),
            ("health: {command: [x], timeout: 25h}", "a.health.timeout", &["24h"]),
            ("health: {command: [x], retries: 1001}", "a.health.retries", &["1 to 1000"]),
            ("health: {command: [x]}, ready: notify", "a.ready", &["one of the two"]),
            ("ready: maybe", "a.ready", &["notify"]),
            ("resources: {memory: 1.5G}", "a.resources.memory", &["256M"]),
            ("resources: {cpu: 0%}", "a.resources.cpu", &["150%"]),
            ("capabilities: [CAP_NET_ADMIN]", "a.capabilities[0]", &["without CAP_"]),
            ("devices: [/etc/passwd]", "a.devices[0]", &["/dev/"]),
            ("devices: [/dev/../etc]", "a.devices[0]", &["/dev/"]),
            ("secrets: ['../x']", "a.secrets[0]", &["[a-z0-9]+"]),
            ("secrets: [x, y, x]", "a.secrets[2]", &["`x` a second time", "each once"]),
            ("devices: [/dev/a, /dev/a]", "a.devices[1]", &["`/dev/a` a second time", "each once"]),
            ("resources: {memory: '0'}", "a.resources.memory", &["\"0\"", "256M"]),
            ("resources: {memory: 1023K}", "a.resources.memory", &["`1023K`", "at least 1M"]),
            ("resources: {memory: 8192T}", "a.resources.memory", &["`8192T`", "a number of bytes"]),
            ("resources: {tasks: 0}", "a.resources.tasks", &["`0`", "an integer"]),
            ("resources: {tasks: 3}", "a.resources.tasks", &["`3`", "4 to 4194304"]),
            ("resources: {tasks: 4194305}", "a.resources.tasks", &["`4194305`", "4 to 4194304"]),
            ("resources: {tasks: 99999999999999999999}", "a.resources.tasks", &["an integer"]),
            ("resources: {cpu: 100001%}", "a.resources.cpu", &["150%"]),
            ("health: {command: []}", "a.health.command", &["an empty list"]),
            ("health: {command: ['']}", "a.health.command", &["a program without a name"]),
            ("health: {command: [x], interval: 0s}", "a.health.interval", &["1s to 24h"]),
            ("health: {command: [x], start: 99999999999999999999h}", "a.health.start", &["1s to 24h"]),
            ("health: {command: [x], retries: 0}", "a.health.retries", &["`0`"]),
            ("run: {environment: [A=b]}", "a.run.environment", &["a list of 1", "a mapping"]),
            ("run: {environment: {A: }}", "a.run.environment.A", &["nothing", "a text"]),
            ("run: {environment: {'': x}}", "a.run.environment.", &["[A-Za-z_]"]),
            ("run: {environment: {A=B: x}}", "a.run.environment.A=B", &["[A-Za-z_]"]),
            ("run: {environment: {A: \"x\\ny\"}}", "a.run.environment.A", &["without control characters"]),
            ("run: {environment: {A: \"x\\0y\"}}", "a.run.environment.A", &["without control characters"]),
            ("run: {command: [\"x\\0y\"]}", "a.run.command[0]", &["without control characters"]),
            ("run: {stop_seconds: -1}", "a.run.stop_seconds", &["`-1`"]),
            ("needs: [A]", "a.needs[0]", &["[a-z0-9]+"]),
            ("service_type: fs-only, run: {init: true}", "a.run", &["only with service_type container"]),
            ("storage: [{dest: /d, label: l}]", "a.storage", &["type: volume, source: NAME"]),
        ] {
            refused(&[&format!("a {fields}")], 4, field, words);
        }
        let top = "version: 1\nproduct: de6c82c5-2e01-4c92-949b-a6545d30fc06\nstorage: []\ntargets:\n  \
                   a: {url: 'oci:/x:y', version: 1, service_type: fs-only, network: {type: none}}\n";
        let said = ImportManifest::parse(Path::new("m.yaml"), top.as_bytes()).unwrap_err().to_string();
        assert!(said.starts_with("m.yaml:3:1: storage: ") && said.contains("type: volume"), "{said}");
    }

    /// A volume with a name of 64 characters.
    const LONG_VOLUME: &str = concat!(
        "destination: /d, type: volume, source: ",
        "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
    );
    /// A mount at a place with a name of 256 bytes.
    const LONG_NAME: &str = concat!(
        "destination: /d/",
        "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        ", type: tmpfs"
    );

    #[test]
    fn what_a_container_mounts_is_what_mosfs_can_mount() {
        for (mount, field, words) in [
            ("destination: /proc/x, type: tmpfs", "destination", &["other than /"][..]),
            ("destination: /, type: tmpfs", "destination", &["other than /"]),
            ("destination: //./, type: tmpfs", "destination", &["other than /"]),
            (LONG_NAME, "destination", &["a name of 256 bytes", "at most 255 bytes"]),
            ("destination: /d, type: nfs, source: x", "type", &["bind, tmpfs, volume, target"]),
            ("destination: /d", "source", &["nothing", "absolute path"]),
            ("destination: /d, source: x", "source", &["`x`"]),
            ("destination: /d, source: /x/../y", "source", &["without `..`"]),
            ("destination: /d, type: volume", "source", &["nothing", "the name of a volume"]),
            ("destination: /d, type: volume, source: ../x", "source", &["`../x`", "the name of a volume"]),
            ("destination: /d, type: volume, source: ..", "source", &["`..`", "the name of a volume"]),
            ("destination: /d, type: volume, source: .x", "source", &["`.x`", "the name of a volume"]),
            ("destination: /d, type: volume, source: x.", "source", &["`x.`", "the name of a volume"]),
            ("destination: /d, type: volume, source: x/y", "source", &["`x/y`", "the name of a volume"]),
            ("destination: /d, type: volume, source: /x", "source", &["`/x`", "the name of a volume"]),
            ("destination: /d, type: volume, source: X", "source", &["`X`", "the name of a volume"]),
            (LONG_VOLUME, "source", &["at most 63 characters"]),
            ("destination: /d, type: target, source: b", "source", &["service_type fs-only"]),
            ("destination: /d, type: target, source: x", "source", &["service_type fs-only"]),
            ("destination: /d, type: target, source: data, options: [rw]", "options", &["read-only"]),
            ("destination: /d, type: volume, source: v, options: [size=1M]", "options", &["size=1M"]),
            ("destination: /d, type: tmpfs, options: [size=x]", "options", &["size=SIZE"]),
            ("destination: /d, type: tmpfs, options: [mode=99]", "options", &["mode=OCTAL"]),
            ("destination: /d, type: tmpfs, options: [suid]", "options", &["`suid`"]),
        ] {
            let target = format!("a mounts: [{{{mount}}}]");
            let others = ["b run: {}", "data service_type: fs-only"];
            refused(&[&target, others[0], others[1]], 4, &format!("a.mounts[0].{field}"), words);
        }
        let twice = "a mounts: [{destination: /d, type: tmpfs}, {destination: //d/, type: tmpfs}]";
        refused(&[twice], 4, "a.mounts[1].destination", &["mounts[0]"]);
    }

    #[test]
    fn targets_agree_on_ports_addresses_and_needs() {
        let port = |name: &str, port: &str| format!("{name} network: {{type: simple, ports: [{{{port}}}]}}");
        let (a, b) = (port("a", "host: 80, container: 1"), port("b", "host: 80, container: 2"));
        refused(&[&a, &b], 5, "b.network.ports[0].host", &["80/tcp", "a publishes it"]);
        let one = port("b", "host: 80, container: 2, address: 192.0.2.7");
        refused(&[&a, &one], 5, "b.network.ports[0].host", &["80/tcp"]);
        let twice = "a network: {type: simple, ports: [{host: 80, container: 1}, {host: 80, container: 2}]}";
        refused(
            &[twice],
            4,
            "a.network.ports[1].host",
            &["found port 80/tcp; allowed: each port of the host once"],
        );
        for address in ["0.0.0.0", "255.255.255.255", "224.0.0.1", "0.1.2.3"] {
            let field = "a.network.ports[0].address";
            let port = port("a", &format!("host: 80, container: 1, address: {address}"));
            refused(
                &[&port],
                4,
                field,
                &[&format!("found `{address}`"), "leave `address` out for all of them"],
            );
        }
        read(&[&port("a", "host: 80, container: 1, address: 127.0.0.1")]).unwrap();
        let other = port("c", "host: 80, container: 2, address: 192.0.2.8");
        read(&[&one, &other, &port("a", "host: 80, container: 1, protocol: udp")]).unwrap();
        let address = |name: &str, ipv4: &str| format!("{name} network: {{type: simple, ipv4: {ipv4}}}");
        refused(&[&address("a", "10.0.3.7"), &address("b", "10.0.3.7")], 5, "b.network.ipv4", &["a has it"]);
        refused(
            &[&address("a", "10.0.3.7/24"), &address("b", "10.0.4.7/24")],
            5,
            "b.network.ipv4",
            &["10.0.4.0/24", "one subnet"],
        );
        for (own, words) in [
            ("10.0.3.1", "an address of 10.0.3.0/24 other than its first, its last and 10.0.3.1"),
            ("10.0.3.255", "an address of 10.0.3.0/24 other than"),
            ("192.168.1.1", "an address of 10.0.3.0/24 other than"),
            ("127.0.0.5/8", "a subnet for hosts"),
        ] {
            refused(&[&address("a", own)], 4, "a.network.ipv4", &[words]);
        }
        for name in ["localhost", "ip6-loopback", "10.0.3.9", "127.1", "7", "0x7f"] {
            let target = format!("'{name}' network: {{type: simple}}");
            let found = format!("found type simple for a target with the name `{name}`");
            refused(&[&target], 4, &format!("{name}.network.type"), &[&found, "not localhost"]);
            // Nobody looks it up.
            read(&[&format!("'{name}' run: {{}}")]).unwrap();
        }
        for name in ["a_b", "a.b", "1a", "1.2.3.4.5", "0xg", "localhost.a"] {
            read(&[&format!("'{name}' network: {{type: simple}}")]).unwrap();
        }
        refused(&["a needs: [x]"], 4, "a.needs[0]", &["`x`", "a target of this system"]);
        refused(&["a needs: [d]", "d service_type: fs-only"], 4, "a.needs[0]", &["fs-only"]);
        refused(&["a needs: [a]"], 4, "a.needs[0]", &["`a`, which needs `a`"]);
        let said = read(&["a needs: [b]", "b needs: [c]", "c needs: [a]"]).unwrap_err();
        assert_eq!(said.matches("targets that do not need this one").count(), 3, "{said}");
    }
}
