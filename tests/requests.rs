//! How many requests a FUSE mount answers for what programs do with many files, and what it answers to those that ask
//! for attributes which are not there. For each format of a layer.
//!
//! No time is measured: the daemon's own count of system calls that write (`syscw` in proc(5)) is how many replies it
//! has sent. `--spin=never`, as keeping cores awake takes writes of its own.

#[path = "common/squashfs.rs"]
#[allow(dead_code)]
mod images;
#[path = "common/layout.rs"]
mod layout;
#[path = "common/mkfs_erofs.rs"]
#[allow(dead_code)]
mod mkfs_erofs;

use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use images::{args, mksquashfs, need_root};
use layout::{Layout, OurMount};
use mosfs::internals::convert::puzzlefs::{Limits, pack};
use mosfs::internals::image::erofs::Erofs;
use mosfs::internals::image::overlay::Merged;
use mosfs::internals::image::{Layer, MemorySource};
use mosfs::internals::progress::Progress;
use mosfs::internals::store::Store;
use rustix::fs::{XattrFlags, lgetxattr, llistxattr, lsetxattr};
use rustix::io::Errno;
use tempfile::TempDir;

const FOLDERS: u64 = 20;
const FILES: u64 = 60;
/// All of [`tree`], with its root.
const ENTRIES: u64 = 1 + FOLDERS + FOLDERS * FILES;
/// Two listings of each folder, the second of which has its end, and some for the start.
const LISTINGS: u64 = 2 * (FOLDERS + 1) + 20;

const ACL: &str = "system.posix_acl_access";
const DEFAULT_ACL: &str = "system.posix_acl_default";
const LABEL: &str = "security.selinux";
/// A capability: `cap_net_raw+ep`.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Folders of files without attributes.
fn tree(at: &Path) -> PathBuf {
    for folder in 0..FOLDERS {
        let folder = at.join(format!("d{folder}"));
        fs::create_dir_all(&folder).unwrap();
        for file in 0..FILES {
            fs::write(folder.join(format!("f{file}")), format!("{file}\n")).unwrap();
        }
    }
    at.to_path_buf()
}

fn set(path: &Path, name: &str, value: &[u8]) {
    lsetxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|error| panic!("{name} of {}: {error}", path.display()));
}

fn get(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = [0; 256];
    lgetxattr(path, name, &mut value[..]).map(|len| value[..len].to_vec())
}

fn list(path: &Path) -> Vec<String> {
    let mut names = [0; 1024];
    let len = llistxattr(path, &mut names[..]).unwrap();
    let names = names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names.map(|name| String::from_utf8(name.to_vec()).unwrap()).collect()
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Format {
    Squashfs,
    Erofs,
    /// All layers merged into one.
    Puzzlefs,
}

use Format::{Erofs as AsErofs, Puzzlefs as AsPuzzlefs, Squashfs as AsSquashfs};

const FORMATS: [Format; 3] = [AsSquashfs, AsErofs, AsPuzzlefs];

/// Makes the tree of a layer.
type Make<'a> = &'a dyn Fn(&Path);

fn mkfs(tree: &Path, image: &Path, options: &str) {
    let _ = fs::remove_file(image);
    images::run("erofs-utils", "mkfs.erofs", &args(&format!("--quiet {options}"), &[image, tree]));
}

fn open(image: &Path) -> Arc<dyn Layer> {
    Arc::new(Erofs::open(Arc::new(MemorySource(fs::read(image).unwrap()))).unwrap())
}

/// A mount of layers, the bottom one first.
struct Fixture {
    mount: OurMount,
    _folder: TempDir,
}

impl Fixture {
    fn new(format: Format, layers: &[Make<'_>]) -> Self {
        need_root();
        let folder = tempfile::tempdir().unwrap();
        layout::open_to_all(folder.path());
        let layout = Layout::new(&folder.path().join("oci"));
        let (mut descriptors, mut opened) = (Vec::new(), Vec::new());
        for (number, make) in layers.iter().enumerate() {
            let (at, image) = (folder.path().join(format!("tree{number}")), folder.path().join("image"));
            make(&at);
            match format {
                AsSquashfs => {
                    mksquashfs(&at, &image, "-comp zstd -xattrs");
                    descriptors.push(layout.layer(&image).descriptor);
                }
                AsErofs => {
                    mkfs(&at, &image, "-zlz4");
                    descriptors.push(layout.erofs_layer(&image).descriptor);
                }
                AsPuzzlefs => {
                    mkfs(&at, &image, "");
                    opened.push(open(&image));
                }
            }
        }
        if format == AsPuzzlefs {
            let store = Store::create(&folder.path().join("store")).unwrap();
            let (view, writer) = (Merged::new(opened).unwrap(), store.writer().unwrap());
            let threads = NonZeroUsize::new(2).unwrap();
            let packed = pack(&view, &writer, Limits::default(), threads, &Progress::silent()).unwrap();
            for layer in packed.layers {
                fs::copy(store.blob_path(&layer.digest), layout.blob(&layer.digest)).unwrap();
                descriptors.push(serde_json::to_value(layer).unwrap());
            }
        }
        layout.image("all", &descriptors);
        let mount = OurMount::new(&layout.source("all"), &folder.path().join("m"), &["--spin=never"]);
        Self { mount, _folder: folder }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.mount.at.join(path)
    }

    /// How many replies the daemon has sent.
    fn replies(&self) -> u64 {
        let io = fs::read_to_string(format!("/proc/{}/io", self.mount.pid())).unwrap();
        let count = io.lines().find_map(|line| line.strip_prefix("syscw: ")).expect("a count of writes");
        count.parse().unwrap()
    }

    /// How many replies `work` takes.
    fn count(&self, work: impl FnOnce(&Path)) -> u64 {
        let before = self.replies();
        work(&self.mount.at);
        self.replies() - before
    }
}

/// What `ls -lR` of coreutils 9.1 requests: each folder, the attributes of each file, and its ACL and label until the
/// answer is that the file system has no such thing.
fn list_as_ls_does(at: &Path) {
    fn folder(at: &Path, asks: &mut Vec<&str>, seen: &mut u64) {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            *seen += 1;
            asks.retain(|name| get(&path, name) != Err(Errno::OPNOTSUPP));
            if meta.is_dir() {
                folder(&path, asks, seen);
            }
        }
    }
    let mut seen = 1;
    folder(at, &mut vec![LABEL, ACL], &mut seen);
    assert_eq!(seen, ENTRIES);
}

fn run(program: &str, args: &[&str], at: &Path) {
    let mut command = Command::new(program);
    let status = command.args(args).arg(at).stdout(Stdio::null()).status();
    assert!(status.unwrap_or_else(|error| panic!("cannot run {program}: {error}")).success());
}

fn plain(at: &Path) {
    tree(at);
}

fn with_some_attributes(at: &Path) {
    fs::create_dir_all(at.join("d1")).unwrap();
    fs::write(at.join("d1/f1"), "1\n").unwrap();
    set(&at.join("d1/f1"), "user.note", b"top");
    fs::write(at.join("d1/f2"), "2\n").unwrap();
    set(&at.join("d1/f2"), "security.capability", &CAPABILITY);
}

#[test]
fn a_listing_makes_no_request_for_each_file() {
    for format in FORMATS {
        for what in ["no attributes", "some attributes, none of which ls shows"] {
            let (bottom, top): (Make<'_>, Make<'_>) = (&plain, &with_some_attributes);
            let layers = if what == "no attributes" { vec![bottom] } else { vec![bottom, top] };
            let what = format!("{format:?}, {what}");
            let fixture = || Fixture::new(format, &layers);
            let first = fixture();
            let requests = first.count(list_as_ls_does);
            assert!((FOLDERS..LISTINGS).contains(&requests), "{what}: {requests} requests");
            // All but that it does not have them is in the kernel's cache.
            let again = first.count(list_as_ls_does);
            assert!(again <= 2 + 1, "{what}: {again} requests for a second listing");
            // That of coreutils 9.7 lists the names of each file's attributes, which no answer ends.
            let requests = fixture().count(|at| run("ls", &["-lR"], at));
            assert!(
                (FOLDERS..LISTINGS + ENTRIES).contains(&requests),
                "{what}: {requests} requests of ls -lR"
            );
            let requests = fixture().count(|at| run("du", &["-s"], at));
            assert!((FOLDERS..LISTINGS).contains(&requests), "{what}: {requests} requests of du");
        }
    }
}

#[test]
fn attributes_are_shown_and_what_is_not_there_is_told_from_what_cannot_be_there() {
    for format in FORMATS {
        let fixture = Fixture::new(format, &[&plain, &with_some_attributes]);
        let (noted, able, bare) = (fixture.at("d1/f1"), fixture.at("d1/f2"), fixture.at("d2/f2"));
        assert_eq!(get(&noted, "user.note").unwrap(), b"top");
        assert_eq!(list(&noted), ["user.note"]);
        assert_eq!(get(&able, "security.capability").unwrap(), CAPABILITY);
        assert_eq!(list(&able), ["security.capability"]);
        for path in [&noted, &able, &bare, &fixture.at("d2")] {
            // The kernel's squashfs says so too, with and without attributes in the image.
            for (name, expected) in [
                ("user.other", Errno::NODATA),
                ("trusted.other", Errno::NODATA),
                ("security.ima", Errno::NODATA),
                (ACL, Errno::OPNOTSUPP),
                (DEFAULT_ACL, Errno::OPNOTSUPP),
                ("system.nfs4_acl", Errno::OPNOTSUPP),
                ("other.other", Errno::OPNOTSUPP),
                // But for this one: see `View::is_unsupported`.
                (LABEL, Errno::OPNOTSUPP),
            ] {
                assert_eq!(get(path, name), Err(expected), "{format:?}: {name} of {}", path.display());
            }
        }
        assert_eq!(get(&bare, "user.note"), Err(Errno::NODATA));
        assert_eq!(get(&bare, "security.capability"), Err(Errno::NODATA));
        assert!(list(&bare).is_empty());
    }
}

/// One file of one layer has a label: each other file has none, which is not that there could be none.
#[test]
fn labels_of_an_image_are_shown() {
    let labelled = |at: &Path| {
        tree(at);
        set(&at.join("d3/f3"), LABEL, b"system_u:object_r:etc_t:s0\0");
    };
    for format in FORMATS {
        let fixture = Fixture::new(format, &[&labelled, &with_some_attributes]);
        assert_eq!(get(&fixture.at("d4/f4"), LABEL), Err(Errno::NODATA));
        assert_eq!(get(&fixture.at("d3/f3"), LABEL).unwrap(), b"system_u:object_r:etc_t:s0\0");
        assert_eq!(get(&fixture.at("d1/f1"), LABEL), Err(Errno::NODATA));
        assert_eq!(get(&fixture.at("d1/f1"), ACL), Err(Errno::OPNOTSUPP));
        list_as_ls_does(&fixture.mount.at);
    }
}

/// One file or folder has an ACL, of one kind: it is shown, and others can be read by those whom their mode lets.
#[test]
fn acls_of_an_image_are_shown() {
    for format in [AsErofs, AsPuzzlefs] {
        for (words, path, shown) in
            [("-m u:1001:---", "d3/f3", "user:1001:---"), ("-d -m u:1001:rwx", "d3", "default:user:1001:rwx")]
        {
            let with_acl = |at: &Path| {
                tree(at);
                images::run("acl", "setfacl", &args(words, &[&at.join(path)]));
            };
            let fixture = Fixture::new(format, &[&with_acl]);
            let what = format!("{format:?}, {words}");
            let acl = images::run("acl", "getfacl", &args("-pn", &[&fixture.at(path)]));
            assert!(String::from_utf8_lossy(&acl).lines().any(|line| line == shown), "{what}: {acl:?}");
            let listed = images::run("coreutils", "ls", &args("-ld", &[&fixture.at(path)]));
            let mode = String::from_utf8(listed).unwrap();
            assert_eq!(mode.split(' ').next().map(|mode| mode.ends_with('+')), Some(true), "{what}: {mode}");
            for name in [ACL, DEFAULT_ACL] {
                assert_eq!(get(&fixture.at("d4"), name), Err(Errno::NODATA), "{what}: {name}");
            }
            let reads = |user: &str, path: &str| {
                let mut command = Command::new("setpriv");
                command.args(["--reuid", user, "--regid", user, "--clear-groups", "cat"]);
                let output = command.arg(fixture.at(path)).output().unwrap();
                output.status.success()
            };
            assert!(reads("1001", "d4/f4") && reads("1002", "d3/f3"), "{what}");
            assert_eq!(reads("1001", "d3/f3"), path == "d3", "{what}");
            list_as_ls_does(&fixture.mount.at);
        }
    }
}

/// Wherever an erofs image has an attribute: beside the inode, shared by files, with a prefix of the image.
#[test]
fn each_attribute_of_an_erofs_image_is_found() {
    need_root();
    let folder = tempfile::tempdir().unwrap();
    let (at, image) = (folder.path().join("tree"), folder.path().join("image"));
    tree(&at);
    let may_have = |name: &str| open(&image).may_have_xattr(name.as_bytes());
    // None at all; and where it would take long to find out: files without compression, and many of them.
    mkfs(&at, &image, "-x-1 -zlz4");
    assert!(!may_have(LABEL) && !may_have(ACL) && !may_have("user.other"));
    mkfs(&at, &image, "-x-1");
    assert!(may_have(LABEL) && may_have(ACL));
    for folder in (0..FOLDERS).filter(|folder| ![7, 8, 19].contains(folder)) {
        fs::remove_dir_all(at.join(format!("d{folder}"))).unwrap();
    }
    set(&at, "user.root", b"of the root");
    for file in 0..9 {
        set(&at.join(format!("d19/f{file}")), LABEL, b"the same");
    }
    set(&at.join("d7"), "user.folder", b"of a folder");
    set(&at.join("d8/f8"), "trusted.file", b"of a file");
    let program = mkfs_erofs::mkfs_erofs().join("mkfs.erofs");
    for options in
        ["", "-x0", "-x100", "--xattr-prefix=security.sel --xattr-prefix=user.f", "-zlz4 -Eall-fragments"]
    {
        let _ = fs::remove_file(&image);
        let words = format!("--quiet {options}");
        images::run("erofs-utils", program.to_str().unwrap(), &args(&words, &[&image, &at]));
        for name in [LABEL, "user.root", "user.folder", "trusted.file"] {
            assert!(may_have(name), "{options}: {name}");
        }
        for name in [ACL, DEFAULT_ACL, "user.file", "user.other", "security.ima", "security.sel"] {
            assert!(!may_have(name), "{options}: {name}");
        }
    }
    // A file whose inode makes no sense may have any; who reads it gets the error.
    let layer = open(&image);
    let folder = layer.lookup(layer.root(), b"d8").unwrap().unwrap().node;
    let file = layer.lookup(folder, b"f9").unwrap().unwrap().node;
    let mut bytes = fs::read(&image).unwrap();
    let metadata = u32::from_le_bytes(bytes[1024 + 40..][..4].try_into().unwrap());
    // The format of the inode, and a superblock without a checksum.
    bytes[metadata as usize * 4096 + file.0 as usize * 32 + 1] = 0xff;
    bytes[1024 + 8] &= !1;
    let layer = Erofs::open(Arc::new(MemorySource(bytes))).unwrap();
    assert!(layer.attr(file).is_err() && layer.may_have_xattr(ACL.as_bytes()));
}

/// More sets of attributes than are read to find the names: what there is must be shown all the same.
#[test]
fn labels_of_an_image_of_many_attributes_are_shown() {
    let many = |at: &Path| {
        tree(at);
        for folder in 0..FOLDERS {
            for file in 0..FILES {
                let value = format!("{folder}/{file}");
                set(&at.join(format!("d{folder}/f{file}")), "user.number", value.as_bytes());
            }
        }
        set(&at.join("d19/f59"), LABEL, b"last");
    };
    for format in FORMATS {
        let fixture = Fixture::new(format, &[&many]);
        assert_eq!(get(&fixture.at("d0/f0"), LABEL), Err(Errno::NODATA));
        assert_eq!(get(&fixture.at("d19/f59"), LABEL).unwrap(), b"last");
        assert_eq!(get(&fixture.at("d19/f58"), "user.number").unwrap(), b"19/58");
    }
}

/// What copies attributes from a mount must not fail on what it is told.
#[test]
fn files_are_copied_with_their_attributes() {
    for format in FORMATS {
        copy_with_attributes(&Fixture::new(format, &[&plain, &with_some_attributes]));
    }
}

fn copy_with_attributes(fixture: &Fixture) {
    let to = tempfile::tempdir().unwrap();
    let copied = to.path().join("copy");
    let output = Command::new("cp").arg("-a").args([&fixture.mount.at, &copied]).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let archive = to.path().join("archive");
    let output = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "--acls", "--selinux", "-cf"])
        .arg(&archive)
        .arg("-C")
        .args([&fixture.mount.at, Path::new(".")])
        .output()
        .unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let extracted = to.path().join("extracted");
    fs::create_dir(&extracted).unwrap();
    let output = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "-xf"])
        .arg(&archive)
        .arg("-C")
        .arg(&extracted)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    for at in [&copied, &extracted] {
        assert_eq!(get(&at.join("d1/f1"), "user.note").unwrap(), b"top");
        assert_eq!(get(&at.join("d1/f2"), "security.capability").unwrap(), CAPABILITY);
        assert!(list(&at.join("d2/f2")).iter().all(|name| name == LABEL));
        let mode = |at: &Path| fs::metadata(at.join("d2/f2")).unwrap().mode();
        assert_eq!(mode(at), mode(&fixture.mount.at));
    }
}
