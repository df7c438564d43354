//! The tables of a squashfs image, written when all content is.
//!
//! ```text
//! superblock      96 bytes, written last
//! options         of the codec, if it has any: one metadata block, not compressed
//! data blocks     and fragment blocks, by `pack`
//! inode table     metadata blocks
//! directory table metadata blocks
//! fragment table  metadata blocks of 16-byte entries, then the places of these blocks
//! id table        metadata blocks of 4-byte ids, then the places of these blocks
//! xattr table     metadata blocks of names and values; metadata blocks of 16-byte entries; their places
//! ```
//!
//! A metadata block is a 16-bit length (bit 15: not compressed) and up to 8192 bytes, compressed.
//! All numbers are little-endian. Source: linux/fs/squashfs/squashfs_fs.h (format 4.0).
//!
//! Nothing in it comes from a clock, the environment or the number of threads. Inodes of one
//! folder lie side by side, so that listing it with attributes reads few blocks.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::ConvertError;
use super::pack::{Packed, Stored};
use super::packing::{Compressor, Packing};
use super::tree::{NodeIndex, NodeKind, Tree, Xattrs};
use crate::image::squashfs::{self, FLAG_COMPRESSOR_OPTIONS, METADATA_BYTES, METADATA_STORED};

/// Size of the superblock, in bytes.
const SUPERBLOCK_BYTES: u64 = squashfs::SUPERBLOCK_BYTES as u64;
/// "No such block", and "no such table" in the superblock.
const NONE_64: u64 = u64::MAX;
/// "No fragment", "no attributes" in an inode.
const NONE_32: u32 = u32::MAX;
/// The most entries under one header of a directory.
const DIR_GROUP: usize = 256;
/// Superblock flag: there are no extended attributes.
const FLAG_NO_XATTRS: u16 = 1 << 9;

/// Appends metadata blocks to memory.
struct Metadata {
    stored: Vec<u8>,
    block: Vec<u8>,
    starts: Vec<u64>,
    compressor: Compressor,
}

impl Metadata {
    fn new(packing: Packing) -> io::Result<Self> {
        Ok(Self {
            stored: Vec::new(),
            block: Vec::with_capacity(METADATA_BYTES),
            starts: Vec::new(),
            compressor: packing.compressor()?,
        })
    }

    /// Where the next byte goes: the offset of its block in the table, and in the block.
    fn place(&self) -> (u64, u16) {
        (self.stored.len() as u64, self.block.len() as u16)
    }

    fn reference(&self) -> u64 {
        let (block, offset) = self.place();
        block << 16 | u64::from(offset)
    }

    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(METADATA_BYTES - self.block.len()));
            self.block.extend_from_slice(now);
            bytes = later;
            if self.block.len() == METADATA_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        self.starts.push(self.stored.len() as u64);
        let packed = self.compressor.compress(&self.block)?;
        let (bytes, flag) = match &packed {
            Some(packed) => (packed, 0),
            None => (&self.block, METADATA_STORED),
        };
        // At most 8192, so it fits beside the flag.
        self.stored.extend_from_slice(&(bytes.len() as u16 | flag).to_le_bytes());
        self.stored.extend_from_slice(bytes);
        self.block.clear();
        Ok(())
    }
}

/// What is known of a node once it is written.
#[derive(Debug, Clone, Copy, Default)]
struct Written {
    /// Its inode's number, from 1; 0: not numbered yet.
    number: u32,
    /// Its inode's reference.
    reference: u64,
    /// Names that it has (folders: names that lead to it and its subfolders).
    links: u32,
    done: bool,
}

/// Where a folder's listing is.
#[derive(Debug, Clone, Default)]
struct Listing {
    block: u32,
    offset: u16,
    bytes: u32,
    /// Entries of the index: offset in the listing, block, first name.
    index: Vec<(u32, u32, Box<[u8]>)>,
}

struct TableWriter<'a> {
    tree: &'a Tree,
    packed: &'a Packed,
    packing: Packing,
    inodes: Metadata,
    directories: Metadata,
    nodes: Vec<Written>,
    listings: HashMap<NodeIndex, Listing>,
    parents: HashMap<NodeIndex, NodeIndex>,
    ids: Vec<u32>,
    id_places: HashMap<u32, u16>,
    xattrs: BTreeMap<&'a Xattrs, u32>,
    xattr_lists: Vec<&'a Xattrs>,
}

/// Writes the options of the codec behind the future superblock. Returns where content begins, in bytes.
pub(super) fn write_options(file: &File, packing: Packing) -> io::Result<u64> {
    let options = packing.codec().options();
    if options.is_empty() {
        return Ok(SUPERBLOCK_BYTES);
    }
    let mut block = (options.len() as u16 | METADATA_STORED).to_le_bytes().to_vec();
    block.extend_from_slice(options);
    file.write_all_at(&block, SUPERBLOCK_BYTES)?;
    Ok(SUPERBLOCK_BYTES + block.len() as u64)
}

/// Writes all tables and the superblock of an image whose content is in `file`; the image's size
/// in bytes, which the superblock says too. The tree is finished.
pub(super) fn write_tables(
    tree: &Tree,
    packed: &Packed,
    file: &File,
    packing: Packing,
) -> Result<u64, ConvertError> {
    let mut writer = TableWriter {
        tree,
        packed,
        packing,
        inodes: Metadata::new(packing)?,
        directories: Metadata::new(packing)?,
        nodes: vec![Written::default(); tree.nodes.len()],
        listings: HashMap::new(),
        parents: HashMap::new(),
        ids: Vec::new(),
        id_places: HashMap::new(),
        xattrs: BTreeMap::new(),
        xattr_lists: Vec::new(),
    };
    let (dirs, count) = writer.number()?;
    // Folders before the folders that they are in: a folder's inode needs its listing's place.
    for dir in dirs.iter().rev() {
        writer.directory(*dir)?;
    }
    writer.inode(0, count.wrapping_add(1))?;
    writer.finish(count, file)
}

fn children(tree: &Tree, dir: NodeIndex) -> impl Iterator<Item = (&[u8], NodeIndex)> {
    let children = match tree.nodes.get(dir).map(|node| &node.kind) {
        Some(NodeKind::Dir { children, .. }) => Some(children),
        _ => None,
    };
    children.into_iter().flatten().map(|(name, index)| (&**name, *index))
}

impl<'a> TableWriter<'a> {
    /// Numbers all nodes, counts links, and lists the folders, each before those in it.
    fn number(&mut self) -> Result<(Vec<NodeIndex>, u32), ConvertError> {
        let tree = self.tree;
        let (mut dirs, mut todo, mut next) = (Vec::new(), vec![0], 1u32);
        self.nodes[0] = Written { number: 1, links: 2, ..Written::default() };
        while let Some(dir) = todo.pop() {
            dirs.push(dir);
            let first = todo.len();
            for (_, child) in children(tree, dir) {
                let is_dir = matches!(tree.nodes[child].kind, NodeKind::Dir { .. });
                let node = &mut self.nodes[child];
                node.links += if is_dir { 2 } else { 1 };
                if node.number == 0 {
                    next += 1;
                    node.number = next;
                }
                if is_dir {
                    self.nodes[dir].links += 1;
                    self.parents.insert(child, dir);
                    todo.push(child);
                }
            }
            // In the order of their names, as a stack returns the last one first.
            todo[first..].reverse();
        }
        Ok((dirs, next))
    }

    /// Writes the inodes of a folder's entries, then its listing.
    fn directory(&mut self, dir: NodeIndex) -> Result<(), ConvertError> {
        let entries: Vec<_> = children(self.tree, dir).collect();
        let own_number = self.nodes[dir].number;
        for (_, child) in &entries {
            if !self.nodes[*child].done {
                self.inode(*child, own_number)?;
            }
        }

        let (block, offset) = self.directories.place();
        let mut listing = Listing { block: low32(block, "directory table")?, offset, ..Listing::default() };
        let mut at = 0;
        while at < entries.len() {
            // A group shares a header: one metadata block of inodes, numbers near the first one's, and
            // no border of a metadata block of the listing, so that the index can point at it.
            let begin = at;
            let first = self.nodes[entries[begin].1];
            let header_block = self.directories.place().0;
            let mut group = Vec::new();
            let mut size = 12 + usize::from(self.directories.place().1);
            for (name, child) in entries[begin..].iter().take(DIR_GROUP) {
                let node = self.nodes[*child];
                let delta = i64::from(node.number) - i64::from(first.number);
                if node.reference >> 16 != first.reference >> 16 || i16::try_from(delta).is_err() {
                    break;
                }
                if !group.is_empty() && size >= METADATA_BYTES {
                    break;
                }
                group.extend_from_slice(&(node.reference as u16).to_le_bytes());
                group.extend_from_slice(&(delta as i16).to_le_bytes());
                group.extend_from_slice(&type_of(&self.tree.nodes[*child].kind).to_le_bytes());
                // 1 to 255 bytes, as the tree checked.
                group.extend_from_slice(&(name.len() as u16 - 1).to_le_bytes());
                group.extend_from_slice(name);
                size += 8 + name.len();
                at += 1;
            }
            let count = at - begin;
            // Header blocks after the first one of a listing are worth an entry in the index.
            let last =
                listing.index.last().map_or(u64::from(listing.block), |(_, block, _)| u64::from(*block));
            if header_block != last {
                let name = entries[begin].0.into();
                listing.index.push((listing.bytes, low32(header_block, "directory table")?, name));
            }
            let mut header = Vec::with_capacity(12);
            header.extend_from_slice(&(count as u32 - 1).to_le_bytes());
            header.extend_from_slice(&low32(first.reference >> 16, "inode table")?.to_le_bytes());
            header.extend_from_slice(&first.number.to_le_bytes());
            self.directories.write(&header)?;
            self.directories.write(&group)?;
            let grown = u64::from(listing.bytes) + (header.len() + group.len()) as u64;
            listing.bytes = low32(grown, "directory")?;
        }
        self.listings.insert(dir, listing);
        Ok(())
    }

    /// Writes a node's inode. A folder's listing has been written.
    fn inode(&mut self, index: NodeIndex, parent_number: u32) -> Result<(), ConvertError> {
        let (tree, packed) = (self.tree, self.packed);
        let node = &tree.nodes[index];
        let (uid, gid) = (self.id(node.meta.uid)?, self.id(node.meta.gid)?);
        let xattr = self.xattr(&node.meta.xattrs);
        let Written { number, links, .. } = self.nodes[index];
        let extended = xattr != NONE_32;
        let mut body = Vec::new();
        let mut put = |bytes: &[u8]| body.extend_from_slice(bytes);
        // Types 1 to 6 are basic, 8 to 13 the same with more fields.
        let kind = match &node.kind {
            NodeKind::Dir { .. } => {
                let listing = self.listings.remove(&index).unwrap_or_default();
                // The size counts 3 bytes for `.` and `..`, which are not stored.
                let size = low32(u64::from(listing.bytes) + 3, "directory")?;
                let indexes = u16::try_from(listing.index.len()).unwrap_or(u16::MAX);
                match u16::try_from(size) {
                    Ok(size) if !extended && indexes == 0 => {
                        put(&listing.block.to_le_bytes());
                        put(&links.to_le_bytes());
                        put(&size.to_le_bytes());
                        put(&listing.offset.to_le_bytes());
                        put(&parent_number.to_le_bytes());
                        1
                    }
                    _ => {
                        put(&links.to_le_bytes());
                        put(&size.to_le_bytes());
                        put(&listing.block.to_le_bytes());
                        put(&parent_number.to_le_bytes());
                        put(&indexes.to_le_bytes());
                        put(&listing.offset.to_le_bytes());
                        put(&xattr.to_le_bytes());
                        for (offset, block, name) in listing.index.iter().take(usize::from(indexes)) {
                            put(&offset.to_le_bytes());
                            put(&block.to_le_bytes());
                            put(&(name.len() as u32 - 1).to_le_bytes());
                            put(name);
                        }
                        8
                    }
                }
            }
            NodeKind::File(data) => {
                let place =
                    |number: u32| (number as usize).checked_sub(1).and_then(|at| packed.blocks.get(at));
                let start =
                    data.blocks.iter().find_map(|number| place(*number)).map_or(0, |stored| stored.start);
                let (fragment, offset) = data.fragment.unwrap_or((NONE_32, 0));
                let holes = data.blocks.iter().filter(|number| **number == 0).count() as u64;
                // Only a hint for st_blocks; the last hole may be shorter, and no file is all saved.
                let sparse = (holes * self.packing.block_bytes() as u64).min(data.size.saturating_sub(1));
                let basic = (u32::try_from(start), u32::try_from(data.size));
                let kind = match basic {
                    (Ok(start), Ok(size)) if !extended && links == 1 && holes == 0 => {
                        put(&start.to_le_bytes());
                        put(&fragment.to_le_bytes());
                        put(&offset.to_le_bytes());
                        put(&size.to_le_bytes());
                        2
                    }
                    _ => {
                        put(&start.to_le_bytes());
                        put(&data.size.to_le_bytes());
                        put(&sparse.to_le_bytes());
                        put(&links.to_le_bytes());
                        put(&fragment.to_le_bytes());
                        put(&offset.to_le_bytes());
                        put(&xattr.to_le_bytes());
                        9
                    }
                };
                for number in &data.blocks {
                    put(&place(*number).map_or(0, |stored| stored.word).to_le_bytes());
                }
                kind
            }
            NodeKind::Symlink(target) => {
                put(&links.to_le_bytes());
                put(&(target.len() as u32).to_le_bytes());
                put(target);
                if extended {
                    put(&xattr.to_le_bytes());
                }
                if extended { 10 } else { 3 }
            }
            NodeKind::Block(_) | NodeKind::Char(_) | NodeKind::Whiteout => {
                let (basic, number) = match &node.kind {
                    NodeKind::Block(number) => (4, *number),
                    NodeKind::Char(number) => (5, *number),
                    _ => (5, 0),
                };
                put(&links.to_le_bytes());
                put(&number.to_le_bytes());
                if extended {
                    put(&xattr.to_le_bytes());
                }
                if extended { basic + 7 } else { basic }
            }
            // A link that is still pending was refused when the tree was finished.
            NodeKind::Fifo | NodeKind::PendingLink(_) => {
                put(&links.to_le_bytes());
                if extended {
                    put(&xattr.to_le_bytes());
                }
                if extended { 13 } else { 6 }
            }
        };
        let reference = self.inodes.reference();
        let mut head = Vec::with_capacity(16);
        for half in [kind, node.meta.mode, uid, gid] {
            head.extend_from_slice(&half.to_le_bytes());
        }
        head.extend_from_slice(&node.meta.mtime.to_le_bytes());
        head.extend_from_slice(&number.to_le_bytes());
        self.inodes.write(&head)?;
        self.inodes.write(&body)?;
        let node = &mut self.nodes[index];
        (node.reference, node.done) = (reference, true);
        Ok(())
    }

    fn id(&mut self, id: u32) -> Result<u16, ConvertError> {
        if let Some(place) = self.id_places.get(&id) {
            return Ok(*place);
        }
        // The superblock counts them in 16 bits.
        let place = u16::try_from(self.ids.len()).ok().filter(|place| *place < u16::MAX);
        let place = place.ok_or(ConvertError::TooManyIds)?;
        self.ids.push(id);
        self.id_places.insert(id, place);
        Ok(place)
    }

    fn xattr(&mut self, list: &'a Xattrs) -> u32 {
        if list.is_empty() {
            return NONE_32;
        }
        let next = self.xattr_lists.len() as u32;
        let lists = &mut self.xattr_lists;
        *self.xattrs.entry(list).or_insert_with(|| {
            lists.push(list);
            next
        })
    }

    /// Writes the tables one after the other, and the superblock.
    fn finish(mut self, inode_count: u32, file: &File) -> Result<u64, ConvertError> {
        let mut end = self.packed.end;
        let mut append = |bytes: &[u8]| -> Result<u64, ConvertError> {
            let start = end;
            file.write_all_at(bytes, start).map_err(ConvertError::Write)?;
            end += bytes.len() as u64;
            Ok(start)
        };
        self.inodes.flush()?;
        self.directories.flush()?;
        let inode_table = append(&self.inodes.stored)?;
        let directory_table = append(&self.directories.stored)?;

        let mut fragments = Metadata::new(self.packing)?;
        for Stored { start, word } in &self.packed.fragments {
            fragments.write(&start.to_le_bytes())?;
            fragments.write(&word.to_le_bytes())?;
            fragments.write(&[0; 4])?;
        }
        let fragment_table = match self.packed.fragments.is_empty() {
            true => NONE_64,
            false => indexed(&mut fragments, &mut append)?,
        };

        let mut ids = Metadata::new(self.packing)?;
        for id in &self.ids {
            ids.write(&id.to_le_bytes())?;
        }
        let id_table = indexed(&mut ids, &mut append)?;

        let xattr_table = if self.xattr_lists.is_empty() { NONE_64 } else { self.xattr_table(&mut append)? };

        let mut superblock = Vec::with_capacity(SUPERBLOCK_BYTES as usize);
        let mut put = |bytes: &[u8]| superblock.extend_from_slice(bytes);
        put(b"hsqs");
        put(&inode_count.to_le_bytes());
        // mkfs_time: no clock (docs/design.md, layer bytes).
        put(&0u32.to_le_bytes());
        let block_bytes = self.packing.block_bytes() as u32;
        put(&block_bytes.to_le_bytes());
        put(&(self.packed.fragments.len() as u32).to_le_bytes());
        let codec = self.packing.codec();
        put(&codec.id().to_le_bytes());
        put(&(block_bytes.ilog2() as u16).to_le_bytes());
        let no_xattrs = if xattr_table == NONE_64 { FLAG_NO_XATTRS } else { 0 };
        let options = if codec.options().is_empty() { 0 } else { FLAG_COMPRESSOR_OPTIONS };
        put(&(no_xattrs | options).to_le_bytes());
        put(&(self.ids.len() as u16).to_le_bytes());
        put(&4u16.to_le_bytes());
        put(&0u16.to_le_bytes());
        put(&self.nodes[0].reference.to_le_bytes());
        // There is no export table.
        for place in [end, id_table, xattr_table, inode_table, directory_table, fragment_table, NONE_64] {
            put(&place.to_le_bytes());
        }
        file.write_all_at(&superblock, 0).map_err(ConvertError::Write)?;
        Ok(end)
    }

    /// Names and values, a table of lists, and its index with a header of 16 bytes.
    fn xattr_table(
        &self,
        append: &mut dyn FnMut(&[u8]) -> Result<u64, ConvertError>,
    ) -> Result<u64, ConvertError> {
        let (mut pairs, mut lists) = (Metadata::new(self.packing)?, Metadata::new(self.packing)?);
        for list in &self.xattr_lists {
            let reference = pairs.reference();
            let mut size = 0;
            for (full, value) in list.iter() {
                let (kind, name) = split_xattr(full);
                pairs.write(&kind.to_le_bytes())?;
                pairs.write(&(name.len() as u16).to_le_bytes())?;
                pairs.write(name)?;
                pairs.write(&(value.len() as u32).to_le_bytes())?;
                pairs.write(value)?;
                // As listxattr(2) counts the name, with its NUL, and the value.
                size += (full.len() + 1 + value.len()) as u32;
            }
            lists.write(&reference.to_le_bytes())?;
            lists.write(&(list.len() as u32).to_le_bytes())?;
            lists.write(&size.to_le_bytes())?;
        }
        pairs.flush()?;
        let pairs_start = append(&pairs.stored)?;
        lists.flush()?;
        let lists_start = append(&lists.stored)?;
        let mut index = pairs_start.to_le_bytes().to_vec();
        index.extend_from_slice(&(self.xattr_lists.len() as u32).to_le_bytes());
        index.extend_from_slice(&[0; 4]);
        for start in &lists.starts {
            index.extend_from_slice(&(lists_start + start).to_le_bytes());
        }
        append(&index)
    }
}

/// Writes a table and the places of its blocks; the place of these places.
fn indexed(
    table: &mut Metadata,
    append: &mut dyn FnMut(&[u8]) -> Result<u64, ConvertError>,
) -> Result<u64, ConvertError> {
    table.flush()?;
    let start = append(&table.stored)?;
    let places: Vec<u8> = table.starts.iter().flat_map(|block| (start + block).to_le_bytes()).collect();
    append(&places)
}

/// The prefix number of an attribute's name, and the rest of it.
fn split_xattr(full: &[u8]) -> (u16, &[u8]) {
    // The tree lets no other prefix through.
    let prefixes: [(&[u8], u16); 3] = [(b"user.", 0), (b"trusted.", 1), (b"security.", 2)];
    prefixes.iter().find_map(|(prefix, kind)| Some((*kind, full.strip_prefix(*prefix)?))).unwrap_or((0, full))
}

/// The type of a name in a listing: that of the basic inode.
fn type_of(kind: &NodeKind) -> u16 {
    match kind {
        NodeKind::Dir { .. } => 1,
        NodeKind::File(_) => 2,
        NodeKind::Symlink(_) => 3,
        NodeKind::Block(_) => 4,
        NodeKind::Char(_) | NodeKind::Whiteout => 5,
        NodeKind::Fifo | NodeKind::PendingLink(_) => 6,
    }
}

fn low32(value: u64, what: &'static str) -> Result<u32, ConvertError> {
    u32::try_from(value).map_err(|_| ConvertError::TableTooBig { what })
}
