// SPDX-License-Identifier: GPL-2.0

//! How far a virtqueue is, as an update of CIDs says it (Documentation/checkpoint.md).

/// The bit of the wrap counter in a place of a packed ring (virtio 2.8.14).
const WRAP: u16 = 1 << 15;

/// The place in a virtqueue behind the buffers that were used. Each of them has one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedPlace {
    /// As it is on the wire.
    value: u16,
    /// How many descriptors the ring has, where it is a packed one.
    packed_size: Option<u32>,
}

impl UsedPlace {
    /// The place before the first buffer: of a packed ring with so many descriptors, or else of a split ring.
    pub fn first(packed_size: Option<u32>) -> Self {
        Self {
            // The wrap counters of packed rings begin as 1.
            value: packed_size.map_or(0, |_| WRAP),
            packed_size,
        }
    }

    /// Goes on to the next buffer.
    pub fn advance(&mut self) {
        let next = self.value.wrapping_add(1);
        let is_end = |size| u32::from(next & !WRAP) >= size;
        self.value = match self.packed_size {
            Some(size) if is_end(size) => (self.value & WRAP) ^ WRAP,
            // Of a packed ring with all 32768 descriptors the index carries over into the wrap counter.
            _ => next,
        };
    }

    /// What the device says of it: with a split ring the `idx` of the used ring, which counts modulo 2^16; with a packed one
    /// the index of a descriptor in bits 0 to 14 and the wrap counter in bit 15.
    pub fn to_wire(self) -> u16 {
        self.value
    }
}
