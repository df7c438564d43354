//! What inodes lead to but for names: the parts of files and the chunks that they lie in, and the numbers of devices.

use super::inodes::{NONE, Tag, index, lists};
use super::message::{List, Message, Struct};
use super::{MAX_CHUNK_BYTES, corrupt};
use crate::digest::Digest;
use crate::image::LayerError;
use crate::image::chunked::Chunks;
use crate::sys::memory::populate;

/// The kernel's device numbers have 12 bits of major and 20 of minor number.
const MAJOR_MAX: u64 = (1 << 12) - 1;
const MINOR_MAX: u64 = (1 << 20) - 1;

/// Which chunks there are, and the parts of files that use them.
pub(super) struct Used<'c> {
    /// Those that the manifest lists.
    listed: &'c Chunks,
    /// Which of `found` each of them is, first as stored raw, then as compressed; or [`NONE`].
    numbers: Vec<[u32; 2]>,
    pub found: Vec<Found>,
    /// The one of `listed` that is likely to be used next.
    next: usize,
    /// The chunk of the last part. Files follow each other in a chunk, so it is mostly that of the next one.
    last: Option<((Digest, bool), u32)>,
    pub parts: Vec<Part>,
    /// For each list, and each of its inodes.
    files: Vec<Vec<File>>,
}

/// What a file consists of.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct File {
    /// The first of [`Used::parts`], and how many.
    pub first: u32,
    pub count: u32,
    /// The words of the message that were read for them.
    pub words: u32,
}

/// A chunk that some file uses. One that is not listed, which no file that is kept may use, may be there many times.
pub(super) struct Found {
    pub digest: Digest,
    pub compressed: bool,
    /// How many bytes it decodes to.
    pub decoded_bytes: u32,
    /// Its stored size by the manifest's list, in bytes, if it is there.
    listed_bytes: Option<u64>,
    /// Its number in the order of first use, once a file that is kept uses it.
    pub number: Option<u32>,
}

/// A part of a file that has bytes.
pub(super) struct Part {
    pub len: u32,
    pub offset: u32,
    /// Which of [`Used::found`].
    pub chunk: u32,
    /// Where in the message it is, in bytes.
    pub place: u32,
}

/// A part of a file, checked.
struct FileChunk {
    len: u32,
    offset: u32,
    digest: Digest,
    compressed: bool,
}

impl<'c> Used<'c> {
    fn of(listed: &'c Chunks) -> Self {
        let (numbers, found) = (vec![[NONE; 2]; listed.len()], Vec::with_capacity(listed.len()));
        Self { listed, numbers, found, next: 0, last: None, parts: Vec::new(), files: Vec::new() }
    }

    /// The second walk: what all inodes of all lists lead to, those that do not count as well.
    pub(super) fn read(message: &Message<'_>, listed: &'c Chunks) -> Result<Self, LayerError> {
        let lists = lists(message)?;
        let mut used = Self::of(listed);
        // Most files have one part.
        used.parts.reserve(lists.iter().map(List::len).sum());
        populate(used.parts.spare_capacity_mut());
        populate(used.found.spare_capacity_mut());
        for list in &lists {
            let mut files = Vec::with_capacity(list.len());
            populate(files.spare_capacity_mut());
            for source in list.iter() {
                let (first, left) = (used.parts.len(), message.left());
                used.read_inode(&source)?;
                // Fewer words than the message has.
                let words = (left - message.left()) as u32;
                files.push(File { first: index(first), count: index(used.parts.len() - first), words });
            }
            used.files.push(files);
        }
        Ok(used)
    }

    /// What an inode of a list consists of; nothing if it is no file.
    pub(super) fn file(&self, list: u32, inode: u32) -> File {
        let file = self.files.get(list as usize).and_then(|files| files.get(inode as usize));
        file.copied().unwrap_or_default()
    }

    #[inline(always)]
    fn read_inode(&mut self, inode: &Struct<'_>) -> Result<(), LayerError> {
        match Tag::of(inode)? {
            Tag::File => {
                for part in inode.list(0)?.iter() {
                    self.read_part(&part)?;
                }
            }
            Tag::Dir => {
                if let Some(dir) = inode.child(0)?
                    && dir.bit(0)
                {
                    let why = "a folder has lookBelow set, which nothing reads or writes";
                    return Err(corrupt(dir.offset(), why));
                }
            }
            Tag::Char | Tag::Block => {
                device(inode)?;
            }
            Tag::Fifo | Tag::Symlink | Tag::Socket | Tag::Whiteout => {}
        }
        Ok(())
    }

    /// Checks a part of a file, and notes it, and that its chunk is used up to the part's end.
    #[inline(always)]
    fn read_part(&mut self, part: &Struct<'_>) -> Result<(), LayerError> {
        let FileChunk { len, offset, digest, compressed } = file_chunk(part)?;
        if len == 0 {
            return Ok(());
        }
        let (key, end) = ((digest, compressed), offset + len);
        let chunk = match self.last {
            Some((last, chunk)) if last == key => chunk,
            _ => self.number(digest, compressed),
        };
        self.last = Some((key, chunk));
        if let Some(found) = self.found.get_mut(chunk as usize) {
            found.decoded_bytes = end.max(found.decoded_bytes);
        }
        // Below MAX_METADATA_BYTES.
        self.parts.push(Part { len, offset, chunk, place: index(part.offset()) });
        Ok(())
    }

    /// Returns which of `found` is that chunk. It is put there if it is new.
    fn number(&mut self, digest: Digest, compressed: bool) -> u32 {
        let new = index(self.found.len());
        let listed = self.listed.find(&digest, self.next);
        self.next = listed.map_or(self.next, |(at, _)| at + 1);
        if let Some(known) = listed.and_then(|(at, _)| self.numbers.get_mut(at)) {
            let known = &mut known[usize::from(compressed)];
            if *known != NONE {
                return *known;
            }
            *known = new;
        }
        let listed_bytes = listed.map(|(_, size)| size);
        self.found.push(Found { digest, compressed, decoded_bytes: 0, listed_bytes, number: None });
        new
    }
}

#[inline(always)]
fn file_chunk(part: &Struct<'_>) -> Result<FileChunk, LayerError> {
    let len = part.u64(0);
    let blob = part.child(0)?.ok_or_else(|| corrupt(part.offset(), "a part of a file has no chunk"))?;
    let (offset, compressed, digest) = (blob.u64(0), blob.bit(64), blob.bytes(0)?);
    let digest: [u8; 32] = digest
        .try_into()
        .map_err(|_| corrupt(blob.offset(), format!("a digest has {} bytes, expected 32", digest.len())))?;
    match offset.checked_add(len) {
        Some(end) if end <= MAX_CHUNK_BYTES.into() => {
            let (len, offset) = (len as u32, offset as u32);
            Ok(FileChunk { len, offset, digest: Digest::from_bytes(digest), compressed })
        }
        _ => {
            let why = format!(
                "a part of a file has {len} bytes at {offset} of a chunk, \
                 expected an end of at most {MAX_CHUNK_BYTES}"
            );
            Err(corrupt(part.offset(), why))
        }
    }
}

impl Found {
    /// Its stored size, in bytes, for the file part at that place.
    pub(super) fn stored_bytes(&self, offset: usize) -> Result<u32, LayerError> {
        let chunk = self.digest;
        match self.listed_bytes {
            Some(size) if size > 0 && size <= MAX_CHUNK_BYTES.into() => Ok(size as u32),
            Some(size) => {
                let why = format!(
                    "the manifest says that chunk {chunk} has {size} bytes, expected 1 to {MAX_CHUNK_BYTES}"
                );
                Err(corrupt(offset, why))
            }
            // Garbage collection would take it away, and no copy of the image would have it.
            None => Err(corrupt(offset, format!("chunk {chunk} is used, but the manifest does not list it"))),
        }
    }
}

/// The number of a device, in the kernel's encoding for user space.
pub(super) fn device(inode: &Struct<'_>) -> Result<u32, LayerError> {
    let (major, minor) = match inode.child(0)? {
        Some(numbers) => (numbers.u64(0), numbers.u64(1)),
        None => (0, 0),
    };
    if major > MAJOR_MAX || minor > MINOR_MAX {
        let why = format!(
            "device number {major}:{minor}, expected at most {MAJOR_MAX}:{MINOR_MAX}, the kernel's bits"
        );
        return Err(corrupt(inode.offset(), why));
    }
    let (major, minor) = (major as u32, minor as u32);
    Ok(minor & 0xff | major << 8 | (minor & !0xff) << 12)
}
