//! Which disk an install medium takes, and a medium that brings the firmware its keys.

use std::fs;

use super::install::{published, with_answers};
use super::machine::Machine;
use super::real::{CMDLINE, Device, build, enrolling, publisher, run_until};
use super::tools::sh;

/// Acceptance: two empty disks and `only-empty`, the medium's own disk, and no disk at all are refused; a serial number
/// means one of two, in whatever order they are.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn a_disk_is_taken_only_where_one_is_meant() {
    let (publisher, _) = published();
    let device = Device::new(publisher);
    let before = device.disk();
    // The order of the devices: the disk, the medium, the second ones.
    sh(&device.path("."), "truncate -s 1G second.img");
    let with_second = |medium: &str, answers: &str| {
        let mut machine = device.machine(&with_answers(medium, answers), "disk");
        machine.medium_first = true;
        machine.second.push(device.path("second.img"));
        machine
    };
    let refused = |machine: &Machine, why: &str| {
        run_until(machine, &format!("MOSFS-INSTALL-VERDICT: 1 {why}"));
        assert_eq!(device.disk(), before, "{why}");
    };
    let machine = with_second("two", "disk: only-empty\n");
    refused(
        &machine,
        "2 disks match `only-empty`: /dev/vda (1 GiB, serial mosfs, empty); /dev/vdd (1 GiB, serial second1, empty)",
    );
    let own = "holds the medium that the system is installed from";
    refused(&with_second("own", "disk: path:/dev/vdb\nwipe: yes\n"), &format!("/dev/vdb {own}"));
    refused(&with_second("serial-own", "disk: serial:STICK\nwipe: yes\n"), &format!("/dev/vdb {own}"));
    // Whether a disk may be erased says nothing of which one is meant.
    refused(
        &with_second("none", "disk: serial:none-such\nwipe: yes\n"),
        "no disk matches `serial:none-such`",
    );
    let mut machine = device.machine(&with_answers("no-disk", "disk: only-empty\n"), "cd");
    machine.disk = None;
    refused(&machine, "no disk matches `only-empty`; disks of this machine: ");

    let mut machine = with_second("serial", "disk: serial:mosfs\nafter: reboot\n");
    machine.medium_first = false;
    machine.expect(
        0,
        &["MOSFS-INSTALL-VERDICT: 0 installed version 200 on /dev/vda", "the floor rose from 0 to 200"],
    );
}

/// The keys on a medium are enrolled by systemd-boot where the firmware is in setup mode; the firmware then checks what it
/// starts, also the system that was installed.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn a_medium_enrolls_its_keys_and_its_signed_kernel_installs() {
    let publisher = publisher("mosfs commit || end 9\nsecure\n");
    let make = "for key in PK KEK db; do
            openssl req -new -x509 -newkey rsa:2048 -nodes -sha256 -days 3650 -subj /CN=$key/ -keyout $key.key \
                -out $key.pem 2>/dev/null
            cert-to-efi-sig-list -g $owner $key.pem $key.esl
        done
        sign-efi-sig-list -g $owner -k PK.key -c PK.pem PK PK.esl PK.auth
        sign-efi-sig-list -g $owner -k PK.key -c PK.pem KEK KEK.esl KEK.auth
        sign-efi-sig-list -g $owner -k KEK.key -c KEK.pem db db.esl db.auth";
    let folder = publisher.path("enroll");
    fs::create_dir(&folder).unwrap();
    sh(&folder, &format!("owner=6f9e8a9e-3c0c-4c1e-9a57-0d7d6b6f3b11\n{make}"));
    let key = ["--sb-key", "enroll/db.key", "--sb-cert", "enroll/db.pem"];
    let system = build(&publisher, 200, &[&["--cmdline", CMDLINE][..], &key].concat());
    let medium = enrolling(&publisher, &system, "disk: only-empty\n", "enroll");
    let device = Device::new(&publisher);
    let mut machine = device.machine(&medium, "cd");
    machine.secure_boot = true;
    // systemd-boot 252 only offers it, as the last entry of its menu; a newer one does it by itself in a virtual machine.
    let down = "\u{1b}[B\u{1b}[B\u{1b}[B\u{1b}[B";
    machine.typed = vec![("Enroll Secure Boot keys: auto", down)];
    let ended = machine.expect(
        0,
        &[
            "MOSFS-INSTALL-VERDICT: 0 installed version 200 on /dev/vda",
            "the floor rose from 0 to 200",
            "vm: SecureBoot 1, SetupMode 0",
        ],
    );
    ended.without(&["Access Denied"]);
}
