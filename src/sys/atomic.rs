//! Atomic changes of files: write a temporary file, sync, rename, sync the folder. These functions write
//! everything that mosfs stores on a disk.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::failpoint;
use crate::error::{IoContext, IoError};
use crate::sys::file;

/// Replaces `path` with a file of these bytes and this mode, so that a crash leaves either the complete old
/// file or the complete new one. The caller holds the lock that guards `path`.
///
/// `failpoint` names the commit points: `NAME.written`, `NAME.renamed`.
pub fn replace(path: &Path, bytes: &[u8], mode: u32, failpoint: &str) -> io::Result<()> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(".new");
    replace_through(&folder_of(path).join(name), path, bytes, mode, failpoint)
}

/// Like [`replace`], with a temporary file of this name, which must be on the same file system.
pub fn replace_through(
    temporary: &Path,
    path: &Path,
    bytes: &[u8],
    mode: u32,
    failpoint: &str,
) -> io::Result<()> {
    // A temporary file of an earlier crash may be overwritten: the caller holds the lock.
    match fs::remove_file(temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    write_new(temporary, bytes, mode)?;
    failpoint::hit(&format!("{failpoint}.written"));
    publish(temporary, path, failpoint)
}

/// Writes a new file and syncs it; its name is not synced yet. An error leaves no file.
///
/// The mode is exact, whatever the umask, on a file system that has modes.
pub fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    let written = (|| {
        file.write_all(bytes)?;
        // The umask can only have cleared bits, so a failure does not grant more access.
        let _ = file.set_permissions(Permissions::from_mode(mode));
        file.sync_all()
    })();
    // Free the space: a full disk is the likeliest cause of failure.
    written.inspect_err(|_| {
        let _ = fs::remove_file(path);
    })
}

/// Renames a synced file to its name, replacing any file there, and syncs the name.
///
/// `failpoint` names the commit point: `NAME.renamed`.
pub fn publish(temporary: &Path, path: &Path, failpoint: &str) -> io::Result<()> {
    fs::rename(temporary, path)?;
    failpoint::hit(&format!("{failpoint}.renamed"));
    sync_folder(folder_of(path))
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new file, for [`create`].
pub struct NewFile {
    /// Its name in the folder.
    pub name: &'static str,
    /// Its content.
    pub bytes: Vec<u8>,
    /// Its mode.
    pub mode: u32,
}

/// Writes new files into a folder, which is created if missing. No file appears with partial content, and
/// none replaces an existing file: each is written into a temporary folder and linked to its name, which
/// fails if the name exists. If one cannot be linked, those before it are removed.
///
/// `after` is called after each file is linked.
///
/// # Errors
/// With the path.
pub fn create(dir: &Path, files: &[NewFile], mut after: impl FnMut(&str)) -> Result<(), IoError> {
    file::create_folders(dir)?;
    let scratch = Scratch::new(dir)?;
    for file in files {
        let path = scratch.path.join(file.name);
        write_new(&path, &file.bytes, file.mode).on("write", &path)?;
    }
    let mut done: Vec<PathBuf> = Vec::new();
    for file in files {
        let path = dir.join(file.name);
        if let Err(error) = fs::hard_link(scratch.path.join(file.name), &path).on("create", &path) {
            for path in done {
                let _ = fs::remove_file(path);
            }
            return Err(error);
        }
        done.push(path);
        sync_folder(dir).on("sync", dir)?;
        after(file.name);
    }
    Ok(())
}

/// A temporary folder that is removed on drop and locked until then. The next call removes what a crash left.
struct Scratch {
    path: PathBuf,
    /// Locked until it is closed.
    _lock: File,
}

/// The prefix of their names.
const SCRATCH: &str = ".new.";

impl Scratch {
    fn new(dir: &Path) -> Result<Self, IoError> {
        Self::sweep(dir);
        let mut attempt = 0;
        loop {
            let path = dir.join(format!("{SCRATCH}{}.{attempt}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                // Process ids are reused.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < 1000 => {
                    attempt += 1;
                    continue;
                }
                outcome => outcome.on("create", &path)?,
            }
            let lock = match File::open(&path) {
                Ok(lock) => lock,
                // Another process removed it before it was locked.
                Err(error) if error.kind() == io::ErrorKind::NotFound && attempt < 1000 => {
                    attempt += 1;
                    continue;
                }
                outcome => outcome.on("open", &path)?,
            };
            lock.lock().on("lock", &path)?;
            let same = |at: io::Result<fs::Metadata>| at.map(|data| (data.dev(), data.ino())).ok();
            if same(fs::symlink_metadata(&path)) == same(lock.metadata()) {
                return Ok(Self { path, _lock: lock });
            }
            attempt += 1;
        }
    }

    /// Removes the folders that no process has locked. Best effort: they do no harm.
    fn sweep(dir: &Path) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if !is_folder || !entry.file_name().as_encoded_bytes().starts_with(SCRATCH.as_bytes()) {
                continue;
            }
            if let Ok(folder) = File::open(entry.path())
                && folder.try_lock().is_ok()
            {
                let _: io::Result<()> = fs::remove_dir_all(entry.path());
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _: io::Result<()> = fs::remove_dir_all(&self.path);
    }
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
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn new_files_replace_nothing_and_come_together() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("made");
        let file = |name, bytes: &[u8]| NewFile { name, bytes: bytes.to_vec(), mode: 0o640 };
        create(&dir, &[file("b", b"one")], |_| ()).unwrap();
        let mode = fs::metadata(dir.join("b")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o640, "the umask does not matter");
        let error = create(&dir, &[file("a", b"two"), file("b", b"two")], |_| ()).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(error.path, dir.join("b"));
        assert_eq!(fs::read(dir.join("b")).unwrap(), b"one");
        assert_eq!(
            fs::read_dir(&dir).unwrap().count(),
            1,
            "neither the first nor a temporary folder is left"
        );
        // The next call removes what a crash left; a folder in use stays.
        let (dead, busy) = (dir.join(".new.4000000000.0"), dir.join(".new.4000000001.0"));
        for folder in [&dead, &busy] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("secret.key"), "half").unwrap();
        }
        let lock = File::open(&busy).unwrap();
        lock.lock().unwrap();
        create(&dir, &[file("c", b"three")], |_| ()).unwrap();
        assert!(!dead.exists() && busy.exists());
        // Not by closing it: a child that another test has just forked may still have a copy of the descriptor.
        lock.unlock().unwrap();
        create(&dir, &[file("d", b"four")], |_| ()).unwrap();
        assert!(!busy.exists());
    }
}
