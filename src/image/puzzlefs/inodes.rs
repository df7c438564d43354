//! The inodes of all lists, as the first walk over the metadata finds them: which of them count.

use super::message::{List, Message, Struct};
use super::{MANIFEST_VERSION, MAX_INO, corrupt};
use crate::image::LayerError;
use crate::image::layer::FileType;
use crate::sys::memory::populate;

/// The inode number of the root folder.
pub(super) const ROOT: u64 = 1;

/// No index of a table.
pub(super) const NONE: u32 = u32::MAX;

/// An index of the tables. They have fewer elements than the message has bytes, and that is below 2^32.
pub(super) fn index(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(NONE)
}

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tag {
    Fifo,
    Char,
    Dir,
    Block,
    File,
    Symlink,
    Socket,
    /// Of a delta: the name does not exist.
    Whiteout,
}

impl Tag {
    #[inline(always)]
    pub(super) fn of(inode: &Struct<'_>) -> Result<Self, LayerError> {
        Ok(match inode.u16(64) {
            1 => Tag::Fifo,
            2 => Tag::Char,
            3 => Tag::Dir,
            4 => Tag::Block,
            5 => Tag::File,
            6 => Tag::Symlink,
            7 => Tag::Socket,
            8 => Tag::Whiteout,
            tag => return Err(corrupt(inode.offset(), format!("an inode has tag {tag}, expected 1 to 8"))),
        })
    }

    /// The type of file. No inode that is kept is a whiteout.
    pub(super) fn kind(self) -> FileType {
        match self {
            Tag::Fifo => FileType::Fifo,
            Tag::Char | Tag::Whiteout => FileType::CharDevice,
            Tag::Dir => FileType::Directory,
            Tag::Block => FileType::BlockDevice,
            Tag::File => FileType::Regular,
            Tag::Symlink => FileType::Symlink,
            Tag::Socket => FileType::Socket,
        }
    }
}

/// An inode that counts: the first list that has its number has it at that index.
#[derive(Debug, Clone, Copy)]
pub(super) struct Visible {
    pub ino: u64,
    pub list: u32,
    pub index: u32,
    pub tag: Tag,
    /// How many names lead to it; of a folder that was reached: 1.
    pub links: u32,
    /// Of a folder that was reached: its entries, and how many of them are folders.
    pub first: u32,
    pub count: u32,
    pub folders: u32,
}

/// The lists of inodes, the newest first.
///
/// # Errors
/// A version that is not read, and a message that makes no sense.
pub(super) fn lists<'m>(message: &'m Message<'m>) -> Result<Vec<List<'m>>, LayerError> {
    let root = message.root()?;
    let version = root.u64(0);
    if version != MANIFEST_VERSION {
        let why = format!("manifestVersion is {version}, expected {MANIFEST_VERSION}");
        return Err(corrupt(root.offset(), why));
    }
    root.list(0)?.iter().map(|list| list.list(0)).collect()
}

/// The first walk: the inodes that count, in the order of their numbers.
pub(super) fn visible(lists: &[List<'_>]) -> Result<Vec<Visible>, LayerError> {
    let mut visible: Vec<Visible> = Vec::with_capacity(lists.iter().map(List::len).sum());
    populate(visible.spare_capacity_mut());
    for (number, list) in lists.iter().enumerate() {
        let (begin, mut twice) = (visible.len(), false);
        let mut before: Option<u64> = None;
        for (at, source) in list.iter().enumerate() {
            let ino = source.u64(0);
            if ino == 0 || ino >= MAX_INO {
                let why = format!("inode number {ino}, expected 1 to {}", MAX_INO - 1);
                return Err(corrupt(source.offset(), why));
            }
            if before.is_some_and(|before| before > ino) {
                return Err(corrupt(source.offset(), format!("inode {ino} is not in the order of numbers")));
            }
            twice |= before == Some(ino);
            let (list, index, tag) = (index(number), index(at), Tag::of(&source)?);
            visible.push(Visible { ino, list, index, tag, links: 0, first: 0, count: 0, folders: 0 });
            before = Some(ino);
        }
        if twice {
            settle(&mut visible, begin, list);
        }
    }
    if lists.len() > 1 {
        // Stable: of those with one number, that of the newest list comes first.
        visible.sort_by_key(|seen| seen.ino);
        visible.dedup_by_key(|seen| seen.ino);
    }
    Ok(visible)
}

/// Some deltas have a number twice in one list. Keeps, of those with one number, the inode that a binary search meets
/// first. The elements of the list are those of `visible` from `begin` on.
fn settle(visible: &mut Vec<Visible>, begin: usize, list: &List<'_>) {
    let (mut kept, mut at) = (begin, begin);
    while let Some(&seen) = visible.get(at) {
        let same = visible.iter().skip(at).take_while(|other| other.ino == seen.ino).count();
        let met = if same > 1 { begin + first_met(list, seen.ino) } else { at };
        visible[kept] = visible.get(met).copied().unwrap_or(seen);
        kept += 1;
        at += same;
    }
    visible.truncate(kept);
}

/// Which element of a list a binary search for `ino` meets first. It is in the list.
fn first_met(list: &List<'_>, ino: u64) -> usize {
    let (mut left, mut right) = (0, list.len().saturating_sub(1));
    while left < right {
        let middle = left + (right - left) / 2;
        match list.get(middle).u64(0) {
            found if found < ino => left = middle + 1,
            found if found > ino => right = middle.saturating_sub(1),
            _ => return middle,
        }
    }
    left
}

/// Where an inode is in a list in the order of numbers, each of them once.
pub(super) fn find(all: &[Visible], ino: u64) -> Option<usize> {
    let number = |seen: &Visible| seen.ino;
    // Numbers begin at 1 and have few gaps, so it lies at this place, or as far before it as there are gaps.
    let guess = usize::try_from(ino.checked_sub(ROOT)?).unwrap_or(usize::MAX);
    if all.get(guess).is_some_and(|one| number(one) == ino) {
        return Some(guess);
    }
    let without_gaps = (all.len() as u64).saturating_sub(1).saturating_add(ROOT);
    let gaps = usize::try_from(number(all.last()?).saturating_sub(without_gaps)).unwrap_or(usize::MAX);
    let end = guess.min(all.len());
    let start = guess.saturating_sub(gaps).min(end);
    all.get(start..end)?.binary_search_by_key(&ino, number).ok().map(|at| start + at)
}

/// The inode in the message.
pub(super) fn inode<'m>(lists: &[List<'m>], seen: Option<&Visible>) -> Option<Struct<'m>> {
    let seen = seen?;
    let list = lists.get(seen.list as usize)?;
    ((seen.index as usize) < list.len()).then(|| list.get(seen.index as usize))
}
