//! One thread at a time reads requests, and polls before it sleeps, where cores may not be kept awake.
//!
//! A thread that sleeps in read(2) must be woken for each request, and while it sleeps its core does too ([`super::spin`]
//! says what that costs). Several threads that sleep there are woken in turn, which moves every request to a core that
//! sleeps. So one thread has the lead: it alone reads, and after each reply it polls the connection for up to
//! [`WINDOW`] before it lets itself sleep. The others, the followers, wait in user space. fuser's loop stays as it is: all
//! of this happens at the end of an operation, after its reply and before fuser reads again.
//!
//! ```text
//!          read(2) ─> operation ─┬─ short ─────────────> reply ─> poll ─> read(2) …        keeps the lead
//!                                └─ long: hand it on ──> reply ─> wait for the lead ─> poll ─> read(2) …
//! ```
//!
//! An operation is long if it decodes for other readers too: a read of [`LONG_READ_BYTES`], which is read-ahead, or any
//! decoding while requests of several readers come at once. Then the lead goes to a follower first, so that decoding
//! stays parallel.
//!
//! The leader polls only while requests come close together, which it learns from the gaps between them: a request a
//! millisecond does not keep a core busy. It polls nothing with one core, where it would keep the reader from running.
//!
//! Where other programs need the cores, nothing of this pays: no core sleeps, and what the leader polls is taken from
//! the share that it needs to answer (measured beside 14 busy processes on two cores: 1.8 to 3 times the wall time). So,
//! while more threads are runnable than there are cores, without those of the mount that decode, every thread reads by
//! itself.
//!
//! A thread that ends (the mount is gone) or panics while it has the lead hands it on, so that every thread finds out.
//!
//! Requests that wait for another machine wait in threads of their own ([`super::pool`]), never in the leader.
//!
//! # Locks
//! One mutex, a leaf, for who has the lead; polling happens outside of it. Another, for when to look at the load, is
//! taken before it.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use crate::sys;
use crate::sys::daemon::Load;
use crate::sys::locks;

/// How long the leader polls before it sleeps. 20 to 200 µs are alike where the client works on the next core; a client
/// that opens files or prints names needs the longer ones.
const WINDOW: Duration = Duration::from_micros(150);
/// Requests less than this apart are close together: a window, and the time to wake both sides.
const CLOSE: Duration = Duration::from_micros(400);
/// So many requests close together, and the leader polls; a quarter is lost for each window without one.
const MOST_CREDIT: u8 = 16;
/// Below this many, it does not poll.
const POLLS_FROM: u8 = 4;
/// So many requests that were there already when the last was answered make a crowd; one is lost for each that was not.
const MOST_CROWD: u8 = 8;
/// A crowd from here on.
const CROWD_FROM: u8 = 3;
/// How often it is looked whether the cores are needed, while threads take turns, and while they do not.
const LOOK: Duration = Duration::from_millis(5);
const LOOK_AGAIN: Duration = Duration::from_millis(25);
/// Two looks at the connection that are this far apart have something else between them: the core is needed.
const PREEMPTED: Duration = Duration::from_micros(100);
/// Reads from this size on are long, in bytes.
const LONG_READ_BYTES: u32 = 64 << 10;

/// Who reads requests. Shared by all threads that serve a mount.
#[derive(Default)]
pub(super) struct Lead {
    /// Whether threads take turns; until then each of them reads by itself.
    on: AtomicBool,
    /// A descriptor of the connection, to poll.
    connection: OnceLock<OwnedFd>,
    /// Threads of this mount that answer or store something now.
    working: AtomicUsize,
    /// Says how many threads are runnable; not there without /proc.
    load: OnceLock<Load>,
    /// When to look at it next.
    next_look: Mutex<Option<Instant>>,
    turns: Mutex<Turns>,
    granted: Condvar,
}

#[derive(Default)]
struct Turns {
    /// Whether a thread has the lead.
    is_held: bool,
    /// Followers that wait for it.
    waiting: usize,
    /// Whether the lead was handed to a follower that has not woken yet.
    is_granted: bool,
    /// Whether every thread reads by itself, since the cores are needed.
    is_open: bool,
}

/// What a serving thread knows of itself.
struct Server {
    lead: Arc<Lead>,
    leads: bool,
    /// How close together requests come.
    credit: u8,
    /// How often several of them wait.
    crowd: u8,
    /// When the last operation ended.
    last: Option<Instant>,
}

thread_local! {
    static SERVER: RefCell<Option<Server>> = const { RefCell::new(None) };
}

/// Work of a thread that serves no requests itself; it lasts until this is dropped.
pub(super) struct Work<'a>(&'a AtomicUsize);

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An operation that is being served. When it is dropped, after the reply, the thread takes its next turn.
pub(super) struct Turn(());

impl Lead {
    /// Has threads take turns from now on. `connection` is a descriptor of the connection that they serve.
    ///
    /// Nothing changes where this process may use one core only.
    pub(super) fn begin(&self, connection: OwnedFd) {
        if sys::daemon::usable_cores() > 1 && self.connection.set(connection).is_ok() {
            if let Ok(load) = Load::open() {
                // Set here alone.
                let _ = self.load.set(load);
            }
            self.on.store(true, Ordering::Release);
        }
    }

    /// An operation begins in this thread.
    pub(super) fn turn(self: &Arc<Self>) -> Option<Turn> {
        if !self.on.load(Ordering::Acquire) {
            return None;
        }
        SERVER.with_borrow_mut(|server| {
            let server = server.get_or_insert_with(|| Server {
                lead: Arc::clone(self),
                leads: false,
                credit: 0,
                crowd: 0,
                last: None,
            });
            server.arrived(Instant::now());
        });
        self.working.fetch_add(1, Ordering::Relaxed);
        Some(Turn(()))
    }

    /// Work begins that no request waits for.
    pub(super) fn work(&self) -> Work<'_> {
        self.working.fetch_add(1, Ordering::Relaxed);
        Work(&self.working)
    }

    fn lock(&self) -> MutexGuard<'_, Turns> {
        locks::lock(&self.turns)
    }

    /// Takes the lead, waiting for it if another thread has it. False where every thread reads by itself.
    fn take(&self) -> bool {
        let mut turns = self.lock();
        if turns.is_open {
            return false;
        }
        if !turns.is_held {
            turns.is_held = true;
            return true;
        }
        turns.waiting += 1;
        while !turns.is_granted && !turns.is_open {
            turns = locks::wait(&self.granted, turns);
        }
        turns.waiting -= 1;
        std::mem::take(&mut turns.is_granted)
    }

    /// Has every thread read by itself, or take turns again.
    fn set_open(&self, is_open: bool) {
        self.lock().is_open = is_open;
        if is_open {
            self.granted.notify_all();
        }
    }

    /// Looks, from time to time, whether the cores are needed. Returns whether every thread is to read by itself.
    fn look(&self, now: Instant) -> bool {
        let was_open = self.lock().is_open;
        let Ok(mut next) = self.next_look.try_lock() else { return was_open };
        if next.is_some_and(|next| now < next) {
            return was_open;
        }
        // The thread that asks is one of those that are runnable, and is not among those that work.
        let ours = self.working.load(Ordering::Relaxed);
        let most = sys::daemon::usable_cores().saturating_add(ours);
        let is_open = self.load.get().and_then(Load::runnable).is_some_and(|count| count > most);
        *next = Some(now + if is_open { LOOK_AGAIN } else { LOOK });
        if is_open != was_open {
            self.set_open(is_open);
        }
        is_open
    }

    /// The cores are needed: looks again later.
    fn give_way(&self) {
        *locks::lock(&self.next_look) = Some(Instant::now() + LOOK_AGAIN);
        self.set_open(true);
    }

    /// Hands the lead to a follower, or leaves it for the next thread that is done.
    fn hand_on(&self) {
        let mut turns = self.lock();
        // One that was handed it and has not woken yet is no candidate: the lead is not ours then.
        if turns.waiting > 0 {
            turns.is_granted = true;
            drop(turns);
            self.granted.notify_one();
        } else {
            turns.is_held = false;
        }
    }

    fn has_request(&self) -> bool {
        self.connection.get().is_none_or(|fd| sys::fuse::is_readable(fd.as_fd()))
    }
}

/// Work that takes long begins in this thread, on behalf of the request that it serves: decoding a block.
pub(super) fn decoding() {
    SERVER.with_borrow_mut(|server| {
        if let Some(server) = server
            && server.crowd >= CROWD_FROM
        {
            server.hand_on();
        }
    });
}

/// A read of `bytes` begins in this thread.
pub(super) fn reading(bytes: u32) {
    if bytes >= LONG_READ_BYTES {
        SERVER.with_borrow_mut(|server| {
            if let Some(server) = server {
                server.hand_on();
            }
        });
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // The lead is taken with nothing borrowed: a thread that panics has no turn to take.
        let lead = SERVER.with_borrow(|server| {
            let server = server.as_ref()?;
            server.lead.working.fetch_sub(1, Ordering::Relaxed);
            (!server.leads).then(|| Arc::clone(&server.lead))
        });
        if std::thread::panicking() {
            return;
        }
        let leads = lead.is_none_or(|lead| lead.take());
        SERVER.with_borrow_mut(|server| {
            if let Some(server) = server {
                server.leads = leads;
                if server.lead.look(Instant::now()) {
                    server.hand_on();
                } else if leads {
                    server.poll();
                }
                server.last = Some(Instant::now());
            }
        });
    }
}

impl Server {
    fn hand_on(&mut self) {
        if std::mem::take(&mut self.leads) {
            self.lead.hand_on();
        }
    }

    /// Learns from the gap before a request for which it slept.
    fn arrived(&mut self, now: Instant) {
        let gap = self.last.take().map(|last| now.duration_since(last));
        if gap.is_some_and(|gap| gap < CLOSE) {
            self.credit = (self.credit + 1).min(MOST_CREDIT);
        } else {
            self.credit -= self.credit.div_ceil(4);
        }
    }

    /// Waits for the next request for a while, if requests come close together.
    fn poll(&mut self) {
        if self.lead.has_request() {
            self.crowd = (self.crowd + 1).min(MOST_CROWD);
            return;
        }
        self.crowd = self.crowd.saturating_sub(1);
        if self.credit < POLLS_FROM {
            return;
        }
        let begin = Instant::now();
        let mut last = begin;
        while !self.lead.has_request() {
            let now = Instant::now();
            if now - last > PREEMPTED {
                self.lead.give_way();
                return self.hand_on();
            }
            if now - begin > WINDOW {
                return;
            }
            last = now;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.hand_on();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::mpsc::channel;

    use super::*;

    /// A connection with nothing to read, and its writing end.
    fn lead() -> (Arc<Lead>, std::io::PipeWriter) {
        let (reader, writer) = std::io::pipe().unwrap();
        let lead = Arc::new(Lead::default());
        lead.connection.set(reader.into()).unwrap();
        lead.on.store(true, Ordering::Release);
        (lead, writer)
    }

    fn server(lead: &Arc<Lead>) -> Server {
        Server { lead: Arc::clone(lead), leads: false, credit: 0, crowd: 0, last: None }
    }

    #[test]
    fn one_thread_leads_at_a_time_and_every_one_gets_its_turn() {
        let (lead, mut writer) = lead();
        // There is always a request, so that nobody polls.
        writer.write_all(b"x").unwrap();
        let (leaders, rounds) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..500 {
                        let turn = lead.turn();
                        if round % 3 == 0 {
                            reading(LONG_READ_BYTES);
                        }
                        drop(turn);
                        assert_eq!(leaders.fetch_add(1, Ordering::SeqCst), 0, "two leaders");
                        rounds.fetch_add(1, Ordering::SeqCst);
                        leaders.fetch_sub(1, Ordering::SeqCst);
                        // What follows is a read(2) that the next thread may do: this one ends its lead.
                        SERVER.with_borrow_mut(|server| server.as_mut().unwrap().hand_on());
                    }
                });
            }
        });
        assert_eq!(rounds.load(Ordering::SeqCst), 2000);
        let turns = lead.lock();
        assert_eq!((turns.is_held, turns.waiting, turns.is_granted), (false, 0, false));
    }

    #[test]
    fn while_the_cores_are_needed_every_thread_reads_by_itself() {
        let (lead, _writer) = lead();
        std::thread::scope(|scope| {
            // One has the lead, and others wait for it.
            assert!(lead.take());
            let followers: Vec<_> = (0..3).map(|_| scope.spawn(|| lead.take())).collect();
            while lead.lock().waiting < 3 {
                std::thread::yield_now();
            }
            lead.give_way();
            for follower in followers {
                assert!(!follower.join().unwrap(), "nobody leads");
            }
            assert!(!lead.take());
            lead.hand_on();
        });
        lead.set_open(false);
        assert!(lead.take());
        assert!(Load::open().unwrap().runnable().unwrap() > 0, "this thread is");
    }

    #[test]
    fn a_thread_that_ends_with_the_lead_hands_it_on() {
        let (lead, _writer) = lead();
        let (sender, receiver) = channel();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                drop(lead.turn());
                sender.send(()).unwrap();
                // A follower waits before this thread ends.
                while lead.lock().waiting == 0 {
                    std::thread::yield_now();
                }
            });
            receiver.recv().unwrap();
            let second = scope.spawn(|| drop(lead.turn()));
            first.join().unwrap();
            second.join().unwrap();
        });
        assert!(!lead.lock().is_held);
    }

    #[test]
    fn polls_only_while_requests_come_close_together() {
        let (lead, mut writer) = lead();
        let mut server = server(&lead);
        let begin = Instant::now();
        let mut at = begin;
        for _ in 0..POLLS_FROM {
            assert!(server.credit < POLLS_FROM);
            server.last = Some(at);
            at += CLOSE / 2;
            server.arrived(at);
        }
        assert!(server.credit >= POLLS_FROM);
        // A request a millisecond: after a few it sleeps.
        for _ in 0..8 {
            server.last = Some(at);
            at += Duration::from_millis(1);
            server.arrived(at);
        }
        assert!(server.credit < POLLS_FROM, "{}", server.credit);

        // Requests that are there already make a crowd, and decoding then hands the lead on.
        writer.write_all(b"x").unwrap();
        for _ in 0..CROWD_FROM {
            server.poll();
        }
        assert!(server.crowd >= CROWD_FROM);
    }

    #[test]
    fn without_a_connection_nothing_changes() {
        let lead = Arc::new(Lead::default());
        assert!(lead.turn().is_none());
        decoding();
        reading(u32::MAX);
        assert!(!lead.lock().is_held);
    }
}
