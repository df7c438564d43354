//! Entry functions for the squashfs reader. Each takes any bytes; none may panic, hang or take much memory.

use std::ops::ControlFlow;
use std::sync::Arc;

use mosfs::internals::image::layer::{BlockId, Layer, NodeId, Place};
use mosfs::internals::image::squashfs::{Options, Squashfs};
use mosfs::internals::image::{FileType, MemorySource};

use super::build::{self, Parts};

/// How much a fuzzer's image may make a reader keep.
const OPTIONS: Options = Options { metadata_cache_bytes: 256 << 10 };

fn open(bytes: Vec<u8>) -> Option<Squashfs> {
    Squashfs::open_with(Arc::new(MemorySource(bytes)), OPTIONS).ok()
}

/// The first bytes are the superblock of an image whose tables are right.
pub fn superblock(data: &[u8]) {
    let mut image = build::sample().0.build().bytes;
    let len = data.len().min(96);
    image[..len].copy_from_slice(&data[..len]);
    if let Some(image) = open(image) {
        let superblock = image.superblock();
        assert!(
            superblock.block_bytes.is_power_of_two() && superblock.inode_table < superblock.directory_table
        );
        everything(&image);
    }
}

/// The decoded inode table, before the inodes of an image that is right.
pub fn inodes(data: &[u8]) {
    let (mut parts, places) = build::sample();
    let shift = data.len().next_multiple_of(4);
    parts.inodes = [data, &vec![0; shift - data.len()], &parts.inodes].concat();
    parts.root = reference(places.root + shift as u64);
    let Some(image) = open(parts.build().bytes) else { return };
    for offset in (0..data.len() as u64).step_by(2).take(512) {
        node(&image, NodeId(reference(offset)));
    }
}

/// The reference of what is at that offset of a decoded table of blocks that are stored as they are.
fn reference(offset: u64) -> u64 {
    ((offset / 8192 * 8194) << 16) | (offset % 8192)
}

/// Two bytes that say how long an index is, the index, then a listing, all of it the root's.
pub fn directory(data: &[u8]) {
    let (mut parts, _) = build::sample();
    let Some((&[entries, len, ..], rest)) = data.split_first_chunk::<2>() else { return };
    let (index, listing) = rest.split_at(rest.len().min(len.into()));
    parts.listings = listing.to_vec();
    parts.root = reference(parts.inodes.len() as u64);
    parts.inodes.extend(build::folder(1, 10, 0, 0, listing.len() as u32, entries.into()));
    parts.inodes.extend(index);
    let Some(image) = open(parts.build().bytes) else { return };
    let root = image.root();
    let mut names: Vec<mosfs::internals::image::DirEntry> = Vec::new();
    let whole = image.read_dir(root, 0, &mut |entry| {
        assert!(
            !entry.name.is_empty() && entry.name.len() <= 255 && entry.name != b"." && entry.name != b".."
        );
        assert!(!entry.name.contains(&b'/') && !entry.name.contains(&0));
        assert!(names.last().is_none_or(|last| last.name < entry.name && last.next < entry.next));
        names.push(entry);
        true
    });
    let step = names.len() / 50 + 1;
    for (number, entry) in names.iter().enumerate().step_by(step).chain(names.iter().enumerate().next_back())
    {
        // An index can lead astray; without one a name is where it is.
        match image.lookup(root, &entry.name) {
            Ok(found) if entries == 0 => assert_eq!(found.as_ref(), Some(entry)),
            Err(_) if entries == 0 => unreachable!("a name that was listed"),
            _ => {}
        }
        let mut next = None;
        let rest = image.read_dir(root, entry.next, &mut |entry| {
            next = Some(entry);
            false
        });
        if rest.is_ok() {
            assert_eq!(next.as_ref(), names.get(number + 1));
        } else {
            assert!(whole.is_err());
        }
        let _ = image.read_dir(root, entry.next + 1, &mut |_| true);
    }
    for name in [&b"a"[..], b"zz", index, &data[..data.len().min(3)]] {
        let _ = image.lookup(root, name);
    }
    let _ = image.check_all(&mut |_| ControlFlow::Continue(()));
}

/// Counts and starts of the fragment, id and export tables, then the bytes that are there.
pub fn tables(data: &[u8]) {
    let Some((head, rest)) = data.split_first_chunk::<16>() else { return };
    let (parts, places) = build::sample();
    let mut built = build::Parts { export: None, xattrs: None, ..parts }.build();
    // Everything after the listings is the fuzzer's.
    let start = u64::from_le_bytes(built.bytes[80..88].try_into().unwrap()) as usize - 18;
    built.bytes.truncate(start);
    built.bytes.extend_from_slice(rest);
    let used = built.bytes.len() as u64;
    let word = |at: usize| u64::from(u16::from_le_bytes([head[at], head[at + 1]]));
    let mut put = |at: usize, bytes: &[u8]| built.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    put(40, &used.to_le_bytes());
    put(80, &(start as u64 + word(0)).to_le_bytes());
    put(88, &(start as u64 + word(2)).to_le_bytes());
    put(48, &(start as u64 + word(4)).to_le_bytes());
    put(16, &(word(6) as u32).to_le_bytes());
    put(26, &head[8..10]);
    put(4, &(word(10) as u32).to_le_bytes());
    let Some(image) = open(built.bytes) else { return };
    for node in [places.root, places.file, places.small, places.link] {
        let _ = image.attr(NodeId(node));
        let _ = image.extent(NodeId(node), 8200);
        let _ = image.extent(NodeId(node), 0);
    }
    for number in [0, 1, 2, 3, 500, 1023, 1024, 1025, u32::MAX, word(12) as u32] {
        let _ = image.node_by_number(number);
    }
    everything(&image);
}

/// The number of bytes of names and values, those, then sets.
pub fn xattrs(data: &[u8]) {
    let Some((len, rest)) = data.split_first_chunk::<2>() else { return };
    let (values, sets) = rest.split_at(rest.len().min(u16::from_le_bytes(*len).into()));
    let (mut parts, _) = build::sample();
    let mut nodes = Vec::new();
    for number in 0..sets.len() as u32 / 16 + 1 {
        nodes.push(parts.inodes.len() as u64);
        parts.inodes.extend([build::common(13, number + 1), crate::fields![1u32, number]].concat());
        if nodes.len() == 16 {
            break;
        }
    }
    parts.xattrs = Some((values.to_vec(), sets.to_vec()));
    let Some(image) = open(parts.build().bytes) else { return };
    for node in nodes {
        let Ok(found) = image.xattrs(NodeId(reference(node))) else { continue };
        assert!(found.iter().map(|(name, _)| name.len() + 1).sum::<usize>() <= 64 << 10);
        assert!(found.iter().map(|(_, value)| value.len()).sum::<usize>() <= 4 << 20);
    }
}

/// A compressor, a size of blocks, the kind of use, then a stored block.
pub fn data(data: &[u8]) {
    let Some((&[compressor, log, kind], rest)) = data.split_first_chunk::<3>() else { return };
    let (parts, _) = build::sample();
    let block_log = 12 + u16::from(log % 9);
    let size = (rest.len() as u32).min(1 << 24);
    let word = if kind & 1 == 0 { size } else { size | 1 << 24 };
    let len = 1u64 << block_log;
    let parts = Parts {
        compressor: u16::from(compressor % 6) + 1,
        block_log,
        data: rest.to_vec(),
        fragments: crate::fields![96u64, word, 0u32],
        inodes: [
            build::folder(1, 3, 0, 0, 0, 0),
            build::file(2, 96, len, (build::NONE, 0), &[word]),
            build::file(3, 96, len - 1, (0, 0), &[]),
        ]
        .concat(),
        root: 0,
        ..parts
    };
    let Some(image) = open(parts.build().bytes) else { return };
    let mut out = Vec::new();
    for node in [40, 40 + 60] {
        let Ok(extent) = image.extent(NodeId(node), 0) else { continue };
        let block = match extent.place {
            Place::Hole => continue,
            Place::Block(block) | Place::Shared { block, .. } => block,
        };
        let result = image.decode(block, &mut out);
        assert!(out.len() <= block.decoded_max as usize && out.capacity() <= 2 << 20);
        if result.is_ok() && matches!(extent.place, Place::Block(_)) {
            assert_eq!(out.len(), extent.len as usize);
        }
    }
    // What nobody asked for.
    let _ = image.decode(
        BlockId { start: 96, size_word: u32::from(kind) << 20 | size, decoded_max: u32::MAX },
        &mut out,
    );
    assert!(out.len() <= len as usize);
}

/// A whole image.
pub fn image(data: &[u8]) {
    if let Some(image) = open(data.to_vec()) {
        everything(&image);
    }
}

/// Uses what there is in an image, as far as it goes.
fn everything(image: &Squashfs) {
    let mut left = 2000;
    let _ = image.check_all(&mut |_| {
        left -= 1;
        if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let mut nodes = vec![image.root()];
    let mut at = 0;
    while let Some(&next) = nodes.get(at) {
        at += 1;
        node(image, next);
        let mut names = Vec::new();
        let _ = image.read_dir(next, 0, &mut |entry| {
            if nodes.len() < 100 {
                nodes.push(entry.node);
            }
            names.push((entry.name, entry.next));
            names.len() < 300
        });
        for (name, cookie) in names.into_iter().take(20) {
            let _ = image.lookup(next, &name);
            let _ = image.read_dir(next, cookie, &mut |_| false);
        }
    }
    let _ = image.compressor_options();
    assert!(image.metadata_cache_bytes() <= OPTIONS.metadata_cache_bytes);
}

/// Asks everything of one node, whatever it is.
fn node(image: &Squashfs, node: NodeId) {
    let Ok(attr) = image.attr(node) else { return };
    assert!(attr.permissions <= 0o7777 && i64::try_from(attr.size_bytes).is_ok());
    let _ = image.xattrs(node);
    let _ = image.lookup(node, b"a");
    if let Ok(target) = image.read_link(node) {
        assert_eq!(target.len() as u64, attr.size_bytes);
    }
    if attr.kind != FileType::Regular {
        assert!(image.extent(node, 0).is_err());
        return;
    }
    let mut out = Vec::new();
    for offset in [0, 1, 4096, attr.size_bytes / 2, attr.size_bytes.saturating_sub(1)] {
        let Ok(extent) = image.extent(node, offset) else { continue };
        let end = extent.file_offset + u64::from(extent.len);
        assert!(extent.file_offset <= offset && offset < end && end <= attr.size_bytes);
        match extent.place {
            Place::Hole => {}
            Place::Block(block) => {
                if image.decode(block, &mut out).is_ok() {
                    assert_eq!(out.len(), extent.len as usize);
                }
            }
            Place::Shared { block, .. } => {
                let _ = image.decode(block, &mut out);
                assert!(out.len() <= block.decoded_max as usize);
            }
        }
    }
}
