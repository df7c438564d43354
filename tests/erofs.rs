//! The erofs reader against images of the real tool and the kernel's reader.

#[path = "common/squashfs.rs"]
#[allow(dead_code)]
mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use common::{Mounted, View, args, assert_same, bytes, make_tree, read, run, see};
use mosfs::image::MemorySource;
use mosfs::image::erofs::Erofs;

/// A tree with one of everything, made once for all tests.
fn tree() -> &'static Path {
    static TREE: OnceLock<PathBuf> = OnceLock::new();
    TREE.get_or_init(|| {
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("erofs");
        let _ = fs::remove_dir_all(&place);
        fs::create_dir_all(&place).unwrap();
        let tree = place.join("tree");
        make_tree(&tree, 700);
        more(&tree);
        tree
    })
}

/// What squashfs cannot hold, or does not care for: ACLs, ends of files of all lengths, long extents.
fn more(tree: &Path) {
    let acl = |words: &str, path: PathBuf| run("acl", "setfacl", &args(words, &[&path]));
    acl("-m u:1234:rw-,g:99:---", tree.join("size-1"));
    acl("-d -m u:1234:rwx", tree.join("empty"));
    // mkfs.erofs 1.5 cuts names of 255 bytes to 254, and does not find the file.
    fs::remove_file(tree.join("names").join("n".repeat(255))).unwrap();
    let ends = tree.join("ends");
    fs::create_dir(&ends).unwrap();
    for number in 0..80 {
        let len = 100 + number * 331;
        fs::write(ends.join(format!("{number}")), bytes(number as u64, len)).unwrap();
    }
    // A long extent, then one that does not compress, then the same again.
    let mut mixed = vec![b'x'; 700_000];
    mixed.extend(fs::read(tree.join("noise")).unwrap());
    mixed.extend(bytes(3, 300_000));
    mixed.extend_from_within(..900_000);
    fs::write(tree.join("mixed"), mixed).unwrap();
}

fn mkfs(tree: &Path, image: &Path, options: &str) {
    let _ = fs::remove_file(image);
    run("erofs-utils", "mkfs.erofs", &args(&format!("--quiet {options}"), &[image, tree]));
}

fn open(image: &Path) -> Erofs {
    Erofs::open(Arc::new(MemorySource(fs::read(image).unwrap())))
        .unwrap_or_else(|error| panic!("{}: {error}", image.display()))
}

/// Compares an image with the kernel's view of it.
fn compare(image: &Path, what: &str) {
    let folder = tempfile::tempdir().unwrap();
    let ours = read(&open(image));
    let mounted = Mounted::of("erofs", image, folder.path().join("mnt"));
    assert_same(what, &ours, &see(&mounted.0, View::Mounted));
}

fn matrix(compressors: &[&str], options: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    for compressor in compressors {
        for more in options {
            let image = folder.path().join("image");
            let options = format!("{compressor} {more}");
            mkfs(tree(), &image, &options);
            compare(&image, &options);
        }
    }
}

#[test]
fn without_compression() {
    matrix(
        &[""],
        &[
            "",
            "-Enoinline_data",
            "-Eforce-inode-extended",
            "-Eforce-inode-compact --all-root --ignore-mtime",
            "-x-1",
            "-x1",
            "-x100",
            "--chunksize=4096",
            "--chunksize=65536 -Eforce-chunk-indexes",
            "--chunksize=1048576 -Eforce-inode-blockmap",
            "-T1234567890 -x3",
        ],
    );
}

#[test]
fn lz4() {
    matrix(
        &["-zlz4", "-zlz4hc,12"],
        &[
            "",
            "-C16384",
            "-C65536",
            "-C1048576",
            "-Elegacy-compress",
            "-Elegacy-compress -Eforce-inode-extended",
            "-Eztailpacking",
            "-Eztailpacking -C65536",
            "--max-extent-bytes=16384",
        ],
    );
}

#[test]
fn newer() {
    let Some(root) = std::env::var_os("MOSFS_EROFS_CHROOT").map(PathBuf::from) else { return };
    let tool = std::env::var("MOSFS_EROFS_TOOL").unwrap();
    let there = root.join("tree");
    if !there.exists() {
        make_tree(&there, 60);
        more(&there);
        for name in ["long", "hole-long", "hole-start", "hole-end", "mixed", "size-2097157", "size-1048576", "hole-only"] {
            fs::remove_file(there.join(name)).unwrap();
        }
    }
    let mut options: Vec<String> = Vec::new();
    for more in ["-b512", "-b1024 -Eforce-inode-extended", "-b2048 --chunksize=2048", "-Exattr-name-filter", "--xattr-prefix=user.long. --xattr-prefix=trusted.on.", "-Enosbcrc", "--chunksize=4096", "-T77 --mkfs-time"] {
        options.push(more.into());
    }
    for z in ["-zlz4hc", "-zlzma,level=3", "-zdeflate", "-zlibdeflate,level=9", "-zzstd", "-zlz4:zstd:lzma:deflate --compress-hints=/hints"] {
        for c in ["", "-C65536"] {
            for e in ["", "-Eztailpacking", "-Efragments", "-Eall-fragments", "-Ededupe", "-Ededupe,fragments -x1 --xattr-prefix=user.", "-Elegacy-compress", "-Eforce-inode-extended,ztailpacking,legacy-compress", "-Ededupe,ztailpacking"] {
                // With several algorithms mkfs.erofs 1.8.6 makes images that no reader can read.
                if z.contains("hints") && e.contains("dedupe") { continue; }
                options.push(format!("{z} {c} {e}"));
            }
        }
        options.push(format!("{z} -b1024 -C8192 -Eztailpacking"));
        options.push(format!("{z} -b512 -Ededupe"));
    }
    if tool.ends_with("1.9") {
        for z in ["", "-zlz4hc", "-zzstd", "-zlzma,level=3", "-zdeflate"] {
            for c in ["-C4096", "-C65536"] {
                for e in ["-E48bit", "-E48bit,dot-omitted", "-E48bit,fragments", "-E48bit,dedupe", "-E48bit,ztailpacking", "--MZ", "--MZ=lz4hc -E48bit,fragments -x1 --xattr-prefix=user.", "--MZ=zstd -Eztailpacking,plain-xattr-prefixes --xattr-prefix=user.", "--zD -Edot-omitted"] {
                    options.push(format!("{z} {c} {e}"));
                }
            }
        }
    }
    fs::write(root.join("hints"), "16384 1 ^size-\n4096 2 ^many\n65536 3 ^hole\n").unwrap();
    let mut bad = Vec::new();
    for options in options {
        let image = root.join("image");
        let _ = fs::remove_file(&image);
        let words = format!("{} {tool} --quiet {options} /image /tree", root.display());
        let output = std::process::Command::new("chroot").args(args(&words, &[])).output().unwrap();
        if !output.status.success() {
            println!("MKFS {options}: {}", String::from_utf8_lossy(&output.stderr));
            continue;
        }
        if let Err(error) = std::panic::catch_unwind(|| compare(&image, &options)) {
            let text = error.downcast_ref::<String>().cloned().unwrap_or_default();
            println!("BAD {options}: {}", &text[..text.len().min(1500)]);
            bad.push(options);
        } else { println!("ok {options}"); }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}
