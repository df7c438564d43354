//! Install media: a machine that UEFI firmware starts from one installs, and starts the system that it installed.
//!
//! ```text
//! real.rs      a small root with a real kernel and the real mosfs, and media of it
//! install.rs   from an empty disk to a committed system; with `make campaign`, from a USB stick, a medium that stays in,
//!              Secure Boot, power cuts, questions at the console, and what is refused
//! choose.rs    with `make campaign`: which of several disks is taken, and a medium that enrolls Secure Boot keys
//! figures.rs   how long a start and an installation take, for docs/boot.md and docs/install.md
//! kernels.rs   with `make campaign`: a new kernel is tried, committed, and given up on where it panics or hangs
//! ```
//!
//! The root is busybox: its init does what `/action` in the image says, once `mosfs boot` has started it.

#[path = "../kernel/fixture.rs"]
#[allow(dead_code)]
mod fixture;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/tools.rs"]
mod tools;

mod choose;
mod figures;
mod install;
mod kernels;
mod real;
