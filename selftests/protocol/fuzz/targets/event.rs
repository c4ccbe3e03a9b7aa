// SPDX-License-Identifier: GPL-2.0

//! Any bytes in an event buffer are an event or the reason why they are none; any parts are updates or refused.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vsock_protocol::event::{Event, InvalidEvent, CID_UPDATE_LEN, EVENT_LEN};
use vsock_protocol::update::{
    find, prepare, Collected, Collector, Key, Tuple, Update, MAX_TUPLES, TUPLE_LEN,
};

fuzz_target!(|events: Vec<Vec<u8>>| {
    let mut collector = Collector::default();
    let mut tuples = Vec::new();
    for bytes in &events {
        match Event::parse(bytes) {
            Ok(Event::TransportReset) => {
                assert_eq!(*bytes, [0; EVENT_LEN]);
                collector.discard();
                tuples.clear();
            }
            Ok(Event::CidUpdate(part)) => {
                assert_eq!(bytes.len(), CID_UPDATE_LEN + part.count() * TUPLE_LEN);
                match collector.add(&part) {
                    Collected::More => tuples.extend(part.tuples().flatten()),
                    Collected::Complete(update) => {
                        tuples.extend(part.tuples().flatten());
                        apply(&update, &mut tuples);
                        tuples.clear();
                    }
                    Collected::OfRefused => assert!(tuples.is_empty()),
                    Collected::OutOfOrder => tuples.clear(),
                }
                assert!(tuples.len() <= MAX_TUPLES as usize);
            }
            Err(InvalidEvent::Length(len)) => assert_eq!(len, bytes.len()),
            Err(InvalidEvent::Unknown(id)) => assert_eq!(id.to_le_bytes(), bytes[..]),
            Err(InvalidEvent::Update) => assert!(bytes.len() >= CID_UPDATE_LEN),
        }
    }
});

/// What the driver does with a complete update.
fn apply(update: &Update, tuples: &mut [Tuple]) {
    let sort = |tuples: &mut [Tuple], key: fn(&Tuple) -> Key| tuples.sort_unstable_by_key(key);
    if !prepare(update, tuples, sort) {
        return;
    }
    for tuple in tuples.to_vec() {
        let found = find(tuples, tuple.host_old_cid, tuple.host_port, tuple.guest_port);
        assert_eq!(found.copied(), Some(tuple));
    }
}
