// SPDX-License-Identifier: GPL-2.0

//! Packets (virtio 5.10.6, `struct virtio_vsock_hdr` and what follows it).

/// Length of a header, in bytes.
pub const HEADER_LEN: usize = 44;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub const TYPE_STREAM: u16 = 1;
/// `VIRTIO_VSOCK_TYPE_SEQPACKET`.
pub const TYPE_SEQPACKET: u16 = 2;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`.
pub const SHUTDOWN_RCV: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`.
pub const SHUTDOWN_SEND: u32 = 2;

/// `VIRTIO_VSOCK_SEQ_EOM`.
pub const SEQ_EOM: u32 = 1;
/// `VIRTIO_VSOCK_SEQ_EOR`.
pub const SEQ_EOR: u32 = 2;
/// They belong to the last part of a message.
pub const SEQ_END_FLAGS: u32 = SEQ_EOM | SEQ_EOR;

/// What a packet is for (`VIRTIO_VSOCK_OP_*`), as a number so that tests can send others, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Op(pub u16);

impl Op {
    pub const REQUEST: Op = Op(1);
    pub const RESPONSE: Op = Op(2);
    pub const RST: Op = Op(3);
    pub const SHUTDOWN: Op = Op(4);
    pub const RW: Op = Op(5);
    pub const CREDIT_UPDATE: Op = Op(6);
    pub const CREDIT_REQUEST: Op = Op(7);
}

/// A packet; `len` of the header is the payload's length, where it is not forged by [`Packet::to_bytes_with_len`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub socket_type: u16,
    pub op: Op,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub payload: Vec<u8>,
}

impl Packet {
    /// An RST from one end, CID and port, to the other.
    pub fn rst(from: (u64, u32), to: (u64, u32), socket_type: u16) -> Packet {
        Packet {
            src_cid: from.0,
            dst_cid: to.0,
            src_port: from.1,
            dst_port: to.1,
            socket_type,
            op: Op::RST,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
            payload: Vec::new(),
        }
    }

    /// The answer to this packet, from its receiver to its sender, without payload or credit.
    pub fn reply(&self, op: Op) -> Packet {
        let from = (self.dst_cid, self.dst_port);
        let to = (self.src_cid, self.src_port);
        Packet {
            op,
            ..Packet::rst(from, to, self.socket_type)
        }
    }

    /// Reads a packet; `None` where the bytes are fewer than its header says.
    pub fn from_bytes(bytes: &[u8]) -> Option<Packet> {
        let (header, rest) = bytes.split_at_checked(HEADER_LEN)?;
        let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | (u32::from(u16_at(at + 2)) << 16);
        let u64_at = |at: usize| u64::from(u32_at(at)) | (u64::from(u32_at(at + 4)) << 32);
        Some(Packet {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            payload: rest.get(..u32_at(24) as usize)?.to_vec(),
            socket_type: u16_at(28),
            op: Op(u16_at(30)),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        })
    }

    /// The packet as it goes on the wire.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.to_bytes_with_len(self.payload.len() as u32)
    }

    /// The packet with a `len` field that need not be true.
    pub fn to_bytes_with_len(&self, len: u32) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.payload.len());
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(self.socket_type.to_le_bytes());
        bytes.extend(self.op.0.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    /// Cuts the packet so that it fits into a buffer of `room` bytes, and returns the rest where there is one.
    ///
    /// `None` for both where even the header does not fit.
    pub fn split_to_fit(mut self, room: usize) -> Option<(Packet, Option<Packet>)> {
        let payload_room = room.checked_sub(HEADER_LEN)?;
        if self.payload.len() <= payload_room {
            return Some((self, None));
        }
        if payload_room == 0 {
            return None;
        }
        let rest = Packet {
            payload: self.payload.split_off(payload_room),
            ..self.clone()
        };
        if self.socket_type == TYPE_SEQPACKET {
            self.flags &= !SEQ_END_FLAGS;
        }
        Some((self, Some(rest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet() -> Packet {
        Packet {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 3,
            src_port: 0x1112_1314,
            dst_port: 5,
            socket_type: TYPE_SEQPACKET,
            op: Op::RW,
            flags: 3,
            buf_alloc: 6,
            fwd_cnt: u32::MAX,
            payload: b"payload".to_vec(),
        }
    }

    #[test]
    fn bytes_and_back() {
        assert_eq!(Packet::from_bytes(&packet().to_bytes()), Some(packet()));
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let bytes = packet().to_bytes();
        assert_eq!(&bytes[..8], &[8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(&bytes[16..20], &[0x14, 0x13, 0x12, 0x11]);
        assert_eq!(&bytes[24..32], &[7, 0, 0, 0, 2, 0, 5, 0]);
        assert_eq!(&bytes[HEADER_LEN..], b"payload");
    }

    #[test]
    fn short_bytes_are_no_packet() {
        let bytes = packet().to_bytes();
        for len in 0..bytes.len() {
            assert_eq!(Packet::from_bytes(&bytes[..len]), None, "{len} bytes");
        }
    }

    #[test]
    fn only_the_last_part_ends_a_message() {
        let (first, rest) = packet().split_to_fit(HEADER_LEN + 4).unwrap();
        let rest = rest.unwrap();
        assert_eq!((first.payload.as_slice(), first.flags), (&b"payl"[..], 0));
        assert_eq!((rest.payload.as_slice(), rest.flags), (&b"oad"[..], 3));
        assert_eq!(packet().split_to_fit(HEADER_LEN), None);
        assert_eq!(
            packet().split_to_fit(HEADER_LEN + 7),
            Some((packet(), None))
        );
    }
}
