//! What the layers below a tar layer have at a path: their merged view.

use std::io::{self, Read};
use std::sync::Arc;

use super::puzzlefs::plan::Content;
use super::{ConvertError, Meta, Under};
use crate::digest::Digest;
use crate::image::oci::LayerDescriptor;
use crate::image::overlay::{Merged, OverlayError, ROOT, names};
use crate::image::verified::VerifiedSource;
use crate::image::{FileType, Layer};
use crate::store::Store;
use crate::sys::file::open_regular;

/// The layers below, opened when they are first asked.
pub(super) struct Lower<'a> {
    store: &'a Store,
    layers: &'a [LayerDescriptor],
    view: Option<View>,
}

/// Their merged view, and the digests of the layers in it; `None` where there is nothing below.
pub(super) type View = Option<(Merged, Vec<Digest>)>;

impl<'a> Lower<'a> {
    /// `layers` are in `store`, with their trees; the first is the bottom one.
    pub(super) fn new(store: &'a Store, layers: &'a [LayerDescriptor]) -> Self {
        Self { store, layers, view: None }
    }

    /// What is at a path.
    pub(super) fn at(&mut self, path: &[u8]) -> Result<Under, ConvertError> {
        let view = match self.view.take() {
            Some(view) => view,
            None => self.open()?,
        };
        let found = match &view {
            Some((view, digests)) => under(view, digests, path),
            None => Ok(Under::Nothing),
        };
        self.view = Some(view);
        found
    }

    fn open(&self) -> Result<View, ConvertError> {
        view(self.store, self.layers)
    }
}

/// The merged view of layers that are in a store, with their trees, and the digests of the layers in it. Layers that
/// nothing here reads are left out.
///
/// # Errors
/// [`ConvertError::Below`] names the layer that cannot be opened.
pub fn view(store: &Store, layers: &[LayerDescriptor]) -> Result<View, ConvertError> {
    let (mut images, mut digests): (Vec<Arc<dyn Layer>>, _) = (Vec::new(), Vec::new());
    for layer in layers {
        let Some(root_hash) = layer.trust.root_hash() else { continue };
        // Without a reader such a layer cannot be asked.
        let Some(open) = layer.image().and_then(|format| format.open) else { continue };
        let below = |source| ConvertError::Below { layer: layer.digest, source };
        let blob = store.blob_path(&layer.digest);
        let (file, _) = open_regular(&blob, store.transport().links()).map_err(|error| error.source)?;
        let source = VerifiedSource::open(file, root_hash).map_err(|error| below(Box::new(error)))?;
        images.push(open(Arc::new(source)).map_err(|error| below(Box::new(error)))?);
        digests.push(layer.digest);
    }
    if images.is_empty() {
        return Ok(None);
    }
    let view = Merged::new(images).map_err(|error| failed(error, &digests))?;
    Ok(Some((view, digests)))
}

/// The content of a regular file of a merged view, by its path without symbolic links; `None` where there is none, or
/// one of more than `max` bytes.
///
/// # Errors
/// A layer that cannot be read.
pub fn read_file(view: &Merged, path: &[u8], max: u64) -> Result<Option<Vec<u8>>, ConvertError> {
    let unreadable = |error: OverlayError| ConvertError::Io(io::Error::other(error));
    let (mut ino, mut attr) = (ROOT, view.attr(ROOT).map_err(unreadable)?);
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
        if attr.kind != FileType::Directory {
            return Ok(None);
        }
        match view.lookup(ino, name).map_err(unreadable)? {
            Some(found) => (ino, attr) = found,
            None => return Ok(None),
        }
    }
    if attr.kind != FileType::Regular || attr.size_bytes > max {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    if attr.size_bytes > 0 {
        Content::new(view, [(ino, attr.size_bytes)].into()).read_to_end(&mut bytes)?;
    }
    Ok(Some(bytes))
}

/// What a merged view of layers with these digests has at a path.
pub(super) fn under(view: &Merged, digests: &[Digest], path: &[u8]) -> Result<Under, ConvertError> {
    find(view, path).map_err(|error| failed(error, digests))
}

/// Says which layer it was.
fn failed(error: OverlayError, digests: &[Digest]) -> ConvertError {
    let at = match &error {
        OverlayError::Layer { layer, .. } => *layer,
        _ => 0,
    };
    let layer = digests.get(at).or(digests.first()).copied().unwrap_or(Digest::of(b""));
    match error {
        OverlayError::Layer { source, .. } => ConvertError::Below { layer, source: Box::new(source) },
        other => ConvertError::Below { layer, source: Box::new(other) },
    }
}

fn find(view: &Merged, path: &[u8]) -> Result<Under, OverlayError> {
    let (mut ino, mut attr) = (ROOT, view.attr(ROOT)?);
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
        if attr.kind != FileType::Directory {
            return Ok(Under::Nothing);
        }
        match view.lookup(ino, name)? {
            Some(found) => (ino, attr) = found,
            None => return Ok(Under::Nothing),
        }
    }
    if attr.kind != FileType::Directory {
        return Ok(Under::Other(attr.kind));
    }
    let mut xattrs = view.xattrs(ino)?;
    // What was escaped would steer the overlay if it were stored as it is shown.
    xattrs.retain(|(name, _)| !names::steers(name));
    xattrs.sort();
    let mtime = attr.mtime.clamp(0, i64::from(u32::MAX)) as u32;
    Ok(Under::Folder(Meta { mode: attr.permissions, uid: attr.uid, gid: attr.gid, mtime, xattrs }))
}
