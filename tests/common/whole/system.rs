//! A publisher and a device: keys, import manifests, builds, mounts, through the program itself.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mosfs::internals::digest::Digest;
use mosfs::internals::store::Store;
use tempfile::TempDir;

use super::commands::{command, mosfs, run};
use super::debian::cache;
use super::unmount::unmount;

/// The product of all tests.
pub const PRODUCT: &str = "de6c82c5-2e01-4c92-949b-a6545d30fc06";

/// A folder for one test, on the disk where `target` is.
pub fn scratch() -> TempDir {
    tempfile::Builder::new().prefix("scratch-").tempdir_in(cache()).expect("make a folder")
}

/// Makes the keys in `dir/keys`.
pub fn keys(dir: &Path) -> PathBuf {
    let keys = dir.join("keys");
    run(mosfs().args(["keys", "generate"]).arg(&keys).args(["--product", PRODUCT]));
    keys
}

/// Writes an import manifest with one target `hostfs`, whose url is given.
pub fn import_manifest(path: &Path, url: &OsStr) {
    let url = url.to_str().expect("a path in UTF-8");
    let text = format!(
        "version: 1\nproduct: {PRODUCT}\ntargets:\n  hostfs:\n    url: \"{url}\"\n    version: 1.0.0\n    \
         service_type: hostfs\n    network: {{type: host}}\n"
    );
    fs::write(path, text).expect("write the import manifest");
}

/// The command `mosfs build FILE --store STORE` with the keys of that folder.
pub fn build(file: &Path, store: &Path, keys: &Path) -> Command {
    let mut command = mosfs();
    command.arg("build").arg(file).arg("--store").arg(store);
    command.arg("--key").arg(keys.join("signer.key")).arg("--cert").arg(keys.join("signer.pem"));
    command
}

/// The digest that `mosfs build` printed.
pub fn digest(printed: &str) -> Digest {
    printed.trim().parse().unwrap_or_else(|error| panic!("mosfs build printed `{printed}`: {error}"))
}

/// The name in a store of its only image of the target `hostfs`.
pub fn image_name(store: &Path) -> String {
    let names = Store::open(store).and_then(|store| store.names()).expect("list the names of the store");
    let mut images =
        names.into_iter().map(|(name, _)| name).filter(|name| name.starts_with("mos/images/hostfs:"));
    let name = images.next().expect("an image in the store");
    assert_eq!(images.next(), None, "one image");
    name
}

/// `oci:STORE:NAME`.
pub fn source(store: &Path, name: &str) -> String {
    format!("oci:{}:{name}", store.display())
}

/// A FUSE mount, unmounted when dropped.
pub struct Mounted {
    dir: PathBuf,
}

impl Mounted {
    /// Mounts a source at a folder, which is made.
    pub fn new(source: &str, dir: &Path) -> Self {
        fs::create_dir_all(dir).expect("make the mount point");
        run(mosfs().args(["mount", "--backend", "fuse", source]).arg(dir));
        Self { dir: dir.to_path_buf() }
    }

    /// A mount that was made already.
    pub fn of(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf() }
    }

    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Unmounts it.
    pub fn unmount(self) {
        unmount(mosfs().arg("umount").arg(&self.dir));
        std::mem::forget(self);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // After a failure.
        let _ = command("umount").arg("-l").arg(&self.dir).status();
    }
}
