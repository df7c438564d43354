//! Entry functions for the PuzzleFS reader. Each takes any bytes; none may panic, hang or take much memory.

use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::sync::Arc;

use mosfs::internals::digest::Digest;
use mosfs::internals::image::blobs::{Blob, BlobError, Blobs, read_whole};
use mosfs::internals::image::format::{ChunkedLayer, Chunks};
use mosfs::internals::image::layer::{Layer, NodeId, Place};
use mosfs::internals::image::puzzlefs::{MAX_CHUNK_BYTES, Puzzlefs};
use mosfs::internals::image::{FileType, LayerError};

/// The digests that a fuzzer's metadata may name: the manifest lists these, each with 64 KiB.
const LISTED: [Digest; 3] =
    [Digest::from_bytes([1; 32]), Digest::from_bytes([2; 32]), Digest::from_bytes([3; 32])];

/// Blobs in memory.
struct Memory(BTreeMap<Digest, Vec<u8>>);

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("memory")
    }
}

impl Blobs for Memory {
    fn blob(&self, _: &Digest, _: u64) -> Blob {
        Blob::File("/nowhere".into())
    }

    fn read(&self, digest: &Digest, stored_bytes: u64, bytes: &mut Vec<u8>) -> Result<(), BlobError> {
        match self.0.get(digest) {
            Some(held) => read_whole(&held[..], digest, stored_bytes, bytes),
            None => Err(BlobError::Io { digest: *digest, source: ErrorKind::NotFound.into() }),
        }
    }
}

fn open(metadata: &[u8], chunks: &[(Digest, u64)], more: &[&[u8]]) -> Result<Puzzlefs, LayerError> {
    let digest = Digest::of(metadata);
    let mut held = BTreeMap::from([(digest, metadata.to_vec())]);
    held.extend(more.iter().map(|bytes| (Digest::of(bytes), bytes.to_vec())));
    Puzzlefs::open(&ChunkedLayer {
        digest,
        size: metadata.len() as u64,
        chunks: Arc::new(Chunks::new(chunks.to_vec()).unwrap()),
        blobs: Arc::new(Memory(held)),
    })
}

/// The bytes are the metadata.
pub fn metadata(data: &[u8]) {
    let Ok(image) = open(data, &LISTED.map(|digest| (digest, 65_536)), &[]) else { return };
    // What opens is a tree: every walk ends, and every name is found again.
    let mut todo = vec![image.root()];
    let mut names = 0u64;
    while let Some(folder) = todo.pop() {
        let mut last: Option<Vec<u8>> = None;
        let mut listed = Vec::new();
        image
            .read_dir(folder, 0, &mut |entry| {
                listed.push(entry);
                true
            })
            .unwrap();
        for entry in listed {
            let name = &entry.name;
            assert!(!name.is_empty() && name.len() <= 255 && name != b"." && name != b"..");
            assert!(!name.contains(&b'/') && !name.contains(&0));
            assert!(last.is_none_or(|last| last < *name));
            last = Some(name.clone());
            assert_eq!(image.lookup(folder, name).unwrap().as_ref(), Some(&entry));
            names += 1;
            if node(&image, entry.node) == FileType::Directory {
                todo.push(entry.node);
            }
        }
    }
    // A name takes two words at least, and none is read twice.
    assert!(names <= data.len() as u64 / 16);
    assert!(image.attr(NodeId(0)).is_err());
}

fn node(image: &Puzzlefs, node: NodeId) -> FileType {
    let attr = image.attr(node).unwrap();
    assert!(attr.nlink > 0 && attr.permissions < 0o10_000);
    assert_eq!(attr.has_xattrs, !image.xattrs(node).unwrap().is_empty());
    match attr.kind {
        FileType::Regular => {
            let (mut at, mut extents) = (0, 0);
            while at < attr.size_bytes && extents < 64 {
                let extent = image.extent(node, at).unwrap();
                assert!(extent.file_offset == at && extent.len > 0 && extent.len <= MAX_CHUNK_BYTES);
                let (block, from) = match extent.place {
                    Place::Block(block) => (block, 0),
                    Place::Shared { block, offset } => (block, offset),
                    Place::Hole => unreachable!("the format has no holes"),
                };
                assert!(from + extent.len <= block.decoded_max && block.decoded_max <= MAX_CHUNK_BYTES);
                let mut out = Vec::new();
                assert!(image.decode(block, &mut out).is_err() && out.is_empty(), "there are no chunks");
                at += u64::from(extent.len);
                extents += 1;
            }
            assert!(image.extent(node, attr.size_bytes).is_err());
        }
        FileType::Symlink => {
            let target = image.read_link(node).unwrap();
            assert!(target.len() as u64 == attr.size_bytes && !target.is_empty() && !target.contains(&0));
        }
        _ => assert!(image.extent(node, 0).is_err()),
    }
    attr.kind
}

/// Three bytes that say how much a file has of a chunk, and whether it is compressed; then the stored bytes.
pub fn chunk(data: &[u8]) {
    let Some((&[low, middle, high], stored)) = data.split_first_chunk::<3>() else { return };
    let len = u32::from_le_bytes([low, middle, high & 0x0f, 0]).max(1);
    let compressed = high & 0x80 != 0;
    let digest = Digest::of(stored);
    let metadata = one_file(&digest, len.into(), compressed);
    let Ok(image) = open(&metadata, &[(digest, stored.len() as u64)], &[stored]) else {
        assert!(stored.is_empty() || len > MAX_CHUNK_BYTES || stored.len() as u32 > MAX_CHUNK_BYTES);
        return;
    };
    let Place::Block(block) = image.extent(NodeId(2), 0).unwrap().place else { panic!("all of a chunk") };
    let mut out = vec![7; 5];
    match image.decode(block, &mut out) {
        Ok(()) if compressed => assert_eq!(out.len(), len as usize),
        Ok(()) => assert_eq!((&out[..], out.len()), (stored, len as usize)),
        Err(_) => assert!(out.is_empty()),
    }
    assert!(out.capacity() <= (len as usize).max(5));
}

/// Metadata of one file, inode 2, that is one chunk.
fn one_file(digest: &Digest, len: u64, compressed: bool) -> Vec<u8> {
    let list = |offset: u64, words: u64| 1 | offset << 2 | 7 << 32 | words << 35;
    let structure = |offset: u64, data: u64, pointers: u64| offset << 2 | data << 32 | pointers << 48;
    let tag = |count: u64, data: u64, pointers: u64| count << 2 | data << 32 | pointers << 48;
    let bytes = |offset: u64, count: u64| 1 | offset << 2 | 2 << 32 | count << 35;
    let word = |at: usize| u64::from_le_bytes(digest.as_bytes()[at * 8..][..8].try_into().unwrap());
    let words = [
        structure(0, 1, 2), // 0: the root
        3,                  // 1: version
        list(1, 1),         // 2: metadatas, at 4
        0,                  // 3: no fs-verity data
        tag(1, 0, 1),       // 4
        list(0, 10),        // 5: inodes, at 6
        tag(2, 3, 2),       // 6
        1,                  // 7: inode 1
        3 | 0o755 << 16,    // 8: a folder
        0,                  // 9
        structure(6, 1, 1), // 10: at 17
        0,                  // 11
        2,                  // 12: inode 2
        5 | 0o644 << 16,    // 13: a file
        0,                  // 14
        list(6, 2),         // 15: at 22
        0,                  // 16
        0,                  // 17: the folder
        list(0, 2),         // 18: its names, at 19
        tag(1, 1, 1),       // 19
        2,                  // 20: inode 2
        bytes(11, 1),       // 21: its name, at 33
        tag(1, 1, 1),       // 22: the file's parts
        len,                // 23
        structure(0, 2, 1), // 24: at 25
        0,                  // 25: offset
        compressed.into(),  // 26
        bytes(1, 32),       // 27: digest, at 29
        0,                  // 28
        word(0),            // 29
        word(1),
        word(2),
        word(3),
        u64::from(b'x'), // 33
    ];
    let mut message = 0u32.to_le_bytes().to_vec();
    message.extend((words.len() as u32).to_le_bytes());
    words.iter().for_each(|word| message.extend(word.to_le_bytes()));
    message
}
