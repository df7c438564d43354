//! The only module with `unsafe`: thin, safe wrappers of system calls and CPU instructions.
//!
//! Each wrapper returns `io::Result`, owns what it opens (`OwnedFd`), and has a SAFETY line on
//! each `unsafe` block. Nothing here knows of mosfs' formats.

pub mod atomic;
pub mod file;
pub mod process;
pub mod sha256;
