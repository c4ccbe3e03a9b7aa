// SPDX-License-Identifier: GPL-2.0

//! Connections share a device and the guest's memory: none of them takes more than its part.

use std::time::Instant;

use anyhow::{bail, ensure, Context, Result};
use serde_json::json;
use vsock_device::packet::{SEQ_EOM, TYPE_SEQPACKET};
use vsock_device::{Op, Packet};

use crate::lab::{
    expect_eq, wait_for, Guest, Lab, Peer, BULK_LIMIT, CID_ANY, LIMIT, PORT, SEQPACKET, STREAM,
};
use crate::machine::{Hardware, DEFAULT_RING};

/// Makes a connection from a port of the host to a listener.
fn connect(guest: &Guest, peer: &Peer, listener: i32, host_port: u32) -> Result<i32> {
    guest.device.inject(Packet {
        src_port: host_port,
        ..peer.packet(Op::REQUEST)
    });
    peer.expect(Op::RESPONSE)?;
    Ok(guest.accept(listener)?)
}

/// Connections with thousands of small packets that wait do not keep another one waiting for all of them.
pub fn fairness(lab: &Lab) -> Result<()> {
    const BUSY: u32 = 3;
    const MANY: u64 = 2000;
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::watch(&guest);
    let busy: Vec<i32> = (1..=BUSY)
        .map(|host_port| connect(&guest, &peer, listener, host_port))
        .collect::<Result<_>>()?;
    let modest_port = BUSY + 1;
    let modest = connect(&guest, &peer, listener, modest_port)?;

    guest.device.hold_tx(true);
    for fd in busy {
        let sent: u64 = guest.start_send_small(fd, MANY).wait(LIMIT)?;
        expect_eq("small packets sent", sent, MANY)?;
    }
    expect_eq("send() of the other", guest.send(modest, "x")?, 1)?;
    guest.device.hold_tx(false);

    let is_other = |packet: &Packet| packet.op == Op::RW && packet.dst_port == modest_port;
    let mut before = 0;
    while !is_other(&peer.next("the packet of the other connection")?) {
        before += 1;
    }
    let ring = usize::from(DEFAULT_RING);
    ensure!(
        before <= ring + BUSY as usize,
        "{before} packets came before that of the other connection; more than {ring}, which the device had, and one of each of {BUSY}"
    );
    for at in before..BUSY as usize * MANY as usize {
        peer.expect(Op::RW)
            .with_context(|| format!("small packet {at}"))?;
    }
    Ok(())
}

/// Packets of different connections that waited for room come in each connection's order, its end last.
pub fn order_is_kept(lab: &Lab) -> Result<()> {
    const CONNECTIONS: u32 = 20;
    const PACKETS: usize = 50;
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::watch(&guest);
    let mut fds = Vec::new();
    let first_port = peer.packet(Op::REQUEST).src_port;
    for at in 0..CONNECTIONS {
        fds.push(connect(&guest, &peer, listener, first_port + at)?);
    }
    guest.device.hold_tx(true);
    for at in 0..PACKETS {
        for fd in &fds {
            let text = format!("packet {at}");
            expect_eq("send()", guest.send(*fd, &text)?, text.len())?;
        }
    }
    for fd in &fds {
        guest.shutdown(*fd, libc::SHUT_WR)?;
    }
    guest.device.hold_tx(false);
    let mut came = vec![0; CONNECTIONS as usize];
    for _ in 0..CONNECTIONS as usize * (PACKETS + 1) {
        let packet = peer.next("a packet that waited")?;
        let of = &mut came[(packet.dst_port - first_port) as usize];
        if *of < PACKETS {
            expect_eq("what it is", packet.op, Op::RW)?;
            let text = String::from_utf8_lossy(&packet.payload).into_owned();
            expect_eq("its payload", text, format!("packet {of}"))?;
        } else {
            expect_eq("the last", packet.op, Op::SHUTDOWN)?;
        }
        *of += 1;
    }
    expect_eq(
        "packets of each",
        came,
        vec![PACKETS + 1; CONNECTIONS as usize],
    )
}

/// `SO_MEMINFO` (level `SOL_SOCKET`), and where the receive memory is in what it returns.
const SO_MEMINFO: i32 = 55;
const SK_MEMINFO_RMEM_ALLOC: usize = 0;
const SK_MEMINFO_VARS: usize = 9;

/// Memory that a socket's received packets take, in bytes.
fn receive_memory(guest: &Guest, fd: i32) -> Result<usize> {
    let info = guest.option(fd, libc::SOL_SOCKET, SO_MEMINFO, SK_MEMINFO_VARS * 4)?;
    let at = SK_MEMINFO_RMEM_ALLOC * 4;
    let value = info.get(at..at + 4).context("SO_MEMINFO is too short")?;
    Ok(u32::from_ne_bytes(value.try_into()?) as usize)
}

/// A peer that fills the receive buffer with packets of one byte, or with such that no two of them share a page, makes the guest
/// hold little more than the buffer.
pub fn memory_of_small_packets(lab: &Lab) -> Result<()> {
    // A little more than half of what a receive buffer has room for.
    const HALF_A_PAGE: i32 = 2048;
    for (kind, len) in [
        (STREAM, 1),
        (SEQPACKET, 1),
        (STREAM, HALF_A_PAGE),
        (SEQPACKET, HALF_A_PAGE),
    ] {
        let guest = lab.guest()?;
        let listener = guest.socket(kind)?;
        let buffer = 64 * 1024;
        // SO_VM_SOCKETS_BUFFER_SIZE, which connections of the listener have, too.
        let size = (buffer as u64).to_ne_bytes();
        guest.set_option(listener, libc::AF_VSOCK, 0, &size)?;
        guest.bind(listener, CID_ANY, PORT)?;
        guest.listen(listener, 1)?;
        let peer = Peer::connect_kind(&guest, kind)?;
        let fd = guest.accept(listener)?;
        let mut small = peer.packet(Op::RW);
        small.payload = vec![b'x'; len as usize];
        if kind == SEQPACKET {
            small.socket_type = TYPE_SEQPACKET;
            small.flags = SEQ_EOM;
        }
        let available = guest.available_memory()?;
        for _ in 0..buffer / len {
            guest.device.inject(small.clone());
        }
        guest.device.wait_delivered(BULK_LIMIT)?;
        wait_for("the guest to have received them", || {
            Ok(guest.siocinq(fd)? == buffer)
        })?;
        let memory = receive_memory(&guest, fd)?;
        // The bound of Documentation/data-path.md.
        let bound = 5 * buffer as usize + 4096;
        ensure!(
            (buffer as usize..=bound).contains(&memory),
            "{buffer} bytes in packets of {len} take {memory} bytes of memory, the bound is {bound}"
        );
        // A buffer for each byte would take 256 MiB.
        let taken = available - guest.available_memory()?;
        ensure!(
            taken < 32 * 1024,
            "{taken} KiB are gone, though the socket has but {memory} bytes"
        );
        // Nothing of it is lost, and its memory comes back.
        let reading = json!({"fd": fd, "count": buffer});
        let (read, most): (i32, usize) = guest.start("recv_small", reading).wait(BULK_LIMIT)?;
        expect_eq("bytes that were read", read, buffer)?;
        if kind == SEQPACKET {
            expect_eq("the longest message", most, len as usize)?;
        }
        let memory = receive_memory(&guest, fd)?;
        expect_eq("memory of what was received", memory, 0)?;
        lab.end_machines()?;
    }
    Ok(())
}

/// A host that asks for connections to a closed port, faster than they can be refused, leaves a program its part of the CPU.
pub fn cpu_in_a_flood(lab: &Lab) -> Result<()> {
    const REQUESTS_AT_A_TIME: u32 = 20_000;
    /// Of the kernel, so that a tick more or less does not matter.
    const ENOUGH_TICKS: u64 = 100;
    let guest = lab.guest_on(&Hardware {
        kernel_parameters: "maxcpus=1",
        ..Hardware::default()
    })?;
    let mut peer = Peer::watch(&guest);
    let script = "echo $$ >/tmp/program; while :; do :; done";
    let _program = guest.start("sh", json!({"script": script}));
    guest.sh("until [ -s /tmp/program ]; do sleep 0.1; done")?;
    let before = CpuTime::of(&guest)?;
    let (mut kernel, mut program) = (0, 0);
    let end = Instant::now() + LIMIT;
    // Without a pause, in which the program would have the CPU for itself.
    while kernel < ENOUGH_TICKS {
        ensure!(
            Instant::now() < end,
            "waited {} s for a flood that takes long enough",
            LIMIT.as_secs()
        );
        for host_port in 1..=REQUESTS_AT_A_TIME {
            peer.set_ports(host_port, PORT);
            peer.send(Op::REQUEST);
        }
        for _ in 0..REQUESTS_AT_A_TIME {
            peer.expect(Op::RST)?;
        }
        let now = CpuTime::of(&guest)?;
        kernel = now.kernel - before.kernel;
        program = now.programs - before.programs;
    }
    guest.sh("kill -KILL $(cat /tmp/program)")?;
    ensure!(
        program >= kernel / 3,
        "while the kernel had {kernel} ticks of the CPU, a program that never sleeps had {program}"
    );
    Ok(())
}

/// Who has had the CPU since the guest has started, in ticks.
struct CpuTime {
    programs: u64,
    /// Interrupts included.
    kernel: u64,
}

impl CpuTime {
    fn of(guest: &Guest) -> Result<Self> {
        let stat = guest.sh("read line </proc/stat; echo \"$line\"")?;
        let ticks: Vec<u64> = stat
            .split_whitespace()
            .skip(1)
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks[..] else {
            bail!("{stat:?} has too few numbers");
        };
        Ok(Self {
            programs: user + nice,
            kernel: system + irq + softirq,
        })
    }
}
