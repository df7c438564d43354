//! Install media.
//!
//! ```text
//! layout.rs  what is where on a medium, and what it is called
//! fat.rs     the EFI system partition
//! ```

pub mod fat;
#[allow(dead_code, reason = "what writes and reads media follows")]
pub mod layout;
