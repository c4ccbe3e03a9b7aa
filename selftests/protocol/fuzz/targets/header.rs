// SPDX-License-Identifier: GPL-2.0

//! Any 44 bytes of a device are a header, come out again as they went in, and have an answer that says so.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vsock_protocol::connection::{step, State};
use vsock_protocol::header::{Header, Op, HEADER_LEN, SHUTDOWN_BOTH};

fuzz_target!(|bytes: [u8; HEADER_LEN]| {
    let header = Header::parse(&bytes);
    assert_eq!(header.to_bytes(), bytes);
    match header.reset_reply() {
        Some(reply) => {
            assert_eq!(reply.op, Op::Rst);
            assert_eq!((reply.src_cid, reply.src_port), (header.dst_cid, header.dst_port));
            assert_eq!((reply.dst_cid, reply.dst_port), (header.src_cid, header.src_port));
        }
        None => assert_eq!(header.op, Op::Rst),
    }
    let states = [
        State::Listening,
        State::Connecting,
        State::Accepted,
        State::Established,
        State::Closing,
        State::Closed,
    ];
    for state in states {
        for peer_shutdown in 0..=SHUTDOWN_BOTH {
            step(state, peer_shutdown, &header);
        }
    }
});
