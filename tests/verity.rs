//! Verity data against `veritysetup`, and verified reads against files that lie.
//!
//! Needs Debian's `cryptsetup-bin`; `erofs-utils` and `squashfs-tools` for the end of an image.

use std::fs::{self, File, OpenOptions};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mosfs::internals::digest::{Digest, hex};
use mosfs::internals::error::{Class, Classified};
use mosfs::internals::image::source::{ReadError, Source};
use mosfs::internals::image::verified::{DEFAULT_CACHE_BYTES, PlainSource, REPORT_MAX, VerifiedSource};
use mosfs::internals::image::verity::{
    BLOCK_BYTES, Geometry, Located, Sealed, Superblock, Tree, VerityError, data_bytes, locate, seal,
};
use mosfs::internals::progress::Progress;
use tempfile::TempDir;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// xorshift64: cheap numbers without structure.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend(self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

fn threads(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

fn open_rw(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// Runs a tool that must succeed.
fn run(package: &str, tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {tool}: {error}: install the Debian package {package}"));
    assert!(output.status.success(), "{tool} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// An image with verity data in a folder of its own.
struct Image {
    _dir: TempDir,
    path: PathBuf,
    data: Vec<u8>,
    sealed: Sealed,
}

/// A squashfs superblock's magic and `bytes_used`, and noise.
fn fake_squashfs(len: usize) -> Vec<u8> {
    let mut data = Noise(len as u64 + 1).bytes(len);
    data[..4].copy_from_slice(b"hsqs");
    data[40..48].copy_from_slice(&(len as u64).to_le_bytes());
    data
}

fn image(len: usize) -> Image {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("image");
    let data = fake_squashfs(len);
    fs::write(&path, &data).unwrap();
    let sealed = seal(&open_rw(&path), len as u64, threads(2), &Progress::silent()).unwrap();
    Image { _dir: dir, path, data, sealed }
}

impl Image {
    fn open(&self) -> VerifiedSource {
        VerifiedSource::open(File::open(&self.path).unwrap(), self.sealed.root_hash).unwrap()
    }

    fn data_blocks(&self) -> u64 {
        (self.data.len() as u64).div_ceil(BLOCK)
    }

    /// Changes one byte of the file by `mask`; doing it again undoes it.
    fn flip(&self, at: u64, mask: u8) {
        let file = open_rw(&self.path);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ mask], at).unwrap();
    }
}

fn read(source: &impl Source, offset: u64, len: usize) -> Result<Vec<u8>, ReadError> {
    source.read(offset, len, &mut Vec::new()).map(<[u8]>::to_vec)
}

#[test]
fn same_bytes_as_veritysetup() {
    for blocks in [1, 2, 127, 128, 129, 16383, 16384, 16385, 20000_u64] {
        let ours = image((blocks * BLOCK) as usize);
        let theirs = ours.path.with_extension("veritysetup");
        fs::write(&theirs, &ours.data).unwrap();
        let path = theirs.to_str().unwrap();
        let superblock = &ours.sealed.superblock;
        let output = run(
            "cryptsetup-bin",
            "veritysetup",
            &[
                "format",
                path,
                path,
                &format!("--hash-offset={}", blocks * BLOCK),
                &format!("--data-blocks={blocks}"),
                &format!("--salt={}", hex(&superblock.salt)),
                &format!("--uuid={}", uuid::Uuid::from_bytes(superblock.uuid)),
            ],
        );
        let root_hash = output.lines().find_map(|line| line.strip_prefix("Root hash:")).unwrap().trim();
        assert_eq!(ours.sealed.root_hash.hex(), root_hash, "{blocks} blocks");
        let (our_bytes, their_bytes) = (fs::read(&ours.path).unwrap(), fs::read(&theirs).unwrap());
        assert!(our_bytes == their_bytes, "{blocks} blocks: the files differ");
        assert_eq!(ours.sealed.size_bytes, our_bytes.len() as u64);
        assert_eq!(ours.sealed.digest, Digest::of(&our_bytes));

        let path = ours.path.to_str().unwrap();
        let offset = format!("--hash-offset={}", blocks * BLOCK);
        run("cryptsetup-bin", "veritysetup", &["verify", path, path, root_hash, &offset]);
        let report = ours.open().verify_all(threads(2), &Progress::silent());
        assert!(report.is_good(), "{blocks} blocks: {report:?}");
    }
}

#[test]
fn the_same_image_gives_the_same_blob_whatever_the_threads_and_the_padding() {
    let len = 300 * 4096 + 123;
    let first = image(len);
    let whole = fs::read(&first.path).unwrap();
    assert!(whole[len..301 * 4096].iter().all(|&byte| byte == 0), "the padding is not zero");
    for (count, tail) in [(1, 0), (3, 3973), (2, 70_000)] {
        let path = first.path.with_extension("again");
        fs::write(&path, [&first.data[..], &vec![0xaa; tail]].concat()).unwrap();
        let sealed = seal(&open_rw(&path), len as u64, threads(count), &Progress::silent()).unwrap();
        assert_eq!(sealed, first.sealed);
        assert!(fs::read(&path).unwrap() == whole);
    }
    // Digest stability: another value means that images built before are built differently now.
    let data_digest = Digest::of(&whole[..301 * 4096]);
    assert_eq!(first.sealed.superblock, Superblock::for_data(&data_digest, 301));
}

#[test]
fn any_range_reads_as_it_was_written() {
    for len in [100, 4096, 5000, 300 * 4096 + 17, 16500 * 4096] {
        let image = image(len);
        let source = image.open();
        let size = image.data_blocks() * BLOCK;
        assert_eq!(source.size_bytes(), size);
        let mut expected = image.data.clone();
        expected.resize(size as usize, 0);
        let mut noise = Noise(99);
        let mut scratch = Vec::new();
        for _ in 0..300 {
            let offset = noise.below(size + 1);
            let len = noise.below((size - offset).min(700_000) + 1) as usize;
            let bytes = source.read(offset, len, &mut scratch).unwrap();
            assert!(bytes == &expected[offset as usize..][..len], "{len} bytes at {offset}");
            assert!(scratch.capacity() <= 700_000 + 8192, "scratch grew to {}", scratch.capacity());
        }
        for (offset, len) in [(size, 1), (size - 1, 2), (u64::MAX, 1), (u64::MAX - 5, 5), (0, usize::MAX)] {
            let error = read(&source, offset, len).unwrap_err();
            assert!(matches!(error, ReadError::OutOfRange { offset: o, .. } if o == offset), "{error}");
        }
        assert!(read(&source, size, 0).unwrap().is_empty());
    }
}

#[test]
fn threads_share_a_cache_that_is_too_small() {
    // 20000 blocks have 157 + 2 + 1 hash blocks; the cache holds one, then three.
    let image = image(20000 * 4096);
    for cache_blocks in [0, 3] {
        let file = File::open(&image.path).unwrap();
        let size = image.data.len() as u64;
        let source = Arc::new(
            VerifiedSource::open_sized(file, size, image.sealed.root_hash, cache_blocks * 4096).unwrap(),
        );
        std::thread::scope(|scope| {
            for seed in 1..5 {
                let (source, data) = (Arc::clone(&source), &image.data);
                scope.spawn(move || {
                    let (mut noise, mut scratch) = (Noise(seed), Vec::new());
                    for _ in 0..500 {
                        let offset = noise.below(size - 9000);
                        let bytes = source.read(offset, 9000, &mut scratch).unwrap();
                        assert!(bytes == &data[offset as usize..][..9000]);
                    }
                });
            }
        });
    }
}

/// "No content is wrong": after any change of the file, a read gives the right bytes or an error.
#[test]
fn no_flipped_byte_is_ever_read() {
    let image = image(20000 * 4096);
    let geometry = Geometry::new(image.data.len() as u64).unwrap();
    assert_eq!(geometry.levels().len(), 3);
    let mut noise = Noise(4711);
    let mut scratch = Vec::new();

    // Data: only reads that touch the block fail, and say which block it is.
    for _ in 0..300 {
        let (at, mask) = (noise.below(geometry.data_bytes()), 1 << noise.below(8));
        image.flip(at, mask);
        let opened = VerifiedSource::open(File::open(&image.path).unwrap(), image.sealed.root_hash);
        // Flipping the magic or the size of the file system moves or loses the verity data: refused at open.
        if let Ok(source) = opened {
            let error = source.read(at, 1, &mut scratch).unwrap_err();
            let ReadError::Verity { what, block, expected, found } = error else { panic!("{error}") };
            assert_eq!((what.as_str(), block), ("data", at / BLOCK));
            assert_ne!(expected, found);
            assert!(scratch.is_empty(), "unchecked bytes are left in the scratch memory");
            let other = (at / BLOCK + 1 + noise.below(19998)) % 20000 * BLOCK;
            assert!(source.read(other, 4096, &mut scratch).unwrap() == &image.data[other as usize..][..4096]);
        } else {
            assert!(at < 48, "a flip at {at} was not expected to be found at open");
        }
        image.flip(at, mask);
    }

    // The tree: exactly the data below the block cannot be read, except where the cache has the block from before.
    for (level, place) in geometry.levels().iter().enumerate() {
        for _ in 0..60 {
            let index = noise.below(place.blocks);
            let at = (place.first_block + index) * BLOCK + noise.below(BLOCK);
            let before = image.open();
            let covered = 128_u64.pow(level as u32 + 1);
            let first = index * covered;
            let inside = first + noise.below(covered.min(20000 - first));
            read(&before, inside * BLOCK, 10).unwrap();
            image.flip(at, 0x40);
            assert!(
                read(&before, inside * BLOCK, 10).unwrap() == image.data[(inside * BLOCK) as usize..][..10]
            );
            let opened = VerifiedSource::open(File::open(&image.path).unwrap(), image.sealed.root_hash);
            let error = match opened {
                Ok(source) => {
                    let outside = (first + covered) % 20000;
                    if outside < first || outside >= first + covered {
                        let bytes = read(&source, outside * BLOCK, 4096).unwrap();
                        assert!(bytes == image.data[(outside * BLOCK) as usize..][..4096]);
                    }
                    read(&source, inside * BLOCK, 10).unwrap_err()
                }
                Err(VerityError::Read(error)) if place.blocks == 1 => error,
                Err(other) => panic!("{other}"),
            };
            let ReadError::Verity { what, block, .. } = error else { panic!("{error}") };
            assert_eq!((what, block), (format!("hash level {level}"), at / BLOCK));
            image.flip(at, 0x40);
        }
    }

    // The superblock: its UUID may change; all else is refused, a wrong salt by the root hash.
    for at in 0..BLOCK {
        image.flip(geometry.data_bytes() + at, 0x10);
        let opened = VerifiedSource::open(File::open(&image.path).unwrap(), image.sealed.root_hash);
        match (at, opened) {
            (16..32, Ok(source)) => {
                assert!(read(&source, 77, 5000).unwrap() == image.data[77..][..5000]);
            }
            (72..80, Err(VerityError::Superblock { field: "data_blocks", .. })) => {}
            (88..120, Err(VerityError::Read(ReadError::Verity { what, .. }))) => {
                assert_eq!(what, "hash level 2")
            }
            (0..16 | 32..72 | 80..88 | 120.., Err(VerityError::Superblock { .. })) => {}
            (_, Ok(_)) => panic!("byte {at} of the superblock was let through"),
            (_, Err(other)) => panic!("byte {at} of the superblock: {other}"),
        }
        image.flip(geometry.data_bytes() + at, 0x10);
    }
    assert!(image.open().verify_all(threads(2), &Progress::silent()).is_good());
}

/// "Never check one read and use another": a file that changes all the time, data and hash blocks
/// alike, gives right bytes or an error.
#[test]
fn a_file_that_changes_while_it_is_read() {
    let image = image(20000 * 4096);
    let level_0 = Geometry::new(image.data.len() as u64).unwrap().levels()[0].first_block;
    let file = File::open(&image.path).unwrap();
    // A cache of one block, so that hash blocks are read again and again as well.
    let source = VerifiedSource::open_sized(file, 20000 * BLOCK, image.sealed.root_hash, 0).unwrap();
    let done = AtomicBool::new(false);
    let (mut right, mut refused, mut wrong) = (0, 0, Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut block = 0;
            while !done.load(Ordering::Relaxed) {
                for at in [block * BLOCK + 1000, (level_0 + block / 128) * BLOCK + block % 128 * 32] {
                    image.flip(at, 0x80);
                    image.flip(at, 0x80);
                }
                block = (block + 1) % 300;
            }
        });
        let (mut noise, mut scratch) = (Noise(3), Vec::new());
        for _ in 0..100_000 {
            let offset = noise.below(300 * BLOCK);
            match source.read(offset, 50_000, &mut scratch) {
                Ok(bytes) if bytes == &image.data[offset as usize..][..50_000] => right += 1,
                Ok(_) => wrong.push(format!("wrong bytes at {offset}")),
                Err(ReadError::Verity { .. }) => refused += 1,
                Err(other) => wrong.push(other.to_string()),
            }
            if right >= 2000 && refused >= 20 {
                break;
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(right > 0 && refused > 0, "{right} reads were right, {refused} refused: nothing raced");
}

/// Swapping two good blocks must not pass: a hash stands for a block at its place.
#[test]
fn blocks_at_each_others_place_are_refused() {
    let image = image(20000 * 4096);
    let geometry = Geometry::new(image.data.len() as u64).unwrap();
    let level_0 = geometry.levels()[0].first_block;
    for (a, b) in [(5, 19000), (level_0, level_0 + 9)] {
        let file = open_rw(&image.path);
        let (mut at_a, mut at_b) = ([0; BLOCK_BYTES], [0; BLOCK_BYTES]);
        file.read_exact_at(&mut at_a, a * BLOCK).unwrap();
        file.read_exact_at(&mut at_b, b * BLOCK).unwrap();
        file.write_all_at(&at_b, a * BLOCK).unwrap();
        file.write_all_at(&at_a, b * BLOCK).unwrap();
        let report = image.open().verify_all(threads(2), &Progress::silent());
        let places: Vec<u64> = report.bad.iter().map(block_of).collect();
        assert_eq!((places, report.bad_count), (vec![a, b], 2));
        file.write_all_at(&at_a, a * BLOCK).unwrap();
        file.write_all_at(&at_b, b * BLOCK).unwrap();
    }
}

fn block_of(error: &ReadError) -> u64 {
    match error {
        ReadError::Verity { block, .. } => *block,
        other => panic!("{other}"),
    }
}

#[test]
fn wrong_root_hash() {
    for len in [4096, 300 * 4096] {
        let image = image(len);
        let wrong = Digest::of(b"another root");
        let error = VerifiedSource::open(File::open(&image.path).unwrap(), wrong).err().unwrap();
        assert_eq!(error.class(), Class::Verification);
        let VerityError::Read(ReadError::Verity { expected, found, .. }) = error else { panic!("{error}") };
        assert_eq!((expected, found), (wrong, image.sealed.root_hash));
    }
}

#[test]
fn sizes_and_places_that_lie() {
    let image = image(300 * 4096);
    let root = image.sealed.root_hash;
    let whole = fs::read(&image.path).unwrap();
    let path = image.path.with_extension("bad");
    let open = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        VerifiedSource::open(File::open(&path).unwrap(), root).err().unwrap()
    };

    // Cut anywhere. At the end of the data the verity data is missing; anywhere else the file is too short.
    for size in [1, 40, 47, 48, 4096, 299 * 4096, 300 * 4096 - 1, 300 * 4096 + 1, 301 * 4096, whole.len() - 1]
    {
        match open(&whole[..size]) {
            // Up to the last block of data it is the image that is cut; from there on it is the verity data.
            VerityError::FileSize { what, found, expected } => {
                let (part, bytes) = match size <= 299 * 4096 {
                    true => ("the file system image", 300 * 4096),
                    false => ("data, verity superblock and tree", whole.len()),
                };
                assert_eq!((what, found, expected), (part, size as u64, bytes as u64));
            }
            VerityError::UnknownImage { .. } => assert!(size < 48),
            other => panic!("{size}: {other}"),
        }
    }
    assert!(matches!(open(&whole[..300 * 4096]), VerityError::Missing { data_bytes: 1_228_800 }));
    assert!(matches!(open(&[]), VerityError::UnknownImage { .. }));
    // Bytes behind the tree: no hash covers them.
    for extra in [1, 5, 4096, 1 << 20] {
        let error = open(&[&whole[..], &vec![0; extra]].concat());
        let text = format!(
            "the image file has {} bytes, expected {} (data, verity superblock and tree)",
            whole.len() + extra,
            whole.len()
        );
        assert_eq!((error.to_string(), error.class()), (text, Class::Verification));
    }

    // The file system's superblock lies about where it ends.
    for used in [0, 1, 4096, 299 * 4096, 301 * 4096, 1 << 40, 1 << 62, 1 << 63, u64::MAX - 4096, u64::MAX] {
        let mut bytes = whole.clone();
        bytes[40..48].copy_from_slice(&used.to_le_bytes());
        let error = open(&bytes);
        let right = match &error {
            VerityError::DataSize { found } => *found == used,
            VerityError::FileSize { found, .. } => *found == whole.len() as u64 && used > 300 * 4096,
            VerityError::Superblock { field, .. } => *field == "signature" && used < 300 * 4096,
            _ => false,
        };
        assert!(right, "bytes_used {used}: {error}");
    }

    // The verity superblock lies about the number of data blocks.
    for blocks in [0, 1, 299, 301, 1 << 51, 1 << 63, u64::MAX - 1, u64::MAX] {
        let mut bytes = whole.clone();
        bytes[300 * 4096 + 72..][..8].copy_from_slice(&blocks.to_le_bytes());
        match open(&bytes) {
            VerityError::Superblock { field: "data_blocks", found, expected } => {
                assert_eq!((found, expected), (blocks.to_string(), "300, the blocks before it".to_string()));
            }
            other => panic!("{blocks}: {other}"),
        }
    }

    // A caller that has the size from elsewhere may be lied to as well.
    for size in [0, 1, 4095, u64::MAX, u64::MAX - 4095, i64::MAX as u64] {
        let file = File::open(&image.path).unwrap();
        let error = VerifiedSource::open_sized(file, size, root, DEFAULT_CACHE_BYTES).err().unwrap();
        assert!(matches!(error, VerityError::DataSize { found } if found == size), "{size}: {error}");
    }
}

#[test]
fn sealing_what_cannot_be_sealed() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("image");
    fs::write(&path, [1; 5000]).unwrap();
    let try_seal = |size| seal(&open_rw(&path), size, threads(1), &Progress::silent()).unwrap_err();
    assert!(matches!(try_seal(0), VerityError::DataSize { found: 0 }));
    assert!(matches!(try_seal(u64::MAX), VerityError::DataSize { found: u64::MAX }));
    assert!(matches!(try_seal(5001), VerityError::FileSize { found: 5000, expected: 5001, .. }));
    assert_eq!(fs::read(&path).unwrap(), [1; 5000], "the file was changed");
    let error = seal(&File::open(&path).unwrap(), 5000, threads(1), &Progress::silent()).unwrap_err();
    assert!(matches!(error, VerityError::Write { .. }) && error.class() == Class::Failure, "{error}");
}

#[test]
fn a_report_lists_every_bad_block() {
    let image = image(20000 * 4096);
    let geometry = Geometry::new(image.data.len() as u64).unwrap();
    let verify = || image.open().verify_all(threads(2), &Progress::silent());
    let places = |report: &mosfs::internals::image::verified::Report| {
        report.bad.iter().map(block_of).collect::<Vec<_>>()
    };

    // Data blocks in several pieces, two in one.
    let bad = [3, 127, 128, 9999, 19999];
    bad.iter().for_each(|block| image.flip(block * BLOCK + 9, 1));
    let report = verify();
    assert_eq!((places(&report), report.bad_count, report.unknown_blocks), (bad.to_vec(), 5, 0));
    assert!(!report.is_good());
    bad.iter().for_each(|block| image.flip(block * BLOCK + 9, 1));

    // A hash block of level 0 in the middle and the last one; then one of level 1 above them.
    let [level_0, level_1] = [geometry.levels()[0], geometry.levels()[1]];
    image.flip((level_0.first_block + 7) * BLOCK, 1);
    image.flip((level_0.first_block + 156) * BLOCK, 1);
    let report = verify();
    assert_eq!(places(&report), [level_0.first_block + 7, level_0.first_block + 156]);
    assert_eq!(report.unknown_blocks, 128 + 20000 - 156 * 128);
    image.flip((level_1.first_block + 1) * BLOCK, 1);
    let report = verify();
    assert_eq!(places(&report), [level_1.first_block + 1, level_0.first_block + 7]);
    assert_eq!(report.unknown_blocks, 128 + 20000 - 16384);
    image.flip((level_1.first_block + 1) * BLOCK, 1);
    image.flip((level_0.first_block + 7) * BLOCK, 1);
    image.flip((level_0.first_block + 156) * BLOCK, 1);

    assert!(verify().is_good());

    // All of the data: the list is bounded, the count is not.
    open_rw(&image.path).write_all_at(&vec![0; 20000 * 4096 - 4096], 4096).unwrap();
    let report = verify();
    assert_eq!((report.bad.len(), report.bad_count), (REPORT_MAX, 19999));
}

#[test]
fn a_file_that_shrinks_after_open_gives_io_errors() {
    let image = image(300 * 4096);
    let source = image.open();
    open_rw(&image.path).set_len(200 * 4096 + 100).unwrap();
    assert!(matches!(read(&source, 250 * BLOCK, 10).unwrap_err(), ReadError::Io { .. }));
    assert!(
        matches!(read(&source, 10, 10).unwrap_err(), ReadError::Io { .. }),
        "the hash block is gone as well"
    );

    // The same with the hash blocks in the cache: the report tells the blocks that cannot be read.
    let image = self::image(100 * 4096);
    let source = image.open();
    open_rw(&image.path).set_len(98 * 4096 + 100).unwrap();
    assert!(read(&source, 97 * BLOCK, 4096).unwrap() == image.data[97 * 4096..98 * 4096]);
    let report = source.verify_all(threads(1), &Progress::silent());
    let offsets: Vec<u64> = report
        .bad
        .iter()
        .map(|error| match error {
            ReadError::Io { offset, .. } => *offset,
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!((offsets, report.bad_count), (vec![98 * BLOCK, 99 * BLOCK], 2));
}

#[test]
fn the_end_of_real_images_is_found() {
    let dir = TempDir::new().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for n in 0..20 {
        fs::write(tree.join(n.to_string()), Noise(n + 1).bytes(10_000)).unwrap();
    }
    let (tree, squashfs, erofs) =
        (tree.to_str().unwrap(), dir.path().join("squashfs"), dir.path().join("erofs"));
    run("squashfs-tools", "mksquashfs", &[tree, squashfs.to_str().unwrap(), "-quiet", "-no-progress"]);
    run("erofs-utils", "mkfs.erofs", &["--quiet", erofs.to_str().unwrap(), tree]);
    for path in [squashfs, erofs] {
        let before = fs::read(&path).unwrap();
        let found = locate(&File::open(&path).unwrap()).unwrap();
        assert!(matches!(found, Located::Absent { image_bytes, .. } if image_bytes == before.len() as u64));
        let size = data_bytes(&before[..4096]).unwrap();
        assert_eq!(size, before.len() as u64, "{}", path.display());
        let sealed = seal(&open_rw(&path), size, threads(2), &Progress::silent()).unwrap();
        let source = VerifiedSource::open(File::open(&path).unwrap(), sealed.root_hash).unwrap();
        assert!(read(&source, 0, before.len()).unwrap() == before);
        let found = locate(&File::open(&path).unwrap()).and_then(Located::required).unwrap();
        assert_eq!(found.superblock, sealed.superblock);
        assert_eq!(source.superblock(), &sealed.superblock);
    }
}

#[test]
fn a_plain_source_reads_what_is_there() {
    let image = image(10_000);
    let source = PlainSource::unsafe_no_verity(File::open(&image.path).unwrap()).unwrap();
    assert_eq!(source.size_bytes(), image.sealed.size_bytes);
    assert!(read(&source, 100, 5000).unwrap() == image.data[100..5100]);
    assert!(matches!(read(&source, source.size_bytes(), 1), Err(ReadError::OutOfRange { .. })));
}

/// A tree of another salt is another tree, so a salt is really part of each hash.
#[test]
fn the_salt_is_in_every_hash() {
    let image = image(200 * 4096);
    let file = File::open(&image.path).unwrap();
    let geometry = Geometry::new(200 * BLOCK).unwrap();
    let task = Progress::silent().task("hash", "image", None);
    let build = |salt| Tree::build(&file, &geometry, salt, threads(1), &task).unwrap();
    let (ours, other) = (build(&image.sealed.superblock.salt), build(&[1; 32]));
    assert_eq!(ours.root_hash, image.sealed.root_hash);
    assert_ne!(ours.root_hash, other.root_hash);
    let differ = ours.bytes.as_chunks::<32>().0.iter().zip(other.bytes.as_chunks::<32>().0);
    assert_eq!(differ.filter(|(a, b)| a != b).count(), 202);
}
