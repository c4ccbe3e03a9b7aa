// SPDX-License-Identifier: GPL-2.0

//! What the device says on its event queue (virtio 5.10.6.7, `struct virtio_vsock_event`).

/// Length of an event on the wire, in bytes.
pub const EVENT_LEN: usize = 4;

/// An event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all connections are gone and `guest_cid` may have changed.
    TransportReset,
}

/// Why bytes are no event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidEvent {
    /// There are more or fewer of them than an event of this kind has.
    Length(usize),
    /// No event has this number.
    Unknown(u32),
}

impl Event {
    /// Reads an event from what the device wrote into an event buffer.
    pub fn parse(bytes: &[u8]) -> Result<Self, InvalidEvent> {
        let id: [u8; EVENT_LEN] = bytes
            .try_into()
            .map_err(|_| InvalidEvent::Length(bytes.len()))?;
        match u32::from_le_bytes(id) {
            0 => Ok(Event::TransportReset),
            other => Err(InvalidEvent::Unknown(other)),
        }
    }
}
