//! Devices that boot in a virtual machine, and the publisher of what they boot.
//!
//! ```text
//! target/vm/fleet-KEY/    made once; KEY is the digest of all that it is made from
//!   keys/ store/          the publisher: versions 200 to 203, and those of small tests
//!   config/               what a device trusts
//!   initrd.GENERATOR-KERNEL
//! ```
//! All devices trust the same keys, so that an initramfs of a real generator is made once for each
//! generator and kernel.

#![allow(dead_code)]

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use mosfs::internals::digest::{self, Digest};
use tempfile::TempDir;

use super::machine::{Machine, debian_image, make_initrd, noise, source_file, squashfs, tool};
use super::publish::{PRODUCT, Publisher};
use super::swtpm::Swtpm;

/// The command under test.
pub const MOSFS: &str = env!("CARGO_BIN_EXE_mosfs-full");
/// The program that is called by this name, and runs the other one.
pub const START: &str = env!("CARGO_BIN_EXE_mosfs");

/// A healthy Debian, and the next one.
pub const GOOD: u64 = 200;
/// The version after [`GOOD`], as healthy.
pub const NEXT: u64 = 201;
/// A Debian with a service that never gets healthy.
pub const SICK: u64 = 202;
/// A Debian whose own layer has an init, stored as it is.
pub const OWN_INIT: u64 = 203;
/// A system with one small file.
pub const SMALL: u64 = 100;
/// The version after [`SMALL`].
pub const SMALL_NEXT: u64 = 101;

const VERDICT_UNIT: &str = "[Unit]\nDefaultDependencies=no\nAfter=multi-user.target\n\
    [Service]\nType=oneshot\nExecStart=/bin/sh /usr/local/bin/vm-verdict\n\
    [Install]\nWantedBy=multi-user.target\n";

/// What runs when multi-user.target is reached: it prints what a test looks for, and does what the
/// untrusted partition asks for in `vm-action`, with the word `vm.do=` of the kernel command line.
const VERDICT: &str = r#"exec >/dev/ttyS0 2>&1
export MOSFS_SYSTEM=/run/mosfs/system MOSFS_CONFIG=/run/mosfs/config
echo "vm: version $(cat /etc/vm-version) reached multi-user with $(cat /proc/1/comm)"
echo "vm: root is $(sed -n 's/^.* \/ \/ [^-]*- \([^ ]*\) \([^ ]*\) .*/\1 \2/p' /proc/self/mountinfo)"
echo "vm: boot.json $(cat /run/mosfs/boot.json)"
echo "vm: pcr15 $(cat /sys/class/tpm/tpm0/pcr-sha256/15)"
echo "vm: measured $(tr -d '\036\n' </run/log/systemd/tpm2-measure.log)"
for process in /proc/[0-9]*; do
    case $(tr '\0' ' ' <$process/cmdline 2>/dev/null) in
        @mosfs*) echo "vm: daemon of the root, oom_score_adj $(cat $process/oom_score_adj)" ;;
    esac
done
code=0
if [ -e $MOSFS_SYSTEM/vm-action ]; then
    sh $MOSFS_SYSTEM/vm-action "$(sed -n 's/.*vm\.do=\([^ ]*\).*/\1/p' /proc/cmdline)"
    code=$?
fi
sync
echo "MOSFS-VM-VERDICT: $code"
systemctl --force --force poweroff
"#;

/// An init for boots where no service matters (`init=/usr/local/bin/vm-quick`).
const QUICK: &str = r#"#!/bin/sh
export PATH=/usr/bin:/usr/sbin:/bin:/sbin
exec sh /usr/local/bin/vm-verdict
"#;

const SICK_UNIT: &str = "[Unit]\nBefore=boot-complete.target\n\
    [Service]\nType=oneshot\nExecStart=/bin/false\n";

/// The bytes of `/usr/share/noise` in [`GOOD`] and [`NEXT`]: two blocks of squashfs and a tail, which
/// do not compress.
pub fn noise_file() -> Vec<u8> {
    noise(300_000, 0x9e37_79b9_7f4a_7c15)
}

/// The publisher, and what its devices share.
pub struct Fleet {
    dir: PathBuf,
    /// Who signs.
    pub publisher: Publisher,
    /// So that no other run of the tests removes the folder.
    _lock: File,
}

/// The publisher, made once.
pub fn fleet() -> &'static Fleet {
    static FLEET: OnceLock<Fleet> = OnceLock::new();
    FLEET.get_or_init(Fleet::prepare)
}

/// The digest of all that a fleet is made from.
fn key(debian: &Path) -> String {
    let mut hasher = digest::Hasher::new();
    let mut todo: Vec<PathBuf> = ["initramfs", "mount-helpers", "tests/vm", "tests/common/device.rs"]
        .iter()
        .map(|name| source_file(name))
        .collect();
    todo.extend([MOSFS.into(), START.into()]);
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            let mut list: Vec<_> =
                fs::read_dir(&path).expect("list").map(|entry| entry.expect("an entry").path()).collect();
            list.sort();
            todo.extend(list);
        } else {
            hasher.update(&fs::read(&path).expect("read"));
        }
    }
    hasher.update(debian.as_os_str().as_encoded_bytes());
    hasher.finish().hex()[..16].to_string()
}

impl Fleet {
    fn prepare() -> Self {
        let debian = debian_image();
        let cache = debian.parent().and_then(Path::parent).expect("target/vm");
        let name = format!("fleet-{}", key(debian));
        let lock = File::create(cache.join("fleet.lock")).expect("a lock file");
        lock.lock().expect("a lock");
        let dir = cache.join(&name);
        if !dir.join("complete").exists() {
            for entry in fs::read_dir(cache).expect("list") {
                let old = entry.expect("an entry").path();
                if old.is_dir() && old.file_name().is_some_and(|n| n.to_string_lossy().starts_with("fleet-"))
                {
                    fs::remove_dir_all(&old).expect("remove an old fleet");
                }
            }
            fs::create_dir(&dir).expect("a folder");
            publish_all(&dir, debian);
            File::create(dir.join("complete")).expect("a mark");
        }
        Self { publisher: Publisher::again(&dir), dir, _lock: lock }
    }

    /// What the devices' initramfs trust.
    pub fn config(&self) -> PathBuf {
        self.dir.join("config")
    }

    /// The digest of the system manifest of a version with Debian in it.
    pub fn digest(&self, version: u64) -> Digest {
        let hex = fs::read_to_string(self.dir.join(format!("digest.{version}"))).expect("the digest");
        Digest::from_hex(&hex).expect("a digest")
    }

    /// The initramfs of a real generator for one of Debian's kernels.
    pub fn initrd(&self, generator: &'static str, kernel: &'static str) -> PathBuf {
        static MADE: Mutex<Vec<(String, &'static OnceLock<()>)>> = Mutex::new(Vec::new());
        let name = format!("initrd.{generator}-{kernel}");
        let initrd = self.dir.join(&name);
        let once = {
            let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
            match made.iter().find(|(one, _)| *one == name) {
                Some((_, once)) => *once,
                None => {
                    let once: &'static OnceLock<()> = Box::leak(Box::default());
                    made.push((name, once));
                    once
                }
            }
        };
        once.get_or_init(|| {
            if !initrd.exists() {
                make_initrd(&initrd, generator, kernel, &self.config());
            }
        });
        initrd
    }
}

/// What PCR 15 of the SHA-256 bank holds after one boot, in upper case as the kernel shows it; worked out as docs/boot.md
/// says, with no code of mosfs' own but the hash.
pub fn measured(config: &Path, manifest: &Digest, target: &str, overlay: &str) -> String {
    let mut files: Vec<_> =
        fs::read_dir(config).expect("list").map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    let mut list = String::new();
    for file in &files {
        let name = file.file_name().expect("a name").to_str().expect("UTF-8");
        list += &format!("{}  {name}\n", Digest::of(&fs::read(file).expect("a file")).hex());
    }
    let event = format!(
        "{{\"boot\":\"mosfs-v1\",\"config\":\"sha256:{}\",\"manifest\":\"sha256:{}\",\"overlay\":\"{overlay}\",\
         \"program\":\"{}\",\"target\":\"{target}\"}}",
        Digest::of(list.as_bytes()).hex(),
        manifest.hex(),
        env!("CARGO_PKG_VERSION"),
    );
    // TPM 2.0 part 1, "Extend of a PCR": the hash of the old value, all zeros after a start, and the digest.
    let mut bytes = vec![0; 32];
    bytes.extend_from_slice(Digest::of(event.as_bytes()).as_bytes());
    Digest::of(&bytes).hex().to_uppercase()
}

/// Writes a file below `root`, and makes the folders that it is in.
pub fn put(root: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = root.join(name);
    fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
    fs::write(&path, content).expect("a file");
    path
}

fn executable(path: &Path) {
    fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("a mode");
}

/// Puts a program somewhere, without what only a debugger reads.
pub fn strip(program: &str, to: &Path) {
    tool("binutils", Command::new("strip").arg("-o").arg(to).arg(program));
    executable(to);
}

/// No login prompt in the tree of a system: it would hang up the line that the verdict is printed on.
pub fn no_login(root: &Path) {
    let units = root.join("etc/systemd/system");
    symlink("/dev/null", units.join("serial-getty@ttyS0.service")).expect("a link");
}

/// Publishes all versions: Debian below, what all versions add, and what makes it this version.
fn publish_all(dir: &Path, debian: &Path) {
    let publisher = Publisher::new(dir);
    let work = tempfile::tempdir_in(dir).expect("a folder");
    let add = |name: &str, options: &[&str], fill: &dyn Fn(&Path)| {
        let (top, image) = (work.path().join(name), work.path().join(format!("{name}.squashfs")));
        fs::create_dir(&top).expect("a folder");
        fill(&top);
        squashfs(&top, &image, &[&["-all-root"], options].concat());
        publisher.add_image(&image)
    };
    let base = publisher.add_image(debian);
    let common = add("common", &[], &|top| {
        put(top, "etc/machine-id", "0123456789abcdef0123456789abcdef\n");
        put(top, "etc/systemd/system/vm-verdict.service", VERDICT_UNIT);
        put(top, "usr/local/bin/vm-verdict", VERDICT);
        executable(&put(top, "usr/local/bin/vm-quick", QUICK));
        for folder in ["etc/mosfs", "var/lib/mosfs", "usr/bin", "usr/libexec/mosfs"] {
            fs::create_dir_all(top.join(folder)).expect("a folder");
        }
        for (program, at) in [(START, "usr/bin/mosfs"), (MOSFS, "usr/libexec/mosfs/mosfs-full")] {
            strip(program, &top.join(at));
        }
        let commit = fs::read(source_file("mount-helpers/mosfs-commit.service")).expect("the unit");
        put(top, "etc/systemd/system/mosfs-commit.service", commit);
        let units = top.join("etc/systemd/system");
        let wants = units.join("multi-user.target.wants");
        fs::create_dir(&wants).expect("a folder");
        for unit in ["mosfs-commit.service", "vm-verdict.service"] {
            symlink(format!("../{unit}"), wants.join(unit)).expect("a link");
        }
        no_login(top);
    });
    for version in [GOOD, NEXT, SICK, OWN_INIT] {
        let options: &[&str] = if version == OWN_INIT { &["-noD", "-noF"] } else { &[] };
        let own = add(&version.to_string(), options, &|top| {
            put(top, "etc/vm-version", version.to_string());
            put(top, "usr/share/noise", noise_file());
            let units = top.join("etc/systemd/system");
            if version == SICK {
                put(top, "etc/systemd/system/vm-health.service", SICK_UNIT);
                fs::create_dir(units.join("boot-complete.target.requires")).expect("a folder");
                let link = units.join("boot-complete.target.requires/vm-health.service");
                symlink("../vm-health.service", link).expect("a link");
            }
            if version == OWN_INIT {
                let init = debian.with_extension("").join("usr/lib/systemd/systemd");
                executable(&put(top, "usr/lib/systemd/systemd", fs::read(init).expect("systemd")));
            }
        });
        let digest = publisher.publish_layers(version, vec![base.clone(), common.clone(), own], true);
        fs::write(dir.join(format!("digest.{version}")), digest.hex()).expect("the digest");
    }
    publisher.publish(SMALL, "small");
    publisher.publish(SMALL_NEXT, "another small one");
    // What a device trusts is what the installation leaves.
    let device = Device { dir: work, config: dir.join("config"), publisher: Publisher::again(dir) };
    device.install(SMALL);
}

/// A device's partition and its TPM.
pub struct Device {
    dir: TempDir,
    config: PathBuf,
    publisher: Publisher,
}

impl Device {
    /// A device with a version installed and the floor provisioned at it.
    pub fn with(version: u64) -> Self {
        Self::of(Publisher::again(&fleet().dir), version)
    }

    /// The same, of another publisher.
    pub fn of(publisher: Publisher, version: u64) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let device = Self { config: dir.path().join("config"), dir, publisher };
        device.install(version);
        device
    }

    /// What it trusts.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// A file of this device.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The folder that becomes the system partition.
    pub fn system(&self) -> PathBuf {
        self.path("system")
    }

    /// The TPM on the host; the machine must be off meanwhile.
    pub fn tpm(&self) -> Swtpm {
        fs::create_dir_all(self.path("tpm")).expect("a folder");
        Swtpm::start_in(&self.path("tpm"))
    }

    /// Runs mosfs on the host for this device.
    pub fn mosfs(&self, arguments: &[&str]) -> String {
        let tpm = self.tpm();
        let output = tool(
            "",
            Command::new(MOSFS)
                .args(arguments)
                .env("MOSFS_SYSTEM", self.system())
                .env("MOSFS_CONFIG", &self.config)
                .env("MOSFS_RUN", self.path("run"))
                .env("SYSTEMD_MEASURE_LOG_USERSPACE", self.path("tpm2-measure.log"))
                .env("MOSFS_TPM", tpm.tcti_text()),
        );
        String::from_utf8(output.stdout).expect("text")
    }

    fn install(&self, version: u64) {
        let ca = self.publisher.key("ca.pem");
        let source = self.publisher.source_of(version);
        self.mosfs(&["install", &source, "--ca", ca.to_str().expect("a path"), "--product", PRODUCT]);
        let (key, floor) = (self.publisher.key("provision.key"), self.publisher.key("floor.pub"));
        let (key, floor) = (key.to_str().expect("a path"), floor.to_str().expect("a path"));
        self.mosfs(&["floor", "provision", "--provision-key", key, "--floor-pub", floor]);
    }

    /// Updates the folder on the host.
    pub fn update(&self, version: u64) {
        self.mosfs(&["update", &self.publisher.source_of(version)]);
    }

    /// The version that the TPM allows at least.
    pub fn floor(&self) -> u64 {
        let text = self.mosfs(&["floor", "show", "--json"]);
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        value["floor"].as_u64().unwrap_or_else(|| panic!("a version in {text}"))
    }

    /// What the booted system does before it powers off; its exit code is the verdict.
    pub fn action(&self, text: &str) {
        fs::write(self.system().join("vm-action"), text).expect("the action");
    }

    /// Puts the publisher's store onto the partition, for updates in the machine; its SOURCE there.
    pub fn carry_source(&self, version: u64) -> String {
        let to = self.system().join("vm-source");
        tool(
            "coreutils",
            Command::new("cp").args(["-a", "--reflink=auto"]).arg(fleet().dir.join("store")).arg(to),
        );
        format!("oci:/run/mosfs/system/vm-source:{}", mosfs::internals::store::version_name(version))
    }

    /// A machine of this device, whose partition is made from the folder and goes with the machine.
    pub fn machine(&self, generator: &'static str, kernel: &'static str) -> Machine {
        Machine { kernel, ..self.machine_with(&fleet().initrd(generator, kernel)) }
    }

    /// The same with an initramfs that is not the fleet's.
    pub fn machine_with(&self, initrd: &Path) -> Machine {
        Machine {
            system: Some(self.system()),
            tpm: Some(self.path("tpm")),
            memory: 768,
            cmdline: "root=mosfs rd.shell=0 rd.emergency=poweroff".into(),
            ..Machine::new(initrd)
        }
    }

    /// The same with a disk that is kept: made from the folder the first time.
    pub fn kept(&self, generator: &'static str, kernel: &'static str) -> Machine {
        let mut machine = self.machine(generator, kernel);
        let disk = self.path("disk.qcow2");
        if disk.exists() {
            machine.system = None;
        }
        machine.disk = Some(disk);
        machine
    }

    /// The folder of a deployment.
    pub fn deployment(&self, version: u64) -> PathBuf {
        let list = fs::read_dir(self.system().join("deployments")).expect("list");
        let mut found = list.map(|entry| entry.expect("an entry").path()).filter(|path| {
            path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&format!("{version}-")))
        });
        found.next().unwrap_or_else(|| panic!("version {version} is deployed"))
    }

    /// The digest of the OCI manifest of a version's hostfs.
    pub fn image(&self, version: u64) -> Digest {
        let text = fs::read(self.deployment(version).join("manifest.json")).expect("the manifest");
        let manifest: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        let digest = manifest["targets"]["hostfs"]["digest"].as_str().expect("a digest");
        digest.parse().expect("a digest")
    }

    /// A blob on the device.
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.system().join("store/blobs/sha256").join(digest.hex())
    }

    /// The layers of a version's hostfs, the bottom one first: digest, offset of the verity superblock, root
    /// hash, each as veritysetup wants it.
    pub fn layers(&self, version: u64) -> Vec<(String, usize, String)> {
        let image = self.publisher.store().image(&self.image(version)).expect("the image");
        let layers = image.layers.iter().map(|layer| {
            let root = layer.trust.root_hash().expect("a root hash");
            (layer.digest.hex(), superblock(&self.blob(&layer.digest)), root.hex())
        });
        layers.collect()
    }

    /// The topmost layer of a version's hostfs.
    pub fn own_layer(&self, version: u64) -> PathBuf {
        let image = self.publisher.store().image(&self.image(version)).expect("the image");
        self.blob(&image.layers.last().expect("a layer").digest)
    }
}

/// Changes one bit of a file.
pub fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).expect("the file to change");
    bytes[at] ^= 1;
    fs::write(path, bytes).expect("the changed file");
}

/// Where the verity superblock of a sealed layer is.
pub fn superblock(layer: &Path) -> usize {
    let bytes = fs::read(layer).expect("the layer");
    bytes.windows(8).rposition(|window| window == b"verity\0\0").expect("a superblock")
}

/// Where a file has these bytes.
pub fn position(path: &Path, needle: &[u8]) -> usize {
    let bytes = fs::read(path).expect("the file");
    bytes.windows(needle.len()).position(|window| window == needle).expect("stored as it is")
}
