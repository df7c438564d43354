//! A list of what a program reads of an image, in order, recorded by `mosfs trace`.
//!
//! ```text
//! {"format":1,"blobs":["sha256:…",…],"reads":[[BLOB,OFFSET,LENGTH],…]}      in bytes; BLOB counts from 0
//! ```
//! In a registry it is the only layer of an artifact of type [`LIST_TYPE`] whose `subject` is the image.
//!
//! Rule: a list is a hint. It says what to fetch first, and nothing else depends on it: nobody signs it, what it names
//! is verified as everything is, and what does not fit the image is left out. It is bounded in size
//! ([`MAX_LIST_BYTES`]), in entries ([`MAX_READS`]), and in what is fetched for it ([`MAX_FETCHED`]).

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// The artifact type of a list.
pub const LIST_TYPE: &str = "application/vnd.mos.read-list.v1";
/// The largest list that is read, in bytes.
pub const MAX_LIST_BYTES: u64 = 2 << 20;
/// The most reads of a list.
const MAX_READS: usize = 65_536;
/// The most bytes that are fetched for a list.
const MAX_FETCHED: u64 = 256 << 20;
/// Reads closer than this are one, in bytes: a request costs more than the bytes between.
const GAP: u64 = 64 << 10;

/// A list of reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReadList {
    format: u32,
    blobs: Vec<Digest>,
    reads: Vec<(usize, u64, u64)>,
}

/// A part of a blob, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListedRead {
    /// The blob.
    pub blob: Digest,
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

/// Why a list cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// It is longer than what is read.
    #[error("the list has {found} bytes, expected at most {MAX_LIST_BYTES}")]
    TooLong {
        /// Its size.
        found: usize,
    },
    /// It is not a list.
    #[error("it is not a list of reads: {0}")]
    Malformed(String),
}

impl ReadList {
    /// The list of reads in this order. Those that are close to an earlier one become part of it.
    pub fn of(reads: impl IntoIterator<Item = ListedRead>) -> Self {
        let mut list = Self { format: 1, blobs: Vec::new(), reads: Vec::new() };
        for ListedRead { blob, offset, len } in reads {
            let index = list.blobs.iter().position(|known| *known == blob).unwrap_or_else(|| {
                list.blobs.push(blob);
                list.blobs.len() - 1
            });
            let end = offset.saturating_add(len);
            // The latest first: reads that belong together follow each other.
            let near = list.reads.iter().rposition(|(other, begin, len)| {
                *other == index
                    && offset <= begin.saturating_add(*len).saturating_add(GAP)
                    && *begin <= end.saturating_add(GAP)
            });
            if let Some((_, begin, len)) = near.and_then(|at| list.reads.get_mut(at)) {
                let last = begin.saturating_add(*len).max(end);
                *begin = (*begin).min(offset);
                *len = last - *begin;
            } else if list.reads.len() < MAX_READS {
                list.reads.push((index, offset, len));
            } else {
                break;
            }
        }
        list
    }

    /// Reads a list of others.
    ///
    /// # Errors
    /// [`ListError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ListError> {
        if bytes.len() as u64 > MAX_LIST_BYTES {
            return Err(ListError::TooLong { found: bytes.len() });
        }
        let list: Self =
            serde_json::from_slice(bytes).map_err(|error| ListError::Malformed(error.to_string()))?;
        if list.format != 1 {
            return Err(ListError::Malformed(format!("format {}, expected 1", list.format)));
        }
        if list.reads.len() > MAX_READS {
            return Err(ListError::Malformed(format!(
                "{} reads, expected at most {MAX_READS}",
                list.reads.len()
            )));
        }
        Ok(list)
    }

    /// The bytes that are stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Numbers and digests: serializing cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// The reads of blobs that it lists, at most [`MAX_FETCHED`] bytes of them.
    pub fn reads(&self) -> impl Iterator<Item = ListedRead> + '_ {
        let mut left = MAX_FETCHED;
        self.reads
            .iter()
            .filter_map(|(index, offset, len)| {
                Some(ListedRead { blob: *self.blobs.get(*index)?, offset: *offset, len: *len })
            })
            .take_while(move |read| {
                let fits = read.len <= left;
                left = left.saturating_sub(read.len);
                fits
            })
    }

    /// How many bytes it lists.
    pub fn bytes(&self) -> u64 {
        self.reads.iter().map(|(_, _, len)| *len).fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(blob: &[u8], offset: u64, len: u64) -> ListedRead {
        ListedRead { blob: Digest::of(blob), offset, len }
    }

    #[test]
    fn reads_that_are_close_are_one() {
        let list = ReadList::of([
            read(b"a", 0, 4096),
            read(b"b", 0, 4096),
            read(b"a", 1 << 20, 100),
            read(b"a", 8192, 4096),
            read(b"a", (1 << 20) + 100, 50),
        ]);
        let found: Vec<_> = list.reads().collect();
        assert_eq!(found, [read(b"a", 0, 12288), read(b"b", 0, 4096), read(b"a", 1 << 20, 150)]);
        assert_eq!(list.bytes(), 12288 + 4096 + 150);
        assert_eq!(ReadList::parse(&list.to_bytes()).unwrap(), list);
    }

    #[test]
    fn a_list_of_others_is_bounded_and_fits_or_is_left_out() {
        let bad = |text: &str| ReadList::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(bad("").contains("not a list"));
        assert!(bad(r#"{"format":2,"blobs":[],"reads":[]}"#).contains("format 2"));
        assert!(bad(r#"{"format":1,"blobs":[],"reads":[[0,-1,1]]}"#).contains("not a list"));
        assert!(bad(&" ".repeat(MAX_LIST_BYTES as usize + 1)).contains("expected at most"));
        let many = vec!["[0,0,1]"; MAX_READS + 1].join(",");
        assert!(bad(&format!(r#"{{"format":1,"blobs":[],"reads":[{many}]}}"#)).contains("65537 reads"));
        // A blob that it does not list, and lengths beyond all measure.
        let list = format!(
            r#"{{"format":1,"blobs":["{}"],"reads":[[7,0,1],[0,1,2],[0,0,18446744073709551615],[0,5,5]]}}"#,
            Digest::of(b"a")
        );
        let list = ReadList::parse(list.as_bytes()).unwrap();
        assert_eq!(list.reads().collect::<Vec<_>>(), [read(b"a", 1, 2)]);
        assert_eq!(list.bytes(), u64::MAX);
    }
}
