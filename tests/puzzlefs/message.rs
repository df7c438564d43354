//! A small writer of metadata, which can also write what no other would: the tests' own, so that reader and writer
//! of the program are not each other's measure.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex};

use mosfs::internals::digest::Digest;
use mosfs::internals::image::LayerError;
use mosfs::internals::image::blobs::{Blob, BlobError, Blobs, read_whole};
use mosfs::internals::image::format::{ChunkedLayer, Chunks};
use mosfs::internals::image::puzzlefs::Puzzlefs;

/// What a pointer leads to.
#[derive(Clone)]
pub enum Ptr {
    Null,
    /// Data words and pointers.
    Struct(Vec<u64>, Vec<Ptr>),
    /// Elements with as many data words and pointers each as the first.
    List(Vec<(Vec<u64>, Vec<Ptr>)>),
    Bytes(Vec<u8>),
    /// A pointer as it stands.
    Raw(u64),
}

/// A message of one segment with that root.
pub fn encode(root: &Ptr) -> Vec<u8> {
    let mut words = vec![0];
    write(&mut words, 0, root);
    frame(&[words])
}

/// A message of these segments.
pub fn frame(segments: &[Vec<u64>]) -> Vec<u8> {
    let mut bytes = (segments.len() as u32 - 1).to_le_bytes().to_vec();
    segments.iter().for_each(|segment| bytes.extend((segment.len() as u32).to_le_bytes()));
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    segments.iter().flatten().for_each(|word| bytes.extend(word.to_le_bytes()));
    bytes
}

fn pointer(kind: u64, at: usize, target: usize, upper: u64) -> u64 {
    let offset = target as i64 - at as i64 - 1;
    kind | ((offset as u64) << 2 & 0xffff_fffc) | upper << 32
}

fn write(words: &mut Vec<u64>, at: usize, what: &Ptr) {
    let target = words.len();
    match what {
        Ptr::Null => {}
        Ptr::Raw(word) => words[at] = *word,
        Ptr::Struct(data, pointers) => {
            words[at] = pointer(0, at, target, data.len() as u64 | (pointers.len() as u64) << 16);
            words.extend(data);
            words.resize(words.len() + pointers.len(), 0);
            for (number, inner) in pointers.iter().enumerate() {
                write(words, target + data.len() + number, inner);
            }
        }
        Ptr::List(elements) => {
            let (data, pointers) = elements.first().map_or((0, 0), |one| (one.0.len(), one.1.len()));
            let total = elements.len() * (data + pointers);
            words[at] = pointer(1, at, target, 7 | (total as u64) << 3);
            words.push((elements.len() as u64) << 2 | ((data | pointers << 16) as u64) << 32);
            words.resize(words.len() + total, 0);
            for (number, (values, inner)) in elements.iter().enumerate() {
                let start = target + 1 + number * (data + pointers);
                words[start..start + data].copy_from_slice(values);
                for (number, inner) in inner.iter().enumerate() {
                    write(words, start + data + number, inner);
                }
            }
        }
        Ptr::Bytes(bytes) => {
            words[at] = pointer(1, at, target, 2 | (bytes.len() as u64) << 3);
            for chunk in bytes.chunks(8) {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                words.push(u64::from_le_bytes(word));
            }
        }
    }
}

/// An inode, as an element of a list.
pub type Inode = (Vec<u64>, Vec<Ptr>);

/// An inode of that tag.
pub fn inode(ino: u64, tag: u64, what: Ptr, additional: Ptr) -> Inode {
    (vec![ino, tag | 0o644 << 16, 0], vec![what, additional])
}

/// A folder with these names.
pub fn dir(ino: u64, names: &[(&[u8], u64)]) -> Inode {
    let entries = names.iter().map(|(name, ino)| (vec![*ino], vec![Ptr::Bytes(name.to_vec())])).collect();
    inode(ino, 3, Ptr::Struct(vec![0], vec![Ptr::List(entries)]), Ptr::Null)
}

/// A part of a file: digest, offset in the chunk, length, whether it is compressed.
pub type Part<'a> = (&'a [u8], u64, u64, bool);

/// A regular file.
pub fn file(ino: u64, parts: &[Part<'_>]) -> Inode {
    let parts = parts.iter().map(|(digest, offset, len, compressed)| {
        let blob = Ptr::Struct(vec![*offset, u64::from(*compressed)], vec![Ptr::Bytes(digest.to_vec())]);
        (vec![*len], vec![blob])
    });
    inode(ino, 5, Ptr::List(parts.collect()), Ptr::Null)
}

/// A symbolic link.
pub fn link(ino: u64, target: &[u8]) -> Inode {
    inode(ino, 6, Ptr::Null, Ptr::Struct(vec![], vec![Ptr::Null, Ptr::Bytes(target.to_vec())]))
}

/// A file with one attribute.
pub fn with_xattr(ino: u64, name: &[u8], value: &[u8]) -> Inode {
    let pair = (vec![], vec![Ptr::Bytes(name.to_vec()), Ptr::Bytes(value.to_vec())]);
    inode(ino, 1, Ptr::Null, Ptr::Struct(vec![], vec![Ptr::List(vec![pair]), Ptr::Null]))
}

/// The metadata of these lists of inodes, the newest first.
pub fn rootfs(version: u64, lists: Vec<Vec<Inode>>) -> Ptr {
    let lists = lists.into_iter().map(|inodes| (vec![], vec![Ptr::List(inodes)])).collect();
    Ptr::Struct(vec![version], vec![Ptr::List(lists), Ptr::Null])
}

/// Metadata with one list.
pub fn one(inodes: Vec<Inode>) -> Vec<u8> {
    encode(&rootfs(3, vec![inodes]))
}

/// Blobs in memory, which a test can change.
#[derive(Debug, Default)]
pub struct Memory(pub Mutex<HashMap<Digest, Vec<u8>>>);

impl Memory {
    /// Puts a blob; its digest and size.
    pub fn put(&self, bytes: &[u8]) -> (Digest, u64) {
        let digest = Digest::of(bytes);
        self.0.lock().unwrap().insert(digest, bytes.to_vec());
        (digest, bytes.len() as u64)
    }
}

impl Blobs for Memory {
    fn blob(&self, _: &Digest, _: u64) -> Blob {
        unreachable!("all blobs are read whole")
    }

    fn read(&self, digest: &Digest, stored_bytes: u64, bytes: &mut Vec<u8>) -> Result<(), BlobError> {
        match self.0.lock().unwrap().get(digest) {
            Some(held) => read_whole(&held[..], digest, stored_bytes, bytes),
            None => {
                bytes.clear();
                Err(BlobError::Io { digest: *digest, source: ErrorKind::NotFound.into() })
            }
        }
    }
}

/// A layer of this metadata and these chunks: digest and size each.
pub fn layer(blobs: Arc<Memory>, rootfs: (Digest, u64), chunks: &[(Digest, u64)]) -> ChunkedLayer {
    let chunks = Arc::new(Chunks::new(chunks.to_vec()).unwrap());
    ChunkedLayer { digest: rootfs.0, size: rootfs.1, chunks, blobs }
}

/// Opens an image of that metadata and these chunks.
pub fn open(metadata: &[u8], chunks: &[&[u8]]) -> Result<Puzzlefs, LayerError> {
    let blobs = Arc::new(Memory::default());
    let chunks: Vec<_> = chunks.iter().map(|chunk| blobs.put(chunk)).collect();
    let rootfs = blobs.put(metadata);
    Puzzlefs::open(&layer(blobs, rootfs, &chunks))
}

/// The digest of chunk `number` of a [`large`] image.
pub fn large_chunk(number: u64) -> Digest {
    Digest::of(&number.to_le_bytes())
}

/// Metadata that uses this many chunks of 64 KiB: four files each, in folders of 100.
pub fn large(chunks: u64) -> Vec<u8> {
    let folders = chunks.div_ceil(25);
    let first_file = 2 + folders;
    let name = |number: u64| format!("file-{number:08}").into_bytes();
    let mut inodes = Vec::new();
    let names: Vec<_> = (0..folders).map(|folder| (name(folder), 2 + folder)).collect();
    let names: Vec<_> = names.iter().map(|(name, ino)| (&name[..], *ino)).collect();
    inodes.push(dir(1, &names));
    for folder in 0..folders {
        let numbers = folder * 100..(chunks * 4).min(folder * 100 + 100);
        let names: Vec<_> = numbers.map(|number| (name(number), first_file + number)).collect();
        let names: Vec<_> = names.iter().map(|(name, ino)| (&name[..], *ino)).collect();
        inodes.push(dir(2 + folder, &names));
    }
    for number in 0..chunks * 4 {
        let digest = large_chunk(number / 4);
        inodes.push(file(first_file + number, &[(digest.as_bytes(), number % 4 * 16_384, 16_384, true)]));
    }
    one(inodes)
}

/// A manifest of a [`large`] image whose metadata is this, with a chunk of `stored_bytes` each.
pub fn large_manifest(metadata: &[u8], chunks: u64, stored_bytes: u64) -> Vec<u8> {
    let mut text = format!(
        r#"{{"config":{{"data":"e30=","digest":"{}","mediaType":"application/vnd.oci.empty.v1+json","size":2}},"layers":[{{"digest":"{}","mediaType":"application/vnd.puzzlefs.image.rootfs.v1","size":{}}}"#,
        Digest::of(b"{}"),
        Digest::of(metadata),
        metadata.len()
    );
    for number in 0..chunks {
        text += &format!(
            r#",{{"digest":"{}","mediaType":"application/vnd.puzzlefs.image.filedata.v1+zstd","size":{stored_bytes}}}"#,
            large_chunk(number)
        );
    }
    text += r#"],"schemaVersion":2}"#;
    text.into_bytes()
}
