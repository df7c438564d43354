//! The merged view: a stack of layers shown as one tree, by the rules of overlayfs.
//!
//! Rules (Linux `Documentation/filesystems/overlayfs.rst`):
//! - a character device with number 0:0 is a whiteout, and so is an empty regular file with the attribute
//!   `trusted.overlay.whiteout`: it hides the name in all layers below, and is itself never shown, not
//!   even in the bottom layer;
//! - folders of the same name merge, down to the first layer where the name is a whiteout or is no
//!   folder; anything but a folder hides what is below;
//! - a folder with the attribute `trusted.overlay.opaque` = `y` hides the folders below it;
//! - attributes under `trusted.overlay.` are shown as names.rs says.
//!
//! # Inode numbers
//! A file is known by one number, which a mount shows as st_ino:
//! ```text
//! 1                                  the root
//! base of the layer + its number     all else; a merged folder has the number of its topmost part
//! ```
//! A layer numbers its files from 0 to a bound ([`Layer::numbers`]); its base is 2 and the bounds of
//! the layers below it. The bounds of squashfs layers are small: together they stay below 2^32 up to
//! some 80 million files, so that programs with 32-bit inode numbers work. The bases are found when
//! the first number is needed.
//!
//! So a number can be used at any later time without any state, and hard links share it. Only
//! folders that several layers have need state: their list of parts, kept once the folder has been
//! seen (about 100 bytes each, never more than there are such folders). A folder that only one layer
//! has is served straight from that layer, with that layer's cookies.
//!
//! # One plain image
//! [`Merged::plain`] shows an image that is no layer as it is, without these rules: what a layer would mean as a
//! whiteout is a file (plain.rs).
//!
//! # Listing a merged folder
//! Layers list in the order of names, so a merged listing is a streaming merge; nothing is held but
//! 32 entries a layer. Its cookie is the ordinal of the entry. Where each layer stood at an ordinal is
//! remembered for the last [`SAVED_CURSORS`] of them (8 bytes a layer each); on a miss the listing
//! is walked again from its start.
//!
//! # Locks
//! `dirs` (read mostly), `cursors` (short), both leaf locks: no layer is called under them.

mod cursor;
mod links;
pub mod names;
mod plain;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use self::cursor::{CursorCache, Merge};
pub use self::plain::Shown;
use super::layer::{Attr, DirEntry, Extent, FileType, Layer, LayerError, NodeId, StatFs};

use crate::sys::locks;

/// The inode number of the root folder (FUSE_ROOT_ID in `linux/fuse.h`).
pub const ROOT: u64 = 1;
/// How many layers a view can have.
pub const MAX_LAYERS: usize = 1000;
/// How many layers the kernel's overlayfs takes (`OVL_MAX_STACK` in fs/overlayfs/params.h, less the empty one that
/// the kernel backend adds).
pub const MAX_KERNEL_LAYERS: usize = 499;
/// How many places in merged listings are remembered, each with 8 bytes a layer.
pub const SAVED_CURSORS: usize = 64;

/// The number of the first file of the bottom layer.
const FIRST: u64 = ROOT + 1;
/// The number that a listing shows of an entry that leads to no inode. It stands for no file.
const BROKEN: u64 = u64::MAX;

/// Why the merged view cannot answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverlayError {
    /// There must be 1 to 1000 layers.
    #[error("a merged view takes 1 to {MAX_LAYERS} layers, found {0}")]
    LayerCount(usize),
    /// The folder that is to be shown as the root is not there.
    #[error("the image has no folder `{}`: {why}", folder.display())]
    Subdir {
        /// The folder, as the user wrote it.
        folder: PathBuf,
        /// What was found instead.
        why: String,
    },
    /// The number does not belong to any layer.
    #[error("inode {0:#x} belongs to no layer")]
    NoSuchInode(u64),
    /// A layer could not answer.
    #[error("layer {layer}: {source}")]
    Layer {
        /// Index of the layer, 0 is the bottom.
        layer: usize,
        /// Its answer.
        source: LayerError,
    },
}

/// One name in a folder of the merged view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name: any bytes but NUL and `/`.
    pub name: Vec<u8>,
    /// The inode number.
    pub ino: u64,
    /// The file's type.
    pub kind: FileType,
    /// Give it to [`Merged::read_dir`] to go on after this entry. Never 0, at most 2^56.
    pub next: u64,
}

/// A file as one layer knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Part {
    /// Index of the layer, 0 is the bottom.
    pub layer: usize,
    /// The node in that layer.
    pub node: NodeId,
}

/// A folder that several layers have (or the root).
struct MergedDir {
    /// Its parts, topmost first.
    parts: Box<[Part]>,
    /// The folder that it was found in.
    parent: u64,
    /// Link count, 0 while nobody asked.
    nlink: AtomicU32,
}

/// A stack of layers, shown as one tree, as overlayfs merges them.
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
/// use mosfs::layers::{FileType, Merged, open};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let example = Example::publish()?;
/// # let store = &example.store;
/// # let (name, _) = store.names()?.into_iter().find(|(name, _)| name.starts_with("mos/images/")).unwrap();
/// # let image = store.image(&store.resolve(&name)?.digest)?;
/// # let plan = mosfs::MountPlan::new("web", &image, &store.blobs(), Default::default())?;
/// // What a MountPlan has, merged where it has several layers.
/// let tree: Merged = open(&plan)?;
/// let (usr, attr) = tree.lookup(1, b"usr")?.ok_or("no such folder")?;
/// assert_eq!(attr.kind, FileType::Directory);
///
/// let mut names = Vec::new();
/// tree.read_dir(usr, 0, &mut |entry| {
///     names.push(entry.name);
///     true
/// })?;
/// assert_eq!(names, [b"lib"]);
/// # Ok(())
/// # }
/// ```
pub struct Merged {
    layers: Vec<Arc<dyn Layer>>,
    root: Arc<MergedDir>,
    dirs: RwLock<HashMap<u64, Arc<MergedDir>>>,
    cursors: Mutex<CursorCache>,
    hidden_links: OnceLock<HashMap<Part, u32>>,
    /// The first inode number of each layer, and one past the last of all.
    bases: OnceLock<Box<[u64]>>,
    /// How the one image is shown that is no layer of a stack; `None` for layers.
    plain: Option<Shown>,
}

/// What an inode number stands for.
enum Inode {
    /// A file, or a folder that one layer has alone.
    Alone(Part),
    /// A folder with parts in several layers.
    Several(Arc<MergedDir>),
}

impl Merged {
    /// The merged view of `layers`; the first is the bottom one.
    ///
    /// # Errors
    /// A wrong number of layers, or a root folder that cannot be read.
    pub fn new(layers: Vec<Arc<dyn Layer>>) -> Result<Self, OverlayError> {
        if layers.is_empty() || layers.len() > MAX_LAYERS {
            return Err(OverlayError::LayerCount(layers.len()));
        }
        let mut parts: Vec<Part> = Vec::new();
        for (layer, image) in layers.iter().enumerate().rev() {
            let part = Part { layer, node: image.root() };
            parts.push(part);
            if layer > 0 && is_opaque(&layers, part)? {
                break;
            }
        }
        Ok(Self::with_root(layers, parts, None))
    }

    fn with_root(layers: Vec<Arc<dyn Layer>>, parts: Vec<Part>, plain: Option<Shown>) -> Self {
        let parts = parts.into_boxed_slice();
        Self {
            layers,
            root: Arc::new(MergedDir { parts, parent: ROOT, nlink: AtomicU32::new(0) }),
            dirs: RwLock::default(),
            cursors: Mutex::default(),
            hidden_links: OnceLock::new(),
            bases: OnceLock::new(),
            plain,
        }
    }

    /// The layers, bottom first.
    pub fn layers(&self) -> &[Arc<dyn Layer>] {
        &self.layers
    }

    /// Whether any layer has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        self.layers.iter().any(|layer| layer.has_xattrs())
    }

    /// Whether any file may have an extended attribute of that name. May read from the layers.
    pub fn may_have_xattr(&self, name: &[u8]) -> bool {
        names::is_renamed(name) || self.layers.iter().any(|layer| layer.may_have_xattr(name))
    }

    /// What stat(2) shows of a file, with the link count of the merged view.
    pub fn attr(&self, ino: u64) -> Result<Attr, OverlayError> {
        match self.place(ino)? {
            Inode::Alone(part) => {
                let attr = self.part_attr(part)?;
                if attr.kind == FileType::Directory {
                    return Ok(attr);
                }
                Ok(Attr { nlink: self.visible_links(part, attr.nlink)?, ..attr })
            }
            Inode::Several(dir) => {
                let Some(&top) = dir.parts.first() else { return Err(OverlayError::NoSuchInode(ino)) };
                let attr = self.part_attr(top)?;
                Ok(Attr { nlink: self.dir_links(&dir)?, ..attr })
            }
        }
    }

    /// The file at a path (`usr/lib`; the root is empty), without following links.
    pub(crate) fn find(&self, path: &[u8]) -> Result<Option<(u64, Attr)>, OverlayError> {
        let (mut ino, mut attr) = (ROOT, self.attr(ROOT)?);
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            if attr.kind != FileType::Directory {
                return Ok(None);
            }
            match self.lookup(ino, name)? {
                Some(found) => (ino, attr) = found,
                None => return Ok(None),
            }
        }
        Ok(Some((ino, attr)))
    }

    /// The file of that name in a folder.
    pub fn lookup(&self, dir: u64, name: &[u8]) -> Result<Option<(u64, Attr)>, OverlayError> {
        let ino = match self.place(dir)? {
            Inode::Alone(part) => {
                let Some(entry) = self.part_lookup(part, name)? else { return Ok(None) };
                let found = Part { layer: part.layer, node: entry.node };
                if self.is_whiteout(found, entry.kind)? {
                    return Ok(None);
                }
                self.number(found)?
            }
            Inode::Several(merged) => {
                let mut chain = Chain::default();
                for &part in &merged.parts {
                    if let Some(entry) = self.part_lookup(part, name)?
                        && !self.extend(
                            &mut chain,
                            Part { layer: part.layer, node: entry.node },
                            entry.kind,
                        )?
                    {
                        break;
                    }
                }
                match self.number_of(chain, dir)? {
                    Some((ino, _)) => ino,
                    None => return Ok(None),
                }
            }
        };
        Ok(Some((ino, self.attr(ino)?)))
    }

    /// Calls `each` for the entries of a folder in the order of their names, from `cookie` on (0: from
    /// the start, else the `next` of an earlier entry), until it returns false. An entry that `each`
    /// refused comes again when the listing goes on with the `next` of the one before it.
    pub fn read_dir(
        &self,
        dir: u64,
        cookie: u64,
        each: &mut dyn FnMut(Entry) -> bool,
    ) -> Result<(), OverlayError> {
        match self.place(dir)? {
            Inode::Alone(part) => self.read_single(part, cookie, each),
            Inode::Several(merged) => self.read_merged(dir, &merged, cookie, each),
        }
    }

    /// The folder that a folder lies in, where that is known without a search: the folder is the
    /// root, or several layers have it.
    pub fn parent(&self, dir: u64) -> Option<u64> {
        match self.place(dir).ok()? {
            Inode::Several(merged) => Some(merged.parent),
            Inode::Alone(_) => (dir == ROOT).then_some(ROOT),
        }
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, ino: u64) -> Result<Vec<u8>, OverlayError> {
        let part = self.part(ino)?;
        self.layers[part.layer].read_link(part.node).map_err(|source| at(part, source))
    }

    /// The extended attributes that a user sees, with full names, in the order of the image.
    pub fn xattrs(&self, ino: u64) -> Result<Vec<(Vec<u8>, Vec<u8>)>, OverlayError> {
        let part = self.part(ino)?;
        if !self.layers[part.layer].has_xattrs() {
            return Ok(Vec::new());
        }
        let all = self.layers[part.layer].xattrs(part.node).map_err(|source| at(part, source))?;
        if self.plain.is_some() {
            return Ok(all);
        }
        Ok(all.into_iter().filter_map(|(name, value)| Some((names::shown(name)?, value))).collect())
    }

    /// The extent that holds the byte at `offset` of a regular file, which is below its size, and the
    /// index of the layer that has it.
    pub fn extent(&self, ino: u64, offset: u64) -> Result<(usize, Extent), OverlayError> {
        let part = self.part(ino)?;
        let extent = self.layers[part.layer].extent(part.node, offset).map_err(|source| at(part, source))?;
        // A layer must answer with the extent that was asked for; a reader that loops over extents
        // relies on it to come to an end.
        let past = offset.checked_sub(extent.file_offset);
        if past.is_none_or(|past| past >= u64::from(extent.len)) {
            let why = format!(
                "expected an extent that holds offset {offset}, found {} bytes at {}",
                extent.len, extent.file_offset
            );
            return Err(at(part, LayerError::Corrupt { table: "extent", offset: extent.file_offset, why }));
        }
        Ok((part.layer, extent))
    }

    /// Sizes, for statfs(2): the sums over the layers.
    pub fn stat_fs(&self) -> StatFs {
        let mut sum = StatFs::default();
        for layer in &self.layers {
            let one = layer.stat_fs();
            sum.bytes = sum.bytes.saturating_add(one.bytes);
            sum.files = sum.files.saturating_add(one.files);
            sum.block_bytes = sum.block_bytes.max(one.block_bytes);
        }
        sum
    }

    /// How many merged folders are remembered.
    pub fn merged_folders(&self) -> usize {
        locks::read(&self.dirs).len()
    }

    /// The layer and node of a file; of a merged folder its topmost part.
    fn part(&self, ino: u64) -> Result<Part, OverlayError> {
        if ino == ROOT {
            return self.root.parts.first().copied().ok_or(OverlayError::NoSuchInode(ino));
        }
        let bases = self.bases();
        // The last layer whose base is not above the number.
        let above = bases.partition_point(|base| *base <= ino);
        let Some(layer) = above.checked_sub(1).filter(|layer| *layer < self.layers.len()) else {
            return Err(OverlayError::NoSuchInode(ino));
        };
        let node = self.layers[layer].node(ino - bases[layer]);
        node.map(|node| Part { layer, node }).map_err(|source| OverlayError::Layer { layer, source })
    }

    /// Finds now how the files are numbered, rather than when the first number is needed. A caller whose threads may
    /// not all wait for another machine calls this in one that may: what cannot be read is numbered otherwise.
    pub fn number_files(&self) {
        self.bases();
    }

    fn bases(&self) -> &[u64] {
        self.bases.get_or_init(|| {
            let mut next = FIRST;
            let mut bases = vec![next];
            for layer in &self.layers {
                next = next.saturating_add(layer.numbers());
                bases.push(next);
            }
            bases.into_boxed_slice()
        })
    }

    /// The inode number of a file.
    fn number(&self, part: Part) -> Result<u64, OverlayError> {
        let number = self.layers[part.layer].number(part.node).map_err(|source| at(part, source))?;
        Ok(self.bases()[part.layer] + number)
    }

    fn place(&self, ino: u64) -> Result<Inode, OverlayError> {
        let part = self.part(ino)?;
        if self.layers.len() == 1 {
            return Ok(Inode::Alone(part));
        }
        if ino == ROOT {
            return Ok(match *self.root.parts {
                [_] => Inode::Alone(part),
                _ => Inode::Several(self.root.clone()),
            });
        }
        // The bottom layer is never the topmost part of several.
        if part.layer > 0
            && let Some(dir) = locks::read(&self.dirs).get(&ino)
        {
            return Ok(Inode::Several(dir.clone()));
        }
        Ok(Inode::Alone(part))
    }

    fn part_attr(&self, part: Part) -> Result<Attr, OverlayError> {
        let attr = self.layers[part.layer].attr(part.node).map_err(|source| at(part, source))?;
        Ok(match &self.plain {
            Some(shown) => shown.attr(attr),
            None => attr,
        })
    }

    fn part_lookup(&self, part: Part, name: &[u8]) -> Result<Option<DirEntry>, OverlayError> {
        self.layers[part.layer].lookup(part.node, name).map_err(|source| at(part, source))
    }

    /// Whiteout: a character device with number 0:0, or an empty regular file with the attribute
    /// (overlayfs.rst, "whiteouts and opaque directories").
    fn is_whiteout(&self, part: Part, kind: FileType) -> Result<bool, OverlayError> {
        if self.plain.is_some() {
            return Ok(false);
        }
        match kind {
            FileType::CharDevice => Ok(self.part_attr(part)?.rdev == 0),
            FileType::Regular if self.layers[part.layer].has_xattrs() => {
                // A file that cannot be read hides nothing; opening it returns the error.
                let Ok(attr) = self.part_attr(part) else { return Ok(false) };
                if attr.size_bytes != 0 || !attr.has_xattrs {
                    return Ok(false);
                }
                let all = self.layers[part.layer].xattrs(part.node).map_err(|source| at(part, source))?;
                Ok(all.iter().any(|(name, _)| name == names::WHITEOUT))
            }
            _ => Ok(false),
        }
    }

    /// Adds what the next lower layer has under the name to what is visible of it. Returns whether
    /// layers further down still matter.
    fn extend(&self, chain: &mut Chain, part: Part, kind: FileType) -> Result<bool, OverlayError> {
        if kind == FileType::Directory {
            // Whether the part above is opaque is looked up only here, where there is something to hide.
            if let Some(&above) = chain.parts.last()
                && is_opaque(&self.layers, above)?
            {
                return Ok(false);
            }
            chain.parts.push(part);
            chain.kind = Some(kind);
            return Ok(true);
        }
        if chain.parts.is_empty() && !self.is_whiteout(part, kind)? {
            chain.parts.push(part);
            chain.kind = Some(kind);
        }
        Ok(false)
    }

    /// The inode number of what is visible under a name; remembers a merged folder.
    fn number_of(&self, chain: Chain, parent: u64) -> Result<Option<(u64, FileType)>, OverlayError> {
        let (Some(&top), Some(kind)) = (chain.parts.first(), chain.kind) else { return Ok(None) };
        let ino = self.number(top)?;
        if chain.parts.len() > 1 {
            let known = locks::read(&self.dirs).contains_key(&ino);
            if !known {
                let dir =
                    MergedDir { parts: chain.parts.into_boxed_slice(), parent, nlink: AtomicU32::new(0) };
                let mut dirs = locks::write(&self.dirs);
                dirs.entry(ino).or_insert_with(|| Arc::new(dir));
            }
        }
        Ok(Some((ino, kind)))
    }

    fn read_single(
        &self,
        part: Part,
        cookie: u64,
        each: &mut dyn FnMut(Entry) -> bool,
    ) -> Result<(), OverlayError> {
        let mut failed = None;
        self.layers[part.layer]
            .read_dir(part.node, cookie, &mut |entry| {
                let found = Part { layer: part.layer, node: entry.node };
                match self.is_whiteout(found, entry.kind) {
                    Ok(true) => true,
                    Ok(false) => {
                        let DirEntry { name, kind, next, .. } = entry;
                        let ino = self.number(found).unwrap_or(BROKEN);
                        each(Entry { name, ino, kind, next })
                    }
                    Err(error) => {
                        failed = Some(error);
                        false
                    }
                }
            })
            .map_err(|source| at(part, source))?;
        failed.map_or(Ok(()), Err)
    }

    fn read_merged(
        &self,
        ino: u64,
        dir: &MergedDir,
        cookie: u64,
        each: &mut dyn FnMut(Entry) -> bool,
    ) -> Result<(), OverlayError> {
        let saved = match cookie {
            0 => None,
            _ => locks::lock(&self.cursors).get(ino, cookie),
        };
        let mut ordinal = if saved.is_some() { cookie } else { 0 };
        let mut merge = Merge::new(self, &dir.parts, saved.as_deref())?;
        while let Some(group) = merge.next()? {
            let name = std::mem::take(&mut group[0].1.name);
            let mut chain = Chain::default();
            for (part, entry) in group.iter() {
                if !self.extend(&mut chain, Part { layer: part.layer, node: entry.node }, entry.kind)? {
                    break;
                }
            }
            if !chain.parts.is_empty() {
                if ordinal < cookie {
                    ordinal += 1;
                } else {
                    let kind = chain.kind.unwrap_or(FileType::Regular);
                    let (child, kind) = match self.number_of(chain, ino) {
                        Ok(Some(found)) => found,
                        Ok(None) => continue,
                        Err(_) => (BROKEN, kind),
                    };
                    if !each(Entry { name, ino: child, kind, next: ordinal + 1 }) {
                        break;
                    }
                    ordinal += 1;
                }
            }
            merge.accept();
        }
        if ordinal > 0 {
            let cookies = merge.cookies();
            locks::lock(&self.cursors).put(ino, ordinal, cookies);
        }
        Ok(())
    }

    /// The link count of a merged folder: itself, `.`, and `..` of each visible folder in it.
    fn dir_links(&self, dir: &MergedDir) -> Result<u32, OverlayError> {
        match dir.nlink.load(Ordering::Relaxed) {
            0 => {}
            known => return Ok(known),
        }
        let mut count = 2u32;
        let mut merge = Merge::new(self, &dir.parts, None)?;
        while let Some(group) = merge.next()? {
            if group[0].1.kind == FileType::Directory {
                count = count.saturating_add(1);
            }
            merge.accept();
        }
        dir.nlink.store(count, Ordering::Relaxed);
        Ok(count)
    }

    /// The link count of a file: what the layer says, less the links that layers above hide.
    fn visible_links(&self, part: Part, nlink: u32) -> Result<u32, OverlayError> {
        if nlink <= 1 || part.layer + 1 == self.layers.len() {
            return Ok(nlink);
        }
        let less = |hidden: &HashMap<Part, u32>| {
            nlink.saturating_sub(hidden.get(&part).copied().unwrap_or(0)).max(1)
        };
        if let Some(hidden) = self.hidden_links.get() {
            return Ok(less(hidden));
        }
        // Not under a lock: the walk may wait for another machine. Two threads that walk find the same.
        let hidden = links::hidden_links(self, &self.root.parts)?;
        Ok(less(self.hidden_links.get_or_init(|| hidden)))
    }
}

/// What is visible under one name: the parts of a folder, topmost first, or one file; empty where
/// the name is hidden or nowhere.
#[derive(Default)]
struct Chain {
    parts: Vec<Part>,
    kind: Option<FileType>,
}

fn at(part: Part, source: LayerError) -> OverlayError {
    OverlayError::Layer { layer: part.layer, source }
}

/// Opaque: `overlay.opaque` is `y` (overlayfs.rst, "whiteouts and opaque directories").
fn is_opaque(layers: &[Arc<dyn Layer>], part: Part) -> Result<bool, OverlayError> {
    let layer = &layers[part.layer];
    if !layer.has_xattrs() || !layer.attr(part.node).map_err(|source| at(part, source))?.has_xattrs {
        return Ok(false);
    }
    let all = layer.xattrs(part.node).map_err(|source| at(part, source))?;
    Ok(all.iter().any(|(name, value)| name == names::OPAQUE && value == b"y"))
}
