//! Boots of a whole Debian: systemd, multi-user.target, `mosfs commit` by its unit.

use super::device::{Device, GOOD, NEXT, OWN_INIT, SICK, fleet, flip, measured, noise_file, position};
use super::machine::{Ended, Machine};
use super::{DRACUT, INITRAMFS_TOOLS, KERNEL, OLD_KERNEL};

/// Boots, and wants a version to reach multi-user with the root and the PCR that are its own.
fn reaches_multi_user(machine: &Machine, version: u64, backend: &str) -> Ended {
    machine.expect(
        0,
        &[
            &format!("vm: version {version} reached multi-user with systemd"),
            "vm: root is overlay mosfs:hostfs",
            &format!("\"backend\":\"{backend}\""),
            &format!(
                "vm: pcr15 {}",
                measured(&fleet().config(), &fleet().digest(version), "hostfs", "tmpfs")
            ),
            "vm: measured {\"content\":{\"bootId\":\"",
        ],
    )
}

#[test]
fn initramfs_tools_on_dm_verity_boots_updates_and_never_goes_back() {
    let device = Device::with(GOOD);
    let source = device.carry_source(NEXT);
    device.action(&format!(
        "ls /var/lib/mosfs/state.json /etc/mosfs/product && touch /etc/written || exit 90\n\
         [ \"$1\" != update ] || mosfs update {source} || exit 91\n\
         mosfs status",
    ));
    assert_eq!(device.floor(), 0, "provisioned, and nothing was committed yet");
    let mut first = device.kept(INITRAMFS_TOOLS, KERNEL);
    // Words that ask to skip checks change nothing here, and neither do they where something is refused.
    first.cmdline += " vm.do=update loglevel=7 mosfs.verify=0 mosfs.floor=none MOSFS_CONFIG=/tmp MOSFS_TPM=device:/dev/null";
    let ended = reaches_multi_user(&first, GOOD, "dm-verity");
    // The words whose absence tests/boot/refused.rs takes for "nothing was mounted".
    for word in super::refused::KERNEL_SAYS_MOUNTED {
        assert!(ended.console.contains(word), "expected `{word}`\n{}", ended.console);
    }
    assert!(ended.console.contains("pending   version 201"), "{}", ended.console);
    assert_eq!(device.floor(), GOOD, "the update alone raises nothing");

    let second = device.kept(INITRAMFS_TOOLS, KERNEL);
    let ended = reaches_multi_user(&second, NEXT, "dm-verity");
    assert!(ended.console.contains("current   version 201"), "{}", ended.console);
    assert!(ended.console.contains("previous  none"), "below the floor it is of no use: {}", ended.console);
    assert_eq!(device.floor(), NEXT, "mosfs commit raises the floor");

    // The disk as it was before the update, in the same machine.
    let mut restored = device.machine(INITRAMFS_TOOLS, KERNEL);
    restored.cmdline += " loglevel=7 mosfs.verify=0 mosfs.floor=none mosfs.floor=file mosfs.unsafe=1";
    restored
        .expect(4, &["version 200 is below the floor: this device allows version 201 and up"])
        .without(&super::refused::KERNEL_SAYS_MOUNTED);
}

#[test]
fn initramfs_tools_on_fuse_boots_and_boots_again() {
    let device = Device::with(GOOD);
    device.action("mosfs status && touch /etc/written");
    for kernel in [KERNEL, OLD_KERNEL] {
        let mut machine = device.kept(INITRAMFS_TOOLS, kernel);
        machine.cmdline += " mosfs.backend=fuse";
        let ended = reaches_multi_user(&machine, GOOD, "fuse");
        // As hard to kill as anything: without it there is no root.
        assert_eq!(ended.after("vm: daemon of the root, oom_score_adj"), ["-1000"], "{}", ended.console);
        assert_eq!(device.floor(), GOOD);
    }
}

/// Changes one byte of `/usr/share/noise` in a version's own layer.
fn flip_noise(device: &Device, version: u64) {
    let layer = device.own_layer(version);
    flip(&layer, position(&layer, &noise_file()[20_000..20_032]));
}

#[test]
fn dracut_on_dm_verity_boots_and_a_flipped_byte_is_eio_and_seen() {
    let device = Device::with(GOOD);
    flip_noise(&device, GOOD);
    device.action(&format!(
        "mosfs status\ncat /usr/share/noise >/dev/null && exit 90\n\
         echo 'vm: status after'; mosfs status; mosfs status --json; mkdir /tmp/m\n\
         mosfs mount --backend dm-verity hostfs /tmp/m; echo \"vm: mount says $?\"\n\
         test \"$(cat /etc/vm-version)\" = {GOOD}",
    ));
    let ended = reaches_multi_user(&device.machine(DRACUT, KERNEL), GOOD, "dm-verity");
    let (before, after) = ended.console.split_once("vm: status after").expect("both");
    assert!(before.contains("hostfs at / (dm-verity): verified"), "{before}");
    for word in
        ["hostfs at / (dm-verity): CORRUPT", "\"health\":\"corrupt\"", "has status C", "vm: mount says 3"]
    {
        assert!(after.contains(word), "expected `{word}`\n{after}");
    }
    assert!(
        before.contains("Input/output error") || after.contains("Input/output error"),
        "{}",
        ended.console
    );
}

#[test]
fn dracut_on_fuse_boots_and_a_flipped_byte_is_eio_and_logged() {
    let device = Device::with(GOOD);
    flip_noise(&device, GOOD);
    device.action(&format!(
        "cat /usr/share/noise >/dev/null && exit 90\n\
         cat /run/mosfs/mounts/*.log; mosfs status\ntest \"$(cat /etc/vm-version)\" = {GOOD}",
    ));
    let mut machine = device.machine(DRACUT, KERNEL);
    machine.cmdline += " mosfs.backend=fuse";
    let ended = reaches_multi_user(&machine, GOOD, "fuse");
    for word in ["Input/output error", "ERROR", "expected", "hostfs at / (fuse): some reads failed"] {
        assert!(ended.console.contains(word), "expected `{word}`\n{}", ended.console);
    }
}

#[test]
fn a_pending_system_with_a_bad_block_in_its_init_gives_way_after_its_tries() {
    let device = Device::with(GOOD);
    device.update(OWN_INIT);
    // Mounting reads none of it; starting it does.
    let layer = device.own_layer(OWN_INIT);
    flip(&layer, position(&layer, b"\x7fELF") + 100);
    device.action("mosfs status");
    for attempt in 1..=3 {
        let ended = device.kept(INITRAMFS_TOOLS, KERNEL).expect(125, &["booting version 203"]);
        ended.without(&["vm: version"]);
        println!("attempt {attempt} has failed");
    }
    let ended = reaches_multi_user(&device.kept(INITRAMFS_TOOLS, KERNEL), GOOD, "dm-verity");
    for word in ["version 203", "no tries left: it was started 3 times and never committed"] {
        assert!(ended.console.contains(word), "expected `{word}`\n{}", ended.console);
    }
    assert_eq!(device.floor(), GOOD);
}

#[test]
fn a_pending_system_that_never_gets_healthy_gives_way_after_its_tries() {
    let device = Device::with(GOOD);
    device.update(SICK);
    device.action("systemctl show -p ActiveState mosfs-commit.service vm-health.service; mosfs status");
    for left in ["2 tries left", "1 try left", "no tries left"] {
        let ended = reaches_multi_user(&device.kept(INITRAMFS_TOOLS, KERNEL), SICK, "dm-verity");
        assert!(ended.console.contains(left), "expected `{left}`\n{}", ended.console);
        assert_eq!(device.floor(), 0, "it has not been committed");
    }
    let mut last = device.kept(INITRAMFS_TOOLS, KERNEL);
    last.cmdline += " init=/usr/local/bin/vm-quick";
    last.expect(
        0,
        &[
            "booting version 200",
            "vm: version 200 reached",
            "no tries left: it was started 3 times and never committed",
            "last boot version 200 was started",
        ],
    );
}
