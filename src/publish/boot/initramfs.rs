//! Collects the files of an initramfs out of the image of the root: nothing comes from the machine that builds.
//!
//! ```text
//! /init                       a link to /usr/bin/mosfs, which mounts, loads, boots and switches (crate::boot::init)
//! /usr/bin/mosfs              the image's /usr/libexec/mosfs/mosfs-full
//! /usr/sbin/mke2fs            the image's, if it has one: the kernel image then also sets up disks
//! /usr/sbin/e2fsck            the image's, if it has one: a boot then checks the system partition before it mounts it
//! /usr/lib/…, /lib64/…        their libraries and the dynamic loader, at the paths that they have in the image
//! /usr/lib/mosfs/modules/*.ko modules of the kernel, decompressed
//! /usr/lib/mosfs/modules/order their names in the order of loading, one a line
//! /etc/mosfs/*                CONFIG: what the boot trusts; the file `kernel` is the kernel's id
//! /dev /proc /run /sys /sysroot /tmp
//! ```

use std::collections::BTreeMap;

use super::cpio::{Archive, CpioError};
use super::modules::Module;
use crate::image::FileType;
use crate::image::files::{Files, FilesError};
use crate::sys::elf::{Elf, ElfError};

/// The full program, where `make install` and the package put it.
pub(super) const PROGRAM: &str = "usr/libexec/mosfs/mosfs-full";
/// What makes the file system of a disk that is set up, and what checks it at each boot.
const OF_FILE_SYSTEMS: [&str; 2] = [MKE2FS, "e2fsck"];
const MKE2FS: &str = "mke2fs";
/// Where an image may have them. In the initramfs they are in the first folder.
const OF_ADMINISTRATORS: [&str; 4] = ["usr/sbin", "sbin", "usr/bin", "bin"];
/// The folder of the modules in the initramfs.
pub(super) const MODULES: &str = "usr/lib/mosfs/modules";
/// The folder of CONFIG in the initramfs.
pub(super) const CONFIG: &str = "etc/mosfs";

/// Libraries that are loaded when they are first used, so that no program names them: that for disks, and those for a
/// TPM.
const LOADED_LATER: [&str; 4] = ["libblkid.so.1", "libtss2-esys.so.0", "libtss2-sys.so.1", "libtss2-mu.so.0"];
/// Folders in which the dynamic loaders of distributions look without a cache (ld.so(8), and Debian's multiarch).
const FOLDERS: [&str; 6] =
    ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib64", "lib64", "usr/lib", "lib"];
/// Largest program or library, in bytes.
const MAX_PROGRAM: u64 = 256 << 20;
/// Most libraries.
const MAX_LIBRARIES: usize = 500;

/// Why an initramfs cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// A file of the image cannot be read.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The archive cannot be made.
    #[error(transparent)]
    Cpio(#[from] CpioError),
    /// The image lacks the program.
    #[error("the image has no /{path}")]
    NoProgram {
        /// The path, without the leading slash.
        path: String,
    },
    /// A program or library that is not one.
    #[error("/{path}: {source}")]
    Program {
        /// The path, without the leading slash.
        path: String,
        /// What is wrong with it.
        source: ElfError,
    },
    /// A library is missing.
    #[error("the image has no {library}, which {by} needs")]
    NoLibrary {
        /// The library's name.
        library: String,
        /// What needs it.
        by: String,
    },
}

/// An initramfs, without the file that holds the kernel's id.
#[derive(Debug)]
pub(super) struct Initramfs {
    /// Its files.
    pub archive: Archive,
    /// Whether it has what sets up a disk.
    pub installs: bool,
}

/// Makes the initramfs.
///
/// # Errors
/// [`InitramfsError`].
pub(super) fn collect(
    files: &Files,
    modules: &[Module],
    config: &BTreeMap<String, Vec<u8>>,
) -> Result<Initramfs, InitramfsError> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "run", "sys", "sysroot", "tmp", "usr/bin", "usr/lib"] {
        archive.folder(folder)?;
    }
    // As the image has them: where /lib is a folder of its own it stays one.
    for name in ["bin", "sbin", "lib", "lib64"] {
        let usr = format!("usr/{name}");
        if files.find(name)?.is_some_and(|found| found.path == usr) {
            archive.folder(&usr)?;
            archive.link(name, &usr)?;
        }
    }
    let mut libraries = Libraries { files, archive, todo: Vec::new() };
    let program = files.read(PROGRAM, MAX_PROGRAM)?;
    let program = program.ok_or_else(|| InitramfsError::NoProgram { path: PROGRAM.into() })?;
    libraries.needs(PROGRAM, &program)?;
    libraries.archive.file("usr/bin/mosfs", 0o755, program)?;
    for library in LOADED_LATER {
        libraries.todo.push((library.to_string(), format!("/{PROGRAM}")));
    }
    let mut installs = false;
    for name in OF_FILE_SYSTEMS {
        for folder in OF_ADMINISTRATORS {
            let path = format!("{folder}/{name}");
            if let Some(program) = files.read(&path, MAX_PROGRAM)? {
                libraries.needs(&path, &program)?;
                libraries.archive.file(&format!("{}/{name}", OF_ADMINISTRATORS[0]), 0o755, program)?;
                installs |= name == MKE2FS;
                break;
            }
        }
    }
    libraries.add_all()?;
    let mut archive = libraries.archive;
    archive.link("init", "usr/bin/mosfs")?;
    let mut order = String::new();
    for module in modules {
        archive.file(&format!("{MODULES}/{}", module.name), 0o644, module.content.clone())?;
        order.push_str(&module.name);
        order.push('\n');
    }
    archive.file(&format!("{MODULES}/order"), 0o644, order.into_bytes())?;
    for (name, content) in config {
        archive.file(&format!("{CONFIG}/{name}"), 0o644, content.clone())?;
    }
    Ok(Initramfs { archive, installs })
}

/// Libraries on their way into an archive.
struct Libraries<'a> {
    files: &'a Files,
    archive: Archive,
    /// Names that are still to be found, each with what needs it.
    todo: Vec<(String, String)>,
}

impl Libraries<'_> {
    fn needs(&mut self, path: &str, program: &[u8]) -> Result<(), InitramfsError> {
        let wrong = |source| InitramfsError::Program { path: path.to_string(), source };
        let elf = Elf::new(program).map_err(wrong)?;
        if let Some(loader) = elf.loader().map_err(wrong)? {
            self.loader(path, &String::from_utf8_lossy(loader))?;
        }
        let libraries = elf.libraries().map_err(wrong)?;
        self.todo.extend(libraries.into_iter().map(|name| (name, format!("/{path}"))));
        Ok(())
    }

    /// The loader has a path of its own, which the kernel opens.
    fn loader(&mut self, by: &str, loader: &str) -> Result<(), InitramfsError> {
        let missing = || InitramfsError::NoLibrary { library: loader.to_string(), by: format!("/{by}") };
        let content = self.files.read(loader, MAX_PROGRAM)?.ok_or_else(missing)?;
        let place = self.place(loader.trim_matches('/'))?;
        Ok(self.archive.file(&place, 0o755, content)?)
    }

    fn add_all(&mut self) -> Result<(), InitramfsError> {
        let mut seen: Vec<String> = Vec::new();
        while let Some((name, by)) = self.todo.pop() {
            if seen.contains(&name) {
                continue;
            }
            let missing = || InitramfsError::NoLibrary { library: name.clone(), by: by.clone() };
            if seen.len() == MAX_LIBRARIES {
                return Err(missing());
            }
            let mut found = None;
            for folder in FOLDERS {
                let path = format!("{folder}/{name}");
                if self.files.find(&path)?.is_some_and(|found| found.attr.kind == FileType::Regular) {
                    found = Some(path);
                    break;
                }
            }
            let path = found.ok_or_else(missing)?;
            let content = self.files.read(&path, MAX_PROGRAM)?.ok_or_else(missing)?;
            self.needs(&path, &content)?;
            let place = self.place(&path)?;
            self.archive.file(&place, 0o755, content)?;
            seen.push(name);
        }
        Ok(())
    }

    /// The path with its folder as the image has it: below `/usr/lib` where `/lib` is a link to it. The file's own
    /// name stays, also where it is a link to a longer one.
    fn place(&self, path: &str) -> Result<String, InitramfsError> {
        let Some((folder, name)) = path.rsplit_once('/') else { return Ok(path.to_string()) };
        let folder = self.files.find(folder)?.map_or_else(|| folder.to_string(), |found| found.path);
        Ok(format!("{folder}/{name}"))
    }
}
