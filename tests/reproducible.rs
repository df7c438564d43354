//! The same input gives the same digest: on any day, with any number of threads, wherever, and by whomever.

#[path = "common/whole/mod.rs"]
mod common;
#[path = "common/program.rs"]
mod program;

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::commands::{command, join, mosfs, need_root, run};
use common::debian::{self, noise};
use common::layers::{self, Layer, layer};
use common::system::{build, digest, image_name, import_manifest, keys, scratch};
use mosfs::internals::digest::Digest;
use program::copy_program;

/// Layers with enough content that threads have something to overtake each other with.
fn some_layers() -> Vec<Layer> {
    let mut bottom = layer().dir("./").dir("data").dir("etc");
    for number in 0..40_u64 {
        let size = 30_000 * number as usize;
        let text = format!("line {number} of a text that repeats itself, but for {number}\n");
        bottom = bottom
            .content(&format!("data/noise-{number}"), &noise(size / 3, number + 1))
            .content(&format!("data/text-{number}"), text.repeat(size / text.len()).as_bytes())
            .hard(&format!("data/link-{number}"), &format!("data/text-{number}"))
            .pax(&[("SCHILY.xattr.user.number", &number.to_le_bytes())])
            .file(&format!("etc/{number}"), &text);
    }
    vec![
        bottom,
        layer().dir("data").file("data/.wh.noise-3", "").content("data/new", &noise(700_000, 99)),
        layer().file("data/.wh..wh..opq", "").file("data/last", "last"),
    ]
}

/// An input and what it was built to once.
struct Input {
    manifest: PathBuf,
    keys: PathBuf,
    first: Digest,
    image: String,
}

fn input(dir: &Path, layout: &Path, name: &str) -> Input {
    let (manifest, store, keys) = (dir.join("import.yaml"), dir.join("first"), keys(dir));
    let mut url = OsString::from("oci:");
    url.push(join(layout, ":", name));
    import_manifest(&manifest, &url);
    let first = digest(&run(&mut build(&manifest, &store, &keys)));
    Input { manifest, keys, first, image: image_name(&store) }
}

impl Input {
    /// Builds once more, through a command that is given the program and its arguments.
    fn again(&self, what: &str, store: &Path, mut command: Command) {
        let plain = build(&self.manifest, store, &self.keys);
        command.arg(plain.get_program()).args(plain.get_args());
        assert_eq!(digest(&run(&mut command)), self.first, "{what}");
        assert_eq!(image_name(store), self.image, "{what}");
        fs::remove_dir_all(store).expect("remove the store");
    }
}

/// `env NAME=VALUE`… as a prefix.
fn with_env(settings: &[&str]) -> Command {
    let mut command = Command::new("env");
    command.args(settings);
    command
}

#[test]
fn two_builds_give_the_same_digest() {
    need_root();
    let dir = scratch();
    let layout = dir.path().join("layout");
    layers::image(&layout, "same", some_layers());
    let input = input(dir.path(), &layout, "same");
    let store = dir.path().join("store");

    input.again("a second time", &store, with_env(&[]));
    for later in ["+1 day", "+40 days"] {
        let mut clock = command("faketime");
        clock.arg("-f").arg(later);
        input.again(later, &store, clock);
    }
    let strange =
        ["TZ=Pacific/Kiritimati", "LC_ALL=tr_TR.UTF-8", "LANG=C", "HOME=/nowhere", "HOSTNAME=else", "USER=x"];
    input.again("another environment", &store, with_env(&strange));
    input.again("no environment", &store, with_env(&["-i"]));
    let mut umask = Command::new("sh");
    umask.args(["-c", "umask 077; cd /; exec \"$@\"", "sh"]);
    input.again("another umask and folder", &store, umask);
    let mut host = command("unshare");
    host.args(["--uts", "--ipc", "--net"]);
    input.again("another host", &store, host);
    let mut one = command("taskset");
    one.args(["-c", "0"]);
    input.again("one processor", &store, one);

    for jobs in ["1", "2", "8", "61"] {
        let mut command = build(&input.manifest, &store, &input.keys);
        assert_eq!(digest(&run(command.args(["--jobs", jobs]))), input.first, "--jobs {jobs}");
        fs::remove_dir_all(&store).expect("remove the store");
    }
}

/// What must not matter: where the input lies, its times and modes, and who builds it.
#[test]
fn another_user_with_another_copy_gets_the_same_digest() {
    need_root();
    const USER: u32 = 12_345;
    let dir = scratch();
    let layout = dir.path().join("layout");
    layers::image(&layout, "same", some_layers());
    let input = input(dir.path(), &layout, "same");

    // Where that user can get at everything.
    let there = tempfile::tempdir().expect("make a folder");
    run(Command::new("cp").args(["-r", "--no-preserve=all"]).arg(&layout).arg(&input.keys).arg(there.path()));
    for (program, name) in
        [(mosfs().get_program(), "mosfs"), (env!("CARGO_BIN_EXE_mosfs-full").as_ref(), "mosfs-full")]
    {
        copy_program(program, there.path().join(name));
        fs::set_permissions(there.path().join(name), fs::Permissions::from_mode(0o755)).expect("chmod");
    }
    let mut url = OsString::from("oci:");
    url.push(join(&there.path().join("layout"), ":", "same"));
    import_manifest(&there.path().join("import.yaml"), &url);
    run(Command::new("chown").args(["-R", &USER.to_string()]).arg(there.path()));
    chown(there.path(), Some(USER), Some(USER)).expect("chown");

    fs::set_permissions(there.path().join("keys/signer.key"), fs::Permissions::from_mode(0o600))
        .expect("chmod");

    let mut user = command("setpriv");
    user.args(["--reuid", &USER.to_string(), "--regid", &USER.to_string(), "--clear-groups"]);
    user.arg("./mosfs").args(["build", "import.yaml", "--store", "store"]);
    user.args(["--key", "keys/signer.key", "--cert", "keys/signer.pem"]).current_dir(there.path());
    assert_eq!(digest(&run(&mut user)), input.first);
}

/// The Debian image in the campaign, as it takes minutes; elsewhere its first layer stands for it above.
#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn a_debian_root_gives_the_same_digest() {
    let image = debian::image();
    let dir = scratch();
    let input = input(dir.path(), &image.layout, "debian");
    let store = dir.path().join("store");
    let mut clock = command("faketime");
    clock.args(["-f", "+9 days"]);
    input.again("another day", &store, clock);
    let mut command = build(&input.manifest, &store, &input.keys);
    assert_eq!(digest(&run(command.args(["--jobs", "1"]))), input.first, "--jobs 1");
}
