//! Mounts whose image is fetched while it is read: what is fetched and when, what a network and a registry that
//! fail, lie or go away do to a reader, and what a kill leaves.

#[path = "../deploy/device.rs"]
#[allow(dead_code, reason = "the tests of deployments use the rest")]
mod device;
#[path = "../common/swtpm.rs"]
#[allow(dead_code, reason = "the floor's own tests use the rest")]
mod swtpm;

#[path = "../registry/debian.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod debian;
#[path = "../registry/place.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod place;
#[path = "../common/program.rs"]
mod program;
#[path = "../common/publish.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod publish;
#[path = "../registry/server.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod server;
#[path = "../common/unmount.rs"]
mod unmount;

mod away;
mod faults;
mod fixture;
mod formats;
mod reads;
mod targets;
mod trace;
mod update;
