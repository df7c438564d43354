//! The runtime's configuration of a container (OCI runtime specification, config.json), made in memory.
//!
//! Pure: what it needs to know of the machine is in [`Bundle`].
//!
//! | what | value |
//! | --- | --- |
//! | root | read-only; `/tmp` and `/run` are in memory |
//! | namespaces | pid, ipc, uts, mount, cgroup, and user and network where the target has its own |
//! | privileges | no new ones; few capabilities for root, none for others; [`super::seccomp`] |
//! | /proc, /sys | what tells of the host or changes it is masked or read-only |

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::config::ImageConfig;
use super::ids;
use super::seccomp;
use super::user::User;
use crate::manifest::{Network, Target, TargetName};
use crate::sorting;

/// The version of this configuration: part of the run key, so that a container is restarted when another version of
/// mosfs would start it in another way. Raise it with each change that a running container should get.
pub const GENERATION: u32 = 3;

/// The capabilities of a container that runs as root.
pub const CAPABILITIES: [&str; 7] =
    ["CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID"];

/// Where programs are looked for if the image does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where the init of a target with `run.init` is.
const INIT: &str = "/run/mosfs-init";
/// Where the socket of a target with `ready: notify` is.
const NOTIFY: &str = "/run/mosfs-notify";

/// What shows something of the host that a container has no use for.
const MASKED: [&str; 13] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/dev/block",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
/// What would change the host.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A mount that mosfs has prepared, or that the runtime makes in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// The place in the container.
    pub destination: String,
    /// What is bound there; a new tmpfs if nothing is.
    pub source: Option<PathBuf>,
    /// The options of the mount.
    pub options: Vec<String>,
}

impl Prepared {
    /// A read-only bind of a file or folder.
    pub fn read_only(source: &Path, destination: &str) -> Self {
        let options = ["bind", "ro", "nosuid", "nodev", "noexec"].map(str::to_string).to_vec();
        Self { destination: destination.into(), source: Some(source.into()), options }
    }
}

/// Everything that a configuration is made of.
#[derive(Debug)]
pub struct Bundle<'a> {
    /// The name of the target.
    pub name: &'a TargetName,
    /// The target, from the signed manifest.
    pub target: &'a Target,
    /// The verified configuration of its image.
    pub image: &'a ImageConfig,
    /// Who it runs as.
    pub user: &'a User,
    /// The host's id of its id 0; `None` for the host's ids.
    pub base: Option<u32>,
    /// The mounted root.
    pub root: &'a Path,
    /// Mounts besides those of every container.
    pub mounts: &'a [Prepared],
    /// The program of the host that is process 1, with `run.init`.
    pub init: Option<&'a Path>,
    /// The socket of the service manager, with `ready: notify`.
    pub notify: Option<&'a Path>,
    /// The command that connects the network, with network `simple`.
    pub connect: Option<&'a [String]>,
    /// Whether the machine has the one hierarchy of control groups (version 2), which the container then sees.
    pub unified: bool,
}

/// Returns the command that a target runs: the manifest's, or the image's. Empty if neither has one.
pub fn command(target: &Target, image: &ImageConfig) -> Vec<String> {
    match target.workload.run().command {
        Some(command) => command,
        None => image.entrypoint.iter().chain(&image.cmd).flatten().cloned().collect(),
    }
}

/// Returns the environment: the image's, the manifest's over it, and PATH and HOME where neither has them.
pub fn environment(target: &Target, image: &ImageConfig, user: &User) -> Vec<String> {
    let mut all: Vec<(String, String)> = Vec::new();
    let mut set = |name: &str, value: &str| match all.iter_mut().find(|(known, _)| known == name) {
        Some(entry) => entry.1 = value.to_string(),
        None => all.push((name.to_string(), value.to_string())),
    };
    set("PATH", PATH);
    set("HOME", &user.home);
    for (name, value) in image.env.iter().flatten().filter_map(|entry| entry.split_once('=')) {
        set(name, value);
    }
    for (name, value) in target.workload.run().environment.iter().flatten() {
        set(name, value);
    }
    all.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
}

/// Returns the `process` of a container: what runs in it, and with which privileges.
pub fn process(
    target: &Target,
    image: &ImageConfig,
    user: &User,
    arguments: &[String],
    environment: &[String],
    terminal: bool,
) -> Value {
    let added: Vec<&str> = target.workload.capabilities.iter().flatten().map(String::as_str).collect();
    let named = |names: &[&str]| -> Vec<String> {
        let mut all: Vec<String> = names.iter().map(|name| format!("CAP_{name}")).collect();
        sorting::sort(&mut all);
        all.dedup();
        all
    };
    let capabilities = if user.uid == 0 {
        let all = named(&[&CAPABILITIES[..], &added].concat());
        json!({ "bounding": all, "permitted": all, "effective": all })
    } else {
        // Ambient, as the program has none of its own that could become effective (capabilities(7)).
        let all = named(&added);
        json!({ "bounding": all, "permitted": all, "effective": all, "inheritable": all, "ambient": all })
    };
    let folder = image.working_dir.as_deref().filter(|dir| !dir.is_empty()).unwrap_or("/");
    json!({
        "terminal": terminal,
        "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.more_gids },
        "args": arguments,
        "env": environment,
        "cwd": folder,
        "noNewPrivileges": true,
        "capabilities": capabilities,
    })
}

/// Adds the folders of every container that are in memory, where nothing else is mounted there.
pub fn add_memory(mounts: &mut Vec<Prepared>) {
    for (destination, mode) in [("/tmp", "mode=1777"), ("/run", "mode=755")] {
        if !mounts.iter().any(|one| one.destination == destination) {
            let options = ["nosuid", "nodev", mode].map(str::to_string).to_vec();
            mounts.push(Prepared { destination: destination.into(), source: None, options });
        }
    }
}

/// Returns the configuration.
pub fn config(bundle: &Bundle<'_>) -> Value {
    let Bundle { name, target, image, user, base, root, .. } = bundle;
    let network = &target.network;
    let mut arguments = command(target, image);
    let mut environment = environment(target, image, user);
    let mut mounts = base_mounts(*base, network, bundle.unified);
    let mut own: Vec<Prepared> = bundle.mounts.to_vec();
    add_memory(&mut own);
    if let Some(init) = bundle.init {
        let mut bind = Prepared::read_only(init, INIT);
        bind.options.retain(|option| option != "noexec");
        own.push(bind);
        arguments.splice(0..0, [INIT.to_string(), "--".to_string()]);
    }
    if let Some(socket) = bundle.notify {
        own.push(Prepared {
            options: ["bind", "nosuid", "nodev", "noexec"].map(str::to_string).to_vec(),
            ..Prepared::read_only(socket, NOTIFY)
        });
        environment.push(format!("NOTIFY_SOCKET={NOTIFY}"));
    }
    // A mount comes after the one that it is below.
    sorting::sort_by(&mut own, |a, b| a.destination.cmp(&b.destination));
    for one in own {
        let (kind, source) = match &one.source {
            Some(source) => ("bind", source.display().to_string()),
            None => ("tmpfs", "tmpfs".to_string()),
        };
        let Prepared { destination, options, .. } = one;
        mounts
            .push(json!({ "destination": destination, "type": kind, "source": source, "options": options }));
    }
    let mut namespaces: Vec<Value> =
        ["pid", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({ "type": kind })).to_vec();
    if *network != Network::Host {
        namespaces.push(json!({ "type": "network" }));
    }
    let capabilities = target.workload.capabilities.as_deref().unwrap_or_default();
    let mut linux = json!({
        "maskedPaths": MASKED,
        "readonlyPaths": READ_ONLY,
        "rootfsPropagation": "private",
        "seccomp": seccomp::profile(capabilities),
    });
    if let Some(base) = base {
        namespaces.push(json!({ "type": "user" }));
        let map = json!([{ "containerID": 0, "hostID": base, "size": ids::COUNT }]);
        linux["uidMappings"] = map.clone();
        linux["gidMappings"] = map;
    }
    linux["namespaces"] = json!(namespaces);
    let writable = super::is_writable(target);
    let mut config = json!({
        "ociVersion": "1.0.2",
        "hostname": name.as_str(),
        "root": { "path": root, "readonly": !writable },
        "process": process(target, image, user, &arguments, &environment, false),
        "mounts": mounts,
        "linux": linux,
    });
    if let Some(connect) = bundle.connect {
        config["hooks"] = json!({ "createRuntime": [{ "path": connect.first(), "args": connect }] });
    }
    config
}

/// The mounts of every container.
fn base_mounts(base: Option<u32>, network: &Network, unified: bool) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let safe = ["nosuid", "noexec", "nodev"];
    let mut mounts = vec![
        mount("/proc", "proc", &safe),
        mount("/dev", "tmpfs", &["nosuid", "noexec", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
        mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777"]),
        mount("/dev/mqueue", "mqueue", &safe),
    ];
    // Who is root in a user namespace can mount sysfs only with a network of the same user namespace.
    if base.is_some() && *network == Network::Host {
        mounts.push(json!({ "destination": "/sys", "type": "bind", "source": "/sys",
            "options": ["rbind", "nosuid", "noexec", "nodev", "ro"] }));
    } else {
        mounts.push(mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]));
    }
    if unified {
        mounts.push(mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]));
    }
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::tests::system;

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: Some(vec!["/bin/server".into(), "--listen".into()]),
            cmd: Some(vec!["8080".into()]),
            env: Some(vec!["PATH=/opt/bin".into(), "GREETING=good day = hello".into()]),
            working_dir: Some("/srv".into()),
            ..ImageConfig::default()
        }
    }

    fn user(uid: u32) -> User {
        User { uid, gid: uid, more_gids: vec![], home: "/home/app".into() }
    }

    fn made(fields: &str, uid: u32, base: Option<u32>) -> Value {
        let manifest = system(&[("web", fields)]);
        let (name, target) = manifest.targets.first_key_value().unwrap();
        let (image, user) = (image(), user(uid));
        config(&Bundle {
            name,
            target,
            image: &image,
            user: &user,
            base,
            root: Path::new("/work/root"),
            mounts: &[Prepared::read_only(Path::new("/work/hosts"), "/etc/hosts")],
            init: None,
            notify: None,
            connect: None,
            unified: true,
        })
    }

    fn texts(value: &Value) -> Vec<&str> {
        value.as_array().unwrap().iter().map(|one| one.as_str().unwrap()).collect()
    }

    fn namespaces(config: &Value) -> Vec<&str> {
        config["linux"]["namespaces"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["type"].as_str().unwrap())
            .collect()
    }

    fn mount<'a>(config: &'a Value, destination: &str) -> &'a Value {
        let all = config["mounts"].as_array().unwrap();
        let mut found = all.iter().filter(|mount| mount["destination"] == destination);
        let one = found.next().unwrap_or_else(|| panic!("a mount at {destination} in {all:#?}"));
        assert!(found.next().is_none(), "two mounts at {destination}");
        one
    }

    #[test]
    fn a_container_has_few_privileges_and_a_root_that_it_cannot_change() {
        let config = made("service_type: container", 0, Some(524_288));
        let process = &config["process"];
        assert_eq!(process["noNewPrivileges"], true);
        assert_eq!(config["root"], json!({ "path": "/work/root", "readonly": true }));
        let few = [
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FOWNER",
            "CAP_KILL",
            "CAP_NET_BIND_SERVICE",
            "CAP_SETGID",
            "CAP_SETUID",
        ];
        for set in ["bounding", "permitted", "effective"] {
            assert_eq!(texts(&process["capabilities"][set]), few, "{set}");
        }
        assert!(process["capabilities"].get("ambient").is_none());
        // What a map of ids means to the kernel: the container's root is nobody of the host's.
        let map = json!([{ "containerID": 0, "hostID": 524_288, "size": 65_536 }]);
        assert_eq!(config["linux"]["uidMappings"], map);
        assert_eq!(config["linux"]["gidMappings"], map);
        assert_eq!(namespaces(&config), ["pid", "ipc", "uts", "mount", "cgroup", "network", "user"]);
        assert_eq!(config["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
        assert!(texts(&config["linux"]["maskedPaths"]).contains(&"/proc/kcore"));
        assert!(texts(&config["linux"]["readonlyPaths"]).contains(&"/proc/sysrq-trigger"));
        for place in ["/tmp", "/run"] {
            let options = texts(&mount(&config, place)["options"]);
            assert!(options.contains(&"nosuid") && options.contains(&"nodev"), "{place}: {options:?}");
        }
        assert!(config.get("hooks").is_none());
    }

    #[test]
    fn what_runs_is_the_image_s_unless_the_manifest_says_otherwise() {
        let config = made("service_type: container", 1000, Some(524_288));
        let process = &config["process"];
        assert_eq!(texts(&process["args"]), ["/bin/server", "--listen", "8080"]);
        assert_eq!(texts(&process["env"]), ["PATH=/opt/bin", "HOME=/home/app", "GREETING=good day = hello"]);
        assert_eq!((process["cwd"].as_str(), process["user"]["uid"].as_u64()), (Some("/srv"), Some(1000)));
        // Who is not root has no capabilities at all.
        for set in ["bounding", "permitted", "effective", "inheritable", "ambient"] {
            assert!(texts(&process["capabilities"][set]).is_empty(), "{set}");
        }
        let other = made(
            "service_type: container, run: {command: [/bin/job], environment: {GREETING: bye, B: '2'}}, \
             capabilities: [NET_RAW]",
            1000,
            Some(524_288),
        );
        assert_eq!(texts(&other["process"]["args"]), ["/bin/job"]);
        assert_eq!(
            texts(&other["process"]["env"]),
            ["PATH=/opt/bin", "HOME=/home/app", "GREETING=bye", "B=2"]
        );
        assert_eq!(texts(&other["process"]["capabilities"]["ambient"]), ["CAP_NET_RAW"]);
    }

    #[test]
    fn networks_are_namespaces_and_sysfs_follows_them() {
        let host = made("service_type: container, network: {type: host}", 0, Some(524_288));
        assert!(!namespaces(&host).contains(&"network"));
        let sys = mount(&host, "/sys");
        assert_eq!((sys["type"].as_str(), texts(&sys["options"]).contains(&"ro")), (Some("bind"), true));
        let none = made("service_type: container, network: {type: none}", 0, Some(524_288));
        assert!(namespaces(&none).contains(&"network"));
        assert_eq!(mount(&none, "/sys")["type"], "sysfs");
        // The host's ids: no user namespace.
        let ids = made("service_type: container, nsgroup: ''", 0, None);
        assert!(!namespaces(&ids).contains(&"user"));
        assert!(ids["linux"].get("uidMappings").is_none());
    }

    #[test]
    fn a_mount_replaces_what_every_container_has_at_its_place_and_comes_after_its_parents() {
        let manifest = system(&[("web", "service_type: container, run: {writable: true}, ready: notify")]);
        let (name, target) = manifest.targets.first_key_value().unwrap();
        let (image, user) = (image(), user(0));
        let own = |place: &str| Prepared::read_only(Path::new("/work/m"), place);
        let mounts = [own("/run/a/b"), own("/tmp"), own("/run/a")];
        let connect = ["/usr/bin/mosfs".to_string(), "x".to_string()];
        let config = config(&Bundle {
            name,
            target,
            image: &image,
            user: &user,
            base: None,
            root: Path::new("/work/root"),
            mounts: &mounts,
            init: Some(Path::new("/usr/bin/tini-static")),
            notify: Some(Path::new("/run/systemd/notify")),
            connect: Some(&connect),
            unified: false,
        });
        let places: Vec<&str> = config["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|mount| mount["destination"].as_str().unwrap())
            .skip_while(|place| *place != "/run")
            .collect();
        assert_eq!(places, ["/run", "/run/a", "/run/a/b", "/run/mosfs-init", "/run/mosfs-notify", "/tmp"]);
        assert_eq!(mount(&config, "/tmp")["type"], "bind");
        assert_eq!(config["root"]["readonly"], false);
        assert_eq!(texts(&config["process"]["args"])[..3], ["/run/mosfs-init", "--", "/bin/server"]);
        assert!(texts(&config["process"]["env"]).contains(&"NOTIFY_SOCKET=/run/mosfs-notify"));
        let hook = &config["hooks"]["createRuntime"][0];
        assert_eq!((hook["path"].as_str(), texts(&hook["args"]).len()), (Some("/usr/bin/mosfs"), 2));
    }
}
