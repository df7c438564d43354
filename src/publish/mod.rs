//! The publisher's side: from an import manifest to a signed system.
//!
//! ```text
//! build.rs   import manifest -> images in a store, a signed system manifest
//! ```

pub mod build;
