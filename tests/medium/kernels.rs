//! A kernel is a part of its system: the firmware's boot loader tries it, and gives up on it.

use super::real::{Device, build, medium, publisher, steps};
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
    // The updates are on another disk.
    let updates = device.path("updates.img");
    let script = format!(
        "mkdir updates; cp -a {} {} updates/; mke2fs -q -t ext4 -d updates {} 512M; rm -r updates",
        second.store,
        third.store,
        updates.display()
    );
    sh(publisher.dir(), &script);
    let mut machine = device.machine(&medium, "cd");
    machine.second.push(updates);
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
