//! Images that the kernel mounts, to compare with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

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
        // A program that another test is starting holds what was open here until it is executed.
        let unmounted = (0..200).any(|_| {
            let status = Command::new("umount").arg("-q").arg(&self.0).status();
            let done = status.is_ok_and(|status| status.success());
            if !done {
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            done
        });
        assert!(unmounted || std::thread::panicking(), "{} stays mounted", self.0.display());
    }
}
