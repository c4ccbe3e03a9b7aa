// SPDX-License-Identifier: GPL-2.0

//! The header that every packet begins with (virtio 5.10.6, `struct virtio_vsock_hdr`).

use super::{cid::Cid, fields::Fields};

/// Length of a header on the wire, in bytes.
pub const HEADER_LEN: usize = 44;

/// `VIRTIO_VSOCK_OP_SHUTDOWN` flag: the sender receives no more data.
pub const SHUTDOWN_RCV: u32 = 1;
/// `VIRTIO_VSOCK_OP_SHUTDOWN` flag: the sender sends no more data.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

/// `VIRTIO_VSOCK_OP_RW` flag: the payload ends a message (`VIRTIO_VSOCK_SEQ_EOM`).
pub const SEQ_EOM: u32 = 1;
/// `VIRTIO_VSOCK_OP_RW` flag: the message ends a record (`VIRTIO_VSOCK_SEQ_EOR`).
pub const SEQ_EOR: u32 = 2;

/// What a packet is for (`VIRTIO_VSOCK_OP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Asks a listener for a connection.
    Request,
    /// Accepts a connection.
    Response,
    /// Refuses or ends a connection.
    Rst,
    /// Ends one or both directions; see [`SHUTDOWN_RCV`] and [`SHUTDOWN_SEND`].
    Shutdown,
    /// Carries payload.
    Rw,
    /// Tells the sender's credit.
    CreditUpdate,
    /// Asks for the receiver's credit.
    CreditRequest,
    /// A number that the specification does not assign.
    Unknown(u16),
}

impl From<u16> for Op {
    fn from(raw: u16) -> Self {
        match raw {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Rst,
            4 => Op::Shutdown,
            5 => Op::Rw,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            other => Op::Unknown(other),
        }
    }
}

impl From<Op> for u16 {
    fn from(op: Op) -> Self {
        match op {
            Op::Request => 1,
            Op::Response => 2,
            Op::Rst => 3,
            Op::Shutdown => 4,
            Op::Rw => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
            Op::Unknown(raw) => raw,
        }
    }
}

/// The kind of socket that a packet belongs to (`VIRTIO_VSOCK_TYPE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SocketType {
    /// A byte stream (`SOCK_STREAM`).
    Stream,
    /// Messages with boundaries (`SOCK_SEQPACKET`).
    SeqPacket,
    /// A number that the specification does not assign.
    Unknown(u16),
}

impl From<u16> for SocketType {
    fn from(raw: u16) -> Self {
        match raw {
            1 => SocketType::Stream,
            2 => SocketType::SeqPacket,
            other => SocketType::Unknown(other),
        }
    }
}

impl From<SocketType> for u16 {
    fn from(socket_type: SocketType) -> Self {
        match socket_type {
            SocketType::Stream => 1,
            SocketType::SeqPacket => 2,
            SocketType::Unknown(raw) => raw,
        }
    }
}

/// A packet's header, every field as it is on the wire; nothing in it has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Header {
    /// CID of the sender.
    pub src_cid: u64,
    /// CID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload that follow the header.
    pub len: u32,
    /// Kind of the socket.
    pub socket_type: SocketType,
    /// What the packet is for.
    pub op: Op,
    /// Flags, their meaning depends on `op`.
    pub flags: u32,
    /// Size of the sender's receive buffer, in bytes.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of its receive buffer since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// The end of a message that the payload has: `None` for none, else whether it ends a record, too.
    pub fn message_end(&self) -> Option<bool> {
        (self.socket_type == SocketType::SeqPacket && self.flags & SEQ_EOM != 0)
            .then_some(self.flags & SEQ_EOR != 0)
    }

    /// Reads the fields of a header.
    ///
    /// The caller passes its own copy of the bytes: what the device can still write is read once.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut fields = Fields(bytes);
        // The order of these lines is the order on the wire.
        Header {
            src_cid: fields.le64(),
            dst_cid: fields.le64(),
            src_port: fields.le32(),
            dst_port: fields.le32(),
            len: fields.le32(),
            socket_type: fields.le16().into(),
            op: fields.le16().into(),
            flags: fields.le32(),
            buf_alloc: fields.le32(),
            fwd_cnt: fields.le32(),
        }
    }

    /// Writes the header as it goes on the wire.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut room = bytes.iter_mut();
        let mut put = |field: &[u8]| {
            for (from, to) in field.iter().zip(&mut room) {
                *to = *from;
            }
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&u16::from(self.socket_type).to_le_bytes());
        put(&u16::from(self.op).to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// Replaces both CIDs in a header as it goes on the wire.
    pub fn set_cids(bytes: &mut [u8; HEADER_LEN], src: Cid, dst: Cid) {
        let cids = u64::from(src.get())
            .to_le_bytes()
            .into_iter()
            .chain(u64::from(dst.get()).to_le_bytes());
        for (byte, new) in bytes.iter_mut().zip(cids) {
            *byte = new;
        }
    }

    /// The RST that answers this packet for which there is no connection; none answers an RST.
    pub fn reset_reply(&self) -> Option<Header> {
        if self.op == Op::Rst {
            return None;
        }
        Some(Header::rst(
            (self.dst_cid, self.dst_port),
            (self.src_cid, self.src_port),
            self.socket_type,
        ))
    }

    /// The RST from `src` to `dst`, a CID and a port each, of something that is no connection and so has no credit.
    pub(super) fn rst(src: (u64, u32), dst: (u64, u32), socket_type: SocketType) -> Header {
        Header {
            src_cid: src.0,
            dst_cid: dst.0,
            src_port: src.1,
            dst_port: dst.1,
            len: 0,
            socket_type,
            op: Op::Rst,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}
