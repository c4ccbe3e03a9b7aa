// SPDX-License-Identifier: GPL-2.0

//! A virtqueue, whatever the layout of its ring: buffers that the driver has made available, and used ones.

use std::sync::atomic::{AtomicU16, Ordering};

use vhost_user_backend::{VringRwLock, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryError, GuestMemoryLoadGuard,
    GuestMemoryMmap,
};

use crate::packed::PackedRing;

pub(crate) type Memory = GuestMemoryAtomic<GuestMemoryMmap<()>>;
pub(crate) type MemoryGuard = GuestMemoryLoadGuard<GuestMemoryMmap<()>>;
pub(crate) type Vring = VringRwLock<Memory>;

/// A part of a buffer in the guest's memory.
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    pub(crate) at: GuestAddress,
    pub(crate) len: usize,
    pub(crate) is_writable: bool,
}

/// A buffer that the driver has made available.
pub(crate) struct Buffer {
    /// What the driver knows it by.
    pub(crate) id: u16,
    /// How many descriptors of the ring it has.
    pub(crate) descriptors: u16,
    pub(crate) segments: Vec<Segment>,
}

impl Buffer {
    /// What the driver has put into it.
    pub(crate) fn read(&self, memory: &MemoryGuard) -> Result<Vec<u8>, GuestMemoryError> {
        let mut bytes = Vec::new();
        for segment in self.segments.iter().filter(|it| !it.is_writable) {
            let before = bytes.len();
            bytes.resize(before + segment.len, 0);
            memory.read_slice(&mut bytes[before..], segment.at)?;
        }
        Ok(bytes)
    }

    fn writable(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|it| it.is_writable)
    }

    /// How many bytes the device can write to it.
    pub(crate) fn room(&self) -> usize {
        self.writable().map(|segment| segment.len).sum()
    }

    /// Writes as much as there is room for, and returns how much that is.
    pub(crate) fn write(
        &self,
        memory: &MemoryGuard,
        bytes: &[u8],
    ) -> Result<u32, GuestMemoryError> {
        let mut written = 0;
        for segment in self.writable() {
            let end = bytes.len().min(written + segment.len);
            memory.write_slice(&bytes[written..end], segment.at)?;
            written = end;
        }
        Ok(written as u32)
    }
}

/// What a device keeps for a ring besides what the vhost-user library does.
#[derive(Default)]
pub(crate) struct RingState {
    /// Of a packed ring: descriptors used since it was last looked at whether the driver wants to know.
    pub(crate) unsignalled: AtomicU16,
}

impl RingState {
    /// The driver begins.
    pub(crate) fn reset(&self) {
        self.unsignalled.store(0, Ordering::Relaxed);
    }
}

/// What both layouts can do.
pub(crate) trait Layout {
    /// Takes the next available buffer. It is used, or given back, before the next one is taken.
    fn pop(&self) -> Option<Buffer>;

    /// Gives a buffer back that was not used.
    fn unpop(&self, buffer: &Buffer);

    /// Makes a buffer a used one, with so many bytes written.
    fn add_used(&self, buffer: &Buffer, len: u32);

    /// The place behind the used buffers, as an update of CIDs has it.
    fn used(&self) -> u16;

    /// Makes the driver see a used buffer that no driver has made available.
    fn forge_used(&self, id: u16, len: u32);

    /// Buffers, or for a packed ring descriptors, that are available and were not taken.
    fn posted(&self) -> u16;

    /// Asks the driver to notify the device of available buffers. Returns whether there are some.
    fn enable_notification(&self) -> bool;

    /// Asks the driver not to notify the device.
    fn disable_notification(&self);

    /// Whether the driver wants to know of what was used since the last call.
    fn needs_notification(&self) -> bool;
}

/// A virtqueue while the device works on it.
pub(crate) struct Ring<'a> {
    vring: &'a Vring,
    layout: Box<dyn Layout + 'a>,
}

impl<'a> Ring<'a> {
    pub(crate) fn new(
        vring: &'a Vring,
        state: &'a RingState,
        memory: MemoryGuard,
        is_packed: bool,
    ) -> Self {
        let layout: Box<dyn Layout> = if is_packed {
            Box::new(PackedRing::new(vring, state, memory))
        } else {
            Box::new(SplitRing { vring, memory })
        };
        Self { vring, layout }
    }

    /// Interrupts the driver.
    pub(crate) fn interrupt(&self) -> std::io::Result<()> {
        self.vring.signal_used_queue()
    }
}

impl<'a> std::ops::Deref for Ring<'a> {
    type Target = dyn Layout + 'a;

    fn deref(&self) -> &Self::Target {
        &*self.layout
    }
}

/// A split ring, which the library knows.
struct SplitRing<'a> {
    vring: &'a Vring,
    memory: MemoryGuard,
}

impl Layout for SplitRing<'_> {
    fn pop(&self) -> Option<Buffer> {
        let mut state = self.vring.get_mut();
        let chain = state
            .get_queue_mut()
            .pop_descriptor_chain(self.memory.clone())?;
        Some(Buffer {
            id: chain.head_index(),
            descriptors: 1,
            segments: chain
                .map(|descriptor| Segment {
                    at: descriptor.addr(),
                    len: descriptor.len() as usize,
                    is_writable: descriptor.is_write_only(),
                })
                .collect(),
        })
    }

    fn unpop(&self, _buffer: &Buffer) {
        self.vring
            .get_mut()
            .get_queue_mut()
            .go_to_previous_position();
    }

    fn add_used(&self, buffer: &Buffer, len: u32) {
        // It fails for a ring that is not in the guest's memory, and then the driver does not learn of it.
        let _ = self.vring.add_used(buffer.id, len);
    }

    fn used(&self) -> u16 {
        self.vring.get_ref().get_queue().next_used()
    }

    fn forge_used(&self, id: u16, len: u32) {
        // The library would refuse it.
        let mut state = self.vring.get_mut();
        let queue = state.get_queue_mut();
        let used_ring = GuestAddress(queue.used_ring());
        let next = queue.next_used();
        // After the ring's flags and index, 4 bytes, come entries of 8.
        let entry = used_ring.unchecked_add(4 + u64::from(next % queue.size()) * 8);
        let next = next.wrapping_add(1);
        self.memory
            .write_obj((u64::from(id) | (u64::from(len) << 32)).to_le(), entry)
            .and_then(|()| {
                self.memory
                    .store(next.to_le(), used_ring.unchecked_add(2), Ordering::Release)
            })
            .expect("the used ring is in the guest's memory");
        queue.set_next_used(next);
    }

    fn posted(&self) -> u16 {
        let state = self.vring.get_ref();
        let queue = state.get_queue();
        queue
            .avail_idx(&*self.memory, Ordering::Acquire)
            .map_or(0, |avail| avail.0.wrapping_sub(queue.next_avail()))
    }

    fn enable_notification(&self) -> bool {
        self.vring.enable_notification().unwrap_or(false)
    }

    fn disable_notification(&self) {
        // It is a hint.
        let _ = self.vring.disable_notification();
    }

    fn needs_notification(&self) -> bool {
        self.vring.needs_notification().unwrap_or(true)
    }
}
