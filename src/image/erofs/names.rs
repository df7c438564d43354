//! Finds out which extended attributes an image has.
//!
//! No field of an image says so, not even whether there are any: the inodes do. So they are read, folder by folder,
//! where that is a matter of a few milliseconds. A mount does it before it answers the first request.

use std::collections::{HashSet, VecDeque};

use super::directory::ENTRY_BYTES;
use super::inode::{COMPACT_BYTES, EXTENDED_BYTES, Inode, Layout, SLOT_BYTES, is_extended};
use super::metadata::{PAGE_BYTES, Space};
use super::{Erofs, NodeId};
use crate::image::bytes::without_waiting;
use crate::image::fields::{u16_at, u64_at};
use crate::image::source::check_range;
use crate::image::{FileType, LayerError};

/// The most files of an image whose inodes are read. A Debian root has 13,000.
const FILES_MAX: u64 = 16 << 10;
/// The most entries of folders, with `.` and `..`.
const ENTRIES_MAX: u64 = 4 * FILES_MAX;
/// The most pages, and the most bytes of attributes.
const PAGES_MAX: usize = 1024;
const XATTR_BYTES_MAX: usize = 256 << 10;

const PAGE: u64 = PAGE_BYTES as u64;

/// What was read last of the image. Not by way of the cache, which this would fill with what nobody has requested.
#[derive(Default)]
struct Window {
    at: u64,
    bytes: Vec<u8>,
    scratch: Vec<u8>,
}

/// What was found so far.
struct Scan<'a> {
    image: &'a Erofs,
    inodes: Window,
    pages_left: usize,
    entries: u64,
    xattr_bytes: usize,
    names: HashSet<Vec<u8>>,
    /// With `.` and `..`, and perhaps loops.
    seen: HashSet<NodeId>,
    folders: VecDeque<Inode>,
}

impl Erofs {
    /// Whether any file may have an attribute of that name. The names are read on first use.
    pub(super) fn may_have_xattr_named(&self, name: &[u8]) -> bool {
        // A fault is reported to whoever reads that file.
        let read = || without_waiting(|| self.read_xattr_names()).unwrap_or_default();
        let names = self.xattr_names.get_or_init(read);
        names.as_ref().is_none_or(|names| names.contains(name))
    }

    /// Returns the names of all attributes; `None` where that would take too long.
    fn read_xattr_names(&self) -> Result<Option<HashSet<Vec<u8>>>, LayerError> {
        // Without compression the ends of files lie between the inodes.
        let spread = !self.superblock.has_clusters() && self.superblock.inodes > PAGES_MAX as u64;
        if self.metabox.is_some() || self.superblock.inodes > FILES_MAX || spread {
            return Ok(None);
        }
        let mut scan = Scan {
            image: self,
            inodes: Window::default(),
            pages_left: PAGES_MAX,
            entries: 0,
            xattr_bytes: 0,
            names: HashSet::new(),
            seen: HashSet::new(),
            folders: VecDeque::new(),
        };
        let mut window = Window::default();
        let mut fits = scan.add(self.root)?;
        while let Some(folder) = scan.folders.pop_front() {
            let (Layout::Plain(Some(_)) | Layout::Inline(_)) = folder.layout else { return Ok(None) };
            let log = self.superblock.block_log;
            for offset in (0..folder.size).step_by(1 << log) {
                let len = (folder.size - offset).min(1 << log) as usize;
                let (_, at) = self.flat_place(&folder, offset, len)?;
                let block = window.read(self, at, len, &mut scan.pages_left)?;
                let count = block.get(8..10).map_or(0, |field| usize::from(u16_at(field, 0))) / ENTRY_BYTES;
                for entry in block.chunks_exact(ENTRY_BYTES).take(count) {
                    fits = fits && scan.add(self.node_at(u64_at(entry, 0))?)?;
                }
                if !fits || scan.pages_left == 0 {
                    return Ok(None);
                }
            }
        }
        Ok(fits.then_some(scan.names))
    }
}

impl Scan<'_> {
    /// Adds the attributes of a file. Returns whether there may be more.
    fn add(&mut self, node: NodeId) -> Result<bool, LayerError> {
        let at = self.image.superblock.metadata + node.0 * SLOT_BYTES;
        let mut bytes = self.inodes.read(self.image, at, COMPACT_BYTES, &mut self.pages_left)?;
        if is_extended(bytes) {
            bytes = self.inodes.read(self.image, at, EXTENDED_BYTES, &mut self.pages_left)?;
        }
        let inode = self.image.parse(Space::Image, at, bytes)?;
        if inode.kind == FileType::Directory && self.seen.insert(node) {
            self.folders.push_back(inode);
        }
        for (name, value) in self.image.xattrs_of(&inode)? {
            self.xattr_bytes += name.len() + value.len();
            self.names.insert(name);
        }
        self.entries += 1;
        Ok(self.entries <= ENTRIES_MAX && self.xattr_bytes <= XATTR_BYTES_MAX && self.pages_left > 0)
    }
}

impl Window {
    /// Returns `len` bytes at `at`, at most a block, and counts down `pages_left` where they are read.
    fn read(
        &mut self,
        image: &Erofs,
        at: u64,
        len: usize,
        pages_left: &mut usize,
    ) -> Result<&[u8], LayerError> {
        let size = image.source.size_bytes();
        check_range(at, len as u64, size)?;
        let end = at + len as u64;
        if at < self.at || end > self.at + self.bytes.len() as u64 {
            let begin = at / PAGE * PAGE;
            let read = (end.next_multiple_of(PAGE).min(size) - begin) as usize;
            self.bytes.clear();
            self.bytes.extend_from_slice(image.source.read(begin, read, &mut self.scratch)?);
            self.at = begin;
            *pages_left = pages_left.saturating_sub(read.div_ceil(PAGE_BYTES));
        }
        Ok(self.bytes.get((at - self.at) as usize..(end - self.at) as usize).unwrap_or_default())
    }
}
