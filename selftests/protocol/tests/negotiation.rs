// SPDX-License-Identifier: GPL-2.0

//! Feature bits: which kinds of sockets driver and device agree on.

use vsock_protocol::{header::SocketType, SocketTypes};

/// Bits 0 `VIRTIO_VSOCK_F_STREAM`, 1 `VIRTIO_VSOCK_F_SEQPACKET`, 2 `VIRTIO_VSOCK_F_NO_IMPLIED_STREAM`; then
/// whether there are stream and seqpacket sockets.
const TABLE: [(u32, bool, bool); 8] = [
    (0b000, true, false),
    (0b001, true, false),
    (0b010, true, true),
    (0b011, true, true),
    (0b100, false, false),
    (0b101, true, false),
    (0b110, false, true),
    (0b111, true, true),
];

#[test]
fn features_decide_on_the_kinds_of_sockets() {
    for (features, stream, seqpacket) in TABLE {
        let types = SocketTypes::negotiated(|bit| (features >> bit) & 1 != 0);
        assert_eq!(types, SocketTypes { stream, seqpacket }, "{features:03b}");
        assert_eq!(types.contains(SocketType::Stream), stream);
        assert_eq!(types.contains(SocketType::SeqPacket), seqpacket);
        assert!(!types.contains(SocketType::Unknown(0)));
        assert!(!types.contains(SocketType::Unknown(3)));
    }
}
