// SPDX-License-Identifier: GPL-2.0

//! Updates of CIDs: parts in every order, and lists of every content.

#[path = "updates/text.rs"]
mod text;
mod updates;

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use text::{Operation, Run};
use vsock_protocol::cid::Cid;
use vsock_protocol::event::Event;
use vsock_protocol::header::{Header, Op, SocketType, HEADER_LEN};
use vsock_protocol::update::{find, prepare, Collected, Collector, Due, Key, Tuple, Update};

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
    prepare(
        &update(),
        Some(cid(3)),
        tuples,
        |tuples, key: fn(&Tuple) -> Key| {
            tuples.sort_unstable_by_key(key);
        },
    )
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
    for port in first..first + count {
        bytes.extend(2_u64.to_le_bytes());
        bytes.extend(2_u64.to_le_bytes());
        bytes.extend(port.to_le_bytes());
        bytes.extend(port.to_le_bytes());
        bytes.extend(1_u64.to_le_bytes());
    }
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
        for (first, count) in [(0, 2), (2, 2), (4, 1)] {
            assert_eq!(collector.take_due(8), Due::Nothing);
            let part = event(generation, 5, first, count, 8);
            assert_eq!(add(&mut collector, &part), Collected::Taken);
        }
        assert!(collector.is_due());
        // Packets of before it go first.
        assert_eq!(collector.take_due(7), Due::AfterPackets);
        let Due::Now(update) = collector.take_due(8) else {
            panic!("the last part is not the last");
        };
        assert_eq!((update.generation, update.rx_used), (generation, 8));
        assert!(!collector.is_due());
    }
    assert_eq!(add(&mut collector, &event(9, 0, 0, 0, 0)), Collected::Taken);
    assert!(matches!(collector.take_due(0), Due::Now(_)));
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
        assert_eq!(add(&mut collector, &event(1, 5, 0, 2, 8)), Collected::Taken);
        assert_eq!(add(&mut collector, &wrong), Collected::Refused);
    }
    let mut collector = Collector::default();
    assert_eq!(
        add(&mut collector, &event(1, 5, 1, 1, 8)),
        Collected::Refused
    );
    for (first, count) in [(2, 1), (3, 2)] {
        assert_eq!(
            add(&mut collector, &event(1, 5, first, count, 8)),
            Collected::OfRefused
        );
    }
    // The next one is none of its parts.
    assert_eq!(add(&mut collector, &event(2, 2, 0, 1, 8)), Collected::Taken);
    collector.discard();
    assert_eq!(
        add(&mut collector, &event(2, 2, 1, 1, 8)),
        Collected::Refused
    );
}

#[test]
fn a_part_that_cannot_be_refuses_the_update_once() {
    let bad = |first, count| {
        let mut bytes = event(1, 5, first, count, 8);
        bytes[38] = 1;
        bytes
    };
    let mut collector = Collector::default();
    assert_eq!(add(&mut collector, &event(1, 5, 0, 2, 8)), Collected::Taken);
    assert_eq!(add(&mut collector, &bad(2, 2)), Collected::Refused);
    // Good or not, the rest is not applied.
    assert_eq!(add(&mut collector, &bad(4, 1)), Collected::OfRefused);
    assert_eq!(
        add(&mut collector, &event(1, 5, 2, 2, 8)),
        Collected::OfRefused
    );
    // One that no update is long enough for, and one that is not as long as it says.
    assert_eq!(
        add(&mut collector, &event(2, 5, 0, 1, 8)[..39]),
        Collected::Refused
    );
    assert_eq!(
        add(&mut collector, &event(3, 5, 0, 2, 8)[..72]),
        Collected::Refused
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
    // Updates are a chain.
    for guest_cid in [None, Some(cid(4))] {
        let sort = |_: &mut [Tuple], _: fn(&Tuple) -> Key| ();
        assert!(!prepare(&update(), guest_cid, &mut [], sort));
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

/// Mostly whole updates that are applied or refused, so that a run is about something.
#[test]
fn runs_apply_and_refuse_updates() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let operations = operations();
    let (mut applied, mut refused) = (0, 0);
    for _ in 0..200 {
        let mut run = Run::default();
        let made_up = operations.new_tree(&mut runner).expect("operations");
        for operation in made_up.current() {
            run.apply(operation);
        }
        applied += run.applied;
        refused += run.refused;
    }
    assert!(
        applied > 100 && refused > 100,
        "{applied} applied, {refused} refused"
    );
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    proptest::collection::vec(any::<Operation>(), 0..100)
}

proptest! {
    /// Updates whose parts are lost, come twice, or have other bytes or lengths.
    #[test]
    fn connections_end_as_the_text_says(operations in operations()) {
        let mut run = Run::default();
        operations.into_iter().for_each(|operation| run.apply(operation));
    }

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
            let key = (cid(wanted.0), wanted.1, wanted.2);
            prop_assert_eq!(find(&mut tuples, key, SocketType::SeqPacket), None);
            let found = find(&mut tuples, key, SocketType::Stream);
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
