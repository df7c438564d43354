//! overlayfs over mounts that are attached nowhere.
//!
//! ```text
//!   lower mounts (descriptors)      thread with a mount namespace of its own
//!   bottom .. top               ->  tmpfs/0 .. tmpfs/N-1, tmpfs/e (empty)  ->  overlayfs (descriptor)
//! ```
//!
//! overlayfs clones the mounts of its lower folders for itself, so the namespace and its tmpfs
//! can go as soon as the overlay is made. Nothing but the overlay ever shows in the caller's mount
//! tree, and a process that is killed at any step leaves nothing.
//!
//! The empty folder is always the lowest layer. Linux requires two lowers where there is no upper one,
//! and with it a stack of one layer is like every other: no whiteout is a device in it, and no
//! `trusted.overlay.*` attribute is shown.
//!
//! One difference to our own merged view: overlayfs lists the name of a whiteout that is in a folder
//! of one layer only, where it hides nothing; the name cannot be opened.

use std::fmt::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

use crate::image::overlay::MAX_KERNEL_LAYERS;
use crate::mount::source_name;
use crate::sys::file;
use crate::sys::mountapi::{self, CallError, FsContext};

/// Most layers of a stack.
pub const MAX_LAYERS: usize = MAX_KERNEL_LAYERS;

/// Where the writes of a writable mount go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upper {
    /// Into memory that goes with the mount.
    Memory,
    /// Into folders, which are made where they are missing and must be on one file system.
    Folder {
        /// The folder of changed files.
        upper: PathBuf,
        /// overlayfs' own working folder.
        work: PathBuf,
    },
}

/// The two folders of an upper layer, as overlayfs takes them.
struct UpperPaths {
    upper: PathBuf,
    work: PathBuf,
}

/// Options of every overlay.
///
/// - `redirect_dir=nofollow`, `metacopy=off`: a layer must not name where else in the stack to
///   read (`trusted.overlay.redirect`, `trusted.overlay.metacopy` are content of the image).
/// - `index=off`: no state in the upper folder that binds it to one lower file system.
/// - `xino=off`: files have the inode numbers of their layers, which programs with 32-bit numbers
///   can take; `on` puts the number of the layer into the highest bits. So files of different layers
///   differ in st_dev. Folders have the overlay's own st_dev, so that nobody who stays on one file
///   system stops at them.
const OPTIONS: [(&str, &str); 4] =
    [("redirect_dir", "nofollow"), ("metacopy", "off"), ("index", "off"), ("xino", "off")];

/// Makes an overlay of `lowers` (bottom first) that is attached nowhere.
///
/// `source` is what the mount table shows as its device. `attributes` are `MOUNT_ATTR_*` bits;
/// without an upper folder the overlay is read-only in any case.
pub fn assemble(
    lowers: &[BorrowedFd<'_>],
    upper: Option<&Upper>,
    source: &str,
    attributes: u64,
) -> Result<OwnedFd, CallError> {
    mountapi::in_private_namespace(|folder| {
        mountapi::make_folder(folder, "e")?;
        let mut names = Vec::with_capacity(lowers.len() + 1);
        for (number, lower) in lowers.iter().enumerate() {
            let name = number.to_string();
            mountapi::make_folder(folder, &name)?;
            mountapi::attach_at(*lower, folder, &name)?;
            names.push(name);
        }
        names.reverse();
        names.push("e".into());
        // overlayfs takes the uppermost layer first.
        let upper = upper.map(|upper| prepare(folder, upper, lowers.last())).transpose()?;
        let upper = upper.as_ref();
        let attributes = attributes | if upper.is_none() { libc::MOUNT_ATTR_RDONLY } else { 0 };
        if !FsContext::open("overlay")?.checks_options() {
            return with_string(folder, &names, upper, source, attributes);
        }
        match with_context(&names, upper, source, attributes) {
            Err(error) if error.is_unsupported() => {
                with_string(folder, &names, upper, source, attributes).map_err(|mut second| {
                    // Both ways failed: the first one has the kernel's better words.
                    second.log.push(format!("before that: {error}"));
                    second
                })
            }
            result => result,
        }
    })
}

/// Linux 6.7 and up: one `lowerdir+` for each layer, so that nothing limits their text.
fn with_context(
    names: &[String],
    upper: Option<&UpperPaths>,
    source: &str,
    attributes: u64,
) -> Result<OwnedFd, CallError> {
    let context = FsContext::open("overlay")?;
    context.set_string("source", source_name::cut(source, source_name::FSCONFIG_BYTES_MAX).as_bytes())?;
    for (key, value) in OPTIONS {
        context.set_string(key, value.as_bytes())?;
    }
    for name in names {
        context.set_string("lowerdir+", name.as_bytes())?;
    }
    match upper {
        Some(UpperPaths { upper, work }) => {
            context.set_string("upperdir", escape(upper).as_bytes())?;
            context.set_string("workdir", escape(work).as_bytes())?;
        }
        None => context.set_flag("ro")?,
    }
    context.mount(attributes)
}

/// Older kernels: all in one string of at most 4095 bytes, which is why the names are short.
fn with_string(
    folder: BorrowedFd<'_>,
    names: &[String],
    upper: Option<&UpperPaths>,
    source: &str,
    attributes: u64,
) -> Result<OwnedFd, CallError> {
    let mut options = format!("lowerdir={}", names.join(":"));
    if let Some(UpperPaths { upper, work }) = upper {
        let _ = write!(options, ",upperdir={},workdir={}", escape(upper), escape(work));
    }
    for (key, value) in OPTIONS {
        let _ = write!(options, ",{key}={value}");
    }
    let flags = if upper.is_none() { libc::MS_RDONLY } else { 0 };
    mountapi::make_folder(folder, "m")?;
    let source = &*source_name::cut(source, source_name::MOUNT_BYTES_MAX);
    mountapi::mount_legacy(source, Path::new("m"), "overlay", flags, &options)?;
    let mount = mountapi::clone_mount(Path::new("m"))?;
    mountapi::set_attributes(mount.as_fd(), attributes, 0)?;
    Ok(mount)
}

/// Makes the folders of an upper layer. A new upper folder gets owner and mode of the uppermost
/// lower root, because overlayfs shows its own for the root of the whole.
fn prepare(
    folder: BorrowedFd<'_>,
    upper: &Upper,
    root: Option<&BorrowedFd<'_>>,
) -> Result<UpperPaths, CallError> {
    let paths = match upper {
        Upper::Folder { upper, work } => UpperPaths { upper: upper.clone(), work: work.clone() },
        Upper::Memory => {
            let context = FsContext::open("tmpfs")?;
            context.set_string("mode", b"0700")?;
            mountapi::make_folder(folder, "u")?;
            mountapi::attach_at(context.mount(0)?.as_fd(), folder, "u")?;
            UpperPaths { upper: "u/upper".into(), work: "u/work".into() }
        }
    };
    let failed = |path: &Path, source| {
        let call = format!("prepare the upper folder {}", path.display());
        CallError { call, source, log: Vec::new() }
    };
    file::create_folders(&paths.work).map_err(|error| failed(&error.path, error.source))?;
    if !paths.upper.is_dir() {
        file::create_folders(&paths.upper).map_err(|error| failed(&error.path, error.source))?;
        if let Some(root) = root {
            let copy = || {
                let root = std::fs::File::from(root.try_clone_to_owned()?).metadata()?;
                chown(&paths.upper, Some(root.uid()), Some(root.gid()))?;
                std::fs::set_permissions(&paths.upper, root.permissions())
            };
            copy().map_err(|source| failed(&paths.upper, source))?;
        }
    }
    Ok(paths)
}

/// A path as overlayfs unescapes it, in a string of options and in one option alike: `,`, `:` and `\` behind a backslash.
fn escape(path: &Path) -> String {
    let mut text = String::new();
    for c in path.to_string_lossy().chars() {
        if matches!(c, ',' | ':' | '\\') {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A tmpfs with one file, attached nowhere.
    fn layer(dir: &Path, files: &[(&str, &str)]) -> OwnedFd {
        std::fs::create_dir_all(dir).unwrap();
        for (name, text) in files {
            std::fs::write(dir.join(name), text).unwrap();
        }
        mountapi::clone_mount(dir).expect("this test needs root")
    }

    fn mount_points() -> String {
        std::fs::read_to_string("/proc/self/mountinfo").unwrap()
    }

    /// The content of a file on a mount that is attached nowhere.
    fn read(mount: &OwnedFd, name: &str) -> std::io::Result<String> {
        use std::os::fd::AsRawFd;
        std::fs::read_to_string(format!("/proc/self/fd/{}/{name}", mount.as_raw_fd()))
    }

    #[test]
    fn upper_layers_win_and_nothing_shows_in_the_mount_tree() {
        let dir = tempfile::tempdir().unwrap();
        let bottom = layer(&dir.path().join("0"), &[("a", "bottom"), ("b", "bottom")]);
        let top = layer(&dir.path().join("1"), &[("a", "top")]);
        let before = mount_points();
        let mount = assemble(&[bottom.as_fd(), top.as_fd()], None, "mosfs:test", 0).unwrap();
        assert_eq!(mount_points(), before);
        assert_eq!(read(&mount, "a").unwrap(), "top");
        assert_eq!(read(&mount, "b").unwrap(), "bottom");
    }

    #[test]
    fn the_string_way_gives_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let bottom = layer(&dir.path().join("0"), &[("a", "bottom"), ("b", "bottom")]);
        let mount = mountapi::in_private_namespace(|folder| {
            mountapi::make_folder(folder, "0")?;
            mountapi::make_folder(folder, "e")?;
            mountapi::attach_at(bottom.as_fd(), folder, "0")?;
            with_string(folder, &["0".into(), "e".into()], None, "mosfs:test", libc::MOUNT_ATTR_RDONLY)
        })
        .unwrap();
        assert_eq!(read(&mount, "b").unwrap(), "bottom");
        let target = dir.path().join("t");
        std::fs::create_dir(&target).unwrap();
        mountapi::attach(mount, &target).unwrap();
        let error = std::fs::write(target.join("new"), "x").unwrap_err();
        mountapi::unmount(&target, false).unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    }

    #[test]
    fn writes_go_to_the_upper_folder_even_with_odd_characters_in_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let bottom = layer(&dir.path().join("0"), &[("a", "bottom")]);
        std::fs::set_permissions(dir.path().join("0"), PermissionsExt::from_mode(0o1751)).unwrap();
        let changed = dir.path().join("up,p:e\\r");
        let top = Upper::Folder { upper: changed.clone(), work: dir.path().join("work") };
        let mount = assemble(&[bottom.as_fd()], Some(&top), "mosfs:test", 0).unwrap();
        let target = dir.path().join("t");
        std::fs::create_dir(&target).unwrap();
        mountapi::attach(mount, &target).unwrap();
        std::fs::write(target.join("a"), "changed").unwrap();
        let mode = std::fs::metadata(&target).unwrap().mode();
        mountapi::unmount(&target, false).unwrap();
        assert_eq!(mode & 0o7777, 0o1751, "the root looks like that of the image");
        assert_eq!(std::fs::read_to_string(changed.join("a")).unwrap(), "changed");
        assert_eq!(std::fs::read_to_string(dir.path().join("0/a")).unwrap(), "bottom");
    }

    #[test]
    fn writes_to_memory_go_with_the_mount() {
        let dir = tempfile::tempdir().unwrap();
        let bottom = layer(&dir.path().join("0"), &[("a", "bottom")]);
        std::fs::set_permissions(dir.path().join("0"), PermissionsExt::from_mode(0o755)).unwrap();
        let target = dir.path().join("t");
        std::fs::create_dir(&target).unwrap();
        let before = mount_points();
        let mount = assemble(&[bottom.as_fd()], Some(&Upper::Memory), "mosfs:test", 0).unwrap();
        mountapi::attach(mount, &target).unwrap();
        let lines = (before.lines().count(), mount_points().lines().count());
        std::fs::write(target.join("a"), "changed").unwrap();
        let (text, mode) =
            (std::fs::read_to_string(target.join("a")), std::fs::metadata(&target).unwrap().mode());
        mountapi::unmount(&target, false).unwrap();
        assert_eq!(text.unwrap(), "changed");
        assert_eq!(mode & 0o7777, 0o755);
        assert_eq!(lines.1, lines.0 + 1);
        assert_eq!(std::fs::read_to_string(dir.path().join("0/a")).unwrap(), "bottom");
    }

    #[test]
    fn a_hundred_layers() {
        let dir = tempfile::tempdir().unwrap();
        let layers: Vec<OwnedFd> = (0..100)
            .map(|i| {
                let name = i.to_string();
                layer(&dir.path().join(&name), &[("last", &name), (&format!("only{i}"), "")])
            })
            .collect();
        let lowers: Vec<_> = layers.iter().map(AsFd::as_fd).collect();
        let mount = assemble(&lowers, None, "mosfs:test", 0).unwrap();
        assert_eq!(read(&mount, "last").unwrap(), "99");
        assert_eq!(read(&mount, "only0").unwrap(), "");
    }
}
