//! A publisher of systems that install from a medium, and the check of such a medium.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::fixture::{PRODUCT, Publisher};

/// A publisher whose hostfs has what sets up a disk.
pub fn publisher() -> Publisher {
    let publisher = Publisher::new();
    publisher.put("usr/sbin/mke2fs", fs::read("/bin/true").unwrap());
    publisher.image();
    publisher
}

/// Has `mosfs` check a medium with what a device of this publisher trusts.
pub fn verify(mut mosfs: Command, medium: &Path) -> Command {
    mosfs.args(["iso", "--ca", "keys/ca.pem", "--product", PRODUCT, "--verify"]).arg(medium);
    mosfs
}
