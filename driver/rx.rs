// SPDX-License-Identifier: GPL-2.0

//! Packets from the device.

use super::{
    connection::{Connection, ResetState},
    purpose,
    queue_work,
    queue_work_in_turn,
    queue_work_without_memory,
    spare_buffers::SpareBuffers,
    statistics::Counter,
    tx::ControlPacket,
    work,
    VsockDriver, //
};
use crate::{
    af_vsock_glue::{
        errno::{ECONNREFUSED, ECONNRESET, ENOBUFS, EPROTO},
        monitor::{self, Direction},
        skb::{wipes_freed_memory, SkBuff, SkBuffQueue},
        socket::{Address, Directions, LockedSocket, Socket, SocketKind, SocketState},
        virtio::{LiveDevice, RawQueue, Virtqueue},
        workqueue::cond_resched,
    },
    protocol::{
        cid::Cid,
        connection::{step, ConnectError, State, Step},
        header::{Header, Op, SocketType, HEADER_LEN},
        ring::UsedPlace,
    },
};
use kernel::{
    prelude::*,
    sync::{atomic::Relaxed, Arc, ArcBorrow},
};

/// How many packets one run of the work item takes, so that others get the lock, and the CPU when it is their turn.
const BUDGET: u32 = 256;

/// How many buffers the device has at most, however large its ring is: 2 MiB of memory.
const MAX_RX_BUFFERS: u32 = 512;

/// A packet's payload; its header was cut off.
type ReceivedPayload = SkBuff<()>;

/// The receive virtqueue. Each of its buffers takes a page of memory and holds a packet with its header.
pub(crate) struct RxQueue {
    queue: Virtqueue<()>,
    /// Buffers that the device has.
    posted: u32,
    /// Buffers whose packets were of use to nobody but the driver, to be given to the device again.
    emptied: SkBuffQueue<()>,
    /// Whether there may be any: not where memory is to be wiped when nobody needs it.
    keeps_emptied: bool,
    /// Those that readers have emptied. Kept while there is this queue.
    spare_buffers: Arc<SpareBuffers<()>>,
    /// Behind the buffers that were taken out.
    place: UsedPlace,
    /// Whether the device sends updates of CIDs, of which no packet of after one may be received before it.
    has_updates: bool,
}

impl RxQueue {
    /// Takes over an empty queue. `is_packed` says whether it is a packed ring, `has_updates` whether the device may send
    /// updates of CIDs.
    pub(crate) fn new(
        queue: RawQueue,
        is_packed: bool,
        has_updates: bool,
        spare_buffers: Arc<SpareBuffers<()>>,
    ) -> Self {
        let queue = Virtqueue::from(queue);
        let place = UsedPlace::first(is_packed.then(|| queue.size()));
        let this = Self {
            queue,
            posted: 0,
            emptied: SkBuffQueue::new(),
            keeps_emptied: !wipes_freed_memory(),
            spare_buffers,
            place,
            has_updates,
        };
        // As many as the device is given at a time.
        let most = this.wanted() as usize / 2;
        this.spare_buffers
            .open(most * SkBuff::<()>::page_truesize());
        this
    }

    /// The place behind the buffers that were taken out, as updates of CIDs say it.
    pub(crate) fn place(&self) -> u16 {
        self.place.to_wire()
    }

    /// The device that the queue is of.
    pub(crate) fn device(&self) -> &LiveDevice {
        self.queue.device()
    }

    /// Whether the device broke the queue's rules.
    pub(crate) fn is_broken(&self) -> bool {
        self.queue.is_broken()
    }

    /// How many buffers the device has.
    pub(crate) fn posted(&self) -> usize {
        self.posted as usize
    }

    /// How many buffers the device is to have.
    fn wanted(&self) -> u32 {
        self.queue.size().min(MAX_RX_BUFFERS)
    }

    /// Whether the device may send updates of CIDs.
    pub(crate) fn has_updates(&self) -> bool {
        self.has_updates
    }

    /// Gives the device buffers until it has enough, or memory is short. May sleep.
    pub(crate) fn fill(&mut self) {
        let lacking = self.wanted().saturating_sub(self.posted) as usize;
        self.spare_buffers.take(&mut self.emptied, lacking);
        while self.posted < self.wanted() {
            let emptied = self.emptied.pop_front().map(Ok);
            let Ok(buffer) = emptied.unwrap_or_else(|| SkBuff::page_sized::<HEADER_LEN>(())) else {
                break;
            };
            if self.queue.push_empty(buffer).is_err() {
                break;
            }
            self.posted += 1;
        }
        self.queue.kick();
    }

    /// Takes back a buffer whose packet nobody needs any more.
    fn take_back(&mut self, emptied: SkBuff<()>) {
        if self.keeps_emptied {
            self.emptied.push_back(emptied.recycle_received());
        } else {
            emptied.consume();
        }
    }

    fn fill_if_low(&mut self) {
        if self.posted <= self.wanted() / 2 {
            self.fill();
        }
    }
}

impl Drop for RxQueue {
    fn drop(&mut self) {
        self.emptied.take().consume();
        self.spare_buffers.close();
    }
}

/// The addresses of a packet, checked.
#[derive(Clone, Copy)]
struct Flow {
    remote: Address,
    local: Address,
}

impl Flow {
    /// `None` where the source is reserved, or the destination is no CID that a guest can have.
    fn of(header: &Header) -> Option<Self> {
        Some(Self {
            remote: Address {
                cid: Cid::from_wire(header.src_cid).ok()?.get(),
                port: header.src_port,
            },
            local: Address {
                cid: Cid::guest_from_config(header.dst_cid).ok()?.get(),
                port: header.dst_port,
            },
        })
    }
}

impl VsockDriver {
    /// Receives what the device has sent. Work item; sleeps, and takes sockets' locks.
    pub(super) fn process_rx(self: &Arc<Self>) {
        let mut guard = self.rx.lock();
        let Some(rx) = (*guard).as_mut() else {
            return;
        };
        let mut budget = BUDGET;
        loop {
            rx.queue.disable_interrupts();
            loop {
                if self.update_waits.load(Relaxed) {
                    self.handle_events();
                }
                if self.tx.park_if_congested() {
                    // The device takes no answers. process_tx() lets this go on once it does.
                    self.moderation.note_flood();
                    rx.fill_if_low();
                    return;
                }
                if budget == 0 {
                    self.moderation.note_flood();
                    rx.fill_if_low();
                    queue_work_in_turn::<{ work::RX }>(self.clone());
                    return;
                }
                let Some(packet) = rx.queue.pop_received() else {
                    if self.update_waits.load(Relaxed) {
                        // It waits for packets that the device does not have put here.
                        self.refuse_waiting_update();
                    }
                    break;
                };
                budget -= 1;
                rx.posted = rx.posted.saturating_sub(1);
                if rx.has_updates {
                    self.handle_events_before_packet();
                }
                match packet {
                    Ok(packet) => {
                        if let Some(emptied) = self.receive(packet) {
                            rx.take_back(emptied);
                        }
                    }
                    Err(_) => self.statistics.dropped_long.increment(),
                }
                // Each buffer is one piece of memory, and so one descriptor.
                rx.place.advance();
                self.rx_handled.store(rx.place().into(), Relaxed);
                rx.fill_if_low();
            }
            if rx.is_broken() || rx.queue.enable_interrupts() {
                break;
            }
            cond_resched();
        }
        if rx.is_broken() {
            queue_work::<{ work::DEVICE }>(self.clone());
            return;
        }
        rx.fill_if_low();
        if rx.posted == 0 {
            // There was no memory for even one buffer, and no interrupt will come.
            drop(guard);
            queue_work_without_memory::<{ work::RX }>(self.clone());
        }
    }

    /// Takes a packet apart and finds the socket that it is for. Returns the buffer where its packet was received and nobody
    /// needs it any more. Needs the rx mutex; sleeps, and takes the socket's lock.
    fn receive(self: &Arc<Self>, mut packet: SkBuff<()>) -> Option<SkBuff<()>> {
        let Some(raw_header) = packet.take_front::<HEADER_LEN>() else {
            self.statistics.dropped_short.increment();
            return None;
        };
        let header = Header::parse(&raw_header);
        // All of it is compared for no packet that has a source.
        if header.src_cid == 0 && raw_header == [0; HEADER_LEN] {
            // The device has a buffer with zeros there, and says that it has written a packet.
            self.statistics.dropped_unwritten.increment();
            self.reset_for_lost_packets();
            return None;
        }
        let Some(len) = usize::try_from(header.len)
            .ok()
            .filter(|len| *len <= packet.len() - HEADER_LEN)
        else {
            self.statistics.dropped_short.increment();
            return None;
        };
        packet.truncate(HEADER_LEN + len);
        monitor::show(Direction::Received, &raw_header, purpose, &packet);
        packet.pull(HEADER_LEN);
        self.statistics.rx_packets.add_exclusively(1);
        self.statistics.rx_bytes.add_exclusively(len);

        if matches!(header.op, Op::Request | Op::Response) {
            // It may be of after an event that waits in its queue: then it does not concern a connection of before, and
            // the connection that it makes is not reset. Or it is of before, and the guest has another CID by now.
            self.handle_events();
        }
        let Some(flow) = self.flow(&header) else {
            self.statistics.dropped_cid.increment();
            self.fail_attempt_of_before(&header);
            return None;
        };
        if !self.socket_types().contains(header.socket_type) {
            self.statistics.unknown_type.increment();
            self.send_reset_reply(&header);
            return None;
        }
        let socket = Socket::find_connected(flow.remote, flow.local)
            .or_else(|| Socket::find_bound(flow.local));
        match socket {
            Some(socket) => self.receive_for(&socket.lock(), flow, &header, packet),
            None => {
                self.send_reset_reply(&header);
                None
            }
        }
    }

    /// The addresses of a packet that a guest with our CID may get from somebody else.
    fn flow(self: &Arc<Self>, header: &Header) -> Option<Flow> {
        let source = Cid::from_wire(header.src_cid).ok()?;
        let is_ours = || {
            self.guest_cid()
                .is_some_and(|cid| u64::from(cid.get()) == header.dst_cid && cid != source)
        };
        if !is_ours() {
            // Perhaps the CID has changed, and the event that says so waits in its queue.
            self.handle_events();
            if !is_ours() {
                return None;
            }
        }
        Flow::of(header)
    }

    /// Lets an attempt to connect of before a reset fail whose answer bears a CID that the guest had: the connection has ended with
    /// that, and there will be no other answer.
    fn fail_attempt_of_before(&self, header: &Header) {
        if !matches!(header.op, Op::Response | Op::Rst) {
            return;
        }
        let Some(mut flow) = Flow::of(header) else {
            return;
        };
        if let Some(cid) = self.guest_cid() {
            // Which a socket that is bound to the guest's CID has by now, too.
            flow.local.cid = cid.get();
        }
        let Some(socket) = Socket::find_bound(flow.local) else {
            return;
        };
        let socket = socket.lock();
        let is_of_before = socket
            .connection::<Self>()
            .is_some_and(|connection| self.was_reset_since(&connection));
        if is_of_before
            && protocol_state(socket.state()) == State::Connecting
            && protocol_type(socket.kind()) == Some(header.socket_type)
            && socket.accepts_source::<Self>(flow.remote)
        {
            self.fail_connect(&socket, ConnectError::Refused);
        }
    }

    /// Whether there was a transport reset after the peer was asked for a connection, or after that was made. Needs the socket's
    /// lock; without the rx mutex the answer may be out of date.
    pub(super) fn was_reset_since(&self, connection: &Connection) -> bool {
        connection.resets_before() != self.resets.load(Relaxed)
    }

    /// Does what a packet means for the socket that it was found to be for. Returns its buffer where that was received and nobody
    /// needs it any more. Needs the rx mutex; sleeps.
    fn receive_for(
        &self,
        socket: &LockedSocket<'_>,
        flow: Flow,
        header: &Header,
        payload: ReceivedPayload,
    ) -> Option<ReceivedPayload> {
        let state = protocol_state(socket.state());
        // While nobody had its lock the socket may have been closed, or connected to somebody else.
        if protocol_type(socket.kind()) != Some(header.socket_type)
            || socket.is_done()
            || (state != State::Listening && !socket.accepts_source::<Self>(flow.remote))
        {
            self.send_reset_reply(header);
            return None;
        }
        if state == State::Listening {
            // It may have a connection all the same, of an attempt to connect that failed before.
            match step(state, 0, header) {
                Step::Accept => self.accept(socket, flow, header),
                Step::Refuse => self.send_reset_reply(header),
                _ => self.statistics.dropped_state.increment(),
            }
            return None;
        }
        let Some(connection) = socket.connection::<Self>() else {
            self.send_reset_reply(header);
            return None;
        };
        if connection.reset_state() != ResetState::No {
            // What the device has reset is over, though the socket is still bound and can be found.
            self.send_reset_reply(header);
            return None;
        }
        let news = connection.note_packet(header);
        if news.ends_waits {
            socket.write_space();
        }
        let state = match state {
            State::Established if !news.peer_knows => State::Accepted,
            state => state,
        };
        let step = step(state, socket.peer_shutdown().bits(), header);
        if news.peer_buffer_shrank && step.keeps_connection() {
            self.send_wanted_credit_update(socket, connection, socket.low_water());
        }

        match step {
            Step::Accept | Step::Refuse => self.send_reset_reply(header),
            Step::Establish => {
                let was_reset = self.was_reset_since(&connection);
                connection.note_made(self.guest_cid(), self.resets.load(Relaxed));
                socket.set_connected();
                socket.insert_connected();
                socket.state_change();
                if was_reset {
                    // The response may be of before the reset, and the connection have ended with that.
                    self.probe(socket, connection);
                } else {
                    // The buffer may have grown since the request.
                    self.send_wanted_credit_update(socket, connection, socket.low_water());
                }
            }
            Step::FailConnect { error, reply } => {
                if reply {
                    self.send_reset_reply(header);
                }
                if error == ConnectError::Refused {
                    self.statistics.refused_connects.increment();
                }
                self.fail_connect(socket, error);
            }
            Step::RespondAgain => {
                if connection.has_sent_nothing() {
                    // Where there is no memory for it the peer asks again.
                    let _ =
                        self.send_control(socket, connection, ControlPacket::reply(Op::Response));
                } else {
                    self.probe(socket, connection);
                }
            }
            Step::Deliver => return self.deliver(socket, connection, header, payload),
            Step::SendCredit => self.send_credit_update(socket, connection, true),
            Step::NoteCredit => {}
            Step::PeerShutdown(directions) => {
                self.peer_shut_down(socket, connection, Directions::from_bits(directions));
            }
            Step::PeerClosed => {
                let is_closed = socket.peer_shutdown() == Directions::BOTH
                    || connection.has_sent_shutdown(Directions::BOTH.bits());
                if state != State::Closing && !is_closed {
                    self.statistics.resets_by_peer.increment();
                }
                self.cancel_waiting(&connection);
                self.finish_connection(socket, &connection);
            }
            Step::PeerForgot => {
                self.send_final_reset(socket, connection, ControlPacket::reply(Op::Rst));
                self.reset_connection(socket, &connection, &self.statistics.resets_by_new_request);
            }
            Step::Drop => {
                self.statistics.dropped_state.increment();
                return None;
            }
        }
        Some(payload)
    }

    /// Makes a connection for a listener, or refuses it.
    fn accept(&self, listener: &LockedSocket<'_>, flow: Flow, header: &Header) {
        if self.try_accept(listener, flow, header).is_err() {
            self.send_reset_reply(header);
        }
    }

    fn try_accept(&self, listener: &LockedSocket<'_>, flow: Flow, header: &Header) -> Result {
        // A listener that is being closed has emptied its queue; what came later would stay there.
        if listener.accept_queue_is_full() || listener.shutdown() == Directions::BOTH {
            return Err(ECONNREFUSED.into());
        }
        let child = listener.create_child().ok_or(ENOMEM)?;
        {
            let mut child = child.lock_child();
            child.set_state(SocketState::Established);
            child.set_addresses(flow.local, flow.remote);
            child.assign_transport::<Self>(listener)?;
            let connection = child.connection::<Self>().ok_or(ENODEV)?;
            connection.note_packet(header);
            connection.note_made(self.guest_cid(), self.resets.load(Relaxed));
            // Nothing is received meanwhile, so that the peer's next packet finds the socket in its table.
            self.send_control(&child, connection, ControlPacket::reply(Op::Response))?;
            child.insert_connected();
            listener.enqueue_accept(&child);
        }
        listener.data_ready();
        Ok(())
    }

    /// Puts payload where readers find it. Returns its buffer where they find a copy. Sleeps.
    fn deliver(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        header: &Header,
        payload: ReceivedPayload,
    ) -> Option<ReceivedPayload> {
        if let Ok(emptied) = connection.enqueue(socket, payload, header.message_end()) {
            if header.message_end().is_some() {
                // Whatever its length, and SO_RCVLOWAT.
                socket.data_ready();
            } else {
                socket.wake_readers();
            }
            return emptied;
        }
        // Its data would be lost, so the connection ends instead.
        self.statistics.resets_by_credit.increment();
        self.send_final_reset(socket, connection, ControlPacket::reply(Op::Rst));
        self.finish_connection(socket, &connection);
        socket.fail(ENOBUFS.into());
        None
    }

    /// Notes what the peer has shut down by now. Sleeps.
    fn peer_shut_down(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        directions: Directions,
    ) {
        let changed = directions != socket.peer_shutdown();
        socket.set_peer_shutdown(directions);
        if directions == Directions::BOTH {
            if connection.unread() == 0 || socket.close_is_scheduled() {
                // Nothing is to be read any more, or nobody will: this answers the peer's close.
                self.send_final_reset(socket, connection, ControlPacket::reply(Op::Rst));
                self.finish_connection(socket, &connection);
            } else {
                self.cancel_waiting(&connection);
                // The peer may use its port anew, though ours has not closed the socket.
                socket.remove_from_tables();
            }
        }
        if changed {
            socket.state_change();
        }
    }

    /// Ends a connection that the peer has closed. What was received can still be read, and the peer may use its port
    /// anew: what waits to be sent, but for a last RST, is the caller's to cancel before. Sleeps.
    pub(super) fn finish_connection(&self, socket: &LockedSocket<'_>, connection: &Connection) {
        connection.note_finished();
        socket.set_done();
        socket.set_peer_shutdown(Directions::BOTH);
        if connection.unread() == 0 {
            socket.set_state(SocketState::Closing);
        }
        socket.state_change();
        socket.remove_from_tables();
        if socket.cancel_close() {
            connection.purge();
        }
    }

    /// Takes a closed socket out of the core's tables. Sleeps.
    pub(super) fn forget(&self, socket: &LockedSocket<'_>, connection: &Connection) {
        connection.purge();
        socket.remove_from_tables();
    }

    /// Ends a connection that the device has lost: every call of the application fails with ECONNRESET. Returns
    /// whether there was one that had not come to its end, which `cause` counts.
    ///
    /// What waits to be sent on it is the caller's to cancel. Sleeps.
    pub(super) fn reset_connection(
        &self,
        socket: &LockedSocket<'_>,
        connection: &Connection,
        cause: &Counter,
    ) -> bool {
        let is_closed = socket.close_is_scheduled();
        if connection.reset_state() != ResetState::No || (socket.is_done() && !is_closed) {
            // Where the peer has closed what it sent before can still be read.
            socket.remove_from_tables();
            return false;
        }
        connection.note_reset(socket.blocked_readers());
        connection.purge();
        cause.increment();
        if is_closed {
            // The application has closed it already, so it only goes a little sooner.
            socket.set_done();
            socket.cancel_close();
        } else if socket.state() == SocketState::Established {
            // The socket stays established for the core, which asks before_receive() and before_send().
            socket.set_peer_shutdown(socket.peer_shutdown().with(Directions::SEND));
            socket.fail(ECONNRESET.into());
        }
        socket.remove_from_tables();
        true
    }

    /// Ends an attempt to connect; what waits to be sent of it is of no use any more. Sleeps.
    pub(super) fn fail_connect(&self, socket: &LockedSocket<'_>, error: ConnectError) {
        if let Some(connection) = socket.connection::<Self>() {
            self.cancel_waiting(&connection);
        }
        socket.set_state(SocketState::Closed);
        let error = match error {
            ConnectError::Refused => ECONNRESET,
            ConnectError::Protocol => EPROTO,
        };
        socket.fail(error.into());
    }
}

/// The type that a socket's packets have; datagrams have none.
pub(super) fn protocol_type(kind: SocketKind) -> Option<SocketType> {
    match kind {
        SocketKind::Stream => Some(SocketType::Stream),
        SocketKind::SeqPacket => Some(SocketType::SeqPacket),
        SocketKind::Datagram => None,
    }
}

fn protocol_state(state: SocketState) -> State {
    match state {
        SocketState::Closed => State::Closed,
        SocketState::Connecting => State::Connecting,
        SocketState::Established => State::Established,
        SocketState::Closing => State::Closing,
        SocketState::Listening => State::Listening,
    }
}
