//! How fast blocks are hashed, trees are built and verified data is read.
//!
//! `cargo bench --bench verity`; quote ratios of one run, not figures of two machines.

use std::fs::File;
use std::num::NonZeroUsize;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use mosfs::internals::image::source::Source;
use mosfs::internals::image::verified::{DEFAULT_CACHE_BYTES, PlainSource, VerifiedSource};
use mosfs::internals::image::verity::{Geometry, Sealed, Tree, seal};
use mosfs::internals::progress::Progress;
use mosfs::internals::sys::sha256::{BLOCK, hash_blocks};
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

/// Size of the image that is hashed and read: 256 MiB, in the page cache.
const IMAGE_BYTES: u64 = 256 << 20;

fn main() {
    divan::main();
}

/// Bytes without structure.
fn noise(len: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
        .collect()
}

/// An image with its verity data.
fn image() -> &'static (NamedTempFile, Sealed) {
    static IMAGE: OnceLock<(NamedTempFile, Sealed)> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let file = NamedTempFile::new().unwrap();
        std::fs::write(file.path(), noise(IMAGE_BYTES as usize)).unwrap();
        let sealed = seal(file.as_file(), IMAGE_BYTES, NonZeroUsize::MIN, &Progress::silent()).unwrap();
        (file, sealed)
    })
}

fn verified() -> VerifiedSource {
    let (file, sealed) = image();
    let file = File::open(file.path()).unwrap();
    VerifiedSource::open_sized(file, IMAGE_BYTES, sealed.root_hash, DEFAULT_CACHE_BYTES).unwrap()
}

fn plain() -> PlainSource {
    PlainSource::unsafe_no_verity(File::open(image().0.path()).unwrap()).unwrap()
}

/// Blocks hashed at once: 1 is a single stream.
#[divan::bench(args = [1, 2, 32])]
fn salted_blocks(bencher: Bencher, blocks: usize) {
    let data = noise(blocks * BLOCK);
    let mut out = vec![[0; 32]; blocks];
    bencher.counter(BytesCount::new(data.len())).bench_local(|| {
        hash_blocks(&[7; 32], black_box(&data), &mut out);
    });
}

/// The same by the `sha2` crate.
#[divan::bench]
fn sha2_crate(bencher: Bencher) {
    let data = noise(BLOCK);
    bencher
        .counter(BytesCount::new(data.len()))
        .bench_local(|| Sha256::new().chain_update([7; 32]).chain_update(black_box(&data)).finalize());
}

/// The tree of an image, on so many threads.
#[divan::bench(args = [1, 2], sample_count = 15)]
fn tree(bencher: Bencher, threads: usize) {
    let (file, sealed) = image();
    let geometry = Geometry::new(IMAGE_BYTES).unwrap();
    let task = Progress::silent().task("hash", "image", None);
    let threads = NonZeroUsize::new(threads).unwrap();
    bencher.counter(BytesCount::new(IMAGE_BYTES)).bench_local(|| {
        Tree::build(file.as_file(), &geometry, &sealed.superblock.salt, threads, &task).unwrap()
    });
}

/// The same by the tool that everyone has, as a process, into a file of its own.
#[divan::bench(sample_count = 15)]
fn veritysetup_format(bencher: Bencher) {
    let (data, sealed) = image();
    let tree = NamedTempFile::new().unwrap();
    bencher.counter(BytesCount::new(IMAGE_BYTES)).bench_local(|| {
        let status = Command::new("veritysetup")
            .arg("format")
            .args([data.path(), tree.path()])
            .arg(format!("--data-blocks={}", IMAGE_BYTES / BLOCK as u64))
            .arg(format!("--salt={}", mosfs::internals::digest::hex(&sealed.superblock.salt)))
            .stdout(Stdio::null())
            .status();
        assert!(status.expect("install the Debian package cryptsetup-bin").success());
    });
}

/// Random reads of so many bytes, each checked.
#[divan::bench(args = [4096, 65536, 131_072], sample_count = 50)]
fn read_verified(bencher: Bencher, len: usize) {
    random_reads(bencher, &verified(), len);
}

/// The same reads, not checked.
#[divan::bench(args = [4096, 65536, 131_072], sample_count = 50)]
fn read_plain(bencher: Bencher, len: usize) {
    random_reads(bencher, &plain(), len);
}

fn random_reads(bencher: Bencher, source: &impl Source, len: usize) {
    let (mut scratch, mut x) = (Vec::new(), 0x9e37_79b9_7f4a_7c15_u64);
    bencher.counter(BytesCount::new(256 * len)).bench_local(|| {
        for _ in 0..256 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let offset = x % (IMAGE_BYTES - len as u64);
            black_box(source.read(offset, len, &mut scratch).unwrap());
        }
    });
}

/// Everything, once, on so many threads.
#[divan::bench(args = [1, 2], sample_count = 15)]
fn verify_all(bencher: Bencher, threads: usize) {
    let source = verified();
    bencher.counter(BytesCount::new(IMAGE_BYTES)).bench_local(|| {
        assert!(source.verify_all(NonZeroUsize::new(threads).unwrap(), &Progress::silent()).is_good());
    });
}
