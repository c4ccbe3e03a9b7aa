// SPDX-License-Identifier: GPL-2.0

//! The event that says which connections go on after a migration (Documentation/checkpoint.md).

/// `VIRTIO_VSOCK_F_CHECKPOINT`, as a bit of the device's features.
pub const FEATURE_CHECKPOINT: u64 = 1 << 23;

/// `VIRTIO_VSOCK_EVENT_CID_UPDATE`.
const EVENT_CID_UPDATE: u32 = 1;

/// How long an event may be, in bytes.
const EVENT_LEN: usize = 4096;

/// Length of what comes before the tuples, and where `rx_used` is in it, in bytes.
const HEAD_LEN: usize = 40;
const RX_USED_AT: usize = 36;

/// Length of a tuple, in bytes.
const TUPLE_LEN: usize = 32;

/// How many tuples fit into an event.
pub const TUPLES_PER_EVENT: usize = (EVENT_LEN - HEAD_LEN) / TUPLE_LEN;

/// A connection that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    pub host_old_cid: u64,
    pub host_new_cid: u64,
    pub host_port: u32,
    pub guest_port: u32,
    pub socket_type: u16,
}

/// A whole update.
#[derive(Clone, Debug)]
pub struct Update {
    pub generation: u32,
    pub old_guest_cid: u64,
    pub new_guest_cid: u64,
    pub tuples: Vec<Tuple>,
}

impl Update {
    /// The events of the update; [`set_rx_used`] completes them.
    pub fn to_events(&self) -> Vec<Vec<u8>> {
        let total = self.tuples.len();
        let part = |first: usize, tuples: &[Tuple]| {
            self.part(total as u32, first as u32, tuples.len() as u32, tuples)
        };
        if total == 0 {
            return vec![part(0, &[])];
        }
        let parts = self.tuples.chunks(TUPLES_PER_EVENT);
        let starts = (0..).step_by(TUPLES_PER_EVENT);
        starts
            .zip(parts)
            .map(|(first, tuples)| part(first, tuples))
            .collect()
    }

    /// One part, with numbers that need not be true.
    pub fn part(&self, total: u32, first: u32, count: u32, tuples: &[Tuple]) -> Vec<u8> {
        let mut event = Vec::new();
        event.extend(EVENT_CID_UPDATE.to_le_bytes());
        event.extend(self.generation.to_le_bytes());
        event.extend(self.old_guest_cid.to_le_bytes());
        event.extend(self.new_guest_cid.to_le_bytes());
        for number in [total, first, count, 0] {
            event.extend(number.to_le_bytes());
        }
        for tuple in tuples {
            event.extend(tuple.host_old_cid.to_le_bytes());
            event.extend(tuple.host_new_cid.to_le_bytes());
            event.extend(tuple.host_port.to_le_bytes());
            event.extend(tuple.guest_port.to_le_bytes());
            event.extend(tuple.socket_type.to_le_bytes());
            event.extend([0; 6]);
        }
        event
    }
}

/// Notes in a part how far the receive queue was used before the update.
pub(crate) fn set_rx_used(event: &mut [u8], rx_used: u16) {
    if let Some(field) = event.get_mut(RX_USED_AT..RX_USED_AT + 2) {
        field.copy_from_slice(&rx_used.to_le_bytes());
    }
}
