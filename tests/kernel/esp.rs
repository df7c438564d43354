//! The EFI system partition over install, update, commit and gc; what crashes leave on it, and what is not ours.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use mosfs::internals::deploy::choice::{Role, choose};
use mosfs::internals::deploy::{DeployError, System};
use mosfs::internals::digest::Digest;
use mosfs::internals::error::Classified;
use mosfs::internals::floor::{self, FloorLocation};
use mosfs::internals::trust::Anchor;
use tempfile::TempDir;

use super::fixture::{MOSFS, PRODUCT, Publisher};
use super::tools::{run, run_any, sh};

/// Versions 200 and 201 with one kernel, 202 with another, 203 with that of 200 again.
struct Systems {
    publisher: Publisher,
    /// The first 12 digits of the two kernel ids.
    ids: [String; 2],
    /// The two kernel images.
    kernels: [Vec<u8>; 2],
}

fn systems() -> &'static Systems {
    static SYSTEMS: OnceLock<Systems> = OnceLock::new();
    SYSTEMS.get_or_init(|| {
        let publisher = Publisher::new();
        for version in [200, 201, 203] {
            publisher.build(version, "store", &[]);
        }
        publisher.build(202, "store", &["--cmdline", "quiet"]);
        let id = |version| publisher.kernel_id("store", version)[..12].to_string();
        let kernel = |version| fs::read(publisher.unpack("store", version).join("mosfs.efi")).unwrap();
        let (ids, kernels) = ([id(200), id(202)], [kernel(200), kernel(202)]);
        Systems { publisher, ids, kernels }
    })
}

/// A device with an EFI system partition, which is a folder here, and the development floor.
pub struct Device {
    pub dir: TempDir,
}

impl Device {
    pub fn new() -> Self {
        let this = Self { dir: TempDir::new().unwrap() };
        fs::create_dir(this.esp()).unwrap();
        this
    }

    /// A device with version 200.
    pub fn installed() -> Self {
        let this = Self::new();
        this.run(&this.install());
        this
    }

    pub fn esp(&self) -> PathBuf {
        self.dir.path().join("esp")
    }

    pub fn system(&self) -> PathBuf {
        self.dir.path().join("system")
    }

    pub fn command(&self, words: &[String]) -> Command {
        let mut command = Command::new(MOSFS);
        command.args(words).args(["--floor", "file"]).env_remove("MOSFS_FAILPOINT");
        for (name, folder) in [
            ("MOSFS_SYSTEM", "system"),
            ("MOSFS_CONFIG", "config"),
            ("MOSFS_RUN", "run"),
            ("MOSFS_ESP", "esp"),
        ] {
            command.env(name, self.dir.path().join(folder));
        }
        command
    }

    pub fn run(&self, words: &[String]) -> String {
        run(&mut self.command(words))
    }

    pub fn install(&self) -> Vec<String> {
        let ca = systems().publisher.path("keys/ca.pem").display().to_string();
        ["install", &source(200), "--ca", &ca, "--product", PRODUCT].map(String::from).to_vec()
    }

    pub fn commit(&self) -> String {
        self.run(&["commit".into()])
    }

    /// The names in `EFI/Linux`, sorted.
    pub fn names(&self) -> Vec<String> {
        let list = fs::read_dir(self.esp().join("EFI/Linux")).unwrap();
        let mut names: Vec<_> = list.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub fn rename(&self, from: &str, to: &str) {
        let folder = self.esp().join("EFI/Linux");
        fs::rename(folder.join(from), folder.join(to)).unwrap();
    }

    /// Every file with its content and the times of its last changes.
    pub fn snapshot(&self) -> BTreeMap<PathBuf, (u64, i64, i64, Vec<u8>)> {
        let list = sh(&self.esp(), "find . -type f");
        let entry = |path: &str| {
            let path = self.esp().join(path);
            let data = fs::metadata(&path).unwrap();
            (path.clone(), (data.ino(), data.mtime(), data.mtime_nsec(), fs::read(path).unwrap()))
        };
        list.lines().map(entry).collect()
    }

    /// Wants these names in `EFI/Linux`, each with the kernel whose id it has.
    pub fn expect(&self, names: &[&str]) {
        assert_eq!(self.names(), names);
        for name in names {
            let which =
                systems().ids.iter().position(|id| name.contains(id.as_str())).expect("an id of ours");
            let content = fs::read(self.esp().join("EFI/Linux").join(name)).unwrap();
            assert!(content == systems().kernels[which], "{name} is whole");
        }
    }

    /// What a boot under a kernel would start, and in which role.
    pub fn boot(&self, kernel: Option<Digest>) -> Result<(u64, Role), String> {
        self.try_boot(kernel).map_err(|(_, why)| why)
    }

    /// The same, with the exit code of a refusal.
    pub fn try_boot(&self, kernel: Option<Digest>) -> Result<(u64, Role), (u8, String)> {
        let system = System::at(self.system());
        let config = self.dir.path().join("config");
        let anchor = Anchor::load(&config).unwrap();
        let mut floor = floor::open(&FloorLocation::File(self.system().join("floor")), &config).unwrap();
        let booted = choose(&system, &anchor, floor.as_mut(), kernel, |_, _| Ok(()));
        let refused = |error: DeployError| (error.class().exit_code(), error.to_string());
        booted.map(|booted| (booted.deployment.version, booted.role)).map_err(refused)
    }

    /// Starts what systemd-boot would start: kernels without tries left come last, then the highest version comes
    /// first (systemd-boot(7), "Boot counting"; Boot Loader Specification, "Sorting").
    pub fn start_as_the_loader_does(&self) -> Result<(u64, Role), String> {
        let names = self.names();
        let rank = |name: &&String| {
            let version: u64 = name.split('-').nth(1).unwrap().parse().unwrap();
            (!name.contains("+0"), version)
        };
        let kernel = names.iter().filter(|name| name.ends_with(".efi")).max_by_key(rank).expect("a kernel");
        let which = systems().ids.iter().position(|id| kernel.contains(id.as_str())).unwrap();
        self.boot(Some(kernel_ids()[which]))
    }

    /// Records that this boot runs a version, as `mosfs boot` does.
    pub fn record(&self, version: u64) {
        let list = fs::read_dir(self.system().join("deployments")).unwrap();
        let mut names = list.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let deployment = names.find(|name| name.starts_with(&format!("{version}-"))).unwrap();
        fs::create_dir_all(self.dir.path().join("run")).unwrap();
        let record = format!("{{\"deployment\":\"{deployment}\",\"backend\":\"fuse\",\"phases_ms\":[]}}");
        fs::write(self.dir.path().join("run/boot.json"), record).unwrap();
    }

    pub fn state(&self) -> serde_json::Value {
        serde_json::from_slice(&fs::read(self.system().join("state.json")).unwrap()).unwrap()
    }

    /// Wants every kernel that has its final name to be whole.
    pub fn expect_whole(&self) {
        for name in self.names().iter().filter(|name| name.ends_with(".efi")) {
            let which = systems().ids.iter().position(|id| name.contains(id.as_str())).unwrap();
            let content = fs::read(self.esp().join("EFI/Linux").join(name)).unwrap();
            assert!(content == systems().kernels[which], "{name} is whole");
        }
    }
}

/// The store of the publisher.
pub fn store() -> PathBuf {
    systems().publisher.path("store")
}

fn source(version: u64) -> String {
    format!("oci:{}:mos/system/system:{version}", store().display())
}

pub fn update(version: u64) -> Vec<String> {
    vec!["update".into(), source(version)]
}

/// The full kernel ids.
pub fn kernel_ids() -> [Digest; 2] {
    let publisher = &systems().publisher;
    [200, 202].map(|version| Digest::from_hex(&publisher.kernel_id("store", version)).unwrap())
}

pub fn name(version: u64, kernel: usize, count: &str) -> String {
    format!("mosfs-{version}-{}{count}.efi", systems().ids[kernel])
}

#[test]
fn the_first_system_brings_its_kernel_and_the_loader() {
    let device = Device::installed();
    device.expect(&[&name(200, 0, "")]);
    let loader = fs::read(device.esp().join("EFI/BOOT/BOOTX64.EFI")).unwrap();
    assert!(loader == fs::read("/usr/lib/systemd/boot/efi/systemd-bootx64.efi").unwrap());
    let before = device.snapshot();
    device.run(&device.install());
    device.commit();
    device.run(&["gc".into()]);
    assert_eq!(device.snapshot(), before, "nothing is written a second time");
}

#[test]
fn a_version_with_the_same_kernel_changes_nothing() {
    let device = Device::installed();
    let before = device.snapshot();
    device.run(&update(201));
    device.commit();
    device.run(&["gc".into()]);
    assert_eq!(device.snapshot(), before);
    assert_eq!(device.boot(Some(kernel_ids()[0])), Ok((201, Role::Current)));
}

#[test]
fn another_kernel_is_on_trial_until_its_version_is_committed() {
    let device = Device::installed();
    device.run(&update(202));
    let [old, new] = [name(200, 0, ""), name(202, 1, "+3")];
    device.expect(&[&old, &new]);
    // The old kernel passes the pending version over, and spends none of its tries.
    let [first, second] = kernel_ids();
    assert_eq!(device.boot(Some(first)), Ok((200, Role::Current)));
    assert_eq!(device.state()["pending"]["tries_left"], 3);
    let why = device.state()["last_boot"]["refused"][0]["why"].as_str().unwrap().to_string();
    assert_eq!(why, format!("its kernel is not running: the system requires {second}, {first} is running"));
    // systemd-boot counts in the name; another command leaves that alone.
    device.rename(&new, &name(202, 1, "+2-1"));
    device.run(&["gc".into()]);
    device.expect(&[&old, &name(202, 1, "+2-1")]);
    assert_eq!(device.boot(Some(second)), Ok((202, Role::Pending)));
    assert_eq!(device.state()["pending"]["tries_left"], 2);
    device.record(202);
    device.commit();
    // The old version is below the floor now, and so its kernel is gone.
    device.expect(&[&name(202, 1, "")]);
    // The old kernel, signed as it may be, starts nothing: and neither does one without an id.
    for other in [Some(first), None] {
        let error = device.boot(other).unwrap_err();
        assert!(error.contains("its kernel is not running"), "{error}");
    }
    assert_eq!(device.boot(Some(second)), Ok((202, Role::Current)));
}

/// Acceptance: whoever can write the disk puts everything back as it was: an old kernel, signed as it is, and the old system
/// with its state file. The floor, which a TPM keeps, stays where it is.
#[test]
fn an_old_kernel_that_is_put_back_starts_nothing_also_with_the_old_state() {
    let device = Device::installed();
    device.commit();
    let [first, second] = kernel_ids();
    let (system, floor) = (device.system(), device.system().join("floor"));
    sh(device.dir.path(), "cp -a system old-system && cp -a esp old-esp");
    device.run(&update(202));
    assert_eq!(device.boot(Some(second)), Ok((202, Role::Pending)));
    device.record(202);
    device.commit();
    device.expect(&[&name(202, 1, "")]);
    // The kernel alone: the system that is current has another one.
    sh(device.dir.path(), "cp -a old-esp/EFI/Linux/. esp/EFI/Linux/");
    device.expect(&[&name(200, 0, ""), &name(202, 1, "")]);
    let (code, why) = device.try_boot(Some(first)).unwrap_err();
    assert!(why.contains("its kernel is not running"), "{why}");
    assert_eq!(code, 3, "{why}");
    // The next command removes it.
    device.run(&["gc".into()]);
    device.expect(&[&name(202, 1, "")]);
    // All of it: its own kernel runs, and its signatures are good.
    let raised = fs::read(&floor).unwrap();
    sh(device.dir.path(), "rm -r system esp && mv old-system system && mv old-esp esp");
    fs::write(&floor, raised).unwrap();
    assert!(system.join("state.json").exists());
    for kernel in [first, second] {
        let (code, why) = device.try_boot(Some(kernel)).unwrap_err();
        assert!(
            why.contains("version 200 is below the floor: this device allows version 202 and up"),
            "{why}"
        );
        assert_eq!(code, 4, "{why}");
    }
}

#[test]
fn a_version_may_go_back_to_an_older_kernel() {
    let device = Device::installed();
    device.run(&update(202));
    device.commit();
    device.run(&update(203));
    // It sorts above the one that runs.
    device.expect(&[&name(202, 1, ""), &name(203, 0, "+3")]);
    device.commit();
    device.expect(&[&name(203, 0, "")]);
}

#[test]
fn a_kernel_whose_tries_are_used_up_is_tried_again_only_if_asked() {
    let device = Device::installed();
    device.run(&update(202));
    device.rename(&name(202, 1, "+3"), &name(202, 1, "+0-3"));
    device.run(&update(202));
    device.expect(&[&name(200, 0, ""), &name(202, 1, "+0-3")]);
    // Three starts of the version itself, none of which was healthy.
    for left in [2, 1, 0] {
        assert_eq!(device.boot(Some(kernel_ids()[1])), Ok((202, Role::Pending)));
        assert_eq!(device.state()["pending"]["tries_left"], left);
    }
    let mut words = update(202);
    words.push("--again".into());
    device.run(&words);
    device.expect(&[&name(200, 0, ""), &name(202, 1, "+3")]);
}

#[test]
fn what_belongs_to_others_stays() {
    let device = Device::new();
    for (path, content) in [
        ("EFI/BOOT/BOOTX64.EFI", "another loader"),
        ("EFI/Linux/arch.efi", "another kernel"),
        ("EFI/Linux/mosfs-notes.txt", "not a kernel"),
        ("EFI/Microsoft/Boot/bootmgfw.efi", "another system"),
        ("loader/loader.conf", "timeout 5"),
    ] {
        let path = device.esp().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let before = device.snapshot();
    device.run(&device.install());
    device.run(&update(202));
    let commit = run_any(&mut device.command(&["commit".into()]));
    let said = String::from_utf8_lossy(&commit.stderr).into_owned();
    assert!(commit.status.success(), "{said}");
    assert!(said.contains("EFI/BOOT/BOOTX64.EFI belongs to another system, and is not replaced"), "{said}");
    let after = device.snapshot();
    for (path, file) in &before {
        assert_eq!(after.get(path), Some(file), "{}", path.display());
    }
    assert!(device.names().contains(&name(202, 1, "")));
}

#[test]
fn without_room_nothing_is_fetched() {
    let device = Device::installed();
    let mount = Mounted::tmpfs(&device.esp(), "size=2m");
    fs::create_dir_all(device.esp().join("EFI/Linux")).unwrap();
    fs::write(device.esp().join("EFI/Linux/arch.efi"), vec![0; 100_000]).unwrap();
    let blobs = || fs::read_dir(device.system().join("store/blobs/sha256")).unwrap().count();
    let (before, state) = (blobs(), device.state()["pending"].clone());
    let output = run_any(&mut device.command(&update(202)));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let begin = format!("\nmosfs: the EFI system partition {} has ", device.esp().display());
    assert!(said.contains(&begin), "{said}");
    assert!(
        said.contains(" are needed for the kernel of version 202; kernels on it: arch.efi (100000 bytes)\n"),
        "{said}"
    );
    assert_eq!((blobs(), device.state()["pending"].clone()), (before, state));
    // Acceptance: a file of another system fills it. Nothing on it is touched, and no byte is written.
    let other = device.esp().join("EFI/Other");
    fs::create_dir(&other).unwrap();
    let free = sh(&device.esp(), "df --output=avail -B1 . | tail -n 1");
    sh(&other, &format!("fallocate -l {} data", free.trim()));
    let before = (device.snapshot(), blobs());
    let output = run_any(&mut device.command(&update(202)));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let begin = format!("\nmosfs: the EFI system partition {} has 0 bytes free", device.esp().display());
    assert!(said.contains(&begin) && said.contains("arch.efi (100000 bytes)"), "{said}");
    assert_eq!((device.snapshot(), blobs()), before);
    drop(mount);
}

/// A small file system, unmounted when this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(place: &Path, options: &str) -> Self {
        run(Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(place));
        Self(place.to_path_buf())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn an_update_whose_kernel_has_no_place_is_refused() {
    let device = Device::installed();
    let without = |version| run_any(device.command(&update(version)).env_remove("MOSFS_ESP"));
    let output = without(202);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let expected = "mosfs: version 202 has a kernel of its own, and no EFI system partition is mounted to put it on\n\
                    hint: mount the EFI system partition, and name it with `--esp DIR`\n";
    assert!(said.ends_with(expected), "{said}");
    assert!(device.state()["pending"].is_null());
    // One that keeps the kernel needs no place.
    assert!(without(201).status.success());
}

/// Where a commit of another kernel may end.
const COMMIT_POINTS: [&str; 5] = [
    "commit.state.blessed",
    "esp.kernel.renamed",
    "commit.kernel.blessed",
    "commit.floor.raised",
    "esp.kernel.removed",
];

/// systemd-boot has counted the last try of a kernel when its system commits. After a crash it starts the old kernel,
/// unless the count is gone: so the floor, which refuses the old system, must not be raised before that.
#[test]
fn a_crash_in_the_commit_of_the_last_try_leaves_a_machine_that_starts() {
    for point in COMMIT_POINTS {
        let device = Device::installed();
        device.run(&update(202));
        device.rename(&name(202, 1, "+3"), &name(202, 1, "+0-3"));
        assert_eq!(device.boot(Some(kernel_ids()[1])), Ok((202, Role::Pending)));
        device.record(202);
        let output = run_any(device.command(&["commit".into()]).env("MOSFS_FAILPOINT", point));
        assert_eq!(output.status.code(), None, "{point}");
        let (version, _) =
            device.start_as_the_loader_does().unwrap_or_else(|error| panic!("{point}: {error}"));
        // Before its count is gone, the old version is what runs, and what is committed.
        let expected = if point == "commit.state.blessed" { 200 } else { 202 };
        assert_eq!(version, expected, "{point}");
        device.record(version);
        device.commit();
        assert_eq!(device.start_as_the_loader_does(), Ok((expected, Role::Current)), "{point}");
    }
}

/// FAT writes the new name before it removes the old one: a crash in between leaves both with the same blocks, and
/// whoever removes one of them frees the blocks of the other.
#[test]
fn of_two_names_of_one_kernel_neither_is_removed() {
    let device = Device::installed();
    device.run(&update(202));
    let folder = device.esp().join("EFI/Linux");
    let both = |one: &str, other: &str| {
        fs::hard_link(folder.join(one), folder.join(other)).unwrap();
        let before = device.snapshot();
        device.run(&["gc".into()]);
        device.run(&update(202));
        assert_eq!(device.snapshot(), before, "{one} {other}");
        fs::remove_file(folder.join(one)).unwrap();
        fs::rename(folder.join(other), folder.join(one)).unwrap();
    };
    let new = name(202, 1, "+3");
    both(&new, &format!("{new}.new"));
    both(&new, &name(202, 1, "+2-1"));
    // The commit was about to remove the count.
    let kept = name(202, 1, "");
    fs::hard_link(folder.join(&new), folder.join(&kept)).unwrap();
    device.commit();
    device.expect(&[&new, &kept]);
    let before = device.snapshot();
    device.commit();
    assert_eq!(device.snapshot(), before);
    // The files of a kernel that nothing names any more are removed together.
    device.run(&update(203));
    device.commit();
    device.expect(&[&name(203, 0, "")]);
}

/// FAT writes a new name without a size, and gives it the blocks of the old one after that.
#[test]
fn an_empty_name_is_no_kernel() {
    let device = Device::installed();
    device.run(&update(202));
    let folder = device.esp().join("EFI/Linux");
    let new = name(202, 1, "+3");
    device.rename(&new, &format!("{new}.new"));
    fs::write(folder.join(&new), "").unwrap();
    device.run(&update(202));
    device.expect(&[&name(200, 0, ""), &new]);
    // The commit was about to remove the count.
    assert_eq!(device.boot(Some(kernel_ids()[1])), Ok((202, Role::Pending)));
    device.record(202);
    fs::write(folder.join(name(202, 1, "")), "").unwrap();
    device.commit();
    device.expect(&[&name(202, 1, "")]);
    // And one that nothing is to replace.
    fs::write(folder.join(&new), "").unwrap();
    device.run(&["gc".into()]);
    device.expect(&[&name(202, 1, "")]);
}

#[test]
fn a_commit_names_the_process_that_it_has_waited_for() {
    let device = Device::installed();
    let lock = device.system().join("lock");
    let mut command = Command::new("flock");
    command.arg(&lock).args(["-c", "echo held; exec cat"]);
    let mut holder =
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut word = [0; 5];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut word).unwrap();
    let output = run_any(&mut device.command(&["commit".into(), "--wait".into(), "0".into()]));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    drop(holder.stdin.take());
    holder.wait().unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let expected = format!(
        "mosfs: waiting for another mosfs that changes {}\nmosfs: {} was not released within 0 s by process {}\n\
         hint: let the other process finish, or end it; `--wait` waits longer\n",
        device.system().display(),
        lock.display(),
        holder.id()
    );
    assert!(said.ends_with(&expected), "{said}");
    device.commit();
}

#[test]
fn a_crash_at_any_point_leaves_the_old_kernel_and_the_next_command_finishes() {
    let points = |point: &str, commands: &[Vec<String>], last: &[&str]| {
        let device = Device::installed();
        for words in &commands[..commands.len() - 1] {
            device.run(words);
        }
        let words = &commands[commands.len() - 1];
        if words == &["commit".to_string()] {
            device.record(202);
        }
        let output = run_any(device.command(words).env("MOSFS_FAILPOINT", point));
        assert_eq!(output.status.code(), None, "{point} is not on the way of {words:?}");
        // Whatever has its final name is whole, and something that boots is there.
        device.expect_whole();
        let names = device.names();
        let started = device.start_as_the_loader_does();
        assert!(started.is_ok(), "{point}: {names:?}: {started:?}");
        device.run(words);
        device.expect(last);
    };
    let [old, new, kept] = [name(200, 0, ""), name(202, 1, "+3"), name(202, 1, "")];
    let after_update = [old.as_str(), new.as_str()];
    for point in ["esp.kernel.written", "deploy.state.written", "deploy.state.renamed", "esp.kernel.renamed"]
    {
        points(point, &[update(202)], &after_update);
    }
    let commit = vec!["commit".to_string()];
    for point in COMMIT_POINTS {
        points(point, &[update(202), commit.clone()], &[kept.as_str()]);
    }
    for point in ["esp.loader.written", "esp.loader.renamed", "esp.record.written", "esp.kernel.written"] {
        let device = Device::new();
        let output = run_any(device.command(&device.install()).env("MOSFS_FAILPOINT", point));
        assert_eq!(output.status.code(), None, "{point}");
        device.run(&device.install());
        device.expect(&[&old]);
        assert!(device.esp().join("EFI/BOOT/BOOTX64.EFI").exists(), "{point}");
    }
}
