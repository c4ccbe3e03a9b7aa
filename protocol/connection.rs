// SPDX-License-Identifier: GPL-2.0

//! What a packet does to the connection that it is for (virtio 5.10.6.4 to 5.10.6.6).
//!
//! The state of a socket lives in the socket; here is the function from a state and a packet to the
//! [`Step`] that follows. It decides, the driver acts.

use super::header::{Header, Op, SHUTDOWN_BOTH};

/// State of a socket, as far as packets are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Waits for connections.
    Listening,
    /// Has sent a request and waits for the response.
    Connecting,
    /// As established, and the peer has not said anything since its request.
    Accepted,
    /// Can send and receive, but for directions that were shut down.
    Established,
    /// Has been closed and waits for nothing but the peer's RST.
    Closing,
    /// Has no connection.
    Closed,
}

/// Why an attempt to connect failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectError {
    /// The peer refused, ECONNRESET to the application.
    Refused,
    /// The peer answered with something else than an answer, EPROTO to the application.
    Protocol,
}

/// What the driver has to do about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make a new connection for a listener.
    Accept,
    /// Answer with RST: there is nothing here that the packet could be for.
    Refuse,
    /// The connection is established.
    Establish,
    /// The attempt to connect failed; answer with RST where `reply` says so.
    FailConnect {
        /// What the application is told.
        error: ConnectError,
        /// Whether the peer is told.
        reply: bool,
    },
    /// The peer's connect() was ended by a signal or its timeout, and called again: answer with a response once more. Where
    /// something was sent since the first one, send a packet instead that a peer without the connection answers with RST.
    ///
    /// Where the first response was still on its way it answers this request, too. (Had the peer had it between the two, it would
    /// have refused it.) But Linux of before the end of 2025 may have had it and forgotten the connection, and waits for another,
    /// and so does a peer that was started anew; what was sent to it is lost, and the connection with that.
    RespondAgain,
    /// Put the payload into the receive buffer.
    Deliver,
    /// Answer with a credit update.
    SendCredit,
    /// Nothing beyond the credit that every packet carries.
    NoteCredit,
    /// The peer has shut down directions: all that it has shut down by now, [`SHUTDOWN_BOTH`] or less.
    PeerShutdown(u32),
    /// The peer has ended the connection.
    PeerClosed,
    /// The peer has lost the connection and wants a new one in its place: answer with RST and fail ours.
    PeerForgot,
    /// The packet makes no sense here: drop it and count it.
    Drop,
}

impl Step {
    /// Whether a connection that was established goes on.
    pub fn keeps_connection(self) -> bool {
        match self {
            Step::RespondAgain
            | Step::Deliver
            | Step::SendCredit
            | Step::NoteCredit
            | Step::Drop => true,
            Step::PeerShutdown(directions) => directions != SHUTDOWN_BOTH,
            _ => false,
        }
    }
}

/// What the packet with `header` means for a socket in `state` whose peer has shut down `peer_shutdown`.
pub fn step(state: State, peer_shutdown: u32, header: &Header) -> Step {
    match (state, header.op) {
        (State::Listening, Op::Request) => Step::Accept,
        (State::Listening | State::Closed, Op::Rst) => Step::Drop,
        (State::Listening | State::Closed, _) => Step::Refuse,

        (State::Connecting, Op::Response) => Step::Establish,
        (State::Connecting, Op::Rst) => Step::FailConnect {
            error: ConnectError::Refused,
            reply: false,
        },
        (State::Connecting, _) => Step::FailConnect {
            error: ConnectError::Protocol,
            reply: true,
        },

        (State::Accepted, Op::Request) => Step::RespondAgain,
        (State::Accepted, _) => step(State::Established, peer_shutdown, header),

        (State::Established, Op::Rw) if header.len == 0 && header.message_end().is_none() => {
            Step::NoteCredit
        }
        (State::Established, Op::Rw) => Step::Deliver,
        (State::Established, Op::CreditRequest) => Step::SendCredit,
        (State::Established, Op::CreditUpdate) => Step::NoteCredit,
        (State::Established, Op::Shutdown) => {
            Step::PeerShutdown(peer_shutdown | (header.flags & SHUTDOWN_BOTH))
        }
        (State::Established, Op::Rst) => Step::PeerClosed,
        // What the peer has sent on the connection that it has closed can be read yet.
        (State::Established, Op::Request) if peer_shutdown == SHUTDOWN_BOTH => Step::Refuse,
        (State::Established, Op::Request) => Step::PeerForgot,
        (State::Established, Op::Response | Op::Unknown(_)) => Step::Drop,

        (State::Closing, Op::Rst) => Step::PeerClosed,
        (State::Closing, _) => Step::Drop,
    }
}
