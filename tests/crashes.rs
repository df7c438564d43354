//! A build that dies at any commit point leaves a store that verifies, and the next one finishes it with the
//! same digest. What is bad in a store is listed, all of it.

#[path = "common/whole/mod.rs"]
mod common;

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use common::commands::{join, mosfs, need_root, output, run};
use common::debian::noise;
use common::layers::{self, layer};
use common::system::{build, digest, image_name, import_manifest, keys, scratch};
use mosfs::internals::digest::Digest;
use mosfs::internals::store::Store;

/// An input, and the digest that it is built to.
struct Input {
    manifest: PathBuf,
    keys: PathBuf,
    expected: Digest,
    /// A store that was built without disturbance.
    whole: PathBuf,
}

/// `more` are lines for the end of the import manifest.
fn input(dir: &Path, more: &str) -> Input {
    need_root();
    let (layout, manifest, whole) = (dir.join("layout"), dir.join("import.yaml"), dir.join("whole"));
    layers::image(
        &layout,
        "crash",
        vec![
            layer().dir("./").content("noise", &noise(300_000, 1)).file("one", "1"),
            layer().file(".wh.one", "").file("two", "2"),
            layer().content("more", &noise(200_000, 2)),
        ],
    );
    let mut url = OsString::from("oci:");
    url.push(join(&layout, ":", "crash"));
    import_manifest(&manifest, &url);
    let text = fs::read_to_string(&manifest).expect("read");
    fs::write(&manifest, text + more).expect("write");
    let keys = keys(dir);
    let expected = digest(&run(&mut build(&manifest, &whole, &keys)));
    Input { manifest, keys, expected, whole }
}

/// `oci:DIR`.
fn layout(store: &Path) -> OsString {
    let mut text = OsString::from("oci:");
    text.push(store);
    text
}

impl Input {
    /// What must hold of a store that a dead process left.
    fn recovers(&self, store: &Path, what: &str) {
        if store.join("oci-layout").exists() {
            let verify = output(mosfs().arg("verify").arg(layout(store)));
            let text = String::from_utf8_lossy(&verify.stdout).into_owned()
                + &String::from_utf8_lossy(&verify.stderr);
            assert!(verify.status.success(), "{what}: verify of what was left: {text}");
        }
        let again = digest(&run(&mut build(&self.manifest, store, &self.keys)));
        assert_eq!(again, self.expected, "{what}: the digest of the build after it");
        run(mosfs().arg("verify").arg(layout(store)));
        run(mosfs().args(["gc", "--store"]).arg(store));
        run(mosfs().arg("verify").arg(layout(store)));
        let left: Vec<_> =
            fs::read_dir(store.join(".mosfs/tmp")).map(|list| list.flatten().collect()).unwrap_or_default();
        assert!(left.is_empty(), "{what}: gc leaves {left:?}");
        assert_eq!(image_name(store), image_name(&self.whole), "{what}: names");
    }
}

/// All names in `failpoint::hit("…")`, and those of files that `sys::atomic` writes, below these folders of the
/// source, so that a new one is tested too.
fn failpoints(folders: &[&str]) -> Vec<String> {
    let mut names = Vec::new();
    let mut todo: Vec<_> =
        folders.iter().map(|folder| Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).collect();
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(fs::read_dir(path).expect("list").map(|entry| entry.expect("an entry").path()));
            continue;
        }
        let text = fs::read_to_string(&path).expect("read the source");
        names.extend(
            text.split("failpoint::hit(\"")
                .skip(1)
                .filter_map(|rest| Some(rest.split_once('"')?.0.to_string())),
        );
        // The name is the first text among the arguments.
        let first_text = |rest: &str| rest.split('"').nth(1).expect("a name").to_string();
        for (call, points) in
            [("atomic::replace", &["written", "renamed"][..]), ("atomic::publish(", &["renamed"])]
        {
            let named = text.split(call).skip(1).map(first_text);
            names.extend(named.flat_map(|name| points.iter().map(move |point| format!("{name}.{point}"))));
        }
    }
    names.sort();
    names.dedup();
    names
}

#[test]
fn a_build_killed_at_a_commit_point_can_be_finished() {
    let dir = scratch();
    killed_everywhere(&input(dir.path(), ""), dir.path(), "store.blob.renamed", 15);
}

/// Chunks are written, synced and named many at a time.
#[test]
fn a_puzzlefs_build_killed_at_a_commit_point_can_be_finished() {
    let dir = scratch();
    let input = input(dir.path(), "storage_type: puzzlefs\n");
    killed_everywhere(&input, dir.path(), "store.batch.renamed", 15);
}

/// Kills a build at every commit point, each time that it is passed. `known` is one that it must pass.
fn killed_everywhere(input: &Input, dir: &Path, known: &str, at_least: usize) {
    let all = failpoints(&["src/store", "src/convert", "src/publish/build.rs"]);
    for known in ["build.system.named", "build.system.signed", "store.index.renamed", known] {
        assert!(all.iter().any(|name| name == known), "no failpoint {known} among {all:?}");
    }
    let (mut reached, mut reached_known) = (0, false);
    for name in all.iter().filter(|name| name.starts_with("build.") || name.starts_with("store.")) {
        // The N-th time that it is passed; the third stands for those in the middle, and then steps grow.
        let mut number = 1;
        loop {
            let what = format!("killed at {name}:{number}");
            let store = dir.join("store");
            let mut command = build(&input.manifest, &store, &input.keys);
            let killed = output(command.env("MOSFS_FAILPOINT", format!("{name}:{number}")));
            let finished = killed.status.success();
            if !finished {
                assert_eq!(
                    killed.status.signal(),
                    Some(9),
                    "{what}: {}",
                    String::from_utf8_lossy(&killed.stderr)
                );
                reached += 1;
                reached_known |= name == known;
            }
            input.recovers(&store, &what);
            fs::remove_dir_all(&store).expect("remove the store");
            if finished {
                break;
            }
            number += if number < 3 { 1 } else { 4 };
        }
    }
    assert!(reached >= at_least && reached_known, "only {reached} commit points were reached");
}

/// Killed whenever, and while another build runs.
#[test]
fn builds_in_each_others_way_end_well() {
    let dir = scratch();
    let input = input(dir.path(), "");
    let store = dir.path().join("store");
    for milliseconds in [1, 5, 12, 25, 40, 70] {
        let start = || {
            let mut command = build(&input.manifest, &store, &input.keys);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start a build")
        };
        let (mut one, other) = (start(), start());
        std::thread::sleep(Duration::from_millis(milliseconds));
        one.kill().expect("kill");
        one.wait().expect("wait");
        let other = other.wait_with_output().expect("wait");
        assert!(other.status.success(), "{}", String::from_utf8_lossy(&other.stderr));
        assert_eq!(digest(&String::from_utf8_lossy(&other.stdout)), input.expected);
        input.recovers(&store, &format!("killed after {milliseconds} ms"));
        fs::remove_dir_all(&store).expect("remove the store");
    }
}

#[test]
fn verify_lists_each_bad_blob() {
    let dir = scratch();
    let input = input(dir.path(), "");
    let store = Store::open(&input.whole).expect("open the store");
    let name = image_name(&input.whole);
    let image = Digest::from_hex(name.rsplit('/').next().expect("hex")).expect("a digest");
    let layers: Vec<_> =
        store.image(&image).expect("an image").layers.iter().map(|layer| layer.digest).collect();
    let good = run(mosfs().arg("verify").arg(layout(&input.whole)));
    assert!(good.contains("good"), "{good}");

    // One byte of the first layer, the last byte of the second cut off, the third gone, and a name of nothing.
    let file = OpenOptions::new().read(true).write(true).open(store.blob_path(&layers[0])).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5000).expect("read");
    file.write_all_at(&[byte[0] ^ 1], 5000).expect("write");
    let second = OpenOptions::new().write(true).open(store.blob_path(&layers[1])).expect("open");
    second.set_len(second.metadata().expect("stat").len() - 1).expect("truncate");
    fs::remove_file(store.blob_path(&layers[2])).expect("remove");
    for what in [layout(&input.whole), join(Path::new(&layout(&input.whole)), ":", &name)] {
        let verify = output(mosfs().arg("verify").arg(&what));
        let text = String::from_utf8_lossy(&verify.stdout).into_owned();
        let errors = String::from_utf8_lossy(&verify.stderr).into_owned();
        assert_eq!(verify.status.code(), Some(3), "{what:?}: {text}{errors}");
        for layer in &layers {
            let lines = text.lines().filter(|line| line.contains(&layer.to_string())).count();
            assert!(lines > 0, "{what:?}: nothing of {layer} in\n{text}{errors}");
        }
        // The block that was changed is named too.
        assert!(
            text.lines().any(|line| line.contains(&layers[0].to_string()) && line.contains("block 1 ")),
            "{text}"
        );
    }
    // The next build finds what is missing; what is bad it must not take for good.
    let again = output(&mut build(&input.manifest, &input.whole, &input.keys));
    let verify = output(mosfs().arg("verify").arg(layout(&input.whole)));
    assert!(
        !again.status.success() || verify.status.success(),
        "a build over bad blobs says that all is well, and the store is bad: {}{}",
        String::from_utf8_lossy(&again.stdout),
        String::from_utf8_lossy(&verify.stdout)
    );
}
