//! Tar layers into squashfs: against what GNU tar and umoci unpack, through the kernel's reader and unsquashfs.

#[path = "common/mounted.rs"]
mod mounted;
#[path = "common/tarball.rs"]
mod tarball;
#[path = "common/tools.rs"]
mod tools;

use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use mosfs::internals::convert::{
    Codec, ConvertError, Converted, Effort, LowerEntry, LowerLookup, Meta, Packing, TarLayer, convert_tar,
};
use mosfs::internals::digest::Digest;
use mosfs::internals::error::{Class, Classified};
use mosfs::internals::image::FileType;
use mosfs::internals::image::format::Compression;
use mosfs::internals::progress::Progress;
use mounted::Mounted;
use tarball::{Header, Tarball};
use tempfile::TempDir;
use tools::{assert_same_tree, need_root, run, sh, snapshot};

/// What the small layer below becomes.
const GOLDEN_SIZE: u64 = 8192;
const GOLDEN_DIGEST: &str = "sha256:45cfe3fadcaa7248385619929baf293072e0aa0ea90ba2ad7a3f3056d4a499bc";

fn layer_of(bytes: &[u8], compression: Compression) -> TarLayer {
    TarLayer { digest: Digest::of(bytes), size: bytes.len() as u64, compression, diff_id: None }
}

fn convert_with(
    bytes: &[u8],
    layer: &TarLayer,
    to: &Path,
    threads: usize,
) -> Result<Converted, ConvertError> {
    convert_over(bytes, layer, to, threads, &mut |_| Ok(LowerEntry::Nothing))
}

/// Converts a layer; `below` is what the layers below it have.
fn convert_over(
    bytes: &[u8],
    layer: &TarLayer,
    to: &Path,
    threads: usize,
    below: &mut LowerLookup<'_>,
) -> Result<Converted, ConvertError> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(to).unwrap();
    let packing = Packing::new(Codec::Zstd, Some(3), 128 << 10).unwrap();
    let effort = Effort { threads: NonZeroUsize::new(threads).unwrap(), packing };
    convert_tar(bytes, layer, &file, effort, below, &Progress::silent())
}

fn convert(bytes: &[u8], to: &Path) -> Result<Converted, ConvertError> {
    convert_with(bytes, &layer_of(bytes, Compression::None), to, 2)
}

/// A tree with one of everything, packed by GNU tar.
fn everything() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        need_root();
        let base = Path::new(env!("CARGO_TARGET_TMPDIR")).join("convert");
        let _ = fs::remove_dir_all(&base);
        fs::create_dir_all(&base).unwrap();
        sh(
            &base,
            r#"
            mkdir tree; cd tree
            chmod 1751 .; chown 12:34 .
            mkdir -m 2750 dir; chown 3000000000:4000000000 dir
            echo small > dir/small; : > dir/empty; chmod 4755 dir/small
            head -c 131072 /dev/urandom > block; head -c 131071 /dev/urandom > under; head -c 131073 /dev/urandom > over
            head -c 1000003 /dev/zero | tr '\0' 'a' > compressible
            head -c 700001 /dev/urandom > random
            truncate -s 5M sparse; printf middle | dd of=sparse bs=1 seek=2500000 conv=notrunc status=none
            truncate -s 300000 all-holes
            truncate -s 1000000 tail-hole; head -c 200000 /dev/urandom | dd of=tail-hole conv=notrunc status=none
            ln dir/small hard-1; ln dir/small dir/hard-2
            ln -s 'some/where else' soft; ln -s "$(head -c 3000 /dev/zero | tr '\0' l)" long-soft
            mknod null c 1 3; mknod big-minor c 10 300; mknod disk b 259 70000; mkfifo pipe; chmod 640 null pipe
            name=$(printf 'n%.0s' $(seq 255)); echo x > $name
            printf y > "$(printf 'bad\377utf8')"; printf z > 'new
line'
            mkdir -p deep/$name/$name/$name; echo d > deep/$name/$name/$name/file
            mkdir many; i=0; while [ $i -lt 1500 ]; do echo $((i % 7)) > many/file-with-a-long-enough-name-$i; i=$((i+1)); done
            setfattr -n user.text -v value dir/small; setfattr -n user.binary -v 0x000a3d00ff dir/small
            setfattr -n trusted.thing -v t dir; setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 block
            setfattr -n user.empty dir/empty; setfattr -h -n trusted.link -v l soft; setfattr -h -n trusted.dev -v l null
            setfattr -n user.large -v "$(head -c 3000 /dev/zero | tr '\0' v)" over
            touch -d @1234567890.123456789 dir/small; touch -h -d @4000000000 soft; touch -d @0 dir/empty
            touch -d @1111111111 many dir deep .
            "#,
        );
        base
    })
}

fn pack(options: &str) -> Vec<u8> {
    let base = everything();
    let command = format!("tar --sort=name --xattrs --xattrs-include='*' {options} -C tree -cf - .");
    let output = tools::run_any(Command::new("sh").arg("-ec").arg(command).current_dir(base));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// What the source tree is, with what tar and squashfs keep: whole seconds.
fn expected() -> std::collections::BTreeMap<PathBuf, String> {
    snapshot(&everything().join("tree"))
}

#[test]
fn everything_arrives_as_it_was() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("image");
    let expected = expected();
    for options in [
        "--format=posix",
        "--format=posix --sparse",
        "--format=posix --sparse --sparse-version=0.1",
        "--format=posix --sparse --sparse-version=0.0",
    ] {
        let stream = pack(options);
        let done = convert(&stream, &image).unwrap();
        assert_eq!(done.notes, [] as [String; 0], "{options}");
        let mounted = Mounted::of("squashfs", &image, folder.path().join("mnt"));
        assert_same_tree(&expected, &snapshot(&mounted.0));
        drop(mounted);
        if options != "--format=posix" {
            continue;
        }
        let out = folder.path().join("unsquashed");
        run(Command::new("unsquashfs")
            .args(["-quiet", "-no-progress", "-strict-errors", "-d"])
            .arg(&out)
            .arg(&image));
        assert_same_tree(&expected, &snapshot(&out));
        fs::remove_dir_all(out).unwrap();
    }
}

#[test]
fn gnu_headers_too() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("image");
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    for options in [
        "--format=gnu --no-xattrs",
        "--format=gnu --sparse --no-xattrs",
        "--format=oldgnu --sparse --no-xattrs",
    ] {
        let stream = pack(options);
        convert(&stream, &image).unwrap();
        let tar = folder.path().join("tar");
        fs::write(&tar, &stream).unwrap();
        let unpacked = folder.path().join("unpacked");
        fs::create_dir(&unpacked).unwrap();
        run(Command::new("tar").arg("-xpf").arg(&tar).arg("-C").arg(&unpacked));
        let mounted = Mounted::of("squashfs", &image, folder.path().join("mnt"));
        assert_same_tree(&snapshot(&unpacked), &snapshot(&mounted.0));
        drop(mounted);
        fs::remove_dir_all(unpacked).unwrap();
    }
}

#[test]
fn the_same_bytes_for_any_compression_and_number_of_threads() {
    let folder = TempDir::new().unwrap();
    let stream = pack("--format=posix");
    let first = convert(&stream, &folder.path().join("first")).unwrap().sealed;
    fs::write(folder.path().join("tar"), &stream).unwrap();
    sh(
        folder.path(),
        "gzip -k tar; zstd -q -k tar; head -c 1000000 tar | gzip > two; tail -c +1000001 tar | gzip >> two",
    );
    for (file, compression, threads) in [
        ("tar", Compression::None, 1),
        ("tar", Compression::None, 8),
        ("tar.gz", Compression::Gzip, 3),
        ("tar.zst", Compression::Zstd, 2),
        // Two members, as some tools write: one stream.
        ("two", Compression::Gzip, 2),
    ] {
        let bytes = fs::read(folder.path().join(file)).unwrap();
        let layer = TarLayer { diff_id: Some(Digest::of(&stream)), ..layer_of(&bytes, compression) };
        let image = folder.path().join("image");
        let sealed = convert_with(&bytes, &layer, &image, threads).unwrap().sealed;
        assert_eq!((sealed.digest, sealed.root_hash), (first.digest, first.root_hash), "{file}, {threads}");
        assert_eq!(Digest::of(&fs::read(&image).unwrap()), first.digest);
    }
    run(Command::new("veritysetup")
        .args(["verify", "--hash-offset"])
        .arg((first.superblock.data_blocks * 4096).to_string())
        .args([folder.path().join("first"), folder.path().join("first")])
        .arg(first.root_hash.hex()));
}

/// A small layer whose image never changes its bytes: a change of the writer or of the library that
/// compresses must be seen, as it changes the digest of every system that is built again.
#[test]
fn the_bytes_are_those_of_the_last_version() {
    let mut tar = Tarball::default();
    tar.dir("etc")
        .file("etc/hostname", b"mosfs\n")
        .link(b'2', "etc/link", "hostname")
        .file("zeros", &[0; 300_000]);
    tar.pax(&[(b"SCHILY.xattr.user.a", b"b")]).file("x", &[b'x'; 200_000]);
    tar.file("same", b"mosfs\n").file("other", b"fsmos\n");
    let folder = TempDir::new().unwrap();
    let sealed = convert(&tar.end(), &folder.path().join("image")).unwrap().sealed;
    assert_eq!((sealed.size_bytes, sealed.digest.to_string().as_str()), (GOLDEN_SIZE, GOLDEN_DIGEST));
}

/// Converts a stream with nothing below it, mounts the image, and has it looked at.
fn view(tar: &Tarball, check: impl FnOnce(&Path)) {
    view_over(tar, &mut |_| Ok(LowerEntry::Nothing), |root, notes| {
        assert_eq!(notes, [""; 0]);
        check(root);
    });
}

/// The same over other layers; the notes of the conversion are handed out too.
fn view_over(tar: &Tarball, below: &mut LowerLookup<'_>, check: impl FnOnce(&Path, &[String])) {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("image");
    let bytes = tar.end();
    let notes = convert_over(&bytes, &layer_of(&bytes, Compression::None), &image, 2, below).unwrap().notes;
    let mounted = Mounted::of("squashfs", &image, folder.path().join("mnt"));
    check(&mounted.0, &notes);
}

fn names(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

fn opaque(path: &Path) -> bool {
    let output = tools::run_any(
        Command::new("getfattr").args(["--only-values", "-n", "trusted.overlay.opaque"]).arg(path),
    );
    output.stdout == b"y"
}

fn whiteout(path: &Path) -> bool {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let data = path.symlink_metadata().unwrap();
    data.file_type().is_char_device() && data.rdev() == 0
}

#[test]
fn whiteouts_become_those_of_overlayfs() {
    let mut tar = Tarball::default();
    tar.dir("before").file("before/.wh..wh..opq", b"").file("before/new", b"");
    // The marker stands behind all else, before its folder's own entry, or for a folder without one.
    tar.dir("after").file("after/new", b"").file("middle", b"").file("after/.wh..wh..opq", b"");
    tar.file("early/.wh..wh..opq", b"").dir("early").file("implied/.wh..wh..opq", b"");
    tar.file(".wh.gone", b"").file("dir/.wh.gone", b"");
    // A folder that was removed and made again hides the old one; a file does so by itself.
    tar.file(".wh.again", b"").dir("again").dir("again-2").file(".wh.again-2", b"");
    tar.file(".wh.again-3", b"").file("again-3/x", b"x").file(".wh.file", b"").file("file", b"f");
    tar.file("file-2", b"f").file(".wh.file-2", b"");
    // As umoci writes them: one for each file of a folder that is gone, or that is a file or a link now.
    tar.file(".wh.gone-2", b"").file("gone-2/.wh.x", b"").file("gone-3/.wh.x", b"").file(".wh.gone-3", b"");
    tar.file("now-file", b"f")
        .file("now-file/.wh.x", b"")
        .file("now-file-2/.wh.x", b"")
        .file("now-file-2", b"f");
    tar.link(b'2', "now-link", "dir").file("now-link/.wh.middle", b"");
    tar.file(".wh..wh.aufs", b"").file(".wh..wh.plnk/1.2", b"");
    // The layers below have a folder wherever somebody asks.
    view_over(&tar, &mut |_| Ok(LowerEntry::Folder(Meta::default())), |root, _| {
        for name in ["before", "after", "early", "implied", "again", "again-2", "again-3"] {
            assert!(opaque(&root.join(name)), "{name}");
        }
        for name in ["gone", "dir/gone", "gone-2", "gone-3"] {
            assert!(whiteout(&root.join(name)), "{name}");
        }
        assert!(!opaque(&root.join("dir")) && !opaque(root) && !root.join("dir/middle").exists());
        assert_eq!(fs::read(root.join("file")).unwrap(), b"f");
        assert_eq!(fs::read(root.join("file-2")).unwrap(), b"f");
        let expected = [
            "after",
            "again",
            "again-2",
            "again-3",
            "before",
            "dir",
            "early",
            "file",
            "file-2",
            "gone",
            "gone-2",
            "gone-3",
            "implied",
            "middle",
            "now-file",
            "now-file-2",
            "now-link",
        ];
        assert_eq!(names(root), expected);
    });
}

#[test]
fn the_last_entry_of_a_name_counts() {
    let mut tar = Tarball::default();
    tar.file("a", b"first").link(b'1', "link-to-first", "a").file("./a", b"second");
    tar.dir("d").file("d/x", b"x").dir("d/").file("was-dir/x", b"x").file("was-dir", b"file");
    tar.file("was-file", b"file").dir("was-file").file("was-file/x", b"x");
    tar.link(b'1', "early-link", "later").file("later", b"later").link(b'1', "second-early", "early-link");
    tar.link(b'2', "soft", "d").file("soft/through", b"t").link(b'2', "abs", "/e/f").file("abs/x", b"e");
    tar.link(b'2', "up", "../../d").file("up/y", b"y").file("/rooted", b"r").file("implied/a/b", b"b");
    view(&tar, |root| {
        use std::os::unix::fs::MetadataExt;
        let read = |name: &str| String::from_utf8(fs::read(root.join(name)).unwrap()).unwrap();
        assert_eq!(read("a"), "second");
        assert_eq!(read("link-to-first"), "first");
        assert_eq!(
            (read("d/x"), read("was-dir"), read("was-file/x")),
            ("x".into(), "file".into(), "x".into())
        );
        let ino = |name: &str| root.join(name).metadata().unwrap().ino();
        assert_eq!(read("early-link"), "later");
        assert_eq!((ino("early-link"), ino("second-early")), (ino("later"), ino("later")));
        assert_eq!(root.join("later").metadata().unwrap().nlink(), 3);
        assert_eq!((read("d/through"), read("e/f/x"), read("d/y")), ("t".into(), "e".into(), "y".into()));
        assert_eq!(read("rooted"), "r");
        let implied = root.join("implied/a").metadata().unwrap();
        assert_eq!((implied.mode() & 0o7777, implied.uid(), implied.mtime()), (0o755, 0, 0));
    });
}

/// What only deletes is no folder: it appears where the layers below have one, and nowhere else.
#[test]
fn deletes_make_no_folders() {
    let mut tar = Tarball::default();
    tar.file("there/.wh.x", b"").file("there/deep/.wh.y", b"").file("there/not/deep/.wh.z", b"");
    tar.file("nowhere/.wh.x", b"").file("nowhere/deep/.wh..wh..opq", b"");
    tar.file("file/.wh.x", b"").file("link/.wh.x", b"").file("aufs/.wh..wh.plnk", b"");
    // With an entry in it, a folder takes the place of a link below, and deletes beside it have nothing to hide.
    tar.file("link-2/entry", b"e").file("link-2/.wh.other", b"");
    // What is new, or hides all that is below it, needs no whiteouts.
    tar.dir("new")
        .file("new/.wh.x", b"")
        .dir("opaque")
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/.wh.x", b"");
    let mut below = |path: &[u8]| {
        let asked = std::str::from_utf8(path).unwrap();
        assert!(!asked.starts_with("/opaque/") && !asked.starts_with("/nowhere/"), "{asked}");
        Ok(match asked {
            "" | "/there" | "/there/deep" | "/opaque" => {
                LowerEntry::Folder(Meta { mode: 0o711, ..Meta::default() })
            }
            "/file" => LowerEntry::Other(FileType::Regular),
            "/link" | "/link-2" => LowerEntry::Other(FileType::Symlink),
            _ => LowerEntry::Nothing,
        })
    };
    view_over(&tar, &mut below, |root, notes| {
        use std::os::unix::fs::MetadataExt;
        assert_eq!(names(root), ["link-2", "new", "opaque", "there"]);
        assert_eq!(names(&root.join("there")), ["deep", "x"]);
        assert!(whiteout(&root.join("there/x")) && whiteout(&root.join("there/deep/y")));
        assert_eq!(root.join("there/deep").metadata().unwrap().mode() & 0o7777, 0o711);
        assert_eq!(names(&root.join("link-2")), ["entry"]);
        assert_eq!((names(&root.join("new")), names(&root.join("opaque"))), (vec![], vec![]));
        assert!(opaque(&root.join("opaque")));
        let mut about: Vec<_> = notes.iter().map(|note| note.split(':').next().unwrap()).collect();
        about.sort_unstable();
        assert_eq!(about, ["file", "link", "link-2"], "{notes:?}");
    });
    // Nothing is below the bottom layer.
    let mut tar = Tarball::default();
    tar.file(".wh.x", b"").file("d/.wh.x", b"").file("f", b"");
    view(&tar, |root| assert_eq!(names(root), ["f"]));
}

/// A hostile or broken stream, and the words of the error that it gives.
#[test]
fn hostile_streams_are_refused() {
    type Make = fn(&mut Tarball);
    let cases: &[(&str, Make, &str)] = &[
        (
            "a name with ..",
            |t| {
                t.file("a/../../etc/passwd", b"");
            },
            "`..`",
        ),
        (
            "a hard link with ..",
            |t| {
                t.link(b'1', "l", "../../etc/shadow");
            },
            "`..`",
        ),
        (
            "a hard link to nothing",
            |t| {
                t.link(b'1', "l", "nowhere");
            },
            "hard link to `nowhere`",
        ),
        (
            "hard links in a ring",
            |t| {
                t.link(b'1', "a", "b").link(b'1', "b", "a");
            },
            "hard link to",
        ),
        (
            "a hard link to itself",
            |t| {
                t.link(b'1', "a", "a");
            },
            "hard link to",
        ),
        (
            "a hard link to a folder",
            |t| {
                t.dir("d").link(b'1', "l", "d");
            },
            "hard link to a folder",
        ),
        (
            "a file below a file",
            |t| {
                t.file("f", b"").file("f/x", b"");
            },
            "not a folder",
        ),
        (
            "links in a ring",
            |t| {
                t.link(b'2', "a", "b").link(b'2', "b", "a").file("a/x", b"");
            },
            "too many symbolic links",
        ),
        (
            "a file as the root",
            |t| {
                t.file("./", b"").file(".", b"");
            },
            "replace the root",
        ),
        (
            "a whiteout of ..",
            |t| {
                t.file("d/.wh...", b"");
            },
            "impossible name",
        ),
        (
            "a whiteout of nothing",
            |t| {
                t.file(".wh.", b"");
            },
            "impossible name",
        ),
        (
            "a long part",
            |t| {
                t.pax(&[(b"path", &[b'n'; 256])]).file("x", b"");
            },
            "longer than 255",
        ),
        (
            "a long path",
            |t| {
                t.pax(&[(b"path", &b"a/".repeat(2100))]).file("x", b"");
            },
            "length of a name",
        ),
        (
            "a NUL in a name",
            |t| {
                t.pax(&[(b"path", b"a\0b")]).file("x", b"");
            },
            "impossible name",
        ),
        (
            "a NUL in an attribute's name",
            |t| {
                t.pax(&[(b"SCHILY.xattr.user.a\0b", b"x")]).file("x", b"");
            },
            "attribute name",
        ),
        (
            "an attribute too long",
            |t| {
                t.pax(&[(b"SCHILY.xattr.user.a", &[1; 65537])]).file("x", b"");
            },
            "longer than Linux",
        ),
        (
            "an extended header too long",
            |t| {
                t.raw(Header::new(b'x', b"p", 2 << 20), b"");
            },
            "more than the 1048576",
        ),
        (
            "a long name too long",
            |t| {
                t.raw(Header::new(b'L', b"p", 1 << 40), b"");
            },
            "more than the 1048576",
        ),
        (
            "a record beyond its header",
            |t| {
                t.raw(Header::new(b'x', b"p", 9), b"99 a=bcd\n");
            },
            "longer than the header",
        ),
        (
            "a record of length 0",
            |t| {
                t.raw(Header::new(b'x', b"p", 9), b"0 a=bcde\n");
            },
            "longer than the header",
        ),
        (
            "a record without a value",
            |t| {
                t.raw(Header::new(b'x', b"p", 9), b"9 abcdef\n");
            },
            "no `=`",
        ),
        (
            "an owner too large",
            |t| {
                t.pax(&[(b"uid", b"4294967296")]).file("x", b"");
            },
            "uid",
        ),
        (
            "an owner below 0",
            |t| {
                t.pax(&[(b"uid", b"-1")]).file("x", b"");
            },
            "uid",
        ),
        (
            "a time that is none",
            |t| {
                t.pax(&[(b"mtime", b"yesterday")]).file("x", b"");
            },
            "mtime",
        ),
        (
            "a size that is none",
            |t| {
                t.pax(&[(b"size", b"1e3")]).file("x", b"");
            },
            "size",
        ),
        (
            "a size below 0",
            |t| {
                let mut h = Header::new(b'0', b"x", 0);
                h.set(124, &[0xff; 12]);
                t.raw(h, b"");
            },
            "size",
        ),
        (
            "a size of 2^63",
            |t| {
                t.pax(&[(b"size", b"9223372036854775808")]).file("x", b"");
            },
            "size",
        ),
        (
            "a device number too large",
            |t| {
                let mut h = Header::new(b'3', b"x", 0);
                h.octal(329, 8, 0o10000);
                t.raw(h, b"");
            },
            "device number",
        ),
        (
            "a type that is none",
            |t| {
                t.raw(Header::new(b'M', b"x", 0), b"");
            },
            "type `M`",
        ),
        (
            "a link to nothing",
            |t| {
                t.link(b'2', "l", "");
            },
            "empty name",
        ),
        (
            "no name",
            |t| {
                t.file("", b"");
            },
            "replace the root",
        ),
        (
            "a file that ends early",
            |t| {
                t.raw(Header::new(b'0', b"x", 100_000), b"short");
            },
            "the stream ends there",
        ),
        (
            "no tar at all",
            |t| {
                t.bytes.extend_from_slice(&[b'x'; 2048]);
            },
            "checksum",
        ),
        (
            "a sparse map out of order",
            |t| {
                t.pax(&[(b"GNU.sparse.map", b"10,5,0,5"), (b"GNU.sparse.size", b"20")])
                    .file("x", b"0123456789");
            },
            "out of order",
        ),
        (
            "a sparse map beyond the file",
            |t| {
                t.pax(&[(b"GNU.sparse.map", b"0,10"), (b"GNU.sparse.size", b"5")]).file("x", b"0123456789");
            },
            "beyond the file",
        ),
        (
            "a sparse map that overflows",
            |t| {
                t.pax(&[(b"GNU.sparse.map", b"18446744073709551615,10"), (b"GNU.sparse.size", b"5")])
                    .file("x", b"0123456789");
            },
            "beyond 2^64",
        ),
        (
            "a sparse map that does not add up",
            |t| {
                t.pax(&[(b"GNU.sparse.map", b"0,3"), (b"GNU.sparse.size", b"20")]).file("x", b"0123456789");
            },
            "add up",
        ),
        (
            "a sparse file of 2^62 bytes",
            |t| {
                t.pax(&[(b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"4611686018427387904")])
                    .file("x", b"0");
            },
            "too many names, attributes or blocks",
        ),
        (
            "a sparse map in the content that never ends",
            |t| {
                t.pax(&[
                    (b"GNU.sparse.major", b"1"),
                    (b"GNU.sparse.minor", b"0"),
                    (b"GNU.sparse.realsize", b"5"),
                ])
                .file("x", &[b'1'; 600]);
            },
            "number is malformed",
        ),
        (
            "a sparse map in the content that is too long",
            |t| {
                t.pax(&[
                    (b"GNU.sparse.major", b"1"),
                    (b"GNU.sparse.minor", b"0"),
                    (b"GNU.sparse.realsize", b"5"),
                ])
                .file("x", b"9\n0\n1\n");
            },
            "longer than the entry",
        ),
        (
            "a sparse map of a billion pieces",
            |t| {
                t.pax(&[
                    (b"GNU.sparse.major", b"1"),
                    (b"GNU.sparse.minor", b"0"),
                    (b"GNU.sparse.realsize", b"5"),
                ])
                .file("x", b"1000000000\n");
            },
            "map of a sparse file",
        ),
    ];
    let folder = TempDir::new().unwrap();
    for (what, make, words) in cases {
        let mut tar = Tarball::default();
        make(&mut tar);
        let stream = if *what == "a file that ends early" { tar.bytes.clone() } else { tar.end() };
        let error = convert(&stream, &folder.path().join("image")).expect_err(what);
        let typed = matches!(
            error,
            ConvertError::Tar(_)
                | ConvertError::Entry { .. }
                | ConvertError::HardLink { .. }
                | ConvertError::TooMuch { .. }
        );
        assert!(typed && error.to_string().contains(words), "{what}: {error:?}");
        assert_eq!(error.class(), Class::Input, "{what}");
    }
}

#[test]
fn what_is_not_the_layer_asked_for_is_refused() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("image");
    let mut tar = Tarball::default();
    tar.file("file", &[b'x'; 100_000]);
    let stream = tar.end();
    fs::write(folder.path().join("tar"), &stream).unwrap();
    sh(folder.path(), "gzip -k tar");
    let gz = fs::read(folder.path().join("tar.gz")).unwrap();
    let good = layer_of(&gz, Compression::Gzip);
    convert_with(&gz, &good, &image, 1).unwrap();

    let other = Digest::of(b"other");
    let refused = |bytes: &[u8], layer: &TarLayer| {
        let error = convert_with(bytes, layer, &image, 1).unwrap_err();
        assert_eq!(error.class(), Class::Verification, "{error}");
        error
    };
    let error = refused(&gz, &TarLayer { digest: other, ..good });
    assert!(matches!(error, ConvertError::Digest { found, .. } if found == good.digest));
    let error = refused(&gz, &TarLayer { diff_id: Some(other), ..good });
    assert!(
        matches!(error, ConvertError::DiffId { expected, found, .. } if expected == other && found == Digest::of(&stream))
    );
    let error = refused(&gz[..gz.len() - 10], &good);
    assert!(matches!(error, ConvertError::Size { found, .. } if found == gz.len() as u64 - 10));
    let longer = [&gz[..], &[0; 100]].concat();
    assert!(matches!(refused(&longer, &good), ConvertError::Size { .. }));
    // A damaged blob is named as such, whatever the decompressor says of it.
    let mut damaged = gz.clone();
    damaged[50] ^= 1;
    assert!(matches!(refused(&damaged, &good), ConvertError::Digest { .. }));
    // A blob that was cut off, with the digest of what is left, is not a whole stream.
    let cut = &gz[..gz.len() - 10];
    let error = convert_with(cut, &layer_of(cut, Compression::Gzip), &image, 1).unwrap_err();
    assert!(matches!(error, ConvertError::Tar(_)), "{error}");
    // Nor is anything behind the stream's end passed over.
    let error = convert_with(&longer, &layer_of(&longer, Compression::Gzip), &image, 1).unwrap_err();
    assert!(matches!(error, ConvertError::Tar(_)), "{error}");
}
