//! What the layers below a tar layer have at a path: their merged view.

use std::io::Read;
use std::sync::Arc;

use super::puzzlefs::plan::Content;
use super::{ConvertError, LowerEntry, Meta};
use crate::digest::Digest;
use crate::image::oci::LayerDescriptor;
use crate::image::overlay::{Merged, OverlayError, names};
use crate::image::verified::VerifiedSource;
use crate::image::{FileType, Layer};
use crate::store::Store;
use crate::sys::file::open_regular;

/// The layers below, opened when they are first asked.
pub(super) struct Lower<'a> {
    store: &'a Store,
    layers: &'a [LayerDescriptor],
    /// Inside: `None` where there is nothing below.
    view: Option<Option<View>>,
}

impl<'a> Lower<'a> {
    /// `layers` are in `store`, with their trees; the first is the bottom one.
    pub(super) fn new(store: &'a Store, layers: &'a [LayerDescriptor]) -> Self {
        Self { store, layers, view: None }
    }

    /// What is at a path.
    pub(super) fn at(&mut self, path: &[u8]) -> Result<LowerEntry, ConvertError> {
        if self.view.is_none() {
            self.view = Some(View::open(self.store, self.layers)?);
        }
        match self.view.iter().flatten().next() {
            Some(view) => under(&view.tree, &view.digests, path),
            None => Ok(LowerEntry::Nothing),
        }
    }
}

/// The merged view of layers that are in a store, and the digests of the layers in it.
pub struct View {
    tree: Merged,
    digests: Vec<Digest>,
}

impl View {
    /// Opens layers with their trees. Layers that nothing here reads are left out; `None` where none is left.
    ///
    /// # Errors
    /// [`ConvertError::Below`] names the layer that cannot be opened.
    pub fn open(store: &Store, layers: &[LayerDescriptor]) -> Result<Option<Self>, ConvertError> {
        let (mut images, mut digests): (Vec<Arc<dyn Layer>>, _) = (Vec::new(), Vec::new());
        for layer in layers {
            // Without a reader such a layer cannot be asked.
            let Some(open) = layer.image().and_then(|format| format.open) else { continue };
            let below = |source| ConvertError::Below { layer: layer.digest, source };
            let source = open_verified(store, layer).map_err(|error| below(Box::new(error)))?;
            let Some(source) = source else { continue };
            images.push(open(Arc::new(source)).map_err(|error| below(Box::new(error)))?);
            digests.push(layer.digest);
        }
        if images.is_empty() {
            return Ok(None);
        }
        let tree = Merged::new(images).map_err(|error| failed(error, &digests))?;
        Ok(Some(Self { tree, digests }))
    }

    /// The content of a regular file, by its path without symbolic links; `None` where there is none, or one of more
    /// than `max` bytes.
    ///
    /// # Errors
    /// [`ConvertError::Below`] names the layer that cannot be read.
    pub fn read_file(&self, path: &[u8], max: u64) -> Result<Option<Vec<u8>>, ConvertError> {
        let found = self.tree.find(path).map_err(|error| failed(error, &self.digests))?;
        let Some((ino, attr)) = found else { return Ok(None) };
        if attr.kind != FileType::Regular || attr.size_bytes > max {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        if attr.size_bytes > 0 {
            Content::new(&self.tree, [(ino, attr.size_bytes)].into()).read_to_end(&mut bytes)?;
        }
        Ok(Some(bytes))
    }

    /// The names in a folder, at most `most` of them; none where there is no such folder.
    ///
    /// # Errors
    /// [`ConvertError::Below`] names the layer that cannot be read.
    pub fn names(&self, path: &[u8], most: usize) -> Result<Vec<Vec<u8>>, ConvertError> {
        let mut found = Vec::new();
        let mut list = || match self.tree.find(path)? {
            Some((ino, attr)) if attr.kind == FileType::Directory => {
                self.tree.read_dir(ino, 0, &mut |entry| {
                    found.push(entry.name);
                    found.len() < most
                })
            }
            _ => Ok(()),
        };
        list().map_err(|error| failed(error, &self.digests))?;
        Ok(found)
    }
}
/// Opens the file of a layer, verified; `None` for a layer without a root hash.
///
/// # Errors
/// [`ConvertError::Verity`], [`ConvertError::Io`].
pub fn open_verified(store: &Store, layer: &LayerDescriptor) -> Result<Option<VerifiedSource>, ConvertError> {
    let Some(root_hash) = layer.trust.root_hash() else { return Ok(None) };
    let path = store.blob_path(&layer.digest);
    let (file, _) = open_regular(&path, store.transport().links()).map_err(|error| error.source)?;
    VerifiedSource::open(file, root_hash).map(Some).map_err(|source| ConvertError::Verity { source })
}

/// What a merged view of layers with these digests has at a path.
pub(super) fn under(view: &Merged, digests: &[Digest], path: &[u8]) -> Result<LowerEntry, ConvertError> {
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

fn find(view: &Merged, path: &[u8]) -> Result<LowerEntry, OverlayError> {
    let Some((ino, attr)) = view.find(path)? else { return Ok(LowerEntry::Nothing) };
    if attr.kind != FileType::Directory {
        return Ok(LowerEntry::Other(attr.kind));
    }
    let mut xattrs = view.xattrs(ino)?;
    // What was escaped would steer the overlay if it were stored as it is shown.
    xattrs.retain(|(name, _)| !names::steers(name));
    xattrs.sort();
    let mtime = attr.mtime.clamp(0, i64::from(u32::MAX)) as u32;
    Ok(LowerEntry::Folder(Meta { mode: attr.permissions, uid: attr.uid, gid: attr.gid, mtime, xattrs }))
}
