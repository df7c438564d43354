//! Mounts where others would share, copy, lack or refuse something: limits of processes, bind mounts, namespaces, chroots,
//! and images that nobody signed.

#[path = "common/squashfs.rs"]
#[allow(dead_code)]
mod images;
#[path = "common/layout.rs"]
mod layout;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use images::{mksquashfs, need_root, run};
use layout::{Layout, OurMount, is_alive, kill, open_to_all, run_mosfs, wait_until};
use mosfs::internals::mount::{Health, mounts, table};
use mosfs::internals::sys::mountapi;
use tempfile::TempDir;

/// A layout with an image of the file `f`, a folder, and a setuid program.
struct Fixture {
    folder: TempDir,
    source: String,
}

impl Fixture {
    fn new() -> Self {
        need_root();
        let folder = tempfile::tempdir().unwrap();
        open_to_all(folder.path());
        let tree = folder.path().join("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("f"), "hello").unwrap();
        fs::copy("/usr/bin/id", tree.join("id")).unwrap();
        fs::set_permissions(tree.join("id"), fs::Permissions::from_mode(0o4755)).unwrap();
        open_to_all(&tree);
        mksquashfs(&tree, &folder.path().join("image"), "-comp zstd -no-xattrs");
        let layout = Layout::new(&folder.path().join("oci"));
        let layer = layout.layer(&folder.path().join("image"));
        layout.image("x", &[layer.descriptor]);
        let source = layout.source("x");
        Self { folder, source }
    }

    fn path(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path.canonicalize().unwrap()
    }

    fn mount(&self, options: &[&str]) -> OurMount {
        OurMount::new(&self.source, &self.path("m"), options)
    }
}

/// A process that is killed when it is dropped.
struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn umount(at: &Path) {
    let output = run_mosfs(&["umount".as_ref(), at.as_os_str()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(table::mounted_at(at).unwrap(), None);
}

#[test]
fn a_daemon_that_cannot_start_all_its_threads_leaves_no_mount() {
    let fixture = Fixture::new();
    let (at, run) = (fixture.path("m"), fixture.path("run"));
    // RLIMIT_NPROC does not bind root of the machine, but the root of a user namespace. A user of their own, so that
    // nothing else counts, and a PID namespace, so that nothing is left to count the next time.
    let script = "mount -t tmpfs tmpfs \"$4\"; export MOSFS_RUN=\"$4\"\n\
                  prlimit --nproc=\"$1\" \"$0\" mount --threads 4 --backend fuse \"$2\" \"$3\" 2>\"$4/said\"; code=$?\n\
                  mounted=$(grep -c \" $3 \" /proc/self/mountinfo)\n\
                  echo \"$code $mounted $(cat \"$3/f\" 2>/dev/null || cat \"$4/said\")\"";
    let user = 1_000_000 + std::process::id();
    let mount = |limit: u32| {
        let output = Command::new("setpriv")
            .args([format!("--reuid={user}"), format!("--regid={user}"), "--clear-groups".into()])
            .args(["unshare", "-Urm", "-p", "-f", "--kill-child", "sh", "-c", script])
            .args([env!("CARGO_BIN_EXE_mosfs"), &limit.to_string(), &fixture.source])
            .args([&at, &run])
            .output()
            .expect("setpriv (Debian package util-linux) runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_string()
    };
    let mut refused = 0;
    for limit in 3..=16 {
        let said = mount(limit);
        if said != "0 1 hello" {
            assert!(said.starts_with("1 0 mosfs: ") && said.contains("cannot "), "at most {limit}: {said}");
            refused += 1;
        }
    }
    assert!(refused > 5, "the limits were met {refused} times");
    assert_eq!(mount(1000), "0 1 hello");
}

#[test]
fn umount_does_not_wait_for_copies_and_they_are_served_to_their_end() {
    let fixture = Fixture::new();
    let mount = fixture.mount(&[]);
    let pid = mount.pid();
    let copy = fixture.path("copy");
    run("mount", "mount", &["--bind".as_ref(), mount.at.as_os_str(), copy.as_os_str()]);
    umount(&mount.at);
    assert!(is_alive(pid));
    assert_eq!(fs::read_to_string(copy.join("f")).unwrap(), "hello");
    // The name is free for another one, which ends with its own last user.
    let second = fixture.mount(&[]);
    assert_ne!(second.pid(), pid);
    mountapi::unmount(&copy, false).unwrap();
    wait_until("the daemon ends with the last copy", || !is_alive(pid));
    assert_eq!(second.record().unwrap().health(), Health::Good);
    umount(&second.at);

    // In another namespace, of a writable mount, whose daemon is below an overlay.
    for options in [&[][..], &["--writable"]] {
        let mount = fixture.mount(options);
        let pid = mount.pid();
        let mut other = Command::new("unshare");
        other.args(["-m", "--propagation", "private", "sh", "-c", "echo; exec sleep 1000"]);
        let mut other = Other(other.stdout(Stdio::piped()).spawn().unwrap());
        std::io::Read::read_exact(other.0.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        umount(&mount.at);
        assert!(is_alive(pid));
        drop(other);
        wait_until("the daemon ends with the namespace", || !is_alive(pid));
    }
}

#[test]
fn a_daemon_of_another_pid_namespace_is_not_taken_for_dead() {
    let fixture = Fixture::new();
    let at = fixture.path("m");
    let mut inside = Command::new("unshare");
    inside.args(["-p", "-f", "--kill-child", "sh", "-c"]);
    inside.arg(r#""$0" mount --backend fuse "$1" "$2"; echo $?; exec sleep 1000"#);
    inside.args([env!("CARGO_BIN_EXE_mosfs"), &fixture.source]).arg(&at).stdout(Stdio::piped());
    let mut inside = Other(inside.spawn().unwrap());
    let mut code = [0];
    std::io::Read::read_exact(inside.0.stdout.as_mut().unwrap(), &mut code).unwrap();
    assert_eq!(code, *b"0");
    let mount = OurMount { at: at.clone() };
    assert_eq!(mount.record().unwrap().health(), Health::Good);
    assert!(run_mosfs(&["umount".as_ref(), "--dead".as_ref(), at.as_os_str()]).status.success());
    assert_eq!(fs::read_to_string(at.join("f")).unwrap(), "hello");
    let vacant = run_mosfs(&["umount".as_ref(), "--vacant".as_ref(), at.as_os_str()]);
    assert_eq!(vacant.status.code(), Some(1));
    umount(&at);
    assert!(mounts().unwrap().iter().all(|record| record.target != at));
    assert!(run_mosfs(&["umount".as_ref(), "--vacant".as_ref(), at.as_os_str()]).status.success());
}

#[test]
fn a_daemon_that_is_stopped_is_not_taken_for_dead() {
    let fixture = Fixture::new();
    let mount = fixture.mount(&[]);
    let pid = mount.pid();
    kill("-STOP", pid);
    let health = mount.record().unwrap().health();
    kill("-CONT", pid);
    assert_eq!(health, Health::Good);
    umount(&mount.at);
}

#[test]
fn what_nobody_signed_has_no_setuid_programs_and_no_devices_unless_asked_for() {
    let fixture = Fixture::new();
    let flags = |at: &Path| {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = table.lines().rfind(|line| line.split(' ').nth(4) == at.to_str()).unwrap();
        line.split(' ').nth(5).unwrap().to_string()
    };
    for (options, expected) in [
        (&[][..], "ro,nosuid,nodev,relatime"),
        (&["--writable"], "rw,nosuid,nodev,relatime"),
        (&["-o", "suid"], "ro,nodev,relatime"),
        (&["-o", "dev,suid,noexec"], "ro,noexec,relatime"),
    ] {
        let mount = fixture.mount(options);
        assert_eq!(flags(&mount.at), expected, "{options:?}");
        umount(&mount.at);
    }
}

#[test]
fn an_overlay_on_a_fresh_mount_is_open_to_those_to_whom_its_root_is() {
    let fixture = Fixture::new();
    // Nothing looks at the mount between the two.
    let mount = fixture.mount(&[]);
    let (over, empty) = (fixture.path("over"), fixture.path("empty"));
    let options = format!("lowerdir={}:{}", mount.at.display(), empty.display());
    mountapi::mount_legacy("x", &over, "overlay", 0, &options).unwrap();
    let mut cat = Command::new("setpriv");
    cat.args(["--reuid=65534", "--regid=65534", "--clear-groups", "cat"]).arg(over.join("f"));
    let output = cat.output();
    mountapi::unmount(&over, false).unwrap();
    assert_eq!(output.unwrap().stdout, b"hello");
    umount(&mount.at);
}

#[test]
fn a_chroot_without_proc_and_without_a_mount_of_its_own_mounts_and_unmounts() {
    let fixture = Fixture::new();
    let root = fixture.path("root");
    for name in ["dev", "run", "tmp", "m"] {
        fs::create_dir(root.join(name)).unwrap();
    }
    let script = "set -e; cp \"$1\" \"$1-full\" \"$2\"; cp -a \"$3\" \"$2/oci\"\n\
                  mknod -m 666 \"$2/dev/fuse\" c 10 229; mknod -m 666 \"$2/dev/null\" c 1 3\n\
                  for f in $(ldd \"$1\" \"$1-full\" | grep -o '/[^ :]*' | sort -u); do\n\
                  case $f in */mosfs*) continue ;; esac; mkdir -p \"$2/${f%/*}\"; cp -L \"$f\" \"$2$f\"; done";
    let status = Command::new("sh")
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_mosfs")])
        .arg(&root)
        .arg(fixture.folder.path().join("oci"))
        .status()
        .unwrap();
    assert!(status.success());
    let inside = |args: &[&str]| {
        let output = Command::new("chroot").arg(&root).arg("/mosfs").args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    inside(&["mount", "oci:/oci:x", "/m", "--backend", "fuse"]);
    let mount = OurMount { at: root.join("m") };
    assert_eq!(fs::read_to_string(mount.at.join("f")).unwrap(), "hello");
    assert!(inside(&["status"]).contains("oci:/oci:x at /m (fuse): verified"));
    inside(&["umount", "/m"]);
    assert_eq!(table::mounted_at(&mount.at).unwrap(), None);
    let left = fs::read_dir(root.join("run/mosfs/mounts")).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["lock"]);
}
