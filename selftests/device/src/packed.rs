// SPDX-License-Identifier: GPL-2.0

//! A packed ring (virtio 2.8), of which the vhost-user library only keeps addresses and the place of the next buffer.
//!
//! The device uses each buffer before it takes the next one. So it writes used descriptors where it has read available
//! ones, and one place in the ring is all that it needs to know.

use std::sync::atomic::{fence, Ordering};

use vhost_user_backend::VringT;
use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_WRITE, VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED,
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
    VRING_PACKED_EVENT_F_WRAP_CTR,
};
use virtio_queue::desc::packed::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::ring::{Buffer, Layout, MemoryGuard, RingState, Segment, Vring};

/// Length of a descriptor, and where its last fields are, in bytes.
const DESCRIPTOR_LEN: u64 = 16;
const LEN_AT: u64 = 8;
const ID_AT: u64 = 12;
const FLAGS_AT: u64 = 14;

/// Flags of a descriptor.
const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;

/// Where the flags of an event suppression structure are, in bytes; the place that they are about comes before.
const EVENT_FLAGS_AT: u64 = 2;

/// A place in a ring, with the wrap counter that it is reached with: what the library keeps as the next available index,
/// what event suppression structures have, and QEMU gives and takes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    const WRAP: u16 = 1 << VRING_PACKED_EVENT_F_WRAP_CTR;

    fn from_bits(bits: u16) -> Self {
        Self {
            index: bits & !Self::WRAP,
            wrap: bits & Self::WRAP != 0,
        }
    }

    fn to_bits(self) -> u16 {
        self.index | if self.wrap { Self::WRAP } else { 0 }
    }

    /// The place that is `by` descriptors further on; `by` is at most the ring's size.
    fn advance(self, by: u16, size: u16) -> Self {
        if self.index + by < size {
            Self {
                index: self.index + by,
                wrap: self.wrap,
            }
        } else {
            Self {
                index: self.index + by - size,
                wrap: !self.wrap,
            }
        }
    }

    /// How many descriptors this place is after another, in a ring that is passed twice at most.
    fn distance_from(self, before: Self, size: u16) -> u16 {
        let linear = |place: Self| place.index + if place.wrap { 0 } else { size };
        (linear(self) + 2 * size - linear(before)) % (2 * size)
    }
}

pub(crate) struct PackedRing<'a> {
    vring: &'a Vring,
    state: &'a RingState,
    memory: MemoryGuard,
    size: u16,
    descriptors: GuestAddress,
    /// What the driver says of interrupts.
    driver_event: GuestAddress,
    /// What the device says of notifications.
    device_event: GuestAddress,
    uses_event_idx: bool,
}

impl<'a> PackedRing<'a> {
    pub(crate) fn new(vring: &'a Vring, state: &'a RingState, memory: MemoryGuard) -> Self {
        let vring_state = vring.get_ref();
        let queue: &Queue = vring_state.get_queue();
        Self {
            vring,
            state,
            memory,
            size: queue.size(),
            descriptors: GuestAddress(queue.desc_table()),
            driver_event: GuestAddress(queue.avail_ring()),
            device_event: GuestAddress(queue.used_ring()),
            uses_event_idx: queue.event_idx_enabled(),
        }
    }

    fn place(&self) -> Place {
        Place::from_bits(self.vring.get_ref().get_queue().next_avail())
    }

    fn set_place(&self, place: Place) {
        self.vring
            .get_mut()
            .get_queue_mut()
            .set_next_avail(place.to_bits());
    }

    fn descriptor_at(&self, place: Place) -> GuestAddress {
        self.descriptors
            .unchecked_add(u64::from(place.index) * DESCRIPTOR_LEN)
    }

    /// The descriptor at a place, if it is available there.
    fn available(&self, place: Place) -> Option<Descriptor> {
        let at = self.descriptor_at(place);
        let flags = self
            .memory
            .load::<u16>(at.unchecked_add(FLAGS_AT), Ordering::Acquire)
            .ok()?;
        let flags = u16::from_le(flags);
        let is_available = (flags & AVAIL != 0) == place.wrap && (flags & USED != 0) != place.wrap;
        if !is_available {
            return None;
        }
        self.read_descriptor(at)
    }

    fn read_descriptor(&self, at: GuestAddress) -> Option<Descriptor> {
        self.memory.read_obj::<Descriptor>(at).ok()
    }

    /// The segments of the buffer that a descriptor begins, or goes on with.
    fn add_segments(&self, descriptor: Descriptor, segments: &mut Vec<Segment>) {
        if !descriptor.refers_to_indirect_table() {
            segments.push(segment(descriptor));
            return;
        }
        let entries = u64::from(descriptor.len()) / DESCRIPTOR_LEN;
        let table = (0..entries).map_while(|entry| {
            let at = descriptor.addr().checked_add(entry * DESCRIPTOR_LEN)?;
            self.read_descriptor(at)
        });
        segments.extend(table.map(segment));
    }

    /// Writes a used descriptor, its flags last.
    fn write_used(&self, place: Place, id: u16, len: u32) {
        let at = self.descriptor_at(place);
        let mut flags = if place.wrap { AVAIL | USED } else { 0 };
        if len > 0 {
            flags |= VRING_DESC_F_WRITE as u16;
        }
        self.memory
            .write_obj(len.to_le(), at.unchecked_add(LEN_AT))
            .and_then(|()| self.memory.write_obj(id.to_le(), at.unchecked_add(ID_AT)))
            .and_then(|()| {
                let flags_at = at.unchecked_add(FLAGS_AT);
                self.memory
                    .store(flags.to_le(), flags_at, Ordering::Release)
            })
            .expect("the ring is in the guest's memory");
    }

    fn count_unsignalled(&self, descriptors: u16) {
        let unsignalled = &self.state.unsignalled;
        let before = unsignalled.load(Ordering::Relaxed);
        unsignalled.store(before.saturating_add(descriptors), Ordering::Relaxed);
    }

    fn set_device_event(&self, place: Place, flags: u32) {
        let flags_at = self.device_event.unchecked_add(EVENT_FLAGS_AT);
        self.memory
            .store(
                place.to_bits().to_le(),
                self.device_event,
                Ordering::Relaxed,
            )
            .and_then(|()| {
                self.memory
                    .store((flags as u16).to_le(), flags_at, Ordering::Release)
            })
            .expect("the device's area is in the guest's memory");
    }
}

fn segment(descriptor: Descriptor) -> Segment {
    Segment {
        at: descriptor.addr(),
        len: descriptor.len() as usize,
        is_writable: descriptor.is_write_only(),
    }
}

impl Layout for PackedRing<'_> {
    fn pop(&self) -> Option<Buffer> {
        let begin = self.place();
        let mut descriptor = self.available(begin)?;
        let mut segments = Vec::new();
        let mut descriptors = 1;
        self.add_segments(descriptor, &mut segments);
        // The driver makes the first one available last, so the others are there.
        while descriptor.has_next() && descriptors < self.size {
            descriptor =
                self.read_descriptor(self.descriptor_at(begin.advance(descriptors, self.size)))?;
            self.add_segments(descriptor, &mut segments);
            descriptors += 1;
        }
        self.set_place(begin.advance(descriptors, self.size));
        Some(Buffer {
            id: descriptor.id(),
            descriptors,
            segments,
        })
    }

    fn unpop(&self, buffer: &Buffer) {
        self.set_place(begin_of(buffer, self.place(), self.size));
    }

    fn add_used(&self, buffer: &Buffer, len: u32) {
        let begin = begin_of(buffer, self.place(), self.size);
        self.write_used(begin, buffer.id, len);
        self.count_unsignalled(buffer.descriptors);
    }

    fn used(&self) -> u16 {
        // It is where buffers are taken, too, once those that were taken are used.
        self.place().to_bits()
    }

    fn forge_used(&self, id: u16, len: u32) {
        let place = self.place();
        self.write_used(place, id, len);
        self.set_place(place.advance(1, self.size));
    }

    fn posted(&self) -> u16 {
        let begin = self.place();
        let is_available = |by: &u16| self.available(begin.advance(*by, self.size)).is_some();
        (0..self.size).take_while(is_available).count() as u16
    }

    fn enable_notification(&self) -> bool {
        let place = self.place();
        let flags = if self.uses_event_idx {
            VRING_PACKED_EVENT_FLAG_DESC
        } else {
            VRING_PACKED_EVENT_FLAG_ENABLE
        };
        self.set_device_event(place, flags);
        // The driver makes a buffer available and then reads this; one of both sees the other's.
        fence(Ordering::SeqCst);
        self.available(place).is_some()
    }

    fn disable_notification(&self) {
        self.set_device_event(self.place(), VRING_PACKED_EVENT_FLAG_DISABLE);
    }

    fn needs_notification(&self) -> bool {
        // The used buffers are there for the driver before it is looked at what it wants to know.
        fence(Ordering::SeqCst);
        let used = self.state.unsignalled.swap(0, Ordering::Relaxed);
        let flags_at = self.driver_event.unchecked_add(EVENT_FLAGS_AT);
        let load = |at| {
            self.memory
                .load::<u16>(at, Ordering::Acquire)
                .map_or(VRING_PACKED_EVENT_FLAG_ENABLE as u16, u16::from_le)
        };
        match u32::from(load(flags_at)) {
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC => {
                let wanted = Place::from_bits(load(self.driver_event));
                let since = self.place().distance_from(wanted, self.size);
                (1..=used).contains(&since)
            }
            _ => true,
        }
    }
}

/// Where a buffer begins that ends before a place.
fn begin_of(buffer: &Buffer, end: Place, size: u16) -> Place {
    // Twice around the ring is nowhere at all.
    end.advance(size - buffer.descriptors, size)
        .advance(size, size)
}
