//! Which disk is taken, and what a boot is measured as: `mosfs boot` on this machine, with loop devices for disks and a
//! software TPM.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use mosfs::internals::digest::Digest;
use mosfs::internals::sys::disk;
use tempfile::TempDir;

use super::device::{Device, MOSFS, SMALL, SMALL_NEXT, flip, measured};
use super::host::Mounts;
use super::machine::tool;
use super::publish::Publisher;
use super::swtpm::Swtpm;

/// A loop device that goes with its owner.
struct Loop(String);

impl Loop {
    fn of(image: &Path, options: &[&str]) -> Self {
        let output = tool("mount", Command::new("losetup").args(["-f", "--show"]).args(options).arg(image));
        Self(String::from_utf8(output.stdout).expect("a name").trim().to_string())
    }

    /// Waits until no file system on it is mounted: that of a boot goes with the last daemon that is about to leave.
    fn wait_until_unmounted(&self) {
        let end = Instant::now() + Duration::from_secs(600);
        while let Err(error) = disk::open_exclusive(Path::new(&self.0)) {
            assert!(Instant::now() < end, "{}: {error}", self.0);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// A label that no other test and no disk of this machine has; at most 12 bytes, the most that XFS takes.
fn label() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    format!("m{}-{}", std::process::id(), GIVEN.fetch_add(1, Ordering::Relaxed))
}

/// An empty disk image. It is never a file that was there before: a file system of that one may still be mounted, if
/// only by a daemon that is about to leave, and its last write would be found in the new one.
fn blank(image: &Path) {
    let _ = fs::remove_file(image);
    File::create_new(image).expect("an image").set_len(32 << 20).expect("a size");
}

/// A disk image with this label and what a folder holds.
fn ext4(image: &Path, label: &str, folder: Option<&Path>) {
    blank(image);
    ext4_of(image, "32M", label, folder);
}

/// Makes a file system of this size on what there is.
fn ext4_of(image: &Path, size: &str, label: &str, folder: Option<&Path>) {
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-t", "ext4", "-L", label]);
    if let Some(folder) = folder {
        command.arg("-d").arg(folder);
    }
    tool("e2fsprogs", command.arg(image).arg(size));
}

/// Two loop devices, the first of which comes first by its name.
fn two_disks(first: &Path, second: &Path) -> [Loop; 2] {
    let number = |one: &Loop| one.0.trim_start_matches("/dev/loop").to_string();
    // Other programs attach and detach loop devices too, so that the order is not certain before both are there.
    for _ in 0..100 {
        let one = Loop::of(first, &[]);
        let two = Loop::of(second, &[]);
        // Names are compared as text, as mosfs does.
        if number(&one) < number(&two) {
            return [one, two];
        }
        drop((one, two));
        let two = Loop::of(second, &[]);
        let one = Loop::of(first, &[]);
        if number(&one) < number(&two) {
            return [one, two];
        }
    }
    panic!("no loop devices in this order");
}

/// What `mosfs boot` did.
struct Booted {
    code: i32,
    answer: serde_json::Value,
    said: String,
}

impl Booted {
    fn version(&self, version: u64) {
        assert_eq!(self.code, 0, "{}", self.said);
        assert_eq!(self.answer["version"], version, "{}", self.said);
    }

    fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, code, "{}", self.said);
        for word in words {
            assert!(self.said.contains(word), "expected `{word}`: {}", self.said);
        }
    }
}

/// The folders of a boot; what it mounted goes with them.
struct Boot<'a> {
    device: &'a Device,
    dir: TempDir,
    config: PathBuf,
}

impl<'a> Boot<'a> {
    fn of(device: &'a Device) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        fs::create_dir(dir.path().join("run")).expect("a folder");
        Self { device, dir, config: device.config().to_path_buf() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Boots from a disk.
    fn on_disk(&self, words: &str, arguments: &[&str]) -> Booted {
        self.run(&self.path("partition"), &self.device.tpm(), words, arguments)
    }

    /// Boots from the second of two disks after the first one was refused with these words.
    ///
    /// A boot waits half a second for the disk that comes first. On a busy machine that may be too short: then it takes
    /// the other one without a word, and is tried again.
    fn on_the_second_disk(&self, words: &str, refusal: &str) {
        for _ in 0..20 {
            let booted = self.on_disk(words, &["--wait", "20"]);
            booted.version(SMALL);
            if booted.said.contains(refusal) {
                return;
            }
        }
        panic!("no boot says `{refusal}`");
    }

    /// Boots from the device's folder.
    fn on_folder(&self, tpm: &Swtpm, words: &str) -> Booted {
        self.run(&self.device.system(), tpm, words, &["--wait", "0"])
    }

    fn run(&self, system: &Path, tpm: &Swtpm, words: &str, arguments: &[&str]) -> Booted {
        let _mounts = Mounts(self.path(""));
        fs::write(self.path("cmdline"), format!("quiet root=mosfs mosfs.backend=fuse {words}\n"))
            .expect("a file");
        let output = Command::new(MOSFS)
            .args(["boot", "--json", "--sysroot"])
            .arg(self.path("sysroot"))
            .arg("--cmdline")
            .arg(self.path("cmdline"))
            .args(arguments)
            .env("MOSFS_SYSTEM", system)
            .env("MOSFS_CONFIG", &self.config)
            .env("MOSFS_RUN", self.path("run"))
            .env("MOSFS_TPM", tpm.tcti_text())
            .env("SYSTEMD_MEASURE_LOG_USERSPACE", self.path("log/tpm2-measure.log"))
            .output()
            .expect("mosfs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let answer = serde_json::from_slice(&output.stdout).unwrap_or_default();
        Booted { code: output.status.code().unwrap_or(-1), answer, said }
    }
}

/// An image of a disk that must not be written to.
struct Untouched(PathBuf, Digest);

impl Untouched {
    fn of(image: &Path) -> Self {
        Self(image.to_path_buf(), Digest::of(&fs::read(image).expect("the image")))
    }

    fn check(&self, what: &str) {
        assert_eq!(Digest::of(&fs::read(&self.0).expect("the image")), self.1, "{what} was written to");
    }
}

/// Writes the superblock of a member of a Linux RAID, version 0.90, in its last 64 KiB (linux/raid/md_p.h).
fn raid_090(image: &Path) {
    let file = File::options().write(true).open(image).expect("the image");
    let at = (file.metadata().expect("a size").len() & !0xffff) - 0x1_0000;
    let mut block = vec![0u8; 4096];
    let mut put =
        |word: usize, value: u32| block[4 * word..4 * word + 4].copy_from_slice(&value.to_le_bytes());
    // magic, major, minor, patch; then the words of the generic part up to the number of disks.
    for (word, value) in
        [(0, 0xa92b_4efc), (1, 0), (2, 90), (5, 0x1234), (7, 1), (8, 30 << 10), (9, 2), (10, 2)]
    {
        put(word, value);
    }
    file.write_all_at(&block, at).expect("a superblock");
}

/// The same of version 1.0, 8 KiB before the end (md_p.h, struct mdp_superblock_1).
fn raid_10(image: &Path) {
    let file = File::options().write(true).open(image).expect("the image");
    let sectors = file.metadata().expect("a size").len() / 512;
    let at = (sectors - 16) & !7;
    let mut block = vec![0u8; 512];
    let mut put = |offset: usize, bytes: &[u8]| block[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, &0xa92b_4efc_u32.to_le_bytes());
    put(4, &1u32.to_le_bytes());
    put(16, &[7; 16]);
    put(32, b"host:0");
    put(72, &1u32.to_le_bytes());
    put(80, &at.to_le_bytes());
    put(92, &2u32.to_le_bytes());
    put(136, &at.to_le_bytes());
    put(144, &at.to_le_bytes());
    put(220, &1u32.to_le_bytes());
    // The sum of its first 258 bytes as words, folded once; the last two bytes are half a word.
    let word = |at: usize| u64::from(u32::from_le_bytes(block[at..at + 4].try_into().expect("4 bytes")));
    let sum: u64 = (0..64).map(|at| word(4 * at)).sum();
    let sum = ((sum & 0xffff_ffff) + (sum >> 32)) as u32;
    block[216..220].copy_from_slice(&sum.to_le_bytes());
    file.write_all_at(&block, at * 512).expect("a superblock");
}

/// What blkid(8) calls a device.
fn blkid(device: &Loop) -> String {
    let output: Output = Command::new("blkid")
        .args(["-p", "-o", "value", "-s", "TYPE", &device.0])
        .output()
        .expect("util-linux");
    String::from_utf8_lossy(&output.stdout).trim().to_string()
}

#[test]
fn a_part_of_something_else_is_passed_over_whatever_label_it_carries() {
    let device = Device::with(SMALL);
    let boot = Boot::of(&device);
    let label = label();
    let good = boot.path("good");
    ext4(&good, &label, Some(&device.system()));
    let member = boot.path("member");
    let pvcreate = |image: &Path| {
        let disk = Loop::of(image, &[]);
        tool("lvm2", Command::new("pvcreate").args(["-q", "-y", "-ff", &disk.0]));
    };
    let kinds: [(&str, &dyn Fn(&Path)); 3] =
        [("linux_raid_member", &raid_090), ("linux_raid_member", &raid_10), ("LVM2_member", &pvcreate)];
    for (kind, change) in kinds {
        // The file system ends before the superblock, as inside of a mirror.
        blank(&member);
        ext4_of(&member, "28M", &label, Some(&device.system()));
        change(&member);
        let untouched = Untouched::of(&member);
        let disks = two_disks(&member, &good);
        assert_eq!(blkid(&disks[0]), kind);
        let words = format!("mosfs.system=LABEL={label}");
        boot.on_disk(&words, &["--wait", "20"]).version(SMALL);
        untouched.check(kind);
        // Alone it is no partition, by its label and by its name.
        let [alone, good] = disks;
        drop(good);
        let passed_over = format!("{} was passed over: it is a part of something else ({kind})", alone.0);
        boot.on_disk(&words, &["--wait", "3"]).refused(1, &["no system partition", &passed_over]);
        let by_name = format!("mosfs.system={}", alone.0);
        boot.on_disk(&by_name, &["--wait", "3"]).refused(1, &["no system partition", &passed_over]);
        untouched.check(kind);
    }
}

#[test]
fn the_next_disk_is_tried_where_one_is_empty_broken_or_foreign() {
    let device = Device::with(SMALL);
    let boot = Boot::of(&device);
    let label = label();
    let (good, other) = (boot.path("good"), boot.path("other"));
    ext4(&good, &label, Some(&device.system()));
    let words = format!("mosfs.system=LABEL={label}");

    ext4(&other, &label, None);
    let disks = two_disks(&other, &good);
    boot.on_the_second_disk(&words, "it holds no system; looking for another one");
    drop(disks);

    // Only the superblock is left.
    ext4(&other, &label, Some(&device.system()));
    File::options().write(true).open(&other).unwrap().write_all_at(&vec![0; 4 << 20], 2048).unwrap();
    let disks = two_disks(&other, &good);
    boot.on_disk(&words, &["--wait", "20"]).version(SMALL);
    drop(disks);

    // Another product's disk, and one with older systems.
    let elsewhere = tempfile::tempdir().unwrap();
    let stranger = Publisher::of_product(elsewhere.path(), "11111111-2e01-4c92-949b-a6545d30fc06");
    stranger.publish(900, "foreign");
    let system = elsewhere.path().join("system");
    let installed = Command::new(MOSFS)
        .args([
            "install",
            &stranger.source_of(900),
            "--product",
            "11111111-2e01-4c92-949b-a6545d30fc06",
            "--ca",
        ])
        .arg(stranger.key("ca.pem"))
        .args(["--floor", "file"])
        .env("MOSFS_SYSTEM", &system)
        .env("MOSFS_CONFIG", elsewhere.path().join("config"))
        .output()
        .unwrap();
    assert!(installed.status.success(), "{}", String::from_utf8_lossy(&installed.stderr));
    ext4(&other, &label, Some(&system));
    let disks = two_disks(&other, &good);
    boot.on_the_second_disk(&words, "no deployment can be booted: 900-");
    // The foreign one alone: its reason is the boot's.
    let [alone, good] = disks;
    drop(good);
    boot.on_disk(&words, &["--wait", "3"]).refused(3, &[&alone.0, "no deployment can be booted: 900-"]);
    assert_eq!(fs::read_dir(boot.path("partition")).unwrap().count(), 0, "it is mounted no more");
}

/// Rule (docs/boot.md, the check of the file system): what a power cut or a worn disk leaves of a file system is repaired
/// before it is mounted, also where its superblock cannot be read; that only where the device is known by another name than
/// its label. `medium/install.rs` has a partition that is known by its name in the GPT.
#[test]
fn a_damaged_file_system_is_repaired_before_it_is_mounted() {
    let device = Device::with(SMALL);
    let boot = Boot::of(&device);
    let image = boot.path("image");
    let put = |at: u64, bytes: &[u8]| {
        File::options().write(true).open(&image).unwrap().write_all_at(bytes, at).unwrap();
    };
    // ext4_super_block, at 1024: s_checksum covers all that is before it, s_state is 2 where there were errors.
    let torn = || put(1024 + 512, &[0xa5; 64]);
    let erased = || put(0, &[0; 4096]);
    let with_errors = || {
        tool("e2fsprogs", Command::new("debugfs").args(["-w", "-R", "ssv state 2"]).arg(&image));
    };
    let label = label();
    let damages: [(&str, bool, &dyn Fn()); 4] = [
        ("torn", true, &torn),
        ("erased", true, &erased),
        ("errors", true, &with_errors),
        ("errors", false, &with_errors),
    ];
    for (what, by_name, damage) in damages {
        ext4(&image, &label, Some(&device.system()));
        damage();
        let disk = Loop::of(&image, &[]);
        let words = if by_name { disk.0.clone() } else { format!("LABEL={label}") };
        let words = format!("mosfs.system={words}");
        let booted = boot.on_disk(&words, &["--wait", "20"]);
        booted.version(SMALL);
        let said = format!("{}: e2fsck has corrected its file system", disk.0);
        assert!(booted.said.contains(&said), "{what}: {}", booted.said);
        // Once: it is whole now.
        disk.wait_until_unmounted();
        let again = boot.on_disk(&words, &["--wait", "20"]);
        again.version(SMALL);
        assert!(!again.said.contains("e2fsck"), "{what}: {}", again.said);
    }
    // Without a superblock nothing shows that it has the label.
    ext4(&image, &label, Some(&device.system()));
    erased();
    let untouched = Untouched::of(&image);
    let disk = Loop::of(&image, &[]);
    let words = format!("mosfs.system=LABEL={label}");
    boot.on_disk(&words, &["--wait", "3"]).refused(1, &["no system partition"]);
    drop(disk);
    // Nothing can be corrected on a disk that cannot be written.
    let disk = Loop::of(&image, &["-r"]);
    let words_by_name = format!("mosfs.system={}", disk.0);
    let said = format!("{}: it has no file system; looking for another one", disk.0);
    boot.on_disk(&words_by_name, &["--wait", "3"]).refused(1, &[&said]);
    drop(disk);
    untouched.check("a damaged disk");
    // What cannot be repaired is named.
    put(0, &vec![0; 32 << 20]);
    let disk = Loop::of(&image, &[]);
    let said = format!("{}: it has no file system; e2fsck ends with exit code 8", disk.0);
    boot.on_disk(&format!("mosfs.system={}", disk.0), &["--wait", "3"]).refused(1, &[&said]);
}

/// A FUSE daemon that is stopped: whatever it serves does not answer until this goes.
struct Stopped(String);

impl Stopped {
    fn signal(&self, signal: &str) {
        let _ = Command::new("kill").args([signal, &self.0]).status();
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.signal("-CONT");
    }
}

#[test]
fn a_disk_that_does_not_answer_stops_nothing() {
    let device = Device::with(SMALL);
    let boot = Boot::of(&device);
    let label = label();
    let good = boot.path("good");
    ext4(&good, &label, Some(&device.system()));

    // A disk whose every read waits for a process that does not run: an image in a FUSE mount.
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    let (tree, squashfs) = (dir.path().join("tree"), dir.path().join("squashfs"));
    fs::create_dir(&tree).unwrap();
    ext4(&tree.join("disk"), &label, Some(&device.system()));
    tool(
        "squashfs-tools",
        Command::new("mksquashfs").args([&tree, &squashfs]).args(["-quiet", "-no-progress"]),
    );
    publisher.publish_layers(1, vec![publisher.add_image(&squashfs)], true);
    let names = publisher.store().names().unwrap();
    let image = names.into_iter().map(|(name, _)| name).find(|name| name.starts_with("mos/images/")).unwrap();
    let mount = dir.path().join("mount");
    fs::create_dir(&mount).unwrap();
    let _mounts = Mounts(dir.path().to_path_buf());
    let mut mosfs = Command::new(MOSFS);
    mosfs.args(["mount", "--backend", "fuse", &format!("{}:{image}", publisher.source())]).arg(&mount);
    tool("", &mut mosfs);
    let records =
        fs::read_dir("/run/mosfs/mounts").unwrap().filter_map(|entry| fs::read(entry.ok()?.path()).ok());
    let daemon = records
        .filter_map(|text| serde_json::from_slice::<serde_json::Value>(&text).ok())
        .find(|record| record["target"] == mount.to_str().unwrap())
        .map(|record| record["daemon"]["pid"].to_string())
        .unwrap();
    {
        let disks = two_disks(&mount.join("disk"), &good);
        let stopped = Stopped(daemon);
        stopped.signal("-STOP");
        // What the kernel has read of it already does not count.
        let _ = Command::new("blockdev").args(["--flushbufs", &disks[0].0]).status();
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        let words = format!("mosfs.system=LABEL={label}");
        boot.on_disk(&words, &["--wait", "20"]).version(SMALL);
        let [silent, good] = disks;
        drop(good);
        let said = format!("{} was passed over: it does not answer", silent.0);
        boot.on_disk(&words, &["--wait", "3"]).refused(1, &["no system partition", &said]);
        drop(stopped);
    }
}

#[test]
fn a_disk_that_cannot_be_written_boots_what_is_current_and_tries_nothing() {
    let device = Device::with(SMALL);
    device.update(SMALL_NEXT);
    let boot = Boot::of(&device);
    let label = label();
    let image = boot.path("image");
    ext4(&image, &label, Some(&device.system()));
    let untouched = Untouched::of(&image);
    let disk = Loop::of(&image, &["-r"]);
    for words in [format!("mosfs.system=LABEL={label}"), format!("mosfs.system={}", disk.0)] {
        let booted = boot.on_disk(&words, &["--wait", "60"]);
        booted.version(SMALL);
        let said = format!("{} cannot be written: a pending version", disk.0);
        assert!(booted.said.contains(&said), "{}", booted.said);
    }
    drop(disk);
    untouched.check("a read-only disk");
    // The same disk, once it can be written: the pending version has all its tries.
    let disk = Loop::of(&image, &[]);
    boot.on_disk(&format!("mosfs.system={}", disk.0), &["--wait", "60"]).version(SMALL_NEXT);
}

#[test]
fn file_systems_of_all_kinds_are_found_by_label_and_uuid() {
    let device = Device::with(SMALL);
    let boot = Boot::of(&device);
    let kinds = [("ext2", "mke2fs"), ("ext3", "mke2fs"), ("ext4", "mke2fs")];
    for (kind, program) in kinds {
        let label = label();
        let image = boot.path("image");
        blank(&image);
        let uuid = "6d1f6e2a-0c5c-4b0a-9d2e-0a1b2c3d4e5f";
        let mut command = Command::new(program);
        command.args(["-q", "-t", kind, "-L", &label, "-U", uuid, "-d"]).arg(device.system()).arg(&image);
        tool("e2fsprogs", &mut command);
        let _disk = Loop::of(&image, &[]);
        boot.on_disk(&format!("mosfs.system=LABEL={label}"), &["--wait", "60"]).version(SMALL);
        boot.on_disk(&format!("mosfs.system=UUID={}", uuid.to_uppercase()), &["--wait", "60"]).version(SMALL);
    }
}

/// What PCR 15 of a bank holds, in lower case.
fn pcr15(tpm: &Swtpm, bank: &str) -> String {
    let text = tpm.tool_ok("tpm2_pcrread", &[format!("{bank}:15")]);
    let text = String::from_utf8(text).expect("text");
    let value = text.lines().find_map(|line| line.split_once("15: 0x")).expect("a value");
    value.1.trim().to_lowercase()
}

/// What a PCR holds after an event: as docs/boot.md says, with Python's means and none of mosfs'.
fn extended(bank: &str, event: &str) -> String {
    let script = "import hashlib,sys\n\
        h=lambda b: hashlib.new(sys.argv[1],b).digest()\n\
        print(h(bytes(len(h(b'')))+h(sys.argv[2].encode())).hex())";
    let output = tool("python3", Command::new("python3").args(["-c", script, bank, event]));
    String::from_utf8(output.stdout).expect("text").trim().to_string()
}

/// The records of an event log.
fn records(boot: &Boot<'_>) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(boot.path("log/tpm2-measure.log")).expect("the log");
    let parse =
        |record: &str| serde_json::from_str(record.strip_suffix('\n').expect("a line")).expect("JSON");
    text.split('\u{1e}').skip(1).map(parse).collect()
}

const BANKS: [&str; 4] = ["sha1", "sha256", "sha384", "sha512"];

/// A TPM of the device's, just started, with these banks.
fn with_banks(device: &Device, banks: &str) -> Swtpm {
    let mut tpm = device.tpm();
    tpm.tool_ok("tpm2_pcrallocate", &[banks]);
    tpm.restart();
    tpm
}

#[test]
fn a_boot_is_measured_into_every_active_bank_and_logged() {
    let device = Device::with(SMALL);
    fs::write(device.config().join("site.conf"), "whatever else is in CONFIG\n").unwrap();
    let manifest = Digest::of(&fs::read(device.deployment(SMALL).join("manifest.json")).unwrap());
    for banks in [&BANKS[..], &["sha256"], &["sha1"], &["sha384", "sha512"]] {
        let boot = Boot::of(&device);
        let all = |set: &&str| if banks.contains(set) { format!("{set}:all") } else { format!("{set}:none") };
        let tpm = with_banks(&device, &BANKS.iter().map(all).collect::<Vec<_>>().join("+"));
        boot.on_folder(&tpm, "mosfs.overlay=ro").version(SMALL);
        let records = records(&boot);
        let [record] = &records[..] else { panic!("{records:?}") };
        let event = record["content"]["string"].as_str().unwrap();
        for bank in banks {
            assert_eq!(pcr15(&tpm, bank), extended(bank, event), "{bank}");
        }
        if banks.contains(&"sha256") {
            let expected = measured(device.config(), &manifest, "hostfs", "ro").to_lowercase();
            assert_eq!(pcr15(&tpm, "sha256"), expected);
        }
        assert_eq!((&record["pcr"], &record["content_type"]), (&15.into(), &"systemd".into()));
        let logged: Vec<_> = record["digests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["hashAlg"].as_str().unwrap())
            .collect();
        assert_eq!(logged.len(), banks.len(), "{logged:?}");
        assert!(banks.iter().all(|bank| logged.contains(bank)), "{logged:?}");
    }
}

#[test]
fn what_was_booted_changes_the_measurement() {
    let device = Device::with(SMALL);
    let mut seen = Vec::new();
    let mut boot_and_see = |what: &str, words: &str| {
        let mut tpm = device.tpm();
        tpm.restart();
        let boot = Boot::of(&device);
        let booted = boot.on_folder(&tpm, words);
        assert_eq!(booted.code, 0, "{what}: {}", booted.said);
        let value = pcr15(&tpm, "sha256");
        assert!(!seen.contains(&value), "{what} is measured as something before it");
        seen.push(value);
    };
    boot_and_see("the first", "");
    boot_and_see("another overlay", "mosfs.overlay=ro");
    fs::write(device.config().join("overlay"), "tmpfs\n").unwrap();
    boot_and_see("another CONFIG that means the same", "");
    device.update(SMALL_NEXT);
    boot_and_see("another system", "");
}

#[test]
fn a_boot_that_fails_closes_the_pcr_in_every_bank() {
    let fault = |what: &str, change: &dyn Fn(&Device, &Boot<'_>), words: &str, code: i32| {
        let device = Device::with(SMALL);
        let boot = Boot::of(&device);
        change(&device, &boot);
        let mut tpm = device.tpm();
        tpm.restart();
        let booted = boot.on_folder(&tpm, words);
        assert_eq!(booted.code, code, "{what}: {}", booted.said);
        for bank in BANKS {
            assert_eq!(pcr15(&tpm, bank), extended(bank, "mosfs-v1 refused"), "{what}: {bank}");
        }
        let last = records(&boot).pop().unwrap();
        assert_eq!(last["content"]["string"], "mosfs-v1 refused", "{what}");
        assert!(!boot.path("run/boot.json").is_file(), "{what}");
    };
    let nothing = |_: &Device, _: &Boot<'_>| {};
    let signature = |device: &Device, _: &Boot<'_>| flip(&device.deployment(SMALL).join("manifest.sig"), 20);
    fault("a bad signature", &signature, "", 3);
    fault("a word that makes no sense", &nothing, "mosfs.overlay=rw", 2);
    fault("a word that CONFIG does not allow", &nothing, "mosfs.overlay=scratch", 2);
    fault("another root= word", &nothing, "root=/dev/sda1", 2);
    fault("a target that is none", &nothing, "root=mosfs:none", 2);
    let config = |name: &'static str| {
        move |device: &Device, _: &Boot<'_>| fs::write(device.config().join(name), "x\n").unwrap()
    };
    fault("a CONFIG without sense", &config("overlay"), "", 2);
    fault("a product that is none", &config("product"), "", 2);
    fault("a CA that is none", &config("manifestCA.pem"), "", 2);
    fault("a floor key that is none", &config("floor.pub"), "", 2);
    let no_ca =
        |device: &Device, _: &Boot<'_>| fs::remove_file(device.config().join("manifestCA.pem")).unwrap();
    fault("no CA", &no_ca, "", 3);
    let no_partition = |device: &Device, _: &Boot<'_>| fs::remove_dir_all(device.system()).unwrap();
    fault("no partition", &no_partition, "mosfs.system=LABEL=no-such-label", 1);
    // After the root was mounted.
    let no_record = |_: &Device, boot: &Boot<'_>| fs::create_dir_all(boot.path("run/boot.json/x")).unwrap();
    fault("a run folder that takes no record", &no_record, "", 1);
}

#[test]
fn a_target_that_is_no_hostfs_is_no_root_unless_the_configuration_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    let layer = |content: &str| publisher.layer(&publisher.store().writer().unwrap(), content);
    let targets = [("hostfs", "hostfs", vec![layer("host")]), ("kiosk", "fs-only", vec![layer("kiosk")])];
    publisher.publish_targets(SMALL, &targets, true);
    let device = Device::of(Publisher::again(dir.path()), SMALL);
    let boot = Boot::of(&device);
    let mut tpm = device.tpm();
    boot.on_folder(&tpm, "root=mosfs:kiosk").refused(2, &["target kiosk cannot be the root", "fs-only"]);
    fs::write(device.config().join("root-target"), "kiosk\n").unwrap();
    let mut values = Vec::new();
    for (words, target) in [("", "kiosk"), ("root=mosfs:hostfs", "hostfs")] {
        tpm.restart();
        let booted = boot.on_folder(&tpm, words);
        booted.version(SMALL);
        assert_eq!(booted.answer["target"], target);
        values.push(pcr15(&tpm, "sha256"));
    }
    assert_ne!(values[0], values[1]);
}

#[test]
fn a_tpm_that_takes_no_measurement_stops_the_boot() {
    let device = Device::with(SMALL);
    let boot = Boot::of(&device);
    // The bank is active, and has all PCRs but this one.
    let others: Vec<String> = (0..24).filter(|pcr| *pcr != 15).map(|pcr| pcr.to_string()).collect();
    let banks = format!("sha1:none+sha256:{}+sha384:none+sha512:none", others.join(","));
    let tpm = with_banks(&device, &banks);
    boot.on_folder(&tpm, "").refused(5, &["no active bank with PCR 15"]);
    assert!(!boot.path("sysroot/content").exists(), "nothing stays mounted");
}

#[test]
fn the_tpm_is_waited_for_as_the_disk_is() {
    let device = Device::with(SMALL);
    let boot = Boot::of(&device);
    // Its port is known before it listens there.
    let mut tpm = device.tpm();
    let port = tpm.port();
    tpm.kill();
    let state = device.path("tpm");
    let late = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_secs(2));
        Command::new("swtpm")
            .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--tpmstate"])
            .arg(format!("dir={}", state.display()))
            .arg("--server")
            .arg(format!("type=tcp,port={port},bindaddr=127.0.0.1"))
            .arg("--ctrl")
            .arg(format!("type=tcp,port={},bindaddr=127.0.0.1", port + 1))
            .spawn()
            .expect("swtpm")
    });
    let booted = boot.run(&device.system(), &tpm, "", &["--wait", "120"]);
    let mut child = late.join().expect("a process");
    let _ = child.kill();
    let _ = child.wait();
    booted.version(SMALL);
}

#[test]
fn an_initramfs_is_checked_before_it_replaces_another() {
    let device = Device::with(SMALL);
    let check = || {
        let output = Command::new(MOSFS)
            .args(["boot", "--check", "--config"])
            .arg(device.config())
            .output()
            .expect("mosfs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(check().0, Some(0), "{}", check().1);
    for (file, content, code) in [
        ("overlay", Some("rw"), 2),
        ("on-failure", Some("never"), 2),
        ("root-target", Some("../x"), 2),
        ("product", Some("not a uuid\n"), 2),
        ("manifestCA.pem", Some("no certificate"), 2),
        ("floor.pub", Some("no key"), 2),
        ("floor.pub", None, 5),
        ("manifestCA.pem", None, 3),
        ("product", None, 3),
    ] {
        let path = device.config().join(file);
        let before = fs::read(&path).ok();
        match content {
            Some(content) => fs::write(&path, content).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let (found, said) = check();
        assert_eq!(found, Some(code), "{file} with {content:?}: {said}");
        assert!(said.contains(file), "{file} with {content:?}: {said}");
        match before {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
    }
}
