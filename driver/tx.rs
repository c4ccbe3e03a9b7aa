// SPDX-License-Identifier: GPL-2.0

//! Packets to the device.
//!
//! A packet goes straight into the virtqueue where there is room and nothing waits. Otherwise it waits in the
//! backlog, in order, until the device has used buffers. What waits is bounded: payload by the size of its
//! socket's buffer, answers to packets of the device by [`MAX_WAITING_REPLIES`], because no more packets are
//! received while so many wait, and other control packets by a number for each socket.

use super::{
    connection::Connection,
    purpose,
    queue_work,
    work,
    VsockDriver, //
};
use crate::{
    af_vsock_glue::{
        message::{MessageSource, ZeroCopy},
        monitor::{self, Direction},
        skb::{Payload, SkBuff, SkBuffQueue},
        socket::{LockedSocket, Socket},
        virtio::{PushError, RawQueue, ToDevice, Virtqueue},
        workqueue::cond_resched,
    },
    protocol::{
        header::{Header, Op, SocketType, HEADER_LEN, SEQ_EOM, SEQ_EOR},
        MAX_PAYLOAD,
    },
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        new_mutex, new_spinlock, Arc, ArcBorrow, Mutex, SpinLock,
    },
};

/// How many answers may wait for room before no more packets are received.
const MAX_WAITING_REPLIES: usize = 128;

/// Control block of a packet to the device.
pub(crate) struct Outgoing {
    /// The connection that counts the packet until it is dropped.
    counted: Option<(Arc<Connection>, Counted)>,
    /// Whether it answers a packet of the device.
    is_reply: bool,
}

/// What a connection counts of a packet.
#[derive(Clone, Copy)]
enum Counted {
    /// So many bytes of payload.
    Payload(u32),
    /// A credit update.
    CreditUpdate,
}

impl Outgoing {
    fn control(is_reply: bool) -> Self {
        Self {
            counted: None,
            is_reply,
        }
    }

    fn payload(connection: ArcBorrow<'_, Connection>, len: u32) -> Self {
        connection.add_unsent(len);
        Self {
            counted: Some((connection.into(), Counted::Payload(len))),
            is_reply: false,
        }
    }

    fn credit_update(connection: ArcBorrow<'_, Connection>, is_reply: bool) -> Self {
        connection.add_waiting_update();
        Self {
            counted: Some((connection.into(), Counted::CreditUpdate)),
            is_reply,
        }
    }

    fn is_credit_update(&self) -> bool {
        matches!(self.counted, Some((_, Counted::CreditUpdate)))
    }

    fn payload_len(&self) -> usize {
        match &self.counted {
            Some((_, Counted::Payload(len))) => *len as usize,
            _ => 0,
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        match self.counted.take() {
            Some((connection, Counted::Payload(len))) => connection.remove_unsent(len),
            Some((connection, Counted::CreditUpdate)) => connection.remove_waiting_update(),
            None => {}
        }
    }
}

/// A packet to the device.
pub(crate) type OutgoingPacket = SkBuff<Outgoing>;

/// The transmit virtqueue and what waits for room in it.
#[pin_data]
pub(crate) struct Tx {
    /// `None` while there is no device.
    #[pin]
    queue: Mutex<Option<TxQueue>>,
    #[pin]
    backlog: SpinLock<Backlog>,
    /// Whether answers may wait in the backlog. Changed with its lock held.
    replies_wait: Atomic<bool>,
    /// The longest payload that fits into the virtqueue, in bytes.
    longest_payload: Atomic<u32>,
}

/// The transmit virtqueue of a device.
pub(crate) struct TxQueue {
    queue: Virtqueue<Outgoing, ToDevice>,
    /// Packets that the device has.
    in_flight: usize,
}

impl TxQueue {
    fn push(&mut self, packet: OutgoingPacket) -> Result<(), (OutgoingPacket, PushError)> {
        self.queue.push(packet)?;
        self.in_flight += 1;
        Ok(())
    }

    fn pop(&mut self) -> Option<OutgoingPacket> {
        let packet = self.queue.pop()?;
        self.in_flight -= 1;
        Some(packet)
    }
}

/// Packets that wait, in order.
struct Backlog {
    packets: SkBuffQueue<Outgoing>,
    replies: usize,
    /// Whether the receiver has stopped until fewer answers wait.
    rx_parked: bool,
}

impl Backlog {
    fn push_back(&mut self, packet: OutgoingPacket) {
        self.replies += usize::from(packet.control().is_reply);
        self.packets.push_back(packet);
    }

    fn push_front(&mut self, packet: OutgoingPacket) {
        self.replies += usize::from(packet.control().is_reply);
        self.packets.push_front(packet);
    }

    fn pop_front(&mut self) -> Option<OutgoingPacket> {
        let packet = self.packets.pop_front()?;
        self.replies -= usize::from(packet.control().is_reply);
        Some(packet)
    }

    fn extract(
        &mut self,
        mut matches: impl FnMut(&OutgoingPacket) -> bool,
    ) -> SkBuffQueue<Outgoing> {
        let mut replies = 0;
        let extracted = self.packets.extract(|packet| {
            let extract = matches(packet);
            replies += usize::from(extract && packet.control().is_reply);
            extract
        });
        self.replies -= replies;
        extracted
    }
}

impl Tx {
    /// A transmitter without a device.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            queue <- new_mutex!(None, "virtio_vsock_rs_tx"),
            backlog <- new_spinlock!(Backlog {
                packets: SkBuffQueue::new(),
                replies: 0,
                rx_parked: false,
            }, "virtio_vsock_rs_backlog"),
            replies_wait: Atomic::new(false),
            longest_payload: Atomic::new(MAX_PAYLOAD),
        })
    }

    /// Begins to use a device's queue.
    pub(crate) fn start(&self, queue: RawQueue) {
        let queue = Virtqueue::from(queue);
        let longest = if queue.takes_any_packet() {
            MAX_PAYLOAD
        } else {
            // A small queue takes packets in one segment only.
            (OutgoingPacket::longest_linear() - HEADER_LEN) as u32
        };
        self.longest_payload.store(longest, Relaxed);
        *self.queue.lock() = Some(TxQueue {
            queue,
            in_flight: 0,
        });
    }

    /// The longest payload of a packet, in bytes.
    pub(crate) fn longest_payload(&self) -> u32 {
        self.longest_payload.load(Relaxed)
    }

    /// Whether packets may be in as many pieces as the caller's pages are.
    pub(crate) fn takes_pages(&self) -> bool {
        self.longest_payload() == MAX_PAYLOAD
    }

    /// Takes the device's queue out of use; nothing is added to it or to the backlog any more. Sleeps.
    pub(crate) fn take_queue(&self) -> Option<TxQueue> {
        self.queue.lock().take()
    }

    /// Frees what waits for a device that is gone.
    pub(crate) fn drop_backlog(&self) {
        let mut backlog = self.backlog.lock();
        backlog.rx_parked = false;
        let waiting = backlog.extract(|_| true);
        // Freed outside of the spinlock.
        drop(backlog);
        drop(waiting);
    }

    /// Whether so many answers wait that no more packets should be received. Whoever is told so stops
    /// receiving, and [`VsockDriver::resume_rx`] lets it go on. Callable in atomic context.
    pub(crate) fn park_rx_if_congested(&self) -> bool {
        // Answers are given by who asks here, so it knows of its own; this spares every packet the lock.
        if !self.replies_wait.load(Relaxed) {
            return false;
        }
        let mut backlog = self.backlog.lock();
        backlog.rx_parked = backlog.replies >= MAX_WAITING_REPLIES;
        backlog.rx_parked
    }

    /// Whether the receiver has stopped and can go on. It is told once.
    fn unpark_rx(&self) -> bool {
        let mut backlog = self.backlog.lock();
        self.replies_wait.store(backlog.replies > 0, Relaxed);
        backlog.replies < MAX_WAITING_REPLIES && core::mem::take(&mut backlog.rx_parked)
    }
}

/// What a packet of a connection says besides its addresses.
#[derive(Clone, Copy)]
pub(crate) struct Message {
    /// What it is for.
    pub(crate) op: Op,
    /// Flags of `op`.
    pub(crate) flags: u32,
    /// Whether it answers a packet of the device.
    pub(crate) is_reply: bool,
}

impl Message {
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
    fn header(
        &self,
        socket: &LockedSocket<'_>,
        connection: &Connection,
        op: Op,
        flags: u32,
        len: u32,
    ) -> Result<Header> {
        let (local, remote) = (socket.local(), socket.remote());
        let guest_cid = self.guest_cid().ok_or(ENODEV)?.get();
        // No device carries a guest's packets to itself; that is what the loopback transport is for.
        if remote.cid == guest_cid {
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
        connection: &Connection,
        message: Message,
    ) -> Result {
        self.send_counted(
            socket,
            connection,
            message,
            Outgoing::control(message.is_reply),
        )
    }

    fn send_counted(
        &self,
        socket: &LockedSocket<'_>,
        connection: &Connection,
        message: Message,
        control: Outgoing,
    ) -> Result {
        let header = self.header(socket, connection, message.op, message.flags, 0)?;
        let packet = SkBuff::outgoing(
            Some(socket),
            &header.to_bytes(),
            Payload::None,
            None,
            control,
        )?;
        self.transmit(packet)?;
        connection.advertised();
        Ok(())
    }

    /// Sends the next `len` bytes of a message, out of the caller's pages where `from_pages` says so. May sleep.
    pub(crate) fn send_payload(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        message: &mut MessageSource,
        len: u32,
        mut zero_copy: Option<&mut ZeroCopy>,
        from_pages: bool,
    ) -> Result {
        let is_end = connection.socket_type() == SocketType::SeqPacket
            && message.remaining() == len as usize;
        let flags = match (is_end, message.ends_record()) {
            (false, _) => 0,
            (true, false) => SEQ_EOM,
            (true, true) => SEQ_EOM | SEQ_EOR,
        };
        let header = self
            .header(socket, &connection, Op::Rw, flags, len)?
            .to_bytes();
        let control = || Outgoing::payload(connection, len);
        if from_pages {
            let payload = Payload::Pages(message, len as usize);
            match SkBuff::outgoing(
                Some(socket),
                &header,
                payload,
                zero_copy.as_deref_mut(),
                control(),
            ) {
                // The message is in more pieces than a packet can have.
                Err(EMSGSIZE) => {
                    if let Some(zero_copy) = &mut zero_copy {
                        zero_copy.set_copied();
                    }
                }
                packet => {
                    self.transmit(packet?)?;
                    connection.advertised();
                    return Ok(());
                }
            }
        }
        let payload = Payload::Copy(message, len as usize);
        self.transmit(SkBuff::outgoing(
            Some(socket),
            &header,
            payload,
            zero_copy,
            control(),
        )?)?;
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
        if connection.has_many_waiting_updates() {
            // This one says all that they do. Those that the device has already are as many as its queue takes.
            self.cancel(|packet| {
                packet.control().is_credit_update() && packet.is_charged_to(socket)
            });
        }
        let control = Outgoing::credit_update(connection, is_reply);
        let message = Message::of(Op::CreditUpdate);
        if self
            .send_counted(socket, &connection, message, control)
            .is_ok()
        {
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
            Outgoing::control(true),
        );
        // Out of memory, or without a device, the peer is left to its own timeout.
        if packet.and_then(|packet| self.transmit(packet)).is_ok() {
            self.statistics.rst_no_socket.increment();
        }
    }

    /// Gives a packet to the device, or lets it wait for room. May sleep.
    ///
    /// # Errors
    ///
    /// ENODEV where there is no device, EIO where it is broken, ENOMEM; the packet is freed.
    pub(crate) fn transmit(&self, packet: OutgoingPacket) -> Result {
        let payload = packet.control().payload_len();
        let mut queue = self.tx.queue.lock();
        let sent = match (*queue).as_mut() {
            None => Err((packet, ENODEV)),
            Some(queue) => self.push_or_wait(queue, packet),
        };
        drop(queue);
        match sent {
            Ok(()) => {
                self.statistics.tx_packets.increment();
                self.statistics.tx_bytes.add(payload);
                Ok(())
            }
            // The packet is freed here, outside of the lock: that wakes writers.
            Err((_packet, error)) => {
                self.statistics.dropped_tx.increment();
                Err(error)
            }
        }
    }

    fn push_or_wait(
        &self,
        queue: &mut TxQueue,
        packet: OutgoingPacket,
    ) -> Result<(), (OutgoingPacket, Error)> {
        if queue.queue.is_broken() {
            return Err((packet, EIO));
        }
        if let Some(header) = packet.front() {
            monitor::show(Direction::Sent, header, purpose, &packet);
        }
        let nothing_waits = self.tx.backlog.lock().packets.is_empty();
        let pushed = if nothing_waits {
            queue.push(packet)
        } else {
            Err((packet, PushError::Full))
        };
        match pushed {
            Ok(()) => {
                queue.queue.kick();
                Ok(())
            }
            // The device will use buffers that it has, and its interrupt takes this up.
            Err((packet, PushError::Full | PushError::NoMemory))
                if queue.in_flight > 0 || !nothing_waits =>
            {
                let mut backlog = self.tx.backlog.lock();
                if packet.control().is_reply {
                    self.tx.replies_wait.store(true, Relaxed);
                }
                backlog.push_back(packet);
                drop(backlog);
                self.statistics.tx_waited.increment();
                Ok(())
            }
            Err((packet, PushError::Full | PushError::NoMemory)) => Err((packet, ENOMEM)),
            Err((packet, PushError::Failed(_))) => Err((packet, EIO)),
        }
    }

    /// Frees the packets that the device has used, and gives it those that wait. Work item; sleeps.
    pub(super) fn process_tx(self: &Arc<Self>) {
        // Freed after the lock is released: freeing calls back into sockets.
        let mut used = SkBuffQueue::new();
        {
            let mut queue = self.tx.queue.lock();
            let Some(queue) = (*queue).as_mut() else {
                return;
            };
            loop {
                queue.queue.disable_interrupts();
                while let Some(packet) = queue.pop() {
                    used.push_back(packet);
                }
                self.push_waiting(queue);
                if queue.queue.is_broken() || queue.queue.enable_interrupts() {
                    break;
                }
                cond_resched();
            }
            queue.queue.kick();
            if queue.queue.is_broken() {
                // Nothing that waits will be taken any more; what is sent from now on fails.
                let mut lost = self.tx.backlog.lock().extract(|_| true);
                self.statistics.dropped_tx.add(lost.len());
                while let Some(packet) = lost.pop_front() {
                    used.push_back(packet);
                }
            } else if queue.in_flight == 0 && !self.tx.backlog.lock().packets.is_empty() {
                // There was no memory to map even one packet, and no interrupt will come.
                queue_work::<{ work::TX }>(self.clone());
            }
        }
        while let Some(packet) = used.pop_front() {
            packet.consume();
            cond_resched();
        }
        self.resume_rx();
    }

    /// Moves packets from the backlog into the queue, as far as there is room.
    fn push_waiting(&self, queue: &mut TxQueue) {
        loop {
            let Some(packet) = self.tx.backlog.lock().pop_front() else {
                return;
            };
            if let Err((packet, _)) = queue.push(packet) {
                self.tx.backlog.lock().push_front(packet);
                return;
            }
            cond_resched();
        }
    }

    /// Lets the receiver go on, where it has stopped and few enough answers wait.
    fn resume_rx(self: &Arc<Self>) {
        if self.tx.unpark_rx() {
            queue_work::<{ work::RX }>(self.clone());
        }
    }

    /// Frees the packets of a socket that wait. Sleeps.
    pub(crate) fn cancel_waiting(self: ArcBorrow<'_, Self>, socket: &Socket) {
        self.cancel(|packet| packet.is_charged_to(socket));
        Arc::from(self).resume_rx();
    }

    /// Frees packets that wait. Sleeps.
    fn cancel(&self, matches: impl FnMut(&OutgoingPacket) -> bool) {
        // The lock keeps packets from being between backlog and queue.
        let queue = self.tx.queue.lock();
        let cancelled = self.tx.backlog.lock().extract(matches);
        drop(queue);
        drop(cancelled);
    }
}
