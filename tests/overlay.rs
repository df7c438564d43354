//! The merged view of layers: its rules one by one, and random stacks against the kernel's overlayfs.

#[path = "common/memory.rs"]
mod memory;
#[path = "common/whole/scan.rs"]
mod scan;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use memory::MemoryLayer;
use mosfs::internals::digest::Hasher;
use mosfs::internals::image::layer::{FileType, Layer};
use mosfs::internals::image::overlay::{MAX_LAYERS, Merged, OverlayError, ROOT};
use mosfs::internals::mount::engine::Engine;
use scan::{Node, Tree, assert_same, scan};

fn view(layers: Vec<MemoryLayer>) -> Merged {
    Merged::new(layers.into_iter().map(|layer| Arc::new(layer) as Arc<dyn Layer>).collect()).unwrap()
}

/// The inode number at a path.
fn find(view: &Merged, path: &str) -> Option<u64> {
    path.split('/').filter(|name| !name.is_empty()).try_fold(ROOT, |ino, name| {
        let found = view.lookup(ino, name.as_bytes()).unwrap().map(|(ino, _)| ino);
        if let Some(ino) = found {
            assert!(view.attr(ino).is_ok());
        }
        found
    })
}

/// The names in the folder at a path.
fn names(view: &Merged, path: &str) -> Vec<String> {
    let mut all = Vec::new();
    let ino = find(view, path).unwrap();
    view.read_dir(ino, 0, &mut |entry| {
        let (found, attr) = view.lookup(ino, &entry.name).unwrap().expect("listed and not found");
        assert_eq!((found, attr.kind), (entry.ino, entry.kind));
        all.push(String::from_utf8(entry.name).unwrap());
        true
    })
    .unwrap();
    all
}

fn content(view: Merged, path: &str) -> Vec<u8> {
    let ino = find(&view, path).unwrap();
    let engine = Engine::new(view, vec![], 0);
    let mut bytes = Vec::new();
    engine.read(ino, 0, 1 << 20, &mut |part| bytes.extend_from_slice(part)).unwrap();
    bytes
}

#[test]
fn a_view_takes_1_to_1000_layers() {
    assert!(matches!(Merged::new(vec![]), Err(OverlayError::LayerCount(0))));
    let many = |count| (0..count).map(|_| Arc::new(MemoryLayer::default()) as Arc<dyn Layer>).collect();
    assert!(matches!(Merged::new(many(MAX_LAYERS + 1)), Err(OverlayError::LayerCount(1001))));
    let layers = (0..MAX_LAYERS).map(|n| MemoryLayer::default().file(&format!("d/{n:04}"), "x")).collect();
    let view = view(layers);
    assert_eq!(names(&view, "d").len(), MAX_LAYERS);
    assert_eq!(names(&view, "d")[999], "0999");
}

#[test]
fn whiteouts_hide_and_are_hidden() {
    let bottom = MemoryLayer::default().file("a/x", "1").file("a/y", "1").dir("a/d/e").whiteout("a/odd");
    let top = MemoryLayer::default().whiteout("a/x").whiteout("a/d").whiteout("a/none").whiteout("only/w");
    let view = view(vec![bottom, top]);
    assert_eq!(names(&view, "a"), ["y"]);
    assert_eq!(find(&view, "a/x"), None);
    assert_eq!(find(&view, "a/d"), None);
    assert_eq!(find(&view, "a/odd"), None, "also in the bottom layer");
    assert_eq!(names(&view, "only"), [""; 0], "also in a folder that one layer has alone");
    assert_eq!(find(&view, "only/w"), None);
}

#[test]
fn a_real_device_is_no_whiteout() {
    let mut layer = MemoryLayer::default();
    layer.at("null", FileType::CharDevice).attr.rdev = 0x103;
    let view = view(vec![MemoryLayer::default().file("null", ""), layer]);
    assert_eq!(names(&view, ""), ["null"]);
}

#[test]
fn opaque_folders_hide_what_is_below() {
    {
        let name = "trusted.overlay.opaque";
        let bottom = || MemoryLayer::default().file("a/b/old", "1");
        let top = |value| MemoryLayer::default().file("a/b/new", "2").xattr("a/b", name, value);
        assert_eq!(names(&view(vec![bottom(), top("y")]), "a/b"), ["new"]);
        assert_eq!(names(&view(vec![bottom(), top("n")]), "a/b"), ["new", "old"]);
        let merged = view(vec![bottom(), top("y")]);
        let found = find(&merged, "a/b").unwrap();
        assert_eq!(merged.xattrs(found).unwrap(), [], "the attribute is not shown");
    }
    let root = MemoryLayer::default().file("new", "").opaque("");
    assert_eq!(names(&view(vec![MemoryLayer::default().file("old", ""), root]), ""), ["new"]);
    // Opaque in the middle: the layer above still merges with it, the one below does not.
    let stack = vec![
        MemoryLayer::default().file("d/1", ""),
        MemoryLayer::default().file("d/2", "").opaque("d"),
        MemoryLayer::default().file("d/3", ""),
    ];
    assert_eq!(names(&view(stack), "d"), ["2", "3"]);
}

#[test]
fn delete_and_recreate_over_three_layers() {
    let stack = || {
        vec![
            MemoryLayer::default().file("d/old", "1").file("f", "1"),
            MemoryLayer::default().whiteout("d").whiteout("f"),
            MemoryLayer::default().file("d/new", "3").file("f", "3"),
        ]
    };
    let merged = view(stack());
    assert_eq!(names(&merged, "d"), ["new"]);
    assert_eq!(find(&merged, "d/old"), None);
    assert_eq!(content(view(stack()), "f"), b"3");
}

#[test]
fn a_file_replaces_a_folder_and_back() {
    let stack = || {
        vec![
            MemoryLayer::default().file("x/deep/old", "1"),
            MemoryLayer::default().file("x", "a file"),
            MemoryLayer::default().file("x/new", "3"),
        ]
    };
    assert_eq!(names(&view(stack()), "x"), ["new"]);
    let mut two = stack();
    two.truncate(2);
    assert_eq!(content(view(two), "x"), b"a file");
    let mut link = stack();
    link.push(MemoryLayer::default().link("x", "elsewhere"));
    let merged = view(link);
    let ino = find(&merged, "x").unwrap();
    assert_eq!(merged.read_link(ino).unwrap(), b"elsewhere");
}

#[test]
fn attributes_are_those_of_the_topmost_part() {
    let mut top = MemoryLayer::default().file("d/x", "").xattr("d", "user.k", "top");
    top.at("d", FileType::Directory).attr.permissions = 0o700;
    let bottom = MemoryLayer::default().file("d/y", "").xattr("d", "user.k", "bottom");
    let merged = view(vec![bottom, top]);
    let ino = find(&merged, "d").unwrap();
    assert_eq!(merged.attr(ino).unwrap().permissions, 0o700);
    assert_eq!(merged.xattrs(ino).unwrap(), [(b"user.k".to_vec(), b"top".to_vec())]);
    assert_eq!(merged.parent(ino), Some(ROOT));
}

#[test]
fn link_counts_are_those_of_the_view() {
    let bottom = MemoryLayer::default()
        .dir("d/a")
        .dir("d/b")
        .dir("d/c")
        .file("f1", "x")
        .hard_link("f2", "f1")
        .hard_link("d/a/f3", "f1")
        .hard_link("gone/deep/f4", "f1")
        .file("g1", "y")
        .hard_link("g2", "g1");
    let middle = MemoryLayer::default().whiteout("d/b").whiteout("gone").file("g2", "other").dir("d/n");
    let top = MemoryLayer::default().file("f2", "other").file("t1", "").hard_link("t2", "t1").dir("d/m");
    let merged = view(vec![bottom, middle, top]);
    let nlink = |path| merged.attr(find(&merged, path).unwrap()).unwrap().nlink;
    assert_eq!(nlink(""), 3, "the root has d");
    assert_eq!(nlink("d"), 6, "a, c, m, n");
    assert_eq!(nlink("f1"), 2, "f1 and d/a/f3; f2 is replaced, f4 is in a folder that is gone");
    assert_eq!(nlink("d/a/f3"), 2);
    assert_eq!(nlink("g1"), 1);
    assert_eq!(nlink("g2"), 1);
    assert_eq!(nlink("t1"), 2);
    assert_eq!(find(&merged, "f1"), find(&merged, "d/a/f3"), "hard links share their inode");
}

#[test]
fn inode_numbers_need_no_state() {
    let stack = || vec![MemoryLayer::default().file("d/x", "1"), MemoryLayer::default().file("d/y", "2")];
    let (one, two) = (view(stack()), view(stack()));
    let (x, y) = (find(&one, "d/x").unwrap(), find(&one, "d/y").unwrap());
    assert_eq!(two.attr(x).unwrap().size_bytes, 1, "a number from another view of the same layers");
    assert_ne!(x, y);
    assert_eq!(two.merged_folders(), 0);
    assert!(matches!(one.attr(0), Err(OverlayError::NoSuchInode(0))));
    assert!(matches!(one.attr(2 + (2 << 48)), Err(OverlayError::NoSuchInode(_))));
    assert!(matches!(one.attr(u64::MAX), Err(OverlayError::NoSuchInode(_))));
    assert!(one.attr(2 + 77).is_err());
}

#[test]
fn a_listing_goes_on_from_any_cookie() {
    let layer = |step: usize| {
        let each = |layer: MemoryLayer, n| layer.file(&format!("d/{n:05}"), "");
        (0..3000).step_by(step).fold(MemoryLayer::default(), each)
    };
    let whiteouts =
        (0..3000).step_by(7).fold(MemoryLayer::default(), |l, n| l.whiteout(&format!("d/{n:05}")));
    let expected: Vec<String> = (0..3000)
        .filter(|n| n % 5 == 0 || (n % 2 == 0 || n % 3 == 0) && n % 7 != 0)
        .map(|n| format!("{n:05}"))
        .collect();
    let merged = view(vec![layer(2), layer(3), whiteouts, layer(5)]);
    let dir = find(&merged, "d").unwrap();
    for batch in [1, 2, 31, 32, 33, 1000, 5000] {
        let (mut cookie, mut all) = (0, Vec::new());
        loop {
            let (mut taken, before) = (0, all.len());
            merged
                .read_dir(dir, cookie, &mut |entry| {
                    if taken == batch {
                        return false;
                    }
                    taken += 1;
                    cookie = entry.next;
                    all.push(String::from_utf8(entry.name).unwrap());
                    true
                })
                .unwrap();
            if all.len() == before {
                break;
            }
        }
        assert_eq!(all, expected, "in batches of {batch}");
    }
    // Far more cookies than are remembered, from the last to the first.
    for index in (0..expected.len()).rev().step_by(11) {
        let mut next = None;
        merged
            .read_dir(dir, index as u64, &mut |entry| {
                next = Some(entry.name);
                false
            })
            .unwrap();
        assert_eq!(next.unwrap(), expected[index].as_bytes());
    }
}

#[test]
fn a_layer_with_a_loop_of_folders_is_no_loop_here() {
    let mut bottom = MemoryLayer::default().dir("a/b").file("f", "").hard_link("g", "f");
    let a = bottom.id("a");
    bottom.at("a/b", FileType::Directory).entries.insert(b"a".to_vec(), a);
    let merged = view(vec![bottom, MemoryLayer::default().whiteout("a").whiteout("g")]);
    let ino = find(&merged, "f").unwrap();
    let nlink = merged.attr(ino).unwrap().nlink;
    assert!((1..=2).contains(&nlink), "{nlink}");
}

#[test]
fn reads_cross_blocks_holes_and_tails() {
    let mut bytes: Vec<u8> = (0..1000u32).map(|n| (n % 251 + 1) as u8).collect();
    bytes[128..320].fill(0);
    let layer = MemoryLayer::default().file("f", &bytes).file("empty", "");
    let merged = view(vec![layer]);
    let (ino, empty) = (find(&merged, "f").unwrap(), find(&merged, "empty").unwrap());
    let engine = Engine::new(merged, vec!["layer".into()], 1 << 16);
    for offset in [0, 1, 63, 64, 65, 127, 128, 200, 319, 320, 900, 959, 960, 961, 999, 1000, 5000] {
        for len in [0, 1, 63, 64, 65, 128, 200, 1000, 100_000] {
            let mut calls = 0;
            let expected = &bytes[offset.min(1000)..(offset + len).min(1000).max(offset.min(1000))];
            let mut reply = |part: &[u8]| {
                calls += 1;
                assert_eq!(part, expected, "{len} bytes at {offset}");
            };
            engine.read(ino, offset as u64, len as u32, &mut reply).unwrap();
            assert_eq!(calls, 1);
        }
    }
    engine.read(empty, 0, 10, &mut |part| assert!(part.is_empty())).unwrap();
    assert_eq!(engine.seek(ino, 0, true).unwrap(), Some(0));
    assert_eq!(engine.seek(ino, 0, false).unwrap(), Some(128));
    assert_eq!(engine.seek(ino, 130, false).unwrap(), Some(130));
    assert_eq!(engine.seek(ino, 130, true).unwrap(), Some(320));
    assert_eq!(engine.seek(ino, 400, false).unwrap(), Some(1000), "the end is a hole");
    assert_eq!(engine.seek(ino, 1000, false).unwrap(), None);
    assert_eq!(engine.seek(ino, 1000, true).unwrap(), None);
}

#[test]
fn a_bad_block_fails_alone() {
    let mut layer = MemoryLayer::default().file("f", [7; 200]).file("g", [8; 200]);
    let f = layer.id("f");
    layer.bad = vec![f << 20 | 1];
    let merged = view(vec![layer]);
    let (f, g) = (find(&merged, "f").unwrap(), find(&merged, "g").unwrap());
    let engine = Engine::new(merged, vec!["layer sha256:11".into()], 1 << 16);
    let mut calls = 0;
    assert!(engine.read(f, 0, 200, &mut |_| calls += 1).is_err());
    assert!(engine.read(f, 70, 1, &mut |_| calls += 1).is_err());
    assert_eq!(calls, 0, "nothing of a read that fails is handed out");
    engine.read(f, 0, 64, &mut |part| assert_eq!(part, [7; 64])).unwrap();
    engine.read(g, 0, 200, &mut |part| assert_eq!(part, [8; 200])).unwrap();
    let counts = engine.troubles().counts();
    assert_eq!(counts.verity, 2);
    assert!(counts.last.unwrap().contains("layer sha256:11"));
}

/// A small generator of random numbers (xorshift64*), the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % below
    }
}

/// Runs a tool; one that is missing or fails ends the test.
fn run(package: &str, program: &str, args: &[&std::ffi::OsStr]) {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program}: {error}; install Debian's package {package}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?} failed: {said}");
}

/// Fills a folder with a random layer: names from a small set, so that layers meet.
fn make_layer(random: &mut Random, dir: &Path, depth: u32, bottom: bool) {
    for name in ["a", "b", "c", "d", "e", "\u{ff}\u{100}"] {
        let path = dir.join(name);
        match random.next(10) {
            0..=2 if depth < 4 => {
                fs::create_dir(&path).unwrap();
                make_layer(random, &path, depth + 1, bottom);
                if !bottom && random.next(4) == 0 {
                    set_xattr(&path, "trusted.overlay.opaque", "y");
                }
                if random.next(3) == 0 {
                    set_xattr(&path, "user.note", &format!("{}", random.next(100)));
                }
                fs::set_permissions(&path, PermissionsExt::from_mode(0o700 + random.next(64) as u32))
                    .unwrap();
            }
            3 | 4 => fs::write(&path, vec![random.next(256) as u8; random.next(9000) as usize]).unwrap(),
            5 => symlink(format!("to-{}", random.next(100)), &path).unwrap(),
            6 if !bottom => {
                run("coreutils", "mknod", &[path.as_os_str(), "c".as_ref(), "0".as_ref(), "0".as_ref()])
            }
            7 => {
                let (kind, numbers): (&str, &[&str]) =
                    [("p", &[] as &[&str]), ("b", &["7", "300"]), ("c", &["1", "3"])]
                        [random.next(3) as usize];
                let args: Vec<_> = [path.as_os_str(), kind.as_ref()]
                    .into_iter()
                    .chain(numbers.iter().map(|number| number.as_ref()))
                    .collect();
                run("coreutils", "mknod", &args);
            }
            // A hard link to a file beside or above it.
            8 => {
                let near = fs::read_dir(dir).unwrap().chain(fs::read_dir(dir.parent().unwrap()).unwrap());
                let mut files: Vec<PathBuf> = near
                    .map(|entry| entry.unwrap())
                    .filter(|entry| entry.file_type().unwrap().is_file())
                    .map(|entry| entry.path())
                    .collect();
                files.sort();
                if depth > 0
                    && let Some(file) = files.get(random.next(files.len().max(1) as u64) as usize)
                {
                    fs::hard_link(file, &path).unwrap();
                }
            }
            _ => continue,
        }
        if fs::symlink_metadata(&path).is_ok() && random.next(3) == 0 {
            lchown(&path, Some(random.next(3000) as u32), Some(random.next(3000) as u32)).unwrap();
        }
    }
}

fn set_xattr(path: &Path, name: &str, value: &str) {
    let args = ["-n", name, "-v", value].map(AsRef::<std::ffi::OsStr>::as_ref);
    run("attr", "setfattr", &[&args[..], &[path.as_os_str()]].concat());
}

/// A mount that is undone when it is dropped.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Scans a view without a mount.
fn scan_view(engine: &Engine) -> Tree {
    let view = engine.view();
    let mut all = BTreeMap::new();
    let mut first: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut todo = vec![(Vec::new(), ROOT)];
    while let Some((path, ino)) = todo.pop() {
        let attr = view.attr(ino).unwrap();
        if attr.kind == FileType::Directory {
            view.read_dir(ino, 0, &mut |entry| {
                let (found, attr) = view.lookup(ino, &entry.name).unwrap().expect("listed and not found");
                assert_eq!((found, attr.kind), (entry.ino, entry.kind));
                let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
                todo.push(([&path, slash, &entry.name].concat(), entry.ino));
                true
            })
            .unwrap();
        }
        let known = first.entry(ino).or_insert_with(|| path.clone());
        if path < *known {
            known.clone_from(&path);
        }
        let content = (attr.kind == FileType::Regular).then(|| {
            let mut hasher = Hasher::new();
            let mut offset = 0;
            while offset < attr.size_bytes {
                engine.read(ino, offset, 5000, &mut |part| hasher.update(part)).unwrap();
                offset += 5000;
            }
            Ok(hasher.finish())
        });
        let kind = match attr.kind {
            FileType::Directory => 'd',
            FileType::Regular => '-',
            FileType::Symlink => 'l',
            FileType::BlockDevice => 'b',
            FileType::CharDevice => 'c',
            FileType::Fifo => 'p',
            FileType::Socket => 's',
        };
        let node = Node {
            kind,
            mode: attr.permissions.into(),
            uid: attr.uid,
            gid: attr.gid,
            size: if kind == 'd' { 0 } else { attr.size_bytes },
            mtime: attr.mtime,
            rdev: if matches!(kind, 'b' | 'c') { attr.rdev.into() } else { 0 },
            nlink: attr.nlink.into(),
            xattrs: view.xattrs(ino).unwrap().into_iter().collect(),
            content,
            target: (kind == 'l').then(|| view.read_link(ino).unwrap()),
            same_as: Vec::new(),
        };
        all.insert(path, (ino, node));
    }
    all.into_iter().map(|(path, (ino, node))| (path, Node { same_as: first[&ino].clone(), ..node })).collect()
}

/// Random stacks of squashfs layers, against a copy of what the kernel's overlayfs shows of the same images.
///
/// The copy is made by cp, which keeps hard links: its link counts are what the image unpacks to.
#[test]
fn random_stacks_are_what_the_kernel_shows() {
    assert_eq!(
        mosfs::internals::sys::daemon::effective_ids().0,
        0,
        "this test mounts: run it as root (tests/as-root)"
    );
    for seed in 1..=12u64 {
        let random = &mut Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let folder = tempfile::tempdir().unwrap();
        let mut mounts = Vec::new();
        let mut layers: Vec<Arc<dyn Layer>> = Vec::new();
        let count = 2 + random.next(4);
        for index in 0..count {
            let dir = folder.path().join(format!("tree{index}"));
            fs::create_dir(&dir).unwrap();
            make_layer(random, &dir, 0, index == 0);
            let image = folder.path().join(format!("image{index}"));
            let options = "-quiet -no-progress -noappend -xattrs -comp gzip -b 4096";
            let args = [dir.as_os_str(), image.as_os_str()]
                .into_iter()
                .chain(options.split(' ').map(|o| o.as_ref()));
            run("squashfs-tools", "mksquashfs", &args.collect::<Vec<_>>());
            let source = Arc::new(mosfs::internals::image::MemorySource(fs::read(&image).unwrap()));
            layers.push(Arc::new(mosfs::internals::image::squashfs::Squashfs::open(source).unwrap()));
            let at = folder.path().join(format!("mount{index}"));
            fs::create_dir(&at).unwrap();
            let args = ["-t", "squashfs", "-o", "loop,ro"].map(AsRef::<std::ffi::OsStr>::as_ref);
            run("mount", "mount", &[&args[..], &[image.as_os_str(), at.as_os_str()]].concat());
            mounts.push(Mount(at));
        }
        let at = folder.path().join("merged");
        fs::create_dir(&at).unwrap();
        let lower: Vec<_> = mounts.iter().rev().map(|mount| mount.0.to_str().unwrap()).collect();
        let options = format!("lowerdir={},xino=off,index=off", lower.join(":"));
        let args = ["-t", "overlay", "overlay", "-o", &options].map(AsRef::<std::ffi::OsStr>::as_ref);
        run("mount", "mount", &[&args[..], &[at.as_os_str()]].concat());
        mounts.push(Mount(at.clone()));
        let copy = folder.path().join("copy");
        // The kernel lists the whiteouts of a folder that one layer has alone, and then has no such files.
        let output = Command::new("cp").env("LC_ALL", "C").arg("-a").args([&at, &copy]).output().unwrap();
        for line in String::from_utf8_lossy(&output.stderr).lines() {
            assert!(line.ends_with("No such file or directory") && line.contains("cannot stat"), "{line}");
        }
        mounts.reverse();
        drop(mounts);

        let engine = Engine::new(Merged::new(layers).unwrap(), vec![], 1 << 20);
        let what = format!("seed {seed}, {count} layers");
        assert_same(&scan(&copy), &scan_view(&engine), &what);
        assert_eq!(engine.troubles().total(), 0);
    }
}
