//! One blob that is here in parts: a read fetches what it needs, and waits for it.
//!
//! ```text
//! read ─ all here ──────────────────────────────> pread of the file
//!      ─ may not wait ──────────────────────────> WouldBlock (the caller has threads for that)
//!      ─ in flight, whoever asked ──────────────> wait for it
//!      ─ missing ─ fetch a window around it ────> write to the file, hand the bytes to all who wait
//!                └ and have the next window fetched, not waited for
//! ```
//!
//! Bytes are unverified here: the reader hashes them against the tree. What it finds wrong it reports
//! ([`ReadAt::distrust`]): the bytes around it are fetched again, from the registry itself rather than a mirror,
//! [`RETRIES`] times; after that the reader gets its error, and a later read may try again.
//!
//! # Locks
//! `flights` and `suspects` are held to look and to note, never while bytes are fetched or written. The order is
//! `flights`, `suspects`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::flight::{Fetched, Flight};
use super::link::{Link, LinkError, Urgency};
use super::part::{BLOCK, Part, Written};
use crate::image::bytes::{ReadAt, may_wait};
use crate::sys::locks::lock;

/// What a reader's miss fetches at least, in bytes, aligned. Together with [`AHEAD_BYTES`] it is about what a link carries
/// in one round trip (100 Mbit/s, 20 ms: 250 KB); a small part that is waited for, and the rest behind it without
/// waiting, is faster than all at once.
const WINDOW_BYTES: u64 = 64 << 10;
/// What is fetched behind a window without waiting, in bytes; as long as reads go on in order, twice as much each
/// time. With less, reads in order wait more often; with more, a program that reads here and there fetches what it
/// never reads.
const AHEAD_BYTES: u64 = 192 << 10;
/// The most that one request asks for, in bytes.
pub(super) const MOST_BYTES: u64 = 1 << 20;
/// What is fetched again around a block that does not verify, in bytes, aligned.
const SUSPECT_BYTES: u64 = 64 << 10;
/// How often it is fetched again before the reader gets an error.
const RETRIES: u32 = 2;
/// After this long it may be fetched again.
const RETRY_AGAIN: Duration = Duration::from_secs(60);
/// A disk that was full is tried again after this.
const FULL_FOR: Duration = Duration::from_secs(60);

const WINDOW: u64 = WINDOW_BYTES / BLOCK;
const MOST: u64 = MOST_BYTES / BLOCK;
const SUSPECT: u64 = SUSPECT_BYTES / BLOCK;

/// A blob that is here in parts.
pub(super) struct LazyBlob {
    part: Part,
    link: Arc<Link>,
    flights: Mutex<Vec<Arc<Window>>>,
    suspects: Mutex<Suspects>,
    /// Where the last window ended, and how much was fetched behind it, in blocks.
    order: Mutex<(u64, u64)>,
    ahead: Box<dyn Fn(Range<u64>) + Send + Sync>,
    full: Mutex<Option<Instant>>,
    /// One process receives the whole blob at a time, from a place that sends no parts.
    whole: Mutex<()>,
}

/// What was found wrong.
#[derive(Default)]
struct Suspects {
    /// Aligned pieces that are to be fetched again, by number.
    open: BTreeSet<u64>,
    /// How often a piece was fetched again, and since when that is counted.
    tried: BTreeMap<u64, (u32, Instant)>,
}

/// Blocks that are being fetched.
struct Window {
    blocks: Range<u64>,
    urgency: Urgency,
    flight: Flight,
}

/// Where bytes are.
enum Found {
    /// In the file.
    Here,
    /// In memory, from this byte of the blob on; the disk may have been full.
    Bytes(u64, Arc<Vec<u8>>),
}

impl LazyBlob {
    /// A blob of `part`, whose missing bytes come through `link`. `ahead` is told of blocks that are likely to be
    /// read next, and must not block.
    pub(super) fn new(part: Part, link: Arc<Link>, ahead: Box<dyn Fn(Range<u64>) + Send + Sync>) -> Self {
        Self {
            part,
            link,
            flights: Mutex::default(),
            suspects: Mutex::default(),
            order: Mutex::default(),
            ahead,
            full: Mutex::default(),
            whole: Mutex::default(),
        }
    }

    /// Its file and map.
    pub(super) fn part(&self) -> &Part {
        &self.part
    }

    /// Forgets that the disk was full. The process that serves the image finds out by itself, and says so in its log,
    /// which the process that mounted it does not write.
    pub(super) fn forget_full(&self) {
        *lock(&self.full) = None;
    }

    /// Whether the disk was full a short time ago.
    pub(super) fn is_full(&self) -> bool {
        lock(&self.full).is_some_and(|since| since.elapsed() < FULL_FOR)
    }

    /// Blocks that verification has found wrong and that were not fetched again yet.
    fn is_suspect(&self, block: u64) -> bool {
        lock(&self.suspects).open.contains(&(block / SUSPECT))
    }

    /// Fetches the first run of these blocks that are not here and not in flight, at most [`MOST_BYTES`]. Returns
    /// the block after it; `None` where there was nothing to fetch. They need not be here then: the disk may be full.
    ///
    /// # Errors
    /// Those of the link.
    pub(super) fn fetch_missing(
        &self,
        blocks: Range<u64>,
        urgency: Urgency,
    ) -> Result<Option<u64>, LinkError> {
        let window = {
            let mut flights = lock(&self.flights);
            let Some(first) = self.first_free(blocks.clone(), &flights) else { return Ok(None) };
            let end = self.run_end(first, blocks.end.min(first + MOST), &flights);
            Window::enter(&mut flights, first..end, urgency)
        };
        self.fly(&window).map(|_| Some(window.blocks.end))
    }

    /// Fetches all runs of these blocks, for nobody who waits. Ends with the first that fails.
    pub(super) fn fetch_likely(&self, blocks: Range<u64>) {
        let mut at = blocks.start;
        while let Ok(Some(end)) = self.fetch_missing(at..blocks.end, Urgency::Background) {
            at = end;
            if self.is_full() {
                return;
            }
        }
    }

    /// The first block of a range that is missing and that nobody fetches.
    fn first_free(&self, blocks: Range<u64>, flights: &[Arc<Window>]) -> Option<u64> {
        let mut from = blocks.start;
        loop {
            let block = self.part.first_missing(from..blocks.end)?;
            match flights.iter().find(|flight| flight.blocks.contains(&block)) {
                Some(flight) => from = flight.blocks.end,
                None => return Some(block),
            }
        }
    }

    /// Where a run of missing blocks that begins at `first` ends, at the latest at `end`.
    fn run_end(&self, first: u64, end: u64, flights: &[Arc<Window>]) -> u64 {
        (first + 1..end).find(|block| self.is_taken(*block, flights)).unwrap_or(end.max(first + 1))
    }

    /// Whether a block is here or on its way.
    fn is_taken(&self, block: u64, flights: &[Arc<Window>]) -> bool {
        self.part.has(block) || flights.iter().any(|window| window.blocks.contains(&block))
    }

    /// Makes a block available to a reader, and as many as possible of those up to `wanted_end` with it.
    fn obtain(&self, block: u64, wanted_end: u64, deadline: Instant) -> io::Result<Found> {
        loop {
            enum Turn {
                Wait(Arc<Window>),
                Fetch(Arc<Window>),
            }
            let turn = {
                let mut flights = lock(&self.flights);
                if self.part.has(block) {
                    return Ok(Found::Here);
                }
                match flights.iter().find(|flight| flight.blocks.contains(&block)) {
                    Some(flight) => Turn::Wait(flight.clone()),
                    None => {
                        let end = (block / WINDOW * WINDOW + WINDOW)
                            .max(wanted_end)
                            .min(self.part.blocks())
                            .min(block + MOST);
                        let begin = block / WINDOW * WINDOW;
                        // Another process may have fetched it.
                        self.part.rescan(begin..end, &|block| self.is_suspect(block))?;
                        if self.part.has(block) {
                            return Ok(Found::Here);
                        }
                        let is_free = |block: &u64| !self.is_taken(*block, &flights);
                        let begin = (begin..block).rev().take_while(is_free).last().unwrap_or(block);
                        let end = self.run_end(block, end, &flights);
                        Turn::Fetch(Window::enter(&mut flights, begin..end, Urgency::Reader))
                    }
                }
            };
            match turn {
                Turn::Fetch(window) => {
                    let bytes = self.fly(&window).map_err(io::Error::other)?;
                    self.look_ahead(&window.blocks);
                    return Ok(Found::Bytes(window.blocks.start * BLOCK, bytes));
                }
                Turn::Wait(window) => match window.flight.wait(deadline) {
                    Some(Ok(bytes)) => return Ok(Found::Bytes(window.blocks.start * BLOCK, bytes)),
                    // The background gives up at once; a reader does not.
                    Some(Err(_)) if window.urgency == Urgency::Background => {}
                    Some(Err(error)) => return Err(io::Error::other(error)),
                    None => {
                        let why = format!("it did not come within {} s", self.link.patience().as_secs());
                        return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                    }
                },
            }
        }
    }

    /// Has what follows a window fetched, which most programs read next.
    fn look_ahead(&self, blocks: &Range<u64>) {
        let next = {
            let mut order = lock(&self.order);
            let (end, ahead) = *order;
            let first = AHEAD_BYTES / BLOCK;
            // In order: at the end of what was fetched ahead, or within it.
            let in_order = ahead > 0 && blocks.start >= end && blocks.start <= end + ahead;
            let ahead = if in_order { (ahead * 2).min(MOST) } else { first };
            *order = (blocks.end, ahead);
            blocks.end..(blocks.end + ahead).min(self.part.blocks())
        };
        if !next.is_empty() {
            (self.ahead)(next);
        }
    }

    /// Fetches the blocks of a window, writes them, and wakes all who wait for them.
    fn fly(&self, window: &Arc<Window>) -> Fetched {
        let fetch = || self.fetch(&window.blocks, window.urgency);
        window.flight.fly(fetch, || lock(&self.flights).retain(|one| !Arc::ptr_eq(one, window)))
    }

    fn fetch(&self, blocks: &Range<u64>, urgency: Urgency) -> Fetched {
        let range = self.part.bytes_of(blocks);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let pieces = blocks.start / SUSPECT..blocks.end.div_ceil(SUSPECT);
        let distrusted = lock(&self.suspects).open.range(pieces.clone()).next().is_some();
        let fetched = match self.link.has_no_ranges() {
            true => Err(LinkError::NoRanges(String::new())),
            false => self.link.fetch(self.part.blob(), range.start, &mut bytes, urgency, distrusted),
        };
        match fetched {
            Err(LinkError::NoRanges(_)) => {
                self.fetch_whole(blocks, distrusted)?;
                self.part
                    .read(&mut bytes, range.start)
                    .map_err(|error| LinkError::Failed(error.to_string()))?;
            }
            Err(error) => return Err(error),
            Ok(()) => self.keep(&bytes, range.start),
        }
        lock(&self.suspects).open.retain(|piece| !pieces.contains(piece));
        Ok(Arc::new(bytes))
    }

    /// Writes fetched bytes to the file. Where the disk is full, they serve those who wait and no one else.
    fn keep(&self, bytes: &[u8], offset: u64) {
        if self.is_full() {
            return;
        }
        if let Err(error) = self.part.write(bytes, offset) {
            let mut full = lock(&self.full);
            if full.is_none_or(|since| since.elapsed() >= 10 * FULL_FOR) {
                log::error!(
                    "{} cannot be kept: {error}; it is fetched again for each read until there is room in {}",
                    self.part.blob().digest,
                    self.part.folder().display()
                );
            }
            *full = Some(Instant::now());
        }
    }

    /// Receives all of the blob, in order, unless another thread has brought these blocks meanwhile.
    fn fetch_whole(&self, blocks: &Range<u64>, distrusted: bool) -> Result<(), LinkError> {
        let _alone = lock(&self.whole);
        if !distrusted && self.part.first_missing(blocks.clone()).is_none() {
            return Ok(());
        }
        let failed = |error: String| LinkError::Failed(error);
        let blob = self.part.blob();
        log::info!("fetching all {} bytes of {}", blob.size, blob.digest);
        let mut stream = self.link.from().open(blob, 0).map_err(|error| {
            self.link.failed(&error, Urgency::Reader);
            failed(error.to_string())
        })?;
        let mut buffer = vec![0; MOST_BYTES as usize];
        let mut at = 0;
        while at < blob.size {
            let most = (blob.size - at).min(MOST_BYTES) as usize;
            let piece = buffer.get_mut(..most).unwrap_or_default();
            stream.read_exact(piece).map_err(|error| failed(error.to_string()))?;
            match self.part.write(piece, at).map_err(|error| failed(error.to_string()))? {
                Written::Kept => {}
                Written::Complete => break,
            }
            at += most as u64;
        }
        self.link.succeeded();
        Ok(())
    }

    /// Fetches a block again that was found wrong, whatever was tried before.
    ///
    /// # Errors
    /// Those of the link.
    pub(super) fn fetch_again(&self, block: u64) -> Result<(), LinkError> {
        let piece = block / SUSPECT;
        lock(&self.suspects).open.insert(piece);
        let blocks = piece * SUSPECT..((piece + 1) * SUSPECT).min(self.part.blocks());
        self.part.unmark(blocks.clone());
        self.fetch_missing(blocks, Urgency::Reader).map(|_| ())
    }
}

impl ReadAt for LazyBlob {
    fn len(&self) -> io::Result<u64> {
        Ok(self.part.blob().size)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.part.is_complete() {
            return self.part.read(buffer, offset);
        }
        let end = offset.saturating_add(buffer.len() as u64);
        if end > self.part.blob().size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let blocks = offset / BLOCK..end.div_ceil(BLOCK);
        if self.part.first_missing(blocks.clone()).is_none() {
            return self.part.read(buffer, offset);
        }
        if !may_wait() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let _waiting = self.link.wait();
        let deadline = Instant::now() + self.link.patience() * 2;
        let mut at = offset;
        while at < end {
            let block = at / BLOCK;
            let stop = match self.part.first_missing(block..blocks.end) {
                None => end,
                Some(missing) => (missing * BLOCK).min(end),
            };
            if stop > at {
                let piece = buffer.get_mut((at - offset) as usize..(stop - offset) as usize);
                self.part.read(piece.unwrap_or_default(), at)?;
                at = stop;
                continue;
            }
            if let Found::Bytes(first, bytes) = self.obtain(block, blocks.end, deadline)? {
                // From memory: they need not have been kept.
                let stop = (first + bytes.len() as u64).min(end);
                let (to, from) = ((at - offset) as usize, (at - first) as usize);
                let count = (stop - at) as usize;
                if let (Some(to), Some(from)) =
                    (buffer.get_mut(to..to + count), bytes.get(from..from + count))
                {
                    to.copy_from_slice(from);
                }
                at = stop;
            }
        }
        Ok(())
    }

    fn distrust(&self, offset: u64, len: u64) -> bool {
        // A blob of the store is what it is: its content had the right digest.
        if self.part.is_complete() {
            return false;
        }
        let pieces = offset / SUSPECT_BYTES..offset.saturating_add(len).div_ceil(SUSPECT_BYTES);
        let mut again = false;
        let mut suspects = lock(&self.suspects);
        for piece in pieces {
            let tried = suspects.tried.entry(piece).or_insert((0, Instant::now()));
            if tried.1.elapsed() >= RETRY_AGAIN {
                *tried = (0, Instant::now());
            }
            if tried.0 >= RETRIES {
                continue;
            }
            tried.0 += 1;
            again = true;
            suspects.open.insert(piece);
            self.part.unmark(piece * SUSPECT..((piece + 1) * SUSPECT).min(self.part.blocks()));
        }
        if again {
            log::warn!(
                "{}: the bytes at {offset} do not verify; fetching them again from {}",
                self.part.blob().digest,
                self.link.from().location()
            );
        }
        again
    }
}

impl Window {
    /// Adds blocks to those that are being fetched.
    fn enter(flights: &mut Vec<Arc<Window>>, blocks: Range<u64>, urgency: Urgency) -> Arc<Self> {
        let window = Arc::new(Self { blocks, urgency, flight: Flight::default() });
        flights.push(Arc::clone(&window));
        window
    }
}
