//! An image in a registry that can be spoiled, and mounts of it.

#[path = "../common/wait.rs"]
mod wait;

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mosfs::internals::convert::puzzlefs::{Limits, pack};
use mosfs::internals::digest::Digest;
use mosfs::internals::image::oci::Descriptor;
use mosfs::internals::mount::{MountPlan, Verification, open_tree};
use mosfs::internals::progress::Progress;
use serde_json::Value;

use crate::place::{Place, display, layers_of, load, noise, system_of, text};
use crate::server::{Options, Seen, Server};

pub use wait::wait_until;

/// How many files the image has, and how long each is, in bytes. They cannot be compressed much.
pub const FILES: usize = 24;
pub const FILE_BYTES: usize = 150_000;

/// An image of two layers in a registry.
pub struct Lazy {
    pub place: Place,
    pub server: Server,
    /// The layers, the bottom one first.
    pub layers: Vec<Descriptor>,
    /// The digest of its manifest.
    pub image: Digest,
}

impl Lazy {
    pub fn new() -> Self {
        Self::served_by(Options::default())
    }

    pub fn served_by(options: Options) -> Self {
        Self::of_layers(options, |place| {
            let low = place.publisher.add_image(&squashfs(place, "low", 0..FILES / 2));
            let high = place.publisher.add_image(&squashfs(place, "high", FILES / 2..FILES));
            vec![low, high]
        })
    }

    /// The same files as chunks (PuzzleFS): the blob of metadata, then the chunks.
    pub fn chunked() -> Self {
        Self::of_layers(Options::default(), |place| {
            let layer = place.publisher.add_image(&squashfs(place, "all", 0..FILES));
            let digest = place.publisher.publish_layers(199, vec![layer], true);
            let store = place.publisher.store();
            assert!(store.resolve(&format!("mos/system/system:sha256/{}", digest.hex())).is_ok());
            let image = system_of(&store, 199).1.remove(0).1;
            let plan = MountPlan::new("image", &image, &store.blobs(), Verification::default()).unwrap();
            let (view, writer) = (open_tree(&plan).unwrap(), store.writer().unwrap());
            pack(&view, &writer, Limits::default(), NonZeroUsize::MIN, &Progress::silent()).unwrap().layers
        })
    }

    fn of_layers(options: Options, make: impl FnOnce(&Place) -> Vec<Descriptor>) -> Self {
        let (place, server) = (Place::new(), Server::start(options));
        let layers = make(&place);
        place.publisher.publish_layers(200, layers, true);
        let store = place.publisher.store();
        load(&store, 200, "p", &server);
        let layers = layers_of(&store, 200);
        let image = system_of(&store, 200).1[0].1.digest;
        Self { place, server, layers, image }
    }

    /// The image by its tag.
    pub fn source(&self) -> String {
        self.server.source(&format!("p/mos/images/hostfs:{}", self.image.hex()))
    }

    /// The image by its digest.
    pub fn pinned(&self) -> String {
        self.server.source(&format!("p/mos/images/hostfs@{}", self.image))
    }

    /// Where mounts of this test keep what they fetch.
    pub fn cache(&self) -> PathBuf {
        self.place.path("cache")
    }

    /// The command that mounts at a folder of the test's.
    pub fn command(&self, source: &str, at: &str, options: &[&str]) -> Command {
        let at = self.place.path(at);
        fs::create_dir_all(&at).unwrap();
        let (cache, at) = (display(&self.cache()), display(&at));
        let mut args = vec!["mount", "--store", &cache];
        args.extend(options);
        args.extend([source, at.as_str()]);
        let mut command = self.place.command(&args);
        command.stdin(Stdio::null());
        command
    }

    /// Mounts the image, with two seconds of patience unless it is said otherwise.
    pub fn mount_with(&self, at: &str, options: &[&str]) -> Mount<'_> {
        let mut all = options.to_vec();
        if !options.contains(&"--net-timeout") {
            all.extend(["--net-timeout", "2"]);
        }
        self.mount_of(&self.source(), at, &all)
    }

    /// Mounts the image from another place.
    pub fn mount_of(&self, source: &str, at: &str, options: &[&str]) -> Mount<'_> {
        let output = self.command(source, at, options).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        self.mounted(at)
    }

    /// What was mounted at a folder of the test's.
    pub fn mounted(&self, at: &str) -> Mount<'_> {
        Mount { lazy: self, at: self.place.path(at).canonicalize().unwrap() }
    }

    /// Mounts the image so that only what is read is fetched.
    pub fn mount(&self, at: &str) -> Mount<'_> {
        self.mount_with(at, &["--no-fill"])
    }

    /// How many bytes of layers a log shows.
    pub fn fetched(&self, log: &[Seen]) -> u64 {
        self.parts(log).iter().map(|seen| seen.sent).sum()
    }

    /// The requests for layers.
    pub fn parts<'a>(&self, log: &'a [Seen]) -> Vec<&'a Seen> {
        log.iter().filter(|seen| self.layers.iter().any(|layer| seen.gets(&layer.digest))).collect()
    }

    /// The bytes of both layers.
    pub fn size(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).sum()
    }

    /// The partial file of a layer.
    pub fn part(&self, layer: usize) -> PathBuf {
        self.cache().join(".mosfs/lazy").join(self.layers[layer].digest.hex())
    }

    /// Whether a layer is a blob of the cache.
    pub fn is_whole(&self, layer: usize) -> bool {
        self.blob(&self.layers[layer].digest).exists()
    }

    /// A blob of the cache.
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.cache().join("blobs/sha256").join(digest.hex())
    }
}

/// A mount, undone when it is dropped.
pub struct Mount<'a> {
    lazy: &'a Lazy,
    pub at: PathBuf,
}

impl Mount<'_> {
    pub fn file(&self, number: usize) -> PathBuf {
        self.at.join(name(number))
    }

    /// Reads a file; the number of the error, if there is one.
    pub fn read(&self, number: usize) -> Result<(), i32> {
        match fs::read(self.file(number)) {
            Ok(bytes) => {
                assert!(bytes == content(number).as_bytes(), "file {number} has other bytes");
                Ok(())
            }
            Err(error) => Err(error.raw_os_error().expect("an error of the system")),
        }
    }

    pub fn read_all(&self) {
        for number in 0..FILES {
            assert_eq!(self.read(number), Ok(()), "file {number}");
        }
    }

    /// What `mosfs status --json` says of this mount.
    pub fn status(&self) -> Value {
        let output = self.lazy.place.run(&["status", "--json", "--floor", "file"]);
        let all: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let mounts = all["mounts"].as_array().expect("mounts").clone();
        mounts.into_iter().find(|one| one["target"] == *display(&self.at)).expect("the mount")
    }

    pub fn pid(&self) -> u32 {
        self.status()["daemon"]["pid"].as_u64().expect("a pid") as u32
    }

    /// The daemon's log.
    pub fn log(&self) -> String {
        let path = self.status()["daemon"]["log"].as_str().expect("a log").to_string();
        fs::read_to_string(path).unwrap_or_default()
    }

    pub fn kill(&self, signal: &str) {
        let pid = self.pid();
        assert!(Command::new("kill").arg(signal).arg(pid.to_string()).status().unwrap().success());
    }

    pub fn unmount(self) {
        let at = self.at.clone();
        drop(self);
        wait_until("the mount is gone", || !is_mounted(&at));
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.at).stderr(Stdio::null()).status();
        let _ = Command::new("umount").arg("-l").arg(&self.at).stderr(Stdio::null()).status();
    }
}

pub fn is_mounted(at: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(4) == at.to_str())
}

pub fn name(number: usize) -> String {
    format!("d{}/f{number}", number % 4)
}

/// What file `number` holds.
pub fn content(number: usize) -> String {
    noise(FILE_BYTES, number as u64 + 1)
}

/// A squashfs image of some of the files.
fn squashfs(place: &Place, name_of: &str, files: std::ops::Range<usize>) -> PathBuf {
    let (tree, image) = (place.path(&format!("{name_of}.tree")), place.path(&format!("{name_of}.image")));
    for number in files {
        let path = tree.join(name(number));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content(number)).unwrap();
    }
    let made = Command::new("mksquashfs")
        .args([&tree, &image])
        .args(["-comp", "zstd", "-noappend", "-quiet", "-no-progress", "-all-root", "-processors", "1"])
        .output()
        .unwrap_or_else(|error| panic!("cannot run mksquashfs: {error}; install `squashfs-tools`"));
    assert!(made.status.success(), "{}", text(&made.stderr));
    image
}
