//! Printing: errors with advice, and answers.

use crate::error::AnyError;
use crate::trust::floor::{FloorError, KeyError};

/// Prints an error to stderr: one line of what and why, then advice.
pub fn report(error: &AnyError) {
    eprintln!("mosfs: {error}");
    if let Some(advice) = floor_advice(error) {
        eprintln!("mosfs: {advice}");
    }
}

/// What to do about an error of the floor, wherever in the chain it is.
fn floor_advice(error: &AnyError) -> Option<&'static str> {
    let mut cause = Some(error.inner());
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<FloorError>() {
            return super::floor::advice(error);
        }
        if let Some(KeyError::Exposed { .. }) = error.downcast_ref::<KeyError>() {
            return Some("chmod 600 the key");
        }
        cause = error.source();
    }
    None
}
