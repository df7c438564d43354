//! The engine: reads files of a merged view through a bounded cache of decoded blocks.
//!
//! It does not depend on FUSE; the same engine can serve any front end. A read is served from extents:
//!
//! ```text
//! whole stored block requested   decoded into the thread's buffer and returned; not cached, as
//!                                the kernel keeps the pages
//! part of a stored block         decoded once into the cache; concurrent readers wait for it
//! shared block (fragment)        the same, in its own share of the cache
//! hole                           zeros
//! ```
//! When a block was decoded for only a part of it, the [`Surplus`] is notified: the front end can store the
//! rest where the next read will find it.
//!
//! # Errors
//! A block that does not verify fails the read that needs it and is logged (see [`trouble`]); everything else
//! keeps working.

pub mod cache;
pub mod trouble;

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use self::cache::{Block, BlockCache, Share};
use self::trouble::Troubles;
use crate::image::bytes::without_waiting;
use crate::image::layer::{Attr, BlockId, Extent, FileType, LayerError, Place};
use crate::image::overlay::{Merged, OverlayError};
use crate::image::source::ReadError;

/// Why the engine cannot serve a request. The cause has already been logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineError {
    /// No such inode.
    NotFound,
    /// The file has another type than the operation requires.
    WrongType,
    /// The bytes cannot be read, do not verify, or are malformed.
    Io,
    /// The bytes are on another machine, and this thread may not wait for them (`bytes::without_waiting`). Not an
    /// error: another thread is to do it.
    NotHere,
}

/// Whether an error says no more than that this thread may not wait.
fn is_not_here(error: &LayerError) -> bool {
    matches!(error, LayerError::Read(ReadError::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock)
}

/// A block that was decoded because a part of it was read.
pub struct Decoded {
    /// Index of its layer.
    pub layer: usize,
    /// Which block.
    pub id: BlockId,
    /// Its decoded bytes.
    pub block: Arc<Block>,
    /// The file that was read.
    pub ino: u64,
    /// The size of that file, in bytes.
    pub size_bytes: u64,
    /// The file's extent that the block holds.
    pub extent: Extent,
    /// The bytes of the file that were requested: first, and one past the last.
    pub asked: (u64, u64),
}

/// Receives blocks of which only a part was requested, to use the rest. Must not block.
pub trait Surplus: Send + Sync {
    /// Called for each newly decoded block.
    fn decoded(&self, news: Decoded);
}

/// Reads files of a merged view. Shared by all threads of a mount.
pub struct Engine {
    view: Merged,
    cache: BlockCache,
    troubles: Troubles,
    surplus: Option<Box<dyn Surplus>>,
    before_decoding: Option<fn()>,
}

/// The buffers of a thread: decoded bytes that are not cached, and data assembled from parts.
#[derive(Default)]
struct Scratch {
    decoded: Vec<u8>,
    assembled: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Buffers of a thread that grew beyond this many bytes are freed after use.
const KEEP_SCRATCH_BYTES: usize = 1 << 20;

impl Engine {
    /// Creates an engine over a merged view. `names` names its layers in the log, bottom first; `cache_bytes`
    /// bounds the decoded blocks that are kept.
    pub fn new(view: Merged, names: Vec<String>, cache_bytes: usize) -> Self {
        let block_bytes = view.stat_fs().block_bytes as usize;
        Self {
            view,
            cache: BlockCache::new(cache_bytes, block_bytes),
            troubles: Troubles::new(names),
            surplus: None,
            before_decoding: None,
        }
    }

    /// Notifies `surplus` of each block that is decoded for only a part.
    pub fn set_surplus(&mut self, surplus: Box<dyn Surplus>) {
        self.surplus = Some(surplus);
    }

    /// Calls `hook` in the thread that serves a read, before it decodes a block for it.
    pub fn set_before_decoding(&mut self, hook: fn()) {
        self.before_decoding = Some(hook);
    }

    /// The merged view.
    pub fn view(&self) -> &Merged {
        &self.view
    }

    /// The errors so far.
    pub fn troubles(&self) -> &Troubles {
        &self.troubles
    }

    /// Logs an error of the merged view, and returns the error for the caller.
    pub fn failed(&self, ino: u64, error: &OverlayError) -> EngineError {
        match error {
            OverlayError::NoSuchInode(_) => EngineError::NotFound,
            OverlayError::Layer { source: LayerError::WrongType { .. }, .. } => EngineError::WrongType,
            OverlayError::Layer { source, .. } if is_not_here(source) => EngineError::NotHere,
            OverlayError::Layer { layer, source } => {
                self.troubles.report(*layer, ino, source);
                EngineError::Io
            }
            OverlayError::LayerCount(_) | OverlayError::Subdir { .. } => EngineError::Io,
        }
    }

    /// What stat(2) shows of a file.
    pub fn attr(&self, ino: u64) -> Result<Attr, EngineError> {
        self.view.attr(ino).map_err(|error| self.failed(ino, &error))
    }

    /// Reads up to `len` bytes of a regular file at `offset` and passes them to `reply` in one piece, exactly
    /// once, unless there is an error. Fewer bytes than requested mean the end of the file.
    pub fn read(
        &self,
        ino: u64,
        offset: u64,
        len: u32,
        reply: &mut dyn FnMut(&[u8]),
    ) -> Result<(), EngineError> {
        let attr = self.view.attr(ino).map_err(|error| self.failed(ino, &error))?;
        if attr.kind != FileType::Regular {
            return Err(EngineError::WrongType);
        }
        let end = offset.saturating_add(u64::from(len)).min(attr.size_bytes);
        if offset >= end {
            reply(&[]);
            return Ok(());
        }
        SCRATCH.with_borrow_mut(|scratch| {
            let done = self.read_range(ino, &attr, offset, end, scratch, reply);
            for buffer in [&mut scratch.decoded, &mut scratch.assembled] {
                if buffer.capacity() > KEEP_SCRATCH_BYTES {
                    *buffer = Vec::new();
                }
            }
            done
        })
    }

    fn read_range(
        &self,
        ino: u64,
        attr: &Attr,
        offset: u64,
        end: u64,
        scratch: &mut Scratch,
        reply: &mut dyn FnMut(&[u8]),
    ) -> Result<(), EngineError> {
        let Scratch { decoded, assembled } = scratch;
        assembled.clear();
        let mut at = offset;
        while at < end {
            let (layer, extent) = self.view.extent(ino, at).map_err(|error| self.failed(ino, &error))?;
            let extent_end = extent.file_offset.saturating_add(u64::from(extent.len));
            let stop = extent_end.min(end);
            // Where the requested bytes lie in the extent; both fit, as an extent is below 4 GiB.
            let (from, to) = ((at - extent.file_offset) as usize, (stop - extent.file_offset) as usize);
            let only = at == offset && stop == end;
            let (id, start, share) = match extent.place {
                Place::Hole => {
                    assembled.resize(assembled.len() + (to - from), 0);
                    at = stop;
                    continue;
                }
                Place::Block(id) => (id, 0, Share::Data),
                Place::Shared { block, offset } => (block, offset as usize, Share::Shared),
            };
            let whole = share == Share::Data && from == 0 && to == extent.len as usize;
            let held;
            let bytes: &[u8] = if whole {
                match self.cache.get(share, layer, id) {
                    Some(block) => {
                        held = block;
                        held.bytes()
                    }
                    None => {
                        self.decode(layer, ino, id, decoded)?;
                        decoded
                    }
                }
            } else {
                let asked = (offset, end);
                held = self.cached(share, layer, id, || PartialRead {
                    ino,
                    size: attr.size_bytes,
                    extent,
                    asked,
                })?;
                held.bytes()
            };
            let Some(part) = start.checked_add(to).and_then(|to| bytes.get(start + from..to)) else {
                let why =
                    format!("expected at least {} bytes, found {}", start.saturating_add(to), bytes.len());
                let error = LayerError::Corrupt { table: "data block", offset: id.start, why };
                self.troubles.report(layer, ino, &error);
                return Err(EngineError::Io);
            };
            if only {
                reply(part);
                return Ok(());
            }
            assembled.extend_from_slice(part);
            at = stop;
        }
        reply(assembled);
        Ok(())
    }

    fn decode(&self, layer: usize, ino: u64, id: BlockId, out: &mut Vec<u8>) -> Result<(), EngineError> {
        let image = self.view.layers().get(layer).ok_or(EngineError::Io)?;
        if let Some(hook) = self.before_decoding {
            hook();
        }
        image.decode(id, out).map_err(|error| {
            if is_not_here(&error) {
                return EngineError::NotHere;
            }
            self.troubles.report(layer, ino, &error);
            EngineError::Io
        })
    }

    /// Returns a decoded block from the cache, decoding it if necessary.
    fn cached(
        &self,
        share: Share,
        layer: usize,
        id: BlockId,
        asked: impl FnOnce() -> PartialRead,
    ) -> Result<Arc<Block>, EngineError> {
        let mut fresh = false;
        let mut who = None;
        let block = self.cache.get_or_decode(share, layer, id, |out| {
            fresh = true;
            let asked = who.insert(asked());
            self.decode(layer, asked.ino, id, out)
        })?;
        if fresh && let (Some(surplus), Some(PartialRead { ino, size, extent, asked })) = (&self.surplus, who)
        {
            surplus.decoded(Decoded {
                layer,
                id,
                block: block.clone(),
                ino,
                size_bytes: size,
                extent,
                asked,
            });
        }
        Ok(block)
    }

    /// Loads a shared block into the cache before it is requested, unless it is on another machine. Its errors are
    /// not logged.
    pub fn shared_block(&self, layer: usize, id: BlockId) -> Result<Arc<Block>, EngineError> {
        let image = self.view.layers().get(layer).ok_or(EngineError::Io)?;
        let error =
            |error: LayerError| if is_not_here(&error) { EngineError::NotHere } else { EngineError::Io };
        without_waiting(|| {
            self.cache.get_or_decode(Share::Shared, layer, id, |out| image.decode(id, out).map_err(error))
        })
    }

    /// Returns the first offset at or after `offset` that is data (`data`) or a hole (`!data`), as lseek(2)
    /// with SEEK_DATA and SEEK_HOLE does: the end of the file counts as a hole, and `None` means that there
    /// is no such offset (ENXIO).
    pub fn seek(&self, ino: u64, offset: u64, data: bool) -> Result<Option<u64>, EngineError> {
        let attr = self.attr(ino)?;
        if attr.kind != FileType::Regular {
            return Err(EngineError::WrongType);
        }
        let mut at = offset;
        while at < attr.size_bytes {
            let (_, extent) = self.view.extent(ino, at).map_err(|error| self.failed(ino, &error))?;
            if (extent.place == Place::Hole) != data {
                return Ok(Some(at));
            }
            at = extent.file_offset.saturating_add(u64::from(extent.len));
        }
        Ok(if data || offset >= attr.size_bytes { None } else { Some(attr.size_bytes) })
    }
}

/// The read that requested a part of a block.
struct PartialRead {
    ino: u64,
    size: u64,
    extent: Extent,
    asked: (u64, u64),
}
