//! What a file system shows of a tree, path by path, and how two trees differ.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirEntryExt, FileTypeExt, MetadataExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use mosfs::internals::digest::{Digest, Hasher};

/// All paths below a folder, relative to it; the folder itself is the empty path.
pub type Tree = BTreeMap<Vec<u8>, Node>;

/// What is seen of one path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// `d`, `-`, `l`, `b`, `c`, `p` or `s`, as ls(1) has them.
    pub kind: char,
    /// The low 12 bits of st_mode.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes; of folders 0, as each file system has its own idea.
    pub size: u64,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Device number of a device, else 0.
    pub rdev: u64,
    /// Link count.
    pub nlink: u64,
    /// The first path, in the order of bytes, with the same inode number: hard links name the same one.
    pub same_as: Vec<u8>,
    /// Target of a symbolic link.
    pub target: Option<Vec<u8>>,
    /// SHA-256 of a regular file's content, or the number of the error that reading it gives.
    pub content: Option<Result<Digest, i32>>,
    /// Extended attributes.
    #[serde(with = "pairs")]
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Bytes for people.
pub fn show(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// What [`try_scan`] could read, and what it could not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scan {
    /// What was read.
    #[serde(with = "pairs")]
    pub tree: Tree,
    /// Paths that could not be looked at, or listed, with the number of the error. Those that
    /// could not be listed are in the tree too.
    #[serde(with = "pairs")]
    pub errors: BTreeMap<Vec<u8>, i32>,
}

/// Reads everything below `root`.
///
/// # Panics
/// As [`try_scan`], and on any error.
pub fn scan(root: &Path) -> Tree {
    let scan = try_scan(root);
    let contents =
        scan.tree.iter().filter_map(|(path, node)| Some((path, node.content.as_ref()?.as_ref().err()?)));
    let list: Vec<_> = scan
        .errors
        .iter()
        .chain(contents)
        .map(|(path, error)| format!("/{}: error {error}", show(path)))
        .collect();
    assert!(list.is_empty(), "{root:?} cannot be read:\n{}", list.join("\n"));
    scan.tree
}

/// Reads everything below `root`, as far as it can be read.
///
/// # Panics
/// Where the folder lists a name twice, or with another type or inode number than stat(2) has.
pub fn try_scan(root: &Path) -> Scan {
    let mut scan = Scan::default();
    let mut first = HashMap::new();
    let mut todo = vec![Vec::new()];
    while let Some(path) = todo.pop() {
        let full = root.join(OsStr::from_bytes(&path));
        let (node, ino) = match look(&full) {
            Ok(seen) => seen,
            Err(error) => {
                scan.errors.insert(path, number(&error));
                continue;
            }
        };
        if node.kind == 'd'
            && let Err(error) = list(&full, |name| {
                let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
                todo.push([&path, slash, name].concat());
            })
        {
            scan.errors.insert(path.clone(), number(&error));
        }
        let name: &mut Vec<u8> = first.entry(ino).or_insert_with(|| path.clone());
        if path < *name {
            name.clone_from(&path);
        }
        let twice = scan.tree.insert(path, node);
        assert!(twice.is_none(), "{full:?} is listed twice");
    }
    for node in scan.tree.values_mut() {
        let ino = u64::from_ne_bytes(node.same_as[..8].try_into().expect("eight bytes"));
        node.same_as.clone_from(&first[&ino]);
    }
    scan
}

fn number(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(-1)
}

/// What is to be seen of one path, and its inode number.
fn look(full: &Path) -> io::Result<(Node, u64)> {
    let stat = fs::symlink_metadata(full)?;
    let kind = letter(stat.file_type());
    let node = Node {
        kind,
        mode: stat.mode() & 0o7777,
        uid: stat.uid(),
        gid: stat.gid(),
        size: if kind == 'd' { 0 } else { stat.size() },
        mtime: stat.mtime(),
        rdev: if matches!(kind, 'b' | 'c') { stat.rdev() } else { 0 },
        nlink: stat.nlink(),
        // The number for now; the name is known when all have been seen.
        same_as: stat.ino().to_ne_bytes().to_vec(),
        target: match kind {
            'l' => Some(fs::read_link(full)?.into_os_string().into_vec()),
            _ => None,
        },
        content: (kind == '-').then(|| content(full).map_err(|error| number(&error))),
        xattrs: xattrs(full)?,
    };
    Ok((node, stat.ino()))
}

fn list(full: &Path, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    for entry in fs::read_dir(full)? {
        let entry = entry?;
        // What cannot be looked at is told when its turn comes.
        if let Ok(inner) = fs::symlink_metadata(entry.path()) {
            let listed = letter(entry.file_type()?);
            assert_eq!(listed, letter(inner.file_type()), "d_type and st_mode of {:?}", entry.path());
            assert_eq!(entry.ino(), inner.ino(), "d_ino and st_ino of {:?}", entry.path());
        }
        each(entry.file_name().as_bytes());
    }
    Ok(())
}

fn letter(kind: fs::FileType) -> char {
    match () {
        () if kind.is_dir() => 'd',
        () if kind.is_file() => '-',
        () if kind.is_symlink() => 'l',
        () if kind.is_block_device() => 'b',
        () if kind.is_char_device() => 'c',
        () if kind.is_fifo() => 'p',
        () => 's',
    }
}

fn content(path: &Path) -> io::Result<Digest> {
    let mut file = File::open(path)?;
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finish()),
            got => hasher.update(&buffer[..got]),
        }
    }
}

/// The extended attributes of a path, of a link itself.
pub fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0; 64 << 10];
    let got = match rustix::fs::llistxattr(path, &mut names[..]) {
        // A file system without any, as the kernel's squashfs answers too.
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        other => other?,
    };
    let mut all = BTreeMap::new();
    for name in names[..got].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 << 10];
        let got = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        value.truncate(got);
        all.insert(name.to_vec(), value);
    }
    Ok(all)
}

/// Maps whose keys are bytes, as lists of pairs.
mod pairs {
    use super::{BTreeMap, Deserialize, Serialize};
    use serde::{Deserializer, Serializer};

    pub fn serialize<V: Serialize, S: Serializer>(
        map: &BTreeMap<Vec<u8>, V>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(map)
    }

    pub fn deserialize<'de, V: Deserialize<'de>, D: Deserializer<'de>>(
        from: D,
    ) -> Result<BTreeMap<Vec<u8>, V>, D::Error> {
        Ok(Vec::<(Vec<u8>, V)>::deserialize(from)?.into_iter().collect())
    }
}

/// One difference between two trees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The path.
    pub path: Vec<u8>,
    /// Which attribute; `path` where one side lacks it.
    pub what: &'static str,
    /// On one side, and on the other.
    pub sides: (String, String),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = show(&self.path);
        write!(f, "/{path}: {}: expected {}, found {}", self.what, self.sides.0, self.sides.1)
    }
}

/// All differences, in the order of paths.
pub fn differences(expected: &Tree, found: &Tree) -> Vec<Difference> {
    let mut all = Vec::new();
    let mut push = |path: &[u8], what, a: String, b: String| {
        if a != b {
            all.push(Difference { path: path.to_vec(), what, sides: (a, b) });
        }
    };
    for (path, a) in expected {
        let Some(b) = found.get(path) else {
            push(path, "path", "there".into(), "nothing".into());
            continue;
        };
        push(path, "type", a.kind.into(), b.kind.into());
        push(path, "mode", format!("{:04o}", a.mode), format!("{:04o}", b.mode));
        push(path, "owner", format!("{}:{}", a.uid, a.gid), format!("{}:{}", b.uid, b.gid));
        push(path, "size", a.size.to_string(), b.size.to_string());
        push(path, "mtime", a.mtime.to_string(), b.mtime.to_string());
        push(path, "rdev", format!("{:#x}", a.rdev), format!("{:#x}", b.rdev));
        push(path, "nlink", a.nlink.to_string(), b.nlink.to_string());
        push(path, "same file as", show(&a.same_as), show(&b.same_as));
        let target = |node: &Node| node.target.as_deref().map(show).unwrap_or_default();
        push(path, "link target", target(a), target(b));
        let content = |node: &Node| match &node.content {
            Some(Ok(digest)) => digest.to_string(),
            Some(Err(number)) => format!("error {number}"),
            None => String::new(),
        };
        push(path, "content", content(a), content(b));
        let attributes = |node: &Node| {
            let each = node.xattrs.iter().map(|(name, value)| format!("{}={}", show(name), show(value)));
            format!("[{}]", each.collect::<Vec<_>>().join(" "))
        };
        push(path, "attributes", attributes(a), attributes(b));
    }
    for path in found.keys().filter(|path| !expected.contains_key(*path)) {
        push(path, "path", "nothing".into(), "there".into());
    }
    all
}

/// Fails, with the differences, unless both trees are the same.
pub fn assert_same(expected: &Tree, found: &Tree, what: &str) {
    let all = differences(expected, found);
    let list: Vec<_> = all.iter().take(40).map(ToString::to_string).collect();
    assert!(all.is_empty(), "{what}: {} differences:\n{}", all.len(), list.join("\n"));
}
