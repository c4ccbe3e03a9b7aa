// SPDX-License-Identifier: GPL-2.0

//! The device with the host's ends of connections, one after the other migrations: before a migration it is the old
//! host's, after it the new one's, to which the listed ends were carried.

use super::driver::{Configuration, Queues};
use super::{cid, packet, Fault, Packet, Scenario, SERVICE};
use std::collections::VecDeque;
use vsock_protocol::cid::Cid;
use vsock_protocol::connection::{step, State, Step};
use vsock_protocol::credit::{ReceiveCredit, SendCredit};
use vsock_protocol::header::{Header, Op, SocketType, SHUTDOWN_BOTH};

/// The guest's and the host's CID.
type Addresses = (Cid, Cid);

/// The host's end of a connection. One that is over is not there any more.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct End {
    /// Which connection it is the host's end of.
    pub id: u8,
    pub state: State,
    pub host_port: u32,
    pub guest_port: u32,
    /// Its present addresses are the last ones. Those before are of migrations that the guest has not answered.
    pub addresses: Vec<Addresses>,
    pub send: SendCredit,
    pub receive: ReceiveCredit,
    pub sent: u8,
    pub received: u8,
    pub is_closed: bool,
    /// What it has to send when the tuple was answered.
    owes: Option<Op>,
}

impl End {
    pub fn new(id: u8, state: State, addresses: Addresses, ports: (u32, u32), window: u32) -> Self {
        Self {
            id,
            state,
            host_port: ports.0,
            guest_port: ports.1,
            addresses: vec![addresses],
            send: SendCredit::default(),
            receive: ReceiveCredit::new(window),
            sent: 0,
            received: 0,
            is_closed: false,
            owes: None,
        }
    }

    /// Whether its tuple was not answered yet.
    pub fn is_held(&self) -> bool {
        self.addresses.len() > 1
    }

    pub fn present(&self) -> Addresses {
        self.addresses[self.addresses.len() - 1]
    }

    fn header(&mut self, op: Op) -> Header {
        let credit = self.receive.advertisement();
        self.receive.advertised();
        let (guest_cid, host_cid) = self.present();
        Header {
            src_cid: host_cid.get().into(),
            dst_cid: guest_cid.get().into(),
            src_port: self.host_port,
            dst_port: self.guest_port,
            len: u32::from(op == Op::Rw),
            socket_type: SocketType::Stream,
            op,
            flags: if op == Op::Shutdown { SHUTDOWN_BOTH } else { 0 },
            buf_alloc: credit.buf_alloc,
            fwd_cnt: credit.fwd_cnt,
        }
    }

    fn packet(&mut self, op: Op) -> Packet {
        let byte = (op == Op::Rw).then_some((self.id, self.sent));
        self.sent += u8::from(op == Op::Rw);
        let mut packet = packet(self.header(op), byte);
        packet.of = Some(self.id);
        packet
    }
}

/// What goes to the guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum ForGuest {
    Packet(Packet),
    /// Parts of an update.
    Parts(VecDeque<Vec<u8>>),
    /// That of a transport reset.
    ResetEvent,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    pub guest_cid: Cid,
    host_cid: Cid,
    /// The guest's CIDs of before.
    old_guest_cids: Vec<Cid>,
    pub ends: Vec<End>,
    for_guest: VecDeque<ForGuest>,
    rx_used: u16,
    /// `rx_used` of the update whose first part was made available.
    stamp: Option<u16>,
    pub migrations: u8,
    pub resets: u8,
    generation: u32,
    /// Whether an update has changed `guest_cid` since a transport reset.
    is_ahead: bool,
    /// The host's and the guest's port of connections that have ended with the guest's present CID, and whose packets may be
    /// on their way.
    not_free: Vec<(u32, u32)>,
}

/// What the device may do next, besides what programs of the host make it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceStep {
    /// Takes a packet of the driver.
    Take,
    /// Makes the next packet or event available.
    Put,
    /// Makes a packet available that is behind an event.
    PutBehindEvent,
}

impl Device {
    pub fn new(guest_cid: Cid, host_cid: Cid, migrations: u8, resets: u8) -> Self {
        Self {
            guest_cid,
            host_cid,
            old_guest_cids: Vec::new(),
            ends: Vec::new(),
            for_guest: VecDeque::new(),
            rx_used: 0,
            stamp: None,
            migrations,
            resets,
            generation: 0,
            is_ahead: false,
            not_free: Vec::new(),
        }
    }

    pub fn configuration(&self) -> Configuration {
        Configuration {
            guest_cid: self.guest_cid,
            is_ahead: self.is_ahead,
        }
    }

    pub fn steps(&self, queues: &Queues, scenario: &Scenario, steps: &mut Vec<DeviceStep>) {
        if !queues.tx.is_empty() {
            steps.push(DeviceStep::Take);
        }
        match self.for_guest.front() {
            None => {}
            Some(ForGuest::Packet(_)) => steps.push(DeviceStep::Put),
            Some(event) => {
                if queues.events.len() < scenario.event_buffers {
                    steps.push(DeviceStep::Put);
                }
                let overtaken = match event {
                    ForGuest::ResetEvent => Fault::PacketsOvertakeResets,
                    _ => Fault::PacketsOvertakeUpdates,
                };
                let overtakes = scenario.fault == Some(overtaken);
                if overtakes && matches!(self.for_guest.get(1), Some(ForGuest::Packet(_))) {
                    steps.push(DeviceStep::PutBehindEvent);
                }
            }
        }
    }

    pub fn act(
        &mut self,
        step: DeviceStep,
        queues: &mut Queues,
        scenario: &Scenario,
    ) -> Result<(), &'static str> {
        match step {
            DeviceStep::Take => {
                let packet = queues.tx.remove(0);
                return self.receive(packet, scenario);
            }
            DeviceStep::Put => match self.for_guest.front_mut() {
                Some(ForGuest::Packet(_)) => self.put_packet(0, queues),
                Some(ForGuest::Parts(parts)) => {
                    let rx_used = match scenario.fault {
                        Some(Fault::CountsNoBuffers) => 0,
                        _ => *self.stamp.get_or_insert(self.rx_used),
                    };
                    if let Some(mut part) = parts.pop_front() {
                        part[36..38].copy_from_slice(&rx_used.to_le_bytes());
                        queues.events.push(part);
                    }
                    if parts.is_empty() {
                        self.for_guest.pop_front();
                        self.stamp = None;
                    }
                }
                Some(ForGuest::ResetEvent) => {
                    self.for_guest.pop_front();
                    queues.events.push(0_u32.to_le_bytes().to_vec());
                }
                None => {}
            },
            DeviceStep::PutBehindEvent => self.put_packet(1, queues),
        }
        Ok(())
    }

    fn put_packet(&mut self, at: usize, queues: &mut Queues) {
        if let Some(ForGuest::Packet(packet)) = self.for_guest.remove(at) {
            self.rx_used = self.rx_used.wrapping_add(1);
            queues.rx.push(packet);
        }
    }

    fn send(&mut self, packet: Packet) {
        self.for_guest.push_back(ForGuest::Packet(packet));
    }

    fn send_of(&mut self, at: usize, op: Op) {
        let packet = self.ends[at].packet(op);
        self.send(packet);
    }

    // Programs of the host

    pub fn can_send(&self, at: usize, scenario: &Scenario) -> bool {
        let end = &self.ends[at];
        end.state == State::Established
            && !end.is_held()
            && !end.is_closed
            && end.sent < scenario.host_bytes
            && end.send.available(u32::MAX) > 0
    }

    pub fn write(&mut self, at: usize) {
        self.ends[at].send.take(1, u32::MAX);
        self.send_of(at, Op::Rw);
    }

    pub fn close(&mut self, at: usize) {
        self.ends[at].is_closed = true;
        self.send_when_answered(at, Op::Shutdown);
    }

    pub fn connect(&mut self, id: u8, ports: (u32, u32), scenario: &Scenario) {
        let addresses = (self.guest_cid, self.host_cid);
        let end = End::new(id, State::Connecting, addresses, ports, scenario.window);
        self.ends.push(end);
        self.send_of(self.ends.len() - 1, Op::Request);
    }

    /// Whether no connection has these ports and the present addresses.
    pub fn is_free(&self, ports: (u32, u32)) -> bool {
        let is_used = |end: &End| (end.host_port, end.guest_port) == ports;
        !self.ends.iter().any(is_used) && !self.not_free.contains(&ports)
    }

    // Migrations and resets

    /// The ends that may be listed: those of which the guest was told.
    pub fn listable(&self) -> Vec<u8> {
        let waits_for_response = |end: &&End| {
            self.for_guest.iter().any(|waiting| {
                matches!(waiting, ForGuest::Packet(packet)
                    if packet.header.op == Op::Response && packet.of == Some(end.id))
            })
        };
        self.ends
            .iter()
            .filter(|end| end.state == State::Established && !waits_for_response(end))
            .map(|end| end.id)
            .collect()
    }

    /// Goes on as another device, with the listed ends and, where `moves` says so, other CIDs.
    pub fn migrate(&mut self, listed: &[u8], scenario: &Scenario) {
        let before = (self.guest_cid, self.host_cid);
        self.migrations -= 1;
        self.generation += 1;
        if scenario.moves {
            self.guest_cid = cid(before.0.get() + 1);
            self.host_cid = cid(before.1.get() + 1);
            self.is_ahead = scenario.resets > self.resets;
        }
        self.old_guest_cids.push(before.0);
        self.end_connections(|end| !listed.contains(&end.id), scenario);
        let answers = self.take_back_packets(scenario);
        let tuples: Vec<_> = self
            .ends
            .iter_mut()
            .map(|end| {
                let (_, host_old_cid) = end.present();
                end.addresses.push((self.guest_cid, self.host_cid));
                (host_old_cid, self.host_cid, end.host_port, end.guest_port)
            })
            .collect();
        let parts = parts(
            self.generation,
            (before.0, self.guest_cid),
            &tuples,
            scenario.tuples_per_part,
        );
        self.for_guest.push_back(ForGuest::Parts(parts));
        for mut answer in answers {
            answer.header.dst_cid = self.guest_cid.get().into();
            self.send(answer);
        }
    }

    /// Ends all connections. What was not made available of an update is not made available any more.
    pub fn reset(&mut self, scenario: &Scenario) {
        self.resets -= 1;
        self.old_guest_cids.push(self.guest_cid);
        if scenario.moves {
            self.guest_cid = cid(self.guest_cid.get() + 1);
        }
        self.is_ahead = false;
        if scenario.fault != Some(Fault::KeepsEndsAtReset) {
            self.end_connections(|_| true, scenario);
        }
        let answers = self.take_back_packets(scenario);
        self.for_guest
            .retain(|waiting| !matches!(waiting, ForGuest::Parts(_)));
        self.stamp = None;
        self.for_guest.push_back(ForGuest::ResetEvent);
        for mut answer in answers {
            answer.header.dst_cid = self.guest_cid.get().into();
            self.send(answer);
        }
    }

    /// Ends connections; the programs of the host learn of it.
    fn end_connections(&mut self, is_over: impl Fn(&End) -> bool, scenario: &Scenario) {
        if !scenario.moves && scenario.fault != Some(Fault::ReusesAddresses) {
            let over = self.ends.iter().filter(|end| is_over(end));
            self.not_free
                .extend(over.map(|end| (end.host_port, end.guest_port)));
        }
        self.ends.retain(|end| !is_over(end));
    }

    /// Takes back the packets that were not made available: what the ends have written is sent later. Returns the answers
    /// to requests, which the guest still waits for.
    fn take_back_packets(&mut self, scenario: &Scenario) -> Vec<Packet> {
        let mut answers = Vec::new();
        for waiting in std::mem::take(&mut self.for_guest) {
            let ForGuest::Packet(mut packet) = waiting else {
                self.for_guest.push_back(waiting);
                continue;
            };
            let end = self.ends.iter_mut().find(|end| packet.of == Some(end.id));
            match (packet.header.op, end) {
                (Op::Rw, Some(end)) => {
                    if scenario.fault != Some(Fault::LosesWhatWaits) {
                        end.sent -= 1;
                    }
                    end.send.give_back(1);
                }
                (Op::Shutdown, Some(end)) => end.owes = Some(Op::Shutdown),
                // What a credit update says comes with the answer to the guest's.
                (_, Some(_)) => {}
                (Op::Response | Op::Rst, None)
                    if scenario.fault != Some(Fault::ForgetsRequests) =>
                {
                    packet.header.op = Op::Rst;
                    packet.byte = None;
                    answers.push(packet);
                }
                (_, None) => {}
            }
        }
        answers
    }

    // Packets of the driver

    /// Where a packet's addresses are those of an end: which one, and the first and last of its addresses that they are.
    fn find(&self, header: &Header) -> Option<(usize, usize, usize)> {
        self.ends.iter().enumerate().find_map(|(at, end)| {
            let is_of = |(guest_cid, host_cid): &Addresses| {
                (guest_cid.get().into(), host_cid.get().into()) == (header.src_cid, header.dst_cid)
            };
            let first = end.addresses.iter().position(is_of)?;
            let last = end.addresses.iter().rposition(is_of)?;
            let ports = (end.host_port, end.guest_port);
            (ports == (header.dst_port, header.src_port)).then_some((at, first, last))
        })
    }

    fn receive(&mut self, mut packet: Packet, scenario: &Scenario) -> Result<(), &'static str> {
        let header = &mut packet.header;
        let is_old = |cid: &Cid| u64::from(cid.get()) == header.src_cid;
        if header.op == Op::Request && self.old_guest_cids.iter().any(is_old) {
            // It was on its way when the CID changed.
            if scenario.fault == Some(Fault::DropsOldRequests) && scenario.moves {
                return Ok(());
            }
            header.src_cid = self.guest_cid.get().into();
        }
        let header = packet.header;
        if let Some((at, first, last)) = self.find(&header) {
            let is_old = first == 0 && self.ends[at].is_held();
            if is_old && last == 0 && scenario.fault == Some(Fault::DropsOldPackets) {
                return Ok(());
            }
            // Where the addresses stay the same nothing but the answer tells which they are.
            if first > 0 || (last > 0 && header.op == Op::CreditRequest) {
                return self.receive_answer(at, last, &packet);
            }
            return self.receive_for(at, &packet);
        }
        if header.op == Op::Request && header.dst_port == SERVICE {
            self.accept(&packet, scenario);
        } else if header.src_cid == u64::from(self.guest_cid.get()) {
            if let Some(mut rst) = header.reset_reply().map(|rst| super::packet(rst, None)) {
                rst.of = packet.of;
                self.send(rst);
            }
        }
        Ok(())
    }

    /// A packet that bears addresses of a migration that was not answered. The answer is one to those before, too.
    fn receive_answer(
        &mut self,
        at: usize,
        of: usize,
        packet: &Packet,
    ) -> Result<(), &'static str> {
        let end = &mut self.ends[at];
        if packet.header.op == Op::Rst {
            self.ends.remove(at);
            return Ok(());
        }
        if packet.header.op != Op::CreditRequest {
            return Err("a packet bears new addresses before the tuple was answered");
        }
        end.addresses.drain(..of);
        end.send
            .update(packet.header.buf_alloc, packet.header.fwd_cnt);
        if end.is_held() {
            return Ok(());
        }
        match end.owes.take() {
            Some(Op::Rst) => {
                self.send_of(at, Op::Rst);
                self.ends.remove(at);
            }
            owed => {
                self.send_of(at, Op::CreditUpdate);
                if let Some(op) = owed {
                    self.send_of(at, op);
                }
            }
        }
        Ok(())
    }

    fn send_when_answered(&mut self, at: usize, op: Op) {
        if self.ends[at].is_held() {
            self.ends[at].owes = Some(op);
            return;
        }
        self.send_of(at, op);
        if op == Op::Rst {
            self.ends.remove(at);
        }
    }

    fn receive_for(&mut self, at: usize, packet: &Packet) -> Result<(), &'static str> {
        let header = packet.header;
        let end = &mut self.ends[at];
        end.send.update(header.buf_alloc, header.fwd_cnt);
        match step(end.state, 0, &header) {
            Step::Establish => {
                end.state = State::Established;
                // The driver has had the request, and with it all that came before.
                self.not_free.clear();
                if packet.of != Some(end.id) {
                    return Err("a response to another attempt of the host");
                }
            }
            Step::Deliver => {
                if packet.byte != Some((end.id, end.received)) {
                    return Err("the host gets a byte that is not the next one of its connection");
                }
                end.received += 1;
                end.receive
                    .receive(1)
                    .map_err(|_| "the guest sends more than its credit")?;
                end.receive.consume(1, 1);
                // After an answer credit is told anyway.
                if !end.is_held() && end.receive.wants_update(1) {
                    self.send_of(at, Op::CreditUpdate);
                }
            }
            Step::SendCredit => self.send_of(at, Op::CreditUpdate),
            Step::PeerShutdown(_) => self.send_when_answered(at, Op::Rst),
            Step::PeerClosed => {
                self.ends.remove(at);
            }
            Step::FailConnect { reply, .. } => {
                self.ends.remove(at);
                if let Some(rst) = header.reset_reply().filter(|_| reply) {
                    self.send(super::packet(rst, None));
                }
            }
            Step::RespondAgain | Step::PeerForgot => {
                return Err("a request on a connection that there is")
            }
            Step::Accept | Step::Refuse | Step::NoteCredit | Step::Drop => {}
        }
        Ok(())
    }

    fn accept(&mut self, request: &Packet, scenario: &Scenario) {
        let header = request.header;
        let (Some(id), Ok(host_cid)) = (request.of, Cid::from_wire(header.dst_cid)) else {
            return;
        };
        // The host answers by the CID that the guest knows it by.
        let addresses = (self.guest_cid, host_cid);
        let ports = (header.dst_port, header.src_port);
        let mut end = End::new(id, State::Established, addresses, ports, scenario.window);
        end.send.update(header.buf_alloc, header.fwd_cnt);
        self.ends.push(end);
        self.send_of(self.ends.len() - 1, Op::Response);
    }
}

/// The events of an update.
fn parts(
    generation: u32,
    guest_cids: (Cid, Cid),
    tuples: &[(Cid, Cid, u32, u32)],
    tuples_per_part: usize,
) -> VecDeque<Vec<u8>> {
    let chunks: Vec<_> = match tuples {
        [] => vec![tuples],
        tuples => tuples.chunks(tuples_per_part).collect(),
    };
    let mut first = 0;
    let mut parts = VecDeque::new();
    for chunk in chunks {
        let mut event = Vec::new();
        event.extend(1_u32.to_le_bytes());
        event.extend(generation.to_le_bytes());
        event.extend(u64::from(guest_cids.0.get()).to_le_bytes());
        event.extend(u64::from(guest_cids.1.get()).to_le_bytes());
        for number in [tuples.len(), first, chunk.len(), 0] {
            event.extend((number as u32).to_le_bytes());
        }
        for (old, new, host_port, guest_port) in chunk {
            event.extend(u64::from(old.get()).to_le_bytes());
            event.extend(u64::from(new.get()).to_le_bytes());
            event.extend(host_port.to_le_bytes());
            event.extend(guest_port.to_le_bytes());
            event.extend(u64::from(u16::from(SocketType::Stream)).to_le_bytes());
        }
        first += chunk.len();
        parts.push_back(event);
    }
    parts
}
