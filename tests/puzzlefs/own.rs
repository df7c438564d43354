//! Images that mosfs packs: the same chunks as the puzzlefs tool's, the same bytes for the same tree.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use mosfs::internals::convert::puzzlefs::{
    Limits, Packed, PuzzlefsError, compress::Compressor, fsverity, pack,
};
use mosfs::internals::error::{Class, Classified};
use mosfs::internals::image::format::{ChunkedLayer, Chunks};
use mosfs::internals::image::layer::Layer;
use mosfs::internals::image::oci::Descriptor;
use mosfs::internals::image::overlay::Merged;
use mosfs::internals::image::puzzlefs::{FILEDATA, Puzzlefs, ROOTFS, VERITY_ANNOTATION};
use mosfs::internals::progress::Progress;
use mosfs::internals::store::Store;

use crate::dump::dump;
use crate::images::{image, open, unpack};

fn pack_into(store: &Store, layer: Arc<dyn Layer>, threads: usize) -> Result<Packed, PuzzlefsError> {
    let view = Merged::new(vec![layer]).unwrap();
    let threads = NonZeroUsize::new(threads).unwrap();
    pack(&view, &store.writer().unwrap(), Limits::default(), threads, &Progress::silent())
}

fn reopen(store: &Store, packed: &Packed) -> Puzzlefs {
    let rootfs = &packed.layers[0];
    let chunks = Arc::new(chunks(&packed.layers));
    Puzzlefs::open(&ChunkedLayer { digest: rootfs.digest, size: rootfs.size, chunks, blobs: store.blobs() })
        .unwrap()
}

fn chunks(layers: &[Descriptor]) -> Chunks {
    let chunks = layers.iter().filter(|layer| layer.media_type.starts_with(FILEDATA));
    Chunks::new(chunks.map(|chunk| (chunk.digest, chunk.size)).collect()).unwrap()
}

/// Every path of the folder, with the time each file was last changed.
fn blob_times(store: &Path) -> BTreeMap<String, std::time::SystemTime> {
    std::fs::read_dir(store.join("blobs/sha256"))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().modified().unwrap())
        })
        .collect()
}

/// The puzzlefs tool packed this tree with `build -c`: the chunks are the same to the byte, and so is the tree.
#[test]
fn a_tree_gives_the_chunks_that_the_puzzlefs_tool_makes() {
    let folder = tempfile::tempdir().unwrap();
    for (layout, name) in [("odd-zstd", "odd"), ("del-raw", "d1"), ("socket-raw", "socket")] {
        let source = folder.path().join(layout);
        unpack(layout, &source);
        let store = Store::create(&folder.path().join(format!("{layout}-store"))).unwrap();
        let packed = pack_into(&store, Arc::new(open(&source, name)), 2).unwrap();
        if layout == "odd-zstd" {
            let (found, expected) = (chunks(&packed.layers), chunks(&image(&source, name).manifest.layers));
            assert_eq!(found, expected);
            assert_eq!(found.len(), 7);
        }
        // The view hides these: a device that says "nothing is here", and the overlay's own attribute.
        let expected: Vec<String> = dump(&open(&source, name))
            .lines()
            .filter(|line| !line.starts_with("/char-0-0 "))
            .map(|line| match line.strip_prefix("/opaque-dir dir ") {
                Some(_) => line.replace("trusted.overlay.opaque=79", "-"),
                None => line.to_string(),
            })
            .collect();
        let again = dump(&reopen(&store, &packed));
        assert_eq!(again.lines().collect::<Vec<_>>(), expected, "{layout}");
    }
}

#[test]
fn neither_threads_nor_an_earlier_build_change_an_image() {
    let folder = tempfile::tempdir().unwrap();
    unpack("odd-zstd", &folder.path().join("source"));
    let source = || Arc::new(open(&folder.path().join("source"), "odd"));
    let one = Store::create(&folder.path().join("one")).unwrap();
    let first = pack_into(&one, source(), 1).unwrap();
    let times = blob_times(one.dir());
    for threads in [1, 2, 7] {
        let other = Store::create(&folder.path().join(format!("{threads}"))).unwrap();
        assert_eq!(pack_into(&other, source(), threads).unwrap().layers, first.layers);
    }
    // Into the same store: nothing is written twice.
    assert_eq!(pack_into(&one, source(), 3).unwrap().layers, first.layers);
    assert_eq!(blob_times(one.dir()), times);
    // A blob that is not what its name says is replaced.
    let chunk = one.blob_path(&first.layers[1].digest);
    let good = std::fs::read(&chunk).unwrap();
    std::fs::remove_file(&chunk).unwrap();
    std::fs::write(&chunk, vec![0; good.len()]).unwrap();
    pack_into(&one, source(), 3).unwrap();
    assert_eq!(std::fs::read(&chunk).unwrap(), good);
}

#[test]
fn manifests_list_each_chunk_once_behind_the_metadata() {
    let folder = tempfile::tempdir().unwrap();
    unpack("odd-raw", &folder.path().join("source"));
    let store = Store::create(&folder.path().join("store")).unwrap();
    let packed = pack_into(&store, Arc::new(open(&folder.path().join("source"), "odd")), 2).unwrap();
    assert_eq!(packed.layers[0].media_type, ROOTFS);
    let digests: BTreeSet<_> = packed.layers.iter().map(|layer| layer.digest).collect();
    assert_eq!(digests.len(), packed.layers.len());
    for layer in &packed.layers {
        assert!(store.has(layer), "{}", layer.digest);
    }
    let metadata = store.get(&packed.layers[0].digest, 1 << 20).unwrap();
    assert_eq!(packed.layers[0].annotations[VERITY_ANNOTATION], fsverity::digest(&metadata).hex());
}

/// Digests of the kernel's, by way of the tool, which asks the kernel's own code: of its metadata blobs.
#[test]
fn fs_verity_digests_are_those_of_the_kernel() {
    for (layout, name) in [("odd-raw", "odd"), ("odd-zstd", "odd"), ("del-raw", "d2"), ("hard-raw", "h1")] {
        let folder = tempfile::tempdir().unwrap();
        unpack(layout, folder.path());
        let rootfs =
            image(folder.path(), name).manifest.layers.into_iter().find(|layer| layer.media_type == ROOTFS);
        let rootfs = rootfs.unwrap();
        let blob = std::fs::read(folder.path().join("blobs/sha256").join(rootfs.digest.hex())).unwrap();
        assert_eq!(fsverity::digest(&blob).hex(), rootfs.annotations[VERITY_ANNOTATION], "{layout}:{name}");
    }
    // `fsverity digest` (fsverity-utils 1.5) of no bytes, and of 600,000 that need two levels of hashes.
    let empty = "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95";
    assert_eq!(fsverity::digest(&[]).hex(), empty);
    let bytes: Vec<u8> = (0..600_000u32).map(|n| (n % 251) as u8).collect();
    assert_eq!(
        fsverity::digest(&bytes).hex(),
        "06d5be5c1f84f55006b5826aec720b80e5d95f30e170be7e1d6aae61755f1ae4"
    );
}

/// A chunk whose compressed form has more than 131,072 bytes is stored as it is, though compression saves some: a
/// reader in use fails beyond that.
#[test]
fn a_chunk_that_hardly_compresses_is_stored_as_it_is() {
    let mut compressor = Compressor::new().unwrap();
    let mut state = 39u64;
    let mut noise = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    let mut chunk = Vec::new();
    while chunk.len() < 262_144 {
        chunk.extend((0..3_996).map(|_| noise()));
        chunk.extend([0; 100]);
    }
    chunk.truncate(262_144);
    assert_eq!(compressor.compress(&chunk).unwrap(), None);
    let half = compressor.compress(&chunk[..131_072]).unwrap().expect("it is small enough");
    assert!(half.len() < 131_072 && half.len() > 120_000, "{}", half.len());
    assert_eq!(compressor.compress(&chunk[..3_000]).unwrap(), None, "and what does not compress at all");
}

/// The bound is the largest manifest; here it is a small one, which the same image exceeds.
#[test]
fn an_image_with_too_many_chunks_is_refused_before_all_of_it_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    unpack("odd-raw", &folder.path().join("source"));
    let view = Merged::new(vec![Arc::new(open(&folder.path().join("source"), "odd"))]).unwrap();
    let store = Store::create(&folder.path().join("store")).unwrap();
    let limits = |max_manifest_bytes| Limits { max_manifest_bytes, ..Limits::default() };
    let packed = |limits| {
        let threads = NonZeroUsize::new(2).unwrap();
        pack(&view, &store.writer().unwrap(), limits, threads, &Progress::silent())
    };
    let error = packed(limits((64 << 10) + 3 * 156)).unwrap_err();
    assert!(matches!(error, PuzzlefsError::TooLarge { chunks: 4, .. }), "{error}");
    assert_eq!(
        error.to_string(),
        "the image has too many chunks for one manifest: 4 or more need over 66004 bytes, \
         which is the largest manifest (about 26,000 chunks, 1.7 GB of files)"
    );
    assert_eq!(error.class(), Class::Input);
    assert!(blob_times(store.dir()).len() < 7);
    assert!(packed(limits((64 << 10) + 7 * 156)).is_ok());
    let error = packed(Limits { max_files: 100, ..Limits::default() }).unwrap_err();
    assert!(matches!(error, PuzzlefsError::TooMuch { max: 100 }), "{error}");
}
