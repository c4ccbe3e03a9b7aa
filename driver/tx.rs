// SPDX-License-Identifier: GPL-2.0

//! Packets to the device.
//!
//! A packet goes straight into the virtqueue where there is room and nothing waits. Otherwise it waits in the
//! backlog, in order, until the device has used buffers. What waits is bounded: payload by the credit of its
//! sender, answers to packets of the device by [`MAX_WAITING_REPLIES`], because no more packets are received
//! while so many wait, and other control packets by what their sockets may have outstanding.

use super::{
    connection::Connection,
    queue_work,
    work,
    VsockDriver, //
};
use crate::{
    af_vsock_glue::{
        message::{MessageSource, ZeroCopy},
        skb::{Payload, SkBuff, SkBuffQueue},
        socket::{LockedSocket, Socket},
        virtio::{PushError, RawQueue, ToDevice, Virtqueue},
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
    /// The connection whose payload it is, and how many bytes.
    payload: Option<(Arc<Connection>, u32)>,
    /// Whether it answers a packet of the device.
    is_reply: bool,
}

impl Outgoing {
    fn control(is_reply: bool) -> Self {
        Self {
            payload: None,
            is_reply,
        }
    }

    /// Counts as unsent until it is dropped.
    fn payload(connection: ArcBorrow<'_, Connection>, len: u32) -> Self {
        connection.add_unsent(len);
        Self {
            payload: Some((connection.into(), len)),
            is_reply: false,
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if let Some((connection, len)) = self.payload.take() {
            connection.remove_unsent(len);
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
    queue: Mutex<Option<Virtqueue<Outgoing, ToDevice>>>,
    #[pin]
    backlog: SpinLock<Backlog>,
    /// The longest payload that fits into the virtqueue, in bytes.
    longest_payload: Atomic<u32>,
}

/// Packets that wait, in order.
struct Backlog {
    packets: SkBuffQueue<Outgoing>,
    replies: usize,
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
            }, "virtio_vsock_rs_backlog"),
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
        *self.queue.lock() = Some(queue);
    }

    /// The longest payload of a packet, in bytes.
    pub(crate) fn longest_payload(&self) -> u32 {
        self.longest_payload.load(Relaxed)
    }

    /// Whether packets may be in as many pieces as the caller's pages are.
    pub(crate) fn takes_pages(&self) -> bool {
        self.longest_payload() == MAX_PAYLOAD
    }

    /// Stops using the device, and frees what it was to be sent. Sleeps.
    pub(crate) fn stop(&self) {
        // The queue is dropped after the lock, and then what waited for it: nothing is added any more.
        let queue = self.queue.lock().take();
        drop(queue);
        let waiting = self.backlog.lock().extract(|_| true);
        drop(waiting);
    }

    /// Whether so many answers wait that no more packets should be received. Callable in atomic context.
    pub(crate) fn is_congested(&self) -> bool {
        self.backlog.lock().replies >= MAX_WAITING_REPLIES
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
        let (buf_alloc, fwd_cnt) = connection.advertise();
        Ok(Header {
            src_cid: guest_cid.into(),
            dst_cid: remote.cid.into(),
            src_port: local.port,
            dst_port: remote.port,
            len,
            socket_type: connection.socket_type(),
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        })
    }

    /// Makes a control packet of a connection. May sleep.
    pub(crate) fn control_packet(
        &self,
        socket: &LockedSocket<'_>,
        connection: &Connection,
        message: Message,
    ) -> Result<OutgoingPacket> {
        let header = self.header(socket, connection, message.op, message.flags, 0)?;
        SkBuff::outgoing(
            Some(socket),
            &header.to_bytes(),
            Payload::None,
            None,
            Outgoing::control(message.is_reply),
        )
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
                packet => return self.transmit(packet?),
            }
        }
        let payload = Payload::Copy(message, len as usize);
        self.transmit(SkBuff::outgoing(
            Some(socket),
            &header,
            payload,
            zero_copy,
            control(),
        )?)
    }

    /// Sends a control packet of a connection. May sleep.
    pub(crate) fn send_control(
        &self,
        socket: &LockedSocket<'_>,
        connection: &Connection,
        message: Message,
    ) -> Result {
        self.transmit(self.control_packet(socket, connection, message)?)
    }

    /// Sends a credit update. May sleep.
    ///
    /// Where it cannot be sent nothing is lost: the next packet carries the credit.
    pub(crate) fn send_credit_update(
        &self,
        socket: &LockedSocket<'_>,
        connection: &Connection,
        is_reply: bool,
    ) {
        let message = Message {
            is_reply,
            ..Message::of(Op::CreditUpdate)
        };
        if self.send_control(socket, connection, message).is_ok() {
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
    /// ENODEV where there is no device, EIO where it is broken; the packet is freed.
    pub(crate) fn transmit(&self, packet: OutgoingPacket) -> Result {
        let payload = packet.control().payload.as_ref().map_or(0, |(_, len)| *len);
        let mut queue = self.tx.queue.lock();
        let sent = match (*queue).as_mut() {
            None => Err((packet, ENODEV)),
            Some(queue) => self.push_or_wait(queue, packet),
        };
        drop(queue);
        match sent {
            Ok(()) => {
                self.statistics.tx_packets.increment();
                self.statistics.tx_bytes.add(payload as usize);
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
        queue: &mut Virtqueue<Outgoing, ToDevice>,
        packet: OutgoingPacket,
    ) -> Result<(), (OutgoingPacket, Error)> {
        let nothing_waits = self.tx.backlog.lock().packets.is_empty();
        let refused = if nothing_waits {
            queue.push(packet)
        } else {
            Err((packet, PushError::Full))
        };
        match refused {
            Ok(()) => {
                queue.kick();
                Ok(())
            }
            Err((packet, PushError::Full)) => {
                // The queue is full, so the device will use buffers, and its interrupt takes this up.
                self.tx.backlog.lock().push_back(packet);
                self.statistics.tx_waited.increment();
                Ok(())
            }
            Err((packet, PushError::Failed(error))) => Err((packet, error)),
        }
    }

    /// Frees the packets that the device has used, and gives it those that wait. Work item; sleeps.
    pub(super) fn process_tx(self: &Arc<Self>) {
        // Freed after the lock is released: freeing calls back into sockets.
        let mut used = SkBuffQueue::new();
        let mut failed = SkBuffQueue::new();
        let was_congested = self.tx.is_congested();
        {
            let mut queue = self.tx.queue.lock();
            let Some(queue) = (*queue).as_mut() else {
                return;
            };
            loop {
                queue.disable_interrupts();
                while let Some(packet) = queue.pop() {
                    used.push_back(packet);
                }
                self.push_waiting(queue, &mut failed);
                if queue.enable_interrupts() || queue.is_broken() {
                    break;
                }
            }
            queue.kick();
        }
        while let Some(packet) = used.pop_front() {
            packet.consume();
        }
        self.statistics.dropped_tx.add(failed.len());
        drop(failed);
        if was_congested && !self.tx.is_congested() {
            queue_work::<{ work::RX }>(self.clone());
        }
    }

    /// Moves packets from the backlog into the queue, as far as there is room.
    fn push_waiting(
        &self,
        queue: &mut Virtqueue<Outgoing, ToDevice>,
        failed: &mut SkBuffQueue<Outgoing>,
    ) {
        loop {
            let Some(packet) = self.tx.backlog.lock().pop_front() else {
                return;
            };
            match queue.push(packet) {
                Ok(()) => {}
                Err((packet, PushError::Full)) => {
                    self.tx.backlog.lock().push_front(packet);
                    return;
                }
                Err((packet, PushError::Failed(_))) => failed.push_back(packet),
            }
        }
    }

    /// Frees the packets of a socket that wait. Sleeps.
    pub(crate) fn cancel_waiting(self: ArcBorrow<'_, Self>, socket: &Socket) {
        let was_congested = self.tx.is_congested();
        // The lock keeps packets from being between backlog and queue.
        let queue = self.tx.queue.lock();
        let cancelled = self
            .tx
            .backlog
            .lock()
            .extract(|packet| packet.is_charged_to(socket));
        drop(queue);
        drop(cancelled);
        if was_congested && !self.tx.is_congested() {
            queue_work::<{ work::RX }>(self.into());
        }
    }
}
