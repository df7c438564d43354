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
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::overlay::{self, Upper};
use crate::digest::{Digest, hex};
use crate::error::{Class, Classified, IoContext, IoError};
use crate::failpoint;
use crate::image::verity::{BLOCK_BYTES, Located, VerityData, VerityError, locate};
use crate::sys::dm::{Control, Target};
use crate::sys::flock::Lock;
use crate::sys::loopdev::LoopDevice;
use crate::sys::mountapi::{FsContext, MountError};

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
    /// The layer's file has no sound verity data where it must be.
    #[error("layer {digest} ({}): {source}", path.display())]
    NoVerity {
        /// The layer.
        digest: Digest,
        /// Its file.
        path: PathBuf,
        /// What was expected and what was found.
        source: Box<VerityError>,
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
    #[error("{count} layers: overlayfs takes 1 to {max}", max = overlay::MAX_LAYERS)]
    LayerCount {
        /// How many there are.
        count: usize,
    },
}

impl Classified for DmVerityError {
    fn class(&self) -> Class {
        match self {
            Self::NoVerity { source, .. } => source.class(),
            Self::TableMismatch { .. } | Self::Corrupt { .. } => Class::Verification,
            _ => Class::Failure,
        }
    }
}

/// The first device of these root hashes in which the kernel has met a block that does not match.
pub fn corrupt_device(root_hashes: impl IntoIterator<Item = Digest>) -> Option<String> {
    let control = Control::open().ok()?;
    root_hashes.into_iter().map(|hash| format!("{NAME_PREFIX}{}", hash.hex())).find(|name| {
        let status = control.target_status(name).unwrap_or_default();
        matches!(status.as_slice(), [one] if one.kind == "verity" && one.parameters.starts_with('C'))
    })
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
        let unavailable = |source| DmVerityError::Unavailable { source };
        let control = Control::open().map_err(unavailable)?;
        match control.target_version("verity") {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                return Err(unavailable(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "the kernel has no target type verity (module dm-verity)",
                )));
            }
            // Other errors: an older kernel, which will say so when the table is loaded.
            _ => {}
        }
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

    fn lock(&self) -> Result<Lock, IoError> {
        Lock::exclusive(&self.lock_path).on("lock", &self.lock_path)
    }

    /// Mounts a stack of layers (bottom first) as one tree that is attached nowhere yet: what
    /// [`DmVerity::layers`] and [`assemble`] do.
    pub fn stack(
        &self,
        layers: &[LayerInput<'_>],
        upper: Option<&Upper>,
        source: &str,
        attributes: u64,
    ) -> Result<OwnedFd, DmVerityError> {
        assemble(&self.layers(layers)?, upper, source, attributes)
    }

    /// Mounts layers, each attached nowhere. Where one fails, those before it are freed.
    pub fn layers(&self, layers: &[LayerInput<'_>]) -> Result<Vec<LayerMount>, DmVerityError> {
        if layers.is_empty() || layers.len() > overlay::MAX_LAYERS {
            return Err(DmVerityError::LayerCount { count: layers.len() });
        }
        layers.iter().map(|layer| self.layer(layer)).collect()
    }

    /// Mounts one layer, attached nowhere, and checks that the kernel found nothing wrong with it.
    pub fn layer(&self, layer: &LayerInput<'_>) -> Result<LayerMount, DmVerityError> {
        let file_system = KernelFs::of(layer)?;
        let device = self.activate(layer)?;
        let mounted = mount_device(file_system, &device.node);
        failpoint::hit("dm-verity-layer");
        // Rule (docs/design.md, corrupt is seen): after
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
    fn activate(&self, layer: &LayerInput<'_>) -> Result<Device, DmVerityError> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(layer.path)
            .on("open", layer.path)?;
        let data = locate(&file).and_then(Located::required).map_err(|source| DmVerityError::NoVerity {
            digest: layer.digest,
            path: layer.path.to_path_buf(),
            source: Box::new(source),
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
                Ok(status) if status.live => self.join(&name, status.dev, layer, &data),
                // Left by a process that was killed while it made the device: we have the lock.
                Ok(status) if status.open_count == 0 => match self.control.remove(&name, false) {
                    Ok(()) => self.create(&name, &file, layer, &data),
                    Err(source) => Err(failed("remove", source)),
                },
                Ok(_) => Err(failed("use", io::Error::from_raw_os_error(libc::EBUSY))),
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
                    self.create(&name, &file, layer, &data)
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

    /// The device of a layer, held open, if the kernel has one that is what [`DmVerity::layer`] would make.
    ///
    /// Nothing is made, and no module is loaded: `None` is any reason why there is none.
    pub fn existing(layer: &LayerInput<'_>) -> Option<File> {
        // The driver; opening its control node would load it.
        if !Path::new("/sys/class/misc/device-mapper").exists() {
            return None;
        }
        let backend = Self { control: Control::open().ok()?, lock_path: PathBuf::new() };
        let name = format!("{NAME_PREFIX}{}", layer.root_hash.hex());
        let status = backend.control.status(&name).ok().filter(|status| status.live)?;
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(layer.path).ok()?;
        let data = locate(&file).and_then(Located::required).ok()?;
        backend.join(&name, status.dev, layer, &data).ok().map(|device| device.holder)
    }

    /// Makes the device. On an error nothing of it is left.
    fn create(
        &self,
        name: &str,
        file: &File,
        layer: &LayerInput<'_>,
        data: &VerityData,
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
            let target = target(data, &loop_device.major_minor(), &layer.root_hash);
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
        data: &VerityData,
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
        // Rule (docs/design.md, named by root hash): the live table is compared before the device is used again.
        // Which loop device it reads is of no matter: what it reads is checked.
        let expected = describe(&[target(data, "-", &layer.root_hash)]);
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

/// Makes one tree of mounted layers (bottom first), attached nowhere yet.
///
/// `source` is what the mount table will show as its device. With an upper folder the tree is
/// writable. `attributes` are `MOUNT_ATTR_*` bits of the result.
pub fn assemble(
    layers: &[LayerMount],
    upper: Option<&Upper>,
    source: &str,
    attributes: u64,
) -> Result<OwnedFd, DmVerityError> {
    let lowers: Vec<_> = layers.iter().map(|layer| layer.mount.as_fd()).collect();
    let overlay = overlay::assemble(&lowers, upper, source, attributes)?;
    failpoint::hit("dm-verity-overlay");
    Ok(overlay)
}

/// An active device, held open.
#[derive(Debug)]
struct Device {
    name: String,
    node: PathBuf,
    /// Keeps the device until the mounted file system does.
    holder: File,
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
    Ok(Device { name: name.into(), node, holder })
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
    /// By media type, matched by prefix (docs/design.md, media types).
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
}

/// The target line: data and hashes are on one device. No option: a bad block is EIO.
fn target(data: &VerityData, device: &str, root_hash: &Digest) -> Target {
    let blocks = data.geometry.data_blocks();
    Target {
        start_sector: 0,
        sectors: data.geometry.data_bytes() / SECTOR_BYTES,
        kind: "verity".into(),
        parameters: format!(
            "1 {device} {device} {BLOCK_BYTES} {BLOCK_BYTES} {blocks} {} sha256 {} {}",
            blocks + 1,
            root_hash.hex(),
            hex(&data.superblock.salt),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::verity::{Geometry, Superblock};

    #[test]
    fn the_table_is_what_veritysetup_would_load() {
        let superblock = Superblock { uuid: [0; 16], salt: [0xab; 32], data_blocks: 3 };
        let data = VerityData { superblock, geometry: Geometry::new(3 * 4096).unwrap() };
        let target = target(&data, "7:5", &Digest::from_bytes([0x11; 32]));
        let (hash, salt) = ("11".repeat(32), "ab".repeat(32));
        assert_eq!(target.sectors, 24);
        assert_eq!(target.parameters, format!("1 7:5 7:5 4096 4096 3 4 sha256 {hash} {salt}"));
        assert_eq!(describe(&[target]), format!("0 24 verity 1 - - 4096 4096 3 4 sha256 {hash} {salt}"));
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
}
