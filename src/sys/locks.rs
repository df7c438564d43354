//! Locks of this process. A thread that panicked while it held one does not take the others with it: what a lock guards
//! is consistent wherever a statement can panic.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

/// Locks a mutex.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns what a mutex guards, once nobody shares it.
pub fn into_inner<T>(mutex: Mutex<T>) -> T {
    mutex.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Locks for reading.
pub fn read<T: ?Sized>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Locks for writing.
pub fn write<T: ?Sized>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until the condition is notified.
pub fn wait<'a, T>(condition: &Condvar, held: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition.wait(held).unwrap_or_else(PoisonError::into_inner)
}

/// Waits until the condition is notified, at most for `time`. Returns also whether the time is over.
pub fn wait_for<'a, T>(
    condition: &Condvar,
    held: MutexGuard<'a, T>,
    time: Duration,
) -> (MutexGuard<'a, T>, bool) {
    let (held, waited) = condition.wait_timeout(held, time).unwrap_or_else(PoisonError::into_inner);
    (held, waited.timed_out())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_outlives_a_thread_that_panicked_with_it() {
        let (shared, table) = (Mutex::new(1), RwLock::new(1));
        std::thread::scope(|scope| {
            let broken = scope.spawn(|| {
                let _held = (lock(&shared), write(&table));
                panic!("with two locks held");
            });
            assert!(broken.join().is_err());
        });
        *lock(&shared) += 1;
        *write(&table) += 1;
        assert_eq!((into_inner(shared), *read(&table)), (2, 2));
    }
}
