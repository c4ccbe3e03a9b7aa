// SPDX-License-Identifier: GPL-2.0

//! Credit with counters that have no end, and the comparison of the real thing with it.
//!
//! The property tests and the fuzz target share this: they make up operations as numbers, [`Sender::apply`] and
//! [`Receiver::apply`] carry them out on both and panic where they differ.

use vsock_protocol::credit::{CreditExceeded, ReceiveCredit, SendCredit};

/// Counters wrap here on the wire.
const WIRE: i128 = 1 << 32;

/// An operation: what to do, and two arguments.
pub type Operation = (u8, u32, u32);

/// A count as it is on the wire.
fn on_wire(count: i128) -> u32 {
    u32::try_from(count.rem_euclid(WIRE)).expect("the rest of a division by 2^32")
}

fn cut(count: i128) -> u32 {
    u32::try_from(count.clamp(0, WIRE - 1)).expect("a number of 32 bits")
}

/// [`SendCredit`] and what it should be.
#[derive(Debug, Default)]
pub struct Sender {
    credit: SendCredit,
    sent: i128,
    /// Bytes that the peer says it has consumed. A peer may lie.
    consumed: i128,
    peer_buf_alloc: u32,
    /// Bytes of the last take that have not been given back.
    taken: u32,
}

impl Sender {
    /// A sender that has sent `count` bytes, all of which have been consumed.
    pub fn after(count: u32) -> Self {
        let mut sender = Self::default();
        sender.update(u32::MAX, 0);
        sender.take(count, u32::MAX);
        sender.update(0, i128::from(count));
        assert_eq!(sender.sent, i128::from(count));
        sender
    }

    pub fn apply(&mut self, (what, first, second): Operation) {
        match what % 6 {
            0 | 1 => self.take(first, second),
            2 => {
                let unused = first.min(self.taken);
                self.credit.give_back(unused);
                self.sent -= i128::from(unused);
                self.taken -= unused;
            }
            // An honest peer has consumed more than before, and nothing that was not sent.
            3 | 4 => {
                let consumed = (self.consumed + i128::from(first)).min(self.sent);
                self.update(second, consumed);
            }
            _ => self.update(second, i128::from(first)),
        }
        for limit in [second, first, u32::MAX] {
            assert_eq!(self.credit.available(limit), self.available(limit));
            assert_eq!(
                self.credit.largest_message(limit),
                self.peer_buf_alloc.min(limit)
            );
        }
    }

    fn available(&self, limit: u32) -> u32 {
        // For an honest peer the difference is in that range anyway.
        let in_flight = (self.sent - self.consumed).rem_euclid(WIRE);
        cut(i128::from(self.peer_buf_alloc.min(limit)) - in_flight)
    }

    fn take(&mut self, wanted: u32, limit: u32) {
        let expected = wanted.min(self.available(limit));
        assert_eq!(self.credit.take(wanted, limit), expected);
        self.sent += i128::from(expected);
        self.taken = expected;
    }

    fn update(&mut self, peer_buf_alloc: u32, consumed: i128) {
        self.credit.update(peer_buf_alloc, on_wire(consumed));
        self.peer_buf_alloc = peer_buf_alloc;
        self.consumed = consumed;
    }
}

/// [`ReceiveCredit`] and what it should be.
#[derive(Debug)]
pub struct Receiver {
    credit: ReceiveCredit,
    buf_alloc: u32,
    received: i128,
    read: i128,
    freed: i128,
    /// What the peer was told last: what was freed, and the size of the buffer.
    told: (i128, u32),
    /// How many bytes the peer has ever been allowed to send.
    allowed: i128,
}

impl Receiver {
    /// A receiver that has received and freed `count` bytes, and has not told its peer anything.
    pub fn after(count: u32) -> Self {
        let mut receiver = Self {
            credit: ReceiveCredit::new(u32::MAX),
            buf_alloc: u32::MAX,
            received: 0,
            read: 0,
            freed: 0,
            told: (0, 0),
            allowed: 0,
        };
        receiver.receive(count);
        receiver.consume(count, count);
        receiver.resize(0);
        assert_eq!(receiver.freed, i128::from(count));
        receiver
    }

    pub fn apply(&mut self, (what, first, second): Operation) {
        match what % 8 {
            0 | 1 => self.receive(first),
            2 => {
                // All that is allowed.
                let room =
                    self.allowed.max(self.freed + i128::from(self.buf_alloc)) - self.received;
                self.receive(cut(room));
                self.receive(1);
            }
            3 | 4 => {
                let read = i128::from(first).min(self.received - self.read);
                let freed = i128::from(second).min(self.read + read - self.freed);
                self.consume(cut(read), cut(freed));
            }
            5 => self.resize(first),
            _ => {
                self.credit.advertised();
                self.told = (self.freed, self.buf_alloc);
                self.allowed = self.allowed.max(self.freed + i128::from(self.buf_alloc));
            }
        }
        let unadvertised =
            self.freed - self.told.0 + i128::from(self.buf_alloc.saturating_sub(self.told.1));
        let advertisement = self.credit.advertisement();
        assert_eq!(advertisement.buf_alloc, self.buf_alloc);
        assert_eq!(advertisement.fwd_cnt, on_wire(self.freed));
        assert_eq!(self.credit.buf_alloc(), self.buf_alloc);
        assert_eq!(i128::from(self.credit.unread()), self.received - self.read);
        assert_eq!(self.credit.unadvertised(), cut(unadvertised));
        if unadvertised == 0 {
            assert!(!self.credit.wants_update(second), "there is no news");
        }
    }

    fn receive(&mut self, len: u32) {
        let received = self.received + i128::from(len);
        let limit = self.allowed.max(self.freed + i128::from(self.buf_alloc));
        let before = format!("{:?}", self.credit);
        // The bytes in the buffer are counted in 32 bits.
        if received <= limit && received - self.freed < WIRE {
            assert_eq!(self.credit.receive(len), Ok(()));
            self.received = received;
        } else {
            assert_eq!(self.credit.receive(len), Err(CreditExceeded));
            assert_eq!(format!("{:?}", self.credit), before);
        }
    }

    fn consume(&mut self, read: u32, freed: u32) {
        self.credit.consume(read, freed);
        self.read += i128::from(read);
        self.freed += i128::from(freed);
    }

    fn resize(&mut self, buf_alloc: u32) {
        self.credit.set_buf_alloc(buf_alloc);
        self.buf_alloc = buf_alloc;
    }
}
