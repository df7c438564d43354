//! What an image holds is what a mount shows: path by path, against `umoci unpack` of the same image.
//!
//! The images are made by umoci, and by hand where no tool writes such layers. What umoci itself does not keep is
//! listed in [`umoci_keeps_all_but`]; the reference is what it unpacks.

#[path = "common/whole/mod.rs"]
mod common;

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use common::commands::{command, join, mosfs, need_root, refused, run};
use common::layers::{Layer, layer};
use common::system::{Mounted, PRODUCT, build, digest, image_name, import_manifest, keys, scratch, source};
use common::scan::{Tree, assert_same, scan, show, try_scan};
use common::{debian, layers};
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
    digest(&run(&mut build(&manifest, &store, &keys)));

    let mounted = Mounted::new(&source(&store, &image_name(&store)), &dir.path().join("mnt"));
    let expected = scan(&image.unpacked);
    assert_same(&expected, &scan(mounted.dir()), "the mount");
    // Once more, now that the kernel and the daemon hold much of it.
    assert_same(&expected, &scan(mounted.dir()), "the mount, the second time");
    mounted.unmount();
}

/// The recipe makes what it says it makes, so that the comparison above is about something.
#[test]
fn the_debian_image_has_it_all() {
    let tree = scan(&debian::image().unpacked);
    let node = |path: &str| tree.get(path.as_bytes()).unwrap_or_else(|| panic!("there is no {path}"));
    let missing = |path: &str| assert!(!tree.contains_key(path.as_bytes()), "{path} should be deleted");

    assert!(tree.len() > 10_000, "{} paths", tree.len());
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
    for gone in ["odd/again/one", "odd/gone", "odd/emptied/two", "odd/opaque/one", "odd/opaque/sub/one", "usr/share/doc/bash"] {
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
    run(command("umoci").args(["unpack", "--image"]).arg(join(&layout, ":", "odd")).arg(dir.path().join("bundle")));
    (scan(&dir.path().join("bundle/rootfs")), found)
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
    for (path, there) in [("again/1", false), ("opaque/old", false), ("twice/new", true), ("deep/er/est/file", true)] {
        assert_eq!(expected.contains_key(path.as_bytes()), there, "{path}, as umoci unpacks it");
    }
    assert_same(&expected, &found, "the mount");
}

/// The names of a tar may be written in several ways.
#[test]
fn names_of_entries_are_cleaned_as_umoci_cleans_them() {
    let layers = vec![
        layer().dir("./").dir("./a").file("./a/1", "1").file("/absolute", "2").dir("b/").file("b//2", "3").file("a/./3", "4"),
        layer().dir(".").file("./a/.wh.1", "").file("/.wh.absolute", ""),
    ];
    let (expected, found) = both_sides(layers);
    assert_same(&expected, &found, "the mount");
}
