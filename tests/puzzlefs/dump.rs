//! A tree as text, one line a name, as the expected trees have it: path, type, mode, owner, group, size, device,
//! links, time, attributes, content.

use std::collections::HashMap;
use std::fmt::Write as _;

use mosfs::internals::digest::{Hasher, hex};
use mosfs::internals::image::layer::Place;
use mosfs::internals::image::{Attr, FileType, Layer, LayerError, NodeId};

fn shown(bytes: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        match byte {
            33..127 if byte != b'\\' => text.push(char::from(byte)),
            _ => write!(text, "\\{byte:03o}").unwrap(),
        }
    }
    if text.is_empty() { "-".into() } else { text }
}

/// The content of a regular file.
pub fn content(layer: &dyn Layer, node: NodeId, size: u64) -> Result<Vec<u8>, LayerError> {
    let (mut content, mut block) = (Vec::new(), Vec::new());
    while (content.len() as u64) < size {
        let extent = layer.extent(node, content.len() as u64)?;
        assert_eq!(extent.file_offset, content.len() as u64);
        let (id, from) = match extent.place {
            Place::Hole => panic!("the format has no holes"),
            Place::Block(id) => (id, 0),
            Place::Shared { block, offset } => (block, offset as usize),
        };
        layer.decode(id, &mut block)?;
        content.extend_from_slice(&block[from..from + extent.len as usize]);
    }
    assert_eq!(content.len() as u64, size);
    Ok(content)
}

/// All of a layer.
pub fn dump(layer: &dyn Layer) -> String {
    let mut text = String::new();
    let mut first = HashMap::new();
    show(layer, layer.root(), "/", &mut first, &mut text);
    text
}

fn show(layer: &dyn Layer, node: NodeId, path: &str, first: &mut HashMap<NodeId, String>, text: &mut String) {
    let attr: Attr = layer.attr(node).unwrap();
    let kind = match attr.kind {
        FileType::Directory => "dir",
        FileType::Regular => "file",
        FileType::Symlink => "link",
        FileType::BlockDevice => "block",
        FileType::CharDevice => "char",
        FileType::Fifo => "fifo",
        FileType::Socket => "sock",
    };
    let size = if attr.kind == FileType::Directory { "-".into() } else { attr.size_bytes.to_string() };
    let device = match attr.kind {
        FileType::BlockDevice | FileType::CharDevice => {
            format!("{}:{}", libc::major(attr.rdev.into()), libc::minor(attr.rdev.into()))
        }
        _ => "-".into(),
    };
    let mut xattrs = layer.xattrs(node).unwrap();
    assert_eq!(attr.has_xattrs, !xattrs.is_empty());
    assert!(xattrs.iter().all(|(name, _)| layer.may_have_xattr(name)));
    assert!(!layer.may_have_xattr(b"user.of.no.file"));
    xattrs.sort();
    let list: Vec<_> = xattrs.iter().map(|(k, v)| format!("{}={}", shown(k), hex(v))).collect();
    let list = if list.is_empty() { "-".into() } else { list.join(",") };
    let content = match attr.kind {
        FileType::Regular => {
            let mut hasher = Hasher::new();
            hasher.update(&content(layer, node, attr.size_bytes).unwrap());
            hasher.finish().to_string()
        }
        FileType::Symlink => {
            let target = layer.read_link(node).unwrap();
            assert_eq!(target.len() as u64, attr.size_bytes);
            format!("-> {}", shown(&target))
        }
        _ => "-".into(),
    };
    let same = first.entry(node).or_insert_with(|| path.to_string());
    let same = if same == path { String::new() } else { format!(" same-inode-as={same}") };
    let (mode, uid, gid, nlink) = (attr.permissions, attr.uid, attr.gid, attr.nlink);
    let (mtime, nanos) = (attr.mtime, attr.mtime_nanos);
    assert_eq!(nanos, 0);
    writeln!(
        text,
        "{path} {kind} {mode:04o} {uid} {gid} {size} {device} nlink={nlink} mtime={mtime} {list} {content}{same}"
    )
    .unwrap();
    if attr.kind == FileType::Directory {
        let mut entries = Vec::new();
        layer
            .read_dir(node, 0, &mut |entry| {
                entries.push(entry);
                true
            })
            .unwrap();
        for (at, entry) in entries.iter().enumerate() {
            assert_eq!(layer.lookup(node, &entry.name).unwrap().as_ref(), Some(entry));
            // Each cookie goes on behind its entry.
            let mut next = None;
            layer
                .read_dir(node, entry.next, &mut |entry| {
                    next = Some(entry);
                    false
                })
                .unwrap();
            assert_eq!(next.as_ref(), entries.get(at + 1));
            let below = format!("{}/{}", path.trim_end_matches('/'), shown(&entry.name));
            show(layer, entry.node, &below, first, text);
        }
    }
}
