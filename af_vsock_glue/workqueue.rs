// SPDX-License-Identifier: GPL-2.0

//! A workqueue of one's own.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use super::bindings;
use core::{ops::Deref, ptr::NonNull};
use kernel::{prelude::*, sync::Arc, workqueue::Queue};

/// When the work of a queue gets the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    /// At once, as other network devices have it in softirqs (`WQ_HIGHPRI`).
    BeforePrograms,
    /// When it is its turn, like a program.
    AsPrograms,
}

/// An owned workqueue. The last reference may not be dropped by work of its own: see [`Drained`].
///
/// # Invariants
///
/// The pointer is a workqueue that only this value destroys.
pub(crate) struct OwnedQueue(NonNull<bindings::workqueue_struct>);

// SAFETY: A workqueue may be used and destroyed by any thread.
unsafe impl Send for OwnedQueue {}
// SAFETY: Its functions synchronise by themselves.
unsafe impl Sync for OwnedQueue {}

impl OwnedQueue {
    /// Makes a workqueue that runs work on the CPU which queued it.
    pub(crate) fn new(name: &CStr, priority: Priority) -> Result<Arc<Self>> {
        let is_high = priority == Priority::BeforePrograms;
        // SAFETY: `name` is a C string, which the function copies.
        let queue = unsafe { bindings::vsock_glue_alloc_workqueue(name.as_char_ptr(), is_high) };
        // INVARIANT: It was made here.
        let queue = NonNull::new(queue).map(Self).ok_or(ENOMEM)?;
        Ok(Arc::new(queue, GFP_KERNEL)?)
    }

    /// The C workqueue.
    pub(super) fn as_raw(&self) -> *mut bindings::workqueue_struct {
        self.0.as_ptr()
    }
}

impl Deref for OwnedQueue {
    type Target = Queue;

    fn deref(&self) -> &Queue {
        // SAFETY: By the type invariant the workqueue lives as long as `self`.
        unsafe { Queue::from_raw(self.0.as_ptr().cast_const().cast()) }
    }
}

impl Drop for OwnedQueue {
    fn drop(&mut self) {
        // SAFETY: By the type invariant nobody else destroys it.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) }
    }
}

/// A reference to a workqueue that, when it is dropped, waits until the queue has no work left.
///
/// A module keeps one and drops it last: then no work outlives it, whoever else refers to the queue.
pub(crate) struct Drained(Arc<OwnedQueue>);

impl Drained {
    /// Waits for the work of `queue` when it is dropped.
    pub(crate) fn new(queue: Arc<OwnedQueue>) -> Self {
        Self(queue)
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        // SAFETY: The queue is valid, and this is no work of its own.
        unsafe { bindings::drain_workqueue(self.0.as_raw()) }
    }
}

/// Whether a message that a device can provoke may be logged now.
pub(crate) fn may_log() -> bool {
    // SAFETY: No preconditions.
    unsafe { bindings::vsock_glue_ratelimit() }
}

/// Gives way to other tasks where that is due. For long loops in process context.
pub(crate) fn cond_resched() {
    // SAFETY: The callers are in process context (it warns where they are not).
    unsafe { bindings::vsock_glue_cond_resched() }
}

/// Whether the current task goes before all programs that are not realtime. Callable in any context.
pub(crate) fn current_is_realtime() -> bool {
    // SAFETY: No preconditions.
    unsafe { bindings::vsock_glue_current_is_realtime() }
}

/// The time, in jiffies; it wraps. Callable in any context.
pub(crate) fn jiffies() -> usize {
    // SAFETY: No preconditions.
    unsafe { bindings::vsock_glue_jiffies() }
}
