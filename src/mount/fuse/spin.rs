//! `--spin`: keeps cores from going to sleep while requests come close together.
//!
//! A request and its answer cross between two cores. On a virtual machine an idle core is given back
//! to the host at once, and waking it up costs 30 to 100 µs, more than the answer itself. So, while
//! requests come close together, idle cores are kept awake:
//! - as root, by a wish to the kernel for a wake-up latency of zero (`/dev/cpu_dma_latency`,
//!   Documentation/power/pm_qos_interface.rst): the idle loop then polls, and costs nobody anything;
//! - where that cannot be had, by one thread a core that runs only when nothing else wants to
//!   (SCHED_IDLE).
//!
//! It ends [`QUIET`] after the last request, so that an idle mount costs nothing.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

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

/// What keeps cores awake.
enum Keeper {
    /// The wish, as an open file: it holds while the file is open.
    Latency(File),
    /// Threads that spin while this is true.
    Threads(Arc<Spinners>),
}

struct Spinners {
    on: AtomicBool,
    lock: Mutex<()>,
    start: Condvar,
}

impl Keeper {
    fn new() -> Self {
        if let Ok(mut file) = OpenOptions::new().write(true).open("/dev/cpu_dma_latency")
            && file.write_all(&NO_WISH.to_ne_bytes()).is_ok()
        {
            return Self::Latency(file);
        }
        let shared = Arc::new(Spinners { on: false.into(), lock: Mutex::default(), start: Condvar::new() });
        // One core is busy with whoever asks; all others can be kept awake.
        let cores = crate::sys::daemon::usable_cores();
        for _ in 0..cores.min(4) {
            let shared = shared.clone();
            let spin = move || {
                if crate::sys::daemon::run_only_when_idle().is_err() {
                    return;
                }
                loop {
                    while shared.on.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                    let held = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
                    let idle = |_: &mut ()| !shared.on.load(Ordering::Relaxed);
                    drop(shared.start.wait_while(held, idle));
                }
            };
            if std::thread::Builder::new().name("spin".into()).stack_size(64 << 10).spawn(spin).is_err() {
                break;
            }
        }
        Self::Threads(shared)
    }

    fn keep_awake(&mut self, awake: bool) {
        match self {
            Self::Latency(file) => {
                let wish: i32 = if awake { 0 } else { NO_WISH };
                let _ = file.write_all(&wish.to_ne_bytes());
            }
            Self::Threads(shared) => {
                let held = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
                shared.on.store(awake, Ordering::Relaxed);
                shared.start.notify_all();
                drop(held);
            }
        }
    }
}

/// Keeps cores awake while `pulse` beats; never returns.
pub(super) fn run(pulse: &Pulse) -> ! {
    let mut keeper = Keeper::new();
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
                keeper.keep_awake(true);
                awake = true;
            }
            quiet = if dense { Duration::ZERO } else { quiet + LOOK };
        }
        if awake {
            keeper.keep_awake(false);
        }
    }
}
