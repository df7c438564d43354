//! Putting decoded bytes into the kernel's page cache before anybody asks (FUSE_NOTIFY_STORE).
//!
//! A block that was decoded for a part holds more than was asked for: the rest of the file's extent,
//! and, where the block is shared, the contents of other small files. Each of those would cost a round trip
//! between two cores later, which is dearer than the copy. So they are stored now, by a thread of its
//! own: the kernel may make it wait for a locked page, which a thread that answers requests must
//! never do, as the page may be waiting for that answer.
//!
//! Only inodes that the kernel knows can be stored to. Which files share a block is learnt for free
//! when their attributes are sent: [`Siblings`] keeps that for small files, bounded.
//!
//! The queue is bounded too, by [`QUEUE`] blocks; news that does not fit is dropped.
//!
//! # Locks
//! [`Siblings`] has one mutex, a leaf, held for a look-up or an insert.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use fuser::{INodeNo, Notifier};

use crate::image::layer::{Attr, BlockId, FileType, Place};
use crate::mount::engine::{Decoded, Engine, Surplus};

/// How many decoded blocks may wait to be stored; each holds its memory while it waits.
const QUEUE: usize = 8;
/// How many files the table of siblings knows, 40 bytes each.
const MOST_SIBLINGS: usize = 16 * 1024;
/// Files above this size are not looked at for a tail in a shared block, in bytes.
const SMALL_FILE_BYTES: u64 = 128 * 1024;
const PAGE: u64 = 4096;

/// A small file whose content lies in a shared block.
#[derive(Clone, Copy)]
struct Sibling {
    ino: u64,
    /// Where in the decoded block it begins, in bytes.
    offset: u32,
    /// How many bytes it has.
    len: u32,
}

/// Which small files lie in which shared block, of those that the kernel knows and has not read.
#[derive(Default)]
pub(super) struct Siblings {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    blocks: HashMap<(usize, u64), Vec<Sibling>>,
    /// The blocks in the order in which they came up, to forget the oldest first.
    order: VecDeque<(usize, u64)>,
    files: usize,
}

impl Siblings {
    /// Notes a file that the kernel has just been told of.
    pub fn seen(&self, engine: &Engine, ino: u64, attr: &Attr) {
        if attr.kind != FileType::Regular || attr.size_bytes == 0 || attr.size_bytes > SMALL_FILE_BYTES {
            return;
        }
        // An error is met again, and logged, when the file is read.
        let Ok((layer, extent)) = engine.view().extent(ino, 0) else { return };
        let Place::Shared { block, offset } = extent.place else { return };
        if u64::from(extent.len) != attr.size_bytes {
            return;
        }
        let sibling = Sibling { ino, offset, len: extent.len };
        self.table.lock().unwrap_or_else(PoisonError::into_inner).insert((layer, block.start), sibling);
    }

    /// Takes the files of a block off the table.
    fn take(&self, layer: usize, block: BlockId) -> Vec<Sibling> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = table.blocks.remove(&(layer, block.start)).unwrap_or_default();
        table.files = table.files.saturating_sub(taken.len());
        taken
    }
}

impl Table {
    fn insert(&mut self, key: (usize, u64), sibling: Sibling) {
        let files = self.blocks.entry(key).or_insert_with(|| {
            self.order.push_back(key);
            Vec::new()
        });
        if files.iter().any(|one| one.ino == sibling.ino) {
            return;
        }
        files.push(sibling);
        self.files += 1;
        while self.files > MOST_SIBLINGS || self.order.len() > MOST_SIBLINGS {
            let Some(oldest) = self.order.pop_front() else { break };
            self.files -= self.blocks.remove(&oldest).map_or(0, |files| files.len());
        }
    }
}

/// The sending end of the queue: never blocks.
pub(super) struct StoreQueue(SyncSender<Decoded>);

impl Surplus for StoreQueue {
    fn decoded(&self, news: Decoded) {
        let _ = self.0.try_send(news);
    }
}

/// The queue and its receiving end.
pub(super) fn queue() -> (StoreQueue, Receiver<Decoded>) {
    let (sender, receiver) = sync_channel(QUEUE);
    (StoreQueue(sender), receiver)
}

/// Stores what comes through the queue until the mount ends.
pub(super) fn run(receiver: &Receiver<Decoded>, siblings: &Arc<Siblings>, notifier: &Notifier) {
    while let Ok(news) = receiver.recv() {
        if let Place::Shared { offset, .. } = news.extent.place {
            store_rest(notifier, &news, offset as usize);
            for one in siblings.take(news.layer, news.id) {
                let (from, len) = (one.offset as usize, one.len as usize);
                if one.ino != news.ino
                    && let Some(bytes) = from.checked_add(len).and_then(|to| news.block.bytes().get(from..to))
                {
                    // Fails for an inode that the kernel has forgotten: nothing is lost.
                    let _ = notifier.store(INodeNo(one.ino), 0, bytes);
                }
            }
        } else {
            store_rest(notifier, &news, 0);
        }
    }
}

/// Stores the parts of the file's extent before and after what was asked for, in whole pages.
fn store_rest(notifier: &Notifier, news: &Decoded, start: usize) {
    let begin = news.extent.file_offset;
    let end = begin.saturating_add(u64::from(news.extent.len)).min(news.size_bytes);
    // The reply covers whole pages (the kernel pads the last one of the file itself).
    let (asked_from, asked_to) = (news.asked.0 / PAGE * PAGE, news.asked.1.next_multiple_of(PAGE));
    // A page that reaches into the extent before or after is left alone: it would be stored in part.
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
