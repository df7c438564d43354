//! mount(8) and fstab with `mount -t mosfs`: the helper that they call, in a mount namespace where it
//! is in /sbin. Also `notify_pipe`, for those who wait for a mount otherwise.

#[path = "common/program.rs"]
mod program;
#[path = "common/publish.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod publish;
#[path = "common/unmount.rs"]
mod unmount;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use program::copy_program;
use publish::{PRODUCT, Publisher};
use tempfile::TempDir;
use unmount::unmount;

const MOSFS: &str = env!("CARGO_BIN_EXE_mosfs");

/// A device with version 200 of `hostfs` and `app`.
struct Fixture {
    dir: TempDir,
    publisher: Publisher,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let publisher = Publisher::new(dir.path());
        let layer = |content: &str| vec![publisher.add_layer(content)];
        let targets = [("hostfs", "hostfs", layer("host")), ("app", "container", layer("app 1"))];
        publisher.publish_targets(200, &targets, true);
        let fixture = Self { dir, publisher };
        for folder in ["m", "run", "sbin"] {
            fs::create_dir(fixture.path(folder)).unwrap();
        }
        let helper = Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-helpers/mount.mosfs");
        copy_program(helper, fixture.path("sbin/mount.mosfs"));
        let ca = fixture.publisher.key("ca.pem");
        let source = fixture.publisher.source();
        let mut install = fixture.mosfs();
        install.args(["install", &source, "--floor", "file", "--product", PRODUCT, "--ca"]).arg(ca);
        let output = install.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn mosfs(&self) -> Command {
        let mut command = Command::new(MOSFS);
        self.environment(&mut command);
        command
    }

    fn environment(&self, command: &mut Command) {
        command.stdin(Stdio::null()).env("MOSFS", MOSFS).env("MOSFS_SYSTEM", self.path("system"));
        command.env("MOSFS_CONFIG", self.path("config")).env("MOSFS_RUN", self.path("run"));
        command.env("T", self.dir.path()).env("LC_ALL", "C");
    }

    /// Runs a script in a mount namespace of its own, where mount(8) finds the helper. `$T` is the
    /// fixture's folder; what is mounted at `$T/m` is unmounted in the end.
    fn script(&self, text: &str) -> Output {
        // The namespace begins with copies of all mounts: those of other tests would not end while it lasts.
        let begin = "awk '/ - fuse.mosfs | - overlay mosfs:/ { print $5 }' /proc/self/mountinfo | xargs -r umount -l\n\
                     mount -t overlay -o lowerdir=$T/sbin:/usr/sbin none /usr/sbin || exit 99\n\
                     trap 'while mountpoint -q $T/m; do umount -l $T/m; done' EXIT\n";
        let private = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/private-mounts");
        let mut command = Command::new(private);
        command.args(["sh", "-uc", &format!("{begin}{text}")]);
        self.environment(&mut command);
        command.output().expect("run tests/private-mounts")
    }

    /// The same, which must succeed; what it printed.
    fn succeeds(&self, text: &str) -> String {
        let output = self.script(text);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}: {}: {said}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same, where the last command fails with this exit code and these words; nothing may be mounted.
    fn refused(&self, text: &str, code: i32, words: &[&str]) {
        let output = self.script(&format!("{text}\ncode=$?; mountpoint -q $T/m && exit 98; exit $code"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{text}: {said}");
        for word in words {
            assert!(said.contains(word), "{text} does not say `{word}`: {said}");
        }
    }
}

/// A line of /proc/self/mountinfo for `$T/m`, as `FLAGS TYPE SOURCE`, one for each mount there.
const SHOW: &str = "awk -v m=$T/m '$5 == m { for (i = 6; $i != \"-\"; i++); print $6, $(i+1), $(i+2) }' /proc/self/mountinfo";

#[test]
fn a_target_is_mounted_read_only_and_umount_ends_all() {
    let fixture = Fixture::new();
    let text = format!(
        "mount -t mosfs hostfs $T/m && cat $T/m/content && echo && {SHOW}\n\
         pid=$(\"$MOSFS\" status --json --floor file | grep -o '\"pid\":[0-9]*' | head -n 1 | cut -d: -f2)\n\
         touch $T/m/x 2>/dev/null && exit 3\n\
         umount $T/m && ! mountpoint -q $T/m || exit 4\n\
         for _ in $(seq 1000); do [ -e /proc/$pid ] || exit 0; sleep 0.01; done; exit 5"
    );
    let printed = fixture.succeeds(&text);
    assert!(printed.starts_with("host\nro,"), "{printed}");
    assert!(printed.ends_with(" fuse.mosfs hostfs\n"), "{printed}");
}

#[test]
fn options_of_mosfs_of_systemd_and_of_mount() {
    let fixture = Fixture::new();
    let mount = "mount -t mosfs -o ro,nosuid,noexec,_netdev,nofail,x-systemd.automount,x-systemd.requires=a.service,\
                 comment=systemd.x,backend=fuse,daemon=fork app $T/m";
    let printed = fixture.succeeds(&format!("{mount} && {SHOW}"));
    assert!(printed.starts_with("ro,nosuid,noexec,"), "{printed}");
    // The system and its configuration may be named, as those of mosfs itself.
    let text = "unset MOSFS_SYSTEM MOSFS_CONFIG\n\
                mount -t mosfs app $T/m -o system=$T/system,config=$T/config && cat $T/m/content";
    assert_eq!(fixture.succeeds(text), "app 1");
    // An image of any layout, and its root hash.
    let names = fixture.publisher.store().names().unwrap();
    let (name, image) = names.iter().find(|(name, _)| name.starts_with("mos/images/app:")).unwrap();
    let hash =
        fixture.publisher.store().image(&image.digest).unwrap().layers[0].trust.root_hash().unwrap().hex();
    let source = format!("oci:$T/store:{name}");
    assert_eq!(
        fixture.succeeds(&format!("mount -t mosfs -o root_hash={hash} {source} $T/m && cat $T/m/content")),
        "app 1"
    );
    // Nobody's signature was asked for: neither setuid programs nor devices, unless that is asked for.
    for (options, flags) in [
        ("ro", "ro,nosuid,nodev,"),
        ("ro,allow_suid", "ro,nodev,"),
        ("ro,allow_suid,allow_dev", "ro,relatime "),
    ] {
        let printed = fixture.succeeds(&format!("mount -t mosfs -o {options} {source} $T/m && {SHOW}"));
        assert!(printed.starts_with(flags), "{options}: {printed}");
    }
    let wrong = hash.replace(&hash[..4], "0000");
    fixture.refused(&format!("mount -t mosfs -o root_hash={wrong} {source} $T/m"), 32, &["root hash"]);
}

#[test]
fn lines_of_fstab() {
    let fixture = Fixture::new();
    let fstab = fixture.path("fstab");
    let m = fixture.path("m");
    let line =
        |options: &str| fs::write(&fstab, format!("app {} mosfs {options} 0 0\n", m.display())).unwrap();
    line("defaults");
    let printed = fixture.succeeds(&format!("mount -T $T/fstab $T/m && cat $T/m/content && echo && {SHOW}"));
    assert!(printed.starts_with("app 1\nro,"), "{printed}");
    line("ro,_netdev,x-systemd.mount-timeout=10s,backend=fuse,nodev");
    // A second time nothing is mounted over it.
    let printed = fixture.succeeds(&format!("mount -a -T $T/fstab && mount -a -T $T/fstab && {SHOW}"));
    assert!(printed.starts_with("ro,nodev,"), "{printed}");
    assert_eq!(printed.lines().count(), 1, "{printed}");
    line("noauto,backend=fuse");
    let text = "mount -a -T $T/fstab && ! mountpoint -q $T/m && mount -T $T/fstab $T/m && cat $T/m/content";
    assert_eq!(fixture.succeeds(text), "app 1");
    line("backend=fuse,upper=/nowhere/below/proc,nonsense");
    fixture.refused("mount -T $T/fstab $T/m", 1, &["nonsense"]);
}

#[test]
fn what_is_written_goes_to_the_upper_folder() {
    let fixture = Fixture::new();
    let printed = fixture.succeeds(&format!(
        "mount -t mosfs -o backend=fuse,upper=$T/mine app $T/m && echo new >$T/m/content && cat $T/m/content && {SHOW}\n\
         umount $T/m && cat $T/mine/content"
    ));
    assert!(printed.starts_with("new\nrw,") && printed.ends_with("\nnew\n"), "{printed}");
    let text = "mount -t mosfs -o backend=fuse,writable app $T/m && echo kept >$T/m/content && umount $T/m\n\
                mount -t mosfs -o backend=fuse,writable app $T/m && cat $T/m/content $T/system/scratch/app/upper/content";
    assert_eq!(fixture.succeeds(text), "kept\nkept\n");
    // What mount(8) says by itself, rw, asks for nothing.
    assert_eq!(fixture.succeeds("mount -t mosfs -o rw app $T/m && cat $T/m/content"), "app 1");
}

#[test]
fn failures_have_the_codes_of_mount() {
    let fixture = Fixture::new();
    fixture.refused("mount -t mosfs nope $T/m", 1, &["has no target `nope`"]);
    fixture.refused("mount -t mosfs -o nonsense app $T/m", 1, &["nonsense"]);
    fixture.refused("mount -t mosfs -o backend=kernel app $T/m", 1, &["`kernel` is not a backend"]);
    fixture.refused("mount.mosfs app", 1, &["usage: mount.mosfs"]);
    fixture.refused("mount.mosfs app $T/m -N 1", 1, &["namespace"]);
    fixture.refused("mount -t mosfs -f app $T/m", 0, &[]);
    let deployments = fs::read_dir(fixture.path("system/deployments")).unwrap();
    let manifest = deployments.map(|entry| entry.unwrap().path().join("manifest.sig")).next().unwrap();
    let mut bytes = fs::read(&manifest).unwrap();
    bytes[20] ^= 1;
    fs::write(&manifest, bytes).unwrap();
    fixture.refused("mount -t mosfs app $T/m", 32, &["signature"]);
}

#[test]
fn a_plain_file_is_mounted_with_its_root_hash() {
    let fixture = Fixture::new();
    let make = "mkdir -p $T/tree && echo plain >$T/tree/content && mksquashfs $T/tree $T/image -noappend -quiet -no-progress >&2 &&\n\
                hash=$(veritysetup format $T/image $T/hashes | awk '/^Root hash/ { print $3 }') &&\n\
                (echo before; cat $T/image) >$T/inside || exit 90\n";
    let mount = |options: &str| format!("{make} mount -t mosfs -o {options} $T/inside $T/m");
    let show = format!("&& cat $T/m/content && {SHOW}");
    let printed =
        fixture.succeeds(&format!("{} {show}", mount("offset=7,hash_file=$T/hashes,root_hash=$hash")));
    assert!(printed.starts_with("plain\nro,nosuid,nodev,"), "{printed}");
    // As a line of fstab, unverified, and with options that only a plain file has.
    let line = "$T/inside $T/m mosfs ro,offset=7,unsafe_no_verity,uid=12 0 0";
    let printed = fixture.succeeds(&format!(
        "{make} echo \"{line}\" >$T/fstab && mount -T $T/fstab $T/m && stat -c %u $T/m/content"
    ));
    assert_eq!(printed, "12\n");
    fixture.refused(&mount("offset=7"), 32, &["no root hash was given"]);
}

/// Reads one byte and the end from a pipe; fails where it takes too long.
fn read_pipe(path: &Path) -> Vec<u8> {
    let path = path.to_path_buf();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut said = Vec::new();
        fs::File::open(&path).unwrap().read_to_end(&mut said).unwrap();
        sender.send(said).unwrap();
    });
    receiver.recv_timeout(Duration::from_secs(300)).expect("somebody writes to the pipe")
}

fn make_pipe(path: &Path) {
    let status = Command::new("mkfifo").arg(path).status().expect("mkfifo (Debian package coreutils) runs");
    assert!(status.success());
}

#[test]
fn a_pipe_says_when_the_mount_is_ready_and_when_it_failed() {
    let fixture = Fixture::new();
    let (pipe, target) = (fixture.path("pipe"), fixture.path("m"));
    make_pipe(&pipe);
    let option = format!("notify_pipe={}", pipe.display());
    let end = || unmount(fixture.mosfs().arg("umount").arg(&target));
    let mount = |more: &[&str], source: &str| {
        let mut command = fixture.mosfs();
        command.args(["mount", "--backend", "fuse", "-o", &option]).args(more).arg(source).arg(&target);
        command
    };
    // Who waits is there before: as with `squashfuse_ll -f -o notify_pipe=…`.
    let mut child = mount(&["--foreground"], "app").stderr(Stdio::null()).spawn().unwrap();
    assert_eq!(read_pipe(&pipe), b"s");
    assert_eq!(fs::read_to_string(target.join("content")).unwrap(), "app 1");
    end();
    assert!(child.wait().unwrap().success());
    // Who waits comes later: the command has returned, the byte is still to be had.
    assert!(mount(&[], "app").status().unwrap().success());
    assert_eq!(read_pipe(&pipe), b"s");
    end();
    // There will be no mount.
    for more in [&[][..], &["--foreground"]] {
        let child = mount(more, "nope").stderr(Stdio::piped()).spawn().unwrap();
        assert_eq!(read_pipe(&pipe), b"f");
        assert_eq!(child.wait_with_output().unwrap().status.code(), Some(2));
    }
    // Through mount(8).
    let text = format!(
        "cat $T/pipe >$T/said & mount -t mosfs -o backend=fuse,{option} app $T/m && wait && cat $T/said"
    );
    assert_eq!(fixture.succeeds(&text), "s");
    // A file that is no pipe keeps its content, and nothing is mounted.
    let file = fixture.path("file");
    fs::write(&file, "mine").unwrap();
    let option = format!("notify_pipe={}", file.display());
    let output = fixture.mosfs().args(["mount", "-o", &option, "app"]).arg(&target).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("expected a named pipe"), "{said}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
}

#[test]
fn the_service_manager_is_told_when_a_mount_in_the_foreground_is_ready() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let fixture = Fixture::new();
    let target = fixture.path("m");
    let name = format!("mosfs-test-{}", std::process::id());
    let plain = fixture.path("socket");
    let sockets = [
        (plain.to_str().unwrap().to_string(), UnixDatagram::bind(&plain).unwrap()),
        (
            format!("@{name}"),
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap(),
        ),
    ];
    for (name, socket) in sockets {
        let mut command = fixture.mosfs();
        command.args(["mount", "--foreground", "--backend", "fuse", "app"]).arg(&target);
        let mut child = command.env("NOTIFY_SOCKET", &name).stderr(Stdio::null()).spawn().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
        let mut said = [0; 64];
        let count = socket.recv(&mut said).unwrap();
        assert_eq!(&said[..count], b"READY=1", "{name}");
        assert_eq!(fs::read_to_string(target.join("content")).unwrap(), "app 1");
        unmount(fixture.mosfs().arg("umount").arg(&target));
        let begin = Instant::now();
        while child.try_wait().unwrap().is_none() {
            assert!(begin.elapsed() < Duration::from_secs(300));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
