//! Mounts whose ids the kernel maps.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};

use mosfs::internals::sys::mountapi;

/// Mounts what is mounted at `from` at `to`, with ids 0 to `count - 1` shown as those from `first` on.
pub fn mount_mapped(from: &Path, to: &Path, first: u32, count: u32) {
    // It has unshared when it prints.
    let mut child = Command::new("unshare")
        .args(["--user", "sh", "-c", "echo ready; exec sleep 1000"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("unshare (Debian package util-linux)");
    let mut line = String::new();
    let output = child.stdout.take().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).unwrap();
    assert_eq!(line, "ready\n");
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{}/{map}", child.id()), format!("0 {first} {count}\n")).unwrap();
    }
    let namespace = File::open(format!("/proc/{}/ns/user", child.id())).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let tree = mountapi::clone_mount(from).unwrap();
    mountapi::map_ids(tree.as_fd(), namespace.as_fd()).unwrap();
    mountapi::attach(tree, to).unwrap();
}
