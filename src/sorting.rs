//! Sorted lists and maps, by code that is compiled once.
//!
//! The sort of the standard library is compiled anew for each type and each order: some 5 KB of program for each of the
//! fifty lists that a command sorts once. Here the numbers of the elements are sorted, by one function for all lists,
//! and then the elements are swapped into their places. Where a list is long and time counts, the standard library's is
//! better.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

/// Sorts a list. Equal elements keep their order.
pub fn sort<T: Ord>(list: &mut [T]) {
    sort_by(list, T::cmp);
}

/// Sorts a list by a key. Elements with equal keys keep their order.
pub fn sort_by_key<T, K: Ord>(list: &mut [T], key: impl Fn(&T) -> K) {
    sort_by(list, |one, other| key(one).cmp(&key(other)));
}

/// Sorts a list by an order. Elements that are equal in it keep their order.
pub fn sort_by<T>(list: &mut [T], order: impl Fn(&T, &T) -> Ordering) {
    let swaps = swaps(list.len(), &|one, other| order(&list[one], &list[other]));
    for (one, other) in swaps {
        list.swap(one, other);
    }
}

/// Collects a map. Of several values of a key, the last one stays.
pub fn map<K: Ord, V>(entries: impl IntoIterator<Item = (K, V)>) -> BTreeMap<K, V> {
    // `collect` sorts first.
    let mut map = BTreeMap::new();
    map.extend(entries);
    map
}

/// Collects a set.
pub fn set<T: Ord>(elements: impl IntoIterator<Item = T>) -> BTreeSet<T> {
    let mut set = BTreeSet::new();
    set.extend(elements);
    set
}

/// The swaps, in order, that sort so many elements.
fn swaps(len: usize, order: &dyn Fn(usize, usize) -> Ordering) -> Vec<(usize, usize)> {
    let mut sorted: Vec<usize> = (0..len).collect();
    sorted.sort_by(|one, other| order(*one, *other));
    let mut swaps = Vec::new();
    // `sorted` is a permutation: along each of its cycles, a place gets its element, and then that element's place.
    for start in 0..len {
        let mut place = start;
        while sorted[place] != start {
            let from = std::mem::replace(&mut sorted[place], place);
            swaps.push((place, from));
            place = from;
        }
        sorted[place] = place;
    }
    swaps
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn lists_are_sorted_as_the_standard_library_does(list in prop::collection::vec((0_u8..8, any::<u8>()), 0..100)) {
            let mut ours = list.clone();
            let mut std = list.clone();
            sort(&mut ours);
            std.sort();
            prop_assert_eq!(&ours, &std);

            // Elements with the same key keep their order.
            ours.clone_from(&list);
            std.clone_from(&list);
            sort_by_key(&mut ours, |one| std::cmp::Reverse(one.0));
            std.sort_by_key(|one| std::cmp::Reverse(one.0));
            prop_assert_eq!(&ours, &std);

            prop_assert_eq!(map(list.iter().copied()), list.iter().copied().collect());
            prop_assert_eq!(set(list.iter().copied()), list.into_iter().collect());
        }
    }
}
