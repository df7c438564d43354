//! Mounts: what is planned, the backends that do it, and the register of what is mounted.

pub mod dm_verity;
pub mod engine;
pub mod kernel_overlay;
