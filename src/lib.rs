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

// Until the face below is drawn.
#![cfg_attr(not(feature = "internals"), allow(dead_code, unused_imports))]

mod boot;
mod cli;
mod convert;
mod deploy;
mod digest;
mod error;
mod failpoint;
mod floor;
mod image;
mod manifest;
mod mount;
mod progress;
mod publish;
mod store;
#[allow(unsafe_code)]
mod sys;
mod text;
mod transport;
mod trust;

/// The entries of the two programs, `mosfs` and `mosfs-full`.
#[doc(hidden)]
pub mod programs {
    pub use crate::cli::main as mosfs_full;
    pub use crate::cli::start::main as mosfs;
}

/// All modules, for the tests, benches and fuzz targets of this package. It promises nothing to others.
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals {
    macro_rules! modules {
        ($($name:ident)*) => {
            $(pub mod $name {
                pub use crate::$name::*;
            })*
        };
    }

    modules! {
        boot cli convert deploy digest error failpoint floor image manifest mount progress publish store sys text
        transport trust
    }
}
