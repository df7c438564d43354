//! Several transfers at a time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::sys::locks;

/// How many blobs are transferred at a time.
const AT_ONCE: usize = 4;

/// Does `work` for each item, four at a time, in no order.
///
/// # Errors
/// The first error; what was begun is finished or fails by itself, nothing further is begun.
pub fn for_each<T: Sync, E: Send>(items: &[T], work: impl Fn(&T) -> Result<(), E> + Sync) -> Result<(), E> {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
    let failure = || locks::lock(&failed);
    let worker = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            if failure().is_some() {
                return;
            }
            if let Err(error) = work(item) {
                failure().get_or_insert(error);
                return;
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..AT_ONCE.min(items.len()) {
            scope.spawn(worker);
        }
        worker();
    });
    let failed = failure().take();
    failed.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_item_once_and_nothing_after_an_error() {
        let done = Mutex::new(Vec::new());
        let note = |item: &u32| -> Result<(), u32> {
            done.lock().unwrap().push(*item);
            if *item == 5 { Err(*item) } else { Ok(()) }
        };
        assert_eq!(for_each(&[1, 2, 3, 4], note), Ok(()));
        let mut found = std::mem::take(&mut *done.lock().unwrap());
        found.sort_unstable();
        assert_eq!(found, [1, 2, 3, 4]);
        let many: Vec<u32> = (0..1000).collect();
        assert_eq!(for_each(&many, note), Err(5));
        assert!(done.lock().unwrap().len() < 1000);
        assert_eq!(for_each(&[], note), Ok(()));
    }
}
