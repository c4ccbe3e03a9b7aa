// SPDX-License-Identifier: GPL-2.0

//! The driver: protocol/ decides, and here is what driver/ makes of it, without locks. Where driver/ gives up a lock
//! there is a step, so that applications and the device come between.

use super::updates::{Effect, Updates};
use super::{packet, Fault, Packet, Scenario, LISTENER};
use vsock_protocol::cid::Cid;
use vsock_protocol::connection::{step, State, Step};
use vsock_protocol::credit::{ReceiveCredit, SendCredit};
use vsock_protocol::event::Event;
use vsock_protocol::header::{Header, Op, SocketType, SHUTDOWN_BOTH};
use vsock_protocol::update::{find, Tuple, Update};

/// A socket of the guest. One that is over is not there any more.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Socket {
    /// Which connection it is the guest's end of. Only the oracle knows.
    pub id: u8,
    pub state: State,
    pub guest_cid: Cid,
    pub host_cid: Cid,
    pub host_port: u32,
    pub guest_port: u32,
    pub send: SendCredit,
    pub receive: ReceiveCredit,
    pub sent: u8,
    pub received: u8,
    pub is_closed: bool,
    /// How many transport resets there had been when its request was made.
    resets: u8,
    /// What waits for room in the transmit queue; see driver/backlog.rs.
    waiting: Vec<Packet>,
    before: Option<Packet>,
    cids: Option<(Cid, Cid)>,
}

impl Socket {
    pub fn new(id: u8, state: State, cids: (Cid, Cid), ports: (u32, u32), window: u32) -> Self {
        Self {
            id,
            state,
            guest_cid: cids.0,
            host_cid: cids.1,
            host_port: ports.0,
            guest_port: ports.1,
            send: SendCredit::default(),
            receive: ReceiveCredit::new(window),
            sent: 0,
            received: 0,
            is_closed: false,
            resets: 0,
            waiting: Vec::new(),
            before: None,
            cids: None,
        }
    }

    fn header(&mut self, op: Op, guest_cid: Cid) -> Header {
        let credit = self.receive.advertisement();
        self.receive.advertised();
        Header {
            src_cid: guest_cid.get().into(),
            dst_cid: self.host_cid.get().into(),
            src_port: self.guest_port,
            dst_port: self.host_port,
            len: u32::from(op == Op::Rw),
            socket_type: SocketType::Stream,
            op,
            flags: 0,
            buf_alloc: credit.buf_alloc,
            fwd_cnt: credit.fwd_cnt,
        }
    }
}

/// Whose turn it is to give the device a packet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Turn {
    Socket(u8),
    Unconnected(Packet),
}

/// An update that is being applied, socket by socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Applying {
    update: Update,
    tuples: Vec<Tuple>,
    /// Sockets that were connected when it began.
    sockets: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Driver {
    pub guest_cid: Cid,
    updates: Updates,
    applying: Option<Applying>,
    /// How many buffers of the receive queue were handled.
    handled: u16,
    /// A packet that was taken out of the receive queue.
    in_hand: Option<Packet>,
    pub sockets: Vec<Socket>,
    turns: Vec<Turn>,
    /// A request whose addresses are made, and which is not given to the device yet.
    pub prepared: Option<(u8, Packet)>,
    /// How many transport resets there were, refused updates among them.
    resets: u8,
    /// Updates that were refused without need.
    pub refused: u8,
    /// Whether the CID was read when it had changed once more already, so that the updates that say so are refused.
    has_read_ahead: bool,
}

/// What the configuration space says.
#[derive(Clone, Copy, Debug)]
pub struct Configuration {
    pub guest_cid: Cid,
    /// Whether it is not that of the last transport reset any more. Only the oracle knows.
    pub is_ahead: bool,
}

/// What the driver may do next, besides what applications make it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverStep {
    /// Takes an event, or begins to apply the update that is due.
    Event,
    /// The same, without memory for it.
    EventWithoutMemory,
    /// Goes on with applying an update.
    Apply,
    /// Refuses an update that waits for packets which there are not.
    RefuseWaiting,
    /// Takes a packet out of the receive queue.
    Take,
    /// Receives it.
    Receive,
    /// Gives the device a packet that waited.
    Transmit,
}

/// The queues between driver and device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Queues {
    pub rx: Vec<Packet>,
    pub tx: Vec<Packet>,
    pub events: Vec<Vec<u8>>,
}

impl Driver {
    pub fn new(guest_cid: Cid) -> Self {
        Self {
            guest_cid,
            updates: Updates::default(),
            applying: None,
            handled: 0,
            in_hand: None,
            sockets: Vec::new(),
            turns: Vec::new(),
            prepared: None,
            resets: 0,
            refused: 0,
            has_read_ahead: false,
        }
    }

    fn socket(&mut self, id: u8) -> Option<&mut Socket> {
        self.sockets.iter_mut().find(|socket| socket.id == id)
    }

    /// Whether the update that is due can be applied, `None` where none is.
    fn due(&self, scenario: &Scenario) -> Option<bool> {
        self.updates
            .is_due()
            .then(|| self.clone().take_due(scenario).is_some())
    }

    fn take_due(&mut self, scenario: &Scenario) -> Option<Vec<Effect>> {
        let cid = Some(self.guest_cid);
        if scenario.fault == Some(Fault::IgnoresRxUsed) {
            return (0..100).find_map(|handled| self.updates.take_due(handled, cid));
        }
        self.updates.take_due(self.handled, cid)
    }

    pub fn steps(&self, queues: &Queues, scenario: &Scenario, steps: &mut Vec<DriverStep>) {
        if self.turns_can_go(queues, scenario) {
            steps.push(DriverStep::Transmit);
        }
        if self.applying.is_some() {
            steps.push(DriverStep::Apply);
            return;
        }
        let due = self.due(scenario);
        let has_event = due == Some(true) || (due.is_none() && !queues.events.is_empty());
        if has_event {
            steps.push(DriverStep::Event);
            if due.is_none() && scenario.lacks_memory {
                steps.push(DriverStep::EventWithoutMemory);
            }
        }
        if self.in_hand.is_some() {
            if !has_event || scenario.fault == Some(Fault::LooksAtEventsLater) {
                steps.push(DriverStep::Receive);
            }
        } else if !queues.rx.is_empty() && due != Some(true) {
            steps.push(DriverStep::Take);
        } else if due == Some(false) {
            steps.push(DriverStep::RefuseWaiting);
        }
    }

    pub fn act(
        &mut self,
        step: DriverStep,
        queues: &mut Queues,
        configuration: Configuration,
        scenario: &Scenario,
    ) -> Result<(), &'static str> {
        match step {
            DriverStep::Transmit => self.transmit_next(queues),
            DriverStep::Apply => self.apply_next(queues, scenario),
            DriverStep::Event => {
                let effects = if self.updates.is_due() {
                    self.take_due(scenario).unwrap_or_default()
                } else {
                    let event = queues.events.remove(0);
                    let event = Event::parse(&event).map_err(|_| "no event")?;
                    if event == Event::TransportReset {
                        self.has_read_ahead = configuration.is_ahead;
                        if scenario.fault != Some(Fault::KeepsPartsAtReset) {
                            self.updates.take(&event);
                        }
                        self.transport_reset(configuration, scenario);
                        return Ok(());
                    }
                    self.updates.take(&event)
                };
                self.carry_out(effects, queues, configuration, scenario);
            }
            DriverStep::EventWithoutMemory => {
                let event = queues.events.remove(0);
                let event = Event::parse(&event).map_err(|_| "no event")?;
                let effects = self.updates.take_with_memory(&event, false);
                self.carry_out(effects, queues, configuration, scenario);
            }
            DriverStep::RefuseWaiting => {
                let effects = self.updates.refuse_waiting();
                self.carry_out(effects, queues, configuration, scenario);
            }
            DriverStep::Take => self.in_hand = Some(queues.rx.remove(0)),
            DriverStep::Receive => {
                if let Some(packet) = self.in_hand.take() {
                    self.handled = self.handled.wrapping_add(1);
                    return self.receive(packet, queues, scenario);
                }
            }
        }
        Ok(())
    }

    fn carry_out(
        &mut self,
        effects: Vec<Effect>,
        queues: &mut Queues,
        configuration: Configuration,
        scenario: &Scenario,
    ) {
        for effect in effects {
            match effect {
                Effect::TransportReset => {
                    self.refused += u8::from(!self.has_read_ahead);
                    self.transport_reset(configuration, scenario);
                }
                Effect::ResetAgain => {
                    if scenario.fault != Some(Fault::KeepsConnectionsSinceRefusal) {
                        self.reset_connections();
                    }
                }
                Effect::Answer(tuple) => {
                    if scenario.fault != Some(Fault::LeavesRefusedUnanswered) {
                        let rst = tuple.reset(self.guest_cid);
                        self.transmit(Turn::Unconnected(packet(rst, None)), queues, scenario);
                    }
                }
                Effect::Apply(update, tuples) => {
                    self.guest_cid = update.new_guest_cid;
                    self.applying = Some(Applying {
                        update,
                        tuples,
                        sockets: self.connected().collect(),
                    });
                }
            }
        }
    }

    fn transport_reset(&mut self, configuration: Configuration, scenario: &Scenario) {
        self.resets += 1;
        if scenario.fault != Some(Fault::KeepsCidAtReset) {
            self.guest_cid = configuration.guest_cid;
        }
        if scenario.fault != Some(Fault::KeepsConnectionsAtReset) {
            self.reset_connections();
        }
        self.readdress_requests();
    }

    fn reset_connections(&mut self) {
        let connected: Vec<_> = self.connected().collect();
        connected.into_iter().for_each(|id| self.forget(id));
    }

    fn connected(&self) -> impl Iterator<Item = u8> + '_ {
        let connected = |socket: &&Socket| socket.state == State::Established;
        self.sockets
            .iter()
            .filter(connected)
            .map(|socket| socket.id)
    }

    /// Applies an update to one more socket, or ends it.
    fn apply_next(&mut self, queues: &mut Queues, scenario: &Scenario) {
        let Some(mut applying) = self.applying.take() else {
            return;
        };
        if let Some(id) = applying.sockets.pop() {
            self.keep_or_reset(id, &mut applying, queues, scenario);
            self.applying = Some(applying);
            return;
        }
        self.readdress_requests();
        if scenario.fault == Some(Fault::LeavesMissingUnanswered) {
            return;
        }
        for tuple in applying.tuples.iter().filter(|tuple| !tuple.is_kept) {
            let rst = tuple.reset(self.guest_cid);
            self.transmit(Turn::Unconnected(packet(rst, None)), queues, scenario);
        }
    }

    fn keep_or_reset(
        &mut self,
        id: u8,
        applying: &mut Applying,
        queues: &mut Queues,
        scenario: &Scenario,
    ) {
        let Some(socket) = self.sockets.iter_mut().find(|socket| socket.id == id) else {
            return;
        };
        let key = (socket.host_cid, socket.host_port, socket.guest_port);
        let Some(tuple) = find(&mut applying.tuples, key, SocketType::Stream) else {
            if scenario.fault != Some(Fault::KeepsUnlisted) {
                self.forget(id);
            }
            return;
        };
        tuple.is_kept = true;
        socket.host_cid = tuple.host_new_cid;
        socket.guest_cid = applying.update.new_guest_cid;
        let cids = (socket.guest_cid, socket.host_cid);
        let header = socket.header(Op::CreditRequest, cids.0);
        let answer = packet(header, None);
        let waits = !socket.waiting.is_empty();
        if waits && scenario.fault != Some(Fault::LeavesOldAddresses) {
            socket.cids = Some(cids);
        }
        if waits && scenario.fault != Some(Fault::AnswersLast) {
            socket.before = Some(answer);
            return;
        }
        self.transmit_of(id, answer, queues, scenario);
    }

    fn readdress_requests(&mut self) {
        let guest_cid = self.guest_cid;
        for socket in &mut self.sockets {
            for packet in &mut socket.waiting {
                if packet.header.op == Op::Request {
                    packet.header.src_cid = guest_cid.get().into();
                }
            }
        }
    }

    /// Ends a connection, and what waits of it.
    fn forget(&mut self, id: u8) {
        self.sockets.retain(|socket| socket.id != id);
        self.turns.retain(|turn| *turn != Turn::Socket(id));
    }

    // Packets to the device

    fn turns_can_go(&self, queues: &Queues, scenario: &Scenario) -> bool {
        !self.turns.is_empty() && queues.tx.len() < scenario.tx_room
    }

    fn transmit(&mut self, turn: Turn, queues: &mut Queues, scenario: &Scenario) {
        match turn {
            Turn::Unconnected(packet)
                if self.turns.is_empty() && queues.tx.len() < scenario.tx_room =>
            {
                queues.tx.push(packet);
            }
            turn => self.turns.push(turn),
        }
    }

    fn transmit_of(&mut self, id: u8, packet: Packet, queues: &mut Queues, scenario: &Scenario) {
        if self.turns.is_empty() && queues.tx.len() < scenario.tx_room {
            queues.tx.push(packet);
            return;
        }
        if let Some(socket) = self.socket(id) {
            socket.waiting.push(packet);
            if socket.waiting.len() == 1 {
                self.turns.push(Turn::Socket(id));
            }
        }
    }

    fn transmit_next(&mut self, queues: &mut Queues) {
        let turn = self.turns.remove(0);
        let id = match turn {
            Turn::Unconnected(packet) => return queues.tx.push(packet),
            Turn::Socket(id) => id,
        };
        let Some(socket) = self.socket(id) else {
            return;
        };
        if let Some(before) = socket.before.take() {
            queues.tx.push(before);
            self.turns.insert(0, Turn::Socket(id));
            return;
        }
        let mut packet = socket.waiting.remove(0);
        if let Some((guest_cid, host_cid)) = socket.cids {
            let mut bytes = packet.header.to_bytes();
            Header::set_cids(&mut bytes, guest_cid, host_cid);
            packet.header = Header::parse(&bytes);
        }
        queues.tx.push(packet);
        if socket.waiting.is_empty() {
            socket.cids = None;
        } else {
            self.turns.push(Turn::Socket(id));
        }
    }

    fn send(&mut self, id: u8, op: Op, flags: u32, queues: &mut Queues, scenario: &Scenario) {
        let present = self.guest_cid;
        let Some(socket) = self.socket(id) else {
            return;
        };
        let of_present = socket.state == State::Connecting;
        let guest_cid = if of_present {
            present
        } else {
            socket.guest_cid
        };
        let mut header = socket.header(op, guest_cid);
        header.flags = flags;
        let byte = (op == Op::Rw).then_some((id, socket.sent));
        socket.sent += u8::from(op == Op::Rw);
        let mut packet = packet(header, byte);
        packet.of = Some(id);
        self.transmit_of(id, packet, queues, scenario);
    }

    // Applications

    pub fn can_send(&self, at: usize, scenario: &Scenario) -> bool {
        self.sockets.get(at).is_some_and(|socket| {
            socket.state == State::Established
                && !socket.is_closed
                && socket.sent < scenario.guest_bytes
                && socket.send.available(u32::MAX) > 0
        })
    }

    pub fn write(&mut self, at: usize, queues: &mut Queues, scenario: &Scenario) {
        let socket = &mut self.sockets[at];
        socket.send.take(1, u32::MAX);
        let id = socket.id;
        self.send(id, Op::Rw, 0, queues, scenario);
    }

    pub fn close(&mut self, at: usize, queues: &mut Queues, scenario: &Scenario) {
        let socket = &mut self.sockets[at];
        socket.is_closed = true;
        let id = socket.id;
        self.send(id, Op::Shutdown, SHUTDOWN_BOTH, queues, scenario);
    }

    /// Makes a request; [`Self::request`] gives it to the device.
    pub fn prepare_request(&mut self, id: u8, host_cid: Cid, port: u32, scenario: &Scenario) {
        let (cids, ports) = ((self.guest_cid, host_cid), (port, 100 + u32::from(id)));
        let mut socket = Socket::new(id, State::Connecting, cids, ports, scenario.window);
        socket.resets = self.resets;
        let mut request = packet(socket.header(Op::Request, self.guest_cid), None);
        request.of = Some(id);
        self.sockets.push(socket);
        self.prepared = Some((id, request));
    }

    pub fn request(&mut self, queues: &mut Queues, scenario: &Scenario) {
        if let Some((id, request)) = self.prepared.take() {
            self.transmit_of(id, request, queues, scenario);
        }
    }

    // Packets of the device

    fn receive(
        &mut self,
        packet: Packet,
        queues: &mut Queues,
        scenario: &Scenario,
    ) -> Result<(), &'static str> {
        let header = packet.header;
        let is_ours = header.dst_cid == u64::from(self.guest_cid.get());
        let at = self.sockets.iter().position(|socket| {
            (socket.host_port, socket.guest_port) == (header.src_port, header.dst_port)
                && u64::from(socket.host_cid.get()) == header.src_cid
        });
        if !is_ours {
            let is_answer = matches!(header.op, Op::Response | Op::Rst);
            if let Some(socket) = at.map(|at| &self.sockets[at]) {
                let fails = socket.state == State::Connecting && is_answer;
                if fails && scenario.fault != Some(Fault::DropsOldAnswers) {
                    self.forget(socket.id);
                }
            }
            return Ok(());
        }
        let Some(at) = at else {
            let listens = header.dst_port == LISTENER;
            let state = if listens {
                State::Listening
            } else {
                State::Closed
            };
            match step(state, 0, &header) {
                Step::Accept => self.accept(&packet, queues, scenario),
                Step::Refuse => self.refuse(&header, queues, scenario),
                _ => {}
            }
            return Ok(());
        };
        let socket = &mut self.sockets[at];
        let id = socket.id;
        let of = packet.of;
        socket.send.update(header.buf_alloc, header.fwd_cnt);
        match step(socket.state, 0, &header) {
            Step::Accept | Step::Refuse => self.refuse(&header, queues, scenario),
            Step::Establish => {
                socket.state = State::Established;
                socket.guest_cid = self.guest_cid;
                if of != Some(id) {
                    return Err("a response to another attempt");
                }
                let is_of_before = socket.resets != self.resets;
                if is_of_before && scenario.fault != Some(Fault::TrustsResponses) {
                    self.send(id, Op::CreditUpdate, 0, queues, scenario);
                }
            }
            Step::FailConnect { reply, .. } => {
                if reply {
                    self.refuse(&header, queues, scenario);
                }
                self.forget(id);
            }
            Step::Deliver => {
                if packet.byte != Some((id, socket.received)) {
                    return Err("the guest gets a byte that is not the next one of its connection");
                }
                socket.received += 1;
                socket
                    .receive
                    .receive(1)
                    .map_err(|_| "the host sends more than its credit")?;
                socket.receive.consume(1, 1);
                if socket.receive.wants_update(1) && !socket.is_closed {
                    self.send(id, Op::CreditUpdate, 0, queues, scenario);
                }
            }
            Step::SendCredit => self.send(id, Op::CreditUpdate, 0, queues, scenario),
            Step::NoteCredit | Step::Drop => {}
            Step::PeerShutdown(directions) => {
                if directions == SHUTDOWN_BOTH {
                    self.end_by_rst(id, queues, scenario);
                }
            }
            // The model's sockets are Established from the first, so this is not asked for.
            Step::RespondAgain => return Err("a repeated request"),
            Step::PeerForgot => self.end_by_rst(id, queues, scenario),
            Step::PeerClosed => self.forget(id),
        }
        Ok(())
    }

    /// Ends a connection without memory to tell the host. An RST in place of an answer is sent all the same.
    pub fn end_without_memory(&mut self, at: usize, queues: &mut Queues, scenario: &Scenario) {
        let socket = &self.sockets[at];
        let (id, is_answer) = (socket.id, |packet: &Packet| {
            packet.header.op == Op::CreditRequest
        });
        let answer_waits = socket.before.is_some() || socket.waiting.iter().any(is_answer);
        if answer_waits && scenario.fault != Some(Fault::ForgetsAnswers) {
            self.end_by_rst(id, queues, scenario);
        } else {
            self.forget(id);
        }
    }

    fn end_by_rst(&mut self, id: u8, queues: &mut Queues, scenario: &Scenario) {
        let Some(socket) = self.socket(id) else {
            return;
        };
        let guest_cid = socket.guest_cid;
        let rst = packet(socket.header(Op::Rst, guest_cid), None);
        self.forget(id);
        self.transmit(Turn::Unconnected(rst), queues, scenario);
    }

    fn refuse(&mut self, header: &Header, queues: &mut Queues, scenario: &Scenario) {
        if let Some(rst) = header.reset_reply() {
            self.transmit(Turn::Unconnected(packet(rst, None)), queues, scenario);
        }
    }

    fn accept(&mut self, request: &Packet, queues: &mut Queues, scenario: &Scenario) {
        let header = request.header;
        let (Some(id), Ok(host_cid)) = (request.of, Cid::from_wire(header.src_cid)) else {
            return;
        };
        let cids = (self.guest_cid, host_cid);
        let ports = (header.src_port, header.dst_port);
        let mut socket = Socket::new(id, State::Established, cids, ports, scenario.window);
        socket.send.update(header.buf_alloc, header.fwd_cnt);
        self.sockets.push(socket);
        self.send(id, Op::Response, 0, queues, scenario);
    }
}
