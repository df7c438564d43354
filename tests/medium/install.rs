//! From a medium and an empty disk to a committed system.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use super::fixture::{MOSFS, Publisher};
use super::machine::{Cut, Machine, tool};
use super::real::{CMDLINE, Device, System, build, fat, full_publisher, medium, publisher, run_until, steps};
use super::tools::sh;

/// What a system does once it is up: it is committed, which raises the floor.
const COMMIT: &str = "mosfs commit || end 9\nmosfs floor show\nesp\n";
/// Shows what Linux keeps from root.
const LOCKDOWN: &str =
    "mount -t securityfs securityfs /sys/kernel/security || end 22\ncat /sys/kernel/security/lockdown\n";
/// The words that the steps of an installation begin with.
pub const STEPS: [&str; 10] = [
    "medium: ",
    "disk: ",
    "floor: ",
    "partition: ",
    "mkfs: ",
    "install: ",
    "verify: ",
    "esp: ",
    "MOSFS-INSTALL-VERDICT: ",
    "vm: ",
];

/// A publisher with version 200 on Debian's cloud kernel.
pub fn published() -> &'static (Publisher, System) {
    static PUBLISHED: OnceLock<(Publisher, System)> = OnceLock::new();
    PUBLISHED.get_or_init(|| {
        let publisher = publisher(COMMIT);
        let system = build(&publisher, 200, &["--cmdline", CMDLINE]);
        (publisher, system)
    })
}

/// A medium of it with these answers. `name` is of the test's own.
pub fn with_answers(name: &str, answers: &str) -> PathBuf {
    let (publisher, system) = published();
    medium(publisher, system, name, Some(answers))
}

#[test]
fn a_cd_installs_on_an_empty_disk_which_then_starts_by_itself() {
    let (publisher, _) = published();
    let medium = with_answers("cd", "disk: only-empty\n");
    let device = Device::new(publisher);
    let mut machine = device.machine(&medium, "cd");
    // A new board, whose clock has never been set.
    machine.rtc = Some("2020-01-01T00:00:00");
    let ended = machine.expect(0, &["the clock said Jan  1 00:", "the floor rose from 0 to 200"]);
    let steps = steps(&ended.console, &STEPS);
    let kernel = &publisher.kernel_id("store-200", 200)[..12];
    let expected = [
        "medium: version 200 (",
        "disk: /dev/vda (1 GiB) is empty",
        "floor: the TPM gets a floor with the key ",
        "partition: /dev/vda: ",
        "mkfs: ext4, labelled mosfs, on /dev/vda2",
        "install: version 200 on /dev/vda2",
        "verify: every block on /dev/vda2",
        &format!("esp: EFI/Linux/mosfs-200-{kernel}.efi on /dev/vda1"),
        "MOSFS-INSTALL-VERDICT: 0 installed version 200 on /dev/vda",
        "vm: version 200",
        "floor: 200",
        &format!("vm: on the ESP: mosfs-200-{kernel}.efi"),
    ];
    assert_eq!(steps.len(), expected.len(), "{steps:#?}");
    for (step, expected) in steps.iter().zip(expected) {
        assert!(step.starts_with(expected), "{step}: expected {expected}");
    }
    // Half of a superblock, as of a power cut between its two sectors, and then none at all.
    machine.medium = None;
    for (at, bytes) in [((513 << 20) + 1024 + 512, 512), (513 << 20, 4096)] {
        let write = format!("write -P 0 {at} {bytes}");
        let disk = device.path("disk.qcow2");
        tool("qemu-utils", Command::new("qemu-io").args(["-f", "qcow2", "-c", &write]).arg(disk));
        machine.expect(0, &["/dev/vda2: e2fsck has corrected its file system", "vm: version 200"]);
    }
}

/// What every installation ends with: the system is up and committed.
const UP: [&str; 4] = [
    "MOSFS-INSTALL-VERDICT: 0 installed version 200 on /dev/vda",
    "This machine restarts.",
    "vm: version 200",
    "the floor rose from 0 to 200",
];

/// A medium on a disk, which the firmware prefers: it starts again after the installation, and must not loop. The answers
/// are on a medium of their own, which wins.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn a_medium_that_stays_in_makes_no_loop() {
    let (publisher, _) = published();
    let medium = with_answers("loop", "disk: serial:none-such\n");
    let device = Device::new(publisher);
    let mut machine = device.machine(&medium, "disk");
    machine.medium_first = true;
    fat(&device.path("answers.img"), "MOSFS-ANSWE", "answers.yaml", "disk: only-empty\nafter: reboot\n");
    machine.second.push(device.path("answers.img"));
    let ended = run_until(&machine, "to restart this machine.");
    let installed = "MOSFS-INSTALL-VERDICT: 0 installed version 200 on /dev/vda";
    ended.expect(137, &[installed, "Version 200 was on the disk already."]);
    assert_eq!(ended.console.matches(installed).count(), 1, "{}", ended.console);
    // Without the medium the disk starts.
    machine.medium = None;
    machine.expect(0, &["vm: version 200", "the floor rose from 0 to 200"]);
}

/// What a person does: the medium is a USB stick, and the kernel that of real machines, for which USB, the disk, FAT and ext4
/// are modules. The stick stays in until the installation is done.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn a_usb_stick_installs_with_the_kernel_of_real_machines() {
    let publisher = full_publisher(COMMIT);
    let system = build(&publisher, 200, &["--cmdline", CMDLINE]);
    let stick = medium(&publisher, &system, "stick", Some("disk: only-empty\n"));
    let device = Device::new(&publisher);
    let mut machine = device.machine(&stick, "usb");
    // Without `after` in the answers, the machine waits until the stick is removed or somebody presses Enter.
    machine.typed = vec![("Remove the medium, or press Enter to restart this machine.", "")];
    let on_usb = "is on the medium /dev/sda";
    let ended = machine.expect(0, &[on_usb, UP[0], UP[2], UP[3]]);
    assert_eq!(ended.console.matches("MOSFS-INSTALL-VERDICT").count(), 1, "{}", ended.console);
}

/// Acceptance: a power cut at any moment of an installation, and the same medium installs without `wipe`.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn an_installation_that_was_cut_off_is_finished_by_the_same_medium() {
    let (publisher, _) = published();
    let medium = with_answers("cut", "disk: only-empty\n");
    for (step, milliseconds) in [("partition: ", 0), ("install: ", 1500), ("esp: ", 0)] {
        let device = Device::new(publisher);
        let mut machine = device.machine(&medium, "cd");
        machine.cut = Some(Cut::After(step.into(), Duration::from_millis(milliseconds)));
        machine.run();
        machine.cut = None;
        // Where everything was on the disk, the firmware may start it without the medium.
        machine.expect(0, &["vm: version 200", "the floor rose from 0 to 200"]);
    }
}

/// Without answers the console is asked: a choice that is none, then the disk, and its serial number because it is not
/// empty; then the medium is waited for.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn without_answers_the_console_is_asked() {
    let (publisher, system) = published();
    let medium = medium(publisher, system, "asked", None);
    let device = Device::new(publisher);
    sh(
        &device.path("."),
        "qemu-img create -q -f raw raw 1G; mke2fs -q -t ext4 -L data raw; qemu-img convert -O qcow2 raw disk.qcow2; rm raw",
    );
    let mut machine = device.machine(&medium, "disk");
    machine.medium_first = true;
    machine.typed = vec![
        ("type the number of the disk", "9"),
        ("Press Enter to try again.", ""),
        ("type the number of the disk", "1"),
        ("To erase all of it, type mosfs:", "mosfs"),
    ];
    let ended = run_until(&machine, "Remove the medium, or press Enter to restart this machine.");
    ended.expect(
        137,
        &[
            "MOSFS-INSTALL-VERDICT: 1 no disk was chosen; nothing was written",
            "/dev/vda (1 GiB, serial mosfs, ext4 labelled data)",
            "MOSFS-INSTALL-VERDICT: 0 installed version 200 on /dev/vda",
        ],
    );
    // The medium is not in the list.
    ended.without(&["STICK"]);
    machine.medium = None;
    machine.expect(0, &["vm: version 200"]);
}

/// Acceptance: whatever is refused leaves the disk as it is.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn what_a_medium_refuses_leaves_the_disk_as_it_is() {
    let (publisher, _) = published();
    let good = with_answers("refused", "disk: path:/dev/vda\n");
    // A disk that is not empty.
    let device = Device::new(publisher);
    sh(
        &device.path("."),
        "truncate -s 1G raw; printf 'label: gpt\\n,100M\\n' | sfdisk -q raw; qemu-img convert -O qcow2 raw disk.qcow2; rm raw",
    );
    let before = device.disk();
    let machine = device.machine(&good, "cd");
    run_until(&machine, "MOSFS-INSTALL-VERDICT: 1 /dev/vda is not empty: it holds a GPT partition table");
    assert_eq!(device.disk(), before);
    // One bit of a layer on the medium.
    let device = Device::new(publisher);
    let before = device.disk();
    let store = publisher.path("store-200/blobs/sha256");
    let layer = store.join(sh(&store, "ls -S | head -n 1").trim());
    let layer = fs::read(layer).unwrap();
    let part = &layer[layer.len() / 2..][..64];
    let mut bytes = fs::read(&good).unwrap();
    let at = bytes.windows(64).position(|window| window == part).expect("the layer on the medium");
    bytes[at] ^= 1;
    let flipped = device.path("flipped.iso");
    fs::write(&flipped, bytes).unwrap();
    let machine = device.machine(&flipped, "cd");
    let ended = run_until(&machine, "MOSFS-INSTALL-VERDICT: 3 ");
    ended.expect(137, &["its content has digest"]);
    assert_eq!(device.disk(), before);
    // No floor, and no key.
    let mut machine = device.machine(&good, "cd");
    machine.second.clear();
    run_until(&machine, "MOSFS-INSTALL-VERDICT: 5 the TPM has no floor yet");
    assert_eq!(device.disk(), before);
    // The machine is switched off by itself.
    let ended = machine.run();
    ended.expect(125, &["This machine is switched off in 60 seconds."]);
    assert_eq!(device.disk(), before);
}

/// Version 200, signed with the key for tests in Debian's package ovmf.
fn build_signed(publisher: &Publisher) -> System {
    let key = "/usr/share/ovmf/PkKek-1-snakeoil";
    sh(publisher.dir(), &format!("openssl rsa -in {key}.key -passin pass:snakeoil -out db.key 2>/dev/null"));
    let pem = format!("{key}.pem");
    build(publisher, 200, &["--cmdline", CMDLINE, "--sb-key", "db.key", "--sb-cert", &pem])
}

/// A machine whose firmware starts only what that key has signed.
fn enforcing(device: &Device, medium: &Path, kind: &'static str) -> Machine {
    let mut machine = device.machine(medium, kind);
    machine.secure_boot = true;
    fs::copy("/usr/share/OVMF/OVMF_VARS_4M.snakeoil.fd", device.path("vars.fd")).unwrap();
    machine
}

#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn with_secure_boot_only_a_signed_medium_starts() {
    let publisher = publisher(COMMIT);
    let signed = build_signed(&publisher);
    let answers = Some("disk: only-empty\n");
    let good = medium(&publisher, &signed, "signed", answers);
    let device = Device::new(&publisher);
    enforcing(&device, &good, "cd").expect(0, &UP);
    // The same, unsigned.
    let device = Device::new(&publisher);
    let unsigned = build(&publisher, 201, &["--cmdline", CMDLINE]);
    let machine = enforcing(&device, &medium(&publisher, &unsigned, "unsigned", answers), "cd");
    run_until(&machine, "Access Denied").without(&["MOSFS-INSTALL-VERDICT", "Linux version"]);
}

/// The same medium as a disk and as a USB stick, with the kernel of real machines: it loads nearly all of its drivers, and
/// under Secure Boot only those that its own maker has signed.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn with_secure_boot_a_signed_medium_installs_as_a_disk_and_as_a_stick() {
    let publisher = full_publisher(&format!("secure\n{LOCKDOWN}{COMMIT}"));
    let signed = build_signed(&publisher);
    let good = medium(&publisher, &signed, "signed", Some("disk: only-empty\nafter: reboot\n"));
    for (kind, on) in [("disk", "is on the medium /dev/vd"), ("usb", "is on the medium /dev/sda")] {
        let device = Device::new(&publisher);
        let ended = enforcing(&device, &good, kind)
            .expect(0, &[&[on, "vm: SecureBoot 1, SetupMode 0", "[integrity]"][..], &UP].concat());
        ended.without(&["Access Denied", "Loading of unsigned module", "Key was rejected"]);
    }
    // The same, unsigned.
    let unsigned = build(&publisher, 201, &["--cmdline", CMDLINE]);
    let unsigned = medium(&publisher, &unsigned, "unsigned", Some("disk: only-empty\n"));
    for kind in ["disk", "usb"] {
        let device = Device::new(&publisher);
        let before = device.disk();
        run_until(&enforcing(&device, &unsigned, kind), "Access Denied")
            .without(&["MOSFS-INSTALL-VERDICT", "Linux version"]);
        assert_eq!(device.disk(), before, "{kind}");
    }
}

/// A provisioning key that is elsewhere: the second medium carries the nonce there and the signature back. The machine stays
/// on meanwhile; a nonce of before, or a signature over one, serves nobody.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn a_medium_carries_a_nonce_to_a_key_that_is_elsewhere_and_the_signature_back() {
    const UUID: &str = "4c4c4544-0042-3510-8054-b4c04f4a4d32";
    const OUT: &str = "Leave this machine on: when it starts again, it makes another nonce.";
    let (publisher, _) = published();
    let medium = with_answers("remote", "disk: only-empty\nfloor: remote\n");
    let device = Device::new(publisher);
    let public = fs::read_to_string(publisher.path("keys/provision.pub")).unwrap();
    let stick = device.path("stick.img");
    fat(&stick, "MOSFS-PROVI", "provision.pub", &public);
    let mut machine = device.machine(&medium, "cd");
    machine.uuid = Some(UUID);
    machine.second.clear();
    machine.kept = vec![stick.clone()];
    let before = device.disk();
    // The machine is switched off while it waits.
    run_until(&machine, OUT);
    assert_eq!(device.disk(), before, "the disk is not written before the floor is there");
    // What the holder of the key does.
    let (stick, folder) = (stick.display(), device.path("."));
    let (nonce, signature) = (format!("nonce-{UUID}"), format!("signature-{UUID}"));
    let sign = format!(
        "cd {folder}; mcopy -n -o -i {stick} ::/{nonce} .; test $(stat -c %s {nonce}) = 36; \
         {MOSFS} floor sign-provision --nonce {nonce} --key {key} --output {signature}",
        folder = folder.display(),
        key = publisher.path("keys/provision.key").display(),
    );
    sh(&folder, &sign);
    let put = format!("mcopy -o -i {stick} {}/{signature} ::/", folder.display());
    machine.host = vec![
        // Over the nonce of before.
        (OUT, put.clone()),
        (OUT, format!("! mdir -i {stick} ::/{signature}; {sign}; {put}")),
    ];
    machine.typed = vec![("Press Enter to try again.", "")];
    let refused =
        "MOSFS-INSTALL-VERDICT: 5 the signature is not the provisioning key's over the nonce of this session";
    let found = format!("mosfs: /{signature} is on /dev/vdb");
    let ended = machine.expect(0, &[&[refused, &found][..], &UP].concat());
    assert_eq!(ended.console.matches(OUT).count(), 2, "{}", ended.console);
}
