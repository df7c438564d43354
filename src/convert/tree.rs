//! The tree of a layer while its tar stream is read.
//!
//! Only what is not content is held here, until the stream has ended: a later entry may replace an
//! earlier one, make its folder opaque, or be what a link meant. Rules:
//!
//! - The last entry of a name counts. A folder over a folder keeps the children. Anything else
//!   over a folder takes the children away.
//! - Missing parents are made; what they look like is asked of the layers below (a folder that a
//!   layer does not mention keeps its attributes), else 0755, root, 1970.
//! - A parent that is a symbolic link of this layer is followed, within the layer's root; a whiteout's is not.
//!   One that is a link in a layer below is not followed: the folder made here takes its place, which is what the
//!   kernel's overlayfs shows of layers that were unpacked one by one. A note says so.
//! - A folder that only whiteouts stand in is there to delete, not to appear: where the layers below have no folder
//!   at its place, nothing of it is stored, and what is there stays. A whiteout in a folder
//!   that hides all below it, or has nothing below it, is not stored either.
//! - OCI whiteouts (image-spec, layer.md) become overlayfs' own (kernel, overlayfs.rst): `.wh.NAME` a character device
//!   0:0, `.wh..wh..opq` the attribute `trusted.overlay.opaque=y` of its folder, wherever in the stream it stands. Both
//!   speak of the layers below only: an entry of that name in the same layer stays, and if it is a
//!   folder, it becomes opaque. Other names that begin with `.wh..wh.` are notes of aufs, and dropped.
//! - A hard link to an earlier name is the same file, even if that name is replaced later. One to
//!   a later name is resolved at the end. One to a name of a layer below cannot be stored.
//! - `trusted.overlay.*` and `user.overlay.*` of the stream are dropped: the layer does not steer
//!   the overlay. So are attributes that squashfs has no room for (POSIX access control lists);
//!   both are told as notes.
//!
//! Bounds: [`MAX_ENTRIES`] names and [`MAX_METADATA_BYTES`] for names, link targets, attributes and lists of blocks.

use std::collections::BTreeMap;

use super::tar::{Entry, EntryKind, show};
use super::{ConvertError, MAX_METADATA_BYTES, pack::FileData};
use crate::image::FileType;
use crate::image::overlay::names;

/// The most names that a layer may have.
pub(super) const MAX_ENTRIES: usize = 4_000_000;
/// How many symbolic links a path may lead through: as the kernel's MAXSYMLINKS.
const MAX_LINKS: usize = 40;
/// How many notes are kept; those beyond are counted.
const MAX_NOTES: usize = 20;
/// What a node costs besides its bytes, roughly.
const NODE_BYTES: u64 = 200;

/// A list of extended attributes: full names and values, sorted.
pub(super) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// Number of a node in [`Tree::nodes`].
pub(super) type NodeIndex = usize;

/// What a file is.
#[derive(Debug)]
pub(super) enum NodeKind {
    /// A folder.
    Dir {
        /// Its entries, sorted by bytes.
        children: BTreeMap<Box<[u8]>, NodeIndex>,
        /// Whether no entry of the stream speaks of it.
        implied: bool,
        /// Whether it hides what is below.
        opaque: bool,
    },
    /// A regular file.
    File(FileData),
    /// A symbolic link.
    Symlink(Box<[u8]>),
    /// A character device, number as the kernel encodes it.
    Char(u32),
    /// A block device.
    Block(u32),
    /// A named pipe.
    Fifo,
    /// Nothing: hides what is below.
    Whiteout,
    /// A hard link whose target has not been seen yet.
    PendingLink(Vec<u8>),
}

/// A file's attributes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permission bits, the low 12 bits of st_mode.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970, as squashfs stores them.
    pub mtime: u32,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

/// A file.
#[derive(Debug)]
pub(super) struct Node {
    /// What it is.
    pub kind: NodeKind,
    /// Its attributes.
    pub meta: Meta,
}

/// A layer's tree. The root is node 0.
pub(super) struct Tree {
    /// All nodes, also those that were replaced.
    pub nodes: Vec<Node>,
    /// What was changed or dropped, for people; at most a few.
    pub notes: Vec<String>,
    /// How many notes there were.
    pub notes_total: usize,
    metadata_bytes: u64,
    pending: Vec<Pending>,
}

/// A name whose hard link is resolved at the end.
struct Pending {
    dir: NodeIndex,
    name: Box<[u8]>,
    /// The whole path, for errors.
    path: Box<[u8]>,
}

/// What the layers below have at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LowerEntry {
    /// Nothing.
    Nothing,
    /// A folder.
    Folder(Meta),
    /// Something else.
    Other(FileType),
}

fn directory(implied: bool) -> Node {
    let kind = NodeKind::Dir { children: BTreeMap::new(), implied, opaque: false };
    Node { kind, meta: Meta { mode: 0o755, ..Meta::default() } }
}

/// What is wrong with an entry's place, for errors.
fn bad(path: &[u8], why: &'static str) -> ConvertError {
    ConvertError::Entry { path: show(path), why }
}

/// The components of a path of the stream: no empty ones, no `.`.
fn components<'a>(path: &'a [u8], whole: &[u8]) -> Result<Vec<&'a [u8]>, ConvertError> {
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            // A layer is a set of changes below one folder: no name leads out of it.
            b".." => return Err(bad(whole, "its name has a `..`")),
            _ if part.len() > 255 => return Err(bad(whole, "a part of its name is longer than 255 bytes")),
            _ => parts.push(part),
        }
    }
    Ok(parts)
}

impl Default for Tree {
    fn default() -> Self {
        Self {
            nodes: vec![directory(true)],
            notes: Vec::new(),
            notes_total: 0,
            metadata_bytes: 0,
            pending: Vec::new(),
        }
    }
}

impl Tree {
    /// Takes an entry in. `data` is where the content of a regular file is.
    pub(super) fn add(&mut self, mut entry: Entry, data: Option<FileData>) -> Result<(), ConvertError> {
        let path = std::mem::take(&mut entry.path);
        for note in std::mem::take(&mut entry.notes) {
            self.note(|| format!("{}: {note}", show(&path)));
        }
        let parts = components(&path, &path)?;
        let Some((name, parents)) = parts.split_last() else {
            // `./` speaks of the root.
            return match entry.kind {
                EntryKind::Directory => {
                    let meta = self.meta(&path, entry)?;
                    self.describe_dir(0, meta);
                    Ok(())
                }
                _ => Err(bad(&path, "it would replace the root folder")),
            };
        };
        // Whatever stands below a whiteout's own name (aufs' notes) is not part of the layer.
        if parents.iter().any(|part| part.starts_with(b".wh..wh.")) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return match self.whiteout_dir(parents, &path)? {
                Some(dir) => self.whiteout(dir, hidden, &path),
                None => Ok(()),
            };
        }
        let dir = self.walk(parents, &path)?;
        let kind = match entry.kind.clone() {
            EntryKind::Directory => {
                let meta = self.meta(&path, entry)?;
                return self.add_dir(dir, name, meta, &path);
            }
            EntryKind::HardLink(target) => return self.link(dir, name, &target, &path),
            EntryKind::File => NodeKind::File(data.unwrap_or_default()),
            EntryKind::Symlink(target) if target.is_empty() => {
                return Err(bad(&path, "it links to an empty name"));
            }
            EntryKind::Symlink(target) => NodeKind::Symlink(target.into()),
            EntryKind::CharDevice(major, minor) => NodeKind::Char(device(major, minor)),
            EntryKind::BlockDevice(major, minor) => NodeKind::Block(device(major, minor)),
            EntryKind::Fifo => NodeKind::Fifo,
        };
        let mut meta = self.meta(&path, entry)?;
        if matches!(kind, NodeKind::Char(0)) {
            // overlayfs.rst: "A whiteout is created as a character device with 0/0 device number".
            self.note(|| format!("{}: a character device 0:0 hides the name and is not shown", show(&path)));
        }
        if matches!(kind, NodeKind::Symlink(_)) {
            // Linux gives every symbolic link these, whatever a stream says.
            meta.mode = 0o777;
        }
        let cost = match &kind {
            NodeKind::File(data) => data.blocks.len() as u64 * 4,
            NodeKind::Symlink(target) => target.len() as u64,
            _ => 0,
        };
        self.charge(cost, &path)?;
        self.put(dir, name, Node { kind, meta }, &path)
    }

    /// Adds to the account of memory.
    fn charge(&mut self, bytes: u64, path: &[u8]) -> Result<(), ConvertError> {
        self.metadata_bytes += bytes;
        if self.metadata_bytes > MAX_METADATA_BYTES || self.nodes.len() > MAX_ENTRIES {
            return Err(ConvertError::TooMuch {
                path: show(path),
                entries: self.nodes.len(),
                bytes: self.metadata_bytes,
            });
        }
        Ok(())
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        self.notes_total += 1;
        if self.notes.len() < MAX_NOTES {
            self.notes.push(text());
        }
    }

    /// Turns an entry's attributes into what squashfs can store.
    fn meta(&mut self, path: &[u8], entry: Entry) -> Result<Meta, ConvertError> {
        // squashfs has 32 bits without a sign; before 1970 and after 2106 the nearest is taken.
        let mtime = entry.mtime.clamp(0, i64::from(u32::MAX)) as u32;
        if i64::from(mtime) != entry.mtime {
            self.note(|| format!("{}: time {} cannot be stored, {mtime} is", show(path), entry.mtime));
        }
        if entry.has_acls {
            self.note(|| format!("{}: access control lists cannot be stored", show(path)));
        }
        let mut xattrs = Vec::new();
        for (name, value) in entry.xattrs {
            let known = [&b"user."[..], b"trusted.", b"security."]
                .iter()
                .any(|prefix| name.strip_prefix(*prefix).is_some_and(|rest| !rest.is_empty()));
            if !known || names::steers(&name) {
                self.note(|| format!("{}: attribute {} is dropped", show(path), show(&name)));
                continue;
            }
            // The kernel's XATTR_NAME_MAX and XATTR_SIZE_MAX (linux/limits.h).
            if name.len() > 255 || value.len() > 65536 {
                return Err(bad(path, "an extended attribute is longer than Linux allows"));
            }
            self.charge((name.len() + value.len()) as u64 + 48, path)?;
            xattrs.push((name, value));
        }
        xattrs.sort();
        Ok(Meta { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime, xattrs })
    }

    fn children(&mut self, dir: NodeIndex) -> Option<&mut BTreeMap<Box<[u8]>, NodeIndex>> {
        match &mut self.nodes.get_mut(dir)?.kind {
            NodeKind::Dir { children, .. } => Some(children),
            _ => None,
        }
    }

    fn child(&self, dir: NodeIndex, name: &[u8]) -> Option<NodeIndex> {
        match &self.nodes.get(dir)?.kind {
            NodeKind::Dir { children, .. } => children.get(name).copied(),
            _ => None,
        }
    }

    /// Puts a new node at a name, in place of what is there.
    fn put(&mut self, dir: NodeIndex, name: &[u8], node: Node, path: &[u8]) -> Result<(), ConvertError> {
        self.charge(NODE_BYTES + name.len() as u64, path)?;
        let index = self.nodes.len();
        self.nodes.push(node);
        self.set_child(dir, name, index);
        Ok(())
    }

    fn set_child(&mut self, dir: NodeIndex, name: &[u8], index: NodeIndex) {
        if let Some(children) = self.children(dir) {
            children.insert(name.into(), index);
        }
    }

    fn describe_dir(&mut self, index: NodeIndex, new: Meta) {
        if let Some(Node { kind: NodeKind::Dir { implied, .. }, meta }) = self.nodes.get_mut(index) {
            *implied = false;
            *meta = new;
        }
    }

    fn add_dir(&mut self, dir: NodeIndex, name: &[u8], meta: Meta, path: &[u8]) -> Result<(), ConvertError> {
        let index = self.make_dir(dir, name, path)?;
        self.describe_dir(index, meta);
        Ok(())
    }

    /// The folder of that name; what else stands there is replaced.
    fn make_dir(&mut self, dir: NodeIndex, name: &[u8], path: &[u8]) -> Result<NodeIndex, ConvertError> {
        let old = self.child(dir, name);
        let mut hides = false;
        if let Some(index) = old {
            match self.nodes.get(index).map(|node| &node.kind) {
                Some(NodeKind::Dir { .. }) => return Ok(index),
                // The folder below is gone, this one is new.
                Some(NodeKind::Whiteout) => hides = true,
                _ => {}
            }
        }
        let index = self.nodes.len();
        self.put(dir, name, directory(true), path)?;
        if hides {
            self.make_opaque(index);
        }
        Ok(index)
    }

    fn make_opaque(&mut self, index: NodeIndex) {
        if let Some(Node { kind: NodeKind::Dir { opaque, .. }, .. }) = self.nodes.get_mut(index) {
            *opaque = true;
        }
    }

    /// The folder that a whiteout stands in, made where it is missing. `None` where this layer has
    /// something else in its place, or nothing: then all that was below it is hidden already.
    ///
    /// Links are not followed: tools that compare trees write whiteouts of what was in a folder also
    /// where a link took the folder's place, and never mean what the link leads to.
    fn whiteout_dir(&mut self, parents: &[&[u8]], path: &[u8]) -> Result<Option<NodeIndex>, ConvertError> {
        let mut dir = 0;
        for name in parents {
            dir = match self.child(dir, name) {
                Some(index) if self.children(index).is_some() => index,
                Some(_) => return Ok(None),
                None => self.make_dir(dir, name, path)?,
            };
        }
        Ok(Some(dir))
    }

    /// Whether a folder is there only because whiteouts stand in it.
    fn only_whiteouts(&self, dir: NodeIndex) -> bool {
        let mut todo = vec![dir];
        while let Some(index) = todo.pop() {
            match self.nodes.get(index).map(|node| &node.kind) {
                Some(NodeKind::Dir { children, implied: true, .. }) => todo.extend(children.values()),
                Some(NodeKind::Whiteout) => {}
                _ => return false,
            }
        }
        true
    }

    fn whiteout(&mut self, dir: NodeIndex, hidden: &[u8], path: &[u8]) -> Result<(), ConvertError> {
        match hidden {
            b".wh..opq" => {
                self.make_opaque(dir);
                return Ok(());
            }
            b"" | b"." | b".." => return Err(bad(path, "it is a whiteout of an impossible name")),
            _ if hidden.starts_with(b".wh.") => return Ok(()),
            _ => {}
        }
        match self.child(dir, hidden) {
            // An entry of this layer stays; a folder must not be merged with the one below.
            Some(index) if !self.only_whiteouts(index) => {
                self.make_opaque(index);
                Ok(())
            }
            _ => {
                let node = Node { kind: NodeKind::Whiteout, meta: Meta::default() };
                self.put(dir, hidden, node, path)
            }
        }
    }

    fn link(&mut self, dir: NodeIndex, name: &[u8], target: &[u8], path: &[u8]) -> Result<(), ConvertError> {
        match self.find(target, path)? {
            Some(index) => {
                self.check_link_target(index, path)?;
                self.charge(NODE_BYTES, path)?;
                if matches!(self.nodes.get(index).map(|node| &node.kind), Some(NodeKind::PendingLink(_))) {
                    self.pending.push(Pending { dir, name: name.into(), path: path.into() });
                }
                self.set_child(dir, name, index);
                Ok(())
            }
            None => {
                self.charge(target.len() as u64, path)?;
                self.pending.push(Pending { dir, name: name.into(), path: path.into() });
                let node = Node { kind: NodeKind::PendingLink(target.to_vec()), meta: Meta::default() };
                self.put(dir, name, node, path)
            }
        }
    }

    fn check_link_target(&self, index: NodeIndex, path: &[u8]) -> Result<(), ConvertError> {
        match self.nodes.get(index).map(|node| &node.kind) {
            Some(NodeKind::Dir { .. }) => Err(bad(path, "it is a hard link to a folder")),
            Some(NodeKind::Whiteout) => Err(bad(path, "it is a hard link to a file that is removed")),
            _ => Ok(()),
        }
    }

    /// The node that a hard link names, which must be there already.
    fn find(&self, target: &[u8], path: &[u8]) -> Result<Option<NodeIndex>, ConvertError> {
        let parts = components(target, path)?;
        let Some((name, parents)) = parts.split_last() else {
            return Err(bad(path, "it is a hard link to the root folder"));
        };
        match Steps::new(parents).next(self, path)? {
            Step::Done(dir) => Ok(self.child(dir, name)),
            Step::Missing(..) => Ok(None),
        }
    }

    /// The folder at a path, made where it is missing; links on the way are followed.
    fn walk(&mut self, parents: &[&[u8]], path: &[u8]) -> Result<NodeIndex, ConvertError> {
        let mut steps = Steps::new(parents);
        loop {
            match steps.next(self, path)? {
                Step::Done(dir) => return Ok(dir),
                Step::Missing(dir, name) => {
                    let index = self.make_dir(dir, &name, path)?;
                    steps.trail.push(index);
                }
            }
        }
    }

    /// Takes notes of the stream as a whole.
    pub(super) fn take_notes(&mut self, notes: Vec<String>) {
        for note in notes {
            self.note(|| note);
        }
    }

    /// Ends the tree: resolves links, asks `below` for what is at the folders that the stream does
    /// not speak of, takes away what hides nothing, and marks opaque folders.
    pub(super) fn finish(
        &mut self,
        below: &mut dyn FnMut(&[u8]) -> Result<LowerEntry, ConvertError>,
    ) -> Result<(), ConvertError> {
        self.resolve_links()?;
        let deletes = self.deletes();
        // All folders that are left, with their paths and what is below them, parents first.
        let under = below(b"")?;
        let mut todo = vec![(0, Vec::new(), under)];
        while let Some((index, path, under)) = todo.pop() {
            let Some(Node { kind: NodeKind::Dir { children, implied, opaque }, meta }) =
                self.nodes.get_mut(index)
            else {
                continue;
            };
            // Whether the layers below show anything through this folder.
            let seen_through = matches!(under, LowerEntry::Folder(_)) && !*opaque;
            if *implied && let LowerEntry::Folder(found) = under {
                *meta = found;
            }
            if *opaque {
                meta.xattrs.retain(|(name, _)| name != names::OPAQUE);
                meta.xattrs.push((names::OPAQUE.to_vec(), b"y".to_vec()));
                meta.xattrs.sort();
            }
            let children: Vec<_> = children.iter().map(|(name, index)| (name.clone(), *index)).collect();
            for (name, child) in children {
                let (implied, whiteout) = match self.nodes.get(child).map(|node| &node.kind) {
                    Some(NodeKind::Dir { implied, .. }) => (*implied, false),
                    Some(NodeKind::Whiteout) => (false, true),
                    _ => continue,
                };
                if whiteout {
                    if !seen_through && let Some(children) = self.children(index) {
                        children.remove(&name);
                    }
                    continue;
                }
                let path = [&path, &b"/"[..], &name].concat();
                let under = if seen_through { below(&path)? } else { LowerEntry::Nothing };
                let only_deletes = deletes.get(child).copied().unwrap_or(false);
                if implied && let LowerEntry::Other(kind) = under {
                    self.note_other(&path, kind, only_deletes);
                }
                if only_deletes && !matches!(under, LowerEntry::Folder(_)) {
                    if let Some(children) = self.children(index) {
                        children.remove(&name);
                    }
                    continue;
                }
                todo.push((child, path, under));
            }
        }
        Ok(())
    }

    /// Says that a folder without an entry of its own meets something else in the layers below.
    fn note_other(&mut self, path: &[u8], kind: FileType, only_deletes: bool) {
        let path = path.strip_prefix(b"/").unwrap_or(path);
        let what = match kind {
            FileType::Symlink => "a symbolic link",
            FileType::Regular => "a file",
            _ => "no folder",
        };
        self.note(|| match only_deletes {
            true => format!("{}: it is {what} in the layers below: what is to be deleted in it is not there", show(path)),
            false => format!(
                "{}: it is {what} in the layers below, which is hidden by the folder that this layer's entries need \
                 (as overlayfs shows layers that are unpacked one by one)",
                show(path)
            ),
        });
    }

    /// For each node, whether it is a folder that is there only because whiteouts stand in it.
    fn deletes(&self) -> Vec<bool> {
        // Parents first.
        let mut order = vec![0];
        let mut at = 0;
        while let Some(&index) = order.get(at) {
            if let Some(Node { kind: NodeKind::Dir { children, .. }, .. }) = self.nodes.get(index) {
                let folder = |child: &&NodeIndex| {
                    matches!(self.nodes.get(**child).map(|node| &node.kind), Some(NodeKind::Dir { .. }))
                };
                order.extend(children.values().filter(folder));
            }
            at += 1;
        }
        let mut deletes = vec![false; self.nodes.len()];
        for index in order.into_iter().rev() {
            let Some(Node { kind: NodeKind::Dir { children, implied: true, .. }, .. }) =
                self.nodes.get(index)
            else {
                continue;
            };
            let only = children
                .values()
                .all(|child| deletes[*child] || matches!(self.nodes[*child].kind, NodeKind::Whiteout));
            // Where there are none, a note of aufs stood in it.
            deletes[index] = only;
        }
        deletes
    }

    /// Finds what hard links to later names meant.
    fn resolve_links(&mut self) -> Result<(), ConvertError> {
        for Pending { dir, name, path } in std::mem::take(&mut self.pending) {
            let Some(mut index) = self.child(dir, &name) else { continue };
            for hop in 0.. {
                let Some(Node { kind: NodeKind::PendingLink(target), .. }) = self.nodes.get(index) else {
                    break;
                };
                let missing = || ConvertError::HardLink { path: show(&path), target: show(target) };
                if hop == MAX_LINKS {
                    return Err(missing());
                }
                index = self.find(target, &path)?.ok_or_else(missing)?;
            }
            self.check_link_target(index, &path)?;
            self.set_child(dir, &name, index);
        }
        Ok(())
    }
}

/// The kernel's encoding of a device number (linux/kdev_t.h, new_encode_dev).
fn device(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// A walk along a path, through links, within the root.
struct Steps {
    /// The folders from the root to the current one.
    trail: Vec<NodeIndex>,
    /// The names that are left, the next one last.
    rest: Vec<Vec<u8>>,
    links: usize,
}

enum Step {
    Done(NodeIndex),
    /// There is nothing of that name in that folder. After the caller pushed it on the trail, go on.
    Missing(NodeIndex, Vec<u8>),
}

impl Steps {
    fn new(parts: &[&[u8]]) -> Self {
        Self { trail: vec![0], rest: parts.iter().rev().map(|part| part.to_vec()).collect(), links: 0 }
    }

    fn next(&mut self, tree: &Tree, path: &[u8]) -> Result<Step, ConvertError> {
        loop {
            let here = self.trail.last().copied().unwrap_or(0);
            let Some(name) = self.rest.pop() else { return Ok(Step::Done(here)) };
            match name.as_slice() {
                b"" | b"." => continue,
                // Only a link's target has it here. The root is its own parent.
                b".." => {
                    if self.trail.len() > 1 {
                        self.trail.pop();
                    }
                    continue;
                }
                _ if name.len() > 255 => {
                    return Err(bad(path, "it lies behind a link that cannot be followed"));
                }
                _ => {}
            }
            let Some(index) = tree.child(here, &name) else { return Ok(Step::Missing(here, name)) };
            match tree.nodes.get(index).map(|node| &node.kind) {
                Some(NodeKind::Dir { .. }) => self.trail.push(index),
                Some(NodeKind::Symlink(target)) => {
                    self.links += 1;
                    if self.links > MAX_LINKS {
                        return Err(bad(path, "it lies behind too many symbolic links"));
                    }
                    if target.starts_with(b"/") {
                        self.trail.truncate(1);
                    }
                    self.rest.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
                }
                // What the layer says of a removed folder's inside makes it a new folder.
                Some(NodeKind::Whiteout) => return Ok(Step::Missing(here, name)),
                _ => return Err(bad(path, "it lies below something that is not a folder")),
            }
        }
    }
}
