//! Why a tar stream cannot be read.

use std::fmt;
use std::io;

use super::show;

/// Why a tar stream cannot be read, and where.
#[derive(Debug, thiserror::Error)]
#[error("tar: {place}: {problem}")]
pub struct TarError {
    /// Where in the stream.
    pub place: TarPosition,
    /// What is wrong there.
    #[source]
    pub problem: Problem,
}

/// Where in a stream. Offsets are in the uncompressed stream, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarPosition {
    /// At an entry of that name.
    Entry(Vec<u8>),
    /// At a header whose entry is not known yet.
    Header {
        /// Where the header begins.
        offset: u64,
        /// The name of the entry before it, if there is one.
        after: Option<Vec<u8>>,
    },
}

impl fmt::Display for TarPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entry(path) => write!(f, "`{}`", show(path)),
            Self::Header { offset, after: None } => write!(f, "the header at {offset}"),
            Self::Header { offset, after: Some(path) } => {
                write!(f, "the header at {offset}, behind `{}`", show(path))
            }
        }
    }
}

/// What is wrong with a tar stream.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The stream ends in the middle of something, or cannot be read or decompressed.
    #[error("cannot read {what} at {offset}: {source}")]
    Read {
        /// What was being read.
        what: &'static str,
        /// Where, in bytes.
        offset: u64,
        /// The reader's or decompressor's answer.
        source: io::Error,
    },
    /// A header's checksum is wrong: this is no tar stream, or a damaged one.
    #[error("the header has a wrong checksum: it says `{expected}`, its bytes add up to {found:o} (octal)")]
    Checksum {
        /// What the header says.
        expected: String,
        /// What the header adds up to.
        found: u64,
    },
    /// A number is malformed or does not fit.
    #[error("{field} is not a number that fits: `{found}`")]
    Number {
        /// Which field.
        field: &'static str,
        /// What is there.
        found: String,
    },
    /// Something is longer or more than what is read.
    #[error("{what} is {found}, more than the {max} allowed")]
    TooBig {
        /// What is too big.
        what: &'static str,
        /// How big it is.
        found: u64,
        /// The bound.
        max: u64,
    },
    /// An extended header makes no sense.
    #[error("the extended header is malformed: {why}")]
    Pax {
        /// What is wrong.
        why: String,
    },
    /// A sparse file's map makes no sense.
    #[error("the map of the sparse file is malformed: {why}")]
    Sparse {
        /// What is wrong.
        why: &'static str,
    },
    /// A kind of entry that a layer cannot have.
    #[error("the entry is of the type `{found}`, a part of a file that is continued from another volume")]
    Type {
        /// The type byte.
        found: char,
    },
    /// A name with a NUL byte.
    #[error("the entry has an impossible name: `{found}`")]
    Name {
        /// The name.
        found: String,
    },
}
