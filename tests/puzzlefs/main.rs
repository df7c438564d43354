//! PuzzleFS images: those of another tool, hostile ones, and our own.

#[path = "../common/layout.rs"]
mod layout;
#[path = "../common/tools.rs"]
#[allow(dead_code)]
mod tools;

mod dump;
mod images;
mod message;
mod others;
mod own;
mod refused;
