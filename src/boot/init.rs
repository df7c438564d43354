//! mosfs as the first process of an initramfs that `mosfs build` made.
//!
//! ```text
//! mount /proc, /sys, /dev, /run
//! load the modules of /usr/lib/mosfs/modules/order
//! if the firmware started the machine from an install medium: install, and end the machine (crate::setup::installer)
//! start the watchdog, where CONFIG says so (`watchdog`)
//! run `mosfs boot` as a process of its own, with an empty environment
//! move the mounts to the new root, free the initramfs, make /sysroot the root, run its init
//! ```
//!
//! There is no shell and no other program. What fails ends in a restart, or in a halt where CONFIG says so
//! (`on-failure`); the boot loader counts. What hangs ends in a restart where there is a watchdog: it is left running,
//! and the init of the root has to take it over.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::settings::{OnFailure, Settings};
use crate::deploy::esp;
use crate::error::{Class, Classified, IoContext, IoError};
use crate::setup::installer::{self, Installer};
use crate::setup::media;
use crate::sys::file;
use crate::sys::init::{self as calls, End};
use crate::sys::mountapi::{self, CallError, mount_legacy};
use crate::sys::watchdog;

/// The path that Linux starts in an initramfs.
pub const PATH: &str = "/init";
/// The full program in the initramfs.
const PROGRAM: &str = "/usr/bin/mosfs";
/// The modules, and the list of them.
const MODULES: &str = "/usr/lib/mosfs/modules";
/// CONFIG in the initramfs.
const CONFIG: &str = "/etc/mosfs";
/// Where the root is mounted.
const SYSROOT: &str = "/sysroot";
/// The file systems of the kernel, which the new root gets: type, place, options.
const MOUNTS: [(&str, &str, &str); 4] = [
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devtmpfs", "/dev", "mode=755"),
    ("tmpfs", "/run", "mode=755"),
];
/// What is there if the firmware is UEFI, and where its variables are mounted.
const UEFI: &str = "/sys/firmware/efi";
const VARIABLES: &str = "/sys/firmware/efi/efivars";
/// Longest list of modules, or kernel command line, in bytes.
const MAX_TEXT: u64 = 1 << 20;
/// What Linux itself looks for, less the shell (init/main.c, kernel_init).
const INITS: [&str; 3] = ["/sbin/init", "/etc/init", "/bin/init"];

/// Why the system is not started.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A mount failed.
    #[error("cannot mount {place}: {source}")]
    Mount {
        /// Where.
        place: &'static str,
        /// The call that failed.
        source: CallError,
    },
    /// `mosfs boot` did not mount a root. It has said why.
    #[error("no system is booted (exit code {code}), the reason is above")]
    NotBooted {
        /// Its exit code.
        code: i32,
    },
    /// The root has no init that can be run.
    #[error("the root has no init that can be run: {}", list(tried))]
    NoInit {
        /// What was tried, and why it failed.
        tried: Vec<(String, io::Error)>,
    },
    /// A file cannot be used.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for InitError {
    fn class(&self) -> Class {
        Class::Failure
    }
}

fn list(tried: &[(String, io::Error)]) -> String {
    tried.iter().map(|(path, error)| format!("{path}: {error}")).collect::<Vec<_>>().join("; ")
}

/// Whether this process is the first one of an initramfs of `mosfs build`.
pub fn is_init() -> bool {
    std::process::id() == 1
        && std::env::args_os().next().is_some_and(|name| name == PATH)
        && Path::new(MODULES).is_dir()
}

/// Starts the system. It does not return where it succeeds. `say` gets a sentence for what does not stop a boot.
pub fn run(say: &dyn Fn(&str)) -> InitError {
    match start(say) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

/// What follows a boot that failed. It does not return.
pub fn fail(say: &dyn Fn(&str)) -> ! {
    let on_failure =
        Settings::load(Path::new(CONFIG)).map(|settings| settings.on_failure).unwrap_or_default();
    let end = match on_failure {
        OnFailure::Halt => {
            say("this machine halts");
            End::Halt
        }
        // There is no shell here: `mosfs build` refuses a CONFIG that asks for one.
        OnFailure::Reboot | OnFailure::Shell => {
            say("this machine restarts in 5 seconds");
            std::thread::sleep(std::time::Duration::from_secs(5));
            End::Restart
        }
    };
    finish(end, say)
}

/// Ends the machine. It does not return.
fn finish(end: End, say: &dyn Fn(&str)) -> ! {
    say(&format!("the kernel does not end this machine: {}", calls::end(end)));
    // A first process that ends is a panic of the kernel, which restarts.
    std::process::exit(1)
}

enum Never {}

fn start(say: &dyn Fn(&str)) -> Result<Never, InitError> {
    for (kind, place, options) in MOUNTS {
        let flags = libc::MS_NOSUID | if kind == "devtmpfs" { 0 } else { libc::MS_NODEV };
        match mount_legacy(kind, Path::new(place), kind, flags, options) {
            // The kernel has done it.
            Err(error) if error.errno() == libc::EBUSY => {}
            result => result.map_err(|source| InitError::Mount { place, source })?,
        }
    }
    load_modules(say)?;
    if let Some(end) = install(say) {
        finish(end, say);
    }
    let watchdog = start_watchdog(say).then_some(["--watchdog", watchdog::DEVICE]);
    // Words of the kernel command line that nobody knows become environment variables of the first process.
    let status = Command::new(PROGRAM)
        .arg0("mosfs")
        .args(["boot", "--system", "/run/mosfs/system", "--config", CONFIG, "--sysroot", SYSROOT])
        .args(watchdog.iter().flatten())
        .env_clear()
        .env("PATH", "/usr/bin")
        .stdin(Stdio::null())
        .status()
        .on("run", PROGRAM)?;
    if !status.success() {
        return Err(InitError::NotBooted { code: status.code().unwrap_or(-1) });
    }
    switch_root()
}

/// Installs, if the firmware started this machine from an install medium. Returns how the machine is to end then.
///
/// Rule: only where the machine was started from decides. Whatever cannot be found out, the machine boots.
fn install(say: &dyn Fn(&str)) -> Option<End> {
    // A kernel that mosfs made is started by UEFI alone.
    if !Path::new(UEFI).exists() {
        return None;
    }
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    if let Err(error) = mount_legacy("efivarfs", Path::new(VARIABLES), "efivarfs", flags, "")
        && error.errno() != libc::EBUSY
    {
        say(&format!("the firmware's variables cannot be read, so no install medium is looked for: {error}"));
        return None;
    }
    let partition = esp::loader_partition();
    // The init of the system mounts them as it likes.
    if let Err(error) = mountapi::unmount(Path::new(VARIABLES), true) {
        say(&error.to_string());
    }
    let medium = media::find(partition.as_deref(), say)?;
    installer::run(&medium, &Installer { program: Path::new(PROGRAM), config: Path::new(CONFIG) }, say)
}

/// Starts the watchdog, where CONFIG says so; returns whether it runs. A machine that has none boots all the same: it may be
/// another model.
fn start_watchdog(say: &dyn Fn(&str)) -> bool {
    // `mosfs boot` reports a CONFIG that cannot be read.
    let Ok(Settings { watchdog: Some(seconds), .. }) = Settings::load(Path::new(CONFIG)) else {
        return false;
    };
    let started = watchdog::start(Path::new(watchdog::DEVICE), seconds);
    match &started {
        Ok(seconds) => {
            say(&format!(
                "this machine restarts unless its system feeds the watchdog within {seconds} seconds"
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            say("this machine has no watchdog whose driver is in its kernel");
        }
        Err(error) => say(&format!("the watchdog is not started: {}: {error}", watchdog::DEVICE)),
    }
    // Where it has another time than it should, it runs all the same.
    !started.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Loads the modules of the list, in its order. One that fails is no reason to stop: most are for other machines.
fn load_modules(say: &dyn Fn(&str)) -> Result<(), InitError> {
    let order = Path::new(MODULES).join("order");
    let list = file::read_named(&order, MAX_TEXT)?;
    for name in String::from_utf8_lossy(&list).lines() {
        let path = Path::new(MODULES).join(name);
        let loaded = calls::load_module(&path);
        match loaded {
            // Its hardware is not here, or that of a module whose symbols it needs.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT)) => {}
            Err(error) => say(&format!("the module {name} is not loaded: {error}")),
            Ok(()) => {}
        }
    }
    Ok(())
}

fn switch_root() -> Result<Never, InitError> {
    let sysroot = Path::new(SYSROOT);
    let command_line = file::read_named(Path::new("/proc/cmdline"), MAX_TEXT)?;
    let command_line = String::from_utf8_lossy(&command_line).into_owned();
    for (_, place, _) in MOUNTS {
        let to = sysroot.join(place.trim_start_matches('/'));
        calls::move_mount(place, &to).map_err(|source| InitError::Mount { place, source })?;
    }
    // The memory of the initramfs; what is mounted below it is not touched.
    let device = fs::metadata("/").on("stat", "/")?.dev();
    free(Path::new("/"), device);
    std::env::set_current_dir(sysroot).on("enter", sysroot)?;
    calls::move_mount(".", Path::new("/")).map_err(|source| InitError::Mount { place: "/", source })?;
    std::os::unix::fs::chroot(".").on("enter", sysroot)?;
    std::env::set_current_dir("/").on("enter", "/")?;
    let mut tried = Vec::new();
    for init in inits(&command_line) {
        let error = Command::new(&init).env_clear().envs(environment()).exec();
        tried.push((init, error));
    }
    Err(InitError::NoInit { tried })
}

/// The programs that may be the init of the root, in order: what the kernel command line names, then the usual ones.
fn inits(command_line: &str) -> Vec<String> {
    let mut named = command_line.split_whitespace().rev().filter_map(|word| word.strip_prefix("init="));
    let named = named.find(|path| path.starts_with('/'));
    named.into_iter().chain(INITS).map(str::to_string).collect()
}

/// What Linux gives to the first process.
fn environment() -> [(OsString, OsString); 2] {
    [("HOME".into(), "/".into()), ("TERM".into(), "linux".into())]
}

/// Removes all that is on this device. What cannot be removed stays in memory, which is no harm.
fn free(folder: &Path, device: u64) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())).collect::<Vec<PathBuf>>() {
        let Ok(metadata) = path.symlink_metadata() else { continue };
        if metadata.dev() != device {
            continue;
        }
        if metadata.is_dir() {
            free(&path, device);
            let _ = fs::remove_dir(&path);
        } else {
            let _ = fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_init_of_the_command_line_comes_first() {
        assert_eq!(inits("root=mosfs quiet"), INITS);
        assert_eq!(inits("init=/a root=mosfs init=/b\n")[..2], ["/b", "/sbin/init"]);
        assert_eq!(inits("init=sh"), INITS, "only an absolute path");
    }

    #[test]
    fn this_process_is_not_the_first_one() {
        assert!(!is_init());
    }

    #[test]
    fn freeing_removes_what_is_on_the_device_alone() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().metadata().unwrap().dev();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/c"), "x").unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("a/link")).unwrap();
        free(dir.path(), device + 1);
        assert!(dir.path().join("a/b/c").exists());
        free(dir.path(), device);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
