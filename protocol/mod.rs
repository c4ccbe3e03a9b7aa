// SPDX-License-Identifier: GPL-2.0

//! What the bytes of the virtio socket device mean.
//!
//! Everything here is a function of its arguments: headers ([`header`]), addresses ([`cid`]), credit
//! arithmetic ([`credit`]), what a packet does to a connection in a given state ([`connection`]) and what
//! the device says on its event queue ([`event`], [`update`], [`ring`]). There is no kernel type, no lock and no unsafe code, so
//! the same files are built into the module and, by path, into a user-space crate where they are tested,
//! fuzzed and model-checked.
//!
//! The source is section 5.10 "Socket Device" of the virtio specification, cited below as "virtio 5.10.x".

#![forbid(unsafe_code)]
// Public for the user-space crate.
#![allow(unreachable_pub)]

pub mod cid;
pub mod connection;
pub mod credit;
pub mod event;
mod fields;
pub mod header;
pub mod ring;
pub mod update;

/// The largest payload of one packet, in bytes (what Linux's vhost-vsock and virtio transports use).
pub const MAX_PAYLOAD: u32 = 64 * 1024;

/// Feature bits (virtio 5.10.3 and 6).
pub mod feature {
    /// `VIRTIO_VSOCK_F_STREAM`: stream sockets are supported.
    pub const STREAM: u32 = 0;
    /// `VIRTIO_VSOCK_F_SEQPACKET`: seqpacket sockets are supported.
    pub const SEQPACKET: u32 = 1;
    /// `VIRTIO_VSOCK_F_NO_IMPLIED_STREAM`: stream sockets are not supported without their feature bit.
    pub const NO_IMPLIED_STREAM: u32 = 2;
    /// `VIRTIO_VSOCK_F_CHECKPOINT`: the device can send updates of CIDs (Documentation/checkpoint.md).
    pub const CHECKPOINT: u32 = 23;
    /// `VIRTIO_F_RING_PACKED`: the virtqueues are packed rings.
    pub const RING_PACKED: u32 = 34;
}

/// The kinds of sockets that driver and device agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketTypes {
    /// Stream sockets.
    pub stream: bool,
    /// Seqpacket sockets.
    pub seqpacket: bool,
}

impl SocketTypes {
    /// What the negotiated feature bits mean; `has` says of each whether it was negotiated.
    pub fn negotiated(has: impl Fn(u32) -> bool) -> Self {
        Self {
            // Devices older than the bit have stream sockets without it.
            stream: has(feature::STREAM) || !has(feature::NO_IMPLIED_STREAM),
            seqpacket: has(feature::SEQPACKET),
        }
    }

    /// Whether `socket_type` is among them.
    pub fn contains(self, socket_type: header::SocketType) -> bool {
        match socket_type {
            header::SocketType::Stream => self.stream,
            header::SocketType::SeqPacket => self.seqpacket,
            header::SocketType::Unknown(_) => false,
        }
    }
}

/// Virtqueue numbers (virtio 5.10.2).
pub mod queue {
    /// Packets from the device.
    pub const RX: u32 = 0;
    /// Packets to the device.
    pub const TX: u32 = 1;
    /// Events of the device.
    pub const EVENT: u32 = 2;
    /// How many queues there are.
    pub const COUNT: usize = 3;
}
