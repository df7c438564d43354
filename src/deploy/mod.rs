//! (to come)

pub mod build;
