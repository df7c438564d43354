//! The erofs reader against images of the real tool and the kernel's reader, and mounts of erofs layers.
//!
//! `make campaign` adds the corpus of Debian 13's mkfs.erofs, in a chroot that it makes. `MOSFS_EROFS=ROOT:PROGRAM`
//! runs that corpus with another program, in another chroot.

#[path = "common/squashfs.rs"]
#[allow(dead_code)]
mod common;
#[path = "fuzz/src/erofs.rs"]
#[allow(dead_code)]
mod fuzz;
#[path = "common/idmap.rs"]
mod idmap;
#[path = "common/layout.rs"]
mod layout;
#[path = "common/mounted.rs"]
mod mounted;
#[path = "common/whole/scan.rs"]
#[allow(dead_code)]
mod scan;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use common::{View, args, assert_same, bytes, make_tree, read, run, see};
use layout::{Layout, OurMount, open_to_all, run_mosfs};
use mosfs::internals::image::erofs::Erofs;
use mosfs::internals::image::{Layer, LayerError, MemorySource};
use mounted::Mounted;

/// Where the trees of this file are: static values are not dropped, so what an earlier run left goes first.
fn place(name: &str) -> PathBuf {
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("erofs").join(name);
    let _ = fs::remove_dir_all(&place);
    fs::create_dir_all(&place).unwrap();
    place
}

/// A tree with one of everything, made once for all tests.
fn tree() -> &'static Path {
    static TREE: OnceLock<PathBuf> = OnceLock::new();
    TREE.get_or_init(|| {
        let tree = place("full").join("tree");
        make_tree(&tree, 700);
        more(&tree);
        tree
    })
}

/// What squashfs cannot hold, or does not care for: ACLs, ends of files of all lengths, long extents.
fn more(tree: &Path) {
    // mkfs.erofs 1.5 cuts names of 255 bytes to 254, and does not find the file.
    fs::remove_file(tree.join("names").join("n".repeat(255))).unwrap();
    let acl = |words: &str, path: PathBuf| run("acl", "setfacl", &args(words, &[&path]));
    acl("-m u:1234:rw-,g:99:---", tree.join("size-1"));
    acl("-d -m u:1234:rwx", tree.join("empty"));
    let ends = tree.join("ends");
    fs::create_dir(&ends).unwrap();
    for number in 0..80 {
        fs::write(ends.join(format!("{number}")), bytes(number as u64, 100 + number * 331)).unwrap();
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

fn try_open(bytes: Vec<u8>) -> Result<Erofs, LayerError> {
    Erofs::open(Arc::new(MemorySource(bytes)))
}

fn open(image: &Path) -> Erofs {
    try_open(fs::read(image).unwrap()).unwrap_or_else(|error| panic!("{}: {error}", image.display()))
}

/// Compares an image with the kernel's view of it.
fn compare(image: &Path, what: &str) {
    let folder = tempfile::tempdir().unwrap();
    let ours = read(&open(image));
    let mounted = Mounted::of("erofs", image, folder.path().join("mnt"));
    assert_same(what, &ours, &see(&mounted.0, View::Mounted));
}

fn corpus(compressors: &[&str], options: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    for compressor in compressors {
        for more in options {
            let options = format!("{compressor} {more}");
            mkfs(tree(), &image, &options);
            compare(&image, &options);
        }
    }
}

#[test]
fn without_compression() {
    corpus(
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
    corpus(
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

/// The options of newer programs. Not with several algorithms and dedupe at once: the images of 1.8.6 have
/// clusters of one algorithm that the index gives to another, which no reader can read.
#[cfg(feature = "campaign")]
fn newer_options(version: &str) -> Vec<String> {
    let mut options: Vec<String> = [
        "",
        "-b512",
        "-b1024 -Eforce-inode-extended",
        "-b2048 --chunksize=2048",
        "-Exattr-name-filter",
        "--xattr-prefix=user.long. --xattr-prefix=trusted.on.",
        "-Enosbcrc",
        "--chunksize=4096",
        "-T77 --mkfs-time",
    ]
    .map(str::to_string)
    .into();
    let several = "-zlz4:zstd:lzma:deflate --compress-hints=/hints";
    let tails = [
        "",
        "-Eztailpacking",
        "-Efragments",
        "-Eall-fragments",
        "-Elegacy-compress",
        "-Eforce-inode-extended,ztailpacking,legacy-compress",
        "-Ededupe",
        "-Ededupe,fragments -x1 --xattr-prefix=user.",
        "-Ededupe,ztailpacking",
    ];
    let compressors = ["-zlz4hc", "-zlzma,level=3", "-zdeflate", "-zlibdeflate,level=9", "-zzstd", several];
    // 1.9.3 crashes with several.
    for compressor in compressors.into_iter().take(if version < "1.9" { 6 } else { 5 }) {
        for size in ["", "-C65536"] {
            let tails = tails.iter().filter(|tail| compressor != several || !tail.contains("dedupe"));
            options.extend(tails.map(|tail| format!("{compressor} {size} {tail}")));
        }
        options.push(format!("{compressor} -b1024 -C8192 -Eztailpacking"));
    }
    if version >= "1.9" {
        let wide = ["", ",dot-omitted", ",fragments", ",dedupe", ",ztailpacking"];
        for compressor in ["", "-zlz4hc", "-zlzma,level=3", "-zdeflate", "-zzstd"] {
            options.extend(wide.map(|more| format!("{compressor} -C65536 -E48bit{more}")));
            options.push(format!("{compressor} --zD --MZ -m4096 -Edot-omitted"));
            options.push(format!("{compressor} -m4096 -Efragments -x1 --xattr-prefix=user."));
            options.push(format!(
                "{compressor} -m4096 -Eztailpacking,plain-xattr-prefixes --xattr-prefix=user."
            ));
        }
        options.push("-zlz4hc:zstd -C65536 -m65536:1 -Eall-fragments,dedupe".into());
    }
    options
}

/// The corpus of another program, which is in a chroot.
#[cfg(feature = "campaign")]
fn newer_corpus(root: &Path, program: &str) {
    let chroot = |words: &str| -> std::process::Output {
        let words = format!("{} {program} {words}", root.display());
        Command::new("chroot").args(words.split_whitespace()).output().unwrap()
    };
    let version = String::from_utf8(chroot("-V").stdout).unwrap();
    let version = version.rsplit(' ').find(|word| word.starts_with(|first: char| first.is_ascii_digit()));
    let (tree, image) = (root.join("tree"), root.join("image"));
    let _ = fs::remove_dir_all(&tree);
    make_tree(&tree, 60);
    more(&tree);
    // dedupe takes minutes for long runs of the same byte.
    for name in ["long", "hole-long", "hole-start", "hole-end", "mixed", "size-2097157", "size-1048576"] {
        fs::remove_file(tree.join(name)).unwrap();
    }
    fs::write(root.join("hints"), "16384 1 ^size-\n4096 2 ^many\n65536 3 ^hole\n").unwrap();
    for options in newer_options(version.unwrap_or_default()) {
        let _ = fs::remove_file(&image);
        let made = chroot(&format!("--quiet {options} /image /tree"));
        assert!(made.status.success(), "{options}: {}", String::from_utf8_lossy(&made.stderr));
        compare(&image, &options);
    }
}

#[test]
#[cfg(feature = "campaign")]
fn newer_programs() {
    if let Ok(other) = std::env::var("MOSFS_EROFS") {
        let (root, program) = other.split_once(':').expect("MOSFS_EROFS is ROOT:PROGRAM");
        return newer_corpus(Path::new(root), program);
    }
    let root = place("debian-13").join("root");
    run("mmdebstrap", "mmdebstrap", &args("--quiet --variant=apt --include=erofs-utils trixie", &[&root]));
    newer_corpus(&root, "mkfs.erofs");
}

/// Where small images of many programs are, each of the tree that [`small_tree`] makes.
fn fixtures() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/erofs_image");
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// A small tree, the same each time.
fn small_tree(tree: &Path) {
    use std::os::unix::fs::{FileExt, symlink};
    common::need_root();
    fs::create_dir_all(tree.join("folder/in/folder")).unwrap();
    let text = "The quick brown fox. ".repeat(400);
    let noise = bytes(7, 3000);
    let file = |name: &str, content: &[u8]| fs::write(tree.join(name), content).unwrap();
    file("empty", b"");
    file("text", text.as_bytes());
    file("copy", text.as_bytes());
    file("longer", &[&noise[..], text.as_bytes(), &noise].concat());
    file("noise", &noise);
    for number in 0..9 {
        file(&format!("folder/end {number}"), text.get(..number * 77 + 5).unwrap().as_bytes());
    }
    let sparse = fs::File::create(tree.join("sparse")).unwrap();
    sparse.write_all_at(b"data", 9_000).unwrap();
    sparse.set_len(16_000).unwrap();
    fs::hard_link(tree.join("noise"), tree.join("folder/in/noise")).unwrap();
    symlink("text", tree.join("link")).unwrap();
    run("coreutils", "mkfifo", &args("", &[&tree.join("fifo")]));
    run(
        "coreutils",
        "mknod",
        &args("", &[&tree.join("null"), Path::new("c"), Path::new("1"), Path::new("3")]),
    );
    fs::set_permissions(tree.join("noise"), fs::Permissions::from_mode(0o4711)).unwrap();
    for (name, words) in [
        ("text", "-n user.long.prefix.one -v 1"),
        ("copy", "-n user.long.prefix.one -v 1"),
        ("copy", "-n user.long.prefix.two -v 2"),
        ("null", "-n trusted.device -v x"),
    ] {
        run("attr", "setfattr", &args(words, &[&tree.join(name)]));
    }
    run(
        "findutils",
        "find",
        &args(
            "",
            &[
                tree,
                Path::new("-exec"),
                Path::new("touch"),
                Path::new("-h"),
                Path::new("-d"),
                Path::new("@1000000000"),
                Path::new("{}"),
                Path::new("+"),
            ],
        ),
    );
}

#[test]
fn small_images_show_their_tree() {
    let tree = place("small").join("tree");
    small_tree(&tree);
    let expected = see(&tree, View::Copied);
    let paths = fixtures();
    assert!(paths.len() > 8);
    for path in paths {
        let found = common::as_copied(read(&open(&path)));
        assert_same(&path.display().to_string(), &found, &expected);
    }
}

/// Changes of single bytes and of fields, at places where something is: whatever they do, an answer comes.
#[test]
fn no_change_of_an_image_breaks_the_reader() {
    let seed: u64 = std::env::var("MOSFS_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    let rounds =
        if std::env::var("MOSFS_CAMPAIGN").is_ok_and(|length| length == "long") { 20_000 } else { 250 };
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % below.max(1)
    };
    for path in fixtures() {
        let good = fs::read(&path).unwrap();
        let used: Vec<usize> = (1024..good.len()).filter(|at| good[*at] != 0).collect();
        for _ in 0..rounds {
            let mut bytes = good.clone();
            for _ in 0..=random(3) {
                let at = used[random(used.len())];
                match random(4) {
                    0 => bytes[at] ^= 1 << random(8),
                    1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random(5)],
                    2 => {
                        let end = bytes.len().min(at + 4);
                        bytes[at..end].fill([0, 0xff][random(2)]);
                    }
                    _ => {
                        let (from, len) = (used[random(used.len())], random(32));
                        let end = (from + len).min(bytes.len()).min(from + bytes.len() - at);
                        bytes.copy_within(from..end.max(from), at);
                    }
                }
            }
            let kept = bytes.clone();
            if std::panic::catch_unwind(move || fuzz::image(&bytes)).is_err() {
                let found = std::env::temp_dir().join("erofs-finding");
                fs::write(&found, kept).unwrap();
                panic!("a change of {} breaks the reader: {}", path.display(), found.display());
            }
        }
    }
}

/// A mount of an image through FUSE, with its verity tree, and of the same by the kernel.
struct Both {
    kernel: Mounted,
    ours: OurMount,
    /// Goes last.
    _folder: tempfile::TempDir,
}

impl Both {
    fn new(tree: &Path, options: &str) -> Self {
        Self::with(tree, options, &[])
    }

    /// The same with options of `mosfs mount`.
    fn with(tree: &Path, options: &str, of_mount: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        open_to_all(folder.path());
        let image = folder.path().join("image");
        mkfs(tree, &image, options);
        let layout = Layout::new(&folder.path().join("oci"));
        let layer = layout.erofs_layer(&image);
        layout.image("all", std::slice::from_ref(&layer.descriptor));
        let kernel = Mounted::of("erofs", &image, folder.path().join("kernel"));
        let ours = OurMount::new(&layout.source("all"), &folder.path().join("ours"), of_mount);
        Self { kernel, ours, _folder: folder }
    }
}

#[test]
fn a_mount_shows_what_the_kernel_shows() {
    for options in ["", "-zlz4hc -C65536 -Eztailpacking"] {
        let both = Both::new(tree(), options);
        let mut expected = scan::scan(&both.kernel.0);
        hide_overlay(&mut expected);
        scan::assert_same(&expected, &scan::scan(&both.ours.at), options);
    }
}

/// Whiteouts and the overlay's own attributes are what the merged view hides.
fn hide_overlay(seen: &mut scan::Tree) {
    assert!(seen.remove(b"dev/whiteout".as_slice()).is_some());
    for node in seen.values_mut() {
        node.xattrs.retain(|name, _| !name.starts_with(b"trusted.overlay."));
    }
}

#[test]
fn layers_of_both_formats_merge() {
    common::need_root();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for dir in ["below/kept", "below/opaque", "above/kept", "above/opaque"] {
        fs::create_dir_all(at(dir)).unwrap();
    }
    for (file, text) in [
        ("below/kept/one", "one"),
        ("below/kept/gone", "gone"),
        ("below/opaque/hidden", "hidden"),
        ("above/kept/two", "two"),
        ("above/opaque/seen", "seen"),
    ] {
        fs::write(at(file), text).unwrap();
    }
    run(
        "coreutils",
        "mknod",
        &args("", &[&at("above/kept/gone"), Path::new("c"), Path::new("0"), Path::new("0")]),
    );
    run("attr", "setfattr", &args("-n trusted.overlay.opaque -v y", &[&at("above/opaque")]));
    mkfs(&at("above"), &at("above.erofs"), "-zlz4hc");
    mkfs(&at("below"), &at("below.erofs"), "");
    common::mksquashfs(&at("below"), &at("below.squashfs"), "-comp zstd");
    common::mksquashfs(&at("above"), &at("above.squashfs"), "-comp zstd");
    for (below, above) in [("squashfs", "erofs"), ("erofs", "squashfs"), ("erofs", "erofs")] {
        let layout = Layout::new(&at(&format!("oci-{below}-{above}")));
        let layer = |name: &str, format: &str| {
            let image = at(&format!("{name}.{format}"));
            let layer = if format == "erofs" { layout.erofs_layer(&image) } else { layout.layer(&image) };
            layer.descriptor
        };
        layout.image("all", &[layer("below", below), layer("above", above)]);
        let mount = OurMount::new(&layout.source("all"), &at("m"), &[]);
        let names = |dir: &str| {
            let mut names: Vec<_> = fs::read_dir(mount.at.join(dir))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!(names("kept"), ["one", "two"], "{below} below {above}");
        assert_eq!(names("opaque"), ["seen"], "{below} below {above}");
        assert_eq!(fs::read_to_string(mount.at.join("kept/one")).unwrap(), "one");
        assert_eq!(fs::read_to_string(mount.at.join("kept/two")).unwrap(), "two");
    }
}

/// An ACL takes away what the mode of a file alone would give, and gives what it would not.
#[test]
fn acls_hold() {
    common::need_root();
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for (name, mode, acl) in [
        ("group", 0o640, "u:1001:r--,g::---"),
        ("denied", 0o644, "u:1001:---"),
        ("given", 0o600, "u:1001:r--"),
        ("plain", 0o644, ""),
    ] {
        let path = tree.join(name);
        fs::write(&path, name).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        if !acl.is_empty() {
            run("acl", "setfacl", &args(&format!("-m {acl}"), &[&path]));
        }
    }
    let both = Both::new(&tree, "-zlz4");
    let reads = |mount: &Path, uid: u32, gid: u32, name: &str| {
        let path = mount.join(name);
        let words = format!("--reuid={uid} --regid={gid} --clear-groups cat");
        Command::new("setpriv").args(args(&words, &[&path])).output().unwrap().status.success()
    };
    for (uid, gid) in [(0, 0), (1001, 1001), (1002, 0), (1002, 1002)] {
        for name in ["group", "denied", "given", "plain"] {
            let expected = reads(&both.kernel.0, uid, gid, name);
            assert_eq!(reads(&both.ours.at, uid, gid, name), expected, "{name} for {uid}:{gid}");
        }
    }
    assert!(!reads(&both.ours.at, 1001, 1001, "denied") && reads(&both.ours.at, 1001, 1001, "given"));
    assert!(!reads(&both.ours.at, 1002, 0, "group"), "the mask is not the group's right");
    let shown = |at: &Path| run("acl", "getfacl", &args("-c -n -p", &[&at.join("group")]));
    assert_eq!(shown(&both.ours.at), shown(&both.kernel.0));
}

/// A mount with shifted ids is what the kernel shows of the image with mapped ids: owners, ACLs, capabilities.
#[test]
fn shifted_ids_are_those_that_the_kernel_maps() {
    const FIRST: u32 = 100_000;
    common::need_root();
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    run("coreutils", "cp", &args("-a", &[self::tree(), &tree]));
    for (name, uid, gid) in
        [("owned", 1000, 33), ("last", 65_535, 65_535), ("beyond", 65_536, 7), ("far", 70_000, 70_000)]
    {
        fs::write(tree.join(name), name).unwrap();
        std::os::unix::fs::chown(tree.join(name), Some(uid), Some(gid)).unwrap();
    }
    run("acl", "setfacl", &args("-m u:1001:rw-,g:99:r--", &[&tree.join("owned")]));
    fs::copy("/bin/true", tree.join("program")).unwrap();
    run("libcap2-bin", "setcap", &args("cap_net_raw+ep", &[&tree.join("program")]));
    let both = Both::with(&tree, "-zlz4", &["--shift-ids", "100000:65536"]);
    let mapped = folder.path().join("mapped");
    fs::create_dir(&mapped).unwrap();
    idmap::mount_mapped(&both.kernel.0, &mapped, FIRST, 65_536);
    let mapped = Mounted(mapped);
    let (mut expected, found) = (scan::scan(&mapped.0), scan::scan(&both.ours.at));
    hide_overlay(&mut expected);
    scan::assert_same(&expected, &found, "shifted");
    assert_eq!((found[&b"owned"[..]].uid, found[&b"owned"[..]].gid), (FIRST + 1000, FIRST + 33));
    // What is outside of the range is shown as the overflow id, and is nobody's.
    assert_eq!((found[&b"beyond"[..]].uid, found[&b"beyond"[..]].gid), (65_534, FIRST + 7));
    let shown = |at: &Path| run("acl", "getfacl", &args("-c -n -p", &[&at.join("owned")]));
    assert!(String::from_utf8_lossy(&shown(&both.ours.at)).contains("user:101001:rw-"));
    assert_eq!(shown(&both.ours.at), shown(&mapped.0));
    let record = both.ours.record().unwrap();
    assert_eq!(record.shift.map(|shift| shift.to_string()).as_deref(), Some("100000:65536"));
}

/// Every byte of a layer that a read needs is verified.
#[test]
fn a_changed_block_is_an_error_and_verify_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("good"), bytes(1, 100_000)).unwrap();
    fs::write(tree.join("bad"), bytes(2, 100_000)).unwrap();
    let image = folder.path().join("image");
    mkfs(&tree, &image, "-zlz4hc");
    let layout = Layout::new(&folder.path().join("oci"));
    let layer = layout.erofs_layer(&image);
    layout.image("all", std::slice::from_ref(&layer.descriptor));
    let opened = open(&image);
    let bad = opened.lookup(opened.root(), b"bad").unwrap().unwrap();
    let extent = opened.extent(bad.node, 50_000).unwrap();
    let mosfs::internals::image::layer::Place::Block(block) = extent.place else { panic!("{extent:?}") };

    let blob = layout.blob(&layer.digest);
    let mut stored = fs::read(&blob).unwrap();
    stored[block.start as usize + 99] ^= 1;
    fs::write(&blob, &stored).unwrap();
    let mount = OurMount::new(&layout.source("all"), &folder.path().join("m"), &[]);
    assert_eq!(fs::read(mount.at.join("good")).unwrap(), bytes(1, 100_000));
    let error = fs::read(mount.at.join("bad")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    drop(mount);

    let output = run_mosfs(&["verify", &layout.source("all")]);
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains(&format!("block {} (data)", block.start / 4096)), "{said}");
}

/// What is refused, with the exact error.
#[test]
fn images_that_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), bytes(1, 10_000)).unwrap();
    let (image, blobs) = (folder.path().join("image"), folder.path().join("blobs"));
    mkfs(&tree, &image, "");
    let good = fs::read(&image).unwrap();
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        try_open(bytes).err().expect("it is refused").to_string()
    };
    // Without the checksum each field is looked at.
    let field = |at: usize, value: &[u8]| {
        refused(&|bytes| {
            bytes[1032] &= !1;
            bytes[1024 + at..][..value.len()].copy_from_slice(value);
        })
    };
    assert_eq!(
        field(80, &[0, 2, 0, 0]),
        "corrupt superblock at 1104: the image requires feature 0x200, which mosfs does not know"
    );
    assert_eq!(
        field(80, &[0, 0, 0, 0x80]),
        "corrupt superblock at 1104: the image requires feature 0x80000000, which mosfs does not know"
    );
    assert_eq!(
        field(0, &[0]),
        "corrupt superblock at 1024: magic is 0xe0f5e100, expected 0xe0f5e1e2 (erofs)"
    );
    assert_eq!(field(12, &[17]), "corrupt superblock at 1036: block size is 2^17, expected 2^9 to 2^16");
    assert_eq!(
        field(90, &[1]),
        "corrupt superblock at 1114: directory blocks are 2 times larger, expected 1"
    );
    let blocks = good.len() / 4096;
    assert_eq!(
        field(36, &(blocks as u32 + 1).to_le_bytes()),
        format!(
            "corrupt superblock at 1060: {} blocks of 4096 bytes, the source has {} bytes",
            blocks + 1,
            good.len()
        )
    );
    let checksum = refused(&|bytes| bytes[1100] ^= 1);
    assert!(checksum.starts_with("corrupt superblock at 1028: checksum is 0x"), "{checksum}");
    assert_eq!(
        refused(&|bytes| bytes.truncate(1100)),
        "corrupt superblock at 1024: the image has 1100 bytes, expected at least 1152"
    );

    let words = format!("--chunksize=4096 --blobdev={}", blobs.display());
    fs::write(&blobs, "").unwrap();
    mkfs(&tree, &image, &words);
    let error = try_open(fs::read(&image).unwrap()).err().unwrap().to_string();
    assert_eq!(
        error,
        "corrupt superblock at 1110: 1 further devices hold data, expected none: one image is one file"
    );
}
