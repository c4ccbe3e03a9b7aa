// SPDX-License-Identifier: GPL-2.0

//! Updates of CIDs: parts in every order, and lists of every content.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;
use vsock_protocol::cid::Cid;
use vsock_protocol::event::Event;
use vsock_protocol::header::{Header, Op, SocketType, HEADER_LEN};
use vsock_protocol::update::{find, prepare, Collected, Collector, Key, Tuple, Update};

fn cid(raw: u64) -> Cid {
    Cid::from_wire(raw).expect("a CID that is not reserved")
}

fn tuple(old: u64, new: u64, host_port: u32, guest_port: u32) -> Tuple {
    Tuple {
        host_old_cid: cid(old),
        host_new_cid: cid(new),
        host_port,
        guest_port,
        socket_type: SocketType::Stream,
        is_kept: false,
    }
}

fn update() -> Update {
    Update {
        generation: 1,
        old_guest_cid: cid(3),
        new_guest_cid: cid(4),
        rx_used: 0,
    }
}

fn prepared(tuples: &mut [Tuple]) -> bool {
    prepare(&update(), tuples, |tuples, key: fn(&Tuple) -> Key| {
        tuples.sort_unstable_by_key(key);
    })
}

/// An event with `count` tuples of a generation.
fn event(generation: u32, total: u32, first: u32, count: u32, rx_used: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(generation.to_le_bytes());
    bytes.extend(3_u64.to_le_bytes());
    bytes.extend(4_u64.to_le_bytes());
    for number in [total, first, count] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(rx_used.to_le_bytes());
    bytes.extend([0; 2]);
    bytes.resize(40 + 32 * count as usize, 0);
    bytes
}

fn add(collector: &mut Collector, event: &[u8]) -> Collected {
    match Event::parse(event) {
        Ok(Event::CidUpdate(part)) => collector.add(&part),
        other => panic!("no update: {other:?}"),
    }
}

#[test]
fn parts_in_order_are_an_update() {
    let mut collector = Collector::default();
    for generation in [1, 2, 1] {
        assert_eq!(
            add(&mut collector, &event(generation, 5, 0, 2, 8)),
            Collected::More
        );
        assert_eq!(
            add(&mut collector, &event(generation, 5, 2, 2, 8)),
            Collected::More
        );
        let Collected::Complete(update) = add(&mut collector, &event(generation, 5, 4, 1, 8))
        else {
            panic!("the last part is not the last");
        };
        assert_eq!((update.generation, update.rx_used), (generation, 8));
    }
    assert!(matches!(
        add(&mut collector, &event(9, 0, 0, 0, 0)),
        Collected::Complete(_)
    ));
}

#[test]
fn a_part_out_of_order_refuses_the_update_and_the_rest_of_it() {
    let wrong = [
        // one missing, one again, another total, another generation, another place in the receive queue
        event(1, 5, 3, 1, 8),
        event(1, 5, 0, 2, 8),
        event(1, 6, 2, 1, 8),
        event(2, 5, 2, 1, 8),
        event(1, 5, 2, 1, 9),
    ];
    for wrong in wrong {
        let mut collector = Collector::default();
        assert_eq!(add(&mut collector, &event(1, 5, 0, 2, 8)), Collected::More);
        assert_eq!(add(&mut collector, &wrong), Collected::OutOfOrder);
    }
    let mut collector = Collector::default();
    assert_eq!(
        add(&mut collector, &event(1, 5, 1, 1, 8)),
        Collected::OutOfOrder
    );
    assert_eq!(
        add(&mut collector, &event(1, 5, 2, 1, 8)),
        Collected::OfRefused
    );
    assert_eq!(
        add(&mut collector, &event(1, 5, 3, 2, 8)),
        Collected::OfRefused
    );
    // The next one is none of its parts.
    assert_eq!(add(&mut collector, &event(2, 2, 0, 1, 8)), Collected::More);
    assert!(collector.discard());
    assert!(!collector.discard());
    assert_eq!(
        add(&mut collector, &event(2, 2, 1, 1, 8)),
        Collected::OutOfOrder
    );
}

#[test]
fn doubles_and_the_guest_itself_are_refused() {
    let good = [
        tuple(100, 200, 1, 1),
        tuple(101, 201, 1, 1),
        tuple(100, 200, 1, 2),
    ];
    assert!(prepared(&mut good.clone()));
    assert!(prepared(&mut []));
    // Two hosts may change places.
    assert!(prepared(&mut [
        tuple(100, 101, 1, 1),
        tuple(101, 100, 1, 1)
    ]));
    let bad = [
        [tuple(100, 200, 1, 1), tuple(100, 201, 1, 1)],
        [tuple(100, 200, 1, 1), tuple(101, 200, 1, 1)],
        [tuple(3, 200, 1, 1), tuple(100, 200, 1, 2)],
        [tuple(100, 4, 1, 1), tuple(100, 200, 1, 2)],
    ];
    for mut tuples in bad {
        assert!(!prepared(&mut tuples), "{tuples:?}");
    }
}

#[test]
fn an_rst_bears_the_new_addresses() {
    let rst = tuple(100, 200, 10, 20).reset(cid(4));
    assert_eq!((rst.src_cid, rst.dst_cid), (4, 200));
    assert_eq!((rst.src_port, rst.dst_port), (20, 10));
    assert_eq!(
        (rst.op, rst.socket_type, rst.len),
        (Op::Rst, SocketType::Stream, 0)
    );
}

proptest! {
    /// Against a map and a set, with few CIDs and ports so that doubles come about.
    #[test]
    fn a_list_is_what_a_map_would_be(
        raw in proptest::collection::vec((2..8_u64, 2..8_u64, 0..6_u32, 0..6_u32), 0..12),
        wanted in (2..8_u64, 0..6_u32, 0..6_u32),
    ) {
        let mut tuples: Vec<_> = raw
            .iter()
            .map(|(old, new, host_port, guest_port)| tuple(*old, *new, *host_port, *guest_port))
            .collect();
        let by_old: HashMap<_, _> = raw.iter().map(|(old, new, h, g)| ((*old, *h, *g), *new)).collect();
        let by_new: HashSet<_> = raw.iter().map(|(_, new, h, g)| (*new, *h, *g)).collect();
        let own = raw.iter().any(|(old, new, _, _)| *old == 3 || *new == 4);
        let good = by_old.len() == raw.len() && by_new.len() == raw.len() && !own;
        prop_assert_eq!(prepared(&mut tuples), good);
        if good {
            let found = find(&mut tuples, cid(wanted.0), wanted.1, wanted.2);
            prop_assert_eq!(
                found.map(|tuple| u64::from(tuple.host_new_cid.get())),
                by_old.get(&wanted).copied()
            );
        }
    }

    #[test]
    fn new_cids_change_nothing_else(bytes in proptest::array::uniform32(any::<u8>()), src in 3..u32::MAX, dst in 3..u32::MAX) {
        let mut header = [0xa5; HEADER_LEN];
        header[..32].copy_from_slice(&bytes);
        let before = header;
        Header::set_cids(&mut header, cid(src.into()), cid(dst.into()));
        let after = Header::parse(&header);
        prop_assert_eq!((after.src_cid, after.dst_cid), (u64::from(src), u64::from(dst)));
        prop_assert_eq!(&header[16..], &before[16..]);
    }
}
