//! The only module with `unsafe`: thin, safe wrappers of system calls and CPU instructions.
//!
//! Each wrapper returns `io::Result`, or an error of its own that names the whole call ([`mountapi`], [`dm`],
//! [`tpm`]). It owns what it opens (`OwnedFd`), and each `unsafe` block has a SAFETY line. Nothing here depends
//! on the formats of mosfs. [`elf`], [`failpoint`], [`flock`], [`locks`], [`notify`] and [`said`] need no `unsafe`.

pub mod atomic;
pub mod blkid;
pub mod daemon;
pub mod disk;
pub mod dm;
pub mod elf;
pub mod failpoint;
pub mod file;
pub mod flock;
pub mod fuse;
pub mod helper;
pub mod init;
pub mod locks;
pub mod loopdev;
pub mod memory;
pub mod mountapi;
pub mod namespace;
pub mod notify;
pub mod process;
pub mod said;
pub mod sha256;
pub mod streams;
pub mod terminal;
pub mod tpm;
pub mod watchdog;

/// The folder of files that last as long as this boot (locks, records, mount points): `$MOSFS_RUN`, or
/// `/run/mosfs`.
pub fn run_dir() -> std::path::PathBuf {
    std::env::var_os("MOSFS_RUN").map_or_else(|| "/run/mosfs".into(), std::path::PathBuf::from)
}
