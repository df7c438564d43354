//! Files that are read whole, and files that are written once.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{IoContext, IoError};

/// Reads an open file whole, or one byte more than `max` of it.
pub(super) fn read_at_most(file: impl Read, path: &Path, max: usize) -> Result<Vec<u8>, IoError> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_end(&mut bytes).on("read", path)?;
    Ok(bytes)
}

/// A new file that has its content, but not its name yet.
pub(super) struct NewFile {
    /// Its name in the folder.
    pub name: &'static str,
    /// Its content.
    pub bytes: Vec<u8>,
    /// Its mode.
    pub mode: u32,
}

/// Writes new files into a folder. None of them appears with part of its content, and none
/// replaces a file that is there: each is written into a temporary folder, and linked to its
/// name, which fails if the name is taken. If one cannot be linked, those before it are removed.
///
/// `after` is called once each file has its name.
pub(super) fn write_new(dir: &Path, files: &[NewFile], mut after: impl FnMut(&str)) -> Result<(), IoError> {
    fs::create_dir_all(dir).on("create", dir)?;
    let scratch = Scratch::new(dir)?;
    for file in files {
        let path = scratch.0.join(file.name);
        let mut open = OpenOptions::new();
        let mut handle = open.write(true).create_new(true).mode(file.mode).open(&path).on("create", &path)?;
        handle.write_all(&file.bytes).on("write", &path)?;
        handle.sync_all().on("sync", &path)?;
    }
    let mut done: Vec<PathBuf> = Vec::new();
    for file in files {
        let path = dir.join(file.name);
        if let Err(error) = fs::hard_link(scratch.0.join(file.name), &path).on("create", &path) {
            for path in done {
                let _ = fs::remove_file(path);
            }
            return Err(error);
        }
        done.push(path);
        sync_dir(dir)?;
        after(file.name);
    }
    Ok(())
}

fn sync_dir(dir: &Path) -> Result<(), IoError> {
    File::open(dir).and_then(|dir| dir.sync_all()).on("sync", dir)
}

/// A temporary folder that goes with its last user.
struct Scratch(PathBuf);

impl Scratch {
    fn new(dir: &Path) -> Result<Self, IoError> {
        // A crash leaves its folder behind, and process ids come again: another number then.
        let mut attempt = 0;
        loop {
            let path = dir.join(format!(".new.{}.{attempt}", std::process::id()));
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < 1000 => attempt += 1,
                outcome => return outcome.on("create", &path).map(|()| Self(path)),
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _: io::Result<()> = fs::remove_dir_all(&self.0);
    }
}
