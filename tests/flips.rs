//! Campaigns of flipped bytes over a whole layer: squashfs, its hash tree, and the readers of both.
//!
//! The rule: a flipped byte never gives wrong content. What is read is right, or it is an error.

#[path = "common/squashfs.rs"]
#[allow(dead_code)]
mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{bytes, mksquashfs};
use mosfs::internals::digest::Digest;
use mosfs::internals::image::layer::{Attr, Layer, Place, Xattrs};
use mosfs::internals::image::squashfs::Squashfs;
use mosfs::internals::image::verified::VerifiedSource;
use mosfs::internals::image::verity::seal;
use mosfs::internals::image::{FileType, LayerError, MemorySource, ReadError};
use mosfs::internals::progress::Progress;
use tempfile::TempDir;

/// What was read of a file, whole.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    attr: Attr,
    xattrs: Xattrs,
    target: Vec<u8>,
    content: Vec<u8>,
}

/// Everything that can be read of an image, and the errors where something cannot.
fn read(image: &Squashfs) -> (BTreeMap<Vec<u8>, Seen>, Vec<LayerError>) {
    let (mut tree, mut errors) = (BTreeMap::new(), Vec::new());
    let mut todo = vec![(Vec::new(), image.root())];
    while let Some((path, node)) = todo.pop() {
        // A flipped byte of an image that nobody verifies can make a loop of folders.
        if path.len() > 200 || tree.len() > 1000 {
            continue;
        }
        let seen = (|| {
            let attr = image.attr(node)?;
            let target = if attr.kind == FileType::Symlink { image.read_link(node)? } else { Vec::new() };
            let content =
                if attr.kind == FileType::Regular { content(image, node, attr)? } else { Vec::new() };
            Ok(Seen { attr, xattrs: image.xattrs(node)?, target, content })
        })();
        match seen {
            Ok(seen) => {
                if seen.attr.kind == FileType::Directory {
                    let result = image.read_dir(node, 0, &mut |entry| {
                        todo.push(([&path[..], b"/", &entry.name].concat(), entry.node));
                        true
                    });
                    errors.extend(result.err());
                }
                tree.insert(path, seen);
            }
            Err(error) => errors.push(error),
        }
    }
    (tree, errors)
}

fn content(
    image: &Squashfs,
    node: mosfs::internals::image::NodeId,
    attr: Attr,
) -> Result<Vec<u8>, LayerError> {
    let (mut content, mut block) = (Vec::new(), Vec::new());
    while (content.len() as u64) < attr.size_bytes && content.len() < 4 << 20 {
        let extent = image.extent(node, content.len() as u64)?;
        let len = extent.len as usize;
        match extent.place {
            Place::Hole => content.resize(content.len() + len.min(4 << 20), 0),
            Place::Block(id) => {
                image.decode(id, &mut block)?;
                content.extend_from_slice(&block);
            }
            Place::Shared { block: id, offset } => {
                image.decode(id, &mut block)?;
                match block.get(offset as usize..offset as usize + len) {
                    Some(part) => content.extend_from_slice(part),
                    None => {
                        let why = "a fragment block is too short".into();
                        return Err(LayerError::Corrupt { table: "fragment block", offset: id.start, why });
                    }
                }
            }
        }
    }
    Ok(content)
}

/// Numbers that look random and are the same each time.
struct Noise(u64);

impl Noise {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

fn make(folder: &Path, options: &str) -> PathBuf {
    let (tree, image) = (folder.join("tree"), folder.join("image"));
    if !tree.exists() {
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        for number in 0..40 {
            let name = tree.join(format!("a/b/file-{number}"));
            fs::write(name, bytes(number, 100 + 37 * number as usize)).unwrap();
        }
        fs::write(tree.join("a/large"), bytes(99, 300_000)).unwrap();
        fs::write(tree.join("a/noise"), bytes(100, 20_000)).unwrap();
        std::os::unix::fs::symlink("b/file-3", tree.join("a/link")).unwrap();
        fs::hard_link(tree.join("a/noise"), tree.join("a/b/same")).unwrap();
    }
    mksquashfs(&tree, &image, options);
    image
}

/// Changes one byte by `mask`; doing it again undoes it.
fn flip(file: &File, at: u64, mask: u8) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ mask], at).unwrap();
}

#[test]
fn a_flipped_byte_of_a_verified_layer_never_gives_wrong_content() {
    let folder = TempDir::new().unwrap();
    let image = make(folder.path(), "-comp zstd -b 16K");
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let used = common::open(&image).superblock().bytes_used;
    let sealed = seal(&file, used, NonZeroUsize::MIN, &Progress::silent()).unwrap();
    let open = |root: Digest| {
        let source = VerifiedSource::open(File::open(&image).unwrap(), root)?;
        Ok::<_, Box<dyn std::error::Error>>(Squashfs::open(Arc::new(source))?)
    };
    let (right, errors) = read(&open(sealed.root_hash).unwrap());
    assert!(errors.is_empty() && right.len() == 48, "{} files, {errors:?}", right.len());
    let superblock = *open(sealed.root_hash).unwrap().superblock();

    // Each structural place, then places all over the file.
    let data_end = used.next_multiple_of(4096);
    let tables = [superblock.inode_table, superblock.directory_table, superblock.id_table];
    let tables = tables.into_iter().chain(superblock.fragment_table).chain(superblock.export_table);
    let mut places: Vec<u64> =
        (0..96).chain(tables.flat_map(|table| [table, table + 1, table + 5])).collect();
    places.extend((data_end..data_end + 512).step_by(7));
    places.extend((data_end + 4096..sealed.size_bytes).step_by(211));
    let mut noise = Noise(7);
    places.extend((0..400).map(|_| noise.below(sealed.size_bytes)));

    let (mut noticed, mut unnoticed) = (0, 0);
    for at in places {
        let mask = 1 << noise.below(8);
        flip(&file, at, mask);
        match open(sealed.root_hash) {
            Err(_) => noticed += 1,
            Ok(image) => {
                let (seen, errors) = read(&image);
                for (path, seen) in &seen {
                    let path = String::from_utf8_lossy(path);
                    assert!(right.get(path.as_bytes()) == Some(seen), "byte {at} flipped: {path:?} is wrong");
                }
                for error in &errors {
                    let verity = matches!(error, LayerError::Read(ReadError::Verity { .. }));
                    assert!(verity, "byte {at} flipped: {error}");
                }
                assert!(
                    !errors.is_empty() || seen.len() == right.len(),
                    "byte {at} flipped: files are missing"
                );
                if errors.is_empty() { unnoticed += 1 } else { noticed += 1 }
            }
        }
        flip(&file, at, mask);
    }
    let (seen, errors) = read(&open(sealed.root_hash).unwrap());
    assert!(errors.is_empty() && seen == right);
    // Not every byte is needed to read everything: padding, and salt or names in the verity superblock.
    assert!(noticed > 500 && unnoticed < noticed / 2, "{noticed} noticed, {unnoticed} not");
}

/// Without verity a flip can give other content, but nothing worse: no panic, no loop, no end of memory.
#[test]
fn flipped_bytes_of_an_image_that_nobody_verifies_do_no_harm() {
    let folder = TempDir::new().unwrap();
    let mut noise = Noise(11);
    for compressor in ["gzip", "lzo", "lz4", "xz", "zstd", "lzma"] {
        for tables in ["", "-noI -noX -noId"] {
            let image =
                fs::read(make(folder.path(), &format!("-comp {compressor} -b 16K {tables}"))).unwrap();
            let superblock = *Squashfs::open(Arc::new(MemorySource(image.clone()))).unwrap().superblock();
            for number in 0..60 {
                let mut image = image.clone();
                // Most of them in the tables, which are a small part of an image.
                let from = [0, superblock.inode_table, superblock.inode_table, superblock.directory_table]
                    [number % 4];
                for _ in 0..1 + number % 3 {
                    let at = from + noise.below(superblock.bytes_used - from);
                    image[at as usize] ^= 1 << noise.below(8);
                }
                if let Ok(image) = Squashfs::open(Arc::new(MemorySource(image))) {
                    let (_, errors) = read(&image);
                    for error in errors {
                        let right = matches!(
                            error,
                            LayerError::Corrupt { .. } | LayerError::Read(ReadError::OutOfRange { .. })
                        );
                        assert!(right, "{compressor}: {error}");
                    }
                }
            }
        }
    }
}
