// SPDX-License-Identifier: GPL-2.0

//! A guest moves from one device to another, which is a process of its own, with other CIDs of the guest and of the host.
//! Programs of the host ask for the state of their connections, carry it over, and go on; the guest's programs notice
//! nothing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use serde_json::json;
use vsock_device::blob::{ConnectionBlob, Part};
use vsock_device::HOST_CID;

use crate::agent::Pending;
use crate::lab::{
    expect_eq, expect_errno, host_listener, restore, Guest, Lab, MovingGuest, CID_ANY, GUEST_CID,
    LIMIT, PORT, SEQPACKET, STREAM,
};
use crate::tests::traffic::{Amount, Kind, Traffic};

/// The port of the host that the guest connects to.
const HOST_PORT: u32 = 6666;

/// How often a guest moves, where nobody has said it.
const MIGRATIONS: u32 = 25;

/// How often one of two guests moves, where nobody has said it.
const MIGRATIONS_OF_ONE: u32 = 10;

/// The CID of the other one.
const STAYING_CID: u32 = 1_000_000;

/// The longest time between migrations, in milliseconds.
const LONGEST_PAUSE: u64 = 100;

/// Connections of all kinds through many migrations at random moments: not a byte is lost, doubled or out of order, and
/// what nobody carries over is reset.
pub fn traffic_goes_on(lab: &Lab) -> Result<()> {
    let (seed, migrations) = (lab.env.seed, lab.env.migrations.unwrap_or(MIGRATIONS));
    let mut random = fastrand::Rng::with_seed(seed);
    let mut guest = lab.moving_guest()?;
    let listener = guest.listener(PORT)?;
    let mut traffic = Traffic::begin(&guest, Kind::ALL)?;
    let mut moved = || -> Result<()> {
        let mut host_cid = HOST_CID;
        for round in 1..=migrations {
            // Earlier addresses do not come again, as the extension has it.
            let cid = if random.bool() {
                guest.cid
            } else {
                GUEST_CID + round
            };
            let new_host_cid = if random.bool() {
                host_cid
            } else {
                HOST_CID + 10_000 + u64::from(round)
            };
            let mut migration = Migration {
                lab,
                guest: &mut guest,
                traffic: &mut traffic,
                random: &mut random,
                listener,
                host_cid,
            };
            migration
                .carry_out(cid, new_host_cid)
                .with_context(|| format!("migration {round} of {migrations}"))?;
            host_cid = new_host_cid;
        }
        Ok(())
    };
    let result = moved().and_then(|()| {
        let amount = traffic.end(&guest)?;
        let kept = guest.counter("kept_connections")?;
        let should = i64::from(migrations) * Kind::ALL.len() as i64;
        expect_eq("connections that went on", kept, should)?;
        if lab.env.migrations.is_some() {
            let Amount { bytes, messages } = amount;
            println!(
                "note: {migrations} migrations, {} MiB and {messages} messages",
                bytes >> 20
            );
        }
        Ok(())
    });
    result.with_context(|| {
        format!("the same moments: scripts/harness run --migrations {migrations} --seed {seed} migration::traffic_goes_on")
    })
}

/// One of many migrations, with what happens beside the traffic.
struct Migration<'a, 'b> {
    lab: &'a Lab<'b>,
    guest: &'a mut MovingGuest,
    traffic: &'a mut Traffic,
    random: &'a mut fastrand::Rng,
    listener: i32,
    host_cid: u64,
}

/// A connection whose program does not carry it over as it is.
struct Left {
    fd: i32,
    stream: UnixStream,
    host_port: u32,
    /// Whether its state is handed in for another connection, which the guest does not have.
    is_changed: bool,
}

impl Migration<'_, '_> {
    fn carry_out(&mut self, cid: u32, host_cid: u64) -> Result<()> {
        if self.random.bool() {
            std::thread::sleep(Duration::from_millis(self.random.u64(..LONGEST_PAUSE)));
        }
        let left = self
            .random
            .bool()
            .then(|| self.connection_to_leave())
            .transpose()?;
        let _host_listener = self.guest.host_listener(HOST_PORT)?;
        let attempt = self
            .random
            .bool()
            .then(|| self.begin_attempt())
            .transpose()?;
        let mut monitor = match self.random.bool() {
            true => Some(self.guest.machine.monitor()?),
            false => None,
        };

        let destination = self.lab.destination(cid, host_cid)?;
        let uds = destination.uds.clone();
        if let Some(monitor) = &mut monitor {
            monitor.pause()?;
        }
        self.guest.stop()?;
        self.traffic.move_to(self.guest, &uds, self.random)?;
        let left = left.map(|left| self.leave(left, &uds)).transpose()?;
        let _new_host_listener = host_listener(&uds, HOST_PORT)?;
        self.guest.go_on(destination)?;
        if let Some(monitor) = &mut monitor {
            monitor.resume()?;
        }
        self.traffic.work();

        if let Some(Left {
            fd,
            mut stream,
            is_changed,
            ..
        }) = left
        {
            let recv = self.guest.recv(fd, 1);
            expect_errno("recv() on what was left", recv, "ECONNRESET")?;
            self.guest.close(fd)?;
            if is_changed {
                let read = stream.read(&mut [0]).context("the end of no connection")?;
                expect_eq("bytes of no connection", read, 0)?;
            }
        }
        if let Some((fd, attempt)) = attempt {
            match attempt.wait::<()>(LIMIT) {
                Ok(()) => {}
                refused => expect_errno("connect()", refused, "ECONNRESET")?,
            }
            self.guest.close(fd)?;
        }
        if self.random.bool() {
            self.new_connection(host_cid)?;
        }
        Ok(())
    }

    fn connection_to_leave(&mut self) -> Result<Left> {
        let (stream, host_port) = self.guest.connect_from_host_port(PORT)?;
        Ok(Left {
            fd: self.guest.accept(self.listener)?,
            stream,
            host_port,
            is_changed: self.random.bool(),
        })
    }

    /// Forgets a connection, or makes it another one that the guest does not have.
    fn leave(&self, left: Left, uds: &Path) -> Result<Left> {
        if !left.is_changed {
            return Ok(left);
        }
        let mut blob = ConnectionBlob::parse(&self.guest.checkpoint(left.host_port, PORT)?)?;
        blob.host_port += 1 << 20;
        let stream = restore(uds, &blob.to_bytes())?;
        Ok(Left { stream, ..left })
    }

    /// Lets the guest begin to connect to the host.
    fn begin_attempt(&self) -> Result<(i32, Pending)> {
        let fd = self.guest.socket(STREAM)?;
        let host_cid = u32::try_from(self.host_cid)?;
        Ok((fd, self.guest.start_connect(fd, host_cid, HOST_PORT)))
    }

    fn new_connection(&self, host_cid: u64) -> Result<()> {
        let _stream = self
            .guest
            .connect_from_host(PORT)
            .context("a new connection")?;
        let fd = self.guest.accept(self.listener)?;
        let (own, peer) = (self.guest.own_address(fd)?, self.guest.peer_address(fd)?);
        expect_eq("the guest's CID", own.0, self.guest.cid)?;
        expect_eq("the host's CID", u64::from(peer.0), host_cid)?;
        self.guest.close(fd)?;
        Ok(())
    }
}

/// One of two guests moves that have connections to each other: both are told, and the one that stays keeps its CID, and
/// its other connections.
pub fn one_of_two_guests(lab: &Lab) -> Result<()> {
    let migrations = lab.env.migrations.unwrap_or(MIGRATIONS_OF_ONE);
    let seed = lab.env.seed;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut moving = lab.moving_guest()?;
    let staying = lab.staying_guest(STAYING_CID)?;
    let host_listener = staying.listener(HOST_PORT)?;
    let mut host_stream = staying.connect_from_host(HOST_PORT)?;
    let host_fd = staying.accept(host_listener)?;
    let mut ways = Vec::new();
    for (kind, send, receive, port) in [
        (STREAM, "send_pattern", "recv_pattern", PORT),
        (SEQPACKET, "send_messages", "recv_messages", PORT + 1),
    ] {
        let listener = moving.socket(kind)?;
        moving.bind(listener, CID_ANY, port)?;
        moving.listen(listener, 1)?;
        let staying_fd = staying.socket(kind)?;
        staying.connect(staying_fd, moving.cid, port)?;
        let moving_fd = moving.accept(listener)?;
        let to_staying = json!({"fd": moving_fd, "seed": 0});
        let from_moving = json!({"fd": staying_fd, "seed": 0});
        let to_moving = json!({"fd": staying_fd, "seed": 1});
        let from_staying = json!({"fd": moving_fd, "seed": 1});
        ways.push(Way {
            fd: moving_fd,
            is_from_staying: false,
            sending: moving.start(send, to_staying),
            receiving: staying.start(receive, from_moving),
        });
        ways.push(Way {
            fd: staying_fd,
            is_from_staying: true,
            sending: staying.start(send, to_moving),
            receiving: moving.start(receive, from_staying),
        });
    }
    let moved = || -> Result<()> {
        for round in 1..=migrations {
            if random.bool() {
                std::thread::sleep(Duration::from_millis(random.u64(..LONGEST_PAUSE)));
            }
            // Earlier addresses do not come again, as the extension has it.
            let cid = if random.bool() {
                moving.cid
            } else {
                GUEST_CID + round
            };
            let destination = lab.near_destination(cid)?;
            moving.stop()?;
            moving.go_on(destination)?;
        }
        for way in ways {
            let sender = if way.is_from_staying {
                &staying
            } else {
                &*moving
            };
            way.end(sender)?;
        }
        Ok(())
    };
    moved()
        .with_context(|| format!("the same moments: --migrations {migrations} --seed {seed}"))?;
    host_stream.write_all(b"still there")?;
    let still_there = staying.recv(host_fd, 99)?;
    expect_eq("recv()", still_there, "still there".to_owned())?;
    for (guest, connections) in [(&*moving, 2), (&staying, 3)] {
        expect_eq("updates refused", guest.counter("refused_updates")?, 0)?;
        expect_eq(
            "connections that went on",
            guest.counter("kept_connections")?,
            connections * i64::from(migrations),
        )?;
    }
    let cid = staying.local_cid()?;
    expect_eq("the CID of the guest that stayed", cid, STAYING_CID)
}

/// One direction of a connection between guests.
struct Way {
    fd: i32,
    is_from_staying: bool,
    sending: Pending,
    receiving: Pending,
}

impl Way {
    /// Ends it, and compares what was sent with what came.
    fn end(self, sender: &Guest) -> Result<()> {
        let asked = sender.end_sending(self.fd);
        let sent: u64 = self.sending.wait(LIMIT).context("a sender")?;
        asked?;
        sender.shutdown(self.fd, libc::SHUT_WR)?;
        let received: u64 = self.receiving.wait(LIMIT).context("a receiver")?;
        ensure!(sent > 0, "nothing was sent");
        expect_eq("what has come", received, sent)
    }
}

/// Connections of some kinds through migrations; `after_each` is called with the guest after each of them. Returns what
/// came in all.
pub fn carry_traffic(
    lab: &Lab,
    guest: &mut MovingGuest,
    (kinds, migrations): (&[Kind], u32),
    mut after_each: impl FnMut(&Guest) -> Result<()>,
) -> Result<Amount> {
    let mut traffic = Traffic::begin(guest, kinds)?;
    for _ in 0..migrations {
        std::thread::sleep(Duration::from_millis(LONGEST_PAUSE));
        let destination = lab.destination(guest.cid + 1, HOST_CID)?;
        guest.stop()?;
        traffic.move_to(guest, &destination.uds, &mut fastrand::Rng::new())?;
        guest.go_on(destination)?;
        traffic.work();
        after_each(guest)?;
    }
    traffic.end(guest)
}

/// States that no device has written: refused with the reason, and nothing else happens.
pub fn bad_states(lab: &Lab) -> Result<()> {
    let mut guest = lab.moving_guest()?;
    let listener = guest.listener(PORT)?;
    let (stream, host_port) = guest.connect_from_host_port(PORT)?;
    let fd = guest.accept(listener)?;
    let destination = lab.destination(GUEST_CID + 1, HOST_CID)?;
    let uds = destination.uds.clone();
    guest.stop()?;
    let state = guest.checkpoint(host_port, PORT)?;
    drop(stream);
    let good = ConnectionBlob::parse(&state)?;
    let changed = |change: &dyn Fn(&mut ConnectionBlob)| {
        let mut blob = good.clone();
        change(&mut blob);
        blob.to_bytes()
    };
    let mut cut = state.clone();
    cut.truncate(state.len() - 1);
    let mut long = state.clone();
    long.push(0);
    let version = state
        .windows(8)
        .position(|at| at == b"\x67version")
        .context("the state has no version")?;
    let mut newer = state.clone();
    newer[version + 8] = 3;
    let bad = [
        ("no connection's state", Vec::new()),
        ("no connection's state", b"nonsense".to_vec()),
        ("no connection's state", cut),
        ("too many", long),
        ("version 3", newer),
        (
            "not those of a connection",
            changed(&|blob| blob.guest_cid = 0),
        ),
        (
            "not those of a connection",
            changed(&|blob| blob.host_cid = blob.guest_cid),
        ),
        ("no socket type 9", changed(&|blob| blob.socket_type = 9)),
        ("two directions", changed(&|blob| blob.guest_shutdown = 4)),
        (
            "more than the buffer",
            changed(&|blob| {
                blob.received = vec![Part {
                    payload: vec![0; 300_000],
                    flags: 0,
                }];
            }),
        ),
        (
            "no such connections",
            changed(&|blob| blob.buf_alloc = 1 << 30),
        ),
    ];
    for (reason, state) in bad {
        let refused = restore(&uds, &state)
            .err()
            .with_context(|| format!("{reason}: taken"))?;
        let said = format!("{refused:#}");
        ensure!(said.contains(reason), "{said:?} does not say {reason:?}");
    }
    let mut stream = restore(&uds, &state)?;
    let twice = restore(&uds, &state)
        .err()
        .context("the same state, twice: taken")?;
    ensure!(format!("{twice:#}").contains("here already"), "{twice:#}");
    guest.go_on(destination)?;
    stream.write_all(b"as if nothing had happened")?;
    expect_eq(
        "recv()",
        guest.recv(fd, 99)?,
        "as if nothing had happened".to_owned(),
    )?;
    let late = restore(&guest.uds, &state)
        .err()
        .context("a state after the start: taken")?;
    ensure!(format!("{late:#}").contains("has begun"), "{late:#}");
    expect_eq(
        "connections that went on",
        guest.counter("kept_connections")?,
        1,
    )
}

/// A guest moves whose driver and device have not agreed on the extension: its connections are reset, those too that a program
/// of the host has carried over, and its listener is reached at the new CID.
pub fn without_the_extension(lab: &Lab) -> Result<()> {
    let mut guest = lab.moving_guest_without_checkpoint()?;
    let listener = guest.listener(PORT)?;
    let (_left_behind, host_port) = guest.connect_from_host_port(PORT)?;
    let fd = guest.accept(listener)?;
    let reading = guest.start("recv", json!({"fd": fd, "len": 1}));
    let cid = GUEST_CID + 1;
    let destination = lab.destination(cid, HOST_CID)?;
    guest.stop()?;
    let state = guest.checkpoint(host_port, PORT)?;
    let mut carried_over = restore(&destination.uds, &state)?;
    guest.go_on(destination)?;
    expect_errno("recv()", reading.wait::<String>(LIMIT), "ECONNRESET")?;
    let read = carried_over.read(&mut [0])?;
    expect_eq("what the host's program reads", read, 0)?;
    expect_eq("the guest's CID", guest.local_cid()?, cid)?;
    let stream = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    drop(stream);
    expect_eq(
        "the end of a new connection",
        guest.recv(fd, 1)?,
        String::new(),
    )
}

/// That a uevent and the device's folder in sysfs say the same of a migration.
pub(super) fn expect_told(guest: &Guest, uevents: i32, expected: &[(&str, &str)]) -> Result<()> {
    let told = guest.next_migration(uevents)?;
    for (name, value) in expected {
        let is = told.get(*name).map(String::as_str);
        expect_eq(&format!("{name} in the uevent"), is, Some(*value))?;
        let file = name.to_lowercase();
        let shown = guest.sh(&format!("cat /sys/bus/virtio/devices/*/migration/{file}"))?;
        expect_eq(&format!("{file} in sysfs"), shown.trim(), *value)?;
    }
    Ok(())
}

/// Programs learn of resets and migrations: what it was, which CIDs, how many connections, and that it was another one.
pub fn told_to_programs(lab: &Lab) -> Result<()> {
    let mut guest = lab.moving_guest()?;
    let uevents = guest.uevent_socket()?;
    let none = guest.sh("cat /sys/bus/virtio/devices/*/migration/cause")?;
    expect_eq("the cause before any", none.trim(), "none")?;
    let listener = guest.listener(PORT)?;
    let _streams = [
        guest.connect_from_host(PORT)?,
        guest.connect_from_host(PORT)?,
    ];
    guest.accept(listener)?;
    guest.device.transport_reset(u64::from(GUEST_CID + 7));
    expect_told(
        &guest,
        uevents,
        &[
            ("CAUSE", "transport-reset"),
            ("GENERATION", "1"),
            ("OLD_CID", "3"),
            ("NEW_CID", "10"),
            ("CONNECTIONS_RESET", "2"),
            ("CONNECTIONS_KEPT", "0"),
        ],
    )?;
    guest.close(listener)?;
    let kinds: &[_] = &[Kind::BothWays, Kind::Messages];
    carry_traffic(lab, &mut guest, (kinds, 1), |guest| {
        expect_told(
            guest,
            uevents,
            &[
                ("CAUSE", "cid-update"),
                ("GENERATION", "2"),
                ("OLD_CID", "10"),
                ("NEW_CID", "4"),
                ("CONNECTIONS_RESET", "0"),
                ("CONNECTIONS_KEPT", "2"),
            ],
        )
    })?;
    Ok(())
}
