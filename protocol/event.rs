// SPDX-License-Identifier: GPL-2.0

//! What the device says on its event queue (virtio 5.10.6.7, `struct virtio_vsock_event`; the update of CIDs is an
//! extension, Documentation/checkpoint.md).

use super::{
    fields::Fields,
    update::{Tuple, UpdatePart, TUPLE_LEN},
};

/// Length of an event without any data, in bytes.
pub const EVENT_LEN: usize = 4;

/// Length of what comes before the tuples in an update of CIDs, in bytes.
pub const CID_UPDATE_LEN: usize = 40;

/// How long the event buffers are once `VIRTIO_VSOCK_F_CHECKPOINT` is negotiated, in bytes.
pub const LONG_EVENT_LEN: usize = 4096;

const TRANSPORT_RESET: u32 = 0;

/// The number of an update of CIDs.
pub const CID_UPDATE: u32 = 1;

/// An event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all connections are gone and `guest_cid` may have changed.
    TransportReset,
    /// `VIRTIO_VSOCK_EVENT_CID_UPDATE`: CIDs have changed, and the listed connections are still there. Whatever has its
    /// number is one, for the tuples in it want answers: what cannot be is refused by its collector.
    CidUpdate(UpdatePart<'a>),
}

/// Why bytes are no event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidEvent {
    /// There are more or fewer of them than an event of this kind has.
    Length(usize),
    /// No event has this number.
    Unknown(u32),
}

impl<'a> Event<'a> {
    /// Reads an event from what the device wrote into an event buffer.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, InvalidEvent> {
        let wrong_length = InvalidEvent::Length(bytes.len());
        let (id, rest) = bytes.split_first_chunk::<4>().ok_or(wrong_length)?;
        match u32::from_le_bytes(*id) {
            TRANSPORT_RESET if rest.is_empty() => Ok(Event::TransportReset),
            CID_UPDATE => Ok(Event::CidUpdate(parse_update(rest))),
            TRANSPORT_RESET => Err(wrong_length),
            _ if bytes.len() != EVENT_LEN => Err(wrong_length),
            other => Err(InvalidEvent::Unknown(other)),
        }
    }
}

fn parse_update(bytes: &[u8]) -> UpdatePart<'_> {
    const HEAD_LEN: usize = CID_UPDATE_LEN - EVENT_LEN;
    let (head, tuples) = bytes.split_at_checked(HEAD_LEN).unwrap_or((bytes, &[]));
    let mut fields = Fields(head);
    let generation = fields.le32();
    let (old_guest_cid, new_guest_cid) = (fields.le64(), fields.le64());
    let (total, first, count) = (fields.le32(), fields.le32(), fields.le32());
    let (rx_used, reserved) = (fields.le16(), fields.le16());
    let len = usize::try_from(count)
        .ok()
        .and_then(|count| count.checked_mul(TUPLE_LEN)?.checked_add(HEAD_LEN));
    UpdatePart::new(
        generation,
        (old_guest_cid, new_guest_cid),
        (total, first, count),
        rx_used,
        tuples,
        reserved == 0 && len == Some(bytes.len()),
    )
}

/// The tuples of an update that the device sent by `bytes`, [`TUPLE_LEN`] bytes each; `None` for those that cannot be.
pub(super) fn tuples(bytes: &[u8]) -> impl Iterator<Item = Option<Tuple>> + '_ {
    bytes.chunks_exact(TUPLE_LEN).map(|tuple| {
        let mut fields = Fields(tuple);
        let (old_cid, new_cid) = (fields.le64(), fields.le64());
        let (host_port, guest_port) = (fields.le32(), fields.le32());
        let socket_type = fields.le16();
        let reserved = (fields.le16(), fields.le32());
        if reserved != (0, 0) {
            return None;
        }
        Tuple::new(old_cid, new_cid, host_port, guest_port, socket_type)
    })
}
