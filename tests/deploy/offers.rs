//! Which system of a source is taken: names are hints, signatures count, and the work is bounded.

use mosfs::internals::image::oci::{Descriptor, REF_NAME};
use mosfs::internals::manifest::SYSTEM_MEDIA_TYPE;
use mosfs::internals::store::version_name;
use mosfs::internals::trust::{CERTIFICATE_TYPE, FLOOR_SIGNATURE_TYPE, SIGNATURE_TYPE};

use crate::device::{Device, text};
use crate::publish::Publisher;
use crate::signers::{add, artifact, forget};

fn world() -> (tempfile::TempDir, Publisher, Device) {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    publisher.publish(200, "first");
    publisher.publish(201, "second");
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    (dir, publisher, device)
}

fn name(publisher: &Publisher, name: &str, entry: &Descriptor) {
    publisher.store().writer().unwrap().set_name(name, entry).unwrap();
}

fn pending(device: &Device) -> Option<u64> {
    device.state().pending.map(|pending| pending.deployment.version)
}

#[test]
fn no_name_hides_the_highest_version_that_verifies() {
    let (_dir, publisher, device) = world();
    let store = publisher.store();
    let writer = store.writer().unwrap();
    // An old version, rubbish, a system without a signature, an image, a name of nothing.
    name(&publisher, &version_name(9_999_999), &artifact(&store, 200));
    let rubbish = writer.put_artifact(SYSTEM_MEDIA_TYPE, b"not a manifest", None).unwrap();
    name(&publisher, &version_name(9_999_998), &rubbish);
    publisher.publish(9_999_997, "nobody signed it");
    forget(&publisher, 9_999_997, &[SIGNATURE_TYPE]);
    let (_, image) =
        store.names().unwrap().into_iter().find(|(name, _)| name.starts_with("mos/images/")).unwrap();
    name(&publisher, &version_name(9_999_996), &image);
    let nothing = Descriptor::of(SYSTEM_MEDIA_TYPE, b"nothing");
    let nothing = Descriptor::new(mosfs::internals::image::oci::MANIFEST, nothing.digest, nothing.size);
    name(&publisher, &version_name(9_999_995), &nothing);
    let other = writer.put_artifact(SYSTEM_MEDIA_TYPE, b"{}", None).unwrap();
    name(&publisher, &version_name(u64::MAX), &other);
    let check = device.run(&["update", "--check", "--json", &publisher.source()]);
    let answer: serde_json::Value = serde_json::from_slice(&check.stdout).unwrap();
    assert_eq!((answer["update"].as_bool(), answer["version"].as_u64()), (Some(true), Some(201)));
    let update = device.run(&["update", &publisher.source()]);
    assert!(update.status.success(), "{}", text(&update.stderr));
    assert_eq!(pending(&device), Some(201));
    let said = text(&update.stderr);
    for version in [9_999_998, 9_999_997, 9_999_996, 9_999_995] {
        assert!(said.contains(&format!("{} (", version_name(version))), "{version} is not said: {said}");
    }
    assert!(said.contains("comes without a signature"), "{said}");
}

#[test]
fn a_version_under_a_wrong_name_or_without_one_is_found() {
    for wrong in [Some(version_name(5)), Some("mos/system/system:latest".to_string()), None] {
        let (_dir, publisher, device) = world();
        let store = publisher.store();
        let entry = artifact(&store, 201);
        let names: Vec<String> = store
            .names()
            .unwrap()
            .into_iter()
            .filter(|(_, one)| one.digest == entry.digest)
            .map(|(name, _)| name)
            .collect();
        let writer = store.writer().unwrap();
        writer.remove_names(&names.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        writer.set_entries(&[(wrong.as_deref(), &entry)]).unwrap();
        drop(writer);
        device.ok(&["update", &publisher.source()]);
        assert_eq!(pending(&device), Some(201), "{wrong:?}");
    }
}

#[test]
fn a_name_that_the_user_gives_must_tell_the_truth() {
    let (_dir, publisher, device) = world();
    name(&publisher, &version_name(300), &artifact(&publisher.store(), 201));
    let said = device.refused(&["update", &publisher.source_of(300)], 3, &["version 201", ":300"]);
    assert!(said.contains("hint: leave out the name"), "{said}");
    let other = format!("{}:sha256:{}", publisher.source(), "00".repeat(32));
    name(
        &publisher,
        &format!("mos/system/system:sha256/{}", "00".repeat(32)),
        &artifact(&publisher.store(), 201),
    );
    device.refused(&["update", &other], 3, &["leads to another system"]);
    assert_eq!(pending(&device), None);
}

#[test]
fn one_name_twice_is_no_way_to_hide_a_system_either() {
    let (_dir, publisher, device) = world();
    // As a tool that does not know the rules may write it: the old system first.
    let path = publisher.dir().join("store/index.json");
    let mut index: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut planted = serde_json::to_value(artifact(&publisher.store(), 200)).unwrap();
    planted["annotations"][REF_NAME] = version_name(201).into();
    index["manifests"].as_array_mut().unwrap().insert(0, planted);
    std::fs::write(&path, index.to_string()).unwrap();
    device.ok(&["update", &publisher.source_of(201)]);
    assert_eq!(pending(&device), Some(201));
}

#[test]
fn bad_signatures_and_certificates_do_not_crowd_out_the_good_ones() {
    let (_dir, publisher, device) = world();
    let stranger = crate::pki::Pki::with_ca();
    stranger.signer("stranger", "ec:P-256", "ca");
    for number in 0..100 {
        add(&publisher, 201, SIGNATURE_TYPE, format!("no signature {number}").as_bytes());
        add(&publisher, 201, FLOOR_SIGNATURE_TYPE, &[number; 64]);
        let certificate = format!("# {number}\n{}", text(&stranger.read("stranger.pem")));
        add(&publisher, 201, CERTIFICATE_TYPE, certificate.as_bytes());
    }
    std::fs::copy(publisher.key("floor.pub"), device.config().join("floor.pub")).unwrap();
    device.ok(&["update", &publisher.source()]);
    assert_eq!(pending(&device), Some(201));
    device.ok(&["verify"]);
    // What was not taken stays where it was.
    let store = mosfs::internals::store::Store::open(&device.system().join("store")).unwrap();
    assert_eq!(store.referrers(&artifact(&store, 201).digest, None).unwrap().len(), 3);
    // One whose bytes are gone hides no other.
    let entry = publisher.store().referrers(&artifact(&publisher.store(), 201).digest, Some(SIGNATURE_TYPE));
    std::fs::remove_file(publisher.store().blob_path(&entry.unwrap()[0].digest)).unwrap();
    device.ok(&["update", &publisher.source()]);
}
