//! Constructs errors.

use crate::image::LayerError;

/// Returns an error that names the table, the offset, and the expected and found values.
#[cold]
pub(super) fn corrupt(table: &'static str, offset: u64, why: impl Into<String>) -> LayerError {
    LayerError::Corrupt { table, offset, why: why.into() }
}
