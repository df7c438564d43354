//! The publisher's side: from an import manifest to a signed system.
//!
//! ```text
//! boot/      the target `boot`: kernel, initramfs and loader out of the hostfs image
//! base.rs    what a new system shares with an earlier one
//! build.rs   import manifest -> images in a store, a signed system manifest
//! halves.rs  the same in two halves, with the keys elsewhere
//! kernels.rs what the kernels of the new system cannot mount of it
//! keys.rs    a set of keys and certificates for development
//! ```

pub mod base;
pub mod boot;
pub mod build;
pub mod halves;
pub mod kernels;
pub mod keys;
