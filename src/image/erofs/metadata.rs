//! Reads metadata: inodes, xattrs, folders, indexes of clusters, the ends of files that are beside them.
//!
//! Metadata lies in the image as it is, or in the metabox, a file of the image whose content may be
//! compressed. Both are read in pages of 4096 bytes, the unit that verity verifies, and cached.

use std::sync::Arc;

use super::Erofs;
use super::error::corrupt;
use crate::image::layer::Place;
use crate::image::source::check_range;
use crate::image::{LayerError, ReadError};

/// Size of a page, in bytes.
pub(super) const PAGE_BYTES: usize = 4096;

const PAGE: u64 = PAGE_BYTES as u64;

/// The name of metadata in errors.
const TABLE: &str = "metadata";

/// Bit of a key of the cache: a page of the metabox.
const METABOX_PAGE: u64 = 1 << 63;

/// Where metadata is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Space {
    /// In the image.
    Image,
    /// In the metabox.
    Metabox,
}

/// A piece of a page.
pub(super) struct Piece {
    page: Arc<[u8]>,
    from: usize,
    to: usize,
}

impl Piece {
    /// A piece that is all of `bytes`.
    pub(super) fn whole(bytes: Arc<[u8]>) -> Self {
        Piece { from: 0, to: bytes.len(), page: bytes }
    }

    /// The bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        self.page.get(self.from..self.to).unwrap_or_default()
    }
}

impl Erofs {
    /// Size of a space, in bytes.
    pub(super) fn space_bytes(&self, space: Space) -> u64 {
        match space {
            Space::Image => self.source.size_bytes(),
            Space::Metabox => self.metabox.map_or(0, |inode| inode.size),
        }
    }

    /// Returns a page; it is shorter than [`PAGE_BYTES`] at the end of the space.
    fn page(&self, space: Space, number: u64) -> Result<Arc<[u8]>, LayerError> {
        let key = match space {
            Space::Image => number,
            Space::Metabox => METABOX_PAGE | number,
        };
        if let Some(page) = self.pages.get(key) {
            return Ok(page);
        }
        let at = number.saturating_mul(PAGE);
        let size = self.space_bytes(space);
        let len = size.saturating_sub(at).min(PAGE) as usize;
        if len == 0 {
            return Err(ReadError::OutOfRange { offset: at, len: 1, size }.into());
        }
        let page: Arc<[u8]> = match space {
            Space::Image => {
                let mut scratch = Vec::new();
                Arc::from(self.source.read(at, len, &mut scratch)?)
            }
            Space::Metabox => self.metabox_page(number, at, len)?,
        };
        self.pages.put(key, page.clone());
        Ok(page)
    }

    /// Decodes a page of the metabox, and caches the other pages that the same cluster holds.
    fn metabox_page(&self, number: u64, at: u64, len: usize) -> Result<Arc<[u8]>, LayerError> {
        let Some(metabox) = self.metabox else {
            return Err(corrupt(TABLE, at, "a reference to compressed metadata, and the image has none"));
        };
        let extent = self.extent_of(&metabox, at)?;
        let end = extent.file_offset.saturating_add(extent.len.into());
        let mut content = Vec::new();
        if at.saturating_add(len as u64) > end {
            self.append(&metabox, at, len, &mut content)?;
            return Ok(Arc::from(content));
        }
        self.append(&metabox, extent.file_offset, extent.len as usize, &mut content)?;
        if matches!(extent.place, Place::Block(_)) {
            let first = extent.file_offset.div_ceil(PAGE);
            let after = if end == metabox.size { end.div_ceil(PAGE) } else { end / PAGE };
            for other in (first..after).filter(|other| *other != number) {
                let from = (other * PAGE - extent.file_offset) as usize;
                if let Some(page) = content.get(from..content.len().min(from + PAGE_BYTES)) {
                    self.pages.put(METABOX_PAGE | other, Arc::from(page));
                }
            }
        }
        let from = (at - extent.file_offset) as usize;
        Ok(Arc::from(content.get(from..from + len).unwrap_or_default()))
    }

    /// Returns `len` bytes at `at` if they lie in one page, and `None` if not.
    fn piece(&self, space: Space, at: u64, len: usize) -> Result<Option<Piece>, LayerError> {
        let from = (at % PAGE) as usize;
        if from + len > PAGE_BYTES {
            return Ok(None);
        }
        let page = self.page(space, at / PAGE)?;
        check_range(at, len as u64, self.space_bytes(space))?;
        Ok(Some(Piece { page, from, to: from + len }))
    }

    /// Returns `len` bytes at `at`, at most a block. The caller has bounded `len`.
    pub(super) fn bytes(&self, space: Space, at: u64, len: usize) -> Result<Piece, LayerError> {
        if len <= PAGE_BYTES
            && let Some(piece) = self.piece(space, at, len)?
        {
            return Ok(piece);
        }
        let mut bytes = Vec::new();
        self.append_metadata(space, at, len, &mut bytes)?;
        Ok(Piece::whole(Arc::from(bytes)))
    }

    /// Returns the `N` bytes at `at`.
    pub(super) fn array<const N: usize>(&self, space: Space, at: u64) -> Result<[u8; N], LayerError> {
        let mut out = [0; N];
        if let Some(piece) = self.piece(space, at, N)? {
            out.copy_from_slice(piece.bytes());
            return Ok(out);
        }
        let mut bytes = Vec::new();
        self.append_metadata(space, at, N, &mut bytes)?;
        out.copy_from_slice(&bytes);
        Ok(out)
    }

    /// Appends `len` bytes at `at` to `out`. The caller has bounded `len`.
    pub(super) fn append_metadata(
        &self,
        space: Space,
        at: u64,
        len: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), LayerError> {
        check_range(at, len as u64, self.space_bytes(space))?;
        let (mut at, mut left) = (at, len);
        while left > 0 {
            let from = (at % PAGE) as usize;
            let now = left.min(PAGE_BYTES - from);
            let page = self.page(space, at / PAGE)?;
            out.extend_from_slice(page.get(from..from + now).unwrap_or_default());
            at += now as u64;
            left -= now;
        }
        Ok(())
    }
}
