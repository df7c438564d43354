//! How fast a store takes a blob in: read, hashed, written, synced and renamed.
//!
//! `cargo bench --bench ingest`; beside it, what hashing alone and `cp` alone take.

use std::fs;
use std::path::Path;
use std::process::Command;

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use mosfs::internals::digest::Digest;
use mosfs::internals::image::oci::Descriptor;
use mosfs::internals::progress::Progress;
use mosfs::internals::store::Store;
use tempfile::TempDir;

fn main() {
    divan::main();
}

/// Size of the blob, in bytes.
const BYTES: usize = 64 << 20;

/// Bytes that do not repeat: xorshift64 (Marsaglia).
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..BYTES / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect()
}

/// A layout that holds the blob, and the blob's descriptor.
fn source(dir: &Path) -> (Store, Descriptor) {
    let store = Store::create(dir).expect("a store");
    let blob = store.writer().and_then(|writer| writer.put_bytes("application/octet-stream", &noise()));
    (store, blob.expect("a blob"))
}

#[divan::bench(sample_count = 10)]
fn store(bencher: Bencher) {
    let dir = TempDir::new().expect("a folder");
    let (from, blob) = source(&dir.path().join("from"));
    bencher
        .counter(BytesCount::new(BYTES))
        .with_inputs(|| TempDir::new_in(dir.path()).expect("a folder"))
        .bench_local_values(|to| {
            let store = Store::create(&to.path().join("store")).expect("a store");
            let task = Progress::silent().task("fetch", "blob", None);
            let writer = store.writer().expect("a writer");
            assert!(writer.fetch(from.transport(), &blob, &task).expect("the blob"));
            to
        });
}

#[divan::bench(sample_count = 10)]
fn copy(bencher: Bencher) {
    let dir = TempDir::new().expect("a folder");
    let (from, blob) = source(&dir.path().join("from"));
    let path = from.blob_path(&blob.digest);
    bencher.counter(BytesCount::new(BYTES)).bench_local(|| {
        let to = dir.path().join("copy");
        let done = Command::new("cp").args([&path, &to]).status().expect("cp runs");
        assert!(done.success());
        fs::File::open(&to).and_then(|file| file.sync_all()).expect("a sync");
        fs::remove_file(&to).expect("removing");
    });
}

#[divan::bench(sample_count = 10)]
fn hash(bencher: Bencher) {
    let bytes = noise();
    bencher.counter(BytesCount::new(BYTES)).bench_local(|| Digest::of(black_box(&bytes)));
}
