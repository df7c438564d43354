//! Stores decoded bytes in the kernel's page cache before they are requested (FUSE_NOTIFY_STORE).
//!
//! A block that was decoded for a part of it holds more than was requested: the rest of the file's extent
//! and, if the block is shared, the contents of other small files. Each of those would later cost a round
//! trip between two cores, which is more expensive than the copy. So they are stored now, by a separate
//! thread: the kernel may make it wait for a locked page, which a thread that serves requests must never do,
//! as the page may be waiting for its reply.
//!
//! Only inodes that the kernel knows can be stored to. Which files share a block is known at no cost when
//! their attributes are sent: [`Siblings`] records that for small files, bounded.
//!
//! The queue is bounded too, by [`QUEUE`] blocks; blocks that do not fit are dropped.
//!
//! # Ahead
//! A program that reads small files one after the other (tar, cp, a compiler its headers) waits for one
//! shared block after the other, while a core sleeps. So, when shared blocks are requested in the order in
//! which they lie in the image, the same thread decodes up to [`AHEAD`] of the next ones, as long as they
//! hold files that the kernel knows and has not read, and stores those files.
//!
//! # Locks
//! [`Siblings`] has one mutex, a leaf, held for a look-up or an insert.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use fuser::{INodeNo, Notifier};

use super::lead::Lead;
use super::started::OnDemand;
use crate::image::layer::{Attr, BlockId, FileType, Place};
use crate::mount::engine::cache::Block;
use crate::mount::engine::{Decoded, Engine, Surplus};
use crate::sys::locks;

/// How many decoded blocks may wait to be stored; each holds its memory while it waits.
const QUEUE: usize = 8;
/// How many shared blocks are decoded ahead of the requested one.
const AHEAD: usize = 4;
/// How many files the table of siblings knows, 16 bytes each (and as much again for spare capacity of the
/// vectors).
const MOST_SIBLINGS: usize = 64 * 1024;
/// How many shared blocks the table knows, 100 bytes each.
const MOST_BLOCKS: usize = 16 * 1024;
/// Files above this size, in bytes, are not checked for a tail in a shared block.
const SMALL_FILE_BYTES: u64 = 128 * 1024;
const PAGE: u64 = 4096;

/// A small file whose content lies in a shared block.
#[derive(Clone, Copy)]
struct Sibling {
    ino: u64,
    /// Where it begins in the decoded block, in bytes.
    offset: u32,
    /// How many bytes it has.
    len: u32,
}

/// A shared block: the index of its layer, and where it lies there. In the order of reading.
type Key = (usize, BlockId);

/// Which small files lie in which shared block, limited to files that the kernel knows and has not read.
#[derive(Default)]
pub(super) struct Siblings {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    blocks: BTreeMap<Key, Vec<Sibling>>,
    /// The blocks in order of insertion, to evict the oldest first.
    order: VecDeque<Key>,
    files: usize,
}

impl Siblings {
    fn lock(&self) -> MutexGuard<'_, Table> {
        locks::lock(&self.table)
    }

    /// Records a file whose attributes the kernel has just received.
    pub(super) fn seen(&self, engine: &Engine, ino: u64, attr: &Attr) {
        if attr.kind != FileType::Regular || attr.size_bytes == 0 || attr.size_bytes > SMALL_FILE_BYTES {
            return;
        }
        // An error recurs, and is logged, when the file is read.
        let Ok((layer, extent)) = engine.view().extent(ino, 0) else { return };
        let Place::Shared { block, offset } = extent.place else { return };
        if u64::from(extent.len) != attr.size_bytes {
            return;
        }
        let sibling = Sibling { ino, offset, len: extent.len };
        self.lock().insert((layer, block), sibling);
    }

    /// Removes the files of a block from the table and returns them.
    fn take(&self, key: &Key) -> Vec<Sibling> {
        let mut table = self.lock();
        let taken = table.blocks.remove(key).unwrap_or_default();
        table.files = table.files.saturating_sub(taken.len());
        taken
    }

    /// The first block of the table that lies behind `key` in the same layer.
    fn after(&self, key: &Key) -> Option<Key> {
        let table = self.lock();
        let behind = (Bound::Excluded(*key), Bound::Unbounded);
        let next = table.blocks.range(behind).next().map(|(next, _)| *next);
        next.filter(|next| next.0 == key.0)
    }
}

impl Table {
    fn insert(&mut self, key: Key, sibling: Sibling) {
        let files = self.blocks.entry(key).or_insert_with(|| {
            self.order.push_back(key);
            Vec::new()
        });
        if files.iter().any(|one| one.ino == sibling.ino) {
            return;
        }
        files.push(sibling);
        self.files += 1;
        while self.files > MOST_SIBLINGS || self.order.len() > MOST_BLOCKS {
            let Some(oldest) = self.order.pop_front() else { break };
            self.files -= self.blocks.remove(&oldest).map_or(0, |files| files.len());
        }
    }
}

/// The sending end of the queue: never blocks. What is sent first starts the thread that stores.
pub(super) struct StoreQueue {
    sender: SyncSender<Decoded>,
    thread: Arc<OnceLock<OnDemand>>,
}

impl Surplus for StoreQueue {
    fn decoded(&self, news: Decoded) {
        let _ = self.sender.try_send(news);
        if let Some(thread) = self.thread.get() {
            thread.start();
        }
    }
}

/// The queue, the place of the thread that stores, and the queue's receiving end.
pub(super) fn queue() -> (StoreQueue, Arc<OnceLock<OnDemand>>, Receiver<Decoded>) {
    let (sender, receiver) = sync_channel(QUEUE);
    let thread = Arc::default();
    (StoreQueue { sender, thread: Arc::clone(&thread) }, thread, receiver)
}

/// Stores blocks from the queue, and decodes ahead, until the mount ends.
///
/// `lead` hears when it works.
pub(super) fn run(
    receiver: &Receiver<Decoded>,
    engine: &Engine,
    siblings: &Siblings,
    notifier: &Notifier,
    lead: &Lead,
) {
    let mut ahead = Readahead::default();
    loop {
        let next = match ahead.left {
            0 => receiver.recv().map_err(|_| TryRecvError::Disconnected),
            _ => receiver.try_recv(),
        };
        let _work = lead.work();
        match next {
            Ok(news) => {
                if let Place::Shared { offset, .. } = news.extent.place {
                    let key = (news.layer, news.id);
                    ahead.asked(key, siblings);
                    store_rest(notifier, &news, offset as usize);
                    store_files(notifier, &news.block, siblings.take(&key), Some(news.ino));
                } else {
                    store_rest(notifier, &news, 0);
                }
            }
            Err(TryRecvError::Empty) => {
                let Some(key) = ahead.step(siblings) else { continue };
                // An error recurs, and is logged, when one of the files is read.
                if let Ok(block) = engine.shared_block(key.0, key.1) {
                    store_files(notifier, &block, siblings.take(&key), None);
                }
            }
            Err(TryRecvError::Disconnected) => return,
        }
    }
}

/// How far the reading of shared blocks of a layer has advanced.
#[derive(Default)]
struct Readahead {
    /// The next block, if blocks are read in order.
    next: Option<Key>,
    /// How many more blocks to decode ahead.
    left: usize,
}

impl Readahead {
    /// A reader had to wait for a block.
    fn asked(&mut self, key: Key, siblings: &Siblings) {
        match self.next {
            Some(next) if next == key => self.left = AHEAD,
            // Part of a block that has already been handled, such as the tail of a large file.
            Some((layer, block)) if layer == key.0 && key.1 < block => return,
            _ => self.left = 0,
        }
        self.next = siblings.after(&key);
    }

    /// The block to decode now.
    fn step(&mut self, siblings: &Siblings) -> Option<Key> {
        let Some(key) = self.next else {
            self.left = 0;
            return None;
        };
        self.left -= 1;
        self.next = siblings.after(&key);
        Some(key)
    }
}

/// Stores the files of a shared block, except the requested one.
fn store_files(notifier: &Notifier, block: &Block, files: Vec<Sibling>, asked: Option<u64>) {
    for Sibling { ino, offset, len } in files {
        let (from, len) = (offset as usize, len as usize);
        if asked != Some(ino)
            && let Some(bytes) = from.checked_add(len).and_then(|to| block.bytes().get(from..to))
        {
            // Fails for an inode that the kernel has forgotten, which is harmless.
            let _ = notifier.store(INodeNo(ino), 0, bytes);
        }
    }
}

/// Stores the parts of the file's extent before and after the requested bytes, in whole pages.
fn store_rest(notifier: &Notifier, news: &Decoded, start: usize) {
    let begin = news.extent.file_offset;
    let end = begin.saturating_add(u64::from(news.extent.len)).min(news.size_bytes);
    // The reply covers whole pages (the kernel pads the last one of the file itself).
    let (asked_from, asked_to) = (news.asked.0 / PAGE * PAGE, news.asked.1.next_multiple_of(PAGE));
    // A page that reaches into the previous or next extent is skipped: it would be stored only in part.
    let first = begin.next_multiple_of(PAGE);
    let last = if end == news.size_bytes { end } else { end / PAGE * PAGE };
    for (from, to) in [(first, asked_from.min(last)), (asked_to.max(first), last)] {
        if from >= to {
            continue;
        }
        let (a, b) = (start + (from - begin) as usize, start + (to - begin) as usize);
        if let Some(bytes) = news.block.bytes().get(a..b) {
            let _ = notifier.store(INodeNo(news.ino), from, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(layer: usize, start: u64) -> Key {
        (layer, BlockId { start, size_word: 1, decoded_max: 4096 })
    }

    fn table(keys: impl IntoIterator<Item = Key>) -> Siblings {
        let siblings = Siblings::default();
        for (key, ino) in keys.into_iter().zip(1..) {
            let sibling = Sibling { ino, offset: 0, len: 1 };
            siblings.table.lock().unwrap().insert(key, sibling);
        }
        siblings
    }

    #[test]
    fn blocks_asked_for_in_their_order_are_decoded_ahead() {
        let siblings = table((0..20).map(|start| key(1, start * 10)).chain([key(2, 500)]));
        let mut ahead = Readahead::default();
        ahead.asked(key(1, 0), &siblings);
        assert_eq!(ahead.left, 0, "one block is no order");
        ahead.asked(key(1, 10), &siblings);
        let steps: Vec<_> = std::iter::from_fn(|| (ahead.left > 0).then(|| ahead.step(&siblings))).collect();
        assert_eq!(steps, [20, 30, 40, 50].map(|start| Some(key(1, start))));
        // The tail of a large file in a block already handled changes nothing.
        ahead.asked(key(1, 30), &siblings);
        assert_eq!((ahead.left, ahead.next), (0, Some(key(1, 60))));
        ahead.asked(key(1, 60), &siblings);
        assert_eq!(ahead.left, AHEAD);
        ahead.asked(key(1, 150), &siblings);
        assert_eq!(ahead.left, 0, "a jump ends it");
        // It ends with its layer.
        for start in [160, 170, 180, 190] {
            ahead.asked(key(1, start), &siblings);
        }
        assert_eq!(ahead.step(&siblings), None);
        assert_eq!(ahead.left, 0);
    }

    #[test]
    fn the_table_is_bounded_and_forgets_the_oldest() {
        let siblings = table((0..2 * MOST_BLOCKS as u64).map(|start| key(0, start)));
        let table = siblings.table.lock().unwrap();
        assert_eq!((table.blocks.len(), table.order.len()), (MOST_BLOCKS, MOST_BLOCKS));
        assert_eq!(table.files, MOST_BLOCKS);
        assert!(!table.blocks.contains_key(&key(0, 0)));
    }
}
