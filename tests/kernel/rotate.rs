//! Another manifest CA, in two steps: a kernel that trusts both, then one that trusts the new one alone.
//!
//! CONFIG is that of the running kernel: it is taken out of the kernel image, and handed to the booted system.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use mosfs::internals::deploy::System;
use mosfs::internals::deploy::choice::choose;
use mosfs::internals::deploy::kernel;
use mosfs::internals::floor::{self, FloorLocation};
use mosfs::internals::trust::Anchor;
use tempfile::TempDir;

use super::build::{section, unpack_initrd};
use super::fixture::{MOSFS, PRODUCT, Publisher, generate_keys, refused};
use super::tools::{run, sh};

/// A device that runs a kernel.
struct Device<'a> {
    publisher: &'a Publisher,
    dir: TempDir,
}

impl Device<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(MOSFS);
        command.args(words).args(["--floor", "file"]).env_remove("MOSFS_FAILPOINT");
        for name in ["system", "config", "run", "esp"] {
            command.env(format!("MOSFS_{}", name.to_uppercase()), self.path(name));
        }
        command
    }

    fn source(&self, version: u64) -> String {
        format!("oci:{}:mos/system/system:{version}", self.publisher.path("store").display())
    }

    fn update(&self, version: u64) -> Command {
        self.command(&["update", &self.source(version)])
    }

    /// Starts the kernel of a version, and with it the version, and commits it.
    fn start(&self, version: u64) {
        let uki = self.publisher.unpack("store", version).join("mosfs.efi");
        let (files, _) = unpack_initrd(&section(&uki, ".initrd"));
        let config = self.path("config");
        let _ = fs::remove_dir_all(&config);
        sh(self.dir.path(), &format!("cp -r {}/files/etc/mosfs config", files.path().display()));
        let anchor = Anchor::load(&config).unwrap();
        let mut floor = floor::open(&FloorLocation::File(self.path("system/floor")), &config).unwrap();
        let running = kernel::running(&config).unwrap();
        assert_eq!(running.unwrap().hex(), self.publisher.kernel_id("store", version));
        let booted =
            choose(&System::at(self.path("system")), &anchor, floor.as_mut(), running, |_, _| Ok(()))
                .unwrap();
        assert_eq!(booted.deployment.version, version);
        drop(floor);
        fs::create_dir_all(self.path("run")).unwrap();
        let record =
            format!("{{\"deployment\":\"{}\",\"backend\":\"fuse\",\"phases_ms\":[]}}", booted.deployment);
        fs::write(self.path("run/boot.json"), record).unwrap();
        run(&mut self.command(&["commit"]));
    }
}

#[test]
fn an_update_replaces_the_manifest_ca_in_two_steps() {
    let publisher = Publisher::new();
    generate_keys(publisher.dir(), "new");
    sh(publisher.dir(), "cat keys/ca.pem new/ca.pem >both.pem");
    // Who signs, and what the kernel of that version trusts. The floor key stays.
    let build = |version: u64, signer: &str, ca: &str| {
        publisher.import(version, "");
        let mut command = publisher.signed_by(signer, "store");
        command.args(["--floor-key", "keys/floor.key", "--ca", ca]);
        command
    };
    run(&mut build(200, "keys", "keys/ca.pem"));
    run(&mut build(201, "keys", "both.pem"));
    // Both steps at once: no device could verify the system under that kernel.
    let said = refused(&mut build(202, "keys", "new/ca.pem"), 2);
    assert!(said.contains("was issued by another"), "{said}");
    run(&mut build(202, "new", "new/ca.pem"));
    run(&mut build(203, "keys", "keys/ca.pem"));

    let device = Device { publisher: &publisher, dir: TempDir::new().unwrap() };
    fs::create_dir(device.path("esp")).unwrap();
    let ca = publisher.path("keys/ca.pem").display().to_string();
    run(&mut device.command(&["install", &device.source(200), "--ca", &ca, "--product", PRODUCT]));
    device.start(200);
    // The first step cannot be left out.
    let said = refused(&mut device.update(202), 3);
    assert!(said.contains("was issued by another"), "{said}");
    run(&mut device.update(201));
    device.start(201);
    run(&mut device.update(202));
    device.start(202);
    // What the old CA's signer signs is refused from now on.
    let said = refused(&mut device.update(203), 3);
    assert!(said.contains("was issued by another"), "{said}");
}
