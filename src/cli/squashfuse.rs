//! The command line of squashfuse, for callers that know it: `squashfuse` and `squashfuse_ll` as links to mosfs.
//!
//! ```text
//! squashfuse [-f] [-o OPTIONS] ARCHIVE MOUNTPOINT
//! ```
//! Rules of libfuse: options are joined by commas, a backslash keeps the next character, and they may stand before,
//! between and behind the two paths. A mount differs from one of `mosfs mount` where squashfuse does:
//! - nothing is verified unless `-o root_hash=` is given. The link is how the user asks for that;
//! - only the user who mounts may enter, unless `-o allow_other`, and may read everything: the kernel compares modes
//!   and owners only under `-o default_permissions`;
//! - `uid=0` and `gid=0` change nothing.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use super::mount::root_hash;
use super::plain::{FileArgs, FileArgsError, FileOptions};
use super::{notify, output};
use crate::digest::Digest;
use crate::error::{AnyError, Class, Classified, IoContext};
use crate::image::plain::PlainFile;
use crate::mount::fuse::{self, FuseOptions};
use crate::mount::{Access, Backend, Daemon, MountFlags, MountPlan, Request};

/// The names that a link may have.
const NAMES: [&str; 2] = ["squashfuse", "squashfuse_ll"];

/// A target that is a connection to FUSE, which the caller has mounted: `/dev/fd/N` (libfuse).
const CONNECTION: &str = "/dev/fd/";

/// squashfuse starts `fusermount3` when a signal asks it to unmount. Callers rely on the time that this takes.
const GRACE: Duration = Duration::from_millis(50);

/// What libfuse knows and mosfs does without being asked, or never.
const PASSED_OVER: &[&str] = &[
    "ro",
    "rw",
    "async",
    "sync",
    "dirsync",
    "atime",
    "noatime",
    "async_read",
    "sync_read",
    "big_writes",
    "kernel_cache",
    "auto_cache",
    "noauto_cache",
    "clone_fd",
    "nonempty",
    "use_ino",
    "readdir_ino",
    "intr",
    "noforget",
    "auto_unmount",
];
/// The same, with a value.
const PASSED_OVER_VALUES: &[&str] = &[
    "subtype",
    "blksize",
    "max_read",
    "max_readahead",
    "max_background",
    "congestion_threshold",
    "entry_timeout",
    "attr_timeout",
    "ac_attr_timeout",
    "negative_timeout",
    "max_idle_threads",
    "max_threads",
];

/// What a command line says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Line {
    paths: Vec<PathBuf>,
    foreground: bool,
    one_thread: bool,
    help: bool,
    version: bool,
    file: FileArgs,
    options: FileOptions,
    root_hashes: Vec<Digest>,
    flags: MountFlags,
    fsname: Option<String>,
    notify: Vec<String>,
}

/// Whether the program was called by a name of squashfuse.
pub(super) fn is_called(args: &[OsString]) -> bool {
    let name = args.first().and_then(|name| Path::new(name).file_name());
    name.is_some_and(|name| NAMES.iter().any(|known| name == *known))
}

/// Runs a command line of squashfuse.
pub(super) fn run(args: &[OsString]) -> ExitCode {
    let name = args.first().and_then(|name| Path::new(name).file_name()).unwrap_or(OsStr::new(NAMES[0]));
    let name = name.to_string_lossy();
    let line = match Line::parse(args.get(1..).unwrap_or_default()) {
        Ok(line) => line,
        Err(error) => return output::exit_code(Err(error)),
    };
    if line.help {
        return output::exit_code(usage(&name).iter().try_for_each(output::line));
    }
    if line.version {
        return output::exit_code(output::line(format_args!(
            "{name} of mosfs {}",
            env!("CARGO_PKG_VERSION")
        )));
    }
    if let [archive, target] = &line.paths[..] {
        return output::exit_code(mount(&line, archive, target));
    }
    usage(&name).iter().for_each(output::plain);
    ExitCode::from(Class::Input.exit_code())
}

fn usage(name: &str) -> Vec<String> {
    let options = [
        ("-f", "stay in the foreground"),
        ("-s", "use one thread"),
        ("-d, -o debug", "stay in the foreground, with the log on stderr"),
        ("-h, --help", "print this help"),
        ("-V, --version", "print the version"),
        ("-o offset=N", "the image begins at byte N of ARCHIVE"),
        ("-o subdir=PATH", "mount this folder of the image"),
        ("-o uid=N", "all files belong to this user"),
        ("-o gid=N", "all files belong to this group"),
        ("-o timeout=N", "unmount after N seconds without use"),
        ("-o notify_pipe=PATH", "write `s` to a named pipe when the mount is ready, `f` if it failed"),
        ("-o allow_other", "let all users enter"),
        ("-o allow_root", "let root enter"),
        ("-o default_permissions", "let the kernel compare modes and owners"),
        ("-o root_hash=HEX", "verify every block: the root hash that veritysetup printed"),
        ("-o hash_file=PATH", "the hash tree is in this file"),
        ("-o hash_offset=N", "the hash tree begins at byte N of ARCHIVE, or of hash_file"),
    ];
    let mut lines = vec![
        format!("Usage: {name} [options] ARCHIVE MOUNTPOINT"),
        String::new(),
        format!("Mount a squashfs or erofs image. This is mosfs with the command line of {name}."),
        String::new(),
    ];
    lines.extend(options.iter().map(|(option, does)| format!("    {option:<23} {does}")));
    lines
}

impl Line {
    fn parse(args: &[OsString]) -> Result<Self, AnyError> {
        let flags = MountFlags { access: Access::Mounter, ..MountFlags::untrusted() };
        let mut line = Self { flags, ..Self::default() };
        let mut args = args.iter();
        let mut only_paths = false;
        while let Some(arg) = args.next() {
            let bytes = arg.as_bytes();
            match bytes {
                _ if only_paths || !bytes.starts_with(b"-") || bytes == b"-" => line.paths.push(arg.into()),
                b"--" => only_paths = true,
                b"-f" => line.foreground = true,
                b"-d" => line.foreground = true,
                b"-s" => line.one_thread = true,
                b"-h" | b"--help" => line.help = true,
                b"-V" | b"--version" => line.version = true,
                b"-o" => match args.next() {
                    Some(options) => line.options(options)?,
                    None => return Err(LineError::NoOptions.into()),
                },
                [b'-', b'o', options @ ..] => line.options(OsStr::from_bytes(options))?,
                _ => return Err(LineError::Unknown { option: arg.to_string_lossy().into_owned() }.into()),
            }
        }
        Ok(line)
    }

    fn options(&mut self, options: &OsStr) -> Result<(), AnyError> {
        split(options.as_bytes()).iter().filter(|option| !option.is_empty()).try_for_each(|option| {
            self.option(option.to_str().ok_or_else(|| LineError::unknown_option(option))?)
        })
    }

    fn option(&mut self, option: &str) -> Result<(), AnyError> {
        let (name, value) =
            option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
        let bytes = |text: &str| {
            let number = text.parse().map_err(|_| {
                AnyError::from(FileArgsError::Value {
                    option: option.to_string(),
                    expected: "a number of bytes",
                })
            });
            number.map(Some)
        };
        match (name, value) {
            ("offset", Some(value)) => self.file.offset = bytes(value)?,
            ("hash_offset", Some(value)) => self.file.hash_offset = bytes(value)?,
            ("hash_file", Some(value)) => self.file.hash_file = Some(value.into()),
            ("root_hash", Some(value)) => {
                let wrong =
                    |_| FileArgsError::Value { option: option.to_string(), expected: "64 hex digits" };
                self.root_hashes.push(root_hash(value).map_err(wrong)?);
            }
            // 0 is what squashfuse has without the option.
            ("uid" | "gid", Some("0")) => {}
            ("fsname", Some(value)) => self.fsname = Some(value.to_string()),
            ("debug", None) => self.foreground = true,
            ("allow_root", None) => self.flags.allow_root = true,
            ("default_permissions", None) => self.flags.access = Access::Checked,
            _ if notify::is_option(option) => self.notify.push(option.to_string()),
            (_, None) if PASSED_OVER.contains(&name) => {}
            (_, Some(_)) if PASSED_OVER_VALUES.contains(&name) => {}
            _ if self.options.take(option)? => {}
            _ => self.flags.apply(option)?,
        }
        Ok(())
    }
}

/// The options of a list: a backslash keeps the next character (libfuse, fuse_opt_add_opt_escaped).
fn split(list: &[u8]) -> Vec<OsString> {
    let mut all = vec![Vec::new()];
    let mut bytes = list.iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b',' => all.push(Vec::new()),
            b'\\' => all.iter_mut().last().into_iter().for_each(|last| last.extend(bytes.next())),
            _ => all.iter_mut().last().into_iter().for_each(|last| last.push(byte)),
        }
    }
    all.into_iter().map(OsString::from_vec).collect()
}

fn mount(line: &Line, archive: &Path, target: &Path) -> Result<(), AnyError> {
    let pipe = notify::Pipe::of(&line.notify)?;
    let done = try_mount(line, archive, target, &pipe);
    match &done {
        Ok(()) => pipe.say_in_background(notify::SUCCESS),
        Err(_) => pipe.say(notify::FAILURE),
    }
    done
}

fn try_mount(line: &Line, archive: &Path, target: &Path, pipe: &notify::Pipe) -> Result<(), AnyError> {
    let is_unverified = line.root_hashes.is_empty();
    let file = line.file.file(archive, &line.root_hashes, is_unverified)?;
    let path = std::path::absolute(archive).on("find", archive)?;
    let mut plan = MountPlan::of_file(PlainFile { path, ..file }, line.options.shown.clone());
    if let Some(name) = &line.fsname {
        plan.source.clone_from(name);
    }
    let threads = if line.one_thread { 1 } else { 0 };
    let options = FuseOptions { threads, idle: line.options.idle, grace: GRACE, ..FuseOptions::default() };
    let mut ready = || pipe.say_from_thread(notify::SUCCESS);
    if let Some(connection) = connection(target) {
        if !line.foreground {
            return Err(LineError::Background { target: target.to_path_buf() }.into());
        }
        fuse::serve_connection(&plan, connection, &line.flags, &options, output::log(), &mut ready)?;
        return Ok(());
    }
    let daemon = if line.foreground {
        Daemon::Foreground { terminal: output::log(), ready: &mut ready }
    } else {
        Daemon::Forked
    };
    let flags = line.flags.clone();
    Request {
        plan: &plan,
        target,
        backend: Backend::Fuse,
        flags,
        upper: None,
        fuse: options,
        daemon,
        foreign: None,
    }
    .run()?;
    Ok(())
}

/// The number of a connection to FUSE that is given as the target.
fn connection(target: &Path) -> Option<i32> {
    target.to_str()?.strip_prefix(CONNECTION)?.parse().ok().filter(|number| *number >= 0)
}

/// What is wrong with a command line.
#[derive(Debug, thiserror::Error)]
enum LineError {
    #[error("option `{option}` is not known")]
    Unknown { option: String },
    #[error("option -o needs a value")]
    NoOptions,
    #[error("{} is a connection of the caller, and needs -f", target.display())]
    Background { target: PathBuf },
}

impl LineError {
    fn unknown_option(option: &OsStr) -> AnyError {
        Self::Unknown { option: option.to_string_lossy().into_owned() }.into()
    }
}

impl Classified for LineError {
    fn class(&self) -> Class {
        Class::Input
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Line, AnyError> {
        let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        Line::parse(&args)
    }

    #[test]
    fn a_command_line_is_read_as_libfuse_reads_it() {
        let line =
            parse("-f -o allow_other,ro,uid=1000,gid=100,offset=40960 /proc/self/fd/3 /dev/fd/4").unwrap();
        assert_eq!(line.paths, ["/proc/self/fd/3", "/dev/fd/4"].map(PathBuf::from));
        assert_eq!(connection(&line.paths[1]), Some(4));
        assert!(line.foreground && line.flags.allow_other && line.flags.nosuid && line.flags.nodev);
        assert_eq!((line.file.offset, line.options.shown.uid), (Some(40960), Some(1000)));
        assert_eq!(line.flags.access, Access::Mounter);
        let line = parse("a -osubdir=x\\,y\\\\z,uid=0 b -s -o suid,default_permissions").unwrap();
        assert_eq!(line.options.shown.subdir, PathBuf::from("x,y\\z"));
        assert_eq!((line.options.shown.uid, line.one_thread), (None, true));
        assert!(!line.flags.nosuid && line.flags.access == Access::Checked);
        assert_eq!(parse("-- -f x").unwrap().paths, ["-f", "x"].map(PathBuf::from));
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for wrong in
            ["-x a b", "-o", "-o bogus a b", "-o bogus=1 a b", "-o offset=x a b", "-o root_hash=1 a b"]
        {
            assert_eq!(parse(wrong).unwrap_err().class(), Class::Input, "{wrong}");
        }
    }

    #[test]
    fn it_is_called_by_the_name_of_the_link() {
        let called = |name: &str| is_called(&[OsString::from(name)]);
        assert!(called("/usr/bin/squashfuse") && called("squashfuse_ll"));
        assert!(!called("mosfs") && !called("squashfuse_ls") && !is_called(&[]));
    }
}
