//! `mosfs mount` through FUSE: what is seen through it, how it begins and how it ends.

#[path = "common/squashfs.rs"]
#[allow(dead_code)]
mod images;
#[path = "common/layout.rs"]
mod layout;
#[path = "common/mounted.rs"]
mod mounted;
#[path = "common/program.rs"]
mod program;
#[path = "common/whole/scan.rs"]
mod scan;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use images::{make_tree, mksquashfs, need_root};
use layout::{
    LayerBlob, Layout, OurMount, is_alive, kill, mosfs as program, open_rw, open_to_all, run_mosfs,
    wait_until,
};
use mosfs::internals::mount::{Health, MountError, mounts};
use mounted::{Mounted, unmount};
use program::copy_program;
use scan::{assert_same, scan};
use tempfile::TempDir;

/// An image of a tree with one of everything, made once for all tests.
fn everything() -> &'static (PathBuf, PathBuf) {
    static IMAGE: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    IMAGE.get_or_init(|| {
        need_root();
        // Static values are not dropped: the folder is one that cargo gives to tests.
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuse");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        make_tree(&folder.join("tree"), 3100);
        mksquashfs(&folder.join("tree"), &folder.join("image"), "-comp zstd -xattrs");
        (folder.join("tree"), folder.join("image"))
    })
}

/// A layout with that image.
struct Fixture {
    folder: TempDir,
    layout: Layout,
    layer: LayerBlob,
}

fn fixture() -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout::new(&folder.path().join("oci"));
    let layer = layout.layer(&everything().1);
    layout.image("all", std::slice::from_ref(&layer.descriptor));
    Fixture { folder, layout, layer }
}

impl Fixture {
    fn mount(&self, options: &[&str]) -> OurMount {
        OurMount::new(&self.layout.source("all"), &self.folder.path().join("m"), options)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// A small image of the files given.
fn small(layout: &Layout, folder: &Path, files: &[(&str, &[u8])]) -> LayerBlob {
    need_root();
    let tree = folder.join("small-tree");
    let _ = fs::remove_dir_all(&tree);
    fs::create_dir(&tree).unwrap();
    for (name, content) in files {
        let path = tree.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    mksquashfs(&tree, &folder.join("small-image"), "-comp zstd -no-xattrs");
    layout.layer(&folder.join("small-image"))
}

/// What `mosfs` says to these words, with its exit code; nothing may be mounted after it.
fn refused(args: &[&OsStr], code: i32) -> String {
    let output = run_mosfs(args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    let target = args.last().map(Path::new).unwrap();
    if let Ok(target) = target.canonicalize() {
        assert_eq!(mosfs::internals::mount::table::mounted_at(&target).unwrap(), None);
    }
    said
}

fn errno(result: io::Result<impl Sized>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// What the kernel answers for a connection that has no daemon any more.
fn is_gone(result: io::Result<impl Sized>) -> bool {
    matches!(errno(result), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

#[test]
fn the_tree_is_what_the_kernel_shows_of_the_image() {
    let fixture = fixture();
    let kernel = Mounted::of("squashfs", &everything().1, fixture.path("kernel"));
    let mut expected = scan(&kernel.0);
    // Whiteouts and the overlay's own attributes are what the merged view hides.
    assert!(expected.remove(b"dev/whiteout".as_slice()).is_some());
    for node in expected.values_mut() {
        node.xattrs.retain(|name, _| !name.starts_with(b"trusted.overlay."));
    }
    for options in [
        &[][..],
        &["--threads", "1", "--cache-mib", "1"],
        &["--spin", "--threads", "4"][..],
        &["--spin=never"],
    ] {
        let mount = fixture.mount(options);
        assert_same(&expected, &scan(&mount.at), &format!("{options:?}"));
        // Once more, now from the kernel's caches.
        assert_same(&expected, &scan(&mount.at), "again");
        assert_eq!(mount.record().unwrap().health(), Health::Good);
        end(mount);
    }
}

#[test]
fn ids_are_shifted_through_fuse_alone_to_a_range_that_there_is() {
    let fixture = fixture();
    let (source, at) = (fixture.layout.source("all"), fixture.path("m"));
    fs::create_dir_all(&at).unwrap();
    let with = |options: &[&str]| {
        let mut words: Vec<&OsStr> = vec!["mount".as_ref()];
        words.extend(options.iter().map(OsStr::new));
        words.extend([OsStr::new(&source), at.as_os_str()]);
        words.into_iter().map(OsString::from).collect::<Vec<_>>()
    };
    for (options, code, said) in [
        (&["--shift-ids", "100000"][..], 2, "FIRST:COUNT"),
        (&["--shift-ids", "4294967295:2"], 2, "FIRST:COUNT"),
        (
            &["--shift-ids", "1:65536", "--backend", "dm-verity"],
            1,
            "ids are shifted by the fuse backend alone",
        ),
        (&["--shift-ids", "1:65536", "--writable"], 1, "ids of a writable mount cannot be shifted"),
    ] {
        let words = with(options);
        let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
        let found = refused(&words, code);
        assert!(found.contains(said), "{options:?}: {found}");
    }
    // `auto` means FUSE then.
    let mount = fixture.mount(&["--shift-ids", "100000:65536"]);
    assert_eq!(mount.record().unwrap().backend, "fuse");
    assert_eq!(fs::metadata(&mount.at).unwrap().uid(), 100_000);
    end(mount);
}

/// Unmounts and waits until nothing is left.
fn end(mount: OurMount) {
    let pid = mount.pid();
    unmount(Command::new("umount").arg(&mount.at));
    wait_until("the daemon ends", || !is_alive(pid));
    assert_eq!(mount.record(), None);
}

#[test]
fn many_readers_see_the_same() {
    let fixture = fixture();
    let mount = fixture.mount(&[]);
    let files =
        ["text", "noise", "long", "size-2097157", "size-131073", "copy-of-size-131073", "hole-middle"];
    std::thread::scope(|scope| {
        for thread in 0..16usize {
            let (mount, fixture) = (&mount, &fixture);
            scope.spawn(move || {
                let _ = fixture;
                for step in 0..files.len() * 2 {
                    let name = files[(thread + step) % files.len()];
                    let expected = fs::read(everything().0.join(name)).unwrap();
                    let file = File::open(mount.at.join(name)).unwrap();
                    let mut at = (thread * 7919) % expected.len();
                    let mut buffer = vec![0; 10_000];
                    while at < expected.len() {
                        let count = file.read_at(&mut buffer, at as u64).unwrap();
                        assert_eq!(buffer[..count], expected[at..at + count], "{name} at {at}");
                        at += count.max(1) * 3;
                    }
                }
            });
        }
    });
    end(mount);
}

#[test]
#[allow(unsafe_code)]
fn holes_are_found_and_sizes_told() {
    let fixture = fixture();
    let mount = fixture.mount(&[]);
    let seek = |name: &str, offset: i64, whence: i32| {
        let file = File::open(mount.at.join(name)).unwrap();
        // SAFETY: a seek on an open descriptor.
        match unsafe { libc::lseek(file.as_raw_fd(), offset, whence) } {
            -1 => Err(io::Error::last_os_error().raw_os_error().unwrap()),
            found => Ok(found),
        }
    };
    let block = 128 << 10;
    let size = i64::try_from(fs::metadata(mount.at.join("hole-middle")).unwrap().len()).unwrap();
    assert_eq!(seek("hole-middle", 0, libc::SEEK_DATA), Ok(0));
    assert_eq!(seek("hole-middle", 0, libc::SEEK_HOLE), Ok(block));
    assert_eq!(seek("hole-middle", block, libc::SEEK_DATA), Ok((2 << 20) / block * block));
    assert_eq!(seek("hole-middle", 2 << 20, libc::SEEK_HOLE), Ok(size));
    assert_eq!(seek("hole-middle", size, libc::SEEK_HOLE), Err(libc::ENXIO));
    assert_eq!(seek("text", 5, libc::SEEK_DATA), Ok(5));

    let path = std::ffi::CString::new(mount.at.as_os_str().as_bytes()).unwrap();
    // SAFETY: statfs is plain data, and the path is NUL-terminated.
    let found = unsafe {
        let mut found: libc::statfs = std::mem::zeroed();
        assert_eq!(libc::statfs(path.as_ptr(), &mut found), 0);
        found
    };
    assert_eq!((found.f_bfree, found.f_bavail, found.f_ffree, found.f_namelen), (0, 0, 0, 255));
    assert_eq!(found.f_bsize, block);
    let image_bytes = fs::metadata(&everything().1).unwrap().len();
    assert!(found.f_blocks * block as u64 >= image_bytes - 4096 && found.f_files > 3000);
}

#[test]
fn the_mount_is_read_only_and_permissions_hold() {
    let fixture = fixture();
    let mount = fixture.mount(&[]);
    assert_eq!(errno(File::create(mount.at.join("new"))), Some(libc::EROFS));
    assert_eq!(errno(fs::remove_file(mount.at.join("text"))), Some(libc::EROFS));
    open_to_all(fixture.folder.path());
    // size-0 has mode 0: root reads it, others may not; text is for all.
    File::open(mount.at.join("size-0")).unwrap();
    let as_nobody = |name: &str| {
        let words = ["--reuid=65534", "--regid=65534", "--clear-groups", "cat"];
        let output = Command::new("setpriv").args(words).arg(mount.at.join(name)).output();
        output.expect("cannot run setpriv; install Debian's package util-linux").status.success()
    };
    assert!(as_nobody("text"));
    assert!(!as_nobody("size-0"));
}

#[test]
fn three_layers_are_one_tree_with_large_folders() {
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout::new(&folder.path().join("oci"));
    let names = |step: usize| (0..4000).step_by(step).map(|n| format!("d/name-{n:06}-{}", "x".repeat(40)));
    let files = |step: usize| names(step).collect::<Vec<_>>();
    let mut layers = Vec::new();
    for step in [2, 3, 5] {
        let content = [step as u8; 10];
        let files = files(step);
        let files: Vec<(&str, &[u8])> = files.iter().map(|name| (name.as_str(), &content[..])).collect();
        layers.push(small(&layout, folder.path(), &files).descriptor);
    }
    layout.image("three", &layers);
    let mount = OurMount::new(&layout.source("three"), &folder.path().join("m"), &[]);
    let expected: BTreeSet<String> = [2, 3, 5].into_iter().flat_map(files).collect();
    for _ in 0..2 {
        let found: BTreeSet<String> = fs::read_dir(mount.at.join("d"))
            .unwrap()
            .map(|entry| format!("d/{}", entry.unwrap().file_name().into_string().unwrap()))
            .collect();
        assert_eq!(found, expected);
    }
    for name in &expected {
        let number: usize = name[7..13].parse().unwrap();
        let layer = [5, 3, 2].into_iter().find(|step| number.is_multiple_of(*step)).unwrap();
        assert_eq!(fs::read(mount.at.join(name)).unwrap(), [layer as u8; 10]);
    }
    assert_eq!(mount.record().unwrap().layers.len(), 3);
    end(mount);
}

#[test]
fn a_program_runs_inside() {
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout::new(&folder.path().join("oci"));
    let shell =
        fs::read("/bin/busybox").expect("there is no /bin/busybox; install Debian's package busybox-static");
    need_root();
    let tree = folder.path().join("tree");
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::write(tree.join("bin/busybox"), shell).unwrap();
    images::run("coreutils", "chmod", &["0755".as_ref(), tree.join("bin/busybox").as_os_str()]);
    mksquashfs(&tree, &folder.path().join("image"), "-comp zstd");
    layout.image("shell", &[layout.layer(&folder.path().join("image")).descriptor]);
    let mount = OurMount::new(&layout.source("shell"), &folder.path().join("m"), &[]);
    let output =
        Command::new("chroot").arg(&mount.at).args(["/bin/busybox", "sh", "-c", "echo hi; ls /"]).output();
    let output = output.unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hi\nbin\n");

    let noexec = OurMount::new(&layout.source("shell"), &folder.path().join("n"), &["-o", "noexec,nosuid"]);
    let refused = Command::new(noexec.at.join("bin/busybox")).status();
    assert_eq!(errno(refused), Some(libc::EACCES));
}

#[test]
fn a_bad_block_is_an_error_and_a_line_in_the_log_and_nothing_more() {
    let fixture = fixture();
    let blob = fixture.layout.blob(&fixture.layer.digest);
    let mount = fixture.mount(&[]);
    // `noise` does not compress, so that its bytes are found in the image as they are.
    let noise = fs::read(everything().0.join("noise")).unwrap();
    let image = fs::read(&blob).unwrap();
    let at =
        image.windows(64).position(|window| window == &noise[..64]).expect("noise is stored as it is") + 5000;
    let mut byte = [image[at]];
    byte[0] ^= 1;
    open_rw(&blob).write_all_at(&byte, at as u64).unwrap();

    let bad = mount.at.join("noise");
    for _ in 0..3 {
        assert_eq!(errno(fs::read(&bad)), Some(libc::EIO));
    }
    // What does not need the block is right, in this file too.
    let mut last = vec![0; 1000];
    let end_of_file = noise.len() - 1000;
    File::open(&bad).unwrap().read_exact_at(&mut last, end_of_file as u64).unwrap();
    assert_eq!(last, noise[end_of_file..]);
    for name in ["text", "long", "size-2097157"] {
        assert_eq!(fs::read(mount.at.join(name)).unwrap(), fs::read(everything().0.join(name)).unwrap());
    }

    let daemon = || mount.record().unwrap().daemon.unwrap();
    wait_until("the errors are in the register", || daemon().errors.verity > 0);
    assert_eq!(mount.record().unwrap().health(), Health::Errors);
    let log = fs::read_to_string(daemon().log.unwrap()).unwrap();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(lines.len(), 1, "once, however often it is read: {log}");
    let block = format!("block {}", at / 4096);
    for part in [&fixture.layer.digest.to_string(), &block, "expected sha256:", "has hash sha256:"] {
        assert!(lines[0].contains(part), "{part} is not in {}", lines[0]);
    }
    // Once the block is right again, so is the file.
    open_rw(&blob).write_all_at(&[image[at]], at as u64).unwrap();
    assert_eq!(fs::read(&bad).unwrap(), noise);
    end(mount);
}

#[test]
fn an_image_that_does_not_verify_is_not_mounted() {
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout::new(&folder.path().join("oci"));
    let good = small(&layout, folder.path(), &[("f", &[1; 100_000])]);
    let target = folder.path().join("m");
    fs::create_dir(&target).unwrap();
    let source = layout.source("x");
    let mount: Vec<&OsStr> = vec!["mount".as_ref(), "--backend".as_ref(), "fuse".as_ref()];
    let ends: [&OsStr; 2] = [source.as_ref(), target.as_os_str()];
    let with = |more: &[&'static str]| {
        let more: Vec<&OsStr> = more.iter().map(|word| OsStr::new(*word)).collect();
        [&mount[..], &more, &ends].concat()
    };

    // No root hash.
    let mut bare = good.descriptor.clone();
    bare["annotations"] = serde_json::json!({});
    layout.image("x", &[bare]);
    let said = refused(&with(&[]), 3);
    assert!(said.contains(&good.digest.to_string()) && said.contains("no root hash"), "{said}");

    // The root hash of something else.
    let mut other = good.descriptor.clone();
    let wrong: &'static str = mosfs::internals::digest::Digest::of(b"x").hex().leak();
    other["annotations"]["io.stackeroci.stacker.atomfs_verity_root_hash"] = wrong.into();
    layout.image("x", &[other]);
    let said = refused(&with(&[]), 3);
    assert!(said.contains(wrong) && said.contains("expected"), "{said}");

    // Pins: the right one, a wrong one, too many.
    layout.image("x", std::slice::from_ref(&good.descriptor));
    let said = refused(&with(&["--root-hash", wrong]), 3);
    assert!(said.contains(wrong) && said.contains(&good.root_hash.hex()), "{said}");
    refused(&with(&["--root-hash", wrong, "--root-hash", wrong]), 2);
    refused(&with(&["--root-hash", "abc"]), 2);

    // An erofs layer that is none, and something that nobody can mount.
    for (media_type, words, code) in [
        ("application/vnd.stacker.image.layer.erofs+lz4", "expected 0xe0f5e1e2 (erofs)", 1),
        ("application/vnd.oci.image.layer.v1.tar+gzip", "cannot be mounted", 2),
    ] {
        let mut other = good.descriptor.clone();
        other["mediaType"] = media_type.into();
        layout.image("x", &[other]);
        let said = refused(&with(&[]), code);
        assert!(said.contains(words), "{said}");
    }

    // The superblock of the image, and that of the tree, in a blob of their own.
    layout.image("x", std::slice::from_ref(&good.descriptor));
    let blob = layout.blob(&good.digest);
    let bytes = fs::read(&blob).unwrap();
    // Rule (docs/design.md, verity location): the file ends with the tree, since no hash covers what lies behind it.
    for extra in [1, 4096] {
        fs::write(&blob, [&bytes[..], &vec![0; extra]].concat()).unwrap();
        let said = refused(&with(&[]), 3);
        let found = format!("the image file has {} bytes, expected {}", bytes.len() + extra, bytes.len());
        assert!(said.contains(&found) && said.contains(&good.digest.to_string()), "{said}");
    }
    for at in [0, 8, 40, 4095] {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        fs::write(&blob, changed).unwrap();
        refused(&with(&[]), 3);
    }
    fs::write(&blob, &bytes[..bytes.len() - 1]).unwrap();
    refused(&with(&[]), 3);
    // A manifest that is not the one that the index names.
    fs::write(&blob, &bytes).unwrap();
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(layout.dir.join("index.json")).unwrap()).unwrap();
    let manifest: mosfs::internals::digest::Digest =
        index["manifests"][0]["digest"].as_str().unwrap().parse().unwrap();
    let text = fs::read_to_string(layout.blob(&manifest)).unwrap();
    fs::write(layout.blob(&manifest), text.replace("atomfs", "atomfz")).unwrap();
    refused(&with(&[]), 3);
    fs::write(layout.blob(&manifest), text).unwrap();

    // And with everything as it was it mounts, pinned.
    let mount = OurMount::new(&source, &target, &["--root-hash", &good.root_hash.hex()]);
    assert_eq!(fs::read(mount.at.join("f")).unwrap(), [1; 100_000]);
    end(mount);
}

#[test]
fn a_target_that_cannot_be_mounted_at_is_named() {
    let fixture = fixture();
    let source = fixture.layout.source("all");
    for (name, target) in [("missing", fixture.path("missing")), ("file", fixture.path("oci/oci-layout"))] {
        let args = ["mount".as_ref(), source.as_ref(), target.as_os_str()];
        let said = refused(&args, 1);
        assert!(said.contains(target.to_str().unwrap()), "{name}: {said}");
    }
    let target = fixture.path("m");
    fs::create_dir(&target).unwrap();
    let said =
        refused(&["mount".as_ref(), "-o".as_ref(), "rw".as_ref(), source.as_ref(), target.as_os_str()], 2);
    assert!(said.contains("`rw`"), "{said}");
    let said = refused(&["umount".as_ref(), target.as_os_str()], 2);
    assert!(said.contains("is not a mount of mosfs"), "{said}");
    let wrong = mosfs::internals::mount::unmount(Path::new("/proc"), false);
    assert!(matches!(wrong, Err(MountError::NotOurs { found: Some(_), .. })));
}

#[test]
fn a_signal_unmounts_and_a_busy_mount_serves_those_who_are_in_it() {
    let fixture = fixture();
    let mount = fixture.mount(&[]);
    let pid = mount.pid();
    let text = fs::read(everything().0.join("text")).unwrap();
    let mut file = File::open(mount.at.join("text")).unwrap();
    kill("-TERM", pid);
    wait_until("it is out of the tree", || !mount.at.join("text").exists());
    let mut found = Vec::new();
    file.read_to_end(&mut found).unwrap();
    assert_eq!(found, text);
    assert!(is_alive(pid));
    drop(file);
    wait_until("the daemon ends with its last user", || !is_alive(pid));
    assert_eq!(mounts().unwrap().into_iter().find(|record| record.target == mount.at), None);

    // A second signal does not wait for anybody.
    let mount = fixture.mount(&[]);
    let pid = mount.pid();
    let file = File::open(mount.at.join("long")).unwrap();
    kill("-INT", pid);
    wait_until("it is out of the tree", || !mount.at.join("long").exists());
    kill("-INT", pid);
    wait_until("the daemon ends at once", || !is_alive(pid));
    assert!(is_gone(file.read_at(&mut [0; 10], 3 << 20)));
}

#[test]
fn a_dead_daemon_is_seen_and_its_mount_ended() {
    let fixture = fixture();
    let mount = fixture.mount(&[]);
    let pid = mount.pid();
    kill("-KILL", pid);
    wait_until("it is dead", || !is_alive(pid));
    assert_eq!(mount.record().unwrap().health(), Health::DaemonDead);
    assert!(is_gone(fs::metadata(mount.at.join("text"))));
    let output = run_mosfs(&["umount".as_ref(), mount.at.as_os_str()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(mount.record(), None);
    assert!(fs::read_dir(&mount.at).unwrap().next().is_none());

    // Ended by a plain umount, the record of a dead daemon is stale and goes when it is looked at.
    let mount = fixture.mount(&[]);
    let record = mount.record().unwrap();
    kill("-KILL", mount.pid());
    unmount(Command::new("umount").arg(&mount.at));
    assert_eq!(mount.record(), None);
    assert!(!record.daemon.unwrap().log.unwrap().exists());
}

#[test]
fn umount_says_when_a_mount_is_in_use() {
    let fixture = fixture();
    let mount = fixture.mount(&[]);
    let pid = mount.pid();
    let file = File::open(mount.at.join("text")).unwrap();
    let output = run_mosfs(&["umount".as_ref(), mount.at.as_os_str()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("busy"), "{said}");
    drop(file);
    unmount(program().arg("umount").arg(&mount.at));
    assert!(!is_alive(pid), "umount returns when the daemon has ended");
}

#[test]
fn two_mounts_of_one_image_live_apart() {
    let fixture = fixture();
    let one = fixture.mount(&[]);
    let two = OurMount::new(&fixture.layout.source("all"), &fixture.path("two"), &[]);
    // And one on top of the other.
    let three = OurMount::new(&fixture.layout.source("all"), &one.at, &[]);
    assert_ne!(one.pid(), two.pid());
    assert_eq!(mounts().unwrap().iter().filter(|record| record.target == one.at).count(), 2);
    unmount(Command::new("umount").arg(&two.at));
    assert!(one.at.join("text").exists());
    for left in [1, 0] {
        let output = run_mosfs(&["umount".as_ref(), three.at.as_os_str()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(mounts().unwrap().iter().filter(|record| record.target == one.at).count(), left);
    }
}

#[test]
#[allow(unsafe_code)]
fn the_daemon_keeps_nothing_of_who_started_it() {
    let fixture = fixture();
    let target = fixture.path("m");
    fs::create_dir(&target).unwrap();
    let (mut reader, writer) = io::pipe().unwrap();
    let mut command = program();
    command.args(["mount", "--backend", "fuse", &fixture.layout.source("all")]).arg(&target);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let kept: OwnedFd = writer.into();
    let number = kept.as_raw_fd();
    // SAFETY: only dup2, which is safe between fork and exec.
    unsafe {
        command.pre_exec(move || {
            // A descriptor that the program does not know, as a script's lock file would be.
            if libc::dup2(number, 77) < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    // Waits for the ends of its output too, which a daemon must not hold open.
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    drop(command);
    drop(kept);
    assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), 0, "nobody holds the other end");

    let mount = OurMount { at: target.canonicalize().unwrap() };
    let pid = mount.pid();
    // The folder of its own record, which it can reach from there when the root is switched.
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/run/mosfs/mounts"));
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session: u32 = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap().parse().unwrap();
    assert_eq!(session, pid, "a session of its own");
    let open: BTreeSet<PathBuf> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|path| {
            // The wish for awake cores (`--spin`) is the daemon's own.
            !["/dev/fuse", "/dev/null", "/dev/cpu_dma_latency"].iter().any(|own| path.starts_with(own))
        })
        .collect();
    let blob = fixture.layout.blob(&fixture.layer.digest).canonicalize().unwrap();
    // What it holds a lock of, so that others see that it lives.
    let lock = mount.record().unwrap().daemon.unwrap().lock.unwrap();
    let expected: BTreeSet<PathBuf> = [blob, lock].into();
    let sockets = |path: &&PathBuf| path.to_string_lossy().starts_with("socket:");
    assert_eq!(open.iter().filter(|path| !sockets(path)).cloned().collect::<BTreeSet<_>>(), expected);
    end(mount);
}

#[test]
fn in_the_foreground_it_serves_until_it_is_unmounted() {
    let fixture = fixture();
    let target = fixture.path("m");
    fs::create_dir(&target).unwrap();
    let mut command = program();
    command.args(["mount", "--foreground", "--backend", "fuse", &fixture.layout.source("all")]).arg(&target);
    let mut child = command.spawn().unwrap();
    let mount = OurMount { at: target.canonicalize().unwrap() };
    wait_until("it is mounted", || mount.record().is_some());
    assert_eq!(mount.pid(), child.id());
    assert!(mount.at.join("text").exists());
    unmount(Command::new("umount").arg(&mount.at));
    assert!(child.wait().unwrap().success());
    assert_eq!(mount.record(), None);
}

/// Runs `mosfs` as an ordinary user with a clean environment.
fn as_user(uid: u32, binary: &Path, args: &[&OsStr]) -> std::process::Output {
    let words = [format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".into()];
    let mut command = Command::new("setpriv");
    command.args(words).arg(binary).args(args).env_remove("XDG_RUNTIME_DIR").stdin(Stdio::null());
    command.output().expect("cannot run setpriv; install Debian's package util-linux")
}

/// A folder of an ordinary user, with the program in a place where they can run it.
fn user_folder(uid: u32, folder: &Path) -> (PathBuf, PathBuf) {
    open_to_all(folder);
    let (binary, target) = (folder.join("mosfs"), folder.join("target"));
    copy_program(env!("CARGO_BIN_EXE_mosfs-full"), &binary);
    fs::create_dir(&target).unwrap();
    std::os::unix::fs::chown(&target, Some(uid), Some(uid)).unwrap();
    (binary, target)
}

/// The register of an ordinary user's mounts, whose path follows from the user: one test of any run has it at a time.
struct Register {
    path: PathBuf,
    _lock: File,
}

impl Register {
    fn of(uid: u32) -> Self {
        let lock = File::create(format!("/tmp/mosfs-{uid}.test-lock")).unwrap();
        lock.lock().unwrap();
        let path = PathBuf::from(format!("/tmp/mosfs-{uid}"));
        let _ = fs::remove_dir_all(&path);
        Self { path, _lock: lock }
    }
}

impl Drop for Register {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[test]
fn an_ordinary_user_mounts_and_unmounts() {
    const UID: u32 = 65_534; // nobody: fusermount3 wants a user that has a name
    need_root();
    let user = Register::of(UID);
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout::new(&folder.path().join("oci"));
    let layer = small(&layout, folder.path(), &[("d/f", b"hello")]);
    layout.image("x", &[layer.descriptor]);
    let (binary, target) = user_folder(UID, folder.path());
    let source = layout.source("x");
    let output = as_user(UID, &binary, &["mount".as_ref(), source.as_ref(), target.as_os_str()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said} (is Debian's package fuse3 installed?)");
    let _mount = OurMount { at: target.clone() };

    let cat = |uid: u32| as_user(uid, Path::new("/bin/cat"), &[target.join("d/f").as_os_str()]);
    assert_eq!(cat(UID).stdout, b"hello");
    assert!(!cat(1).status.success(), "only the user may enter");
    let listed =
        mosfs::internals::mount::table::mounted_at(&target.canonicalize().unwrap()).unwrap().unwrap();
    assert_eq!(listed.kind, "fuse.mosfs");

    let register = user.path.join("mounts");
    let found = fs::metadata(&register).unwrap();
    assert_eq!((found.uid(), found.mode() & 0o777), (UID, 0o700));
    let records = || {
        let list = fs::read_dir(&register).unwrap().map(|entry| entry.unwrap().path());
        list.filter(|path| path.extension() == Some("json".as_ref())).collect::<Vec<_>>()
    };
    let record: mosfs::internals::mount::MountRecord =
        serde_json::from_slice(&fs::read(&records()[0]).unwrap()).unwrap();
    let pid = record.daemon.unwrap().pid;
    assert_eq!(fs::metadata(format!("/proc/{pid}")).unwrap().uid(), UID);

    let output = as_user(UID, &binary, &["umount".as_ref(), target.as_os_str()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!is_alive(pid));
    assert!(records().is_empty());
}

#[test]
fn a_register_that_somebody_else_made_is_refused() {
    const UID: u32 = 1; // daemon, which every Debian has
    need_root();
    let register = Register::of(UID);
    let theirs = &register.path;
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout::new(&folder.path().join("oci"));
    let layer = small(&layout, folder.path(), &[("f", b"hello")]);
    layout.image("x", &[layer.descriptor]);
    let (binary, target) = user_folder(UID, folder.path());
    fs::create_dir_all(theirs.join("mounts")).unwrap();
    let source = layout.source("x");
    let output = as_user(UID, &binary, &["mount".as_ref(), source.as_ref(), target.as_os_str()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(theirs.to_str().unwrap()) && said.contains("expected a folder of user"), "{said}");
    assert_eq!(mosfs::internals::mount::table::mounted_at(&target.canonicalize().unwrap()).unwrap(), None);
}

#[test]
fn names_that_are_no_text_work_as_targets_too() {
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout::new(&folder.path().join("oci"));
    let layer = small(&layout, folder.path(), &[("f", b"hello")]);
    layout.image("x", &[layer.descriptor]);
    let odd = folder.path().join(OsString::from_vec(b"a \\ b\xff".to_vec()));
    let mount = OurMount::new(&layout.source("x"), &odd, &[]);
    assert_eq!(fs::read(mount.at.join("f")).unwrap(), b"hello");
    end(mount);
}
