//! No virtual machine: `mosfs boot` with a sysroot in a temporary folder.

use std::fs;
use std::path::{Path, PathBuf};

use super::device::{Device, SMALL};

/// Unmounts what a boot on this machine has mounted, the last one first.
pub struct Mounts(pub PathBuf);

impl Drop for Mounts {
    fn drop(&mut self) {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = table
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|point| Path::new(point).starts_with(&self.0));
        for point in points.collect::<Vec<_>>().into_iter().rev() {
            let _ = mosfs::internals::sys::mountapi::unmount(Path::new(point), true);
        }
    }
}

#[test]
fn mosfs_boot_through_fuse_on_this_machine() {
    let device = Device::with(SMALL);
    let _mounts = Mounts(device.path(""));
    fs::write(device.path("cmdline"), "quiet root=mosfs mosfs.backend=fuse\n").unwrap();
    let (sysroot, cmdline) = (device.path("sysroot"), device.path("cmdline"));
    let arguments =
        ["boot", "--sysroot", sysroot.to_str().unwrap(), "--cmdline", cmdline.to_str().unwrap(), "--json"];
    let answer: serde_json::Value = serde_json::from_str(&device.mosfs(&arguments)).unwrap();
    assert_eq!(answer["version"], SMALL);
    assert_eq!(answer["backend"], "fuse");
    assert_eq!(answer["overlay"], "tmpfs");
    assert_eq!(fs::read_to_string(sysroot.join("content")).unwrap(), "small");
    fs::write(sysroot.join("written"), "x").unwrap();
    assert!(device.path("run/boot.json").exists());
    assert!(device.path("run/config/manifestCA.pem").exists());
}
