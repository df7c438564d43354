//! What several test programs share. Each file is one area; a test program uses what it needs.

#![allow(dead_code)]

pub mod commands;
pub mod debian;
pub mod layers;
pub mod system;
pub mod tree;
