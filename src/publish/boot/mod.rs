//! The target `boot`: the kernel of a system, as a part of it.
//!
//! ```text
//! the hostfs image ─┬─ kernel.rs     vmlinuz, its release
//!                   ├─ modules.rs    its modules, in the order of loading
//!                   ├─ initramfs.rs  mosfs-full, its libraries ─┬─ cpio.rs ──┐
//!                   │                CONFIG ────────────────────┘            ├─ pe.rs ── sign.rs ── mosfs.efi
//!                   └─ systemd's stub, systemd-boot ─────────────────────────┘              └────── loader.efi
//! ```
//!
//! The image of the target has two files: `mosfs.efi`, a unified kernel image, and `loader.efi`, systemd-boot. Kernel,
//! modules, programs and libraries come out of the hostfs image, through the verified reader: nothing is of the
//! machine that builds, and no step requires root. The same input gives the same bytes.
//!
//! **The kernel id** is SHA-256 over the list of all that the unified kernel image is made of, but for the file that
//! holds the id itself ([`kernel_id`]). The running kernel has it in CONFIG (`kernel`), the image's OCI manifest as an
//! annotation ([`KERNEL_ID`]), which the signed system manifest covers by its digest.
//! `mosfs boot` starts a system only under the kernel that it names (docs/design.md, kernel of the system).
//!
//! **A signature for Secure Boot** has the time of signing in it, so two signatures differ. A program that the store
//! already has signed, by the same certificate, is taken from there: the same input gives the same digest as long as
//! the store is kept.

mod cpio;
mod initramfs;
mod inspect;
mod kernel;
mod modules;
mod pe;
mod sign;

use std::collections::BTreeMap;

pub use initramfs::InitramfsError;
pub use inspect::inspect;
pub use kernel::KernelError;
pub use modules::ModulesError;
pub use pe::PeError;
pub use sign::{EfiSignError, EfiSigner};

use crate::convert::{ConvertError, Effort, TarLayer, convert_tar};
use crate::digest::{Digest, Hasher};
use crate::error::{Class, Classified};
use crate::image::boot::{ARTIFACT_TYPE, BYTES, INSTALLS, KERNEL_ID, KERNEL_RELEASE, LOADER, UKI};
use crate::image::files::{Files, FilesError};
use crate::image::format::Compression;
use crate::image::oci::{Descriptor, EMPTY, EMPTY_BYTES, LayerDescriptor, MANIFEST, Manifest, Trust};
use crate::manifest::rules;
use crate::progress::Progress;
use crate::sorting;
use crate::store::view::ViewError;
use crate::store::{StoreError, Writer};
use crate::trust::Anchor;

/// The annotation of the image's OCI manifest with the digest of its programs before they were signed, and of who
/// signed them: what a later build compares.
const UNSIGNED: &str = "vnd.mos.boot.unsigned";

/// systemd's stub, by distributions.
const STUB: &str = "usr/lib/systemd/boot/efi/linuxx64.efi.stub";
/// systemd-boot, by distributions.
const SYSTEMD_BOOT: &str = "usr/lib/systemd/boot/efi/systemd-bootx64.efi";
/// Largest stub or boot loader, in bytes.
const MAX_EFI: u64 = 16 << 20;
/// Longest kernel command line, in bytes (`COMMAND_LINE_SIZE` of x86, asm/setup.h).
const MAX_CMDLINE: usize = 2048;
/// The words of every kernel command line. A kernel that panics restarts at once, so that the boot loader counts.
const CMDLINE: &str = "root=mosfs panic=-1";
/// Name of the file in CONFIG that holds the kernel id.
pub use crate::image::boot::KERNEL_FILE;

/// What the target `boot` is to be.
#[derive(Debug, Clone)]
pub struct Spec {
    /// What the boot trusts.
    pub anchor: Anchor,
    /// The same, and all else that CONFIG has, as files by name.
    pub config: BTreeMap<String, Vec<u8>>,
    /// The kernel's release, where the image has several kernels.
    pub kernel: Option<String>,
    /// More words for the kernel command line.
    pub cmdline: Option<String>,
    /// Who signs for Secure Boot.
    pub signer: Option<EfiSigner>,
}

/// Why there is no target `boot`.
#[derive(Debug, thiserror::Error)]
pub enum BootTargetError {
    /// The system has no hostfs, whose kernel it would be.
    #[error("the system has no target of service type hostfs, whose kernel would be the system's")]
    NoHostfs,
    /// The import manifest has a target of this name.
    #[error("the import manifest already has a target `boot`")]
    Taken,
    /// The image cannot be read.
    #[error(transparent)]
    View(#[from] ViewError),
    /// A file of the image cannot be read.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// There is not exactly one kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The modules cannot be had.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// The initramfs cannot be made.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// A file that the image must have.
    #[error("the image has no /{path}")]
    Missing {
        /// The path, without the leading slash.
        path: String,
    },
    /// systemd's stub cannot take the sections.
    #[error("/{path}: {source}")]
    Stub {
        /// The path, without the leading slash.
        path: String,
        /// Why not.
        source: PeError,
    },
    /// The kernel's release cannot be the version of a target.
    #[error("the kernel's release `{release}` cannot be the version of the target `boot`: {source}")]
    Release {
        /// The release.
        release: String,
        /// What is allowed.
        source: rules::Refused,
    },
    /// A kernel command line that is too long, or has control characters.
    #[error(
        "the kernel command line has {bytes} bytes; allowed: at most {MAX_CMDLINE}, no control characters"
    )]
    Cmdline {
        /// Its length in bytes.
        bytes: usize,
    },
    /// The programs are not signed.
    #[error(transparent)]
    Sign(#[from] EfiSignError),
    /// The image cannot be made.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// The store does not take it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Classified for BootTargetError {
    fn class(&self) -> Class {
        match self {
            Self::View(error) => error.class(),
            Self::Sign(error) => error.class(),
            Self::Convert(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Files(_) => Class::Failure,
            _ => Class::Input,
        }
    }
}

/// The programs of a target `boot`, not signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    /// The unified kernel image.
    pub uki: Vec<u8>,
    /// systemd-boot.
    pub loader: Vec<u8>,
    /// The kernel's release.
    pub release: String,
    /// The kernel id.
    pub kernel_id: Digest,
    /// Whether the kernel image can set up a disk.
    pub installs: bool,
}

/// The target `boot` in a store.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The image's OCI manifest.
    pub manifest: Descriptor,
    /// The kernel's release.
    pub release: String,
    /// The kernel id.
    pub kernel_id: Digest,
    /// Whether the store had these programs signed already.
    pub reused: bool,
}

/// Makes the programs out of the files of a hostfs image.
///
/// # Errors
/// [`BootTargetError`].
pub fn programs(files: &Files, spec: &Spec) -> Result<Programs, BootTargetError> {
    let read = |path: &str| {
        let found = files.read(path, MAX_EFI)?;
        found.ok_or_else(|| BootTargetError::Missing { path: path.to_string() })
    };
    let kernel = kernel::find(files, spec.kernel.as_deref())?;
    rules::target_version(&kernel.release)
        .map_err(|source| BootTargetError::Release { release: kernel.release.clone(), source })?;
    let (stub, loader) = (read(STUB)?, read(SYSTEMD_BOOT)?);
    let mut cmdline = CMDLINE.to_string();
    if let Some(more) = &spec.cmdline {
        cmdline.push(' ');
        cmdline.push_str(more);
    }
    if cmdline.len() > MAX_CMDLINE || rules::has_control(&cmdline) {
        return Err(BootTargetError::Cmdline { bytes: cmdline.len() });
    }
    // The boot loader's menu shows the name; it has no version, so that the same kernel is the same image.
    let os_release = format!("ID=mosfs\nPRETTY_NAME=\"mosfs, Linux {}\"\n", kernel.release);
    let modules = modules::collect(files, &kernel.modules, &kernel.release)?;
    let initramfs::Initramfs { mut archive, installs } = initramfs::collect(files, &modules, &spec.config)?;
    let kernel_id = kernel_id(
        &[
            ("stub", &stub),
            ("linux", &kernel.program),
            ("cmdline", cmdline.as_bytes()),
            ("osrel", os_release.as_bytes()),
            ("loader", &loader),
        ],
        &archive,
    );
    let config = format!("{}/{KERNEL_FILE}", initramfs::CONFIG);
    archive.file(&config, 0o644, format!("{kernel_id}\n").into_bytes()).map_err(InitramfsError::from)?;
    let initrd = archive.to_zstd().map_err(InitramfsError::from)?;
    let sections: [(&str, &[u8]); 5] = [
        (".osrel", os_release.as_bytes()),
        (".cmdline", cmdline.as_bytes()),
        (".uname", kernel.release.as_bytes()),
        (".linux", &kernel.program),
        (".initrd", &initrd),
    ];
    let uki =
        pe::append(&stub, &sections).map_err(|source| BootTargetError::Stub { path: STUB.into(), source })?;
    Ok(Programs { uki, loader, release: kernel.release, kernel_id, installs })
}

/// SHA-256 over a list, one line for each part and then for each file of the initramfs:
/// `mosfs-kernel-v1`, `HEX NAME`, `HEX MODE PATH`.
fn kernel_id(parts: &[(&str, &[u8])], archive: &cpio::Archive) -> Digest {
    let mut list = Hasher::new();
    list.update(b"mosfs-kernel-v1\n");
    for (name, content) in parts {
        list.update(format!("{} {name}\n", Digest::of(content).hex()).as_bytes());
    }
    archive.list(&mut list);
    list.finish()
}

/// Signs programs, makes the target's image of them and stores it. It has no name yet.
///
/// # Errors
/// [`BootTargetError`].
pub fn store(
    writer: &Writer<'_>,
    programs: Programs,
    signer: Option<&EfiSigner>,
    effort: Effort,
    progress: &Progress,
) -> Result<Stored, BootTargetError> {
    let Programs { mut uki, mut loader, release, kernel_id, installs } = programs;
    let mut unsigned = Hasher::new();
    for program in [&uki, &loader] {
        unsigned.update(Digest::of(program).as_bytes());
    }
    if let Some(signer) = signer {
        unsigned.update(signer.identity()?.as_bytes());
    }
    let unsigned = unsigned.finish().to_string();
    if let Some(manifest) = earlier(writer, &unsigned)? {
        return Ok(Stored { manifest, release, kernel_id, reused: true });
    }
    if let Some(signer) = signer {
        let scratch = writer.temp()?;
        uki = signer.sign(&uki, scratch.path())?;
        loader = signer.sign(&loader, scratch.path())?;
    }
    let mut tar = Vec::new();
    for (name, content) in [(LOADER, &loader), (UKI, &uki)] {
        append_to_tar(&mut tar, name, content);
    }
    // Two blocks of zeros end an archive.
    tar.resize(tar.len() + 1024, 0);
    let layer = TarLayer {
        digest: Digest::of(&tar),
        size: tar.len() as u64,
        compression: Compression::None,
        diff_id: None,
    };
    // The firmware's programs are packed by mosfs itself, whatever was chosen for the targets.
    let effort = Effort { packing: effort.packing.squashfs(), ..effort };
    let temp = writer.temp()?;
    let below = &mut |_: &[u8]| Ok(crate::convert::LowerEntry::Nothing);
    let sealed = convert_tar(tar.as_slice(), &layer, &temp.file, effort, below, progress)?.sealed;
    writer.commit(temp, &sealed.digest)?;
    let trust = Trust::RootHash(sealed.root_hash);
    let layer = LayerDescriptor::new(effort.packing.media_type(), sealed.digest, sealed.size_bytes, trust);
    let mut annotations = vec![
        (KERNEL_ID, kernel_id.to_string()),
        (KERNEL_RELEASE, release.clone()),
        (UNSIGNED, unsigned),
        (BYTES, (uki.len() + loader.len()).to_string()),
    ];
    if installs {
        annotations.push((INSTALLS, "ext4".to_string()));
    }
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(MANIFEST.into()),
        artifact_type: Some(ARTIFACT_TYPE.into()),
        config: writer.put_bytes(EMPTY, EMPTY_BYTES)?,
        layers: vec![layer.to_descriptor()],
        subject: None,
        annotations: sorting::map(annotations.into_iter().map(|(name, value)| (name.to_string(), value))),
        extra: BTreeMap::new(),
    };
    let manifest = writer.put_bytes(MANIFEST, &manifest.to_bytes())?;
    Ok(Stored { manifest, release, kernel_id, reused: false })
}

/// The image that an earlier build made of the same programs, if the store has it whole.
fn earlier(writer: &Writer<'_>, unsigned: &str) -> Result<Option<Descriptor>, BootTargetError> {
    let store = writer.store();
    let repository = format!("{}:", crate::store::image_repository(crate::image::boot::TARGET));
    for (name, manifest) in store.names()? {
        if !name.starts_with(&repository) {
            continue;
        }
        // One that is damaged is made anew.
        let Ok(image) = store.image(&manifest.digest) else { continue };
        if image.manifest.annotations.get(UNSIGNED).map(String::as_str) == Some(unsigned)
            && image.manifest.layers.iter().all(|layer| store.get(&layer.digest, layer.size).is_ok())
        {
            return Ok(Some(Descriptor::new(MANIFEST, manifest.digest, image.size)));
        }
    }
    Ok(None)
}

/// Appends a file to a tar archive (POSIX.1-2024, pax, "ustar Interchange Format"): of root, mode 0444, time 0.
fn append_to_tar(tar: &mut Vec<u8>, name: &str, content: &[u8]) {
    let mut header = [0; 512];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000444\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{:011o}\0", content.len()));
    put(136, "00000000000\0");
    // The sum is taken with blanks in its own place.
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar.extend_from_slice(&header);
    tar.extend_from_slice(content);
    tar.resize(tar.len().next_multiple_of(512), 0);
}
