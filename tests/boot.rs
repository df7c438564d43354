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
        fs::write(top.join("usr/share/noise"), noise()).unwrap();
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
        // A login prompt would hang up the line that the verdict is printed on.
        symlink("/dev/null", units.join("serial-getty@ttyS0.service")).unwrap();
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

/// Installs version 200 and boots it; the root must be this backend's, the floor must have risen.
fn boots_to_multi_user(generator: &str, backend: &str, cmdline: &str) {
    let _turn = turn();
    let device = Device::new();
    let system = device.publish(200);
    device.install();
    device.action(
        "cat /sys/class/tpm/tpm0/pcr-sha256/15 | sed 's/^/vm: pcr15 /'\n\
         ls /var/lib/mosfs/state.json /etc/mosfs/product && touch /etc/written",
    );
    let boot = Boot { generator, cmdline: cmdline.into(), ..device.boot() };
    boot.expect(
        0,
        &[
            "vm: version 200 reached multi-user with systemd",
            "vm: root is overlay mosfs:hostfs",
            &format!("\"backend\":\"{backend}\""),
            &format!("vm: pcr15 {}", extended_once(&system)),
        ],
    );
    assert!(device.floor().contains("200"), "mosfs commit raises the floor: {}", device.floor());
}

#[test]
fn initramfs_tools_boots_on_dm_verity() {
    // With words that ask to skip checks: they change nothing.
    let asks = "mosfs.verify=0 mosfs.floor=none MOSFS_CONFIG=/tmp MOSFS_TPM=device:/dev/null";
    boots_to_multi_user("initramfs-tools", "dm-verity", asks);
}

#[test]
fn initramfs_tools_boots_on_fuse() {
    boots_to_multi_user("initramfs-tools", "fuse", "mosfs.backend=fuse");
}

#[test]
fn dracut_boots_on_dm_verity() {
    boots_to_multi_user("dracut", "dm-verity", "");
}

#[test]
fn dracut_boots_on_fuse() {
    boots_to_multi_user("dracut", "fuse", "mosfs.backend=fuse");
}

/// A device with a small hostfs, for boots that are refused before anything of it runs.
fn small_device(version: u64) -> Device {
    let device = Device::new();
    device.publisher.publish(version, "small");
    device.install();
    device
}

/// Copies a folder and changes one file in the copy.
fn copy_with(from: &Path, to: &Path, file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    tool("coreutils", Command::new("cp").args(["-a", "--reflink=auto"]).args([from, to]));
    let path = to.join(file.strip_prefix(from).unwrap());
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
}

/// The folder of the device's only deployment.
fn deployment(device: &Device) -> PathBuf {
    let mut all = fs::read_dir(device.path("system/deployments")).unwrap();
    let only = all.next().unwrap().unwrap().path();
    assert!(all.next().is_none());
    only
}

#[test]
fn what_is_changed_on_the_disk_is_refused_before_it_is_mounted() {
    let _turn = turn();
    let device = small_device(200);
    let system = device.path("system");
    let folder = deployment(&device);
    let image = device.publisher.store().names().unwrap();
    let image = image.iter().find(|(name, _)| name.starts_with("mos/images/hostfs:")).unwrap().1.digest;
    let blob = |digest: &Digest| system.join("store/blobs/sha256").join(digest.hex());
    let layer = device.publisher.store().image(&image).unwrap().layers[0].digest;
    let layer_bytes = fs::read(blob(&layer)).unwrap();
    let superblock = layer_bytes.windows(8).position(|window| window == b"verity\0\0").unwrap();
    // The root hash of a small image is that of its one data block, or of the top of its tree.
    let tree = if layer_bytes.len() > superblock + 4096 { superblock + 4096 } else { 100 };
    let cases: [(&str, PathBuf, usize, &str); 5] = [
        ("manifest", folder.join("manifest.json"), 40, "200-"),
        ("signature", folder.join("manifest.sig"), 20, "signature"),
        ("certificate", folder.join("cert.pem"), 300, "certificate"),
        ("OCI manifest", blob(&image), 50, "sha256:"),
        ("tree", blob(&layer), tree, "verity"),
    ];
    for (what, file, at, word) in cases {
        println!("== {what}");
        let copy = device.path("copy");
        let _ = fs::remove_dir_all(&copy);
        copy_with(&system, &copy, &file, |bytes| bytes[at] ^= 1);
        let console =
            Boot { system: copy, ..device.boot() }.expect(3, &["no deployment can be booted", word]);
        assert!(!console.contains("booting version"), "{what}");
    }
}

#[test]
fn without_the_right_tpm_nothing_boots() {
    let _turn = turn();
    let device = small_device(200);
    println!("== no TPM");
    Boot { tpm: None, ..device.boot() }.expect(5, &["no TPM answers at device:/dev/tpmrm0"]);
    println!("== not provisioned");
    let empty = Some(device.path("tpm-empty"));
    fs::create_dir(empty.as_ref().unwrap()).unwrap();
    let asks = "mosfs.floor=file mosfs.tpm=none mosfs.unsafe=1";
    let boot = Boot { tpm: empty, cmdline: asks.into(), ..device.boot() };
    boot.expect(5, &["has no floor: NV index 0x01500050 does not exist"]);
    println!("== another index of the same number");
    let fake = device.path("tpm-fake");
    fs::create_dir(&fake).unwrap();
    {
        let tpm = Swtpm::start_in(&fake);
        let attributes = "ownerwrite|ownerread|authread|authwrite|no_da";
        tpm.tool_ok("tpm2_nvdefine", &["0x01500050", "-C", "o", "-s", "8", "-a", attributes]);
        fs::write(device.path("zero"), [0; 8]).unwrap();
        let zero = device.path("zero");
        tpm.tool_ok("tpm2_nvwrite", &["0x01500050", "-C", "o", "-i", zero.to_str().unwrap()]);
    }
    Boot { tpm: Some(fake), ..device.boot() }.expect(5, &["is not this product's floor: its Name is"]);
    println!("== below the floor");
    device.publisher.publish(201, "newer");
    {
        let tpm = device.tpm();
        tool("coreutils", Command::new("cp").arg("-a").args([device.path("system"), device.path("old")]));
        device.mosfs(&tpm, &["update", &device.publisher.source()]);
        // Nothing has booted here, so that the pending one is blessed.
        device.mosfs(&tpm, &["commit"]);
    }
    let old = Boot { system: device.path("old"), ..device.boot() };
    old.expect(4, &["version 200 is below the floor: this device allows version 201 and up"]);
}

#[test]
fn an_update_is_tried_committed_and_not_undone() {
    let _turn = turn();
    let device = Device::new();
    device.publish(200);
    device.install();
    device.action("mosfs status");
    device.boot().expect(0, &["vm: version 200 reached multi-user"]);
    tool("coreutils", Command::new("cp").arg("-a").args([device.path("system"), device.path("old")]));
    device.publish(201);
    device.mosfs(&device.tpm(), &["update", &device.publisher.source()]);
    device.boot().expect(0, &["vm: version 201 reached multi-user"]);
    assert!(device.floor().contains("201"), "{}", device.floor());
    // The disk as it was before the update, in the same machine.
    let old = Boot { system: device.path("old"), ..device.boot() };
    old.expect(4, &["version 200 is below the floor: this device allows version 201 and up"]);
}

#[test]
fn a_pending_system_that_is_broken_gives_way_to_the_current_one() {
    let _turn = turn();
    let device = Device::new();
    device.publish(200);
    device.install();
    device.publish(201);
    device.mosfs(&device.tpm(), &["update", &device.publisher.source()]);
    device.action("mosfs status");
    let names = device.publisher.store().names().unwrap();
    let old = device.path("system/deployments");
    let new = fs::read_dir(old)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with("201-"));
    let manifest = fs::read_to_string(new.unwrap().join("manifest.json")).unwrap();
    let image = names
        .iter()
        .find(|(name, one)| name.starts_with("mos/images/hostfs:") && manifest.contains(&one.digest.hex()))
        .unwrap()
        .1
        .digest;
    let layers = device.publisher.store().image(&image).unwrap().layers;
    let blob = device.path("system/store/blobs/sha256").join(layers[1].digest.hex());
    let mut bytes = fs::read(&blob).unwrap();
    let superblock = bytes.windows(8).rposition(|window| window == b"verity\0\0").unwrap();
    bytes[superblock + 4096 + 10] ^= 1;
    fs::write(&blob, bytes).unwrap();
    device
        .boot()
        .expect(0, &["deployment 201-", "was not booted: verity", "vm: version 200 reached multi-user"]);
}

#[test]
fn a_flipped_byte_is_eio_and_is_seen() {
    let _turn = turn();
    let device = Device::new();
    device.publish(200);
    device.install();
    let names = device.publisher.store().names().unwrap();
    let image = names.iter().find(|(name, _)| name.starts_with("mos/images/hostfs:")).unwrap().1.digest;
    let layers = device.publisher.store().image(&image).unwrap().layers;
    let blob = device.path("system/store/blobs/sha256").join(layers[1].digest.hex());
    let mut bytes = fs::read(&blob).unwrap();
    let needle = &noise()[20_000..20_032];
    let at = bytes.windows(32).position(|window| window == needle).expect("noise is stored as it is");
    bytes[at] ^= 1;
    fs::write(&blob, bytes).unwrap();
    device.action(
        "cat /usr/share/noise >/dev/null && exit 90\nmosfs status\nmkdir /tmp/m\n\
         mosfs mount --backend dm-verity hostfs /tmp/m; echo \"vm: mount says $?\"\ntest -e /usr/share/needle",
    );
    device.boot().expect(0, &["Input/output error", "has status C", "vm: mount says 3"]);
}

/// Bytes that do not compress, the same every time.
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    // Two whole blocks of squashfs and a tail: a byte in the first is in no fragment that others share.
    (0..300_000)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
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
