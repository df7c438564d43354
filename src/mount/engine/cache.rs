//! The bounded cache of decoded blocks.
//!
//! The cache has two shares, each bounded in bytes: data blocks, and shared blocks (fragments). Many small
//! files need the latter, and a stream of data must not evict them. A share is split into shards by key. A
//! shard holds blocks in clock order: when it is full, blocks are evicted from the front, and a block used
//! since the last pass moves to the back for a second round.
//!
//! # Joining
//! A block that is being decoded is in its shard as `Decoding`. Other threads that need it wait for that one
//! decode and share its result, including a failure.
//!
//! # Locks
//! One mutex per shard, held for a look-up only, never while decoding. A decode in flight has its own mutex
//! and condition variable, taken without the shard's. The pool of spare buffers has one, a leaf.

use std::collections::VecDeque;
use std::collections::hash_map::{Entry, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use super::EngineError;
use crate::image::bytes::may_wait;
use crate::image::layer::BlockId;
use crate::sys::locks;

/// Which part of the cache a block belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// Blocks of one file.
    Data,
    /// Blocks that several files share (squashfs fragments).
    Shared,
}

/// The decoded bytes of a block. Its memory returns to the pool when the last user drops it.
pub struct Block {
    bytes: Vec<u8>,
    pool: Arc<Pool>,
}

impl Block {
    /// The decoded bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.give(std::mem::take(&mut self.bytes));
    }
}

/// Buffers for reuse: the first touch of a page costs more than decoding into it. The oldest one comes first.
struct Pool {
    spare: Mutex<Vec<Vec<u8>>>,
    most: usize,
}

impl Pool {
    /// Returns a buffer for `len` bytes. None that is much larger: where blocks differ in size, as chunks of PuzzleFS do,
    /// each buffer would grow to the largest in time, and stay so in the cache.
    fn take(&self, len: usize) -> Vec<u8> {
        let mut spare = locks::lock(&self.spare);
        let fits = |buffer: &Vec<u8>| (len..=len.saturating_mul(2)).contains(&buffer.capacity());
        spare.iter().rposition(fits).map(|at| spare.remove(at)).unwrap_or_default()
    }

    fn give(&self, buffer: Vec<u8>) {
        let mut spare = locks::lock(&self.spare);
        if buffer.capacity() > 0 {
            let oldest = (spare.len() >= self.most).then(|| spare.remove(0));
            spare.push(buffer);
            drop(spare);
            drop(oldest);
        }
    }
}

type Key = (usize, BlockId);
type Outcome = Result<Arc<Block>, EngineError>;

/// A decode in flight.
#[derive(Default)]
struct PendingDecode {
    /// Whether the thread that decodes may wait for another machine.
    may_wait: bool,
    outcome: Mutex<Option<Outcome>>,
    landed: Condvar,
}

enum Slot {
    Decoding(Arc<PendingDecode>),
    Ready { block: Arc<Block>, used: AtomicBool },
}

#[derive(Default)]
struct Shard {
    slots: HashMap<Key, Slot>,
    /// The ready blocks, in clock order.
    clock: VecDeque<Key>,
    /// The memory of the ready blocks, in bytes.
    bytes: usize,
}

/// A bounded cache of decoded blocks. See the module documentation.
pub struct BlockCache {
    data: Box<[Mutex<Shard>]>,
    shared: Box<[Mutex<Shard>]>,
    /// The bounds of one shard, in bytes.
    data_bytes: usize,
    shared_bytes: usize,
    pool: Arc<Pool>,
}

/// A shard holds at least this many blocks.
const BLOCKS_A_SHARD: usize = 16;
/// More shards than concurrent threads bring no benefit.
const MOST_SHARDS: usize = 16;
/// How many spare buffers the pool keeps: one per thread that may be decoding.
const SPARE_BUFFERS: usize = 4;

impl BlockCache {
    /// Creates a cache of at most `bytes` bytes of memory for blocks of up to `block_bytes`.
    ///
    /// Two thirds are for shared blocks, which many small files need. Each share keeps at least two blocks,
    /// even if `bytes` allows fewer.
    pub fn new(bytes: usize, block_bytes: usize) -> Self {
        let block_bytes = block_bytes.max(4096);
        let least = block_bytes.saturating_mul(2);
        let shared = (bytes / 3 * 2).max(least);
        let data = bytes.saturating_sub(shared).max(least);
        let shards = |total: usize| {
            let count = (total / block_bytes / BLOCKS_A_SHARD).clamp(1, MOST_SHARDS);
            let all: Box<[Mutex<Shard>]> = (0..count).map(|_| Mutex::default()).collect();
            (all, total / count)
        };
        let (data, data_bytes) = shards(data);
        let (shared, shared_bytes) = shards(shared);
        let pool = Arc::new(Pool { spare: Mutex::default(), most: SPARE_BUFFERS });
        Self { data, shared, data_bytes, shared_bytes, pool }
    }

    /// Returns the block if it is cached and decoded.
    pub fn get(&self, share: Share, layer: usize, id: BlockId) -> Option<Arc<Block>> {
        match locks::lock(self.shard(share, layer, id).0).slots.get(&(layer, id)) {
            Some(Slot::Ready { block, used }) => {
                used.store(true, Ordering::Relaxed);
                Some(block.clone())
            }
            _ => None,
        }
    }

    /// Returns the block; `decode` fills it in if it is not cached. Of several concurrent callers only one
    /// decodes, and the others wait for it; a thread that may not wait for another machine
    /// ([`without_waiting`](crate::image::bytes::without_waiting)) does not wait for one that may.
    pub fn get_or_decode(
        &self,
        share: Share,
        layer: usize,
        id: BlockId,
        decode: impl FnOnce(&mut Vec<u8>) -> Result<(), EngineError>,
    ) -> Outcome {
        let (shard, most) = self.shard(share, layer, id);
        let key = (layer, id);
        loop {
            let flight = match locks::lock(shard).slots.entry(key) {
                Entry::Occupied(slot) => match slot.get() {
                    Slot::Ready { block, used } => {
                        used.store(true, Ordering::Relaxed);
                        return Ok(block.clone());
                    }
                    Slot::Decoding(flight) => flight.clone(),
                },
                Entry::Vacant(slot) => {
                    slot.insert(Slot::Decoding(Arc::new(PendingDecode {
                        may_wait: may_wait(),
                        ..PendingDecode::default()
                    })));
                    break;
                }
            };
            if flight.may_wait && !may_wait() {
                return Err(EngineError::NotHere);
            }
            match flight.wait() {
                // The one that decoded may not wait, and this one may.
                Err(EngineError::NotHere) if may_wait() => {}
                outcome => return outcome,
            }
        }
        // Lands the flight even if `decode` panics, so that no thread waits forever.
        let mut landing = DecodeGuard { shard, most, key, outcome: Err(EngineError::Io) };
        let mut bytes = self.pool.take(id.decoded_max as usize);
        match decode(&mut bytes) {
            Ok(()) => landing.outcome = Ok(Arc::new(Block { bytes, pool: self.pool.clone() })),
            Err(error) => {
                self.pool.give(bytes);
                landing.outcome = Err(error);
            }
        }
        landing.outcome.clone()
    }

    /// Returns how many bytes of memory the cached blocks take.
    #[cfg(test)]
    fn held_bytes(&self) -> usize {
        self.data.iter().chain(&self.shared).map(|shard| locks::lock(shard).bytes).sum()
    }

    fn shard(&self, share: Share, layer: usize, id: BlockId) -> (&Mutex<Shard>, usize) {
        let (shards, most) = match share {
            Share::Data => (&self.data, self.data_bytes),
            Share::Shared => (&self.shared, self.shared_bytes),
        };
        // Fibonacci hashing: neighbouring blocks go to different shards.
        let hash = (id.start ^ (layer as u64) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        (&shards[hash as usize % shards.len()], most)
    }
}

impl PendingDecode {
    fn wait(&self) -> Outcome {
        let mut outcome = locks::lock(&self.outcome);
        loop {
            match &*outcome {
                Some(known) => return known.clone(),
                None => outcome = locks::wait(&self.landed, outcome),
            }
        }
    }
}

/// Stores the result of a decode in its shard and wakes the threads that wait for it.
struct DecodeGuard<'a> {
    shard: &'a Mutex<Shard>,
    most: usize,
    key: Key,
    outcome: Outcome,
}

impl Drop for DecodeGuard<'_> {
    fn drop(&mut self) {
        let mut leaving = Vec::new();
        let mut shard = locks::lock(self.shard);
        let was = match &self.outcome {
            Ok(block) => {
                let slot = Slot::Ready { block: block.clone(), used: AtomicBool::new(false) };
                shard.bytes += block.bytes.capacity();
                shard.clock.push_back(self.key);
                shard.slots.insert(self.key, slot)
            }
            Err(_) => shard.slots.remove(&self.key),
        };
        shard.shrink(self.most, &mut leaving);
        drop(shard);
        if let Some(Slot::Decoding(flight)) = was {
            *locks::lock(&flight.outcome) = Some(self.outcome.clone());
            flight.landed.notify_all();
        }
    }
}

impl Shard {
    /// Evicts blocks until at most `most` bytes are held; they are dropped outside the lock.
    fn shrink(&mut self, most: usize, leaving: &mut Vec<Arc<Block>>) {
        // Each block gets at most one second round, so twice the length is enough.
        let mut rounds = self.clock.len() * 2;
        while self.bytes > most && rounds > 0 {
            rounds -= 1;
            let Some(key) = self.clock.pop_front() else { break };
            if let Some(Slot::Ready { used, .. }) = self.slots.get(&key)
                && used.swap(false, Ordering::Relaxed)
            {
                self.clock.push_back(key);
                continue;
            }
            if let Some(Slot::Ready { block, .. }) = self.slots.remove(&key) {
                self.bytes = self.bytes.saturating_sub(block.bytes.capacity());
                leaving.push(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    fn id(start: u64) -> BlockId {
        BlockId { start, size_word: 1, decoded_max: 4096 }
    }

    #[test]
    fn a_thread_that_may_not_wait_does_not_wait_for_one_that_may() {
        use crate::image::bytes::without_waiting;
        let cache = BlockCache::new(1 << 20, 4096);
        let (begun, done) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let block = cache.get_or_decode(Share::Data, 0, id(1), |out| {
                    begun.wait();
                    done.wait();
                    fill(1)(out)
                });
                assert!(block.is_ok());
            });
            begun.wait();
            let outcome = without_waiting(|| cache.get_or_decode(Share::Data, 0, id(1), fill(2)));
            assert_eq!(outcome.err(), Some(EngineError::NotHere));
            done.wait();
        });
        // The other way round: who may wait decodes by itself what another could not.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let outcome = without_waiting(|| {
                    cache.get_or_decode(Share::Data, 0, id(2), |_| {
                        begun.wait();
                        Err(EngineError::NotHere)
                    })
                });
                assert_eq!(outcome.err(), Some(EngineError::NotHere));
            });
            begun.wait();
            assert_eq!(cache.get_or_decode(Share::Data, 0, id(2), fill(3)).unwrap().bytes(), [3; 4096]);
        });
    }

    #[test]
    fn blocks_of_all_sizes_take_no_more_memory_than_they_may() {
        let cache = BlockCache::new(6 << 20, 256 << 10);
        let sizes = (0..2000u64).map(|number| (number, 16 << 10 << (number * 7 % 5)));
        for (start, decoded_max) in sizes {
            let id = BlockId { start, size_word: 0, decoded_max };
            let share = if start % 3 == 0 { Share::Data } else { Share::Shared };
            let block = cache.get_or_decode(share, 0, id, |out| {
                out.clear();
                out.reserve_exact(decoded_max as usize);
                out.resize(decoded_max as usize, 1);
                Ok(())
            });
            let block = block.unwrap();
            assert!(block.bytes.capacity() <= 2 * block.bytes.len());
        }
        let shards = cache.data.iter().chain(&cache.shared);
        let memory = |shard: &Mutex<Shard>| -> usize {
            let ready = |slot: &Slot| match slot {
                Slot::Ready { block, .. } => block.bytes.capacity(),
                Slot::Decoding(_) => 0,
            };
            locks::lock(shard).slots.values().map(ready).sum()
        };
        let held: usize = shards.map(memory).sum();
        assert_eq!(held, cache.held_bytes());
        assert!((4 << 20..=6 << 20).contains(&held), "{held} bytes");
    }

    fn fill(value: u8) -> impl FnOnce(&mut Vec<u8>) -> Result<(), EngineError> {
        move |out| {
            out.clear();
            out.resize(4096, value);
            Ok(())
        }
    }

    #[test]
    fn the_bound_holds_and_used_blocks_stay_longer() {
        let cache = BlockCache::new(6 * 4096, 4096);
        for start in 0..100 {
            cache.get_or_decode(Share::Shared, 0, id(start), fill(start as u8)).unwrap();
            assert!(cache.get(Share::Shared, 0, id(0)).is_some(), "block 0 is used all the time");
            assert!(cache.held_bytes() <= 6 * 4096);
        }
        assert!(cache.get(Share::Shared, 0, id(1)).is_none());
        assert!(cache.get(Share::Data, 0, id(0)).is_none(), "shares are apart");
        assert!(cache.get(Share::Shared, 1, id(0)).is_none(), "layers are apart");
    }

    #[test]
    fn askers_join_one_decode() {
        let cache = BlockCache::new(1 << 20, 4096);
        let decodes = AtomicUsize::new(0);
        let gate = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    gate.wait();
                    let block = cache.get_or_decode(Share::Data, 3, id(7), |out| {
                        decodes.fetch_add(1, Ordering::SeqCst);
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        fill(9)(out)
                    });
                    assert_eq!(block.unwrap().bytes(), [9; 4096]);
                });
            }
        });
        assert_eq!(decodes.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_failure_is_not_kept() {
        let cache = BlockCache::new(1 << 20, 4096);
        let outcome = cache.get_or_decode(Share::Data, 0, id(1), |_| Err(EngineError::Io));
        assert_eq!(outcome.err(), Some(EngineError::Io));
        assert!(cache.get_or_decode(Share::Data, 0, id(1), fill(1)).is_ok());
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = cache.get_or_decode(Share::Data, 0, id(2), |_| panic!("a decoder's bug"));
        }));
        assert!(panicked.is_err());
        assert!(cache.get_or_decode(Share::Data, 0, id(2), fill(2)).is_ok());
    }

    #[test]
    fn buffers_are_used_again() {
        let cache = BlockCache::new(4096, 4096);
        for start in 0..1000 {
            cache.get_or_decode(Share::Data, 0, id(start), fill(0)).unwrap();
        }
        assert!(locks::lock(&cache.pool.spare).len() <= SPARE_BUFFERS);
        assert!(!locks::lock(&cache.pool.spare).is_empty());
    }
}
