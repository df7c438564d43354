//! What needs a kernel of our choice: device-mapper, old kernels, boots, power cuts.
//!
//! The tests whose names begin with `guest_` run inside a virtual machine (tests/vm/run), as root
//! of a small initramfs with this very program in it. They are ignored here; the tests of the host
//! side boot the machine and want each of them to pass there.

#[path = "common/publish.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod publish;
#[path = "vm/targets.rs"]
mod targets;

use std::fs;
use std::io::Write as _;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mosfs::internals::digest::Digest;
use mosfs::internals::error::{Class, Classified};
use mosfs::internals::image::blobs::Blob;
use mosfs::internals::image::oci::{LayerDescriptor, Trust};
use mosfs::internals::mount::kernel::dm_verity::{DmVerity, DmVerityError, assemble};
use mosfs::internals::mount::kernel::overlay::Upper;
use mosfs::internals::mount::{LayerBytes, PlannedLayer};
use mosfs::internals::sys::dm::{Control, Target};
use mosfs::internals::sys::loopdev::LoopDevice;
use mosfs::internals::sys::mountapi;

#[path = "common/machine.rs"]
mod machine;
use machine::{Machine, mini_initrd, noise, squashfs, tool};

// ---------------------------------------------------------------------------------------------
// Host side
// ---------------------------------------------------------------------------------------------

/// Appends a verity tree to an image, made by the reference tool; the root hash.
fn add_verity(image: &Path) -> String {
    let size = fs::metadata(image).unwrap().len().next_multiple_of(4096);
    fs::OpenOptions::new().write(true).open(image).unwrap().set_len(size).unwrap();
    let output = tool(
        "cryptsetup-bin",
        Command::new("veritysetup")
            .args(["format", "--hash", "sha256", "--salt", &"5a".repeat(32)])
            .args(["--data-block-size=4096", "--hash-block-size=4096"])
            .arg(format!("--data-blocks={}", size / 4096))
            .arg(format!("--hash-offset={size}"))
            .args([image, image]),
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find(|line| line.starts_with("Root hash:")).expect("veritysetup prints it");
    line.split_whitespace().last().unwrap().to_string()
}

fn write(path: PathBuf, content: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// Makes the layers that the guest mounts, with a list of `NAME ROOTHASH MEDIATYPE`.
fn make_layers(out: &Path, scratch: &Path) {
    const SQUASHFS: &str = "application/vnd.stacker.image.layer.squashfs+zstd+verity";
    const EROFS: &str = "application/vnd.stacker.image.layer.erofs+lz4";
    fs::create_dir_all(out).unwrap();
    let mut list = String::new();
    let mut seal = |name: &str, media_type: &str, make: &dyn Fn(&Path, &Path)| {
        let dir = scratch.join(name);
        fs::create_dir_all(&dir).unwrap();
        let image = out.join(name);
        make(&dir, &image);
        let root_hash = add_verity(&image);
        list.push_str(&format!("{name} {root_hash} {media_type}\n"));
    };
    let whiteout = |path: PathBuf| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        tool("coreutils", Command::new("mknod").arg(path).args(["c", "0", "0"]));
    };
    seal("base", SQUASHFS, &|dir, image| {
        write(dir.join("etc/keep"), b"base");
        write(dir.join("etc/changed"), b"base");
        write(dir.join("etc/gone"), b"base");
        write(dir.join("opaque/hidden"), b"base");
        write(dir.join("big"), &noise(1 << 20, 1));
        write(dir.join("empty"), b"");
        symlink("etc/keep", dir.join("link")).unwrap();
        squashfs(dir, image, &[]);
    });
    seal("middle", SQUASHFS, &|dir, image| {
        write(dir.join("etc/changed"), b"middle");
        whiteout(dir.join("etc/gone"));
        write(dir.join("opaque/new"), b"middle");
        tool(
            "attr",
            Command::new("setfattr")
                .args(["-n", "trusted.overlay.opaque", "-v", "y"])
                .arg(dir.join("opaque")),
        );
        squashfs(dir, image, &[]);
    });
    seal("top", SQUASHFS, &|dir, image| {
        write(dir.join("etc/gone"), b"again");
        whiteout(dir.join("never-was"));
        squashfs(dir, image, &[]);
    });
    seal("erofs", EROFS, &|dir, image| {
        write(dir.join("etc/changed"), b"erofs");
        write(dir.join("from-erofs"), &noise(300_000, 2));
        tool("erofs-utils", Command::new("mkfs.erofs").args(["-zlz4", "--quiet"]).args([image, dir]));
    });
    for i in 0..100 {
        seal(&format!("l{i}"), SQUASHFS, &|dir, image| {
            write(dir.join("last"), format!("{i}").as_bytes());
            write(dir.join(format!("only{i}")), b"");
            squashfs(dir, image, &[]);
        });
    }
    fs::write(out.join("list"), list).unwrap();
}

const GUEST_INIT: &str = r#"#!/bin/sh
export PATH=/bin RUST_BACKTRACE=0
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs tmp /tmp
while read -r module; do insmod /modules/$module || echo "cannot load $module"; done </modules.list
cat /proc/version
/guest --ignored --test-threads=1 --nocapture guest_
echo "MOSFS-VM-VERDICT: $?"
poweroff -f
"#;

/// Boots the guest tests under a Debian kernel and wants all of them to pass.
fn run_guest_tests(kernel: &'static str) {
    let dir = tempfile::tempdir().unwrap();
    let (layers, initrd) = (dir.path().join("layers"), dir.path().join("initrd"));
    make_layers(&layers, &dir.path().join("scratch"));
    let me = std::env::current_exe().unwrap();
    mini_initrd(&initrd, kernel, GUEST_INIT, &[(&me, "/guest")], &[(&layers, "/layers")]);
    let listed = Command::new(me).args(["--list", "--ignored", "guest_"]).output().unwrap();
    let count = String::from_utf8_lossy(&listed.stdout).lines().filter(|l| l.ends_with(": test")).count();
    assert!(count > 0);
    let passed = format!("test result: ok. {count} passed; 0 failed");
    Machine { kernel, ..Machine::new(&initrd) }.expect(0, &[&passed]);
}

#[test]
fn dm_verity_on_linux_6_12() {
    run_guest_tests("6.12");
}

#[test]
fn dm_verity_on_linux_6_1() {
    run_guest_tests("6.1");
}

// ---------------------------------------------------------------------------------------------
// Guest side
// ---------------------------------------------------------------------------------------------

const RUN: &str = "/run/mosfs";

/// A layer of the list, at `/layers/NAME` or copied elsewhere.
#[derive(Clone)]
struct GuestLayer {
    path: PathBuf,
    digest: Digest,
    root_hash: Digest,
    media_type: String,
}

impl GuestLayer {
    fn named(name: &str) -> Self {
        let list = fs::read_to_string("/layers/list").expect("this test runs inside the machine");
        let mut words = list
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|words| words[0] == name)
            .unwrap()
            .into_iter();
        Self {
            path: Path::new("/layers").join(words.next().unwrap()),
            digest: Digest::of(name.as_bytes()),
            root_hash: Digest::from_hex(words.next().unwrap()).unwrap(),
            media_type: words.next().unwrap().into(),
        }
    }

    fn planned(&self) -> PlannedLayer {
        let size = fs::metadata(&self.path).map_or(0, |data| data.len());
        let trust = Trust::RootHash(self.root_hash);
        PlannedLayer {
            descriptor: LayerDescriptor::new(&self.media_type, self.digest, size, trust),
            bytes: LayerBytes::One(Blob::File(self.path.clone())),
        }
    }

    fn device(&self) -> String {
        format!("mosfs-{}", self.root_hash.hex())
    }

    /// A copy in /tmp whose bytes were changed by `change`.
    fn broken(&self, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let mut bytes = fs::read(&self.path).unwrap();
        change(&mut bytes);
        let path = PathBuf::from(format!("/tmp/broken-{}", self.path.file_name().unwrap().display()));
        fs::File::create(&path).unwrap().write_all(&bytes).unwrap();
        Self { path, ..self.clone() }
    }
}

fn layers(names: &[&str]) -> Vec<GuestLayer> {
    names.iter().map(|name| GuestLayer::named(name)).collect()
}

fn backend() -> DmVerity {
    DmVerity::open(Path::new(RUN)).unwrap()
}

fn stack(backend: &DmVerity, layers: &[GuestLayer]) -> Result<OwnedFd, DmVerityError> {
    let layers: Vec<_> = layers.iter().map(GuestLayer::planned).collect();
    assemble(&backend.layers(&layers)?, None, "mosfs:test", 0)
}

/// Mounts a stack at a new folder.
fn mount_at(name: &str, layers: &[GuestLayer]) -> PathBuf {
    let target = Path::new("/mnt").join(name);
    fs::create_dir_all(&target).unwrap();
    mountapi::attach(stack(&backend(), layers).unwrap(), &target).unwrap();
    target
}

/// Loop devices with a file, device-mapper devices, and mounts of our file systems.
fn left_overs() -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").unwrap() {
        let path = entry.unwrap().path();
        if let Ok(file) = fs::read_to_string(path.join("loop/backing_file")) {
            found.push(format!("{} over {}", path.display(), file.trim()));
        }
    }
    found.extend(Control::open().unwrap().list().unwrap().into_iter().map(|device| device.name));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    found
        .extend(mounts.lines().filter(|l| l.contains("overlay") || l.contains("squashfs")).map(String::from));
    found
}

/// Wants nothing to be left: the kernel frees devices from a work queue, so it is given time.
fn nothing_left() {
    let end = Instant::now() + Duration::from_secs(300);
    loop {
        let found = left_overs();
        if found.is_empty() {
            return;
        }
        assert!(Instant::now() < end, "left behind: {found:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn text(path: PathBuf) -> String {
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_stack_is_merged_and_umount_frees_all() {
    let before = fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
    let target = mount_at("merged", &layers(&["base", "middle", "erofs", "top"]));
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count(), before + 1);
    assert_eq!(text(target.join("etc/keep")), "base");
    assert_eq!(text(target.join("etc/changed")), "erofs");
    assert_eq!(text(target.join("etc/gone")), "again");
    assert_eq!(text(target.join("link")), "base");
    assert_eq!(names(&target.join("opaque")), ["new"]);
    assert_eq!(names(&target), ["big", "empty", "etc", "from-erofs", "link", "opaque"]);
    assert_eq!(fs::read(target.join("big")).unwrap(), noise(1 << 20, 1));
    assert_eq!(fs::read(target.join("from-erofs")).unwrap(), noise(300_000, 2));
    let error = fs::write(target.join("etc/keep"), "x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    // What umount(8) does, no more.
    mountapi::unmount(&target, false).unwrap();
    nothing_left();
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_whiteouts_of_a_single_layer_are_no_devices() {
    let target = mount_at("single", &layers(&["middle"]));
    assert_eq!(text(target.join("etc/changed")), "middle");
    let error = fs::symlink_metadata(target.join("etc/gone")).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    mountapi::unmount(&target, false).unwrap();
    nothing_left();
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_a_hundred_layers() {
    let names: Vec<String> = (0..100).map(|i| format!("l{i}")).collect();
    let layers = layers(&names.iter().map(String::as_str).collect::<Vec<_>>());
    for count in [1, 10, 100] {
        let start = Instant::now();
        let target = mount_at("hundred", &layers[..count]);
        println!("FIGURE {count} layers mounted in {} us", start.elapsed().as_micros());
        assert_eq!(text(target.join("last")), (count - 1).to_string());
        assert!(target.join("only0").exists());
        assert_eq!(self::names(&target).len(), count + 1);
        mountapi::unmount(&target, false).unwrap();
        nothing_left();
    }
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_failure_at_one_layer_frees_the_others() {
    for at in [0, 2, 3] {
        let mut stack_layers = layers(&["base", "middle", "erofs", "top"]);
        // A wrong root hash: the very first read fails.
        stack_layers[at].root_hash = Digest::of(b"another");
        let error = stack(&backend(), &stack_layers).unwrap_err();
        assert!(matches!(error, DmVerityError::Corrupt { .. }), "{error}");
        assert_eq!(error.class(), Class::Verification);
        assert!(error.to_string().contains(&stack_layers[at].digest.to_string()), "{error}");
        nothing_left();
    }
    let mut stack_layers = layers(&["base", "top"]);
    stack_layers[1].path = "/layers/none".into();
    assert!(matches!(stack(&backend(), &stack_layers).unwrap_err(), DmVerityError::Io(_)));
    nothing_left();
    assert!(matches!(stack(&backend(), &[]).unwrap_err(), DmVerityError::LayerCount { count: 0 }));
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_flipped_data_byte_is_eio_and_the_device_says_so() {
    let good = fs::read("/layers/base").unwrap();
    let needle = &noise(1 << 20, 1)[200_000..200_032];
    let at = good.windows(32).position(|window| window == needle).expect("noise is stored as it is");
    let layer = GuestLayer::named("base").broken(|bytes| bytes[at] ^= 1);
    let target = mount_at("flipped", std::slice::from_ref(&layer));
    assert_eq!(text(target.join("etc/keep")), "base");
    let error = fs::read(target.join("big")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    // The rest goes on, but whoever mounts it anew is told.
    assert_eq!(text(target.join("etc/changed")), "base");
    let error = stack(&backend(), std::slice::from_ref(&layer)).unwrap_err();
    assert!(matches!(error, DmVerityError::Corrupt { .. }), "{error}");
    mountapi::unmount(&target, false).unwrap();
    nothing_left();
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_flipped_tree_or_superblock_is_refused() {
    let layer = GuestLayer::named("base");
    let bytes = fs::read(&layer.path).unwrap();
    let superblock = bytes.windows(8).position(|window| window == b"verity\0\0").unwrap();
    // The top of the tree, which is the first block of it.
    let broken = layer.broken(|bytes| bytes[superblock + 4096 + 100] ^= 1);
    let error = stack(&backend(), &[broken]).unwrap_err();
    assert!(matches!(error, DmVerityError::Corrupt { .. }), "{error}");
    // The salt: another salt gives other hashes.
    let broken = layer.broken(|bytes| bytes[superblock + 88] ^= 1);
    let error = stack(&backend(), &[broken]).unwrap_err();
    assert!(matches!(error, DmVerityError::Corrupt { .. }), "{error}");
    // The number of data blocks.
    let broken = layer.broken(|bytes| bytes[superblock + 72] ^= 1);
    let error = stack(&backend(), &[broken]).unwrap_err();
    assert!(matches!(error, DmVerityError::NoVerity { .. }), "{error}");
    assert_eq!(error.class(), Class::Verification);
    // Bytes behind the tree, which no hash covers.
    let broken = layer.broken(|bytes| bytes.push(0));
    let error = stack(&backend(), &[broken]).unwrap_err();
    assert!(matches!(error, DmVerityError::NoVerity { .. }), "{error}");
    assert_eq!(error.class(), Class::Verification);
    // The length of the file system.
    let broken = layer.broken(|bytes| bytes[41] ^= 0x10);
    let error = stack(&backend(), &[broken]).unwrap_err();
    assert!(matches!(error, DmVerityError::NoVerity { .. }), "{error}");
    nothing_left();
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_a_device_of_our_name_with_another_table_is_refused() {
    let layer = GuestLayer::named("base");
    let file = fs::File::open(&layer.path).unwrap();
    let loop_device = LoopDevice::attach(std::os::fd::AsFd::as_fd(&file), &layer.path, 4096).unwrap();
    let control = Control::open().unwrap();
    control.create(&layer.device(), "").unwrap();
    // A linear device shows the file without any check.
    let sectors = file.metadata().unwrap().len() / 512;
    let parameters = format!("{} 0", loop_device.major_minor());
    let target = Target { start_sector: 0, sectors, kind: "linear".into(), parameters };
    control.load(&layer.device(), &target).unwrap();
    control.resume(&layer.device()).unwrap();
    let holder =
        fs::File::open(format!("/dev/dm-{}", libc_minor(control.status(&layer.device()).unwrap().dev)))
            .unwrap();
    assert!(holder.metadata().unwrap().file_type().is_block_device());
    let error = stack(&backend(), std::slice::from_ref(&layer)).unwrap_err();
    assert!(matches!(error, DmVerityError::TableMismatch { .. }), "{error}");
    assert_eq!(error.class(), Class::Verification);
    assert!(error.to_string().contains("linear"), "{error}");
    drop(holder);
    control.remove(&layer.device(), false).unwrap();
    drop(loop_device);
    nothing_left();
}

/// The UUID says whose a device is: a volume group or a LUKS mapping may be called `mosfs-…` as well.
#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_devices_of_others_are_not_swept() {
    let control = Control::open().unwrap();
    let all = [("mosfs-data", "LVM-abcdef"), ("mosfs-swap", ""), ("mosfs-left", "MOSFS-VERITY-left")];
    for (name, uuid) in all {
        control.create(name, uuid).unwrap();
    }
    backend();
    let mut kept: Vec<String> = control.list().unwrap().into_iter().map(|device| device.name).collect();
    kept.sort();
    assert_eq!(kept, ["mosfs-data", "mosfs-swap"]);
    kept.iter().for_each(|name| control.remove(name, false).unwrap());
    nothing_left();
}

fn libc_minor(dev: u64) -> u32 {
    libc::minor(dev)
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_layers_are_shared_and_raced_for() {
    let all = layers(&["base", "middle"]);
    let first = mount_at("shared-a", &all);
    let second = mount_at("shared-b", &all);
    assert_eq!(Control::open().unwrap().list().unwrap().len(), 2);
    mountapi::unmount(&first, false).unwrap();
    assert_eq!(text(second.join("etc/changed")), "middle");
    // Set up again while the device is marked for removal but held.
    let first = mount_at("shared-a", &all);
    mountapi::unmount(&second, false).unwrap();
    assert_eq!(text(first.join("etc/changed")), "middle");
    mountapi::unmount(&first, false).unwrap();
    nothing_left();
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let all = &all;
            scope.spawn(move || {
                // Each with a lock folder of its own in half of the cases, as in containers.
                let run = format!("{RUN}/{}", worker % 2);
                let backend = DmVerity::open(Path::new(&run)).unwrap();
                for _ in 0..10 {
                    let mount = stack(&backend, all).unwrap();
                    let path = format!("/proc/self/fd/{}/etc/changed", mount.as_raw_fd());
                    assert_eq!(fs::read_to_string(path).unwrap(), "middle");
                }
            });
        }
    });
    nothing_left();
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_killed_at_any_step_leaves_nothing() {
    if std::env::var_os("MOSFS_FAILPOINT").is_some() {
        let _ = stack(&backend(), &layers(&["base", "middle", "top"]));
        unreachable!("the failpoint was not passed");
    }
    for point in ["device.created", "device.loaded", "device.live", "layer.mounted", "overlay.assembled"] {
        for number in [1, 3] {
            if point == "overlay.assembled" && number > 1 {
                continue;
            }
            let status = Command::new("/proc/self/exe")
                .args(["--ignored", "--exact", "guest_killed_at_any_step_leaves_nothing"])
                .env("MOSFS_FAILPOINT", format!("kernel.{point}:{number}"))
                .status()
                .unwrap();
            use std::os::unix::process::ExitStatusExt;
            assert_eq!(status.signal(), Some(libc::SIGKILL), "{point}:{number}");
            // Only in the two steps before the mark for removal is there something to sweep.
            if matches!(point, "device.created" | "device.loaded") {
                backend();
            }
            nothing_left();
        }
    }
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_writable_over_verity() {
    let all = layers(&["base", "middle"]);
    let planned: Vec<_> = all.iter().map(GuestLayer::planned).collect();
    let stacked = |upper| assemble(&backend().layers(&planned).unwrap(), upper, "mosfs:test", 0).unwrap();
    let upper = Upper::Folder { upper: "/tmp/upper".into(), work: "/tmp/work".into() };
    let target = Path::new("/mnt/writable");
    fs::create_dir_all(target).unwrap();
    let mount = stacked(Some(&upper));
    mountapi::attach(mount, target).unwrap();
    fs::write(target.join("etc/keep"), "mine").unwrap();
    fs::remove_file(target.join("big")).unwrap();
    assert_eq!(text(target.join("etc/keep")), "mine");
    assert!(!target.join("big").exists());
    mountapi::unmount(target, false).unwrap();
    nothing_left();
    assert_eq!(text("/tmp/upper/etc/keep".into()), "mine");
    assert_eq!(fs::symlink_metadata("/tmp/upper/big").unwrap().rdev(), 0);
    let mount = stacked(Some(&Upper::Memory));
    mountapi::attach(mount, target).unwrap();
    fs::write(target.join("etc/keep"), "mine").unwrap();
    assert_eq!(text(target.join("etc/keep")), "mine");
    mountapi::unmount(target, false).unwrap();
    nothing_left();
}
