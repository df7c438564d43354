//! Files that change as a whole: written beside, synced, renamed over, folder synced.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::failpoint;

/// Replaces `path` by a file of these bytes and this mode, so that a crash leaves the old file or
/// the new one, whole. The caller holds the lock that guards `path`.
///
/// `failpoint` names the commit points: `NAME.written`, `NAME.renamed`.
pub fn replace(path: &Path, bytes: &[u8], mode: u32, failpoint: &str) -> io::Result<()> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(".new");
    let temporary = folder.join(name);
    // A temporary file of an earlier crash is ours to overwrite: the caller holds the lock.
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()
    })();
    if let Err(error) = written {
        // Give the space back: a full disk is the likeliest reason to be here.
        let _ = std::fs::remove_file(&temporary);
        return Err(error);
    }
    failpoint::hit(&format!("{failpoint}.written"));
    std::fs::rename(&temporary, path)?;
    failpoint::hit(&format!("{failpoint}.renamed"));
    sync_folder(folder)
}

/// Exchanges two paths of one file system, so that each name always leads to one of them
/// (renameat2 with RENAME_EXCHANGE).
pub fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let c = |path: &Path| std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from);
    let (one, other) = (c(one)?, c(other)?);
    // SAFETY: both pointers are NUL-terminated strings that outlive the call.
    let answer = unsafe {
        libc::renameat2(libc::AT_FDCWD, one.as_ptr(), libc::AT_FDCWD, other.as_ptr(), libc::RENAME_EXCHANGE)
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Syncs a folder, so that the names in it survive a power cut.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Reads a file of at most `max_bytes`; a longer one is an error and is not read.
pub fn read_bounded(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        let why = format!("the file is longer than the {max_bytes} bytes that are allowed");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_and_leaves_nothing_beside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(folder.path().join(".file.new"), "left by a crash").unwrap();
        replace(&path, b"one", 0o600, "test").unwrap();
        replace(&path, b"two", 0o600, "test").unwrap();
        assert_eq!(read_bounded(&path, 3).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(read_bounded(&path, 2).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }
}
