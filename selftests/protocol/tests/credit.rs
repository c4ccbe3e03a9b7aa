// SPDX-License-Identifier: GPL-2.0

//! Credit arithmetic, compared with counters that have no end.

mod model;

use model::{Operation, Receiver, Sender};
use proptest::prelude::*;
use vsock_protocol::credit::{Advertisement, CreditExceeded, ReceiveCredit, SendCredit};

/// Numbers of all magnitudes, also such as are near 2^32.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![
        (any::<u32>(), 0..32u32).prop_map(|(number, shift)| number >> shift),
        (0..1000u32).prop_map(|number| u32::MAX - number),
    ]
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    proptest::collection::vec((any::<u8>(), number(), number()), 0..200)
}

/// What the counters stand at when the operations begin: often they wrap around in the first few.
fn beginning() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), (0..100_000u32).prop_map(|below| u32::MAX - below)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_sender_counts_right(beginning in beginning(), operations in operations()) {
        let mut sender = Sender::after(beginning);
        operations.into_iter().for_each(|operation| sender.apply(operation));
    }

    #[test]
    fn a_receiver_counts_right(beginning in beginning(), operations in operations()) {
        let mut receiver = Receiver::after(beginning);
        operations.into_iter().for_each(|operation| receiver.apply(operation));
    }

    #[test]
    fn a_lying_peer_gets_no_more_than_the_limit(
        updates in proptest::collection::vec((number(), number()), 1..50),
        limit in number(),
    ) {
        let mut credit = SendCredit::default();
        for (buf_alloc, fwd_cnt) in updates {
            credit.update(buf_alloc, fwd_cnt);
            prop_assert!(credit.available(limit) <= limit.min(buf_alloc));
            prop_assert!(credit.take(u32::MAX, limit) <= limit.min(buf_alloc));
            prop_assert_eq!(credit.available(limit), 0);
        }
    }

    /// Counts that do not fit together are a mistake of the driver's, but none that may panic.
    #[test]
    fn counts_that_do_not_fit_are_endured(
        operations in proptest::collection::vec((number(), number(), number()), 0..50),
    ) {
        let mut credit = ReceiveCredit::new(u32::MAX);
        for (len, read, freed) in operations {
            let _ = credit.receive(len);
            credit.consume(read, freed);
            credit.wants_update(len);
        }
    }
}

#[test]
fn credit_across_the_wrap_around_is_what_it_is_elsewhere() {
    let mut credit = SendCredit::default();
    credit.update(u32::MAX, 0);
    assert_eq!(credit.take(u32::MAX - 9, u32::MAX), u32::MAX - 9);
    // 2^32 - 10 bytes were sent and consumed.
    credit.update(100, u32::MAX - 9);
    assert_eq!(credit.take(30, u32::MAX), 30);
    assert_eq!(credit.available(u32::MAX), 70);
    // All but 5 of these were consumed: 2^32 + 15.
    credit.update(100, 15);
    assert_eq!(credit.available(u32::MAX), 95);
    credit.give_back(5);
    assert_eq!(credit.available(u32::MAX), 100);
}

#[test]
fn a_peer_that_shrinks_its_buffer_below_what_is_in_flight_leaves_no_room() {
    let mut credit = SendCredit::default();
    credit.update(1000, 0);
    assert_eq!(credit.take(800, u32::MAX), 800);
    credit.update(500, 0);
    assert_eq!(credit.available(u32::MAX), 0);
    assert_eq!(credit.take(1, u32::MAX), 0);
    credit.update(500, 301);
    assert_eq!(credit.available(u32::MAX), 1);
}

#[test]
fn a_peer_may_use_the_credit_that_it_got_before_the_buffer_shrank() {
    let mut credit = ReceiveCredit::new(1000);
    credit.advertised();
    assert_eq!(credit.receive(400), Ok(()));
    credit.set_buf_alloc(100);
    credit.advertised();
    assert_eq!(credit.receive(600), Ok(()));
    assert_eq!(credit.receive(1), Err(CreditExceeded));
    assert_eq!(credit.unread(), 1000);
    // Until 900 of these have been freed there is no new credit.
    credit.consume(950, 950);
    assert_eq!(credit.receive(51), Err(CreditExceeded));
    assert_eq!(credit.receive(50), Ok(()));
}

#[test]
fn what_overtakes_older_packets_may_be_used_and_is_news_again() {
    let mut credit = ReceiveCredit::new(1000);
    credit.advertised();
    assert_eq!(credit.receive(700), Ok(()));
    credit.consume(700, 700);
    credit.advertised_before_older();
    credit.set_buf_alloc(400);
    // The peer has used it before the packets came that say less.
    assert_eq!(credit.receive(1000), Ok(()));
    assert_eq!(credit.receive(1), Err(CreditExceeded));
    assert_eq!(credit.unadvertised(), 700);
}

#[test]
fn a_buffer_can_become_larger_than_the_peer_knows() {
    let mut credit = ReceiveCredit::new(100);
    credit.advertised();
    assert_eq!(credit.receive(100), Ok(()));
    credit.set_buf_alloc(300);
    // The peer could not send what the reader waits for, if it were not told.
    assert_eq!(credit.unadvertised(), 200);
    assert!(credit.wants_update(200));
    credit.advertised();
    assert!(!credit.wants_update(200));
    assert_eq!(credit.receive(200), Ok(()));
    assert_eq!(credit.receive(1), Err(CreditExceeded));
}

#[test]
fn a_packet_carries_the_size_of_the_buffer_and_what_has_left_it() {
    let mut credit = ReceiveCredit::new(1000);
    credit.advertised();
    assert_eq!(credit.receive(600), Ok(()));
    // Half of the packet is read, none of its memory is free.
    credit.consume(300, 0);
    let unchanged = Advertisement {
        buf_alloc: 1000,
        fwd_cnt: 0,
    };
    assert_eq!(credit.advertisement(), unchanged);
    assert_eq!(credit.unread(), 300);
    credit.consume(300, 600);
    let freed = Advertisement {
        buf_alloc: 1000,
        fwd_cnt: 600,
    };
    assert_eq!(credit.advertisement(), freed);
    assert_eq!(credit.unread(), 0);
}
