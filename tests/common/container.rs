//! Images of containers, made of busybox, and a device that runs them.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mosfs::internals::digest::Digest;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The product of all systems here.
pub const PRODUCT: &str = "de6c82c5-2e01-4c92-949b-a6545d30fc06";

/// What busybox is called by in the images.
const APPLETS: [&str; 25] = [
    "cat", "chmod", "cp", "echo", "env", "false", "grep", "hostname", "httpd", "id", "ip", "kill", "ls",
    "mkdir", "mknod", "mount", "nc", "ping", "sh", "sleep", "stat", "touch", "true", "unshare", "wget",
];

/// An OCI layout with images of containers.
pub struct Images {
    dir: PathBuf,
    entries: Vec<Value>,
}

impl Images {
    /// An empty layout.
    pub fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { dir: dir.to_path_buf(), entries: Vec::new() }
    }

    /// The source of an image in an import manifest.
    pub fn url(&self, name: &str) -> String {
        format!("oci:{}:{name}", self.dir.display())
    }

    fn put(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.dir.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest.to_string(), "size": bytes.len() })
    }

    /// Adds an image of a folder, with this `config`.
    pub fn add(&mut self, name: &str, tree: &Path, config: &Value) {
        let mut tar = Command::new("tar");
        tar.args(["--create", "--numeric-owner", "--sort=name", "--mtime=@0", "--directory"])
            .arg(tree)
            .arg(".");
        let output = tar.output().expect("tar runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let layer = self.put("application/vnd.oci.image.layer.v1.tar", &output.stdout);
        let document = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
        });
        let config = self.put("application/vnd.oci.image.config.v1+json", document.to_string().as_bytes());
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer] });
        let mut entry = self.put(kind, manifest.to_string().as_bytes());
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        self.entries.push(entry);
        let index = json!({ "schemaVersion": 2, "manifests": self.entries });
        fs::write(self.dir.join("index.json"), index.to_string()).unwrap();
    }
}

/// Makes a root folder of busybox with a user `app` (1000), and what `more` adds.
pub fn busybox(root: &Path, more: impl FnOnce(&Path)) {
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::create_dir_all(root.join("home/app")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("/bin/busybox (Debian package busybox-static)");
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
        .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\napp:x:1000:\naudio:x:29:app\n").unwrap();
    let secret = root.join("home/app/secret");
    fs::write(&secret, "mine\n").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    chown(&secret, Some(1000), Some(1000)).unwrap();
    chown(root.join("home/app"), Some(1000), Some(1000)).unwrap();
    more(root);
}

/// A publisher and a device without systemd, whose containers run in the foreground.
pub struct World {
    dir: TempDir,
    /// The images.
    pub images: Images,
}

impl World {
    /// With an image `host`, and nothing installed.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::new(&dir.path().join("oci"));
        let mut world = Self { dir, images };
        world.image("host", &json!({}), |root| fs::write(root.join("content"), "host").unwrap());
        let keys = world.dir("keys");
        world.ok(&["keys", "generate", &keys, "--product", PRODUCT]);
        world
    }

    /// A path of this world.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    /// A path of this world as text.
    pub fn dir(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Adds an image of a folder that `fill` fills.
    pub fn image(&mut self, name: &str, config: &Value, fill: impl FnOnce(&Path)) {
        let tree = self.path(&format!("trees/{name}"));
        fs::create_dir_all(&tree).unwrap();
        fill(&tree);
        self.images.add(name, &tree, config);
    }

    /// Adds an image of busybox that runs a shell script.
    pub fn script(&mut self, name: &str, script: &str) {
        self.image(name, &json!({ "Entrypoint": ["/bin/sh", "-c"], "Cmd": [script] }), |root| {
            busybox(root, |_| ())
        });
    }

    /// Writes an import manifest of these targets: name, image, fields of its flow mapping. Container and network none
    /// unless they say otherwise.
    pub fn manifest(&self, version: u64, targets: &[(&str, &str, &str)]) -> String {
        let mut yaml = format!("version: {version}\nproduct: {PRODUCT}\ntargets:\n");
        let all = [("hostfs", "host", "service_type: hostfs, network: {type: host}")];
        for (name, image, fields) in all.iter().chain(targets) {
            let kind = if fields.contains("service_type") { "" } else { "service_type: container, " };
            let network = if fields.contains("network") { "" } else { "network: {type: none}, " };
            let url = self.images.url(image);
            yaml += &format!("  {name}: {{url: '{url}', version: '{version}', {kind}{network}{fields}}}\n");
        }
        let path = self.path("import.yaml");
        fs::write(&path, yaml).unwrap();
        path.display().to_string()
    }

    /// Builds and installs a version of these targets, and mounts them through FUSE.
    pub fn install(&self, targets: &[(&str, &str, &str)]) {
        let import = self.manifest(1, targets);
        self.install_file(&import);
    }

    /// Builds and installs an import manifest, and mounts its targets through FUSE.
    pub fn install_file(&self, import: &str) {
        let (store, key, cert) =
            (self.dir("store"), self.dir("keys/signer.key"), self.dir("keys/signer.pem"));
        self.ok(&["build", import, "--store", &store, "--key", &key, "--cert", &cert]);
        let source = format!("oci:{store}");
        self.ok(&[
            "install",
            &source,
            "--ca",
            &self.dir("keys/ca.pem"),
            "--product",
            PRODUCT,
            "--floor",
            "file",
        ]);
        self.ok(&["activate", "--floor", "file", "--backend", "fuse", "--daemon", "fork"]);
    }

    /// `mosfs` on this device, where the one hierarchy of control groups is mounted, as crun requires it.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "slave", "sh", "-c"]);
        command.arg("test -e /sys/fs/cgroup/cgroup.controllers || mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\"").arg("sh");
        command.arg(env!("CARGO_BIN_EXE_mosfs")).args(args);
        command
            .env("MOSFS_SYSTEM", self.path("system"))
            .env("MOSFS_CONFIG", self.path("config"))
            .env("MOSFS_RUN", self.path("run"))
            .env_remove("MOSFS_FAILPOINT")
            .env_remove("NOTIFY_SOCKET");
        command
    }

    /// Runs `mosfs`.
    pub fn run(&self, args: &[&str]) -> Output {
        // Mounts that must stay: not in a namespace of their own.
        let stays = ["activate", "mount"].contains(&args[0]) || args.contains(&"--mount-shifted");
        let mut command = if stays { self.plain(args) } else { self.command(args) };
        command.output().expect("mosfs runs")
    }

    fn plain(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mosfs"));
        command.args(args);
        command
            .env("MOSFS_SYSTEM", self.path("system"))
            .env("MOSFS_CONFIG", self.path("config"))
            .env("MOSFS_RUN", self.path("run"))
            .env_remove("MOSFS_FAILPOINT");
        command
    }

    /// Runs `mosfs`, which must succeed; what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "mosfs {args:?}: {:?}: {said}", output.status.code());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs `mosfs`, which must fail with this exit code and say all of these words.
    pub fn refused(&self, args: &[&str], code: i32, words: &[&str]) {
        let output = self.run(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "mosfs {args:?}: {said}");
        for word in words {
            assert!(said.contains(word), "mosfs {args:?} does not say `{word}`: {said}");
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // What a failed test has left running.
        let state = self.path("run/crun");
        for entry in fs::read_dir(&state).into_iter().flatten().flatten() {
            let mut command = Command::new("crun");
            command.args(["--cgroup-manager=disabled", "--root"]).arg(&state).args(["delete", "--force"]);
            let _ = command.arg(entry.file_name()).status();
        }
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = self.path("");
        let below = table
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|at| Path::new(at).starts_with(&own));
        for at in below.collect::<Vec<_>>().into_iter().rev() {
            let _ = Command::new("umount").args(["--lazy", at]).status();
        }
    }
}
