//! A tree with one of everything, images of it made by the real tools, and what is to be seen in them.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use mosfs::internals::image::layer::{Extent, Layer, NodeId, Place};
use mosfs::internals::image::squashfs::Squashfs;
use mosfs::internals::image::{FileType, MemorySource};
use sha2::{Digest, Sha256};

/// Runs a tool; a tool that is missing or fails ends the test, naming Debian's package.
pub fn run(package: &str, program: &str, args: &[&OsStr]) -> Vec<u8> {
    let output =
        Command::new(program).args(args).stdin(Stdio::null()).output().unwrap_or_else(|error| {
            panic!("cannot run {program}: {error}; install Debian's package {package}")
        });
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?} failed: {errors}");
    output.stdout
}

/// The words of a command line, then paths.
pub fn args<'a>(words: &'a str, paths: &[&'a Path]) -> Vec<&'a OsStr> {
    words.split_whitespace().map(OsStr::new).chain(paths.iter().map(|path| path.as_os_str())).collect()
}

/// These tests make device nodes and mount images.
pub fn need_root() {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let root = status.lines().any(|line| line.starts_with("Uid:\t0\t0\t"));
    assert!(root, "this test makes device nodes and mounts images: run it as root (tests/as-root)");
}

/// What there is to see of a file.
#[derive(Clone, PartialEq, Eq)]
pub struct Seen {
    pub kind: char,
    pub permissions: u32,
    pub uid: u32,
    pub gid: u32,
    /// Left out for folders where the reader of the tree has its own idea of it.
    pub size: Option<u64>,
    /// Left out for files with xattrs: the kernel's reader counts the size of those as well.
    pub blocks_512: Option<u64>,
    pub mtime: i64,
    pub rdev: u64,
    /// Left out for folders in a copy: images differ in whether files in a folder count.
    pub nlink: Option<u64>,
    pub target: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub content: Option<[u8; 32]>,
}

impl std::fmt::Debug for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Seen { kind, permissions, uid, gid, size, blocks_512, mtime, rdev, nlink, .. } = self;
        let hash =
            self.content.map(|hash| format!("{:02x}{:02x}{:02x}{:02x}", hash[0], hash[1], hash[2], hash[3]));
        write!(
            f,
            "{kind} {permissions:o} {uid}:{gid} size {size:?} blocks {blocks_512:?} mtime {mtime} rdev {rdev:#x} nlink {nlink:?} content {hash:?}"
        )?;
        if !self.target.is_empty() {
            write!(
                f,
                " -> {:?}({})",
                String::from_utf8_lossy(&self.target[..self.target.len().min(20)]),
                self.target.len()
            )?;
        }
        for (name, value) in &self.xattrs {
            let (name, start) =
                (String::from_utf8_lossy(name), String::from_utf8_lossy(&value[..value.len().min(20)]));
            write!(f, " {name}={start:?}({})", value.len())?;
        }
        Ok(())
    }
}

/// All files of a tree, by their path from its root; the root is the empty path.
pub type Tree = BTreeMap<Vec<u8>, Seen>;

/// Fails with the paths that differ.
pub fn assert_same(what: &str, ours: &Tree, theirs: &Tree) {
    let mut differences = Vec::new();
    for path in ours.keys().chain(theirs.keys().filter(|path| !ours.contains_key(*path))) {
        let (ours, theirs) = (ours.get(path), theirs.get(path));
        if ours != theirs {
            differences
                .push(format!("{:?}\n  ours   {ours:?}\n  theirs {theirs:?}", String::from_utf8_lossy(path)));
        }
    }
    assert!(
        differences.is_empty(),
        "{what}: {} paths differ\n{}",
        differences.len(),
        differences[..differences.len().min(8)].join("\n")
    );
    assert!(!ours.is_empty());
}

/// How much of a tree on a file system is compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// A mounted image: everything.
    Mounted,
    /// A mounted squashfs without any xattrs, which answers that it does not know such things.
    MountedWithoutXattrs,
    /// A copy on another file system: sizes of folders and space used are its own.
    Copied,
}

/// Leaves out what is not the same in a copy on another file system.
pub fn as_copied(mut tree: Tree) -> Tree {
    for seen in tree.values_mut() {
        seen.blocks_512 = None;
        if seen.kind == 'd' {
            (seen.size, seen.nlink) = (None, None);
        }
    }
    tree
}

/// What is in a tree on a file system.
pub fn see(root: &Path, view: View) -> Tree {
    let mut xattrs = if view == View::MountedWithoutXattrs { BTreeMap::new() } else { all_xattrs(root) };
    let mut tree = Tree::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let kind = meta.file_type();
        let letter = match () {
            () if kind.is_dir() => 'd',
            () if kind.is_file() => 'f',
            () if kind.is_symlink() => 'l',
            () if kind.is_block_device() => 'b',
            () if kind.is_char_device() => 'c',
            () if kind.is_fifo() => 'p',
            () => 's',
        };
        if kind.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        let relative = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
        let xattrs = xattrs.remove(&path).unwrap_or_default();
        let seen = Seen {
            kind: letter,
            permissions: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            size: Some(meta.size()),
            blocks_512: xattrs.is_empty().then_some(meta.blocks()),
            mtime: meta.mtime(),
            rdev: meta.rdev(),
            nlink: Some(meta.nlink()),
            target: if kind.is_symlink() {
                fs::read_link(&path).unwrap().into_os_string().into_vec()
            } else {
                Vec::new()
            },
            xattrs,
            content: kind.is_file().then(|| Sha256::digest(fs::read(&path).unwrap()).into()),
        };
        tree.insert(relative, seen);
    }
    assert!(xattrs.is_empty(), "xattrs of unknown paths: {:?}", xattrs.keys());
    if view == View::Copied { as_copied(tree) } else { tree }
}

/// The extended attributes of all files of a tree, as getfattr(1) tells them.
fn all_xattrs(root: &Path) -> BTreeMap<PathBuf, BTreeMap<Vec<u8>, Vec<u8>>> {
    let text = run("attr", "getfattr", &args("-R -P -h -d -e hex --absolute-names -m -", &[root]));
    let mut all = BTreeMap::new();
    let mut path = PathBuf::new();
    for line in text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        if let Some(name) = line.strip_prefix(b"# file: ") {
            path = PathBuf::from(OsString::from_vec(unescape(name)));
            continue;
        }
        let equals = line.iter().position(|&byte| byte == b'=');
        let (name, value) = equals.map_or((line, &b""[..]), |at| (&line[..at], &line[at + 1..]));
        let hex = value.strip_prefix(b"0x").unwrap_or_default();
        let digit = |byte: u8| (byte as char).to_digit(16).unwrap() as u8;
        let value = hex.chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect();
        all.entry(path.clone()).or_insert_with(BTreeMap::new).insert(unescape(name), value);
    }
    all
}

/// Undoes getfattr's octal escapes.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        if byte == b'\\' && text.len() >= at + 4 && text[at + 1].is_ascii_digit() {
            out.push(text[at + 1..at + 4].iter().fold(0, |sum, digit| sum << 3 | (digit - b'0')));
            at += 4;
        } else {
            out.push(byte);
            at += 1;
        }
    }
    out
}

/// What is in an image, by the reader under test.
///
/// Each name is found by `read_dir` and again by `lookup`; each content is read extent by extent.
pub fn read(image: &dyn Layer) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![(Vec::new(), image.root())];
    while let Some((path, node)) = todo.pop() {
        let attr =
            image.attr(node).unwrap_or_else(|error| panic!("{:?}: {error}", String::from_utf8_lossy(&path)));
        let folder = attr.kind == FileType::Directory;
        let xattrs: BTreeMap<_, _> = image.xattrs(node).unwrap().into_iter().collect();
        assert_eq!(attr.has_xattrs, !xattrs.is_empty(), "{:?}", String::from_utf8_lossy(&path));
        assert!(xattrs.keys().all(|name| image.may_have_xattr(name)), "{:?}", String::from_utf8_lossy(&path));
        let seen = Seen {
            kind: letter(attr.kind),
            permissions: attr.permissions.into(),
            uid: attr.uid,
            gid: attr.gid,
            size: Some(attr.size_bytes),
            blocks_512: xattrs.is_empty().then_some(attr.blocks_512),
            mtime: attr.mtime,
            rdev: attr.rdev.into(),
            nlink: Some(attr.nlink.into()),
            target: if attr.kind == FileType::Symlink { image.read_link(node).unwrap() } else { Vec::new() },
            xattrs,
            content: (attr.kind == FileType::Regular).then(|| {
                let mut hash = Sha256::new();
                content(image, node, attr.size_bytes, &mut |part| hash.update(part));
                hash.finalize().into()
            }),
        };
        if folder {
            for entry in list(image, node) {
                let mut child = path.clone();
                if !child.is_empty() {
                    child.push(b'/');
                }
                child.extend_from_slice(&entry.name);
                todo.push((child, entry.node));
            }
        }
        assert!(tree.insert(path, seen).is_none());
    }
    tree
}

pub fn letter(kind: FileType) -> char {
    match kind {
        FileType::Directory => 'd',
        FileType::Regular => 'f',
        FileType::Symlink => 'l',
        FileType::BlockDevice => 'b',
        FileType::CharDevice => 'c',
        FileType::Fifo => 'p',
        FileType::Socket => 's',
    }
}

/// The entries of a folder, read in one go, and compared with reading them in small parts and one by one by name.
pub fn list(image: &dyn Layer, node: NodeId) -> Vec<mosfs::internals::image::DirEntry> {
    let mut all = Vec::new();
    image
        .read_dir(node, 0, &mut |entry| {
            all.push(entry);
            true
        })
        .unwrap();
    let mut parts = Vec::new();
    let mut cookie = 0;
    loop {
        let before = parts.len();
        image
            .read_dir(node, cookie, &mut |entry| {
                parts.push(entry);
                parts.len() - before < 7
            })
            .unwrap();
        if parts.len() == before {
            break;
        }
        cookie = parts.last().unwrap().next;
    }
    assert_eq!(all, parts);
    for entry in &all {
        assert_eq!(image.lookup(node, &entry.name).unwrap().as_ref(), Some(entry));
        assert_eq!(image.attr(entry.node).unwrap().kind, entry.kind);
        let mut other = entry.name.clone();
        *other.last_mut().unwrap() ^= 0x80;
        if all.binary_search_by(|entry| entry.name.cmp(&other)).is_err() {
            assert_eq!(image.lookup(node, &other).unwrap(), None);
        }
    }
    all
}

/// Reads a file from its first extent to its last.
pub fn content(image: &dyn Layer, node: NodeId, size: u64, each: &mut dyn FnMut(&[u8])) {
    let mut offset = 0;
    let mut block = Vec::new();
    while offset < size {
        let Extent { file_offset, len, place } = image.extent(node, offset).unwrap();
        assert_eq!(file_offset, offset);
        assert!(len > 0 && offset + u64::from(len) <= size);
        match place {
            Place::Hole => {
                let zeros = [0; 65536];
                let mut left = len as usize;
                while left > 0 {
                    let now = left.min(zeros.len());
                    each(&zeros[..now]);
                    left -= now;
                }
            }
            Place::Block(id) => {
                image.decode(id, &mut block).unwrap();
                assert_eq!(block.len(), len as usize);
                each(&block);
            }
            Place::Shared { block: id, offset } => {
                image.decode(id, &mut block).unwrap();
                each(&block[offset as usize..][..len as usize]);
            }
        }
        offset += u64::from(len);
    }
}

/// Opens an image that lies in a file.
pub fn open(path: &Path) -> Squashfs {
    Squashfs::open(Arc::new(MemorySource(fs::read(path).unwrap())))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Bytes that compress about as well as programs do, others for each seed.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 64);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // A word of noise, then a run that was there before.
        out.extend_from_slice(&state.to_le_bytes());
        let back = (state >> 40) as usize % 4000 + 1;
        let run = (state >> 20) as usize % 60;
        for _ in 0..run {
            let byte = out.len().checked_sub(back).map_or(b'-', |at| out[at]);
            out.push(byte);
        }
    }
    out.truncate(len);
    out
}

fn touch(path: &Path, seconds: u64) {
    let time = format!("-h -d @{seconds}");
    run("coreutils", "touch", &args(&time, &[path]));
}

fn file(path: PathBuf, content: &[u8]) -> PathBuf {
    fs::write(&path, content).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    path
}

/// A file with content only at some places.
fn sparse(path: &Path, size: u64, parts: &[(u64, &[u8])]) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    for (offset, part) in parts {
        file.write_all_at(part, *offset).unwrap();
    }
}

fn xattr(path: &Path, name: &str, value: &str) {
    run(
        "attr",
        "setfattr",
        &[
            OsStr::new("-h"),
            OsStr::new("-n"),
            OsStr::new(name),
            OsStr::new("-v"),
            OsStr::new(value),
            path.as_os_str(),
        ],
    );
}

/// Makes the tree, with a folder of that many entries (3,000 and more get an index).
pub fn make_tree(root: &Path, many: u32) {
    need_root();
    fs::create_dir(root).unwrap();
    let at = |name: &str| root.join(name);

    // Sizes around the sizes of blocks, 4 KiB to 1 MiB.
    for (seed, size) in
        [0, 1, 100, 4095, 4096, 4097, 65_536, 70_000, 131_072, 131_073, 262_144, 1 << 20, (2 << 20) + 5]
            .into_iter()
            .enumerate()
    {
        file(at(&format!("size-{size}")), &bytes(seed as u64, size));
    }
    // Longer than the block lists that are walked from their start each time, with blocks of 4 KiB.
    file(at("long"), &bytes(77, 5 << 20));
    file(at("copy-of-size-131073"), &bytes(9, 131_073));
    // A text and noise that no compressor makes smaller.
    file(at("text"), "The quick brown fox. ".repeat(5000).as_bytes());
    let mut noise = Vec::new();
    while noise.len() < 200_000 {
        let hash: [u8; 32] = Sha256::digest((noise.len() as u64).to_le_bytes()).into();
        noise.extend_from_slice(&hash);
    }
    file(at("noise"), &noise);

    let part = bytes(5, 9000);
    sparse(&at("hole-start"), 3 << 20, &[((3 << 20) - 9000, &part)]);
    sparse(&at("hole-end"), 3 << 20, &[(0, &part)]);
    sparse(&at("hole-middle"), (2 << 20) + 12_345, &[(0, &part), ((2 << 20) + 3345, &part)]);
    sparse(&at("hole-only"), (1 << 20) + 1, &[]);
    sparse(&at("hole-long"), 12 << 20, &[(7 << 20, &part)]);

    fs::create_dir_all(at("deep/a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p/q/r/s/t/u/v/w/x/y/z")).unwrap();
    file(at("deep/a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p/q/r/s/t/u/v/w/x/y/z/leaf"), b"leaf");
    fs::create_dir(at("empty")).unwrap();

    fs::create_dir(at("many")).unwrap();
    for number in 0..many {
        let content = format!("{number}");
        let content = if number % 10 == 0 { content.as_bytes() } else { b"" };
        file(at(&format!("many/entry number {number} with some more text")), content);
    }
    fs::create_dir(at("names")).unwrap();
    for name in [
        &b"\xff\xfe not utf-8 \x80"[..],
        b"new\nline",
        b"\x01",
        b" ",
        b"-",
        b"caf\xc3\xa9",
        b"\\ \"quotes'",
        b"...",
    ] {
        file(at("names").join(OsStr::from_bytes(name)), name);
    }
    file(at("names").join("n".repeat(255)), b"long name");
    file(at("names").join("n".repeat(254)), b"shorter name");

    fs::create_dir(at("links")).unwrap();
    file(at("links/one"), b"three names");
    fs::hard_link(at("links/one"), at("links/two")).unwrap();
    fs::hard_link(at("links/one"), at("names/three")).unwrap();
    symlink("one", at("links/soft")).unwrap();
    symlink("/nowhere/".to_string() + &"x".repeat(3000), at("links/long")).unwrap();
    symlink(OsStr::from_bytes(b"\xff\xfe"), at("links/bytes")).unwrap();
    for number in 0..40 {
        // Their lengths put what follows them at all sorts of offsets.
        symlink("t".repeat(900 + number), at(&format!("links/l{number}"))).unwrap();
    }

    fs::create_dir(at("dev")).unwrap();
    for (name, words) in [
        ("null", "c 1 3"),
        ("whiteout", "c 0 0"),
        ("disk", "b 8 17"),
        ("large", "b 259 1048575"),
        ("most", "c 4095 300"),
    ] {
        let path = at("dev").join(name);
        let mut command = vec![path.as_os_str()];
        command.extend(args(words, &[]));
        run("coreutils", "mknod", &command);
    }
    run("coreutils", "mkfifo", &args("", &[&at("dev/fifo")]));
    std::os::unix::net::UnixListener::bind(at("dev/socket")).unwrap();

    for (name, uid, gid) in [
        ("empty", 1000, 100),
        ("size-1", 65_534, 65_534),
        ("dev/null", 4_000_000_000, 3),
        ("links/soft", 12, 13),
    ] {
        lchown(at(name), Some(uid), Some(gid)).unwrap();
    }
    for number in 0..30 {
        lchown(
            at(&format!("many/entry number {number} with some more text")),
            Some(70_000 + number),
            Some(80_000 + number),
        )
        .unwrap();
    }
    for (name, mode) in
        [("size-1", 0o4755), ("size-100", 0o2711), ("empty", 0o1777), ("size-0", 0), ("text", 0o6777)]
    {
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    xattr(&at("size-1"), "user.one", "1");
    xattr(&at("size-100"), "security.capability", "0x0100000200040000000000000000000000000000");
    xattr(&at("empty"), "trusted.overlay.opaque", "y");
    xattr(&at("empty"), "user.empty", "");
    xattr(&at("links/soft"), "trusted.on.a.link", "value");
    xattr(&at("links/l7"), "trusted.on.a.link", "value");
    xattr(&at("dev/null"), "trusted.on.a.device", "value");
    xattr(&at("dev/disk"), "trusted.on.a.device", "other value");
    xattr(&at("dev/fifo"), "trusted.on.a.fifo", "value");
    xattr(&at("dev/socket"), "trusted.on.a.socket", "value");
    xattr(&at("links/one"), "user.shared", "by three names");
    // The same long value at several files goes where all of them refer to.
    let long = "v".repeat(2500);
    for name in ["text", "noise", "long", "many"] {
        xattr(&at(name), "user.long.and.shared", &long);
        xattr(&at(name), &format!("user.of.{name}"), name);
    }
    for number in 0..60 {
        xattr(&at("size-4096"), &format!("user.number.{number:03}"), &"x".repeat(number));
    }

    for (name, time) in [
        ("size-0", 0),
        ("size-1", 1),
        ("text", (1 << 31) + 5),
        ("noise", (1 << 32) - 2),
        ("links/soft", 1_000_000_000),
    ] {
        touch(&at(name), time);
    }
    // Folders last: what is made in them changes their times.
    for (name, time) in [("empty", 77), ("many", 78), ("names", 79), ("links", 80), ("dev", 81), ("deep", 82)]
    {
        touch(&at(name), time);
    }
    touch(root, 1_234_567_890);
}

/// Makes an image with mksquashfs.
pub fn mksquashfs(tree: &Path, image: &Path, options: &str) {
    let common = "-quiet -no-progress -noappend -processors 1 ";
    let mut all: Vec<&OsStr> = vec![tree.as_os_str(), image.as_os_str()];
    let words = common.to_string() + options;
    all.extend(args(&words, &[]));
    run("squashfs-tools", "mksquashfs", &all);
}

/// Extracts an image with unsquashfs.
pub fn unsquashfs(image: &Path, folder: &Path) {
    run("squashfs-tools", "unsquashfs", &args("-quiet -no-progress -processors 1 -d", &[folder, image]));
}

/// Runs a tool that reads its input from a pipe.
pub fn feed(package: &str, program: &str, words: &[&OsStr], input: &[u8]) {
    let mut child = Command::new(program)
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run {program}: {error}; install Debian's package {package}"));
    let written = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{program} {words:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    written.unwrap();
}
