//! mkfs.erofs of Debian 13, also where this machine has an older one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder with a program `mkfs.erofs` 1.8 that runs on this machine: Debian 13's, with Debian 13's libraries.
///
/// It is made once (ten seconds, needs Debian's mirror), and kept in cargo's folder for test programs.
pub fn mkfs_erofs() -> PathBuf {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let lock = fs::File::create(cache.join("debian-13-erofs.lock")).unwrap();
    lock.lock().unwrap();
    let (root, bin) = (cache.join("debian-13-erofs"), cache.join("debian-13-erofs/bin-of-the-tests"));
    if bin.join("mkfs.erofs").exists() {
        return bin;
    }
    let _ = fs::remove_dir_all(&root);
    let made = Command::new("mmdebstrap")
        .args(["--quiet", "--variant=extract", "--include=erofs-utils", "trixie"])
        .arg(&root)
        .output()
        .unwrap_or_else(|error| panic!("cannot run mmdebstrap: {error}; install `mmdebstrap`"));
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "does this machine reach Debian's mirror? {said}");
    let libraries = root.join("usr/lib").join(format!("{}-linux-gnu", std::env::consts::ARCH));
    let loader = fs::read_dir(&libraries).unwrap().map(|entry| entry.unwrap().path());
    let loader = loader.filter(|path| path.file_name().unwrap().as_encoded_bytes().starts_with(b"ld-linux"));
    let loader = loader.max().expect("libc6 has a loader");
    let text = format!(
        "#!/bin/sh\nexec {} --library-path {} {} \"$@\"\n",
        loader.display(),
        libraries.display(),
        root.join("usr/bin/mkfs.erofs").display()
    );
    fs::create_dir(&bin).unwrap();
    program(&bin.join("mkfs.erofs"), &text);
    bin
}

/// Writes a program that is a script.
pub fn program(path: &Path, text: &str) {
    let temporary = path.with_extension("new");
    fs::write(&temporary, text).unwrap();
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(temporary, path).unwrap();
}

/// `PATH` with a folder before all others.
pub fn path_with(folder: &Path) -> std::ffi::OsString {
    let mut path = folder.as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    path
}
