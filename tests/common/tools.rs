//! Running the real tools. A missing one fails the test and names its Debian package.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Which Debian package has a tool.
fn package(tool: &str) -> &str {
    match tool {
        "unsquashfs" | "mksquashfs" | "sqfstar" => "squashfs-tools",
        "getfattr" | "setfattr" => "attr",
        "zstd" | "gzip" | "tar" | "openssl" | "skopeo" | "umoci" | "faketime" => tool,
        "veritysetup" => "cryptsetup-bin",
        "mkfs.erofs" => "erofs-utils",
        _ => "coreutils",
    }
}

/// Runs a tool whatever it answers.
pub fn run_any(command: &mut Command) -> Output {
    let tool = command.get_program().to_string_lossy().into_owned();
    command
        .output()
        .unwrap_or_else(|error| panic!("cannot run {tool} (Debian package {}): {error}", package(&tool)))
}

/// Runs a tool that must succeed; what it prints.
pub fn run(command: &mut Command) -> String {
    let output = run_any(command);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Runs a shell script in a folder.
pub fn sh(dir: &Path, script: &str) -> String {
    run(Command::new("sh").arg("-ec").arg(script).current_dir(dir))
}

/// Whether the tests run as root; those that need it fail otherwise.
pub fn need_root() {
    let uid = std::fs::metadata("/proc/self").unwrap().uid();
    assert_eq!(uid, 0, "this test makes devices and owners: run it as root");
}

/// What lstat(2) and the content of a file say, as one line, without the name.
fn line(path: &Path, names: &mut BTreeMap<(u64, u64), PathBuf>, relative: &Path) -> String {
    let data = path.symlink_metadata().unwrap();
    let kind = data.file_type();
    let mut text = format!("{:o} {}:{} {}", data.mode(), data.uid(), data.gid(), data.mtime());
    if kind.is_file() {
        let content = mosfs::internals::digest::Digest::of(&std::fs::read(path).unwrap());
        // Links of one file are told by the first of their names.
        let first = names.entry((data.dev(), data.ino())).or_insert_with(|| relative.to_path_buf());
        text += &format!(" nlink {} size {} {content} as {}", data.nlink(), data.len(), first.display());
    } else if kind.is_symlink() {
        text += &format!(" -> {}", std::fs::read_link(path).unwrap().as_os_str().as_bytes().escape_ascii());
    } else if kind.is_block_device() || kind.is_char_device() {
        text += &format!(" rdev {:x}", data.rdev());
    }
    text
}

/// All files below a folder, with all that a file has.
pub fn snapshot(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut names = BTreeMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(relative) = todo.pop() {
        let path = root.join(&relative);
        // The first name of a file must not depend on the order of the walk: sort below.
        if path.symlink_metadata().unwrap().is_dir() {
            let mut entries: Vec<_> = std::fs::read_dir(&path)
                .unwrap()
                .map(|entry| relative.join(entry.unwrap().file_name()))
                .collect();
            entries.sort();
            entries.reverse();
            todo.extend(entries);
        }
        let text = line(&path, &mut names, &relative);
        found.insert(relative, text);
    }
    // On a file system without attributes it fails, after saying so; then there are none to compare.
    let xattrs = run_any(
        Command::new("getfattr").args(["-R", "-P", "-h", "-d", "-m-", "-e", "hex", "."]).current_dir(root),
    );
    found.insert("(attributes)".into(), sorted_blocks(&String::from_utf8_lossy(&xattrs.stdout)));
    found
}

/// getfattr's answer, its paragraphs sorted, as it walks in the order of the folder.
fn sorted_blocks(text: &str) -> String {
    let mut blocks: Vec<String> = text
        .split("\n\n")
        .map(|block| {
            let mut lines: Vec<_> = block.lines().collect();
            if let Some(rest) = lines.get_mut(1..) {
                rest.sort();
            }
            lines.join("\n")
        })
        .filter(|block| !block.is_empty())
        .collect();
    blocks.sort();
    blocks.join("\n\n")
}

/// Fails where two trees differ, naming each difference.
pub fn assert_same_tree(expected: &BTreeMap<PathBuf, String>, found: &BTreeMap<PathBuf, String>) {
    let mut differences = Vec::new();
    for path in expected.keys().chain(found.keys().filter(|path| !expected.contains_key(*path))) {
        let (one, two) = (expected.get(path), found.get(path));
        if one != two {
            differences.push(format!("{path:?}\n  expected {one:?}\n  found    {two:?}"));
        }
    }
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
}
