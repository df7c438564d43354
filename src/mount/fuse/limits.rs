//! Chooses all kernel capabilities and limits, each with its reason.
//!
//! Figures: find, tar and cold reads of a Debian root of 606 MB and 24.5k entries on two cores, Linux 6.18,
//! as ratios to a mount of the same image by the kernel's squashfs.

use std::ops::RangeInclusive;
use std::time::Duration;

use fuser::{InitFlags, KernelConfig};

use crate::mount::plan::{LayerBytes, MountPlan};
use crate::sys;

/// How long the kernel may keep names and attributes: nothing in an image ever changes. A year, as
/// `Duration::MAX` would overflow the kernel's jiffies.
pub(super) const TTL: Duration = Duration::from_secs(365 * 24 * 3600);

/// Most bytes of one read request: 32 pages. A read-ahead of 512 KiB is then four requests, which all threads
/// serve in parallel. With 256 pages one thread gets all the work, and the others sleep (0.58 became 0.92).
pub(super) const READ_BYTES: u32 = 128 * 1024;

/// How many read-ahead requests may be in flight. The kernel's 12 and fuser's 16 are too few for four readers
/// of 512 KiB each.
pub(super) const BACKGROUND: u16 = 64;

/// The kernel's read-ahead, in KiB, set on the mount's bdi. This requires root: the FUSE protocol itself can
/// only lower the default of 128 KiB, with which every read waits for one request at a time.
pub(super) const READ_AHEAD_KIB: u32 = 512;

/// Default of `--threads`, by the cores: threads that serve requests. The second one brings the most (0.92 became 0.58);
/// more than four only contend for the connection's single queue in the kernel.
pub const THREADS: RangeInclusive<usize> = 2..=4;

/// Default of `--threads`.
pub(super) fn default_threads() -> usize {
    // Not `available_parallelism`: it first reads four cgroup files, which costs 0.1 ms at start.
    sys::daemon::usable_cores().clamp(*THREADS.start(), *THREADS.end())
}

/// Default of `--cache-mib`: 32 fragments and 16 data blocks of 128 KiB. Two fragments instead of 32 cost 40
/// % on small files; more data blocks bring no benefit, as the kernel keeps the pages. With this default a
/// daemon stays below 16 MiB of anonymous memory.
pub const CACHE_MIB: usize = 6;

/// The same where there are layers of chunks, most of which are 32 to 128 KiB: as fast as 4 and 6 MiB, and so is 2 MiB, which
/// would hold only two chunks of the largest size. The daemon of a Debian root of 13,000 files stays below 12 MB.
pub const CHUNKS_CACHE_MIB: usize = 3;

/// Whether a layer of a mount consists of chunks, as PuzzleFS images do.
pub(super) fn has_chunks(plan: &MountPlan) -> bool {
    plan.layers().iter().any(|layer| matches!(layer.bytes, LayerBytes::Chunks(_)))
}

/// Default of `--cache-mib` for a mount.
pub(super) fn default_cache_mib(plan: &MountPlan) -> usize {
    if has_chunks(plan) { CHUNKS_CACHE_MIB } else { CACHE_MIB }
}

/// The capabilities to request from the kernel, and why.
const WANTED: [(InitFlags, &str); 7] = [
    (InitFlags::FUSE_DO_READDIRPLUS, "attributes with each listing: find needs no other requests"),
    // Deliberately without READDIRPLUS_AUTO: with it the kernel returns to plain readdir when it sees no
    // look-ups, and find became 10 times slower.
    (InitFlags::FUSE_NO_OPEN_SUPPORT, "open without a request, after one ENOSYS"),
    (InitFlags::FUSE_NO_OPENDIR_SUPPORT, "opendir without a request; the kernel then keeps listings"),
    (InitFlags::FUSE_CACHE_SYMLINKS, "each link's target is requested once"),
    (InitFlags::FUSE_PARALLEL_DIROPS, "several look-ups in one folder at once"),
    (InitFlags::FUSE_ASYNC_READ, "read-ahead in several requests at once"),
    (InitFlags::FUSE_EXPLICIT_INVAL_DATA, "pages stay cached when attributes are requested again"),
];

/// Chooses capabilities and limits for a new connection. `acls`: whether files may have POSIX ACLs. `maps_ids`: whether the
/// mount may be mounted again with its ids mapped, which requires `default_permissions`.
pub(super) fn negotiate(config: &mut KernelConfig, acls: bool, maps_ids: bool) {
    if maps_ids {
        // Containers with ids of their own do that (Linux 6.12). Without `default_permissions`, Linux ends the connection.
        let _ = config.add_capabilities(InitFlags::FUSE_ALLOW_IDMAP);
    }
    if acls {
        // The kernel then checks ACLs as on any file system: without it the group's bits of a mode, which hold
        // an ACL's mask, would allow the group more than the ACL does. It costs a request for each file that
        // others than its owner open, so it is left out where no file can have one.
        let _ = config.add_capabilities(InitFlags::FUSE_POSIX_ACL);
    }
    for (flag, _) in WANTED {
        // A kernel that lacks one (Linux 5.2 has them all) is slower but still correct.
        let _ = config.add_capabilities(flag);
    }
    let _ = config.set_max_write(READ_BYTES);
    let _ = config.set_max_background(BACKGROUND);
    let _ = config.set_congestion_threshold(BACKGROUND);
    let _ = config.set_time_granularity(Duration::from_nanos(1));
}

/// Raises the read-ahead of a mount, by its device number. Best effort: without it reads are slower.
pub(super) fn raise_read_ahead((major, minor): (u32, u32)) {
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, READ_AHEAD_KIB.to_string()) {
        log::debug!("cannot write {path}: {error}");
    }
}
