// SPDX-License-Identifier: GPL-2.0

//! Any bytes in an event buffer are an event or the reason why they are none.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vsock_protocol::event::{Event, InvalidEvent, EVENT_LEN};

fuzz_target!(|bytes: &[u8]| {
    match Event::parse(bytes) {
        Ok(Event::TransportReset) => assert_eq!(bytes, [0; EVENT_LEN]),
        Err(InvalidEvent::Length(len)) => assert_eq!(len, bytes.len()),
        Err(InvalidEvent::Unknown(id)) => assert_eq!(id.to_le_bytes(), bytes),
    }
});
