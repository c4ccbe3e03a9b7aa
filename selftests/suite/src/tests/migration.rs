// SPDX-License-Identifier: GPL-2.0

//! A guest moves from one device to another, with other CIDs of the guest and of the host. Programs of the host ask for
//! the state of their connections, carry it over, and go on; the guest's programs notice nothing.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{anyhow, ensure, Context, Result};
use vsock_device::blob::ConnectionBlob;
use vsock_device::update::FEATURE_CHECKPOINT;
use vsock_device::HOST_CID;

use crate::lab::{expect_eq, expect_errno, restore, Guest, Lab, GUEST_CID, LIMIT, PORT};
use crate::machine::Hardware;
use crate::pattern;

/// The port of the guest's program that has the streams.
const STREAMS_PORT: u32 = 5555;

/// How much a program of the host sends or receives at once, in bytes.
const PART: usize = 32 * 1024;

fn guest(lab: &Lab) -> Result<Guest> {
    lab.guest_on(&Hardware {
        features: FEATURE_CHECKPOINT,
        ..Hardware::default()
    })
}

/// A program of the host in the middle of a stream each way: what it has sent and received so far.
struct Program {
    stream: UnixStream,
    host_port: u32,
    /// How long each stream is in all, in bytes.
    len: u64,
    sent: u64,
    received: u64,
    seed: u64,
}

/// A program that sends and receives until it is told that the guest moves.
struct Working {
    stop: Sender<()>,
    thread: JoinHandle<Result<Program>>,
}

impl Working {
    fn begin(program: Program) -> Self {
        let (stop, stopped) = channel();
        Self {
            stop,
            thread: std::thread::spawn(move || program.work(&stopped)),
        }
    }

    fn end(self) -> Result<Program> {
        // It may have ended with an error before.
        let _ = self.stop.send(());
        self.thread
            .join()
            .map_err(|_| anyhow!("a thread panicked"))?
    }
}

impl Program {
    fn work(mut self, stop: &Receiver<()>) -> Result<Self> {
        self.stream.set_nonblocking(true)?;
        let mut buffer = vec![0; PART];
        while stop.try_recv().is_err() {
            let sent = self.send(&mut buffer)?;
            let received = self.receive(&mut buffer)?;
            if !sent && !received {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        self.stream.set_nonblocking(false)?;
        Ok(self)
    }

    /// Sends what there is room for; returns whether there was some.
    fn send(&mut self, buffer: &mut [u8]) -> Result<bool> {
        let len = (self.len - self.sent).min(buffer.len() as u64) as usize;
        pattern::fill(&mut buffer[..len], self.seed, self.sent);
        match self.stream.write(&buffer[..len]) {
            Ok(len) => {
                self.sent += len as u64;
                Ok(len > 0)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error).context("the host's program sends"),
        }
    }

    /// Takes what there is; returns whether there was something.
    fn receive(&mut self, buffer: &mut [u8]) -> Result<bool> {
        match (&self.stream).read(buffer) {
            Ok(len) => {
                let wrong = pattern::first_difference(&buffer[..len], self.seed + 1, self.received);
                ensure!(
                    wrong.is_none(),
                    "byte {wrong:?} of the guest's stream is wrong"
                );
                self.received += len as u64;
                Ok(len > 0)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error).context("the host's program receives"),
        }
    }

    /// Reads to the end of its socket, asks for the state, and goes on with another socket.
    fn move_to(mut self, guest: &Guest, uds: &Path) -> Result<Self> {
        let host_port = self.host_port;
        let asked = std::thread::scope(|scope| {
            let asking = scope.spawn(|| guest.checkpoint(host_port, STREAMS_PORT));
            // The device has to get rid of what it has begun to write.
            let mut buffer = vec![0; PART];
            let stream = self.stream.try_clone()?;
            stream.set_read_timeout(Some(LIMIT))?;
            while self.receive(&mut buffer)? {}
            asking.join().map_err(|_| anyhow!("a thread panicked"))?
        });
        let state = asked.context("the state of a connection")?;
        self.stream = restore(uds, &state)?;
        Ok(self)
    }
}

/// Runs programs at the host, each with a stream of `len` bytes to the guest and one from it, while the guest moves, and
/// checks every byte. `after_each` is called with the guest after each migration, and the CIDs that it and the host have.
pub fn carry_streams(
    lab: &Lab,
    guest: &mut Guest,
    (programs, migrations, len): (u64, u32, u64),
    mut after_each: impl FnMut(&Guest, u32, u64) -> Result<()>,
) -> Result<()> {
    let listener = guest.listener(STREAMS_PORT)?;
    let mut resting = Vec::new();
    let mut moving = Vec::new();
    let mut fds = vec![listener];
    for at in 0..programs {
        let (stream, host_port) = guest.connect_from_host_port(STREAMS_PORT)?;
        let fd = guest.accept(listener)?;
        fds.push(fd);
        let seed = at * 2;
        moving.push(guest.start_recv_pattern(fd, seed, len));
        moving.push(guest.start_send_pattern(fd, seed + 1, len));
        resting.push(Program {
            stream,
            host_port,
            len,
            sent: 0,
            received: 0,
            seed,
        });
    }
    for round in 1..=migrations {
        let working: Vec<_> = resting.drain(..).map(Working::begin).collect();
        // A moment of traffic, another one each time.
        std::thread::sleep(Duration::from_millis(u64::from(round * 37 % 101)));
        let cid = guest.cid + 1;
        let host_cid = HOST_CID + 1000 + u64::from(round);
        let (destination, uds) = lab.destination(guest, cid, host_cid)?;
        guest.device.stop(LIMIT)?;
        for program in working {
            resting.push(program.end()?.move_to(guest, &uds)?);
        }
        guest.move_to(destination, cid, uds);
        after_each(guest, cid, host_cid)?;
    }
    let working: Vec<_> = resting.drain(..).map(Working::begin).collect();
    for moved in moving {
        expect_eq("bytes moved", moved.wait::<u64>(LIMIT)?, len)?;
    }
    for program in working {
        let mut program = program.end()?;
        let mut buffer = vec![0; PART];
        while program.received < len && program.receive(&mut buffer)? {}
        expect_eq(
            "what the host's program has sent and received",
            (program.sent, program.received),
            (len, len),
        )?;
    }
    for fd in fds {
        guest.close(fd)?;
    }
    Ok(())
}

/// Streams both ways through many migrations: not a byte is lost, doubled or out of order.
pub fn streams_go_on(lab: &Lab) -> Result<()> {
    let mut guest = guest(lab)?;
    let listener = guest.listener(PORT)?;
    // One that nobody carries over.
    let _left = guest.connect_from_host(PORT)?;
    let left = guest.accept(listener)?;
    // Enough to last for all migrations; some kernels are slow.
    let len = if lab.env.has_option("CONFIG_KASAN") {
        8 << 20
    } else {
        96 << 20
    };
    carry_streams(lab, &mut guest, (3, 50, len), |guest, cid, host_cid| {
        let _stream = guest.connect_from_host(PORT).context("a new connection")?;
        let fd = guest.accept(listener)?;
        let (own, peer) = (guest.own_address(fd)?, guest.peer_address(fd)?);
        expect_eq("the guest's CID", own.0, cid)?;
        expect_eq("the host's CID", u64::from(peer.0), host_cid)?;
        guest.close(fd)?;
        Ok(())
    })?;
    expect_errno("recv() on what was left", guest.recv(left, 1), "ECONNRESET")?;
    // All others went on, each time.
    expect_eq(
        "connections that went on",
        guest.counter("kept_connections")?,
        3 * 50,
    )?;
    expect_eq(
        "connections that were reset",
        guest.counter("reset_connections")? >= 1,
        true,
    )
}

/// States that no device has written: refused with the reason, and nothing else happens.
pub fn bad_states(lab: &Lab) -> Result<()> {
    let mut guest = guest(lab)?;
    let listener = guest.listener(PORT)?;
    let (stream, host_port) = guest.connect_from_host_port(PORT)?;
    let fd = guest.accept(listener)?;
    let (destination, uds) = lab.destination(&guest, GUEST_CID + 1, HOST_CID)?;
    guest.device.stop(LIMIT)?;
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
    newer[version + 8] = 2;
    let bad = [
        ("no connection's state", Vec::new()),
        ("no connection's state", b"nonsense".to_vec()),
        ("no connection's state", cut),
        ("too many", long),
        ("version 2", newer),
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
            changed(&|blob| blob.received = vec![0; 300_000]),
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
    guest.move_to(destination, GUEST_CID + 1, uds);
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

/// That a uevent and the device's folder in sysfs say the same of a migration.
fn expect_told(guest: &Guest, uevents: i32, expected: &[(&str, &str)]) -> Result<()> {
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
    let mut guest = guest(lab)?;
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
    carry_streams(lab, &mut guest, (2, 1, 1 << 20), |guest, _, _| {
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
    })
}
