//! Images in plain files: `mosfs mount FILE`, verified by what `veritysetup` writes, and the command line of squashfuse.

#[path = "../common/squashfs.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod images;
#[path = "../common/layout.rs"]
mod layout;
#[path = "../common/mounted.rs"]
mod mounted;
#[path = "../common/program.rs"]
mod program;
#[path = "../common/whole/scan.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod scan;

mod squashfuse;
mod verified;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use images::{make_tree, mksquashfs, need_root, run};
use layout::{OurMount, mosfs, open_to_all};
use program::copy_program;
use tempfile::TempDir;

/// An ordinary user that has a name, which fusermount3 requires.
const NOBODY: u32 = 65_534;

/// A folder with the image of a tree with one of everything.
struct Fixture {
    dir: TempDir,
}

impl Fixture {
    /// Makes both.
    fn new() -> Self {
        need_root();
        let dir = tempfile::tempdir().unwrap();
        open_to_all(dir.path());
        let fixture = Self { dir };
        make_tree(&fixture.path("tree"), 300);
        mksquashfs(&fixture.path("tree"), &fixture.image(), "-comp zstd -xattrs");
        fixture
    }

    /// A file of the folder.
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The image.
    fn image(&self) -> PathBuf {
        self.path("image")
    }

    /// Its size.
    fn image_bytes(&self) -> u64 {
        fs::metadata(self.image()).unwrap().len()
    }

    /// Mounts through `mosfs mount`.
    fn mount(&self, file: &Path, options: &[&str]) -> OurMount {
        OurMount::new(file.to_str().unwrap(), &self.path("m"), options)
    }

    /// A mount that must fail with this exit code and these words, and leave nothing mounted.
    fn refused(&self, file: &Path, options: &[&str], code: i32, words: &[&str]) {
        let at = self.path("m");
        fs::create_dir_all(&at).unwrap();
        let output = mosfs().arg("mount").args(options).arg(file).arg(&at).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{options:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{options:?} does not say `{word}`: {said}");
        }
        assert_eq!(fs::read_dir(&at).unwrap().count(), 0);
    }

    /// Runs `veritysetup format`; returns the root hash.
    fn veritysetup(&self, options: &str, data: &Path, hash: &Path) -> String {
        let words: Vec<&OsStr> =
            ["format"].into_iter().chain(options.split_whitespace()).map(OsStr::new).collect();
        let output = run(
            "cryptsetup-bin",
            "veritysetup",
            &[&words[..], &[data.as_os_str(), hash.as_os_str()]].concat(),
        );
        let text = String::from_utf8(output).unwrap();
        let hash = text.lines().find_map(|line| line.strip_prefix("Root hash:"));
        hash.expect("veritysetup prints the root hash").trim().to_string()
    }

    /// The image with its tree appended, and the root hash.
    fn appended(&self) -> (PathBuf, String) {
        let (file, bytes) = (self.path("appended"), self.image_bytes());
        fs::copy(self.image(), &file).unwrap();
        let options = format!("--hash-offset={bytes} --data-blocks={}", bytes / 4096);
        let root_hash = self.veritysetup(&options, &file, &file);
        (file, root_hash)
    }

    /// A file of other bytes before and behind a file.
    fn inside(&self, file: &Path, before: usize, behind: usize) -> PathBuf {
        let (begin, end) = (images::bytes(1, before), images::bytes(2, behind));
        let whole = self.path("inside");
        fs::write(&whole, [begin, fs::read(file).unwrap(), end].concat()).unwrap();
        whole
    }

    /// A folder and a program of an ordinary user; the program has this name.
    fn of_nobody(&self, name: &str) -> (PathBuf, PathBuf) {
        let (program, at) = (self.path(name), self.path("nobody"));
        // The full program, which needs no other beside it.
        copy_program(env!("CARGO_BIN_EXE_mosfs-full"), &program);
        fs::create_dir_all(&at).unwrap();
        chown(&at, Some(NOBODY), Some(NOBODY)).unwrap();
        (program, at)
    }
}

/// Runs a program as an ordinary user.
fn as_nobody(program: impl AsRef<OsStr>, args: &[&OsStr]) -> Output {
    let words = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), "--clear-groups".into()];
    let mut command = Command::new("setpriv");
    command
        .args(words)
        .arg(program)
        .args(args)
        .env_remove("XDG_RUNTIME_DIR")
        .stdin(std::process::Stdio::null());
    command.output().expect("cannot run setpriv; install Debian's package util-linux")
}
