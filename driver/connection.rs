// SPDX-License-Identifier: GPL-2.0

//! What the driver keeps for each socket.

use crate::{
    af_vsock_glue::skb::{SkBuff, SkBuffQueue},
    protocol::credit::{CreditExceeded, ReceiveCredit, SendCredit},
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        new_spinlock, Arc, SpinLock,
    },
};

/// Payload of at most so many bytes is copied behind the payload before it, where there is room.
const COPY_BREAK: usize = 256;

/// Control block of a received packet, which holds nothing but payload.
#[derive(Default)]
pub(crate) struct Received {
    /// Bytes at the front that were read already.
    read: usize,
}

/// The packets that were received and not read completely.
///
/// Their number is bounded by credit, and their memory by twice the receive buffer and one packet for the
/// payload that came in packets of its own, plus as much again as small packets may waste: see
/// [`ReceiveQueue::enqueue`].
pub(crate) struct ReceiveQueue {
    packets: SkBuffQueue<Received>,
    /// Sum of their memory, in bytes.
    truesize: usize,
}

impl ReceiveQueue {
    fn new() -> Self {
        Self {
            packets: SkBuffQueue::new(),
            truesize: 0,
        }
    }

    /// Appends a packet of payload. Small payload goes into the last packet's memory where it fits; payload
    /// of any size does once the queue takes more than `limit` bytes of memory.
    fn enqueue(&mut self, packet: SkBuff<()>, limit: usize) {
        let crowded = self.truesize.saturating_add(packet.truesize()) > limit;
        if packet.len() <= COPY_BREAK || crowded {
            if let Some(true) = self.packets.with_back(|last| last.append(&packet)) {
                packet.consume();
                return;
            }
        }
        self.truesize += packet.truesize();
        self.packets
            .push_back(packet.with_control(Received::default()));
    }
}

/// A socket's part of the protocol: credit both ways, and what was received.
#[pin_data]
pub(crate) struct Connection {
    #[pin]
    state: SpinLock<ConnectionState>,
    /// Payload that was given to [`tx`](super::tx) and not yet taken by the device, in bytes.
    unsent: Atomic<i64>,
}

struct ConnectionState {
    send: SendCredit,
    receive: ReceiveCredit,
    queue: ReceiveQueue,
    reset: ResetState,
}

/// Whether the connection was reset by the device, and the application told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResetState {
    /// It was not.
    No,
    /// It was, and the next call fails with ECONNRESET.
    Untold,
    /// It was, and the application knows.
    Told,
}

impl Connection {
    /// A connection with a receive buffer of `buf_alloc` bytes, whose peer has not said anything yet.
    pub(crate) fn new(buf_alloc: u32) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                state <- new_spinlock!(ConnectionState {
                    send: SendCredit::default(),
                    receive: ReceiveCredit::new(buf_alloc),
                    queue: ReceiveQueue::new(),
                    reset: ResetState::No,
                }, "virtio_vsock_rs_connection"),
                unsent: Atomic::new(0),
            }),
            GFP_KERNEL,
        )
    }

    /// Notes what a packet says of the peer's receive buffer; returns whether more can be sent than before.
    pub(crate) fn note_peer_credit(&self, buf_alloc: u32, fwd_cnt: u32) -> bool {
        let mut state = self.state.lock();
        let limit = state.receive.buf_alloc();
        let before = state.send.available(limit);
        state.send.update(buf_alloc, fwd_cnt);
        state.send.available(limit) > before
    }

    /// Takes up to `wanted` bytes of credit.
    pub(crate) fn take_send_credit(&self, wanted: u32) -> u32 {
        let mut state = self.state.lock();
        let limit = state.receive.buf_alloc();
        state.send.take(wanted, limit)
    }

    /// Gives credit back for payload that could not be sent.
    pub(crate) fn return_send_credit(&self, unused: u32) {
        self.state.lock().send.give_back(unused);
    }

    /// Counts payload that is on its way to the device.
    pub(crate) fn add_unsent(&self, len: u32) {
        self.unsent.add(i64::from(len), Relaxed);
    }

    /// Notes that the device has taken payload, or that it was thrown away.
    pub(crate) fn remove_unsent(&self, len: u32) {
        self.unsent.fetch_sub(i64::from(len), Relaxed);
    }

    /// Bytes that the device has not taken yet.
    pub(crate) fn unsent(&self) -> usize {
        usize::try_from(self.unsent.load(Relaxed)).unwrap_or(0)
    }

    /// Bytes that can be sent.
    pub(crate) fn writable(&self) -> u32 {
        let state = self.state.lock();
        state.send.available(state.receive.buf_alloc())
    }

    /// Bytes that can be read.
    pub(crate) fn readable(&self) -> u32 {
        self.state.lock().receive.unread()
    }

    /// The `buf_alloc` and `fwd_cnt` of a packet that is about to be sent.
    pub(crate) fn advertise(&self) -> (u32, u32) {
        self.state.lock().receive.advertise()
    }

    /// Whether the peer should be told now of room in the receive buffer, as a reader waits for `low_water`
    /// bytes.
    pub(crate) fn wants_credit_update(&self, low_water: u32) -> bool {
        self.state.lock().receive.wants_update(low_water)
    }

    /// Changes the size of the receive buffer.
    pub(crate) fn set_buf_alloc(&self, buf_alloc: u32) {
        self.state.lock().receive.set_buf_alloc(buf_alloc);
    }

    /// Appends a packet of payload to what can be read.
    pub(crate) fn enqueue(&self, payload: SkBuff<()>) -> Result<(), CreditExceeded> {
        let len = u32::try_from(payload.len()).map_err(|_| CreditExceeded)?;
        let mut state = self.state.lock();
        state.receive.receive(len)?;
        let limit = (state.receive.buf_alloc() as usize).saturating_mul(2);
        state.queue.enqueue(payload, limit);
        Ok(())
    }

    /// Takes the receive queue out, so that its data can be copied without the spinlock.
    ///
    /// The caller holds the socket's lock and puts the queue back before it releases that; the counts that
    /// pollers see stay as they are meanwhile.
    fn borrow_queue(&self) -> SkBuffQueue<Received> {
        self.state.lock().queue.packets.take()
    }

    /// Lets `copy` have data from the front of the receive queue, up to `len` bytes, and leaves it there.
    /// Returns how much it took; an error only where it took nothing. Needs the socket's lock; may sleep.
    pub(crate) fn peek(
        &self,
        len: usize,
        mut copy: impl FnMut(&SkBuff<Received>, usize, usize) -> Result,
    ) -> Result<usize> {
        let packets = self.borrow_queue();
        let mut copied = 0;
        let result = packets.try_for_each(|packet| {
            let read = packet.control().read;
            let part = (len - copied).min(packet.len() - read);
            if part > 0 {
                copy(packet, read, part)?;
                copied += part;
            }
            Ok(())
        });
        self.state.lock().queue.packets.prepend(packets);
        if copied > 0 {
            return Ok(copied);
        }
        result.map(|()| 0)
    }

    /// Moves data out of the receive queue, as [`peek`](Self::peek) does otherwise.
    pub(crate) fn dequeue(
        &self,
        len: usize,
        mut copy: impl FnMut(&SkBuff<Received>, usize, usize) -> Result,
    ) -> Result<usize> {
        let mut packets = self.borrow_queue();
        let mut result = Ok(());
        let mut copied = 0;
        let mut freed = 0;
        let mut freed_truesize = 0;
        while copied < len {
            let Some(mut packet) = packets.pop_front() else {
                break;
            };
            let read = packet.control().read;
            let part = (len - copied).min(packet.len() - read);
            result = copy(&packet, read, part);
            if result.is_ok() {
                copied += part;
                packet.control_mut().read += part;
            }
            if packet.control().read < packet.len() {
                packets.push_front(packet);
                break;
            }
            freed += packet.len();
            freed_truesize += packet.truesize();
            packet.consume();
        }

        let mut state = self.state.lock();
        state.queue.packets.prepend(packets);
        state.queue.truesize = state.queue.truesize.saturating_sub(freed_truesize);
        // Neither is more than the receive buffer, whose size is 32 bits.
        state.receive.consume(copied as u32, freed as u32);
        drop(state);

        if copied > 0 {
            return Ok(copied);
        }
        result.map(|()| 0)
    }

    /// Throws away what was received and not read.
    pub(crate) fn purge(&self) {
        let mut state = self.state.lock();
        let unread = state.receive.unread();
        state.receive.consume(unread, 0);
        let packets = state.queue.packets.take();
        state.queue.truesize = 0;
        drop(state);
        // Freed here, outside of the spinlock.
        drop(packets);
    }

    /// Whether the connection was reset by the device.
    pub(crate) fn reset_state(&self) -> ResetState {
        self.state.lock().reset
    }

    /// Notes a reset by the device, or that the application was told of it.
    pub(crate) fn set_reset_state(&self, reset: ResetState) {
        self.state.lock().reset = reset;
    }
}
