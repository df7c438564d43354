//! What is not a regular file in place of a file that is not trusted: on SYSTEM, in the run folder, and in
//! an OCI layout. For each file and each kind of object: an error that names the path, what was expected
//! and what was found, and ends; never a hang, never what a link leads to.

#[path = "deploy/device.rs"]
#[allow(dead_code, reason = "the tests of deployments use the rest")]
mod device;
#[path = "common/publish.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod publish;
#[path = "common/swtpm.rs"]
#[allow(dead_code, reason = "the floor's own tests use the rest")]
mod swtpm;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use device::{Device, text};
use mosfs::internals::digest::Digest;
use mosfs::internals::store::Store;
use mosfs::internals::sys::mountapi;
use publish::Publisher;
use tempfile::TempDir;

/// The kinds of objects, and what is said to be found.
const OBJECTS: &[(&str, &str)] = &[
    ("pipe", "a named pipe"),
    ("folder", "a folder"),
    ("socket", "a socket"),
    ("device", "a character device"),
    ("link", "a symbolic link"),
];

/// The programs that are waited for end, or are killed after this many seconds: 137 is no exit code of
/// mosfs. Nothing here takes a hundredth of it.
const LIMIT: &str = "120";

fn put(object: &str, path: &Path) {
    let tool = |words: &[&str]| {
        let mut command = Command::new(words[0]);
        let done = command.arg(path).args(&words[1..]).status();
        assert!(done.expect("coreutils").success(), "{words:?}");
    };
    match object {
        "pipe" => tool(&["mkfifo"]),
        "folder" => fs::create_dir(path).unwrap(),
        "socket" => drop(UnixListener::bind(path).unwrap()),
        "device" => tool(&["mknod", "c", "1", "5"]),
        // To the very file that belongs there.
        "link" => symlink(away(path), path).unwrap(),
        "huge" => File::create(path).unwrap().set_len(1 << 42).unwrap(),
        other => panic!("{other}"),
    }
}

/// Where the real file is meanwhile.
fn away(path: &Path) -> PathBuf {
    path.with_file_name(format!("{}.away", path.file_name().unwrap().to_str().unwrap()))
}

/// Puts an object in the place of a file for as long as `job` runs. A socket's path must be short.
fn with_object(object: &str, path: &Path, job: impl FnOnce()) {
    let existed = path.exists();
    if existed {
        fs::rename(path, away(path)).unwrap();
    } else {
        fs::write(away(path), "").unwrap();
    }
    if object == "socket" {
        let short = tempfile::tempdir().unwrap();
        put(object, &short.path().join("s"));
        assert!(Command::new("mv").arg(short.path().join("s")).arg(path).status().unwrap().success());
    } else {
        put(object, path);
    }
    job();
    if fs::symlink_metadata(path).unwrap().is_dir() {
        fs::remove_dir_all(path).unwrap();
    } else {
        fs::remove_file(path).unwrap();
    }
    if existed {
        fs::rename(away(path), path).unwrap();
    } else {
        fs::remove_file(away(path)).unwrap();
    }
}

struct Fixture {
    device: Device,
    publisher: Publisher,
    /// The manifest and the layer of the target `app`.
    image: Digest,
    layer: Digest,
    _dir: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let publisher = Publisher::new(dir.path());
        let layer = |content: &str| vec![publisher.add_layer(content)];
        publisher.publish_targets(
            200,
            &[("hostfs", "hostfs", layer("host")), ("app", "container", layer("app"))],
            true,
        );
        let device = Device::with_file_floor();
        device.install(&publisher, 200);
        device.ok(&["commit"]);
        let store = Store::open(&device.system().join("store")).unwrap();
        let (_, image) =
            store.names().unwrap().into_iter().find(|(name, _)| name.starts_with("mos/images/app:")).unwrap();
        let layer = store.image(&image.digest).unwrap().layers[0].digest;
        fs::create_dir(device.dir.join("at")).unwrap();
        Self { image: image.digest, layer, device, publisher, _dir: dir }
    }

    fn system(&self, name: &str) -> PathBuf {
        self.device.system().join(name)
    }

    fn deployment(&self, name: &str) -> PathBuf {
        let mut all = fs::read_dir(self.system("deployments")).unwrap();
        all.next().unwrap().unwrap().path().join(name)
    }

    /// Runs `mosfs`; `{at}` is an empty folder.
    fn run(&self, words: &str) -> Output {
        let at = self.device.dir.join("at").display().to_string();
        let words: Vec<String> = words.split_whitespace().map(|word| word.replace("{at}", &at)).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mosfs = self.device.command(&words);
        let mut command = Command::new("timeout");
        command.args(["-s", "KILL", LIMIT]).arg(mosfs.get_program()).args(mosfs.get_args());
        for (name, value) in mosfs.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let output = command.output().expect("timeout (Debian package coreutils)");
        while mountapi::unmount(&self.device.dir.join("at"), true).is_ok() {}
        output
    }

    fn expect(&self, words: &str, code: i32, path: &Path, said: &str) {
        let output = self.run(words);
        let all = text(&output.stdout) + &text(&output.stderr);
        let path = path.display().to_string();
        assert_eq!(output.status.code(), Some(code), "mosfs {words}: {all}");
        let line = all.lines().find(|line| line.contains(&path) && line.contains(said));
        assert!(line.is_some(), "mosfs {words} does not say `{path}` and `{said}` in a line: {all}");
        assert!(!all.contains("panicked"), "{all}");
    }
}

#[test]
fn files_of_a_device_are_regular_files_or_are_not_used() {
    let fixture = Fixture::new();
    let blob = |digest: &Digest| fixture.system("store/blobs/sha256").join(digest.hex());
    let run = fixture.device.dir.join("run");
    fs::create_dir_all(&run).unwrap();
    let mount = "mount --backend fuse app {at}";
    let install = format!("update {}", fixture.publisher.source_of(200));
    // The file, and each command that needs it with its exit code.
    let table: &[(PathBuf, &[(&str, i32)])] = &[
        (fixture.deployment("manifest.json"), &[(mount, 1), ("gc", 3), ("activate --dry-run", 1)]),
        (fixture.deployment("manifest.sig"), &[(mount, 1), ("commit", 1)]),
        (fixture.deployment("cert.pem"), &[(mount, 1)]),
        (fixture.deployment("floor.sig"), &[(mount, 1)]),
        (fixture.system("store/index.json"), &[("verify", 1), ("gc", 1)]),
        (fixture.system("store/oci-layout"), &[("verify", 1), ("gc", 1), (mount, 1)]),
        (blob(&fixture.image), &[(mount, 1), ("verify", 3)]),
        (blob(&fixture.layer), &[("verify", 3), ("verify app", 3)]),
        (fixture.system("floor"), &[("floor show", 1)]),
        (run.join("boot.json"), &[("commit", 1), (mount, 1), ("gc", 1)]),
    ];
    for (path, commands) in table {
        for (object, found) in OBJECTS {
            for (words, code) in *commands {
                with_object(object, path, || {
                    fixture.expect(words, *code, path, &format!("expected a regular file, found {found}"));
                });
            }
        }
    }
    // A state file that cannot be used is reported, and rebuilt by the next command that changes something.
    let state = fixture.system("state.json");
    for (object, found) in OBJECTS.iter().copied().chain([("huge", "")]) {
        with_object(object, &state, || {
            let said = fixture.run("status");
            let why = if object == "huge" { "the file is longer than the" } else { found };
            assert!(
                said.status.success() && text(&said.stdout).contains(why),
                "{object}: {}",
                text(&said.stdout)
            );
            assert!(fixture.run(mount).status.success(), "{object}");
            assert!(fixture.run("gc").status.success(), "{object}");
            assert!(fs::symlink_metadata(&state).unwrap().is_file(), "{object}");
        });
    }
    // Files that are locked are not read, so their length does not matter.
    let locks = [
        (fixture.system("lock"), "gc"),
        (fixture.system("store/.mosfs/lock"), "gc"),
        (run.join("mounts/lock"), mount),
    ];
    fs::create_dir_all(run.join("mounts")).unwrap();
    for (path, words) in &locks {
        for (object, found) in OBJECTS {
            with_object(object, path, || {
                // The daemon works in the folder of records.
                let named = if *words == mount { Path::new("./lock") } else { path };
                fixture.expect(words, 1, named, &format!("expected a regular file, found {found}"));
            });
        }
    }
    // Nothing was changed on the way.
    assert!(fixture.run("verify").status.success());
    assert_eq!(fixture.run(&install).status.code(), Some(0));
    assert!(fixture.run(mount).status.success());
}

#[test]
fn a_file_that_is_one_long_hole_is_not_read() {
    let fixture = Fixture::new();
    let blob = |digest: &Digest| fixture.system("store/blobs/sha256").join(digest.hex());
    let run = fixture.device.dir.join("run");
    fs::create_dir_all(&run).unwrap();
    let mount = "mount --backend fuse app {at}";
    let longer = "the file is longer than the";
    let table: &[(PathBuf, &str, i32, &str)] = &[
        (fixture.deployment("manifest.json"), mount, 1, longer),
        (fixture.deployment("manifest.sig"), mount, 1, longer),
        (fixture.deployment("cert.pem"), mount, 1, longer),
        (fixture.deployment("floor.sig"), mount, 1, longer),
        (fixture.system("store/index.json"), "verify", 1, longer),
        (fixture.system("store/oci-layout"), mount, 1, longer),
        (fixture.system("floor"), "floor show", 1, longer),
        (run.join("boot.json"), "commit", 1, longer),
    ];
    for (path, words, code, said) in table {
        with_object("huge", path, || fixture.expect(words, *code, path, said));
    }
    for digest in [&fixture.image, &fixture.layer] {
        with_object("huge", &blob(digest), || {
            let output = fixture.run("verify");
            let all = text(&output.stdout);
            assert_eq!(output.status.code(), Some(3), "{all}");
            assert!(all.contains(&digest.hex()) && all.contains("4398046511104"), "{all}");
        });
    }
    // One that nobody needs is told, and not read either.
    let extra = blob(&Digest::of(b"nobody"));
    put("huge", &extra);
    let output = fixture.run("verify");
    assert!(output.status.success(), "{}", text(&output.stdout));
    assert!(
        text(&output.stderr).contains("1 blobs and files that nothing needs"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_layout_of_others_may_have_links_to_files_and_nothing_else() {
    let fixture = Fixture::new();
    let layout = fixture.device.dir.join("layout");
    let copied = Command::new("cp").arg("-a").arg(fixture.publisher.store().dir()).arg(&layout).status();
    assert!(copied.unwrap().success());
    let blob = |digest: &Digest| layout.join("blobs/sha256").join(digest.hex());
    let name = mosfs::internals::store::image_name("app", &fixture.image);
    let source = format!("oci:{}:{name}", layout.display());
    let mount = format!("mount --backend fuse {source} {{at}}");
    let verify = format!("verify {source}");
    let update = format!("update oci:{}", layout.display());
    for (path, words, code) in [
        (layout.join("oci-layout"), &mount, 1),
        (layout.join("oci-layout"), &update, 1),
        (layout.join("index.json"), &mount, 1),
        (layout.join("index.json"), &update, 1),
        (blob(&fixture.image), &mount, 1),
        (blob(&fixture.layer), &mount, 1),
        (blob(&fixture.layer), &verify, 3),
    ] {
        for (object, found) in OBJECTS {
            with_object(object, &path, || {
                if *object == "link" {
                    let output = fixture.run(words);
                    assert!(output.status.success(), "{words}: {}", text(&output.stderr));
                } else {
                    fixture.expect(words, code, &path, &format!("expected a regular file, found {found}"));
                }
            });
        }
    }
}

#[test]
fn a_build_reads_no_pipe_of_a_layout() {
    let fixture = Fixture::new();
    let dir = fixture.device.dir.clone();
    let layout = dir.join("layout");
    fs::create_dir(dir.join("tree")).unwrap();
    fs::write(dir.join("tree/file"), "content").unwrap();
    for words in ["init --layout layout", "new --image layout:x", "insert --rootless --image layout:x tree /"]
    {
        let done = Command::new("umoci").args(words.split(' ')).current_dir(&dir).output();
        let done = done.expect("the umoci command is needed (Debian package umoci)");
        assert!(done.status.success(), "umoci {words}: {}", text(&done.stderr));
    }
    let store = Store::open(&layout).unwrap();
    let image = store.resolve("x").unwrap().digest;
    let layer = store.image(&image).unwrap().layers[0].digest;
    let import = format!(
        "version: 300\nproduct: {}\ntargets:\n  hostfs:\n    url: \"oci:{}:x\"\n    version: 1.0.0\n    \
         service_type: hostfs\n    network: {{type: host}}\n",
        publish::PRODUCT,
        layout.display()
    );
    fs::write(dir.join("import.yaml"), import).unwrap();
    let key = |name: &str| fixture.publisher.key(name).display().to_string();
    let words = format!(
        "build {0}/import.yaml --store {0}/built --key {1} --cert {2}",
        dir.display(),
        key("signer.key"),
        key("signer.pem")
    );
    for path in [
        layout.join("index.json"),
        layout.join("blobs/sha256").join(image.hex()),
        layout.join("blobs/sha256").join(layer.hex()),
    ] {
        for (object, found) in OBJECTS.iter().filter(|(object, _)| *object != "link") {
            with_object(object, &path, || {
                fixture.expect(&words, 1, &path, &format!("expected a regular file, found {found}"));
            });
        }
    }
    assert!(fixture.run(&words).status.success());
}

#[test]
fn a_boot_passes_over_a_deployment_that_is_no_file() {
    let fixture = Fixture::new();
    let layer = vec![fixture.publisher.add_layer("next")];
    let app = vec![fixture.publisher.add_layer("app")];
    fixture.publisher.publish_targets(201, &[("hostfs", "hostfs", layer), ("app", "container", app)], true);
    let dir = fixture.device.dir.clone();
    fs::write(dir.join("cmdline"), "root=mosfs mosfs.backend=fuse mosfs.overlay=ro").unwrap();
    let words =
        format!("boot --floor file --json --sysroot {{at}} --cmdline {}", dir.join("cmdline").display());
    for (name, (object, found)) in ["manifest.json", "manifest.sig", "cert.pem", "floor.sig"]
        .into_iter()
        .flat_map(|name| OBJECTS.iter().map(move |object| (name, object)))
    {
        // A new try each time: the one before was counted.
        let _ = fs::remove_dir_all(fixture.device.system());
        let _ = fs::remove_dir_all(dir.join("run"));
        fixture.device.install(&fixture.publisher, 200);
        fixture.device.ok(&["update", &fixture.publisher.source_of(201)]);
        let pending = fs::read_dir(fixture.system("deployments"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.file_name().unwrap().to_str().unwrap().starts_with("201-"))
            .unwrap();
        let path = pending.join(name);
        with_object(object, &path, || {
            fixture.expect(&words, 0, &path, &format!("expected a regular file, found {found}"));
        });
    }
}
