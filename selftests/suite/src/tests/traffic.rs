// SPDX-License-Identifier: GPL-2.0

//! Connections of all kinds between a guest and programs of the host, which go on while the guest moves: each byte says
//! where in its stream, or message, it is.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{channel, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{anyhow, ensure, Context, Result};
use serde_json::json;
use vsock_device::packet::{TYPE_SEQPACKET, TYPE_STREAM};

use crate::agent::Pending;
use crate::lab::{expect_eq, restore_by, Guest, MovingGuest, LIMIT, SEQPACKET};
use crate::pattern;

/// The port of the guest's program that has the connections.
const TRAFFIC_PORT: u32 = 5555;

/// How much a program of the host sends or receives at once, in bytes.
const PART: usize = 32 * 1024;

/// How much a program sends that nobody reads, in bytes: more than both ends have room for.
const TOO_MUCH: u64 = 2 << 20;

/// What happens on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A stream each way.
    BothWays,
    /// A stream each way, the guest's by MSG_ZEROCOPY.
    ZeroCopy,
    /// Messages each way.
    Messages,
    /// The guest has shut down its sending.
    GuestIsDone,
    /// The host has.
    HostIsDone,
    /// The guest's reader is blocked until the end.
    BlockedReader,
    /// The guest's writer is blocked, for the host's program reads only when it has to.
    BlockedWriter,
    /// The guest does not read until the end, and the host's program has written all that goes.
    FullWindow,
}

impl Kind {
    pub const ALL: &[Kind] = &[
        Kind::BothWays,
        Kind::ZeroCopy,
        Kind::Messages,
        Kind::GuestIsDone,
        Kind::HostIsDone,
        Kind::BlockedReader,
        Kind::BlockedWriter,
        Kind::FullWindow,
    ];

    /// The port of the guest's program.
    fn port(self) -> u32 {
        match self {
            Kind::Messages => TRAFFIC_PORT + 1,
            _ => TRAFFIC_PORT,
        }
    }

    fn socket_type(self) -> u16 {
        match self {
            Kind::Messages => TYPE_SEQPACKET,
            _ => TYPE_STREAM,
        }
    }

    /// How much the host sends while the guest moves.
    fn host_sends(self) -> u64 {
        match self {
            Kind::HostIsDone | Kind::BlockedReader => 0,
            Kind::FullWindow => TOO_MUCH,
            _ => u64::MAX,
        }
    }

    /// The guest's call that sends.
    fn guest_sends(self) -> Option<&'static str> {
        match self {
            Kind::GuestIsDone | Kind::FullWindow => None,
            Kind::Messages => Some("send_messages"),
            Kind::ZeroCopy => Some("send_pattern_zero_copy"),
            _ => Some("send_pattern"),
        }
    }

    /// The guest's call that receives.
    fn guest_receives(self) -> &'static str {
        match self {
            Kind::Messages => "recv_messages",
            _ => "recv_pattern",
        }
    }
}

/// A program of the host in the middle of its connection: what it has sent and received so far, in bytes or messages.
struct Program {
    kind: Kind,
    stream: UnixStream,
    host_port: u32,
    /// Of what it sends; what it receives has the next one.
    seed: u64,
    sent: u64,
    received: u64,
}

/// A program that works until it is told that the guest moves.
pub struct Working<T> {
    stop: Sender<()>,
    thread: JoinHandle<Result<T>>,
}

/// Whether a program that works is told to stop, or nobody is there any more who would.
pub fn is_stopped(stop: &Receiver<()>) -> bool {
    stop.try_recv() != Err(TryRecvError::Empty)
}

impl<T: Send + 'static> Working<T> {
    /// `work` returns when it [is told to](is_stopped).
    pub fn begin(work: impl FnOnce(&Receiver<()>) -> Result<T> + Send + 'static) -> Self {
        let (stop, stopped) = channel();
        Self {
            stop,
            thread: std::thread::spawn(move || work(&stopped)),
        }
    }

    /// Tells it, and waits for it.
    pub fn end(self) -> Result<T> {
        // It may have ended with an error before.
        let _ = self.stop.send(());
        self.thread
            .join()
            .map_err(|_| anyhow!("a thread panicked"))?
    }
}

impl Program {
    fn begin(self) -> Working<Self> {
        Working::begin(move |stop| {
            let kind = self.kind;
            let worked = self.work(stop);
            worked.with_context(|| format!("the host's program, {kind:?}"))
        })
    }

    fn work(mut self, stop: &Receiver<()>) -> Result<Self> {
        self.stream.set_nonblocking(true)?;
        let mut buffer = vec![0; PART.max(pattern::MAX_MESSAGE + 1)];
        while !is_stopped(stop) {
            let sent = self.send(&mut buffer)?;
            let received = self.kind != Kind::BlockedWriter && self.receive(&mut buffer)?;
            if !sent && !received {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        self.stream.set_nonblocking(false)?;
        Ok(self)
    }

    /// Sends what there is room for; returns whether there was some.
    fn send(&mut self, buffer: &mut [u8]) -> Result<bool> {
        let left = self.kind.host_sends().saturating_sub(self.sent);
        if left == 0 {
            return Ok(false);
        }
        let message;
        let (bytes, is_message) = match self.kind {
            Kind::Messages => {
                message = pattern::message(self.seed, self.sent);
                (&message[..], true)
            }
            _ => {
                let len = left.min(PART as u64) as usize;
                pattern::fill(&mut buffer[..len], self.seed, self.sent);
                (&buffer[..len], false)
            }
        };
        match (&self.stream).write(bytes) {
            Ok(len) => {
                ensure!(!is_message || len == bytes.len(), "half a message was sent");
                self.sent += if is_message { 1 } else { len as u64 };
                Ok(len > 0)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error).context("it sends"),
        }
    }

    /// Takes what there is; returns whether there was something.
    fn receive(&mut self, buffer: &mut [u8]) -> Result<bool> {
        match (&self.stream).read(buffer) {
            Ok(0) => Ok(false),
            Ok(len) => {
                let bytes = &buffer[..len];
                if self.kind == Kind::Messages {
                    let should = pattern::message(self.seed + 1, self.received);
                    ensure!(
                        bytes == should,
                        "message {}, of {} bytes, came as another one, of {len}",
                        self.received,
                        should.len()
                    );
                    self.received += 1;
                } else {
                    let wrong = pattern::first_difference(bytes, self.seed + 1, self.received);
                    ensure!(
                        wrong.is_none(),
                        "byte {wrong:?} of the guest's stream is wrong"
                    );
                    self.received += len as u64;
                }
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error).context("it receives"),
        }
    }

    /// Receives up to the end of its socket.
    fn receive_all(&mut self) -> Result<()> {
        let mut buffer = vec![0; PART.max(pattern::MAX_MESSAGE + 1)];
        self.stream.set_read_timeout(Some(LIMIT))?;
        while self.receive(&mut buffer)? {}
        Ok(())
    }

    /// Reads to the end of its socket, asks for the state, and goes on with another socket.
    fn move_to(mut self, guest: &Guest, uds: &Path) -> Result<Self> {
        let (host_port, guest_port) = (self.host_port, self.kind.port());
        let asked = guest.checkpoint_while(host_port, guest_port, || self.receive_all());
        let state = asked.context("the state of a connection")?;
        self.stream = restore_by(uds, self.kind.socket_type(), &state)?;
        if self.kind == Kind::HostIsDone {
            self.stream.shutdown(Shutdown::Write)?;
        }
        Ok(self)
    }
}

/// The guest's end of a connection.
struct GuestEnd {
    kind: Kind,
    fd: i32,
    seed: u64,
    sending: Option<Pending>,
    receiving: Option<Pending>,
}

/// Connections of the host's programs to a program of a guest, which carry data all the time.
#[derive(Default)]
pub struct Traffic {
    listeners: Vec<i32>,
    guest_ends: Vec<GuestEnd>,
    working: Vec<Working<Program>>,
    resting: Vec<Program>,
}

/// What came through all migrations, both ways.
#[derive(Clone, Copy, Debug, Default)]
pub struct Amount {
    pub bytes: u64,
    pub messages: u64,
}

impl Traffic {
    /// Makes a connection of each kind.
    pub fn begin(guest: &MovingGuest, kinds: &[Kind]) -> Result<Self> {
        let mut this = Self::default();
        let streams = guest.listener(Kind::BothWays.port())?;
        let messages = guest.listener_of_kind(SEQPACKET, Kind::Messages.port())?;
        this.listeners.extend([streams, messages]);
        for (kind, seed) in kinds.iter().copied().zip((0..).step_by(2)) {
            let (stream, host_port) =
                guest.connect_from_host_by(kind.socket_type(), kind.port())?;
            let fd = guest.accept(match kind {
                Kind::Messages => messages,
                _ => streams,
            })?;
            match kind {
                Kind::GuestIsDone => guest.shutdown(fd, libc::SHUT_WR)?,
                Kind::HostIsDone => stream.shutdown(Shutdown::Write)?,
                _ => {}
            }
            let start = |method, seed| guest.start(method, json!({"fd": fd, "seed": seed}));
            this.guest_ends.push(GuestEnd {
                kind,
                fd,
                seed,
                sending: kind.guest_sends().map(|method| start(method, seed + 1)),
                receiving: (kind != Kind::FullWindow).then(|| start(kind.guest_receives(), seed)),
            });
            this.resting.push(Program {
                kind,
                stream,
                host_port,
                seed,
                sent: 0,
                received: 0,
            });
        }
        this.work();
        Ok(this)
    }

    /// Carries the connections of all programs over to the device at `uds`, after the guest's has stopped.
    pub fn move_to(&mut self, guest: &Guest, uds: &Path, random: &mut fastrand::Rng) -> Result<()> {
        let programs = self.working.drain(..).map(Working::end);
        let mut programs = programs.collect::<Result<Vec<_>>>()?;
        random.shuffle(&mut programs);
        for program in programs {
            let kind = program.kind;
            let moved = program
                .move_to(guest, uds)
                .with_context(|| format!("carrying over {kind:?}"))?;
            self.resting.push(moved);
        }
        Ok(())
    }

    /// Lets the programs go on.
    pub fn work(&mut self) {
        self.working
            .extend(self.resting.drain(..).map(Program::begin));
    }

    /// Ends all connections, and compares what was sent with what came.
    pub fn end(mut self, guest: &Guest) -> Result<Amount> {
        let mut amount = Amount::default();
        for working in std::mem::take(&mut self.working) {
            let program = working.end()?;
            let kind = program.kind;
            let at = self
                .guest_ends
                .iter()
                .position(|end| end.seed == program.seed);
            let guest_end = self
                .guest_ends
                .swap_remove(at.context("the program has no guest")?);
            let moved = guest_end
                .end(guest, program)
                .with_context(|| format!("the end of {kind:?}"))?;
            match kind {
                Kind::Messages => amount.messages += moved,
                _ => amount.bytes += moved,
            }
        }
        for listener in self.listeners {
            guest.close(listener)?;
        }
        Ok(amount)
    }
}

impl GuestEnd {
    /// Ends both directions; returns how much came in all.
    fn end(self, guest: &Guest, mut program: Program) -> Result<u64> {
        if self.kind == Kind::BlockedReader {
            let mut bytes = vec![0; PART];
            pattern::fill(&mut bytes, self.seed, 0);
            program.stream.write_all(&bytes)?;
            program.sent = PART as u64;
        }
        // After this the guest's reader comes to an end.
        program.stream.shutdown(Shutdown::Write)?;
        let receiving = match self.receiving {
            Some(receiving) => receiving,
            None => guest.start(
                self.kind.guest_receives(),
                json!({"fd": self.fd, "seed": self.seed}),
            ),
        };
        let received: u64 = receiving.wait(LIMIT).context("the guest's reader")?;
        expect_eq("what the guest has received", received, program.sent)?;
        let reading = std::thread::spawn(move || program.receive_all().map(|()| program.received));
        let mut sent = 0;
        if let Some(sending) = self.sending {
            let asked = guest.end_sending(self.fd);
            sent = sending.wait::<u64>(LIMIT).context("the guest's writer")?;
            asked?;
        }
        if self.kind != Kind::GuestIsDone {
            guest.shutdown(self.fd, libc::SHUT_WR)?;
        }
        let came = reading.join().map_err(|_| anyhow!("a thread panicked"))??;
        expect_eq("what the host's program has received", came, sent)?;
        guest.close(self.fd)?;
        Ok(received + sent)
    }
}
