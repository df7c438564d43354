//! Entry functions for the erofs reader. Each takes any bytes; none may panic, hang or take much memory.

use std::sync::Arc;

use mosfs::internals::image::erofs::{Erofs, Options};
use mosfs::internals::image::layer::{BlockId, Layer, NodeId, Place};
use mosfs::internals::image::{FileType, MemorySource};

/// How much a fuzzer's image may make a reader keep.
const OPTIONS: Options = Options { metadata_cache_bytes: 128 << 10 };

/// The most that a cluster decodes to, in bytes.
const DECODED_BYTES_MAX: u32 = 12 << 20;

/// How many clusters of an image are decoded: each may take 12 MiB.
const CLUSTERS: usize = 60;

/// A whole image, without a checksum.
pub fn image(data: &[u8]) {
    let mut bytes = data.to_vec();
    // A checksum would keep a fuzzer out.
    if let Some(features) = bytes.get_mut(1032) {
        *features &= !1;
    }
    let Ok(image) = Erofs::open_with(Arc::new(MemorySource(bytes)), OPTIONS) else { return };
    let mut left = CLUSTERS;
    let mut nodes = vec![image.root()];
    let mut at = 0;
    while let Some(&next) = nodes.get(at) {
        at += 1;
        node(&image, next, &mut left);
        let mut names: Vec<(Vec<u8>, u64)> = Vec::new();
        let _ = image.read_dir(next, 0, &mut |entry| {
            let name = &entry.name;
            assert!(!name.is_empty() && name.len() <= 255 && name != b"." && name != b"..");
            assert!(!name.contains(&b'/') && !name.contains(&0));
            assert!(names.last().is_none_or(|last| last.0 < *name && last.1 < entry.next));
            assert!(entry.next != 0 && entry.next <= 1 << 56);
            let number = image.number(entry.node).unwrap();
            assert!(number < image.numbers() && image.node(number).unwrap() == entry.node);
            if nodes.len() < 100 {
                nodes.push(entry.node);
            }
            names.push((entry.name, entry.next));
            names.len() < 300
        });
        for (name, cookie) in names.into_iter().take(20) {
            let _ = image.lookup(next, &name);
            let _ = image.read_dir(next, cookie, &mut |_| false);
            let _ = image.read_dir(next, cookie ^ 0x1234, &mut |_| false);
        }
    }
    for number in [0, 1, image.numbers() - 1, image.numbers(), u64::MAX] {
        node(&image, NodeId(number), &mut left);
    }
    assert!(image.metadata_cache_bytes() <= OPTIONS.metadata_cache_bytes);
}

/// Asks everything of one node, whatever it is.
fn node(image: &Erofs, node: NodeId, left: &mut usize) {
    let Ok(attr) = image.attr(node) else { return };
    assert!(attr.permissions <= 0o7777 && i64::try_from(attr.size_bytes).is_ok());
    if let Ok(found) = image.xattrs(node) {
        assert!(found.iter().map(|(name, _)| name.len() + 1).sum::<usize>() <= 64 << 10);
        assert!(found.iter().map(|(_, value)| value.len()).sum::<usize>() <= 4 << 20);
    }
    let _ = image.lookup(node, b"a");
    if let Ok(target) = image.read_link(node) {
        assert_eq!(target.len() as u64, attr.size_bytes);
    }
    if attr.kind != FileType::Regular {
        assert!(image.extent(node, 0).is_err());
        return;
    }
    let mut out = Vec::new();
    let size = attr.size_bytes;
    for offset in [0, 1, 4095, 4096, 20_000, size / 3, size / 2, size.saturating_sub(1)] {
        let Ok(extent) = image.extent(node, offset) else { continue };
        let end = extent.file_offset + u64::from(extent.len);
        assert!(extent.file_offset <= offset && offset < end && end <= size);
        let (Place::Block(block) | Place::Shared { block, .. }) = extent.place else { continue };
        if *left == 0 {
            continue;
        }
        *left -= 1;
        assert!(block.decoded_max <= DECODED_BYTES_MAX);
        if image.decode(block, &mut out).is_ok() {
            assert_eq!(out.len(), block.decoded_max as usize);
        }
        assert!(out.capacity() <= 2 * DECODED_BYTES_MAX as usize);
    }
}

/// A code, what it decodes to, then a stored cluster.
pub fn cluster(data: &[u8]) {
    let Some((&[code, low, high, flags], stored)) = data.split_first_chunk::<4>() else { return };
    // An image of one block, and the cluster behind it.
    let mut bytes = include_bytes!("../corpus/erofs_image/plain-512").to_vec();
    let start = bytes.len() as u64;
    bytes.extend_from_slice(stored);
    let image = Erofs::open_with(Arc::new(MemorySource(bytes)), OPTIONS).expect("a good image");
    let len = u32::from(u16::from_le_bytes([low, high])) << (flags >> 4);
    let size = (stored.len() as u32).min((1 << 21) - 1);
    let size_word = size | u32::from(code & 7) << 21 | u32::from(flags & 7) << 24;
    let mut out = Vec::new();
    if image.decode(BlockId { start, size_word, decoded_max: len }, &mut out).is_ok() {
        assert_eq!(out.len(), len as usize);
    }
    assert!(out.capacity() <= 2 * DECODED_BYTES_MAX as usize);
}
