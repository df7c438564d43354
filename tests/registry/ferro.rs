//! Against `ferro-oci-server`, a registry of other authors that keeps a list of referrers and ignores ranges.
//! `make campaign` installs it from Rust's crates.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};

use mosfs::internals::image::oci::SYSTEM_REPOSITORY;
use mosfs::internals::store::{Store, version_name};
use tempfile::TempDir;

use crate::debian::on_a_port;
use crate::place::{Place, display, noise, system_of};
use crate::real::skopeo;

/// A running server; it ends when it is dropped.
struct Ferro {
    child: Child,
    port: u16,
    _dir: TempDir,
}

impl Ferro {
    fn start() -> Self {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin/ferro-oci-server");
        let dir = tempfile::tempdir().expect("a folder");
        let (child, port) = on_a_port("it with `make campaign`", |port| {
            let mut command = Command::new(&program);
            command.env("FERRO_OCI_LISTEN", format!("127.0.0.1:{port}"));
            command.env("FERRO_OCI_STORAGE_DIR", dir.path());
            command
        });
        Self { child, port, _dir: dir }
    }
}

impl Drop for Ferro {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "requires ferro-oci-server: `make campaign` installs it")]
fn a_registry_with_referrers_and_without_ranges_has_all_that_a_device_uses() {
    let (place, registry) = (Place::new(), Ferro::start());
    let host = format!("127.0.0.1:{}", registry.port);
    let source = format!("docker://{host}/p");
    place.publish(200, &[20_000, 300_000]);
    assert!(place.push(&source).contains("pushed version 200"));
    assert!(place.push(&source).contains("0 blobs sent, 0 mounted"));

    // Referrers are in its own list: no tag stands in for that.
    let tags =
        skopeo(&["list-tags", "--tls-verify=false", &format!("docker://{host}/p/{SYSTEM_REPOSITORY}")]);
    assert!(tags.contains("\"200\"") && !tags.contains("\"sha256-"), "{tags}");
    place.pull(&source, "copy");
    let (ours, copy) = (place.publisher.store(), Store::open(&place.path("copy")).unwrap());
    let system = ours.resolve(&version_name(200)).unwrap();
    assert_eq!(copy.referrers(&system.digest, None).unwrap().len(), 3);
    place.ok(&["verify", &format!("oci:{}", display(&place.path("copy")))]);

    // skopeo copies the image with the same digest.
    let (_, images) = system_of(&ours, 200);
    let digest = images[0].1.digest;
    let image = format!("docker://{host}/p/mos/images/hostfs@{digest}");
    let layout = place.path("skopeo");
    skopeo(&["copy", "-q", "--src-tls-verify=false", &image, &format!("oci:{}:x", display(&layout))]);
    assert_eq!(Store::open(&layout).unwrap().resolve("x").unwrap().digest, digest);

    // Each request for a part of a layer is answered with all of it.
    let mnt = place.path("mnt");
    fs::create_dir(&mnt).unwrap();
    let at = display(&mnt);
    place.ok(&["mount", "--store", &display(&place.path("lazy")), &image, &at]);
    let read = fs::read_to_string(mnt.join("content"));
    place.ok(&["umount", &at]);
    assert!(read.unwrap() == noise(300_000, 20_001), "not the upper layer's file");

    assert!(place.install(&source).contains("installed version 200"));
    place.publish(201, &[40_000]);
    place.push(&source);
    assert!(place.ok(&["update", "--check", &source]).contains("version 201 would be installed"));
    place.ok(&["update", &source]);
    assert!(place.ok(&["update", "--check", &source]).contains("version 201 is pending"));
}
