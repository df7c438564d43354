//! The mounts of a container besides its root: volumes, trees of other targets, folders of the host, memory, files that
//! mosfs writes, and secrets.
//!
//! ```text
//! SYSTEM/volumes/         mode 0700, so that no user of the host reaches a program that a container made setuid
//! SYSTEM/volumes/NAME/    owners and modes as the container sees them: its ids are mapped, none of the host's are on disk
//! ```
//! mosfs makes each mount itself, with its ids mapped, below the work folder in the container's own mount namespace;
//! the runtime only binds them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use super::bundle::Prepared;
use super::places::{Places, write_note};
use super::root::{self, Place, step};
use super::user::User;
use super::{Container, RunError, ids, shifted};
use crate::error::{IoContext, IoError};
use crate::manifest::consistency::normal;
use crate::manifest::{Mount, Network, ServiceType, SystemManifest, TargetName};
use crate::sys::file;
use crate::sys::flock::Lock;
use crate::sys::{mountapi, namespace};

/// Most bytes of the resolver's configuration.
const MAX_RESOLV: u64 = 1 << 20;

/// Most bytes of a hosts file: more lines than a manifest can have targets.
const MAX_HOSTS: u64 = 16 << 20;

/// Where the parts of mounts are.
#[derive(Debug)]
pub struct Folders<'a> {
    /// The tmpfs of the container, in its own mount namespace.
    pub work: &'a Path,
    /// Its hosts file, which the host has too.
    pub hosts: &'a Path,
    /// Where the targets are mounted.
    pub targets: &'a Path,
    /// `/run/mosfs`.
    pub run: &'a Path,
    /// Where the volumes are.
    pub volumes: &'a Path,
    /// The credentials that systemd has loaded for the unit.
    pub credentials: Option<&'a Path>,
}

/// Returns the places that the root must have to mount at.
pub fn places(container: &Container) -> Vec<Place> {
    let folder = |path: &str| Place { path: path.into(), is_file: false };
    let file = |path: &str| Place { path: path.into(), is_file: true };
    let mut places = vec![file("/etc/hosts"), file("/etc/resolv.conf")];
    places.extend(container.image.working_dir.as_deref().filter(|dir| !dir.is_empty()).map(folder));
    places.extend(container.target.mounts.iter().flatten().map(|mount| {
        // A socket, a pipe or a device is mounted on a file, too.
        let is_no_folder = |source: &str| fs::metadata(source).is_ok_and(|metadata| !metadata.is_dir());
        let is_file = mount.kind.as_deref().unwrap_or("bind") == "bind"
            && mount.source.as_deref().is_some_and(is_no_folder);
        Place { path: (&*mount.destination).into(), is_file }
    }));
    places
}

/// Prepares all mounts of a container besides its root.
///
/// Only for a process in a mount namespace of its own. `for_real`: whether files on the host are made, such as volumes
/// that are not there.
pub fn prepare(
    container: &Container,
    folders: &Folders<'_>,
    root: &Path,
    user: &User,
    ids: Option<BorrowedFd<'_>>,
    for_real: bool,
) -> Result<Vec<Prepared>, RunError> {
    let target = container.name.as_str();
    let failed = |what: &str| step::<io::Error>(target, what);
    let place = folders.work.join("mounts");
    file::create_folder(&place, 0o711)?;
    let mut all = network_files(container, folders, for_real)?;
    for (number, mount) in container.target.mounts.iter().flatten().enumerate() {
        let kind = mount.kind.as_deref().unwrap_or("bind");
        let source = mount.source.as_deref().unwrap_or_default();
        let tree = match kind {
            "tmpfs" => {
                all.push(Prepared {
                    destination: normal(&mount.destination),
                    source: None,
                    options: options(mount, &["nosuid", "nodev"]),
                });
                continue;
            }
            "volume" => volume(container, folders, source, mount, root, ids, for_real)?,
            "target" => {
                let plan = container.mounted.get(source).ok_or_else(|| {
                    failed("find a target to mount")(io::Error::other(format!("`{source}` is no target")))
                })?;
                let group = container.base.zip(ids);
                let shifted = shifted::place(folders.run, container.base.unwrap_or(0), source);
                let trees =
                    shifted::trees_of_group(target, plan, &folders.targets.join(source), &shifted, group)?;
                Some(root::read_only(&format!("mosfs:{source}"), &trees)?)
            }
            _ => {
                // Its error without the words of a system call.
                let there = fs::metadata(source);
                there.map_err(failed(&format!("bind {source} of the host")))?;
                let copied = mountapi::clone_tree(Path::new(source));
                Some(copied.map_err(step(target, &format!("bind {source} of the host")))?)
            }
        };
        let Some(tree) = tree else { continue };
        let at = attach(target, tree, &place, number)?;
        let always: &[&str] =
            if kind == "target" { &["bind", "ro", "nosuid", "nodev"] } else { &["bind", "nosuid", "nodev"] };
        let always: Vec<&str> = if kind == "bind" {
            always.iter().map(|one| if *one == "bind" { "rbind" } else { one }).collect()
        } else {
            always.to_vec()
        };
        all.push(Prepared {
            destination: normal(&mount.destination),
            source: Some(at),
            options: options(mount, &always),
        });
    }
    all.extend(devices(container, folders.work, user)?);
    all.extend(secrets(container, folders, user)?);
    Ok(all)
}

/// Makes nodes of the devices of a target, which belong to its user.
///
/// Those of the host belong to ids that the container does not have, and their file system cannot map them.
fn devices(container: &Container, work: &Path, user: &User) -> Result<Vec<Prepared>, RunError> {
    let target = container.name.as_str();
    let wanted = container.target.workload.devices.as_deref().unwrap_or_default();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let folder = work.join("devices");
    file::create_folder(&folder, 0o711)?;
    root::mount_devices(target, &folder)?;
    let base = container.base.unwrap_or(0);
    let one = |(number, device): (usize, &String)| {
        let path = folder.join(number.to_string());
        file::create_device(&path, Path::new(device), (base + user.uid, base + user.gid))
            .map_err(step(target, &format!("add its device {device}")))?;
        let options = ["bind", "nosuid", "noexec"].map(str::to_string).to_vec();
        Ok(Prepared { destination: device.clone(), source: Some(path), options })
    };
    wanted.iter().enumerate().map(one).collect()
}

/// The options of a mount: those that it always has, then the manifest's.
fn options(mount: &Mount, always: &[&str]) -> Vec<String> {
    let written = mount.options.iter().flatten().map(String::as_str);
    // What a bind is called is said already.
    let written = written.filter(|option| !matches!(*option, "bind" | "rbind"));
    let mut all: Vec<String> = Vec::new();
    for option in always.iter().copied().chain(written) {
        if !all.iter().any(|one| one == option) {
            all.push(option.to_string());
        }
    }
    all
}

/// Attaches a tree below the folder of mounts; returns its path there.
fn attach(target: &str, tree: OwnedFd, folder: &Path, number: usize) -> Result<PathBuf, RunError> {
    let failed = |what: &str| step::<io::Error>(target, what);
    let name = number.to_string();
    let path = folder.join(&name);
    let is_folder = fs::metadata(format!("/proc/self/fd/{}", tree.as_raw_fd()))
        .map_err(failed("look at what is mounted"))?
        .is_dir();
    if is_folder {
        file::create_folder(&path, 0o755)?;
    } else {
        file::create_file(&path, 0o644)?;
    }
    let dir = file::open_folder(folder).map_err(failed("open the folder of mounts"))?;
    mountapi::attach_at(tree.as_fd(), dir.as_fd(), &name).map_err(step(target, "attach a mount"))?;
    Ok(path)
}

/// Returns the tree of a volume, with its ids mapped; `None` if it is not there and is not to be made.
///
/// A new volume has the owner and the mode of the image's folder at its destination.
fn volume(
    container: &Container,
    folders: &Folders<'_>,
    name: &str,
    mount: &Mount,
    root: &Path,
    mapped: Option<BorrowedFd<'_>>,
    make: bool,
) -> Result<Option<OwnedFd>, RunError> {
    let target = container.name.as_str();
    let failed = |what: String| step::<io::Error>(target, &what);
    let volumes = folders.volumes;
    let path = volumes.join(name);
    // Containers that share a volume start at once: the second finds what the first has made, and never replaces it.
    let lock = folders.run.join("volumes.lock");
    let _lock = if make { Some(Lock::exclusive(&lock).on("lock", &lock)?) } else { None };
    match fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => {
            let why = io::Error::other("it is no folder");
            return Err(failed(format!("mount volume {}", path.display()))(why));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound && !make => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_volume(container, volumes, name, mount, root)
                .map_err(failed(format!("make volume {}", path.display())))?;
        }
        Err(error) => return Err(failed(format!("look at volume {}", path.display()))(error)),
    }
    if mapped.is_some() {
        check_owner(target, &path)?;
    }
    let tree = mountapi::clone_mount(&path).map_err(step(target, &format!("mount volume {name}")))?;
    if let Some(ids) = mapped {
        mountapi::map_ids(tree.as_fd(), ids).map_err(|source| {
            let what = format!("the file system of volume {}", path.display());
            RunError::NoIdMap { target: target.into(), what, source }
        })?;
    }
    Ok(Some(tree))
}

/// Requires that a volume belongs to ids that a container with ids of its own has.
///
/// What was copied from elsewhere has the ids of the host there. In the container it would belong to nobody, and the
/// program could not write, without any hint why.
fn check_owner(target: &str, path: &Path) -> Result<(), RunError> {
    let metadata =
        fs::symlink_metadata(path).map_err(step(target, &format!("look at volume {}", path.display())))?;
    let owners = [("user", metadata.uid()), ("group", metadata.gid())];
    match owners.into_iter().find(|(_, id)| *id >= ids::COUNT) {
        None => Ok(()),
        Some((kind, id)) => {
            Err(RunError::VolumeOwner { target: target.into(), path: path.to_path_buf(), kind, id })
        }
    }
}

/// Requires that each mount has a place of its own kind in the image.
///
/// The runtime would say it in words that name neither the target nor the field. What is below another mount is the
/// runtime's: only that mount has it.
///
/// # Errors
/// [`RunError::Destination`].
pub fn check_destinations(target: &str, root: &Path, mounts: &[Prepared]) -> Result<(), RunError> {
    let dir = file::open_folder(root).map_err(step(target, "open its root"))?;
    let is_below = |place: &Path, other: &Path| place != other && place.starts_with(other);
    for mount in mounts {
        let place = Path::new(&mount.destination);
        let others = mounts.iter().map(|other| Path::new(&other.destination));
        // As memory is there in every container.
        if others.chain(["/dev", "/run", "/tmp"].map(Path::new)).any(|other| is_below(place, other)) {
            continue;
        }
        let is_folder = match &mount.source {
            None => true,
            Some(source) => fs::metadata(source).map_or(true, |metadata| metadata.is_dir()),
        };
        let found =
            match namespace::open_in_root(dir.as_fd(), place, libc::O_PATH).and_then(|one| one.metadata()) {
                Ok(metadata) if metadata.is_dir() == is_folder => continue,
                Ok(metadata) if metadata.is_dir() => "its image has a folder there",
                Ok(_) => "its image has a file there",
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENOTDIR) => "a part of that path is a file in its image",
                    Some(libc::ENOENT) => "its image has a link on that path which leads nowhere",
                    Some(libc::ELOOP) => "its image has links on that path which lead in a circle",
                    // The runtime knows more.
                    _ => continue,
                },
            };
        let what = if is_folder { "a folder" } else { "a file" };
        let destination = mount.destination.clone();
        return Err(RunError::Destination { target: target.into(), what, destination, found });
    }
    Ok(())
}

/// Makes a volume. One that was begun and not finished has another name, and is made anew.
fn make_volume(
    container: &Container,
    volumes: &Path,
    name: &str,
    mount: &Mount,
    root: &Path,
) -> io::Result<()> {
    match file::create_folder(volumes, 0o700) {
        Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists => {}
        other => other.map_err(|error| error.source)?,
    }
    fs::set_permissions(volumes, fs::Permissions::from_mode(0o700))?;
    let dir = file::open_folder(root)?;
    let destination = Path::new(&mount.destination);
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let (uid, gid, mode) = match namespace::open_in_root(dir.as_fd(), destination, flags) {
        Ok(folder) => {
            let metadata = folder.metadata()?;
            let base = container.base.unwrap_or(0);
            (
                metadata.uid().saturating_sub(base),
                metadata.gid().saturating_sub(base),
                metadata.mode() & 0o1777,
            )
        }
        Err(_) => (0, 0, 0o755),
    };
    // A dot is in no name of a volume's beginning.
    let begun = volumes.join(format!(".{name}"));
    match fs::remove_dir(&begun) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    file::create_folder(&begun, 0o700).map_err(|error| error.source)?;
    chown(&begun, Some(uid), Some(gid))?;
    fs::set_permissions(&begun, fs::Permissions::from_mode(mode))?;
    file::open_folder(&begun)?.sync_all()?;
    fs::rename(&begun, volumes.join(name))?;
    file::open_folder(volumes)?.sync_all()
}

/// /etc/hosts and /etc/resolv.conf of a container.
fn network_files(
    container: &Container,
    folders: &Folders<'_>,
    for_real: bool,
) -> Result<Vec<Prepared>, RunError> {
    let target = container.name.as_str();
    let failed = |what: &str| step::<io::Error>(target, what);
    if for_real {
        let addresses = container.addresses.of.iter().map(|(name, address)| (name.as_str(), address));
        let text = hosts(&container.name, &container.target.network, addresses);
        write_note(folders.hosts, &text)?;
    }
    let mut all = vec![Prepared::read_only(folders.hosts, "/etc/hosts")];
    let mut add = |name: &str, text: &str| -> io::Result<()> {
        let path = folders.work.join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
        all.push(Prepared::read_only(&path, &format!("/etc/{name}")));
        Ok(())
    };
    let resolv = match container.target.network {
        Network::None => String::new(),
        Network::Host | Network::Simple { .. } => {
            let read = |path: &str| -> Result<String, RunError> {
                let found = file::find_regular(Path::new(path), file::Links::Followed, MAX_RESOLV)?;
                Ok(String::from_utf8_lossy(&found.unwrap_or_default()).into_owned())
            };
            let own = read("/etc/resolv.conf")?;
            // The host's own resolver is out of reach in another network: what it asks is not.
            if container.target.network != Network::Host && asks_this_host_alone(&own) {
                read("/run/systemd/resolve/resolv.conf")?
            } else {
                own
            }
        }
    };
    add("resolv.conf", &resolv).map_err(failed("write resolv.conf"))?;
    Ok(all)
}

/// Whether a resolver's configuration names loopback addresses alone.
fn asks_this_host_alone(resolv: &str) -> bool {
    let mut servers = resolv.lines().filter_map(|line| line.strip_prefix("nameserver"));
    servers.all(|server| server.trim().starts_with("127.") || server.trim() == "::1")
}

/// Returns the hosts file of a container: itself, and all targets with addresses by name.
fn hosts<'a>(
    own: &TargetName,
    network: &Network,
    addresses: impl Iterator<Item = (&'a str, &'a Ipv4Addr)> + Clone,
) -> String {
    let mut text = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n".to_string();
    if addresses.clone().all(|(name, _)| name != own.as_str()) {
        text += &format!("127.0.1.1 {own}\n");
    }
    if let Network::Simple { .. } | Network::Host = network {
        for (name, address) in addresses {
            text += &format!("{address} {name}\n");
        }
    }
    text
}

/// Writes the hosts files of the containers of a system that run: targets come and go beside them.
///
/// # Errors
/// [`IoError`] with the path.
pub fn follow_hosts(
    places: &Places,
    manifest: &SystemManifest,
    addresses: &BTreeMap<String, Ipv4Addr>,
) -> Result<(), IoError> {
    for (name, target) in
        manifest.targets.iter().filter(|(_, one)| one.service_type == ServiceType::Container)
    {
        let addresses = addresses.iter().map(|(name, address)| (name.as_str(), address));
        let text = hosts(name, &target.network, addresses);
        let path = places.hosts(name.as_str());
        match file::find_regular(&path, file::Links::Refused, MAX_HOSTS)? {
            Some(found) if found != text.as_bytes() => {}
            _ => continue,
        }
        // What is mounted in the container is this file: another one in its place would not show there.
        let write = || {
            let mut options = fs::OpenOptions::new();
            let file = options.write(true).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC).open(&path)?;
            file.write_all_at(text.as_bytes(), 0)?;
            file.set_len(text.len() as u64)
        };
        write().on("write", &path)?;
    }
    Ok(())
}

/// Copies the secrets of a target to memory that its user alone can read.
fn secrets(container: &Container, folders: &Folders<'_>, user: &User) -> Result<Option<Prepared>, RunError> {
    let target = container.name.as_str();
    let names = container.target.workload.secrets.as_deref().unwrap_or_default();
    if names.is_empty() {
        return Ok(None);
    }
    let Some(from) = folders.credentials else {
        let why = io::Error::other("systemd has loaded no credentials; the target runs as its unit only");
        return Err(step(target, "read its secrets")(why));
    };
    let base = container.base.unwrap_or(0);
    let folder = folders.work.join("secrets");
    let copy = || -> io::Result<()> {
        file::create_folder(&folder, 0o700).map_err(|error| error.source)?;
        for name in names {
            let bytes = fs::read(from.join(name))
                .map_err(|error| io::Error::new(error.kind(), format!("secret {name}: {error}")))?;
            let path = folder.join(name);
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o400).open(&path)?;
            io::Write::write_all(&mut file, &bytes)?;
            chown(&path, Some(base + user.uid), Some(base + user.gid))?;
        }
        chown(&folder, Some(base + user.uid), Some(base + user.gid))?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o500))
    };
    copy().map_err(step(target, "read its secrets"))?;
    Ok(Some(Prepared::read_only(&folder, "/run/secrets")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::tests::system;

    #[test]
    fn a_resolver_of_the_host_is_no_use_in_another_network() {
        assert!(asks_this_host_alone("# by systemd-resolved\nnameserver 127.0.0.53\noptions edns0\n"));
        assert!(!asks_this_host_alone("nameserver 127.0.0.53\nnameserver 192.0.2.1\n"));
    }

    #[test]
    fn options_are_those_of_the_manifest_after_those_of_the_type() {
        let options_of = |written: &[&str]| {
            let written = Some(written.iter().map(|one| one.to_string()).collect());
            let mount = Mount { destination: "/d".into(), source: None, kind: None, options: written };
            options(&mount, &["rbind", "nosuid", "nodev"])
        };
        assert_eq!(options_of(&["bind", "ro", "nodev"]), ["rbind", "nosuid", "nodev", "ro"]);
        assert_eq!(options_of(&[]), ["rbind", "nosuid", "nodev"]);
    }

    #[test]
    fn the_hosts_file_of_what_runs_is_written_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { run: dir.path().into(), system: dir.path().into() };
        places.make_notes().unwrap();
        let container = |network: &str| format!("service_type: container, network: {{type: {network}}}");
        let (simple, host, none) = (container("simple"), container("host"), container("none"));
        let manifest = system(&[("web", &simple), ("db", &simple), ("hostly", &host), ("alone", &none)]);
        let addresses = |all: &[(&str, [u8; 4])]| {
            all.iter().map(|(name, octets)| (name.to_string(), Ipv4Addr::from(*octets))).collect()
        };
        let inode = |name: &str| fs::metadata(places.hosts(name)).unwrap().ino();
        for name in ["web", "hostly", "alone"] {
            fs::write(
                places.hosts(name),
                "of before, and a long line that is no longer there at all\n".repeat(9),
            )
            .unwrap();
        }
        let before = ["web", "hostly", "alone"].map(inode);
        let read = |name: &str| fs::read_to_string(places.hosts(name)).unwrap();
        let local = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n";
        let both: BTreeMap<_, _> = addresses(&[("db", [10, 0, 3, 2]), ("web", [10, 0, 3, 3])]);
        let one: BTreeMap<_, _> = addresses(&[("web", [10, 0, 3, 3])]);
        for (given, lines) in
            [(&both, "10.0.3.2 db\n10.0.3.3 web\n"), (&one, "10.0.3.3 web\n"), (&one, "10.0.3.3 web\n")]
        {
            follow_hosts(&places, &manifest, given).unwrap();
            assert_eq!(read("web"), format!("{local}{lines}"));
            assert_eq!(read("hostly"), format!("{local}127.0.1.1 hostly\n{lines}"));
            assert_eq!(read("alone"), format!("{local}127.0.1.1 alone\n"));
        }
        // A file that is bound elsewhere stays the same one. What does not run gets none.
        assert_eq!(["web", "hostly", "alone"].map(inode), before);
        assert!(!places.hosts("db").exists());
        // A link is not followed.
        fs::write(dir.path().join("other"), "other").unwrap();
        std::os::unix::fs::symlink(dir.path().join("other"), places.hosts("db")).unwrap();
        let error = follow_hosts(&places, &manifest, &both).unwrap_err();
        assert!(error.to_string().contains("db.hosts"), "{error}");
        assert_eq!(fs::read_to_string(dir.path().join("other")).unwrap(), "other");
    }
}
