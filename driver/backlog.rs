// SPDX-License-Identifier: GPL-2.0

//! Packets that wait for room in the transmit virtqueue, for memory to map them, or for others to go with, in an order
//! that is fair to connections.
//!
//! Packets of a connection stay in order. Connections take turns: the first waiting packet of each is in one queue,
//! and when it has left for the device the next one of the connection goes to that queue's end. So a packet waits for
//! those of its own connection, and between two of these for at most one of each other connection that has some.

use super::{
    connection::Connection,
    tx::{Outgoing, OutgoingPacket},
};
use crate::{
    af_vsock_glue::skb::SkBuffQueue,
    protocol::{
        cid::Cid,
        header::{Header, Op},
    },
};
use kernel::sync::{Arc, ArcBorrow, LockedBy};

/// Packets that wait.
pub(crate) struct Backlog {
    /// The first packet of each connection that has some, and answers that are of no connection.
    turns: SkBuffQueue<Outgoing>,
    /// How many packets wait that answer one of the device.
    replies: usize,
}

/// The packets of a connection that wait.
pub(crate) struct WaitingPackets {
    /// Whether the first is in [`Backlog::turns`], or on its way from there to the device.
    has_turn: bool,
    /// All others.
    behind: SkBuffQueue<Outgoing>,
    /// A packet that goes before the first.
    before: Option<OutgoingPacket>,
    /// The guest's and the peer's CID, where these have changed since there are packets.
    cids: Option<(Cid, Cid)>,
}

impl WaitingPackets {
    /// No packets.
    pub(crate) fn new() -> Self {
        Self {
            has_turn: false,
            behind: SkBuffQueue::new(),
            before: None,
            cids: None,
        }
    }
}

/// [`WaitingPackets`] of a connection, to be had by who has the backlog.
pub(crate) type Waiting = LockedBy<WaitingPackets, super::tx::TxState>;

/// Whose turn it is while its packet is given to the device.
pub(crate) enum Turn {
    /// A connection's, with its first packet.
    First(Arc<Connection>),
    /// A connection's, with the packet that goes before the first.
    Before(Arc<Connection>),
    /// That of an answer that is of no connection.
    Unconnected,
}

impl super::tx::TxState {
    /// Appends a packet to those of its connection.
    pub(crate) fn push_waiting(&mut self, packet: OutgoingPacket) {
        self.backlog.replies += usize::from(packet.control().is_reply());
        if let Some(connection) = packet.control().connection() {
            let connection: Arc<Connection> = connection.into();
            let waiting = connection.waiting().access_mut(self);
            if waiting.has_turn {
                waiting.behind.push_back(packet);
                return;
            }
            waiting.has_turn = true;
        }
        self.backlog.turns.push_back(packet);
    }

    /// Takes the packet whose turn it is. [`Self::end_turn`] or [`Self::keep_turn`] has to follow.
    pub(crate) fn take_turn(&mut self) -> Option<(OutgoingPacket, Turn)> {
        let mut packet = self.backlog.turns.pop_front()?;
        let Some(connection) = packet.control().connection().map(Arc::from) else {
            self.backlog.replies -= usize::from(packet.control().is_reply());
            return Some((packet, Turn::Unconnected));
        };
        let waiting = connection.waiting().access_mut(self);
        if let Some(before) = waiting.before.take() {
            self.backlog.turns.push_front(packet);
            return Some((before, Turn::Before(connection)));
        }
        if let (Some((guest_cid, host_cid)), Some(header)) = (waiting.cids, packet.front_mut()) {
            Header::set_cids(header, guest_cid, host_cid);
        }
        self.backlog.replies -= usize::from(packet.control().is_reply());
        Some((packet, Turn::First(connection)))
    }

    /// The packet is with the device: the connection's next one gets in line.
    pub(crate) fn end_turn(&mut self, turn: Turn) {
        let Turn::First(connection) = turn else {
            return;
        };
        let waiting = connection.waiting().access_mut(self);
        match waiting.behind.pop_front() {
            Some(next) => self.backlog.turns.push_back(next),
            None => {
                waiting.has_turn = false;
                waiting.cids = None;
            }
        }
    }

    /// The device has no room: the packet stays where it was.
    pub(crate) fn keep_turn(&mut self, packet: OutgoingPacket, turn: Turn) {
        if let Turn::Before(connection) = turn {
            connection.waiting().access_mut(self).before = Some(packet);
            return;
        }
        self.backlog.replies += usize::from(packet.control().is_reply());
        self.backlog.turns.push_front(packet);
    }

    /// Gives the packets of a connection that wait other CIDs.
    pub(crate) fn readdress(&mut self, connection: &Connection, guest_cid: Cid, host_cid: Cid) {
        let waiting = connection.waiting().access_mut(self);
        if waiting.has_turn {
            waiting.cids = Some((guest_cid, host_cid));
        }
    }

    /// Puts a packet before those of its connection that wait, in place of one that was put there before. Gives it back
    /// where none waits.
    pub(crate) fn put_before_waiting(
        &mut self,
        connection: &Connection,
        packet: OutgoingPacket,
    ) -> Option<OutgoingPacket> {
        let waiting = connection.waiting().access_mut(self);
        if !waiting.has_turn {
            return Some(packet);
        }
        // What is freed is a control packet, whose socket the caller has: that wakes writers and takes no lock of ours.
        waiting.before = Some(packet);
        None
    }

    /// Gives requests that wait, and what waits behind them, the guest's present CID. They are the first of their connections (on
    /// Linux 7.2 an RST of the one before may be first).
    pub(crate) fn readdress_requests(&mut self, guest_cid: Cid) {
        let turns = self.backlog.turns.take();
        turns.for_each(|packet| {
            if let (Some(connection), Some(header)) =
                (packet.control().connection(), packet.front())
            {
                let header = Header::parse(header);
                if let (Op::Request, Ok(host_cid)) = (header.op, Cid::from_wire(header.dst_cid)) {
                    self.readdress(&connection, guest_cid, host_cid);
                }
            }
        });
        self.backlog.turns = turns;
    }

    /// Whether no packet waits.
    pub(crate) fn nothing_waits(&self) -> bool {
        self.backlog.turns.is_empty()
    }

    /// How many packets wait that answer one of the device.
    pub(crate) fn waiting_replies(&self) -> usize {
        self.backlog.replies
    }

    /// How many packets wait. Looks at each connection that has some.
    pub(crate) fn count_waiting(&mut self) -> usize {
        let turns = self.backlog.turns.take();
        let mut count = turns.len();
        turns.for_each(|packet| {
            if let Some(connection) = packet.control().connection() {
                let waiting = connection.waiting().access_mut(self);
                count += waiting.behind.len() + usize::from(waiting.before.is_some());
            }
        });
        self.backlog.turns = turns;
        count
    }

    /// Takes all packets of a connection for which `matches` holds, and which are not in line already.
    fn take_behind(
        &mut self,
        connection: &Connection,
        matches: impl FnMut(&OutgoingPacket) -> bool,
    ) -> SkBuffQueue<Outgoing> {
        let taken = connection
            .waiting()
            .access_mut(self)
            .behind
            .extract(matches);
        self.backlog.replies -= replies(&taken);
        taken
    }

    /// Takes the credit updates of a connection, but for one that is first.
    pub(crate) fn take_credit_updates(&mut self, connection: &Connection) -> SkBuffQueue<Outgoing> {
        self.take_behind(connection, |packet| packet.control().is_credit_update())
    }

    /// Takes all packets of a connection.
    pub(crate) fn take_waiting_of(&mut self, connection: &Connection) -> SkBuffQueue<Outgoing> {
        let mut taken = self.take_behind(connection, |_| true);
        let waiting = connection.waiting().access_mut(self);
        waiting.cids = None;
        taken.extend(waiting.before.take());
        if core::mem::take(&mut waiting.has_turn) {
            taken.prepend(
                self.backlog
                    .take_turns(|of| core::ptr::eq(&*of, connection)),
            );
        }
        taken
    }

    /// Takes all packets of all connections that `is_over` holds of, in one pass.
    pub(crate) fn take_waiting_where(
        &mut self,
        mut is_over: impl FnMut(&Connection) -> bool,
    ) -> SkBuffQueue<Outgoing> {
        let mut first = self.backlog.take_turns(|connection| is_over(&connection));
        let mut taken = SkBuffQueue::new();
        while let Some(packet) = first.pop_front() {
            if let Some(connection) = packet.control().connection() {
                let connection: Arc<Connection> = connection.into();
                taken.prepend(self.take_behind(&connection, |_| true));
                let waiting = connection.waiting().access_mut(self);
                waiting.has_turn = false;
                waiting.cids = None;
                taken.extend(waiting.before.take());
            }
            taken.push_back(packet);
        }
        taken
    }

    /// Takes everything.
    pub(crate) fn take_all_waiting(&mut self) -> SkBuffQueue<Outgoing> {
        let mut taken = self.take_waiting_where(|_| true);
        taken.prepend(self.backlog.turns.take());
        self.backlog.replies = 0;
        taken
    }
}

impl Backlog {
    pub(crate) fn new() -> Self {
        Self {
            turns: SkBuffQueue::new(),
            replies: 0,
        }
    }

    /// Takes packets of connections out of the line.
    fn take_turns(
        &mut self,
        mut matches: impl FnMut(ArcBorrow<'_, Connection>) -> bool,
    ) -> SkBuffQueue<Outgoing> {
        let taken = self
            .turns
            .extract(|packet| packet.control().connection().is_some_and(&mut matches));
        self.replies -= replies(&taken);
        taken
    }
}

/// How many packets answer one of the device.
fn replies(packets: &SkBuffQueue<Outgoing>) -> usize {
    let mut count = 0;
    packets.for_each(|packet| {
        count += usize::from(packet.control().is_reply());
    });
    count
}
