//! OCI layouts with squashfs and erofs layers, and `mosfs mount` of them.

#![allow(dead_code)]

#[path = "wait.rs"]
mod wait;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use mosfs::internals::digest::Digest;
use mosfs::internals::image::verity;
use mosfs::internals::progress::Progress;
use serde_json::json;

#[allow(unused_imports, reason = "not all tests wait")]
pub use wait::wait_until;

/// An OCI layout that is made by hand, so that it can be wrong.
pub struct Layout {
    pub dir: PathBuf,
}

/// A sealed layer, as its descriptor.
#[derive(Clone)]
pub struct LayerBlob {
    pub digest: Digest,
    pub root_hash: Digest,
    pub descriptor: serde_json::Value,
}

impl Layout {
    pub fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { dir: dir.to_path_buf() }
    }

    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    /// Seals a squashfs image with a verity tree and puts it in.
    pub fn layer(&self, image: &Path) -> LayerBlob {
        let mut bytes_used = [0; 8];
        // Field bytes_used of the squashfs superblock.
        File::open(image).unwrap().read_exact_at(&mut bytes_used, 40).unwrap();
        let media_type = "application/vnd.stacker.image.layer.squashfs+zstd";
        self.layer_of(image, media_type, u64::from_le_bytes(bytes_used))
    }

    /// Seals an erofs image with a verity tree and puts it in.
    pub fn erofs_layer(&self, image: &Path) -> LayerBlob {
        let media_type = "application/vnd.stacker.image.layer.erofs+lz4hc";
        self.layer_of(image, media_type, fs::metadata(image).unwrap().len())
    }

    fn layer_of(&self, image: &Path, media_type: &str, data_bytes: u64) -> LayerBlob {
        let temp = self.dir.join("temp");
        fs::copy(image, &temp).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&temp).unwrap();
        let threads = NonZeroUsize::new(2).unwrap();
        let sealed = verity::seal(&file, data_bytes, threads, &Progress::silent()).unwrap();
        fs::rename(&temp, self.blob(&sealed.digest)).unwrap();
        let descriptor = json!({
            "mediaType": media_type,
            "digest": sealed.digest.to_string(),
            "size": sealed.size_bytes,
            "annotations": { "io.stackeroci.stacker.atomfs_verity_root_hash": sealed.root_hash.hex() },
        });
        LayerBlob { digest: sealed.digest, root_hash: sealed.root_hash, descriptor }
    }

    fn put(&self, media_type: &str, value: &serde_json::Value) -> serde_json::Value {
        let bytes = serde_json::to_vec(value).unwrap();
        let digest = Digest::of(&bytes);
        fs::write(self.blob(&digest), &bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest.to_string(), "size": bytes.len() })
    }

    /// Names an image of these layers, the bottom one first; the only image of the layout.
    pub fn image(&self, name: &str, layers: &[serde_json::Value]) {
        let machine = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let config = json!({ "architecture": machine, "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [] } });
        let config = self.put("application/vnd.oci.image.config.v1+json", &config);
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers });
        let mut entry = self.put(media_type, &manifest);
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        let index = json!({ "schemaVersion": 2, "manifests": [entry] });
        fs::write(self.dir.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    }

    /// What `mosfs mount` takes.
    pub fn source(&self, name: &str) -> String {
        format!("oci:{}:{name}", self.dir.display())
    }
}

/// Opens a blob for changing bytes in it.
pub fn open_rw(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// The program under test.
pub fn mosfs() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mosfs"));
    command.stdin(Stdio::null());
    command
}

/// Runs `mosfs` and returns what it says.
pub fn run_mosfs<S: AsRef<OsStr>>(args: &[S]) -> Output {
    mosfs().args(args).output().unwrap()
}

/// A mount made by `mosfs mount`, undone when it is dropped.
pub struct OurMount {
    pub at: PathBuf,
}

impl OurMount {
    pub fn new(source: &str, at: &Path, options: &[&str]) -> Self {
        fs::create_dir_all(at).unwrap();
        let output =
            mosfs().args(["mount", "--backend", "fuse"]).args(options).arg(source).arg(at).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "mosfs mount {source}: {}: {said}", output.status);
        Self { at: at.canonicalize().unwrap() }
    }

    /// The record in the register of mounts.
    pub fn record(&self) -> Option<mosfs::internals::mount::MountRecord> {
        mosfs::internals::mount::mounts().unwrap().into_iter().find(|record| record.target == self.at)
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.record().expect("the mount is in the register").daemon.expect("it has a daemon").pid
    }
}

impl Drop for OurMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).stderr(Stdio::null()).status();
    }
}

/// Whether a process is there.
pub fn is_alive(pid: u32) -> bool {
    mosfs::internals::sys::process::started_at(pid).is_some()
}

/// Sends a signal.
pub fn kill(signal: &str, pid: u32) {
    let status = Command::new("kill").arg(signal).arg(pid.to_string()).status().unwrap();
    assert!(status.success());
}

/// Opens a folder to everybody.
pub fn open_to_all(dir: &Path) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
}
