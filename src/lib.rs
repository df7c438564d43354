//! mosfs turns a list of OCI images into a signed, verified, running Linux system.
//!
//! Three groups of modules carry the rest. A module may use those below and to its left (a table in
//! `tests/architecture.rs` enforces it):
//!
//! ```text
//! bytes    image <- mount                             what is read, and how it is presented
//! places   image <- transport <- store <- convert     where images come from and go to
//! belief   manifest <- trust <- floor                 what is trusted, and why
//!
//! deploy (all three) <- boot          on a device
//! publish (places, belief)            on the publisher's machine
//! cli                                 parse, run, print
//! ```
//!
//! All of them use `digest`, `error`, `progress`, `failpoint` and `sys`.

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
pub mod text;
pub mod transport;
pub mod trust;
