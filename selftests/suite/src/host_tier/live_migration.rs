// SPDX-License-Identifier: GPL-2.0

//! A live migration as it is: QEMU hands a guest that runs to another QEMU, whose `vhost-vsock` device has another CID, and
//! the guest's programs are in the middle of what they do. Then back again.
//!
//! QEMU tells the guest by a transport reset. Each connection of either kind has to fail with ECONNRESET, whatever its
//! program was doing with it; the listeners, which are the same from the first migration to the last, have to be reached at
//! the new CID.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use serde_json::json;

use super::nested::{NestedGuest, NestedHost};
use super::HOST_CID;
use crate::agent::{sh_ok, Agent, CallError, Pending};
use crate::lab::{expect_eq, expect_errno, expect_pollerr, wait_for, A_WHILE, CID_ANY, LIMIT};
use crate::qmp::MigrationFigures;
use crate::sockets::{Call, HowFar, ESTABLISHED, LISTEN, SEQPACKET, STREAM};
use crate::Driver;

/// How many migrations a run has that does not say how many.
pub const DEFAULT_MIGRATIONS: u32 = 4;

/// The first of the guest's ports that are listened to.
const GUEST_PORT: u32 = 2000;

/// The first of the host's, one for each kind of sockets.
const HOST_PORT: u32 = 3000;

const KINDS: [i32; 2] = [STREAM, SEQPACKET];
const KIND_NAMES: [&str; 2] = ["stream", "seqpacket"];

/// What a program of the host sees whose guest has gone, by what it was doing and how far QEMU is. That is the host's part.
const HOST_ERRORS: [&str; 4] = ["ECONNRESET", "EPIPE", "ENOTCONN", "EHOSTUNREACH"];

/// What a program of the guest does with its connection when the migration comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// It waits in recv(), for data that does not come.
    WaitingForData,
    /// It waits in send(), for a host that does not receive.
    WaitingForRoom,
    /// It waits in poll().
    Polling,
    /// Nothing, with data to be read; then it receives.
    NothingThenReceives,
    /// Nothing; then it sends.
    NothingThenSends,
    /// It receives what the host sends without a pause.
    Receiving,
    /// It sends without a pause, and the host receives.
    Sending,
    /// It has yet to accept the connection.
    NotAccepted,
}

impl Doing {
    /// In the order in which they begin. accept() gives connections in their order, so the last has to be last.
    const ALL: [Doing; 8] = [
        Doing::WaitingForData,
        Doing::WaitingForRoom,
        Doing::Polling,
        Doing::NothingThenReceives,
        Doing::NothingThenSends,
        Doing::Receiving,
        Doing::Sending,
        Doing::NotAccepted,
    ];
}

/// Migrates the guest so many times; `progress` hears of each.
pub fn run(
    host: &mut NestedHost,
    guest: &mut NestedGuest,
    migrations: u32,
    progress: &mut dyn FnMut(&str),
) -> Result<Summary> {
    let mut sockets = Sockets::open(&host.machine.agent, guest)?;
    let result = sockets.migrate(host, guest, migrations, progress);
    // After a failure as well: while they are there the driver cannot be removed.
    let closed = sockets.close(&host.machine.agent, &guest.agent);
    let summary = result?;
    closed.context("closing all sockets")?;
    Ok(summary)
}

/// What the migrations came to.
#[derive(Default)]
pub struct Summary {
    migrations: Vec<MigrationFigures>,
    connections_reset: usize,
    /// What was received on connections until they were reset.
    bytes: u64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spread = |figure: fn(&MigrationFigures) -> Duration| {
            let mut figures = self.migrations.iter().map(figure).collect::<Vec<_>>();
            figures.sort();
            let at = |index: usize| figures.get(index).map_or(0, Duration::as_millis);
            let last = figures.len().saturating_sub(1);
            format!("{} ms ({} to {})", at(last / 2), at(0), at(last))
        };
        write!(
            f,
            "{} live migrations: {} in all, {} down; {} connections were reset after {} MiB",
            self.migrations.len(),
            spread(|it| it.total),
            spread(|it| it.down),
            self.connections_reset,
            self.bytes >> 20
        )
    }
}

/// What is not as it should be. The test goes on with the other connections, so that all of it is seen.
#[derive(Default)]
struct Findings(Vec<String>);

impl Findings {
    /// Gives what there is. It is an error where a machine does not answer: each further call would be waited for.
    fn note<T>(&mut self, what: &str, result: Result<T>) -> Result<Option<T>> {
        let error = match result {
            Ok(value) => return Ok(Some(value)),
            Err(error) => error,
        };
        self.0.push(format!("{what}: {error:#}"));
        if matches!(error.downcast_ref(), Some(CallError::Lost(_))) {
            self.fail("a machine does not answer")?;
        }
        Ok(None)
    }

    /// Fails where there was something.
    fn fail(&self, when: &str) -> Result<()> {
        ensure!(self.0.is_empty(), "{when}:\n{}", self.0.join("\n"));
        Ok(())
    }
}

/// A listener of the guest.
struct Listener {
    fd: i32,
    kind: i32,
    /// Whether it is bound to the guest's own CID, rather than to any.
    to_own_cid: bool,
    port: u32,
}

impl Listener {
    /// Its address when the guest has this CID.
    fn address(&self, cid: u32) -> (u32, u32) {
        (if self.to_own_cid { cid } else { CID_ANY }, self.port)
    }
}

/// All sockets. The listeners are there from the first migration to the last.
struct Sockets {
    /// The guest's.
    listeners: Vec<Listener>,
    /// The host's, one for each of [`KINDS`].
    host_listeners: Vec<i32>,
    /// Those that the next migration has to reset.
    connections: Vec<Connection>,
    /// Of our driver alone.
    told: Option<Told>,
}

impl Sockets {
    fn open(host: &Agent, guest: &NestedGuest) -> Result<Self> {
        wait_for("the connections of other tests to be gone", || {
            let connected = guest.agent.sockets()?;
            Ok(connected.iter().all(|it| it.state != ESTABLISHED))
        })?;
        let mut listeners = Vec::new();
        for kind in KINDS {
            for to_own_cid in [false, true] {
                let mut listener = Listener {
                    fd: -1,
                    kind,
                    to_own_cid,
                    port: GUEST_PORT + listeners.len() as u32,
                };
                listener.fd = listen(&guest.agent, kind, listener.address(guest.cid()))?;
                listeners.push(listener);
            }
        }
        let mut host_listeners = Vec::new();
        for (kind, port) in KINDS.into_iter().zip(HOST_PORT..) {
            host_listeners.push(listen(host, kind, (CID_ANY, port))?);
        }
        let told = match guest.spec.driver {
            Driver::Rs => Some(Told {
                uevents: guest.agent.uevent_socket()?,
                generation: generation(&guest.agent)?,
                lost_packet_resets: guest.agent.counter("lost_packet_resets")?,
                left_behind: guest.agent.counter("dropped_unwritten")?,
            }),
            Driver::C => None,
        };
        Ok(Self {
            listeners,
            host_listeners,
            connections: Vec::new(),
            told,
        })
    }

    fn close(&self, host: &Agent, guest: &Agent) -> Result<()> {
        for connection in &self.connections {
            connection.close(host, guest)?;
        }
        let uevents = self.told.iter().map(|told| told.uevents);
        for fd in self.listeners.iter().map(|it| it.fd).chain(uevents) {
            guest.close(fd)?;
        }
        for fd in &self.host_listeners {
            host.close(*fd)?;
        }
        Ok(())
    }

    fn migrate(
        &mut self,
        host: &mut NestedHost,
        guest: &mut NestedGuest,
        migrations: u32,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Summary> {
        let mut summary = Summary::default();
        let mut findings = Findings::default();
        self.connect_all(0, &host.machine.agent, guest, &mut findings)?;
        findings.fail("before the first migration")?;
        for round in 1..=migrations {
            let begin = |it: &Connection| it.begin(&host.machine.agent, &guest.agent);
            let calls = self.connections.iter().map(begin);
            let calls = calls.collect::<Result<Vec<_>>>()?;
            let from = guest.cid();
            let figures = host.migrate(guest)?;

            let host_agent = &host.machine.agent;
            let reset = self.connections.len();
            let told = self.expect_to_be_told(guest, from, reset);
            findings.note("what programs are told", told)?;
            let mut bytes = 0;
            for (connection, calls) in self.connections.drain(..).zip(calls) {
                let received = connection.expect_reset(calls, host_agent, &guest.agent);
                bytes += findings.note(&connection.name, received)?.unwrap_or(0);
            }
            findings.note("addresses", self.expect_addresses(guest))?;
            self.connect_all(round, host_agent, guest, &mut findings)?;

            let to = guest.cid();
            let what = format!("migration {round} of {migrations}, CID {from} to {to}");
            findings.fail(&what)?;
            let left_behind = match &mut self.told {
                Some(told) => told.packets_left_behind(&guest.agent)?,
                None => 0,
            };
            progress(&format!(
                "{what}: {} ms in all, {} ms down; {reset} connections were reset after {} MiB{}",
                figures.total.as_millis(),
                figures.down.as_millis(),
                bytes >> 20,
                match left_behind {
                    0 => String::new(),
                    packets => format!("; {packets} packets were left behind"),
                }
            ));
            summary.migrations.push(figures);
            summary.connections_reset += reset;
            summary.bytes += bytes;
        }
        Ok(summary)
    }

    /// Makes the connections for a round: of each kind one for each thing that a program may be doing with it. Who connects to
    /// whom changes from round to round.
    ///
    /// That shows as well that the listeners are reached at the CID that the guest has now, and that it reaches the host.
    fn connect_all(
        &mut self,
        round: u32,
        host: &Agent,
        guest: &NestedGuest,
        findings: &mut Findings,
    ) -> Result<()> {
        for (doing, number) in Doing::ALL.into_iter().zip(round..) {
            for ((kind, name), host_listener) in
                KINDS.into_iter().zip(KIND_NAMES).zip(&self.host_listeners)
            {
                let listeners = self.listeners.iter().filter(|it| it.kind == kind);
                let mut ways = listeners.map(Way::ToGuest).collect::<Vec<_>>();
                if doing != Doing::NotAccepted {
                    ways.push(Way::ToHost(*host_listener, kind));
                }
                let way = &ways[number as usize % ways.len()];
                let name = format!("{name}, {way}, {doing:?}");
                let seed = (u64::from(round) << 8) | self.connections.len() as u64;
                let connection = way.connect(doing, seed, host, guest);
                if let Some((host, guest)) = findings.note(&name, connection)? {
                    self.connections.push(Connection {
                        name,
                        doing,
                        seed,
                        guest,
                        host,
                    });
                }
            }
        }
        Ok(())
    }

    /// Waits until the guest knows of the migration; programs on our driver are told what it did.
    fn expect_to_be_told(&mut self, guest: &NestedGuest, from: u32, reset: usize) -> Result<()> {
        let agent = &guest.agent;
        if let Some(told) = &mut self.told {
            told.expect(agent, (from, guest.cid()), reset)?;
            let lost_packet_resets = agent.counter("lost_packet_resets")?;
            if lost_packet_resets != told.lost_packet_resets {
                // The guest knew that packets were left behind before it got the event.
                told.expect(agent, (guest.cid(), guest.cid()), 0)?;
                told.lost_packet_resets += 1;
                expect_eq(
                    "resets for packets that were left behind",
                    lost_packet_resets,
                    told.lost_packet_resets,
                )?;
            }
            expect_eq(
                "the generation in sysfs",
                generation(agent)?,
                told.generation,
            )?;
        }
        wait_for(&format!("the guest's CID to be {}", guest.cid()), || {
            Ok(agent.local_cid()? == guest.cid())
        })
    }

    /// That the listeners have the addresses that they should, whoever asks.
    fn expect_addresses(&self, guest: &NestedGuest) -> Result<()> {
        let mut expected = Vec::new();
        for listener in &self.listeners {
            let address = listener.address(guest.cid());
            expect_eq(
                "getsockname()",
                guest.agent.own_address(listener.fd)?,
                address,
            )?;
            expected.push(address);
        }
        let shown = guest.agent.sockets()?.into_iter();
        let mut shown = shown
            .filter(|it| it.state == LISTEN)
            .map(|it| it.own)
            .collect::<Vec<_>>();
        shown.sort_by_key(|(_, port)| *port);
        expect_eq("the listeners as ss --vsock shows them", shown, expected)
    }
}

/// What programs on our driver were told by now.
struct Told {
    /// Where the guest gets the kernel's uevents.
    uevents: i32,
    /// How many migrations those were.
    generation: u32,
    /// How often all connections were reset because packets were left behind.
    lost_packet_resets: i64,
    /// How many packets those were.
    left_behind: i64,
}

impl Told {
    /// The next uevent is of a transport reset with these CIDs and so many connections.
    fn expect(&mut self, agent: &Agent, (from, to): (u32, u32), reset: usize) -> Result<()> {
        self.generation += 1;
        let expected = [
            ("CAUSE", "transport-reset".to_owned()),
            ("GENERATION", self.generation.to_string()),
            ("OLD_CID", from.to_string()),
            ("NEW_CID", to.to_string()),
            ("CONNECTIONS_RESET", reset.to_string()),
            ("CONNECTIONS_KEPT", "0".to_owned()),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value));
        let fields = agent.next_migration(self.uevents)?;
        expect_eq("the uevent", fields, HashMap::from(expected))
    }

    /// How many packets were left behind since this was asked last. All are known once there is a new connection.
    fn packets_left_behind(&mut self, agent: &Agent) -> Result<i64> {
        let by_now = agent.counter("dropped_unwritten")?;
        Ok(by_now - std::mem::replace(&mut self.left_behind, by_now))
    }
}

/// A socket that listens.
fn listen(agent: &Agent, kind: i32, (cid, port): (u32, u32)) -> Call<i32> {
    let fd = agent.socket(kind)?;
    agent.bind(fd, cid, port)?;
    agent.listen(fd, 8)?;
    Ok(fd)
}

/// How many migrations programs of the guest can see in sysfs.
fn generation(guest: &Agent) -> Result<u32> {
    let text = sh_ok(
        guest,
        "cat /sys/bus/virtio/drivers/virtio_vsock_rs/virtio*/migration/generation",
        LIMIT,
    )?;
    Ok(text.trim().parse()?)
}

/// Who connects to whom.
enum Way<'a> {
    /// The host, to this listener of the guest.
    ToGuest(&'a Listener),
    /// The guest, to this listener of the host, of this kind.
    ToHost(i32, i32),
}

impl fmt::Display for Way<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::ToGuest(listener) if listener.to_own_cid => "to the guest's own CID",
            Way::ToGuest(_) => "to VMADDR_CID_ANY of the guest",
            Way::ToHost(..) => "to the host",
        })
    }
}

impl Way<'_> {
    /// Connects, and sees to it that both ends are of one connection; returns the host's end and the guest's. That is the
    /// listener where the connection is not to be accepted.
    fn connect(
        &self,
        doing: Doing,
        seed: u64,
        host: &Agent,
        guest: &NestedGuest,
    ) -> Result<(i32, i32)> {
        let (host_end, guest_end) = match self {
            Way::ToGuest(listener) => {
                let fd = host.socket(listener.kind)?;
                host.connect(fd, guest.cid(), listener.port)
                    .context("connect()")?;
                if doing == Doing::NotAccepted {
                    return Ok((fd, listener.fd));
                }
                let accepted = guest.agent.accept(listener.fd).context("accept()")?;
                let address = (guest.cid(), listener.port);
                expect_eq("its address", guest.agent.own_address(accepted)?, address)?;
                (fd, accepted)
            }
            Way::ToHost(listener, kind) => {
                let fd = guest.agent.socket(*kind)?;
                let address = host.own_address(*listener)?;
                guest
                    .agent
                    .connect(fd, HOST_CID, address.1)
                    .context("connect()")?;
                let accepted = host.accept(*listener).context("accept() of the host")?;
                let (cid, _) = host.peer_address(accepted)?;
                expect_eq("the CID that the host sees", cid, guest.cid())?;
                (accepted, fd)
            }
        };
        for (sender, from, receiver, to) in [
            (host, host_end, &guest.agent, guest_end),
            (&guest.agent, guest_end, host, host_end),
        ] {
            let text = format!("connection {seed:#x}");
            sender.send(from, &text)?;
            expect_eq("what comes", receiver.recv(to, 100)?, text)?;
        }
        Ok((host_end, guest_end))
    }
}

/// A connection that a migration has to reset.
struct Connection {
    name: String,
    doing: Doing,
    /// No two connections have the same, so nor do they have the same data.
    seed: u64,
    /// The guest's end; the listener where it was not accepted.
    guest: i32,
    host: i32,
}

/// The calls that are under way at both ends of a connection.
#[derive(Default)]
struct Calls {
    guest: Option<Pending>,
    host: Option<Pending>,
}

impl Connection {
    /// Lets the programs at both ends begin what they do.
    fn begin(&self, host: &Agent, guest: &Agent) -> Result<Calls> {
        let mut calls = Calls::default();
        match self.doing {
            Doing::WaitingForData => {
                calls.guest = Some(guest.start("recv", json!({"fd": self.guest, "len": 1})));
            }
            Doing::WaitingForRoom => {
                calls.guest = Some(guest.start_send_pattern_until_error(self.guest, self.seed));
                wait_for("the host's buffer to be full", || {
                    Ok(guest.poll(self.guest, libc::POLLOUT, Duration::ZERO)? == 0)
                })?;
            }
            Doing::Polling => {
                let params = json!({"fd": self.guest, "events": libc::POLLIN, "timeout_ms": -1});
                calls.guest = Some(guest.start("poll", params));
            }
            Doing::NothingThenReceives => {
                host.send(self.host, "unread")?;
                let poll = guest.poll(self.guest, libc::POLLIN, LIMIT)?;
                expect_eq("poll() for data", poll, libc::POLLIN)?;
            }
            Doing::NothingThenSends => (),
            Doing::Receiving => {
                calls.guest = Some(guest.start_recv_pattern_until_error(self.guest, self.seed));
                calls.host = Some(host.start_send_pattern_until_error(self.host, self.seed));
            }
            Doing::Sending => {
                calls.guest = Some(guest.start_send_pattern_until_error(self.guest, self.seed));
                calls.host = Some(host.start_recv_pattern_until_error(self.host, self.seed));
            }
            Doing::NotAccepted => {
                host.send(self.host, "unread")?;
            }
        }
        for call in [&calls.guest, &calls.host].into_iter().flatten() {
            call.expect_blocked(A_WHILE / 8)
                .context(self.name.clone())?;
        }
        Ok(calls)
    }

    /// That the guest's program learns of the reset, and that the host's does not wait for ever. Closes both ends. Returns
    /// how many bytes came until then, where the programs were sending and receiving.
    fn expect_reset(&self, calls: Calls, host: &Agent, guest: &Agent) -> Result<u64> {
        let result = self.expect_end(calls, guest);
        self.close(host, guest)?;
        result
    }

    fn expect_end(&self, calls: Calls, guest: &Agent) -> Result<u64> {
        let Calls {
            guest: of_guest,
            host: of_host,
        } = calls;
        let fd = self.guest;
        let blocked = of_guest.context("the guest's program has no call");
        match self.doing {
            Doing::WaitingForData => {
                expect_errno(
                    "the blocked recv()",
                    blocked?.wait::<String>(LIMIT),
                    "ECONNRESET",
                )?;
                expect_no_more(guest, fd)?;
            }
            Doing::WaitingForRoom => {
                expect_reset_of_pattern("the blocked send()", &blocked?.wait(LIMIT)?)?;
                expect_no_more_after_send(guest, fd)?;
            }
            Doing::Polling => {
                let poll: i16 = blocked?.wait(LIMIT)?;
                ensure!(
                    poll & libc::POLLERR != 0,
                    "the blocked poll() says {poll:#x}, without POLLERR"
                );
                expect_errno("recv() after poll()", guest.recv(fd, 1), "ECONNRESET")?;
                expect_no_more(guest, fd)?;
            }
            Doing::NothingThenReceives => expect_pollerr_and_reset(guest, fd)?,
            Doing::NothingThenSends => {
                expect_pollerr(guest, fd)?;
                expect_errno("send()", guest.send(fd, "x"), "ECONNRESET")?;
                expect_no_more_after_send(guest, fd)?;
            }
            Doing::NotAccepted => {
                let fd = guest.accept(fd).context("accept()")?;
                let result = expect_pollerr_and_reset(guest, fd);
                guest.close(fd)?;
                result?;
            }
            Doing::Receiving | Doing::Sending => {
                let of_guest: HowFar = blocked?.wait(LIMIT)?;
                let of_host = of_host.context("the host's program has no call")?;
                let of_host: HowFar = of_host.wait(LIMIT).context("the host's program")?;
                expect_reset_of_pattern("the guest's program", &of_guest)?;
                let (sent, received) = match self.doing {
                    Doing::Sending => (of_guest.bytes, of_host.bytes),
                    _ => (of_host.bytes, of_guest.bytes),
                };
                ensure!(
                    of_host
                        .error
                        .iter()
                        .all(|error| HOST_ERRORS.contains(&error.as_str())),
                    "the host's program: {:?}",
                    of_host.error
                );
                ensure!(
                    0 < received && received <= sent,
                    "{sent} bytes were sent, {received} came"
                );
                match self.doing {
                    Doing::Sending => expect_no_more_after_send(guest, fd)?,
                    _ => expect_no_more(guest, fd)?,
                }
                return Ok(received);
            }
        }
        Ok(0)
    }

    fn close(&self, host: &Agent, guest: &Agent) -> Result<()> {
        host.close(self.host)?;
        if self.doing != Doing::NotAccepted {
            guest.close(self.guest)?;
        }
        Ok(())
    }
}

fn expect_reset_of_pattern(what: &str, how_far: &HowFar) -> Result<()> {
    ensure!(
        how_far.error.as_deref() == Some("ECONNRESET"),
        "{what}: {:?} instead of ECONNRESET",
        how_far.error
    );
    Ok(())
}

fn expect_pollerr_and_reset(guest: &Agent, fd: i32) -> Result<()> {
    expect_pollerr(guest, fd)?;
    expect_errno("recv() after poll()", guest.recv(fd, 1), "ECONNRESET")?;
    expect_no_more(guest, fd)
}

/// What the program sees that was told of the reset: the end, as with TCP.
fn expect_no_more(guest: &Agent, fd: i32) -> Result<()> {
    expect_eq("recv() after that", guest.recv(fd, 1)?, String::new())?;
    expect_errno("send() after that", guest.send(fd, "x"), "EPIPE")
}

/// The same of a program that was told by a send(). The next one may tell it again.
fn expect_no_more_after_send(guest: &Agent, fd: i32) -> Result<()> {
    let next = guest.send(fd, "x");
    if !matches!(&next, Err(CallError::Errno(name)) if name == "ECONNRESET") {
        expect_errno("the next send()", next, "EPIPE")?;
    }
    expect_no_more(guest, fd)
}
