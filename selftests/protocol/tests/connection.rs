// SPDX-License-Identifier: GPL-2.0

//! What a packet does to a connection: a table of every state and op, and two ends that talk to each other.

use proptest::prelude::*;
use std::collections::VecDeque;
use vsock_protocol::{
    connection::{step, ConnectError, State, Step},
    header::{
        Header, Op, SocketType, SEQ_EOM, SEQ_EOR, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND,
    },
};

const STATES: [State; 6] = [
    State::Listening,
    State::Connecting,
    State::Accepted,
    State::Established,
    State::Closing,
    State::Closed,
];

fn packet(op: Op) -> Header {
    Header {
        src_cid: 2,
        dst_cid: 3,
        src_port: 1024,
        dst_port: 1234,
        len: 0,
        socket_type: SocketType::Stream,
        op,
        flags: 0,
        buf_alloc: 1 << 18,
        fwd_cnt: 0,
    }
}

/// A peer that answers a request with something else than RESPONSE or RST.
const CONFUSED: Step = Step::FailConnect {
    error: ConnectError::Protocol,
    reply: true,
};
const REFUSED: Step = Step::FailConnect {
    error: ConnectError::Refused,
    reply: false,
};

#[test]
fn a_request_of_a_peer_that_has_closed_leaves_what_can_be_read() {
    let request = packet(Op::Request);
    let step = step(State::Established, SHUTDOWN_BOTH, &request);
    assert_eq!(step, Step::Refuse);
}

#[test]
fn every_state_takes_every_op() {
    use Step::*;
    // One column for each of STATES.
    let table = [
        (
            Op::Request,
            [Accept, CONFUSED, RespondAgain, PeerForgot, Drop, Refuse],
        ),
        (Op::Response, [Refuse, Establish, Drop, Drop, Drop, Refuse]),
        (
            Op::Rst,
            [Drop, REFUSED, PeerClosed, PeerClosed, PeerClosed, Drop],
        ),
        // Without a flag it shuts nothing down.
        (
            Op::Shutdown,
            [
                Refuse,
                CONFUSED,
                PeerShutdown(0),
                PeerShutdown(0),
                Drop,
                Refuse,
            ],
        ),
        // Without payload it carries credit alone.
        (
            Op::Rw,
            [Refuse, CONFUSED, NoteCredit, NoteCredit, Drop, Refuse],
        ),
        (
            Op::CreditUpdate,
            [Refuse, CONFUSED, NoteCredit, NoteCredit, Drop, Refuse],
        ),
        (
            Op::CreditRequest,
            [Refuse, CONFUSED, SendCredit, SendCredit, Drop, Refuse],
        ),
        (Op::Unknown(0), [Refuse, CONFUSED, Drop, Drop, Drop, Refuse]),
        (Op::Unknown(8), [Refuse, CONFUSED, Drop, Drop, Drop, Refuse]),
        (
            Op::Unknown(u16::MAX),
            [Refuse, CONFUSED, Drop, Drop, Drop, Refuse],
        ),
    ];
    for (op, steps) in table {
        for (state, expected) in STATES.into_iter().zip(steps) {
            assert_eq!(step(state, 0, &packet(op)), expected, "{state:?}, {op:?}");
        }
    }
}

fn is_connected(state: State) -> bool {
    matches!(state, State::Accepted | State::Established)
}

#[test]
fn payload_is_delivered_to_established_connections_only() {
    let payload = Header {
        len: 1,
        ..packet(Op::Rw)
    };
    for state in STATES {
        let delivered = step(state, 0, &payload) == Step::Deliver;
        assert_eq!(delivered, is_connected(state), "{state:?}");
    }
}

#[test]
fn an_empty_message_is_delivered() {
    let empty = |socket_type, flags| {
        let header = Header {
            socket_type,
            flags,
            ..packet(Op::Rw)
        };
        step(State::Established, 0, &header)
    };
    assert_eq!(empty(SocketType::SeqPacket, SEQ_EOM), Step::Deliver);
    assert_eq!(
        empty(SocketType::SeqPacket, SEQ_EOM | SEQ_EOR),
        Step::Deliver
    );
    assert_eq!(empty(SocketType::SeqPacket, SEQ_EOR), Step::NoteCredit);
    assert_eq!(empty(SocketType::Stream, SEQ_EOM), Step::NoteCredit);
}

#[test]
fn shutdowns_add_up_and_are_never_taken_back() {
    for before in 0..=SHUTDOWN_BOTH {
        // Bits that have no meaning are ignored.
        for flags in [0, SHUTDOWN_RCV, SHUTDOWN_SEND, SHUTDOWN_BOTH, 4, u32::MAX] {
            let header = Header {
                flags,
                ..packet(Op::Shutdown)
            };
            assert_eq!(
                step(State::Established, before, &header),
                Step::PeerShutdown(before | flags & 3)
            );
        }
    }
}

/// A client asks for a connection, is interrupted when `arrivals` packets have come, asks again and sends a byte.
fn connect_again(arrivals: usize, interrupt: What) -> Pair {
    let mut pair = Pair::default();
    let actions = [
        (1, 0, What::Listen(true)),
        (0, 0, What::Connect),
        // The response is on its way to it.
        (1, 1, What::Listen(true)),
        (0, arrivals, interrupt),
        (0, 0, What::Connect),
        (1, 1, What::Listen(true)),
        (0, 1, What::Send(1)),
    ];
    for (end, arrivals, what) in actions {
        pair.act(Action {
            end,
            arrivals,
            what,
        });
    }
    pair.deliver_all();
    pair
}

#[test]
fn a_repeated_request_connects_once() {
    for pair in [
        connect_again(0, What::Interrupt),
        connect_again(1, What::Forget),
    ] {
        let [client, server] = &pair.ends;
        assert_eq!(client.state, State::Established, "{pair:?}");
        assert_eq!(server.state, State::Established, "{pair:?}");
        assert_eq!(server.received, 1, "{pair:?}");
    }
}

fn any_state() -> impl Strategy<Value = State> {
    proptest::sample::select(&STATES[..])
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        9 => (0..9u16).prop_map(Op::from),
        1 => any::<u16>().prop_map(Op::from),
    ]
}

fn any_header() -> impl Strategy<Value = Header> {
    (any_op(), 0..3u16, any::<[u32; 4]>(), any::<bool>()).prop_map(
        |(op, socket_type, [len, flags, buf_alloc, fwd_cnt], empty)| Header {
            len: if empty { 0 } else { len },
            socket_type: socket_type.into(),
            flags,
            buf_alloc,
            fwd_cnt,
            ..packet(op)
        },
    )
}

proptest! {
    #[test]
    fn nothing_but_a_handshake_makes_a_connection(
        state in any_state(),
        peer_shutdown in 0..=SHUTDOWN_BOTH,
        header in any_header(),
    ) {
        let step = step(state, peer_shutdown, &header);
        prop_assert_eq!(
            step == Step::Accept,
            (state, header.op) == (State::Listening, Op::Request)
        );
        prop_assert_eq!(
            step == Step::Establish,
            (state, header.op) == (State::Connecting, Op::Response)
        );
    }

    #[test]
    fn rst_is_never_answered(state in any_state(), header in any_header()) {
        let rst = Header { op: Op::Rst, ..header };
        prop_assert!(!is_answered(step(state, 0, &rst)));
    }

    #[test]
    fn two_ends_agree(actions in proptest::collection::vec(any_action(), 0..100)) {
        let mut pair = Pair::default();
        for action in actions {
            pair.act(action);
        }
        pair.deliver_all();
        let [a, b] = &pair.ends;
        prop_assert_eq!(is_connected(a.state), is_connected(b.state));
        if is_connected(a.state) {
            prop_assert_eq!(a.received, b.sent);
            prop_assert_eq!(b.received, a.sent);
            prop_assert_eq!(a.peer_shutdown, b.shutdown);
            prop_assert_eq!(b.peer_shutdown, a.shutdown);
            // Who has closed waits for nothing any more.
            prop_assert_ne!(a.shutdown, SHUTDOWN_BOTH);
            prop_assert_ne!(b.shutdown, SHUTDOWN_BOTH);
        } else {
            prop_assert_eq!((a.state, b.state), (State::Closed, State::Closed));
        }
    }

    /// A peer that sends what it likes gets one answer to a packet at most, and its RST none.
    #[test]
    fn a_peer_out_of_its_mind_is_endured(
        packets in proptest::collection::vec((any_action(), any_header()), 0..100),
    ) {
        let mut end = End::default();
        for (action, header) in packets {
            let asked_for = end.act(action.what).map(|header| header.op);
            let was = (end.state, end.listens);
            let answer = end.receive(&header);
            prop_assert!(answer.is_none() || header.op != Op::Rst);
            if is_connected(end.state) && !is_connected(was.0) {
                prop_assert!(
                    matches!(
                        (was, header.op),
                        ((State::Connecting, _), Op::Response) | ((_, true), Op::Request)
                    ),
                    "{:?} after {:?}", header, asked_for
                );
            }
        }
    }

    #[test]
    fn an_established_connection_survives_anything_but_its_end(header in any_header()) {
        let step = step(State::Established, 0, &header);
        let ends = matches!(
            step,
            Step::PeerClosed | Step::PeerForgot | Step::PeerShutdown(SHUTDOWN_BOTH)
        );
        let means_end = match header.op {
            Op::Rst | Op::Request => true,
            Op::Shutdown => header.flags & SHUTDOWN_BOTH == SHUTDOWN_BOTH,
            _ => false,
        };
        prop_assert_eq!(ends, means_end);
        prop_assert_eq!(step.keeps_connection(), !ends);
    }
}

fn is_answered(step: Step) -> bool {
    matches!(
        step,
        Step::Accept
            | Step::RespondAgain
            | Step::Refuse
            | Step::FailConnect { reply: true, .. }
            | Step::SendCredit
            | Step::PeerForgot
    )
}

/// One end: a listener and a connection on the same port. It does what the steps say and what applications do.
///
/// It has one connection in its life: packets do not tell a connection from the one before it on the same ports, which
/// is why sockets take other ports.
#[derive(Debug)]
struct End {
    listens: bool,
    was_used: bool,
    /// A signal has ended its connect(), which it may call again.
    was_interrupted: bool,
    state: State,
    shutdown: u32,
    peer_shutdown: u32,
    sent: u64,
    received: u64,
}

impl Default for End {
    fn default() -> Self {
        End {
            listens: false,
            was_used: false,
            was_interrupted: false,
            state: State::Closed,
            shutdown: 0,
            peer_shutdown: 0,
            sent: 0,
            received: 0,
        }
    }
}

/// What an application does.
#[derive(Clone, Copy, Debug)]
enum What {
    Listen(bool),
    Connect,
    /// A signal ends connect().
    Interrupt,
    /// So it does, but the response has come already, and is forgotten.
    Forget,
    Send(u32),
    Shutdown(u32),
    Close,
    RequestCredit,
}

impl End {
    fn begin(&mut self, state: State) {
        *self = End {
            listens: self.listens,
            was_used: true,
            state,
            ..End::default()
        };
    }

    /// Shuts directions down; those that were before are not told again.
    fn shut_down(&mut self, directions: u32) -> Option<Header> {
        let news = directions & !self.shutdown;
        self.shutdown |= directions;
        (news != 0).then_some(Header {
            flags: directions,
            ..packet(Op::Shutdown)
        })
    }

    /// Does what an application wants; returns the packet that it sends thereby.
    fn act(&mut self, what: What) -> Option<Header> {
        match (what, self.state) {
            (What::Listen(listens), _) => {
                self.listens = listens;
                None
            }
            (What::Connect, State::Closed) if !self.was_used || self.was_interrupted => {
                self.begin(State::Connecting);
                Some(packet(Op::Request))
            }
            (What::Send(len), State::Accepted | State::Established)
                if self.shutdown & SHUTDOWN_SEND == 0 && self.peer_shutdown & SHUTDOWN_RCV == 0 =>
            {
                self.sent += u64::from(len);
                Some(Header {
                    len,
                    ..packet(Op::Rw)
                })
            }
            (What::Shutdown(directions), State::Accepted | State::Established) => {
                self.shut_down(directions)
            }
            (What::Close, State::Accepted | State::Established) => self.shut_down(SHUTDOWN_BOTH),
            (What::Interrupt, State::Connecting) | (What::Forget, State::Established) => {
                self.begin(State::Closed);
                self.was_interrupted = true;
                None
            }
            (What::Close, State::Connecting) => {
                self.begin(State::Closed);
                None
            }
            (What::RequestCredit, State::Accepted | State::Established) => {
                Some(packet(Op::CreditRequest))
            }
            _ => None,
        }
    }

    /// Does what a packet means; returns the packet that answers it.
    fn receive(&mut self, header: &Header) -> Option<Header> {
        let state = match self.state {
            State::Closed if self.listens && !self.was_used => State::Listening,
            state => state,
        };
        if state == State::Accepted && header.op != Op::Request {
            self.state = State::Established;
        }
        match step(state, self.peer_shutdown, header) {
            Step::Accept => {
                self.begin(State::Accepted);
                return Some(packet(Op::Response));
            }
            Step::Refuse => return header.reset_reply(),
            Step::Establish => self.begin(State::Established),
            Step::FailConnect { reply, .. } => {
                self.begin(State::Closed);
                return header.reset_reply().filter(|_| reply);
            }
            Step::Deliver => self.received += u64::from(header.len),
            Step::SendCredit => return Some(packet(Op::CreditUpdate)),
            Step::NoteCredit | Step::Drop => {}
            Step::PeerShutdown(SHUTDOWN_BOTH) => {
                self.begin(State::Closed);
                return header.reset_reply();
            }
            Step::RespondAgain if self.sent == 0 && self.shutdown == 0 => {
                return Some(packet(Op::Response))
            }
            Step::RespondAgain => return Some(packet(Op::CreditUpdate)),
            Step::PeerShutdown(directions) => self.peer_shutdown = directions,
            Step::PeerClosed => self.begin(State::Closed),
            Step::PeerForgot => {
                self.begin(State::Closed);
                return header.reset_reply();
            }
        }
        None
    }
}

/// An end does something after some of the packets that are on their way to it have arrived.
#[derive(Clone, Copy, Debug)]
struct Action {
    end: usize,
    arrivals: usize,
    what: What,
}

fn any_action() -> impl Strategy<Value = Action> {
    let what = prop_oneof![
        any::<bool>().prop_map(What::Listen),
        Just(What::Connect),
        Just(What::Connect),
        Just(What::Interrupt),
        (1..1000u32).prop_map(What::Send),
        (1..1000u32).prop_map(What::Send),
        (1..=SHUTDOWN_BOTH).prop_map(What::Shutdown),
        Just(What::Close),
        Just(What::RequestCredit),
    ];
    (0..2usize, 0..4usize, what).prop_map(|(end, arrivals, what)| Action {
        end,
        arrivals,
        what,
    })
}

/// Two ends and the packets on their way to each of them.
#[derive(Debug, Default)]
struct Pair {
    ends: [End; 2],
    on_their_way: [VecDeque<Header>; 2],
}

impl Pair {
    fn act(&mut self, action: Action) {
        for _ in 0..action.arrivals {
            self.deliver(action.end);
        }
        let sent = self.ends[action.end].act(action.what);
        self.on_their_way[1 - action.end].extend(sent);
    }

    fn deliver(&mut self, end: usize) -> bool {
        let Some(header) = self.on_their_way[end].pop_front() else {
            return false;
        };
        let answer = self.ends[end].receive(&header);
        self.on_their_way[1 - end].extend(answer);
        true
    }

    /// Delivers until nothing is on its way any more.
    fn deliver_all(&mut self) {
        let waiting: usize = self.on_their_way.iter().map(VecDeque::len).sum();
        // A packet, its answer, and an RST for that.
        for _ in 0..=3 * waiting {
            if !self.deliver(0) && !self.deliver(1) {
                return;
            }
        }
        panic!("the ends answer each other without end: {self:?}");
    }
}
