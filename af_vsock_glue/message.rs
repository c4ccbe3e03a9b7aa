// SPDX-License-Identifier: GPL-2.0

//! Messages of sendmsg(2) and recvmsg(2).
//!
//! C header: [`include/linux/socket.h`](srctree/include/linux/socket.h)

use super::bindings;
use kernel::types::Opaque;

/// A message that a caller sends: a source of bytes.
///
/// # Invariants
///
/// A valid `struct msghdr` whose iterator can be read from.
#[repr(transparent)]
pub(crate) struct MessageSource(Opaque<bindings::msghdr>);

impl MessageSource {
    /// Makes a reference out of the core's pointer.
    ///
    /// # Safety
    ///
    /// `ptr` is valid, used by nobody else for `'a`, and its iterator is a source.
    pub(super) unsafe fn from_raw<'a>(ptr: *mut bindings::msghdr) -> &'a mut Self {
        // SAFETY: As the caller promises; the type is transparent.
        unsafe { &mut *ptr.cast() }
    }

    /// The iterator.
    pub(super) fn iter(&mut self) -> *mut bindings::iov_iter {
        // SAFETY: By the type invariant.
        unsafe { &raw mut (*self.0.get()).msg_iter }
    }
}

/// A message that a caller receives: room for bytes.
///
/// # Invariants
///
/// A valid `struct msghdr` whose iterator can be written to.
#[repr(transparent)]
pub(crate) struct MessageDest(Opaque<bindings::msghdr>);

impl MessageDest {
    /// Makes a reference out of the core's pointer.
    ///
    /// # Safety
    ///
    /// `ptr` is valid, used by nobody else for `'a`, and its iterator is a destination.
    pub(super) unsafe fn from_raw<'a>(ptr: *mut bindings::msghdr) -> &'a mut Self {
        // SAFETY: As the caller promises; the type is transparent.
        unsafe { &mut *ptr.cast() }
    }

    /// The iterator.
    pub(super) fn iter(&mut self) -> *mut bindings::iov_iter {
        // SAFETY: By the type invariant.
        unsafe { &raw mut (*self.0.get()).msg_iter }
    }
}

/// Bytes that are left in an iterator.
///
/// # Safety
///
/// `iter` is valid.
pub(super) unsafe fn iter_count(iter: *mut bindings::iov_iter) -> usize {
    // SAFETY: The iterator is valid, and `count` is set in every kind of it.
    unsafe { (*iter).__bindgen_anon_1.__bindgen_anon_1.as_ref().count }
}
