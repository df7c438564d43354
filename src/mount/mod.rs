//! (to come)
pub mod dm_verity;
pub mod kernel_overlay;
