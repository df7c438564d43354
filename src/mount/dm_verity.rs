//! The dm-verity backend: the kernel checks every block of a layer when it is read.
//!
//! ```text
//! layer file -> loop (autoclear, 4 KiB) -> dm-verity `mosfs-ROOTHASH` (deferred remove)
//!            -> squashfs or erofs (attached nowhere) -> overlayfs (attached to the target)
//! ```
//!
//! Each stage is held only by the one after it: the loop device by the table, the device by the
//! mounted file system, that by the overlay. So a plain `umount` of the target frees everything,
//! an error at layer N of M frees the N layers before it, and a process that is killed frees what
//! it had, because what it held were descriptors. One moment is not covered by the kernel: between
//! the creation of a device and its mark for deferred removal. A device that was left there has no
//! holder; [`DmVerity::open`] removes it.
//!
//! **Trust.** Only the root hash is believed; it comes from the verified OCI manifest. The verity
//! superblock in the file says where the tree is and which salt it has. A false one gives blocks
//! that do not match the root hash.
//!
//! **Sharing.** A device is named by its root hash and used by all who want that layer. Before it
//! is used again its live table is compared with the one that would have been loaded.
//!
//! **Locks.** `RUN/dm.lock` (flock) is held from the look-up of a device until it has a holder.
//! Where `RUN` is not shared (containers), the loser of the race for a name tries again.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::kernel_overlay::{self, Upper};
use crate::digest::{Digest, hex};
use crate::error::{Class, Classified, IoContext, IoError};
use crate::failpoint;
use crate::sys::dm::{Control, Target};
use crate::sys::flock::ExclusiveLock;
use crate::sys::loopdev::LoopDevice;
use crate::sys::mountapi::{FsContext, MountError};

/// Size of data and hash blocks (INTEROP.md, "where the verity data is").
const BLOCK_BYTES: u64 = 4096;
/// Size of the sectors that device-mapper counts in.
const SECTOR_BYTES: u64 = 512;
/// Prefix of the names of our devices.
const NAME_PREFIX: &str = "mosfs-";
/// How often a lost race for a device is tried again, 10 ms apart.
const TRIES: u32 = 300;

/// A layer to mount. Its root hash comes from a verified OCI manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerInput<'a> {
    /// The layer's file.
    pub path: &'a Path,
    /// Digest of the layer's blob, for messages.
    pub digest: Digest,
    /// What every block is checked against.
    pub root_hash: Digest,
    /// The descriptor's media type: says which file system the layer is.
    pub media_type: &'a str,
}

/// Why a stack cannot be mounted through dm-verity.
#[derive(Debug, thiserror::Error)]
pub enum DmVerityError {
    /// The kernel has no device-mapper, or this user may not use it.
    #[error("cannot use device-mapper (/dev/mapper/control): {source}")]
    Unavailable {
        /// The operating system's answer.
        source: io::Error,
    },
    /// A file could not be used.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The layer is of no file system that the kernel backend mounts.
    #[error("layer {digest}: no kernel file system for media type `{media_type}`")]
    MediaType {
        /// The layer.
        digest: Digest,
        /// Its media type.
        media_type: String,
    },
    /// The layer's file has no verity data where it must be.
    #[error("layer {digest} ({}): {why}", path.display())]
    NoVerity {
        /// The layer.
        digest: Digest,
        /// Its file.
        path: PathBuf,
        /// What was expected and what was found.
        why: String,
    },
    /// A device-mapper or loop command failed.
    #[error("layer {digest}: cannot {operation} {device}: {source}")]
    Device {
        /// The layer.
        digest: Digest,
        /// What was tried, as a verb.
        operation: &'static str,
        /// The device.
        device: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A device of the right name does something else.
    #[error("layer {digest}: {device} is there with another table: expected `{expected}`, found `{found}`")]
    TableMismatch {
        /// The layer.
        digest: Digest,
        /// The device.
        device: String,
        /// The table that this layer takes (devices as `-`).
        expected: String,
        /// The table that is live (devices as `-`).
        found: String,
    },
    /// The kernel has met a block that the root hash does not cover.
    #[error(
        "verity: layer {digest} is corrupt: {device} has status C, expected every block to match root hash {root_hash}"
    )]
    Corrupt {
        /// The layer.
        digest: Digest,
        /// The device.
        device: String,
        /// The root hash.
        root_hash: Digest,
    },
    /// A layer could not be mounted.
    #[error("layer {digest}: {source}")]
    MountLayer {
        /// The layer.
        digest: Digest,
        /// The call that failed.
        source: MountError,
    },
    /// The overlay could not be made or attached.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// More layers than overlayfs takes, or none.
    #[error("{count} layers: overlayfs takes 1 to {max}", max = kernel_overlay::MAX_LAYERS)]
    LayerCount {
        /// How many there are.
        count: usize,
    },
}

impl Classified for DmVerityError {
    fn class(&self) -> Class {
        match self {
            Self::NoVerity { .. } | Self::TableMismatch { .. } | Self::Corrupt { .. } => Class::Verification,
            _ => Class::Failure,
        }
    }
}

/// The backend, with device-mapper open.
#[derive(Debug)]
pub struct DmVerity {
    control: Control,
    lock_path: PathBuf,
}

/// A layer whose file system is mounted but attached nowhere. Dropping it undoes all of it.
#[derive(Debug)]
pub struct LayerMount {
    mount: OwnedFd,
    device: String,
    digest: Digest,
    root_hash: Digest,
}

impl DmVerity {
    /// Opens the backend; `run_dir` (`/run/mosfs`) holds its lock.
    ///
    /// Devices that a killed process left without a holder are removed.
    ///
    /// # Errors
    /// [`DmVerityError::Unavailable`] where the kernel or the user cannot.
    pub fn open(run_dir: &Path) -> Result<Self, DmVerityError> {
        let control = Control::open().map_err(|source| DmVerityError::Unavailable { source })?;
        std::fs::create_dir_all(run_dir).on("create", run_dir)?;
        let backend = Self { control, lock_path: run_dir.join("dm.lock") };
        backend.sweep()?;
        Ok(backend)
    }

    /// Removes devices of ours that nobody holds and that are not marked to go by themselves.
    fn sweep(&self) -> Result<(), DmVerityError> {
        let _lock = self.lock()?;
        for device in self.control.list().map_err(|source| DmVerityError::Unavailable { source })? {
            if !device.name.starts_with(NAME_PREFIX) {
                continue;
            }
            let Ok(status) = self.control.status(&device.name) else { continue };
            if status.open_count == 0 && !status.deferred_remove {
                // Whoever opened it meanwhile keeps it: the removal is then refused as busy.
                let _ = self.control.remove(&device.name, false);
            }
        }
        Ok(())
    }

    fn lock(&self) -> Result<ExclusiveLock, IoError> {
        ExclusiveLock::wait(&self.lock_path).on("lock", &self.lock_path)
    }

    /// Mounts a stack of layers (bottom first) as one tree that is attached nowhere yet.
    ///
    /// `source` is what the mount table will show as its device. With an upper folder the tree is
    /// writable. `attributes` are `MOUNT_ATTR_*` bits of the result.
    pub fn stack(
        &self,
        layers: &[LayerInput<'_>],
        upper: Option<&Upper>,
        source: &str,
        attributes: u64,
    ) -> Result<OwnedFd, DmVerityError> {
        if layers.is_empty() || layers.len() > kernel_overlay::MAX_LAYERS {
            return Err(DmVerityError::LayerCount { count: layers.len() });
        }
        let mounts = layers.iter().map(|layer| self.layer(layer)).collect::<Result<Vec<_>, _>>()?;
        let lowers: Vec<_> = mounts.iter().map(|layer| layer.mount.as_fd()).collect();
        let overlay = kernel_overlay::assemble(&lowers, upper, source, attributes)?;
        failpoint::hit("dm-verity-overlay");
        Ok(overlay)
    }

    /// Mounts one layer, attached nowhere, and checks that the kernel found nothing wrong with it.
    pub fn layer(&self, layer: &LayerInput<'_>) -> Result<LayerMount, DmVerityError> {
        let file_system = KernelFs::of(layer)?;
        let device = self.activate(layer, file_system)?;
        let mounted = mount_device(file_system, &device.node);
        failpoint::hit("dm-verity-layer");
        // Rule (DESIGN.md, section 4 and INTEROP.md, "corruption reported as success"): after
        // activation the device's status is checked. Mounting has read the superblock and the
        // tables at both ends of the image, so the tree has been used by now; a mount that failed
        // because of a bad block is reported as what it is.
        self.check(&device.name, layer)?;
        let mount = mounted.map_err(|source| DmVerityError::MountLayer { digest: layer.digest, source })?;
        Ok(LayerMount { mount, device: device.name, digest: layer.digest, root_hash: layer.root_hash })
    }

    /// Fails if the kernel has met a corrupt block of a layer since its device exists.
    pub fn recheck(&self, mount: &LayerMount) -> Result<(), DmVerityError> {
        self.check_status(&mount.device, mount.digest, mount.root_hash)
    }

    fn check(&self, device: &str, layer: &LayerInput<'_>) -> Result<(), DmVerityError> {
        self.check_status(device, layer.digest, layer.root_hash)
    }

    fn check_status(&self, device: &str, digest: Digest, root_hash: Digest) -> Result<(), DmVerityError> {
        let targets = self.control.target_status(device).map_err(|source| DmVerityError::Device {
            digest,
            operation: "read the status of",
            device: device.into(),
            source,
        })?;
        match targets.as_slice() {
            // The first letter is V or C (Documentation/admin-guide/device-mapper/verity.rst).
            [target] if target.kind == "verity" && target.parameters.starts_with('V') => Ok(()),
            _ => Err(DmVerityError::Corrupt { digest, device: device.into(), root_hash }),
        }
    }

    /// Finds or makes the verity device of a layer.
    fn activate(&self, layer: &LayerInput<'_>, file_system: KernelFs) -> Result<Device, DmVerityError> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(layer.path)
            .on("open", layer.path)?;
        let parameters = VerityParameters::read(&file, file_system)
            .on("read", layer.path)?
            .map_err(|why| DmVerityError::NoVerity {
                digest: layer.digest,
                path: layer.path.to_path_buf(),
                why,
            })?;
        let name = format!("{NAME_PREFIX}{}", layer.root_hash.hex());
        let failed = |operation, source| DmVerityError::Device {
            digest: layer.digest,
            operation,
            device: name.clone(),
            source,
        };
        let _lock = self.lock()?;
        let mut tries = 0;
        loop {
            let result = match self.control.status(&name) {
                Ok(status) if status.live => self.join(&name, status.dev, layer, &parameters),
                // Left by a process that was killed while it made the device: we have the lock.
                Ok(status) if status.open_count == 0 => match self.control.remove(&name, false) {
                    Ok(()) => self.create(&name, &file, layer, &parameters),
                    Err(source) => Err(failed("remove", source)),
                },
                Ok(_) => Err(failed("use", io::Error::from_raw_os_error(libc::EBUSY))),
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
                    self.create(&name, &file, layer, &parameters)
                }
                Err(error) => return Err(failed("look for", error)),
            };
            match result {
                // The device went, came, or is still being made by a process with another lock.
                Err(DmVerityError::Device { source, .. })
                    if tries < TRIES
                        && matches!(
                            source.raw_os_error(),
                            Some(libc::EBUSY | libc::ENXIO | libc::ENOENT | libc::ENODEV)
                        ) =>
                {
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(10));
                }
                result => return result,
            }
        }
    }

    /// Makes the device. On an error nothing of it is left.
    fn create(
        &self,
        name: &str,
        file: &File,
        layer: &LayerInput<'_>,
        parameters: &VerityParameters,
    ) -> Result<Device, DmVerityError> {
        let failed = |operation, source| DmVerityError::Device {
            digest: layer.digest,
            operation,
            device: name.into(),
            source,
        };
        let loop_device =
            LoopDevice::attach(file.as_fd(), layer.path, BLOCK_BYTES as u32).map_err(|source| {
                DmVerityError::Device {
                    digest: layer.digest,
                    operation: "attach a loop device to",
                    device: layer.path.display().to_string(),
                    source,
                }
            })?;
        let uuid = format!("MOSFS-VERITY-{}", layer.root_hash.hex());
        self.control.create(name, &uuid).map_err(|source| failed("create", source))?;
        failpoint::hit("dm-verity-created");
        let finish = || {
            let target = parameters.target(&loop_device.major_minor(), &layer.root_hash);
            self.control.load(name, &target).map_err(|source| failed("load a table into", source))?;
            failpoint::hit("dm-verity-loaded");
            let status = self.control.status(name).map_err(|source| failed("look for", source))?;
            let device = open_node(name, status.dev).map_err(|source| failed("open", source))?;
            // From here on the device goes when its last holder does, and we are one.
            self.control.remove(name, true).map_err(|source| failed("mark for removal", source))?;
            self.control.resume(name).map_err(|source| failed("activate", source))?;
            failpoint::hit("dm-verity-live");
            Ok(device)
        };
        finish().inspect_err(|_| {
            // Deferred, since udev may have it open. It may be gone already: that is no error.
            let _ = self.control.remove(name, true);
        })
    }

    /// Uses a device that is there already, if it is what we would have made.
    fn join(
        &self,
        name: &str,
        dev: u64,
        layer: &LayerInput<'_>,
        parameters: &VerityParameters,
    ) -> Result<Device, DmVerityError> {
        let failed = |operation, source| DmVerityError::Device {
            digest: layer.digest,
            operation,
            device: name.into(),
            source,
        };
        let device = open_node(name, dev).map_err(|source| failed("open", source))?;
        // Only now that we hold it can it no longer go and its number be another device's.
        let status = self.control.status(name).map_err(|source| failed("look for", source))?;
        if status.dev != dev || !status.live || status.suspended {
            return Err(failed("use", io::Error::from_raw_os_error(libc::EBUSY)));
        }
        let targets = self.control.table(name).map_err(|source| failed("read the table of", source))?;
        // Rule (DESIGN.md, section 4): "named by root hash, the live table compared before reuse".
        // Which loop device it reads is of no matter: what it reads is checked.
        let expected = describe(&[parameters.target("-", &layer.root_hash)]);
        let found = describe(&targets);
        if found != expected || !status.read_only {
            return Err(DmVerityError::TableMismatch {
                digest: layer.digest,
                device: name.into(),
                expected,
                found: if status.read_only { found } else { format!("writable: {found}") },
            });
        }
        self.check(name, layer)?;
        Ok(device)
    }
}

/// An active device, held open.
#[derive(Debug)]
struct Device {
    name: String,
    node: PathBuf,
    /// Keeps the device until the mounted file system does.
    _holder: File,
}

/// Opens the node of a device-mapper device and makes sure that it is that device.
fn open_node(name: &str, dev: u64) -> io::Result<Device> {
    let node = PathBuf::from(format!("/dev/dm-{}", libc::minor(dev)));
    let holder = File::open(&node)?;
    let metadata = holder.metadata()?;
    if !metadata.file_type().is_block_device() || metadata.rdev() != dev {
        return Err(io::Error::other(format!(
            "{} is not block device {}:{}",
            node.display(),
            libc::major(dev),
            libc::minor(dev)
        )));
    }
    Ok(Device { name: name.into(), node, _holder: holder })
}

fn mount_device(file_system: KernelFs, node: &Path) -> Result<OwnedFd, MountError> {
    let context = FsContext::open(file_system.name())?;
    context.set_string("source", node.as_os_str().as_encoded_bytes())?;
    context.set_flag("ro")?;
    context.mount(libc::MOUNT_ATTR_RDONLY)
}

/// A table as text, with the two devices of a verity target as `-`.
fn describe(targets: &[Target]) -> String {
    let lines: Vec<String> = targets
        .iter()
        .map(|target| {
            let mut words: Vec<&str> = target.parameters.split_ascii_whitespace().collect();
            // Parameters 1 and 2 are the data and the hash device (verity.rst).
            for word in words.iter_mut().skip(1).take(2) {
                *word = "-";
            }
            format!("{} {} {} {}", target.start_sector, target.sectors, target.kind, words.join(" "))
        })
        .collect();
    lines.join("; ")
}

/// The file systems that the kernel mounts for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KernelFs {
    Squashfs,
    Erofs,
}

impl KernelFs {
    /// By media type, matched by prefix (INTEROP.md, "Layers").
    fn of(layer: &LayerInput<'_>) -> Result<Self, DmVerityError> {
        const TYPES: [(&str, KernelFs); 2] = [
            ("application/vnd.stacker.image.layer.squashfs", KernelFs::Squashfs),
            ("application/vnd.stacker.image.layer.erofs", KernelFs::Erofs),
        ];
        TYPES
            .iter()
            .find(|(prefix, _)| {
                let rest = layer.media_type.strip_prefix(prefix);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('+'))
            })
            .map(|(_, file_system)| *file_system)
            .ok_or_else(|| DmVerityError::MediaType {
                digest: layer.digest,
                media_type: layer.media_type.to_string(),
            })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Squashfs => "squashfs",
            Self::Erofs => "erofs",
        }
    }

    /// Size of the file system without what follows it, in bytes, from its own superblock.
    fn image_bytes(self, file: &File) -> io::Result<Result<u64, String>> {
        // squashfs: the superblock is at 0, 96 bytes long, magic first, bytes_used at 40.
        // erofs: the superblock is at 1024, magic first, blkszbits at 12, blocks at 36
        // (erofs_fs.h, struct erofs_super_block).
        let mut block = [0u8; 1152];
        if let Err(error) = file.read_exact_at(&mut block, 0) {
            return match error.kind() {
                io::ErrorKind::UnexpectedEof => Ok(Err("the file is too short for a superblock".into())),
                _ => Err(error),
            };
        }
        let u32_at = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        Ok(match self {
            Self::Squashfs if u32_at(0) == 0x7371_7368 => {
                Ok(u64::from(u32_at(40)) | u64::from(u32_at(44)) << 32)
            }
            Self::Erofs if u32_at(1024) == 0xE0F5_E1E2 => match block[1024 + 12] {
                bits @ 9..=16 => Ok(u64::from(u32_at(1024 + 36)) << bits),
                bits => Err(format!("erofs block size of 2^{bits} bytes")),
            },
            _ => Err(format!("no {} superblock", self.name())),
        })
    }
}

/// What a verity table needs besides the devices and the root hash.
///
/// Nothing here is trusted (see the module's text); it is checked only for making sense.
#[derive(Debug, Clone, PartialEq, Eq)]
struct VerityParameters {
    data_blocks: u64,
    hash_start_block: u64,
    salt: Vec<u8>,
}

impl VerityParameters {
    /// Reads the verity superblock behind the image (INTEROP.md, "where the verity data is").
    fn read(file: &File, file_system: KernelFs) -> io::Result<Result<Self, String>> {
        let image_bytes = match file_system.image_bytes(file)? {
            Ok(bytes) => bytes,
            Err(why) => return Ok(Err(why)),
        };
        let file_bytes = file.metadata()?.len();
        let superblock_at = image_bytes.checked_next_multiple_of(BLOCK_BYTES);
        let Some(superblock_at) =
            superblock_at.filter(|at| *at > 0 && at.checked_add(BLOCK_BYTES).is_some_and(|end| end <= file_bytes))
        else {
            return Ok(Err(format!(
                "no verity superblock: the file system has {image_bytes} bytes, the file {file_bytes}"
            )));
        };
        let mut block = [0u8; 512];
        file.read_exact_at(&mut block, superblock_at)?;
        Ok(Self::parse(&block, superblock_at))
    }

    /// Parses the 512 bytes of a verity superblock (cryptsetup, "DMVerity", version 1).
    fn parse(block: &[u8; 512], superblock_at: u64) -> Result<Self, String> {
        let u16_at = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        let u32_at = |at: usize| u64::from(u16_at(at)) | u64::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u32_at(at) | u32_at(at + 4) << 32;
        let mut algorithm = [0u8; 32];
        algorithm[..6].copy_from_slice(b"sha256");
        let must = |what: &str, expected: u64, found: u64| {
            if expected == found {
                Ok(())
            } else {
                Err(format!("verity superblock at {superblock_at}: {what} {found}, expected {expected}"))
            }
        };
        if &block[..8] != b"verity\0\0" {
            return Err(format!("no verity superblock at {superblock_at}"));
        }
        must("version", 1, u32_at(8))?;
        must("hash type", 1, u32_at(12))?;
        if block[32..64] != algorithm {
            return Err(format!("verity superblock at {superblock_at}: the hash is not sha256"));
        }
        must("data block size", BLOCK_BYTES, u32_at(64))?;
        must("hash block size", BLOCK_BYTES, u32_at(68))?;
        // The data is exactly what lies before the superblock: a smaller number would leave a
        // part unchecked, another one would move the levels of the tree.
        must("number of data blocks", superblock_at / BLOCK_BYTES, u64_at(72))?;
        let salt_bytes = usize::from(u16_at(80));
        let salt = block[88..344]
            .get(..salt_bytes)
            .ok_or_else(|| format!("verity superblock at {superblock_at}: salt of {salt_bytes} bytes"))?;
        Ok(Self {
            data_blocks: superblock_at / BLOCK_BYTES,
            hash_start_block: superblock_at / BLOCK_BYTES + 1,
            salt: salt.to_vec(),
        })
    }

    /// The target line: data and hashes are on one device. No option: a bad block is EIO.
    fn target(&self, device: &str, root_hash: &Digest) -> Target {
        let salt = if self.salt.is_empty() { "-".to_string() } else { hex(&self.salt) };
        Target {
            start_sector: 0,
            sectors: self.data_blocks * (BLOCK_BYTES / SECTOR_BYTES),
            kind: "verity".into(),
            parameters: format!(
                "1 {device} {device} {BLOCK_BYTES} {BLOCK_BYTES} {} {} sha256 {} {salt}",
                self.data_blocks,
                self.hash_start_block,
                root_hash.hex(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u64 = 3;

    fn superblock() -> [u8; 512] {
        let mut block = [0u8; 512];
        block[..8].copy_from_slice(b"verity\0\0");
        block[8] = 1;
        block[12] = 1;
        block[32..38].copy_from_slice(b"sha256");
        block[64..68].copy_from_slice(&4096u32.to_le_bytes());
        block[68..72].copy_from_slice(&4096u32.to_le_bytes());
        block[72..80].copy_from_slice(&DATA.to_le_bytes());
        block[80] = 2;
        block[88] = 0xab;
        block[89] = 0x01;
        block
    }

    fn parse(block: &[u8; 512]) -> Result<VerityParameters, String> {
        VerityParameters::parse(block, DATA * BLOCK_BYTES)
    }

    #[test]
    fn the_table_is_what_veritysetup_would_load() {
        let target = parse(&superblock()).unwrap().target("7:5", &Digest::from_bytes([0x11; 32]));
        let hash = "11".repeat(32);
        assert_eq!(target.sectors, 24);
        assert_eq!(target.parameters, format!("1 7:5 7:5 4096 4096 3 4 sha256 {hash} ab01"));
        assert_eq!(describe(&[target]), format!("0 24 verity 1 - - 4096 4096 3 4 sha256 {hash} ab01"));
    }

    #[test]
    fn every_field_of_the_superblock_is_checked() {
        for (offset, expected) in [
            (0, "no verity superblock at 12288"),
            (8, "version 2, expected 1"),
            (12, "hash type 2, expected 1"),
            (37, "not sha256"),
            (65, "data block size 4352, expected 4096"),
            (69, "hash block size 4352, expected 4096"),
            (72, "number of data blocks 4, expected 3"),
            (81, "salt of 258 bytes"),
        ] {
            let mut block = superblock();
            block[offset] += 1;
            let error = parse(&block).unwrap_err();
            assert!(error.contains(expected), "{offset}: {error}");
        }
    }

    #[test]
    fn media_types_name_the_file_system() {
        let of = |media_type: &str| {
            let layer = LayerInput {
                path: Path::new("/x"),
                digest: Digest::of(b""),
                root_hash: Digest::of(b""),
                media_type,
            };
            KernelFs::of(&layer).ok()
        };
        assert_eq!(of("application/vnd.stacker.image.layer.squashfs+zstd+verity"), Some(KernelFs::Squashfs));
        assert_eq!(of("application/vnd.stacker.image.layer.erofs+lz4hc"), Some(KernelFs::Erofs));
        assert_eq!(of("application/vnd.stacker.image.layer.squashfsish"), None);
        assert_eq!(of("application/vnd.oci.image.layer.v1.tar"), None);
    }

    #[test]
    fn a_file_without_verity_data_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"hsqs", 0).unwrap();
        file.write_all_at(&5000u64.to_le_bytes(), 40).unwrap();
        file.set_len(8192).unwrap();
        let why = VerityParameters::read(&file, KernelFs::Squashfs).unwrap().unwrap_err();
        assert_eq!(why, "no verity superblock: the file system has 5000 bytes, the file 8192");
        file.set_len(12288).unwrap();
        let why = VerityParameters::read(&file, KernelFs::Squashfs).unwrap().unwrap_err();
        assert_eq!(why, "no verity superblock at 8192");
        file.write_all_at(&u64::MAX.to_le_bytes(), 40).unwrap();
        assert!(VerityParameters::read(&file, KernelFs::Squashfs).unwrap().is_err());
        let why = VerityParameters::read(&file, KernelFs::Erofs).unwrap().unwrap_err();
        assert_eq!(why, "no erofs superblock");
    }
}
