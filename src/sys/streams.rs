//! The standard streams of this process, as descriptors.

use std::os::fd::{BorrowedFd, RawFd};

/// Standard input, output and errors.
pub fn standard() -> [BorrowedFd<'static>; 3] {
    // SAFETY: Rust's runtime opens those that are closed when the process starts, and nothing closes them.
    [libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO]
        .map(|number: RawFd| unsafe { BorrowedFd::borrow_raw(number) })
}
