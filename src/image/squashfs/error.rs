//! Making errors.

use crate::image::LayerError;

/// An error that names the table, the offset and what was expected and found.
#[cold]
pub(super) fn corrupt(table: &'static str, offset: u64, why: impl Into<String>) -> LayerError {
    LayerError::Corrupt { table, offset, why: why.into() }
}
