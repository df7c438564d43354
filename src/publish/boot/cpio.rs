//! Writes an initramfs: a cpio archive in the form that Linux unpacks (`newc`).
//!
//! ```text
//! header: `070701`, 13 numbers of 8 hex digits   name, NUL, padding to 4 bytes   content, padding to 4 bytes
//! ...
//! a last entry named `TRAILER!!!`
//! ```
//!
//! Source: Documentation/driver-api/early-userspace/buffer-format.rst of Linux. The same files give the same bytes:
//! entries are in the order of their names, owned by root, with the time 0; folders come before what is in them.

use std::collections::BTreeMap;
use std::io::Read;

use crate::digest::{Digest, Hasher};

/// Type and permission bits of a folder, a regular file and a link (stat(2), `st_mode`).
const FOLDER: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_777;

/// zstd's level for an initramfs.
const LEVEL: i32 = 15;

/// Why an archive cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpioError {
    /// Two different things would have one name.
    #[error("/{path} would be two different files in the initramfs")]
    Twice {
        /// The path, without the leading slash.
        path: String,
    },
    /// The format has 32 bits for a size.
    #[error("/{path} has {bytes} bytes, too many for an initramfs")]
    TooBig {
        /// The path, without the leading slash.
        path: String,
        /// Its size in bytes.
        bytes: usize,
    },
    /// zstd failed.
    #[error("cannot compress the initramfs: {0}")]
    Compress(String),
    /// It is not zstd, or larger than is read.
    #[error("cannot decompress it: {0}")]
    Decompress(String),
    /// It is not an archive that mosfs writes.
    #[error("at byte {at}: {what}, expected an archive as mosfs writes it")]
    NotOurs {
        /// Where, in bytes.
        at: usize,
        /// What is there.
        what: &'static str,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    mode: u32,
    content: Vec<u8>,
}

/// The files of an initramfs.
#[derive(Debug, Default)]
pub(super) struct Archive {
    /// By path, without a leading slash. A folder sorts before what is in it.
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// Adds a folder and those above it.
    ///
    /// # Errors
    /// [`CpioError::Twice`] if one of them is not a folder.
    pub(super) fn folder(&mut self, path: &str) -> Result<(), CpioError> {
        for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
            self.add(&path[..end], Entry { mode: FOLDER, content: Vec::new() })?;
        }
        Ok(())
    }

    /// Adds a regular file with these permission bits, and the folders above it.
    ///
    /// # Errors
    /// [`CpioError::Twice`] if there is something else of this name.
    pub(super) fn file(&mut self, path: &str, permissions: u32, content: Vec<u8>) -> Result<(), CpioError> {
        self.above(path)?;
        self.add(path, Entry { mode: REGULAR | permissions, content })
    }

    /// Adds a symbolic link, and the folders above it.
    ///
    /// # Errors
    /// [`CpioError::Twice`] if there is something else of this name.
    pub(super) fn link(&mut self, path: &str, target: &str) -> Result<(), CpioError> {
        self.above(path)?;
        self.add(path, Entry { mode: LINK, content: target.as_bytes().to_vec() })
    }

    fn above(&mut self, path: &str) -> Result<(), CpioError> {
        path.rsplit_once('/').map_or(Ok(()), |(folder, _)| self.folder(folder))
    }

    fn add(&mut self, path: &str, entry: Entry) -> Result<(), CpioError> {
        match self.entries.get(path) {
            None => drop(self.entries.insert(path.to_string(), entry)),
            Some(known) if *known == entry => {}
            Some(_) => return Err(CpioError::Twice { path: path.to_string() }),
        }
        Ok(())
    }

    /// Reads a compressed archive of at most `max` bytes that [`Archive::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`CpioError::Decompress`]; [`CpioError::NotOurs`] for any other archive, however good.
    pub(super) fn from_zstd(compressed: &[u8], max: usize) -> Result<Self, CpioError> {
        let failed = |error: std::io::Error| CpioError::Decompress(error.to_string());
        let mut bytes = Vec::new();
        let decoder = zstd::Decoder::new(compressed).map_err(failed)?;
        decoder.take(max as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() > max {
            return Err(CpioError::Decompress(format!("it has more than {max} bytes")));
        }
        let archive = Self::parse(&bytes)?;
        // Numbers, owners, times and padding have one form.
        if archive.to_bytes()? != bytes {
            return Err(CpioError::NotOurs { at: 0, what: "another form of the same files" });
        }
        Ok(archive)
    }

    fn parse(bytes: &[u8]) -> Result<Self, CpioError> {
        let mut archive = Self::default();
        let mut at = 0;
        loop {
            let wrong = |what| CpioError::NotOurs { at, what };
            let header = bytes.get(at..at + 110).ok_or_else(|| wrong("the end"))?;
            let number = |index: usize| {
                let digits = header.get(6 + 8 * index..14 + 8 * index).unwrap_or_default();
                let text = std::str::from_utf8(digits).ok()?;
                u32::from_str_radix(text, 16).ok().map(|number| number as usize)
            };
            let (Some(mode), Some(size), Some(name_size)) = (number(1), number(6), number(11)) else {
                return Err(wrong("no numbers"));
            };
            let name_at = at + 110;
            let name =
                bytes.get(name_at..name_at.saturating_add(name_size)).ok_or_else(|| wrong("the end"))?;
            let path = name.strip_suffix(b"\0").and_then(|name| std::str::from_utf8(name).ok());
            let path = path.ok_or_else(|| wrong("a name that is no text"))?;
            if path == "TRAILER!!!" {
                return Ok(archive);
            }
            let content_at = (name_at + name_size).next_multiple_of(4);
            let content =
                bytes.get(content_at..content_at.saturating_add(size)).ok_or_else(|| wrong("the end"))?;
            archive.add(path, Entry { mode: mode as u32, content: content.to_vec() })?;
            at = (content_at + size).next_multiple_of(4);
        }
    }

    /// Takes a file out, and returns its content.
    pub(super) fn take(&mut self, path: &str) -> Option<Vec<u8>> {
        self.entries.remove(path).map(|entry| entry.content)
    }

    /// Describes every entry, one a line: digest of the content, mode in octal, path.
    pub(super) fn list(&self, to: &mut Hasher) {
        for (path, entry) in &self.entries {
            to.update(format!("{} {:o} {path}\n", Digest::of(&entry.content).hex(), entry.mode).as_bytes());
        }
    }

    /// Returns the archive's bytes.
    ///
    /// # Errors
    /// [`CpioError::TooBig`].
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, CpioError> {
        let mut bytes = Vec::new();
        for (number, (path, entry)) in (1..).zip(&self.entries) {
            write(&mut bytes, number, path, entry.mode, &entry.content)?;
        }
        write(&mut bytes, 0, "TRAILER!!!", 0, &[])?;
        Ok(bytes)
    }

    /// Returns the archive compressed with zstd, as Linux unpacks it.
    ///
    /// # Errors
    /// [`CpioError`].
    pub(super) fn to_zstd(&self) -> Result<Vec<u8>, CpioError> {
        zstd::bulk::compress(&self.to_bytes()?, LEVEL).map_err(|error| CpioError::Compress(error.to_string()))
    }
}

fn write(bytes: &mut Vec<u8>, number: u32, path: &str, mode: u32, content: &[u8]) -> Result<(), CpioError> {
    let too_big = || CpioError::TooBig { path: path.to_string(), bytes: content.len() };
    let size = u32::try_from(content.len()).map_err(|_| too_big())?;
    let name_size = u32::try_from(path.len() + 1).map_err(|_| too_big())?;
    // Inode number, mode, uid, gid, links, mtime, size, device (major, minor), rdev (the same), size of the name, sum.
    let numbers = [number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
    bytes.extend_from_slice(b"070701");
    numbers.iter().for_each(|number| bytes.extend_from_slice(format!("{number:08X}").as_bytes()));
    bytes.extend_from_slice(path.as_bytes());
    bytes.push(0);
    pad(bytes);
    bytes.extend_from_slice(content);
    pad(bytes);
    Ok(())
}

/// Every part begins at a multiple of 4 bytes.
fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_file_are_those_of_the_format() {
        let mut archive = Archive::default();
        archive.file("a", 0o644, b"hello".to_vec()).unwrap();
        let bytes = archive.to_bytes().unwrap();
        let expected = "07070100000001000081A400000000000000000000000100000000000000050000000000000000000000000000000000000002\
                        00000000a\0hello\0\0\0";
        assert_eq!(String::from_utf8_lossy(&bytes[..expected.len()]), expected);
        assert!(String::from_utf8_lossy(&bytes[expected.len()..]).contains("TRAILER!!!"));
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn the_order_of_adding_changes_nothing() {
        let make = |paths: &[&str]| {
            let mut archive = Archive::default();
            paths.iter().for_each(|path| archive.file(path, 0o755, path.as_bytes().to_vec()).unwrap());
            archive.to_zstd().unwrap()
        };
        assert_eq!(make(&["b/c", "a", "b/a"]), make(&["a", "b/a", "b/c", "a"]));
    }

    #[test]
    fn an_archive_is_read_back_and_no_other_form_of_it() {
        let mut archive = Archive::default();
        archive.file("etc/a", 0o644, b"hello".to_vec()).unwrap();
        archive.link("init", "usr/bin/mosfs").unwrap();
        let zstd = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).unwrap();
        let bytes = archive.to_bytes().unwrap();
        let mut read = Archive::from_zstd(&zstd(&bytes), bytes.len()).unwrap();
        assert_eq!(read.entries, archive.entries);
        assert_eq!(read.take("etc/a").as_deref(), Some(&b"hello"[..]));
        assert_eq!(read.take("etc/a"), None);
        let error = Archive::from_zstd(&zstd(&bytes), bytes.len() - 1).unwrap_err();
        assert!(matches!(error, CpioError::Decompress(_)), "{error}");
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            if let Ok(read) = Archive::from_zstd(&zstd(&changed), bytes.len()) {
                assert_ne!(read.entries, archive.entries, "byte {at}");
            }
            assert!(Archive::from_zstd(&zstd(&bytes[..at]), bytes.len()).is_err(), "{at} bytes");
        }
        assert!(Archive::from_zstd(&zstd(&[bytes, vec![0; 4]].concat()), 1 << 20).is_err());
        assert!(Archive::from_zstd(b"no zstd", 1 << 20).is_err());
    }

    #[test]
    fn one_name_is_one_file() {
        let mut archive = Archive::default();
        archive.file("usr/bin/a", 0o755, b"1".to_vec()).unwrap();
        let twice = |path: &str| Err(CpioError::Twice { path: path.into() });
        assert_eq!(archive.file("usr/bin/a", 0o755, b"2".to_vec()), twice("usr/bin/a"));
        assert_eq!(archive.link("usr/bin/a", "b"), twice("usr/bin/a"));
        assert_eq!(archive.file("usr/bin/a/b", 0o755, Vec::new()), twice("usr/bin/a"));
    }
}
