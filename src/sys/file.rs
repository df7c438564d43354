//! Files and folders: opening what is not trusted, bounded reads, exact modes, sharing of blocks.
//!
//! mosfs reads two kinds of files. Files on SYSTEM, in an OCI layout or in a run folder are **not trusted**:
//! an attacker who can write there may have replaced them with a named pipe, a device, a folder, a link or a
//! file of any length. [`open_regular`] and [`read_regular`] are the only way to read such a file. Files that
//! the administrator names on the command line can be pipes (`--key <(…)`): [`read_named`] only bounds their
//! length.
//!
//! The umask clears mode bits in open(2) and mkdir(2). Where the mode matters, folders are created with
//! [`create_folders`] or [`create_folder`] and files with [`create_file`], which set the bits again.

use std::fs::{self, DirBuilder, File, FileType, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use crate::error::{IoContext, IoError};

/// Whether the last component of an untrusted path may be a symbolic link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// A link is an error. For files that mosfs itself writes: it never makes one.
    Refused,
    /// A link to a regular file is followed. For OCI layouts of other tools, some of which use links as
    /// blobs; the content is still checked against its digest or root hash.
    Followed,
}

/// Opens an untrusted regular file for reading, with its length in bytes. Never blocks.
///
/// # Errors
/// `InvalidData` with what was expected and found if it is something else; a device is not opened.
pub fn open_regular(path: &Path, links: Links) -> Result<(File, u64), IoError> {
    let mut options = OpenOptions::new();
    options.read(true);
    let file = open_checked(path, links, Devices::Refused, &mut options)?;
    let length = file.metadata().on("stat", path)?.len();
    Ok((file, length))
}

/// Opens a file system image that the user names, for reading: a regular file or a block device. Follows
/// links, and never blocks.
///
/// # Errors
/// As [`open_regular`].
pub fn open_image(path: &Path) -> Result<File, IoError> {
    open_checked(path, Links::Followed, Devices::Block, OpenOptions::new().read(true))
}

/// Opens (or creates, mode 0600) an untrusted regular file for writing, to lock it. Follows no link.
///
/// # Errors
/// As [`open_regular`].
pub fn open_lock_file(path: &Path) -> Result<File, IoError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    open_checked(path, Links::Refused, Devices::Refused, &mut options)
}

/// Opens (or makes, mode 0600) an untrusted regular file to read it, write to it and lock it. Follows no link.
///
/// # Errors
/// As [`open_regular`].
pub fn open_to_continue(path: &Path) -> Result<File, IoError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    open_checked(path, Links::Refused, Devices::Refused, &mut options)
}

/// Reads an untrusted regular file of at most `max_bytes`; a longer one is not read.
///
/// # Errors
/// As [`open_regular`]; `FileTooLarge`.
pub fn read_regular(path: &Path, links: Links, max_bytes: u64) -> Result<Vec<u8>, IoError> {
    let (file, length) = open_regular(path, links)?;
    let too_long = || {
        let why = format!("the file is longer than the {max_bytes} bytes that are allowed");
        IoError::new("read", path, io::Error::new(io::ErrorKind::FileTooLarge, why))
    };
    if length > max_bytes {
        return Err(too_long());
    }
    // It may have grown since.
    let bytes = read_at_most(file, path, max_bytes)?;
    if bytes.len() as u64 > max_bytes { Err(too_long()) } else { Ok(bytes) }
}

/// Does what [`read_regular`] does; returns `None` if there is no such file.
///
/// # Errors
/// As [`read_regular`].
pub fn find_regular(path: &Path, links: Links, max_bytes: u64) -> Result<Option<Vec<u8>>, IoError> {
    match read_regular(path, links, max_bytes) {
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

/// Removes a file, if there is one.
///
/// # Errors
/// [`IoError`] if it cannot be removed.
pub fn remove_if_there(path: &Path) -> Result<(), IoError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(IoError::new("remove", path, error)),
        _ => Ok(()),
    }
}

/// Reads a file named by the administrator, up to `max_bytes` plus one byte, so that its parser can refuse it
/// as too long. It may be a pipe.
///
/// # Errors
/// With the path.
pub fn read_named(path: &Path, max_bytes: u64) -> Result<Vec<u8>, IoError> {
    read_at_most(File::open(path).on("open", path)?, path, max_bytes)
}

/// Reads an open file, up to `max_bytes` plus one byte. `path` is for the error.
///
/// # Errors
/// With the path.
pub fn read_at_most(file: impl Read, path: &Path, max_bytes: u64) -> Result<Vec<u8>, IoError> {
    let mut bytes = Vec::new();
    file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes).on("read", path)?;
    Ok(bytes)
}

/// Whether a block device counts as a regular file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Devices {
    Refused,
    /// A block device may hold an image. Opening one has no side effect.
    Block,
}

impl Devices {
    fn allow(self, found: FileType) -> bool {
        found.is_file() || self == Self::Block && found.is_block_device()
    }

    fn refuse(self, path: &Path, found: FileType) -> IoError {
        let expected = match self {
            Self::Refused => "a regular file",
            Self::Block => "a regular file or a block device",
        };
        not_regular(path, expected, found)
    }
}

/// Rule: an untrusted file must be a regular file, or it is not used.
fn open_checked(
    path: &Path,
    links: Links,
    devices: Devices,
    options: &mut OpenOptions,
) -> Result<File, IoError> {
    // Check the type first, because opening a device can have side effects (a watchdog, a tape) and opening a
    // socket fails without a clear reason.
    let found = match links {
        Links::Refused => fs::symlink_metadata(path),
        Links::Followed => fs::metadata(path),
    };
    if let Ok(found) = found
        && !devices.allow(found.file_type())
    {
        return Err(devices.refuse(path, found.file_type()));
    }
    // If it has been replaced since: do not wait for the other end of a pipe, and acquire no controlling
    // terminal.
    let follow = if links == Links::Refused { libc::O_NOFOLLOW } else { 0 };
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC | follow);
    let file = options.open(path).on("open", path)?;
    let found = file.metadata().on("stat", path)?.file_type();
    if devices.allow(found) { Ok(file) } else { Err(devices.refuse(path, found)) }
}

fn not_regular(path: &Path, expected: &str, found: FileType) -> IoError {
    let found = match found {
        found if found.is_dir() => "a folder",
        found if found.is_symlink() => "a symbolic link",
        found if found.is_fifo() => "a named pipe",
        found if found.is_socket() => "a socket",
        found if found.is_block_device() => "a block device",
        found if found.is_char_device() => "a character device",
        _ => "something else",
    };
    let why = format!("expected {expected}, found {found}");
    IoError::new("open", path, io::Error::new(io::ErrorKind::InvalidData, why))
}

/// Creates a folder and its missing parents, each with mode 0755 whatever the umask.
///
/// # Errors
/// With the folder that could not be created.
pub fn create_folders(path: &Path) -> Result<(), IoError> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        create_folders(parent)?;
    }
    match create_folder(path, 0o755) {
        // Another process has just created it.
        Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made,
    }
}

/// Creates one folder with this mode whatever the umask.
///
/// # Errors
/// With the path; `AlreadyExists`.
pub fn create_folder(path: &Path, mode: u32) -> Result<(), IoError> {
    DirBuilder::new().mode(mode).create(path).on("create", path)?;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC);
    // The umask removes the owner's right to read: change the mode by path.
    match options.open(path) {
        Ok(folder) => add_bits(&folder, mode),
        Err(_) => fs::set_permissions(path, Permissions::from_mode(mode)),
    }
    .on("change the mode of", path)
}

/// Creates or truncates a file with this mode whatever the umask. Follows no link.
///
/// # Errors
/// As [`open_regular`].
pub fn create_file(path: &Path, mode: u32) -> Result<File, IoError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(mode);
    let file = open_checked(path, Links::Refused, Devices::Refused, &mut options)?;
    // A file system without modes keeps its own mode.
    let _ = add_bits(&file, mode);
    Ok(file)
}

/// Creates the node of the device that the node at `like` is of, with an owner of its own. Only for root.
///
/// # Errors
/// Those of stat(2), mknod(2) and chown(2); `like` is followed, and must be a device.
pub fn create_device(path: &Path, like: &Path, owner: (u32, u32)) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{FileTypeExt, chown};
    let device = std::fs::metadata(like)?;
    let kind = device.file_type();
    let kind = match (kind.is_char_device(), kind.is_block_device()) {
        (true, _) => libc::S_IFCHR,
        (_, true) => libc::S_IFBLK,
        _ => return Err(io::Error::other("it is no device")),
    };
    let name = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path is NUL-terminated and outlives the call.
    if unsafe { libc::mknod(name.as_ptr(), kind | 0o600, device.rdev()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    chown(path, Some(owner.0), Some(owner.1))?;
    std::fs::set_permissions(path, Permissions::from_mode(0o660))
}

/// Whether a file has an access control list beside its mode (acl(5)), or may have one. `path` is followed.
pub fn may_have_acl(path: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let Ok(name) = std::ffi::CString::new(path.as_os_str().as_bytes()) else { return false };
    let attribute = c"system.posix_acl_access";
    // SAFETY: both names are NUL-terminated and outlive the call; with a size of 0, nothing is written.
    let length = unsafe { libc::getxattr(name.as_ptr(), attribute.as_ptr(), std::ptr::null_mut(), 0) };
    let is_known =
        || matches!(io::Error::last_os_error().raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP));
    length >= 0 || !is_known()
}

/// Restores the bits that the umask cleared, and keeps those that the parent folder added (set-group-ID).
fn add_bits(file: &File, mode: u32) -> io::Result<()> {
    let found = file.metadata()?.mode() & 0o7777;
    if found | mode == found { Ok(()) } else { file.set_permissions(Permissions::from_mode(found | mode)) }
}

/// Makes `to` share all blocks of `from`, copy-on-write (`FICLONE`, ioctl_ficlone(2)).
///
/// # Errors
/// `EOPNOTSUPP`, `EXDEV`, `EINVAL` and others if the file system does not support it: then copy.
pub fn reflink(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: FICLONE takes a file descriptor by value, no pointer; both are open for the call.
    match unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the free space of the file system of `path` for this user, in bytes (statvfs(3), `f_bavail`).
pub fn available_bytes(path: &std::path::Path) -> io::Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut answer = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path is NUL-terminated and outlives the call; statvfs fills `answer` on success.
    let answer = unsafe {
        if libc::statvfs(path.as_ptr(), answer.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        answer.assume_init()
    };
    Ok(answer.f_bavail.saturating_mul(answer.f_frsize))
}

/// Writes everything that the file system of `file` holds in memory to its disk (syncfs(2)).
pub fn sync_file_system(file: &File) -> io::Result<()> {
    // SAFETY: syncfs takes a file descriptor by value, no pointer; it is open for the call.
    match unsafe { libc::syncfs(file.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns where a file has data from `offset` on, in bytes: the first and one past the last byte of the next
/// stretch that is not a hole (lseek(2), SEEK_DATA and SEEK_HOLE). `None` if there is none.
///
/// A file system without holes reports one stretch up to the end of the file. Moves the file's cursor.
///
/// # Errors
/// Those of lseek(2).
pub fn next_data(file: &File, offset: u64) -> io::Result<Option<(u64, u64)>> {
    let seek = |offset: u64, whence| -> io::Result<u64> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: lseek takes no pointer; the descriptor is open for the call.
        let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
        u64::try_from(found).map_err(|_| io::Error::last_os_error())
    };
    let begin = match seek(offset, libc::SEEK_DATA) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        found => found?,
    };
    Ok(Some((begin, seek(begin, libc::SEEK_HOLE)?)))
}

/// Opens a folder, to open files of it with [`open_regular_at`] later.
pub fn open_folder(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC).open(path)
}

/// Does what [`open_regular`] does, for a file of an open folder (openat(2)).
///
/// # Errors
/// As [`open_regular`], without the path.
pub fn open_regular_at(folder: &File, name: &str, links: Links) -> io::Result<File> {
    let name = std::ffi::CString::new(name)?;
    let follow = if links == Links::Refused { libc::O_NOFOLLOW } else { 0 };
    let open = |flags: libc::c_int| -> io::Result<File> {
        // SAFETY: the name is NUL-terminated and outlives the call; the folder is open for it.
        match unsafe { libc::openat(folder.as_raw_fd(), name.as_ptr(), flags | libc::O_CLOEXEC | follow) } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: openat has just returned this descriptor, which nobody else has.
            descriptor => Ok(File::from(unsafe { OwnedFd::from_raw_fd(descriptor) })),
        }
    };
    let check = |file: File| {
        let found = file.metadata()?.file_type();
        if found.is_file() { Ok(file) } else { Err(Devices::Refused.refuse(Path::new(""), found).source) }
    };
    // Looked at first, as in `open_checked`; O_PATH opens nothing.
    check(open(libc::O_PATH)?)?;
    check(open(libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "12345").unwrap();
        fs::create_dir(path("folder")).unwrap();
        symlink("file", path("link")).unwrap();
        symlink("/dev/null", path("device-link")).unwrap();
        let _socket = UnixListener::bind(path("socket")).unwrap();
        assert!(Command::new("mkfifo").arg(path("pipe")).status().unwrap().success());

        for links in [Links::Refused, Links::Followed] {
            assert_eq!(open_regular(&path("file"), links).unwrap().1, 5);
            for (name, what) in [("folder", "a folder"), ("socket", "a socket"), ("pipe", "a named pipe")] {
                let error = open_regular(&path(name), links).unwrap_err();
                let expected =
                    format!("cannot open {}: expected a regular file, found {what}", path(name).display());
                assert_eq!(error.to_string(), expected);
                assert_eq!(open_lock_file(&path(name)).unwrap_err().to_string(), expected);
                assert_eq!(create_file(&path(name), 0o644).unwrap_err().to_string(), expected);
            }
            let error = open_regular(&path("absent"), links).unwrap_err();
            assert_eq!(error.source.kind(), io::ErrorKind::NotFound);
        }
        let error = open_regular(&path("link"), Links::Refused).unwrap_err();
        assert!(error.to_string().ends_with("expected a regular file, found a symbolic link"), "{error}");
        assert_eq!(open_regular(&path("link"), Links::Followed).unwrap().1, 5);
        let error = open_regular(&path("device-link"), Links::Followed).unwrap_err();
        assert!(error.to_string().ends_with("found a character device"), "{error}");
    }

    #[test]
    fn reads_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "12345").unwrap();
        assert_eq!(read_regular(&path, Links::Refused, 5).unwrap(), b"12345");
        let error = read_regular(&path, Links::Refused, 4).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::FileTooLarge);
        // 1 TiB that is never read.
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let error = read_regular(&path, Links::Refused, 1 << 20).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(read_named(&path, 7).unwrap(), [0; 8]);
        assert!(find_regular(&dir.path().join("absent"), Links::Refused, 1).unwrap().is_none());
    }
}
