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
//! superblock in the file says where the tree is and which salt it has. A false one yields blocks
//! that do not match the root hash.
//!
//! **Sharing.** A device is named by its root hash and shared by all mounts of that layer. Before it
//! is used again its live table is compared with the one that would have been loaded.
//!
//! **Locks.** `RUN/dm.lock` (flock) is held from the look-up of a device until it has a holder.
//! Where `RUN` is not shared (containers), the loser of the race for a name tries again.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::overlay::{self, Upper};
use crate::digest::{Digest, hex};
use crate::error::{Class, Classified, IoContext, IoError};
use crate::image::verity::{BLOCK_BYTES, Located, VerityData, VerityError, locate};
use crate::mount::plan::PlannedLayer;
use crate::sys::dm::{Control, Target};
use crate::sys::failpoint;
use crate::sys::file::{self, Links, open_regular};
use crate::sys::flock::Lock;
use crate::sys::loopdev::LoopDevice;
use crate::sys::mountapi::{CallError, FsContext};

/// Size of the sectors that device-mapper counts in.
const SECTOR_BYTES: u64 = 512;
/// Prefix of the names of our devices.
const NAME_PREFIX: &str = "mosfs-";
/// Prefix of their UUIDs, which say that a device is ours.
const UUID_PREFIX: &str = "MOSFS-VERITY-";
/// How often a lost race for a device is tried again, 10 ms apart.
const TRIES: u32 = 300;

/// What the kernel needs of a layer.
struct KernelLayer<'a> {
    path: &'a Path,
    /// Of the layer's blob, for messages.
    digest: Digest,
    /// What every block is checked against.
    root_hash: Digest,
    /// The file system's name in the kernel.
    file_system: &'static str,
}

impl<'a> KernelLayer<'a> {
    fn of(layer: &'a PlannedLayer) -> Result<Self, DmVerityError> {
        let descriptor = &layer.descriptor;
        let digest = descriptor.digest;
        let media_type = || descriptor.media_type().to_string();
        let format = descriptor
            .image()
            .ok_or_else(|| DmVerityError::MediaType { digest, media_type: media_type() })?;
        let path = layer.file().ok_or(DmVerityError::NotAFile { digest })?;
        // Rule (docs/design.md, unverified mounts): only `--unsafe-no-verity` makes one, and not in this backend.
        let root_hash = descriptor.trust.root_hash().ok_or(DmVerityError::NoRootHash { digest })?;
        Ok(Self { path, digest, root_hash, file_system: format.kernel })
    }

    /// An operation on its device that failed.
    fn failed(&self, device: &str, operation: &'static str, source: io::Error) -> DmVerityError {
        DmVerityError::Device { digest: self.digest, operation, device: device.into(), source }
    }
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
    /// The layer is not one file of this machine, which a loop device needs.
    #[error("layer {digest}: it is not one file of this machine")]
    NotAFile {
        /// The layer.
        digest: Digest,
    },
    /// The plan has no root hash for the layer.
    #[error("layer {digest} has no root hash: it cannot be verified")]
    NoRootHash {
        /// The layer.
        digest: Digest,
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
        source: CallError,
    },
    /// The overlay could not be made or attached.
    #[error(transparent)]
    Mount(#[from] CallError),
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
            Self::NoRootHash { .. } | Self::TableMismatch { .. } | Self::Corrupt { .. } => {
                Class::Verification
            }
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
pub struct LayerMount(OwnedFd);

impl From<LayerMount> for OwnedFd {
    fn from(layer: LayerMount) -> Self {
        layer.0
    }
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
        file::create_folders(run_dir)?;
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
            // Rule: the UUID identifies a device's owner. Any volume group may be called `mosfs`.
            if status.uuid.starts_with(UUID_PREFIX) && status.open_count == 0 && !status.deferred_remove {
                // Whoever opened it meanwhile keeps it: the removal is then refused as busy.
                let _ = self.control.remove(&device.name, false);
            }
        }
        Ok(())
    }

    fn lock(&self) -> Result<Lock, IoError> {
        Lock::exclusive(&self.lock_path).on("lock", &self.lock_path)
    }

    /// Mounts layers, each attached nowhere. Where one fails, those before it are freed.
    pub fn layers(&self, layers: &[PlannedLayer]) -> Result<Vec<LayerMount>, DmVerityError> {
        if layers.is_empty() || layers.len() > overlay::MAX_LAYERS {
            return Err(DmVerityError::LayerCount { count: layers.len() });
        }
        layers.iter().map(|layer| self.layer(layer)).collect()
    }

    /// Mounts one layer, attached nowhere, and checks that the kernel found nothing wrong with it.
    pub fn layer(&self, layer: &PlannedLayer) -> Result<LayerMount, DmVerityError> {
        let layer = &KernelLayer::of(layer)?;
        let device = self.activate(layer)?;
        let mounted = mount_device(layer.file_system, &device.node);
        failpoint::hit("kernel.layer.mounted");
        // Rule (docs/design.md, corrupt is seen): after
        // activation the device's status is checked. Mounting has read the superblock and the
        // tables at both ends of the image, so the tree has been used by now; a mount that failed
        // because of a bad block is reported as what it is.
        self.check(&device.name, layer)?;
        let mount = mounted.map_err(|source| DmVerityError::MountLayer { digest: layer.digest, source })?;
        Ok(LayerMount(mount))
    }

    /// Fails if the kernel has met a corrupt block of a layer since its device exists.
    fn check(&self, device: &str, layer: &KernelLayer<'_>) -> Result<(), DmVerityError> {
        let (digest, root_hash) = (layer.digest, layer.root_hash);
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
    fn activate(&self, layer: &KernelLayer<'_>) -> Result<Device, DmVerityError> {
        let (file, _) = open_regular(layer.path, Links::Followed)?;
        let data = locate(&file).and_then(Located::required).map_err(|source| DmVerityError::NoVerity {
            digest: layer.digest,
            path: layer.path.to_path_buf(),
            source: Box::new(source),
        })?;
        let name = format!("{NAME_PREFIX}{}", layer.root_hash.hex());
        let failed = |operation, source| layer.failed(&name, operation, source);
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
    pub fn existing(layer: &PlannedLayer) -> Option<File> {
        let layer = &KernelLayer::of(layer).ok()?;
        // The driver; opening its control node would load it.
        if !Path::new("/sys/class/misc/device-mapper").exists() {
            return None;
        }
        let backend = Self { control: Control::open().ok()?, lock_path: PathBuf::new() };
        let name = format!("{NAME_PREFIX}{}", layer.root_hash.hex());
        let status = backend.control.status(&name).ok().filter(|status| status.live)?;
        let (file, _) = open_regular(layer.path, Links::Followed).ok()?;
        let data = locate(&file).and_then(Located::required).ok()?;
        backend.join(&name, status.dev, layer, &data).ok().map(|device| device.holder)
    }

    /// Makes the device. On an error nothing of it is left.
    fn create(
        &self,
        name: &str,
        file: &File,
        layer: &KernelLayer<'_>,
        data: &VerityData,
    ) -> Result<Device, DmVerityError> {
        let failed = |operation, source| layer.failed(name, operation, source);
        let loop_device =
            LoopDevice::attach(file.as_fd(), layer.path, BLOCK_BYTES as u32).map_err(|source| {
                DmVerityError::Device {
                    digest: layer.digest,
                    operation: "attach a loop device to",
                    device: layer.path.display().to_string(),
                    source,
                }
            })?;
        let uuid = format!("{UUID_PREFIX}{}", layer.root_hash.hex());
        self.control.create(name, &uuid).map_err(|source| failed("create", source))?;
        failpoint::hit("kernel.device.created");
        let finish = || {
            let target = target(data, &loop_device.major_minor(), &layer.root_hash);
            self.control.load(name, &target).map_err(|source| failed("load a table into", source))?;
            failpoint::hit("kernel.device.loaded");
            let status = self.control.status(name).map_err(|source| failed("look for", source))?;
            let device = open_node(name, status.dev).map_err(|source| failed("open", source))?;
            // From here on the device goes when its last holder does, and we are one.
            self.control.remove(name, true).map_err(|source| failed("mark for removal", source))?;
            self.control.resume(name).map_err(|source| failed("activate", source))?;
            failpoint::hit("kernel.device.live");
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
        layer: &KernelLayer<'_>,
        data: &VerityData,
    ) -> Result<Device, DmVerityError> {
        let failed = |operation, source| layer.failed(name, operation, source);
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
    let lowers: Vec<_> = layers.iter().map(|layer| layer.0.as_fd()).collect();
    let overlay = overlay::assemble(&lowers, upper, source, attributes)?;
    failpoint::hit("kernel.overlay.assembled");
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

fn mount_device(file_system: &str, node: &Path) -> Result<OwnedFd, CallError> {
    let context = FsContext::open(file_system)?;
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
    use std::sync::Arc;

    use super::*;
    use crate::image::blobs::Blob;
    use crate::image::oci::{LayerDescriptor, Trust};
    use crate::image::verity::{Geometry, Superblock};
    use crate::mount::plan::LayerBytes;

    #[test]
    fn the_table_is_what_veritysetup_would_load() {
        let superblock = Superblock { uuid: [0; 16], salt: vec![0xab; 32], data_blocks: 3 };
        let data = VerityData { superblock, geometry: Geometry::new(3 * 4096).unwrap() };
        let target = target(&data, "7:5", &Digest::from_bytes([0x11; 32]));
        let (hash, salt) = ("11".repeat(32), "ab".repeat(32));
        assert_eq!(target.sectors, 24);
        assert_eq!(target.parameters, format!("1 7:5 7:5 4096 4096 3 4 sha256 {hash} {salt}"));
        assert_eq!(describe(&[target]), format!("0 24 verity 1 - - 4096 4096 3 4 sha256 {hash} {salt}"));
    }

    #[test]
    fn what_the_kernel_cannot_mount_is_named() {
        let (squashfs, root) = ("application/vnd.stacker.image.layer.squashfs+zstd+verity", Digest::of(b"r"));
        let of = |media_type: &str, trust, blob| {
            let descriptor = LayerDescriptor::new(media_type, Digest::of(b"l"), 1, trust);
            let layer = PlannedLayer { descriptor, bytes: LayerBytes::One(blob) };
            KernelLayer::of(&layer).map(|layer| layer.file_system)
        };
        let file = || Blob::File("/x".into());
        let erofs = "application/vnd.stacker.image.layer.erofs+lz4hc";
        assert_eq!(of(squashfs, Trust::RootHash(root), file()).unwrap(), "squashfs");
        assert_eq!(of(erofs, Trust::RootHash(root), file()).unwrap(), "erofs");
        for media_type in
            ["application/vnd.stacker.image.layer.squashfsish", "application/vnd.oci.image.layer.v1.tar"]
        {
            let error = of(media_type, Trust::RootHash(root), file()).unwrap_err();
            assert!(matches!(error, DmVerityError::MediaType { .. }), "{error}");
        }
        let error = of(squashfs, Trust::None, file()).unwrap_err();
        assert!(matches!(error, DmVerityError::NoRootHash { .. }) && error.class() == Class::Verification);
        let remote =
            Blob::Remote { place: "elsewhere".into(), bytes: Arc::new(tempfile::tempfile().unwrap()) };
        let error = of(squashfs, Trust::RootHash(root), remote).unwrap_err();
        assert!(matches!(error, DmVerityError::NotAFile { .. }), "{error}");
    }
}
