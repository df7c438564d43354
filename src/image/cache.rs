//! A bounded cache of small pieces of an image, by a number: decoded metadata.
//!
//! Each set has its own lock, held for a look-up only. Two threads that miss the same piece at the same time
//! both make it, which takes less time than waking a waiting thread.

use std::sync::Mutex;

use crate::sys::locks;

/// Number of pieces in a set of the cache. Their keys fit in four cache lines.
pub(super) const WAYS: usize = 32;

/// A set of the cache: at most [`WAYS`] pieces, replaced by the clock algorithm.
struct Set<V> {
    keys: Vec<u64>,
    values: Vec<V>,
    /// Bit N: piece N was used since the clock hand last passed.
    used: u32,
    hand: usize,
}

impl<V> Default for Set<V> {
    fn default() -> Self {
        Set { keys: Vec::new(), values: Vec::new(), used: 0, hand: 0 }
    }
}

/// The cache. A piece is cheap to clone, such as an `Arc`.
pub(super) struct Cache<V> {
    sets: Box<[Mutex<Set<V>>]>,
}

impl<V: Clone> Cache<V> {
    /// Creates a cache of at most about `bytes` bytes of pieces of up to `piece_bytes` each (and at least
    /// one set).
    pub(super) fn new(bytes: usize, piece_bytes: usize) -> Self {
        let sets = (bytes / (piece_bytes * WAYS)).max(1);
        Cache { sets: (0..sets).map(|_| Mutex::default()).collect() }
    }

    fn set(&self, key: u64) -> &Mutex<Set<V>> {
        // Fibonacci hashing: the high bits of the product depend on all bits of the key.
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        &self.sets[(hash as usize) % self.sets.len()]
    }

    /// Returns the piece with that number, if it is cached.
    pub(super) fn get(&self, key: u64) -> Option<V> {
        let mut set = locks::lock(self.set(key));
        let way = set.keys.iter().position(|&held| held == key)?;
        set.used |= 1 << way;
        set.values.get(way).cloned()
    }

    /// Adds a piece. One with that number that is cached already stays.
    pub(super) fn put(&self, key: u64, value: V) {
        let mut set = locks::lock(self.set(key));
        let set = &mut *set;
        if set.keys.contains(&key) {
            return;
        }
        if set.keys.len() < WAYS {
            set.keys.push(key);
            set.values.push(value);
            return;
        }
        while set.used & (1 << set.hand) != 0 {
            set.used &= !(1 << set.hand);
            set.hand = (set.hand + 1) % WAYS;
        }
        set.keys[set.hand] = key;
        set.values[set.hand] = value;
        set.hand = (set.hand + 1) % WAYS;
    }

    /// Returns the sum of a size over the pieces in the cache.
    pub(super) fn sum(&self, size: impl Fn(&V) -> usize) -> usize {
        self.sets.iter().map(|set| locks::lock(set).values.iter().map(&size).sum::<usize>()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_is_bounded_and_finds_what_it_holds() {
        let cache = Cache::new(1 << 20, 8192);
        for at in 0..10_000u64 {
            cache.put(at * 777, at);
            assert_eq!(cache.get(at * 777), Some(at));
        }
        let held = cache.sum(|_| 8192);
        assert!(held <= 1 << 20, "{held} bytes");
        assert!(held > 900 << 10, "{held} bytes");
    }

    #[test]
    fn a_used_piece_outlives_unused_ones() {
        let cache = Cache::new(0, 8192);
        cache.put(1, 1);
        for at in 2..500 {
            cache.put(at, 0);
            assert!(cache.get(1).is_some(), "lost after {at}");
        }
        assert!(cache.get(2).is_none());
    }
}
