//! The squashfs reader against images of the real tools, the kernel's reader and unsquashfs.

#[path = "common/squashfs.rs"]
mod common;

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use common::{Mounted, View, assert_same, feed, make_tree, mksquashfs, open, read, run, see, unsquashfs};
use mosfs::image::squashfs::{Compressor, Event};
use tempfile::TempDir;

/// The tree, made once for all tests.
fn tree() -> &'static Path {
    static TREE: OnceLock<TempDir> = OnceLock::new();
    // Static values are not dropped: the folder is below the one that cargo gives to tests.
    let folder = TREE.get_or_init(|| {
        let _ = fs::remove_dir_all(Path::new(env!("CARGO_TARGET_TMPDIR")).join("squashfs"));
        fs::create_dir_all(Path::new(env!("CARGO_TARGET_TMPDIR")).join("squashfs")).unwrap();
        let folder = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR")).join("squashfs")).unwrap();
        make_tree(&folder.path().join("tree"));
        folder
    });
    folder.path()
}

fn kernel_has(compressor: Compressor) -> bool {
    compressor != Compressor::Lzma
}

/// Compares an image with the kernel's view of it (where it has the compressor) and with what unsquashfs extracts.
fn compare(image: &Path, what: &str) {
    let folder = tempfile::tempdir().unwrap();
    let squashfs = open(image);
    if kernel_has(squashfs.superblock().compressor) {
        let mounted = Mounted::new(image, folder.path().join("mnt"));
        assert_same(
            &format!("{what}: kernel"),
            &read(&squashfs, View::Mounted),
            &see(&mounted.0, View::Mounted),
        );
    } else {
        let extracted = folder.path().join("extracted");
        unsquashfs(image, &extracted);
        assert_same(
            &format!("{what}: unsquashfs"),
            &read(&squashfs, View::Copied),
            &see(&extracted, View::Copied),
        );
    }
    let mut files = 0;
    let _ = squashfs.check_all(&mut |event| {
        match event {
            Event::Problem { path, error } => panic!("{what}: {}: {error}", String::from_utf8_lossy(path)),
            Event::Node { .. } => files += 1,
            Event::Content(_) => {}
        }
        std::ops::ControlFlow::Continue(())
    });
    assert!(files > 3100, "{what}: {files} files");
}

#[test]
fn zstd_default() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    mksquashfs(&tree().join("tree"), &image, "-comp zstd -b 128K");
    compare(&image, "zstd");
    mksquashfs(&tree().join("tree"), &image, "-comp gzip -b 4K");
    compare(&image, "gzip 4K");
}
