// SPDX-License-Identifier: GPL-2.0

//! What the driver keeps for each socket.

use super::{backlog::Waiting, spare_buffers::SpareBuffers};
use crate::{
    af_vsock_glue::{
        skb::{Control, FromDevice, QueuedSkBuff, SkBuff, SkBuffQueue},
        socket::{Address, Socket},
    },
    protocol::{
        cid::Cid,
        credit::{Advertisement, CreditExceeded, ReceiveCredit, SendCredit},
        header::{Header, Op, SocketType},
    },
};
use core::ops::ControlFlow;
use kernel::{
    alloc::AllocError,
    bitmap::BitmapVec,
    current,
    prelude::*,
    sync::{
        atomic::{Atomic, Full, Relaxed},
        new_spinlock, Arc, SpinLock,
    },
};

/// Payload of at most so many bytes is copied behind the payload before it, where there is room.
const COPY_BREAK: usize = 256;

/// What part of what the peer of a seqpacket socket can use of the receive buffer may become free, while there are other messages
/// to read, before the peer is told.
const UNTOLD_SHARE_OF_MESSAGES: u32 = 16;

/// Where a message ends in a packet's payload.
#[derive(Clone, Copy)]
struct MessageEnd {
    /// That of the first byte behind the message.
    offset: u32,
    /// Whether it ends a record, too.
    ends_record: bool,
}

impl MessageEnd {
    /// `None` for an offset that no packet has.
    fn new(offset: usize, ends_record: bool) -> Option<Self> {
        let offset = u32::try_from(offset).ok()?;
        Some(Self {
            offset,
            ends_record,
        })
    }
}

/// Ends of messages in one packet's payload: for each byte that there is room for a bit which says that a message ends with it,
/// and one that a record does. So they take a quarter of the payload's memory, however short the messages are.
struct MessageEnds(BitmapVec);

impl MessageEnds {
    /// None, in payload of up to `room` bytes. Callable in atomic context.
    fn new(room: usize) -> Result<Self, AllocError> {
        let bits = room.checked_mul(2).ok_or(AllocError)?;
        // Under a spinlock, so not GFP_KERNEL.
        Ok(Self(BitmapVec::new(bits, GFP_ATOMIC)?))
    }

    /// Memory that they take, in bytes.
    fn size(&self) -> usize {
        self.0.len().div_ceil(u8::BITS as usize)
    }

    /// Adds one. There is none at the front of the payload, nor behind the room.
    fn add(&mut self, end: MessageEnd) {
        let Some(last_byte) = end.offset.checked_sub(1) else {
            return;
        };
        let bit = last_byte as usize * 2;
        if bit + 1 < self.0.len() {
            self.0.set_bit(bit);
            if end.ends_record {
                self.0.set_bit(bit + 1);
            }
        }
    }

    /// The first one behind the first `read` bytes.
    fn next_after(&self, read: u32) -> Option<MessageEnd> {
        let bit = self.next_bit(read as usize * 2)?;
        let ends_record = self.next_bit(bit + 1) == Some(bit + 1);
        MessageEnd::new(bit / 2 + 1, ends_record)
    }

    fn next_bit(&self, start: usize) -> Option<usize> {
        (start < self.0.len()).then(|| self.0.next_bit(start))?
    }
}

/// Control block of a received packet, which holds nothing but payload.
pub(crate) struct Received {
    /// Bytes at the front that were read already.
    read: u32,
    /// Ends of the messages before the last one, where small messages were merged.
    ends: Option<MessageEnds>,
    /// End of the last message, where it ends in this packet.
    last: Option<MessageEnd>,
}

impl Control for Received {
    type Direction = FromDevice;
}

impl Received {
    /// The first message end that was not read.
    fn next_end(&self) -> Option<MessageEnd> {
        let merged = self
            .ends
            .as_ref()
            .and_then(|ends| ends.next_after(self.read));
        merged.or(self.last)
    }

    /// How many message ends were not read.
    fn unread_ends(&self) -> u32 {
        let mut merged = 0;
        let mut read = self.read;
        while let Some(end) = self.ends.as_ref().and_then(|ends| ends.next_after(read)) {
            read = end.offset;
            merged += 1;
        }
        merged + u32::from(self.last.is_some())
    }
}

/// The packets that were received and not read completely.
///
/// Their memory is bounded: see Documentation/data-path.md.
struct ReceiveQueue {
    packets: SkBuffQueue<Received>,
    /// Sum of their memory, in bytes.
    truesize: usize,
    /// How many messages end in them.
    messages: u32,
}

impl ReceiveQueue {
    fn new() -> Self {
        Self {
            packets: SkBuffQueue::new(),
            truesize: 0,
            messages: 0,
        }
    }

    /// Appends a packet of payload, and the end of a message where `end` says so.
    ///
    /// Small payload goes into the last packet's memory where it fits; payload of any size, and whole
    /// messages, do once the queue takes more than `limit` bytes of memory.
    /// Memory is charged to `socket`. Returns the buffer where it is not in the queue.
    fn enqueue(
        &mut self,
        socket: &Socket,
        packet: SkBuff<()>,
        end: Option<bool>,
        limit: usize,
    ) -> Option<SkBuff<()>> {
        let crowded = self.truesize.saturating_add(packet.truesize()) > limit;
        let merge = packet.len() <= COPY_BREAK || crowded;
        let merged = match merge {
            true => self
                .packets
                .back_mut()
                .and_then(|last| Self::merge(last, &packet, end, crowded)),
            false => None,
        };
        if let Some(more_memory) = merged {
            self.messages += u32::from(end.is_some());
            self.truesize += more_memory;
            return Some(packet);
        }
        if packet.len() == 0 {
            // The end of a message that has no beginning.
            return Some(packet);
        }
        self.messages += u32::from(end.is_some());
        self.truesize += packet.truesize();
        let received = Received {
            read: 0,
            ends: None,
            last: end_of(packet.len(), end),
        };
        let packet = packet.with_control(received);
        packet.charge_as_received(socket);
        self.packets.push_back(packet);
        None
    }

    /// Appends `packet` to `last`, behind the end of a message only where `messages` says so. Returns how many bytes of memory
    /// `last` takes more than before; `None` where `packet` has to stay alone.
    fn merge(
        mut last: QueuedSkBuff<'_, Received>,
        packet: &SkBuff<()>,
        end: Option<bool>,
        messages: bool,
    ) -> Option<usize> {
        if packet.len() > last.tailroom() {
            return None;
        }
        let mut more_memory = 0;
        if let Some(previous) = last.control().last {
            if !messages || packet.len() == 0 {
                return None;
            }
            if last.control().ends.is_none() {
                let ends = MessageEnds::new(last.len() + last.tailroom()).ok()?;
                more_memory = ends.size();
                last.control_mut().ends = Some(ends);
            }
            if let Some(ends) = &mut last.control_mut().ends {
                ends.add(previous);
            }
        }
        if !last.append(packet) {
            return None;
        }
        last.charge_more(more_memory);
        let len = last.len();
        last.control_mut().last = end_of(len, end);
        Some(more_memory)
    }
}

fn end_of(len: usize, end: Option<bool>) -> Option<MessageEnd> {
    end.and_then(|ends_record| MessageEnd::new(len, ends_record))
}

/// A socket's part of the protocol: credit both ways, and what was received.
#[pin_data]
pub(crate) struct Connection {
    socket_type: SocketType,
    #[pin]
    state: SpinLock<ConnectionState>,
    /// A [`ResetState`]. Changed with the socket's lock.
    reset: Atomic<u32>,
    /// Whether it was ended by the peer, or by an RST to it. Changed with the socket's lock.
    is_finished: Atomic<bool>,
    /// Readers that were blocked when the connection was reset and still have to learn of it. Changed with the
    /// socket's lock.
    untold_readers: Atomic<u32>,
    /// Payload that was given to [`tx`](super::tx) and not yet taken by the device, in bytes.
    unsent: Atomic<i64>,
    /// How much room the message needs that found too little last, in bytes, unless its sender waits. Changed with the socket's
    /// lock.
    needed_room: Atomic<u32>,
    /// The same of the message before, for when the sender of that one waits. Changed with the socket's lock.
    needed_before: Atomic<u32>,
    /// The PID of the task that has tried to send the message in the call that it is in; 0 where none has. Changed with the
    /// socket's lock.
    needed_by: Atomic<i32>,
    /// Credit updates that were given to [`tx`](super::tx) and not yet taken by the device.
    waiting_updates: Atomic<i32>,
    /// Packets that wait for room in the transmit virtqueue.
    waiting: Waiting,
    /// The guest's CID that the connection's peer knows; [`Address::CID_ANY`] before there is a connection. Changed
    /// with the socket's lock.
    guest_cid: Atomic<u32>,
    /// How many transport resets there had been when it was asked for, and then when it was made. Changed with the socket's lock.
    resets_before: Atomic<u32>,
}

/// How much may be on its way to the peer, in bytes, however large the buffers are.
const LARGEST_WINDOW: u32 = 1 << 28;

/// How many credit updates of a connection may wait for the device before the next one takes the place of them.
const MANY_WAITING_UPDATES: i32 = 64;

struct ConnectionState {
    send: SendCredit,
    receive: ReceiveCredit,
    queue: ReceiveQueue,
    /// Why a sender has found no room last, where nothing was sent since.
    stall: Option<Stall>,
    /// The directions whose end the peer was told, as the protocol's flags.
    shutdown_sent: u32,
    /// Whether the peer has sent anything but requests, so that it knows of the connection.
    peer_knows: bool,
}

impl ConnectionState {
    /// What may be on its way to the peer, in bytes, however much room that has.
    fn send_limit(&self) -> u32 {
        self.receive.buf_alloc().min(LARGEST_WINDOW)
    }

    /// Bytes that the peer has room for.
    fn available(&self) -> u32 {
        self.send.available(self.send_limit())
    }

    /// Bytes that can be sent, while the device has not taken `unsent` of those before.
    ///
    /// A peer whose `fwd_cnt` claims what the device has not even taken does not make us queue more.
    fn sendable(&self, unsent: usize) -> u32 {
        let waiting = u32::try_from(unsent).unwrap_or(u32::MAX);
        let room = self.send_limit().saturating_sub(waiting);
        self.available().min(room)
    }

    /// Takes out what was received and not read, to be freed without the lock.
    fn take_received(&mut self) -> SkBuffQueue<Received> {
        let unread = self.receive.unread();
        self.receive.consume(unread, 0);
        self.queue.truesize = 0;
        self.queue.messages = 0;
        self.queue.packets.take()
    }

    /// The longest message that can be sent, in bytes, once there is room for it.
    fn largest_message(&self) -> u32 {
        self.send.largest_message(self.send_limit())
    }

    /// Takes up to `wanted` bytes of credit and returns how many that are.
    fn take_credit(&mut self, wanted: u32) -> u32 {
        let taken = self.send.take(wanted, self.send_limit());
        if taken > 0 {
            self.stall = None;
        }
        taken
    }
}

/// Why there is no room to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stall {
    /// The peer has too little for it.
    Credit,
    /// The device has not taken what was sent before, without which there would be enough.
    Device,
}

/// Whether the connection was reset by the device, and the application told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResetState {
    /// It was not.
    No,
    /// It was, and the next call fails with ECONNRESET.
    Untold,
    /// It was, and the application knows: later calls find the end of the connection.
    Told,
}

/// What a packet of the peer changes, beyond what it is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerNews {
    /// Senders have to look again: more can be sent than before, or not even an empty buffer of the peer may have room for a
    /// message that waits, or there is a buffer again.
    pub(crate) ends_waits: bool,
    /// Linux limits what it sends by the size of its own buffer, too, so that it may need an update to go on.
    pub(crate) peer_buffer_shrank: bool,
    /// Whether the peer has sent anything but requests.
    pub(crate) peer_knows: bool,
}

/// A message that was read.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ReadMessage {
    /// Its length in bytes, whatever the reader had room for.
    pub(crate) len: usize,
    /// Whether it ends a record.
    pub(crate) ends_record: bool,
}

impl Connection {
    /// A connection with a receive buffer of `buf_alloc` bytes, whose peer has not said anything yet.
    pub(crate) fn new(
        socket_type: SocketType,
        buf_alloc: u32,
        waiting: Waiting,
    ) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                socket_type,
                state <- new_spinlock!(ConnectionState {
                    send: SendCredit::default(),
                    receive: ReceiveCredit::new(buf_alloc),
                    queue: ReceiveQueue::new(),
                    stall: None,
                    shutdown_sent: 0,
                    peer_knows: false,
                }, "virtio_vsock_rs_connection"),
                reset: Atomic::new(ResetState::No as u32),
                is_finished: Atomic::new(false),
                untold_readers: Atomic::new(0),
                unsent: Atomic::new(0),
                needed_room: Atomic::new(0),
                needed_before: Atomic::new(0),
                needed_by: Atomic::new(0),
                waiting_updates: Atomic::new(0),
                waiting,
                guest_cid: Atomic::new(Address::CID_ANY),
                resets_before: Atomic::new(0),
            }),
            GFP_KERNEL,
        )
    }

    /// Forgets a connection that has ended, for the next one of the same socket. Needs the socket's lock.
    pub(crate) fn begin_anew(&self, buf_alloc: u32) {
        self.purge();
        {
            let mut state = self.state.lock();
            state.send = SendCredit::default();
            state.receive = ReceiveCredit::new(buf_alloc);
            state.stall = None;
            state.peer_knows = false;
        }
        self.needed_room.store(0, Relaxed);
        self.guest_cid.store(Address::CID_ANY, Relaxed);
        self.untold_readers.store(0, Relaxed);
        self.is_finished.store(false, Relaxed);
        self.reset.store(ResetState::No as u32, Relaxed);
    }

    /// The guest's CID that the connection's peer knows; `None` before there is a connection.
    pub(crate) fn guest_cid(&self) -> Option<Cid> {
        Cid::guest_from_config(self.guest_cid.load(Relaxed).into()).ok()
    }

    /// Changes the guest's CID that the connection's packets have. Needs the socket's lock.
    pub(crate) fn set_guest_cid(&self, cid: Cid) {
        self.guest_cid.store(cid.get(), Relaxed);
    }

    /// Notes that the peer is asked for a connection, after so many transport resets. Needs the socket's lock; takes the
    /// connection lock.
    pub(crate) fn note_request(&self, resets_before: u32) {
        self.resets_before.store(resets_before, Relaxed);
        // The application may have shut down an attempt of before, or a connection.
        self.state.lock().shutdown_sent = 0;
    }

    /// Notes that there is a connection now, whose peer knows the guest by `guest_cid`, after so many transport resets. Needs the
    /// socket's lock.
    pub(crate) fn note_made(&self, guest_cid: Option<Cid>, resets_before: u32) {
        if let Some(cid) = guest_cid {
            self.set_guest_cid(cid);
        }
        self.resets_before.store(resets_before, Relaxed);
    }

    /// How many transport resets there had been when the peer was asked for a connection, or that was made.
    pub(crate) fn resets_before(&self) -> u32 {
        self.resets_before.load(Relaxed)
    }

    /// The packets that wait for room in the transmit virtqueue.
    pub(crate) fn waiting(&self) -> &Waiting {
        &self.waiting
    }

    /// The kind of the socket.
    pub(crate) fn socket_type(&self) -> SocketType {
        self.socket_type
    }

    /// Notes what a packet of the peer says of its receive buffer, and that it knows of the connection.
    pub(crate) fn note_packet(&self, header: &Header) -> PeerNews {
        let mut state = self.state.lock();
        let (available, largest) = (state.available(), state.largest_message());
        state.send.update(header.buf_alloc, header.fwd_cnt);
        state.peer_knows |= header.op != Op::Request;
        PeerNews {
            ends_waits: state.available() > available
                || state.largest_message() < largest
                || (largest == 0 && state.largest_message() > 0),
            peer_buffer_shrank: state.receive.note_peer_buf_alloc(header.buf_alloc),
            peer_knows: state.peer_knows,
        }
    }

    /// Whether the peer was sent nothing that a program here has sent or shut down.
    pub(crate) fn has_sent_nothing(&self) -> bool {
        let state = self.state.lock();
        state.send.is_untouched() && state.shutdown_sent == 0
    }

    /// Takes up to `wanted` bytes of credit.
    pub(crate) fn take_send_credit(&self, wanted: u32) -> u32 {
        let unsent = self.unsent();
        let mut state = self.state.lock();
        let wanted = wanted.min(state.sendable(unsent));
        state.take_credit(wanted)
    }

    /// Takes credit for a message of `len` bytes, for all of it: a part that was sent could not be taken back. Returns whether
    /// there was so much; otherwise the current task finds no room to send, and poll() none, until there is or the task
    /// [waits](Self::note_waiting_sender). Needs the socket's lock.
    ///
    /// # Errors
    ///
    /// EMSGSIZE where there never will be.
    pub(crate) fn take_message_credit(&self, len: usize) -> Result<bool> {
        let len = u32::try_from(len).map_err(|_| EMSGSIZE)?;
        let unsent = self.unsent();
        let mut state = self.state.lock();
        if len > state.largest_message() {
            return Err(EMSGSIZE);
        }
        if len > state.sendable(unsent) {
            if self.needed_by_sender() == 0 {
                let before = self.needed_room.load(Relaxed);
                self.needed_before.store(before, Relaxed);
            }
            self.needed_room.store(len, Relaxed);
            self.needed_by.store(current!().pid(), Relaxed);
            return Ok(false);
        }
        state.take_credit(len);
        Ok(true)
    }

    /// Notes that the current task begins to send: what it, or another, has tried before does not matter to it. Needs the
    /// socket's lock.
    pub(crate) fn note_new_sender(&self) {
        self.needed_by.store(0, Relaxed);
    }

    /// Notes that the current task waits for room, and tries its message again when it is woken: poll() is asked for others
    /// then, who may have shorter ones. Needs the socket's lock.
    pub(crate) fn note_waiting_sender(&self) {
        if self.needed_by_sender() > 0 {
            let before = self.needed_before.load(Relaxed);
            self.needed_room.store(before, Relaxed);
            self.needed_by.store(0, Relaxed);
        }
    }

    /// Notes that a message needs no more room, whether it was sent or cannot be. Returns whether poll() found none because of
    /// one. Needs the socket's lock.
    pub(crate) fn forget_needed_room(&self) -> bool {
        let is_needed = self.needed_room.load(Relaxed) > 0;
        if is_needed {
            self.needed_room.store(0, Relaxed);
        }
        is_needed
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
    fn unsent(&self) -> usize {
        usize::try_from(self.unsent.load(Relaxed)).unwrap_or(0)
    }

    /// The same, for a task that waits for fewer. The core has put it into the list of those to wake, without a barrier;
    /// whoever lowers the count without the socket's lock looks at that list afterwards.
    pub(crate) fn unsent_for_waiter(&self) -> usize {
        usize::try_from(self.unsent.fetch_add(0, Full)).unwrap_or(0)
    }

    /// Bytes that can be sent; 0 where the message that found too little room last needs more.
    pub(crate) fn writable(&self) -> u32 {
        self.room_for(self.needed_room.load(Relaxed))
    }

    /// Bytes that can be sent by the current task; 0 where its message needs more, and not where that is to be tried: it may have
    /// become too long to wait for.
    pub(crate) fn room_to_send(&self) -> u32 {
        let needed = self.needed_by_sender();
        if self.socket_type == SocketType::SeqPacket && needed == 0 {
            // For its barrier, as below.
            self.unsent_for_waiter();
            return self.state.lock().largest_message().min(1);
        }
        self.room_for(needed)
    }

    /// How much room the message needs for which the current task has found too little, in bytes.
    fn needed_by_sender(&self) -> u32 {
        match self.needed_by.load(Relaxed) == current!().pid() {
            true => self.needed_room.load(Relaxed),
            false => 0,
        }
    }

    fn room_for(&self, needed: u32) -> u32 {
        let unsent = self.unsent_for_waiter();
        let state = self.state.lock();
        let room = state.sendable(unsent);
        let largest = state.largest_message();
        if needed > largest && largest > 0 {
            // A buffer has become smaller meanwhile. Who tries the message again learns that it is too long.
            return room.max(1);
        }
        match room < needed {
            true => 0,
            false => room,
        }
    }

    /// Notes that the current task has found no room to send. Says why, where that is news since something was sent.
    pub(crate) fn note_stall(&self) -> Option<Stall> {
        let needed = self.needed_by_sender().max(1);
        let unsent = u32::try_from(self.unsent()).unwrap_or(u32::MAX);
        let mut state = self.state.lock();
        // The peer cannot have read what the device has not taken.
        let stall = match state.available().saturating_add(unsent) < needed {
            true => Stall::Credit,
            false => Stall::Device,
        };
        (state.stall.replace(stall) != Some(stall)).then_some(stall)
    }

    /// Whether more credit updates wait than a device that takes packets lets come about.
    pub(crate) fn has_many_waiting_updates(&self) -> bool {
        self.waiting_updates.load(Relaxed) >= MANY_WAITING_UPDATES
    }

    /// Counts a credit update that is on its way to the device.
    pub(crate) fn add_waiting_update(&self) {
        self.waiting_updates.add(1, Relaxed);
    }

    /// Notes that the device has taken a credit update, or that it was thrown away.
    pub(crate) fn remove_waiting_update(&self) {
        self.waiting_updates.fetch_sub(1, Relaxed);
    }

    /// Whether the peer was told of the end of all these directions.
    pub(crate) fn has_sent_shutdown(&self, directions: u32) -> bool {
        directions & !self.state.lock().shutdown_sent == 0
    }

    /// Notes that the peer is told of the end of directions.
    pub(crate) fn note_shutdown_sent(&self, directions: u32) {
        self.state.lock().shutdown_sent |= directions;
    }

    /// Bytes that are unread, those of a message that is not complete yet included.
    pub(crate) fn unread(&self) -> u32 {
        self.state.lock().receive.unread()
    }

    /// Messages that can be read.
    pub(crate) fn readable_messages(&self) -> u32 {
        self.state.lock().queue.messages
    }

    /// Whether a reader that waits for `low_water` bytes finds enough; any message is.
    pub(crate) fn is_readable(&self, low_water: usize) -> bool {
        match self.socket_type {
            SocketType::SeqPacket => self.readable_messages() > 0,
            _ => self.unread() as usize >= low_water,
        }
    }

    /// The credit for a packet that is about to be made.
    pub(crate) fn advertisement(&self) -> Advertisement {
        self.state.lock().receive.advertisement()
    }

    /// Notes that a packet with that credit is on its way. The socket's lock is held since it was made.
    pub(crate) fn advertised(&self) {
        self.state.lock().receive.advertised();
    }

    /// The same, where packets of the connection follow that were made before.
    pub(crate) fn advertised_before_older(&self) {
        self.state.lock().receive.advertised_before_older();
    }

    /// Whether the peer should be told now of room in the receive buffer, as a reader waits for `low_water`
    /// bytes, or for a message.
    pub(crate) fn wants_credit_update(&self, low_water: u32) -> bool {
        let state = self.state.lock();
        if state.receive.wants_update(low_water) {
            return true;
        }
        if self.socket_type != SocketType::SeqPacket {
            return false;
        }
        // The peer may wait to send a message that takes as much as the whole buffer has, or the rest of one.
        let worth_telling = match state.queue.messages {
            0 => 1,
            _ => (state.receive.window() / UNTOLD_SHARE_OF_MESSAGES).max(1),
        };
        state.receive.unadvertised() >= worth_telling
    }

    /// Changes the size of the receive buffer.
    pub(crate) fn set_buf_alloc(&self, buf_alloc: u32) {
        self.state.lock().receive.set_buf_alloc(buf_alloc);
    }

    /// Appends a packet of payload to what can be read, and the end of a message where `end` says so. Needs the socket's
    /// lock; takes the connection lock. Returns the packet's buffer where it is needed no more.
    pub(crate) fn enqueue(
        &self,
        socket: &Socket,
        payload: SkBuff<()>,
        end: Option<bool>,
    ) -> Result<Option<SkBuff<()>>, CreditExceeded> {
        let len = u32::try_from(payload.len()).map_err(|_| CreditExceeded)?;
        let mut state = self.state.lock();
        state.receive.receive(len)?;
        let limit = (state.receive.buf_alloc() as usize).saturating_mul(2);
        Ok(state.queue.enqueue(socket, payload, end, limit))
    }

    /// Takes the receive queue out, so that its data can be copied without the spinlock.
    ///
    /// The caller holds the socket's lock and puts the queue back before it releases that; the counts that
    /// pollers see stay as they are meanwhile.
    fn borrow_queue(&self) -> SkBuffQueue<Received> {
        self.state.lock().queue.packets.take()
    }

    /// Puts the receive queue back after `read` bytes of it were read, in `messages` whole messages, and
    /// packets left it that took `freed_truesize` bytes of memory and, on a stream, `freed` bytes of credit.
    fn return_queue(
        &self,
        packets: SkBuffQueue<Received>,
        read: usize,
        freed: usize,
        freed_truesize: usize,
        messages: u32,
    ) {
        let mut state = self.state.lock();
        state.queue.packets.prepend(packets);
        state.queue.truesize = state.queue.truesize.saturating_sub(freed_truesize);
        state.queue.messages = state.queue.messages.saturating_sub(messages);
        // Neither is more than the receive buffer, whose size is 32 bits.
        state.receive.consume(read as u32, freed as u32);
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
        let end = packets.try_for_each(|packet| {
            let read = packet.control().read as usize;
            let part = (len - copied).min(packet.len() - read);
            if part == 0 {
                return ControlFlow::Break(Ok(()));
            }
            if let Err(error) = copy(packet, read, part) {
                return ControlFlow::Break(Err(error));
            }
            copied += part;
            ControlFlow::Continue(())
        });
        self.return_queue(packets, 0, 0, 0, 0);
        match end {
            ControlFlow::Break(Err(error)) if copied == 0 => Err(error),
            _ => Ok(copied),
        }
    }

    /// Moves data out of the receive queue, as [`peek`](Self::peek) does otherwise, and emptied buffers to `spare_buffers`.
    pub(crate) fn dequeue(
        &self,
        len: usize,
        spare_buffers: &SpareBuffers<()>,
        mut copy: impl FnMut(&SkBuff<Received>, usize, usize) -> Result,
    ) -> Result<usize> {
        let mut packets = self.borrow_queue();
        let mut result = Ok(());
        let mut copied = 0;
        let mut freed = 0;
        let mut freed_truesize = 0;
        while copied < len && result.is_ok() {
            let Some(mut packet) = packets.pop_front() else {
                break;
            };
            let read = packet.control().read as usize;
            let part = (len - copied).min(packet.len() - read);
            result = copy(&packet, read, part);
            if result.is_ok() {
                copied += part;
                packet.control_mut().read += part as u32;
            }
            if (packet.control().read as usize) < packet.len() {
                packets.push_front(packet);
            } else {
                freed += packet.len();
                freed_truesize += packet.truesize();
                spare_buffers.put(packet.recycle_received());
            }
        }
        self.return_queue(packets, copied, freed, freed_truesize, 0);
        if copied > 0 {
            return Ok(copied);
        }
        result.map(|()| 0)
    }

    /// Lets `copy` have the first message, as much of it as `room` bytes hold, and leaves it in the queue.
    /// `None` where none is complete. Needs the socket's lock; may sleep.
    pub(crate) fn peek_message(
        &self,
        room: usize,
        mut copy: impl FnMut(&SkBuff<Received>, usize, usize) -> Result,
    ) -> Result<Option<ReadMessage>> {
        if self.readable_messages() == 0 {
            return Ok(None);
        }
        let packets = self.borrow_queue();
        let mut message = ReadMessage::default();
        let end = packets.try_for_each(|packet| {
            let read = packet.control().read as usize;
            let end = packet.control().next_end();
            let part = end.map_or(packet.len(), |end| end.offset as usize) - read;
            let wanted = part.min(room.saturating_sub(message.len));
            if wanted > 0 {
                if let Err(error) = copy(packet, read, wanted) {
                    return ControlFlow::Break(Err(error));
                }
            }
            message.len += part;
            match end {
                None => ControlFlow::Continue(()),
                Some(end) => {
                    message.ends_record = end.ends_record;
                    ControlFlow::Break(Ok(()))
                }
            }
        });
        self.return_queue(packets, 0, 0, 0, 0);
        match end {
            ControlFlow::Break(Err(error)) => Err(error),
            _ => Ok(Some(message)),
        }
    }

    /// Moves the first message out of the queue, as [`peek_message`](Self::peek_message) does otherwise.
    ///
    /// A message that cannot be copied is lost, like one that is longer than `room` loses its end. Emptied buffers go to
    /// `spare_buffers`.
    pub(crate) fn dequeue_message(
        &self,
        room: usize,
        spare_buffers: &SpareBuffers<()>,
        mut copy: impl FnMut(&SkBuff<Received>, usize, usize) -> Result,
    ) -> Result<Option<ReadMessage>> {
        if self.readable_messages() == 0 {
            return Ok(None);
        }
        let mut packets = self.borrow_queue();
        let mut message = ReadMessage::default();
        let mut result = Ok(());
        let mut freed_truesize = 0;
        while let Some(mut packet) = packets.pop_front() {
            let read = packet.control().read as usize;
            let end = packet.control().next_end();
            let stop = end.map_or(packet.len(), |end| end.offset as usize);
            let wanted = (stop - read).min(room.saturating_sub(message.len));
            if wanted > 0 && result.is_ok() {
                result = copy(&packet, read, wanted);
            }
            message.len += stop - read;
            packet.control_mut().read = stop as u32;
            if stop < packet.len() {
                packets.push_front(packet);
            } else {
                freed_truesize += packet.truesize();
                spare_buffers.put(packet.recycle_received());
            }
            if let Some(end) = end {
                message.ends_record = end.ends_record;
                break;
            }
        }
        self.return_queue(packets, message.len, message.len, freed_truesize, 1);
        result.map(|()| Some(message))
    }

    /// Takes the first packet out, with what of it was not read. Needs the socket's lock.
    pub(crate) fn take_packet(&self) -> Option<SkBuff<()>> {
        let mut state = self.state.lock();
        let packet = state.queue.packets.pop_front()?;
        let (read, len) = (packet.control().read, packet.len() as u32);
        let freed = match self.socket_type {
            // What was read of its messages came back to the peer already.
            SocketType::SeqPacket => len - read,
            _ => len,
        };
        state.receive.consume(len - read, freed);
        state.queue.truesize = state.queue.truesize.saturating_sub(packet.truesize());
        let ends = packet.control().unread_ends();
        state.queue.messages = state.queue.messages.saturating_sub(ends);
        drop(state);
        let mut packet = packet.with_control(());
        packet.discharge();
        packet.pull(read as usize);
        Some(packet)
    }

    /// Throws away what was received and not read. Takes the connection lock.
    pub(crate) fn purge(&self) {
        let packets = self.state.lock().take_received();
        // Freed here, outside of the spinlock.
        drop(packets);
    }

    /// The same, for whoever drops the last reference to the socket, in any context.
    pub(crate) fn purge_last(&self) {
        // Nobody has the lock, who would have a reference; but where others take it, softirqs are on.
        let state = self.state.try_lock();
        let packets = state.unwrap_or_else(|| self.state.lock()).take_received();
        drop(packets);
    }

    /// Whether the connection was reset by the device.
    pub(crate) fn reset_state(&self) -> ResetState {
        match self.reset.load(Relaxed) {
            state if state == ResetState::No as u32 => ResetState::No,
            state if state == ResetState::Untold as u32 => ResetState::Untold,
            _ => ResetState::Told,
        }
    }

    /// Notes a reset by the device while so many readers are blocked. Needs the socket's lock.
    pub(crate) fn note_reset(&self, blocked_readers: u32) {
        self.untold_readers.store(blocked_readers, Relaxed);
        self.reset.store(ResetState::Untold as u32, Relaxed);
    }

    /// Notes that the application knows of the reset. Needs the socket's lock.
    pub(crate) fn note_reset_told(&self) {
        self.reset.store(ResetState::Told as u32, Relaxed);
    }

    /// Whether the connection was ended by the peer, or has been by an RST to the peer.
    pub(crate) fn is_finished(&self) -> bool {
        self.is_finished.load(Relaxed)
    }

    /// Notes that the connection is ended. Needs the socket's lock.
    pub(crate) fn note_finished(&self) {
        self.is_finished.store(true, Relaxed);
    }

    /// Whether a reader has to be told of the reset: any, or after the first one those that were blocked.
    pub(crate) fn has_untold_reader(&self) -> bool {
        match self.reset_state() {
            ResetState::No => false,
            ResetState::Untold => true,
            ResetState::Told => self.untold_readers.load(Relaxed) > 0,
        }
    }

    /// Notes that a reader that was blocked learns of the reset. Needs the socket's lock.
    pub(crate) fn note_blocked_reader_told(&self) {
        let readers = self.untold_readers.load(Relaxed);
        self.untold_readers
            .store(readers.saturating_sub(1), Relaxed);
    }
}
