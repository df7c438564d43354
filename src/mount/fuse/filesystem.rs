//! The requests of the kernel, answered by the engine.
//!
//! Every request can be answered from its inode number alone, so nothing is opened, released or
//! forgotten. Offsets in a folder are the cookies of the merged view, moved by two for `.` and `..`.
//!
//! Where bytes come from another machine, a request is first tried without waiting. If it needs bytes that are not
//! here, it is done again, with its unused reply, by a thread of the [`Pool`].

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    AccessFlags, Errno, FileAttr, FileHandle, FileType as FuseType, Filesystem, FopenFlags, Generation,
    INodeNo, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};

use super::idle::Opens;
use super::lead::{self, Lead};
use super::limits::{self, TTL};
use super::pool::Pool;
use super::prefill::Siblings;
use super::spin::RequestCounter;
use crate::image::bytes::{may_wait, without_waiting};
use crate::image::layer::{Attr, FileType};
use crate::image::overlay::{Entry, OverlayError, ROOT};
use crate::mount::engine::{Engine, EngineError};
use crate::mount::ids::IdShift;

const GENERATION: Generation = Generation(0);
/// The kernel's offsets of the entries after `.` and after `..`; those of the view follow.
const AFTER_DOT: u64 = 1;
const AFTER_DOTS: u64 = 2;
/// Names of POSIX ACLs.
const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];
/// The label of SELinux.
const SELINUX: &[u8] = b"security.selinux";
/// Namespaces whose names mean nothing to a file system, which stores them all (xattr(7)).
const STORED: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
/// d_ino where it is not known (FUSE_UNKNOWN_INO of libfuse).
const UNKNOWN_INO: u64 = 0xffff_ffff;

/// A merged view as a FUSE file system.
pub(super) struct Tree {
    pub view: Arc<View>,
    pub pulse: Arc<RequestCounter>,
    /// Counts open files, where a timeout needs them.
    pub opens: Option<Arc<Opens>>,
    pub lead: Arc<Lead>,
    /// Threads for requests that wait for another machine; none where all bytes are on this one.
    pub pool: Option<Arc<Pool>>,
    /// Whether the mount may be mounted again with its ids mapped.
    pub maps_ids: bool,
}

impl Tree {
    /// Answers a request. `answer` returns the reply, unused, if it cannot be answered without waiting; it is then
    /// called again where it may wait.
    fn answer<R: Send + 'static>(&self, reply: R, answer: impl Fn(&View, R) -> Option<R> + Send + 'static) {
        self.pulse.beat();
        // It ends after the reply, or once the pool has the request.
        let _turn = self.lead.turn();
        let Some(pool) = &self.pool else {
            // Nothing is missing, so nothing comes back.
            answer(&self.view, reply);
            return;
        };
        if let Some(reply) = without_waiting(|| answer(&self.view, reply)) {
            let view = Arc::clone(&self.view);
            pool.submit(Box::new(move || drop(answer(&view, reply))));
        }
    }

    fn opened(&self, reply: ReplyOpen, flags: FopenFlags) {
        match &self.opens {
            // With NO_OPEN_SUPPORT and NO_OPENDIR_SUPPORT: the kernel opens files by itself from now on.
            None => reply.error(Errno::ENOSYS),
            Some(opens) => {
                self.pulse.beat();
                let _turn = self.lead.turn();
                opens.opened();
                reply.opened(FileHandle(0), flags);
            }
        }
    }

    fn released(&self, reply: ReplyEmpty) {
        if let Some(opens) = &self.opens {
            self.pulse.beat();
            let _turn = self.lead.turn();
            opens.released();
        }
        reply.ok();
    }
}

/// What requests are answered from.
pub(super) struct View {
    pub engine: Arc<Engine>,
    pub siblings: Arc<Siblings>,
    /// Where user and group ids are moved to, if they are.
    pub shift: Option<IdShift>,
    /// Whether files may have POSIX ACLs, once that is known.
    pub acls: OnceLock<bool>,
}

impl View {
    /// The attributes of a file as the kernel gets them.
    fn file_attr(&self, ino: u64, attr: &Attr) -> FileAttr {
        let shown = file_attr(ino, attr);
        match self.shift {
            None => shown,
            Some(shift) => FileAttr { uid: shift.id(shown.uid), gid: shift.id(shown.gid), ..shown },
        }
    }

    /// Whether files may have POSIX ACLs, of either kind. The same at every call: where it was so at the mount, the kernel
    /// checks the ACL of access of each file, and takes every error but "not there" for one of its own reader.
    fn may_have_acls(&self) -> bool {
        let may_have = |name: &&[u8]| self.engine.view().may_have_xattr(name);
        *self.acls.get_or_init(|| ACLS.iter().any(may_have))
    }

    /// Whether a request for that attribute is answered by "not supported", not by "not there".
    ///
    /// `ls -l` requests ACLs and the label of SELinux of each file; after one EOPNOTSUPP it requests none of them on the
    /// same file system. ENOSYS would stop the kernel itself, but for all names: programs that read others, such as
    /// `getcap`, would then report a file system without attributes.
    ///
    /// So it is EOPNOTSUPP for what no file can have in namespaces that Linux itself refuses on a file system that does
    /// not implement them, and for the label of SELinux where no file has one: no SELinux has labelled the image then,
    /// and where SELinux runs, it answers in our place.
    fn is_unsupported(&self, name: &[u8]) -> bool {
        if ACLS.contains(&name) {
            return !self.may_have_acls();
        }
        let is_stored = STORED.iter().any(|prefix| name.starts_with(prefix));
        (!is_stored || name == SELINUX) && !self.engine.view().may_have_xattr(name)
    }

    fn failed(&self, ino: u64, error: &OverlayError) -> EngineError {
        self.engine.failed(ino, error)
    }

    /// Calls `add` with offset, name, inode number and attributes of each entry of a folder from
    /// `offset` on, until it says that the reply is full. `None` for `.`, `..` and what
    /// cannot be read.
    fn list(
        &self,
        ino: u64,
        offset: u64,
        add: &mut dyn FnMut(u64, &[u8], u64, FileType) -> bool,
    ) -> Result<(), EngineError> {
        if offset == 0 && add(AFTER_DOT, b".", ino, FileType::Directory) {
            return Ok(());
        }
        if offset <= AFTER_DOT {
            let parent = self.engine.view().parent(ino).unwrap_or(UNKNOWN_INO);
            if add(AFTER_DOTS, b"..", parent, FileType::Directory) {
                return Ok(());
            }
        }
        let cookie = offset.saturating_sub(AFTER_DOTS);
        let each = &mut |Entry { name, ino, kind, next }: Entry| !add(next + AFTER_DOTS, &name, ino, kind);
        self.engine.view().read_dir(ino, cookie, each).map_err(|error| self.engine.failed(ino, &error))
    }
}

fn errno(error: EngineError) -> Errno {
    match error {
        EngineError::NotFound => Errno::ESTALE,
        EngineError::WrongType => Errno::EINVAL,
        // Who may wait never gets the second one; a reply of a request that was tried without waiting is not used.
        EngineError::Io | EngineError::NotHere => Errno::EIO,
    }
}

/// Refuses a request, or returns its reply where another thread is to answer it.
fn refuse<R>(error: EngineError, reply: R, refuse: impl FnOnce(R, Errno)) -> Option<R> {
    if error == EngineError::NotHere && !may_wait() {
        return Some(reply);
    }
    refuse(reply, errno(error));
    None
}

fn kind(kind: FileType) -> FuseType {
    match kind {
        FileType::Directory => FuseType::Directory,
        FileType::Regular => FuseType::RegularFile,
        FileType::Symlink => FuseType::Symlink,
        FileType::BlockDevice => FuseType::BlockDevice,
        FileType::CharDevice => FuseType::CharDevice,
        FileType::Fifo => FuseType::NamedPipe,
        FileType::Socket => FuseType::Socket,
    }
}

fn time(seconds: i64, nanos: u32) -> SystemTime {
    let nanos = Duration::from_nanos(nanos.into());
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let moved = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    moved.and_then(|time| time.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

fn file_attr(ino: u64, attr: &Attr) -> FileAttr {
    let mtime = time(attr.mtime, attr.mtime_nanos);
    FileAttr {
        ino: INodeNo(ino),
        size: attr.size_bytes,
        blocks: attr.blocks_512,
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: mtime,
        kind: kind(attr.kind),
        perm: attr.permissions,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        // The unit of the page cache. The layer's block would be an honest st_blksize, but the
        // kernel takes it for the block size of its own buffers too.
        blksize: 4096,
        flags: 0,
    }
}

/// Attributes of which only the type is known.
fn bare_attr(ino: u64, file_type: FileType) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: kind(file_type),
        perm: 0,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// Whether a process of root has made a request.
fn is_of_root(request: &Request) -> bool {
    match request.uid() {
        // FUSE_INVALID_UIDGID (linux/fs/fuse/fuse_i.h): where ids may be mapped, the kernel sends none with requests that
        // create nothing. The owner of a process's folder in /proc is its effective user (proc(5)).
        u32::MAX => std::fs::metadata(format!("/proc/{}", request.pid())).is_ok_and(|found| found.uid() == 0),
        user => user == 0,
    }
}

impl Filesystem for Tree {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        limits::negotiate(config, self.view.may_have_acls(), self.maps_ids);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        self.answer(reply, move |view, reply| {
            match view.engine.view().lookup(parent.0, &name) {
                Ok(Some((ino, attr))) => {
                    view.siblings.seen(&view.engine, ino, &attr);
                    reply.entry(&TTL, &view.file_attr(ino, &attr), GENERATION);
                }
                // Inode 0 with a time to live: the kernel remembers that there is no such name.
                Ok(None) => reply.entry(&TTL, &bare_attr(0, FileType::Regular), GENERATION),
                Err(error) => return refuse(view.failed(parent.0, &error), reply, ReplyEntry::error),
            }
            None
        });
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.answer(reply, move |view, reply| {
            match view.engine.attr(ino.0) {
                Ok(attr) => reply.attr(&TTL, &view.file_attr(ino.0, &attr)),
                Err(error) => return refuse(error, reply, ReplyAttr::error),
            }
            None
        });
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        self.answer(reply, move |view, reply| {
            match view.engine.view().read_link(ino.0) {
                Ok(target) => reply.data(&target),
                Err(error) => return refuse(view.failed(ino.0, &error), reply, ReplyData::error),
            }
            None
        });
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.opened(reply, FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.opened(reply, FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.released(reply);
    }

    fn releasedir(&self, _: &Request, _: INodeNo, _: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.released(reply);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.answer(reply, move |view, reply| {
            lead::reading(size);
            let mut reply = Some(reply);
            let done = view.engine.read(ino.0, offset, size, &mut |bytes| {
                if let Some(reply) = reply.take() {
                    reply.data(bytes);
                }
            });
            match (done, reply) {
                (Err(error), Some(reply)) => refuse(error, reply, ReplyData::error),
                _ => None,
            }
        });
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.answer(reply, move |view, mut reply| {
            let mut added = false;
            let done = view.list(ino.0, offset, &mut |next, name, child, file_type| {
                let is_full = reply.add(INodeNo(child), next, kind(file_type), OsStr::from_bytes(name));
                added |= !is_full;
                is_full
            });
            match done {
                Ok(()) => reply.ok(),
                // The kernel asks for the rest from there on.
                Err(EngineError::NotHere) if added => reply.ok(),
                Err(error) => return refuse(error, reply, ReplyDirectory::error),
            }
            None
        });
    }

    fn readdirplus(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, reply: ReplyDirectoryPlus) {
        self.answer(reply, move |view, mut reply| {
            let (mut added, mut is_here) = (false, true);
            let done = view.list(ino.0, offset, &mut |next, name, child, file_type| {
                let (ttl, attr) = if next <= AFTER_DOTS {
                    (TTL, bare_attr(child, file_type))
                } else {
                    match view.engine.attr(child) {
                        Ok(attr) => {
                            view.siblings.seen(&view.engine, child, &attr);
                            (TTL, view.file_attr(child, &attr))
                        }
                        Err(EngineError::NotHere) if !may_wait() => {
                            is_here = false;
                            return true;
                        }
                        // The name is there; a later lookup returns the error. Node 0: the
                        // kernel takes nothing over, so that no made-up size ends up in an inode it knows.
                        Err(_) => (Duration::ZERO, bare_attr(0, file_type)),
                    }
                };
                let is_full =
                    reply.add(INodeNo(child), next, OsStr::from_bytes(name), &ttl, &attr, GENERATION);
                added |= !is_full;
                is_full
            });
            match done {
                // Nothing that could be sent: an empty reply would mean the end of the folder.
                Ok(()) if !is_here && !added => return Some(reply),
                Ok(()) => reply.ok(),
                // The kernel asks for the rest from there on.
                Err(EngineError::NotHere) if added => reply.ok(),
                Err(error) => return refuse(error, reply, ReplyDirectoryPlus::error),
            }
            None
        });
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = name.as_bytes().to_vec();
        self.answer(reply, move |view, reply| {
            if view.is_unsupported(&name) {
                reply.error(Errno::EOPNOTSUPP);
                return None;
            }
            match view.engine.view().xattrs(ino.0) {
                Ok(all) => match all.iter().find(|(key, _)| *key == name) {
                    Some((key, value)) => match view.shift {
                        None => answer_xattr(value, size, reply),
                        Some(shift) => answer_xattr(&shift.xattr(key, value), size, reply),
                    },
                    None => reply.error(Errno::ENODATA),
                },
                Err(error) => return refuse(view.failed(ino.0, &error), reply, ReplyXattr::error),
            }
            None
        });
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let is_root = is_of_root(request);
        self.answer(reply, move |view, reply| {
            match view.engine.view().xattrs(ino.0) {
                Ok(all) => {
                    let mut list = Vec::new();
                    for (name, _) in all {
                        // xattr(7): trusted attributes are invisible to processes without privilege.
                        if is_root || !name.starts_with(b"trusted.") {
                            list.extend_from_slice(&name);
                            list.push(0);
                        }
                    }
                    answer_xattr(&list, size, reply);
                }
                Err(error) => return refuse(view.failed(ino.0, &error), reply, ReplyXattr::error),
            }
            None
        });
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let sizes = self.view.engine.view().stat_fs();
        let unit = sizes.block_bytes.max(4096);
        let blocks = sizes.bytes.div_ceil(u64::from(unit));
        reply.statfs(blocks, 0, 0, sizes.files, 0, unit, 255, unit);
    }

    fn lseek(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        // Values of SEEK_DATA and SEEK_HOLE in linux/fs.h; the kernel answers the others itself.
        let data = match whence {
            3 => true,
            4 => false,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        self.answer(reply, move |view, reply| {
            match view.engine.seek(ino.0, offset, data) {
                Ok(Some(found)) => reply.offset(i64::try_from(found).unwrap_or(i64::MAX)),
                Ok(None) => reply.error(Errno::ENXIO),
                Err(error) => return refuse(error, reply, ReplyLseek::error),
            }
            None
        });
    }
}

fn answer_xattr(value: &[u8], size: u32, reply: ReplyXattr) {
    match (size, u32::try_from(value.len())) {
        (_, Err(_)) => reply.error(Errno::E2BIG),
        (0, Ok(len)) => reply.size(len),
        (size, Ok(len)) if len > size => reply.error(Errno::ERANGE),
        _ => reply.data(value),
    }
}

/// Checks that the root can be served: what mounting promises.
pub(super) fn check_root(engine: &Engine) -> Result<(), EngineError> {
    match engine.attr(ROOT)?.kind {
        FileType::Directory => Ok(()),
        _ => Err(EngineError::WrongType),
    }
}
