// SPDX-License-Identifier: GPL-2.0

//! Any bytes in an event buffer are an event or the reason why they are none. Updates in many parts, of which some are
//! lost, come twice, or have other bytes, do to the guest's connections what the text says, and each tuple is answered.

#![no_main]

#[path = "../../tests/updates/text.rs"]
mod text;
#[path = "../../tests/updates/mod.rs"]
mod updates;

use libfuzzer_sys::fuzz_target;
use text::{Operation, Run};
use vsock_protocol::event::{Event, InvalidEvent, EVENT_LEN};

fuzz_target!(|input: (Vec<Operation>, Vec<Vec<u8>>)| {
    let (operations, events) = input;
    let mut run = Run::default();
    for operation in operations {
        run.apply(operation);
    }
    for bytes in &events {
        match Event::parse(bytes) {
            Ok(Event::TransportReset) => assert_eq!(*bytes, [0; EVENT_LEN]),
            Ok(Event::CidUpdate(_)) => assert_eq!(bytes[..EVENT_LEN], 1_u32.to_le_bytes()),
            Err(InvalidEvent::Length(len)) => assert_eq!(len, bytes.len()),
            Err(InvalidEvent::Unknown(id)) => assert_eq!(id.to_le_bytes(), bytes[..]),
        }
        run.send(bytes);
    }
});
