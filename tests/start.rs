//! `mosfs` and `mosfs-full`: which of them runs a command, and that nobody can tell.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

const MOSFS: &str = env!("CARGO_BIN_EXE_mosfs");
const FULL: &str = env!("CARGO_BIN_EXE_mosfs-full");

fn run(program: &Path, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap()
}

#[test]
fn both_answer_the_same() {
    for args in [
        &["--version"][..],
        &["--help"],
        &["mount", "--help"],
        &["mount", "oci:/nonexistent", "--no-such-option", "m"],
        &["mount", "oci:/nonexistent:x", "/tmp"],
        &["mount", "docker://example.org/x:1", "/tmp"],
        &["mount", "no such:scheme", "/tmp"],
        &["mount", "target", "/tmp", "--system", "/nonexistent", "--config", "/nonexistent"],
        &["verify", "oci:/nonexistent"],
        &[],
    ] {
        let (start, full) = (run(Path::new(MOSFS), args), run(Path::new(FULL), args));
        assert_eq!(start.status.code(), full.status.code(), "{args:?}");
        // The usage line names the program as it was called.
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace("mosfs-full", "mosfs");
        assert_eq!(text(&start.stdout), text(&full.stdout), "{args:?}");
        assert_eq!(text(&start.stderr), text(&full.stderr), "{args:?}");
    }
}

#[test]
fn the_full_program_is_found_where_it_is_installed() {
    let root = tempfile::tempdir().unwrap();
    let (bin, libexec) = (root.path().join("bin"), root.path().join("libexec/mosfs"));
    for folder in [&bin, &libexec] {
        fs::create_dir_all(folder).unwrap();
    }
    let installed = bin.join("mosfs");
    fs::copy(MOSFS, &installed).unwrap();
    let alone = run(&installed, &["--version"]);
    assert_eq!(alone.status.code(), Some(1));
    let said = String::from_utf8_lossy(&alone.stderr);
    assert!(
        said.contains("the program mosfs-full is not installed; looked for") && said.contains("libexec"),
        "{said}"
    );

    fs::copy(FULL, libexec.join("mosfs-full")).unwrap();
    let link = root.path().join("elsewhere");
    symlink(&installed, &link).unwrap();
    for program in [installed, link] {
        let output = run(&program, &["--version"]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stdout.starts_with(b"mosfs "), "{output:?}");
    }
}
