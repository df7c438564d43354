//! Boots of a real Debian system in a virtual machine, from an initramfs of the real generators.
//!
//! Each test prepares a system partition and a TPM on the host with the real commands, boots
//! (tests/vm/run), and reads the serial console. What the booted system is to do is a script on the
//! untrusted partition (`vm-action`), run by a unit of the image when multi-user.target is reached.

#[allow(dead_code)]
#[path = "common/publish.rs"]
mod publish;
#[allow(dead_code)]
#[path = "common/swtpm.rs"]
mod swtpm;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use mosfs::digest::{self, Digest};
use publish::{PRODUCT, Publisher};
use swtpm::Swtpm;
use tempfile::TempDir;

const MOSFS: &str = env!("CARGO_BIN_EXE_mosfs");

fn source_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// One machine at a time: two would only slow each other down under emulation.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tool(package: &str, command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| {
        panic!("cannot run {:?}: {error}; install the Debian package {package}", command.get_program())
    });
    assert!(
        output.status.success(),
        "{command:?} ended with {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A script of tests/vm; it says itself which package it lacks.
fn script(name: &str) -> Command {
    Command::new(source_file("tests/vm").join(name))
}

/// The squashfs of a Debian root with systemd, made once.
fn debian_image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let root = tool("mmdebstrap", script("debian-root").arg("hostfs")).stdout;
        let root = PathBuf::from(String::from_utf8(root).unwrap().trim());
        let image = root.with_extension("squashfs");
        if !image.exists() {
            let part = image.with_extension("part");
            let _ = fs::remove_file(&part);
            tool(
                "squashfs-tools",
                Command::new("mksquashfs").args([&root, &part]).args([
                    "-comp",
                    "zstd",
                    "-Xcompression-level",
                    "3",
                    "-noappend",
                    "-quiet",
                    "-no-progress",
                ]),
            );
            fs::rename(&part, &image).unwrap();
        }
        image
    })
}

const VERDICT_UNIT: &str = "[Unit]\nDefaultDependencies=no\nAfter=multi-user.target\n\
    [Service]\nType=oneshot\nExecStart=/bin/sh /usr/local/bin/vm-verdict\n\
    [Install]\nWantedBy=multi-user.target\n";

const VERDICT: &str = r#"exec >/dev/ttyS0 2>&1
export MOSFS_SYSTEM=/run/mosfs/system MOSFS_CONFIG=/run/mosfs/config
echo "vm: version $(cat /etc/vm-version) reached multi-user with $(cat /proc/1/comm)"
echo "vm: root is $(sed -n 's/^.* \/ \/ [^-]*- \([^ ]*\) \([^ ]*\) .*/\1 \2/p' /proc/self/mountinfo)"
echo "vm: boot.json $(cat /run/mosfs/boot.json)"
code=0
if [ -e $MOSFS_SYSTEM/vm-action ]; then sh $MOSFS_SYSTEM/vm-action; code=$?; fi
sync
echo "MOSFS-VM-VERDICT: $code"
systemctl --force --force poweroff
"#;

/// A publisher, a device's partition and its TPM.
struct Device {
    dir: TempDir,
    publisher: Publisher,
}

impl Device {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let publisher = Publisher::new(dir.path());
        fs::create_dir_all(dir.path().join("tpm")).unwrap();
        Self { dir, publisher }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Publishes a version: Debian below, and above it what makes it this version.
    fn publish(&self, version: u64) -> Digest {
        let top = self.path(&format!("top-{version}"));
        let put = |name: &str, text: &str| {
            let path = top.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("etc/vm-version", &version.to_string());
        put("etc/machine-id", "0123456789abcdef0123456789abcdef\n");
        put("etc/systemd/system/vm-verdict.service", VERDICT_UNIT);
        put("usr/local/bin/vm-verdict", VERDICT);
        put("usr/share/needle", "a needle in the hay\n");
        fs::create_dir_all(top.join("etc/mosfs")).unwrap();
        fs::create_dir_all(top.join("var/lib/mosfs")).unwrap();
        fs::create_dir_all(top.join("usr/bin")).unwrap();
        tool("binutils", Command::new("strip").arg("-o").arg(top.join("usr/bin/mosfs")).arg(MOSFS));
        fs::set_permissions(top.join("usr/bin/mosfs"), PermissionsExt::from_mode(0o755)).unwrap();
        let units = top.join("etc/systemd/system");
        fs::copy(source_file("mount-helpers/mosfs-commit.service"), units.join("mosfs-commit.service"))
            .unwrap();
        let wants = units.join("multi-user.target.wants");
        fs::create_dir_all(&wants).unwrap();
        for unit in ["mosfs-commit.service", "vm-verdict.service"] {
            symlink(format!("../{unit}"), wants.join(unit)).unwrap();
        }
        let image = self.path(&format!("top-{version}.squashfs"));
        tool(
            "squashfs-tools",
            Command::new("mksquashfs").args([&top, &image]).args([
                "-comp",
                "zstd",
                "-Xcompression-level",
                "3",
                "-noappend",
                "-quiet",
                "-no-progress",
                "-all-root",
            ]),
        );
        let layers = vec![self.publisher.add_image(debian_image()), self.publisher.add_image(&image)];
        self.publisher.publish_layers(version, layers, true)
    }

    /// Runs mosfs on the host for this device.
    fn mosfs(&self, tpm: &Swtpm, arguments: &[&str]) -> String {
        let output = tool(
            "",
            Command::new(MOSFS)
                .args(arguments)
                .env("MOSFS_SYSTEM", self.path("system"))
                .env("MOSFS_CONFIG", self.path("config"))
                .env("MOSFS_RUN", self.path("run"))
                .env("MOSFS_TPM", tpm.tcti_text()),
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// The TPM on the host; the machine's own one must be off meanwhile.
    fn tpm(&self) -> Swtpm {
        Swtpm::start_in(&self.path("tpm"))
    }

    /// Installs the highest version, and gives the device's TPM its floor.
    fn install(&self) {
        let tpm = self.tpm();
        let ca = self.publisher.key("ca.pem");
        let source = self.publisher.source();
        self.mosfs(&tpm, &["install", &source, "--ca", ca.to_str().unwrap(), "--product", PRODUCT]);
        let (key, floor) = (self.publisher.key("provision.key"), self.publisher.key("floor.pub"));
        let arguments = [
            "floor",
            "provision",
            "--provision-key",
            key.to_str().unwrap(),
            "--floor-pub",
            floor.to_str().unwrap(),
        ];
        self.mosfs(&tpm, &arguments);
    }

    /// What the booted system does before it powers off; its exit code is the verdict.
    fn action(&self, text: &str) {
        fs::write(self.path("system/vm-action"), text).unwrap();
    }

    fn initrd(&self, generator: &str) -> PathBuf {
        let initrd = self.path(&format!("initrd.{generator}"));
        if !initrd.exists() {
            let mut command = script("make-initrd");
            command
                .arg(generator)
                .arg(&initrd)
                .args(["--mosfs", MOSFS])
                .arg("--config")
                .arg(self.path("config"));
            tool("", &mut command);
        }
        initrd
    }

    fn boot(&self) -> Boot<'_> {
        Boot {
            device: self,
            generator: "initramfs-tools",
            cmdline: String::new(),
            system: self.path("system"),
            disk: None,
            tpm: Some(self.path("tpm")),
        }
    }

    fn floor(&self) -> String {
        self.mosfs(&self.tpm(), &["floor", "show", "--json"])
    }
}

/// One boot of a device.
struct Boot<'a> {
    device: &'a Device,
    generator: &'a str,
    cmdline: String,
    system: PathBuf,
    disk: Option<PathBuf>,
    tpm: Option<PathBuf>,
}

impl Boot<'_> {
    /// Boots, and gives the verdict with the console.
    fn run(&self) -> (i32, String) {
        let mut command = script("run");
        command.arg("--system").arg(&self.system).arg("--initrd").arg(self.device.initrd(self.generator));
        if let Some(tpm) = &self.tpm {
            command.arg("--tpm-state").arg(tpm);
        }
        if let Some(disk) = &self.disk {
            command.arg("--disk").arg(disk);
        }
        let cmdline = format!("root=mosfs rd.shell=0 rd.emergency=poweroff {}", self.cmdline);
        command.args(["--timeout", "240", "--memory", "768", "--cmdline", &cmdline]);
        let output = command.output().unwrap();
        let console = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        println!("{console}");
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        (output.status.code().unwrap_or(-1), console)
    }

    /// Boots, and wants this verdict and these words on the console.
    fn expect(&self, verdict: i32, words: &[&str]) -> String {
        let (found, console) = self.run();
        assert_eq!(found, verdict, "the verdict");
        for word in words {
            assert!(console.contains(word), "expected `{word}` on the console");
        }
        console
    }
}

/// What a PCR holds after one extension from zero (TPM 2.0 part 1, "Extend of a PCR").
fn extended_once(digest: &Digest) -> String {
    let mut bytes = vec![0; 32];
    bytes.extend_from_slice(digest.as_bytes());
    digest::hex(Digest::of(&bytes).as_bytes()).to_uppercase()
}

#[test]
fn boots_to_multi_user_on_both_backends_and_commits() {
    let _turn = turn();
    let device = Device::new();
    let system = device.publish(200);
    device.install();
    device.action(
        "cat /sys/class/tpm/tpm0/pcr-sha256/15 | sed 's/^/vm: pcr15 /'\nmosfs floor show\n\
         ls /var/lib/mosfs/state.json /etc/mosfs/product\ntouch /etc/written",
    );
    let pcr = format!("vm: pcr15 {}", extended_once(&system));
    let words = ["vm: version 200 reached multi-user with systemd", "vm: root is overlay mosfs:hostfs", &pcr];
    let disk = device.path("disk.qcow2");
    let first = Boot { disk: Some(disk.clone()), ..device.boot() };
    first.expect(0, &[&words[..], &["dm-verity"]].concat());
    assert!(device.floor().contains("200"), "{}", device.floor());
    // Again, on the other backend, with words that ask to skip checks.
    let asks =
        "mosfs.backend=fuse mosfs.verify=0 mosfs.floor=none MOSFS_CONFIG=/tmp MOSFS_TPM=device:/dev/null";
    let second = Boot { disk: Some(disk), cmdline: asks.into(), ..device.boot() };
    second.expect(0, &[&words[..], &["\"backend\":\"fuse\""]].concat());
}

/// Unmounts what a boot on this machine has mounted, the last one first.
struct Mounts(PathBuf);

impl Drop for Mounts {
    fn drop(&mut self) {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = table
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|point| Path::new(point).starts_with(&self.0));
        for point in points.collect::<Vec<_>>().into_iter().rev() {
            let _ = mosfs::sys::mountapi::unmount(Path::new(point), true);
        }
    }
}

/// No virtual machine: the same command, with a sysroot in a temporary folder.
#[test]
fn mosfs_boot_through_fuse_on_this_machine() {
    let device = Device::new();
    device.publisher.publish(200, "the first");
    device.install();
    let _mounts = Mounts(device.dir.path().to_path_buf());
    let tpm = device.tpm();
    fs::write(device.path("cmdline"), "quiet root=mosfs mosfs.backend=fuse\n").unwrap();
    let (sysroot, cmdline) = (device.path("sysroot"), device.path("cmdline"));
    let arguments =
        ["boot", "--sysroot", sysroot.to_str().unwrap(), "--cmdline", cmdline.to_str().unwrap(), "--json"];
    let answer = device.mosfs(&tpm, &arguments);
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["version"], 200);
    assert_eq!(answer["backend"], "fuse");
    assert_eq!(answer["overlay"], "tmpfs");
    assert_eq!(fs::read_to_string(sysroot.join("content")).unwrap(), "the first");
    fs::write(sysroot.join("written"), "x").unwrap();
    assert!(device.path("run/boot.json").exists());
    assert!(device.path("run/config/manifestCA.pem").exists());
}
