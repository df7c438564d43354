//! The floor in a TPM, through the whole device: no way back.

use mosfs::internals::deploy::DeployError;
use mosfs::internals::deploy::choice::Role;
use mosfs::internals::error::Classified;

use crate::device::Device;
use crate::publish::Publisher;
use crate::swtpm::Swtpm;

#[test]
fn the_floor_rises_from_200_to_20261123_in_one_commit_and_never_falls() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    publisher.publish(200, "old");
    publisher.publish(20_261_123, "new");
    let tpm = Swtpm::start();
    let device = Device::with_tpm(&tpm);
    device.install(&publisher, 200);
    device.provision(&publisher);
    assert_eq!(device.boot(), (200, Role::Current));
    device.ok(&["commit"]);
    let old = device.state().current.unwrap();
    let old_disk = dir.path().join("old disk");
    device.copy_disk(&old_disk);
    device.ok(&["update", &publisher.source_of(20_261_123)]);
    assert_eq!(device.boot(), (20_261_123, Role::Pending));
    let said = device.ok(&["commit"]);
    assert!(said.contains("the floor rose from 200 to 20261123"), "{said}");
    // The second opinion: the 8 bytes in the TPM.
    let bytes = tpm.tool_ok("tpm2_nvread", &["0x01500050", "-C", "o"]);
    assert_eq!(bytes, 20_261_123u64.to_be_bytes());
    device.refused(&["update", &publisher.source_of(200)], 4, &["200", "20261123"]);

    // Rule: an old disk (state, store, deployments) put back on a device whose floor has risen is
    // refused with code 4, naming version and floor.
    device.restore_disk(&old_disk);
    let error = device.boot_if(|_| true).unwrap_err();
    assert_eq!(error.class().exit_code(), 4);
    assert!(matches!(error, DeployError::NoneLeft { .. }));
    let why = error.to_string();
    assert!(why.contains("version 200") && why.contains("20261123"), "{why}");
    // Not even where something claims that the old one runs.
    device.record_boot(old);
    device.refused(&["commit"], 4, &["version 200", "20261123"]);
}

#[test]
fn a_provisioned_device_takes_no_system_without_a_valid_floor_signature() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    publisher.publish(200, "first");
    publisher.publish_with(201, "unsigned for the floor", false);
    let tpm = Swtpm::start();
    let device = Device::with_tpm(&tpm);
    device.install(&publisher, 200);
    device.provision(&publisher);
    let before = device.snapshot();
    device.refused(&["update", &publisher.source_of(201)], 5, &["version 201", "floor signature"]);
    let rest = |files: Vec<(std::path::PathBuf, Vec<u8>)>| {
        files.into_iter().filter(|(path, _)| !path.ends_with("state.json")).collect::<Vec<_>>()
    };
    assert_eq!(rest(device.snapshot()), rest(before), "nothing was fetched");
}

#[test]
fn a_cleared_tpm_stops_the_boot_with_code_5() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    publisher.publish(200, "first");
    let tpm = Swtpm::start();
    let device = Device::with_tpm(&tpm);
    device.install(&publisher, 200);
    device.provision(&publisher);
    assert_eq!(device.boot(), (200, Role::Current));
    device.ok(&["commit"]);
    tpm.tool_ok("tpm2_clear", &["-c", "p"]);
    let error = device.boot_if(|_| true).unwrap_err();
    assert_eq!(error.class().exit_code(), 5, "{error}");
    device.record_boot(device.state().current.unwrap());
    device.refused(&["commit"], 5, &["0x01500050"]);
}

#[test]
fn two_commits_at_once_are_as_if_one_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    publisher.publish(200, "first");
    publisher.publish(201, "second");
    let tpm = Swtpm::start();
    let device = Device::with_tpm(&tpm);
    device.install(&publisher, 200);
    device.provision(&publisher);
    device.ok(&["update", &publisher.source_of(201)]);
    assert_eq!(device.boot(), (201, Role::Pending));
    let both: Vec<_> = (0..2).map(|_| device.command(&["commit"]).spawn().unwrap()).collect();
    for mut one in both {
        assert!(one.wait().unwrap().success());
    }
    assert_eq!(device.state().current.unwrap().version, 201);
    assert_eq!(tpm.tool_ok("tpm2_nvread", &["0x01500050", "-C", "o"]), 201u64.to_be_bytes());
}
