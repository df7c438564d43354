//! `mosfs` and `mosfs-full`: which of them runs a command, and that nobody can tell.

#[path = "common/program.rs"]
mod program;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use program::copy_program;

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
        &["mount", "--store", "/proc/none", "docker://127.0.0.1:1/x:1", "/tmp"],
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

/// The shared libraries that a program names.
fn libraries(program: &str) -> Vec<String> {
    let output = Command::new("readelf").args(["--dynamic", "--wide", program]).output();
    let output = output.expect("run readelf (Debian package binutils)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let needed = text.lines().filter(|line| line.contains("(NEEDED)"));
    needed.map(|line| line.split(['[', ']']).nth(1).unwrap().to_string()).collect()
}

/// What makes it quick to start: loading libcrypto takes longer than all the rest. Where this fails, something that
/// `src/cli/start.rs` leads to checks a signature.
#[test]
fn mosfs_loads_no_more_than_the_c_library() {
    for name in libraries(MOSFS) {
        let known = ["libc.so.", "libgcc_s.so.", "libm.so.", "ld-linux"];
        assert!(known.iter().any(|known| name.starts_with(known)), "mosfs loads {name}");
    }
    assert!(libraries(FULL).iter().any(|name| name.starts_with("libcrypto.so.")), "{:?}", libraries(FULL));
}

#[test]
fn the_full_program_is_found_where_it_is_installed() {
    let root = tempfile::tempdir().unwrap();
    let (bin, libexec) = (root.path().join("bin"), root.path().join("libexec/mosfs"));
    for folder in [&bin, &libexec] {
        fs::create_dir_all(folder).unwrap();
    }
    let installed = bin.join("mosfs");
    copy_program(MOSFS, &installed);
    let alone = run(&installed, &["--version"]);
    assert_eq!(alone.status.code(), Some(1));
    let said = String::from_utf8_lossy(&alone.stderr);
    assert!(
        said.contains("the program mosfs-full is not installed; looked for") && said.contains("libexec"),
        "{said}"
    );

    copy_program(FULL, libexec.join("mosfs-full"));
    let link = root.path().join("elsewhere");
    symlink(&installed, &link).unwrap();
    for program in [installed, link] {
        let output = run(&program, &["--version"]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stdout.starts_with(b"mosfs "), "{output:?}");
    }
}
