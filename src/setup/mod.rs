//! Sets up a disk: partitions, file systems, the system, its kernel.
//!
//! ```text
//! answers.rs  what is to be done, from a file
//! disk.rs     the disks of the machine, what is on them, which one is meant
//! layout.rs   the mark of a setup under way, and the partition table
//! floor.rs    the floor of the machine's TPM, and how it comes to one
//! run.rs      everything that can be refused; then the steps
//!
//! on a machine that was started from an install medium:
//! media.rs      the medium, and those beside it
//! console.rs    what is said, and typed, on all consoles
//! courier.rs    a nonce to the medium, and its signature back
//! installer.rs  answers, clock, the setup as a process of its own, and what follows
//! ```
//!
//! Invariants: whatever can be refused is refused before the first write to the disk ([`prepare`]); a setup that was
//! interrupted at any moment is continued, or begun again, by the next one with the same source.

pub mod answers;
mod console;
pub mod courier;
pub mod disk;
mod error;
pub mod floor;
pub mod installer;
mod layout;
pub mod media;
mod run;

pub use error::SetupError;
pub use run::{Outcome, Request, Wipe, prepare};

/// Returns the last line of a setup: its exit code, and why.
pub fn verdict(code: u8, reason: &str) -> String {
    format!("MOSFS-INSTALL-VERDICT: {code} {}", reason.replace('\n', "; "))
}
