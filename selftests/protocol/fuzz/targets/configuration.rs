// SPDX-License-Identifier: GPL-2.0

//! Any `guest_cid` and any feature bits of a device mean something, or are refused.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vsock_protocol::cid::Cid;
use vsock_protocol::header::SocketType;
use vsock_protocol::SocketTypes;

fuzz_target!(|configuration: (u64, u64)| {
    let (guest_cid, features) = configuration;
    if let Ok(cid) = Cid::guest_from_config(guest_cid) {
        assert_eq!(u64::from(cid.get()), guest_cid);
        assert_eq!(Cid::from_wire(guest_cid), Ok(cid));
        assert_ne!(cid, Cid::HOST);
    }
    let types = SocketTypes::negotiated(|bit| (features >> bit) & 1 != 0);
    assert!(!types.contains(SocketType::Unknown(0)));
});
