//! Points at which a test can simulate a power cut.
//!
//! Each commit point of a change to the disk has a failpoint. Its name is `MODULE.OBJECT.STATE`, lower case:
//! `deploy.folder.renamed`. In a build with the `failpoints` feature or debug assertions,
//! `MOSFS_FAILPOINT=NAME` (or `NAME:N` for the N-th pass, counted from 1) kills the process there with
//! SIGKILL, so that no destructor runs and no buffer is flushed. A release build contains no failpoints.

/// Kills the process here if the environment requests it.
#[inline]
pub fn hit(name: &str) {
    #[cfg(any(feature = "failpoints", debug_assertions))]
    active::hit(name);
    #[cfg(not(any(feature = "failpoints", debug_assertions)))]
    let _ = name;
}

#[cfg(any(feature = "failpoints", debug_assertions))]
mod active {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);

    pub(super) fn hit(name: &str) {
        let wanted = WANTED.get_or_init(|| {
            let text = std::env::var("MOSFS_FAILPOINT").ok()?;
            Some(match text.rsplit_once(':') {
                Some((name, count)) => (name.to_string(), count.parse().ok()?),
                None => (text, 1),
            })
        });
        let Some((wanted, count)) = wanted else { return };
        if wanted == name && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == *count {
            super::super::process::kill_self();
        }
    }
}
