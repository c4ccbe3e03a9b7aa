// SPDX-License-Identifier: GPL-2.0

//! Events: every length, the numbers that there are, and what an update may say.

use proptest::prelude::*;
use vsock_protocol::event::{Event, InvalidEvent, CID_UPDATE_LEN, EVENT_LEN, LONG_EVENT_LEN};
use vsock_protocol::header::SocketType;
use vsock_protocol::update::{Collected, Collector, Due, MAX_TUPLES, TUPLE_LEN};

/// An update's event out of its fields.
fn update(cids: (u64, u64), numbers: (u32, u32, u32), rest: (u16, u16), tuples: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(9_u32.to_le_bytes());
    bytes.extend(cids.0.to_le_bytes());
    bytes.extend(cids.1.to_le_bytes());
    for number in [numbers.0, numbers.1, numbers.2] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(rest.0.to_le_bytes());
    bytes.extend(rest.1.to_le_bytes());
    bytes.extend(tuples);
    bytes
}

fn tuple(cids: (u64, u64), ports: (u32, u32), socket_type: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(cids.0.to_le_bytes());
    bytes.extend(cids.1.to_le_bytes());
    bytes.extend(ports.0.to_le_bytes());
    bytes.extend(ports.1.to_le_bytes());
    bytes.extend(socket_type.to_le_bytes());
    bytes.extend([0; 6]);
    bytes
}

#[test]
fn the_lengths_are_those_of_the_text() {
    assert_eq!((EVENT_LEN, CID_UPDATE_LEN, TUPLE_LEN), (4, 40, 32));
    assert_eq!((LONG_EVENT_LEN - CID_UPDATE_LEN) / TUPLE_LEN, 126);
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
    let zeros = [0; LONG_EVENT_LEN];
    for len in (0..=zeros.len()).filter(|len| *len != 4) {
        assert_eq!(Event::parse(&zeros[..len]), Err(InvalidEvent::Length(len)));
    }
}

#[test]
fn an_update_says_what_it_says() {
    let bytes = update(
        (3, 4),
        (4, 2, 2),
        (77, 0),
        &[tuple((2, 9), (10, 11), 1), tuple((8, 8), (12, 13), 2)].concat(),
    );
    let Ok(Event::CidUpdate(part)) = Event::parse(&bytes) else {
        panic!("{:?}", Event::parse(&bytes));
    };
    // With the part before it, it is the update.
    let mut collector = Collector::default();
    let before = update((3, 4), (4, 0, 2), (77, 0), &bytes[CID_UPDATE_LEN..]);
    let Ok(Event::CidUpdate(before)) = Event::parse(&before) else {
        panic!("{:?}", Event::parse(&before));
    };
    assert_eq!(collector.add(&before), Collected::Taken);
    assert_eq!(collector.add(&part), Collected::Taken);
    let Due::Now(head) = collector.take_due(77) else {
        panic!("{collector:?}");
    };
    assert_eq!(head.generation, 9);
    assert_eq!((head.old_guest_cid.get(), head.new_guest_cid.get()), (3, 4));
    let tuples: Vec<_> = part
        .tuples()
        .collect::<Option<_>>()
        .expect("two good tuples");
    assert_eq!(part.count(), 2);
    assert_eq!(tuples.len(), 2);
    assert_eq!(tuples[0].host_old_cid.get(), 2);
    assert_eq!(tuples[0].host_new_cid.get(), 9);
    assert_eq!((tuples[0].host_port, tuples[0].guest_port), (10, 11));
    assert_eq!(tuples[0].socket_type, SocketType::Stream);
    assert_eq!(tuples[1].socket_type, SocketType::SeqPacket);
}

fn collected(bytes: &[u8]) -> Collected {
    match Event::parse(bytes) {
        Ok(Event::CidUpdate(part)) => Collector::default().add(&part),
        other => panic!("no update: {other:?}"),
    }
}

#[test]
fn an_update_that_cannot_be_is_refused() {
    let one = tuple((2, 9), (10, 11), 1);
    let refused = [
        ((2, 4), (1, 0, 1), 0_u16),
        ((3, 2), (1, 0, 1), 0),
        ((0, 4), (1, 0, 1), 0),
        ((3, u64::from(u32::MAX)), (1, 0, 1), 0),
        ((3, 1 << 32), (1, 0, 1), 0),
        ((3, 4), (0, 0, 1), 0),
        ((3, 4), (1, 1, 1), 0),
        ((3, 4), (2, u32::MAX, 1), 0),
        ((3, 4), (MAX_TUPLES + 1, 0, 1), 0),
        ((3, 4), (1, 0, 1), 1),
    ];
    for (cids, numbers, reserved) in refused {
        let bytes = update(cids, numbers, (0, reserved), &one);
        assert_eq!(
            collected(&bytes),
            Collected::Refused,
            "{cids:?} {numbers:?} {reserved}"
        );
        // What is listed wants an answer all the same.
        let Ok(Event::CidUpdate(part)) = Event::parse(&bytes) else {
            panic!("{:?}", Event::parse(&bytes));
        };
        assert_eq!(part.tuples().flatten().count(), 1);
    }
    let empty_part = update((3, 4), (1, 0, 0), (0, 0), &[]);
    assert_eq!(collected(&empty_part), Collected::Refused);
    let empty_update = update((3, 4), (0, 0, 0), (0, 0), &[]);
    assert_eq!(collected(&empty_update), Collected::Taken);
    let largest = update((3, 4), (MAX_TUPLES, 0, 1), (0, 0), &one);
    assert_eq!(collected(&largest), Collected::Taken);
}

#[test]
fn a_tuple_that_cannot_be_is_none() {
    let bad = [
        tuple((0, 9), (1, 1), 1),
        tuple((2, 1), (1, 1), 1),
        tuple((2, 1 << 33), (1, 1), 1),
        tuple((2, 9), (1, 1), 0),
        tuple((2, 9), (1, 1), 3),
        {
            let mut reserved = tuple((2, 9), (1, 1), 1);
            reserved[31] = 1;
            reserved
        },
    ];
    for tuple in bad {
        let bytes = update((3, 4), (1, 0, 1), (0, 0), &tuple);
        let Ok(Event::CidUpdate(part)) = Event::parse(&bytes) else {
            panic!("{:?}", Event::parse(&bytes));
        };
        assert_eq!(part.tuples().collect::<Vec<_>>(), [None]);
        assert_eq!(collected(&bytes), Collected::Refused);
    }
}

proptest! {
    #[test]
    fn every_other_number_is_unknown(id in 2..=u32::MAX) {
        let bytes = id.to_le_bytes();
        prop_assert_eq!(
            Event::parse(&bytes),
            Err(InvalidEvent::Unknown(id))
        );
    }

    #[test]
    fn an_update_is_as_long_as_it_says(count in 0..200_u32, len in prop_oneof![0..LONG_EVENT_LEN, (0..127_usize).prop_map(|count| count * TUPLE_LEN)]) {
        let tuples: Vec<_> = tuple((2, 9), (10, 11), 1).into_iter().cycle().take(len).collect();
        let bytes = update((3, 4), (1000, 0, count), (0, 0), &tuples);
        let fits = count > 0 && len == count as usize * TUPLE_LEN;
        prop_assert_eq!(collected(&bytes) == Collected::Taken, fits);
    }

    #[test]
    fn whatever_has_its_number_is_an_update(rest in proptest::collection::vec(any::<u8>(), 0..200)) {
        let bytes = [&1_u32.to_le_bytes()[..], &rest].concat();
        prop_assert!(matches!(Event::parse(&bytes), Ok(Event::CidUpdate(_))));
    }
}
