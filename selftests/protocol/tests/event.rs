// SPDX-License-Identifier: GPL-2.0

//! Events: every length, and the one number that there is.

use proptest::prelude::*;
use vsock_protocol::event::{Event, InvalidEvent, EVENT_LEN};

#[test]
fn an_event_is_4_bytes_long() {
    assert_eq!(EVENT_LEN, 4);
}

#[test]
fn number_0_is_the_transport_reset() {
    assert_eq!(Event::parse(&[0; 4]), Ok(Event::TransportReset));
}

#[test]
fn the_number_is_little_endian() {
    assert_eq!(
        Event::parse(&[1, 2, 3, 4]),
        Err(InvalidEvent::Unknown(0x0403_0201))
    );
}

#[test]
fn every_other_length_is_refused() {
    let zeros = [0; 4096];
    for len in (0..=zeros.len()).filter(|len| *len != 4) {
        assert_eq!(Event::parse(&zeros[..len]), Err(InvalidEvent::Length(len)));
    }
}

proptest! {
    #[test]
    fn every_other_number_is_unknown(id in 1..=u32::MAX) {
        prop_assert_eq!(Event::parse(&id.to_le_bytes()), Err(InvalidEvent::Unknown(id)));
    }
}
