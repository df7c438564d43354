//! "The same system" is compared with the offer, file by file and blob by blob; and `mosfs repair`.

use std::fs;
use std::path::{Path, PathBuf};

use mosfs::internals::deploy::choice::Role;
use mosfs::internals::image::oci::Descriptor;
use mosfs::internals::store::Store;

use crate::device::{Device, text};
use crate::publish::{PRODUCT, Publisher};
use crate::signers::{artifact, sign_again};

/// A publisher of version 200 with a root and a container, and a device that has it.
fn world() -> (tempfile::TempDir, Publisher, Device) {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    publish(&publisher, 200);
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    fs::copy(publisher.key("floor.pub"), device.config().join("floor.pub")).unwrap();
    (dir, publisher, device)
}

fn publish(publisher: &Publisher, version: u64) {
    let layer = |text: &str| vec![publisher.add_layer(text)];
    let root = layer(&format!("root of {version}"));
    publisher.publish_targets(
        version,
        &[("hostfs", "hostfs", root), ("app", "container", layer("app"))],
        true,
    );
}

fn folder(device: &Device) -> PathBuf {
    device.system().join("deployments").join(device.state().current.unwrap().to_string())
}

fn store(device: &Device) -> Store {
    Store::open(&device.system().join("store")).unwrap()
}

/// Every blob that the images of the device's store have.
fn image_blobs(device: &Device) -> Vec<Descriptor> {
    let store = store(device);
    let mut blobs = Vec::new();
    for (name, entry) in store.names().unwrap() {
        if name.starts_with("mos/images/") {
            let image = store.image(&entry.digest).unwrap().manifest;
            blobs.extend(image.layers.into_iter().chain([image.config, entry]));
        }
    }
    assert_eq!(blobs.len(), 6, "two images of a layer, a config and a manifest");
    blobs
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

/// What can happen to a file.
const HARM: [(&str, fn(&Path)); 4] = [
    ("flipped", flip),
    ("removed", |path| fs::remove_file(path).unwrap()),
    ("cut", |path| {
        let bytes = fs::read(path).unwrap();
        fs::remove_file(path).unwrap();
        fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    }),
    ("emptied", |path| {
        fs::remove_file(path).unwrap();
        fs::write(path, "").unwrap();
    }),
];

/// The files of a device but for what tells of commands.
fn rest(device: &Device) -> Vec<(PathBuf, Vec<u8>)> {
    device.snapshot().into_iter().filter(|(path, _)| !path.ends_with("state.json")).collect()
}

#[test]
fn every_harmed_file_of_a_deployment_is_replaced_by_update_and_install_and_named_by_verify() {
    let (_dir, publisher, device) = world();
    let good = rest(&device);
    device.ok(&["verify"]);
    for file in ["manifest.json", "manifest.sig", "cert.pem", "floor.sig"] {
        for (how, harm) in HARM {
            for command in ["update", "install"] {
                harm(&folder(&device).join(file));
                let verify = device.run(&["verify"]);
                let said = text(&verify.stdout);
                assert_eq!(verify.status.code(), Some(3), "{file} {how}: {said}");
                assert!(said.contains("deployment 200-"), "{file} {how}: {said}");
                let said = device.ok(&[command, &publisher.source_of(200)]);
                assert!(said.contains("mended") && said.contains(file), "{file} {how}: {said}");
                assert_eq!(rest(&device), good, "{file} {how}");
                device.ok(&["verify"]);
            }
        }
    }
    assert_eq!(device.boot(), (200, Role::Current));
}

#[test]
fn every_lost_or_damaged_blob_is_fetched_again() {
    let (_dir, publisher, device) = world();
    let good = rest(&device);
    for blob in image_blobs(&device) {
        for (how, harm) in HARM {
            harm(&store(&device).blob_path(&blob.digest));
            assert_eq!(device.run(&["verify"]).status.code(), Some(3), "{how}");
            let dry = device.ok(&["update", "--dry-run", &publisher.source_of(200)]);
            assert!(dry.contains(&format!("would fetch {}", blob.digest)), "{how}: {dry}");
            let said = device.ok(&["update", &publisher.source_of(200)]);
            assert!(said.contains("1 blob fetched again"), "{how}: {said}");
            assert_eq!(rest(&device), good, "{how}");
        }
    }
    let said = device.ok(&["update", &publisher.source_of(200)]);
    assert!(said.contains("nothing to do"), "{said}");
}

#[test]
fn a_pending_system_is_compared_too_and_a_new_one_takes_no_damaged_blob_over() {
    let (_dir, publisher, device) = world();
    // The layer of `app` is the same in both versions; its size does not show the damage.
    let app = publisher.add_layer("app");
    let path = store(&device).blob_path(&app.digest);
    flip(&path);
    publish(&publisher, 201);
    device.ok(&["update", &publisher.source_of(201)]);
    device.ok(&["verify"]);
    flip(&path);
    let pending = device.state().pending.unwrap();
    flip(&device.system().join("deployments").join(pending.deployment.to_string()).join("manifest.sig"));
    assert_eq!(device.run(&["verify"]).status.code(), Some(3));
    let said = device.ok(&["update", &publisher.source_of(201)]);
    assert!(said.contains("pending already, and mended: manifest.sig replaced; 1 blob fetched"), "{said}");
    device.ok(&["verify"]);
    assert_eq!(device.state().pending.unwrap(), pending, "no try is given or taken");
}

#[test]
fn a_renewed_certificate_is_taken_and_a_crash_on_the_way_leaves_the_old_one_or_the_new_one() {
    let (dir, publisher, device) = world();
    let pki = crate::pki::Pki::new();
    for (from, to) in [("ca.pem", "ca.pem"), ("ca.key", "ca.key")] {
        fs::copy(publisher.key(from), pki.path(to)).unwrap();
    }
    let points = [
        ("store.blob.written", 1),
        ("store.blob.renamed", 3),
        ("store.index.written", 1),
        ("store.index.renamed", 1),
        ("deploy.names.set", 1),
        ("deploy.folder.written", 1),
        ("deploy.folder.renamed", 1),
        ("store.gc.names", 1),
        ("store.gc.blob", 1),
        ("store.gc.blob", 2),
    ];
    for (number, (point, time)) in points.into_iter().enumerate() {
        let name = format!("renewed{number}");
        pki.signer(&name, "ec:P-256", "ca");
        let (key, certificate) = (pki.path(&format!("{name}.key")), pki.path(&format!("{name}.pem")));
        sign_again(&publisher, 200, &key, &certificate);
        let at = format!("{point}:{time}");
        let mut cut = device.command(&["update", &publisher.source_of(200)]);
        let cut = cut.env("MOSFS_FAILPOINT", &at).output().unwrap();
        assert_eq!(cut.status.code(), None, "{at}: {}", text(&cut.stderr));
        assert_eq!(device.boot(), (200, Role::Current), "{at}");
        device.ok(&["update", &publisher.source_of(200)]);
        device.ok(&["verify"]);
        let has = mosfs::internals::trust::Certificate::from_pem(
            &fs::read(folder(&device).join("cert.pem")).unwrap(),
        );
        let new = mosfs::internals::trust::Certificate::from_pem(&fs::read(&certificate).unwrap());
        assert_eq!(has.unwrap().to_pem().unwrap(), new.unwrap().to_pem().unwrap(), "{at}");
        // What vouched for it before is gone from the store.
        let about = artifact(&store(&device), 200).digest;
        assert_eq!(store(&device).referrers(&about, None).unwrap().len(), 3, "{at}");
    }
    drop(dir);
}

#[test]
fn repair_mends_from_what_else_is_on_the_device() {
    let (_dir, _publisher, device) = world();
    let good = rest(&device);
    assert!(device.ok(&["repair"]).contains("nothing is damaged"));
    // A deployment's folder from the store …
    for file in ["manifest.json", "manifest.sig", "cert.pem", "floor.sig"] {
        for (how, harm) in HARM {
            harm(&folder(&device).join(file));
            let said = device.ok(&["repair"]);
            assert!(said.contains("mended deployment 200-") && said.contains(file), "{file} {how}: {said}");
            assert_eq!(rest(&device), good, "{file} {how}");
        }
    }
    fs::remove_dir_all(folder_of(&device)).unwrap();
    device.ok(&["repair"]);
    assert_eq!(rest(&device), good);
    // … and what the store has of the system from the folder.
    let about = artifact(&store(&device), 200).digest;
    let mut own = vec![about];
    own.extend(store(&device).referrers(&about, None).unwrap().iter().map(|one| one.digest));
    for digest in own {
        for (how, harm) in HARM {
            harm(&store(&device).blob_path(&digest));
            device.ok(&["repair"]);
            device.ok(&["verify"]);
            assert_eq!(device.boot(), (200, Role::Current), "{how}");
        }
    }
    // The index, whose names follow from the deployments.
    for content in ["", "{", "{\"schemaVersion\":2,\"manifests\":[]}"] {
        fs::write(device.system().join("store/index.json"), content).unwrap();
        let said = device.ok(&["repair"]);
        assert!(said.contains("set again"), "`{content}`: {said}");
        device.ok(&["verify"]);
        assert_eq!(device.boot(), (200, Role::Current));
    }
    // Not the images: they are named, with what to do.
    let layer = image_blobs(&device)[0].clone();
    fs::remove_file(store(&device).blob_path(&layer.digest)).unwrap();
    device.refused(&["repair"], 3, &[&layer.digest.to_string(), "hint: run `mosfs repair SOURCE`"]);
}

fn folder_of(device: &Device) -> PathBuf {
    folder(device)
}

#[test]
fn repair_writes_a_damaged_state_file_anew() {
    let (_dir, publisher, device) = world();
    publish(&publisher, 201);
    device.ok(&["update", &publisher.source_of(201)]);
    let path = device.system().join("state.json");
    let whole = fs::read(&path).unwrap();
    let harms: [&[u8]; 3] = [b"", b"not JSON", &whole[..whole.len() / 2]];
    for harm in harms {
        // What runs is current; nothing becomes pending by a repair.
        for runs in [200, 201] {
            fs::write(&path, &whole).unwrap();
            let state = device.state();
            let id = if runs == 200 { state.current.unwrap() } else { state.pending.unwrap().deployment };
            fs::write(&path, harm).unwrap();
            device.record_boot(id);
            let said = device.ok(&["repair"]);
            assert!(said.contains("state.json: written anew"), "{said}");
            assert_eq!((device.state().current, device.state().pending), (Some(id), None));
        }
    }
    // Where it is not known what runs: the highest that verifies, and never one below the floor.
    fs::remove_file(device.boot_record()).unwrap();
    fs::write(&path, "").unwrap();
    device.ok(&["repair"]);
    assert_eq!(device.state().current.unwrap().version, 201);
    flip(&folder(&device).join("manifest.json"));
    fs::write(&path, "").unwrap();
    device.ok(&["repair"]);
    assert_eq!(device.state().current.unwrap().version, 200);
    fs::write(device.system().join("floor"), "202\n").unwrap();
    fs::write(&path, "").unwrap();
    device.refused(&["repair"], 1, &["holds no deployment"]);
}

#[test]
fn repair_fetches_from_a_source_and_a_crash_of_it_can_be_run_again() {
    let (_dir, publisher, device) = world();
    let good = rest(&device);
    let blobs = image_blobs(&device);
    for point in [
        "repair.state.written",
        "repair.blob.fetched",
        "repair.folder.replaced",
        "repair.names.set",
        "store.blob.renamed",
    ] {
        for blob in &blobs {
            fs::remove_file(store(&device).blob_path(&blob.digest)).unwrap();
        }
        fs::remove_file(folder(&device).join("cert.pem")).unwrap();
        fs::write(device.system().join("store/index.json"), "{").unwrap();
        let id = device.state().current.unwrap();
        device.record_boot(id);
        let state = fs::read(device.system().join("state.json")).unwrap();
        // The signature and certificate are looked for where the state file is whole.
        if point == "repair.state.written" {
            fs::write(device.system().join("state.json"), "").unwrap();
            fs::copy(publisher.key("signer.pem"), folder_at(&device, &id).join("cert.pem")).unwrap();
        }
        let mut cut = device.command(&["repair", &publisher.source()]);
        let cut = cut.env("MOSFS_FAILPOINT", point).output().unwrap();
        assert_eq!(cut.status.code(), None, "{point}: {}", text(&cut.stderr));
        device.ok(&["repair", &publisher.source()]);
        device.ok(&["verify"]);
        assert_eq!(device.state().current, Some(id), "{point}");
        fs::write(device.system().join("state.json"), state).unwrap();
        fs::remove_file(device.boot_record()).unwrap();
    }
    assert_eq!(device.boot(), (200, Role::Current));
    // A source cannot make the device take another system's bytes.
    let other_dir = tempfile::tempdir().unwrap();
    let other = Publisher::new(other_dir.path());
    publish(&other, 200);
    fs::remove_file(folder(&device).join("manifest.sig")).unwrap();
    let about = artifact(&store(&device), 200).digest;
    let kind = mosfs::internals::trust::SIGNATURE_TYPE;
    let gone: Vec<_> =
        store(&device).referrers(&about, Some(kind)).unwrap().iter().map(|one| one.digest).collect();
    store(&device).writer().unwrap().replace_entries(&gone, &[], &[]).unwrap();
    device.refused(&["repair", &other.source()], 3, &["not mended"]);
    device.ok(&["repair", &publisher.source()]);
    let _ = good;
    let ca = publisher.key("ca.pem");
    device.ok(&["install", &publisher.source(), "--ca", ca.to_str().unwrap(), "--product", PRODUCT]);
}

fn folder_at(device: &Device, id: &mosfs::internals::deploy::DeploymentId) -> PathBuf {
    device.system().join("deployments").join(id.to_string())
}
