//! The system calls that a container may use.
//!
//! Built from the kernel's own tables of system calls (64-bit and 32-bit x86, arm64; Linux 6.1, and later ones by name):
//! what is not in [`ALLOWED`] does not exist for a container (ENOSYS, so that a C library takes an older call), and what
//! is in [`DENIED`] is forbidden (EPERM) unless the target has the capability that the kernel requires for it.
//!
//! Denied is what changes the machine (modules, mounts, clocks, boot, swap), what makes or enters namespaces, keys,
//! which are not in a namespace, what reads the machine rather than the container, and what has been the way out of
//! containers before: bpf, io_uring, userfaultfd, perf.

use serde_json::{Value, json};

/// The system calls that all containers may use.
#[rustfmt::skip]
const ALLOWED: &[&str] = &[
    "_llseek", "_newselect", "accept", "accept4", "access", "adjtimex", "alarm", "arch_prctl", "bind",
    "brk", "cachestat", "capget", "capset", "chdir", "chmod", "chown", "chown32", "chroot", "clock_getres",
    "clock_getres_time64", "clock_gettime", "clock_gettime64", "clock_nanosleep", "clock_nanosleep_time64",
    "close", "close_range", "connect", "copy_file_range", "creat", "dup", "dup2", "dup3", "epoll_create",
    "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "epoll_wait", "eventfd", "eventfd2",
    "execve", "execveat", "exit", "exit_group", "faccessat", "faccessat2", "fadvise64", "fadvise64_64",
    "fallocate", "fchdir", "fchmod", "fchmodat", "fchmodat2", "fchown", "fchown32", "fchownat", "fcntl",
    "fcntl64", "fdatasync", "fgetxattr", "flistxattr", "flock", "fork", "fremovexattr", "fsetxattr",
    "fstat", "fstat64", "fstatat", "fstatat64", "fstatfs", "fstatfs64", "fsync", "ftruncate",
    "ftruncate64", "futex", "futex_requeue", "futex_time64", "futex_wait", "futex_waitv", "futex_wake",
    "futimesat", "get_robust_list", "get_thread_area", "getcpu", "getcwd", "getdents", "getdents64",
    "getegid", "getegid32", "geteuid", "geteuid32", "getgid", "getgid32", "getgroups", "getgroups32",
    "getitimer", "getpeername", "getpgid", "getpgrp", "getpid", "getppid", "getpriority", "getrandom",
    "getresgid", "getresgid32", "getresuid", "getresuid32", "getrlimit", "getrusage", "getsid",
    "getsockname", "getsockopt", "gettid", "gettimeofday", "getuid", "getuid32", "getxattr", "getxattrat",
    "inotify_add_watch", "inotify_init", "inotify_init1", "inotify_rm_watch", "io_cancel", "io_destroy",
    "io_getevents", "io_pgetevents", "io_pgetevents_time64", "io_setup", "io_submit", "ioctl",
    "ioprio_get", "ioprio_set", "ipc", "kill", "landlock_add_rule", "landlock_create_ruleset",
    "landlock_restrict_self", "lchown", "lchown32", "lgetxattr", "link", "linkat", "listen", "listxattr",
    "listxattrat", "llistxattr", "lremovexattr", "lseek", "lsetxattr", "lstat", "lstat64", "madvise",
    "map_shadow_stack", "membarrier", "memfd_create", "memfd_secret", "mincore", "mkdir", "mkdirat",
    "mknod", "mknodat", "mlock", "mlock2", "mlockall", "mmap", "mmap2", "mprotect", "mq_getsetattr",
    "mq_notify", "mq_open", "mq_timedreceive", "mq_timedreceive_time64", "mq_timedsend",
    "mq_timedsend_time64", "mq_unlink", "mremap", "mseal", "msgctl", "msgget", "msgrcv", "msgsnd", "msync",
    "munlock", "munlockall", "munmap", "nanosleep", "newfstatat", "nice", "oldfstat", "oldlstat",
    "oldstat", "olduname", "open", "openat", "openat2", "pause", "pidfd_getfd", "pidfd_open",
    "pidfd_send_signal", "pipe", "pipe2", "pkey_alloc", "pkey_free", "pkey_mprotect", "poll", "ppoll",
    "ppoll_time64", "prctl", "pread64", "preadv", "preadv2", "prlimit64", "process_madvise",
    "process_mrelease", "process_vm_readv", "process_vm_writev", "pselect6", "pselect6_time64", "ptrace",
    "pwrite64", "pwritev", "pwritev2", "read", "readahead", "readdir", "readlink", "readlinkat", "readv",
    "recvfrom", "recvmmsg", "recvmmsg_time64", "recvmsg", "remap_file_pages", "removexattr",
    "removexattrat", "rename", "renameat", "renameat2", "restart_syscall", "rmdir", "rseq", "rt_sigaction",
    "rt_sigpending", "rt_sigprocmask", "rt_sigqueueinfo", "rt_sigreturn", "rt_sigsuspend",
    "rt_sigtimedwait", "rt_sigtimedwait_time64", "rt_tgsigqueueinfo", "sched_get_priority_max",
    "sched_get_priority_min", "sched_getaffinity", "sched_getattr", "sched_getparam", "sched_getscheduler",
    "sched_rr_get_interval", "sched_rr_get_interval_time64", "sched_setaffinity", "sched_setattr",
    "sched_setparam", "sched_setscheduler", "sched_yield", "seccomp", "select", "semctl", "semget",
    "semop", "semtimedop", "semtimedop_time64", "sendfile", "sendfile64", "sendmmsg", "sendmsg", "sendto",
    "set_robust_list", "set_thread_area", "set_tid_address", "setfsgid", "setfsgid32", "setfsuid",
    "setfsuid32", "setgid", "setgid32", "setgroups", "setgroups32", "setitimer", "setpgid", "setpriority",
    "setregid", "setregid32", "setresgid", "setresgid32", "setresuid", "setresuid32", "setreuid",
    "setreuid32", "setrlimit", "setsid", "setsockopt", "setuid", "setuid32", "setxattr", "setxattrat",
    "sgetmask", "shmat", "shmctl", "shmdt", "shmget", "shutdown", "sigaction", "sigaltstack", "signal",
    "signalfd", "signalfd4", "sigpending", "sigprocmask", "sigreturn", "sigsuspend", "socket",
    "socketcall", "socketpair", "splice", "ssetmask", "stat", "stat64", "statfs", "statfs64", "statx",
    "symlink", "symlinkat", "sync", "sync_file_range", "sync_file_range2", "syncfs", "sysinfo", "tee",
    "tgkill", "time", "timer_create", "timer_delete", "timer_getoverrun", "timer_gettime",
    "timer_gettime64", "timer_settime", "timer_settime64", "timerfd_create", "timerfd_gettime",
    "timerfd_gettime64", "timerfd_settime", "timerfd_settime64", "times", "tkill", "truncate",
    "truncate64", "ugetrlimit", "ulimit", "umask", "uname", "unlink", "unlinkat", "utime", "utimensat",
    "utimensat_time64", "utimes", "vfork", "vmsplice", "wait4", "waitid", "waitpid", "write", "writev",
];

/// System calls that are forbidden, and the capability with which they are allowed.
#[rustfmt::skip]
const DENIED: &[(Option<&str>, &[&str])] = &[
    (Some("SYS_MODULE"), &[
        "create_module", "delete_module", "finit_module", "get_kernel_syms", "init_module", "query_module",
    ]),
    (Some("SYS_ADMIN"), &[
        "fsconfig", "fsmount", "fsopen", "fspick", "mount", "mount_setattr", "move_mount", "open_tree",
        "pivot_root", "umount", "umount2",
    ]),
    (Some("SYS_ADMIN"), &[
        "setns", "unshare",
    ]),
    (Some("SYS_BOOT"), &[
        "kexec_file_load", "kexec_load", "reboot", "swapoff", "swapon",
    ]),
    (Some("SYS_TIME"), &[
        "clock_adjtime", "clock_adjtime64", "clock_settime", "clock_settime64", "settimeofday", "stime",
    ]),
    (Some("SYS_ADMIN"), &[
        "acct", "lookup_dcookie", "nfsservctl", "quotactl", "quotactl_fd", "setdomainname", "sethostname",
        "syslog", "vhangup",
    ]),
    (None, &[
        "add_key", "keyctl", "request_key",
    ]),
    (Some("SYS_ADMIN"), &[
        "bpf", "fanotify_init", "fanotify_mark", "io_uring_enter", "io_uring_register", "io_uring_setup",
        "kcmp", "name_to_handle_at", "open_by_handle_at", "perf_event_open", "userfaultfd",
    ]),
    (Some("SYS_RAWIO"), &[
        "ioperm", "iopl",
    ]),
    (Some("SYS_NICE"), &[
        "get_mempolicy", "mbind", "migrate_pages", "move_pages", "set_mempolicy",
        "set_mempolicy_home_node",
    ]),
];

/// Flags of clone(2) that make namespaces: CLONE_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID and _NEWNET.
/// clone(2) knows no CLONE_NEWTIME: its bit belongs to the exit signal.
const NEW_NAMESPACES: u64 = 0x7e02_0000;

const EPERM: u64 = libc::EPERM as u64;
const ENOSYS: u64 = libc::ENOSYS as u64;

/// Personalities (personality(2)) that change nothing but what `uname` says: Linux, and asking for the present one.
const PERSONALITIES: [u64; 4] = [0x0, 0x0008, 0x2_0000, 0xffff_ffff];

/// Returns the profile of a container with these more capabilities, as `linux.seccomp` of the runtime's configuration.
pub fn profile(capabilities: &[String]) -> Value {
    let has = |name: &str| capabilities.iter().any(|one| one == name);
    let mut allowed: Vec<&str> = ALLOWED.to_vec();
    let mut denied: Vec<&str> = Vec::new();
    for (capability, calls) in DENIED {
        if capability.is_some_and(has) { allowed.extend(*calls) } else { denied.extend(*calls) }
    }
    let errno =
        |names: &[&str], errno: u64| json!({ "names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno });
    let mut rules = vec![json!({ "names": allowed, "action": "SCMP_ACT_ALLOW" })];
    if has("SYS_ADMIN") {
        rules.push(json!({ "names": ["clone", "clone3"], "action": "SCMP_ACT_ALLOW" }));
    } else {
        let none = json!({ "index": 0, "value": NEW_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" });
        rules.push(json!({ "names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [none] }));
        // Its flags are in memory, which a filter cannot read: the C library then takes clone.
        rules.push(errno(&["clone3"], ENOSYS));
    }
    for value in PERSONALITIES {
        let same = json!({ "index": 0, "value": value, "op": "SCMP_CMP_EQ" });
        rules.push(json!({ "names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [same] }));
    }
    rules.push(errno(&denied, EPERM));
    let architectures: &[&str] = match std::env::consts::ARCH {
        "x86_64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "aarch64" => &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        _ => &[],
    };
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": ENOSYS,
        "architectures": architectures,
        "syscalls": rules,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The action for a call without arguments that matter, and its error.
    fn action(profile: &Value, call: &str) -> (String, Option<u64>) {
        let rules = profile["syscalls"].as_array().unwrap();
        let rule =
            rules.iter().find(|rule| rule["names"].as_array().unwrap().iter().any(|name| name == call));
        let default =
            (profile["defaultAction"].as_str().unwrap().to_string(), profile["defaultErrnoRet"].as_u64());
        rule.map_or(default, |rule| (rule["action"].as_str().unwrap().to_string(), rule["errnoRet"].as_u64()))
    }

    #[test]
    fn what_leads_out_of_a_container_is_forbidden_without_its_capability() {
        let plain = profile(&[]);
        let admin = profile(&["SYS_ADMIN".to_string()]);
        let denied = ("SCMP_ACT_ERRNO".to_string(), Some(EPERM));
        let allowed = ("SCMP_ACT_ALLOW".to_string(), None);
        for call in ["mount", "fsopen", "setns", "unshare", "bpf", "io_uring_setup", "open_by_handle_at"] {
            assert_eq!(action(&plain, call), denied, "{call}");
            assert_eq!(action(&admin, call), allowed, "{call}");
        }
        for call in ["kexec_load", "init_module", "keyctl", "clock_settime", "iopl"] {
            assert_eq!(action(&plain, call), denied, "{call}");
            assert_eq!(action(&admin, call), denied, "{call}");
        }
        assert_eq!(action(&profile(&["SYS_TIME".to_string()]), "clock_settime"), allowed);
        for call in ["read", "execve", "openat2", "futex", "socket", "fchmodat2", "rseq"] {
            assert_eq!(action(&plain, call), allowed, "{call}");
        }
        // New and unknown calls do not exist, so that a C library takes another one.
        for call in ["clone3", "a_call_of_the_future", "uselib", "vm86"] {
            assert_eq!(action(&plain, call), ("SCMP_ACT_ERRNO".to_string(), Some(ENOSYS)), "{call}");
        }
    }

    #[test]
    fn clone_makes_no_namespaces() {
        let flags = libc::CLONE_NEWNS
            | libc::CLONE_NEWCGROUP
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUSER
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNET;
        assert_eq!(NEW_NAMESPACES, flags as u32 as u64);
        let plain = profile(&[]);
        let rules = plain["syscalls"].as_array().unwrap();
        let clone = rules.iter().find(|rule| rule["names"] == json!(["clone"])).unwrap();
        assert_eq!(clone["args"][0]["value"], json!(NEW_NAMESPACES));
        assert_eq!(clone["args"][0]["op"], "SCMP_CMP_MASKED_EQ");
    }

    #[test]
    fn no_call_is_in_two_lists() {
        let mut all: Vec<&str> =
            ALLOWED.iter().chain(DENIED.iter().flat_map(|(_, calls)| *calls)).copied().collect();
        all.extend(["clone", "clone3", "personality"]);
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
