//! The streaming merge of name-sorted listings, and the memory of where listings stood.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, VecDeque};

use super::{Merged, OverlayError, Part, SAVED_CURSORS, at};
use crate::image::layer::DirEntry;

/// How many entries are taken from a layer at a time.
const BATCH: usize = 32;
/// The cookie of a listing that has come to its end.
const AT_END: u64 = u64::MAX;

/// The listing of one part.
struct Stream {
    part: Part,
    /// Entries that were read and not yet merged.
    ahead: VecDeque<DirEntry>,
    /// Where to read on: the `next` of the last entry that was read, or [`AT_END`].
    read_on: u64,
    /// The `next` of the last entry that was accepted.
    accepted: u64,
}

/// The first entry of a stream that is not merged yet, ordered by name, then topmost first.
struct Head {
    entry: DirEntry,
    stream: usize,
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> Ordering {
        self.entry.name.cmp(&other.entry.name).then(self.stream.cmp(&other.stream))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Head {}

/// A merge of the listings of a folder's parts.
pub(super) struct Merge<'a> {
    view: &'a Merged,
    streams: Vec<Stream>,
    heads: BinaryHeap<Reverse<Head>>,
    /// The entries of the current name, topmost first, never empty once `next` said so.
    group: Vec<(Part, DirEntry)>,
    /// For each entry of `group` its stream and its `next`.
    taken: Vec<(usize, u64)>,
}

impl<'a> Merge<'a> {
    /// Begins where `cookies` (one for each part) say, or at the start.
    pub(super) fn new(
        view: &'a Merged,
        parts: &[Part],
        cookies: Option<&[u64]>,
    ) -> Result<Self, OverlayError> {
        let streams = parts.iter().enumerate().map(|(index, &part)| {
            let from = cookies.and_then(|all| all.get(index)).copied().unwrap_or(0);
            Stream { part, ahead: VecDeque::new(), read_on: from, accepted: from }
        });
        let mut merge = Self {
            view,
            streams: streams.collect(),
            heads: BinaryHeap::with_capacity(parts.len()),
            group: Vec::new(),
            taken: Vec::new(),
        };
        for stream in 0..merge.streams.len() {
            merge.refill(stream)?;
        }
        Ok(merge)
    }

    /// The entries that have the next name, topmost first.
    pub(super) fn next(&mut self) -> Result<Option<&mut Vec<(Part, DirEntry)>>, OverlayError> {
        self.group.clear();
        self.taken.clear();
        while let Some(Reverse(head)) = self.heads.peek() {
            if let Some((_, first)) = self.group.first()
                && first.name != head.entry.name
            {
                break;
            }
            let Some(Reverse(Head { entry, stream })) = self.heads.pop() else { break };
            self.taken.push((stream, entry.next));
            self.group.push((self.streams[stream].part, entry));
            self.refill(stream)?;
        }
        Ok(if self.group.is_empty() { None } else { Some(&mut self.group) })
    }

    /// Says that the entries of the last `next` need not come again.
    pub(super) fn accept(&mut self) {
        for &(stream, next) in &self.taken {
            self.streams[stream].accepted = next;
        }
    }

    /// Where each part stands after what was accepted.
    pub(super) fn cookies(&self) -> Box<[u64]> {
        self.streams.iter().map(|stream| stream.accepted).collect()
    }

    /// Puts the next entry of a stream among the heads.
    fn refill(&mut self, index: usize) -> Result<(), OverlayError> {
        let stream = &mut self.streams[index];
        if stream.ahead.is_empty() && stream.read_on != AT_END {
            let mut count = 0;
            let part = stream.part;
            let ahead = &mut stream.ahead;
            let mut full = false;
            self.view.layers[part.layer]
                .read_dir(part.node, stream.read_on, &mut |entry| {
                    ahead.push_back(entry);
                    count += 1;
                    full = count >= BATCH;
                    !full
                })
                .map_err(|source| at(part, source))?;
            stream.read_on = match stream.ahead.back() {
                Some(last) if full => last.next,
                _ => AT_END,
            };
        }
        if let Some(entry) = stream.ahead.pop_front() {
            self.heads.push(Reverse(Head { entry, stream: index }));
        }
        Ok(())
    }
}

/// Where merged listings stood, for the last few places that a listing was left at.
#[derive(Default)]
pub(super) struct CursorCache {
    /// Folder, ordinal and cookies; the last used are at the back.
    saved: VecDeque<(u64, u64, Box<[u64]>)>,
}

impl CursorCache {
    /// The cookies of the parts of `dir` after `ordinal` entries.
    pub(super) fn get(&mut self, dir: u64, ordinal: u64) -> Option<Box<[u64]>> {
        let index = self.saved.iter().rposition(|(d, o, _)| (*d, *o) == (dir, ordinal))?;
        let hit = self.saved.remove(index)?;
        let cookies = hit.2.clone();
        self.saved.push_back(hit);
        Some(cookies)
    }

    /// Remembers the cookies of the parts of `dir` after `ordinal` entries.
    pub(super) fn put(&mut self, dir: u64, ordinal: u64, cookies: Box<[u64]>) {
        self.saved.retain(|(d, o, _)| (*d, *o) != (dir, ordinal));
        if self.saved.len() >= SAVED_CURSORS {
            self.saved.pop_front();
        }
        self.saved.push_back((dir, ordinal, cookies));
    }
}
