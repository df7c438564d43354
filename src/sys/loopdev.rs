//! Loop devices: a block device over a file (<linux/loop.h>).
//!
//! A device created here has autoclear set: it is freed when the last holder closes it, so nothing has to
//! detach it and a killed process leaves none behind. LOOP_CONFIGURE (Linux 5.8) sets file, block size and
//! flags in one step, so the device never exists without them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

/// `LOOP_CONFIGURE` in <linux/loop.h>.
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A as libc::Ioctl;
/// `LOOP_CTL_GET_FREE` in <linux/loop.h>.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82 as libc::Ioctl;
/// `LO_FLAGS_READ_ONLY` in <linux/loop.h>.
const LO_FLAGS_READ_ONLY: u32 = 1;
/// `LO_FLAGS_AUTOCLEAR` in <linux/loop.h>.
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// `LO_NAME_SIZE` in <linux/loop.h>.
const LO_NAME_SIZE: usize = 64;
/// Major number of loop devices (`LOOP_MAJOR` in <linux/major.h>).
const LOOP_MAJOR: u32 = 7;
/// How many races for a free device may be lost before it is an error.
const TRIES: u32 = 200;

/// `struct loop_info64` of <linux/loop.h>.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; LO_NAME_SIZE],
    crypt_name: [u8; LO_NAME_SIZE],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of <linux/loop.h>.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// A loop device. It is freed when this and all other holders have closed it.
#[derive(Debug)]
pub struct LoopDevice {
    #[cfg_attr(not(test), expect(dead_code, reason = "the device is freed when it is closed"))]
    device: File,
    number: u32,
}

impl LoopDevice {
    /// Creates a read-only device with blocks of `block_size_bytes` (512 to a page) over an open file.
    ///
    /// The kernel stores `name` (its last 63 bytes) only for display; it reads through `file`. Reads go
    /// through the page cache. If another process wins the race for a free device, the call tries again.
    pub fn attach(file: BorrowedFd<'_>, name: &Path, block_size_bytes: u32) -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        let mut last = io::Error::from_raw_os_error(libc::EBUSY);
        for attempt in 0..TRIES {
            // SAFETY: LOOP_CTL_GET_FREE takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            let Ok(number) = u32::try_from(number) else { return Err(io::Error::last_os_error()) };
            match Self::configure(number, file, name, block_size_bytes) {
                Ok(device) => return Ok(device),
                // EBUSY: another process was faster. ENXIO, ENOENT: it was removed, or its node
                // is still to come. EAGAIN: the kernel could not lock the page cache.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EBUSY | libc::ENXIO | libc::ENOENT | libc::EAGAIN)
                    ) =>
                {
                    last = error;
                    std::thread::sleep(Duration::from_micros(200 * u64::from(attempt.min(50))));
                }
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    fn configure(number: u32, file: BorrowedFd<'_>, name: &Path, block_size: u32) -> io::Result<Self> {
        let device = OpenOptions::new().read(true).open(format!("/dev/loop{number}"))?;
        let metadata = device.metadata()?;
        let expected = libc::makedev(LOOP_MAJOR, number);
        if !metadata.file_type().is_block_device() || metadata.rdev() != expected {
            return Err(io::Error::other(format!(
                "/dev/loop{number} is not block device {LOOP_MAJOR}:{number}"
            )));
        }
        let mut file_name = [0; LO_NAME_SIZE];
        let bytes = name.as_os_str().as_bytes();
        let tail = &bytes[bytes.len().saturating_sub(LO_NAME_SIZE - 1)..];
        file_name[..tail.len()].copy_from_slice(tail);
        let config = LoopConfig {
            fd: file.as_raw_fd() as u32,
            block_size,
            info: LoopInfo64 {
                device: 0,
                inode: 0,
                rdevice: 0,
                offset: 0,
                size_limit: 0,
                number: 0,
                encrypt_type: 0,
                encrypt_key_size: 0,
                flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR,
                file_name,
                crypt_name: [0; LO_NAME_SIZE],
                encrypt_key: [0; 32],
                init: [0; 2],
            },
            reserved: [0; 8],
        };
        // SAFETY: the pointer is to a struct with the layout that LOOP_CONFIGURE reads (checked in the tests
        // below); it outlives the call, and the kernel does not write to it.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &config as *const LoopConfig) };
        if result == 0 { Ok(Self { device, number }) } else { Err(io::Error::last_os_error()) }
    }

    /// Returns its device number in the form of device-mapper tables: `7:N`.
    pub fn major_minor(&self) -> String {
        format!("{LOOP_MAJOR}:{}", self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::mem::offset_of;
    use std::os::fd::AsFd;
    use std::path::PathBuf;

    #[test]
    fn the_structs_are_those_of_linux_loop_h() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(offset_of!(LoopInfo64, number), 40);
        assert_eq!(offset_of!(LoopInfo64, flags), 52);
        assert_eq!(offset_of!(LoopInfo64, file_name), 56);
        assert_eq!(offset_of!(LoopInfo64, encrypt_key), 184);
        assert_eq!(size_of::<LoopConfig>(), 304);
        assert_eq!(offset_of!(LoopConfig, info), 8);
    }

    #[test]
    fn a_device_shows_the_file_and_goes_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let content: Vec<u8> = (0..3 * 4096u32).map(|i| (i / 7) as u8).collect();
        File::create(&path).unwrap().write_all(&content).unwrap();
        let file = File::open(&path).unwrap();
        let device = LoopDevice::attach(file.as_fd(), &path, 4096)
            .expect("this test needs root and the loop module (modprobe loop)");
        let mut read = Vec::new();
        (&device.device).read_to_end(&mut read).unwrap();
        assert_eq!(read, content);
        let sys = PathBuf::from(format!("/sys/block/loop{}", device.number));
        let show =
            |name: &str| std::fs::read_to_string(sys.join(name)).unwrap_or_default().trim().to_string();
        assert_eq!(show("queue/logical_block_size"), "4096");
        assert_eq!(show("loop/autoclear"), "1");
        assert_eq!(show("loop/backing_file"), path.to_string_lossy());
        assert_eq!(show("ro"), "1");
        drop(device);
        drop(file);
        let is_ours = || show("loop/backing_file").starts_with(&*path.to_string_lossy());
        // The kernel clears it after the close has returned.
        while is_ours() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn devices_made_at_once_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for i in 0..8u8 {
                let path = dir.path().join(format!("image{i}"));
                scope.spawn(move || {
                    std::fs::write(&path, vec![i; 4096]).unwrap();
                    let file = File::open(&path).unwrap();
                    for _ in 0..5 {
                        let device = LoopDevice::attach(file.as_fd(), &path, 4096).unwrap();
                        let mut read = Vec::new();
                        (&device.device).read_to_end(&mut read).unwrap();
                        assert_eq!(read, vec![i; 4096]);
                    }
                });
            }
        });
    }
}
