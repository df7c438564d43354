//! Finds the kernel of an image: `/boot/vmlinuz-RELEASE` or `/usr/lib/modules/RELEASE/vmlinuz`, and its modules in
//! `/usr/lib/modules/RELEASE`.
//!
//! Kernel and modules must be of one build: a kernel loads no other modules, and a system that lacks its drivers does
//! not come up. The release that the kernel has in its own header must be that of the folder.

use std::collections::BTreeSet;

use crate::image::files::{Files, FilesError};

/// Where modules are. Where `/lib` is a link to `usr/lib`, `/lib/modules` is the same folder.
const MODULES: [&str; 2] = ["usr/lib/modules", "lib/modules"];
/// Largest kernel, in bytes.
const MAX_KERNEL: u64 = 256 << 20;
/// Longest release, in bytes (`__NEW_UTS_LEN` in linux/utsname.h).
const MAX_RELEASE: usize = 64;

/// Why an image has no kernel for a system.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file of the image cannot be read.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// There is none.
    #[error("the image has no kernel; looked for /boot/vmlinuz-RELEASE and /usr/lib/modules/RELEASE/vmlinuz")]
    None,
    /// There is more than one.
    #[error("the image has {} kernels: {}", releases.len(), releases.join(", "))]
    Several {
        /// Their releases.
        releases: Vec<String>,
    },
    /// The one that was asked for is not there.
    #[error("the image has no kernel {wanted}; it has {}", list(releases))]
    NotThere {
        /// The release that was asked for.
        wanted: String,
        /// The releases that there are.
        releases: Vec<String>,
    },
    /// Its modules are not there.
    #[error(
        "the image has the kernel {release}, but no /usr/lib/modules/{release}; it has modules of {}",
        list(found)
    )]
    NoModules {
        /// The kernel's release.
        release: String,
        /// The releases of the modules that there are.
        found: Vec<String>,
    },
    /// It is not a kernel that says its release.
    #[error("/{path} is not a Linux kernel for x86-64 (a bzImage)")]
    NotAKernel {
        /// The path, without the leading slash.
        path: String,
    },
    /// Its header names another release than its path.
    #[error("/{path} is the kernel {found}, expected {expected}")]
    OtherRelease {
        /// The path, without the leading slash.
        path: String,
        /// The release in the kernel's header.
        found: String,
        /// The release in the path.
        expected: String,
    },
}

fn list(releases: &[String]) -> String {
    if releases.is_empty() { "none".into() } else { releases.join(", ") }
}

/// A kernel of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kernel {
    /// Its release, as `uname -r` prints it.
    pub release: String,
    /// The kernel itself.
    pub program: Vec<u8>,
    /// The folder with its modules, without the leading slash.
    pub modules: String,
}

/// Finds the kernel of an image: the only one, or that of release `wanted`.
///
/// # Errors
/// [`KernelError`].
pub(super) fn find(files: &Files, wanted: Option<&str>) -> Result<Kernel, KernelError> {
    let (mut kernels, mut modules) = (BTreeSet::new(), BTreeSet::new());
    for name in files.list("boot")? {
        kernels.extend(name.strip_prefix("vmlinuz-").map(str::to_string));
    }
    for folder in MODULES {
        for release in files.list(folder)? {
            if files.find(&format!("{folder}/{release}/vmlinuz"))?.is_some() {
                kernels.insert(release.clone());
            }
            if files.find(&format!("{folder}/{release}/modules.dep"))?.is_some() {
                modules.insert(release);
            }
        }
    }
    let releases: Vec<String> = kernels.into_iter().collect();
    let release = match (wanted, &releases[..]) {
        (Some(wanted), all) if all.iter().any(|one| one == wanted) => wanted.to_string(),
        (Some(wanted), _) => return Err(KernelError::NotThere { wanted: wanted.into(), releases }),
        (None, []) => return Err(KernelError::None),
        (None, [one]) => one.clone(),
        (None, _) => return Err(KernelError::Several { releases }),
    };
    if !modules.contains(&release) {
        return Err(KernelError::NoModules { release, found: modules.into_iter().collect() });
    }
    let mut folder = format!("{}/{release}", MODULES[0]);
    if files.find(&folder)?.is_none() {
        folder = format!("{}/{release}", MODULES[1]);
    }
    for path in [format!("boot/vmlinuz-{release}"), format!("{folder}/vmlinuz")] {
        let Some(program) = files.read(&path, MAX_KERNEL)? else { continue };
        let found = release_of(&program).ok_or_else(|| KernelError::NotAKernel { path: path.clone() })?;
        if found != release {
            return Err(KernelError::OtherRelease { path, found, expected: release });
        }
        return Ok(Kernel { release, program, modules: folder });
    }
    Err(KernelError::NotThere { wanted: release, releases })
}

/// The release in the header of a bzImage: at 0x202 `HdrS`, at 0x20e the offset of the version's text, less 0x200
/// (Documentation/arch/x86/boot.rst of Linux). The text begins with the release, and a space.
fn release_of(program: &[u8]) -> Option<String> {
    if program.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let offset = usize::from(u16::from_le_bytes(*program.get(0x20e..)?.first_chunk()?)) + 0x200;
    let text = program.get(offset..)?;
    let end = text.iter().take(MAX_RELEASE + 1).position(|byte| matches!(byte, b' ' | 0))?;
    let text = std::str::from_utf8(&text[..end]).ok()?;
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())).then(|| text.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_says_its_release() {
        let mut kernel = vec![0; 4096];
        assert_eq!(release_of(&kernel), None);
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(release_of(&kernel), None, "no text");
        kernel[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        kernel[0x300..0x310].copy_from_slice(b"6.12-cloud (a) #");
        assert_eq!(release_of(&kernel).as_deref(), Some("6.12-cloud"));
        kernel[0x20e..0x210].copy_from_slice(&0xffffu16.to_le_bytes());
        assert_eq!(release_of(&kernel), None, "beyond its end");
        kernel[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        kernel[0x300..0x400].fill(b'x');
        assert_eq!(release_of(&kernel), None, "without an end");
        assert_eq!(release_of(b"MZ"), None);
    }
}
