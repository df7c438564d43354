//! The provisioning key is on another machine: a nonce goes there, and its signature comes back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use mosfs::internals::setup::courier::Courier;
use mosfs::internals::setup::media::Second;
use tempfile::TempDir;

use super::fixture::{MOSFS, PRODUCT, generate_keys};
use super::tools::{run, run_any, sh};
use super::{Disk, Machine, attach, publisher, refused_untouched};

const UUID: &str = "4c4c4544-0042-3510-8054-b4c04f4a4d32";

/// The files of an exchange.
struct Exchange {
    dir: TempDir,
}

impl Exchange {
    fn new() -> Self {
        Self { dir: TempDir::new().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn nonce(&self) -> PathBuf {
        self.path("nonce")
    }

    fn signature(&self) -> PathBuf {
        self.path("signature")
    }

    /// A setup with the key elsewhere.
    fn setup(&self, machine: &Machine, disk: &Disk, public: &Path) -> Command {
        let mut command = machine.setup(200, &["--disk", &disk.device]);
        command.arg("--provision-pub").arg(public).arg("--nonce-out").arg(self.nonce());
        command.arg("--signature-in").arg(self.signature());
        command
    }

    /// Begins one, and waits for its nonce.
    fn begin(&self, machine: &Machine, disk: &Disk) -> Child {
        let mut command = self.setup(machine, disk, &publisher().path("keys/provision.pub"));
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for(&self.nonce());
        child
    }

    /// What the holder of a key does.
    fn sign(&self, key: &Path) {
        let mut command = Command::new(MOSFS);
        command.args(["floor", "sign-provision", "--nonce"]).arg(self.nonce()).arg("--key").arg(key);
        run(command.env_remove("MOSFS_FAILPOINT").arg("--output").arg(self.signature()));
    }
}

fn wait_for(path: &Path) {
    while !path.exists() {
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_setup_waits_for_the_signature_of_a_key_that_is_elsewhere() {
    let (disk, machine, exchange) = (Disk::new(), Machine::new(), Exchange::new());
    let before = disk.digest();
    let public = publisher().path("keys/provision.pub");
    let planned = run(exchange.setup(&machine, &disk, &public).arg("--dry-run"));
    let floor = format!(
        "floor: the TPM gets a floor with the key {}, once it has signed a nonce\n",
        public.display()
    );
    assert!(planned.contains(&floor), "{planned}");
    assert!(!exchange.nonce().exists(), "nothing is asked for yet");
    let child = exchange.begin(&machine, &disk);
    assert_eq!(fs::read(exchange.nonce()).unwrap().len(), 36);
    assert_eq!(disk.digest(), before, "the disk is not written before the floor is there");
    exchange.sign(&publisher().path("keys/provision.key"));
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let steps: Vec<&str> = said.lines().map(|line| line.split(':').next().unwrap()).collect();
    let expected = [
        "medium",
        "disk",
        "floor",
        "nonce",
        "partition",
        "mkfs",
        "install",
        "verify",
        "esp",
        "MOSFS-INSTALL-VERDICT",
    ];
    assert_eq!(steps, expected, "{said}");
    assert_eq!(machine.floor(), 0);
    disk.expect_installed(200);
    // The TPM has its floor: nobody is asked again.
    let said = run(&mut exchange.setup(&machine, &disk, &public));
    assert!(said.contains("is installed already") && !said.contains("nonce: "), "{said}");
}

/// Rule: a nonce is signed once, for the session that drew it.
#[test]
fn a_signature_that_is_not_over_this_nonce_is_refused_and_the_disk_stays() {
    let (disk, machine, exchange) = (Disk::new(), Machine::new(), Exchange::new());
    let public = publisher().path("keys/provision.pub");
    let key = publisher().path("keys/provision.key");
    let wrong = "the signature is not the provisioning key's over the nonce of this session";
    // An earlier nonce: of a setup that the power ended.
    let mut child = exchange.begin(&machine, &disk);
    exchange.sign(&key);
    let old = fs::read(exchange.signature()).unwrap();
    fs::remove_file(exchange.signature()).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    fs::write(exchange.signature(), &old).unwrap();
    refused_untouched(&disk, &mut exchange.setup(&machine, &disk, &public), 5, wrong);
    // Another publisher's key, and no signature at all.
    let others = TempDir::new().unwrap();
    generate_keys(others.path(), "keys");
    fs::remove_file(exchange.signature()).unwrap();
    fs::remove_file(exchange.nonce()).unwrap();
    let before = disk.digest();
    let child = exchange.begin(&machine, &disk);
    exchange.sign(&others.path().join("keys/provision.key"));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(5));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.ends_with(&format!("MOSFS-INSTALL-VERDICT: 5 {wrong}\n")), "{said}");
    assert_eq!(disk.digest(), before);
    for garbage in [&b"no signature"[..], &[0; 64]] {
        fs::write(exchange.signature(), garbage).unwrap();
        refused_untouched(&disk, &mut exchange.setup(&machine, &disk, &public), 5, wrong);
    }
    // The power went: the index is there, unwritten, and serves the next setup.
    let child = {
        fs::remove_file(exchange.signature()).unwrap();
        fs::remove_file(exchange.nonce()).unwrap();
        exchange.begin(&machine, &disk)
    };
    exchange.sign(&key);
    assert!(child.wait_with_output().unwrap().status.success());
    disk.expect_installed(200);
}

#[test]
fn what_cannot_lead_to_a_floor_is_refused_before_a_nonce_is_drawn() {
    let (disk, machine, exchange) = (Disk::new(), Machine::new(), Exchange::new());
    let public = publisher().path("keys/provision.pub");
    let key = publisher().path("keys/provision.key");
    // Nobody signs.
    let mut command = exchange.setup(&machine, &disk, &public);
    let why = "no signature of a provisioning key appeared within 0 seconds";
    refused_untouched(&disk, command.args(["--wait", "0"]), 5, why);
    fs::remove_file(exchange.nonce()).unwrap();
    // A key that is for another product, one of another publisher, a private one, none.
    let other = exchange.path("other.pub");
    sh(
        Path::new("/"),
        &format!(
            "openssl pkey -in {0} -pubout -out {1} && {MOSFS} floor authorize --provision-pub {1} --key {2} \
             --product 00000000-0000-4000-8000-000000000001 >>{1}",
            key.display(),
            other.display(),
            publisher().path("keys/floor.key").display()
        ),
    );
    let others = TempDir::new().unwrap();
    generate_keys(others.path(), "keys");
    let theirs = others.path().join("keys/provision.pub");
    let not_ours = format!(
        "expected an authorization by the floor key for this provisioning key and product {PRODUCT}, found 1 for another"
    );
    refused_untouched(&disk, &mut exchange.setup(&machine, &disk, &other), 2, &not_ours);
    refused_untouched(&disk, &mut exchange.setup(&machine, &disk, &theirs), 2, &not_ours);
    refused_untouched(&disk, &mut exchange.setup(&machine, &disk, &key), 2, "private key");
    refused_untouched(&disk, &mut exchange.setup(&machine, &disk, &exchange.path("none")), 1, "none");
    let words = ["--disk", &disk.device, "--nonce-out", "-", "--signature-in", "s", "--provision-pub"];
    let why = "expected a file as --nonce-out, found `-`";
    refused_untouched(&disk, machine.setup(200, &words).arg(&public), 2, why);
    assert!(!exchange.nonce().exists(), "no nonce was drawn");
    let indexes = machine.tpm.handles("handles-nv-index");
    assert!(indexes.is_empty(), "{indexes:?}");
    // A setup that is refused for its disk asks nobody to sign.
    sh(Path::new("/"), &format!("mke2fs -q -t ext4 {}", disk.device));
    refused_untouched(&disk, &mut exchange.setup(&machine, &disk, &public), 1, "is not empty");
    assert!(!exchange.nonce().exists());
    let mut command = machine.setup(200, &["--disk", &disk.device, "--provision-pub"]);
    let output = run_any(command.arg(&public));
    assert_eq!(output.status.code(), Some(2), "a nonce and a signature are required");
}

#[test]
fn a_setup_that_crashed_around_the_nonce_is_run_again() {
    for point in ["floor.index.defined", "floor.out.written", "floor.out.renamed"] {
        let (disk, machine, exchange) = (Disk::new(), Machine::new(), Exchange::new());
        let before = disk.digest();
        let mut command = exchange.setup(&machine, &disk, &publisher().path("keys/provision.pub"));
        let output = run_any(command.env("MOSFS_FAILPOINT", point));
        assert_eq!(output.status.code(), None, "{point}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(disk.digest(), before);
        let _ = fs::remove_file(exchange.nonce());
        let child = exchange.begin(&machine, &disk);
        exchange.sign(&publisher().path("keys/provision.key"));
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{point}: {}", String::from_utf8_lossy(&output.stderr));
        disk.expect_installed(200);
        assert_eq!(machine.floor(), 0, "{point}");
    }
}

/// A medium on a loop device.
struct Stick {
    dir: TempDir,
    device: String,
}

impl Stick {
    fn new(options: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("image");
        let script = "truncate -s 8M image && mke2fs -q -t ext4 -L MOSFS-PROVISION image";
        sh(dir.path(), script);
        Self { device: attach(&image, options), dir }
    }

    fn medium(&self) -> Second {
        Second { device: (&self.device).into(), driver: "ext4" }
    }

    /// What debugfs says of it; the medium is not mounted.
    fn debugfs(&self, request: &str) -> String {
        sh(self.dir.path(), &format!("debugfs -R '{request}' image 2>/dev/null"))
    }
}

impl Drop for Stick {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.device]).status();
    }
}

/// What an install medium does with the second one.
#[test]
fn a_medium_carries_the_nonce_there_and_the_signature_back() {
    let (exchange, stick) = (Exchange::new(), Stick::new(&[]));
    let medium = stick.medium();
    let (nonce, signature) = (format!("nonce-{UUID}"), format!("signature-{UUID}"));
    // What an earlier start of this machine, and another machine, left there.
    medium.write(&signature, b"old", "none").unwrap();
    medium.write("signature-of-another", b"theirs", "none").unwrap();
    fs::write(exchange.nonce(), [7; 36]).unwrap();
    let mut courier = Courier::between(exchange.nonce(), exchange.signature(), UUID.as_bytes());
    let said = courier.visit(&medium).unwrap().unwrap();
    for word in [&format!("/{nonce} is on {}", stick.device), &format!("--output {signature}")] {
        assert!(said.contains(word.as_str()), "{said}");
    }
    // The medium may be taken out at once: all of it is there, and the old signature is gone.
    run(Command::new("e2fsck").args(["-fn", &stick.device]));
    let names = stick.debugfs("ls -p /");
    assert!(names.contains(&nonce) && names.contains("signature-of-another"), "{names}");
    assert!(!names.contains(&signature) && !names.contains(".new"), "{names}");
    assert_eq!(stick.debugfs(&format!("cat /{nonce}")).as_bytes(), [7; 36]);
    // Nothing is there yet.
    for _ in 0..3 {
        assert_eq!(courier.visit(&medium).unwrap(), None);
    }
    // A file that is still being written is not taken.
    medium.write(&signature, b"half", "none").unwrap();
    assert_eq!(courier.visit(&medium).unwrap(), None);
    medium.write(&signature, b"whole", "none").unwrap();
    assert_eq!(courier.visit(&medium).unwrap(), None);
    assert!(!exchange.signature().exists());
    let said = courier.visit(&medium).unwrap().unwrap();
    assert_eq!(said, format!("mosfs: /{signature} is on {}", stick.device));
    assert_eq!(fs::read(exchange.signature()).unwrap(), b"whole");
}

/// A mount for reading that is still there when the medium is to be written, and then is not.
#[test]
fn a_medium_that_is_in_use_for_a_moment_is_waited_for() {
    let stick = Stick::new(&[]);
    let (medium, at) = (stick.medium(), stick.dir.path().join("at"));
    fs::create_dir(&at).unwrap();
    run(Command::new("mount").args(["-o", "ro,noload", &stick.device]).arg(&at));
    thread::scope(|scope| {
        let writing = scope.spawn(|| medium.write("nonce", &[7; 36], "signature"));
        thread::sleep(Duration::from_millis(200));
        run(Command::new("umount").arg(&at));
        writing.join().unwrap().unwrap();
    });
    assert_eq!(medium.read("nonce", 100).unwrap().unwrap(), [7; 36]);
}

#[test]
fn a_medium_that_cannot_be_written_is_named() {
    let exchange = Exchange::new();
    fs::write(exchange.nonce(), [7; 36]).unwrap();
    let stick = Stick::new(&["--read-only"]);
    let read_only = format!("{} is read-only", stick.device);
    let cd = Second { device: "/dev/sr0".into(), driver: "iso9660" };
    for (medium, why) in [(stick.medium(), read_only.as_str()), (cd, "/dev/sr0 is read-only")] {
        let mut courier = Courier::between(exchange.nonce(), exchange.signature(), b"");
        assert_eq!(courier.visit(&medium).unwrap_err().to_string(), why);
    }
    // A full one, which then is put right.
    let stick = Stick::new(&[]);
    let medium = stick.medium();
    let mut courier = Courier::between(exchange.nonce(), exchange.signature(), b"");
    let full = vec![1; 16 << 20];
    let error = medium.write("filler", &full, "none").unwrap_err().to_string();
    assert!(error.contains("No space left on device"), "{error}");
    assert!(courier.visit(&medium).unwrap().unwrap().contains("/nonce is on "));
}
