// SPDX-License-Identifier: GPL-2.0

//! Packets to the device.
//!
//! A packet goes straight into the virtqueue where there is room and nothing waits. Otherwise it waits in the
//! [`backlog`](super::backlog) until the device has used buffers; so do small packets of a sender for which work
//! [waits](super::moderation). What waits is bounded: payload by the size of its
//! socket's buffer, answers to packets of the device by [`MAX_WAITING_REPLIES`], because no more packets are
//! received while so many wait, and other control packets by a number for each socket.

use super::{
    backlog::{Backlog, Waiting, WaitingPackets},
    connection::{Connection, ResetState},
    moderation::LONGEST_SMALL_PAYLOAD,
    purpose,
    queue_work,
    queue_work_in_turn,
    queue_work_without_memory,
    spare_buffers::SpareBuffers,
    statistics::QueueLengths,
    work,
    VsockDriver, //
};
use crate::{
    af_vsock_glue::{
        monitor::{self, Direction},
        skb::{Blank, Control, Payload, SkBuff, SkBuffQueue, ToDevice},
        socket::{Directions, LockedSocket},
        virtio::{PushError, RawQueue, Virtqueue},
        workqueue::cond_resched,
    },
    protocol::{
        cid::Cid,
        header::{Header, Op, HEADER_LEN},
        MAX_PAYLOAD,
    },
};
use core::ops::ControlFlow;
use kernel::{
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        new_mutex, Arc, ArcBorrow, LockedBy, Mutex,
    },
};

/// How many answers may wait for room before no more packets are received.
const MAX_WAITING_REPLIES: usize = 128;

/// How many packets that the device has used one run of the work item takes, so that others get the CPU.
const BUDGET: usize = 256;

/// How many packets of payload wait for the work item, at most, before a sender takes them to the device itself.
const LONGEST_BATCH: u32 = 64;

/// How much memory of buffers is kept for the next packets, in bytes: twice what a connection has on its way by default.
const SPARE_MEMORY: usize = 512 * 1024;

/// Control block of a packet to the device.
pub(crate) struct Outgoing {
    /// The connection that it is of.
    connection: Option<Arc<Connection>>,
    /// What that counts until the packet is dropped.
    counted: Counted,
    /// Whether it answers a packet of the device.
    is_reply: bool,
    /// Whether applications get a completion of it, for MSG_ZEROCOPY.
    completes: bool,
}

/// What a connection counts of a packet.
#[derive(Clone, Copy)]
enum Counted {
    Nothing,
    /// So many bytes of payload.
    Payload(u32),
    /// A credit update.
    CreditUpdate,
}

impl Outgoing {
    /// An answer to a packet that is of no connection.
    fn unconnected_reply() -> Self {
        Self {
            connection: None,
            counted: Counted::Nothing,
            is_reply: true,
            completes: false,
        }
    }

    fn control(connection: ArcBorrow<'_, Connection>, is_reply: bool) -> Self {
        Self {
            connection: Some(connection.into()),
            counted: Counted::Nothing,
            is_reply,
            completes: false,
        }
    }

    /// `len` bytes of payload, of which applications get a completion where `completes` says so.
    pub(super) fn payload(
        connection: ArcBorrow<'_, Connection>,
        len: u32,
        completes: bool,
    ) -> Self {
        connection.add_unsent(len);
        Self {
            connection: Some(connection.into()),
            counted: Counted::Payload(len),
            is_reply: false,
            completes,
        }
    }

    fn credit_update(connection: ArcBorrow<'_, Connection>, is_reply: bool) -> Self {
        connection.add_waiting_update();
        Self {
            connection: Some(connection.into()),
            counted: Counted::CreditUpdate,
            is_reply,
            completes: false,
        }
    }

    /// The connection that the packet is of.
    pub(super) fn connection(&self) -> Option<ArcBorrow<'_, Connection>> {
        self.connection.as_ref().map(Arc::as_arc_borrow)
    }

    /// Whether it answers a packet of the device.
    pub(super) fn is_reply(&self) -> bool {
        self.is_reply
    }

    pub(super) fn is_credit_update(&self) -> bool {
        matches!(self.counted, Counted::CreditUpdate)
    }

    fn payload_len(&self) -> usize {
        match self.counted {
            Counted::Payload(len) => len as usize,
            _ => 0,
        }
    }
}

impl Control for Outgoing {
    type Direction = ToDevice;
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            match self.counted {
                Counted::Payload(len) => connection.remove_unsent(len),
                Counted::CreditUpdate => connection.remove_waiting_update(),
                Counted::Nothing => {}
            }
        }
    }
}

/// A packet to the device.
pub(crate) type OutgoingPacket = SkBuff<Outgoing>;

/// The transmit virtqueue and what waits for room in it.
#[pin_data]
pub(crate) struct Tx {
    #[pin]
    state: Mutex<TxState>,
    /// Whether answers may wait in the backlog.
    replies_wait: Atomic<bool>,
    /// The longest payload that fits into the virtqueue, in bytes.
    longest_payload: Atomic<u32>,
    /// Buffers that the device has used. Kept while there is a device.
    #[pin]
    spare_buffers: SpareBuffers<Blank>,
}

/// When the transmit virtqueue is to be looked at again.
enum Next {
    /// When the device interrupts, something is sent, or the work has its turn.
    Later,
    /// The device has used more already.
    Now,
    /// When there may be memory.
    WithMemory,
}

/// What the tx mutex protects.
pub(crate) struct TxState {
    /// `None` while there is no device.
    device: Option<TxQueue>,
    pub(super) backlog: Backlog,
    /// Whether the receiver of packets or that of events has stopped until fewer answers wait.
    parked: bool,
    /// How many packets went to the backlog though there may have been room, since it was emptied as far as that.
    batched: u32,
    /// Packets that the device has used and that applications get a completion of.
    completing: SkBuffQueue<Outgoing>,
    /// Whether somebody frees such packets. Both workqueues may run the work at a time, and so only one of them does: completions
    /// keep their order.
    is_completing: bool,
}

/// The transmit virtqueue of a device.
pub(crate) struct TxQueue {
    queue: Virtqueue<Outgoing>,
    /// Packets that the device has.
    in_flight: usize,
    /// Whose queue it is, for as long as it has the device.
    driver: Arc<VsockDriver>,
}

impl TxQueue {
    /// Gives a packet to the device, and shows it to those who watch.
    fn push(&mut self, packet: OutgoingPacket) -> Result<(), (OutgoingPacket, PushError)> {
        let payload_len = packet.control().payload_len();
        self.queue.push_filled(packet, |packet| {
            if let Some(header) = packet.front() {
                monitor::show(Direction::Sent, header, purpose, packet);
            }
        })?;
        self.in_flight += 1;
        let statistics = &self.driver.statistics;
        statistics.tx_packets.add_exclusively(1);
        statistics.tx_bytes.add_exclusively(payload_len);
        Ok(())
    }

    fn pop_sent(&mut self) -> Option<OutgoingPacket> {
        let packet = self.queue.pop_sent()?;
        self.in_flight -= 1;
        Some(packet)
    }
}

/// Where a packet is that was sent.
enum Sent {
    /// In the virtqueue.
    ToDevice,
    /// In the backlog, until there is room, or memory to map it.
    Waits,
    /// In the backlog, until the work item runs, which has to be queued.
    Batched,
}

impl TxState {
    /// Gives a packet to the device, or lets it wait for room; where `may_batch` says so, for the work item.
    fn push_or_wait(
        &mut self,
        packet: OutgoingPacket,
        may_batch: bool,
    ) -> Result<Sent, (OutgoingPacket, Error)> {
        match &self.device {
            None => return Err((packet, ENODEV)),
            Some(device) if device.queue.is_broken() => return Err((packet, EIO)),
            Some(_) => {}
        }
        if may_batch && self.batched < LONGEST_BATCH {
            self.batched += 1;
            self.push_waiting(packet);
            return Ok(Sent::Batched);
        }
        // This need not wait, and goes after those before it.
        self.push_batch();
        let nothing_waits = self.nothing_waits();
        let Some(device) = &mut self.device else {
            return Err((packet, ENODEV));
        };
        let pushed = if nothing_waits {
            device.push(packet)
        } else {
            Err((packet, PushError::Full))
        };
        match pushed {
            Ok(()) => {
                device.queue.kick();
                Ok(Sent::ToDevice)
            }
            // The device will use buffers that it has, and its interrupt takes this up; or the work does that looks after
            // what waits.
            Err((packet, PushError::Full | PushError::NoMemory))
                if device.in_flight > 0 || !nothing_waits =>
            {
                self.push_waiting(packet);
                Ok(Sent::Waits)
            }
            Err((packet, PushError::NoMemory)) => {
                // No interrupt will come, so the work tries until there is memory to map the packet.
                queue_work::<{ work::TX }>(device.driver.clone());
                self.push_waiting(packet);
                Ok(Sent::Waits)
            }
            // The whole queue does not take it.
            Err((packet, PushError::Full)) => Err((packet, ENOMEM)),
            Err((packet, PushError::Failed(_))) => Err((packet, EIO)),
        }
    }

    /// Whether the receiver has stopped and can go on. It is told once. `replies_wait` is [`Tx`]'s.
    fn unpark(&mut self, replies_wait: &Atomic<bool>) -> bool {
        let waiting = self.waiting_replies();
        replies_wait.store(waiting > 0, Relaxed);
        waiting < MAX_WAITING_REPLIES && core::mem::take(&mut self.parked)
    }

    /// Takes used packets with completions, where nobody frees such yet. [`Self::go_on_completing`] has to follow, unless it is
    /// none.
    fn begin_completing(&mut self) -> SkBuffQueue<Outgoing> {
        match self.is_completing {
            true => SkBuffQueue::new(),
            false => self.go_on_completing(),
        }
    }

    /// Takes those that there are since; where it is none, the next one who finds some frees them.
    fn go_on_completing(&mut self) -> SkBuffQueue<Outgoing> {
        self.is_completing = !self.completing.is_empty();
        self.completing.take()
    }

    /// Takes what waits for the work item to the device, and what was to wait for room before that.
    fn push_batch(&mut self) {
        if self.batched > 0 {
            self.push_from_backlog();
        }
    }

    /// Moves packets from the backlog into the virtqueue, as far as there is room.
    fn push_from_backlog(&mut self) {
        self.batched = 0;
        let mut any = false;
        while let Some((packet, turn)) = self.take_turn() {
            let pushed = match &mut self.device {
                Some(device) => device.push(packet),
                None => Err((packet, PushError::Full)),
            };
            if let Err((packet, _)) = pushed {
                self.keep_turn(packet, turn);
                break;
            }
            self.end_turn(turn);
            any = true;
            cond_resched();
        }
        if let (true, Some(device)) = (any, &mut self.device) {
            device.queue.kick();
        }
    }
}

impl Tx {
    /// A transmitter without a device.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            state <- new_mutex!(TxState {
                device: None,
                backlog: Backlog::new(),
                parked: false,
                batched: 0,
                completing: SkBuffQueue::new(),
                is_completing: false,
            }, "virtio_vsock_rs_tx"),
            replies_wait: Atomic::new(false),
            longest_payload: Atomic::new(MAX_PAYLOAD),
            spare_buffers <- SpareBuffers::new(),
        })
    }

    /// Room for the waiting packets of a connection, to be had with the tx mutex.
    pub(crate) fn waiting_packets(&self) -> Waiting {
        LockedBy::new(&self.state, WaitingPackets::new())
    }

    /// Begins to use a device's queue.
    pub(crate) fn start(&self, queue: RawQueue, driver: Arc<VsockDriver>) {
        let queue = Virtqueue::from(queue);
        let longest = if queue.takes_any_packet() {
            MAX_PAYLOAD
        } else {
            // A small queue takes packets in one segment only.
            (OutgoingPacket::longest_linear() - HEADER_LEN) as u32
        };
        self.longest_payload.store(longest, Relaxed);
        self.spare_buffers.open(SPARE_MEMORY);
        self.state.lock().device = Some(TxQueue {
            queue,
            in_flight: 0,
            driver,
        });
    }

    /// The longest payload of a packet, in bytes.
    pub(crate) fn longest_payload(&self) -> u32 {
        self.longest_payload.load(Relaxed)
    }

    /// A buffer of a packet of before for the next one, whose payload it may be too small or too large for. Small packets have
    /// none: they would take what is for others, and gain little.
    pub(crate) fn spare_buffer(&self, payload_len: usize) -> Option<SkBuff<Blank>> {
        (payload_len > LONGEST_SMALL_PAYLOAD).then(|| self.spare_buffers.take_one())?
    }

    /// Frees packets that the device has used, but for buffers that are kept for the next ones. No lock may be held: this calls
    /// back into sockets. Sleeps.
    fn free_used(&self, mut packets: SkBuffQueue<Outgoing>) {
        while let Some(packet) = packets.pop_front() {
            if packet.control().payload_len() <= LONGEST_SMALL_PAYLOAD {
                packet.consume();
            } else if let Some(buffer) = packet.recycle_sent() {
                self.spare_buffers.put(buffer);
            }
            cond_resched();
        }
    }

    /// Whether packets may be in as many pieces as the caller's pages are.
    pub(crate) fn takes_pages(&self) -> bool {
        self.longest_payload() == MAX_PAYLOAD
    }

    /// Takes the device's queue out of use; nothing is added to it or to the backlog any more. Sleeps.
    pub(crate) fn take_queue(&self) -> Option<TxQueue> {
        self.spare_buffers.close();
        self.state.lock().device.take()
    }

    /// Whether the device broke the queue's rules. May sleep.
    pub(crate) fn is_broken(&self) -> bool {
        let state = self.state.lock();
        state
            .device
            .as_ref()
            .is_some_and(|device| device.queue.is_broken())
    }

    /// How much waits here. Sleeps.
    pub(crate) fn lengths(&self) -> QueueLengths {
        let mut state = self.state.lock();
        QueueLengths {
            tx_in_flight: state.device.as_ref().map_or(0, |device| device.in_flight),
            tx_waiting: state.count_waiting(),
            tx_waiting_replies: state.waiting_replies(),
            tx_spare_buffers: self.spare_buffers.len(),
            rx_is_stopped: state.parked,
            ..QueueLengths::default()
        }
    }

    /// Frees what waits for a device that is gone; says how many packets that was. Sleeps.
    pub(crate) fn drop_backlog(&self) -> usize {
        let mut state = self.state.lock();
        state.parked = false;
        let waiting = state.take_all_waiting();
        // Freed outside of the lock: that calls back into sockets.
        drop(state);
        waiting.len()
    }

    /// Whether so many answers wait that no more packets and updates should be received. Whoever is told so stops
    /// receiving, and [`VsockDriver::process_tx`] lets it go on. Needs the rx mutex; may sleep.
    pub(crate) fn park_if_congested(&self) -> bool {
        // Answers are given by who asks here, so it knows of its own; this spares every packet the lock.
        if !self.replies_wait.load(Relaxed) {
            return false;
        }
        let mut state = self.state.lock();
        let is_congested = state.waiting_replies() >= MAX_WAITING_REPLIES;
        // Packets and events ask by turns: who may go on now says nothing of the other, who may have stopped before.
        state.parked |= is_congested;
        is_congested
    }
}

/// What a packet of a connection without payload says besides its addresses.
#[derive(Clone, Copy)]
pub(crate) struct ControlPacket {
    /// What it is for.
    pub(crate) op: Op,
    /// Flags of `op`.
    pub(crate) flags: u32,
    /// Whether it answers a packet of the device.
    pub(crate) is_reply: bool,
}

impl ControlPacket {
    /// A packet that the driver sends on behalf of an application.
    pub(crate) const fn of(op: Op) -> Self {
        Self {
            op,
            flags: 0,
            is_reply: false,
        }
    }

    /// A packet that answers one of the device.
    pub(crate) const fn reply(op: Op) -> Self {
        Self {
            op,
            flags: 0,
            is_reply: true,
        }
    }
}

impl VsockDriver {
    /// The header of a packet of `socket`, with its credit. ENODEV where there is no device.
    ///
    /// Also where the connection is over for the peer, who might take the packet for one of a new connection between
    /// the same ports.
    pub(super) fn header(
        &self,
        socket: &LockedSocket<'_>,
        connection: &Connection,
        op: Op,
        flags: u32,
        len: u32,
    ) -> Result<Header> {
        let (local, remote) = (socket.local(), socket.remote());
        let present = self.guest_cid().ok_or(ENODEV)?;
        let guest_cid = connection.guest_cid().unwrap_or(present).get();
        // No device carries a guest's packets to itself; that is what the loopback transport is for.
        if remote.cid == guest_cid {
            return Err(ENODEV);
        }
        // What the peer has closed is not reset, so that what was received can be read.
        let is_over = connection.reset_state() != ResetState::No
            || (socket.peer_shutdown() == Directions::BOTH
                && (self.was_reset_since(connection) || socket.has_successor()));
        if is_over {
            return Err(ENODEV);
        }
        let credit = connection.advertisement();
        Ok(Header {
            src_cid: guest_cid.into(),
            dst_cid: remote.cid.into(),
            src_port: local.port,
            dst_port: remote.port,
            len,
            socket_type: connection.socket_type(),
            op,
            flags,
            buf_alloc: credit.buf_alloc,
            fwd_cnt: credit.fwd_cnt,
        })
    }

    /// Sends a control packet of a connection. May sleep.
    pub(crate) fn send_control(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        packet: ControlPacket,
    ) -> Result {
        let control = Outgoing::control(connection, packet.is_reply);
        let packet = self.make_control(socket, &connection, packet.op, packet.flags, control)?;
        self.transmit_control(&connection, packet)
    }

    /// Sends RST on a connection that is over; what waits of it is of no use to the peer. May sleep.
    pub(crate) fn send_final_reset(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        packet: ControlPacket,
    ) {
        // Otherwise a new connection between the same ports could overtake it.
        let has_lost_answer = self.cancel_waiting(&connection);
        let sent = self.send_control(socket, connection, packet);
        if sent.is_err() && has_lost_answer {
            // The device sends nothing to the peer, and nothing of it, until there is one.
            if let Ok(header) = self.header(socket, &connection, packet.op, packet.flags, 0) {
                self.send_nofail(&header);
            }
        }
        // Otherwise, out of memory or without a device, the peer is left to its own timeout.
    }

    fn make_control(
        &self,
        socket: &LockedSocket<'_>,
        connection: &Connection,
        op: Op,
        flags: u32,
        control: Outgoing,
    ) -> Result<OutgoingPacket> {
        let header = self.header(socket, connection, op, flags, 0)?;
        SkBuff::outgoing(
            Some(socket),
            &header.to_bytes(),
            Payload::None,
            None,
            control,
        )
    }

    fn transmit_control(&self, connection: &Connection, packet: OutgoingPacket) -> Result {
        let is_reply = packet.control().is_reply();
        self.transmit(packet)?;
        if !is_reply {
            self.moderation.note_pause();
        }
        connection.advertised();
        Ok(())
    }

    /// Sends a credit update. May sleep.
    ///
    /// Where it cannot be sent nothing is lost: the peer does not count as told.
    pub(crate) fn send_credit_update(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        is_reply: bool,
    ) {
        let replaces_waiting = connection.has_many_waiting_updates();
        let control = Outgoing::credit_update(connection, is_reply);
        let Ok(update) = self.make_control(socket, &connection, Op::CreditUpdate, 0, control)
        else {
            return;
        };
        if replaces_waiting {
            // This one says all that they do. Those that the device has already are as many as its queue takes.
            let waiting = self.tx.state.lock().take_credit_updates(&connection);
            drop(waiting);
        }
        if self.transmit_control(&connection, update).is_ok() {
            self.statistics.credit_updates.increment();
        }
    }

    /// Answers a packet for which there is no connection with RST, unless it is one itself. May sleep.
    pub(crate) fn send_reset_reply(&self, to: &Header) {
        let Some(header) = to.reset_reply() else {
            return;
        };
        let packet = SkBuff::outgoing(
            None,
            &header.to_bytes(),
            Payload::None,
            None,
            Outgoing::unconnected_reply(),
        );
        // Out of memory, or without a device, the peer is left to its own timeout.
        if packet.and_then(|packet| self.transmit(packet)).is_ok() {
            match to.op {
                Op::Request => self.statistics.refused_requests.increment(),
                _ => self.statistics.rst_no_connection.increment(),
            }
        }
    }

    /// Gives a packet to the device, or lets it wait for room. May sleep.
    ///
    /// # Errors
    ///
    /// ENODEV where there is no device, EIO where it is broken, ENOMEM where its queue is too small for the packet; that is
    /// freed.
    pub(crate) fn transmit(&self, packet: OutgoingPacket) -> Result {
        self.transmit_or_batch(packet, false).map(|_| ())
    }

    /// The same for payload that the current task sends, which waits for the work item where that waits for this task.
    pub(super) fn transmit_payload(self: ArcBorrow<'_, Self>, packet: OutgoingPacket) -> Result {
        let may_batch = self.moderation.note_payload(packet.control().payload_len());
        if let Sent::Batched = self.transmit_or_batch(packet, may_batch)? {
            self.statistics.tx_batched.increment();
            queue_work_in_turn::<{ work::TX }>(self.into());
        }
        Ok(())
    }

    fn transmit_or_batch(&self, packet: OutgoingPacket, may_batch: bool) -> Result<Sent> {
        let is_reply = packet.control().is_reply();
        // The lock is released at the end of this statement.
        let sent = self.tx.state.lock().push_or_wait(packet, may_batch);
        self.note_sent(sent, is_reply)
    }

    /// Counts a packet that waits for the device, or is freed as there is none that works. May sleep; not with the tx lock.
    fn note_sent(
        &self,
        sent: Result<Sent, (OutgoingPacket, Error)>,
        is_reply: bool,
    ) -> Result<Sent> {
        match sent {
            Ok(sent) => {
                if let Sent::Waits = sent {
                    self.statistics.tx_waited.increment();
                    if is_reply {
                        self.tx.replies_wait.store(true, Relaxed);
                    }
                }
                Ok(sent)
            }
            // The packet is freed here, outside of the lock: that wakes writers.
            Err((_packet, error)) => {
                self.statistics.dropped_tx.increment();
                Err(error)
            }
        }
    }

    /// Takes small packets that the current task has sent to the device, where they wait for the work item: the task may wait
    /// for the answer. May sleep.
    pub(super) fn send_batch(&self) {
        if self.moderation.note_pause() {
            self.tx.state.lock().push_batch();
        }
    }

    /// Frees the packets that the device has used, and gives it those that wait. Work item; sleeps.
    pub(super) fn process_tx(self: &Arc<Self>) {
        self.moderation.note_turn();
        let mut budget = BUDGET;
        loop {
            let (used, completing, next) = self.turn_tx_over(&mut budget);
            self.complete(completing);
            self.tx.free_used(used);
            match next {
                Next::Later => return,
                Next::Now => cond_resched(),
                Next::WithMemory => {
                    return queue_work_without_memory::<{ work::TX }>(self.clone());
                }
            }
        }
    }

    /// Takes what the device has used out of its queue and off the budget, fills that queue from what waits, and lets the receiver
    /// go on where it has stopped and few enough answers wait. Gives what is to be freed, by [`Tx::free_used`] and by
    /// [`Self::complete`]. Sleeps.
    fn turn_tx_over(
        self: &Arc<Self>,
        budget: &mut usize,
    ) -> (SkBuffQueue<Outgoing>, SkBuffQueue<Outgoing>, Next) {
        let mut used = SkBuffQueue::new();
        let mut guard = self.tx.state.lock();
        let state = &mut *guard;
        let Some(device) = &mut state.device else {
            return (used, SkBuffQueue::new(), Next::Later);
        };
        device.queue.disable_interrupts();
        while let Some(packet) = device.pop_sent() {
            *budget = budget.saturating_sub(1);
            match packet.control().completes {
                true => state.completing.push_back(packet),
                false => used.push_back(packet),
            }
        }
        let sender = (state.batched > 0).then(|| self.moderation.begin_batch());
        state.push_from_backlog();
        let something_waits = !state.nothing_waits();
        let next = match &mut state.device {
            None => Next::Later,
            Some(device) if device.queue.is_broken() => {
                queue_work::<{ work::DEVICE }>(self.clone());
                // Nothing that waits will be taken any more; what is sent from now on fails.
                let lost = state.take_all_waiting();
                self.statistics.dropped_tx.add(lost.len());
                state.completing.append(lost);
                Next::Later
            }
            Some(device) => match device.queue.enable_interrupts() {
                false if *budget > 0 => Next::Now,
                false => {
                    // With the device here, as below: nothing is queued there once that was taken away for the last time.
                    queue_work_in_turn::<{ work::TX }>(self.clone());
                    Next::Later
                }
                // There was no memory to map even one packet, and no interrupt will come.
                true if device.in_flight == 0 && something_waits => Next::WithMemory,
                true => Next::Later,
            },
        };
        if state.unpark(&self.tx.replies_wait) {
            // It has had many packets to answer already, and programs are to have the CPU, too.
            queue_work_in_turn::<{ work::RX }>(self.clone());
            queue_work_in_turn::<{ work::EVENTS }>(self.clone());
        }
        let completing = state.begin_completing();
        drop(guard);
        if let Some(sender) = sender {
            self.moderation.end_batch(sender);
        }
        (used, completing, next)
    }

    /// Frees packets that applications get a completion of, and those that others find used meanwhile. No lock may be held:
    /// freeing calls back into sockets. Sleeps.
    fn complete(&self, mut completing: SkBuffQueue<Outgoing>) {
        while !completing.is_empty() {
            self.tx.free_used(completing);
            completing = self.tx.state.lock().go_on_completing();
        }
    }

    /// Tells the device that a connection goes on by its new addresses, before any other packet with these. Sleeps.
    pub(crate) fn acknowledge_update(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        guest_cid: Cid,
        host_cid: Cid,
    ) {
        // Without a device there is nobody to tell.
        let Ok(packet) = self.control_nofail(socket, connection, Op::CreditRequest, false) else {
            return;
        };
        let mut state = self.tx.state.lock();
        state.readdress(&connection, guest_cid, host_cid);
        let Some(packet) = state.put_before_waiting(&connection, packet) else {
            state.push_batch();
            drop(state);
            self.statistics.tx_waited.increment();
            connection.advertised_before_older();
            return;
        };
        let sent = state.push_or_wait(packet, false);
        drop(state);
        // Without a device that works there is nobody to tell.
        let _ = self.note_sent(sent, false);
        connection.advertised();
    }

    /// Makes a packet of a connection without payload, whatever memory there is; fails without a device.
    fn control_nofail(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        op: Op,
        is_reply: bool,
    ) -> Result<OutgoingPacket> {
        let header = self.header(socket, &connection, op, 0, 0)?;
        Ok(OutgoingPacket::outgoing_nofail(
            Some(socket),
            &header.to_bytes(),
            Outgoing::control(connection, is_reply),
        ))
    }

    /// Sends a packet of a connection, whatever memory there is, which a peer answers with RST where it does not have the
    /// connection. Sleeps.
    pub(crate) fn probe(&self, socket: &LockedSocket<'_>, connection: ArcBorrow<'_, Connection>) {
        // Without a device there is nobody to ask.
        let Ok(packet) = self.control_nofail(socket, connection, Op::CreditUpdate, true) else {
            return;
        };
        // Without a device that works there is nobody to tell.
        let _ = self.transmit(packet);
        connection.advertised();
    }

    /// Sends a packet of no connection, whatever memory there is. Sleeps.
    pub(crate) fn send_nofail(&self, header: &Header) {
        let packet = OutgoingPacket::outgoing_nofail(
            None,
            &header.to_bytes(),
            Outgoing::unconnected_reply(),
        );
        // Without a device that works there is nobody to tell.
        let _ = self.transmit(packet);
    }

    /// Lets requests for connections that wait come from the guest's present CID. May sleep.
    pub(crate) fn readdress_waiting_requests(&self, guest_cid: Cid) {
        self.tx.state.lock().readdress_requests(guest_cid);
    }

    /// Frees the packets of all connections that were reset. May sleep.
    pub(crate) fn cancel_waiting_of_reset_connections(&self) {
        let was_reset = |connection: &Connection| connection.reset_state() != ResetState::No;
        let waiting = self.tx.state.lock().take_waiting_where(was_reset);
        drop(waiting);
    }

    /// Frees the packets of a connection that wait; returns whether the answer to an update was one of them. May sleep.
    ///
    /// Where the receiver waits for fewer answers it goes on when the device has used a buffer.
    pub(crate) fn cancel_waiting(&self, connection: &Connection) -> bool {
        let waiting = self.tx.state.lock().take_waiting_of(connection);
        let is_answer = |packet: &OutgoingPacket| {
            let header = packet.front().map(Header::parse);
            header.is_some_and(|header| header.op == Op::CreditRequest)
        };
        let answer = waiting.try_for_each(|packet| match is_answer(packet) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        });
        answer.is_break()
    }
}
