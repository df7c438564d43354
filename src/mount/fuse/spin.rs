//! `--spin`: keeps cores from going to sleep while requests come close together.
//!
//! A request and its answer cross between two cores. A core that sleeps has to be woken for each of them:
//! a few µs on bare metal, and 30 to 100 µs in a virtual machine that gives an idle core back to its
//! host at once, more than the answer itself takes. So, while requests come close together, the kernel
//! is asked for a wake-up latency of zero (`/dev/cpu_dma_latency`,
//! Documentation/power/pm_qos_interface.rst): its idle loop then polls. It ends [`QUIET`] after the last
//! request, so that an idle mount costs nothing.
//!
//! Measured in such a machine, as wall time without it: find 0.58, ls -lR 0.57, small files in open order
//! 0.42, reading everything 0.48; and less CPU time, as no core has to be woken through the host.
//! Threads that spin in place of the idle loop (SCHED_IDLE) were tried for users without privilege, and
//! made small files slower: they are in the way of those that are woken.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::mount::backend::by_name;

/// When cores are kept awake.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Spin {
    /// Where a wake-up is dear and the wish is granted: as root, in a virtual machine whose idle cores go
    /// back to the host.
    #[default]
    Auto,
    /// Wherever the kernel lets this process.
    Always,
    /// Not at all.
    Never,
}

impl Spin {
    /// The names that `--spin` takes.
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

/// How often it is looked at whether requests still come.
const LOOK: Duration = Duration::from_millis(1);
/// Without a request for this long, cores may sleep.
const QUIET: Duration = Duration::from_millis(3);
/// Fewer requests than this in one [`LOOK`] do not count as close together.
const DENSE: u64 = 4;
/// "No wish" to /dev/cpu_dma_latency, in µs (PM_QOS_CPU_LATENCY_DEFAULT_VALUE in linux/pm_qos.h).
const NO_WISH: i32 = 2_000_000_000;

/// Counts requests, and wakes the thread that keeps cores awake when they begin.
#[derive(Default)]
pub(super) struct Pulse {
    beats: AtomicU64,
    asleep: AtomicBool,
    lock: Mutex<bool>,
    wake: Condvar,
}

impl Pulse {
    /// One more request. Costs an atomic increment while requests come close together.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::AcqRel) {
            *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = true;
            self.wake.notify_one();
        }
    }

    /// Waits for the next request.
    fn sleep(&self) {
        let mut woken = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        *woken = false;
        self.asleep.store(true, Ordering::Release);
        while !*woken {
            woken = self.wake.wait(woken).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The kernel's file of the wish; it holds while the file is open.
const LATENCY: &str = "/dev/cpu_dma_latency";
/// The kernel's driver for idle cores.
const IDLE_DRIVER: &str = "/sys/devices/system/cpu/cpuidle/current_driver";

/// The wish to the kernel.
struct Wish(File);

impl Wish {
    /// Opens the file of the wish, if `when` says so. An error only where they are to be kept awake always.
    fn new(when: Spin) -> io::Result<Option<Self>> {
        match when {
            Spin::Never => return Ok(None),
            // The driver of machines whose cores' sleep is the host's business. On bare metal the wish would keep
            // every core of a large machine from saving power, for a few µs a request.
            Spin::Auto if !fs::read(IDLE_DRIVER).is_ok_and(|name| name.starts_with(b"haltpoll")) => {
                return Ok(None);
            }
            Spin::Auto | Spin::Always => {}
        }
        let mut wish = match OpenOptions::new().write(true).open(LATENCY) {
            Ok(file) => Self(file),
            Err(_) if when == Spin::Auto => return Ok(None),
            Err(error) => return Err(error),
        };
        // An open file without a value already wishes for the least latency that there is.
        wish.keep_awake(false)?;
        Ok(Some(wish))
    }

    fn keep_awake(&mut self, awake: bool) -> io::Result<()> {
        let micros: i32 = if awake { 0 } else { NO_WISH };
        self.0.write_all(&micros.to_ne_bytes())
    }
}

/// Keeps cores awake while `pulse` beats; returns only where there is nothing to do.
pub(super) fn run(pulse: &Pulse, when: Spin) {
    let mut wish = match Wish::new(when) {
        Ok(Some(wish)) => wish,
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
                awake = wish.keep_awake(true).is_ok();
            }
            quiet = if dense { Duration::ZERO } else { quiet + LOOK };
        }
        if awake {
            let _ = wish.keep_awake(false);
        }
    }
}
