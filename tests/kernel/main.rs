//! The kernel of a system: the target `boot` that `mosfs build` makes, the EFI system partition, and boots from one.
//!
//! ```text
//! fixture.rs  hostfs images with a kernel that is made up, and a publisher who builds systems of them
//! build.rs    what `mosfs build` makes of an image, and what it refuses
//! esp.rs      files on the EFI system partition over install, update, commit and gc, and after crashes
//! fat.rs      the same as power.rs, with the EFI system partition on FAT itself, in a machine
//! power.rs    an update with another kernel and its commit, on a disk that loses what was not flushed
//! rotate.rs   another manifest CA comes with the kernel, in two steps
//! ```

#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/nbd.rs"]
mod nbd;
#[path = "../common/plugged.rs"]
mod plugged;
#[path = "../common/tools.rs"]
mod tools;

mod build;
mod esp;
mod fat;
mod fixture;
mod power;
mod rotate;
