//! What the tests of this folder share: a publisher, a device, and `mosfs` between them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mosfs::internals::image::index::Index;
use mosfs::internals::image::oci::{
    Descriptor, INDEX, MANIFEST, MAX_MANIFEST_BYTES, OciImage, SYSTEM_REPOSITORY,
};
use mosfs::internals::manifest::SystemManifest;
use mosfs::internals::store::{Store, version_name};
use mosfs::internals::transport::Transport;
use tempfile::TempDir;

use crate::publish::{PRODUCT, Publisher};
use crate::server::Server;

/// How often each text is in the memory of a process, as a core dump by gdb shows it: one that obeys the filter of the
/// process, as gcore and the kernel do, and one of everything.
pub fn in_core_dumps(place: &Place, pid: u32, texts: &[&str]) -> Vec<(usize, usize)> {
    let count = |obeys: &str| -> Vec<usize> {
        let path = place.path("core");
        let make = format!("generate-core-file {}", display(&path));
        let output = Command::new("gdb")
            .args(["--batch", "--nx", "--pid", &pid.to_string()])
            .args(["--eval-command", &format!("set use-coredump-filter {obeys}"), "--eval-command", &make])
            .output()
            .unwrap_or_else(|error| panic!("cannot run gdb: {error}; install `gdb`"));
        assert!(path.exists(), "{}", text(&output.stderr));
        let count = |text: &&str| {
            let mut grep = Command::new("grep");
            grep.args(["--text", "--only-matching", "--fixed-strings", text]).arg(&path);
            let found = grep.output().unwrap().stdout;
            found.iter().filter(|byte| **byte == b'\n').count()
        };
        let counts = texts.iter().map(count).collect();
        std::fs::remove_file(&path).unwrap();
        counts
    };
    std::iter::zip(count("on"), count("off")).collect()
}

/// A publisher, and folders of a device.
pub struct Place {
    pub dir: TempDir,
    pub publisher: Publisher,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let publisher = Publisher::new(dir.path());
        Self { dir, publisher }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The publisher's store.
    pub fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// `mosfs` for this place: a home without settings, and little patience unless it is given.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mosfs"));
        command.args(args);
        let patient = args.contains(&"--net-timeout");
        if !patient && ["push", "pull", "install", "update", "build"].contains(&args[0]) {
            command.args(["--net-timeout", "2"]);
        }
        if ["install", "update"].contains(&args[0]) {
            command.args(["--floor", "file"]);
        }
        for variable in ["XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"] {
            command.env(variable, self.path("home"));
        }
        for variable in
            ["HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "REGISTRY_AUTH_FILE", "DOCKER_CONFIG"]
        {
            command.env_remove(variable).env_remove(variable.to_lowercase());
        }
        command
            .env("HOME", self.path("home"))
            .env("CONTAINERS_REGISTRIES_CONF", self.path("registries.conf"))
            .env("MOSFS_SYSTEM", self.path("system"))
            .env("MOSFS_CONFIG", self.path("config"))
            .env("MOSFS_RUN", self.path("run"))
            .env_remove("MOSFS_FAILPOINT");
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("mosfs runs")
    }

    /// Runs `mosfs`, which must succeed; what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "mosfs {args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs `mosfs`, which must fail with this exit code and say all of these words.
    pub fn refused(&self, args: &[&str], code: i32, words: &[&str]) -> String {
        refused(&self.run(args), code, words)
    }

    /// Pushes the highest version.
    pub fn push(&self, to: &str) -> String {
        self.ok(&["push", "--store", &display(&self.store()), to])
    }

    /// Pulls into a folder.
    pub fn pull(&self, from: &str, into: &str) -> String {
        self.ok(&["pull", from, "--store", &display(&self.path(into))])
    }

    /// The arguments of a first install.
    pub fn install_args(&self, from: &str) -> Vec<String> {
        let ca = display(&self.publisher.key("ca.pem"));
        ["install", from, "--ca", &ca, "--product", PRODUCT].map(str::to_string).to_vec()
    }

    pub fn install(&self, from: &str) -> String {
        let args = self.install_args(from);
        self.ok(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// A version with a hostfs of these layers, of incompressible bytes.
    pub fn publish(&self, version: u64, layers: &[usize]) {
        let layers = layers
            .iter()
            .enumerate()
            .map(|(at, bytes)| self.publisher.add_layer(&noise(*bytes, version * 100 + at as u64)));
        self.publisher.publish_layers(version, layers.collect(), true);
    }
}

/// Text that no compression makes shorter than three quarters of itself.
pub fn noise(bytes: usize, seed: u64) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(LETTERS[(state % 64) as usize])
    };
    (0..bytes).map(|_| next()).collect()
}

pub fn refused(output: &Output, code: i32, words: &[&str]) -> String {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    for word in words {
        assert!(said.contains(word), "it does not say `{word}`: {said}");
    }
    said
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn display(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_string()
}

/// The system manifest of a version in a store, and its targets' images.
pub fn system_of(store: &Store, version: u64) -> (SystemManifest, Vec<(String, OciImage)>) {
    let artifact = store.resolve(&version_name(version)).expect("the version");
    let transport: &dyn Transport = store.transport();
    let layer = transport.manifest(&artifact).expect("a manifest").layers[0].clone();
    let manifest =
        SystemManifest::parse(&transport.fetch(&layer, 4 << 20).expect("its JSON")).expect("a system");
    let images = manifest
        .targets
        .iter()
        .map(|(name, target)| (name.to_string(), store.image(&target.digest).expect("an image")))
        .collect();
    (manifest, images)
}

/// Every layer of a version, as descriptors.
pub fn layers_of(store: &Store, version: u64) -> Vec<Descriptor> {
    let (_, images) = system_of(store, version);
    images.iter().flat_map(|(_, image)| image.manifest.layers.clone()).collect()
}

/// Puts a version of a store into a test's registry, as `push` does, without asking it.
pub fn load(store: &Store, version: u64, prefix: &str, server: &Server) {
    let (manifest, images) = system_of(store, version);
    let put = |repository: &str, manifest: &mosfs::internals::image::oci::Manifest| {
        for blob in manifest.layers.iter().chain([&manifest.config]) {
            server.put_blob(repository, &store.get(&blob.digest, u64::MAX).expect("a blob"));
        }
    };
    for (name, image) in &images {
        let repository = format!("{prefix}/mos/images/{name}");
        put(&repository, &image.manifest);
        let bytes = store.get(&image.digest, MAX_MANIFEST_BYTES).expect("a manifest");
        server.put_manifest(&repository, &image.digest.hex(), MANIFEST, &bytes);
    }
    let repository = format!("{prefix}/{SYSTEM_REPOSITORY}");
    let artifact = store.resolve(&version_name(version)).expect("the version");
    let transport: &dyn Transport = store.transport();
    let referrers = store.referrers(&artifact.digest, None).expect("referrers");
    for (tag, one) in [(version.to_string(), &artifact)]
        .into_iter()
        .chain(referrers.iter().enumerate().map(|(at, one)| (format!("{version}.{at}"), one)))
    {
        put(&repository, &transport.manifest(one).expect("a manifest"));
        let bytes = store.get(&one.digest, MAX_MANIFEST_BYTES).expect("a manifest");
        server.put_manifest(&repository, &tag, MANIFEST, &bytes);
    }
    // Where a client looks for them that finds no list of the registry's own.
    let mut index = Index::empty();
    index.manifests = referrers;
    let tag = format!("sha256-{}", artifact.digest.hex());
    server.put_manifest(&repository, &tag, INDEX, &index.to_bytes());
    assert_eq!(manifest.version, version);
}
