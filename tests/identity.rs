//! What an image holds is what a mount shows: path by path, against `umoci unpack` of the same image.
//!
//! The images are made by umoci, and by hand where no tool writes such layers. What umoci itself does not keep is
//! listed in [`umoci_keeps_all_but`]; the reference is what it unpacks.

#[path = "common/whole/mod.rs"]
mod common;
#[path = "common/mkfs_erofs.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod mkfs_erofs;
#[path = "common/program.rs"]
mod program;

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::commands::{command, join, mosfs, need_root, output, run};
use common::layers::{Layer, layer};
use common::scan::{Scan, Tree, assert_same, scan, show, try_scan};
use common::system::{Mounted, PRODUCT, build, digest, image_name, import_manifest, keys, scratch, source};
use common::{debian, layers};
use mosfs::internals::store::Store;
use program::copy_program;
use tar::EntryType;

/// `oci:DIR:NAME` of a layout.
fn url(layout: &Path, name: &str) -> OsString {
    let mut url = OsString::from("oci:");
    url.push(join(layout, ":", name));
    url
}

/// The whole way, on a real root file system: every path is the same.
#[test]
fn a_debian_root_is_the_same_through_the_mount() {
    let image = debian::image();
    let dir = scratch();
    let keys = keys(dir.path());
    let (manifest, store) = (dir.path().join("import.yaml"), dir.path().join("store"));
    import_manifest(&manifest, &url(&image.layout, "debian"));
    let system = digest(&run(&mut build(&manifest, &store, &keys)));
    let expected = scan(&image.unpacked);

    // As a target of an installed system, by its name.
    let device = |mut command: Command| {
        command.arg("--system").arg(dir.path().join("system")).arg("--config").arg(dir.path().join("config"));
        command
    };
    let mut install = device(mosfs());
    install.arg("install").arg(join(Path::new("oci:"), "", &store.to_string_lossy()));
    install.arg("--ca").arg(keys.join("ca.pem")).args(["--product", PRODUCT]);
    run(&mut install);
    let status = run(device(mosfs()).args(["status", "--json"]));
    assert!(status.contains(&system.to_string()) || status.contains(&system.hex()), "{status}");
    let target = dir.path().join("target");
    fs::create_dir(&target).expect("mkdir");
    run(device(mosfs()).args(["mount", "--backend", "fuse", "hostfs"]).arg(&target));
    let mounted = Mounted::of(&target);
    assert_same(&expected, &scan(&target), "the target of the installed system");
    // A program of Debian's runs inside.
    let version =
        run(command("chroot").arg(&target).args(["/usr/bin/dpkg-query", "-W", "-f", "${Status}\n", "dpkg"]));
    assert_eq!(version.trim(), "install ok installed");
    mounted.unmount();

    // As an image of the store, and once more, now that the kernel and the daemon hold much of it.
    let mounted = Mounted::new(&source(&store, &image_name(&store)), &dir.path().join("mnt"));
    assert_same(&expected, &scan(mounted.dir()), "the mount");
    assert_same(&expected, &scan(mounted.dir()), "the mount, the second time");
    mounted.unmount();
    run(mosfs().arg("verify").arg(join(Path::new("oci:"), "", &store.to_string_lossy())));
}

/// The recipe makes what it says it makes, so that the comparison above is about something.
#[test]
fn the_debian_image_has_it_all() {
    let tree = scan(&debian::image().unpacked);
    let node = |path: &str| tree.get(path.as_bytes()).unwrap_or_else(|| panic!("there is no {path}"));
    let missing = |path: &str| assert!(!tree.contains_key(path.as_bytes()), "{path} should be deleted");

    has_whole_packages(&tree);
    assert_eq!(node("odd/links/three-c").nlink, 1, "see umoci_keeps_all_but");
    assert_eq!(node("odd/links/untouched").nlink, 3);
    assert_eq!(node("odd/links/many-0001").nlink, 498);
    assert_eq!(node("odd/links/changed").nlink, 2);
    assert_eq!(node("odd/links/symlink-b").kind, 'l');
    assert_eq!(node("odd/modes/f7777").mode, 0o7777);
    assert_eq!(node("odd/modes/f0000").mode, 0);
    assert_eq!(node("odd/owners/large").uid, 4_294_967_294);
    assert_eq!(node("odd/times/last").mtime, i64::from(u32::MAX));
    assert_eq!(node("odd/times/last.d").mtime, i64::from(u32::MAX));
    assert_eq!(node("odd/times/last.l").mtime, i64::from(u32::MAX));
    assert_eq!(node("odd/xattrs/file").xattrs.len(), 5);
    assert!(node("odd/xattrs/file").xattrs.contains_key(b"security.capability".as_slice()));
    assert_eq!(node("odd/xattrs/many").xattrs.len(), 70);
    assert_eq!(node("odd/sparse/end").size, 64 << 20);
    assert_eq!(node("odd/devices/large-minor").kind, 'b');
    assert_eq!(node("odd/names/to-far").size, 4095);
    for name in [b"odd/names/caf\xe9".to_vec(), [b"odd/names/".as_slice(), &[0xff; 255]].concat()] {
        assert!(tree.contains_key(&name), "there is no {}", show(&name));
    }
    assert_eq!(node("odd/again/two").size, 10, "of layer 3");
    for gone in [
        "odd/again/one",
        "odd/gone",
        "odd/emptied/two",
        "odd/opaque/one",
        "odd/opaque/sub/one",
        "usr/share/doc/bash",
    ] {
        missing(gone);
    }
    assert_eq!(node("odd/opaque/only").kind, '-');
    assert_eq!(node("odd/file-folder-file").kind, '-');
    assert_eq!(node("odd/folder-file-folder").kind, 'd');
    missing("odd/folder-file-folder/old");
    missing("odd/folder-file-folder/inner/old");
    assert_eq!(node("odd/kept/mode").mode, 0o4711);
    assert!(node("odd/kept/no-attribute").xattrs.is_empty());
}

/// A whole Debian lies under the odd files: all that dpkg says that these packages installed, but for what the
/// recipe deletes.
fn has_whole_packages(tree: &Tree) {
    for package in ["bash", "coreutils", "dpkg", "libc6", "perl-base", "util-linux"] {
        let list =
            [format!("var/lib/dpkg/info/{package}.list"), format!("var/lib/dpkg/info/{package}:amd64.list")];
        let list = list.iter().find(|path| tree.contains_key(path.as_bytes()));
        let list =
            debian::image().unpacked.join(list.unwrap_or_else(|| panic!("{package} is not installed")));
        let text = fs::read_to_string(list).expect("a list of dpkg");
        let paths: Vec<_> = text.lines().filter(|path| !path.starts_with("/usr/share/doc")).collect();
        assert!(paths.len() > 10, "{package}: {paths:?}");
        for path in paths.into_iter().filter_map(|path| path.strip_prefix('/')) {
            // dpkg lists /bin/bash; /bin leads to /usr/bin.
            let there = [path.to_string(), format!("usr/{path}")];
            assert!(
                path == "." || there.iter().any(|path| tree.contains_key(path.as_bytes())),
                "{package}: /{path}"
            );
        }
    }
}

/// What umoci 0.4.7 itself loses between the tree that it packs and the one that it unpacks:
/// - Times: Go's tar writer rounds to the nearest second, so those of half a second and more get the next one.
/// - Hard links: `repack` writes what changed, link count included. Layer 3 takes one name of a file away and
///   adds another, so the count is the same as before, and the new name becomes a file of its own.
/// - Sockets, and names of attributes with `=`, which make it fail: they are not in the image.
#[test]
fn umoci_keeps_all_but() {
    let image = debian::image();
    let list = fs::read_to_string(image.layout.with_file_name("lost")).expect("what umoci lost");
    let known = [
        "/odd/links/three-c: nlink: expected 2, found 1",
        "/odd/links/three-d: nlink: expected 2, found 1",
        "/odd/links/three-d: same file as: expected odd/links/three-c, found odd/links/three-d",
    ];
    for line in list.lines().filter(|line| !known.contains(line)) {
        let times = line.split_once(": mtime: expected ").and_then(|(_, rest)| rest.split_once(", found "));
        let (before, after) = times.unwrap_or_else(|| panic!("umoci lost more than is known: {line}"));
        let next = before.parse::<i64>().expect("a time") + 1;
        assert_eq!(after, next.to_string(), "{line}");
    }
}

/// Builds and mounts an image by hand, and scans both sides.
fn both_sides(layers: Vec<Layer>) -> (Tree, Tree) {
    need_root();
    let dir = scratch();
    let (layout, store) = (dir.path().join("layout"), dir.path().join("store"));
    layers::image(&layout, "odd", layers);
    let keys = keys(dir.path());
    let manifest = dir.path().join("import.yaml");
    import_manifest(&manifest, &url(&layout, "odd"));
    run(&mut build(&manifest, &store, &keys));
    let mounted = Mounted::new(&source(&store, &image_name(&store)), &dir.path().join("mnt"));
    let found = scan(mounted.dir());
    mounted.unmount();
    // The same layers as a PuzzleFS image show the same tree, but for times, which it has none of.
    let packed = as_puzzlefs(&manifest, &dir.path().join("puzzlefs"), &keys);
    assert_same(&without_times(&found), &packed, "the same layers as PuzzleFS");
    run(command("umoci")
        .args(["unpack", "--image"])
        .arg(join(&layout, ":", "odd"))
        .arg(dir.path().join("bundle")));
    (scan(&dir.path().join("bundle/rootfs")), found)
}

/// Builds the target of an import manifest as a PuzzleFS image, verifies and mounts it, and scans the mount.
fn as_puzzlefs(manifest: &Path, work: &Path, keys: &Path) -> Tree {
    fs::create_dir_all(work).expect("mkdir");
    let text = fs::read_to_string(manifest).expect("the import manifest");
    let (manifest, store) = (work.join("import.yaml"), work.join("store"));
    fs::write(&manifest, format!("{text}storage_type: puzzlefs\n")).expect("write the import manifest");
    run(&mut build(&manifest, &store, keys));
    run(mosfs().arg("verify").arg(join(Path::new("oci:"), "", &store.to_string_lossy())));
    let mounted = Mounted::new(&source(&store, &image_name(&store)), &work.join("mnt"));
    let tree = scan(mounted.dir());
    mounted.unmount();
    tree
}

/// What PuzzleFS shows of a tree: it has no times, and shows 1970 for all.
fn without_times(tree: &Tree) -> Tree {
    let mut tree = tree.clone();
    tree.values_mut().for_each(|node| node.mtime = 0);
    tree
}

/// All of a real root file system is in a PuzzleFS image, but for times.
#[test]
fn a_debian_root_is_the_same_in_puzzlefs() {
    let image = debian::image();
    let dir = scratch();
    let keys = keys(dir.path());
    let manifest = dir.path().join("import.yaml");
    import_manifest(&manifest, &url(&image.layout, "debian"));
    let found = as_puzzlefs(&manifest, &dir.path().join("puzzlefs"), &keys);
    assert_same(&without_times(&scan(&image.unpacked)), &found, "the PuzzleFS image");
}

/// All of a real root file system is in erofs layers.
#[test]
fn a_debian_root_is_the_same_in_erofs_layers() {
    let image = debian::image();
    let dir = scratch();
    let keys = keys(dir.path());
    let (manifest, store) = (dir.path().join("import.yaml"), dir.path().join("store"));
    import_manifest(&manifest, &url(&image.layout, "debian"));
    let mut build = build(&manifest, &store, &keys);
    build.env("PATH", mkfs_erofs::path_with(&mkfs_erofs::mkfs_erofs()));
    run(build.args(["--layer-format", "erofs", "--level", "3"]));
    let opened = Store::open(&store).expect("the store");
    let name = image_name(&store);
    let built = opened.image(&opened.resolve(&name).expect("a name").digest).expect("an image");
    assert!(built.layers.len() > 3, "one erofs layer for each layer of the source");
    assert!(built.layers.iter().all(|layer| layer.format().is_ok_and(|format| format.name() == "erofs")));
    run(mosfs().arg("verify").arg(join(Path::new("oci:"), "", &store.to_string_lossy())));
    let mounted = Mounted::new(&source(&store, &name), &dir.path().join("mnt"));
    assert_same(&scan(&image.unpacked), &scan(mounted.dir()), "the erofs layers");
    mounted.unmount();
}

/// Deletes, opaque folders and changes of type over three layers, in orders that tools do not use.
#[test]
fn layers_by_hand_are_the_same_as_umoci_unpacks_them() {
    let bottom = layer()
        .dir("./")
        .dir("gone")
        .file("gone/1", "1")
        .dir("again")
        .file("again/1", "1")
        .file("again/2", "2")
        .dir("again/inner")
        .file("again/inner/1", "1")
        .dir("opaque")
        .file("opaque/old", "old")
        .dir("opaque/sub")
        .file("opaque/sub/old", "old")
        .dir("late")
        .file("late/old", "old")
        .dir("twice")
        .file("twice/old", "old")
        .dir("deep")
        .dir("deep/er")
        .dir("deep/er/est")
        .file("deep/er/est/file", "bottom")
        .file("file-dir", "a file")
        .dir("dir-file")
        .file("dir-file/old", "old")
        .dir("dir-link")
        .file("dir-link/old", "old")
        .symlink("link-dir", "again")
        .file("back", "back 1")
        .dir("root-only")
        .file("h1", "linked")
        .hard("h2", "h1")
        .hard("deep/h3", "h1")
        .file("x1", "linked too")
        .hard("x2", "x1")
        .file("again/.dotfile", "dot");
    let middle = layer()
        .file(".wh.gone", "")
        .file(".wh.again", "")
        .file("opaque/.wh..wh..opq", "")
        .dir("opaque")
        .file("opaque/new", "new")
        // The opaque mark behind what it does not hide.
        .dir("late")
        .file("late/new", "new")
        .file("late/.wh..wh..opq", "")
        // Deleted and made again in one layer, in both orders.
        .file(".wh.back", "")
        .file("back", "back 2")
        .dir("twice")
        .file("twice/new", "new")
        .file(".wh.twice", "")
        .file("deep/er/est/.wh.file", "")
        .dir("file-dir")
        .file("file-dir/new", "new")
        .file("dir-file", "a file")
        .symlink("dir-link", "gone")
        .file(".wh.link-dir", "")
        // Nothing to hide.
        .file(".wh.never-there", "")
        .file(".wh.h1", "")
        .file(".wh.x1", "")
        .file(".wh.x2", "");
    let top = layer()
        .dir("again")
        .file("again/2", "2 of the top")
        .dir("again/inner")
        .file("again/inner/3", "3")
        .file("file-dir", "a file again")
        .dir("dir-file")
        .file("dir-file/newest", "newest")
        .dir("dir-link")
        .file("dir-link/newest", "newest")
        .dir("link-dir")
        .file("link-dir/newest", "newest")
        .dir("opaque/sub")
        .file("opaque/sub/newest", "newest")
        .dir("late/sub")
        // Below folders that this layer does not mention.
        .file("deep/er/est/file", "top")
        .file("x1", "another")
        .hard("x3", "x1")
        // The same name three times: the last one counts.
        .file("thrice", "one")
        .dir("thrice")
        .file("thrice", "three");
    let (mut expected, found) = both_sides(vec![bottom, middle, top]);
    // umoci applies the whiteout behind the folder to what is below, and leaves the folder with the time of now.
    expected.get_mut(b"twice".as_slice()).expect("a folder").mtime = found[b"twice".as_slice()].mtime;
    assert_eq!(found[b"twice".as_slice()].mtime, 1_500_000_011, "the layer's own time");
    for (path, there) in
        [("again/1", false), ("opaque/old", false), ("twice/new", true), ("deep/er/est/file", true)]
    {
        assert_eq!(expected.contains_key(path.as_bytes()), there, "{path}, as umoci unpacks it");
    }
    assert_same(&expected, &found, "the mount");
}

/// The names of a tar may be written in several ways.
#[test]
fn names_of_entries_are_cleaned_as_umoci_cleans_them() {
    let layers = vec![
        layer()
            .dir("./")
            .dir("./a")
            .file("./a/1", "1")
            .file("/absolute", "2")
            .dir("b/")
            .file("b//2", "3")
            .file("a/./3", "4"),
        layer().dir(".").file("./a/.wh.1", "").file("/.wh.absolute", ""),
    ];
    let (expected, found) = both_sides(layers);
    assert_same(&expected, &found, "the mount");
}

/// What an image may hold and squashfs under overlay rules cannot: the nearest is stored, and the build says so.
#[test]
fn what_cannot_be_stored_is_told() {
    need_root();
    let dir = scratch();
    let layout = dir.path().join("layout");
    let acl = [
        2, 0, 0, 0, 1, 0, 6, 0, 0xff, 0xff, 0xff, 0xff, 4, 0, 4, 0, 0xff, 0xff, 0xff, 0xff, 32, 0, 4, 0,
        0xff, 0xff, 0xff, 0xff,
    ];
    let bottom = layer()
        .dir("./")
        .file("hidden", "of the bottom")
        .pax(&[("mtime", b"-86400")])
        .file("before-1970", "")
        .pax(&[("mtime", b"5000000000")])
        .file("after-2106", "")
        .pax(&[("mtime", b"1000000000.999999999")])
        .file("fraction", "")
        .pax(&[("SCHILY.xattr.system.posix_acl_access", &acl), ("SCHILY.xattr.user.kept", b"yes")])
        .file("acl", "")
        .pax(&[("SCHILY.xattr.trusted.overlay.opaque", b"y"), ("SCHILY.xattr.user.overlay.whiteout", b"y")])
        .dir("overlay");
    // A device 0:0, which overlayfs takes for "nothing is here", at names of its own and of a file below.
    let top = layer().entry(b"hidden", EntryType::Char, 0o644, b"", b"").entry(
        b"null",
        EntryType::Char,
        0o644,
        b"",
        b"",
    );
    layers::image(&layout, "odd", vec![bottom, top]);
    let (manifest, store) = (dir.path().join("import.yaml"), dir.path().join("store"));
    import_manifest(&manifest, &url(&layout, "odd"));
    let built = output(&mut build(&manifest, &store, &keys(dir.path())));
    let notes = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{notes}");
    for about in [
        "before-1970",
        "after-2106",
        "acl",
        "trusted.overlay.opaque",
        "user.overlay.whiteout",
        "hidden",
        "null",
    ] {
        assert!(notes.contains(about), "nothing of {about} in:\n{notes}");
    }
    let mounted = Mounted::new(&source(&store, &image_name(&store)), &dir.path().join("mnt"));
    let tree = scan(mounted.dir());
    let node = |path: &str| &tree[path.as_bytes()];
    assert_eq!(node("before-1970").mtime, 0);
    assert_eq!(node("after-2106").mtime, i64::from(u32::MAX));
    assert_eq!(node("fraction").mtime, 1_000_000_000);
    assert_eq!(node("acl").xattrs.keys().collect::<Vec<_>>(), [b"user.kept"]);
    assert!(node("overlay").xattrs.is_empty());
    assert!(!tree.contains_key(b"hidden".as_slice()) && !tree.contains_key(b"null".as_slice()));
    mounted.unmount();
}

/// Layers that no honest tool writes, and what cannot be had at all: refused, with the entry's name.
#[test]
fn layers_that_cannot_be_are_refused() {
    need_root();
    let dir = scratch();
    let layout = dir.path().join("layout");
    let keys = keys(dir.path());
    let cases: Vec<(&str, &str, Vec<Layer>)> = vec![
        ("dotdot", "../out", vec![layer().file("../out", "x")]),
        ("dotdot-inside", "a/../../out", vec![layer().dir("a").file("a/../../out", "x")]),
        ("bare-whiteout", "a/.wh.", vec![layer().file("a/.wh.", "")]),
        ("dot-whiteout", "a/.wh...", vec![layer().file("a/.wh...", "")]),
        ("below-file", "a/b", vec![layer().file("a", "x").file("a/b", "y")]),
        ("link-to-folder", "b", vec![layer().dir("a").hard("b", "a")]),
        ("link-to-nothing", "b", vec![layer().hard("b", "nothing")]),
        ("link-to-below", "b", vec![layer().file("a", "x"), layer().hard("b", "a")]),
        ("link-to-itself", "b", vec![layer().hard("b", "b")]),
        ("links-in-a-ring", "b", vec![layer().hard("b", "c").hard("c", "b")]),
        ("continued", "s", vec![layer().entry(b"s", EntryType::new(b'M'), 0o644, b"", b"")]),
        ("links-in-a-loop", "l/x", vec![layer().symlink("l", "m").symlink("m", "l").file("l/x", "x")]),
        ("no-target", "l", vec![layer().symlink("l", "")]),
    ];
    for (name, entry, layers) in cases {
        layers::image(&layout, name, layers);
        let (manifest, store) = (dir.path().join("import.yaml"), dir.path().join("store"));
        import_manifest(&manifest, &url(&layout, name));
        let built = output(&mut build(&manifest, &store, &keys));
        let errors = String::from_utf8_lossy(&built.stderr);
        assert!(matches!(built.status.code(), Some(1..=3)), "{name}: {}: {errors}", built.status);
        assert!(errors.contains(&format!("`{entry}`")), "{name}: {errors}");
        let names = Store::open(&store).and_then(|store| store.names()).expect("list the names");
        assert_eq!(names, [], "{name}: nothing is named");
        fs::remove_dir_all(&store).expect("remove the store");
    }
}

/// An image's links must not lead the builder out of it, nor into what another path stands for.
#[test]
fn links_on_the_way_to_an_entry_stay_within_the_image() {
    let bottom =
        layer().dir("./").dir("real").file("real/old", "old").symlink("link", "real").symlink("out", "/etc");
    // Through links of the same layer.
    let same = layer()
        .dir("there")
        .symlink("here", "there")
        .file("here/through", "a link")
        .symlink("abs", "/there")
        .file("abs/absolute", "a link")
        .symlink("up", "../../../there")
        .file("up/up", "not out of the root");
    let (expected, found) = both_sides(vec![bottom, same]);
    assert_same(&expected, &found, "the mount");
}

/// What this test program does as another user, for [`an_ordinary_user_sees_the_same`].
#[test]
#[ignore = "run by another test"]
fn scan_as_another_user() {
    let root = std::env::var_os("MOSFS_TEST_SCAN").expect("MOSFS_TEST_SCAN");
    let to = std::env::var_os("MOSFS_TEST_TO").expect("MOSFS_TEST_TO");
    let scan = try_scan(Path::new(&root));
    fs::write(to, serde_json::to_vec(&scan).expect("JSON")).expect("write what was seen");
}

/// An ordinary user builds, mounts, and sees through the mount what they see of the tree that umoci
/// unpacked: the same content, and the same doors closed.
#[test]
fn an_ordinary_user_sees_the_same() {
    need_root();
    // nobody: fusermount3 asks for a user with a name.
    const USER: u32 = 65_534;
    // Not below `target`, which may lie where nobody else can go.
    let dir = tempfile::tempdir().expect("make a folder");
    let there = dir.path().canonicalize().expect("a path");
    let layout = there.join("layout");
    let bottom = layer()
        .dir("./")
        .dir("open")
        .content("open/large", &debian::noise(500_000, 3))
        .entry(b"open/secret", EntryType::Regular, 0o600, b"", b"secret")
        .entry(b"closed", EntryType::Directory, 0o700, b"", b"")
        .file("closed/inside", "inside")
        .entry(b"listed", EntryType::Directory, 0o744, b"", b"")
        .file("listed/inside", "inside")
        .entry(b"setuid", EntryType::Regular, 0o4755, b"", b"#!/bin/true")
        .symlink("link", "open/large")
        .hard("hard", "open/large")
        .pax(&[("SCHILY.xattr.user.seen", b"yes"), ("SCHILY.xattr.trusted.hidden", b"from users")])
        .file("attributes", "")
        .entry(b"fifo", EntryType::Fifo, 0o644, b"", b"");
    let top = layer().file("open/.wh.nothing", "").dir("open").file("open/new", "new");
    layers::image(&layout, "user", vec![bottom, top]);
    run(command("umoci")
        .args(["unpack", "--image"])
        .arg(join(&layout, ":", "user"))
        .arg(there.join("bundle")));
    fs::set_permissions(there.join("bundle"), fs::Permissions::from_mode(0o755)).expect("chmod");
    let home = there.join("home");
    fs::create_dir(&home).expect("mkdir");
    run(Command::new("cp").args(["-r", "--no-preserve=mode"]).arg(&layout).arg(&home));
    for (program, name) in [
        (PathBuf::from(mosfs().get_program()), "mosfs"),
        (PathBuf::from(env!("CARGO_BIN_EXE_mosfs-full")), "mosfs-full"),
        (std::env::current_exe().expect("this program"), "test"),
    ] {
        copy_program(program, there.join(name));
        fs::set_permissions(there.join(name), fs::Permissions::from_mode(0o755)).expect("chmod");
    }
    run(Command::new("chown").args(["-R", &format!("{USER}:{USER}")]).arg(&home));
    fs::set_permissions(&there, fs::Permissions::from_mode(0o755)).expect("chmod");
    let user = |program: &str| {
        let mut user = command("setpriv");
        user.args(["--reuid", &USER.to_string(), "--regid", &USER.to_string(), "--clear-groups"]);
        user.env("HOME", &home).env_remove("XDG_RUNTIME_DIR").current_dir(&home);
        user.arg(there.join(program));
        user
    };
    let seen = |root: &Path, name: &str| -> Scan {
        let mut scan = user("test");
        scan.env("MOSFS_TEST_SCAN", root).env("MOSFS_TEST_TO", home.join(name));
        run(scan.args(["--exact", "scan_as_another_user", "--ignored"]));
        serde_json::from_slice(&fs::read(home.join(name)).expect("what was seen")).expect("JSON")
    };

    run(user("mosfs").args(["keys", "generate", "keys", "--product", PRODUCT]));
    import_manifest(&home.join("import.yaml"), &url(&home.join("layout"), "user"));
    let signer = ["--key", "keys/signer.key", "--cert", "keys/signer.pem"];
    run(user("mosfs").args(["build", "import.yaml", "--store", "store"]).args(signer));
    let mnt = home.join("mnt");
    fs::create_dir(&mnt).expect("mkdir");
    chown(&mnt, Some(USER), Some(USER)).expect("chown");
    let store = home.join("store");
    run(user("mosfs").args(["mount", &source(&store, &image_name(&store)), "mnt"]));
    let expected = seen(&there.join("bundle/rootfs"), "expected");
    let found = seen(&mnt, "found");
    run(user("mosfs").args(["umount", "mnt"]));
    assert_eq!(found.errors, expected.errors, "what cannot be read");
    assert!(!expected.errors.is_empty() && expected.tree.len() > 8);
    assert_eq!(expected.tree[b"open/secret".as_slice()].content, Some(Err(13)), "permission denied");
    assert_same(&expected.tree, &found.tree, "the mount of an ordinary user");
}
