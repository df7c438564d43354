//! The command line of squashfuse. The checks are those of its own test-suite, written anew, and those of its callers.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::images::{bytes, mksquashfs, run};
use crate::layout::{OurMount, kill, open_rw, wait_until};
use crate::mounted::unmount;
use crate::{Fixture, NOBODY, as_nobody};

const NAMES: [&str; 2] = ["squashfuse", "squashfuse_ll"];

impl Fixture {
    /// The program by a name of squashfuse.
    fn link(&self, name: &str) -> PathBuf {
        let link = self.path(name);
        if !link.exists() {
            symlink(env!("CARGO_BIN_EXE_mosfs"), &link).unwrap();
        }
        link
    }

    fn squashfuse(&self, name: &str, args: &[&OsStr]) -> Output {
        Command::new(self.link(name)).args(args).stdin(Stdio::null()).output().unwrap()
    }

    /// Mounts in the background, and returns when it has.
    fn squashfuse_mount(&self, name: &str, options: &[&str]) -> OurMount {
        let at = self.path("m");
        fs::create_dir_all(&at).unwrap();
        let image = self.image();
        let args: Vec<&OsStr> =
            options.iter().map(OsStr::new).chain([image.as_os_str(), at.as_os_str()]).collect();
        let output = self.squashfuse(name, &args);
        assert!(output.status.success(), "{options:?}: {}", String::from_utf8_lossy(&output.stderr));
        OurMount { at: at.canonicalize().unwrap() }
    }
}

/// A named pipe, and the one byte that somebody writes to it.
struct Pipe(PathBuf);

impl Pipe {
    fn new(path: PathBuf) -> Self {
        let _ = fs::remove_file(&path);
        run("coreutils", "mkfifo", &[path.as_os_str()]);
        Self(path)
    }

    fn option(&self) -> String {
        format!("notify_pipe={}", self.0.display())
    }

    /// Waits for the byte.
    fn byte(&self) -> u8 {
        let path = self.0.clone();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut said = Vec::new();
            File::open(path).unwrap().read_to_end(&mut said).unwrap();
            sender.send(said).unwrap();
        });
        let said = receiver.recv_timeout(std::time::Duration::from_secs(300)).expect("somebody writes");
        assert_eq!(said.len(), 1);
        said[0]
    }
}

fn is_mounted(at: &Path) -> bool {
    mosfs::internals::mount::table::mounted_at(at).unwrap().is_some()
}

fn end(at: &Path, child: Option<Child>) {
    unmount(Command::new("fusermount3").arg("-u").arg(at));
    if let Some(mut child) = child {
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn the_pipe_says_s_or_f() {
    let fixture = Fixture::new();
    let at = fixture.path("m");
    fs::create_dir(&at).unwrap();
    let pipe = Pipe::new(fixture.path("pipe"));
    for name in NAMES {
        let start = |archive: &Path, at: &Path| {
            let mut command = Command::new(fixture.link(name));
            command.args(["-f", "-o", &pipe.option()]).args([archive, at]);
            command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        };
        let child = start(&fixture.image(), &at);
        assert_eq!(pipe.byte(), b's');
        assert!(is_mounted(&at));
        end(&at, Some(child));
        for (archive, at) in [(Path::new("/dev/null"), &at), (&fixture.image(), &fixture.path("nowhere"))] {
            let mut child = start(archive, at);
            assert_eq!(pipe.byte(), b'f');
            assert!(!child.wait().unwrap().success());
        }
    }
}

#[test]
fn content_is_right_with_every_compressor() {
    let fixture = Fixture::new();
    let source = fixture.path("source");
    fs::create_dir_all(source.join("subdir")).unwrap();
    for (name, size) in [("rand1", 3_000_000), ("rand2", 17_000), ("subdir/rand4", 23_200)] {
        fs::write(source.join(name), bytes(size as u64, size)).unwrap();
    }
    fs::write(source.join("z1 with spaces"), [0; 87]).unwrap();
    for comp in ["gzip", "lzo", "xz", "lz4", "zstd"] {
        mksquashfs(&source, &fixture.image(), &format!("-comp {comp}"));
        let mount = fixture.squashfuse_mount("squashfuse_ll", &[]);
        let names = ["rand1", "rand2", "subdir/rand4", "z1 with spaces"];
        let same = |name: &str| {
            assert_eq!(
                fs::read(mount.at.join(name)).unwrap(),
                fs::read(source.join(name)).unwrap(),
                "{name}"
            );
        };
        names.iter().copied().for_each(same);
        // Several at once.
        std::thread::scope(|scope| {
            (0..4).for_each(|_| drop(scope.spawn(|| names.iter().copied().for_each(same))));
        });
        // A name that is not there, also where that is known already.
        assert!(!mount.at.join("bogus").exists() && !mount.at.join("bogus").exists());
        end(&mount.at, None);
        let mount = fixture.squashfuse_mount("squashfuse", &["-osubdir=subdir"]);
        assert_eq!(fs::read(mount.at.join("rand4")).unwrap(), bytes(23_200, 23_200));
        assert!(!mount.at.join("rand1").exists());
        end(&mount.at, None);
    }
}

#[test]
fn a_signal_unmounts_at_once_and_serves_open_files_to_their_end() {
    let fixture = Fixture::new();
    let mount = fixture.squashfuse_mount("squashfuse_ll", &[]);
    let pid = mount.pid();
    // By its command line, as scripts find it.
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    let line = String::from_utf8_lossy(&line);
    assert!(line.contains("squashfuse_ll") && line.contains(mount.at.to_str().unwrap()), "{line}");
    let mut open = File::open(mount.at.join("size-1048576")).unwrap();
    kill("-TERM", pid);
    wait_until("the mount leaves the tree", || !is_mounted(&mount.at));
    assert!(fs::metadata(format!("/proc/{pid}")).is_ok());
    let mut content = Vec::new();
    open.read_to_end(&mut content).unwrap();
    assert_eq!(content.len(), 1 << 20);
    drop(open);
    wait_until("the daemon ends", || mosfs::internals::sys::process::started_at(pid).is_none());
}

#[test]
fn an_idle_mount_ends_and_an_open_file_keeps_it() {
    let fixture = Fixture::new();
    let mount = fixture.squashfuse_mount("squashfuse_ll", &["-o", "timeout=5"]);
    let pid = mount.pid();
    let open = File::open(mount.at.join("text")).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(8));
    assert!(is_mounted(&mount.at), "a file is open");
    drop(open);
    wait_until("the mount is idle", || !is_mounted(&mount.at));
    wait_until("the daemon ends", || mosfs::internals::sys::process::started_at(pid).is_none());
    // The same through `mosfs mount`.
    let mount = fixture.mount(&fixture.image(), &["--unsafe-no-verity", "-o", "timeout=1"]);
    wait_until("the mount is idle", || !is_mounted(&mount.at));
}

#[test]
fn modes_count_only_where_that_is_asked_for() {
    let fixture = Fixture::new();
    let (program, at) = fixture.of_nobody("squashfuse");
    let (image, hidden) = (fixture.image(), at.join("size-0"));
    let mount = |options: &str| {
        let output =
            as_nobody(&program, &["-o".as_ref(), options.as_ref(), image.as_os_str(), at.as_os_str()]);
        assert!(output.status.success(), "{options}: {}", String::from_utf8_lossy(&output.stderr));
        OurMount { at: at.clone() }
    };
    let cat = || as_nobody("cat", &[hidden.as_os_str()]).status.success();
    let leave = || {
        let output = as_nobody("fusermount3", &["-u".as_ref(), at.as_os_str()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    // A file of root with mode 0: whoever has the image can read all of it anyway.
    let _mount = mount("ro");
    assert!(cat());
    leave();
    let _mount = mount("default_permissions");
    assert!(!cat());
    leave();
    // As root, nobody else enters.
    let ours = fixture.squashfuse_mount("squashfuse", &[]);
    assert!(!as_nobody("cat", &[ours.at.join("text").as_os_str()]).status.success());
    end(&ours.at, None);
    let ours = fixture.squashfuse_mount("squashfuse", &["-o", "allow_other,uid=65534,gid=0"]);
    assert!(as_nobody("cat", &[ours.at.join("text").as_os_str()]).status.success());
    let found = fs::metadata(ours.at.join("text")).unwrap();
    assert_eq!((found.uid(), found.gid()), (NOBODY, fs::metadata(fixture.path("tree/text")).unwrap().gid()));
    end(&ours.at, None);
}

#[test]
fn a_caller_may_have_made_the_connection_and_opened_the_image() {
    let fixture = Fixture::new();
    fs::create_dir(fixture.path("m")).unwrap();
    // What Apptainer does: the image is descriptor 3, and descriptor 4 is mounted already.
    let script = "exec 3<image 4<>/dev/fuse
        mount -i -t fuse -o ro,nosuid,nodev,fd=4,rootmode=040000,user_id=0,group_id=0 squashfuse m || exit 9
        ./squashfuse_ll -f -o ro,allow_other,offset=0 /proc/self/fd/3 /dev/fd/4 & pid=$!
        exec 3<&- 4<&-
        cat m/text; umount m; wait $pid";
    fixture.link("squashfuse_ll");
    let output = Command::new("sh").args(["-c", script]).current_dir(fixture.path("")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout, fs::read(fixture.path("tree/text")).unwrap());
    // In the background nobody would hold the connection.
    let output = fixture.squashfuse("squashfuse_ll", &[fixture.image().as_os_str(), "/dev/fd/9".as_ref()]);
    assert_eq!(output.status.code(), Some(2));
    let image = fixture.image();
    let args = ["-f".as_ref(), image.as_os_str(), "/dev/fd/0".as_ref()];
    let output = fixture.squashfuse("squashfuse_ll", &args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("/dev/fuse"), "{said}");
}

#[test]
fn a_user_namespace_with_the_capability_mounts_without_the_helper() {
    let fixture = Fixture::new();
    let (program, at) = fixture.of_nobody("squashfuse_ll");
    // A helper that fails: what Apptainer's namespace has is no setuid helper.
    let script = format!(
        "PATH={dir}/none:$PATH {program} -o allow_other,uid=65534,gid=65534 {image} {at} && cat {at}/size-100 && umount {at}",
        dir = fixture.path("").display(),
        program = program.display(),
        image = fixture.image().display(),
        at = at.display(),
    );
    fs::create_dir(fixture.path("none")).unwrap();
    fs::write(fixture.path("none/fusermount3"), "#!/bin/sh\nexit 1\n").unwrap();
    run("coreutils", "chmod", &["755".as_ref(), fixture.path("none/fusermount3").as_os_str()]);
    let words = ["--user", "--map-current-user", "--keep-caps", "--mount", "sh", "-c", &script];
    let output = as_nobody("unshare", &words.map(OsStr::new));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout, fs::read(fixture.path("tree/size-100")).unwrap());
}

#[test]
fn what_it_says_of_itself_and_what_it_refuses() {
    let fixture = Fixture::new();
    for name in NAMES {
        // Apptainer reads from this whether `-o uid` can be given.
        let output = fixture.squashfuse(name, &[]);
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("-o uid=") && said.contains(&format!("Usage: {name} ")), "{said}");
        for option in ["-h", "--help", "-V", "--version"] {
            let output = fixture.squashfuse(name, &[option.as_ref()]);
            assert!(output.status.success() && !output.stdout.is_empty(), "{option}");
        }
        let image = fixture.image();
        for (args, code, word) in [
            (&["-x", "a", "b"][..], 2, "`-x`"),
            (&["-o", "bogus", "a", "b"], 2, "`bogus`"),
            (&["a", "b", "c"], 2, "Usage"),
            (&[image.to_str().unwrap(), "/nonexistent/m"], 1, "/nonexistent/m"),
            (&["/nonexistent", "/tmp"], 1, "/nonexistent"),
        ] {
            let args: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
            let output = fixture.squashfuse(name, &args);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.code() == Some(code) && said.contains(word), "{args:?}: {said}");
        }
    }
}

#[test]
fn a_root_hash_can_be_given_to_it_too() {
    let fixture = Fixture::new();
    let (appended, root_hash) = fixture.appended();
    fs::rename(&appended, fixture.image()).unwrap();
    let option = format!("root_hash={root_hash}");
    let mount = fixture.squashfuse_mount("squashfuse_ll", &["-o", &option]);
    assert!(mount.record().unwrap().verified);
    assert_eq!(fs::read(mount.at.join("text")).unwrap(), fs::read(fixture.path("tree/text")).unwrap());
    end(&mount.at, None);
    let file = open_rw(&fixture.image());
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xff], 40).unwrap();
    let (image, at) = (fixture.image(), fixture.path("m"));
    let args = ["-o".as_ref(), option.as_ref(), image.as_os_str(), at.as_os_str()];
    let output = fixture.squashfuse("squashfuse_ll", &args);
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
}
