//! What is fetched while nobody waits for it: what is likely to be read next, what a list names, then all the rest.
//!
//! Readers come first. While one waits, and for [`QUIET`] after, no part of the rest is begun, and a part is short
//! enough ([`PART_BYTES`]) not to be in the way for long. A link that is broken is left alone for as long as
//! [`Link::closed_for`](super::link::Link::closed_for) says; the next part that is tried then is what finds out
//! that it works again. On a nearly full disk ([`LEAVE_BYTES`]) the rest is not fetched.
//!
//! The process that holds a blob's `.fill` lock fetches its rest. Each blob that is whole is made a blob of the
//! store; when all are, the threads end.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use super::link::Urgency;
use super::part::{BLOCK, Completed};
use super::{Lazy, Shared};
use crate::digest::Digest;
use crate::image::source::ReadError;
use crate::image::verified::VerifiedSource;
use crate::image::verity::Geometry;
use crate::progress::Progress;
use crate::sys::file;
use crate::sys::locks::{self, lock};

/// How long no reader must have waited before a part of the rest is fetched. A program that starts computes for a tenth
/// of a second between two reads.
const QUIET: Duration = Duration::from_millis(250);
/// A part of the rest, in bytes.
const PART_BYTES: u64 = 512 << 10;
/// How many threads fetch parts of the rest at a time.
const FILLERS: usize = 2;
/// Threads in all: a list is fetched over as many connections.
const THREADS: usize = 8;
/// How many windows ahead of readers are remembered; older ones are no longer likely.
const MOST_AHEAD: usize = 16;
/// The rest is not fetched where less would be left on the disk, in bytes.
const LEAVE_BYTES: u64 = 64 << 20;
/// The pause after something failed, or while there is nothing to do but to look again.
const PAUSE: Duration = Duration::from_secs(1);
/// How often a blob that is whole and has another digest is mended.
const MENDS: u32 = 3;
/// The stack of a thread, in bytes.
const STACK: usize = 256 << 10;

type Job = (usize, Range<u64>);

/// What there is to fetch.
pub(super) struct Fill {
    fill: bool,
    queue: Mutex<Queue>,
    news: Condvar,
    fillers: AtomicUsize,
}

#[derive(Default)]
struct Queue {
    ahead: VecDeque<Job>,
    list: VecDeque<Job>,
    /// Blobs that are whole and do not have their digest, whatever was fetched again.
    differ: BTreeSet<Digest>,
    ended: bool,
}

impl Fill {
    /// Nothing to fetch yet; `fill`: all of the image.
    pub(super) fn new(fill: bool) -> Self {
        Self { fill, queue: Mutex::default(), news: Condvar::new(), fillers: AtomicUsize::new(0) }
    }

    /// Has blocks of a blob fetched soon. Does not block.
    pub(super) fn ahead(&self, blob: usize, blocks: Range<u64>) {
        let mut queue = lock(&self.queue);
        if queue.ahead.len() >= MOST_AHEAD {
            queue.ahead.pop_front();
        }
        queue.ahead.push_back((blob, blocks));
        drop(queue);
        self.news.notify_one();
    }

    /// Sets what a list names.
    pub(super) fn list(&self, jobs: impl Iterator<Item = Job>) {
        lock(&self.queue).list = jobs.collect();
    }

    /// Takes what a list names first, about `bytes` of it.
    pub(super) fn take_list(&self, bytes: u64) -> Vec<Job> {
        let mut queue = lock(&self.queue);
        let mut left = bytes;
        let mut taken = Vec::new();
        while let Some((number, blocks)) = queue.list.pop_front() {
            left = left.saturating_sub((blocks.end - blocks.start) * BLOCK);
            taken.push((number, blocks));
            if left == 0 {
                break;
            }
        }
        taken
    }

    /// Whether a blob is whole and does not have its digest.
    pub(super) fn differs(&self, digest: &Digest) -> bool {
        lock(&self.queue).differ.contains(digest)
    }
}

/// What a thread does next.
enum Next {
    /// Something that a reader or a list makes likely.
    Likely(Job),
    /// A part of the rest.
    Rest,
    /// Nothing more.
    End,
}

/// Starts the threads. They end when everything is in the store, and with the process.
pub(super) fn start(shared: &Arc<Shared>) -> io::Result<()> {
    if shared.is_complete() {
        return Ok(());
    }
    shared.link.say_again();
    shared.blobs.iter().for_each(|lazy| lazy.blob.forget_full());
    let spawn = |name: &str, work: fn(&Shared)| {
        let shared = Arc::clone(shared);
        let builder = thread::Builder::new().name(name.into()).stack_size(STACK);
        builder.spawn(move || work(&shared)).map(|_| ())
    };
    for _ in 0..THREADS {
        spawn("lazy", work)?;
    }
    spawn("lazy-whole", complete_all)
}

fn work(shared: &Shared) {
    loop {
        match next(shared) {
            Next::End => return,
            Next::Likely((number, blocks)) => {
                if let Some(lazy) = shared.blobs.get(number) {
                    lazy.blob.fetch_likely(blocks);
                }
            }
            Next::Rest => {
                let fetched = fetch_rest(shared);
                shared.fill.fillers.fetch_sub(1, Ordering::AcqRel);
                match fetched {
                    Ok(true) => {}
                    Ok(false) => thread::sleep(PAUSE),
                    Err(_) => thread::sleep(shared.link.closed_for().max(PAUSE)),
                }
            }
        }
    }
}

fn next(shared: &Shared) -> Next {
    let fill = &shared.fill;
    let mut queue = lock(&fill.queue);
    loop {
        if queue.ended {
            return Next::End;
        }
        // The latest window first: it is the reader's of now.
        if let Some(job) = queue.ahead.pop_back().or_else(|| queue.list.pop_front()) {
            return Next::Likely(job);
        }
        let may_fill = fill.fill && shared.link.closed_for().is_zero() && shared.link.is_idle_for(QUIET);
        if may_fill
            && fill
                .fillers
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < FILLERS).then_some(n + 1))
                .is_ok()
        {
            return Next::Rest;
        }
        // Two look again soon whether readers have become quiet; the others wait for news.
        let pause =
            if fill.fill && fill.fillers.load(Ordering::Acquire) < FILLERS { QUIET } else { 60 * PAUSE };
        queue = locks::wait_for(&fill.news, queue, pause).0;
    }
}

/// Fetches one part of what is missing; false where there is nothing, or nothing that this process is to fetch.
fn fetch_rest(shared: &Shared) -> Result<bool, ()> {
    for lazy in &shared.blobs {
        let part = lazy.blob.part();
        if part.is_complete() || lazy.blob.is_full() || part.look_for_blob() {
            continue;
        }
        if !lazy.is_ours_to_fill() {
            continue;
        }
        if file::available_bytes(part.folder()).is_ok_and(|left| left < LEAVE_BYTES) {
            continue;
        }
        let Some(first) = part.first_missing(0..part.blocks()) else { continue };
        let end = (first + PART_BYTES / BLOCK).min(part.blocks());
        match lazy.blob.fetch_missing(first..end, Urgency::Background) {
            Ok(Some(_)) => return Ok(true),
            // Somebody fetches that part: the next one, then.
            Ok(None) => {
                let more = (end + PART_BYTES / BLOCK).min(part.blocks());
                if lazy.blob.fetch_missing(end..more, Urgency::Background).map_err(drop)?.is_some() {
                    return Ok(true);
                }
            }
            Err(_) => return Err(()),
        }
    }
    for chunk in shared.chunks.values() {
        if !shared.store.has(chunk) {
            return shared.chunk(chunk, Urgency::Background).map(|_| true).map_err(drop);
        }
    }
    Ok(false)
}

/// Makes blobs of what is whole, until all are.
fn complete_all(shared: &Shared) {
    let mut mends = vec![0; shared.blobs.len()];
    loop {
        for (lazy, mends) in shared.blobs.iter().zip(&mut mends) {
            let part = lazy.blob.part();
            if part.is_complete() || part.look_for_blob() || *mends > MENDS {
                continue;
            }
            if part.first_missing(0..part.blocks()).is_some() || !lazy.is_ours_to_fill() {
                continue;
            }
            match part.complete(&shared.store) {
                Ok(Completed::Blob) => log::info!("{} is whole", part.blob().digest),
                Ok(Completed::Differs(found)) if *mends < MENDS => {
                    *mends += 1;
                    log::warn!(
                        "{} has digest {found}: fetching again what does not verify",
                        part.blob().digest
                    );
                    mend(lazy);
                }
                Ok(Completed::Differs(found)) => {
                    *mends += 1;
                    log::error!(
                        "{} has digest {found}, and every block verifies or cannot be had: it stays as it is, \
                         and is not stored as a blob",
                        part.blob().digest
                    );
                    lock(&shared.fill.queue).differ.insert(part.blob().digest);
                }
                Err(error) => {
                    log::warn!("{} is not stored yet: {error}", part.blob().digest);
                    thread::sleep(10 * PAUSE);
                }
            }
        }
        if shared.is_complete() {
            break;
        }
        thread::sleep(PAUSE);
    }
    if let Some(complete) = &shared.complete {
        complete();
    }
    lock(&shared.fill.queue).ended = true;
    shared.fill.news.notify_all();
}

/// Fetches those blocks again that do not verify, and the verity superblock, which nothing but the digest covers.
fn mend(lazy: &Lazy) {
    let part = lazy.blob.part();
    let superblock = Geometry::of_file(part.blob().size).map(|found| found.data_blocks());
    let mut again: BTreeSet<u64> = superblock.into_iter().collect();
    if let (Some(root_hash), Ok(file)) = (lazy.root_hash, part.file()) {
        match VerifiedSource::open(file, root_hash) {
            Ok(source) => {
                let report = source.verify_all(NonZeroUsize::MIN, &Progress::silent());
                again.extend(report.bad.iter().filter_map(|bad| match bad {
                    ReadError::Verity { block, .. } => Some(*block),
                    _ => None,
                }));
            }
            // Its first block, or the top of the tree.
            Err(_) => again.extend([0].into_iter().chain(superblock.map(|block| block + 1))),
        }
    }
    for block in again {
        if let Err(error) = lazy.blob.fetch_again(block) {
            log::info!("{error}");
            return;
        }
    }
}

impl Lazy {
    /// Whether this process is the one that completes the blob.
    pub(super) fn is_ours_to_fill(&self) -> bool {
        let mut held = lock(&self.fill_lock);
        if held.is_none() {
            *held = self.blob.part().try_fill().unwrap_or(None);
        }
        held.is_some()
    }
}
