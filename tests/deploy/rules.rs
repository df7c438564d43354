//! The rules of deployments (docs/design.md), on the development floor, where no TPM is needed.

use std::fs;

use mosfs::internals::deploy::choice::Role;
use mosfs::internals::deploy::{DeployError, System};
use mosfs::internals::error::Classified;

use crate::device::{Device, text};
use crate::publish::{PRODUCT, Publisher};

fn published(versions: &[u64]) -> (tempfile::TempDir, Publisher) {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    for version in versions {
        publisher.publish(*version, &format!("content of version {version}"));
    }
    (dir, publisher)
}

#[test]
fn install_writes_the_first_deployment_and_again_is_nothing_to_do() {
    let (_dir, publisher) = published(&[200]);
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    let state = device.state();
    assert_eq!(state.current.map(|id| id.version), Some(200));
    assert_eq!((state.pending, state.previous), (None, None));
    let folder = device.system().join("deployments").join(state.current.unwrap().to_string());
    for file in ["manifest.json", "manifest.sig", "cert.pem", "floor.sig"] {
        assert!(folder.join(file).is_file(), "{file}");
    }
    let before = device.snapshot();
    let said = device.ok(&["install", &publisher.source()]);
    assert!(said.contains("nothing to do"), "{said}");
    assert_eq!(device.snapshot(), before);
    assert_eq!(device.boot(), (200, Role::Current));
}

#[test]
fn install_takes_the_highest_version_without_a_name() {
    let (_dir, publisher) = published(&[200, 1000, 300]);
    let device = Device::with_file_floor();
    let ca = publisher.key("ca.pem");
    device.ok(&["install", &publisher.source(), "--ca", ca.to_str().unwrap(), "--product", PRODUCT]);
    assert_eq!(device.state().current.unwrap().version, 1000);
}

#[test]
fn a_device_with_another_ca_or_product_is_not_overwritten() {
    let (_dir, publisher) = published(&[200, 201]);
    let other_dir = tempfile::tempdir().unwrap();
    let other = Publisher::new(other_dir.path());
    other.publish(300, "from someone else");
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    let before = device.snapshot();
    let ca = other.key("ca.pem");
    let ca = ca.to_str().unwrap();
    let said = device.run(&["install", &other.source(), "--ca", ca, "--product", PRODUCT]);
    assert!(!said.status.success());
    // Rule: the signer's certificate must chain to the CA that the device was given.
    device.refused(&["update", &other.source()], 3, &["manifest CA"]);
    // Rule: the manifest's product must equal the device's.
    let foreign_dir = tempfile::tempdir().unwrap();
    let foreign = Publisher::of_product(foreign_dir.path(), "11111111-2222-4333-8444-555555555555");
    foreign.publish(300, "for other devices");
    device.refused(&["update", &foreign.source()], 3, &[]);
    let after: Vec<_> =
        device.snapshot().into_iter().filter(|(path, _)| !path.ends_with("state.json")).collect();
    let before: Vec<_> = before.into_iter().filter(|(path, _)| !path.ends_with("state.json")).collect();
    assert_eq!(after, before, "a refused update fetches nothing");
}

#[test]
fn a_version_that_is_not_newer_is_refused_with_code_4() {
    let (_dir, publisher) = published(&[199, 200, 201]);
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    device.refused(&["update", &publisher.source_of(199)], 4, &["199", "200"]);
    // Rule: same version and same digest: nothing to do, success.
    let said = device.ok(&["update", &publisher.source_of(200)]);
    assert!(said.contains("nothing to do"), "{said}");
    // Rule: same version, other digest: refused.
    let again_dir = tempfile::tempdir().unwrap();
    fs::create_dir(again_dir.path().join("keys")).unwrap();
    publisher.publish(201, "another 201");
    device.ok(&["update", &publisher.source_of(201)]);
    publisher.publish(201, "yet another 201");
    let said = device.refused(&["update", &publisher.source_of(201)], 4, &["version 201", "sha256:"]);
    assert_eq!(said.matches("sha256:").count(), 2, "it names both: {said}");
    assert_eq!(device.boot(), (201, Role::Pending));
}

#[test]
fn check_and_dry_run_change_nothing() {
    let (_dir, publisher) = published(&[200, 201]);
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    let before = device.snapshot();
    let answer = device.ok(&["update", "--check", "--json", &publisher.source_of(201)]);
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((answer["update"].as_bool(), answer["version"].as_u64()), (Some(true), Some(201)));
    let answer = device.ok(&["update", "--check", "--json", &publisher.source_of(200)]);
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((answer["update"].as_bool(), answer["verdict"].as_str()), (Some(false), Some("up-to-date")));
    let plan = device.ok(&["update", "--dry-run", &publisher.source_of(201)]);
    assert!(plan.contains("would fetch sha256:") && plan.contains("for hostfs"), "{plan}");
    publisher.publish(100, "old");
    let refused = device.run(&["update", "--check", "--json", &publisher.source_of(100)]);
    assert_eq!(refused.status.code(), Some(4));
    let answer: serde_json::Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert_eq!((answer["update"].as_bool(), answer["exit_code"].as_u64()), (Some(false), Some(4)));
    assert_eq!(device.snapshot(), before);
}

#[test]
fn pending_is_tried_three_times_then_current_boots_and_status_says_why() {
    let (_dir, publisher) = published(&[200, 201]);
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    device.ok(&["update", &publisher.source_of(201)]);
    for left in (0..3).rev() {
        let booted = device.boot_if(|version| version == 200).unwrap();
        assert_eq!((booted.deployment.version, booted.role), (200, Role::Current));
        assert_eq!(booted.refused.len(), 1);
        assert_eq!(device.state().pending.unwrap().tries_left, left);
    }
    let booted = device.boot_if(|version| version == 200).unwrap();
    assert!(booted.refused.is_empty(), "without tries it is not tried");
    let status: serde_json::Value = serde_json::from_str(&device.ok(&["status", "--json"])).unwrap();
    assert_eq!(status["pending"]["tries_left"], 0);
    assert_eq!(status["last_boot"]["chosen"], status["current"]["id"]);
    // Rule: a version that failed is not tried again by itself; the same command every night does not do it.
    for source in [publisher.source_of(201), publisher.source()] {
        let said = device.ok(&["update", &source]);
        assert!(said.contains("was started 3 times") && said.contains("--again"), "{said}");
        assert_eq!(device.state().pending.unwrap().tries_left, 0);
        assert_eq!(device.boot(), (200, Role::Current));
    }
    let check = device.ok(&["update", "--check", "--json", &publisher.source()]);
    let check: serde_json::Value = serde_json::from_str(&check).unwrap();
    assert_eq!((check["update"].as_bool(), check["verdict"].as_str()), (Some(false), Some("failed-before")));
    // A person may insist.
    device.ok(&["update", "--again", &publisher.source_of(201)]);
    assert_eq!(device.state().pending.unwrap().tries_left, 3);
    let status = device.ok(&["status"]);
    assert!(status.contains("pending   version 201") && status.contains("3 tries left"), "{status}");
}

#[test]
fn a_try_is_spent_and_on_disk_before_it_is_used() {
    let (_dir, publisher) = published(&[200, 201]);
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    device.ok(&["update", &publisher.source_of(201)]);
    let seen = std::cell::Cell::new(None);
    device
        .boot_if(|_| {
            seen.set(Some(device.state().pending.unwrap().tries_left));
            true
        })
        .unwrap();
    assert_eq!(seen.get(), Some(2));
}

#[test]
fn commit_blesses_then_raises_and_twice_changes_nothing() {
    let (_dir, publisher) = published(&[200, 20_261_123]);
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    let said = device.ok(&["commit"]);
    assert!(said.contains("the floor rose from 0 to 200"), "{said}");
    device.ok(&["update", &publisher.source_of(20_261_123)]);
    assert_eq!(device.boot(), (20_261_123, Role::Pending));
    let said = device.ok(&["commit"]);
    assert!(said.contains("the floor rose from 200 to 20261123"), "{said}");
    let state = device.state();
    assert_eq!(state.current.map(|id| id.version), Some(20_261_123));
    // Below the floor it can never be booted: it is dropped, and its space is given back.
    assert_eq!((state.previous, state.pending), (None, None));
    assert_eq!(device.versions(), [20_261_123]);
    let before = device.snapshot();
    let said = device.ok(&["commit"]);
    assert!(said.contains("was current already; the floor stays at 20261123"), "{said}");
    assert_eq!(device.snapshot(), before);
    // Rule: boot: `version >= floor`: the previous one is no fallback any more.
    let error = device.boot_if(|version| version == 200).unwrap_err();
    assert_eq!(error.class().exit_code(), 1, "its root cannot be mounted, as the test wants it");
    let DeployError::NoneLeft { refused, .. } = &error else { panic!("{error}") };
    assert_eq!(refused.len(), 1);
}

#[test]
fn until_the_floor_is_raised_falling_back_is_legal() {
    let (_dir, publisher) = published(&[200, 201]);
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    device.ok(&["commit"]);
    device.ok(&["update", &publisher.source_of(201)]);
    // Cut off between blessing and raising.
    let cut = device.command(&["commit"]).env("MOSFS_FAILPOINT", "commit.state.blessed").output().unwrap();
    assert!(!cut.status.success());
    assert_eq!(device.state().current.unwrap().version, 201);
    let booted = device.boot_if(|version| version == 200).unwrap();
    assert_eq!((booted.deployment.version, booted.role), (200, Role::Previous));
    assert_eq!(device.boot(), (201, Role::Current));
    let said = device.ok(&["commit"]);
    assert!(said.contains("the floor rose from 200 to 201"), "{said}");
}

#[test]
fn everything_in_the_system_folder_is_verified_afresh_at_boot() {
    let (_dir, publisher) = published(&[200]);
    let flip = |name: &str| {
        let device = Device::with_file_floor();
        device.install(&publisher, 200);
        let id = device.state().current.unwrap();
        let path = device.system().join("deployments").join(id.to_string()).join(name);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
        device.boot_if(|_| true).unwrap_err()
    };
    for name in ["manifest.json", "manifest.sig", "cert.pem"] {
        let error = flip(name);
        assert_eq!(error.class().exit_code(), 3, "{name}: {error}");
    }
    // A folder that holds another signed system than its name says.
    publisher.publish(150, "older");
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    let victim = Device::with_file_floor();
    victim.install(&publisher, 150);
    let (id, old) = (device.state().current.unwrap(), victim.state().current.unwrap());
    for name in ["manifest.json", "manifest.sig", "cert.pem", "floor.sig"] {
        let folder = |device: &Device, id: &mosfs::internals::deploy::DeploymentId| {
            device.system().join("deployments").join(id.to_string()).join(name)
        };
        fs::copy(folder(&victim, &old), folder(&device, &id)).unwrap();
    }
    let error = device.boot_if(|_| true).unwrap_err();
    assert_eq!(error.class().exit_code(), 3, "{error}");
    assert!(error.to_string().contains("its manifest is version 150"), "{error}");
    // An OCI manifest that is not the one of the system manifest.
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    let system = System::at(device.system());
    let store = mosfs::internals::store::Store::open(&system.store_dir()).unwrap();
    let (_, image) =
        store.names().unwrap().into_iter().find(|(name, _)| name.starts_with("mos/images/")).unwrap();
    let path = store.blob_path(&image.digest);
    let bytes = text(&fs::read(&path).unwrap()).replace("schemaVersion\":2", "schemaVersion\":3");
    fs::remove_file(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    let error = device.boot_if(|_| true).unwrap_err();
    assert_eq!(error.class().exit_code(), 3, "{error}");
}

#[test]
fn a_device_without_a_tpm_is_refused_by_default() {
    let (_dir, publisher) = published(&[200, 201]);
    let device = Device::without_tpm();
    // Rule: install comes before the floor is provisioned, and says that there is none.
    let ca = publisher.key("ca.pem");
    let installed = device.run(&[
        "install",
        &publisher.source_of(200),
        "--ca",
        ca.to_str().unwrap(),
        "--product",
        PRODUCT,
    ]);
    assert!(installed.status.success());
    assert!(text(&installed.stderr).contains("no floor yet"), "{}", text(&installed.stderr));
    device.record_boot(device.state().current.unwrap());
    let before = device.snapshot();
    device.refused(&["commit"], 5, &[]);
    device.refused(&["update", &publisher.source_of(201)], 5, &[]);
    fs::copy(publisher.key("floor.pub"), device.config().join("floor.pub")).unwrap();
    device.refused(&["commit"], 5, &["/dev/no-such-tpm"]);
    device.refused(&["update", &publisher.source_of(201)], 5, &["/dev/no-such-tpm"]);
    let error = device.boot_if(|_| true).unwrap_err();
    assert_eq!(error.class().exit_code(), 5, "{error}");
    // Everything but what tells of the refusals is as before.
    device.record_boot(device.state().current.unwrap());
    fs::remove_file(device.config().join("floor.pub")).unwrap();
    let rest = |files: Vec<(std::path::PathBuf, Vec<u8>)>| {
        files.into_iter().filter(|(path, _)| !path.ends_with("state.json")).collect::<Vec<_>>()
    };
    assert_eq!(rest(device.snapshot()), rest(before));
}

#[test]
fn the_development_floor_says_each_time_that_it_protects_nothing() {
    let (_dir, publisher) = published(&[200]);
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    for _ in 0..2 {
        let output = device.run(&["commit"]);
        assert!(output.status.success());
        assert!(text(&output.stderr).contains("protects nothing"), "{}", text(&output.stderr));
    }
}

#[test]
fn a_record_of_this_boot_that_is_none_is_named() {
    let device = Device::with_file_floor();
    let (_dir, publisher) = published(&[200]);
    device.install(&publisher, 200);
    fs::create_dir_all(device.boot_record().parent().unwrap()).unwrap();
    for (text, why) in
        [("{}", "missing field `deployment`"), ("", "EOF while parsing"), ("[]", "invalid length 0")]
    {
        fs::write(device.boot_record(), text).unwrap();
        let file = format!("{} is not a record of a boot: {why}", device.boot_record().display());
        for command in ["commit", "gc"] {
            device.refused(&[command], 1, &[&file, "hint: `mosfs boot` writes it at each boot"]);
        }
    }
}

#[test]
fn nothing_installed_is_said_plainly() {
    let device = Device::with_file_floor();
    let (_dir, publisher) = published(&[200]);
    device.refused(&["update", &publisher.source()], 1, &["holds no deployment"]);
    let status = device.ok(&["status"]);
    assert!(status.contains("current   none"), "{status}");
    device.refused(&["install", &publisher.source()], 3, &["this device trusts no product"]);
}
