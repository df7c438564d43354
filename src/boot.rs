//! Boot: from the initramfs, choose a deployment, verify it, check the floor, mount the root.

pub mod cmdline;
pub mod partition;
