//! The Debian packages of `make deb`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn source(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn run(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).current_dir(source("")).output();
    output.unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"))
}

/// The value of `key = "…"` in a text of TOML.
fn value<'a>(text: &'a str, key: &str) -> &'a str {
    let line = text.lines().find(|line| line.starts_with(&format!("{key} = \"")));
    line.and_then(|line| line.split('"').nth(1)).unwrap_or_else(|| panic!("no {key}"))
}

/// What the packages take of what `make install` puts into target/deb: whole folders, and single files.
fn packaged() -> BTreeSet<String> {
    let manifest = fs::read_to_string(source("Cargo.toml")).unwrap();
    let lines = manifest.lines().map(str::trim).filter(|line| line.starts_with("[\"target/"));
    lines
        .map(|line| {
            let words: Vec<_> = line.split('"').collect();
            let (from, folder) = (words[1], words[3]);
            let name = from.rsplit('/').next().unwrap();
            if let Some(below) = from.strip_prefix("target/deb/") {
                assert_eq!(below, format!("{folder}{name}"), "it is installed where it is packaged");
            }
            format!("{folder}{name}")
        })
        .collect()
}

#[test]
fn every_installed_file_is_in_a_package() {
    let place = tempfile::tempdir().unwrap();
    let output = run(Command::new("make")
        .arg("install")
        .arg(format!("DESTDIR={}", place.path().display()))
        .arg(format!("MOSFS={}", env!("CARGO_BIN_EXE_mosfs"))));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = run(Command::new("find").arg(place.path()).args(["-type", "f", "-printf", "%P\n"]));
    let installed = String::from_utf8(output.stdout).unwrap();
    let packaged = packaged();
    let mut used = BTreeSet::new();
    for file in installed.lines() {
        let folder = format!("{}/*", file.rsplit_once('/').unwrap().0);
        let by = [file, folder.as_str()].into_iter().find(|one| packaged.contains(*one));
        used.insert(by.unwrap_or_else(|| panic!("{file} is in no package")).to_string());
    }
    assert_eq!(used, packaged, "what is packaged is installed");
}

#[test]
fn the_versions_agree() {
    let manifest = fs::read_to_string(source("Cargo.toml")).unwrap();
    let version = value(&manifest, "version");
    let changelog = fs::read_to_string(source("mount-helpers/debian/changelog")).unwrap();
    assert!(changelog.starts_with(&format!("mosfs ({version}-1) ")), "{changelog}");
    assert!(
        manifest.contains(&format!("depends = \"mosfs (>= {version}), ")),
        "mosfs-initramfs asks for its mosfs"
    );
}

/// How many bytes a program may have as it is installed, without symbols. Both are part of an initramfs. `mosfs` has the
/// C library in it, some 800,000 bytes.
const LIMITS: [(&str, u64); 2] = [("usr/bin/mosfs", 2_750_000), ("usr/libexec/mosfs/mosfs-full", 6_000_000)];

fn check_sizes(packages: &[std::path::PathBuf]) {
    let place = tempfile::tempdir().unwrap();
    for package in packages {
        let output = run(Command::new("dpkg-deb").arg("--extract").arg(package).arg(place.path()));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    for (program, limit) in LIMITS {
        let bytes = fs::metadata(place.path().join(program)).unwrap().len();
        println!("{program}: {bytes} bytes");
        // readelf prints `(NEEDED)` for each shared library that a program loads.
        let elf = run(Command::new("readelf").arg("-d").arg(place.path().join(program)));
        let is_static = !String::from_utf8_lossy(&elf.stdout).contains("(NEEDED)");
        assert_eq!(is_static, program == "usr/bin/mosfs", "{program} loads shared libraries: {}", !is_static);
        assert!(bytes <= limit, "{program} has {bytes} bytes, which is more than {limit}");
    }
}

#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "builds a release and two Debians")]
fn packages_are_made_used_and_purged_on_debian_12_and_13() {
    let output = run(Command::new("make").arg("deb"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut packages: Vec<_> =
        fs::read_dir(source("target/debian")).unwrap().map(|entry| entry.unwrap().path()).collect();
    packages.retain(|path| path.extension().is_some_and(|ending| ending == "deb"));
    assert_eq!(packages.len(), 2, "{packages:?}");
    check_sizes(&packages);
    let output = run(Command::new("lintian").args(["--fail-on", "error"]).args(&packages));
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(output.status.success() && !said.contains("E: "), "{said}");
    for release in ["12", "13"] {
        let output = run(Command::new(source("tests/deb")).arg(release));
        let said = String::from_utf8_lossy(&output.stdout);
        println!("{said}");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "Debian {release}: {said}\n{errors}");
        assert!(said.contains("installed, used and purged on Debian "), "{said}");
    }
}
