//! An image file of which every block is verified when it is read.
//!
//! ```text
//! root hash (trusted: from a signed manifest)
//!   └─ top block of the tree          checked at open, kept
//!        └─ hash blocks below         checked when first needed, kept in a bounded cache
//!             └─ data blocks          checked at each read
//! ```
//!
//! **What was hashed is what is used.** A block is copied into memory of this process with pread(2), hashed
//! there, and compared; the caller receives that same copy. No byte of the file is read twice, so an attacker
//! who changes the file, at any moment, causes at most an error. For the same reason this module does not use
//! mmap(2): a mapped page can change after it was hashed. The same applies to hash blocks: the cache holds
//! only verified copies.
//!
//! The root hash does not cover the superblock, so it is not trusted: see [`locate`].
//!
//! A block that does not match may be another one when it is read again: where bytes come from another machine,
//! [`ReadAt::distrust`] fetches them once more, and the new copy is hashed like the first.
//!
//! # Locks
//! Each slot of the cache has its own lock, held only to compare a number and to copy a pointer. No I/O and
//! no hashing happens under it. Two threads that need the same missing block both load it; both copies are
//! verified.

use std::convert::Infallible;
use std::fs::File;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::bytes::{ReadAt, len, read_exact};
use super::source::{ReadError, Source, check_range};
use super::verity::{
    BLOCK_BYTES, Geometry, HASHES_PER_BLOCK, HashBlock, Level, Superblock, VerityData, VerityError, locate,
    locate_behind, parallel,
};
use crate::digest::Digest;
use crate::progress::Progress;
use crate::sorting;
use crate::sys::locks;
use crate::sys::sha256::hash_blocks;

/// The default bound of the cache of hash blocks, in bytes; it covers 256 MiB of data.
pub const DEFAULT_CACHE_BYTES: usize = 2 << 20;

/// How many bad blocks a [`Report`] lists; further ones are only counted.
pub const REPORT_MAX: usize = 1000;

const BLOCK: u64 = BLOCK_BYTES as u64;
const FANOUT: u64 = HASHES_PER_BLOCK as u64;

/// A file system image with verity data, read under a root hash.
///
/// As a [`Source`] its size is that of the data area: the file system's, rounded up to 4096 bytes. The bytes
/// come from anything that can be read at an offset; reads of a file need no indirect call.
pub struct VerifiedSource<R = File> {
    bytes: R,
    superblock: Superblock,
    geometry: Geometry,
    root_hash: Digest,
    /// The verified top block. If there is no tree: a block that holds the root hash as the hash of the only
    /// data block.
    top: Arc<HashBlock>,
    /// Verified blocks of the levels below the top. Block b of the file belongs in slot `b % len`.
    cache: Box<[Slot]>,
}

/// A slot for a verified hash block, with its number in the file.
type Slot = Mutex<Option<(u64, Arc<HashBlock>)>>;

/// What [`VerifiedSource::verify_all`] found.
#[derive(Debug, Default)]
pub struct Report {
    /// The first bad blocks, at most [`REPORT_MAX`], ordered by position in the file: blocks with a wrong
    /// hash ([`ReadError::Verity`]) and blocks that cannot be read ([`ReadError::Io`]).
    pub bad: Vec<ReadError>,
    /// How many bad blocks there are, listed or not.
    pub bad_count: u64,
    /// How many data blocks are under a bad hash block, so that their expected hashes are unknown.
    pub unknown_blocks: u64,
}

impl Report {
    /// Returns whether the image is intact.
    pub fn is_good(&self) -> bool {
        self.bad_count == 0 && self.unknown_blocks == 0
    }
}

impl<R: ReadAt> VerifiedSource<R> {
    /// Opens an image file under its root hash.
    ///
    /// # Errors
    /// [`VerityError::Missing`] if there is no verity data, and others if it is malformed; [`ReadError::Verity`] inside
    /// it if the top of the tree does not match the root hash.
    pub fn open(bytes: R, root_hash: Digest) -> Result<Self, VerityError> {
        let found = locate(&bytes)?.required()?;
        Self::open_found(bytes, found, root_hash, DEFAULT_CACHE_BYTES)
    }

    /// Opens an image file whose data area is known to have `data_bytes` bytes, with a cache of
    /// hash blocks of at most `cache_bytes` bytes (and at least one block).
    ///
    /// An evicted hash block stays in memory while a read still uses it: one more block per thread.
    ///
    /// # Errors
    /// As [`VerifiedSource::open`].
    pub fn open_sized(
        bytes: R,
        data_bytes: u64,
        root_hash: Digest,
        cache_bytes: usize,
    ) -> Result<Self, VerityError> {
        let found = locate_behind(&bytes, data_bytes)?.required()?;
        Self::open_found(bytes, found, root_hash, cache_bytes)
    }

    /// Opens an image whose verity data was found, with a cache of hash blocks of at most `cache_bytes` bytes.
    ///
    /// # Errors
    /// As [`VerifiedSource::open`].
    pub fn open_found(
        bytes: R,
        found: VerityData,
        root_hash: Digest,
        cache_bytes: usize,
    ) -> Result<Self, VerityError> {
        let VerityData { superblock, geometry } = found;
        let slots = geometry.tree_blocks().min((cache_bytes / BLOCK_BYTES) as u64).max(1);
        let mut source = Self {
            bytes,
            superblock,
            geometry,
            root_hash,
            top: Arc::new([[0; 32]; HASHES_PER_BLOCK]),
            cache: (0..slots).map(|_| Slot::default()).collect(),
        };
        // The block that the root hash covers: the top of the tree, or the only data block.
        let top = source.geometry.levels().last().map(|level| level.first_block);
        let mut hashes = [[0; 32]; HASHES_PER_BLOCK];
        source.load_checked(top.unwrap_or(0), hashes.as_flattened_mut(), root_hash.as_bytes())?;
        if top.is_none() {
            hashes = [[0; 32]; HASHES_PER_BLOCK];
            hashes[0] = *root_hash.as_bytes();
        }
        source.top = Arc::new(hashes);
        Ok(source)
    }

    /// Returns the root hash that every read is verified against.
    pub fn root_hash(&self) -> Digest {
        self.root_hash
    }

    /// Returns the superblock. Its UUID is not verified; its salt is, because the root hash matches.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Returns where data and tree lie in the file.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Reads blocks of the file, unverified.
    fn load(&self, first_block: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        read_exact(&self.bytes, first_block * BLOCK, buffer)
    }

    /// Compares blocks in memory with their hashes and passes each one that differs to `bad`.
    ///
    /// This is the only place where blocks are verified. `bytes` holds as many blocks as `expected`.
    fn compare(
        &self,
        bytes: &[u8],
        first_block: u64,
        expected: &[[u8; 32]],
        mut bad: impl FnMut(ReadError) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        /// Blocks that are hashed at a time; an even number for the two streams.
        const BATCH: usize = 16;
        let mut block = first_block;
        for (bytes, expected) in bytes.chunks(BATCH * BLOCK_BYTES).zip(expected.chunks(BATCH)) {
            let mut found = [[0; 32]; BATCH];
            let found = &mut found[..expected.len()];
            hash_blocks(&self.superblock.salt, bytes, found);
            for (expected, found) in expected.iter().zip(found) {
                if expected != found {
                    bad(ReadError::Verity {
                        what: self.name_of(block),
                        block,
                        expected: Digest::from_bytes(*expected),
                        found: Digest::from_bytes(*found),
                    })?;
                }
                block += 1;
            }
        }
        Ok(())
    }

    /// The same, but returns the first block that differs as the error.
    fn check(&self, bytes: &[u8], first_block: u64, expected: &[[u8; 32]]) -> Result<(), ReadError> {
        self.compare(bytes, first_block, expected, Err)
    }

    /// Reads one block, verified. One that does not match is fetched again, where that is possible.
    fn load_checked(&self, block: u64, bytes: &mut [u8], expected: &[u8; 32]) -> Result<(), ReadError> {
        loop {
            self.load(block, bytes)?;
            match self.check(bytes, block, std::slice::from_ref(expected)) {
                Err(_) if self.bytes.distrust(block * BLOCK, BLOCK) => {}
                checked => return checked,
            }
        }
    }

    /// Describes a block of the file, for an error.
    fn name_of(&self, block: u64) -> String {
        match self.geometry.levels().iter().position(|level| block >= level.first_block) {
            Some(level) => format!("hash level {level}"),
            None => "data".to_string(),
        }
    }

    /// Returns a verified hash block: the `index`-th of a level. `index` is within the level.
    fn hash_block(&self, level: usize, index: u64) -> Result<Arc<HashBlock>, ReadError> {
        let levels = self.geometry.levels();
        if level + 1 >= levels.len() {
            return Ok(Arc::clone(&self.top));
        }
        let block = levels[level].first_block + index;
        let slot = &self.cache[(block % self.cache.len() as u64) as usize];
        if let Some((held, hashes)) = &*locks::lock(slot)
            && *held == block
        {
            return Ok(Arc::clone(hashes));
        }
        // Climbs one level at a time and ends at the top; there are at most eight levels.
        let parent = self.hash_block(level + 1, index / FANOUT)?;
        let mut hashes = [[0; 32]; HASHES_PER_BLOCK];
        self.load_checked(block, hashes.as_flattened_mut(), &parent[(index % FANOUT) as usize])?;
        let hashes = Arc::new(hashes);
        *locks::lock(slot) = Some((block, Arc::clone(&hashes)));
        Ok(hashes)
    }

    /// Fills `bytes` with data blocks, all of them verified. What does not match is fetched again, where that is
    /// possible.
    fn read_blocks(&self, first_block: u64, bytes: &mut [u8]) -> Result<(), ReadError> {
        loop {
            match self.try_read_blocks(first_block, bytes) {
                // A hash block has been fetched again by then, so the fault is among the data.
                Err(ReadError::Verity { block, .. })
                    if block < self.geometry.data_blocks() && self.bytes.distrust(block * BLOCK, BLOCK) => {}
                done => return done,
            }
        }
    }

    fn try_read_blocks(&self, first_block: u64, bytes: &mut [u8]) -> Result<(), ReadError> {
        self.load(first_block, bytes)?;
        let (mut block, mut rest) = (first_block, &*bytes);
        while !rest.is_empty() {
            let hashes = self.hash_block(0, block / FANOUT)?;
            let expected = &hashes[(block % FANOUT) as usize..];
            let count = expected.len().min(rest.len() / BLOCK_BYTES);
            let (now, later) = rest.split_at(count * BLOCK_BYTES);
            self.check(now, block, &expected[..count])?;
            (block, rest) = (block + count as u64, later);
        }
        Ok(())
    }

    /// Reads and verifies every block of data and tree, on up to `threads` threads, and does not stop at
    /// errors.
    ///
    /// Uses 512 KiB per thread. The superblock and the top of the tree were checked at open.
    ///
    /// Errors of single blocks are in the report.
    pub fn verify_all(&self, threads: NonZeroUsize, progress: &Progress) -> Report {
        let task = progress.task("verify", &self.root_hash.to_string(), Some(self.size_bytes()));
        let report = Mutex::new(Report::default());
        let bad = |error| locks::lock(&report).add(error);
        let unknown_blocks = AtomicU64::new(0);

        // The hash blocks above level 0, from the top down. Blocks below a bad one cannot be verified.
        for (level, Level { first_block, blocks }) in self.geometry.levels().iter().enumerate().skip(1).rev()
        {
            for index in 0..*blocks {
                if let Err(error) = self.hash_block(level, index)
                    && place(&error) == first_block + index
                {
                    bad(error);
                }
            }
        }
        // Each block of level 0, then the data below it.
        let pieces = 0..self.geometry.data_blocks().div_ceil(FANOUT);
        let Ok(()) = parallel::for_each(threads, pieces, |index, scratch| {
            let first = index * FANOUT;
            let count = FANOUT.min(self.geometry.data_blocks() - first) as usize;
            scratch.resize(count * BLOCK_BYTES, 0);
            match self.hash_block(0, index) {
                Ok(hashes) => self.verify_piece(first, &hashes[..count], scratch, &bad),
                Err(error) => {
                    unknown_blocks.fetch_add(count as u64, Ordering::Relaxed);
                    let level_0 = self.geometry.levels().first().map(|level| level.first_block + index);
                    if Some(place(&error)) == level_0 {
                        bad(error);
                    }
                }
            }
            task.advance(scratch.len() as u64);
            Ok::<(), Infallible>(())
        });

        let mut report = locks::into_inner(report);
        report.unknown_blocks = unknown_blocks.into_inner();
        sorting::sort_by_key(&mut report.bad, place);
        report
    }

    /// Verifies data blocks and passes each bad one to `bad`. `scratch` has their size.
    fn verify_piece(&self, first: u64, expected: &[[u8; 32]], scratch: &mut [u8], bad: &impl Fn(ReadError)) {
        let report = |error| {
            bad(error);
            Ok(())
        };
        if self.load(first, scratch).is_ok() {
            let _ = self.compare(scratch, first, expected, report);
            return;
        }
        // Part of it cannot be read: find out which blocks.
        for ((block, bytes), expected) in (first..).zip(scratch.chunks_mut(BLOCK_BYTES)).zip(expected) {
            match self.load(block, bytes) {
                Ok(()) => drop(self.compare(bytes, block, std::slice::from_ref(expected), report)),
                Err(error) => bad(error),
            }
        }
    }
}

impl Report {
    fn add(&mut self, error: ReadError) {
        self.bad_count += 1;
        if self.bad.len() < REPORT_MAX {
            self.bad.push(error);
        }
    }
}

/// The block of the file that an error is about.
fn place(error: &ReadError) -> u64 {
    match error {
        ReadError::Verity { block, .. } => *block,
        ReadError::Io { offset, .. } | ReadError::OutOfRange { offset, .. } => offset / BLOCK,
        // Of blobs that are read whole, which this is not.
        ReadError::Length { .. } => 0,
    }
}

/// Makes `scratch` at least `len` bytes long, without memory beyond that.
fn grow(scratch: &mut Vec<u8>, len: usize) {
    if scratch.len() < len {
        scratch.reserve_exact(len - scratch.len());
        scratch.resize(len, 0);
    }
}

impl<R: ReadAt> Source for VerifiedSource<R> {
    fn size_bytes(&self) -> u64 {
        self.geometry.data_bytes()
    }

    fn read<'a>(&'a self, offset: u64, len: usize, scratch: &'a mut Vec<u8>) -> Result<&'a [u8], ReadError> {
        check_range(offset, len as u64, self.size_bytes())?;
        if len == 0 {
            return Ok(&[]);
        }
        let first = offset / BLOCK;
        let bytes = ((offset + len as u64).div_ceil(BLOCK) - first) as usize * BLOCK_BYTES;
        grow(scratch, bytes);
        if let Err(error) = self.read_blocks(first, &mut scratch[..bytes]) {
            // Leave no unverified bytes where a careless caller could use them.
            scratch.clear();
            return Err(error);
        }
        Ok(&scratch[(offset % BLOCK) as usize..][..len])
    }
}

/// An image file that is not verified.
pub struct PlainSource<R = File> {
    bytes: R,
    size_bytes: u64,
}

impl<R: ReadAt> PlainSource<R> {
    /// Reads the file as it is. Only `--unsafe-no-verity` may lead here.
    ///
    /// # Errors
    /// [`ReadError::Io`] if the size of the file cannot be determined.
    pub fn unsafe_no_verity(bytes: R) -> Result<Self, ReadError> {
        let size_bytes = len(&bytes)?;
        Ok(Self { bytes, size_bytes })
    }
}

impl<R: ReadAt> Source for PlainSource<R> {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read<'a>(&'a self, offset: u64, len: usize, scratch: &'a mut Vec<u8>) -> Result<&'a [u8], ReadError> {
        check_range(offset, len as u64, self.size_bytes)?;
        grow(scratch, len);
        read_exact(&self.bytes, offset, &mut scratch[..len])?;
        Ok(&scratch[..len])
    }
}
