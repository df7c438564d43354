//! From a medium and an empty disk to a committed system.

use std::path::PathBuf;
use std::sync::OnceLock;

use super::fixture::Publisher;
use super::real::{CMDLINE, Device, System, build, file, medium, publisher, steps};

/// What a system does once it is up: it is committed, which raises the floor.
const COMMIT: &str = "mosfs commit || end 9\nmosfs floor show\nesp\n";
/// The words that the steps of an installation begin with.
const STEPS: [&str; 10] = [
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
fn published() -> &'static (Publisher, System) {
    static PUBLISHED: OnceLock<(Publisher, System)> = OnceLock::new();
    PUBLISHED.get_or_init(|| {
        let publisher = publisher("cloud", COMMIT);
        let system = build(&publisher, 200, &["--cmdline", CMDLINE]);
        (publisher, system)
    })
}

/// A medium of it with these answers. `name` is of the test's own.
fn with_answers(name: &str, answers: &str) -> PathBuf {
    let (publisher, system) = published();
    let answers = file(publisher, &format!("{name}.yaml"), answers);
    medium(publisher, system, name, &[("mosfs/answers.yaml", &answers)])
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
        "verify: /dev/vda2: every block as it was signed",
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
}
