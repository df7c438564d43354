//! What a container runs, looked up before it is started: so that an image without its program fails with a sentence
//! that names the target, the program and the image.
//!
//! The lookup sees what the program will see: the root, with the mounts over it. It follows links as the kernel does
//! inside the container, and never out of it. It opens regular files alone, and reads the first bytes of them.
//!
//! **Rule:** what may run is never refused. Where the lookup cannot know, the runtime decides: below /proc, /sys and
//! /dev, on errors of reading, and for formats that binfmt_misc may know.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::Container;
use super::bundle::Prepared;
use super::user::User;
use crate::sorting;
use crate::sys::elf::Elf;
use crate::sys::{file, namespace};

/// Most links that are followed (path_resolution(7)).
const MOST_LINKS: usize = 40;
/// Most scripts that are the interpreters of others (execve(2)).
const MOST_INTERPRETERS: usize = 5;
/// The first bytes of a file, which say what it is.
const HEAD: usize = 4096;

/// What is looked up in.
#[derive(Debug)]
pub struct Tree<'a> {
    /// The mounted root.
    pub root: &'a Path,
    /// The mounts over it.
    pub mounts: &'a [Prepared],
    /// Who runs the program.
    pub user: &'a User,
    /// The host's id of the container's id 0.
    pub base: u32,
    /// Where the program starts.
    pub folder: &'a str,
    /// Whether who runs it may run every file that anybody may run: root, or CAP_DAC_OVERRIDE.
    pub overrides: bool,
    /// Whether an init starts it, which has a shell run what the kernel does not know (execvp(3)).
    pub init: bool,
}

/// Why something was not found.
enum Miss {
    /// It is not there.
    Absent,
    /// Nobody can know before the start.
    Unknown,
}

/// A mount with the place where links lead it.
struct Mounted {
    at: PathBuf,
    source: Option<PathBuf>,
    noexec: bool,
}

/// A file that was found.
struct Found {
    file: File,
    noexec: bool,
}

impl<'a> Tree<'a> {
    /// What the container's program, or another command in it, is looked up in.
    pub fn of(container: &'a Container, root: &'a Path, mounts: &'a [Prepared], user: &'a User) -> Self {
        let added = container.target.workload.capabilities.iter().flatten();
        Self {
            root,
            mounts,
            user,
            base: container.base.unwrap_or(0),
            folder: container.image.working_dir.as_deref().unwrap_or_default(),
            overrides: user.uid == 0 || added.into_iter().any(|one| one == "DAC_OVERRIDE"),
            init: container.target.workload.run().init == Some(true),
        }
    }
}

/// Returns why the program `command` cannot run, as the end of a sentence whose subject it is; `None` if it can, or if the
/// runtime must decide.
pub fn problem(tree: &Tree<'_>, command: &str, environment: &[String]) -> Option<String> {
    let walk = Walk::new(tree).ok()?;
    let path = environment.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default();
    let in_folders = path.split(':').map(|folder| Path::new(folder).join(command));
    let candidates: Vec<PathBuf> = if command.starts_with('/') {
        vec![command.into()]
    } else if command.contains('/') {
        // Relative to the folder where it starts, or, for some runtimes, to those of PATH.
        std::iter::once(PathBuf::from(command)).chain(in_folders).collect()
    } else {
        in_folders.collect()
    };
    let mut first = None;
    for candidate in candidates {
        match walk.check(&candidate, MOST_INTERPRETERS) {
            Ok(()) => return None,
            Err(Problem::Absent) => {}
            Err(Problem::Bad(why)) => _ = first.get_or_insert(why),
        }
    }
    Some(first.unwrap_or_else(|| {
        if command.contains('/') {
            "does not exist".to_string()
        } else {
            format!("is in no folder of PATH ({path})")
        }
    }))
}

/// Why a file cannot be run.
enum Problem {
    /// There is none.
    Absent,
    /// As the end of a sentence.
    Bad(String),
}

/// The root and the mounts over it.
struct Walk<'a> {
    tree: &'a Tree<'a>,
    root: File,
    mounts: Vec<Mounted>,
}

impl<'a> Walk<'a> {
    fn new(tree: &'a Tree<'a>) -> io::Result<Self> {
        let mut walk = Self { tree, root: open_path(tree.root)?, mounts: Vec::new() };
        let mut all: Vec<&Prepared> = tree.mounts.iter().collect();
        sorting::sort_by(&mut all, |a, b| a.destination.cmp(&b.destination));
        for one in all {
            // The runtime follows links of the image to the place, too.
            let at = walk.place(Path::new(&one.destination));
            let noexec = one.options.iter().any(|option| option == "noexec");
            walk.mounts.push(Mounted { at, source: one.source.clone(), noexec });
        }
        Ok(walk)
    }

    /// Where links lead the longest part of a path that is there, and the rest, which the runtime makes.
    fn place(&self, path: &Path) -> PathBuf {
        match (self.find(path), path.parent(), path.file_name()) {
            (Ok((at, _)), _, _) => at,
            (Err(_), Some(parent), Some(name)) => self.place(parent).join(name),
            _ => path.to_path_buf(),
        }
    }

    /// Finds what is at a path, which is relative to the folder where the program starts.
    fn find(&self, path: &Path) -> Result<(PathBuf, Found), Miss> {
        let whole = Path::new("/").join(self.tree.folder).join(path);
        let mut left: VecDeque<OsString> = parts(&whole);
        let root = self.root.try_clone().map_err(|_| Miss::Unknown)?;
        let mut above = vec![(PathBuf::from("/"), Found { file: root, noexec: false })];
        let mut links = 0;
        while let Some(part) = left.pop_front() {
            if part == ".." {
                if above.len() > 1 {
                    above.pop();
                }
                continue;
            }
            let Some((folder, within)) = above.last() else { return Err(Miss::Unknown) };
            let at = folder.join(&part);
            if ["/proc", "/sys", "/dev"].iter().any(|special| at == Path::new(special)) {
                return Err(Miss::Unknown);
            }
            let mount = self.mounts.iter().rev().find(|mount| mount.at == at);
            let (file, noexec) = match mount {
                Some(Mounted { source: Some(source), noexec, .. }) => {
                    (open_path(source).map_err(|_| Miss::Unknown)?, *noexec)
                }
                // Memory, which is empty at first.
                Some(Mounted { source: None, .. }) if left.is_empty() => return Err(Miss::Unknown),
                Some(Mounted { source: None, .. }) => return self.below_memory(&at, &left),
                None => (open_part(&within.file, &part)?, within.noexec),
            };
            let metadata = file.metadata().map_err(|_| Miss::Unknown)?;
            if metadata.is_symlink() {
                links += 1;
                if links > MOST_LINKS {
                    return Err(Miss::Absent);
                }
                let to = namespace::link_of(file.as_fd()).map_err(|_| Miss::Unknown)?;
                if to.is_absolute() {
                    above.truncate(1);
                }
                for part in parts(&to).into_iter().rev() {
                    left.push_front(part);
                }
                continue;
            }
            above.push((at, Found { file, noexec }));
        }
        above.pop().ok_or(Miss::Unknown)
    }

    /// What is below a folder in memory: only other mounts.
    fn below_memory(&self, at: &Path, left: &VecDeque<OsString>) -> Result<(PathBuf, Found), Miss> {
        let whole = left.iter().fold(at.to_path_buf(), |path, part| path.join(part));
        let is_mounted = |mount: &Mounted| {
            mount.source.is_some() && whole.starts_with(&mount.at) && mount.at.starts_with(at)
        };
        Err(if self.mounts.iter().any(is_mounted) { Miss::Unknown } else { Miss::Absent })
    }

    /// Checks that a file can be run.
    fn check(&self, path: &Path, interpreters: usize) -> Result<(), Problem> {
        let bad = |why: String| Err(Problem::Bad(why));
        let found = match self.find(path) {
            Ok((_, found)) => found,
            Err(Miss::Absent) => return Err(Problem::Absent),
            Err(Miss::Unknown) => return Ok(()),
        };
        let Ok(metadata) = found.file.metadata() else { return Ok(()) };
        if metadata.is_dir() {
            return bad("is a folder".into());
        }
        if !metadata.is_file() {
            return bad("is no regular file".into());
        }
        let user = self.tree.user;
        let group = |gid: u32| metadata.gid() == self.tree.base.saturating_add(gid);
        let bit = if self.tree.overrides {
            0o111
        } else if metadata.uid() == self.tree.base.saturating_add(user.uid) {
            0o100
        } else if group(user.gid) || user.more_gids.iter().copied().any(group) {
            0o010
        } else {
            0o001
        };
        // The same file: a link of /proc that leads to nothing else.
        let again = PathBuf::from(format!("/proc/self/fd/{}", found.file.as_raw_fd()));
        if metadata.mode() & bit == 0 {
            // A list may allow what the bits of the group and of others do not.
            if matches!(bit, 0o010 | 0o001) && file::may_have_acl(&again) {
                return Ok(());
            }
            return bad(format!(
                "is not executable by user {} (mode {:04o})",
                user.uid,
                metadata.mode() & 0o7777
            ));
        }
        if found.noexec {
            return bad("is on a mount with the option noexec".into());
        }
        let Ok(file) = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(again) else {
            return Ok(());
        };
        let mut head = vec![0; HEAD.min(usize::try_from(metadata.len()).unwrap_or(HEAD))];
        if file.read_exact_at(&mut head, 0).is_err() {
            return Ok(());
        }
        if let Some(line) = head.strip_prefix(b"#!") {
            return self.check_interpreter("interpreter", script_interpreter(line), interpreters);
        }
        match Kind::of(&head) {
            Kind::Other => {
                if self.tree.init || knows_other_formats() {
                    return Ok(());
                }
                bad("is neither a program in ELF format nor a script that begins with #! and its interpreter"
                    .into())
            }
            Kind::Foreign(machine) => {
                if knows_other_formats() {
                    return Ok(());
                }
                bad(format!("is a program for {machine}, and this machine is {}", std::env::consts::ARCH))
            }
            Kind::Program(loader) => self.check_interpreter("loader", loader, interpreters),
        }
    }

    /// Checks what the kernel starts in the place of a script or a dynamic program.
    fn check_interpreter(&self, what: &str, path: Option<PathBuf>, left: usize) -> Result<(), Problem> {
        let Some(path) = path.filter(|path| path.is_absolute() && left > 0) else { return Ok(()) };
        let name = crate::text::one_line(&path.display().to_string()).into_owned();
        match self.check(&path, left - 1) {
            Ok(()) => Ok(()),
            Err(Problem::Absent) => {
                Err(Problem::Bad(format!("requires the {what} {name}, which does not exist")))
            }
            Err(Problem::Bad(why)) => Err(Problem::Bad(format!("requires the {what} {name}, which {why}"))),
        }
    }
}

/// The names of a path; `.` and empty ones are none.
fn parts(path: &Path) -> VecDeque<OsString> {
    let all = path.as_os_str().as_bytes().split(|byte| *byte == b'/');
    all.filter(|part| !part.is_empty() && *part != b".")
        .map(|part| OsString::from_vec(part.to_vec()))
        .collect()
}

fn open_path(path: &Path) -> io::Result<File> {
    fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)
}

/// Opens an entry of a folder, a link itself.
fn open_part(folder: &File, name: &OsStr) -> Result<File, Miss> {
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    namespace::open_in_root(folder.as_fd(), Path::new(name), flags).map_err(|error| {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR | libc::ENAMETOOLONG) => Miss::Absent,
            _ => Miss::Unknown,
        }
    })
}

/// The interpreter of a script, from what follows `#!`.
fn script_interpreter(line: &[u8]) -> Option<PathBuf> {
    let mut words = line.split(|byte| *byte == b'\n').next()?.split(|byte| matches!(byte, b' ' | b'\t' | 0));
    let path = words.find(|word| !word.is_empty())?;
    // A script of Windows has a carriage return at the end of the line, which the kernel takes for a part of the name.
    Some(PathBuf::from(OsStr::from_bytes(path)))
}

/// Whether this kernel may run other formats than ELF of its own machine.
fn knows_other_formats() -> bool {
    let formats = fs::read_dir("/proc/sys/fs/binfmt_misc").into_iter().flatten().flatten();
    formats.into_iter().any(|entry| entry.file_name() != "register" && entry.file_name() != "status")
}

/// The machines of ELF programs (elf(5), e_machine).
const MACHINES: [(u16, &str); 8] = [
    (3, "x86"),
    (20, "powerpc"),
    (21, "powerpc64"),
    (22, "s390x"),
    (40, "arm"),
    (62, "x86_64"),
    (183, "aarch64"),
    (243, "riscv64"),
];

/// What the first bytes of a file say.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// It is no ELF file.
    Other,
    /// A program of another machine.
    Foreign(String),
    /// A program, and its loader if it is a dynamic one.
    Program(Option<PathBuf>),
}

impl Kind {
    fn of(head: &[u8]) -> Self {
        let Ok(elf) = Elf::new(head) else { return Self::Other };
        let Ok(machine) = elf.machine() else { return Self::Other };
        // A kernel runs 32-bit programs of its own family, too, if it was built so.
        let own: &[u64] = match std::env::consts::ARCH {
            "x86_64" => &[62, 3],
            "aarch64" => &[183, 40],
            _ => return Self::Program(None),
        };
        if elf.is_big_endian() || !own.contains(&machine) {
            let known = MACHINES.iter().find(|(number, _)| u64::from(*number) == machine);
            return Self::Foreign(
                known.map_or_else(|| format!("machine {machine}"), |(_, name)| (*name).into()),
            );
        }
        // One whose path lies further back is left to the kernel.
        let loader = elf.loader().ok().flatten();
        Self::Program(loader.map(|path| PathBuf::from(OsStr::from_bytes(path))))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn put(root: &Path, path: &str, content: &[u8], mode: u32) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// A program of this machine with this loader, as far as anybody reads it.
    fn elf(machine: u8, loader: Option<&str>) -> Vec<u8> {
        let mut head = vec![0; 256];
        head[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        head[18] = machine;
        (head[32], head[54], head[56]) = (64, 56, 1);
        if let Some(loader) = loader {
            (head[64], head[72], head[96]) = (3, 128, u8::try_from(loader.len()).unwrap() + 1);
            head[128..128 + loader.len()].copy_from_slice(loader.as_bytes());
        }
        head
    }

    const OWN: u8 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
    const FOREIGN: u8 = if cfg!(target_arch = "aarch64") { 62 } else { 183 };

    #[test]
    fn a_program_that_cannot_run_is_told_why() {
        let dir = tempfile::tempdir().unwrap();
        let (root, volume) = (dir.path().join("root"), dir.path().join("volume"));
        put(&root, "bin/own", &elf(OWN, None), 0o755);
        put(&root, "bin/dynamic", &elf(OWN, Some("/lib/ld.so")), 0o755);
        put(&root, "bin/lost", &elf(OWN, Some("/lib/ld-lost.so")), 0o755);
        put(&root, "lib/ld.so", &elf(OWN, None), 0o755);
        put(&root, "bin/foreign", &elf(FOREIGN, None), 0o755);
        put(&root, "bin/closed", &elf(OWN, None), 0o644);
        put(&root, "bin/of-root", &elf(OWN, None), 0o700);
        put(&root, "bin/text", b"echo hello\n", 0o755);
        put(&root, "bin/empty", b"", 0o755);
        put(&root, "bin/script", b"#! /bin/own -x\n", 0o755);
        put(&root, "bin/lost-script", b"#!/bin/bash\n", 0o755);
        put(&root, "bin/windows", b"#!/bin/own\r\n", 0o755);
        put(&root, "bin/nested", b"#!/bin/lost-script\n", 0o755);
        put(&root, "bin/itself", b"#!/bin/itself\n", 0o755);
        put(&volume, "tools/own", &elf(OWN, None), 0o755);
        put(&volume, "tools/lost", b"#!/data/none\n", 0o755);
        symlink("/data/tools/own", root.join("bin/to-volume")).unwrap();
        symlink("../../../../bin/own", root.join("bin/up")).unwrap();
        symlink("round", root.join("bin/round")).unwrap();
        symlink("/etc/passwd", root.join("bin/out")).unwrap();
        symlink("/data", root.join("link")).unwrap();
        fs::create_dir_all(root.join("data")).unwrap();
        let mount = |destination: &str, source: Option<&Path>, option: &str| Prepared {
            destination: destination.into(),
            source: source.map(Path::to_path_buf),
            options: vec![option.into()],
        };
        let mounts = [
            mount("/data", Some(&volume), "rw"),
            mount("/quiet", Some(&volume), "noexec"),
            mount("/memory", None, "rw"),
            mount("/link/more", Some(&volume), "rw"),
        ];
        let said = |uid: u32, command: &str| {
            let user = User { uid, gid: uid, more_gids: vec![], home: "/".into() };
            let (overrides, init) = (uid == 0, false);
            let tree =
                Tree { root: &root, mounts: &mounts, user: &user, base: 0, folder: "/bin", overrides, init };
            problem(&tree, command, &["PATH=/bin:/data/tools".to_string()])
        };
        for good in [
            "/bin/own",
            "own",
            "./own",
            "dynamic",
            "script",
            "itself",
            "/bin/up",
            "to-volume",
            "/data/tools/own",
            "../data/tools/own",
            // The runtime decides.
            "/proc/self/exe",
            "/dev/fd/3",
            "/memory",
        ] {
            assert_eq!(said(0, good), None, "{good}");
        }
        for (command, why) in [
            ("/bin/none", "does not exist"),
            ("/none/none", "does not exist"),
            ("/bin/own/x", "does not exist"),
            ("/bin/round", "does not exist"),
            // Of the container, not of the host.
            ("/bin/out", "does not exist"),
            ("/memory/x", "does not exist"),
            ("/data/more/x", "does not exist"),
            ("./none", "does not exist"),
            ("none", "is in no folder of PATH (/bin:/data/tools)"),
            ("/bin", "is a folder"),
            ("/bin/closed", "is not executable by user 0 (mode 0644)"),
            ("closed", "is not executable by user 0 (mode 0644)"),
            ("/quiet/tools/own", "is on a mount with the option noexec"),
            ("/bin/lost", "requires the loader /lib/ld-lost.so, which does not exist"),
            ("/bin/lost-script", "requires the interpreter /bin/bash, which does not exist"),
            (
                "/bin/nested",
                "requires the interpreter /bin/lost-script, which requires the interpreter /bin/bash, which does not exist",
            ),
            ("/data/tools/lost", "requires the interpreter /data/none, which does not exist"),
        ] {
            assert_eq!(said(0, command).as_deref(), Some(why), "{command}");
        }
        assert_eq!(said(0, "/data/more/tools/own"), None);
        let windows = said(0, "/bin/windows").unwrap();
        assert_eq!(windows, "requires the interpreter /bin/own\\r, which does not exist");
        assert_eq!(said(1000, "/bin/own"), None);
        assert_eq!(said(1000, "/bin/of-root").as_deref(), Some("is not executable by user 1000 (mode 0700)"));
        // With an init, a shell runs it; with the capability, one who is not root may, too.
        let user = User { uid: 1000, gid: 1000, more_gids: vec![], home: "/".into() };
        let (overrides, init) = (true, true);
        let tree = Tree { root: &root, mounts: &[], user: &user, base: 0, folder: "/", overrides, init };
        for good in ["/bin/text", "/bin/of-root"] {
            assert_eq!(problem(&tree, good, &[]), None, "{good}");
        }
        assert!(problem(&tree, "/bin/closed", &[]).is_some());
        // Rights of a list: user 1000 may run it, whatever the mode says of others.
        let listed = root.join("bin/listed");
        put(&root, "bin/listed", &elf(OWN, None), 0o750);
        assert!(said(1000, "/bin/listed").is_some());
        let set = "import os, struct, sys\n\
            entries = [(1, 7, -1), (2, 5, 1000), (4, 5, -1), (16, 5, -1), (32, 0, -1)]\n\
            value = struct.pack('<I', 2) + b''.join(struct.pack('<HHi', *entry) for entry in entries)\n\
            os.setxattr(sys.argv[1], 'system.posix_acl_access', value)";
        let done = std::process::Command::new("python3").args(["-I", "-c", set]).arg(&listed).status();
        assert!(done.expect("python3 (Debian package python3)").success());
        assert_eq!(said(1000, "/bin/listed"), None);
        if !knows_other_formats() {
            let machine = if cfg!(target_arch = "aarch64") { "x86_64" } else { "aarch64" };
            let foreign =
                format!("is a program for {machine}, and this machine is {}", std::env::consts::ARCH);
            assert_eq!(said(0, "/bin/foreign"), Some(foreign));
            for command in ["/bin/text", "/bin/empty"] {
                let why =
                    "is neither a program in ELF format nor a script that begins with #! and its interpreter";
                assert_eq!(said(0, command).as_deref(), Some(why), "{command}");
            }
        }
    }

    #[test]
    fn headers_that_lie_are_read_without_harm() {
        let mut head = elf(OWN, Some("/lib/ld.so"));
        assert_eq!(Kind::of(&head), Kind::Program(Some("/lib/ld.so".into())));
        for at in [32, 39, 54, 56, 72, 79, 96, 103] {
            let mut bad = head.clone();
            bad[at] = 0xff;
            let _ = Kind::of(&bad);
            let _ = Kind::of(&bad[..at]);
        }
        head.truncate(10);
        assert_eq!(Kind::of(&head), Kind::Other);
        // The program of these tests.
        let own = fs::read("/proc/self/exe").unwrap();
        assert!(matches!(Kind::of(&own[..HEAD]), Kind::Program(_)));
    }
}
