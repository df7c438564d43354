//! How fast PuzzleFS images are opened and read: the largest manifest, from memory, and the chunks of a real image.
//!
//! `cargo bench --bench puzzlefs`. The largest numbers are what the largest manifest (4 MiB, 26,000 chunks) takes to
//! open, in time and in memory; 50 ms and 64 MiB are the bounds that it is held to.

#[allow(dead_code)]
#[path = "../tests/puzzlefs/message.rs"]
mod message;

use std::sync::{Arc, OnceLock};

use divan::Bencher;
use divan::counter::BytesCount;
use mosfs::internals::digest::Digest;
use mosfs::internals::image::NodeId;
use mosfs::internals::image::layer::Layer;
use mosfs::internals::image::oci::OciImage;
use mosfs::internals::image::puzzlefs::Puzzlefs;

/// Chunks of the largest image.
const CHUNKS: u64 = 26_000;

#[global_allocator]
static ALLOCATIONS: divan::AllocProfiler = divan::AllocProfiler::system();

fn main() {
    divan::main();
}

fn large() -> &'static (Vec<u8>, Vec<u8>) {
    static LARGE: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
    LARGE.get_or_init(|| {
        let metadata = message::large(CHUNKS);
        let manifest = message::large_manifest(&metadata, CHUNKS, 40_000);
        (metadata, manifest)
    })
}

/// The manifest alone.
#[divan::bench(sample_count = 20, sample_size = 1)]
fn parse_the_largest_manifest() -> OciImage {
    OciImage::parse(&large().1).expect("a manifest")
}

/// The manifest, its digest, and all of the metadata.
#[divan::bench(sample_count = 20, sample_size = 1)]
fn open_the_largest_image(bencher: Bencher<'_, '_>) {
    let (metadata, manifest) = large();
    let blobs = Arc::new(message::Memory::default());
    let rootfs = blobs.put(metadata);
    bencher.bench_local(|| {
        assert_ne!(Digest::of(manifest), rootfs.0);
        let image = OciImage::parse(manifest).expect("a manifest");
        let mut layer = message::layer(blobs.clone(), rootfs, &[]);
        layer.chunks = Arc::clone(&image.chunks);
        drop(image);
        Puzzlefs::open(&layer).expect("an image")
    });
}

/// Metadata of 1,000 files of the largest image, by name.
#[divan::bench]
fn look_up_and_stat(bencher: Bencher<'_, '_>) {
    let (metadata, manifest) = large();
    let blobs = Arc::new(message::Memory::default());
    let rootfs = blobs.put(metadata);
    let mut layer = message::layer(blobs, rootfs, &[]);
    layer.chunks = OciImage::parse(manifest).expect("a manifest").chunks;
    let image = Puzzlefs::open(&layer).expect("an image");
    bencher.bench_local(|| {
        for folder in 0..10 {
            let folder = NodeId(2 + folder * 100);
            image
                .read_dir(folder, 0, &mut |entry| {
                    let found = image.lookup(folder, &entry.name).expect("a look-up").expect("a name");
                    image.attr(found.node).expect("a file");
                    true
                })
                .expect("a folder");
        }
    });
}

/// Decodes a chunk of 64 KiB that compresses to about a third, as mosfs stores it: digest checked each time.
#[divan::bench]
fn decode_a_chunk(bencher: Bencher<'_, '_>) {
    let mut text = String::new();
    for number in 0.. {
        text += &format!("line {number:x} of some text {:x}\n", number * 2_654_435_761u64 % 65_536);
        if text.len() >= 65_536 {
            break;
        }
    }
    text.truncate(65_536);
    let mut compressor = mosfs::internals::convert::puzzlefs::compress::Compressor::new().expect("zstd");
    let stored = compressor.compress(text.as_bytes()).expect("zstd").expect("it is smaller");
    let blobs = Arc::new(message::Memory::default());
    let chunk = blobs.put(&stored);
    let metadata = message::one(vec![
        message::dir(1, &[(b"x", 2)]),
        message::file(2, &[(chunk.0.as_bytes(), 0, 65_536, true)]),
    ]);
    let rootfs = blobs.put(&metadata);
    let image = Puzzlefs::open(&message::layer(blobs, rootfs, &[chunk])).expect("an image");
    let block = image.chunk(0).expect("a chunk");
    let mut out = Vec::new();
    bencher
        .counter(BytesCount::new(65_536u64))
        .bench_local(|| image.decode(block, &mut out).expect("a chunk"));
}
