//! Runs a loop over many pieces on several threads.

use std::num::NonZeroUsize;
use std::sync::Mutex;

use crate::sys::locks;

/// Calls `work` for each item, on up to `threads` threads (including this one), with memory that the thread
/// keeps between items.
///
/// The lock around `items` is held only while the next one is taken.
///
/// # Errors
/// One of the errors that `work` returned. After an error no thread begins another item.
pub(crate) fn for_each<T: Send, E: Send>(
    threads: NonZeroUsize,
    items: impl Iterator<Item = T> + Send,
    work: impl Fn(T, &mut Vec<u8>) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let queue = Mutex::new(Some(items));
    let next = || locks::lock(&queue).as_mut().and_then(Iterator::next);
    let run = || {
        let mut scratch = Vec::new();
        while let Some(item) = next() {
            if let Err(error) = work(item, &mut scratch) {
                *locks::lock(&queue) = None;
                return Err(error);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        // A thread that cannot be started is not an error: the others do its part.
        let helpers: Vec<_> = (1..threads.get())
            .map_while(|_| std::thread::Builder::new().spawn_scoped(scope, run).ok())
            .collect();
        let mut result = run();
        for helper in helpers {
            match helper.join() {
                Ok(other) => result = result.and(other),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        result
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn all_items_once_or_the_error() {
        for threads in [1, 2, 5].map(|n| NonZeroUsize::new(n).unwrap()) {
            let sum = AtomicU32::new(0);
            let add = |item, _: &mut Vec<u8>| {
                sum.fetch_add(item, Ordering::Relaxed);
                Ok::<(), ()>(())
            };
            for_each(threads, 1..=1000, add).unwrap();
            assert_eq!(sum.into_inner(), 500_500);
            let stopped = for_each(threads, 0.., |item, _| if item == 20 { Err(item) } else { Ok(()) });
            assert_eq!(stopped, Err(20));
        }
    }
}
