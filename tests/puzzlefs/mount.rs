//! Mounts of PuzzleFS images through FUSE, and what a flipped bit does to one.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use mosfs::internals::digest::Digest;
use mosfs::internals::image::layer::Layer;
use mosfs::internals::image::puzzlefs::{FILEDATA, Puzzlefs, ROOTFS};
use mosfs::internals::image::{FileType, NodeId};

use crate::dump::content;
use mosfs::internals::image::oci::MAX_MANIFEST_BYTES;

use crate::images::{IMAGES, expected, image, layer, open, unpack};
use crate::layout::{OurMount, open_rw, run_mosfs};
use crate::message::{Ptr, dir, encode, file, inode, large, large_manifest, one, rootfs, with_xattr};
use crate::scan::{Node, Tree, scan, show};
use crate::tools::need_root;

/// The lines of an expected tree that a mount can show: the merged view hides devices 0:0 and the overlay's own
/// attributes.
fn visible(text: &str) -> Vec<String> {
    let lines = text.lines().filter(|line| !line.contains(" char ") || !line.contains(" 0:0 "));
    lines.map(|line| line.replace("trusted.overlay.opaque=79", "-")).collect()
}

fn escaped(bytes: &[u8]) -> String {
    let each = bytes.iter().map(|byte| match byte {
        33..127 if *byte != b'\\' => char::from(*byte).to_string(),
        _ => format!("\\{byte:03o}"),
    });
    let text: String = each.collect();
    if text.is_empty() { "-".into() } else { text }
}

/// A mounted tree as the expected trees are written.
fn lines(tree: &Tree) -> Vec<String> {
    let mut lines: Vec<(Vec<Vec<u8>>, String)> = tree
        .iter()
        .map(|(path, node)| {
            let parts = path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect();
            (parts, line(path, node))
        })
        .collect();
    lines.sort();
    lines.into_iter().map(|(_, line)| line).collect()
}

fn line(path: &[u8], node: &Node) -> String {
    let kind = match node.kind {
        'd' => "dir",
        '-' => "file",
        'l' => "link",
        'b' => "block",
        'c' => "char",
        'p' => "fifo",
        _ => "sock",
    };
    let size = if node.kind == 'd' { "-".into() } else { node.size.to_string() };
    let device = match node.kind {
        'b' | 'c' => format!("{}:{}", libc::major(node.rdev), libc::minor(node.rdev)),
        _ => "-".into(),
    };
    let hex = |bytes: &[u8]| mosfs::internals::digest::hex(bytes);
    let xattrs: Vec<_> = node.xattrs.iter().map(|(k, v)| format!("{}={}", escaped(k), hex(v))).collect();
    let xattrs = if xattrs.is_empty() { "-".into() } else { xattrs.join(",") };
    let content = match (&node.content, &node.target) {
        (Some(Ok(digest)), _) => digest.to_string(),
        (Some(Err(number)), _) => format!("error {number}"),
        (None, Some(target)) => format!("-> {}", escaped(target)),
        (None, None) => "-".into(),
    };
    let same = if node.same_as == path {
        String::new()
    } else {
        format!(" same-inode-as=/{}", escaped(&node.same_as))
    };
    let Node { mode, uid, gid, nlink, mtime, .. } = node;
    let path = if path.is_empty() { "/".to_string() } else { format!("/{}", escaped(path)) };
    format!(
        "{path} {kind} {mode:04o} {uid} {gid} {size} {device} nlink={nlink} mtime={mtime} {xattrs} {content}{same}"
    )
}

#[test]
fn the_images_of_the_tool_mount_as_they_were_meant() {
    need_root();
    for (layout, name, tree) in IMAGES {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("oci");
        unpack(layout, &dir);
        let mount = OurMount::new(&format!("oci:{}:{name}", dir.display()), &folder.path().join("m"), &[]);
        let (found, expected) = (lines(&scan(&mount.at)), visible(&expected(tree)));
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found, expected, "{layout}:{name}");
        }
        assert_eq!(found.len(), expected.len(), "{layout}:{name}");
        // And the whole layout verifies.
        let verified = run_mosfs(&["verify", &format!("oci:{}:{name}", dir.display())]);
        assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    }
}

/// `mosfs` with these words fails with this code and says this.
#[track_caller]
fn refused(args: &[&OsStr], code: i32, words: &str) {
    let output = run_mosfs(args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    assert!(said.contains(words), "{said}\ndoes not say: {words}");
}

#[test]
fn what_a_puzzlefs_image_cannot_do_is_refused_by_name() {
    need_root();
    let folder = tempfile::tempdir().unwrap();
    let (dir, at) = (folder.path().join("oci"), folder.path().join("m"));
    unpack("socket-raw", &dir);
    fs::create_dir(&at).unwrap();
    let source = format!("oci:{}:socket", dir.display());
    let mount = |more: &[&str], code, words: &str| {
        let mut args: Vec<&OsStr> = vec!["mount".as_ref()];
        args.extend(more.iter().map(OsStr::new));
        args.extend([OsStr::new(&source), at.as_os_str()]);
        refused(&args, code, words);
    };
    mount(&["--backend", "dm-verity"], 1, "is made of chunks, which the kernel cannot mount");
    let hash = "0".repeat(64);
    mount(&["--root-hash", &hash], 3, "is made of chunks, each verified by its own digest");
}

/// Content of every regular file by its path.
/// What opening refuses, each command refuses that opens an image: it names the layer and the reason, and exits with the
/// code for that. `refused.rs` has every reason.
#[test]
fn a_malformed_image_is_refused_by_each_command() {
    need_root();
    let folder = tempfile::tempdir().unwrap();
    let layout = crate::layout::Layout::new(&folder.path().join("oci"));
    let at = folder.path().join("m");
    fs::create_dir(&at).unwrap();
    let unlisted = Digest::of(b"not listed");
    let used = file(2, &[(unlisted.as_bytes(), 0, 1, false)]);
    let device = inode(2, 2, Ptr::Struct(vec![4096, 0], vec![]), Ptr::Null);
    let with = |second| one(vec![dir(1, &[(b"x", 2)]), second]);
    let below = inode(1, 3, Ptr::Struct(vec![1], vec![Ptr::Null]), Ptr::Null);
    for (metadata, offset, why) in [
        (vec![1, 2, 3], 0, "the table of segments is cut off".to_string()),
        (encode(&rootfs(2, vec![vec![dir(1, &[])]])), 16, "manifestVersion is 2, expected 3".to_string()),
        (one(vec![below]), 104, "a folder has lookBelow set, which nothing reads or writes".to_string()),
        (one(vec![dir(1, &[(b"a", 1)])]), 128, "folder 1 has two names, or is within itself".to_string()),
        (one(vec![dir(1, &[(b"..", 1)])]), 128, "the name `..` of a file is not a name".to_string()),
        (with(inode(2, 9, Ptr::Null, Ptr::Null)), 104, "an inode has tag 9, expected 1 to 8".to_string()),
        (
            with(device),
            104,
            "device number 4096:0, expected at most 4095:1048575, the kernel's bits".to_string(),
        ),
        (with(used), 200, format!("chunk {unlisted} is used, but the manifest does not list it")),
    ] {
        put(&layout, &metadata, &large_manifest(&metadata, 0, 0));
        let (source, layer) = (layout.source("image"), Digest::of(&metadata));
        let why = format!("corrupt puzzlefs metadata at {offset}: {why}");
        let output = run_mosfs(&["mount", "--backend", "fuse", &source, at.to_str().unwrap()]);
        let blob = layout.blob(&layer);
        let expected = format!("mosfs: layer {layer} ({}): {why}\n", blob.display());
        assert_eq!(String::from_utf8_lossy(&output.stderr), expected);
        assert_eq!(output.status.code(), Some(1), "{why}");
        let output = run_mosfs(&["verify", &source]);
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(said, format!("{source}: layer {layer}: {why}\n"));
        assert_eq!(output.status.code(), Some(3), "{why}");
    }
    let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounted.contains(at.to_str().unwrap()), "{mounted}");
}

/// Such metadata is read by a thread of its own while the manifest is: its files, and each flipped bit of it, are as those
/// of a small image.
#[test]
fn metadata_that_is_read_ahead_is_served_or_refused() {
    need_root();
    let folder = tempfile::tempdir().unwrap();
    let layout = crate::layout::Layout::new(&folder.path().join("oci"));
    let at = folder.path().join("m");
    let chunk = b"what is in the file";
    let digest = Digest::of(chunk);
    fs::write(layout.blob(&digest), chunk).unwrap();
    let part = (&digest.as_bytes()[..], 0, chunk.len() as u64, false);
    let mut metadata = one(vec![dir(1, &[(b"x", 2)]), file(2, &[part])]);
    metadata.resize(3 << 20, 0);
    let mut manifest: serde_json::Value = serde_json::from_slice(&large_manifest(&metadata, 0, 0)).unwrap();
    let listed =
        serde_json::json!({ "mediaType": FILEDATA, "digest": digest.to_string(), "size": chunk.len() });
    manifest["layers"].as_array_mut().unwrap().push(listed);
    put(&layout, &metadata, &serde_json::to_vec(&manifest).unwrap());
    let source = layout.source("image");
    for _ in 0..5 {
        let mount = OurMount::new(&source, &at, &[]);
        assert_eq!(fs::read(at.join("x")).unwrap(), chunk);
        drop(mount);
    }
    let layer = Digest::of(&metadata);
    let blob = layout.blob(&layer);
    for byte in [0, 100, metadata.len() / 2, metadata.len() - 1] {
        let mut wrong = metadata.clone();
        wrong[byte] ^= 1;
        fs::write(&blob, &wrong).unwrap();
        let output = run_mosfs(&["mount", "--backend", "fuse", &source, at.to_str().unwrap()]);
        let said = String::from_utf8_lossy(&output.stderr);
        let found = Digest::of(&wrong);
        assert!(said.contains(&layer.hex()) && said.contains(&found.hex()), "{said}");
        assert_eq!(output.status.code(), Some(3), "{said}");
    }
    let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounted.contains(at.to_str().unwrap()), "{mounted}");
}

fn contents(image: &Puzzlefs) -> BTreeMap<Vec<u8>, (NodeId, u64)> {
    let mut files = BTreeMap::new();
    let mut todo = vec![(image.root(), Vec::new())];
    while let Some((folder, path)) = todo.pop() {
        image
            .read_dir(folder, 0, &mut |entry| {
                let path = [&path[..], b"/", &entry.name].concat();
                match entry.kind {
                    FileType::Directory => todo.push((entry.node, path)),
                    FileType::Regular => {
                        files.insert(path, (entry.node, image.attr(entry.node).unwrap().size_bytes));
                    }
                    _ => {}
                }
                true
            })
            .unwrap();
    }
    files
}

/// Every blob of an image, with one bit flipped at many places of each: a file has its right content or cannot be
/// read, and never another. Every flip is seen by whoever reads all files.
#[test]
fn a_flipped_bit_is_never_served() {
    for (layout, name) in [("odd-zstd", "odd"), ("del-raw", "d1"), ("hard-raw", "h2")] {
        let folder = tempfile::tempdir().unwrap();
        unpack(layout, folder.path());
        let listed = image(folder.path(), name);
        let good = open(folder.path(), name);
        let files = contents(&good);
        let right: BTreeMap<_, _> =
            files.iter().map(|(path, (node, size))| (path, content(&good, *node, *size).unwrap())).collect();
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut seen = std::collections::BTreeSet::new();
        for blob in listed.manifest.layers.iter().filter(|blob| seen.insert(blob.digest)) {
            let path = folder.path().join("blobs/sha256").join(blob.digest.hex());
            let file = open_rw(&path);
            for round in 0..40 {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                let at = match round {
                    0 => 0,
                    1 => blob.size - 1,
                    _ => seed % blob.size,
                };
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ (1 << (seed >> 61))], at).unwrap();
                let mut wrong = 0;
                match Puzzlefs::open(&layer(folder.path(), &listed)) {
                    Err(error) => {
                        assert_eq!(blob.media_type, ROOTFS, "{error}");
                        assert!(error.to_string().starts_with("verity: "), "{error}");
                        wrong += 1;
                    }
                    Ok(image) => {
                        for (path, (node, size)) in &files {
                            match content(&image, *node, *size) {
                                Ok(content) => assert_eq!(&content, &right[path], "{}", show(path)),
                                Err(error) => {
                                    assert!(error.to_string().contains("(chunk) has hash"), "{error}");
                                    wrong += 1;
                                }
                            }
                        }
                    }
                }
                assert!(wrong > 0, "byte {at} of {} was flipped, and nobody saw it", blob.digest);
                file.write_all_at(&byte, at).unwrap();
            }
            assert_eq!(Digest::of(&fs::read(&path).unwrap()), blob.digest);
        }
        assert_eq!(contents(&good), files);
    }
}

/// The same through FUSE: EIO where the chunk is needed, the right bytes everywhere else, and an exit code 3 of
/// `mosfs verify`, which names the blob.
#[test]
fn a_flipped_bit_of_a_chunk_is_eio_for_the_files_in_it() {
    need_root();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("oci");
    unpack("odd-zstd", &dir);
    let good = {
        let mount = OurMount::new(&format!("oci:{}:odd", dir.display()), &folder.path().join("m"), &[]);
        scan(&mount.at)
    };
    let listed = image(&dir, "odd");
    let chunks: Vec<PathBuf> =
        listed.chunks.iter().map(|(digest, _)| dir.join("blobs/sha256").join(digest.hex())).collect();
    for chunk in chunks {
        let file = open_rw(&chunk);
        let middle = file.metadata().unwrap().len() / 2;
        let mut byte = [0];
        file.read_exact_at(&mut byte, middle).unwrap();
        file.write_all_at(&[byte[0] ^ 4], middle).unwrap();
        let mount = OurMount::new(&format!("oci:{}:odd", dir.display()), &folder.path().join("m"), &[]);
        let mut bad = 0;
        for (path, node) in good.iter().filter(|(_, node)| node.kind == '-') {
            let at = mount.at.join(Path::new(OsStr::from_bytes(path)));
            match fs::read(&at) {
                Ok(bytes) => assert_eq!(node.content, Some(Ok(Digest::of(&bytes))), "{}", show(path)),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{}", show(path));
                    bad += 1;
                }
            }
        }
        assert!(bad > 0, "{chunk:?} was flipped, and nobody saw it");
        drop(mount);
        let source = format!("oci:{}:odd", dir.display());
        let name = chunk.file_name().unwrap().to_str().unwrap().to_string();
        let said = run_mosfs(&["verify", &source]);
        assert_eq!(said.status.code(), Some(3));
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.contains(&name), "{said}");
        file.write_all_at(&byte, middle).unwrap();
    }
}

/// Puts an image of this metadata and this manifest into a layout.
fn put(layout: &crate::layout::Layout, metadata: &[u8], manifest: &[u8]) {
    for blob in [metadata, manifest, b"{}"] {
        fs::write(layout.blob(&Digest::of(blob)), blob).unwrap();
    }
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{}","size":{},"annotations":{{"org.opencontainers.image.ref.name":"image"}}}}]}}"#,
        Digest::of(manifest),
        manifest.len()
    );
    fs::write(layout.dir.join("index.json"), index).unwrap();
}

/// An ACL takes away what the mode of a file alone would give.
#[test]
fn acls_hold() {
    need_root();
    // linux/posix_acl_xattr.h: version 2, then tag, permissions and id: the owner reads, user 1001 and nobody else does not.
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, u32::MAX), (2, 0, 1001), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 4, u32::MAX)];
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        acl.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        acl.extend(id.to_le_bytes());
    }
    let file = |ino, name: &[u8]| {
        let (.., additional) = with_xattr(ino, name, &acl);
        inode(ino, 5, Ptr::List(vec![]), additional.into_iter().nth(1).unwrap())
    };
    let folder = tempfile::tempdir().unwrap();
    crate::layout::open_to_all(folder.path());
    // The kernel checks ACLs where any file has one of either kind, and requests that of access of each file.
    for (number, name, holds) in
        [(0, "system.posix_acl_access", true), (1, "system.posix_acl_default", false)]
    {
        let mut root = dir(1, &[(b"acl", 2), (b"other", 3)]);
        root.0[1] = 3 | 0o755 << 16;
        let metadata = one(vec![root, file(2, name.as_bytes()), file(3, b"user.other")]);
        let layout = crate::layout::Layout::new(&folder.path().join(format!("oci{number}")));
        put(&layout, &metadata, &large_manifest(&metadata, 0, 0));
        let mount = OurMount::new(&layout.source("image"), &folder.path().join("m"), &[]);
        let reads = |uid: u32, name: &str| {
            let mut command = std::process::Command::new("setpriv");
            command.args([&format!("--reuid={uid}"), &format!("--regid={uid}"), "--clear-groups", "cat"]);
            command.arg(mount.at.join(name)).output().unwrap().status.success()
        };
        assert!(reads(1001, "other") && reads(1002, "other") && reads(1002, "acl"), "{name}");
        assert_eq!(reads(1001, "acl"), !holds, "{name}");
    }
}

/// As many chunks as the largest manifest can list: the daemon needs less than 64 MiB, all of it, to open and serve it.
#[test]
fn the_largest_image_is_served_within_64_mib() {
    need_root();
    const CHUNKS: u64 = 26_000;
    let folder = tempfile::tempdir().unwrap();
    let layout = crate::layout::Layout::new(&folder.path().join("oci"));
    let metadata = large(CHUNKS);
    let manifest = large_manifest(&metadata, CHUNKS, 40_000);
    assert!(
        manifest.len() as u64 <= MAX_MANIFEST_BYTES && manifest.len() as u64 > MAX_MANIFEST_BYTES / 100 * 97
    );
    put(&layout, &metadata, &manifest);
    let mount = OurMount::new(&layout.source("image"), &folder.path().join("m"), &[]);
    let files: usize = fs::read_dir(&mount.at)
        .unwrap()
        .map(|entry| {
            fs::read_dir(entry.unwrap().path())
                .unwrap()
                .map(|entry| assert_eq!(entry.unwrap().metadata().unwrap().len(), 16_384))
                .count()
        })
        .sum();
    assert_eq!(files as u64, CHUNKS * 4);
    // There are no chunks: their files cannot be read, and the mount goes on.
    let error = fs::read(mount.at.join("file-00000000/file-00000000")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    let kib = memory_kib(&mount, "VmHWM:");
    assert!(kib < 64 << 10, "the daemon needed {kib} KiB");
}

/// Chunks of all sizes that there are, read by several at once: what the daemon holds stays below 12 MB.
#[test]
fn a_mount_takes_at_most_12_mb_of_memory() {
    need_root();
    const CHUNKS: u64 = 400;
    let folder = tempfile::tempdir().unwrap();
    let layout = crate::layout::Layout::new(&folder.path().join("oci"));
    let content = |number: u64| -> Vec<u8> {
        let len = 16_384 << (number * 7 % 5);
        (0..len as u64 / 8)
            .flat_map(|at| (at ^ number << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect()
    };
    let names: Vec<_> = (0..CHUNKS).map(|number| (format!("{number:03}"), number + 2)).collect();
    let names: Vec<_> = names.iter().map(|(name, ino)| (name.as_bytes(), *ino)).collect();
    let (mut inodes, mut layers) = (vec![dir(1, &names)], Vec::new());
    for number in 0..CHUNKS {
        let chunk = content(number);
        let (digest, size) = (Digest::of(&chunk), chunk.len() as u64);
        fs::write(layout.blob(&digest), chunk).unwrap();
        // Some chunks are shared, the others are of one file and longer than a read: both are cached.
        let name: &[u8] = digest.as_bytes();
        let whole = [(name, 0, size, false)];
        let halves = [(name, 0, size / 2, false), (name, size / 2, size / 2, false)];
        inodes.push(file(number + 2, if number % 2 == 0 { &halves[..] } else { &whole }));
        layers.push(serde_json::json!({ "mediaType": FILEDATA, "digest": digest.to_string(), "size": size }));
    }
    let metadata = one(inodes);
    let mut manifest: serde_json::Value = serde_json::from_slice(&large_manifest(&metadata, 0, 0)).unwrap();
    manifest["layers"].as_array_mut().unwrap().extend(layers);
    put(&layout, &metadata, &serde_json::to_vec(&manifest).unwrap());
    let mount = OurMount::new(&layout.source("image"), &folder.path().join("m"), &[]);
    std::thread::scope(|scope| {
        for first in 0..4 {
            let at = &mount.at;
            scope.spawn(move || {
                for number in (first..CHUNKS).step_by(4).chain(first..CHUNKS) {
                    assert!(fs::read(at.join(format!("{number:03}"))).unwrap() == content(number));
                }
            });
        }
    });
    let kib = memory_kib(&mount, "RssAnon:");
    assert!(kib <= 12_000_000 / 1024, "the daemon holds {kib} KiB");
}

/// A field of the daemon's memory in proc(5), in KiB.
fn memory_kib(mount: &OurMount, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", mount.pid())).unwrap();
    let value = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    value.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Chunks are opened when they are read, long after the daemon has left the folder that it was started in, and, at
/// boot, its root folder: it holds the folder of the blobs, not its name.
#[test]
fn a_layout_may_be_named_from_here_and_renamed_while_it_is_mounted() {
    need_root();
    let folder = tempfile::tempdir().unwrap();
    unpack("odd-zstd", &folder.path().join("oci"));
    let at = folder.path().join("m");
    fs::create_dir(&at).unwrap();
    let mut mount = crate::layout::mosfs();
    mount.current_dir(folder.path()).args(["mount", "--backend", "fuse", "oci:oci:odd", "m"]);
    assert!(mount.status().unwrap().success());
    let mount = OurMount { at: at.canonicalize().unwrap() };
    assert_eq!(fs::read(mount.at.join("hello.txt")).unwrap(), b"hello\n");
    fs::rename(folder.path().join("oci"), folder.path().join("moved")).unwrap();
    let good = visible(&expected("odd"));
    assert_eq!(lines(&scan(&mount.at)), good);
}
