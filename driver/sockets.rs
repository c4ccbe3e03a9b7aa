// SPDX-License-Identifier: GPL-2.0

//! What the core of AF_VSOCK asks of a transport.
//!
//! Every function here is called with the socket's lock held, where it takes a [`LockedSocket`].

use super::{
    connection::{Connection, Received, ResetState, Stall},
    rx::protocol_type,
    tx::ControlPacket,
    VsockDriver, //
};
use crate::{
    af_vsock_glue::{
        errno::{ECONNRESET, ESOCKTNOSUPPORT},
        message::{MessageDest, MessageSource},
        skb::SkBuff,
        socket::{Address, Directions, LockedSocket, Socket, SocketState},
        transport::Transport,
    },
    protocol::header::{Op, SocketType},
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{Acquire, Relaxed},
        Arc, ArcBorrow,
    },
    time::msecs_to_jiffies,
};

/// How long a closed socket's peer has to answer, in milliseconds.
const CLOSE_TIMEOUT_MS: u32 = 8000;

/// The largest receive buffer that the protocol can express, in bytes.
const MAX_BUFFER_SIZE: u64 = u32::MAX as u64;

/// How much memory the packets of a socket may take, in bytes, before it has no room for more: a count of 31 bits has it, and one
/// call adds little more than [what may be on its way](super::connection) to a peer.
const MOST_SEND_MEMORY: u32 = 1 << 30;

impl Transport for VsockDriver {
    type Connection = Connection;

    fn local_cid(&self) -> u32 {
        self.guest_cid.load(Relaxed)
    }

    fn new_connection(&self, socket: &LockedSocket<'_>) -> Result<Arc<Connection>> {
        socket.limit_buffer_size(MAX_BUFFER_SIZE);
        let socket_type = protocol_type(socket.kind()).ok_or(ESOCKTNOSUPPORT)?;
        let buf_alloc = u32::try_from(socket.buffer_size())?;
        Connection::new(socket_type, buf_alloc, self.tx.waiting_packets())
    }

    fn release(self: ArcBorrow<'_, Self>, socket: &mut LockedSocket<'_>) {
        if self.close(socket) == Closed::Now {
            socket.set_done();
            if let Some(connection) = socket.connection::<Self>() {
                self.forget(socket, &connection);
            }
        }
    }

    fn free_received(connection: &Connection) {
        connection.purge_last();
    }

    fn close_timeout(&self, socket: &LockedSocket<'_>) {
        let Some(connection) = socket.connection::<Self>() else {
            return;
        };
        if !socket.is_done() {
            self.statistics.resets_by_close_timeout.increment();
            self.send_final_reset(socket, connection, ControlPacket::of(Op::Rst));
            self.finish_connection(socket, &connection);
        }
        self.forget(socket, &connection);
    }

    fn connect(&self, socket: &LockedSocket<'_>, connection: ArcBorrow<'_, Connection>) -> Result {
        if connection.reset_state() != ResetState::No || connection.is_finished() {
            // On Linux 7.2, connect() fails and can be called again where the connection was made and has ended before the caller
            // got the CPU.
            if !connection.is_finished() {
                // Who has reset it may not have come to this yet. (Of a finished one an RST may wait, which goes first.)
                self.cancel_waiting(&connection);
            }
            connection.begin_anew(u32::try_from(socket.buffer_size())?);
            socket.begin_anew();
        }
        if let Some(cid) = self.guest_cid() {
            // The answer will bear this one. (Without a device there will be none.)
            socket.change_own_cid(cid.get());
        }
        // Read before the request goes: a response to one of before a reset is never taken for one to a request of after it.
        connection.note_request(self.resets.load(Acquire));
        self.send_control(socket, connection, ControlPacket::of(Op::Request))
            .map_err(|error| {
                // The core leaves it as if an answer could come.
                socket.set_state(SocketState::Closed);
                // A device that is broken is about to be gone.
                if error == EIO {
                    ENODEV
                } else {
                    error
                }
            })
    }

    fn cancel(self: ArcBorrow<'_, Self>, socket: &LockedSocket<'_>) {
        if let Some(connection) = socket.connection::<Self>() {
            self.cancel_waiting(&connection);
        }
    }

    fn shutdown(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        directions: Directions,
    ) -> Result {
        match connection.reset_state() {
            ResetState::No if !connection.is_finished() => {
                self.send_shutdown(socket, connection, directions)
            }
            ResetState::Untold => Ok(()),
            ResetState::No | ResetState::Told => {
                // The connection is over, which the core has just forgotten.
                socket.set_done();
                Ok(())
            }
        }
    }

    fn allows_stream(&self, socket: &Socket, _remote: Address) -> bool {
        // The core asks this for seqpacket sockets, too.
        self.allows(socket)
    }

    fn allows_seqpacket(&self, socket: &Socket, _remote_cid: u32) -> bool {
        self.allows(socket)
    }

    fn before_receive(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        wanted: usize,
    ) -> Result {
        self.send_batch();
        tell_of_reset(socket, &connection)?;
        let low_water = u32::try_from(wanted).unwrap_or(u32::MAX);
        self.send_wanted_credit_update(socket, connection, low_water);
        Ok(())
    }

    fn before_next_part(&self, connection: &Connection) -> Result {
        if connection.has_untold_reader() {
            // The reader's next call learns of the reset.
            connection.note_blocked_reader_told();
            return Err(ECONNRESET.into());
        }
        Ok(())
    }

    fn after_nothing(&self, socket: &LockedSocket<'_>, connection: &Connection) -> Result {
        if connection.has_untold_reader() {
            if connection.reset_state() == ResetState::Untold {
                end_after_reset(socket, connection);
            }
            connection.note_blocked_reader_told();
            return Err(ECONNRESET.into());
        }
        Ok(())
    }

    fn receive(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        message: &mut MessageDest,
        len: usize,
        peek: bool,
    ) -> Result<usize> {
        if peek {
            return connection.peek(len, |packet, offset, part| {
                packet.copy_to(offset, message, part)
            });
        }
        let received = connection.dequeue(len, &self.spare_buffers, |packet, offset, part| {
            packet.copy_to(offset, message, part)
        })?;
        self.send_wanted_credit_update(socket, connection, socket.low_water());
        Ok(received)
    }

    fn receive_message(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        message: &mut MessageDest,
        peek: bool,
    ) -> Result<usize> {
        tell_of_reset(socket, &connection)?;
        if connection.has_untold_reader() {
            connection.note_blocked_reader_told();
            return Err(ECONNRESET.into());
        }
        let room = message.remaining();
        let copy = |packet: &SkBuff<Received>, offset, part| packet.copy_to(offset, message, part);
        let read = if peek {
            connection.peek_message(room, copy)
        } else {
            let read = connection.dequeue_message(room, &self.spare_buffers, copy);
            self.send_wanted_credit_update(socket, connection, socket.low_water());
            read
        }?;
        let read = read.unwrap_or_default();
        if read.ends_record {
            message.set_ends_record();
        }
        Ok(read.len)
    }

    fn take_packet(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
    ) -> Option<SkBuff<()>> {
        let packet = connection.take_packet()?;
        self.send_wanted_credit_update(socket, connection, socket.low_water());
        Some(packet)
    }

    fn before_send(&self, socket: &LockedSocket<'_>, connection: &Connection) -> Result {
        connection.note_new_sender();
        tell_of_reset(socket, connection)
    }

    fn before_waiting_to_send(&self, connection: &Connection) {
        connection.note_waiting_sender();
    }

    fn send(
        self: ArcBorrow<'_, Self>,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        message: &mut MessageSource,
        len: usize,
    ) -> Result<usize> {
        self.send_stream(socket, connection, message, len)
    }

    fn send_message(
        self: ArcBorrow<'_, Self>,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        message: &mut MessageSource,
        len: usize,
    ) -> Result<usize> {
        self.send_whole_message(socket, connection, message, len)
    }

    fn is_readable(&self, connection: &Connection, low_water: usize) -> bool {
        let is_readable = connection.is_readable(low_water);
        if !is_readable {
            self.send_batch();
        }
        is_readable
    }

    fn readable_messages(connection: &Connection) -> usize {
        // Without a message the core would not ask further, and the reader get an end of the stream.
        (connection.readable_messages() as usize).max(connection.has_untold_reader().into())
    }

    fn readable(connection: &Connection) -> usize {
        // As above, for a stream. Readers of messages do not come here, and the first of them is told without being counted.
        let is_untold = match connection.socket_type() {
            SocketType::SeqPacket => connection.reset_state() == ResetState::Untold,
            _ => connection.has_untold_reader(),
        };
        (connection.unread() as usize).max(is_untold.into())
    }

    fn room_to_send(&self, socket: &LockedSocket<'_>, connection: &Connection) -> usize {
        let room = room_in(socket, connection, connection.room_to_send());
        if room == 0 {
            match connection.note_stall() {
                Some(Stall::Credit) => self.statistics.credit_stalls.increment(),
                Some(Stall::Device) => self.statistics.device_stalls.increment(),
                None => {}
            }
        }
        room
    }

    fn writable(&self, socket: &LockedSocket<'_>, connection: &Connection) -> usize {
        room_in(socket, connection, connection.writable())
    }

    fn unsent(connection: &Connection) -> usize {
        // First, for it has the barrier.
        let unsent = connection.unsent_for_waiter();
        match connection.reset_state() {
            ResetState::No => unsent,
            // What the device still has of it goes nowhere, and a close() that lingers need not wait for it.
            ResetState::Untold | ResetState::Told => 0,
        }
    }

    fn set_buffer_size(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        size: u64,
    ) -> u64 {
        let size = size.min(MAX_BUFFER_SIZE);
        connection.set_buf_alloc(u32::try_from(size).unwrap_or(u32::MAX));
        let is_connected = socket.state() == SocketState::Established && !socket.is_done();
        if is_connected && connection.reset_state() == ResetState::No {
            self.send_credit_update(socket, connection, false);
            // Our own size limits what can be sent, too.
            socket.write_space();
        }
        size
    }

    fn set_low_water(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        low_water: u32,
    ) {
        // A sender that waits for room must not wait for a reader that waits for more data.
        self.send_wanted_credit_update(socket, connection, low_water);
    }
}

/// Whether a socket that is being closed can be forgotten.
#[derive(PartialEq, Eq)]
enum Closed {
    Now,
    /// When the peer has answered, or its time is up.
    Later,
}

impl VsockDriver {
    /// Whether a socket may have connections by the device, going by its namespace and kind. Without a device it may: then
    /// connect() says ENODEV.
    fn allows(&self, socket: &Socket) -> bool {
        socket.in_global_namespace()
            && (self.guest_cid().is_none()
                || protocol_type(socket.kind())
                    .is_some_and(|socket_type| self.socket_types().contains(socket_type)))
    }

    /// Tells the peer of room where it should know of it now, for a reader that waits for `low_water` bytes.
    pub(crate) fn send_wanted_credit_update(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        low_water: u32,
    ) {
        let peer_sends = socket.state() == SocketState::Established
            && !socket.peer_shutdown().contains(Directions::SEND);
        if peer_sends && connection.wants_credit_update(low_water) {
            self.send_credit_update(socket, connection, false);
        }
    }

    /// What `error` of sending is to an application that has a connection: where the device has gone, or its virtqueue is
    /// broken, that has gone too.
    ///
    /// The application does not count as told by this: a call that has sent a part returns how much, and no error. So the next
    /// call fails as well.
    pub(super) fn error_of_connection(
        &self,
        socket: &LockedSocket<'_>,
        connection: &Connection,
        error: Error,
    ) -> Error {
        if error != ENODEV && error != EIO {
            return error;
        }
        // Whoever takes the device away comes to this socket later, and to what waits.
        self.reset_connection(socket, connection, &self.statistics.resets_by_device_loss);
        ECONNRESET.into()
    }

    /// Says goodbye to the peer of a socket that is being closed.
    fn close(self: ArcBorrow<'_, Self>, socket: &mut LockedSocket<'_>) -> Closed {
        let Some(connection) = socket.connection::<Self>() else {
            return Closed::Now;
        };
        match socket.state() {
            SocketState::Established | SocketState::Closing => {}
            SocketState::Connecting => {
                // A response that comes all the same is answered with RST.
                self.cancel_waiting(&connection);
                return Closed::Now;
            }
            SocketState::Closed | SocketState::Listening => return Closed::Now,
        }
        if self.answer_if_ended(socket, connection) {
            return Closed::Now;
        }
        // After any other error the peer is told by RST, once the close timeout is over.
        if let Err(ENODEV | EIO) = self.send_shutdown(socket, connection, Directions::BOTH) {
            // Without a device there is nobody to wait for.
            return Closed::Now;
        }
        socket.linger();
        // Meanwhile the peer may have closed or answered, or the device have lost the connection.
        let Some(connection) = socket.connection::<Self>() else {
            return Closed::Now;
        };
        if self.answer_if_ended(socket, connection) {
            return Closed::Now;
        }
        socket.schedule_close::<Self>(&self.work_at_once, msecs_to_jiffies(CLOSE_TIMEOUT_MS));
        Closed::Later
    }

    /// Whether the connection of a socket that is being closed was reset, or has been closed by the peer. Where something is unread
    /// the peer has got no answer yet: this gives it.
    fn answer_if_ended(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
    ) -> bool {
        if connection.reset_state() != ResetState::No {
            return true;
        }
        // Of one that is done, too: it has come to its end by the peer, or by a reset.
        let is_closed_by_peer = socket.peer_shutdown() == Directions::BOTH;
        if is_closed_by_peer && !socket.is_done() {
            self.send_final_reset(socket, connection, ControlPacket::of(Op::Rst));
        }
        is_closed_by_peer
    }

    fn send_shutdown(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        directions: Directions,
    ) -> Result {
        // The protocol's flags are the socket layer's bits.
        let flags = directions.bits();
        if connection.has_sent_shutdown(flags) {
            return Ok(());
        }
        let packet = ControlPacket {
            flags,
            ..ControlPacket::of(Op::Shutdown)
        };
        self.send_control(socket, connection, packet)?;
        connection.note_shutdown_sent(flags);
        Ok(())
    }
}

/// Bytes that can be sent, where the connection has `room`.
fn room_in(socket: &LockedSocket<'_>, connection: &Connection, room: u32) -> usize {
    let is_over = connection.reset_state() != ResetState::No
        || socket.peer_shutdown().contains(Directions::RECEIVE);
    if is_over {
        // Nobody is to wait for room in a connection that was reset, or whose peer reads no more.
        return room.max(1) as usize;
    }
    // After the connection's count, which has the barrier for who waits for fewer.
    if socket.send_memory() >= MOST_SEND_MEMORY {
        return 0;
    }
    room as usize
}

/// Fails with ECONNRESET where the device has reset the connection and the application was not told yet.
///
/// Afterwards readers get the end of the stream and writers EPIPE, as with TCP.
fn tell_of_reset(socket: &LockedSocket<'_>, connection: &Connection) -> Result {
    // SO_ERROR may have told the application already.
    if connection.reset_state() == ResetState::Untold && end_after_reset(socket, connection) {
        return Err(ECONNRESET.into());
    }
    Ok(())
}

/// Lets later calls find the end of a connection that was reset, of which the application knows from now on. Returns
/// whether the socket still had its error to tell.
fn end_after_reset(socket: &LockedSocket<'_>, connection: &Connection) -> bool {
    connection.note_reset_told();
    socket.set_shutdown(Directions::BOTH);
    socket.set_done();
    socket.set_state(SocketState::Closed);
    if socket.blocked_writers() > 0 {
        // They learn of the reset by the error. One that began to wait after it was set has to be woken.
        socket.state_change();
        socket.has_error()
    } else {
        socket.take_error()
    }
}
