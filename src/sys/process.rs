//! Processes: who we are, and signals to oneself.

/// Ends this process at once, as a power cut would: no destructor, no flush.
pub fn kill_self() -> ! {
    // SAFETY: getpid and kill take no pointers; SIGKILL to oneself does not return.
    unsafe {
        libc::kill(libc::getpid(), libc::SIGKILL);
    }
    std::process::abort()
}

/// The user id of this process.
pub fn user_id() -> u32 {
    // SAFETY: getuid takes nothing and cannot fail.
    unsafe { libc::getuid() }
}
