//! Computes the kernel id of a unified kernel image again.
//!
//! What the id covers is all there: kernel, command line, the text of the boot menu and the initramfs in the image
//! itself, systemd's stub and boot loader in the hostfs image that it was made of. With them the image is put together
//! once more, so that no byte of it is left out; a signature for Secure Boot may follow.

use super::cpio::{Archive, CpioError};
use super::{KERNEL_FILE, MAX_EFI, STUB, SYSTEMD_BOOT, initramfs, kernel_id, pe};
use crate::digest::Digest;
use crate::error::{Class, Classified};
use crate::image::files::{Files, FilesError};

/// Largest initramfs, in bytes, decompressed.
const MAX_INITRD: usize = 512 << 20;

/// Why a unified kernel image is not one that `mosfs build` made of a hostfs image.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// A file of the hostfs image cannot be read.
    #[error("the hostfs image: {0}")]
    Files(#[from] FilesError),
    /// The hostfs image lacks a file that the kernel image was made of.
    #[error("the hostfs image has no /{path}")]
    Missing {
        /// The path, without the leading slash.
        path: &'static str,
    },
    /// It is no EFI program, or lacks a section.
    #[error("mosfs.efi: {0}")]
    Program(String),
    /// Its initramfs is not one that mosfs writes.
    #[error("mosfs.efi: the initramfs: {0}")]
    Initrd(#[from] CpioError),
    /// A program is not what its parts make.
    #[error("{name} is not what its parts make, with or without a signature")]
    Differs {
        /// The program.
        name: &'static str,
    },
    /// The initramfs names another kernel id.
    #[error("the initramfs names the kernel id `{found}`, computed: {expected}")]
    OtherId {
        /// What it names.
        found: String,
        /// The id of what is there.
        expected: Digest,
    },
}

impl Classified for InspectError {
    fn class(&self) -> Class {
        Class::Verification
    }
}

/// Returns the kernel id of the programs of a target `boot`, computed from what they hold.
///
/// # Errors
/// [`InspectError`].
pub fn inspect(uki: &[u8], loader: &[u8], hostfs: &Files) -> Result<Digest, InspectError> {
    let read = |path: &'static str| hostfs.read(path, MAX_EFI)?.ok_or(InspectError::Missing { path });
    let (stub, unsigned_loader) = (read(STUB)?, read(SYSTEMD_BOOT)?);
    if loader != unsigned_loader && !pe::is_signed_form_of(loader, &unsigned_loader) {
        return Err(InspectError::Differs { name: "loader.efi" });
    }
    let program = |error: pe::PeError| InspectError::Program(error.to_string());
    let section = |name: &str| {
        let found = pe::section(uki, name).map_err(program)?;
        found.ok_or_else(|| InspectError::Program(format!("it has no section {name}")))
    };
    let names = [".osrel", ".cmdline", ".uname", ".linux", ".initrd"];
    let mut sections = Vec::new();
    for name in names {
        sections.push((name, section(name)?));
    }
    let whole = pe::append(&stub, &sections).map_err(program)?;
    if uki != whole && !pe::is_signed_form_of(uki, &whole) {
        return Err(InspectError::Differs { name: "mosfs.efi" });
    }
    let [(_, os_release), (_, cmdline), _, (_, linux), (_, initrd)] = sections[..] else {
        return Err(InspectError::Differs { name: "mosfs.efi" });
    };
    let mut archive = Archive::from_zstd(initrd, MAX_INITRD)?;
    let named = archive.take(&format!("{}/{KERNEL_FILE}", initramfs::CONFIG)).unwrap_or_default();
    let id = kernel_id(
        &[
            ("stub", &stub),
            ("linux", linux),
            ("cmdline", cmdline),
            ("osrel", os_release),
            ("loader", &unsigned_loader),
        ],
        &archive,
    );
    if named != format!("{id}\n").into_bytes() {
        let found = String::from_utf8_lossy(&named[..named.len().min(100)]).trim_end().to_string();
        return Err(InspectError::OtherId { found, expected: id });
    }
    Ok(id)
}
