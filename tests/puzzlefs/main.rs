//! PuzzleFS images: those of another tool, hostile ones, and our own.

#[path = "../registry/debian.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod debian;
#[path = "../deploy/device.rs"]
#[allow(dead_code, reason = "the tests of deployments use the rest")]
mod device;
#[path = "../common/layout.rs"]
mod layout;
#[path = "../common/publish.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod publish;
#[path = "../common/whole/scan.rs"]
#[allow(dead_code)]
mod scan;
#[path = "../common/swtpm.rs"]
#[allow(dead_code, reason = "the floor's own tests use the rest")]
mod swtpm;
#[path = "../common/tar_images.rs"]
mod tar_images;
#[path = "../common/tarball.rs"]
mod tarball;
#[path = "../common/tools.rs"]
mod tools;
#[path = "../common/unmount.rs"]
mod unmount;

mod dump;
mod images;
mod message;
mod mount;
mod others;
mod own;
mod refused;
mod system;
