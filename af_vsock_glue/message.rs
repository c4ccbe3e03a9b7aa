// SPDX-License-Identifier: GPL-2.0

//! Messages of sendmsg(2) and recvmsg(2).
//!
//! C header: [`include/linux/socket.h`](srctree/include/linux/socket.h)

use super::{bindings, socket::LockedSocket};
use core::ptr::NonNull;
use kernel::{prelude::*, types::Opaque};

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

    /// The message.
    pub(super) fn as_raw(&mut self) -> *mut bindings::msghdr {
        self.0.get()
    }

    /// Bytes that are left.
    pub(crate) fn remaining(&self) -> usize {
        // SAFETY: By the type invariant.
        unsafe { iter_count(&raw mut (*self.0.get()).msg_iter) }
    }

    /// Where the message is, to come back to.
    pub(crate) fn position(&self) -> Position {
        Position {
            message: self.0.get(),
            remaining: self.remaining(),
        }
    }

    /// Goes back to where the message was. A position of another message is ignored.
    pub(crate) fn rewind(&mut self, position: Position) {
        let advanced = position.remaining.saturating_sub(self.remaining());
        if position.message == self.0.get() && advanced > 0 {
            // SAFETY: The iterator was advanced by so much since, so it can go back by that.
            unsafe { bindings::iov_iter_revert(self.iter(), advanced) };
        }
    }

    fn has_flag(&self, flag: u32) -> bool {
        // SAFETY: By the type invariant.
        unsafe { (*self.0.get()).msg_flags & flag != 0 }
    }

    /// Whether the message ends a record (`MSG_EOR`).
    pub(crate) fn ends_record(&self) -> bool {
        self.has_flag(bindings::MSG_EOR)
    }

    /// Whether the caller wants its own pages to be sent (`MSG_ZEROCOPY`), where that can be.
    pub(crate) fn wants_zero_copy(&self) -> bool {
        self.has_flag(bindings::MSG_ZEROCOPY)
    }

    /// The completion that the caller waits for, where it wants the next `len` bytes to be sent out of its
    /// own pages (`MSG_ZEROCOPY`). ENOMEM where there should be one and cannot be.
    pub(crate) fn zero_copy(
        &mut self,
        socket: &LockedSocket<'_>,
        len: usize,
    ) -> Result<Option<ZeroCopy>> {
        if !self.wants_zero_copy() {
            return Ok(None);
        }
        // SAFETY: By the type invariant.
        if let Some(uarg) = NonNull::new(unsafe { (*self.0.get()).msg_ubuf }) {
            // io_uring brings its own, and keeps it until the call returns.
            return Ok(Some(ZeroCopy {
                uarg,
                is_ours: false,
                is_used: false,
            }));
        }
        if !socket.wants_zero_copy() {
            return Ok(None);
        }
        // SAFETY: The socket is locked, as the function wants it.
        let uarg = unsafe {
            bindings::msg_zerocopy_realloc(socket.as_sock(), len, core::ptr::null_mut(), false)
        };
        Ok(Some(ZeroCopy {
            uarg: NonNull::new(uarg).ok_or(ENOMEM)?,
            is_ours: true,
            is_used: false,
        }))
    }
}

/// A place in a [`MessageSource`].
#[derive(Clone, Copy)]
pub(crate) struct Position {
    message: *mut bindings::msghdr,
    remaining: usize,
}

/// The completion of a send with `MSG_ZEROCOPY`. Each packet of the send holds it, too, until its pages are
/// not needed any more; then the application is told.
///
/// # Invariants
///
/// `uarg` is valid; where `is_ours` this value has a reference to it.
pub(crate) struct ZeroCopy {
    uarg: NonNull<bindings::ubuf_info>,
    is_ours: bool,
    /// Whether a packet holds it.
    is_used: bool,
}

impl ZeroCopy {
    /// The completion, for a packet to hold.
    pub(super) fn attach(&mut self, skb: *mut bindings::sk_buff) {
        self.is_used = true;
        // SAFETY: Both are valid; the function takes a reference for the packet.
        unsafe { bindings::vsock_glue_zcopy_set(skb, self.uarg.as_ptr()) }
    }

    /// Notes that data was copied all the same, which the application is told with the completion.
    pub(crate) fn set_copied(&mut self) {
        if self.is_ours {
            // SAFETY: It was made by `msg_zerocopy_realloc()`.
            unsafe { bindings::vsock_glue_zcopy_set_copied(self.uarg.as_ptr()) }
        }
    }

    /// Says that nothing was sent after all.
    pub(crate) fn set_unused(&mut self) {
        self.is_used = false;
    }
}

impl Drop for ZeroCopy {
    fn drop(&mut self) {
        if self.is_ours {
            // SAFETY: The reference is ours to give away. Where nothing was sent, no completion is due.
            unsafe { bindings::vsock_glue_zcopy_put(self.uarg.as_ptr(), self.is_used) }
        }
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

impl MessageDest {
    /// Bytes of room that are left.
    pub(crate) fn remaining(&self) -> usize {
        // SAFETY: By the type invariant.
        unsafe { iter_count(&raw mut (*self.0.get()).msg_iter) }
    }

    /// Tells the caller that the message ends a record (`MSG_EOR`).
    pub(crate) fn set_ends_record(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { (*self.0.get()).msg_flags |= bindings::MSG_EOR }
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
