//! Replacing the signer, the CA and the floor key of devices in the field (docs/keys.md): what boots before, during
//! and after.

use std::fs;
use std::path::Path;

use mosfs::internals::deploy::choice::Role;
use mosfs::internals::error::Classified;

use crate::device::{Device, text};
use crate::pki::Pki;
use crate::publish::{PRODUCT, Publisher};
use crate::signers::{sign_again, sign_floor};
use crate::swtpm::Swtpm;

fn published() -> (tempfile::TempDir, Publisher) {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    publisher.publish(200, "the system");
    (dir, publisher)
}

/// Another set of keys of the same product.
fn other_keys(dir: &Path) -> std::path::PathBuf {
    let keys = dir.join("new keys");
    let made = std::process::Command::new(env!("CARGO_BIN_EXE_mosfs"))
        .args(["keys", "generate"])
        .arg(&keys)
        .args(["--product", PRODUCT])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    keys
}

fn ca_of(publisher: &Publisher) -> Pki {
    let pki = Pki::new();
    for name in ["ca.pem", "ca.key", "signer.pem"] {
        fs::copy(publisher.key(name), pki.path(name)).unwrap();
    }
    pki
}

fn refused_to_boot(device: &Device, code: u8, word: &str) {
    let error = device.boot_if(|_| true).unwrap_err();
    assert_eq!(error.class().exit_code(), code, "{error}");
    assert!(error.to_string().contains(word), "{error}");
}

#[test]
fn a_signer_is_replaced_and_the_old_one_revoked() {
    let (_dir, publisher) = published();
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    assert_eq!(device.boot(), (200, Role::Current), "before");
    let old_disk = publisher.dir().join("old disk");
    device.copy_disk(&old_disk);

    // 1. The same system, signed by the new signer.
    let pki = ca_of(&publisher);
    pki.signer("new", "ec:P-256", "ca");
    sign_again(&publisher, 200, &pki.path("new.key"), &pki.path("new.pem"));
    let said = device.ok(&["update", &publisher.source_of(200)]);
    assert!(said.contains("cert.pem"), "{said}");
    assert_eq!(device.boot(), (200, Role::Current), "during");

    // 2. The list in CONFIG.
    pki.revoke("signer", "ca").crl("ca", "crl.pem");
    fs::copy(pki.path("crl.pem"), device.config().join("crl.pem")).unwrap();
    assert_eq!(device.boot(), (200, Role::Current), "after");
    device.ok(&["verify"]);

    // What the old signer signed runs nowhere any more, and nobody installs it.
    device.restore_disk(&old_disk);
    refused_to_boot(&device, 3, "was revoked by");
    let verify = device.run(&["verify"]);
    assert_eq!(verify.status.code(), Some(3));
    assert!(text(&verify.stdout).contains("was revoked by"), "{}", text(&verify.stdout));
    publisher.publish(201, "signed by the old signer");
    device.refused(&["update", &publisher.source_of(201)], 3, &["was revoked by", "hint: "]);
    // The way back: the system with the new signature.
    device.ok(&["repair", &publisher.source()]);
    assert_eq!(device.boot(), (200, Role::Current));
}

#[test]
fn a_ca_is_replaced_while_both_are_trusted() {
    let (dir, publisher) = published();
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    assert_eq!(device.boot(), (200, Role::Current), "before");
    let keys = other_keys(dir.path());
    let read = |path: &Path| fs::read(path).unwrap();
    let (old, new) = (read(&publisher.key("ca.pem")), read(&keys.join("ca.pem")));
    let ca = device.config().join("manifestCA.pem");

    // 1. Both CAs; the system that the old one vouches for still runs.
    fs::write(&ca, [old.clone(), new.clone()].concat()).unwrap();
    assert_eq!(device.boot(), (200, Role::Current), "during, old signature");
    let early = publisher.dir().join("too early");
    device.copy_disk(&early);
    // 2. The same system, signed under the new CA.
    sign_again(&publisher, 200, &keys.join("signer.key"), &keys.join("signer.pem"));
    device.ok(&["update", &publisher.source_of(200)]);
    assert_eq!(device.boot(), (200, Role::Current), "during, new signature");
    // 3. The new CA alone.
    fs::write(&ca, &new).unwrap();
    assert_eq!(device.boot(), (200, Role::Current), "after");
    device.ok(&["verify"]);

    // A device that was not given the new signature in between does not start: the order matters.
    device.restore_disk(&early);
    refused_to_boot(&device, 3, "manifest CA");
    device.ok(&["update", &publisher.source_of(200)]);
    assert_eq!(device.boot(), (200, Role::Current), "and is mended by the next update");
}

#[test]
fn a_floor_key_is_replaced_with_the_factorys_help() {
    let (dir, publisher) = published();
    publisher.publish(201, "signed for both floors");
    let keys = other_keys(dir.path());
    sign_floor(&publisher, 201, &keys.join("floor.key"));
    let tpm = Swtpm::start();
    let device = Device::with_tpm(&tpm);
    device.install(&publisher, 200);
    device.provision(&publisher);
    assert_eq!(device.boot(), (200, Role::Current));
    device.ok(&["commit"]);

    // 1. A version with floor signatures of both keys.
    device.ok(&["update", &publisher.source_of(201)]);
    assert_eq!(device.boot(), (201, Role::Pending), "before");
    assert!(device.ok(&["commit"]).contains("the floor rose from 200 to 201"));

    // 2. The new floor in place of the old one. CONFIG and the TPM change together: one without the other is no floor.
    let floor_pub = device.config().join("floor.pub");
    fs::copy(keys.join("floor.pub"), &floor_pub).unwrap();
    refused_to_boot(&device, 5, "0x01500050");
    tpm.tool_ok("tpm2_nvundefine", &["0x01500050", "-C", "o"]);
    refused_to_boot(&device, 5, "0x01500050");
    let (key, public) = (keys.join("provision.key"), keys.join("floor.pub"));
    let (key, public) = (key.to_str().unwrap(), public.to_str().unwrap());
    device.ok(&["floor", "provision", "--provision-key", key, "--floor-pub", public]);
    assert_eq!(device.boot(), (201, Role::Current), "during: the floor is at 0");
    device.refused(&["commit"], 5, &["floor signature"]);

    // 3. The new key's floor signature, from the same source; then the floor rises to what runs.
    let verify = device.run(&["verify"]);
    assert_eq!(verify.status.code(), Some(3), "the old key's signature does not hold here");
    let said = device.ok(&["update", &publisher.source_of(201)]);
    assert!(said.contains("mended: floor.sig replaced"), "{said}");
    assert_eq!(device.boot(), (201, Role::Current), "after");
    assert!(device.ok(&["commit"]).contains("the floor rose from 0 to 201"));
    device.ok(&["verify"]);
    device.refused(&["update", &publisher.source_of(200)], 4, &["200", "201"]);
}

#[test]
fn a_list_of_another_key_or_of_no_use_is_told_before_it_is_believed() {
    let (_dir, publisher) = published();
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    let list = device.config().join("crl.pem");
    // Of the same name, by another key: somebody who is not the CA cannot revoke, nor be taken for it.
    let forger = Pki::new();
    fs::copy(publisher.key("signer.pem"), forger.path("signer.pem")).unwrap();
    forger.root("ca", "/CN=test manifest CA", crate::pki::CA);
    forger.revoke("signer", "ca").crl("ca", "crl.pem");
    for (content, word) in [
        (forger.read("crl.pem"), "is not signed by that CA"),
        (b"".to_vec(), "no PEM block"),
        (b"-----BEGIN X509 CRL-----\nMIIB\n".to_vec(), "cut short"),
        (b"-----BEGIN X509 CRL-----\nMIIB\n-----END X509 CRL-----\n".to_vec(), "crl.pem"),
        ([forger.read("crl.pem"), forger.read("ca.key")].concat(), "holds a private key"),
    ] {
        fs::write(&list, content).unwrap();
        device.refused(&["update", &publisher.source_of(200)], 2, &["crl.pem", word]);
    }
    // A list that is out of date counts, and so does one whose time has not come: a device may have no clock.
    let pki = ca_of(&publisher);
    pki.revoke("signer", "ca");
    for dates in [["20000101000000Z", "20010101000000Z"], ["20700101000000Z", "20710101000000Z"]] {
        pki.dated_crl("ca", "crl.pem", dates);
        fs::copy(pki.path("crl.pem"), &list).unwrap();
        refused_to_boot(&device, 3, "was revoked by");
    }
    // An empty list of the right CA revokes nothing; one of a CA that the device does not know says nothing.
    let empty = ca_of(&publisher);
    empty.crl("ca", "crl.pem");
    let stranger = Pki::new();
    stranger.root("ca", "/CN=Somebody", crate::pki::CA).crl("ca", "crl.pem");
    fs::write(&list, [empty.read("crl.pem"), stranger.read("crl.pem")].concat()).unwrap();
    assert_eq!(device.boot(), (200, Role::Current));
}
