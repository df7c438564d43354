//! Listings of folders.
//!
//! ```text
//! listing  runs, one after the other, in the order of their names; (size of the inode - 3) bytes in all
//! run      entries - 1 u32 (1 to 256 entries), inode block u32, inode number u32, then entries
//! entry    inode offset u16, inode number - that of the run i16, type u16, name length - 1 u16, name
//!
//! index    (in an extended inode) offset in the listing u32, listing block u32, name length - 1 u32, name:
//!          the run at that offset begins in that metadata block, with that name
//! ```
//!
//! Names are sorted by byte, without duplicates. A look-up relies on that, so it is checked at each step. A
//! cookie is the offset in the listing after its entry, in bytes. A walk from it starts at the listing's
//! first run, or at the last cached run before it ([`Places`]): the start of a run is never derived from a
//! cookie, because cookies come from callers of lseek(2).
//!
//! [`Places`]: super::metadata::Places

use super::error::corrupt;
use super::inode::{Data, Directory, Inode, file_type};
use super::metadata::{CachedPosition, Cursor, METADATA_BYTES, PLACES, Position, Region};
use super::{NodeId, Squashfs};
use crate::image::fields::{u16_at, u32_at};
use crate::image::{DirEntry, FileType, LayerError};

/// The name of the directory table in errors.
pub(super) const TABLE: &str = "directory table";

/// The longest name, in bytes (NAME_MAX).
const NAME_BYTES_MAX: usize = 255;

/// Size of a run's header, in bytes.
const RUN_BYTES: u32 = 12;

/// Size of an entry without its name, in bytes.
const ENTRY_BYTES: usize = 8;

/// Most entries of a run.
const RUN_ENTRIES_MAX: u32 = 256;

/// Listings up to this size, in bytes, are always walked from their start.
const SMALL_LISTING_BYTES: u32 = 4096;

/// Added to the size of a listing in an inode: `.` and `..`, which are not in the listing.
const SIZE_EXTRA: u32 = 3;

impl Directory {
    /// Size of the listing, in bytes.
    pub(super) fn listing_bytes(&self) -> u32 {
        self.size.saturating_sub(SIZE_EXTRA)
    }
}

/// A name, stored without a heap allocation.
#[derive(Clone, Copy)]
struct Name {
    bytes: [u8; NAME_BYTES_MAX],
    len: u8,
}

impl Name {
    const EMPTY: Name = Name { bytes: [0; NAME_BYTES_MAX], len: 0 };

    fn get(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }
}

/// An entry, without its name.
#[derive(Debug, Clone, Copy)]
pub(super) struct RawEntry {
    pub node: NodeId,
    pub kind: FileType,
    /// Number of the inode, as stored in the listing.
    pub number: u32,
    /// Offset in the listing after the entry, in bytes.
    pub end: u32,
}

/// Walks a listing and checks it.
pub(super) struct Walk<'a> {
    cursor: Cursor<'a>,
    /// Offset in the listing, in bytes.
    at: u32,
    /// Size of the listing, in bytes.
    len: u32,
    /// Remaining entries of this run.
    left: u32,
    /// The block of the inodes of this run, and the inode number that the entries are relative to.
    run_block: u32,
    run_number: u32,
    /// The names of the last entry and of the one before it.
    name: Name,
    before: Name,
    /// Whether there is a previous name.
    any: bool,
    /// Where runs begin, if the folder is large: at least `step` bytes apart.
    places: Vec<CachedPosition>,
    step: u32,
    last_place: u32,
    /// Where this run begins. It is cached only once its first name has been checked against the previous
    /// one: a walk that starts there cannot see the previous name.
    place: Option<CachedPosition>,
}

impl<'a> Walk<'a> {
    /// Creates a walk from the start of a run, `at` bytes into the listing.
    fn new(cursor: Cursor<'a>, at: u32, len: u32) -> Walk<'a> {
        let step = if len <= SMALL_LISTING_BYTES {
            u32::MAX
        } else {
            // Rounded up, so that the cached positions of a folder cover all of it.
            (u64::from(len) / PLACES + 1).max(2048) as u32
        };
        Walk {
            cursor,
            at,
            len,
            left: 0,
            run_block: 0,
            run_number: 0,
            name: Name::EMPTY,
            before: Name::EMPTY,
            any: false,
            step,
            places: Vec::new(),
            last_place: at,
            place: None,
        }
    }

    /// Returns the name of the entry that `next` returned last.
    pub(super) fn name(&self) -> &[u8] {
        self.name.get()
    }

    /// Returns the next entry.
    pub(super) fn next(&mut self) -> Result<Option<RawEntry>, LayerError> {
        if self.left == 0 {
            if self.at == self.len {
                return Ok(None);
            }
            self.run()?;
        }
        self.left -= 1;
        self.entry().map(Some)
    }

    fn run(&mut self) -> Result<(), LayerError> {
        if self.at - self.last_place >= self.step {
            self.place =
                Some(CachedPosition { item: self.at.into(), position: self.cursor.position(), data: 0 });
            self.last_place = self.at;
        }
        self.forward(RUN_BYTES)?;
        let header: [u8; RUN_BYTES as usize] = self.cursor.array()?;
        let entries = u32_at(&header, 0).saturating_add(1);
        if entries > RUN_ENTRIES_MAX {
            return Err(self
                .cursor
                .corrupt(format!("a run of {entries} entries, expected at most {RUN_ENTRIES_MAX}")));
        }
        self.left = entries;
        self.run_block = u32_at(&header, 4);
        self.run_number = u32_at(&header, 8);
        Ok(())
    }

    /// Advances by `bytes` in the listing.
    fn forward(&mut self, bytes: u32) -> Result<(), LayerError> {
        if bytes > self.len - self.at {
            let left = self.len - self.at;
            return Err(self
                .cursor
                .corrupt(format!("{bytes} bytes at the end of a listing, expected at most {left}")));
        }
        self.at += bytes;
        Ok(())
    }

    fn entry(&mut self) -> Result<RawEntry, LayerError> {
        self.forward(ENTRY_BYTES as u32)?;
        let entry: [u8; ENTRY_BYTES] = self.cursor.array()?;
        let offset = u16_at(&entry, 0);
        if usize::from(offset) >= METADATA_BYTES {
            return Err(self
                .cursor
                .corrupt(format!("an inode at offset {offset} of a metadata block, expected below 8192")));
        }
        let delta = u16_at(&entry, 2) as i16;
        let number = u16_at(&entry, 4);
        let Some(kind) = file_type(number) else {
            return Err(self.cursor.corrupt(format!("type of an entry is {number}, expected 1 to 7")));
        };
        let len = usize::from(u16_at(&entry, 6)) + 1;
        if len > NAME_BYTES_MAX {
            return Err(self
                .cursor
                .corrupt(format!("a name of {len} bytes, expected at most {NAME_BYTES_MAX}")));
        }
        self.forward(len as u32)?;
        std::mem::swap(&mut self.name, &mut self.before);
        self.name.len = len as u8;
        self.cursor.read(&mut self.name.bytes[..len])?;
        self.check_name()?;
        self.places.extend(self.place.take());
        Ok(RawEntry {
            node: NodeId(u64::from(self.run_block) << 16 | u64::from(offset)),
            kind,
            number: self.run_number.wrapping_add_signed(delta.into()),
            end: self.at,
        })
    }

    /// Requires that a name is valid in a folder and sorts after the previous one. Duplicate names, or an
    /// order that a look-up does not expect, would present different files to different callers.
    fn check_name(&mut self) -> Result<(), LayerError> {
        let name = self.name.get();
        if name.iter().any(|&byte| byte == 0 || byte == b'/') || name == b"." || name == b".." {
            return Err(self.cursor.corrupt(format!("the name {:?} is not allowed", show(name))));
        }
        if self.any && self.before.get() >= name {
            let why = format!(
                "the name {:?} after {:?}, expected rising order",
                show(name),
                show(self.before.get())
            );
            return Err(self.cursor.corrupt(why));
        }
        self.any = true;
        Ok(())
    }
}

/// Formats a name for an error.
fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

impl Squashfs {
    fn folder(&self, node: NodeId) -> Result<(Inode, Directory, Cursor<'_>), LayerError> {
        let (inode, cursor) = self.inode(node)?;
        match inode.data {
            Data::Directory(folder) => Ok((inode, folder, cursor)),
            _ => Err(LayerError::WrongType { node }),
        }
    }

    fn directory_region(&self) -> Region {
        Region { table: TABLE, start: self.superblock.directory_table, end: self.superblock.directory_end }
    }

    /// Walks a non-empty listing from its start.
    pub(super) fn walk(&self, folder: &Directory) -> Result<Walk<'_>, LayerError> {
        self.walk_at(folder, folder.block, folder.offset.into(), 0)
    }

    fn walk_at(
        &self,
        folder: &Directory,
        block: u32,
        offset: usize,
        at: u32,
    ) -> Result<Walk<'_>, LayerError> {
        let start = self.superblock.directory_table.saturating_add(block.into());
        let cursor = self.metadata.cursor(self.directory_region(), start, offset)?;
        Ok(Walk::new(cursor, at, folder.listing_bytes()))
    }

    /// Walks from the last run known to begin at or before `cookie`.
    fn walk_from(&self, node: NodeId, folder: &Directory, cookie: u32) -> Result<Walk<'_>, LayerError> {
        if cookie > SMALL_LISTING_BYTES
            && folder.listing_bytes() > SMALL_LISTING_BYTES
            && let Some(place) = self.places.before(node.0, cookie.into())
        {
            let Position { at, offset } = place.position;
            let mut walk = self.walk(folder)?;
            walk.cursor.jump(Position { at, offset })?;
            walk.at = place.item as u32;
            walk.last_place = walk.at;
            return Ok(walk);
        }
        self.walk(folder)
    }

    /// Walks a folder so as to reach the entries after `cookie`, if there are any; the walk can begin before
    /// them.
    pub(super) fn walk_after(&self, node: NodeId, cookie: u32) -> Result<Option<Walk<'_>>, LayerError> {
        let (_, folder, _) = self.folder(node)?;
        if cookie >= folder.listing_bytes() {
            Ok(None)
        } else {
            self.walk_from(node, &folder, cookie).map(Some)
        }
    }

    /// Caches the positions that a walk found.
    pub(super) fn remember(&self, node: NodeId, walk: &Walk<'_>) {
        self.places.remember(node.0, &walk.places);
    }

    pub(super) fn read_listing(
        &self,
        node: NodeId,
        cookie: u64,
        each: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Result<(), LayerError> {
        // An empty folder may refer to a block that does not exist.
        let cookie = u32::try_from(cookie).unwrap_or(u32::MAX);
        let Some(mut walk) = self.walk_after(node, cookie)? else { return Ok(()) };
        let result = loop {
            match walk.next() {
                Ok(Some(entry)) if entry.end <= cookie => {}
                Ok(Some(RawEntry { node, kind, end, .. })) => {
                    if !each(DirEntry { name: walk.name().to_vec(), node, kind, next: end.into() }) {
                        break Ok(());
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.remember(node, &walk);
        result
    }

    pub(super) fn find(&self, node: NodeId, name: &[u8]) -> Result<Option<DirEntry>, LayerError> {
        let (_, folder, cursor) = self.folder(node)?;
        if folder.listing_bytes() == 0 || name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Ok(None);
        }
        let mut walk = match self.index_before(&folder, cursor, name)? {
            None => self.walk(&folder)?,
            Some((at, block)) => {
                let offset = (u64::from(folder.offset) + u64::from(at)) % METADATA_BYTES as u64;
                self.walk_at(&folder, block, offset as usize, at)?
            }
        };
        while let Some(RawEntry { node, kind, end, .. }) = walk.next()? {
            match walk.name().cmp(name) {
                std::cmp::Ordering::Less => {}
                std::cmp::Ordering::Equal => {
                    return Ok(Some(DirEntry { name: name.to_vec(), node, kind, next: end.into() }));
                }
                std::cmp::Ordering::Greater => break,
            }
        }
        Ok(None)
    }

    /// Returns the last entry of the index whose name is not after `name`: offset in the listing and block.
    ///
    /// The cursor must be at the index.
    fn index_before(
        &self,
        folder: &Directory,
        mut cursor: Cursor<'_>,
        name: &[u8],
    ) -> Result<Option<(u32, u32)>, LayerError> {
        let mut found = None;
        let mut buffer = [0; NAME_BYTES_MAX];
        for _ in 0..folder.index {
            let (at, block, first) = index_entry(&mut cursor, &mut buffer)?;
            if first > name {
                break;
            }
            if at >= folder.listing_bytes() {
                let why = format!(
                    "the index of a folder names offset {at}, expected below {}",
                    folder.listing_bytes()
                );
                return Err(cursor.corrupt(why));
            }
            found = Some((at, block));
        }
        Ok(found)
    }

    /// Checks that each entry of a folder's index refers to a run of its listing and holds the run's first
    /// name.
    pub(super) fn check_index(&self, node: NodeId) -> Result<(), LayerError> {
        let (_, folder, mut cursor) = self.folder(node)?;
        if folder.index == 0 {
            return Ok(());
        }
        let mut walk = self.walk(&folder)?;
        let mut buffer = [0; NAME_BYTES_MAX];
        for _ in 0..folder.index {
            let here = cursor.position().at;
            let bad = |why: String| Err(corrupt(super::inode::TABLE, here, why));
            let (at, block, first) = index_entry(&mut cursor, &mut buffer)?;
            while walk.left != 0 || walk.at != at {
                if walk.at > at || walk.next()?.is_none() {
                    return bad(format!("the index of a folder names offset {at}, where no run begins"));
                }
            }
            // If the previous block ends here, the run begins in the next one.
            walk.cursor.rest()?;
            let found = walk.cursor.position().at - self.superblock.directory_table;
            walk.next()?;
            if found != u64::from(block) || walk.name() != first {
                let (first, name) = (show(first), show(walk.name()));
                return bad(format!(
                    "the index of a folder names block {block} and {first:?} at offset {at}, found {found} and {name:?}"
                ));
            }
        }
        Ok(())
    }
}

/// Reads an entry of an index: offset in the listing, block of the listing, and name.
fn index_entry<'b>(
    cursor: &'b mut Cursor<'_>,
    buffer: &'b mut [u8; NAME_BYTES_MAX],
) -> Result<(u32, u32, &'b [u8]), LayerError> {
    let entry: [u8; 12] = cursor.array()?;
    let len = u32_at(&entry, 8);
    if len >= NAME_BYTES_MAX as u32 {
        let found = u64::from(len) + 1;
        let why =
            format!("a name of {found} bytes in the index of a folder, expected at most {NAME_BYTES_MAX}");
        return Err(cursor.corrupt(why));
    }
    Ok((u32_at(&entry, 0), u32_at(&entry, 4), cursor.slice(len as usize + 1, buffer)?))
}
