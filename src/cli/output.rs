//! Printing: errors with advice, and answers.

use crate::error::AnyError;

/// Prints an error to stderr: one line of what and why, then advice.
pub fn report(error: &AnyError) {
    eprintln!("mosfs: {error}");
}
