//! Walks a tree and tells all there is to see of it, so that two trees can be compared.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// What there is to see of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Type as find(1) writes it: `d f l b c p s`.
    pub kind: char,
    /// The low 12 bits of st_mode.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Of all but folders, whose size is the file system's own business.
    pub size: Option<u64>,
    /// Seconds: squashfs keeps no fractions.
    pub mtime: i64,
    /// Of device nodes.
    pub rdev: Option<u64>,
    pub nlink: u64,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// SHA-256 of a file's content.
    pub content: Option<[u8; 32]>,
    /// Target of a link.
    pub target: Option<PathBuf>,
    /// Which files are the same one: the first path, in order, that has this inode.
    pub same_as: PathBuf,
}

/// All files of a tree with their paths below it, the root as the empty path. Stays in one file system.
pub fn walk(root: &Path) -> BTreeMap<PathBuf, Record> {
    let mut all = BTreeMap::new();
    let mut first = BTreeMap::new();
    let device = fs::symlink_metadata(root).unwrap().dev();
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        let full = if path.as_os_str().is_empty() { root.to_path_buf() } else { root.join(&path) };
        let found = fs::symlink_metadata(&full).unwrap_or_else(|error| panic!("{}: {error}", full.display()));
        if found.dev() != device {
            continue;
        }
        let kind = found.file_type();
        if kind.is_dir() {
            let list = fs::read_dir(&full).unwrap_or_else(|error| panic!("{}: {error}", full.display()));
            todo.extend(list.map(|entry| path.join(entry.unwrap().file_name())));
        }
        let letter = match kind {
            _ if kind.is_dir() => 'd',
            _ if kind.is_file() => 'f',
            _ if kind.is_symlink() => 'l',
            _ if kind.is_block_device() => 'b',
            _ if kind.is_char_device() => 'c',
            _ if kind.is_fifo() => 'p',
            _ => 's',
        };
        first
            .entry(found.ino())
            .and_modify(|known: &mut PathBuf| {
                if path < *known {
                    known.clone_from(&path);
                }
            })
            .or_insert_with(|| path.clone());
        let record = Record {
            kind: letter,
            mode: found.mode() & 0o7777,
            uid: found.uid(),
            gid: found.gid(),
            size: (!kind.is_dir()).then(|| found.size()),
            mtime: found.mtime(),
            rdev: matches!(letter, 'b' | 'c').then(|| found.rdev()),
            nlink: found.nlink(),
            xattrs: xattrs(&full),
            content: kind.is_file().then(|| hash(&full)),
            target: kind.is_symlink().then(|| fs::read_link(&full).unwrap()),
            same_as: PathBuf::new(),
        };
        all.insert(path, (found.ino(), record));
    }
    all.into_iter()
        .map(|(path, (ino, record))| (path, Record { same_as: first[&ino].clone(), ..record }))
        .collect()
}

fn hash(path: &Path) -> [u8; 32] {
    let mut file = fs::File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 128 << 10]);
    loop {
        match file.read(&mut buffer).unwrap_or_else(|error| panic!("{}: {error}", path.display())) {
            0 => return hasher.finalize().into(),
            count => hasher.update(&buffer[..count]),
        }
    }
}

/// The extended attributes of a file; none where the file system has none at all.
#[allow(unsafe_code)]
pub fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let c_path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut names = vec![0u8; 64 << 10];
    // SAFETY: the path is NUL-terminated and the buffer has the length that is given.
    let len = unsafe { libc::llistxattr(c_path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    if len < 0 {
        let error = std::io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTSUP), "{}: {error}", path.display());
        return BTreeMap::new();
    }
    names.truncate(len as usize);
    let mut all = BTreeMap::new();
    for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let c_name = CString::new(name).unwrap();
        let mut value = vec![0u8; 64 << 10];
        // SAFETY: both names are NUL-terminated and the buffer has the length that is given.
        let len = unsafe {
            libc::lgetxattr(c_path.as_ptr(), c_name.as_ptr(), value.as_mut_ptr().cast(), value.len())
        };
        let error = std::io::Error::last_os_error();
        assert!(len >= 0, "{} {}: {error}", path.display(), OsStr::from_bytes(name).display());
        value.truncate(len as usize);
        all.insert(name.to_vec(), value);
    }
    all
}

/// Ends the test where two trees differ, naming the first differences.
pub fn assert_same(what: &str, expected: &BTreeMap<PathBuf, Record>, found: &BTreeMap<PathBuf, Record>) {
    let mut differences = Vec::new();
    for path in expected.keys().chain(found.keys().filter(|path| !expected.contains_key(*path))) {
        let (expected, found) = (expected.get(path), found.get(path));
        if expected != found {
            differences.push(format!("{}:\n  expected {expected:?}\n  found    {found:?}", path.display()));
        }
    }
    let shown = differences.iter().take(5).cloned().collect::<Vec<_>>().join("\n");
    assert!(differences.is_empty(), "{what}: {} of {} differ\n{shown}", differences.len(), expected.len());
}
