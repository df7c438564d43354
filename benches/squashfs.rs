//! How fast squashfs images are read from memory: blocks decoded, and metadata walked.
//!
//! `cargo bench --bench squashfs`, or with a real image: `MOSFS_BENCH_SQUASHFS=FILE cargo bench --bench squashfs`.
//! Makes its images with mksquashfs (Debian's squashfs-tools).

use std::process::Command;
use std::sync::{Arc, OnceLock};

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use mosfs::internals::image::layer::{BlockId, Layer, Place};
use mosfs::internals::image::squashfs::Squashfs;
use mosfs::internals::image::{FileType, MemorySource, NodeId};

fn main() {
    divan::main();
}

/// A tree of a few thousand files with content that compresses to about a half.
fn image(compressor: &str) -> Vec<u8> {
    if let Some(path) = std::env::var_os("MOSFS_BENCH_SQUASHFS") {
        return std::fs::read(path).expect("MOSFS_BENCH_SQUASHFS");
    }
    static TREE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let tree = TREE.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let mut state = 88_172_645_463_325_252u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for number in 0..50 {
            let below = folder.path().join(format!("folder-{number}"));
            std::fs::create_dir(&below).expect("a folder");
            for file in 0..60 {
                let len = if file == 0 { 1 << 20 } else { next() as usize % 4000 };
                let mut text = Vec::new();
                while text.len() < len {
                    text.extend_from_slice(
                        format!("{:x} and the same text again; ", next() >> 24).as_bytes(),
                    );
                }
                text.truncate(len);
                std::fs::write(below.join(format!("some-file-{file}.txt")), text).expect("a file");
            }
        }
        folder
    });
    let path = tree.path().with_extension(compressor);
    let status = Command::new("mksquashfs")
        .args([tree.path(), &path])
        .args(["-noappend", "-quiet", "-no-progress", "-comp", compressor, "-b", "128K"])
        .status()
        .expect("mksquashfs of Debian's squashfs-tools");
    assert!(status.success());
    let bytes = std::fs::read(&path).expect("the image");
    std::fs::remove_file(&path).expect("the image");
    bytes
}

fn open(bytes: &[u8]) -> Squashfs {
    Squashfs::open(Arc::new(MemorySource(bytes.to_vec()))).expect("an image")
}

/// Every folder and every file, as `find -printf` asks: names and attributes. The answer is how many there are.
fn walk(image: &Squashfs, each: &mut dyn FnMut(NodeId, u64)) -> usize {
    let (mut folders, mut count) = (vec![image.root()], 0);
    while let Some(folder) = folders.pop() {
        image
            .read_dir(folder, 0, &mut |entry| {
                count += 1;
                let attr = image.attr(entry.node).expect("an inode");
                match attr.kind {
                    FileType::Directory => folders.push(entry.node),
                    FileType::Regular => each(entry.node, attr.size_bytes),
                    _ => {}
                }
                true
            })
            .expect("a folder");
    }
    count
}

/// Each stored block of an image once.
fn blocks(image: &Squashfs) -> Vec<BlockId> {
    let mut all = Vec::new();
    walk(image, &mut |node, size| {
        let mut offset = 0;
        while offset < size {
            let extent = image.extent(node, offset).expect("an extent");
            if let Place::Block(block) | Place::Shared { block, .. } = extent.place {
                all.push(block);
            }
            offset += u64::from(extent.len);
        }
    });
    all.sort();
    all.dedup();
    all
}

/// Decodes each stored block of the image.
#[divan::bench(args = ["zstd", "gzip", "lz4", "lzo", "xz"], sample_count = 10)]
fn decode(bencher: Bencher<'_, '_>, compressor: &str) {
    let image = open(&image(compressor));
    let blocks = blocks(&image);
    let mut out = Vec::new();
    let mut total = 0;
    for block in &blocks {
        image.decode(*block, &mut out).expect("a block");
        total += out.len();
    }
    bencher.counter(BytesCount::new(total)).bench_local(|| {
        for block in &blocks {
            image.decode(*block, &mut out).expect("a block");
        }
    });
}

/// Opens an image and walks all of it: each metadata block is decoded once.
#[divan::bench]
fn walk_cold(bencher: Bencher<'_, '_>) {
    let source = Arc::new(MemorySource(image("zstd")));
    let count = walk(&Squashfs::open(source.clone()).expect("an image"), &mut |_, _| {});
    bencher
        .counter(ItemsCount::new(count))
        .bench_local(|| walk(&Squashfs::open(source.clone()).expect("an image"), &mut |_, _| {}));
}

/// Walks an image again.
#[divan::bench]
fn walk_warm(bencher: Bencher<'_, '_>) {
    let image = open(&image("zstd"));
    let count = walk(&image, &mut |_, _| {});
    bencher.counter(ItemsCount::new(count)).bench_local(|| walk(&image, &mut |_, _| {}));
}

/// Opens an image.
#[divan::bench]
fn open_only(bencher: Bencher<'_, '_>) {
    let source = Arc::new(MemorySource(image("zstd")));
    bencher.bench_local(|| Squashfs::open(source.clone()).expect("an image"));
}

/// Finds each file by its path.
#[divan::bench]
fn lookup(bencher: Bencher<'_, '_>) {
    let image = open(&image("zstd"));
    let root = image.root();
    let mut names = Vec::new();
    image
        .read_dir(root, 0, &mut |entry| {
            names.push(entry.name);
            true
        })
        .expect("the root");
    bencher.counter(ItemsCount::new(names.len())).bench_local(|| {
        names.iter().filter(|name| image.lookup(root, name).is_ok_and(|entry| entry.is_some())).count()
    });
}

/// Finds the extent of each block of the largest file.
#[divan::bench]
fn extents(bencher: Bencher<'_, '_>) {
    let image = open(&image("zstd"));
    let mut largest = (0, image.root());
    walk(&image, &mut |node, size| largest = largest.max((size, node)));
    let (size, node) = largest;
    let step = u64::from(image.superblock().block_bytes);
    bencher.counter(ItemsCount::new(size.div_ceil(step))).bench_local(|| {
        (0..size)
            .step_by(step as usize)
            .map(|offset| image.extent(node, offset).expect("an extent").len)
            .max()
    });
}
