//! Identifies the content of a block device with libblkid, which udev and mount(8) use too.
//!
//! It knows the superblocks of file systems, and of what file systems lie in: members of RAIDs, of volume
//! groups, of encrypted volumes, and many more, wherever on the device they are. A device that carries the
//! label of a file system may still be half of a mirror.
//!
//! Loaded when first needed (as tpm2-tss is), because only `mosfs boot` needs it. Source of the declarations:
//! libblkid's manual ("Low-level probing") and blkid.h of util-linux 2.38; all are there since 2.18.

use std::ffi::{CStr, CString, c_char, c_int};
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

/// The library's name, with the version of its ABI.
const NAME: &CStr = c"libblkid.so.1";

/// `BLKID_SUBLKS_LABEL | BLKID_SUBLKS_UUID | BLKID_SUBLKS_TYPE | BLKID_SUBLKS_USAGE` (blkid.h).
const SUPERBLOCK_FLAGS: c_int = 1 << 1 | 1 << 3 | 1 << 5 | 1 << 7;

/// `BLKID_PARTS_ENTRY_DETAILS` (blkid.h).
const PARTITION_FLAGS: c_int = 1 << 2;

/// Maximum length of a value that is copied, in bytes.
const MAX_VALUE: usize = 1 << 10;

/// What a device holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Nothing that libblkid knows.
    Nothing,
    /// More than one kind of content: mounting it would be a guess.
    Ambiguous,
    /// One thing.
    Superblock(Superblock),
}

/// The one thing that a device holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Superblock {
    /// What it is: `ext4`, `linux_raid_member`, `crypto_LUKS`, …
    pub kind: String,
    /// What it is for: `filesystem`, `raid`, `crypto` or `other`.
    pub usage: String,
    /// Its label; empty where there is none.
    pub label: String,
    /// Its UUID as text; empty where there is none.
    pub uuid: String,
}

/// `struct blkid_struct_probe`: only ever behind a pointer.
#[repr(C)]
struct Probe {
    _opaque: [u8; 0],
    _not_send: PhantomData<*mut u8>,
}

type NewProbe = unsafe extern "C" fn() -> *mut Probe;
type FreeProbe = unsafe extern "C" fn(*mut Probe);
type SetDevice = unsafe extern "C" fn(*mut Probe, c_int, i64, i64) -> c_int;
type SetFlags = unsafe extern "C" fn(*mut Probe, c_int) -> c_int;
type SafeProbe = unsafe extern "C" fn(*mut Probe) -> c_int;
type LookUp = unsafe extern "C" fn(*mut Probe, *const c_char, *mut *const c_char, *mut usize) -> c_int;

struct Library {
    new_probe: NewProbe,
    free_probe: FreeProbe,
    set_device: SetDevice,
    enable_superblocks: SetFlags,
    set_superblocks_flags: SetFlags,
    enable_partitions: SetFlags,
    set_partitions_flags: SetFlags,
    do_safeprobe: SafeProbe,
    lookup_value: LookUp,
}

impl Library {
    fn open() -> Result<Self, String> {
        // SAFETY: NAME ends with a zero byte. The library has no constructors that need anything of
        // us, and it is never unloaded.
        let handle = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            return Err(last_error());
        }
        let symbol = |name: &CStr| {
            // SAFETY: the handle is open and the name ends with a zero byte.
            let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
            if address.is_null() { Err(last_error()) } else { Ok(address) }
        };
        // SAFETY: each address is that of the C function of this name, whose declaration in blkid.h is the
        // type that it is turned into (blkid_loff_t is int64_t, a probe a pointer).
        unsafe {
            Ok(Self {
                new_probe: std::mem::transmute::<*mut libc::c_void, NewProbe>(symbol(c"blkid_new_probe")?),
                free_probe: std::mem::transmute::<*mut libc::c_void, FreeProbe>(symbol(c"blkid_free_probe")?),
                set_device: std::mem::transmute::<*mut libc::c_void, SetDevice>(symbol(
                    c"blkid_probe_set_device",
                )?),
                enable_superblocks: std::mem::transmute::<*mut libc::c_void, SetFlags>(symbol(
                    c"blkid_probe_enable_superblocks",
                )?),
                set_superblocks_flags: std::mem::transmute::<*mut libc::c_void, SetFlags>(symbol(
                    c"blkid_probe_set_superblocks_flags",
                )?),
                enable_partitions: std::mem::transmute::<*mut libc::c_void, SetFlags>(symbol(
                    c"blkid_probe_enable_partitions",
                )?),
                set_partitions_flags: std::mem::transmute::<*mut libc::c_void, SetFlags>(symbol(
                    c"blkid_probe_set_partitions_flags",
                )?),
                do_safeprobe: std::mem::transmute::<*mut libc::c_void, SafeProbe>(symbol(
                    c"blkid_do_safeprobe",
                )?),
                lookup_value: std::mem::transmute::<*mut libc::c_void, LookUp>(symbol(
                    c"blkid_probe_lookup_value",
                )?),
            })
        }
    }
}

fn last_error() -> String {
    // SAFETY: dlerror returns null or a string that lives until this thread's next such call.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return format!("cannot load {}", NAME.to_string_lossy());
    }
    // SAFETY: as above; it is copied at once.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

fn library() -> io::Result<&'static Library> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    LIBRARY.get_or_init(Library::open).as_ref().map_err(|why| io::Error::other(why.clone()))
}

/// Loads libblkid, so that later calls, also those of a forked process, find it loaded.
///
/// # Errors
/// What the dynamic loader said.
pub fn load() -> io::Result<()> {
    library().map(|_| ())
}

/// A probe that is freed when it is dropped.
struct OwnedProbe(&'static Library, *mut Probe);

impl Drop for OwnedProbe {
    fn drop(&mut self) {
        // SAFETY: from blkid_new_probe, freed once.
        unsafe { (self.0.free_probe)(self.1) };
    }
}

impl OwnedProbe {
    /// A probe of a device that must outlive it, with these settings.
    fn of(library: &'static Library, device: &File, settings: &[(SetFlags, c_int)]) -> io::Result<Self> {
        // SAFETY: no arguments.
        let probe = unsafe { (library.new_probe)() };
        if probe.is_null() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let probe = Self(library, probe);
        // SAFETY: the probe is live, and its users hold the device open for longer.
        let mut is_ready = unsafe { (library.set_device)(probe.1, device.as_raw_fd(), 0, 0) } == 0;
        for (set, value) in settings {
            // SAFETY: the probe is live; all of them take it and a number.
            is_ready = is_ready && unsafe { set(probe.1, *value) } == 0;
        }
        if is_ready { Ok(probe) } else { Err(io::Error::last_os_error()) }
    }

    fn value(&self, name: &str) -> String {
        let Ok(name) = CString::new(name) else { return String::new() };
        let (mut data, mut len) = (std::ptr::null(), 0usize);
        // SAFETY: the probe is live, the name ends with a zero byte, both out-pointers are valid.
        let code = unsafe { (self.0.lookup_value)(self.1, name.as_ptr(), &raw mut data, &raw mut len) };
        if code != 0 || data.is_null() {
            return String::new();
        }
        // SAFETY: on success `data` points to `len` bytes that live as long as the probe's results.
        let bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), len.min(MAX_VALUE)) };
        let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    }
}

/// Identifies the content of a device, or of an image of one.
///
/// # Errors
/// If libblkid cannot be loaded, or the device cannot be read.
pub fn probe(device: &File) -> io::Result<Content> {
    let library = library()?;
    let probe = OwnedProbe::of(
        library,
        device,
        &[
            (library.enable_superblocks, 1),
            (library.set_superblocks_flags, SUPERBLOCK_FLAGS),
            // With it, a RAID at the end of the whole disk is not mistaken for one of its last partition.
            (library.enable_partitions, 1),
        ],
    )?;
    // SAFETY: the probe is live and has a device.
    match unsafe { (library.do_safeprobe)(probe.1) } {
        0 => {
            let kind = probe.value("TYPE");
            if kind.is_empty() {
                // A partition table and no more.
                return Ok(Content::Nothing);
            }
            Ok(Content::Superblock(Superblock {
                kind,
                usage: probe.value("USAGE"),
                label: probe.value("LABEL"),
                uuid: probe.value("UUID"),
            }))
        }
        1 => Ok(Content::Nothing),
        -2 => Ok(Content::Ambiguous),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the UUID that the partition table names for a partition, in lower case; `None` if it names none, or if the
/// device is no partition.
///
/// # Errors
/// If libblkid cannot be loaded, or the disk cannot be read.
pub fn partition_uuid(device: &File) -> io::Result<Option<String>> {
    let library = library()?;
    let probe = OwnedProbe::of(
        library,
        device,
        &[
            (library.enable_superblocks, 0),
            (library.enable_partitions, 1),
            (library.set_partitions_flags, PARTITION_FLAGS),
        ],
    )?;
    // SAFETY: the probe is live and has a device.
    match unsafe { (library.do_safeprobe)(probe.1) } {
        0 => Ok(Some(probe.value("PART_ENTRY_UUID").to_ascii_lowercase()).filter(|uuid| !uuid.is_empty())),
        1 | -2 => Ok(None),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::path::Path;
    use std::process::Command;

    fn make(package: &str, command: &mut Command) {
        let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}; install {package}"));
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn image(dir: &Path, mib: u64) -> std::path::PathBuf {
        let path = dir.join("image");
        File::create(&path).unwrap().set_len(mib << 20).unwrap();
        path
    }

    fn found(path: &Path) -> Content {
        probe(&File::open(path).unwrap()).unwrap()
    }

    const UUID: &str = "6d1f6e2a-0c5c-4b0a-9d2e-0a1b2c3d4e5f";

    #[test]
    fn file_systems_of_the_real_tools_are_known() {
        let dir = tempfile::tempdir().unwrap();
        let file_system = |kind: &str| {
            Content::Superblock(Superblock {
                kind: kind.into(),
                usage: "filesystem".into(),
                label: "mosfs".into(),
                uuid: UUID.into(),
            })
        };
        let path = image(dir.path(), 4);
        make(
            "e2fsprogs",
            Command::new("mke2fs").args(["-q", "-t", "ext4", "-L", "mosfs", "-U", UUID]).arg(&path),
        );
        assert_eq!(found(&path), file_system("ext4"));
        let path = image(dir.path(), 320);
        make(
            "xfsprogs",
            Command::new("mkfs.xfs").args(["-q", "-L", "mosfs", "-m", &format!("uuid={UUID}")]).arg(&path),
        );
        assert_eq!(found(&path), file_system("xfs"));
        let path = image(dir.path(), 128);
        make("btrfs-progs", Command::new("mkfs.btrfs").args(["-q", "-L", "mosfs", "-U", UUID]).arg(&path));
        assert_eq!(found(&path), file_system("btrfs"));
    }

    #[test]
    fn encrypted_volumes_are_told_by_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), 20);
        make(
            "cryptsetup-bin",
            Command::new("sh").arg("-c").arg(format!(
                "echo secret | cryptsetup -q luksFormat --type luks1 --pbkdf-force-iterations 1000 {} -",
                path.display()
            )),
        );
        match found(&path) {
            Content::Superblock(Superblock { kind, usage, .. }) => {
                assert_eq!((kind.as_str(), usage.as_str()), ("crypto_LUKS", "crypto"));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn other_content_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for len in [0, 2, 0x43a, 1 << 20] {
            let path = dir.path().join("x");
            std::fs::write(&path, vec![0; len]).unwrap();
            assert!(matches!(probe(&File::open(&path).unwrap()), Ok(Content::Nothing) | Err(_)), "{len}");
        }
        let mut file = File::create(dir.path().join("noise")).unwrap();
        file.write_all(&[0x5a; 1 << 20]).unwrap();
        assert_eq!(found(&dir.path().join("noise")), Content::Nothing);
    }
}
