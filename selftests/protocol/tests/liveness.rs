// SPDX-License-Identifier: GPL-2.0

//! When the peer is told of room: often enough that no sender and reader wait for each other for ever, and no
//! more often than that needs.

use proptest::prelude::*;
use std::collections::VecDeque;
use vsock_protocol::{
    credit::{Advertisement, ReceiveCredit, SendCredit},
    MAX_PAYLOAD,
};

/// When credit goes back to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accounting {
    /// As bytes are read.
    Bytes,
    /// As packets have been read to their end.
    Packets,
}

/// What to the receiver is on its way.
#[derive(Clone, Copy, Debug)]
enum ToReceiver {
    Payload(u32),
    /// The sender's own receive buffer has another size, which limits what it sends, too.
    BufAlloc(u32),
}

/// A packet in the receive buffer.
#[derive(Debug)]
struct Packet {
    len: u32,
    read: u32,
}

/// What the ends do next, where they can.
#[derive(Clone, Copy, Debug)]
enum Action {
    /// The sender sends a packet of so many bytes, or fewer if its credit has it so.
    Send(u32),
    /// The receiver gets a packet.
    Arrive,
    /// The sender gets a credit update.
    Learn,
    /// The reader reads so many bytes, or fewer, as soon as there are as many as it waits for.
    Read(u32),
    /// It waits for so many.
    Await(u32),
    /// The receiver sends a packet of its own.
    Answer,
    /// The receive buffer gets another size.
    Resize(u32),
    /// The sender's receive buffer gets another size.
    ResizeSender(u32),
}

#[derive(Debug)]
struct Connection {
    accounting: Accounting,
    sender: SendCredit,
    /// What the sender limits itself to.
    limit: u32,
    unsent: u64,
    to_receiver: VecDeque<ToReceiver>,
    to_sender: VecDeque<Advertisement>,
    receiver: ReceiveCredit,
    /// Whether the sender tells the size of its own buffer, or 0 instead.
    tells_limit: bool,
    queue: VecDeque<Packet>,
    low_water: u32,
    largest_packet: u32,
    read: u64,
    reads: u64,
    updates: u64,
}

impl Connection {
    /// A connection on which `beginning` bytes have been sent and read, with `unsent` to come.
    fn new(setting: &Setting, tells_limit: bool) -> Self {
        let Setting {
            accounting,
            beginning,
            buf_alloc,
            limit,
            unsent,
            largest_packet,
        } = *setting;
        let mut receiver = ReceiveCredit::new(u32::MAX);
        receiver.receive(beginning).expect("room for 2^32 - 1");
        receiver.consume(beginning, beginning);
        receiver.set_buf_alloc(buf_alloc);
        let mut sender = SendCredit::default();
        sender.update(u32::MAX, 0);
        sender.take(beginning, u32::MAX);
        let mut connection = Self {
            accounting,
            sender,
            limit,
            unsent,
            to_receiver: VecDeque::new(),
            to_sender: VecDeque::new(),
            receiver,
            tells_limit,
            queue: VecDeque::new(),
            low_water: 1,
            largest_packet,
            read: 0,
            reads: 0,
            updates: 0,
        };
        connection.advertise();
        connection.act(Action::Learn);
        connection.note_limit(limit);
        connection
    }

    /// The most that the sender can have on its way.
    fn window(&self) -> u32 {
        self.limit.min(self.receiver.buf_alloc())
    }

    /// The most that a reader can wait for.
    fn highest_low_water(&self) -> u32 {
        match self.accounting {
            Accounting::Bytes => self.window().max(1),
            // A packet may wait for its last byte to be read.
            Accounting::Packets => self.window().saturating_sub(self.largest_packet).max(1),
        }
    }

    fn unread(&self) -> u32 {
        self.receiver.unread()
    }

    fn note_limit(&mut self, limit: u32) -> bool {
        let told = if self.tells_limit { limit } else { 0 };
        self.receiver.note_peer_buf_alloc(told)
    }

    /// Any packet of the receiver does this.
    fn advertise(&mut self) {
        self.to_sender.push_back(self.receiver.advertisement());
        self.receiver.advertised();
    }

    fn update_if_wanted(&mut self) {
        if self.receiver.wants_update(self.low_water) {
            self.updates += 1;
            self.advertise();
            assert!(!self.receiver.wants_update(self.low_water), "{self:?}");
        }
    }

    /// Does something; returns whether it could be done.
    fn act(&mut self, action: Action) -> bool {
        match action {
            Action::Send(size) => {
                let wanted = u32::try_from(self.unsent).unwrap_or(u32::MAX);
                let wanted = wanted.min(size).min(self.largest_packet);
                let len = self.sender.take(wanted, self.limit);
                if len == 0 {
                    return false;
                }
                self.unsent -= u64::from(len);
                self.to_receiver.push_back(ToReceiver::Payload(len));
            }
            Action::Arrive => match self.to_receiver.pop_front() {
                None => return false,
                Some(ToReceiver::Payload(len)) => {
                    let received = self.receiver.receive(len);
                    assert_eq!(received, Ok(()), "an honest sender was turned away");
                    self.queue.push_back(Packet { len, read: 0 });
                }
                Some(ToReceiver::BufAlloc(buf_alloc)) => {
                    if self.note_limit(buf_alloc) {
                        self.update_if_wanted();
                    }
                }
            },
            Action::Learn => match self.to_sender.pop_front() {
                None => return false,
                Some(told) => self.sender.update(told.buf_alloc, told.fwd_cnt),
            },
            Action::Read(size) => {
                let all_is_here = self.unsent == 0 && self.to_receiver.is_empty();
                if self.unread() == 0 || (self.unread() < self.low_water && !all_is_here) {
                    return false;
                }
                self.read(size.clamp(1, self.unread()));
                self.update_if_wanted();
            }
            Action::Await(low_water) => {
                self.low_water = low_water.clamp(1, self.highest_low_water());
                self.update_if_wanted();
            }
            Action::Answer => self.advertise(),
            Action::Resize(buf_alloc) => {
                self.receiver.set_buf_alloc(buf_alloc);
                self.low_water = self.low_water.min(self.highest_low_water());
                self.advertise();
            }
            Action::ResizeSender(limit) => {
                self.limit = limit;
                self.low_water = self.low_water.min(self.highest_low_water());
                self.to_receiver.push_back(ToReceiver::BufAlloc(limit));
            }
        }
        true
    }

    fn read(&mut self, size: u32) {
        let mut left = size;
        let mut freed = 0;
        while left > 0 {
            let packet = self.queue.front_mut().expect("as much as was received");
            let part = left.min(packet.len - packet.read);
            packet.read += part;
            left -= part;
            if packet.read == packet.len {
                freed += packet.len;
                self.queue.pop_front();
            }
        }
        self.receiver.consume(
            size,
            match self.accounting {
                Accounting::Bytes => size,
                Accounting::Packets => freed,
            },
        );
        self.read += u64::from(size);
        self.reads += 1;
    }

    fn is_done(&self) -> bool {
        self.unsent == 0 && self.to_receiver.is_empty() && self.unread() == 0
    }

    /// Does the actions in turn until all is sent and read.
    fn run(&mut self, actions: &[Action]) {
        for action in actions {
            self.act(*action);
        }
        // From here on sizes are what they are, and the ends do whatever they can.
        while !self.is_done() {
            let mut progress = false;
            for action in actions {
                progress |= match action {
                    Action::Send(_) | Action::Arrive | Action::Learn | Action::Read(_) => {
                        self.act(*action)
                    }
                    Action::Await(_) => {
                        self.act(*action);
                        false
                    }
                    Action::Answer | Action::Resize(_) | Action::ResizeSender(_) => false,
                };
            }
            // And these at least.
            for action in [
                Action::Learn,
                Action::Send(MAX_PAYLOAD),
                Action::Arrive,
                Action::Read(u32::MAX),
            ] {
                progress |= self.act(action);
            }
            assert!(progress, "sender and reader wait for each other: {self:?}");
        }
    }
}

#[derive(Clone, Debug)]
struct Setting {
    accounting: Accounting,
    beginning: u32,
    buf_alloc: u32,
    limit: u32,
    unsent: u64,
    largest_packet: u32,
}

/// Sizes from 1 to the one given, of all magnitudes.
fn size(largest: u32) -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => (1..=largest, 0..32u32).prop_map(|(size, shift)| (size >> shift).max(1)),
        1 => 1..=largest,
        1 => Just(largest),
    ]
}

fn setting(largest: u32) -> impl Strategy<Value = Setting> {
    let accounting = prop_oneof![Just(Accounting::Bytes), Just(Accounting::Packets)];
    let beginning = prop_oneof![Just(0), (0..1000u32).prop_map(|below| u32::MAX - below)];
    let sizes = (size(largest), size(largest), size(largest.min(MAX_PAYLOAD)));
    (accounting, beginning, sizes, 0..8u32, 0..largest).prop_map(
        |(accounting, beginning, (buf_alloc, limit, largest_packet), times, rest)| Setting {
            accounting,
            beginning,
            buf_alloc,
            limit,
            unsent: u64::from(buf_alloc.min(limit)) * u64::from(times) + u64::from(rest) % 1000,
            largest_packet,
        },
    )
}

fn action(largest: u32) -> impl Strategy<Value = Action> {
    prop_oneof![
        6 => size(largest).prop_map(Action::Send),
        6 => Just(Action::Arrive),
        6 => Just(Action::Learn),
        6 => size(largest).prop_map(Action::Read),
        3 => size(largest).prop_map(Action::Await),
        1 => Just(Action::Answer),
        1 => size(largest).prop_map(Action::Resize),
        1 => size(largest).prop_map(Action::ResizeSender),
    ]
}

/// The magnitudes of buffers: a few bytes, a few packets, and more than the largest packets.
fn largest() -> impl Strategy<Value = u32> {
    prop_oneof![Just(8), Just(1000), Just(300_000)]
}

fn setting_and_actions() -> impl Strategy<Value = (Setting, Vec<Action>)> {
    largest().prop_flat_map(|largest| {
        (
            setting(largest),
            proptest::collection::vec(action(largest), 0..60),
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn sender_and_reader_never_wait_for_each_other(
        (setting, actions) in setting_and_actions(),
        tells_limit in any::<bool>(),
    ) {
        Connection::new(&setting, tells_limit).run(&actions);
    }

    /// A reader that waits for less than a quarter of what can be on its way causes an update for the other three, and never for
    /// less. Where credit goes back by packets, that holds for packets which fit into the rest of the quarter: of a larger one, which
    /// is read to its middle, the credit may be needed sooner.
    #[test]
    fn updates_are_few(
        (setting, actions) in setting_and_actions(),
        low_water in any::<u32>(),
    ) {
        let mut connection = Connection::new(&setting, true);
        let quarter = connection.window() / 4;
        connection.low_water = (low_water % quarter.max(1)).max(1).min(connection.highest_low_water());
        if setting.accounting == Accounting::Packets {
            let left = quarter.saturating_sub(connection.low_water).max(1);
            connection.largest_packet = connection.largest_packet.min(left);
        }
        let actions: Vec<_> = actions
            .into_iter()
            .filter(|action| {
                !matches!(action, Action::Await(_) | Action::Resize(_) | Action::ResizeSender(_))
            })
            .collect();
        connection.run(&actions);
        let bytes_for_each = u64::from((quarter * 3).max(1));
        prop_assert!(
            connection.updates * bytes_for_each <= connection.read,
            "{} updates for {} bytes, a quarter of the window is {}",
            connection.updates, connection.read, quarter
        );
    }

    /// A peer that tells nothing of its limit gets one for each read at most.
    #[test]
    fn updates_are_no_more_than_reads((setting, actions) in setting_and_actions()) {
        let mut connection = Connection::new(&setting, false);
        let actions: Vec<_> = actions
            .into_iter()
            .filter(|action| !matches!(action, Action::Await(_) | Action::Resize(_)))
            .collect();
        connection.run(&actions);
        prop_assert!(connection.updates <= connection.reads);
    }
}

/// A peer whose own buffer is small sends no more than that at once, however large ours is.
#[test]
fn a_peer_with_a_small_buffer_is_told_in_time() {
    let setting = Setting {
        accounting: Accounting::Bytes,
        beginning: 0,
        buf_alloc: 256 * 1024,
        limit: 16 * 1024,
        unsent: 1024 * 1024,
        largest_packet: MAX_PAYLOAD,
    };
    for tells_limit in [false, true] {
        Connection::new(&setting, tells_limit).run(&[]);
    }
}

/// Requests and answers in turn need no update: the answers carry the credit.
#[test]
fn a_conversation_needs_no_updates() {
    let setting = Setting {
        accounting: Accounting::Bytes,
        beginning: 0,
        buf_alloc: 256 * 1024,
        limit: 256 * 1024,
        unsent: 1_000_000,
        largest_packet: 100,
    };
    let mut connection = Connection::new(&setting, true);
    connection.run(
        &[
            Action::Learn,
            Action::Send(100),
            Action::Arrive,
            Action::Read(100),
            Action::Answer,
        ]
        .repeat(10_000),
    );
    assert_eq!((connection.reads, connection.updates), (10_000, 0));
}
