//! `mosfs activate --lazy` and `mosfs mount --lazy`: targets of which blobs are missing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use mosfs::internals::image::oci::{Descriptor, MANIFEST};
use mosfs::internals::store::Store;

use crate::device::Device;
use crate::fixture::{is_mounted, wait_until};
use crate::place::{Place, load, noise, system_of};
use crate::server::{Fault, Options, Server};

/// A device that has lost the layers of a target.
struct Lost {
    place: Place,
    server: Server,
    device: Device,
    layer: Descriptor,
    content: String,
}

impl Lost {
    /// `source` installs from the registry, or from the publisher's store.
    fn new(from_registry: bool) -> Self {
        let (place, server) = (Place::new(), Server::start(Options::default()));
        let device = Device::with_file_floor();
        let content = noise(700_000, 7);
        let publisher = &place.publisher;
        let targets =
            [("hostfs", "hostfs", "host"), ("app", "container", &content), ("data", "fs-only", "d")];
        let targets = targets.map(|(name, service, text)| (name, service, vec![publisher.add_layer(text)]));
        publisher.publish_targets(200, &targets, true);
        let store = publisher.store();
        load(&store, 200, "p", &server);
        let (_, images) = system_of(&store, 200);
        let app = images.iter().find(|(name, _)| name == "app").expect("a target");
        let layer = app.1.manifest.layers[0].clone();
        if from_registry {
            let install = place.install_args(&server.source("p"));
            device.ok(&install.iter().map(String::as_str).collect::<Vec<_>>());
        } else {
            device.install(publisher, 200);
        }
        assert_eq!(device.boot().0, 200);
        let lost = Self { place, server, device, layer, content };
        fs::remove_file(lost.blob()).expect("a blob");
        lost.server.take_log();
        lost
    }

    fn blob(&self) -> PathBuf {
        self.device.system().join("store/blobs/sha256").join(self.layer.digest.hex())
    }

    fn target(&self, name: &str) -> PathBuf {
        self.device.dir.canonicalize().expect("a folder").join("run/targets").join(name)
    }

    fn read(&self, at: &Path) -> Result<String, Option<i32>> {
        fs::read_to_string(at.join("content")).map_err(|error| error.raw_os_error())
    }

    fn is_whole(&self) -> bool {
        Store::open(&self.device.system().join("store")).expect("a store").has(&self.layer)
    }
}

impl Drop for Lost {
    fn drop(&mut self) {
        for at in [self.target("app"), self.target("data"), self.place.path("m")] {
            if is_mounted(&at) {
                let _ = Command::new("umount").arg("-l").arg(&at).status();
            }
        }
    }
}

const PATIENCE: [&str; 2] = ["--net-timeout", "2"];

#[test]
fn a_target_whose_layer_is_missing_is_mounted_and_the_layer_comes_back() {
    let lost = Lost::new(true);
    let again = ["activate", "--json", "--lazy", "--net-timeout", "2"];
    // Without the option: the others are mounted, and the error names what is missing.
    lost.device.refused(&["activate"], 1, &["app"]);
    assert_eq!(lost.read(&lost.target("data")), Ok("d".into()));
    let said = lost.device.ok(&again);
    assert!(said.contains("\"backend\":\"fuse\""), "{said}");
    assert_eq!(lost.read(&lost.target("app")), Ok(lost.content.clone()));
    wait_until("the layer is a blob again", || lost.is_whole());
    lost.device.ok(&["verify"]);
    // It is mounted right, and stays; from now on nobody needs the registry.
    lost.server.script(|_, _| Some(Fault::Cut(0)));
    let said = lost.device.ok(&again);
    assert!(said.contains("\"action\":\"keep\"") && !said.contains("mount\""), "{said}");
    Command::new("umount").arg(lost.target("app")).status().expect("umount runs");
    lost.device.ok(&again);
    assert_eq!(lost.read(&lost.target("app")), Ok(lost.content.clone()));
}

#[test]
fn an_error_of_the_registry_is_one_of_that_target_alone() {
    let lost = Lost::new(true);
    lost.server.script(|_, _| Some(Fault::Answer(403, Vec::new(), Vec::new())));
    let said = lost.device.refused(&[&["activate", "--lazy"], &PATIENCE[..]].concat(), 1, &["app", "403"]);
    assert!(!said.contains("target data"), "{said}");
    assert_eq!(lost.read(&lost.target("data")), Ok("d".into()));
    lost.server.heal();
    lost.device.ok(&[&["activate", "--lazy"], &PATIENCE[..]].concat());
    assert_eq!(lost.read(&lost.target("app")), Ok(lost.content.clone()));
}

#[test]
fn the_registry_is_the_one_that_the_system_came_from_or_the_one_that_is_named() {
    let lost = Lost::new(false);
    lost.device.refused(&["activate", "--lazy"], 1, &["no registry is known for deployment 200-"]);
    lost.device.refused(&["activate", "--from", "docker://h/p"], 2, &["--lazy"]);
    let layout = lost.place.publisher.source();
    lost.device.refused(&["activate", "--lazy", "--from", &layout], 2, &["expected a registry"]);
    let source = lost.server.source("p");
    lost.device.ok(&["activate", "--lazy", "--from", &source, "--net-timeout", "2"]);
    assert_eq!(lost.read(&lost.target("app")), Ok(lost.content.clone()));
}

#[test]
fn one_target_is_mounted_anywhere_in_the_same_way() {
    let lost = Lost::new(true);
    let at = lost.place.path("m");
    fs::create_dir(&at).expect("a folder");
    let place = at.to_str().expect("UTF-8");
    lost.device.refused(&["mount", "app", place], 1, &["No such file"]);
    lost.device.refused(
        &["mount", "--lazy", "--backend", "dm-verity", "app", place],
        1,
        &["is fetched while it is read, which takes the fuse backend"],
    );
    let layout = lost.place.publisher.source();
    lost.device.refused(&["mount", "--lazy", &layout, place], 2, &["expected a target", "for --lazy"]);
    lost.device.ok(&["mount", "--lazy", "--no-fill", "--net-timeout", "2", "app", place]);
    assert_eq!(lost.read(&at), Ok(lost.content.clone()));
}

#[test]
fn what_the_registry_sends_is_verified_against_the_signed_manifest() {
    let lost = Lost::new(true);
    // A byte in the middle of the file's data, whatever is asked for.
    let layer = lost.layer.digest;
    lost.server.script(move |seen, _| seen.gets(&layer).then_some(Fault::Flip(1000)));
    let output = lost.device.run(&[&["activate", "--lazy"], &PATIENCE[..]].concat());
    let read = lost.read(&lost.target("app"));
    assert!(!output.status.success() || read == Err(Some(5)), "{output:?} {read:?}");
    assert_ne!(read, Ok(lost.content.clone()));
    // Another OCI manifest than the signed one: refused before anything is mounted.
    let lost = Lost::new(true);
    let store = Store::open(&lost.device.system().join("store")).expect("a store");
    let (_, images) = system_of(&lost.place.publisher.store(), 200);
    let app = images.iter().find(|(name, _)| name == "app").expect("a target");
    let manifest = store.blob_path(&app.1.digest);
    fs::set_permissions(&manifest, fs::Permissions::from_mode(0o644)).expect("a mode");
    fs::remove_file(&manifest).expect("a manifest");
    lost.server.script(|seen, _| {
        let other = br#"{"schemaVersion":2,"config":{},"layers":[]}"#.to_vec();
        seen.path
            .contains("images/app/manifests")
            .then(|| Fault::Answer(200, vec![("Content-Type", MANIFEST.into())], other))
    });
    lost.device.refused(&[&["activate", "--lazy"], &PATIENCE[..]].concat(), 3, &["app"]);
    assert!(!is_mounted(&lost.target("app")));
    lost.server.heal();
    lost.device.ok(&[&["activate", "--lazy"], &PATIENCE[..]].concat());
    assert_eq!(lost.read(&lost.target("app")), Ok(lost.content.clone()));
}
