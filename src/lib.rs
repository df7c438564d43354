//! mosfs turns a list of OCI images into a signed, verified, running Linux system.
//!
//! Three pillars, and what stands on them. A module uses those below and to its left (`tests/architecture.rs` holds
//! the table):
//!
//! ```text
//! bytes    image <- mount                             what is read, and how it is shown
//! places   image <- transport <- store <- convert     where images come from and go to
//! belief   manifest <- trust <- floor                 what is believed, and why
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
