//! The metadata as it is kept: checked once, compact, sorted.
//!
//! Schema (id 0x84ae5e6e88b7cbb7). Numbers in brackets: data words and pointers; `@` is the bit of a field.
//!
//! ```text
//! Rootfs (1, 2)         manifestVersion u64 @0; 0 metadatas: InodeVector, the newest first; 1 fsVerityData (not read)
//! InodeVector (0, 1)    0 inodes: Inode, ascending
//! Inode (3, 2)          ino u64 @0, tag u16 @64, permissions u16 @80, uid u32 @96, gid u32 @128;
//!                       0 by the tag: Chr, Blk, Dir or list of FileChunk; 1 InodeAdditional
//! Chr, Blk (2, 0)       major u64 @0, minor u64 @64
//! Dir (1, 1)            lookBelow @0; 0 entries: DirEntry
//! DirEntry (1, 1)       ino u64 @0; 0 name
//! FileChunk (1, 1)      len u64 @0; 0 BlobRef
//! BlobRef (2, 1)        offset u64 @0, compressed @64; 0 digest
//! InodeAdditional (0, 2)  0 xattrs: Xattr; 1 symlinkTarget
//! Xattr (0, 2)          0 key, 1 val
//! ```
//!
//! Four walks over the message. The first looks at every inode of every list, and finds which of them count
//! (`inodes.rs`). The second reads the parts of files and the other things that inodes lead to, and finds how many bytes
//! each chunk decodes to: to the end of the last stretch that any inode uses, also one that no name leads to, since a
//! chunk is cut from the files of one build (`parts.rs`). The third goes from the root through all folders. The fourth
//! keeps what the third reached. It takes the parts of files from the second, and pays for their words once more, so that
//! what it keeps has the bound of one message. In a large message another thread does the second while this one does the
//! first and the third.

use std::collections::HashMap;
use std::thread;

use super::chunk::Chunk;
use super::corrupt;
use super::inodes::{NONE, ROOT, Tag, Visible, find, index, inode, lists, visible};
use super::message::{List, Message, Struct};
use super::parts::{File, Found, Used, device};
use crate::image::LayerError;
use crate::image::chunked::Chunks;
use crate::sys::memory::populate;

/// A message of such a size, in bytes, is read by two threads: to start one takes as long as to read a tenth of it.
const LARGE_BYTES: usize = 1 << 20;

/// The longest name, in bytes (the kernel's NAME_MAX).
const NAME_MAX: usize = 255;
/// The longest target of a link, in bytes (the kernel's PATH_MAX, less the NUL).
const TARGET_MAX: usize = 4095;
/// The longest value of an extended attribute, in bytes (the kernel's XATTR_SIZE_MAX).
const XATTR_MAX: usize = 65_536;
/// The largest file, in bytes: sizes are signed to the kernel.
const SIZE_MAX: u64 = i64::MAX as u64;

/// A file that a name leads to. What few files have, or many have in common, lies elsewhere: there may be many files.
#[derive(Debug)]
pub(super) struct Inode {
    /// Bytes of a file's content or of a link's target.
    pub size: u64,
    pub nlink: u32,
    /// The first of its entries (folder) or stretches (file), where its target begins (link), its number (device).
    pub first: u32,
    /// How many entries or stretches it has.
    pub count: u32,
    /// Which of [`Table::owners`].
    owner: u32,
    pub permissions: u16,
    pub tag: Tag,
    pub has_xattrs: bool,
}

/// Inodes whose numbers follow each other without a gap.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// The number of the first one.
    ino: u64,
    /// Which of [`Table::inodes`] that is.
    inode: u32,
}

/// The attributes of a file that has any.
#[derive(Debug, Clone, Copy)]
struct XattrSet {
    /// Which of [`Table::inodes`] has them.
    inode: u32,
    /// The first of [`Table::xattrs`].
    first: u32,
    count: u32,
}

/// A name in a folder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    name: u32,
    name_len: u8,
    whiteout: bool,
    /// Which of [`Table::inodes`].
    pub inode: u32,
}

/// A part of a file that lies in one chunk. It ends where the next one begins, or with the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stretch {
    /// Where in the file it begins, in bytes.
    pub start: u64,
    /// Which of [`Table::chunks`].
    pub chunk: u32,
    /// Where in the decoded chunk it begins, in bytes.
    pub offset: u32,
}

/// An extended attribute: places in the arena.
#[derive(Debug, Clone, Copy)]
pub(super) struct Xattr {
    pub name: u32,
    pub value: u32,
    pub value_len: u32,
    pub name_len: u8,
}

/// All that is kept of the metadata.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// In the order of their numbers.
    pub inodes: Vec<Inode>,
    /// Their numbers. The last run ends with the last inode.
    runs: Vec<Run>,
    /// User and group, each pair once.
    owners: Vec<(u32, u32)>,
    /// Those of a folder lie side by side, in the order of their names.
    entries: Vec<Entry>,
    stretches: Vec<Stretch>,
    pub xattrs: Vec<Xattr>,
    /// In the order of the inodes.
    xattr_sets: Vec<XattrSet>,
    /// Where each name of an attribute is.
    xattr_names: HashMap<Box<[u8]>, u32>,
    /// In the order of their first use.
    pub chunks: Vec<Chunk>,
    /// Names, targets, attributes.
    arena: Vec<u8>,
}

impl Table {
    /// Reads and checks the metadata. `listed` are the chunks that the manifest lists.
    pub(super) fn read(bytes: &[u8], listed: &Chunks) -> Result<Table, LayerError> {
        let folders = || -> Result<_, LayerError> {
            let message = Message::open(bytes)?;
            let lists = lists(&message)?;
            let mut visible = visible(&lists)?;
            let mut table = Table::default();
            table.walk(&lists, &mut visible)?;
            Ok((table, visible))
        };
        let parts = || Used::read(&Message::open(bytes)?, listed);
        let (folders, parts) = if bytes.len() < LARGE_BYTES {
            (folders(), parts())
        } else {
            thread::scope(|scope| {
                let reading = thread::Builder::new().spawn_scoped(scope, parts);
                let folders = folders();
                // Where there may be no other thread, this one reads them.
                (folders, reading.ok().and_then(|thread| thread.join().ok()).unwrap_or_else(parts))
            })
        };
        let ((mut table, visible), mut parts) = (folders?, parts?);
        let message = Message::open(bytes)?;
        table.keep(&message, &lists(&message)?, &visible, &mut parts)?;
        table.entries.shrink_to_fit();
        table.stretches.shrink_to_fit();
        table.chunks.shrink_to_fit();
        table.arena.shrink_to_fit();
        Ok(table)
    }

    /// Which of the inodes has that number, if a name leads to it.
    fn position(&self, ino: u64) -> Option<usize> {
        let next = self.runs.partition_point(|run| run.ino <= ino);
        let run = self.runs.get(next.checked_sub(1)?)?;
        let end = self.runs.get(next).map_or(self.inodes.len(), |next| next.inode as usize);
        let at = usize::try_from(ino - run.ino).ok()?.checked_add(run.inode as usize)?;
        (at < end).then_some(at)
    }

    /// The inode of that number, if a name leads to it.
    pub(super) fn inode(&self, ino: u64) -> Option<&Inode> {
        self.position(ino).and_then(|at| self.inodes.get(at))
    }

    /// The number of an inode, which is one of `inodes`.
    pub(super) fn number(&self, inode: u32) -> u64 {
        let next = self.runs.partition_point(|run| run.inode <= inode);
        let run = next.checked_sub(1).and_then(|at| self.runs.get(at));
        run.map_or(0, |run| run.ino + u64::from(inode - run.inode))
    }

    /// User and group of an inode.
    pub(super) fn owner(&self, inode: &Inode) -> (u32, u32) {
        self.owners.get(inode.owner as usize).copied().unwrap_or_default()
    }

    /// Bytes of the arena.
    pub(super) fn bytes(&self, start: u32, len: usize) -> &[u8] {
        self.arena.get(start as usize..).and_then(|rest| rest.get(..len)).unwrap_or_default()
    }

    /// The name of an entry.
    pub(super) fn name(&self, entry: &Entry) -> &[u8] {
        self.bytes(entry.name, entry.name_len.into())
    }

    /// The entries of a folder, in the order of their names.
    pub(super) fn entries_of(&self, inode: &Inode) -> &[Entry] {
        slice(&self.entries, inode.first, inode.count)
    }

    /// The stretches of a file.
    pub(super) fn stretches_of(&self, inode: &Inode) -> &[Stretch] {
        slice(&self.stretches, inode.first, inode.count)
    }

    /// Whether any file has an extended attribute of that name.
    pub(super) fn has_xattr_named(&self, name: &[u8]) -> bool {
        self.xattr_names.contains_key(name)
    }

    /// The attributes of the inode of that number.
    pub(super) fn xattrs_of(&self, ino: u64) -> &[Xattr] {
        let set = self.position(ino).and_then(|at| {
            let found = self.xattr_sets.binary_search_by_key(&at, |set| set.inode as usize);
            self.xattr_sets.get(found.ok()?)
        });
        set.map_or(&[], |set| slice(&self.xattrs, set.first, set.count))
    }

    fn put(&mut self, bytes: &[u8]) -> u32 {
        let start = index(self.arena.len());
        self.arena.extend_from_slice(bytes);
        start
    }

    /// The third walk: all folders, from the root on.
    fn walk(&mut self, lists: &[List<'_>], visible: &mut [Visible]) -> Result<(), LayerError> {
        let root = find(visible, ROOT).ok_or_else(|| corrupt(0, "there is no inode 1, the root folder"))?;
        match visible.get_mut(root) {
            Some(root) if root.tag == Tag::Dir => root.links = 1,
            _ => return Err(corrupt(0, "inode 1, the root, is not a folder")),
        }
        // Most inodes have one name.
        self.entries.reserve(visible.len());
        populate(self.entries.spare_capacity_mut());
        let mut todo = vec![root];
        while let Some(at) = todo.pop() {
            let first = self.entries.len();
            let folder = inode(lists, visible.get(at));
            let names = match folder.map(|inode| inode.child(0)).transpose()?.flatten() {
                Some(dir) => dir.list(0)?,
                None => continue,
            };
            let mut folders = 0;
            for entry in names.iter() {
                let (ino, name) = (entry.u64(0), entry.bytes(0)?);
                check_name(name, entry.offset())?;
                let child = find(visible, ino)
                    .ok_or_else(|| corrupt(entry.offset(), format!("there is no inode {ino} for a name")))?;
                let Some(node) = visible.get_mut(child) else { continue };
                match node.tag {
                    Tag::Whiteout => {}
                    Tag::Dir if node.links > 0 => {
                        let why = format!("folder {ino} has two names, or is within itself");
                        return Err(corrupt(entry.offset(), why));
                    }
                    Tag::Dir => {
                        node.links = 1;
                        folders += 1;
                        todo.push(child);
                    }
                    _ => node.links = node.links.saturating_add(1),
                }
                let whiteout = node.tag == Tag::Whiteout;
                let name_len = name.len() as u8;
                let name = self.put(name);
                self.entries.push(Entry { name, name_len, whiteout, inode: index(child) });
            }
            self.sort(first, names.iter().next().map_or(0, |entry| entry.offset()))?;
            if let Some(node) = visible.get_mut(at) {
                node.first = index(first);
                node.count = index(self.entries.len() - first);
                node.folders = folders;
            }
        }
        Ok(())
    }

    /// Sorts the entries of the folder that begins at `first`, and takes out what does not exist.
    fn sort(&mut self, first: usize, offset: usize) -> Result<(), LayerError> {
        let Self { entries, arena, .. } = self;
        let name = |entry: &Entry| {
            arena.get(entry.name as usize..).and_then(|rest| rest.get(..entry.name_len.into())).unwrap_or(&[])
        };
        let folder = entries.get_mut(first..).unwrap_or_default();
        // As most writers leave them: in order, no name twice.
        if folder.iter().all(|entry| !entry.whiteout) && folder.is_sorted_by(|a, b| name(a) < name(b)) {
            return Ok(());
        }
        folder.sort_unstable_by(|a, b| name(a).cmp(name(b)));
        for pair in folder.windows(2) {
            if let [a, b] = pair
                && name(a) == name(b)
            {
                let why = format!("a folder has the name `{}` twice", name(a).escape_ascii());
                return Err(corrupt(offset, why));
            }
        }
        let mut at = first;
        for from in first..entries.len() {
            if !entries[from].whiteout {
                entries.swap(at, from);
                at += 1;
            }
        }
        entries.truncate(at);
        Ok(())
    }

    /// The fourth walk: keeps the inodes that were reached.
    fn keep(
        &mut self,
        message: &Message<'_>,
        lists: &[List<'_>],
        visible: &[Visible],
        chunks: &mut Used<'_>,
    ) -> Result<(), LayerError> {
        let mut places = vec![NONE; visible.len()];
        self.inodes.reserve_exact(visible.iter().filter(|seen| seen.links > 0).count());
        self.stretches.reserve(chunks.parts.len());
        populate(self.inodes.spare_capacity_mut());
        populate(self.stretches.spare_capacity_mut());
        let mut owners = HashMap::new();
        for (seen, place) in visible.iter().zip(&mut places) {
            if seen.links == 0 {
                continue;
            }
            let Some(source) = inode(lists, Some(seen)) else { continue };
            let owner = (source.u32(96), source.u32(128));
            let owner = match self.inodes.last() {
                Some(last) if self.owner(last) == owner => last.owner,
                _ => *owners.entry(owner).or_insert_with(|| {
                    self.owners.push(owner);
                    index(self.owners.len() - 1)
                }),
            };
            let mut kept = Inode {
                size: 0,
                nlink: seen.links,
                first: 0,
                count: 0,
                owner,
                permissions: source.u16(80) & 0o7777,
                tag: seen.tag,
                has_xattrs: false,
            };
            let number = index(self.inodes.len());
            let additional = source.child(1)?;
            match kept.tag {
                Tag::Dir => {
                    (kept.first, kept.count) = (seen.first, seen.count);
                    kept.nlink = seen.folders.saturating_add(2);
                }
                Tag::File => {
                    let file = chunks.file(seen.list, seen.index);
                    message.pay(source.offset(), file.words as usize)?;
                    kept.first = index(self.stretches.len());
                    kept.size = self.file(file, chunks)?;
                    kept.count = index(self.stretches.len()) - kept.first;
                }
                Tag::Char | Tag::Block => kept.first = device(&source)?,
                Tag::Symlink => {
                    let target = match additional {
                        Some(additional) => additional.bytes(1)?,
                        None => &[],
                    };
                    if target.is_empty() || target.len() > TARGET_MAX || target.contains(&0) {
                        let why = format!(
                            "link {} has a target of {} bytes, expected 1 to {TARGET_MAX} without NUL",
                            seen.ino,
                            target.len()
                        );
                        return Err(corrupt(source.offset(), why));
                    }
                    (kept.first, kept.size) = (self.put(target), target.len() as u64);
                }
                Tag::Fifo | Tag::Socket | Tag::Whiteout => {}
            }
            if let Some(additional) = additional {
                let first = index(self.xattrs.len());
                self.attributes(&additional)?;
                let count = index(self.xattrs.len()) - first;
                kept.has_xattrs = count > 0;
                if kept.has_xattrs {
                    self.xattr_sets.push(XattrSet { inode: number, first, count });
                }
            }
            *place = number;
            // The number that it has if it belongs to the last run; 0, which none has, where there is no run.
            if self.number(number) != seen.ino {
                self.runs.push(Run { ino: seen.ino, inode: number });
            }
            self.inodes.push(kept);
        }
        for entry in &mut self.entries {
            entry.inode = places.get(entry.inode as usize).copied().unwrap_or(NONE);
        }
        Ok(())
    }

    /// Keeps the stretches of a file. Returns its size in bytes.
    fn file(&mut self, file: File, chunks: &mut Used<'_>) -> Result<u64, LayerError> {
        let mut start = 0u64;
        for part in slice(&chunks.parts, file.first, file.count) {
            let Some(found) = chunks.found.get_mut(part.chunk as usize) else { continue };
            let chunk = match found.number {
                Some(chunk) => chunk,
                None => {
                    let chunk = index(self.chunks.len());
                    let &mut Found { digest, compressed, decoded_bytes, .. } = found;
                    let stored_bytes = found.stored_bytes(part.place as usize)?;
                    self.chunks.push(Chunk { digest, stored_bytes, decoded_bytes, compressed });
                    found.number = Some(chunk);
                    chunk
                }
            };
            self.stretches.push(Stretch { start, chunk, offset: part.offset });
            start = start.checked_add(part.len.into()).filter(|size| *size <= SIZE_MAX).ok_or_else(|| {
                corrupt(part.place as usize, format!("a file is larger than {SIZE_MAX} bytes"))
            })?;
        }
        Ok(start)
    }

    fn attributes(&mut self, additional: &Struct<'_>) -> Result<(), LayerError> {
        for xattr in additional.list(0)?.iter() {
            let (name, value) = (xattr.bytes(0)?, xattr.bytes(1)?);
            if name.is_empty() || name.len() > NAME_MAX || name.contains(&0) || value.len() > XATTR_MAX {
                let why = format!(
                    "an extended attribute has a name of {} and a value of {} bytes, \
                     expected 1 to {NAME_MAX} without NUL, and at most {XATTR_MAX}",
                    name.len(),
                    value.len()
                );
                return Err(corrupt(xattr.offset(), why));
            }
            let (name_len, value_len) = (name.len() as u8, index(value.len()));
            let name = match self.xattr_names.get(name) {
                Some(&at) => at,
                None => {
                    let at = self.put(name);
                    self.xattr_names.insert(name.into(), at);
                    at
                }
            };
            let value = self.put(value);
            self.xattrs.push(Xattr { name, value, value_len, name_len });
        }
        Ok(())
    }
}

fn check_name(name: &[u8], offset: usize) -> Result<(), LayerError> {
    let wrong = match name {
        b"" => "is empty",
        b"." | b".." => "is not a name",
        _ if name.len() > NAME_MAX => "is longer than 255 bytes",
        _ if name.contains(&b'/') || name.contains(&0) => "has a `/` or a NUL in it",
        _ => return Ok(()),
    };
    let shown = name.get(..name.len().min(NAME_MAX)).unwrap_or_default().escape_ascii();
    Err(corrupt(offset, format!("the name `{shown}` of a file {wrong}")))
}

fn slice<T>(all: &[T], first: u32, count: u32) -> &[T] {
    all.get(first as usize..).and_then(|rest| rest.get(..count as usize)).unwrap_or_default()
}
