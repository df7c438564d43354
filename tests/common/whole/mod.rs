//! What the tests of the whole way share: images, builds, mounts, and what is seen of a tree.

#![allow(dead_code)]

pub mod commands;
pub mod debian;
pub mod layers;
pub mod scan;
pub mod system;
#[path = "../unmount.rs"]
pub mod unmount;
