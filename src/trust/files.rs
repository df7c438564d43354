//! Files that are read whole.

use std::io::Read;
use std::path::Path;

use crate::error::{IoContext, IoError};

/// Reads an open file whole, or one byte more than `max` of it.
pub(crate) fn read_at_most(file: impl Read, path: &Path, max: usize) -> Result<Vec<u8>, IoError> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_end(&mut bytes).on("read", path)?;
    Ok(bytes)
}
