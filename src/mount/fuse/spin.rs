//! `--spin`: keeps cores from going to sleep while requests come close together.
//!
//! A request and its reply cross between two cores. A sleeping core must be woken for each of them: a few µs
//! on bare metal, and 30 to 100 µs in a virtual machine that returns an idle core to its host at once, more
//! than serving the request takes. So, while requests come close together, mosfs requests a wake-up latency
//! of zero from the kernel (`/dev/cpu_dma_latency`, Documentation/power/pm_qos_interface.rst): its idle loop
//! then polls. This ends [`QUIET`] after the last request, so an idle mount costs nothing.
//!
//! Measured in such a machine, as a ratio to the wall time without it: find 0.58, ls -lR 0.57, small files in
//! open order 0.42, reading everything 0.48; CPU time decreases too, as no core has to be woken through the
//! host. Where cores may not be kept awake, the thread that reads requests polls ([`super::lead`]). Threads that spin instead of the idle loop (SCHED_IDLE) were tried for unprivileged users, and made
//! small files slower: they delay the threads that are woken.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, OnceLock};
use std::time::Duration;

use super::started::OnDemand;
use crate::mount::backend::by_name;
use crate::sys::locks;

/// When cores are kept awake.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Spin {
    /// Where a wake-up is expensive and the request is permitted: as root, in a virtual machine whose idle
    /// cores return to the host.
    #[default]
    Auto,
    /// Wherever the kernel permits it.
    Always,
    /// Never.
    Never,
}

impl Spin {
    /// The values that `--spin` accepts.
    pub const NAMES: [(&'static str, Spin); 3] =
        [("auto", Spin::Auto), ("always", Spin::Always), ("never", Spin::Never)];

    /// Its name for `--spin`.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, spin)| *spin == self).map_or("", |(name, _)| name)
    }
}

impl FromStr for Spin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        by_name(&Self::NAMES, text, "is no time to spin")
    }
}

/// How often the thread checks whether requests still arrive.
const LOOK: Duration = Duration::from_millis(1);
/// Without a request for this long, cores may sleep.
const QUIET: Duration = Duration::from_millis(3);
/// Fewer requests than this in one [`LOOK`] do not count as close together.
const DENSE: u64 = 4;
/// The request with which the thread starts: a mount with fewer is not in use.
const FIRST: u64 = 16;
/// "No latency request" for /dev/cpu_dma_latency, in µs (PM_QOS_CPU_LATENCY_DEFAULT_VALUE in linux/pm_qos.h).
const NO_LATENCY_REQUEST: i32 = 2_000_000_000;

/// Counts requests, and wakes the thread that keeps cores awake when requests begin to arrive.
#[derive(Default)]
pub(super) struct RequestCounter {
    beats: AtomicU64,
    asleep: AtomicBool,
    lock: Mutex<bool>,
    wake: Condvar,
    thread: OnceLock<OnDemand>,
}

impl RequestCounter {
    /// How many requests there were.
    pub(super) fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }

    /// Starts `thread` with request number [`FIRST`].
    pub(super) fn on_first(&self, thread: OnDemand) {
        // Nobody sets it twice.
        let _ = self.thread.set(thread);
    }

    /// Counts one request. Costs an atomic increment while requests come close together.
    pub(super) fn beat(&self) {
        if self.beats.fetch_add(1, Ordering::Relaxed) == FIRST - 1
            && let Some(thread) = self.thread.get()
        {
            thread.start();
        }
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::AcqRel) {
            *locks::lock(&self.lock) = true;
            self.wake.notify_one();
        }
    }

    /// Waits for the next request.
    fn sleep(&self) {
        let mut woken = locks::lock(&self.lock);
        *woken = false;
        self.asleep.store(true, Ordering::Release);
        while !*woken {
            woken = locks::wait(&self.wake, woken);
        }
    }
}

/// The PM QoS file. The latency request lasts as long as the file stays open.
const LATENCY: &str = "/dev/cpu_dma_latency";
/// The kernel's driver for idle cores.
const IDLE_DRIVER: &str = "/sys/devices/system/cpu/cpuidle/current_driver";

/// The latency request.
struct LatencyRequest(File);

impl LatencyRequest {
    /// Opens the PM QoS file if `when` requires it. Returns an error only if cores must always be kept awake.
    fn new(when: Spin) -> io::Result<Option<Self>> {
        match when {
            Spin::Never => return Ok(None),
            // The driver of virtual machines whose host controls how cores sleep. On bare metal the latency
            // request would keep every core of a large machine from saving power, to gain a few µs per
            // request.
            Spin::Auto if !fs::read(IDLE_DRIVER).is_ok_and(|name| name.starts_with(b"haltpoll")) => {
                return Ok(None);
            }
            Spin::Auto | Spin::Always => {}
        }
        let mut request = match OpenOptions::new().write(true).open(LATENCY) {
            Ok(file) => Self(file),
            Err(_) if when == Spin::Auto => return Ok(None),
            Err(error) => return Err(error),
        };
        // Opening the file without writing a value already requests the lowest latency.
        request.keep_awake(false)?;
        Ok(Some(request))
    }

    fn keep_awake(&mut self, awake: bool) -> io::Result<()> {
        let micros: i32 = if awake { 0 } else { NO_LATENCY_REQUEST };
        self.0.write_all(&micros.to_ne_bytes())
    }
}

/// Keeps cores awake while `pulse` beats; returns only if that may not be.
pub(super) fn run(pulse: &RequestCounter, when: Spin) {
    let mut request = match LatencyRequest::new(when) {
        Ok(Some(request)) => request,
        Ok(None) => return,
        Err(error) => return log::warn!("--spin has no effect: cannot use {LATENCY}: {error}"),
    };
    loop {
        pulse.sleep();
        let mut before = pulse.beats.load(Ordering::Relaxed);
        let mut awake = false;
        let mut quiet = Duration::ZERO;
        while quiet < QUIET {
            std::thread::sleep(LOOK);
            let now = pulse.beats.load(Ordering::Relaxed);
            let dense = now.wrapping_sub(before) >= DENSE;
            before = now;
            if dense && !awake {
                awake = request.keep_awake(true).is_ok();
            }
            quiet = if dense { Duration::ZERO } else { quiet + LOOK };
        }
        if awake {
            let _ = request.keep_awake(false);
        }
    }
}
