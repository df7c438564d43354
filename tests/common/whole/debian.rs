//! A real Debian root file system as an OCI image, with everything odd that a tree can have.
//!
//! ```text
//! TMPDIR/debian-base.tar              Debian's minbase, made once (a minute, needs Debian's mirror)
//! TMPDIR/debian-image-KEY/layout      the image `debian`: four layers, made by umoci
//! TMPDIR/debian-image-KEY/bundle      what umoci unpacks it to: the reference
//! ```
//! TMPDIR is cargo's folder for test programs, in `target`. KEY is the digest of this file, so that a
//! changed recipe makes a new image. All of it is kept for the next run.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, makedev};

use super::commands::{command, join, need_root, run};
use super::scan::{differences, scan};
use mosfs::internals::digest::Digest;

/// The image and what it should look like.
pub struct Image {
    /// The OCI layout; the image's name in it is `debian`.
    pub layout: PathBuf,
    /// The folder that umoci unpacked it to.
    pub unpacked: PathBuf,
}

/// Where test programs keep files between runs.
pub fn cache() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// Holds a lock file in the cache, so that one thread of one process makes what all use.
fn lock(name: &str) -> File {
    let file = File::create(cache().join(name)).expect("create a lock file");
    file.lock().expect("take a lock");
    file
}

/// Debian's minbase as a tar file.
pub fn base() -> PathBuf {
    need_root();
    let _lock = lock("debian-base.lock");
    let path = cache().join("debian-base.tar");
    if path.exists() {
        return path;
    }
    let temporary = cache().join("debian-base.tmp");
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or("bookworm");
    let made = command("mmdebstrap")
        .args(["--quiet", "--variant=minbase", "--format=tar", suite])
        .arg(&temporary)
        .status()
        .expect("run mmdebstrap");
    assert!(made.success(), "mmdebstrap failed: does this machine reach Debian's mirror?");
    fs::rename(temporary, &path).expect("keep the base");
    path
}

/// The image, made when there is none.
pub fn image() -> Image {
    need_root();
    let base = base();
    let _lock = lock("debian-image.lock");
    let key = &Digest::of(include_bytes!("debian.rs")).hex()[..12];
    let dir = cache().join(format!("debian-image-{key}"));
    let image = Image { layout: dir.join("layout"), unpacked: dir.join("bundle/rootfs") };
    if dir.join("done").exists() {
        return image;
    }
    for old in fs::read_dir(cache()).expect("list the cache").flatten() {
        if old.file_name().as_bytes().starts_with(b"debian-image-") {
            fs::remove_dir_all(old.path()).expect("remove an old image");
        }
    }
    fs::create_dir(&dir).expect("make the folder of the image");

    let (layout, work) = (&image.layout, dir.join("work"));
    let name = join(layout, ":", "debian");
    let root = work.join("rootfs");
    run(command("umoci").args(["init", "--layout"]).arg(layout));
    run(command("umoci").args(["new", "--image"]).arg(&name));
    run(command("umoci").args(["unpack", "--image"]).arg(&name).arg(&work));
    let keep = ["--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf"];
    run(command("tar").arg("-C").arg(&root).args(keep).arg(&base));
    for (layer, change) in [first as fn(&Path), second, third].into_iter().enumerate() {
        change(&root);
        let mut repack = command("umoci");
        repack.arg("repack");
        if layer < 2 {
            repack.arg("--refresh-bundle");
        }
        run(repack.arg("--image").arg(&name).arg(&work));
    }
    // umoci repack never writes an opaque folder: it lists what is gone. insert does.
    let new = dir.join("new");
    fs::create_dir(&new).expect("mkdir");
    write(&new.join("only"), b"what is below is hidden");
    fs::create_dir(new.join("sub")).expect("mkdir");
    write(&new.join("sub/only"), b"here too");
    run(command("umoci").args(["insert", "--opaque", "--image"]).arg(&name).arg(&new).arg("/odd/opaque"));

    run(command("umoci").args(["unpack", "--image"]).arg(&name).arg(dir.join("bundle")));
    // The inserted layer is not in the working tree.
    let inserted = |path: &[u8]| path == b"odd" || path.starts_with(b"odd/opaque");
    let lost = differences(&scan(&root), &scan(&image.unpacked));
    let lost: Vec<_> =
        lost.iter().filter(|one| !inserted(&one.path)).map(|one| one.to_string() + "\n").collect();
    write(&dir.join("lost"), lost.concat().as_bytes());
    fs::remove_dir_all(&work).expect("remove the working tree");
    write(&dir.join("done"), b"");
    image
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap_or_else(|error| panic!("write {path:?}: {error}"));
}

fn mkdir(path: &Path) {
    fs::create_dir_all(path).unwrap_or_else(|error| panic!("mkdir {path:?}: {error}"));
}

fn hard_link(from: &Path, to: &Path) {
    fs::hard_link(from, to).unwrap_or_else(|error| panic!("link {from:?} {to:?}: {error}"));
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode))
        .unwrap_or_else(|error| panic!("chmod {path:?}: {error}"));
}

fn node(path: &Path, kind: FileType, major: u32, minor: u32) {
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(0o640), makedev(major, minor))
        .unwrap_or_else(|error| panic!("mknod {path:?}: {error}"));
}

fn attribute(path: &Path, name: &[u8], value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|error| panic!("setxattr {path:?}: {error}"));
}

fn time(path: &Path, seconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
        .unwrap_or_else(|error| panic!("set the time of {path:?}: {error}"));
}

fn bytes(name: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(name))
}

/// Bytes that do not compress, the same at each run: xorshift64.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut all = Vec::with_capacity(len + 8);
    while all.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        all.extend_from_slice(&state.to_le_bytes());
    }
    all.truncate(len);
    all
}

/// The first layer: Debian, and all kinds of files.
fn first(root: &Path) {
    let odd = &root.join("odd");
    for folder in ["links/dir", "names", "xattrs", "times", "owners", "modes", "sizes", "sparse", "devices"] {
        mkdir(&odd.join(folder));
    }
    links(&odd.join("links"));
    names(&odd.join("names"));
    xattrs(&odd.join("xattrs"));
    devices(&odd.join("devices"));

    for (name, seconds) in [
        ("epoch", 0),
        ("one", 1),
        ("before-2038", i64::from(i32::MAX)),
        ("after-2038", i64::from(i32::MAX) + 1),
        ("last", i64::from(u32::MAX)),
    ] {
        write(&odd.join("times").join(name), name.as_bytes());
        time(&odd.join("times").join(name), seconds);
        mkdir(&odd.join("times").join(format!("{name}.d")));
        time(&odd.join("times").join(format!("{name}.d")), seconds);
        symlink("nowhere", odd.join("times").join(format!("{name}.l"))).expect("symlink");
        time(&odd.join("times").join(format!("{name}.l")), seconds);
    }
    // 3,000 owners: the id table and its index need more than one block each.
    for id in 0..1500_u32 {
        let path = odd.join("owners").join(id.to_string());
        write(&path, b"");
        chown(&path, Some(100_000 + id), Some(200_000 + id)).expect("chown");
    }
    for (name, uid, gid) in
        [("nobody", 65534, 65534), ("large", 4_294_967_294, 2_147_483_648), ("mixed", 1234, 0)]
    {
        let path = odd.join("owners").join(name);
        symlink("/etc/passwd", &path).expect("symlink");
        lchown(&path, Some(uid), Some(gid)).expect("chown");
    }
    for bits in [0, 0o1, 0o7, 0o4755, 0o2755, 0o6711, 0o1777, 0o7777, 0o4000, 0o444] {
        write(&odd.join("modes").join(format!("f{bits:04o}")), b"x");
        mode(&odd.join("modes").join(format!("f{bits:04o}")), bits);
        mkdir(&odd.join("modes").join(format!("d{bits:04o}")));
        mode(&odd.join("modes").join(format!("d{bits:04o}")), bits);
    }
    for size in [0, 1, 2, 4095, 4096, 4097, 131_071, 131_072, 131_073, 262_144, 1_000_003] {
        write(&odd.join("sizes").join(format!("noise-{size}")), &noise(size, size as u64));
        write(
            &odd.join("sizes").join(format!("text-{size}")),
            &b"all work and no play\n".repeat(size / 21 + 1)[..size],
        );
        // A multiple of the block size shared by two files: found twice or stored once, both must read.
        write(&odd.join("sizes").join(format!("again-{size}")), &noise(size, size as u64));
    }
    sparse(&odd.join("sparse"));

    // What the layers above change; see there.
    for folder in ["gone", "gone/below", "again", "again/inner", "kept", "emptied", "opaque", "opaque/sub"] {
        mkdir(&odd.join(folder));
        for file in ["one", "two", "three"] {
            write(&odd.join(folder).join(file), format!("{folder}/{file} of layer 1").as_bytes());
        }
    }
    for name in ["file-folder-file", "file-link-folder", "file-file"] {
        write(&odd.join(name), b"a file of layer 1");
    }
    for name in ["folder-file-folder", "folder-link-folder", "folder-fifo"] {
        mkdir(&odd.join(name).join("inner"));
        write(&odd.join(name).join("inner/old"), b"of layer 1");
        write(&odd.join(name).join("old"), b"of layer 1");
    }
    symlink("kept", odd.join("link-folder-link")).expect("symlink");
    for name in ["mode", "owner", "attribute", "no-attribute", "time", "content"] {
        write(&odd.join("kept").join(name), b"the same content in all layers");
        attribute(&odd.join("kept").join(name), b"user.layer", b"1");
        time(&odd.join("kept").join(name), 1_000_000_000);
    }
    // A folder with so many names that its index has several steps, and its listing several blocks.
    mkdir(&odd.join("wide"));
    for number in 0..3000 {
        write(
            &odd.join("wide").join(format!("a-rather-long-name-of-a-small-file-{number}")),
            &[number as u8],
        );
    }
    let mut deep = odd.join("deep");
    for level in 0..40 {
        deep.push(format!("level-{level:02}-{}", "x".repeat(50)));
    }
    mkdir(&deep);
    write(&deep.join("bottom"), b"of 40 folders");
}

fn links(dir: &Path) {
    // Three names; layer 2 takes one away. Two names; both go. And so on.
    for (name, others) in [
        ("three", &["three-b", "three-c"][..]),
        ("two", &["two-b"]),
        ("across", &["dir/across-b", "dir/across-c"]),
        ("changed", &["changed-b", "changed-c"]),
        ("touched", &["touched-b"]),
        ("untouched", &["untouched-b", "dir/untouched-c"]),
    ] {
        write(&dir.join(name), format!("the file {name} of layer 1").as_bytes());
        for other in others {
            hard_link(&dir.join(name), &dir.join(other));
        }
    }
    symlink("nowhere", dir.join("symlink")).expect("symlink");
    hard_link(&dir.join("symlink"), &dir.join("symlink-b"));
    node(&dir.join("fifo"), FileType::Fifo, 0, 0);
    hard_link(&dir.join("fifo"), &dir.join("fifo-b"));
    node(&dir.join("device"), FileType::CharacterDevice, 1, 3);
    hard_link(&dir.join("device"), &dir.join("device-b"));
    write(&dir.join("many-0000"), b"a file with many names");
    for number in 1..500 {
        hard_link(&dir.join("many-0000"), &dir.join(format!("many-{number:04}")));
    }
    write(&dir.join("large"), &noise(400_000, 7));
    hard_link(&dir.join("large"), &dir.join("dir/large-b"));
}

fn names(dir: &Path) {
    let long = [b'n'; 255];
    let long_bytes = [0xff; 255];
    for name in [
        b"caf\xe9".as_slice(),
        b"\x80\xfe\xff",
        b"new\nline",
        b"tab\tand\x01control",
        b" ",
        b" leading and trailing ",
        b"-rf",
        b"back\\slash",
        b"star*?[",
        b"quote'\"",
        b"...",
        b".hidden",
        b"%s%n",
        b"a=b",
        "\u{fc}ml\u{e4}ut-\u{1f980}".as_bytes(),
        // Not a whiteout: those begin with it.
        b"x.wh.y",
        &long,
        &long_bytes,
    ] {
        write(&dir.join(bytes(name)), name);
    }
    mkdir(&dir.join(bytes(b"folder-\xc3\x28")));
    write(&dir.join(bytes(b"folder-\xc3\x28")).join(bytes(b"\xe9")), b"inside");
    for (name, target) in [
        (b"to-nowhere".as_slice(), b"../does/not/exist".to_vec()),
        (b"to-itself", b"to-itself".to_vec()),
        (b"to-root", b"/".to_vec()),
        (b"to-bytes", b"caf\xe9/\xff\n".to_vec()),
        (b"to-far", [b"x/".repeat(2047), b"y".to_vec()].concat()),
        (b"to-slashes", b"//a///b//".to_vec()),
    ] {
        symlink(OsStr::from_bytes(&target), dir.join(bytes(name))).expect("symlink");
    }
}

fn xattrs(dir: &Path) {
    // What setcap(8) writes for cap_net_bind_service+ep, and a version 3 one with a root id.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for name in ["file", "folder", "fifo", "plain", "same"] {
        match name {
            "folder" => mkdir(&dir.join(name)),
            "fifo" => node(&dir.join(name), FileType::Fifo, 0, 0),
            _ => write(&dir.join(name), b"#!/bin/true\n"),
        }
    }
    attribute(&dir.join("file"), b"security.capability", &capability);
    attribute(&dir.join("file"), b"user.text", b"some text");
    attribute(&dir.join("file"), b"user.binary", &[0, 1, 2, 0xff, 0, b'\n', b'=']);
    attribute(&dir.join("file"), b"trusted.mosfs", b"for root");
    attribute(&dir.join("file"), b"user.name\xe9 with strange bytes", b"value");
    attribute(&dir.join("same"), b"user.text", b"some text");
    attribute(&dir.join("folder"), b"user.folder", b"yes");
    attribute(&dir.join("folder"), b"trusted.folder", b"yes");
    attribute(&dir.join("fifo"), b"trusted.fifo", b"yes");
    // Long values, which the format stores once and refers to; as many as an ext4 block holds.
    write(&dir.join("long"), b"");
    attribute(&dir.join("long"), b"user.long", &noise(3000, 3));
    write(&dir.join("long-again"), b"");
    attribute(&dir.join("long-again"), b"user.long", &noise(3000, 3));
    write(&dir.join("many"), b"");
    for number in 0..70 {
        attribute(
            &dir.join("many"),
            format!("user.attribute-{number}").as_bytes(),
            number.to_string().as_bytes(),
        );
    }
    // More sets of attributes than one block of the table holds.
    mkdir(&dir.join("each"));
    for number in 0..1200 {
        let path = dir.join("each").join(number.to_string());
        write(&path, b"");
        attribute(&path, b"user.number", number.to_string().as_bytes());
    }
    symlink("file", dir.join("link")).expect("symlink");
    attribute(&dir.join("link"), b"trusted.link", b"of the link itself");
}

/// No socket is among them: tar has none, and `umoci repack` fails where it meets one.
fn devices(dir: &Path) {
    for (name, kind, major, minor) in [
        ("null", FileType::CharacterDevice, 1, 3),
        ("loop0", FileType::BlockDevice, 7, 0),
        ("zero-minor", FileType::CharacterDevice, 5, 0),
        ("zero-major", FileType::BlockDevice, 0, 7),
        ("large-minor", FileType::BlockDevice, 259, 0xf_ffff),
        ("large-major", FileType::CharacterDevice, 0xfff, 0x1_2345),
        ("fifo", FileType::Fifo, 0, 0),
    ] {
        node(&dir.join(name), kind, major, minor);
    }
}

fn sparse(dir: &Path) {
    let piece = |name: &str, size: u64, offsets: &[u64]| {
        let mut file = File::create(dir.join(name)).expect("create");
        file.set_len(size).expect("truncate");
        for offset in offsets {
            file.seek(SeekFrom::Start(*offset)).expect("seek");
            file.write_all(b"data in a hole").expect("write");
        }
    };
    piece("end", 64 << 20, &[(64 << 20) - 14]);
    piece("start", 8 << 20, &[0]);
    piece("middle", 8 << 20, &[(4 << 20) + 77]);
    piece("steps", 4 << 20, &[131_072 - 7, 3 * 131_072, 10 * 131_072 + 5]);
    piece("nothing", (1 << 20) + 5, &[]);
    piece("small", 5000, &[]);
    piece("tail", 131_072 * 2 + 100, &[131_072 * 2 + 50]);
}

/// The second layer: deletes, replaces, changes.
fn second(root: &Path) {
    let odd = &root.join("odd");
    let links = &odd.join("links");
    let remove =
        |path: PathBuf| fs::remove_file(&path).unwrap_or_else(|error| panic!("remove {path:?}: {error}"));
    let remove_all =
        |path: PathBuf| fs::remove_dir_all(&path).unwrap_or_else(|error| panic!("remove {path:?}: {error}"));
    for name in ["three-b", "two", "two-b", "symlink", "fifo", "many-0000", "many-0100"] {
        remove(links.join(name));
    }
    // One name becomes a file of its own; a new name is added; the file is changed under all names.
    remove(links.join("changed-b"));
    write(&links.join("changed-b"), b"a file of its own in layer 2");
    hard_link(&links.join("touched"), &links.join("touched-c"));
    hard_link(&links.join("large"), &links.join("large-c"));
    write(&links.join("changed"), b"changed in layer 2 under the names that are left");

    for name in ["gone", "again", "folder-file-folder", "folder-link-folder", "folder-fifo"] {
        remove_all(odd.join(name));
    }
    for name in ["one", "two", "three"] {
        remove(odd.join("emptied").join(name));
    }
    for name in ["file-folder-file", "file-link-folder", "link-folder-link"] {
        remove(odd.join(name));
    }
    mkdir(&odd.join("file-folder-file/inner"));
    write(&odd.join("file-folder-file/inner/new"), b"of layer 2");
    symlink("kept", odd.join("file-link-folder")).expect("symlink");
    mkdir(&odd.join("link-folder-link"));
    write(&odd.join("link-folder-link/new"), b"of layer 2");
    write(&odd.join("folder-file-folder"), b"a file of layer 2");
    symlink("again", odd.join("folder-link-folder")).expect("symlink");
    node(&odd.join("folder-fifo"), FileType::Fifo, 0, 0);
    write(&odd.join("file-file"), b"another file");

    let kept = &odd.join("kept");
    mode(&kept.join("mode"), 0o4711);
    chown(kept.join("owner"), Some(77), Some(88)).expect("chown");
    attribute(&kept.join("attribute"), b"user.layer", b"2");
    rustix::fs::lremovexattr(kept.join("no-attribute"), "user.layer").expect("removexattr");
    time(&kept.join("time"), 1_100_000_000);
    write(&kept.join("content"), b"other content, of the same time");
    time(&kept.join("content"), 1_000_000_000);
    mode(&odd.join("wide"), 0o700);
    for number in (0..3000).step_by(3) {
        remove(odd.join("wide").join(format!("a-rather-long-name-of-a-small-file-{number}")));
    }
    write(&odd.join("wide/new"), b"of layer 2");
    // Real life: packages go, files change.
    remove_all(root.join("usr/share/doc"));
    write(&root.join("etc/motd"), b"changed by layer 2\n");
    fs::rename(root.join("usr/share/zoneinfo"), root.join("usr/share/zones")).expect("rename");
}

/// The third layer: makes again what the second deleted.
fn third(root: &Path) {
    let odd = &root.join("odd");
    mkdir(&odd.join("again/inner"));
    write(&odd.join("again/two"), b"of layer 3");
    write(&odd.join("again/inner/four"), b"of layer 3");
    attribute(&odd.join("again"), b"user.layer", b"3");
    mkdir(&odd.join("emptied/one"));
    for name in ["folder-file-folder", "folder-link-folder", "file-link-folder"] {
        fs::remove_file(odd.join(name)).expect("remove");
        mkdir(&odd.join(name).join("inner"));
        write(&odd.join(name).join("inner/newest"), b"of layer 3");
    }
    fs::remove_dir_all(odd.join("file-folder-file")).expect("remove");
    write(&odd.join("file-folder-file"), b"a file of layer 3");
    fs::remove_dir_all(odd.join("link-folder-link")).expect("remove");
    symlink("kept/one", odd.join("link-folder-link")).expect("symlink");
    for number in (0..3000).step_by(5) {
        let _ =
            fs::remove_file(odd.join("wide").join(format!("a-rather-long-name-of-a-small-file-{number}")));
    }
    write(&odd.join("wide/a-rather-long-name-of-a-small-file-0"), b"back in layer 3");
    mkdir(&root.join("usr/share/doc/new"));
    write(&root.join("usr/share/doc/new/README"), b"of layer 3");
    let links = &odd.join("links");
    write(&links.join("many-0000"), b"not one of them any more");
    fs::remove_file(links.join("three")).expect("remove");
    hard_link(&links.join("three-c"), &links.join("three-d"));
}
