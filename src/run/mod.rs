//! Containers: what a signed container target runs, from its verified image.
//!
//! ```text
//! signed manifest -> OCI manifest -> config.rs  the image's configuration, by digest
//!        |                               |
//!     ids.rs  user.rs  mounts.rs      bundle.rs -> config.json, in memory -> crun
//!        |                               |
//!     units.rs  one unit of systemd a target: mosfs-target@NAME.service -> `mosfs run-target NAME` (start.rs)
//! ```
//! ```text
//! RUN/targets/NAME           the verified tree, mounted by activation
//! RUN/shifted/FIRST/NAME     the same with the ids of a group, where the kernel cannot map them (shifted.rs)
//! RUN/containers/NAME/       a tmpfs in the mount namespace of the container's process alone: root, mounts, config.json
//! RUN/given.json             the ids and addresses that containers were given (given.rs)
//! RUN/notes/NAME.hosts       its /etc/hosts, which an activation keeps up to date
//! RUN/notes/NAME.key         the run key that the container was started with
//! RUN/notes/NAME.error       why its last start failed
//! RUN/notes/NAME.before      why the start before that failed
//! RUN/notes/NAME.unhealthy   why the last attempt at its health failed
//! RUN/notes/NAME.runtime     what the runtime said of a container that it could not run
//! RUN/notes/NAME.lock        held (flock) by what starts the container, and by the runtime as long as it runs
//! RUN/notes/NAME.network     the process of the container, while it uses the bridge
//! RUN/crun/                  the state of the runtime, by target
//! /run/systemd/system/mosfs-target@NAME.service
//! SYSTEM/volumes/NAME        data that survives updates; in SYSTEM/volumes, mode 0700
//! ```
//!
//! **Trust.** Each start reads the signed manifest, the OCI manifest and the configuration again, each checked against
//! the one before it. Nothing that lies on disk in between is believed; the configuration of the runtime never does.
//!
//! **Rule:** a container is started with what its manifest says, or not at all. What this version of mosfs, or this
//! machine, cannot do is an error that names it.

pub mod bundle;
pub mod config;
pub mod given;
pub mod health;
pub mod ids;
pub mod leftovers;
pub mod mounts;
pub mod network;
pub mod places;
pub mod program;
pub mod programs;
pub mod root;
pub mod runtime;
pub mod seccomp;
pub mod shifted;
pub mod start;
pub mod stdio;
pub mod units;
pub mod user;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use crate::deploy::{self, DeployError};
use crate::digest::Digest;
use crate::error::{Class, Classified, IoError};
use crate::manifest::addresses::{self, Addresses};
use crate::manifest::consistency::{self, Finding, View};
use crate::manifest::workload::{Restart, Writable};
use crate::manifest::{Network, Refused, ServiceType, SystemManifest, Target, TargetName};
use crate::mount::{MountError, MountPlan};
use crate::store::{Store, StoreError};
use crate::sys;
use config::ImageConfig;
use given::Given;

/// A container target with all that its start depends on.
#[derive(Debug, Clone)]
pub struct Container {
    /// Its name.
    pub name: TargetName,
    /// The signed target.
    pub target: Target,
    /// The host's id of its id 0; `None` for the host's ids.
    pub base: Option<u32>,
    /// The verified configuration of its image.
    pub image: ImageConfig,
    /// The tree of its image.
    pub tree: MountPlan,
    /// The trees of the fs-only targets that it mounts, by name.
    pub mounted: BTreeMap<String, MountPlan>,
    /// The addresses of all targets.
    pub addresses: Addresses,
    /// The published ports of all targets, if this one has network `simple`.
    pub published: Vec<network::Published>,
    /// Whether it is a job that another target needs: what has `restart: no`, and does not report that it is healthy.
    /// That one starts after it has ended.
    pub is_awaited: bool,
    /// Changes whenever the container would be started in another way.
    pub key: Digest,
}

/// Why a container cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The deployment or the image does not verify, or is not complete.
    #[error(transparent)]
    Deploy(#[from] DeployError),
    /// The store failed or refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An error of the operating system.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A mount failed.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A target that is no container.
    #[error("target {target}: its service_type is {found}, and only a container runs")]
    NoContainer {
        /// The target.
        target: String,
        /// What it is.
        found: ServiceType,
    },
    /// What is no name of a target.
    #[error("`{name}` is no name of a target; {source}")]
    Name {
        /// What was given.
        name: String,
        /// What a name is.
        source: Refused,
    },
    /// The manifest states something that no container can have.
    #[error("{}", list(_0))]
    Manifest(Vec<Finding>),
    /// The configuration of an image is malformed.
    #[error("target {target}: the configuration {digest} of its image: {why}")]
    Config {
        /// The target.
        target: String,
        /// The configuration.
        digest: Digest,
        /// What is wrong.
        why: String,
    },
    /// Neither the manifest nor the image says what runs.
    #[error(
        "target {target}: it has no command: its image has neither Entrypoint nor Cmd, and the manifest has no run.command"
    )]
    NoCommand {
        /// The target.
        target: String,
    },
    /// The program that a target runs cannot be started.
    #[error("target {target}: the program {program} of its image {image} {why}")]
    Program {
        /// The target.
        target: String,
        /// What is run.
        program: String,
        /// Its image: the digest, or what it was mounted from.
        image: String,
        /// Why not, as the end of the sentence.
        why: String,
    },
    /// The program of a command for a container that runs cannot be started.
    #[error("target {target}: the program {program} {why}")]
    Command {
        /// The target.
        target: String,
        /// What is run.
        program: String,
        /// Why not, as the end of the sentence.
        why: String,
    },
    /// Another process of mosfs has failed, and has noted why.
    #[error("{why}")]
    Noted {
        /// Its reason, which names the target.
        why: String,
        /// The class of its exit code.
        class: Class,
    },
    /// More groups of ids than there are ranges.
    #[error("the system has {found} groups of ids, more than the {} that fit", ids::MOST_GROUPS)]
    TooManyGroups {
        /// How many there are.
        found: usize,
    },
    /// The image's user cannot be found.
    #[error("target {target}: user `{user}`: {why}")]
    User {
        /// The target.
        target: String,
        /// The image's `User`.
        user: String,
        /// Why not.
        why: String,
    },
    /// A folder of the image that the runtime mounts at is something else.
    #[error("target {target}: /{folder} of its image is {found}, expected a folder or nothing")]
    NoFolder {
        /// The target.
        target: String,
        /// The folder.
        folder: &'static str,
        /// What is there.
        found: &'static str,
    },
    /// A command is to run in a container that does not.
    #[error("target {target}: cannot run a command in it: its container is not running")]
    NotRunning {
        /// The target.
        target: String,
    },
    /// A container is to be started that another process starts.
    #[error(
        "target {target}: its container is being started by {}",
        pid.map_or("another process".into(), |pid| format!("process {pid}"))
    )]
    Starting {
        /// The target.
        target: String,
        /// The process, if the kernel names it.
        pid: Option<u32>,
    },
    /// A container is to be started that runs.
    #[error("target {target}: its container runs already, as process {pid}")]
    Running {
        /// The target.
        target: String,
        /// Its process 1, as the host numbers it.
        pid: u32,
    },
    /// Something cannot be mounted where the manifest says.
    #[error("target {target}: cannot mount {what} at {destination}: {found}")]
    Destination {
        /// The target.
        target: String,
        /// What is mounted: a file or a folder.
        what: &'static str,
        /// Where.
        destination: String,
        /// What its image has there.
        found: &'static str,
    },
    /// A volume belongs to an id that the container does not have.
    #[error(
        "target {target}: volume {} belongs to {kind} {id}, expected an id below {}: its container has ids of its own",
        path.display(),
        ids::COUNT
    )]
    VolumeOwner {
        /// The target.
        target: String,
        /// The volume.
        path: PathBuf,
        /// User or group.
        kind: &'static str,
        /// The id on disk.
        id: u32,
    },
    /// The verified tree is not mounted.
    #[error("target {target}: its image {image} is not mounted at {}: {why}", path.display())]
    NotMounted {
        /// The target.
        target: String,
        /// Its image: the digest, or what it was mounted from.
        image: String,
        /// Where it should be.
        path: PathBuf,
        /// What is there.
        why: String,
    },
    /// The kernel cannot map the ids of a file system.
    #[error("target {target}: the kernel cannot map the ids of {what}: {source}")]
    NoIdMap {
        /// The target.
        target: String,
        /// The file system.
        what: String,
        /// The kernel's error.
        source: sys::mountapi::CallError,
    },
    /// A step of the start failed.
    #[error("target {target}: cannot {step}: {why}")]
    Step {
        /// The target.
        target: String,
        /// What failed, as a verb and its object.
        step: String,
        /// Why.
        why: String,
    },
    /// A program of the host is missing.
    #[error("target {target}: the program {program} is not installed (Debian package {package})")]
    NoProgram {
        /// The target.
        target: String,
        /// The program.
        program: &'static str,
        /// The package of Debian that has it.
        package: &'static str,
    },
    /// What mosfs cannot do yet.
    #[error("target {target}: {what} is not supported by this version of mosfs")]
    Unsupported {
        /// The target.
        target: String,
        /// What the manifest asks for.
        what: String,
    },
    /// A service of systemd failed.
    #[error("target {target}: {why}")]
    Unit {
        /// The target.
        target: String,
        /// What systemd says.
        why: String,
    },
}

fn list(findings: &[Finding]) -> String {
    findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl Classified for RunError {
    fn class(&self) -> Class {
        match self {
            RunError::Deploy(error) => error.class(),
            RunError::Store(error) => error.class(),
            RunError::Mount(error) => error.class(),
            RunError::Noted { class, .. } => *class,
            RunError::NoContainer { .. }
            | RunError::Name { .. }
            | RunError::Manifest(_)
            | RunError::Config { .. }
            | RunError::NoCommand { .. }
            | RunError::Program { .. }
            | RunError::Command { .. }
            | RunError::User { .. }
            | RunError::Destination { .. }
            | RunError::NoFolder { .. } => Class::Input,
            _ => Class::Failure,
        }
    }
}

impl Container {
    /// Whether it is on the bridge.
    pub fn is_simple(&self) -> bool {
        matches!(self.target.network, Network::Simple { .. })
    }
}

/// Whether the root of a target is writable.
pub fn is_writable(target: &Target) -> bool {
    !matches!(target.workload.run().writable, None | Some(Writable::No))
}

/// Returns the container of a target of a verified manifest; `given` is what containers were given before.
///
/// # Errors
/// Everything that can be wrong with it before it is started.
pub fn container(
    store: &Store,
    manifest: &SystemManifest,
    name: &TargetName,
    given: &Given,
) -> Result<Container, RunError> {
    let label = name.to_string();
    let Some(target) = manifest.targets.get(name) else {
        let why = "the manifest has no such target".to_string();
        return Err(RunError::Unit { target: label, why });
    };
    if target.service_type != ServiceType::Container {
        return Err(RunError::NoContainer { target: label, found: target.service_type });
    }
    // What is wrong with others does not stop this one.
    let mut findings = consistency::check(manifest.targets.iter().map(|(name, one)| (name, View::from(one))));
    findings.retain(|finding| finding.target == *name);
    if !findings.is_empty() {
        return Err(RunError::Manifest(findings));
    }
    if let Network::Simple { ipv6: Some(address), .. } = &target.network
        && !address.is_empty()
    {
        return Err(RunError::Unsupported { target: label, what: "`ipv6` of network simple".into() });
    }
    let networks = manifest.targets.iter().map(|(name, one)| (name, &one.network));
    // A target without an address of its own does not depend on the others.
    let addresses = addresses::assign(networks, &given.addresses).or_else(|bad| match target.network {
        Network::Simple { .. } => {
            let bad = bad.into_iter().next();
            let why = bad
                .map_or_else(String::new, |bad| format!("{} has {}: {}", bad.target, bad.found, bad.allowed));
            let step = "assign the addresses of the targets".into();
            Err(RunError::Step { target: label.clone(), step, why })
        }
        _ => Ok(addresses::none()),
    })?;
    let ranges = ids::assign(manifest, &given.ids).map_err(|found| RunError::TooManyGroups { found })?;
    let base = ids::base(&ranges, name, target);
    let image = deploy::target::image_of(store, &label, target)?;
    let descriptor = &image.manifest.config;
    let bytes = store.get(&descriptor.digest, config::MAX_BYTES)?;
    let config = ImageConfig::parse(name, &descriptor.digest, &bytes)?;
    if bundle::command(target, &config).first().is_none_or(String::is_empty) {
        return Err(RunError::NoCommand { target: label });
    }
    let tree = deploy::target::plan(store, &label, target)?;
    let mut mounted = BTreeMap::new();
    for mount in target.mounts.iter().flatten().filter(|mount| mount.kind.as_deref() == Some("target")) {
        let other = mount.source.as_deref().unwrap_or_default();
        let signed = manifest.targets.iter().find(|(name, _)| name.as_str() == other);
        if let Some((_, signed)) = signed {
            mounted.insert(other.to_string(), deploy::target::plan(store, other, signed)?);
        }
    }
    let mut container = Container {
        name: name.clone(),
        target: target.clone(),
        base,
        image: config,
        tree,
        mounted,
        published: match target.network {
            Network::Simple { .. } => network::published(manifest, &addresses),
            _ => Vec::new(),
        },
        addresses,
        is_awaited: is_awaited(manifest, name, target),
        key: Digest::of(b""),
    };
    container.key = key(&container, manifest);
    Ok(container)
}

/// Whether what needs a target waits for its end.
fn is_awaited(manifest: &SystemManifest, name: &TargetName, target: &Target) -> bool {
    let workload = &target.workload;
    workload.run().restart == Some(Restart::No)
        && workload.health.is_none()
        && workload.ready.is_none()
        && manifest.targets.values().any(|other| other.workload.needs().contains(name))
}

/// The digest of everything that a container's start depends on.
fn key(container: &Container, manifest: &SystemManifest) -> Digest {
    let Container { name, target, base, addresses, mounted, .. } = container;
    // The target as it is signed, in the canonical form of a manifest that has it alone.
    let alone = SystemManifest {
        targets: BTreeMap::from([(name.clone(), target.clone())]),
        version: 1,
        ..manifest.clone()
    };
    let mut text = format!("{}\n{}\n", bundle::GENERATION, String::from_utf8_lossy(&alone.canonical()));
    let _ = writeln!(text, "{base:?}");
    // The hosts file, which has the others, follows them while the container runs.
    if let Network::Simple { .. } = target.network {
        let _ = writeln!(text, "{} {:?}", addresses.subnet, addresses.of.get(name));
    }
    for (name, plan) in mounted {
        let _ = writeln!(text, "{name} {:?}", plan.digest());
    }
    Digest::of(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::manifest::{ImportManifest, Resolved};

    /// A system of these targets, each with the fields of its flow mapping; network none and a version unless written.
    pub(super) fn system(targets: &[(&str, &str)]) -> SystemManifest {
        let mut yaml = "version: 1\nproduct: de6c82c5-2e01-4c92-949b-a6545d30fc06\ntargets:\n".to_string();
        for (name, fields) in targets {
            let network = if fields.contains("network:") { "" } else { "network: {type: none}, " };
            let _ = writeln!(yaml, "  {name}: {{url: 'oci:/x:y', version: '1', {network}{fields}}}");
        }
        let import =
            ImportManifest::parse(Path::new("m.yaml"), yaml.as_bytes()).unwrap_or_else(|e| panic!("{e}"));
        let image = Resolved { digest: Digest::of(b"image"), size: 5 };
        import.to_system(&import.targets.keys().map(|name| (name.clone(), image)).collect()).unwrap()
    }

    #[test]
    fn what_needs_a_job_waits_for_its_end() {
        let job = "service_type: container, run: {restart: no}";
        let watched = "service_type: container, run: {restart: no}, health: {command: [/bin/true]}";
        let service = "service_type: container, run: {restart: on-failure}";
        let needs = "service_type: container, needs: [job, watched, service]";
        let manifest = system(&[
            ("job", job),
            ("lonely", job),
            ("needs", needs),
            ("service", service),
            ("watched", watched),
        ]);
        let awaited: Vec<_> = manifest
            .targets
            .iter()
            .filter(|(name, target)| is_awaited(&manifest, name, target))
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(awaited, ["job"]);
    }

    #[test]
    fn a_signed_manifest_that_breaks_a_rule_of_targets_names_the_target_and_the_field() {
        use crate::manifest::workload::Resources;
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(&dir.path().join("store")).unwrap();
        let port = "service_type: container, network: {type: simple, ports: [{host: 80, container: 1}]}";
        let container_of_none = "service_type: container";
        let mut manifest = system(&[("a", port), ("b", container_of_none), ("c", container_of_none)]);
        // Publishers have signed what `mosfs build` refuses today.
        let network = manifest.targets["a"].network.clone();
        manifest.targets.get_mut("c").unwrap().network = network;
        let b = manifest.targets.get_mut("b").unwrap();
        b.workload.resources = Some(Resources { tasks: Some(u64::MAX), ..Resources::default() });
        let refused = |name: &str| {
            let error = container(&store, &manifest, &name.parse().unwrap(), &Given::default()).unwrap_err();
            (error.class(), error.to_string())
        };
        let port = "target c, network.ports[0].host: found port 80/tcp; allowed: a port that no other target publishes; \
                    a publishes it";
        assert_eq!(refused("c"), (Class::Input, port.to_string()));
        let tasks =
            "target b, resources.tasks: found `18446744073709551615`; allowed: an integer from 4 to 4194304";
        assert_eq!(refused("b"), (Class::Input, tasks.to_string()));
        // What is wrong with others does not stop it: it fails where its image is not in the store.
        assert!(matches!(
            container(&store, &manifest, &"a".parse().unwrap(), &Given::default()),
            Err(RunError::Deploy(_))
        ));
    }
}
