//! Helpers that test files share. Not every file uses all of them.
#![allow(dead_code)]

pub mod swtpm;
