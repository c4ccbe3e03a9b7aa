// SPDX-License-Identifier: GPL-2.0

//! The kernel's sort, which takes n log n steps for every input and has no panic path.
//!
//! C header: [`include/linux/sort.h`](srctree/include/linux/sort.h)

use super::bindings;
use core::cmp::Ordering;
use kernel::ffi::{c_int, c_void};

/// Sorts `items` by what `key` makes of them. Equal ones come in any order. Sleeps.
pub(crate) fn sort_by_key<T: Copy, K: Ord>(items: &mut [T], key: fn(&T) -> K) {
    let key_pointer: *const fn(&T) -> K = &key;
    // SAFETY: The slice has so many items of that size, which may be moved; the function is given with items of the
    // slice and the key.
    unsafe {
        bindings::sort_r_nonatomic(
            items.as_mut_ptr().cast(),
            items.len(),
            size_of::<T>(),
            Some(compare::<T, K>),
            None,
            key_pointer.cast(),
        )
    }
}

/// # Safety
///
/// `left` and `right` point to a `T`, `key` to a function.
unsafe extern "C" fn compare<T, K: Ord>(
    left: *const c_void,
    right: *const c_void,
    key: *const c_void,
) -> c_int {
    // SAFETY: As the caller promises.
    let (left, right, key) = unsafe {
        (
            &*left.cast::<T>(),
            &*right.cast::<T>(),
            *key.cast::<fn(&T) -> K>(),
        )
    };
    match key(left).cmp(&key(right)) {
        Ordering::Less => -1,
        Ordering::Equal => 0,
        Ordering::Greater => 1,
    }
}
