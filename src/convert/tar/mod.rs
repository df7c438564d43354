//! Reading tar streams as GNU tar reads them: v7, ustar, star, GNU and PAX.
//!
//! ```text
//! header (512 bytes) | content, padded to 512 | header | …  | two blocks of zeros
//! ```
//! ```text
//! field.rs   numbers and checksums
//! pax.rs     the records of extended headers
//! sparse.rs  the maps of sparse files
//! error.rs   what can be wrong, with the entry's name
//! ```
//!
//! Sources: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual,
//! "Basic Tar Format" and "Sparse Formats"; star(5). The magic bytes tell the dialects apart:
//!
//! | at 257 | dialect | name | device numbers, sparse files of the type `S` |
//! | --- | --- | --- | --- |
//! | `ustar\0` | ustar, PAX | prefix/name | yes; none |
//! | `ustar\0`, 475 a NUL, times at 476 and 488 | star | prefix/name | yes; star's map |
//! | `ustar  \0` | GNU | name | yes; GNU's map |
//! | anything else | v7 | name | none; none |
//!
//! Records of extended headers win over the names that GNU's `L` and `K` entries have, and these win over the
//! header's own. Unknown keys are passed over. Names of owners are of another machine and do not count.
//!
//! A layer is hostile: every length is bounded before memory is taken, every number is checked,
//! and the reader takes each byte once and goes only forward.

mod error;
mod field;
mod pax;
mod sparse;

use std::io::{self, Read};

use error::TarPosition;
pub use error::{Problem, TarError};

use self::field::{bad_number, check_sum, cut, decimal, field, number, seconds};
use self::pax::{Global, Record, Records};
use self::sparse::Piece;

/// Bytes of a header, and the unit of content.
const BLOCK: usize = 512;
/// The largest extended header or long name, in bytes (that of Go's `archive/tar`).
pub(super) const MAX_SPECIAL_BYTES: u64 = 1 << 20;
/// The longest path, in bytes: Linux' PATH_MAX.
pub(super) const MAX_PATH_BYTES: usize = 4096;
/// The most pieces of a sparse file.
pub(super) const MAX_SPARSE_PIECES: usize = 1 << 20;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum EntryKind {
    /// A regular file.
    File,
    /// A folder.
    Directory,
    /// A symbolic link, with its target.
    Symlink(Vec<u8>),
    /// Another name of an earlier file, with that name.
    HardLink(Vec<u8>),
    /// A character device.
    CharDevice(u32, u32),
    /// A block device.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

/// One entry of a tar stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// The name as it is written: may be empty, may begin with `/` or `./`, may hold `..`.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u16,
    /// Owner, by number. Names of owners are of another machine and do not count.
    pub uid: u32,
    /// Group, by number.
    pub gid: u32,
    /// Seconds since 1970, rounded down.
    pub mtime: i64,
    /// Size of a regular file with its holes, in bytes; 0 for others.
    pub size: u64,
    /// Extended attributes with their full names, in the order of the stream.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Whether the entry has POSIX access control lists in star's text form.
    pub has_acls: bool,
    /// What was passed over or read as something else, for people.
    pub notes: Vec<String>,
}

/// Bytes of a name for people.
pub(super) fn show(name: &[u8]) -> String {
    name.escape_ascii().to_string()
}

/// A stretch of a file's content.
#[derive(Debug)]
pub(super) enum Content<'a> {
    /// Bytes.
    Data(&'a [u8]),
    /// That many zeros, of a hole.
    Hole(u64),
}

/// Reads the entries of a tar stream.
pub(super) struct TarReader<R> {
    from: R,
    /// Bytes read so far.
    offset: u64,
    /// Bytes of content of the current entry that are still in the stream.
    content: u64,
    /// Padding after that content.
    padding: u64,
    /// Where the pieces of the current file are; `None`: all of it, in one.
    pieces: Option<Vec<Piece>>,
    size: u64,
    global: Global,
    /// Where the reader is, for errors.
    place: TarPosition,
    notes: Vec<String>,
    buffer: Vec<u8>,
}

/// What headers before the entry's own say of it.
#[derive(Default)]
struct Special {
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: Vec<Record>,
}

/// Who wrote a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl Dialect {
    fn of(header: &[u8; BLOCK]) -> Self {
        let is_digit = |at: usize| (b'0'..=b'7').contains(&header[at]);
        match (field(header, 257, 6), field(header, 263, 2)) {
            (b"ustar\0", _) => {
                let times = is_digit(476) && header[487] == b' ' && is_digit(488) && header[499] == b' ';
                if header[475] == 0 && times { Self::Star } else { Self::Ustar }
            }
            (b"ustar ", b" \0") => Self::Gnu,
            _ => Self::V7,
        }
    }
}

impl<R: Read> TarReader<R> {
    /// A reader of a stream from its start.
    pub(super) fn new(from: R) -> Self {
        Self {
            from,
            offset: 0,
            content: 0,
            padding: 0,
            pieces: None,
            size: 0,
            global: Global::default(),
            place: TarPosition::Header { offset: 0, after: None },
            notes: Vec::new(),
            buffer: vec![0; 64 * 1024],
        }
    }

    /// How many bytes of the stream were read.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// What was odd about the stream as a whole, for people.
    pub(super) fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// Makes an error of what is wrong at the current place.
    pub(super) fn fail(&self, problem: Problem) -> TarError {
        TarError { place: self.place.clone(), problem }
    }

    /// The next entry, or `None` at the end. Content that was not read is skipped.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        self.read_entry().map_err(|problem| self.fail(problem))
    }

    fn read_entry(&mut self) -> Result<Option<Entry>, Problem> {
        self.skip("content")?;
        let after = match std::mem::replace(&mut self.place, TarPosition::Header { offset: 0, after: None }) {
            TarPosition::Entry(path) => Some(path),
            TarPosition::Header { after, .. } => after,
        };
        let mut special = Special::default();
        loop {
            self.place = TarPosition::Header { offset: self.offset, after: after.clone() };
            let Some(header) = self.header()? else { return Ok(None) };
            check_sum(&header)?;
            let stored = || {
                let text = field(&header, 124, 12);
                let size = u64::try_from(number("size", text)?).ok().filter(|size| *size <= i64::MAX as u64);
                size.ok_or_else(|| bad_number("size", text))
            };
            match header[156] {
                // `X` is Solaris' name for it.
                b'x' | b'X' => special.pax = self.pax(stored()?)?,
                b'g' => {
                    let records = self.pax(stored()?)?;
                    self.global.add(records)?;
                }
                b'L' => special.long_name = Some(self.long_name(stored()?)?),
                b'K' => special.long_link = Some(self.long_name(stored()?)?),
                // GNU: a volume label, no file. It is read like one all the same, and takes what was said before it.
                b'V' => {
                    let stored = stored()?;
                    self.entry(&header, stored, std::mem::take(&mut special))?;
                    self.skip("a volume label")?;
                }
                // A hard link has no content, whatever its size says.
                b'1' => return self.entry(&header, 0, special).map(Some),
                _ => {
                    let stored = stored()
                        .inspect_err(|_| self.place = TarPosition::Entry(cut(&header[..100]).to_vec()))?;
                    return self.entry(&header, stored, special).map(Some);
                }
            }
        }
    }

    /// Gives the content of the current file to `each`, piece by piece, holes included.
    pub(super) fn content<E: From<TarError>>(
        &mut self,
        mut each: impl FnMut(Content<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let pieces = self.pieces.take();
        let whole = [Piece { offset: 0, len: self.size }];
        let mut at = 0;
        for piece in pieces.as_deref().unwrap_or(&whole) {
            if piece.offset > at {
                each(Content::Hole(piece.offset - at))?;
            }
            let mut left = piece.len;
            while left > 0 {
                let want = left.min(self.buffer.len() as u64) as usize;
                let mut buffer = std::mem::take(&mut self.buffer);
                let got = self.read_some(&mut buffer[..want], "content");
                let result = match got {
                    Ok(got) => each(Content::Data(&buffer[..got])).map(|()| got),
                    Err(problem) => Err(self.fail(problem).into()),
                };
                self.buffer = buffer;
                let got = result? as u64;
                self.content = self.content.saturating_sub(got);
                left -= got;
            }
            at = piece.offset + piece.len;
        }
        if self.size > at {
            each(Content::Hole(self.size - at))?;
        }
        self.size = 0;
        Ok(())
    }

    /// Reads one header; `None` at a block of zeros, or where the stream ends instead of it.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, Problem> {
        let Some(header) = self.block()? else { return Ok(None) };
        if header.iter().any(|byte| *byte != 0) {
            return Ok(Some(header));
        }
        // Two blocks of zeros are the end. GNU tar takes a lone one for it too, and says so.
        let at = self.offset - BLOCK as u64;
        if self.block()?.is_some_and(|second| second.iter().any(|byte| *byte != 0)) {
            self.notes
                .push(format!("a lone block of zeros at {at} ends the archive; what follows it is not read"));
        }
        Ok(None)
    }

    /// Reads a block; `None` where the stream ends before it. In the middle of a block it may not.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, Problem> {
        let mut block = [0; BLOCK];
        match self.read_some(&mut block[..1], "a header") {
            Err(Problem::Read { source, .. }) if source.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(problem) => Err(problem),
            Ok(_) => self.fill(&mut block[1..], "a header").map(|()| Some(block)),
        }
    }

    /// Reads the records of an extended header.
    fn pax(&mut self, size: u64) -> Result<Vec<Record>, Problem> {
        pax::records(&self.special("an extended header", size)?)
    }

    /// Reads the name in a GNU `L` or `K` entry; a NUL ends it.
    fn long_name(&mut self, size: u64) -> Result<Vec<u8>, Problem> {
        Ok(cut(&self.special("a long name", size)?).to_vec())
    }

    fn special(&mut self, what: &'static str, size: u64) -> Result<Vec<u8>, Problem> {
        if size > MAX_SPECIAL_BYTES {
            return Err(Problem::TooBig { what, found: size, max: MAX_SPECIAL_BYTES });
        }
        let mut bytes = vec![0; size as usize];
        self.expect(size);
        self.fill(&mut bytes, what)?;
        self.content = 0;
        self.skip(what)?;
        Ok(bytes)
    }

    fn entry(&mut self, header: &[u8; BLOCK], stored: u64, special: Special) -> Result<Entry, Problem> {
        let kind_byte = header[156];
        let dialect = Dialect::of(header);
        let global = std::mem::take(&mut self.global);
        let records = Records { global: &global, own: &special.pax };
        let result = self.describe(header, kind_byte, dialect, stored, &special, records);
        self.global = global;
        result
    }

    fn describe(
        &mut self,
        header: &[u8; BLOCK],
        kind_byte: u8,
        dialect: Dialect,
        stored: u64,
        special: &Special,
        records: Records<'_>,
    ) -> Result<Entry, Problem> {
        let path = match (records.get(b"path"), &special.long_name) {
            (Some(path), _) => path.to_vec(),
            (None, Some(path)) => path.clone(),
            (None, None) => {
                let (prefix, name) = (cut(field(header, 345, 155)), cut(field(header, 0, 100)));
                let posix = matches!(dialect, Dialect::Ustar | Dialect::Star);
                if posix && !prefix.is_empty() { [prefix, b"/", name].concat() } else { name.to_vec() }
            }
        };
        let path = records.get(b"GNU.sparse.name").map_or(path, <[u8]>::to_vec);
        self.place = TarPosition::Entry(path.clone());
        let link = match (records.get(b"linkpath"), &special.long_link) {
            (Some(link), _) => link.to_vec(),
            (None, Some(link)) => link.clone(),
            (None, None) => cut(field(header, 157, 100)).to_vec(),
        };
        for name in [&path, &link] {
            if name.contains(&0) {
                return Err(Problem::Name { found: show(name) });
            }
            if name.len() > MAX_PATH_BYTES {
                let (found, max) = (name.len() as u64, MAX_PATH_BYTES as u64);
                return Err(Problem::TooBig { what: "the length of a name", found, max });
            }
        }
        let mut notes = Vec::new();
        let kind = match kind_byte {
            // Before ustar a folder was a file whose name ends in a slash.
            b'0' | 0 | b'7' if path.ends_with(b"/") => EntryKind::Directory,
            b'0' | 0 | b'7' | b'S' | b'V' => EntryKind::File,
            b'1' => EntryKind::HardLink(link),
            b'2' => EntryKind::Symlink(link),
            b'3' | b'4' => {
                let (major, minor) = if dialect == Dialect::V7 { (0, 0) } else { device(header)? };
                match kind_byte {
                    b'3' => EntryKind::CharDevice(major, minor),
                    _ => EntryKind::BlockDevice(major, minor),
                }
            }
            // `D`: a folder of an incremental archive, with a list of names for content.
            b'5' | b'D' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            b'M' => return Err(Problem::Type { found: 'M' }),
            // POSIX: a type that is not known is extracted as a regular file.
            other => {
                notes.push(format!(
                    "the type `{}` is unknown, the entry is taken for a regular file",
                    show(&[other])
                ));
                EntryKind::File
            }
        };

        let id = |name, key: &[u8], offset| {
            // Also where a record says better: GNU tar reads the header first, and complains of it.
            let text = field(header, offset, 8);
            let value = number(name, text)?;
            let (text, value) = match records.get(key) {
                Some(text) => (text, decimal(text).map(i128::from)),
                None => (text, Some(value)),
            };
            value.and_then(|id| u32::try_from(id).ok()).ok_or_else(|| bad_number(name, text))
        };
        let (uid, gid) = (id("uid", b"uid", 108)?, id("gid", b"gid", 116)?);
        let text = field(header, 136, 12);
        let mtime = i64::try_from(number("mtime", text)?).map_err(|_| bad_number("mtime", text))?;
        let mtime = match records.get(b"mtime") {
            Some(text) => seconds(text).ok_or_else(|| bad_number("mtime", text))?,
            None => mtime,
        };
        let mode = (number("mode", field(header, 100, 8))? & 0o7777) as u16;
        let xattrs = records.xattrs()?;
        notes.extend(
            records
                .libarchive_only()
                .map(|name| format!("the attribute {} in libarchive's own form is dropped", show(name))),
        );

        // Only files have content; what the size of others means differs among tools (as in Go's reader).
        let mut stored = if kind == EntryKind::File || kind_byte == b'D' { stored } else { 0 };
        if let (EntryKind::File, Some(text)) = (&kind, records.get(b"size")) {
            let size = decimal(text).filter(|size| *size <= i64::MAX as u64);
            stored = size.ok_or_else(|| bad_number("size", text))?;
        }
        self.expect(stored);
        if kind == EntryKind::File {
            self.size = stored;
            match (kind_byte, dialect) {
                (b'S', Dialect::Gnu) => self.gnu_sparse(header)?,
                (b'S', Dialect::Star) => self.star_sparse(header)?,
                _ => self.pax_sparse(records)?,
            }
        }
        let has_acls = records.has_acls();
        Ok(Entry { path, kind, mode, uid, gid, mtime, size: self.size, xattrs, has_acls, notes })
    }

    /// From here on `size` bytes of content follow, and their padding.
    fn expect(&mut self, size: u64) {
        self.content = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        self.pieces = None;
        self.size = 0;
    }

    /// Passes over what is left of the current entry.
    ///
    /// A stream may end where padding should be: `umoci insert` writes such layers, and Go reads them.
    fn skip(&mut self, what: &'static str) -> Result<(), Problem> {
        let (mut left, padding) = (self.content + self.padding, self.padding);
        (self.content, self.padding, self.pieces, self.size) = (0, 0, None, 0);
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut result = Ok(());
        while left > 0 && result.is_ok() {
            let want = left.min(buffer.len() as u64) as usize;
            result = match self.read_some(&mut buffer[..want], what) {
                Ok(got) => {
                    left -= got as u64;
                    Ok(())
                }
                Err(Problem::Read { source, .. })
                    if source.kind() == io::ErrorKind::UnexpectedEof && left <= padding =>
                {
                    break;
                }
                Err(error) => Err(error),
            };
        }
        self.buffer = buffer;
        result
    }

    fn fill(&mut self, mut bytes: &mut [u8], what: &'static str) -> Result<(), Problem> {
        while !bytes.is_empty() {
            let got = self.read_some(bytes, what)?;
            bytes = &mut bytes[got..];
        }
        Ok(())
    }

    /// Reads at least one byte; the end of the stream is an error.
    fn read_some(&mut self, bytes: &mut [u8], what: &'static str) -> Result<usize, Problem> {
        loop {
            let source = match self.from.read(bytes) {
                Ok(0) => io::Error::new(io::ErrorKind::UnexpectedEof, "the stream ends there"),
                Ok(got) => {
                    self.offset += got as u64;
                    return Ok(got);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // A decompressor says so when its own input is cut off: never a clean end.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    io::Error::new(io::ErrorKind::InvalidData, error)
                }
                Err(error) => error,
            };
            return Err(Problem::Read { what, offset: self.offset, source });
        }
    }
}

/// Whether bytes begin with a header of a tar stream, or with the blocks that end it.
pub(super) fn begins(head: &[u8]) -> bool {
    let Some(Ok(header)) = head.get(..BLOCK).map(<&[u8; BLOCK]>::try_from) else { return false };
    header.iter().all(|byte| *byte == 0) || check_sum(header).is_ok()
}

/// The numbers of a device node.
fn device(header: &[u8; BLOCK]) -> Result<(u32, u32), Problem> {
    let part = |name, offset| {
        let text = field(header, offset, 8);
        u32::try_from(number(name, text)?).map_err(|_| bad_number(name, text))
    };
    let (major, minor) = (part("major device number", 329)?, part("minor device number", 337)?);
    // What the kernel has room for, and squashfs too: 12 and 20 bits (linux/kdev_t.h, new_encode_dev).
    if major > 0xfff || minor > 0xf_ffff {
        return Err(bad_number("device number", format!("{major}:{minor}").as_bytes()));
    }
    Ok((major, minor))
}
