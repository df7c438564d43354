//! Tar layers into erofs images, which `mkfs.erofs` packs.
//!
//! ```text
//! tar stream ──> squashfs image ──> tar stream ──> mkfs.erofs ──> erofs image ──> compared ──> sealed
//!   as it came     temporary          plain, sorted                with the first one
//! ```
//!
//! The first step is that of squashfs layers, so both formats have the same rules for whiteouts, links, attributes and
//! hostile streams. `mkfs.erofs` sees only what is left of them: a stream with each file once, in the order of names,
//! whiteouts as overlayfs has them. It needs no privilege for that, and reads nothing of this machine.
//!
//! The image depends on that stream, the options and the version of `mkfs.erofs`, not on threads, clock or folder: UUID and
//! build time are zero. Versions before [`OLDEST`] are refused: they read no tar stream (1.5 of Debian 12), or were not
//! tried.
//!
//! **Trust.** What `mkfs.erofs` made is read back through the reader that mounts use, and compared with what it was given,
//! every attribute and every byte. A version with a fault is an error here, and no wrong byte on a device.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use super::LowerLookup;
use super::puzzlefs::plan::Content;
use super::{Codec, ConvertError, Converted, Effort, Packing, Ready, TarLayer, examine};
use super::{tar, write_squashfs};
use crate::error::{Class, Classified};
use crate::image::erofs::Erofs;
use crate::image::overlay::{Merged, OverlayError, ROOT, Shown};
use crate::image::squashfs::Squashfs;
use crate::image::verified::PlainSource;
use crate::image::verity;
use crate::image::{Attr, FileType, LayerError};
use crate::progress::Progress;
use crate::sorting;

/// The program.
const PROGRAM: &str = "mkfs.erofs";
/// The oldest version that is used: major, minor. It reads tar streams since 1.7; 1.8.6 of Debian 13 is what was tried.
const OLDEST: (u32, u32) = (1, 8);
/// How much of a file is compared at a time, in bytes.
const COMPARED_BYTES: usize = 64 << 10;
/// The most of what the program says that is kept, in bytes.
const SAID_BYTES: u64 = 4 << 10;

/// Why an erofs image cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// The program cannot be started.
    #[error("cannot run {PROGRAM}: {0}")]
    Program(io::Error),
    /// The program is too old, or does not say how old it is.
    #[error("{PROGRAM} has version {found}, expected {}.{} or newer", OLDEST.0, OLDEST.1)]
    Version {
        /// What it says.
        found: String,
    },
    /// The program failed.
    #[error("{PROGRAM} failed ({status}): {said}")]
    Failed {
        /// How it ended.
        status: std::process::ExitStatus,
        /// The last it said.
        said: String,
    },
    /// The image is not what the program was given.
    #[error("the image that {PROGRAM} made is wrong: `{path}`: {what} is {found}, expected {expected}")]
    Differs {
        /// The file.
        path: String,
        /// What of it.
        what: &'static str,
        /// As it was given.
        expected: String,
        /// As it is in the image.
        found: String,
    },
    /// One of both images cannot be read.
    #[error("the image that {PROGRAM} made cannot be compared: {0}")]
    Read(#[from] OverlayError),
    /// One of both images cannot be opened.
    #[error("the image that {PROGRAM} made cannot be opened: {0}")]
    Open(#[from] LayerError),
}

impl Classified for ErofsError {
    fn class(&self) -> Class {
        Class::Failure
    }
}

/// Where temporary files are.
#[derive(Debug, Clone, Copy)]
pub struct Scratch<'a> {
    /// An empty file.
    pub file: &'a File,
    /// The folder in which the program makes its own.
    pub folder: &'a Path,
}

/// Checks that the program is there and is new enough.
///
/// # Errors
/// [`ErofsError::Program`], [`ErofsError::Version`].
pub fn check_program() -> Result<(), ErofsError> {
    let output =
        Command::new(PROGRAM).arg("-V").stdin(Stdio::null()).output().map_err(ErofsError::Program)?;
    let said = String::from_utf8_lossy(&output.stdout);
    let is_version = |word: &&str| word.starts_with(|first: char| first.is_ascii_digit());
    let found = said.split_whitespace().find(is_version).unwrap_or("unknown");
    let mut numbers = found.split(['.', '-']).map(|number| number.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST => Ok(()),
        _ => Err(ErofsError::Version { found: found.escape_default().to_string() }),
    }
}

/// Converts a tar layer into an erofs image with a verity tree, in `to`, an empty file.
///
/// # Errors
/// As [`super::convert_tar`], and [`ConvertError::Erofs`].
pub fn convert_tar(
    mut from: impl Read,
    layer: &TarLayer,
    to: &File,
    scratch: Scratch<'_>,
    effort: Effort,
    below: &mut LowerLookup<'_>,
    progress: &Progress,
) -> Result<Converted, ConvertError> {
    let temporary = Effort { packing: Packing::temporary(), ..effort };
    let (_, notes) = write_squashfs(&mut from, layer, scratch.file, temporary, below, progress)?;
    let task = progress.task("pack", &layer.digest.to_string(), None);
    let plain = |file: &File| -> Result<Arc<PlainSource>, ConvertError> {
        let source = PlainSource::unsafe_no_verity(file.try_clone()?);
        Ok(Arc::new(source.map_err(|source| ErofsError::Open(source.into()))?))
    };
    let given = Squashfs::open(plain(scratch.file)?).map_err(ErofsError::Open)?;
    let given = Merged::plain(Arc::new(given), Shown::default()).map_err(ErofsError::Read)?;
    run(&given, to, scratch.folder, effort)?;
    let made = Erofs::open(plain(to)?).map_err(ErofsError::Open)?;
    let made = Merged::plain(Arc::new(made), Shown::default()).map_err(ErofsError::Read)?;
    compare(&given, &made)?;
    drop(task);
    let Ready::NeedsTree(image_bytes) = examine(to, None, effort.threads, progress)? else {
        return Err(ConvertError::TreeWithoutRootHash);
    };
    let sealed = verity::seal(to, image_bytes, effort.threads, progress)?;
    Ok(Converted { sealed, notes })
}

/// Has the program pack a tree into `to`.
fn run(tree: &Merged, to: &File, folder: &Path, effort: Effort) -> Result<(), ConvertError> {
    let Effort { threads, packing } = effort;
    let codec = match packing.codec() {
        Codec::Zstd => "zstd",
        Codec::Lz4 => "lz4hc",
    };
    let mut child = Command::new(PROGRAM)
        .args(["--quiet", "-d1", "--tar=f", "-T0", "--mkfs-time", "-Uclear", "-Eztailpacking"])
        .arg(format!("--workers={threads}"))
        .arg(format!("-z{codec},level={}", packing.level()))
        .arg(format!("-C{}", packing.block_bytes()))
        // The file has a name only while nobody renames its folder.
        .arg(format!("/proc/{}/fd/{}", std::process::id(), to.as_raw_fd()))
        // SOURCE_DATE_EPOCH would change times of files.
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("TMPDIR", folder)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(ErofsError::Program)?;
    let stderr = child.stderr.take();
    let listener = std::thread::spawn(move || {
        let mut said = Vec::new();
        if let Some(mut stderr) = stderr {
            let _ = stderr.by_ref().take(SAID_BYTES).read_to_end(&mut said);
            let _ = io::copy(&mut stderr, &mut io::sink());
        }
        said
    });
    let sent = match child.stdin.take() {
        Some(stdin) => send(tree, BufWriter::with_capacity(128 << 10, stdin)),
        None => Ok(()),
    };
    let status = child.wait().map_err(ErofsError::Program)?;
    let said = listener.join().unwrap_or_default();
    match sent {
        // A program that has failed does not read on: its own reason counts.
        Err(ConvertError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
        sent => sent?,
    }
    if !status.success() {
        let said = String::from_utf8_lossy(&said).trim().replace('\n', "; ");
        return Err(ErofsError::Failed { status, said }.into());
    }
    Ok(())
}

/// The bytes of a block of a tar stream.
const BLOCK: usize = 512;
/// The largest number in an octal field of 8 bytes, and in one of 12.
const MAX_OCTAL_8: u64 = (1 << 21) - 1;
const MAX_OCTAL_12: u64 = (1 << 33) - 1;

/// Writes a tree as a tar stream in the pax format (POSIX.1-2001).
fn send(tree: &Merged, mut out: impl Write) -> Result<(), ConvertError> {
    let mut first_names: HashMap<u64, Vec<u8>> = HashMap::new();
    let mut todo = vec![(ROOT, Vec::new())];
    while let Some((ino, path)) = todo.pop() {
        let attr = tree.attr(ino).map_err(ErofsError::Read)?;
        let is_folder = attr.kind == FileType::Directory;
        let first = (!is_folder && attr.nlink > 1).then(|| first_names.get(&ino).cloned()).flatten();
        let is_again = first.is_some();
        let link = match (first, attr.kind) {
            (Some(first), _) => first,
            (None, FileType::Symlink) => tree.read_link(ino).map_err(ErofsError::Read)?,
            (None, _) => Vec::new(),
        };
        let xattrs = if is_again { Vec::new() } else { tree.xattrs(ino).map_err(ErofsError::Read)? };
        let size = if is_again || attr.kind != FileType::Regular { 0 } else { attr.size_bytes };
        let name = if path.is_empty() { b"./".to_vec() } else { path.clone() };
        header(&mut out, &name, &attr, is_again, &link, &xattrs, size)?;
        if size > 0 {
            let mut content = Content::new(tree, VecDeque::from([(ino, size)]));
            let sent = io::copy(&mut content, &mut out)?;
            pad(&mut out, sent)?;
        }
        if is_folder {
            let mut entries = Vec::new();
            tree.read_dir(ino, 0, &mut |entry| {
                entries.push(entry);
                true
            })
            .map_err(ErofsError::Read)?;
            for entry in entries.into_iter().rev() {
                let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
                todo.push((entry.ino, [&path, slash, &entry.name].concat()));
            }
        } else if attr.nlink > 1 {
            first_names.entry(ino).or_insert(path);
        }
    }
    out.write_all(&[0; 2 * BLOCK])?;
    Ok(out.flush()?)
}

fn pad(out: &mut impl Write, written: u64) -> io::Result<()> {
    let rest = (written % BLOCK as u64) as usize;
    if rest > 0 { out.write_all(&[0; BLOCK][rest..]) } else { Ok(()) }
}

/// Writes the header of a file, with a pax header before it where it does not hold everything.
fn header(
    out: &mut impl Write,
    name: &[u8],
    attr: &Attr,
    is_hard_link: bool,
    link: &[u8],
    xattrs: &[(Vec<u8>, Vec<u8>)],
    size: u64,
) -> io::Result<()> {
    let mut records = Vec::new();
    let mut record = |key: &[u8], value: &[u8]| {
        // " key=value\n" behind the length of all of it, in which it counts itself.
        let rest = key.len() + value.len() + 3;
        let mut len = rest + 1;
        while len != rest + len.to_string().len() {
            len = rest + len.to_string().len();
        }
        records.extend_from_slice(len.to_string().as_bytes());
        for part in [b" ", key, b"=", value, b"\n"] {
            records.extend_from_slice(part);
        }
    };
    let mtime = u64::try_from(attr.mtime).unwrap_or(0);
    for (key, value) in [(&b"path"[..], name), (b"linkpath", link)] {
        if value.len() > 100 {
            record(key, value);
        }
    }
    let numbers = [
        (&b"uid"[..], u64::from(attr.uid), MAX_OCTAL_8),
        (b"gid", attr.gid.into(), MAX_OCTAL_8),
        (b"size", size, MAX_OCTAL_12),
    ];
    for (key, value, _) in numbers.iter().filter(|(_, value, max)| value > max) {
        record(key, value.to_string().as_bytes());
    }
    for (key, value) in xattrs {
        record(&[b"SCHILY.xattr.", &key[..]].concat(), value);
    }
    if !records.is_empty() {
        out.write_all(&block(b"pax", b"", 'x', 0, [0; 2], records.len() as u64, 0, [0; 2]))?;
        out.write_all(&records)?;
        pad(out, records.len() as u64)?;
    }
    let kind = match attr.kind {
        _ if is_hard_link => '1',
        FileType::Regular => '0',
        FileType::Symlink => '2',
        FileType::CharDevice => '3',
        FileType::BlockDevice => '4',
        FileType::Directory => '5',
        // A layer has no sockets: tar cannot hold them.
        FileType::Fifo | FileType::Socket => '6',
    };
    // As makedev(3) takes them apart again.
    let device = [attr.rdev >> 8 & 0xfff, attr.rdev & 0xff | attr.rdev >> 12 & 0xf_ff00];
    out.write_all(&block(name, link, kind, attr.permissions, [attr.uid, attr.gid], size, mtime, device))
}

/// A header. What does not fit stands in the pax header before it.
#[allow(clippy::too_many_arguments)]
fn block(
    name: &[u8],
    link: &[u8],
    kind: char,
    mode: u16,
    owner: [u32; 2],
    size: u64,
    mtime: u64,
    device: [u32; 2],
) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| {
        let bytes = &bytes[..bytes.len().min(BLOCK - at)];
        block[at..at + bytes.len()].copy_from_slice(bytes);
    };
    let octal = |value: u64, digits: usize| {
        let most = (1u64 << (3 * digits)) - 1;
        format!("{:0digits$o}\0", value.min(most)).into_bytes()
    };
    put(0, &name[..name.len().min(100)]);
    put(100, &octal(mode.into(), 7));
    put(108, &octal(owner[0].into(), 7));
    put(116, &octal(owner[1].into(), 7));
    put(124, &octal(size, 11));
    put(136, &octal(mtime, 11));
    put(148, b"        ");
    put(156, &[kind as u8]);
    put(157, &link[..link.len().min(100)]);
    put(257, b"ustar\x0000");
    put(329, &octal(device[0].into(), 7));
    put(337, &octal(device[1].into(), 7));
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    let sum = format!("{sum:06o}\0 ");
    block[148..156].copy_from_slice(sum.as_bytes());
    block
}

/// Compares two trees.
fn compare(given: &Merged, made: &Merged) -> Result<(), ConvertError> {
    let mut pairs = HashMap::from([(ROOT, ROOT)]);
    let mut todo = vec![(ROOT, ROOT, Vec::new())];
    while let Some((ino, found_ino, path)) = todo.pop() {
        let differs = |what, expected: String, found: String| {
            ConvertError::from(ErofsError::Differs { path: tar::show(&path), what, expected, found })
        };
        let attr = compare_attr(given, made, (ino, found_ino), &differs)?;
        match attr.kind {
            FileType::Directory => {
                let list = |tree: &Merged, ino| -> Result<Vec<_>, ErofsError> {
                    let mut all = Vec::new();
                    tree.read_dir(ino, 0, &mut |entry| {
                        all.push((entry.name, entry.ino));
                        true
                    })?;
                    Ok(all)
                };
                let (expected, found) = (list(given, ino)?, list(made, found_ino)?);
                let names = |all: &[(Vec<u8>, u64)]| -> Vec<String> {
                    all.iter().map(|(name, _)| tar::show(name)).collect()
                };
                if !expected.iter().map(|(name, _)| name).eq(found.iter().map(|(name, _)| name)) {
                    return Err(differs(
                        "the list of names",
                        names(&expected).join(" "),
                        names(&found).join(" "),
                    ));
                }
                for ((name, ino), (_, found_ino)) in expected.into_iter().zip(found) {
                    let path = [&path, &b"/"[..], &name].concat();
                    // The same files of the one tree are the same files of the other.
                    match pairs.insert(ino, found_ino) {
                        None => todo.push((ino, found_ino, path)),
                        Some(before) if before == found_ino => {}
                        Some(before) => {
                            let (what, expected) = ("the inode", before.to_string());
                            let (path, found) = (tar::show(&path), found_ino.to_string());
                            return Err(ErofsError::Differs { path, what, expected, found }.into());
                        }
                    }
                }
            }
            FileType::Regular => {
                let content = |tree, ino| Content::new(tree, VecDeque::from([(ino, attr.size_bytes)]));
                let (mut expected, mut found) = (content(given, ino), content(made, found_ino));
                let (mut left, mut at) = (attr.size_bytes, 0u64);
                let (mut one, mut other) = (vec![0; COMPARED_BYTES], vec![0; COMPARED_BYTES]);
                while left > 0 {
                    let now = left.min(COMPARED_BYTES as u64) as usize;
                    expected.read_exact(&mut one[..now])?;
                    let read = found.read_exact(&mut other[..now]);
                    read.map_err(|error| differs("the content", "readable".into(), error.to_string()))?;
                    if let Some(byte) = (0..now).find(|byte| one[*byte] != other[*byte]) {
                        let at = at + byte as u64;
                        let show = |byte: u8| format!("{byte:#04x} at {at}");
                        return Err(differs("the content", show(one[byte]), show(other[byte])));
                    }
                    left -= now as u64;
                    at += now as u64;
                }
            }
            FileType::Symlink => {
                let expected = given.read_link(ino).map_err(ErofsError::Read)?;
                let found = made.read_link(found_ino).map_err(ErofsError::Read)?;
                if expected != found {
                    return Err(differs("the target", tar::show(&expected), tar::show(&found)));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Compares what stat(2) and listxattr(2) show of a file. Returns the attributes.
fn compare_attr(
    given: &Merged,
    made: &Merged,
    (ino, found_ino): (u64, u64),
    differs: &dyn Fn(&'static str, String, String) -> ConvertError,
) -> Result<Attr, ConvertError> {
    let (expected, found) =
        (given.attr(ino).map_err(ErofsError::Read)?, made.attr(found_ino).map_err(ErofsError::Read)?);
    let is_folder = expected.kind == FileType::Directory;
    let has_size = matches!(expected.kind, FileType::Regular | FileType::Symlink);
    let is_device = matches!(expected.kind, FileType::CharDevice | FileType::BlockDevice);
    if expected.kind != found.kind {
        return Err(differs("the type", format!("{:?}", expected.kind), format!("{:?}", found.kind)));
    }
    type Field = (&'static str, fn(&Attr) -> i64, bool);
    let fields: [Field; 8] = [
        ("the mode", |attr| attr.permissions.into(), true),
        ("the owner", |attr| attr.uid.into(), true),
        ("the group", |attr| attr.gid.into(), true),
        ("the time", |attr| attr.mtime, true),
        ("the time's nanoseconds", |attr| attr.mtime_nanos.into(), true),
        ("the number of links", |attr| attr.nlink.into(), !is_folder),
        ("the size", |attr| attr.size_bytes as i64, has_size),
        ("the device number", |attr| attr.rdev.into(), is_device),
    ];
    for (what, field, _) in fields.iter().filter(|(_, _, counts)| *counts) {
        let (expected, found) = (field(&expected), field(&found));
        if expected != found {
            return Err(differs(what, expected.to_string(), found.to_string()));
        }
    }
    let sorted = |tree: &Merged, ino| -> Result<Vec<_>, ErofsError> {
        let mut all = tree.xattrs(ino)?;
        sorting::sort(&mut all);
        Ok(all)
    };
    let (one, other) = (sorted(given, ino)?, sorted(made, found_ino)?);
    if one != other {
        let names = |all: &[(Vec<u8>, Vec<u8>)]| -> String {
            let show =
                |(name, value): &(Vec<u8>, Vec<u8>)| format!("{}={}", tar::show(name), tar::show(value));
            all.iter().map(show).collect::<Vec<_>>().join(" ")
        };
        return Err(differs("the list of attributes", names(&one), names(&other)));
    }
    Ok(expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The records of a pax header count themselves, also where that makes their number longer.
    #[test]
    fn a_header_that_does_not_hold_everything_has_records_before_it() {
        let attr = Attr {
            kind: FileType::Regular,
            permissions: 0o4711,
            uid: u32::MAX - 1,
            gid: 5,
            size_bytes: 3,
            blocks_512: 0,
            mtime: i64::from(u32::MAX),
            mtime_nanos: 0,
            nlink: 1,
            rdev: 0,
            has_xattrs: true,
        };
        for len in 85..110 {
            let name = vec![b'n'; len];
            let mut out = Vec::new();
            header(&mut out, &name, &attr, false, b"", &[(b"user.x".to_vec(), vec![0, b'\n', 0xff])], 3)
                .unwrap();
            out.extend_from_slice(b"abc");
            pad(&mut out, 3).unwrap();
            out.extend_from_slice(&[0; 2 * BLOCK]);
            let mut read = tar::TarReader::new(&out[..]);
            let entry = read.next_entry().unwrap().unwrap();
            assert_eq!(entry.path, name);
            assert_eq!((entry.mode, entry.uid, entry.gid, entry.size), (0o4711, u32::MAX - 1, 5, 3));
        }
    }
}
