//! The publisher's side: from an import manifest to a signed system.
//!
//! ```text
//! build.rs   import manifest -> images in a store, a signed system manifest
//! push.rs    a signed system to a registry
//! keys.rs    a set of keys and certificates for development
//! ```

pub mod build;
pub mod keys;
#[cfg(feature = "registry")]
pub mod push;
