//! Install media.

pub mod fat;
