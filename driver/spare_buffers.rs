// SPDX-License-Identifier: GPL-2.0

//! Buffers that have had a packet, for the next ones.
//!
//! Memory for new ones would have to be allocated, and wiped where the kernel is told to (`init_on_alloc`, as Debian's is), which
//! takes as long as to copy a packet's payload.

use crate::af_vsock_glue::skb::{wipes_freed_memory, SkBuff, SkBuffQueue};
use kernel::{
    prelude::*,
    sync::{new_spinlock, SpinLock},
};

/// A stack of buffers, the last one that came on top: it may be in a cache yet.
#[pin_data]
pub(crate) struct SpareBuffers<C> {
    #[pin]
    stack: SpinLock<Stack<C>>,
}

struct Stack<C> {
    buffers: SkBuffQueue<C>,
    /// Memory that they take, in bytes.
    size: usize,
    /// How much may be kept, in bytes; the last buffer may take more.
    capacity: usize,
}

impl<C> Stack<C> {
    fn push(&mut self, buffer: SkBuff<C>) {
        self.size += buffer.truesize();
        self.buffers.push_front(buffer);
    }

    fn pop(&mut self) -> Option<SkBuff<C>> {
        let buffer = self.buffers.pop_front()?;
        self.size -= buffer.truesize();
        Some(buffer)
    }
}

impl<C: Unpin> SpareBuffers<C> {
    /// None, and none are kept.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            stack <- new_spinlock!(Stack {
                buffers: SkBuffQueue::new(),
                size: 0,
                capacity: 0,
            }, "virtio_vsock_rs_spare_buffers"),
        })
    }

    /// Lets buffers of so many bytes of memory be kept from now on, and none where memory is to be wiped when nobody needs it.
    pub(crate) fn open(&self, capacity: usize) {
        if !wipes_freed_memory() {
            self.stack.lock().capacity = capacity;
        }
    }

    /// Frees all, and lets none be kept.
    pub(crate) fn close(&self) {
        let buffers = {
            let mut stack = self.stack.lock();
            stack.capacity = 0;
            stack.size = 0;
            stack.buffers.take()
        };
        buffers.consume();
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.stack.lock().buffers.len()
    }

    /// Keeps a buffer, or frees it where there are enough.
    pub(crate) fn put(&self, buffer: SkBuff<C>) {
        let mut stack = self.stack.lock();
        if stack.size < stack.capacity {
            stack.push(buffer);
        } else {
            drop(stack);
            buffer.consume();
        }
    }

    /// Adds buffers to `to` until that has `len`, or none are left.
    pub(crate) fn take(&self, to: &mut SkBuffQueue<C>, len: usize) {
        let mut stack = self.stack.lock();
        while to.len() < len {
            let Some(buffer) = stack.pop() else {
                break;
            };
            to.push_back(buffer);
        }
    }

    /// Takes one out, where there is any.
    pub(crate) fn take_one(&self) -> Option<SkBuff<C>> {
        self.stack.lock().pop()
    }
}
