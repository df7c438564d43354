//! `mosfs setup` on loop devices: what it writes, what it refuses before it writes anything, and what crashes leave.

#[path = "../registry/debian.rs"]
#[allow(dead_code)]
mod debian;
#[path = "../kernel/fixture.rs"]
#[allow(dead_code)]
mod fixture;
#[path = "../common/nbd.rs"]
mod nbd;
#[path = "../common/plugged.rs"]
mod plugged;
#[path = "../common/swtpm.rs"]
#[allow(dead_code)]
mod swtpm;
#[path = "../common/tools.rs"]
mod tools;
#[path = "../common/unmount.rs"]
mod unmount;

mod locked;
mod power;
mod remote;
mod space;

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

use mosfs::internals::digest::{Digest, Hasher};
use mosfs::internals::sys::file::next_data;

use debian::{Config, Debian};
use fixture::{MOSFS, PRODUCT, Publisher, generate_keys};
use swtpm::Swtpm;
use tempfile::TempDir;
use tools::{need_root, run, run_any, sh};
use unmount::unmount;

/// The size of a disk, in MiB.
const MIB: u64 = 640;
/// What a disk is compared by, in bytes.
const BLOCK: u64 = 64 << 10;

/// A publisher with version 200 and 201, both with a kernel of their own.
fn publisher() -> &'static Publisher {
    static PUBLISHER: OnceLock<Publisher> = OnceLock::new();
    PUBLISHER.get_or_init(|| {
        let publisher = Publisher::new();
        publisher.build(200, "store", &[]);
        publisher.build(201, "store", &[]);
        let folder = publisher.path("config");
        fs::create_dir(&folder).unwrap();
        for (from, to) in [("ca.pem", "manifestCA.pem"), ("floor.pub", "floor.pub")] {
            fs::copy(publisher.path("keys").join(from), folder.join(to)).unwrap();
        }
        fs::write(folder.join("product"), format!("{PRODUCT}\n")).unwrap();
        publisher
    })
}

/// A file that is a disk, attached to a loop device.
struct Disk {
    _dir: TempDir,
    image: PathBuf,
    device: String,
}

impl Disk {
    fn new() -> Self {
        Self::of(MIB, &["--partscan"])
    }

    fn of(mib: u64, options: &[&str]) -> Self {
        Self::of_bytes(mib << 20, options)
    }

    fn of_bytes(bytes: u64, options: &[&str]) -> Self {
        need_root();
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("disk");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let device = attach(&image, options);
        Self { _dir: dir, image, device }
    }

    /// Writes to the disk as another system would.
    fn put(&self, at: u64, bytes: &[u8]) {
        let mut device = File::options().write(true).open(&self.device).unwrap();
        device.seek(SeekFrom::Start(at)).unwrap();
        device.write_all(bytes).unwrap();
        device.sync_all().unwrap();
    }

    fn read(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut device = File::open(&self.device).unwrap();
        device.seek(SeekFrom::Start(at)).unwrap();
        let mut found = vec![0; bytes];
        device.read_exact(&mut found).unwrap();
        found
    }

    /// Of all that is not zero.
    fn digest(&self) -> Digest {
        File::open(&self.device).unwrap().sync_all().unwrap();
        let (file, mut hash, mut at) = (File::open(&self.image).unwrap(), Hasher::new(), 0);
        let (mut block, zeros) = (vec![0; BLOCK as usize], vec![0; BLOCK as usize]);
        while let Some((begin, end)) = next_data(&file, at).unwrap() {
            at = begin - begin % BLOCK;
            while at < end {
                file.read_exact_at(&mut block, at).unwrap();
                if block != zeros {
                    hash.update(format!("{at}\n").as_bytes());
                    hash.update(&block);
                }
                at += BLOCK;
            }
        }
        hash.finish()
    }

    fn part(&self, number: u32) -> String {
        format!("{}p{number}", self.device)
    }

    /// Keeps udev away while its partitions are looked at. A kernel that reads no GPT forgets them when udev asks it to read
    /// the table again, and is told of them here; any other has them already.
    fn held(&self) -> File {
        let device = File::open(&self.device).unwrap();
        device.lock().unwrap();
        let mut command = Command::new("partx");
        let _ = command.args(["--add", &self.device]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        device
    }

    /// Mounts the system partition read-only for a look.
    fn look<T>(&self, look: impl FnOnce(&Path) -> T) -> T {
        let place = TempDir::new().unwrap();
        run(Command::new("mount").args(["-o", "ro", &self.part(2)]).arg(place.path()));
        let found = look(place.path());
        unmount(Command::new("umount").arg(place.path()));
        found
    }

    /// The files on the EFI system partition, as mtools lists them.
    fn esp(&self) -> Vec<String> {
        let list = sh(Path::new("/"), &format!("mdir -/ -b -i {} ::", self.part(1)));
        let mut names: Vec<_> = list
            .lines()
            .filter(|line| !line.ends_with('/'))
            .map(|line| line.trim_start_matches("::/").into())
            .collect();
        names.sort();
        names
    }

    /// The whole of what a setup makes: both partitions, the system, its kernel, and no mark.
    fn expect_installed(&self, version: u64) {
        let _held = self.held();
        let table = sh(Path::new("/"), &format!("sfdisk -d {}", self.device));
        assert!(table.contains("label: gpt"), "{table}");
        let line = |name: &str| {
            table.lines().find(|line| line.contains(&format!("name=\"{name}\""))).unwrap().to_string()
        };
        assert!(
            line("mosfs-esp")
                .contains("start=        2048, size=     1048576, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B"),
            "{table}"
        );
        assert!(
            line("mosfs").contains("start=     1050624,")
                && line("mosfs").contains("type=0FC63DAF-8483-4772-8E79-3D69D8477DE4"),
            "{table}"
        );
        let id = &publisher().kernel_id("store", version)[..12];
        assert_eq!(
            self.esp(),
            [
                "EFI/BOOT/BOOTX64.EFI".to_string(),
                format!("EFI/Linux/mosfs-{version}-{id}.efi"),
                "EFI/mosfs/loader".to_string()
            ]
        );
        run(Command::new("fsck.fat").args(["-n", &self.part(1)]));
        run(Command::new("e2fsck").args(["-fn", &self.part(2)]));
        let kernel = publisher().unpack("store", version).join("mosfs.efi");
        let copy = sh(
            Path::new("/"),
            &format!("mtype -i {} ::/EFI/Linux/mosfs-{version}-{id}.efi | sha256sum", self.part(1)),
        );
        assert_eq!(copy, sh(Path::new("/"), &format!("sha256sum < {}", kernel.display())));
        self.look(|system| {
            let state: serde_json::Value =
                serde_json::from_slice(&fs::read(system.join("state.json")).unwrap()).unwrap();
            assert!(
                state["current"].as_str().unwrap_or_default().starts_with(&format!("{version}-")),
                "{state}"
            );
            let names: Vec<_> =
                fs::read_dir(system).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert!(!names.iter().any(|name| name == "esp.new"), "{names:?}");
        });
        assert_eq!(self.read(512 << 10, 512), [0; 512], "no mark");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.device]).status();
    }
}

fn attach(image: &Path, options: &[&str]) -> String {
    let mut command = Command::new("losetup");
    run(command.args(["--find", "--show"]).args(options).arg(image)).trim().to_string()
}

/// A machine: a TPM, and a folder for what runs.
struct Machine {
    tpm: Swtpm,
    dir: TempDir,
}

impl Machine {
    fn new() -> Self {
        Self { tpm: Swtpm::start(), dir: TempDir::new().unwrap() }
    }

    /// A machine whose TPM has the floor.
    fn provisioned() -> Self {
        let this = Self::new();
        let key = publisher().path("keys/provision.key");
        run(this.mosfs(&["floor", "provision", "--provision-key"]).arg(key));
        this
    }

    fn mosfs(&self, words: &[&str]) -> Command {
        let mut command = Command::new(MOSFS);
        command.args(words).env_remove("MOSFS_FAILPOINT").env("MOSFS_TPM", self.tpm.tcti_text());
        command.env("MOSFS_CONFIG", publisher().path("config")).env("MOSFS_RUN", self.dir.path());
        command
    }

    fn setup(&self, version: u64, words: &[&str]) -> Command {
        let mut command = self.mosfs(&["setup"]);
        command.arg(format!("oci:{}:{version}", publisher().path("store").display())).args(words);
        command
    }

    fn ok(&self, version: u64, words: &[&str]) -> String {
        run(&mut self.setup(version, words))
    }

    fn floor(&self) -> u64 {
        let text = run(&mut self.mosfs(&["floor", "show", "--json"]));
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["floor"].as_u64().unwrap()
    }
}

/// A setup that must be refused with this exit code; what it says, and the verdict, say why.
fn refused(command: &mut Command, code: i32, why: &str) {
    let Output { status, stdout, stderr } = run_any(command);
    let (out, said) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert_eq!(status.code(), Some(code), "{out}\n{said}");
    assert!(said.contains(why), "expected `{why}`\n{said}");
    let verdict = out.lines().last().unwrap_or_default();
    assert!(verdict.starts_with(&format!("MOSFS-INSTALL-VERDICT: {code} ")), "{out}");
    assert!(verdict.contains(why), "{verdict}");
}

/// The same, of a disk that must stay as it is.
fn refused_untouched(disk: &Disk, command: &mut Command, code: i32, why: &str) {
    let before = disk.digest();
    refused(command, code, why);
    assert_eq!(disk.digest(), before, "the disk is as it was");
}

#[test]
fn an_empty_disk_gets_the_system_its_kernel_and_the_tpm_a_floor() {
    let (disk, machine) = (Disk::new(), Machine::new());
    let key = publisher().path("keys/provision.key");
    let words = ["--disk", &disk.device, "--provision-key", key.to_str().unwrap()];
    let before = disk.digest();
    let planned = machine.ok(200, &[&words[..], &["--dry-run"]].concat());
    assert!(
        planned
            .ends_with(&format!("MOSFS-INSTALL-VERDICT: 0 would install version 200 on {}\n", disk.device)),
        "{planned}"
    );
    assert_eq!(disk.digest(), before);
    let said = machine.ok(200, &words);
    let steps: Vec<&str> = said.lines().map(|line| line.split(':').next().unwrap()).collect();
    assert_eq!(
        steps,
        ["medium", "disk", "floor", "partition", "mkfs", "install", "verify", "esp", "MOSFS-INSTALL-VERDICT"],
        "{said}"
    );
    assert!(
        said.ends_with(&format!("\nMOSFS-INSTALL-VERDICT: 0 installed version 200 on {}\n", disk.device)),
        "{said}"
    );
    assert_eq!(machine.floor(), 0);
    disk.expect_installed(200);

    // The medium stays in: nothing is written again.
    let before = disk.digest();
    let said = machine.ok(200, &words);
    let expected = format!(
        "MOSFS-INSTALL-VERDICT: 0 version 200 is installed already on {}: nothing was written\n",
        disk.device
    );
    assert!(said.ends_with(&expected), "{said}");
    assert_eq!(disk.digest(), before);
    // Another version is another system; it takes the word that the old one may go.
    refused_untouched(&disk, &mut machine.setup(201, &words), 1, "is not empty: it holds mosfs, version 200");
    let json = run(machine.setup(201, &words).args(["--wipe", &disk.device, "--json"]));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["version"], &json["exit_code"]), (&201.into(), &0.into()), "{json}");
    disk.expect_installed(201);
}

#[test]
fn a_disk_that_is_not_empty_is_refused_and_stays_as_it_is() {
    let machine = Machine::provisioned();
    let tools: [(&str, &str); 9] = [
        ("printf 'label: gpt\\n,100M\\n' | sfdisk -q DISK", "a GPT partition table"),
        ("printf 'label: dos\\n,100M\\n' | sfdisk -q DISK", "an MBR partition table"),
        ("mke2fs -q -t ext4 -L data DISK", "ext4 labelled data"),
        ("mkfs.xfs -q DISK", "xfs"),
        (
            "pvcreate -q -ff -y --config 'devices { use_devicesfile=0 }' DISK >/dev/null 2>&1 || pvcreate -ff -y DISK",
            "LVM2_member",
        ),
        (
            "echo secret | cryptsetup -q luksFormat --type luks1 --pbkdf-force-iterations 1000 DISK -",
            "crypto_LUKS",
        ),
        (
            "printf 'label: gpt\\n,100M\\n' | sfdisk -q DISK; dd if=/dev/zero of=DISK bs=1M count=1 conv=fsync status=none",
            "a backup GPT partition table",
        ),
        ("printf x | dd of=DISK bs=1 seek=700000 conv=fsync status=none", "data of an unknown kind"),
        ("mkswap -q DISK", "swap"),
    ];
    for (tool, holds) in tools {
        let disk = Disk::new();
        sh(Path::new("/"), &tool.replace("DISK", &disk.device));
        let words = ["--disk", &disk.device];
        let why = format!("{} is not empty: it holds {holds}", disk.device);
        refused_untouched(&disk, &mut machine.setup(200, &words), 1, &why);
        // That another disk may be erased says nothing of this one.
        let other = Disk::new();
        let words = ["--disk", &disk.device, "--wipe", &other.device];
        let why = format!("{} may be erased, but the disk to set up is {}", other.device, disk.device);
        refused_untouched(&disk, &mut machine.setup(200, &words), 2, &why);
    }
    let disk = Disk::new();
    sh(Path::new("/"), &format!("mke2fs -q -t ext4 -L data {}", disk.device));
    let said = machine.ok(200, &["--disk", &disk.device, "--wipe", &disk.device]);
    assert!(said.contains("holds ext4 labelled data, and will be erased"), "{said}");
    disk.expect_installed(200);
}

#[test]
fn a_disk_that_cannot_be_used_is_refused() {
    let machine = Machine::provisioned();
    let small = Disk::of(500, &["--partscan"]);
    let why = format!("{} has 524288000 bytes; the system needs ", small.device);
    refused_untouched(&small, &mut machine.setup(200, &["--disk", &small.device]), 1, &why);
    let locked = Disk::of(MIB, &["--partscan", "--read-only"]);
    let why = format!("{} is read-only", locked.device);
    refused_untouched(&locked, &mut machine.setup(200, &["--disk", &locked.device]), 1, &why);
    let disk = Disk::new();
    refused(
        &mut machine.setup(200, &["--disk", "/dev/null"]),
        2,
        "/dev/null: expected a whole disk, found something that is no block device",
    );
    refused(&mut machine.setup(200, &["--disk", "/dev/nowhere"]), 1, "cannot stat /dev/nowhere");
    refused(
        &mut machine.setup(200, &["--disk", "serial:none-such"]),
        1,
        "no disk matches `serial:none-such`",
    );
    refused(machine.setup(200, &[]).stdin(Stdio::null()), 2, "no disk was named");
    // In use: a partition that is mounted, a program that has the disk for itself.
    sh(
        Path::new("/"),
        &format!(
            "printf 'label: gpt\\n,100M\\n' | sfdisk -q {0}; partx --add --nr 1 {0} || true",
            disk.device
        ),
    );
    let part = disk.part(1);
    let why = format!("{part}: expected a whole disk, found a partition of {}", disk.device);
    refused_untouched(&disk, &mut machine.setup(200, &["--disk", &part]), 2, &why);
    let place = TempDir::new().unwrap();
    sh(Path::new("/"), &format!("mke2fs -q -t ext4 {part} && mount {part} {}", place.path().display()));
    let words = ["--disk", &disk.device, "--wipe", &disk.device];
    let why = format!("{} is in use: {part} is mounted at {}", disk.device, place.path().display());
    refused(&mut machine.setup(200, &words), 1, &why);
    unmount(Command::new("umount").arg(place.path()));
    run(Command::new("e2fsck").args(["-fn", &part]));
}

/// A system that a registry holds, and one that a registry offers and does not have.
#[test]
fn a_system_comes_from_a_registry() {
    let (machine, registry) = (Machine::provisioned(), Debian::start(&Config::default()));
    let source = registry.source("fleet");
    let store = publisher().path("store");
    let mut push = Command::new(MOSFS);
    run(push.arg("push").arg("--store").arg(&store).arg(&source).env_remove("MOSFS_FAILPOINT"));
    let setup = |disk: &Disk, source: &str| {
        let mut command = machine.mosfs(&["setup", source, "--disk", &disk.device]);
        command.args(["--net-timeout", "30"]);
        command
    };
    let disk = Disk::new();
    let said = run(&mut setup(&disk, &source));
    assert!(said.contains("medium: version 201 (sha256:"), "the highest version: {said}");
    disk.expect_installed(201);
    // The same one from a layout: there is nothing to do.
    assert!(machine.ok(201, &["--disk", &disk.device]).contains("is installed already"));
    let disk = Disk::new();
    refused_untouched(&disk, &mut setup(&disk, &format!("{source}:7")), 2, "has no image named `7`");
    drop(registry);
    refused_untouched(&disk, &mut setup(&disk, &source), 1, "Connection refused");
}

/// Answers from a pipe, which can be read once; nobody waits for what a setup does not read.
#[test]
fn answers_may_come_from_a_pipe() {
    let (disk, machine) = (Disk::new(), Machine::provisioned());
    let mut command = machine.setup(200, &["--answers", "/dev/stdin", "--dry-run"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(format!("disk: path:{}\n", disk.device).as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && said.contains("would install version 200 on "), "{said}");
}

#[test]
fn a_disk_with_large_sectors_is_set_up() {
    let machine = Machine::provisioned();
    let disk = Disk::of(MIB, &["--partscan", "--sector-size", "4096"]);
    machine.ok(200, &["--disk", &disk.device]);
    let table = sh(Path::new("/"), &format!("sfdisk -d {}", disk.device));
    assert!(
        table.contains("sector-size: 4096") && table.contains("start=         256, size=      131072"),
        "{table}"
    );
    assert!(table.contains("start=      131328"), "{table}");
    let held = disk.held();
    run(Command::new("fsck.fat").args(["-n", &disk.part(1)]));
    // What is on it is what was signed, as other tools read it.
    let id = &publisher().kernel_id("store", 200)[..12];
    let kernel = publisher().unpack("store", 200).join("mosfs.efi");
    assert_eq!(
        sh(Path::new("/"), &format!("mtype -i {} ::/EFI/Linux/mosfs-200-{id}.efi | sha256sum", disk.part(1))),
        sh(Path::new("/"), &format!("sha256sum < {}", kernel.display()))
    );
    run(Command::new("e2fsck").args(["-fn", &disk.part(2)]));
    disk.look(|system| assert!(current(system).starts_with("200-")));
    drop(held);
    let said = machine.ok(200, &["--disk", &disk.device]);
    assert!(said.contains("is installed already"), "{said}");
}

#[test]
fn what_is_not_as_it_was_signed_never_gets_as_far_as_the_disk() {
    let (machine, disk) = (Machine::provisioned(), Disk::new());
    let copy = TempDir::new().unwrap();
    let store = copy.path().join("store");
    let from = publisher().path("store");
    let fresh = || sh(Path::new("/"), &format!("rm -rf {0}; cp -a {1} {0}", store.display(), from.display()));
    let setup = || {
        let mut command = machine.mosfs(&["setup"]);
        command.arg(format!("oci:{}:200", store.display())).args(["--disk", &disk.device]);
        command
    };
    // The largest blob is a layer; a flip in its middle is found only by who reads it.
    fresh();
    let largest = sh(&store, "ls -S blobs/sha256 | head -1");
    let path = store.join("blobs/sha256").join(largest.trim());
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    refused_untouched(&disk, &mut setup(), 3, "its content has digest");
    fresh();
    fs::remove_file(&path).unwrap();
    refused_untouched(&disk, &mut setup(), 3, "is missing");
    // A system of somebody else.
    fresh();
    let others = TempDir::new().unwrap();
    generate_keys(others.path(), "keys");
    let mut command = setup();
    command.env("MOSFS_CONFIG", others.path().join("config")).args(["--product", PRODUCT, "--ca"]);
    refused_untouched(&disk, command.arg(others.path().join("keys/ca.pem")), 3, "CA");
}

#[test]
fn the_floor_of_the_tpm_is_asked_before_the_disk_is_written() {
    let disk = Disk::new();
    let words = ["--disk", &disk.device];
    let machine = Machine::new();
    refused_untouched(
        &disk,
        &mut machine.setup(200, &words),
        5,
        "the TPM has no floor yet, and no provisioning key was given",
    );
    // A key that the floor key has not authorized.
    let others = TempDir::new().unwrap();
    generate_keys(others.path(), "keys");
    let key = others.path().join("keys/provision.key");
    let mut command = machine.setup(200, &words);
    refused_untouched(
        &disk,
        command.arg("--provision-key").arg(key),
        2,
        "expected an authorization by the floor key",
    );
    // The right key, authorized for another product.
    let key = others.path().join("provision.key");
    sh(
        others.path(),
        &format!(
            "openssl pkey -in {0} >provision.key && openssl pkey -in {0} -pubout >pub && {MOSFS} floor authorize \
             --provision-pub pub --key {1} --product 00000000-0000-4000-8000-000000000001 >>provision.key && \
             chmod 600 provision.key",
            publisher().path("keys/provision.key").display(),
            publisher().path("keys/floor.key").display()
        ),
    );
    let mut command = machine.setup(200, &words);
    refused_untouched(
        &disk,
        command.arg("--provision-key").arg(key),
        2,
        &format!("this provisioning key and product {PRODUCT}, found 1 for another key or product"),
    );
    // No TPM at all.
    let mut command = machine.setup(200, &words);
    command.env("MOSFS_TPM", "device:/dev/none-such").args(["--tpm-timeout", "1"]);
    refused_untouched(&disk, &mut command, 5, "/dev/none-such");
    // One that is above the version.
    let machine = Machine::provisioned();
    let folder = TempDir::new().unwrap();
    let source = format!("oci:{}:201", publisher().path("store").display());
    let system = folder.path().join("system");
    run(machine.mosfs(&["install", &source, "--system"]).arg(&system));
    fs::write(
        machine.dir.path().join("boot.json"),
        format!("{{\"deployment\":\"{}\",\"backend\":\"fuse\",\"phases_ms\":[]}}", current(&system)),
    )
    .unwrap();
    run(machine.mosfs(&["commit", "--system"]).arg(&system));
    assert_eq!(machine.floor(), 201);
    refused_untouched(&disk, &mut machine.setup(200, &words), 4, "version 200 is below the floor");
    machine.ok(201, &words);
    assert_eq!(machine.floor(), 201);
    disk.expect_installed(201);
}

/// Acceptance: an index of somebody else, and the floor of another product.
#[test]
fn a_tpm_with_the_floor_of_others_is_refused() {
    let (disk, machine) = (Disk::new(), Machine::new());
    let key = publisher().path("keys/provision.key");
    let words = ["--disk", &disk.device, "--provision-key", key.to_str().unwrap()];
    machine.tpm.tool_ok(
        "tpm2_nvdefine",
        &["0x01500050", "-C", "o", "-s", "8", "-a", "authwrite|authread|ownerread|no_da"],
    );
    refused_untouched(&disk, &mut machine.setup(200, &words), 5, "0x01500050");
    let machine = Machine::new();
    let others = TempDir::new().unwrap();
    generate_keys(others.path(), "keys");
    let mut command = machine.mosfs(&["floor", "provision", "--config"]);
    command.arg(others.path().join("config")).args(["--product", PRODUCT, "--provision-key"]);
    command.arg(others.path().join("keys/provision.key")).arg("--floor-pub");
    run(command.arg(others.path().join("keys/floor.pub")));
    refused_untouched(&disk, &mut machine.setup(200, &words), 5, "0x01500050");
    // A TPM that was cleared has no floor.
    let machine = Machine::provisioned();
    machine.tpm.tool_ok("tpm2_nvundefine", &["-C", "o", "0x01500050"]);
    refused_untouched(&disk, &mut machine.setup(200, &words[..2]), 5, "the TPM has no floor yet");
    machine.ok(200, &words);
    disk.expect_installed(200);
}

fn current(system: &Path) -> String {
    let state: serde_json::Value =
        serde_json::from_slice(&fs::read(system.join("state.json")).unwrap()).unwrap();
    state["current"].as_str().unwrap().to_string()
}

/// Every commit point of a setup.
const POINTS: [&str; 13] = [
    "setup.mark.written",
    "setup.disk.erased",
    "setup.table.written",
    "setup.filesystem.made",
    "deploy.blobs.fetched",
    "deploy.names.set",
    "setup.system.installed",
    "setup.esp.cleared",
    "setup.esp.laid",
    "setup.esp.named",
    "setup.esp.written",
    "setup.mark.removed",
    "floor.index.defined",
];

#[test]
fn a_setup_that_crashed_anywhere_is_continued_without_a_word() {
    let key = publisher().path("keys/provision.key");
    for point in POINTS {
        let (disk, machine) = (Disk::new(), Machine::new());
        let words = ["--disk", &disk.device, "--provision-key", key.to_str().unwrap()];
        let output = run_any(machine.setup(200, &words).env("MOSFS_FAILPOINT", point));
        assert_eq!(output.status.code(), None, "{point}: {}", String::from_utf8_lossy(&output.stderr));
        let said = machine.ok(200, &words);
        disk.expect_installed(200);
        let word = match point {
            "setup.system.installed"
            | "setup.esp.cleared"
            | "setup.esp.laid"
            | "setup.esp.named"
            | "setup.esp.written" => "which is continued",
            "setup.mark.removed" => "is installed already",
            "floor.index.defined" => "is empty",
            _ => "which begins again",
        };
        assert!(said.contains(word), "{point}: {said}");
        assert_eq!(machine.floor(), 0, "{point}");
    }
}

/// `kill -9` at random moments, of the setup and of what it runs; with `make campaign`, at fifty.
#[test]
fn a_setup_that_was_killed_at_any_moment_is_continued_without_a_word() {
    let campaign = std::env::var("MOSFS_CAMPAIGN").is_ok_and(|value| value == "long");
    let key = publisher().path("keys/provision.key");
    let setup = |machine: &Machine, disk: &Disk| {
        machine.setup(200, &["--disk", &disk.device, "--provision-key", key.to_str().unwrap()])
    };
    let (disk, machine) = (Disk::new(), Machine::new());
    let begin = Instant::now();
    run(&mut setup(&machine, &disk));
    let whole = begin.elapsed();
    let mut seed = std::env::var("MOSFS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(7_u64);
    for _ in 0..if campaign { 50 } else { 4 } {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let moment = whole.mul_f64((seed >> 40) as f64 / (1_u64 << 24) as f64);
        let (disk, machine) = (Disk::new(), Machine::new());
        let mut command = setup(&machine, &disk);
        let mut child = command.process_group(0).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(moment);
        let _ = Command::new("kill").args(["-9", "--", &format!("-{}", child.id())]).output().unwrap();
        child.wait().unwrap();
        let said = run(&mut setup(&machine, &disk));
        assert!(said.contains("MOSFS-INSTALL-VERDICT: 0 "), "{moment:?} of {whole:?}: {said}");
        disk.expect_installed(200);
        assert_eq!(machine.floor(), 0);
    }
}

/// Rule: the disk that the medium is on is never taken.
#[test]
fn the_disk_that_the_system_comes_from_is_never_taken() {
    let (disk, machine) = (Disk::new(), Machine::provisioned());
    let place = TempDir::new().unwrap();
    let store = publisher().path("store");
    sh(
        Path::new("/"),
        &format!(
            "mke2fs -q -t ext4 {0} && mount {0} {1} && cp -a {2} {1}/store && mount -o remount,ro {1}",
            disk.device,
            place.path().display(),
            store.display()
        ),
    );
    let setup = |words: &[&str]| {
        let mut command = machine.mosfs(&["setup"]);
        command.arg(format!("oci:{}/store:200", place.path().display())).args(words);
        command
    };
    for words in [&["--disk", &disk.device][..], &["--disk", &disk.device, "--wipe", &disk.device]] {
        let why = format!("{} holds the medium that the system is installed from", disk.device);
        refused_untouched(&disk, &mut setup(words), 1, &why);
    }
    // Acceptance: not one byte of it is written while another disk is set up.
    let (other, before) = (Disk::new(), disk.digest());
    run(&mut setup(&["--disk", &other.device]));
    other.expect_installed(200);
    assert_eq!(disk.digest(), before);
    unmount(Command::new("umount").arg(place.path()));
}

/// The verdict is also in a file, and questions can be answered by a program.
#[test]
fn a_program_reads_the_report_and_answers_questions() {
    let (disk, machine) = (Disk::new(), Machine::provisioned());
    let report = machine.dir.path().join("report.json");
    let read = || -> serde_json::Value { serde_json::from_slice(&fs::read(&report).unwrap()).unwrap() };
    let words = ["--disk", &disk.device, "--report", report.to_str().unwrap()];
    machine.ok(200, &words);
    assert_eq!((&read()["already"], &read()["version"]), (&false.into(), &200.into()));
    machine.ok(200, &words);
    assert_eq!((&read()["already"], &read()["exit_code"]), (&true.into(), &0.into()));
    refused(&mut machine.setup(201, &words), 1, "is not empty");
    assert_eq!(read()["exit_code"], 1, "{}", read());
    // Nobody chooses; loop devices are not in the list.
    let mut command = machine.setup(200, &["--ask"]);
    let Output { status, stdout, stderr } = run_any(command.stdin(Stdio::null()));
    let (out, said) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(!said.contains("standard input is no terminal") && !said.contains(&disk.device), "{said}");
    assert!(out.starts_with("MOSFS-INSTALL-VERDICT: 1 no disk "), "{out}");
}

/// A mark is of the table that is to come: whoever has put something else onto the disk since has made it theirs.
#[test]
fn a_mark_does_not_cost_anyone_what_came_after_it() {
    let machine = Machine::provisioned();
    for (tool, holds) in [
        ("printf 'label: gpt\\n2M,100M\\n' | sfdisk -q --wipe never DISK", "a GPT partition table"),
        ("printf 'label: dos\\n2M,100M\\n' | sfdisk -q --wipe never DISK", "an MBR partition table"),
        ("mke2fs -q -t ext4 -b 4096 -L data DISK", "ext4 labelled data"),
    ] {
        for point in ["setup.mark.written", "setup.disk.erased"] {
            let disk = Disk::new();
            let words = ["--disk", &disk.device];
            let crashed = run_any(machine.setup(200, &words).env("MOSFS_FAILPOINT", point));
            assert_eq!(crashed.status.code(), None);
            let mark = disk.read(512 << 10, 512);
            assert!(mark.starts_with(b"mosfs-setup-under-way-v1 "));
            sh(Path::new("/"), &tool.replace("DISK", &disk.device));
            // Also where the tool has left the mark alone.
            if !holds.starts_with("ext4") {
                disk.put(512 << 10, &mark);
            }
            refused_untouched(&disk, &mut machine.setup(200, &words), 1, &format!("it holds {holds}"));
        }
    }
    // A setup of another version.
    let disk = Disk::new();
    let words = ["--disk", &disk.device];
    let crashed = run_any(machine.setup(200, &words).env("MOSFS_FAILPOINT", "setup.esp.written"));
    assert_eq!(crashed.status.code(), None);
    refused_untouched(&disk, &mut machine.setup(201, &words), 1, "it holds mosfs, version 200");
}

#[test]
fn answers_choose_as_options_do() {
    let (disk, machine) = (Disk::new(), Machine::provisioned());
    let answers = machine.dir.path().join("answers.yaml");
    let file = answers.to_str().unwrap();
    fs::write(&answers, format!("disk: path:{}\nwhipe: yes\n", disk.device)).unwrap();
    let why = format!("{file}:2:1: whipe: found an unknown field; allowed: disk, wipe");
    refused_untouched(&disk, &mut machine.setup(200, &["--answers", file]), 2, &why);
    sh(Path::new("/"), &format!("mke2fs -q -t ext4 {}", disk.device));
    fs::write(&answers, format!("disk: path:{}\n", disk.device)).unwrap();
    refused_untouched(&disk, &mut machine.setup(200, &["--answers", file]), 1, "is not empty");
    fs::write(&answers, format!("disk: path:{}\nwipe: yes\n", disk.device)).unwrap();
    machine.ok(200, &["--answers", file]);
    disk.expect_installed(200);
    // Nothing is left in the image's folder, and nothing is mounted.
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&disk.device), "{mounts}");
    assert!(disk.image.exists());
}
