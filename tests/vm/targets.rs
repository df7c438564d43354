//! Inside the virtual machine: `mosfs activate` through dm-verity, and FUSE that reads through a device.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mosfs::internals::digest::Digest;
use mosfs::internals::image::source::Source;
use mosfs::internals::image::verified::VerifiedSource;
use mosfs::internals::mount::kernel::through_device::through_device;
use mosfs::internals::mount::table;
use mosfs::internals::sys::dm::{Control, Target};
use mosfs::internals::sys::loopdev::LoopDevice;
use mosfs::internals::sys::mountapi;

use super::publish::{PRODUCT, Publisher};
use super::{GuestLayer, mount_at, nothing_left, text};

/// A device in a folder of the machine, whose floor is a file, and who publishes for it.
struct GuestDevice {
    dir: PathBuf,
    publisher: Publisher,
}

impl GuestDevice {
    /// With version 200 installed: targets `app` (base, middle) and `data` (base, erofs).
    fn new(name: &str) -> Self {
        let dir = Path::new("/tmp").join(name);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        let device = Self { publisher: Publisher::new(&dir), dir };
        device.publish(200, &[("app", &["base", "middle"]), ("data", &["base", "erofs"])]);
        let (source, ca) = (device.publisher.source(), device.publisher.key("ca.pem"));
        let ca = ca.to_str().unwrap();
        let install = ["install", &source, "--ca", ca, "--product", PRODUCT, "--floor", "file"];
        assert_eq!(device.mosfs(&install), 0);
        device
    }

    fn publish(&self, version: u64, targets: &[(&str, &[&str])]) {
        let add = |name: &str| {
            let layer = GuestLayer::named(name);
            self.publisher.add_sealed(&layer.path, &layer.media_type, layer.root_hash)
        };
        let all = |names: &[&str]| names.iter().map(|name| add(name)).collect::<Vec<_>>();
        let mut targets: Vec<_> =
            targets.iter().map(|(name, layers)| (*name, "container", all(layers))).collect();
        targets.push(("hostfs", "hostfs", all(&["top"])));
        self.publisher.publish_targets(version, &targets, true);
    }

    /// Publishes version 201 (`app` has another top layer, `data` is as it was), and makes it current.
    fn next(&self) {
        self.publish(201, &[("app", &["base", "top"]), ("data", &["base", "erofs"])]);
        assert_eq!(self.mosfs(&["update", &self.publisher.source(), "--floor", "file"]), 0);
        assert_eq!(self.mosfs(&["commit", "--floor", "file"]), 0);
    }

    /// Runs the command line in this process, or in one of its own that dies at a failpoint.
    fn mosfs(&self, arguments: &[&str]) -> u8 {
        let (system, config) = (self.dir.join("system"), self.dir.join("config"));
        let begin = ["mosfs".as_ref(), "--system".as_ref(), system.as_os_str(), "--config".as_ref()];
        let words = begin.into_iter().chain([config.as_os_str()]);
        let words = words.chain(arguments.iter().map(OsStr::new)).map(Into::into);
        let code = format!("{:?}", mosfs::internals::cli::run_with(words));
        // ExitCode can be printed, and nothing else.
        code.chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap()
    }

    fn activate(&self) -> u8 {
        self.mosfs(&["activate", "--floor", "file", "--backend", "dm-verity"])
    }
}

/// Devices of the layers that the kernel has, by the layers' names.
fn devices() -> Vec<String> {
    let all = Control::open().unwrap().list().unwrap();
    let mut found: Vec<String> = ["base", "middle", "erofs", "top"]
        .into_iter()
        .filter(|name| all.iter().any(|one| one.name == GuestLayer::named(name).device()))
        .map(String::from)
        .collect();
    assert_eq!(found.len(), all.len(), "no others");
    found.sort();
    found
}

fn wait_for_devices(expected: &[&str]) {
    let end = Instant::now() + Duration::from_secs(300);
    while devices() != expected {
        assert!(Instant::now() < end, "expected {expected:?}, found {:?}", devices());
        std::thread::sleep(Duration::from_millis(20));
    }
}

const TARGETS: &str = "/run/mosfs/targets";

fn target(name: &str) -> PathBuf {
    Path::new(TARGETS).join(name)
}

/// Device numbers of the targets' mounts.
fn target_devices() -> Vec<(PathBuf, String)> {
    let all = table::mounts().unwrap().into_iter();
    let all = all.filter(|one| one.target.starts_with(TARGETS));
    all.map(|one| (one.target, one.device)).collect()
}

fn unmount_targets() {
    for (path, _) in target_devices() {
        mountapi::unmount(&path, false).unwrap();
    }
    nothing_left();
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_activate_changes_only_what_changed() {
    let device = GuestDevice::new("activate");
    assert_eq!(device.activate(), 0);
    assert_eq!(text(target("app/etc/changed")), "middle");
    assert_eq!(text(target("data/etc/changed")), "erofs");
    assert_eq!(devices(), ["base", "erofs", "middle"], "layers are shared");
    let before = target_devices();
    assert_eq!(before.len(), 2);
    assert_eq!(device.activate(), 0);
    assert_eq!(target_devices(), before);
    device.next();
    // In use: it stays as it is, and nothing of the new one is left.
    let holder = fs::File::open(target("app/etc/keep")).unwrap();
    assert_eq!(device.activate(), 1);
    assert_eq!(target_devices(), before);
    wait_for_devices(&["base", "erofs", "middle"]);
    assert_eq!(text(target("app/etc/changed")), "middle");
    drop(holder);
    assert_eq!(device.activate(), 0);
    assert_eq!(text(target("app/etc/changed")), "base");
    assert_eq!(target_devices()[1], before[1], "data was not touched");
    wait_for_devices(&["base", "erofs", "top"]);
    // A layer that does not verify: the old mount is still there.
    device.publish(202, &[("app", &["base", "middle"]), ("data", &["base", "erofs"])]);
    assert_eq!(device.mosfs(&["update", &device.publisher.source(), "--floor", "file"]), 0);
    assert_eq!(device.mosfs(&["commit", "--floor", "file"]), 0);
    let layer = Digest::of(&fs::read(GuestLayer::named("middle").path).unwrap());
    let blob = device.dir.join("system/store/blobs/sha256").join(layer.hex());
    let mut bytes = fs::read(&blob).unwrap();
    let last = bytes.len() - 1;
    // A block of the tree: the top one where there are few blocks.
    bytes[last - 4000] ^= 1;
    bytes[100] ^= 1;
    fs::write(&blob, bytes).unwrap();
    assert_eq!(device.activate(), 3);
    assert_eq!(text(target("app/etc/changed")), "base");
    unmount_targets();
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_activate_mends_what_a_crash_left() {
    if std::env::var_os("MOSFS_FAILPOINT").is_some() {
        let dir = PathBuf::from("/tmp/crash");
        // The publisher is not used; its keys are there already.
        let (system, config) = (dir.join("system"), dir.join("config"));
        let words = ["mosfs", "activate", "--floor", "file", "--backend", "dm-verity", "--system"];
        let words =
            words.map(Into::into).into_iter().chain([system.into(), "--config".into(), config.into()]);
        mosfs::internals::cli::run_with(words);
        unreachable!("the failpoint was not passed");
    }
    let points = [
        "activate.plan.made:1",
        "activate.mount.prepared:2",
        "activate.place.cleared:1",
        "activate.place.made:2",
        "kernel.tree.attached:1",
        "kernel.tree.attached:2",
        "activate.mount.attached:1",
        "kernel.device.created:1",
        "kernel.device.live:2",
        "kernel.overlay.assembled:2",
    ];
    let crash = |point: &str| {
        let status = Command::new("/proc/self/exe")
            .args(["--ignored", "--exact", "targets::guest_activate_mends_what_a_crash_left"])
            .env("MOSFS_FAILPOINT", point)
            .status()
            .unwrap();
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{point}");
    };
    for point in points {
        let device = GuestDevice::new("crash");
        crash(point);
        assert_eq!(device.activate(), 0, "{point}");
        assert_eq!(text(target("app/etc/changed")), "middle", "{point}");
        assert_eq!(text(target("data/etc/changed")), "erofs", "{point}");
        assert_eq!(target_devices().len(), 2, "{point}");
        wait_for_devices(&["base", "erofs", "middle"]);
        unmount_targets();
    }
    // The same where a mount is replaced: one layer is new, and the old mount is in place.
    for point in [
        "activate.mount.prepared:2",
        "activate.place.cleared:2",
        "kernel.tree.attached:1",
        "kernel.device.live:1",
    ] {
        let device = GuestDevice::new("crash");
        assert_eq!(device.activate(), 0);
        device.next();
        let point = if point.ends_with(":2") { point.replace(":2", ":1") } else { point.to_string() };
        crash(&point);
        assert_eq!(device.activate(), 0, "{point}");
        assert_eq!(text(target("app/etc/changed")), "base", "{point}");
        wait_for_devices(&["base", "erofs", "top"]);
        unmount_targets();
    }
}

#[test]
#[ignore = "runs inside the virtual machine"]
fn guest_fuse_reads_through_a_device_that_is_there() {
    let layer = GuestLayer::named("base");
    let open = |layer: &GuestLayer| {
        let file = fs::File::open(&layer.path).unwrap();
        through_device(&layer.planned(), VerifiedSource::open(file, layer.root_hash).unwrap())
    };
    assert!(open(&layer).is_err(), "no device, nothing to read through");
    assert_eq!(devices(), [] as [String; 0], "and none is made");
    // The device has the good bytes. The file behind our own reader has a bad block, so that what is read
    // well came from the device.
    let mount = mount_at("through", std::slice::from_ref(&layer));
    let broken = layer.broken(|bytes| bytes[8192 + 100] ^= 1);
    let Ok(source) = open(&broken) else { panic!("there is a device") };
    let good = fs::read(&layer.path).unwrap();
    let mut scratch = Vec::new();
    let size = source.size_bytes() as usize;
    for (offset, len) in [(0, 96), (8192, 4096), (8000, 10_000), (size - 100, 100), (100_000, 131_072)] {
        assert_eq!(source.read(offset as u64, len, &mut scratch).unwrap(), &good[offset..][..len]);
    }
    assert!(source.read(size as u64 - 1, 2, &mut scratch).is_err(), "beyond the end");
    // It holds the device, and so all below it, until it goes.
    mountapi::unmount(&mount, false).unwrap();
    assert_eq!(devices(), ["base"]);
    drop(source);
    nothing_left();

    // The device meets the bad block: our reader says which, and the rest can be read.
    let mount = mount_at("through", std::slice::from_ref(&broken));
    let Ok(source) = open(&broken) else { panic!("there is a device") };
    let error = source.read(8192, 4096, &mut scratch).unwrap_err().to_string();
    assert!(error.contains("verity: block 2 (data)") && error.contains("expected sha256:"), "{error}");
    assert_eq!(source.read(100_000, 5000, &mut scratch).unwrap(), &good[100_000..][..5000]);
    // From now on its status is C, and nobody begins to read through it.
    assert!(open(&broken).is_err());
    mountapi::unmount(&mount, false).unwrap();
    drop(source);
    nothing_left();

    // A device of our name with another table is not read through.
    let file = fs::File::open(&layer.path).unwrap();
    let loop_device = LoopDevice::attach(std::os::fd::AsFd::as_fd(&file), &layer.path, 4096).unwrap();
    let control = Control::open().unwrap();
    control.create(&layer.device(), "").unwrap();
    let parameters = format!("{} 0", loop_device.major_minor());
    let sectors = file.metadata().unwrap().len() / 512;
    let linear = Target { start_sector: 0, sectors, kind: "linear".into(), parameters };
    control.load(&layer.device(), &linear).unwrap();
    control.resume(&layer.device()).unwrap();
    assert!(open(&layer).is_err());
    control.remove(&layer.device(), false).unwrap();
    drop(loop_device);
    nothing_left();
}
