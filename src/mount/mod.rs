//! (to come)
pub mod kernel_overlay;
