//! Reading tar streams: ustar, GNU and PAX, as layers have them.
//!
//! ```text
//! header (512 bytes) | content, padded to 512 | header | …  | two blocks of zeros
//! ```
//!
//! Sources: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual,
//! "Basic Tar Format" and "Sparse Formats". Where readers differ, this one does what Go's
//! `archive/tar` does, since the tools that make layers are written in Go.
//!
//! A layer is hostile: every length is bounded before memory is taken, every number is checked,
//! and the reader takes each byte once and goes only forward.

use std::io::{self, Read};

/// Bytes of a header, and the unit of content.
const BLOCK: usize = 512;
/// The largest extended header or long name, in bytes (that of Go's `archive/tar`).
pub const MAX_SPECIAL_BYTES: u64 = 1 << 20;
/// The longest path, in bytes: Linux' PATH_MAX.
pub const MAX_PATH_BYTES: usize = 4096;
/// The most pieces of a sparse file.
pub const MAX_SPARSE_PIECES: usize = 1 << 20;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
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
pub struct Entry {
    /// The name as it is written: may begin with `/` or `./`, may hold `..`.
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
}

/// Why a tar stream cannot be read. Offsets are in the uncompressed stream.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The stream ends in the middle of something, or cannot be read or decompressed.
    #[error("tar: cannot read {what} at {offset}: {source}")]
    Read {
        /// What was being read.
        what: &'static str,
        /// Where, in bytes.
        offset: u64,
        /// The reader's or decompressor's answer.
        source: io::Error,
    },
    /// A header's checksum is wrong: this is no tar stream, or a damaged one.
    #[error("tar: the header at {offset} has a wrong checksum: expected {expected}, found {found}")]
    Checksum {
        /// Where the header is, in bytes.
        offset: u64,
        /// What the header says.
        expected: u64,
        /// What the header adds up to.
        found: u64,
    },
    /// A number is malformed or does not fit.
    #[error("tar: {field} of `{path}` is not a number that fits: `{found}`")]
    Number {
        /// The entry.
        path: String,
        /// Which field.
        field: &'static str,
        /// What is there.
        found: String,
    },
    /// Something is longer or more than what is read.
    #[error("tar: {what} at {offset} is {found}, more than the {max} allowed")]
    TooBig {
        /// What is too big.
        what: &'static str,
        /// Where the entry is, in bytes.
        offset: u64,
        /// How big it is.
        found: u64,
        /// The bound.
        max: u64,
    },
    /// An extended header makes no sense.
    #[error("tar: the extended header at {offset} is malformed: {why}")]
    Pax {
        /// Where it is, in bytes.
        offset: u64,
        /// What is wrong.
        why: String,
    },
    /// A sparse file's map makes no sense.
    #[error("tar: the map of the sparse file `{path}` is malformed: {why}")]
    Sparse {
        /// The entry.
        path: String,
        /// What is wrong.
        why: &'static str,
    },
    /// A kind of entry that a layer cannot have.
    #[error("tar: `{path}` is of the type `{found}`, which is not supported")]
    Type {
        /// The entry.
        path: String,
        /// The type byte.
        found: char,
    },
    /// A name with a NUL byte, or an empty one.
    #[error("tar: the entry at {offset} has an impossible name: `{found}`")]
    Name {
        /// Where the entry is, in bytes.
        offset: u64,
        /// The name.
        found: String,
    },
}

/// Bytes of a name for people.
pub fn show(name: &[u8]) -> String {
    name.escape_ascii().to_string()
}

/// A piece of a sparse file that has content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    offset: u64,
    len: u64,
}

/// A stretch of a file's content.
#[derive(Debug)]
pub enum Content<'a> {
    /// Bytes.
    Data(&'a [u8]),
    /// That many zeros, of a hole.
    Hole(u64),
}

/// Reads the entries of a tar stream.
pub struct TarReader<R> {
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
    path: Vec<u8>,
    buffer: Vec<u8>,
}

/// What headers before the entry's own say of it.
#[derive(Default)]
struct Special {
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Special {
    fn pax(&self, key: &[u8]) -> Option<&[u8]> {
        // The last one of a key counts; an empty value takes it away (POSIX pax).
        let found = self.pax.iter().rev().find(|(name, _)| name == key)?;
        (!found.1.is_empty()).then_some(&found.1)
    }
}

impl<R: Read> TarReader<R> {
    /// A reader of a stream from its start.
    pub fn new(from: R) -> Self {
        Self {
            from,
            offset: 0,
            content: 0,
            padding: 0,
            pieces: None,
            size: 0,
            path: Vec::new(),
            buffer: vec![0; 64 * 1024],
        }
    }

    /// How many bytes of the stream were read.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next entry, or `None` at the end. Content that was not read is skipped.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip("content")?;
        let mut special = Special::default();
        loop {
            let at = self.offset;
            let Some(header) = self.header()? else { return Ok(None) };
            check_sum(&header, at)?;
            let stored = number("size", b"", field(&header, 124, 12))?;
            let stored = u64::try_from(stored).ok().filter(|size| *size <= i64::MAX as u64);
            let Some(stored) = stored else {
                return Err(bad_number("size", cut(field(&header, 0, 100)), field(&header, 124, 12)));
            };
            match header[156] {
                b'x' | b'X' => special.pax = self.pax(at, stored)?,
                b'g' => {
                    let records = self.pax(at, stored)?;
                    // Go's reader passes over global headers, others apply them: refuse what would differ.
                    if let Some((key, _)) =
                        records.iter().find(|(key, _)| !matches!(key.as_slice(), b"comment" | b"charset"))
                    {
                        return Err(TarError::Pax { offset: at, why: format!("global `{}`", show(key)) });
                    }
                }
                b'L' => special.long_name = Some(self.long_name(at, stored)?),
                b'K' => special.long_link = Some(self.long_name(at, stored)?),
                // GNU: a volume label, no file.
                b'V' => {
                    self.expect(stored);
                    self.skip("volume label")?;
                }
                _ => return self.entry(at, &header, stored, special).map(Some),
            }
        }
    }

    /// Gives the content of the current file to `each`, piece by piece, holes included.
    pub fn content<E: From<TarError>>(
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
                    Err(error) => Err(error.into()),
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

    /// Reads one header; `None` at two blocks of zeros, or where the stream ends instead of them.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut header = [0; BLOCK];
        let mut zeros = 0;
        loop {
            // A stream may end without the blocks of zeros; in the middle of a block it may not.
            let got = self.read_some(&mut header[..1], "header");
            match got {
                Err(TarError::Read { source, .. }) if source.kind() == io::ErrorKind::UnexpectedEof => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
                Ok(_) => self.fill(&mut header[1..], "header")?,
            }
            if header.iter().any(|byte| *byte != 0) {
                return Ok(Some(header));
            }
            zeros += 1;
            if zeros == 2 {
                return Ok(None);
            }
        }
    }

    /// Reads the records of an extended header: `LENGTH KEY=VALUE\n` (POSIX pax).
    fn pax(&mut self, at: u64, size: u64) -> Result<Vec<(Vec<u8>, Vec<u8>)>, TarError> {
        let bytes = self.special("extended header", at, size)?;
        let bad = |why: &str| TarError::Pax { offset: at, why: why.into() };
        let mut records = Vec::new();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let space =
                rest.iter().take(20).position(|byte| *byte == b' ').ok_or_else(|| bad("no length"))?;
            let length = decimal(&rest[..space]).ok_or_else(|| bad("the length is not a number"))?;
            let length =
                usize::try_from(length).ok().filter(|length| *length <= rest.len() && *length > space + 1);
            let length = length.ok_or_else(|| bad("a record is longer than the header"))?;
            let record = rest[space + 1..length].strip_suffix(b"\n").ok_or_else(|| bad("no newline"))?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(|| bad("no `=`"))?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            if key.is_empty() {
                return Err(bad("an empty key"));
            }
            records.push((key.to_vec(), value.to_vec()));
            rest = &rest[length..];
        }
        Ok(records)
    }

    /// Reads the name in a GNU `L` or `K` entry; a NUL ends it.
    fn long_name(&mut self, at: u64, size: u64) -> Result<Vec<u8>, TarError> {
        Ok(cut(&self.special("long name", at, size)?).to_vec())
    }

    fn special(&mut self, what: &'static str, at: u64, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_SPECIAL_BYTES {
            return Err(TarError::TooBig { what, offset: at, found: size, max: MAX_SPECIAL_BYTES });
        }
        let mut bytes = vec![0; size as usize];
        self.expect(size);
        self.fill(&mut bytes, what)?;
        self.content = 0;
        self.skip(what)?;
        Ok(bytes)
    }

    fn entry(
        &mut self,
        at: u64,
        header: &[u8; BLOCK],
        stored: u64,
        special: Special,
    ) -> Result<Entry, TarError> {
        let kind_byte = header[156];
        let gnu = header[257..265] == *b"ustar  \0";
        let ustar = header[257..262] == *b"ustar" && !gnu;

        let mut path = match (special.pax(b"path"), &special.long_name) {
            (Some(path), _) => path.to_vec(),
            (None, Some(path)) => path.clone(),
            (None, None) => {
                let (prefix, name) = (cut(field(header, 345, 155)), cut(field(header, 0, 100)));
                if ustar && !prefix.is_empty() { [prefix, b"/", name].concat() } else { name.to_vec() }
            }
        };
        if let Some(name) = special.pax(b"GNU.sparse.name") {
            path = name.to_vec();
        }
        let link = match (special.pax(b"linkpath"), &special.long_link) {
            (Some(link), _) => link.to_vec(),
            (None, Some(link)) => link.clone(),
            (None, None) => cut(field(header, 157, 100)).to_vec(),
        };
        for name in [&path, &link] {
            if name.contains(&0) {
                return Err(TarError::Name { offset: at, found: show(name) });
            }
            if name.len() > MAX_PATH_BYTES {
                let (found, max) = (name.len() as u64, MAX_PATH_BYTES as u64);
                return Err(TarError::TooBig { what: "the length of a name", offset: at, found, max });
            }
        }
        if path.is_empty() {
            return Err(TarError::Name { offset: at, found: String::new() });
        }

        let device = || -> Result<(u32, u32), TarError> {
            let part = |name, offset| {
                let text = field(header, offset, 8);
                u32::try_from(number(name, &path, text)?).map_err(|_| bad_number(name, &path, text))
            };
            let (major, minor) = (part("major device number", 329)?, part("minor device number", 337)?);
            // What the kernel has room for, and squashfs too: 12 and 20 bits (linux/kdev_t.h, new_encode_dev).
            if major > 0xfff || minor > 0xf_ffff {
                return Err(bad_number("device number", &path, format!("{major}:{minor}").as_bytes()));
            }
            Ok((major, minor))
        };
        let kind = match kind_byte {
            // Before ustar a folder was a file whose name ends in a slash.
            b'0' | 0 if path.ends_with(b"/") => EntryKind::Directory,
            b'0' | 0 | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink(link),
            b'2' => EntryKind::Symlink(link),
            b'3' => device().map(|(major, minor)| EntryKind::CharDevice(major, minor))?,
            b'4' => device().map(|(major, minor)| EntryKind::BlockDevice(major, minor))?,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => return Err(TarError::Type { path: show(&path), found: other as char }),
        };

        let id = |name, key: &[u8], offset| {
            let text = special.pax(key).unwrap_or(field(header, offset, 8));
            let value = match special.pax(key) {
                Some(text) => decimal(text).map(i128::from),
                None => Some(number(name, &path, text)?),
            };
            value.and_then(|id| u32::try_from(id).ok()).ok_or_else(|| bad_number(name, &path, text))
        };
        let (uid, gid) = (id("uid", b"uid", 108)?, id("gid", b"gid", 116)?);
        let mtime = match special.pax(b"mtime") {
            Some(text) => seconds(text).ok_or_else(|| bad_number("mtime", &path, text))?,
            None => {
                let text = field(header, 136, 12);
                i64::try_from(number("mtime", &path, text)?).map_err(|_| bad_number("mtime", &path, text))?
            }
        };
        let mode = number("mode", &path, field(header, 100, 8))?;
        let mode = (mode & 0o7777) as u16;

        let mut xattrs: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        for (key, value) in &special.pax {
            let Some(name) = key.strip_prefix(b"SCHILY.xattr.") else { continue };
            if name.is_empty() || name.contains(&0) {
                return Err(TarError::Pax {
                    offset: at,
                    why: format!("the attribute name `{}`", show(name)),
                });
            }
            xattrs.retain(|(known, _)| known != name);
            xattrs.push((name.to_vec(), value.clone()));
        }
        let has_acls =
            special.pax.iter().any(|(key, value)| key.starts_with(b"SCHILY.acl.") && !value.is_empty());

        // Only files have content; what the size of others means differs among tools (as in Go's reader).
        let mut stored = if kind == EntryKind::File { stored } else { 0 };
        if let (EntryKind::File, Some(text)) = (&kind, special.pax(b"size")) {
            let size = decimal(text).filter(|size| *size <= i64::MAX as u64);
            stored = size.ok_or_else(|| bad_number("size", &path, text))?;
        }
        self.expect(stored);
        self.size = stored;
        self.path.clone_from(&path);
        if kind == EntryKind::File {
            if kind_byte == b'S' {
                self.gnu_sparse(at, header)?;
            } else {
                self.pax_sparse(at, &special)?;
            }
        }
        Ok(Entry { path, kind, mode, uid, gid, mtime, size: self.size, xattrs, has_acls })
    }

    /// The old GNU format: four pieces in the header, 21 in each extension block.
    fn gnu_sparse(&mut self, at: u64, header: &[u8; BLOCK]) -> Result<(), TarError> {
        let path = self.path.clone();
        let mut pieces = Vec::new();
        let mut take = |bytes: &[u8]| -> Result<(), TarError> {
            for entry in bytes.chunks_exact(24) {
                // An empty entry ends the list.
                if entry[0] == 0 || entry[12] == 0 {
                    break;
                }
                let part = |text| {
                    let value = number("sparse map", &path, text)?;
                    u64::try_from(value).map_err(|_| bad_number("sparse map", &path, text))
                };
                push_piece(&mut pieces, at, part(&entry[..12])?, part(&entry[12..])?)?;
            }
            Ok(())
        };
        take(&header[386..482])?;
        let mut more = header[482] != 0;
        while more {
            let mut block = [0; BLOCK];
            self.fill(&mut block, "sparse map")?;
            take(&block[..504])?;
            more = block[504] != 0;
        }
        let text = field(header, 483, 12);
        let size = u64::try_from(number("real size", &self.path, text)?)
            .map_err(|_| bad_number("real size", &self.path, text))?;
        self.set_pieces(pieces, size)
    }

    /// The formats 0.0, 0.1 and 1.0 in extended headers.
    fn pax_sparse(&mut self, at: u64, special: &Special) -> Result<(), TarError> {
        let path = show(&self.path);
        let bad = |why| TarError::Sparse { path: path.clone(), why };
        let get = |key: &[u8]| match special.pax(key) {
            Some(text) => decimal(text).map(Some).ok_or(bad("a number is malformed")),
            None => Ok(None),
        };
        let mut pieces = Vec::new();
        let size = if get(b"GNU.sparse.major")? == Some(1) && get(b"GNU.sparse.minor")? == Some(0) {
            // 1.0: the map stands before the content: decimal lines, padded to a block.
            let count = self.map_number(&path)?;
            if count > MAX_SPARSE_PIECES as u64 {
                let (found, max) = (count, MAX_SPARSE_PIECES as u64);
                return Err(TarError::TooBig { what: "the map of a sparse file", offset: at, found, max });
            }
            for _ in 0..count {
                let (offset, len) = (self.map_number(&path)?, self.map_number(&path)?);
                push_piece(&mut pieces, at, offset, len)?;
            }
            // To the end of the map's last block; content began on a block boundary.
            let used = self.size - self.content;
            let rest = used.next_multiple_of(BLOCK as u64) - used;
            if rest > self.content {
                return Err(bad("it is longer than the entry"));
            }
            let mut pad = [0; BLOCK];
            self.fill(&mut pad[..rest as usize], "sparse map")?;
            self.content -= rest;
            get(b"GNU.sparse.realsize")?
        } else if let Some(map) = special.pax(b"GNU.sparse.map") {
            let numbers: Option<Vec<u64>> = map.split(|byte| *byte == b',').map(decimal).collect();
            let numbers = numbers.filter(|all| all.len() % 2 == 0).ok_or(bad("a number is malformed"))?;
            for pair in numbers.chunks_exact(2) {
                push_piece(&mut pieces, at, pair[0], pair[1])?;
            }
            get(b"GNU.sparse.size")?
        } else if special.pax(b"GNU.sparse.numblocks").is_some() {
            let mut offset = None;
            for (key, value) in &special.pax {
                let number = || decimal(value).ok_or(bad("a number is malformed"));
                match (key.as_slice(), offset) {
                    (b"GNU.sparse.offset", None) => offset = Some(number()?),
                    (b"GNU.sparse.numbytes", Some(start)) => {
                        push_piece(&mut pieces, at, start, number()?)?;
                        offset = None;
                    }
                    (b"GNU.sparse.offset" | b"GNU.sparse.numbytes", _) => {
                        return Err(bad("it is out of order"));
                    }
                    _ => {}
                }
            }
            get(b"GNU.sparse.size")?
        } else {
            return Ok(());
        };
        self.set_pieces(pieces, size.ok_or(bad("there is no size"))?)
    }

    /// One line of a 1.0 map.
    fn map_number(&mut self, path: &str) -> Result<u64, TarError> {
        let mut text = Vec::with_capacity(20);
        loop {
            let bad = |why| TarError::Sparse { path: path.into(), why };
            if self.content == 0 {
                return Err(bad("it is longer than the entry"));
            }
            let mut byte = [0];
            self.fill(&mut byte, "sparse map")?;
            self.content -= 1;
            match byte[0] {
                b'\n' => return decimal(&text).ok_or(bad("a number is malformed")),
                _ if text.len() >= 20 => return Err(bad("a number is malformed")),
                digit => text.push(digit),
            }
        }
    }

    /// Takes a map after checking it against what is stored.
    fn set_pieces(&mut self, pieces: Vec<Piece>, size: u64) -> Result<(), TarError> {
        let bad = |why| TarError::Sparse { path: show(&self.path), why };
        let (mut end, mut stored) = (0u64, 0u64);
        for piece in &pieces {
            if piece.offset < end {
                return Err(bad("pieces overlap or are out of order"));
            }
            end = piece.offset.checked_add(piece.len).ok_or(bad("a piece ends beyond 2^64"))?;
            // `end` bounds the sum.
            stored += piece.len;
        }
        if end > size || size > i64::MAX as u64 {
            return Err(bad("a piece ends beyond the file"));
        }
        if stored != self.content {
            return Err(bad("the pieces do not add up to what is stored"));
        }
        (self.pieces, self.size) = (Some(pieces), size);
        Ok(())
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
    fn skip(&mut self, what: &'static str) -> Result<(), TarError> {
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
                Err(TarError::Read { source, .. })
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

    fn fill(&mut self, mut bytes: &mut [u8], what: &'static str) -> Result<(), TarError> {
        while !bytes.is_empty() {
            let got = self.read_some(bytes, what)?;
            bytes = &mut bytes[got..];
        }
        Ok(())
    }

    /// Reads at least one byte; the end of the stream is an error.
    fn read_some(&mut self, bytes: &mut [u8], what: &'static str) -> Result<usize, TarError> {
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
            return Err(TarError::Read { what, offset: self.offset, source });
        }
    }
}

fn push_piece(pieces: &mut Vec<Piece>, at: u64, offset: u64, len: u64) -> Result<(), TarError> {
    if pieces.len() >= MAX_SPARSE_PIECES {
        let (found, max) = (pieces.len() as u64 + 1, MAX_SPARSE_PIECES as u64);
        return Err(TarError::TooBig { what: "the map of a sparse file", offset: at, found, max });
    }
    pieces.push(Piece { offset, len });
    Ok(())
}

/// Checks the sum of a header's bytes, the field itself taken as blanks; old tools added signed bytes.
fn check_sum(header: &[u8; BLOCK], offset: u64) -> Result<(), TarError> {
    let text = field(header, 148, 8);
    let expected = u64::try_from(number("checksum", b"", text)?).unwrap_or(u64::MAX);
    let byte = |(place, byte): (usize, &u8)| if (148..156).contains(&place) { b' ' } else { *byte };
    let found: u64 = header.iter().enumerate().map(byte).map(u64::from).sum();
    let signed: i64 = header.iter().enumerate().map(byte).map(|byte| i64::from(byte as i8)).sum();
    if expected != found && i64::try_from(expected) != Ok(signed) {
        return Err(TarError::Checksum { offset, expected, found });
    }
    Ok(())
}

/// A field of a header; the places are constants within it.
fn field(header: &[u8; BLOCK], offset: usize, len: usize) -> &[u8] {
    &header[offset..offset + len]
}

/// The bytes before the first NUL.
fn cut(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number in a header: octal text, or GNU's base 256 where the first bit is set.
fn number(name: &'static str, path: &[u8], text: &[u8]) -> Result<i128, TarError> {
    let wrong = || bad_number(name, path, text);
    let Some((first, rest)) = text.split_first() else { return Ok(0) };
    if first & 0x80 != 0 {
        // At most 12 bytes: 95 bits and a sign, the second bit of the first byte.
        let start = i128::from(first & 0x3f) - i128::from(first & 0x40);
        return Ok(rest.iter().fold(start, |sum, byte| sum << 8 | i128::from(*byte)));
    }
    let text = cut(text).trim_ascii();
    if text.is_empty() {
        return Ok(0);
    }
    let digits = text.iter().all(|digit| (b'0'..=b'7').contains(digit));
    // 12 digits of 3 bits fit.
    digits.then(|| text.iter().fold(0, |sum, digit| sum << 3 | i128::from(digit - b'0'))).ok_or_else(wrong)
}

/// Decimal digits and nothing else.
fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds of a PAX time, `[-]SECONDS[.FRACTION]`, rounded down.
fn seconds(text: &[u8]) -> Option<i64> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let whole = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let down = negative && fraction.iter().any(|digit| *digit != b'0');
    if negative { (-whole).checked_sub(i64::from(down)) } else { Some(whole) }
}

fn bad_number(field: &'static str, path: &[u8], found: &[u8]) -> TarError {
    TarError::Number { path: show(path), field, found: show(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number("x", b"", b"0000644\0").unwrap(), 0o644);
        assert_eq!(number("x", b"", b"   644 \0").unwrap(), 0o644);
        assert_eq!(number("x", b"", b"\0\0\0\0").unwrap(), 0);
        assert_eq!(number("x", b"", b"\x80\0\0\0\0\x40\0\0").unwrap(), 0x40_0000);
        assert_eq!(number("x", b"", &[0xff; 12]).unwrap(), -1);
        assert!(number("x", b"", b"0009\0").is_err());
        assert!(number("x", b"", b"-1\0").is_err());
    }

    #[test]
    fn times_are_rounded_down() {
        for (text, expected) in [
            ("0", 0),
            ("1.9", 1),
            ("-1", -1),
            ("-1.0", -1),
            ("-1.5", -2),
            ("-0.1", -1),
            ("12345678901.5", 12345678901),
        ] {
            assert_eq!(seconds(text.as_bytes()), Some(expected), "{text}");
        }
        for bad in ["", "-", "1.x", "1e5", "--1", "99999999999999999999"] {
            assert_eq!(seconds(bad.as_bytes()), None, "{bad}");
        }
    }
}
