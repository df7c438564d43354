//! A kernel is a part of its system: the firmware's boot loader tries it, and gives up on it.

use std::fs;
use std::path::PathBuf;

use super::fixture::Publisher;
use super::real::{CMDLINE, Device, System, build, medium, publisher, steps};
use super::tools::sh;

/// Version 200 updates to 201, whose kernel is another one, and 201 to 202, whose kernel panics.
const ACTION: &str = "
commit() { mosfs commit || end 9; esp; }
update() { mount -t ext4 -o ro /dev/vdc /tmp && mosfs update oci:/tmp/store-$1 || end 8; umount /tmp; esp; sync; reboot -f; }
esp
case $(cat /version)-$(mosfs status | grep -c 202) in
    200-*) commit; update 201 ;;
    201-0) commit; update 202 ;;
    *) mosfs status | sed 's/^/vm: /'; commit ;;
esac
";

/// Puts the stores of updates onto another disk.
fn updates(publisher: &Publisher, device: &Device, systems: &[&System]) -> PathBuf {
    let updates = device.path("updates.img");
    let stores: Vec<_> = systems.iter().map(|system| system.store.as_str()).collect();
    let script = format!(
        "mkdir updates; cp -a {} updates/; mke2fs -q -t ext4 -d updates {} 512M; rm -r updates",
        stores.join(" "),
        updates.display()
    );
    sh(publisher.dir(), &script);
    updates
}

/// Acceptance: with a new kernel `+3` appears, after the commit no counter; one that panics gives way by itself.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn a_new_kernel_is_tried_and_committed_and_one_that_panics_gives_way() {
    let publisher = publisher(ACTION);
    let [first, second, third] = [
        (200, "console=ttyS0 no_timer_check quiet"),
        (201, "console=ttyS0 no_timer_check quiet loglevel=4"),
        // It does not find its init, and panics.
        (202, "console=ttyS0 no_timer_check rdinit=/nothing"),
    ]
    .map(|(version, words)| build(&publisher, version, &["--cmdline", words]));
    let id = |version: u64| publisher.kernel_id(&format!("store-{version}"), version)[..12].to_string();
    let [one, two, three] = [200, 201, 202].map(id);
    let medium = medium(&publisher, &first, "medium", Some("disk: only-empty\nafter: reboot\n"));
    let device = Device::new(&publisher);
    let mut machine = device.machine(&medium, "cd");
    machine.second.push(updates(&publisher, &device, &[&second, &third]));
    let console = machine.expect(0, &[]).console;
    let steps = steps(&console, &["vm: "]);
    let esp =
        |version: u64, id: &str, count: &str| format!("vm: on the ESP: mosfs-{version}-{id}{count}.efi");
    let position = |step: &str| {
        steps.iter().position(|one| *one == step).unwrap_or_else(|| panic!("no `{step}`: {steps:#?}"))
    };
    // The update, its first boot, and its commit.
    assert!(position(&esp(201, &two, "+3")) < position(&esp(201, &two, "+2-1")));
    assert!(position(&esp(201, &two, "+2-1")) < position(&esp(201, &two, "")));
    assert!(console.contains("the floor rose from 200 to 201"));
    // The kernel that panics is tried three times.
    assert!(position(&esp(202, &three, "+3")) < position(&esp(202, &three, "+0-3")));
    assert_eq!(console.matches("Kernel panic").count(), 3, "{console}");
    assert_eq!(
        steps.last(),
        Some(&esp(202, &three, "+0-3").as_str()),
        "201 is committed, and 202 stays tried"
    );
    assert!(console.contains("its kernel is not running"), "mosfs status says why");
    let last = steps.iter().rposition(|step| step.starts_with("vm: version ")).unwrap();
    assert!(!steps[last..].contains(&esp(200, &one, "").as_str()), "below the floor");
}

/// Version 200 feeds the watchdog, and updates to 201, which hangs as soon as it has a root.
const HANGS: &str = "
if [ $(cat /version) = 201 ]; then
    echo 'vm: 201 hangs'
    while :; do sleep 1000; done
fi
watchdog -t 5 -T 600 /dev/watchdog || end 7
if mosfs status | grep -q 201; then mosfs status | sed 's/^/vm: /'; end 0; fi
mosfs commit || end 9
mount -t ext4 -o ro /dev/vdc /tmp && mosfs update oci:/tmp/store-201 || end 8
umount /tmp; sync; reboot -f
";

/// Acceptance: a new kernel whose system hangs is restarted by the watchdog, and gives way by itself.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn a_system_that_hangs_is_restarted_by_the_watchdog_and_gives_way() {
    let publisher = publisher(HANGS);
    let configured = |version: u64, seconds: &str| {
        fs::create_dir_all(publisher.path("boot-config")).unwrap();
        fs::write(publisher.path("boot-config/watchdog"), seconds).unwrap();
        build(&publisher, version, &["--cmdline", CMDLINE, "--boot-config", "boot-config"])
    };
    let first = configured(200, "600\n");
    // What hangs may do so soon; a slow machine that is restarted earlier gives way too.
    let second = configured(201, "30\n");
    let medium = medium(&publisher, &first, "medium", Some("disk: only-empty\nafter: reboot\n"));
    let device = Device::new(&publisher);
    let mut machine = device.machine(&medium, "cd");
    machine.watchdog = true;
    machine.second.push(updates(&publisher, &device, &[&second]));
    let started = "this machine restarts unless its system feeds the watchdog within";
    let ended = machine.expect(
        0,
        &[
            "the floor rose from 0 to 200",
            &format!("{started} 600 seconds"),
            &format!("{started} 30 seconds"),
        ],
    );
    let steps = steps(&ended.console, &["vm: "]);
    let last = steps.iter().rposition(|step| step.starts_with("vm: version ")).unwrap();
    assert_eq!(steps[last], "vm: version 200", "{steps:#?}");
    assert!(steps[last..].iter().any(|step| step.contains("201")), "mosfs status names it: {steps:#?}");
}
