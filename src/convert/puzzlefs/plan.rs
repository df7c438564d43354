//! The tree of an image in the order of its numbers, and its content as one stream.
//!
//! The order is the puzzlefs tool's, since what a chunk holds depends on it: depth first. A folder's names get
//! numbers in the order of their bytes, its files join the stream, and then its folders follow in that order. A file
//! with several names joins once, at the first.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read};
use std::sync::Arc;

use super::PuzzlefsError;
use crate::image::layer::{BlockId, Extent, FileType, Layer, Place};
use crate::image::overlay::{Merged, ROOT};

/// A file of the image. Its number is its place in [`Plan::inodes`], and 1.
pub(crate) struct Planned {
    pub what: FileKind,
    pub permissions: u16,
    pub uid: u32,
    pub gid: u32,
    /// Names and values, sorted.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What a file is.
pub(crate) enum FileKind {
    /// Names and the places of their files in [`Plan::inodes`].
    Dir(Vec<(Box<[u8]>, u32)>),
    /// The size in bytes.
    File(u64),
    Symlink(Vec<u8>),
    /// The kernel's device number.
    Char(u32),
    Block(u32),
    Fifo,
    Socket,
}

/// A whole image.
pub(crate) struct Plan {
    pub inodes: Vec<Planned>,
    /// The files that are not empty, in the order of the stream: their numbers in the view, and sizes in bytes.
    pub files: VecDeque<(u64, u64)>,
}

impl Plan {
    /// Walks a view.
    ///
    /// # Errors
    /// [`PuzzlefsError::Tree`]; [`PuzzlefsError::TooMuch`] beyond `max_files` files.
    pub(crate) fn new(view: &Merged, max_files: usize) -> Result<Self, PuzzlefsError> {
        let mut plan = Self { inodes: Vec::new(), files: VecDeque::new() };
        let mut numbers = HashMap::new();
        plan.add(view, ROOT)?;
        let mut todo = vec![(ROOT, 0u32)];
        while let Some((folder, number)) = todo.pop() {
            let mut names = Vec::new();
            view.read_dir(folder, 0, &mut |entry| {
                names.push((entry.name.into_boxed_slice(), entry.ino, entry.kind));
                true
            })?;
            let mut entries = Vec::with_capacity(names.len());
            let first = todo.len();
            for (name, ino, kind) in names {
                let known = (kind != FileType::Directory).then(|| numbers.get(&ino).copied()).flatten();
                let child = match known {
                    Some(child) => child,
                    None => {
                        let child = u32::try_from(plan.inodes.len()).unwrap_or(u32::MAX);
                        if plan.inodes.len() >= max_files {
                            return Err(PuzzlefsError::TooMuch { max: max_files });
                        }
                        plan.add(view, ino)?;
                        if kind == FileType::Directory {
                            todo.push((ino, child));
                        } else {
                            numbers.insert(ino, child);
                        }
                        child
                    }
                };
                entries.push((name, child));
            }
            // The last one of a stack comes first.
            todo[first..].reverse();
            if let Some(Planned { what: FileKind::Dir(place), .. }) = plan.inodes.get_mut(number as usize) {
                *place = entries;
            }
        }
        Ok(plan)
    }

    fn add(&mut self, view: &Merged, ino: u64) -> Result<(), PuzzlefsError> {
        let attr = view.attr(ino)?;
        let what = match attr.kind {
            FileType::Directory => FileKind::Dir(Vec::new()),
            FileType::Regular => FileKind::File(attr.size_bytes),
            FileType::Symlink => FileKind::Symlink(view.read_link(ino)?),
            FileType::CharDevice => FileKind::Char(attr.rdev),
            FileType::BlockDevice => FileKind::Block(attr.rdev),
            FileType::Fifo => FileKind::Fifo,
            FileType::Socket => FileKind::Socket,
        };
        if attr.kind == FileType::Regular && attr.size_bytes > 0 {
            self.files.push_back((ino, attr.size_bytes));
        }
        let mut xattrs = if attr.has_xattrs { view.xattrs(ino)? } else { Vec::new() };
        xattrs.sort();
        let (permissions, uid, gid) = (attr.permissions, attr.uid, attr.gid);
        self.inodes.push(Planned { what, permissions, uid, gid, xattrs });
        Ok(())
    }
}

/// How many bytes of decoded blocks the stream keeps, at the most.
const CACHE_BYTES: usize = 16 << 20;

/// The content of all files of a plan, one after the other.
pub(crate) struct Content<'a> {
    view: &'a Merged,
    files: VecDeque<(u64, u64)>,
    /// Where in the first file the next byte is.
    offset: u64,
    /// The extent that the next byte lies in, with its layer.
    extent: Option<(usize, Extent)>,
    blocks: Blocks,
    /// The first thing that went wrong; a reader can only say that there was something.
    pub failed: Option<PuzzlefsError>,
}

impl<'a> Content<'a> {
    /// The content of these files.
    pub(crate) fn new(view: &'a Merged, files: VecDeque<(u64, u64)>) -> Self {
        Self { view, files, offset: 0, extent: None, blocks: Blocks::default(), failed: None }
    }

    fn next(&mut self, out: &mut [u8]) -> Result<usize, PuzzlefsError> {
        let Some(&(ino, size)) = self.files.front() else { return Ok(0) };
        let (layer, extent) = match self.extent {
            Some(known) => known,
            None => *self.extent.insert(self.view.extent(ino, self.offset)?),
        };
        // The view checked that the extent holds the offset.
        let from = (self.offset - extent.file_offset) as usize;
        let len = (extent.len as usize - from).min(out.len());
        let len = usize::try_from(size - self.offset).map_or(len, |left| len.min(left));
        let out = &mut out[..len];
        let (id, start) = match extent.place {
            Place::Hole => {
                out.fill(0);
                (None, 0)
            }
            Place::Block(id) => (Some(id), 0),
            Place::Shared { block, offset } => (Some(block), offset as usize),
        };
        if let Some(id) = id {
            let layers = self.view.layers();
            let image = layers.get(layer).ok_or(PuzzlefsError::Short { size })?;
            let block = self.blocks.get(layer, image, id)?;
            let held = block.get(start + from..start + from + len).ok_or(PuzzlefsError::Short { size })?;
            out.copy_from_slice(held);
        }
        self.offset += len as u64;
        if self.offset >= size {
            self.files.pop_front();
            (self.offset, self.extent) = (0, None);
        } else if self.offset >= extent.file_offset + u64::from(extent.len) {
            self.extent = None;
        }
        Ok(len)
    }
}

impl Read for Content<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        self.next(out).map_err(|error| {
            let text = error.to_string();
            self.failed.get_or_insert(error);
            io::Error::other(text)
        })
    }
}

/// Decoded blocks of the source's layers, the oldest of which goes first.
#[derive(Default)]
struct Blocks {
    held: HashMap<(usize, BlockId), Arc<[u8]>>,
    order: VecDeque<(usize, BlockId)>,
    bytes: usize,
    scratch: Vec<u8>,
}

impl Blocks {
    fn get(&mut self, layer: usize, image: &Arc<dyn Layer>, id: BlockId) -> Result<Arc<[u8]>, PuzzlefsError> {
        if let Some(block) = self.held.get(&(layer, id)) {
            return Ok(Arc::clone(block));
        }
        image.decode(id, &mut self.scratch).map_err(PuzzlefsError::Content)?;
        let block: Arc<[u8]> = Arc::from(self.scratch.as_slice());
        self.bytes += block.len();
        self.held.insert((layer, id), Arc::clone(&block));
        self.order.push_back((layer, id));
        while self.bytes > CACHE_BYTES
            && let Some(oldest) = self.order.pop_front()
        {
            self.bytes -= self.held.remove(&oldest).map_or(0, |block| block.len());
        }
        Ok(block)
    }
}
