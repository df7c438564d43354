//! The mount API with file descriptors: fsopen(2), fsconfig(2), fsmount(2), move_mount(2),
//! open_tree(2), mount_setattr(2), and the older mount(2) and umount2(2).
//!
//! A mount created here is a detached mount, held by a file descriptor. Dropping it undoes the mount. Minimum
//! kernel 5.12 (mount_setattr); docs/kernel-features.md lists the fallbacks.
//!
//! An error prints the whole call and what the kernel wrote to the context's log, because `Invalid argument`
//! alone is not informative.

use std::ffi::{CStr, CString};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A call of the mount API that failed.
#[derive(Debug)]
pub struct CallError {
    /// The call: name and arguments.
    pub call: String,
    /// The kernel's error.
    pub source: io::Error,
    /// What the kernel wrote to the log of the file system context, line by line.
    pub log: Vec<String>,
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.call, self.source)?;
        for line in &self.log {
            write!(f, "; {line}")?;
        }
        Ok(())
    }
}

/// The error number's kind stays, and so does all that is said.
impl From<CallError> for io::Error {
    fn from(error: CallError) -> Self {
        Self::new(error.source.kind(), error)
    }
}

impl std::error::Error for CallError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

impl CallError {
    pub(super) fn last(call: String) -> Self {
        Self { call, source: io::Error::last_os_error(), log: Vec::new() }
    }

    fn interior_nul(call: String) -> Self {
        Self { call, source: io::Error::new(io::ErrorKind::InvalidInput, "a NUL byte"), log: Vec::new() }
    }

    /// The error number, 0 if there is none.
    pub fn errno(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(0)
    }

    /// Whether the kernel lacks the call or the option, so that an older method may be tried.
    pub fn is_unsupported(&self) -> bool {
        matches!(self.errno(), libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP)
    }
}

fn c_string(text: &[u8], call: &dyn Fn() -> String) -> Result<CString, CallError> {
    CString::new(text).map_err(|_| CallError::interior_nul(call()))
}

/// Converts the return value of a system call to a new file descriptor.
fn new_fd(result: libc::c_long, call: &dyn Fn() -> String) -> Result<OwnedFd, CallError> {
    match i32::try_from(result) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: the kernel has just created this descriptor, so nothing else owns it.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        }
        _ => Err(CallError::last(call())),
    }
}

/// A file system that is being configured, as returned by fsopen(2).
#[derive(Debug)]
pub struct FsContext {
    fd: OwnedFd,
    file_system: String,
}

impl FsContext {
    /// fsopen(2) of a file system type such as `squashfs`. Linux 5.2.
    pub fn open(file_system: &str) -> Result<Self, CallError> {
        let call = || format!("fsopen(\"{file_system}\", FSOPEN_CLOEXEC)");
        let name = c_string(file_system.as_bytes(), &call)?;
        // SAFETY: the pointer is to a NUL-terminated string that outlives the call.
        let result = unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), libc::FSOPEN_CLOEXEC) };
        Ok(Self { fd: new_fd(result, &call)?, file_system: file_system.to_string() })
    }

    /// Sets an option to a string. The kernel takes at most 255 bytes.
    pub fn set_string(&self, key: &str, value: &[u8]) -> Result<(), CallError> {
        let call =
            || self.call("FSCONFIG_SET_STRING", key, &format!("\"{}\"", String::from_utf8_lossy(value)));
        let key_c = c_string(key.as_bytes(), &call)?;
        let value_c = c_string(value, &call)?;
        self.config(libc::FSCONFIG_SET_STRING, Some(&key_c), Some(&value_c), &call)
    }

    /// Returns whether this file system checks each option when it is set.
    ///
    /// One with the old parser (overlayfs before Linux 6.5) accepts anything until the file system is
    /// created, and then reports errors in the kernel's log.
    pub fn checks_options(&self) -> bool {
        self.set_string("mosfs-asks-for-an-unknown-option", b"1").is_err()
    }

    /// Sets an option that has no value.
    pub fn set_flag(&self, key: &str) -> Result<(), CallError> {
        let call = || self.call("FSCONFIG_SET_FLAG", key, "NULL");
        let key_c = c_string(key.as_bytes(), &call)?;
        self.config(libc::FSCONFIG_SET_FLAG, Some(&key_c), None, &call)
    }

    /// Creates the file system and a detached mount of it, with `MOUNT_ATTR_*` bits.
    pub fn mount(self, attributes: u64) -> Result<OwnedFd, CallError> {
        self.config(libc::FSCONFIG_CMD_CREATE, None, None, &|| self.call("FSCONFIG_CMD_CREATE", "", "NULL"))?;
        let call = || format!("fsmount(fsopen(\"{}\"), FSMOUNT_CLOEXEC, {attributes:#x})", self.file_system);
        // SAFETY: fsmount takes no pointers; the descriptor is open as long as `self` is.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.fd.as_raw_fd(),
                libc::FSMOUNT_CLOEXEC,
                attributes as libc::c_uint,
            )
        };
        new_fd(result, &call).map_err(|error| self.with_log(error))
    }

    fn config(
        &self,
        command: libc::fsconfig_command,
        key: Option<&CStr>,
        value: Option<&CStr>,
        call: &dyn Fn() -> String,
    ) -> Result<(), CallError> {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: both pointers are null or to NUL-terminated strings that outlive the call, as each of the
        // three commands used here requires.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.fd.as_raw_fd(),
                command,
                pointer(key),
                pointer(value),
                0 as libc::c_int,
            )
        };
        if result == 0 { Ok(()) } else { Err(self.with_log(CallError::last(call()))) }
    }

    fn call(&self, command: &str, key: &str, value: &str) -> String {
        format!("fsconfig(fsopen(\"{}\"), {command}, \"{key}\", {value})", self.file_system)
    }

    /// Adds the kernel's messages, which reads of the context return one at a time.
    fn with_log(&self, mut error: CallError) -> CallError {
        let mut buffer = [0u8; 512];
        // The kernel keeps at most 8 messages (struct fc_log); the bound is ours.
        for _ in 0..16 {
            // SAFETY: the buffer is ours and has the given length.
            let count = unsafe { libc::read(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
            let Ok(count @ 1..) = usize::try_from(count) else { break };
            let text = String::from_utf8_lossy(&buffer[..count]);
            // `e `, `w ` and `i ` are the severities (fsopen(2)).
            let line = text.trim_end().trim_start_matches(['e', 'w', 'i']).trim_start();
            error.log.push(line.to_string());
        }
        error
    }
}

/// A folder to mount at, held open: what is mounted there goes to this folder, whatever its path leads to meanwhile.
#[derive(Debug)]
pub struct MountPoint {
    fd: OwnedFd,
    path: PathBuf,
}

impl MountPoint {
    /// Opens a folder without asking its file system for anything but its name.
    ///
    /// # Errors
    /// What open(2) returns; `ENOTDIR` for what is no folder; `ESTALE` where the path leads elsewhere meanwhile.
    pub fn open(target: &Path) -> io::Result<Self> {
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        let name = CString::new(target.as_os_str().as_bytes())?;
        // SAFETY: the pointer is to a NUL-terminated string that outlives the call.
        let fd = unsafe { libc::open(name.as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us, so nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let path = target.canonicalize()?;
        if crate::sys::fuse::identity(fd.as_fd())? != crate::sys::fuse::identity_of(&path)? {
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        Ok(Self { fd, path })
    }

    /// Its path, absolute and without links, as the kernel lists it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Attaches a mount that is attached nowhere, on top of what is there. Linux 5.2.
    ///
    /// It takes the descriptor, because a mount that is held by one cannot be unmounted.
    pub fn attach(&self, mount: OwnedFd) -> Result<(), CallError> {
        let (from, to) = (mount.as_raw_fd(), self.fd.as_raw_fd());
        let call = || format!("move_mount({from}, \"\", {to} ({}), \"\")", self.path.display());
        let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(mount.as_fd(), to, c"", flags, &call)
    }
}

impl AsFd for MountPoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<MountPoint> for OwnedFd {
    fn from(point: MountPoint) -> Self {
        point.fd
    }
}

/// Attaches a mount that is attached nowhere to a path. Linux 5.2.
///
/// It consumes the descriptor, because a mount that is held by one cannot be unmounted.
pub fn attach(mount: OwnedFd, target: &Path) -> Result<(), CallError> {
    let call = || format!("open(\"{}\", O_PATH|O_DIRECTORY)", target.display());
    let point =
        MountPoint::open(target).map_err(|source| CallError { call: call(), source, log: Vec::new() })?;
    point.attach(mount)
}

/// Attaches a mount to `name` in the folder `dir`.
pub fn attach_at(mount: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &str) -> Result<(), CallError> {
    let call = || format!("move_mount({}, \"\", {}, \"{name}\")", mount.as_raw_fd(), dir.as_raw_fd());
    let path = c_string(name.as_bytes(), &call)?;
    move_mount(mount, dir.as_raw_fd(), &path, libc::MOVE_MOUNT_F_EMPTY_PATH, &call)
}

fn move_mount(
    mount: BorrowedFd<'_>,
    dir: libc::c_int,
    path: &CStr,
    flags: libc::c_uint,
    call: &dyn Fn() -> String,
) -> Result<(), CallError> {
    // SAFETY: both pointers are to NUL-terminated strings that outlive the call.
    let result = unsafe {
        libc::syscall(libc::SYS_move_mount, mount.as_raw_fd(), c"".as_ptr(), dir, path.as_ptr(), flags)
    };
    if result == 0 { Ok(()) } else { Err(CallError::last(call())) }
}

/// Returns a detached private copy of the mount at `path`, without mounts below it. Linux 5.2.
pub fn clone_mount(path: &Path) -> Result<OwnedFd, CallError> {
    copy_mounts(path, 0)
}

/// Returns a detached private copy of the mount at `path` and of all mounts below it. Linux 5.2.
pub fn clone_tree(path: &Path) -> Result<OwnedFd, CallError> {
    copy_mounts(path, libc::AT_RECURSIVE as libc::c_uint)
}

fn copy_mounts(path: &Path, flags: libc::c_uint) -> Result<OwnedFd, CallError> {
    let call = || {
        format!("open_tree(AT_FDCWD, \"{}\", OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC|{flags:#x})", path.display())
    };
    let path_c = c_string(path.as_os_str().as_bytes(), &call)?;
    // SAFETY: the pointer is to a NUL-terminated string that outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            path_c.as_ptr(),
            libc::OPEN_TREE_CLONE | libc::O_CLOEXEC as libc::c_uint | flags,
        )
    };
    new_fd(result, &call)
}

/// mount_setattr(2) on a mount that is held by descriptor. Linux 5.12.
pub fn set_attributes(mount: BorrowedFd<'_>, set: u64, clear: u64) -> Result<(), CallError> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: clear, propagation: 0, userns_fd: 0 };
    mount_setattr(mount, &attributes, || format!("set {set:#x}, clear {clear:#x}"))
}

/// Maps the ids of a mount that is attached nowhere, as the user namespace does (mount_setattr(2), ID-mapped mounts):
/// the file system's id N shows as the namespace's id N. Linux 5.12, and the file system must allow it.
pub fn map_ids(mount: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> Result<(), CallError> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: user_namespace.as_raw_fd() as u64,
    };
    mount_setattr(mount, &attributes, || "MOUNT_ATTR_IDMAP".into())
}

/// mount_setattr(2); `what` says for an error what was to be set.
fn mount_setattr(
    mount: BorrowedFd<'_>,
    attributes: &libc::mount_attr,
    what: impl FnOnce() -> String,
) -> Result<(), CallError> {
    // SAFETY: the path is a NUL-terminated string, the struct is borrowed for the call and has the given size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            attributes as *const libc::mount_attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(CallError::last(format!("mount_setattr({}, {})", mount.as_raw_fd(), what())))
    }
}

/// The old mount(2), for file systems whose options do not fit the new API on old kernels.
///
/// The kernel takes at most 4095 bytes of options.
pub fn mount_legacy(
    source: &str,
    target: &Path,
    file_system: &str,
    flags: libc::c_ulong,
    options: &str,
) -> Result<(), CallError> {
    let call = || {
        format!("mount(\"{source}\", \"{}\", \"{file_system}\", {flags:#x}, \"{options}\")", target.display())
    };
    if options.len() > 4095 {
        let source = io::Error::from_raw_os_error(libc::E2BIG);
        return Err(CallError { call: call(), source, log: Vec::new() });
    }
    let source_c = c_string(source.as_bytes(), &call)?;
    let target_c = c_string(target.as_os_str().as_bytes(), &call)?;
    let type_c = c_string(file_system.as_bytes(), &call)?;
    let options_c = c_string(options.as_bytes(), &call)?;
    // SAFETY: all four pointers are to NUL-terminated strings that outlive the call.
    let result = unsafe {
        libc::mount(source_c.as_ptr(), target_c.as_ptr(), type_c.as_ptr(), flags, options_c.as_ptr().cast())
    };
    if result == 0 { Ok(()) } else { Err(CallError::last(call())) }
}

/// umount2(2) of the topmost mount at `target`, which must not be a symbolic link. With `detach` a busy mount is
/// detached now and ends with its last user (MNT_DETACH).
pub fn unmount(target: &Path, detach: bool) -> Result<(), CallError> {
    let flags = libc::UMOUNT_NOFOLLOW | if detach { libc::MNT_DETACH } else { 0 };
    let call = || format!("umount2(\"{}\", {flags:#x})", target.display());
    let path = c_string(target.as_os_str().as_bytes(), &call)?;
    // SAFETY: the pointer is to a NUL-terminated string that outlives the call.
    let result = unsafe { libc::umount2(path.as_ptr(), flags) };
    if result == 0 { Ok(()) } else { Err(CallError::last(call())) }
}

/// Runs `work` in a thread with its own mount namespace and working folder.
///
/// `work` receives an empty tmpfs that no other thread sees; it is also the thread's working folder, so names
/// in it can be passed to the kernel as short relative paths. Absolute paths work as before. Mounts that
/// `work` attaches there end with the thread; mounts that it returns as descriptors persist. If the process
/// is killed, the kernel frees everything.
///
/// This is needed because overlayfs accepts no lower folder on a detached mount before Linux 6.15
/// (`clone_private_mount` requires a mount of the caller's own namespace).
pub fn in_private_namespace<T: Send, E: Send + From<CallError>>(
    work: impl FnOnce(BorrowedFd<'_>) -> Result<T, E> + Send,
) -> Result<T, E> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let folder = enter_private_namespace()?;
            work(folder.as_fd())
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Moves the calling thread to its own mount namespace, with an empty tmpfs as its working folder.
fn enter_private_namespace() -> Result<OwnedFd, CallError> {
    // SAFETY: unshare takes no pointers. CLONE_FS makes the working folder and root this
    // thread's own, so that the other threads of the process keep theirs.
    if unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) } != 0 {
        return Err(CallError::last("unshare(CLONE_FS|CLONE_NEWNS)".into()));
    }
    end_exchange(libc::MS_PRIVATE)?;
    let context = FsContext::open("tmpfs")?;
    context.set_string("size", b"1m")?;
    context.set_string("mode", b"0700")?;
    let folder = context.mount(0)?;
    move_mount(folder.as_fd(), libc::AT_FDCWD, c"/", libc::MOVE_MOUNT_F_EMPTY_PATH, &|| {
        "move_mount(tmpfs, \"\", AT_FDCWD, \"/\")".into()
    })?;
    // SAFETY: fchdir takes no pointers; the descriptor is open.
    if unsafe { libc::fchdir(folder.as_raw_fd()) } != 0 {
        return Err(CallError::last("fchdir(tmpfs)".into()));
    }
    Ok(folder)
}

/// Ends the exchange of mounts between the calling thread's own mount namespace and all others. With `MS_PRIVATE` in both
/// directions; with `MS_SLAVE`, what is unmounted or mounted elsewhere still is here.
///
/// The kernel changes the propagation of a mount point only. In a chroot whose root folder is not one, `/` is
/// refused, and no path below it leads to the mount that contains it. There the thread goes to the root of its
/// namespace, which is always a mount point, and comes back.
pub(super) fn end_exchange(kind: libc::c_ulong) -> Result<(), CallError> {
    match set_propagation(kind) {
        Err(error) if error.errno() == libc::EINVAL => {}
        result => return result,
    }
    // After unshare(2), so that it is the folder on this namespace's copy of the mount.
    let root = open_folder(c"/")?;
    let path = c"/proc/thread-self/ns/mnt";
    // SAFETY: the path is a NUL-terminated constant.
    let namespace = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if namespace < 0 {
        return Err(CallError::last(format!("open({path:?}, O_RDONLY)")));
    }
    // SAFETY: open(2) has just returned this descriptor, and nothing else owns it.
    let namespace = unsafe { OwnedFd::from_raw_fd(namespace) };
    // setns(2): joining a mount namespace, even one's own, moves root and working folder to its root.
    // SAFETY: setns takes no pointers; the descriptor is open.
    if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) } != 0 {
        return Err(CallError::last("setns(/proc/thread-self/ns/mnt, CLONE_NEWNS)".into()));
    }
    let made = set_propagation(kind);
    // SAFETY: fchdir takes no pointers; the descriptor is open.
    if unsafe { libc::fchdir(root.as_raw_fd()) } != 0 {
        return Err(CallError::last("fchdir(\"/\")".into()));
    }
    // SAFETY: the path is a NUL-terminated constant.
    if unsafe { libc::chroot(c".".as_ptr()) } != 0 {
        return Err(CallError::last("chroot(\".\")".into()));
    }
    made
}

/// Sets the propagation of the mount at `/` and of all below it (mount_namespaces(7)).
fn set_propagation(kind: libc::c_ulong) -> Result<(), CallError> {
    // SAFETY: constant NUL-terminated strings; source, type and data may be null for a change of
    // propagation (mount(2)).
    let result = unsafe {
        libc::mount(std::ptr::null(), c"/".as_ptr(), std::ptr::null(), libc::MS_REC | kind, std::ptr::null())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(CallError::last(format!("mount(NULL, \"/\", NULL, MS_REC|{kind:#x}, NULL)")))
    }
}

/// Opens a folder as a place only (O_PATH).
fn open_folder(path: &CStr) -> Result<OwnedFd, CallError> {
    // SAFETY: the pointer is to a NUL-terminated string.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(CallError::last(format!("open({path:?}, O_PATH|O_DIRECTORY)")));
    }
    // SAFETY: open(2) has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether a folder has an entry of this name; links are not followed. Anything but a plain yes is no.
pub fn has_entry(dir: BorrowedFd<'_>, name: &str) -> bool {
    let Ok(name) = CString::new(name) else { return false };
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the name is NUL-terminated and outlives the call; `stat` has room for the answer.
    unsafe {
        libc::fstatat(dir.as_raw_fd(), name.as_ptr(), stat.as_mut_ptr(), libc::AT_SYMLINK_NOFOLLOW) == 0
    }
}

/// mkdirat(2) with mode 0700, for the folders of a private namespace.
pub fn make_folder(dir: BorrowedFd<'_>, name: &str) -> Result<(), CallError> {
    let call = || format!("mkdirat({}, \"{name}\", 0700)", dir.as_raw_fd());
    let name_c = c_string(name.as_bytes(), &call)?;
    // SAFETY: the pointer is to a NUL-terminated string that outlives the call.
    let result = unsafe { libc::mkdirat(dir.as_raw_fd(), name_c.as_ptr(), 0o700) };
    if result == 0 { Ok(()) } else { Err(CallError::last(call())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_prints_the_whole_call() {
        let error = FsContext::open("no-such-fs").unwrap_err();
        assert_eq!(error.errno(), libc::ENODEV);
        assert!(error.to_string().starts_with("fsopen(\"no-such-fs\", FSOPEN_CLOEXEC): "), "{error}");
    }

    #[test]
    fn a_nul_byte_is_an_error_and_not_a_shorter_string() {
        let error = FsContext::open("tmp\0fs").unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn options_beyond_a_page_are_refused_before_the_kernel_cuts_them() {
        let error = mount_legacy("x", Path::new("/nowhere"), "overlay", 0, &"a".repeat(4096)).unwrap_err();
        assert_eq!(error.errno(), libc::E2BIG);
    }

    #[test]
    fn mount_attr_has_the_size_that_the_kernel_knows() {
        // MOUNT_ATTR_SIZE_VER0 in <linux/mount.h>.
        assert_eq!(size_of::<libc::mount_attr>(), 32);
    }
}
