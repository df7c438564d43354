//! mosfs turns a list of OCI images into a signed, verified, running Linux system.
//!
//! The way through, and with it the order of the modules (imports point from left to right,
//! `tests/architecture.rs` holds that):
//!
//! ```text
//! cli -> boot -> publish -> deploy -> mount -> floor, trust -> manifest -> convert -> store -> transport -> image
//!     -> (digest, error, progress, failpoint, sys)
//! ```

pub mod boot;
pub mod cli;
pub mod convert;
pub mod deploy;
pub mod digest;
pub mod error;
pub mod failpoint;
pub mod floor;
pub mod image;
pub mod manifest;
pub mod mount;
pub mod progress;
pub mod publish;
pub mod store;
#[allow(unsafe_code)]
pub mod sys;
pub mod transport;
pub mod trust;
