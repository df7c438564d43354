//! Against `ferro-oci-server`, a registry of other authors that keeps a list of referrers and ignores ranges.
//! `make campaign` installs it from Rust's crates.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use mosfs::internals::image::oci::SYSTEM_REPOSITORY;
use mosfs::internals::store::{Store, version_name};
use tempfile::TempDir;

use crate::debian::is_up;
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
        // Another process may take the port between its choice and its use: then choose again.
        for _ in 0..10 {
            let port =
                TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
            let mut child = Command::new(&program)
                .env("FERRO_OCI_LISTEN", format!("127.0.0.1:{port}"))
                .env("FERRO_OCI_STORAGE_DIR", dir.path())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap_or_else(|error| {
                    panic!("cannot run {}: {error}; `make campaign` installs it", program.display())
                });
            if is_up(&mut child, port) {
                return Self { child, port, _dir: dir };
            }
        }
        panic!("ferro-oci-server does not start");
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
