//! What a build has made already: layers that several images have are converted once.
//!
//! **Rule:** what is made of a layer depends on its blob, on the digest that the image's config names for its content, on
//! the packing, and on the layers below, which say what a folder is that a tar only implies. Where all of these are
//! equal, so is the result.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use super::Packing;
use crate::digest::Digest;
use crate::image::Layer;
use crate::image::oci::{LayerDescriptor, OciImage};
use crate::image::squashfs::Superblock;
use crate::sys::locks;

/// What one build has made, for the images that are still to come. All of it is in the build's store, or open.
#[derive(Default)]
pub struct Made {
    /// Layers that more than one image has.
    shared: HashSet<Digest>,
    /// Layers that are stored, and what a conversion changed or dropped.
    pub(super) stored: Known<Source, (LayerDescriptor, Vec<String>)>,
    /// Layers that were images of file systems already, as they are stored, and their superblocks if they are squashfs.
    pub(super) images: Known<LayerDescriptor, (LayerDescriptor, Option<Superblock>)>,
    /// Layers that were opened, to become parts of a PuzzleFS image.
    pub(super) opened: Known<Source, (Arc<dyn Layer>, Vec<String>)>,
}

impl Made {
    /// For a build of these images, of which nothing is made yet.
    pub fn of<'a>(images: impl Iterator<Item = &'a OciImage>) -> Self {
        let (mut seen, mut shared) = (HashSet::new(), HashSet::new());
        let mut known = HashSet::new();
        for image in images.filter(|image| known.insert(image.digest)) {
            let own: HashSet<Digest> = image.layers.iter().map(|layer| layer.digest).collect();
            shared.extend(own.into_iter().filter(|layer| !seen.insert(*layer)));
        }
        Self { shared, ..Self::default() }
    }

    /// Whether more than one image has a layer: the file of one that was opened stays on the disk for these alone.
    pub(super) fn is_shared(&self, layer: &Digest) -> bool {
        self.shared.contains(layer)
    }
}

/// What a layer is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    pub layer: LayerDescriptor,
    pub diff_id: Option<Digest>,
    pub below: Vec<Digest>,
    pub packing: Packing,
}

impl Source {
    /// The source of the layer `at` of an image, on top of layers that are what is `below` it, or what was made of that.
    pub(super) fn new(
        layer: &LayerDescriptor,
        at: usize,
        diff_ids: Option<&[Digest]>,
        below: &[LayerDescriptor],
        packing: Packing,
    ) -> Self {
        Self {
            layer: layer.clone(),
            diff_id: diff_ids.and_then(|ids| ids.get(at).copied()),
            below: below.iter().map(|layer| layer.digest).collect(),
            packing,
        }
    }
}

/// What was made of what.
pub struct Known<K, V>(Mutex<Vec<(K, V)>>);

impl<K, V> Default for Known<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: PartialEq, V: Clone> Known<K, V> {
    /// Returns what was made of this, or makes it now.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get_or_make<E>(&self, key: K, make: impl FnOnce(&K) -> Result<V, E>) -> Result<V, E> {
        let found = locks::lock(&self.0).iter().find(|(one, _)| *one == key).map(|(_, made)| made.clone());
        if let Some(made) = found {
            return Ok(made);
        }
        let made = make(&key)?;
        locks::lock(&self.0).push((key, made.clone()));
        Ok(made)
    }
}
