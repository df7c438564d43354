//! Images that the kernel mounts, to compare with.

#[path = "unmount.rs"]
mod unmount;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

#[allow(unused_imports, reason = "only some tests unmount anything else")]
pub use unmount::unmount;

/// A loop mount of an image, gone when it is dropped.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// Mounts an image of a file system at a folder, which is made if it is not there.
    pub fn of(kind: &str, image: &Path, folder: PathBuf) -> Self {
        fs::create_dir_all(&folder).unwrap();
        let output = Command::new("mount")
            .args(["-t", kind, "-o", "ro,loop"])
            .args([image, &folder])
            .output()
            .unwrap_or_else(|error| panic!("cannot run mount: {error}; install `mount`"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "mount of {} (as root): {said}", image.display());
        Self(folder)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let mut command = Command::new("umount");
        match std::thread::panicking() {
            true => drop(command.arg("-l").arg(&self.0).status()),
            false => unmount(command.arg(&self.0)),
        }
    }
}
