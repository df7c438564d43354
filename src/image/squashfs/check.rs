//! Reading everything, for `mosfs verify`.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use super::directory::RawEntry;
use super::error::corrupt;
use super::inode::{self, Data, File, NONE};
use super::{NodeId, Squashfs};
use crate::image::layer::{Extent, Place};
use crate::image::{Attr, FileType, Layer, LayerError};

/// How many folders and files with several names a check remembers, at the most (about 100 MiB for each).
const REMEMBERED: usize = 1 << 22;

/// What a check reports.
#[derive(Debug)]
pub enum Event<'a> {
    /// A file, before its content is read. A file with several names comes once for each.
    Node {
        /// Path from the root, with a leading `/`.
        path: &'a [u8],
        /// The file.
        node: NodeId,
        /// What stat(2) shows of it.
        attr: &'a Attr,
    },
    /// That many more bytes of content were decoded (or were holes).
    Content(u64),
    /// Something that is wrong; the check goes on.
    Problem {
        /// Path from the root, with a leading `/`, of the file that is hit.
        path: &'a [u8],
        /// What is wrong with it.
        error: LayerError,
    },
}

/// The callback of a check: it can end it with `Break`.
pub(super) type Visit<'v> = dyn FnMut(Event<'_>) -> ControlFlow<()> + 'v;

struct Frame {
    node: NodeId,
    number: u32,
    cookie: u32,
    path_len: usize,
}

struct Check<'a, 'v> {
    image: &'a Squashfs,
    visit: &'a mut Visit<'v>,
    path: Vec<u8>,
    folders: HashSet<u64>,
    /// Files with several names whose content was read.
    linked: HashSet<u64>,
    /// Length of the fragment blocks that were decoded; `None` for one that cannot be decoded.
    fragments: HashMap<u64, Option<u32>>,
    block: Vec<u8>,
}

impl Squashfs {
    /// Reads every file of the image: inodes, names, links, attributes, and each stored block.
    ///
    /// It reports every problem and continues as far as it can. Each fragment block and the
    /// content of each file is decoded once; memory is bounded by 25 bytes for each folder, linked file
    /// and fragment block.
    pub fn check_all(&self, visit: &mut Visit<'_>) -> ControlFlow<()> {
        let mut check = Check {
            image: self,
            visit,
            path: b"/".to_vec(),
            folders: HashSet::new(),
            linked: HashSet::new(),
            fragments: HashMap::new(),
            block: Vec::new(),
        };
        if let Err(error) = self.compressor_options() {
            check.problem(error)?;
        }
        check.tree()
    }
}

impl Check<'_, '_> {
    fn problem(&mut self, error: LayerError) -> ControlFlow<()> {
        (self.visit)(Event::Problem { path: &self.path, error })
    }

    fn note(&mut self, result: Result<(), LayerError>) -> ControlFlow<()> {
        result
            .or_else(|error| match self.problem(error) {
                ControlFlow::Continue(()) => Ok(()),
                stop => Err(stop),
            })
            .map_or_else(|stop| stop, ControlFlow::Continue)
    }

    fn tree(&mut self) -> ControlFlow<()> {
        let root = self.image.root();
        let mut stack = Vec::new();
        if let Some(frame) = self.node(root, None)? {
            stack.push(frame);
        }
        while let Some(mut frame) = stack.pop() {
            self.path.truncate(frame.path_len);
            if let Some(child) = self.folder(&mut frame)? {
                stack.push(frame);
                stack.push(child);
            }
        }
        ControlFlow::Continue(())
    }

    /// Goes on in a folder, up to the next folder in it.
    fn folder(&mut self, frame: &mut Frame) -> ControlFlow<(), Option<Frame>> {
        let image = self.image;
        let mut walk = match image.walk_after(frame.node, frame.cookie) {
            Ok(Some(walk)) => walk,
            Ok(None) => return ControlFlow::Continue(None),
            Err(error) => {
                self.problem(error)?;
                return ControlFlow::Continue(None);
            }
        };
        let child = loop {
            match walk.next() {
                Ok(Some(entry)) if entry.end <= frame.cookie => {}
                Ok(Some(entry)) => {
                    frame.cookie = entry.end;
                    self.path.truncate(frame.path_len);
                    if self.path.last() != Some(&b'/') {
                        self.path.push(b'/');
                    }
                    self.path.extend_from_slice(walk.name());
                    if let Some(child) = self.node(entry.node, Some((&entry, frame.number)))? {
                        break Some(child);
                    }
                }
                Ok(None) => break None,
                Err(error) => {
                    self.path.truncate(frame.path_len);
                    self.problem(error)?;
                    break None;
                }
            }
        };
        image.remember(frame.node, &walk);
        ControlFlow::Continue(child)
    }

    /// Checks a file; the answer is a folder to go into. `entry` is its name's, with the number of the folder.
    fn node(&mut self, node: NodeId, entry: Option<(&RawEntry, u32)>) -> ControlFlow<(), Option<Frame>> {
        let image = self.image;
        let (inode, attr) = match image.inode(node).and_then(|(inode, _)| Ok((inode, image.attr(node)?))) {
            Ok(both) => both,
            Err(error) => {
                self.problem(error)?;
                return ControlFlow::Continue(None);
            }
        };
        (self.visit)(Event::Node { path: &self.path, node, attr: &attr })?;
        let bad = |why: String| corrupt(inode::TABLE, image.superblock.inode_table + (node.0 >> 16), why);
        if inode.number == 0 || inode.number > image.superblock.inodes {
            self.problem(bad(format!(
                "inode number is {}, expected 1 to {}",
                inode.number, image.superblock.inodes
            )))?;
        } else {
            match image.node_by_number(inode.number) {
                Ok(Some(found)) if found != node => {
                    let why = format!(
                        "the export table has inode {} at {:#x}, found it at {:#x}",
                        inode.number, found.0, node.0
                    );
                    self.problem(bad(why))?;
                }
                Ok(_) => {}
                Err(error) => self.problem(error)?,
            }
        }
        if let Some((entry, parent)) = entry {
            if entry.kind != inode.kind {
                let why = format!("is of type {:?}, the folder says {:?}", inode.kind, entry.kind);
                self.problem(bad(why))?;
            }
            if entry.number != inode.number {
                self.problem(bad(format!(
                    "has inode number {}, the folder says {}",
                    inode.number, entry.number
                )))?;
            }
            if let Data::Directory(folder) = inode.data
                && folder.parent != parent
            {
                let why = format!("the folder above has inode number {}, expected {parent}", folder.parent);
                self.problem(bad(why))?;
            }
        }
        if attr.has_xattrs {
            let result = image.xattrs(node).map(drop);
            self.note(result)?;
        }
        match inode.data {
            Data::Directory(_) => {
                if self.folders.len() >= REMEMBERED {
                    self.problem(bad(format!("more than {REMEMBERED} folders: this one is not checked")))?;
                    return ControlFlow::Continue(None);
                }
                if !self.folders.insert(node.0) {
                    self.problem(bad("a folder with two names, or within itself".into()))?;
                    return ControlFlow::Continue(None);
                }
                let result = image.check_index(node);
                self.note(result)?;
                let frame = Frame { node, number: inode.number, cookie: 0, path_len: self.path.len() };
                return ControlFlow::Continue(Some(frame));
            }
            Data::File(file) => {
                let again = inode.nlink > 1 && self.linked.len() < REMEMBERED && !self.linked.insert(node.0);
                if !again {
                    self.content(node, &file)?;
                }
            }
            Data::Symlink(_) => {
                let result = image.read_link(node).map(drop);
                self.note(result)?;
            }
            Data::Device(_) | Data::Nothing => {}
        }
        debug_assert_ne!(attr.kind, FileType::Directory);
        ControlFlow::Continue(None)
    }

    fn content(&mut self, node: NodeId, file: &File) -> ControlFlow<()> {
        let image = self.image;
        let mut list = match image.file(node).and_then(|(file, cursor)| image.block_list(&file, cursor)) {
            Ok(list) => list,
            Err(error) => return self.problem(error),
        };
        let block_bytes = u64::from(image.superblock.block_bytes);
        let mut left = file.size;
        for _ in 0..file.blocks(image.superblock.block_log) {
            let len = left.min(block_bytes);
            let result = match list.next() {
                Ok((0, _)) => Ok(()),
                Ok((word, start)) => image
                    .stored_block(start, word, len as u32)
                    .and_then(|block| image.decode(block, &mut self.block)),
                // Without the words of the list nothing more of this file can be found.
                Err(error) => return self.problem(error),
            };
            self.note(result)?;
            (self.visit)(Event::Content(len))?;
            left -= len;
        }
        if file.fragment != NONE && file.tail_bytes(image.superblock.block_log) > 0 {
            let result = image.tail(file).and_then(|extent| self.tail(&extent));
            self.note(result)?;
            (self.visit)(Event::Content(left))?;
        }
        ControlFlow::Continue(())
    }

    fn tail(&mut self, extent: &Extent) -> Result<(), LayerError> {
        let Place::Shared { block, offset } = extent.place else { return Ok(()) };
        let len = match self.fragments.get(&block.start) {
            Some(Some(len)) => *len,
            // It was reported at the first file that needs it; each file that is hit is named.
            Some(None) | None => {
                let result = self.image.decode(block, &mut self.block);
                let len = result.is_ok().then_some(self.block.len() as u32);
                self.fragments.insert(block.start, len);
                result?;
                len.unwrap_or_default()
            }
        };
        let end = u64::from(offset) + u64::from(extent.len);
        if end > len.into() {
            let why = format!("decodes to {len} bytes, expected at least {end} for this file");
            return Err(corrupt(super::file::FRAGMENT_TABLE, block.start, why));
        }
        Ok(())
    }
}
