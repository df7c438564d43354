//! Running the real tools. One that is missing fails the test and names its Debian package.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The Debian package of each tool that is called by [`command`].
const PACKAGES: &[(&str, &str)] = &[
    ("chroot", "coreutils"),
    ("debootstrap", "debootstrap"),
    ("faketime", "faketime"),
    ("fusermount3", "fuse3"),
    ("mknod", "coreutils"),
    ("mksquashfs", "squashfs-tools"),
    ("mmdebstrap", "mmdebstrap"),
    ("mount", "mount"),
    ("openssl", "openssl"),
    ("setcap", "libcap2-bin"),
    ("setpriv", "util-linux"),
    ("skopeo", "skopeo"),
    ("tar", "tar"),
    ("taskset", "util-linux"),
    ("umoci", "umoci"),
    ("umount", "mount"),
    ("unshare", "util-linux"),
    ("unsquashfs", "squashfs-tools"),
    ("veritysetup", "cryptsetup-bin"),
];

/// A command of a tool that must be there.
///
/// # Panics
/// Where the tool is missing, with its Debian package.
pub fn command(tool: &str) -> Command {
    let package = PACKAGES.iter().find(|(name, _)| *name == tool).map(|(_, package)| *package);
    let package = package.unwrap_or_else(|| panic!("commands.rs lacks a row for {tool}"));
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/local/sbin:/usr/sbin:/sbin";
    let found = std::env::split_paths(&path).any(|folder| folder.join(tool).is_file());
    assert!(found, "{tool} is missing: install the Debian package {package}");
    let mut command = Command::new(tool);
    command.env("PATH", path).stdin(Stdio::null());
    command
}

/// The mosfs program under test, with no setting from outside.
pub fn mosfs() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mosfs"));
    for name in ["MOSFS_SYSTEM", "MOSFS_CONFIG", "MOSFS_FAILPOINT", "MOSFS_LOG"] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// Runs to the end and gives what it printed.
pub fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"))
}

/// Runs a command that must succeed; its standard output as text.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command that must exit with `code`; what it wrote to standard error.
pub fn refused(command: &mut Command, code: i32) -> String {
    let output = output(command);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(
        output.status.code(),
        Some(code),
        "{command:?}: {}\n{}{errors}",
        output.status,
        String::from_utf8_lossy(&output.stdout)
    );
    errors
}

/// Stops the test program where it does not run as root.
pub fn need_root() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let root = status.lines().any(|line| line.starts_with("Uid:\t0\t0\t"));
    assert!(root, "this test must run as root: `make test` asks sudo for it");
}

/// `DIR:NAME` or another pair with a character between.
pub fn join(dir: &Path, between: &str, name: &str) -> std::ffi::OsString {
    let mut all = dir.as_os_str().to_os_string();
    all.push(OsStr::new(between));
    all.push(OsStr::new(name));
    all
}
