//! (to come)

pub mod floor;
