//! A layer that is held in memory: what a test says, and nothing else.

use std::collections::BTreeMap;

use mosfs::internals::image::layer::{
    Attr, BlockId, DirEntry, Extent, FileType, Layer, LayerError, NodeId, Place, StatFs,
};
use mosfs::internals::image::source::ReadError;

/// The size of a stored block: small, so that short files have several.
pub const BLOCK: u32 = 64;

/// A file of a [`MemoryLayer`].
#[derive(Clone)]
pub struct Node {
    pub attr: Attr,
    pub entries: BTreeMap<Vec<u8>, u64>,
    pub content: Vec<u8>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A layer in memory. Node ids are indexes from 1 on; 1 is the root.
pub struct MemoryLayer {
    pub nodes: Vec<Node>,
    /// Blocks that do not verify, by their start.
    pub bad: Vec<u64>,
}

fn node(kind: FileType) -> Node {
    let attr = Attr {
        kind,
        permissions: if kind == FileType::Directory { 0o755 } else { 0o644 },
        uid: 0,
        gid: 0,
        size_bytes: 0,
        blocks_512: 0,
        mtime: 1_700_000_000,
        mtime_nanos: 0,
        nlink: if kind == FileType::Directory { 2 } else { 1 },
        rdev: 0,
        has_xattrs: false,
    };
    Node { attr, entries: BTreeMap::new(), content: Vec::new(), xattrs: Vec::new() }
}

impl Default for MemoryLayer {
    fn default() -> Self {
        Self { nodes: vec![node(FileType::Directory)], bad: Vec::new() }
    }
}

impl MemoryLayer {
    /// The node at a path, which is made, with the folders above it, where it is missing.
    pub fn at(&mut self, path: &str, kind: FileType) -> &mut Node {
        let mut here = 1u64;
        let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
        for (index, name) in names.iter().enumerate() {
            let known = self.nodes[here as usize - 1].entries.get(name.as_bytes()).copied();
            here = known.unwrap_or_else(|| {
                let kind = if index + 1 == names.len() { kind } else { FileType::Directory };
                self.nodes.push(node(kind));
                let id = self.nodes.len() as u64;
                let parent = &mut self.nodes[here as usize - 1];
                parent.entries.insert(name.as_bytes().to_vec(), id);
                parent.attr.nlink += u32::from(kind == FileType::Directory);
                id
            });
        }
        &mut self.nodes[here as usize - 1]
    }

    pub fn dir(mut self, path: &str) -> Self {
        self.at(path, FileType::Directory);
        self
    }

    pub fn file(mut self, path: &str, content: impl AsRef<[u8]>) -> Self {
        let node = self.at(path, FileType::Regular);
        node.content = content.as_ref().to_vec();
        node.attr.size_bytes = node.content.len() as u64;
        self
    }

    pub fn link(mut self, path: &str, target: &str) -> Self {
        let node = self.at(path, FileType::Symlink);
        node.content = target.as_bytes().to_vec();
        node.attr.size_bytes = target.len() as u64;
        self
    }

    /// A second name for a file.
    pub fn hard_link(mut self, path: &str, other: &str) -> Self {
        let id = self.id(other);
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.at(parent, FileType::Directory).entries.insert(name.as_bytes().to_vec(), id);
        self.nodes[id as usize - 1].attr.nlink += 1;
        self
    }

    pub fn whiteout(mut self, path: &str) -> Self {
        self.at(path, FileType::CharDevice);
        self
    }

    pub fn xattr(mut self, path: &str, name: &str, value: &str) -> Self {
        let node = self.at(path, FileType::Directory);
        node.xattrs.push((name.into(), value.into()));
        node.attr.has_xattrs = true;
        self
    }

    pub fn opaque(self, path: &str) -> Self {
        self.xattr(path, "trusted.overlay.opaque", "y")
    }

    /// The id of the file at a path.
    pub fn id(&mut self, path: &str) -> u64 {
        let mut here = 1;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            here = self.nodes[here as usize - 1].entries[name.as_bytes()];
        }
        here
    }

    fn node(&self, id: NodeId) -> Result<&Node, LayerError> {
        let index = id.0.checked_sub(1).map(|index| index as usize);
        index.and_then(|index| self.nodes.get(index)).ok_or(LayerError::Corrupt {
            table: "inode table",
            offset: id.0,
            why: "no such node".into(),
        })
    }
}

impl Layer for MemoryLayer {
    fn root(&self) -> NodeId {
        NodeId(1)
    }

    fn attr(&self, node: NodeId) -> Result<Attr, LayerError> {
        Ok(self.node(node)?.attr)
    }

    fn lookup(&self, dir: NodeId, name: &[u8]) -> Result<Option<DirEntry>, LayerError> {
        let dir = self.node(dir)?;
        let Some((index, (name, &id))) = dir.entries.iter().enumerate().find(|(_, (key, _))| *key == name)
        else {
            return Ok(None);
        };
        let kind = self.node(NodeId(id))?.attr.kind;
        Ok(Some(DirEntry { name: name.clone(), node: NodeId(id), kind, next: index as u64 + 1 }))
    }

    fn read_dir(
        &self,
        dir: NodeId,
        cookie: u64,
        each: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Result<(), LayerError> {
        for (index, (name, &id)) in self.node(dir)?.entries.iter().enumerate().skip(cookie as usize) {
            let kind = self.node(NodeId(id))?.attr.kind;
            if !each(DirEntry { name: name.clone(), node: NodeId(id), kind, next: index as u64 + 1 }) {
                break;
            }
        }
        Ok(())
    }

    fn read_link(&self, node: NodeId) -> Result<Vec<u8>, LayerError> {
        Ok(self.node(node)?.content.clone())
    }

    fn xattrs(&self, node: NodeId) -> Result<Vec<(Vec<u8>, Vec<u8>)>, LayerError> {
        Ok(self.node(node)?.xattrs.clone())
    }

    fn extent(&self, node: NodeId, offset: u64) -> Result<Extent, LayerError> {
        let file = self.node(node)?;
        let index = offset / u64::from(BLOCK);
        let file_offset = index * u64::from(BLOCK);
        let len = (file.attr.size_bytes - file_offset).min(u64::from(BLOCK)) as u32;
        let bytes = &file.content[file_offset as usize..][..len as usize];
        // A tail lies in a block of its own that begins with 16 other bytes, as a fragment would.
        let id = BlockId { start: node.0 << 20 | index, size_word: len, decoded_max: BLOCK + 16 };
        let place = match len {
            BLOCK if bytes.iter().all(|&byte| byte == 0) => Place::Hole,
            BLOCK => Place::Block(id),
            _ => Place::Shared { block: id, offset: 16 },
        };
        Ok(Extent { file_offset, len, place })
    }

    fn decode(&self, block: BlockId, out: &mut Vec<u8>) -> Result<(), LayerError> {
        out.clear();
        if self.bad.contains(&block.start) {
            return Err(LayerError::Read(ReadError::Verity {
                what: "data".into(),
                block: block.start & 0xffff,
                expected: mosfs::internals::digest::Digest::of(b"good"),
                found: mosfs::internals::digest::Digest::of(b"bad"),
            }));
        }
        let file = self.node(NodeId(block.start >> 20))?;
        let from = (block.start & 0xf_ffff) as usize * BLOCK as usize;
        if block.size_word < BLOCK {
            out.extend_from_slice(&[0xee; 16]);
        }
        out.extend_from_slice(&file.content[from..][..block.size_word as usize]);
        Ok(())
    }

    fn has_xattrs(&self) -> bool {
        self.nodes.iter().any(|node| !node.xattrs.is_empty())
    }

    fn stat_fs(&self) -> StatFs {
        StatFs { bytes: 4096, files: self.nodes.len() as u64, block_bytes: BLOCK }
    }
}
