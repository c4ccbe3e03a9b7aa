// SPDX-License-Identifier: GPL-2.0

//! Payload that programs send: credit for it, and packets made of it.
//!
//! A stream sends what there is room for, packet by packet. A message of a seqpacket socket goes as a whole or not at all: it
//! waits until there is room for all of it, and its packets are made before the first of them goes. So neither memory that
//! cannot be read, nor a signal or a timeout, nor another sender of the same socket leaves the peer with a part of a message, to
//! which the next one would be added.

use super::{
    connection::{Connection, ResetState},
    tx::{Outgoing, OutgoingPacket},
    VsockDriver, //
};
use crate::{
    af_vsock_glue::{
        errno::ECONNRESET,
        message::{MessageSource, ZeroCopy},
        skb::{Payload, SkBuff, SkBuffQueue},
        socket::LockedSocket,
    },
    protocol::header::{Op, SocketType, SEQ_EOM, SEQ_EOR},
};
use kernel::{prelude::*, sync::ArcBorrow};

/// Whose memory the packets of one send() carry.
struct Memory {
    /// The completion of MSG_ZEROCOPY, where there is to be one.
    zero_copy: Option<ZeroCopy>,
    /// Whether it is the caller's own pages.
    is_callers: bool,
}

impl Memory {
    /// Notes that the caller gets `error`, and no completion: nothing was sent. Returns the error.
    fn unused(mut self, message: &MessageSource, error: Error) -> Error {
        if let Some(zero_copy) = &mut self.zero_copy {
            zero_copy.set_unused();
        }
        // With MSG_ZEROCOPY applications know ENOMEM from the C driver for pages that are not there.
        match error == EFAULT && message.wants_zero_copy() {
            true => ENOMEM,
            false => error,
        }
    }
}

impl VsockDriver {
    /// Sends up to `len` bytes of a stream, and returns how many; 0 where there is no room. May sleep.
    pub(super) fn send_stream(
        self: ArcBorrow<'_, Self>,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        message: &mut MessageSource,
        len: usize,
    ) -> Result<usize> {
        fail_if_reset(&connection)?;
        let credit = connection.take_send_credit(u32::try_from(len).unwrap_or(u32::MAX));
        if credit == 0 {
            return Ok(0);
        }
        let mut memory = self.memory_of(socket, &connection, message, credit)?;
        let mut left = credit;
        while left > 0 {
            let part = left.min(self.tx.longest_payload());
            let before = message.position();
            let sent = self
                .make_payload(socket, connection, message, part, &mut memory)
                .and_then(|packet| self.transmit_payload(packet));
            if let Err(error) = sent {
                message.rewind(before);
                connection.return_send_credit(left);
                let error = self.error_of_connection(socket, &connection, error);
                if left == credit {
                    return Err(memory.unused(message, error));
                }
                break;
            }
            connection.advertised();
            left -= part;
        }
        Ok((credit - left) as usize)
    }

    /// Sends a message of `len` bytes, all that is left of it. Returns `len`, or 0 where there is no room for all of it.
    /// May sleep.
    pub(super) fn send_whole_message(
        self: ArcBorrow<'_, Self>,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        message: &mut MessageSource,
        len: usize,
    ) -> Result<usize> {
        fail_if_reset(&connection)?;
        let is_taken = connection.take_message_credit(len);
        if !matches!(is_taken, Ok(false)) && connection.forget_needed_room() {
            // poll() has found no room because of the message, or of one that somebody else has tried.
            socket.write_space();
        }
        if !is_taken? {
            return Ok(0);
        }
        // It is no more than the peer's buffer, whose size is 32 bits.
        let credit = len as u32;
        let mut memory = self.memory_of(socket, &connection, message, credit)?;
        let before = message.position();
        let sent = self
            .make_message(socket, connection, message, credit, &mut memory)
            .and_then(|packets| self.transmit_message(packets));
        if let Err(error) = sent {
            message.rewind(before);
            connection.return_send_credit(credit);
            let error = self.error_of_connection(socket, &connection, error);
            return Err(memory.unused(message, error));
        }
        connection.advertised();
        Ok(len)
    }

    /// Makes the packets of a message of `len` bytes.
    fn make_message(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        message: &mut MessageSource,
        len: u32,
        memory: &mut Memory,
    ) -> Result<SkBuffQueue<Outgoing>> {
        let mut packets = SkBuffQueue::new();
        let mut left = len;
        while left > 0 {
            let part = left.min(self.tx.longest_payload());
            packets.push_back(self.make_payload(socket, connection, message, part, memory)?);
            left -= part;
        }
        Ok(packets)
    }

    /// Sends the packets of a message. Where the first can be sent, so can the others, unless the device fails.
    fn transmit_message(self: ArcBorrow<'_, Self>, mut packets: SkBuffQueue<Outgoing>) -> Result {
        if let Some(first) = packets.pop_front() {
            self.transmit_payload(first)?;
        }
        while let Some(packet) = packets.pop_front() {
            // The connection cannot go on without the rest.
            self.transmit_payload(packet).map_err(|_| EIO)?;
        }
        Ok(())
    }

    /// Whose memory the packets for `credit` bytes of a message carry. Gives the credit back where there is none.
    fn memory_of(
        &self,
        socket: &LockedSocket<'_>,
        connection: &Connection,
        message: &mut MessageSource,
        credit: u32,
    ) -> Result<Memory> {
        let mut zero_copy = message
            .zero_copy(socket, credit as usize)
            .inspect_err(|_| connection.return_send_credit(credit))?;
        // Only what is sent as a whole is sent from the caller's pages: a rest that waits for credit would
        // need a completion of its own.
        let is_callers =
            zero_copy.is_some() && self.tx.takes_pages() && message.remaining() <= credit as usize;
        if let (Some(zero_copy), false) = (&mut zero_copy, is_callers) {
            zero_copy.set_copied();
        }
        Ok(Memory {
            zero_copy,
            is_callers,
        })
    }

    /// Makes a packet of the next `len` bytes of a message. May sleep.
    fn make_payload(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        message: &mut MessageSource,
        len: u32,
        memory: &mut Memory,
    ) -> Result<OutgoingPacket> {
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
        let zero_copy = &mut memory.zero_copy;
        let completes = zero_copy.is_some();
        let make = |payload: Payload<'_>, zero_copy: Option<&mut ZeroCopy>| {
            let control = Outgoing::payload(connection, len, completes);
            SkBuff::outgoing(Some(socket), &header, payload, zero_copy, control)
        };
        if memory.is_callers {
            let payload = Payload::Pages(message, len as usize);
            match make(payload, zero_copy.as_mut()) {
                // The message is in more pieces than a packet can have.
                Err(EMSGSIZE) => {
                    if let Some(zero_copy) = zero_copy {
                        zero_copy.set_copied();
                    }
                }
                packet => return packet,
            }
        }
        let buffer = self.tx.spare_buffer(len as usize);
        make(
            Payload::Copy(message, len as usize, buffer),
            zero_copy.as_mut(),
        )
    }
}

/// Fails where the connection was reset.
fn fail_if_reset(connection: &Connection) -> Result {
    match connection.reset_state() {
        ResetState::No => Ok(()),
        // A writer that was blocked, where SO_ERROR has told somebody else before.
        ResetState::Untold | ResetState::Told => Err(ECONNRESET.into()),
    }
}
