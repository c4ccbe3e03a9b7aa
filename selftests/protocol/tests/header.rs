// SPDX-License-Identifier: GPL-2.0

//! Headers: the bytes of `struct virtio_vsock_hdr` and the RST that answers a packet.

use proptest::prelude::*;
use vsock_protocol::header::{Header, Op, SocketType, HEADER_LEN, SEQ_EOM, SEQ_EOR};

/// A header with a different value in each byte, written down field by field from the specification.
const BYTES: [u8; HEADER_LEN] = [
    0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, // le64 src_cid
    0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, // le64 dst_cid
    0x21, 0x22, 0x23, 0x24, // le32 src_port
    0x31, 0x32, 0x33, 0x34, // le32 dst_port
    0x41, 0x42, 0x43, 0x44, // le32 len
    0x51, 0x52, // le16 type
    0x61, 0x62, // le16 op
    0x71, 0x72, 0x73, 0x74, // le32 flags
    0x81, 0x82, 0x83, 0x84, // le32 buf_alloc
    0x91, 0x92, 0x93, 0x94, // le32 fwd_cnt
];

const HEADER: Header = Header {
    src_cid: 0x0807_0605_0403_0201,
    dst_cid: 0x1817_1615_1413_1211,
    src_port: 0x2423_2221,
    dst_port: 0x3433_3231,
    len: 0x4443_4241,
    socket_type: SocketType::Unknown(0x5251),
    op: Op::Unknown(0x6261),
    flags: 0x7473_7271,
    buf_alloc: 0x8483_8281,
    fwd_cnt: 0x9493_9291,
};

/// The numbers of the operations.
const OPS: [(u16, Op); 9] = [
    (0, Op::Unknown(0)),
    (1, Op::Request),
    (2, Op::Response),
    (3, Op::Rst),
    (4, Op::Shutdown),
    (5, Op::Rw),
    (6, Op::CreditUpdate),
    (7, Op::CreditRequest),
    (8, Op::Unknown(8)),
];

/// The numbers of the socket types.
const TYPES: [(u16, SocketType); 4] = [
    (0, SocketType::Unknown(0)),
    (1, SocketType::Stream),
    (2, SocketType::SeqPacket),
    (3, SocketType::Unknown(3)),
];

#[test]
fn a_header_is_44_bytes_long() {
    assert_eq!(HEADER_LEN, 44);
}

#[test]
fn fields_are_read_from_where_the_specification_has_them() {
    assert_eq!(Header::parse(&BYTES), HEADER);
}

#[test]
fn fields_are_written_to_where_the_specification_has_them() {
    assert_eq!(HEADER.to_bytes(), BYTES);
}

#[test]
fn each_byte_belongs_to_one_field() {
    // Where each field begins; the last number is the end.
    const OFFSETS: [usize; 11] = [0, 8, 16, 20, 24, 28, 30, 32, 36, 40, 44];
    let fields = |header: Header| {
        [
            header.src_cid,
            header.dst_cid,
            header.src_port.into(),
            header.dst_port.into(),
            header.len.into(),
            u16::from(header.socket_type).into(),
            u16::from(header.op).into(),
            header.flags.into(),
            header.buf_alloc.into(),
            header.fwd_cnt.into(),
        ]
    };
    for (field, bounds) in OFFSETS.windows(2).enumerate() {
        for (place, byte) in (bounds[0]..bounds[1]).enumerate() {
            let mut bytes = [0; HEADER_LEN];
            bytes[byte] = 0xa5;
            let mut expected = [0; 10];
            expected[field] = 0xa5 << (8 * place);
            assert_eq!(fields(Header::parse(&bytes)), expected, "byte {byte}");
        }
    }
}

#[test]
fn ops_and_types_have_their_numbers() {
    for (raw, op) in OPS {
        assert_eq!(Op::from(raw), op);
        assert_eq!(u16::from(op), raw);
    }
    for (raw, socket_type) in TYPES {
        assert_eq!(SocketType::from(raw), socket_type);
        assert_eq!(u16::from(socket_type), raw);
    }
}

#[test]
fn only_a_seqpacket_socket_has_message_ends() {
    let end = |socket_type, flags| {
        Header {
            socket_type,
            flags,
            ..HEADER
        }
        .message_end()
    };
    assert_eq!((SEQ_EOM, SEQ_EOR), (1, 2));
    assert_eq!(end(SocketType::SeqPacket, 0), None);
    assert_eq!(end(SocketType::SeqPacket, SEQ_EOM), Some(false));
    assert_eq!(end(SocketType::SeqPacket, SEQ_EOM | SEQ_EOR), Some(true));
    // A record ends with a message, not within one.
    assert_eq!(end(SocketType::SeqPacket, SEQ_EOR), None);
    assert_eq!(end(SocketType::SeqPacket, !(SEQ_EOM | SEQ_EOR)), None);
    assert_eq!(end(SocketType::Stream, SEQ_EOM | SEQ_EOR), None);
    assert_eq!(end(SocketType::Unknown(3), SEQ_EOM | SEQ_EOR), None);
}

#[test]
fn every_op_but_rst_is_answered_with_rst() {
    for (_, op) in OPS {
        for (_, socket_type) in TYPES {
            let packet = Header {
                op,
                socket_type,
                ..HEADER
            };
            let reply = (op != Op::Rst).then_some(Header {
                src_cid: HEADER.dst_cid,
                dst_cid: HEADER.src_cid,
                src_port: HEADER.dst_port,
                dst_port: HEADER.src_port,
                len: 0,
                socket_type,
                op: Op::Rst,
                flags: 0,
                buf_alloc: 0,
                fwd_cnt: 0,
            });
            assert_eq!(packet.reset_reply(), reply, "{packet:?}");
        }
    }
}

fn arbitrary_bytes() -> impl Strategy<Value = [u8; HEADER_LEN]> {
    proptest::collection::vec(any::<u8>(), HEADER_LEN)
        .prop_map(|bytes| bytes.try_into().expect("as many bytes as a header has"))
}

proptest! {
    #[test]
    fn bytes_survive_parsing(bytes in arbitrary_bytes()) {
        prop_assert_eq!(Header::parse(&bytes).to_bytes(), bytes);
    }

    #[test]
    fn fields_survive_the_wire(
        (src_cid, dst_cid, src_port, dst_port, len) in any::<(u64, u64, u32, u32, u32)>(),
        (socket_type, op, flags, buf_alloc, fwd_cnt) in any::<(u16, u16, u32, u32, u32)>(),
    ) {
        let header = Header {
            src_cid,
            dst_cid,
            src_port,
            dst_port,
            len,
            socket_type: socket_type.into(),
            op: op.into(),
            flags,
            buf_alloc,
            fwd_cnt,
        };
        prop_assert_eq!(Header::parse(&header.to_bytes()), header);
    }

    #[test]
    fn no_reply_is_answered(bytes in arbitrary_bytes()) {
        if let Some(reply) = Header::parse(&bytes).reset_reply() {
            prop_assert_eq!(reply.reset_reply(), None);
        }
    }
}
