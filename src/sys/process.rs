//! Processes: signals to oneself, and where one's own program is.

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Ends this process at once, as a power cut would: no destructor, no flush. For failpoints alone.
#[cfg(any(feature = "failpoints", debug_assertions))]
pub fn kill_self() -> ! {
    // SAFETY: getpid and kill take no pointers; SIGKILL to oneself does not return.
    unsafe {
        libc::kill(libc::getpid(), libc::SIGKILL);
    }
    std::process::abort()
}

/// The file of this program; without /proc, as it was named when it was started.
pub fn own_program() -> Option<PathBuf> {
    std::env::current_exe().ok().or_else(|| {
        // SAFETY: getauxval(3) takes no pointer; it returns 0 for what it does not know.
        let name = unsafe { libc::getauxval(libc::AT_EXECFN) } as *const libc::c_char;
        // SAFETY: where it is not null, the kernel has put a NUL-terminated string there, which stays.
        let name = (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) })?;
        Some(OsStr::from_bytes(name.to_bytes()).into())
    })
}
