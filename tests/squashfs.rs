//! The squashfs reader against images of the real tools, the kernel's reader and unsquashfs.

#[path = "common/squashfs.rs"]
mod common;
#[path = "common/mounted.rs"]
mod mounted;

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use common::{
    View, args, as_copied, assert_same, feed, list, make_tree, mksquashfs, open, read, run, see, unsquashfs,
};
use mosfs::internals::image::layer::{Layer, Place};
use mosfs::internals::image::squashfs::{Compressor, Event, Options, Squashfs};
use mosfs::internals::image::{LayerError, MemorySource};
use mounted::Mounted;
use tempfile::TempDir;

/// Where two trees are, made once for all tests: `full`, and `lean`, whose large folder is not as large.
fn trees() -> &'static Path {
    static TREE: OnceLock<TempDir> = OnceLock::new();
    TREE.get_or_init(|| {
        // Static values are not dropped: what an earlier run left is removed here.
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("squashfs");
        let _ = fs::remove_dir_all(&place);
        fs::create_dir_all(&place).unwrap();
        let folder = tempfile::tempdir_in(&place).unwrap();
        make_tree(&folder.path().join("full"), 3100);
        make_tree(&folder.path().join("lean"), 150);
        folder
    })
    .path()
}

fn full() -> PathBuf {
    trees().join("full")
}

fn lean() -> PathBuf {
    trees().join("lean")
}

/// Who else can read an image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Others {
    KernelAndUnsquashfs,
    /// unsquashfs 4.5 stops at the id table of lz4 images that squashfs-tools-ng made; the kernel reads them.
    Kernel,
}

/// Compares an image with the kernel's view of it, and with what unsquashfs extracts.
///
/// The kernel knows all compressors but lzma; one that it should know and does not fails the mount, and so the test.
fn compare(image: &Path, what: &str, others: Others) {
    let folder = tempfile::tempdir().unwrap();
    let squashfs = open(image);
    let ours = read(&squashfs);
    if squashfs.superblock().compressor != Compressor::Lzma {
        // A loop device has whole sectors only: the kernel refuses an image that ends in the middle of one.
        let file = fs::OpenOptions::new().write(true).open(image).unwrap();
        file.set_len(file.metadata().unwrap().len().next_multiple_of(4096)).unwrap();
        let mounted = Mounted::of("squashfs", image, folder.path().join("mnt"));
        let view = if squashfs.has_xattrs() { View::Mounted } else { View::MountedWithoutXattrs };
        assert_same(&format!("{what}: kernel"), &ours, &see(&mounted.0, view));
    }
    if others == Others::KernelAndUnsquashfs {
        let extracted = folder.path().join("extracted");
        unsquashfs(image, &extracted);
        assert_same(&format!("{what}: unsquashfs"), &as_copied(ours), &see(&extracted, View::Copied));
    }

    let mut files = 0;
    let flow = squashfs.check_all(&mut |event| {
        match event {
            Event::Problem { path, error } => panic!("{what}: {}: {error}", String::from_utf8_lossy(path)),
            Event::Node { .. } => files += 1,
            Event::Content(_) => {}
        }
        ControlFlow::Continue(())
    });
    assert!(flow.is_continue());
    assert!(files > 250, "{what}: {files} files");
}

const BLOCKS: [&str; 4] = ["4K", "64K", "128K", "1M"];

const FRAGMENTS: [&str; 4] = ["", "-no-fragments", "-always-use-fragments", "-tailends"];

const TABLES: [&str; 10] = [
    "",
    "-noI -noD -noF -noX",
    "-no-xattrs",
    "-noD",
    "-noI",
    "-noF -nopad",
    "-noX",
    "-noId -no-exports",
    "-no-exports -no-sparse -no-duplicates",
    "-no-hardlinks",
];

/// Images of one compressor with each size of blocks. Over all compressors each pair of a size and a way to use
/// fragments comes up, and each other option with a compressor of each kind.
fn matrix(number: usize, compressor: &str, more: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    for (block, size) in BLOCKS.into_iter().enumerate() {
        let image = folder.path().join("image");
        let fragments = FRAGMENTS[(number + block) % FRAGMENTS.len()];
        let tables = TABLES[(number * BLOCKS.len() + block) % TABLES.len()];
        let more = more.get(block).unwrap_or(&"");
        let options = format!("-comp {compressor} -b {size} {fragments} {tables} {more}");
        let tree = if block == number % BLOCKS.len() { full() } else { lean() };
        mksquashfs(&tree, &image, &options);
        compare(&image, &options, Others::KernelAndUnsquashfs);
        fs::remove_file(&image).unwrap();
    }
}

#[test]
fn gzip() {
    matrix(0, "gzip", &["-Xcompression-level 1 -Xwindow-size 8", "", "-Xstrategy huffman_only,fixed", ""]);
}

#[test]
fn lzo() {
    matrix(1, "lzo", &["", "-Xalgorithm lzo1x_1", "-Xalgorithm lzo1x_1_11", "-Xcompression-level 3"]);
}

#[test]
fn lz4() {
    matrix(2, "lz4", &["", "-Xhc", "", "-Xhc"]);
}

#[test]
fn xz() {
    matrix(3, "xz", &["", "-Xbcj x86,arm", "-Xdict-size 8K", "-Xbcj powerpc,armthumb,sparc,ia64"]);
}

#[test]
fn zstd() {
    matrix(4, "zstd", &["-Xcompression-level 1", "-Xcompression-level 3", "", "-Xcompression-level 19"]);
}

#[test]
fn lzma() {
    matrix(5, "lzma", &[]);
}

/// The other family of tools, with each of its compressors: other ideas of fragments, of what is in an extended
/// inode, of the index of folders and of the layout of xattrs.
#[test]
fn squashfs_tools_ng() {
    let folder = tempfile::tempdir().unwrap();
    for (number, compressor) in ["gzip", "lzma", "lzo", "xz", "lz4", "zstd"].into_iter().enumerate() {
        let image = folder.path().join("image");
        let block = [4096, 131_072, 1 << 20, 65_536][number % 4];
        let more = ["", "-e", "-T", "-e -T"][number % 4];
        let others = if compressor == "lz4" { Others::Kernel } else { Others::KernelAndUnsquashfs };
        let tree = if number % 3 == 2 { full() } else { lean() };
        let words = format!("-q -f -k -x -c {compressor} -b {block} {more} -D");
        run("squashfs-tools-ng", "gensquashfs", &args(&words, &[&tree, &image]));
        compare(&image, &format!("gensquashfs {words}"), others);
    }
}

/// From a tar archive: hard links in the order of the archive, xattrs of up to 64 KiB, no entries for parents.
#[test]
fn from_tar() {
    let folder = tempfile::tempdir().unwrap();
    let archive = run(
        "tar",
        "tar",
        &args(
            "--format=posix --xattrs --xattrs-include=* --numeric-owner -cf - -C",
            &[trees(), Path::new("lean")],
        ),
    );
    let image = folder.path().join("image");
    for (program, package, words) in [
        ("sqfstar", "squashfs-tools", "-quiet -no-progress -comp zstd -b 128K"),
        ("sqfstar", "squashfs-tools", "-quiet -no-progress -comp gzip -b 4K -exports -noX"),
        ("tar2sqfs", "squashfs-tools-ng", "-q -c zstd -b 131072"),
        ("tar2sqfs", "squashfs-tools-ng", "-q -c lz4 -b 4096 -e -T"),
    ] {
        // tar cannot hold sockets and leaves them out with a warning.
        feed(package, program, &args(words, &[&image]), &archive);
        let others = if program == "tar2sqfs" && words.contains("lz4") {
            Others::Kernel
        } else {
            Others::KernelAndUnsquashfs
        };
        compare(&image, &format!("{program} {words}"), others);
        fs::remove_file(&image).unwrap();
    }
}

/// More than one block of metadata in one value, and several such values at one file.
#[test]
fn xattrs_of_64_kib() {
    let folder = tempfile::tempdir().unwrap();
    let mut archive = tar::Builder::new(Vec::new());
    let mut expected = Vec::new();
    for (number, name) in ["a", "b", "c"].into_iter().enumerate() {
        let long = vec![b'a' + number as u8; 65_536 - number];
        let same = vec![b'z'; 60_000];
        let keys = ["SCHILY.xattr.user.long", "SCHILY.xattr.user.same"];
        archive.append_pax_extensions([(keys[0], &long[..]), (keys[1], &same[..])]).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(0);
        archive.append_data(&mut header, name, &[][..]).unwrap();
        expected.push((name, vec![(b"user.long".to_vec(), long), (b"user.same".to_vec(), same)]));
    }
    let archive = archive.into_inner().unwrap();
    let image = folder.path().join("image");
    feed("squashfs-tools", "sqfstar", &args("-quiet -no-progress -comp zstd", &[&image]), &archive);
    let squashfs = open(&image);
    for (name, xattrs) in expected {
        let entry = squashfs.lookup(squashfs.root(), name.as_bytes()).unwrap().unwrap();
        let mut found = squashfs.xattrs(entry.node).unwrap();
        found.sort();
        assert_eq!(found, xattrs);
    }
}

/// Padding and appended bytes (the hash tree of dm-verity) do not matter; a byte that is missing does.
#[test]
fn what_follows_the_image() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let small = folder.path().join("small");
    fs::create_dir(&small).unwrap();
    fs::write(small.join("file"), b"content").unwrap();
    mksquashfs(&small, &image, "-comp zstd");
    let padded = fs::read(&image).unwrap();
    let used = open(&image).superblock().bytes_used as usize;
    assert!(used < padded.len() && padded.len().is_multiple_of(4096));

    let appended = [&padded[..], &[0xa5; 8192]].concat();
    for bytes in [padded[..used].to_vec(), padded.clone(), appended] {
        let squashfs = Squashfs::open(Arc::new(MemorySource(bytes))).unwrap();
        let tree = read(&squashfs);
        assert_eq!(tree.len(), 2);
    }
    let error = Squashfs::open(Arc::new(MemorySource(padded[..used - 1].to_vec()))).err().unwrap();
    let LayerError::Corrupt { table: "superblock", offset: 40, why } = error else { panic!("{error}") };
    assert_eq!(why, format!("{used} bytes used, expected 96 to the {} that there are", used - 1));
}

/// Any byte of a large file and any name of a large folder is found, in any order, by a reader that keeps little.
#[test]
fn large_sparse_file_and_large_folder() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    fs::create_dir_all(source.join("many")).unwrap();
    const SIZE: u64 = 1 << 30;
    let sparse = fs::File::create(source.join("sparse")).unwrap();
    sparse.set_len(SIZE).unwrap();
    let places = [0, 300 << 20, (800 << 20) + 777, SIZE - 5];
    for (number, place) in places.into_iter().enumerate() {
        sparse.write_all_at(format!("at {number}!").as_bytes().get(..5).unwrap(), place).unwrap();
    }
    for number in 0..6_000 {
        fs::File::create(
            source.join(format!("many/{number:06} and a name of some length, so that there is an index")),
        )
        .unwrap();
    }
    let image = folder.path().join("image");
    mksquashfs(&source, &image, "-comp zstd -b 4K -Xcompression-level 1");

    let options = Options { metadata_cache_bytes: 0 };
    let squashfs = Squashfs::open_with(Arc::new(MemorySource(fs::read(&image).unwrap())), options).unwrap();
    let file = squashfs.lookup(squashfs.root(), b"sparse").unwrap().unwrap().node;
    assert_eq!(squashfs.attr(file).unwrap().size_bytes, SIZE);
    let byte = |offset: u64| {
        let extent = squashfs.extent(file, offset).unwrap();
        let inside = offset.checked_sub(extent.file_offset).unwrap() as usize;
        assert!(inside < extent.len as usize);
        let mut block = Vec::new();
        match extent.place {
            Place::Hole => 0,
            Place::Block(id) => {
                squashfs.decode(id, &mut block).unwrap();
                block[inside]
            }
            Place::Shared { block: id, offset } => {
                squashfs.decode(id, &mut block).unwrap();
                block[offset as usize + inside]
            }
        }
    };
    for (number, place) in places.into_iter().enumerate().rev() {
        assert_eq!(byte(place), b'a');
        assert_eq!(byte(place + 3), b'0' + number as u8);
        assert_eq!(place.checked_sub(1).map_or(0, byte), 0);
    }
    // From the first byte to the last, holes in large steps.
    let (mut offset, mut steps) = (0, 0);
    while offset < SIZE {
        let extent = squashfs.extent(file, offset).unwrap();
        assert_eq!(extent.file_offset, offset);
        offset += u64::from(extent.len);
        steps += 1;
    }
    assert_eq!(offset, SIZE);
    assert!(steps < 1000, "{steps} extents");
    assert!(squashfs.metadata_cache_bytes() <= 256 << 10);

    let many = squashfs.lookup(squashfs.root(), b"many").unwrap().unwrap().node;
    assert_eq!(list(&squashfs, many).len(), 6_000);
}
