// SPDX-License-Identifier: GPL-2.0

//! Whoever looks at sockets from outside: captures, tracepoints, diagnostics, BPF programs.

use std::io::{Read, Write};

use anyhow::{ensure, Context, Result};
use serde_json::json;

use vsock_device::packet::Op;

use crate::lab::{expect_eq, wait_for, Guest, Lab, Peer, GUEST_CID, LIMIT, PORT};
use crate::sockets::{ESTABLISHED, LISTEN};
use crate::Driver;

const HOST_CID: u32 = vsock_device::HOST_CID as u32;

/// Ports of the host of connections that test packets one by one.
const KEPT_PORT: u32 = 5000;
const RESET_PORT: u32 = 5001;

/// `struct af_vsockmon_hdr`: addresses, what the packet is for, and what follows.
const MONITOR_HEADER: usize = 32;

/// A packet as a vsockmon device gives it.
#[derive(Debug, PartialEq, Eq)]
struct Captured {
    source: (u64, u32),
    destination: (u64, u32),
    purpose: u16,
    operation: u16,
    payload: Vec<u8>,
}

impl Captured {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let u16_at = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let header_len = usize::from(u16_at(28)?);
        Some(Self {
            source: (u64_at(0)?, u32_at(16)?),
            destination: (u64_at(8)?, u32_at(20)?),
            purpose: u16_at(24)?,
            operation: u16_at(MONITOR_HEADER + 30)?,
            payload: bytes.get(MONITOR_HEADER + header_len..)?.to_vec(),
        })
    }
}

/// A packet socket on a vsockmon device.
fn start_capture(guest: &Guest) -> Result<i32> {
    guest.sh("ip link add name vsockmon0 type vsockmon && ip link set vsockmon0 up")?;
    Ok(guest
        .start("packet_socket", json!({"interface": "vsockmon0"}))
        .wait(LIMIT)?)
}

/// The next packet on a packet socket that is for `operation`.
fn next_capture(guest: &Guest, fd: i32, operation: u16) -> Result<Captured> {
    loop {
        let bytes: Vec<u8> = guest
            .start("recv_bytes", json!({"fd": fd, "len": 65536}))
            .wait(LIMIT)
            .with_context(|| format!("waiting for a capture of operation {operation}"))?;
        let captured = Captured::parse(&bytes).context("a capture that is too short")?;
        if captured.operation == operation {
            return Ok(captured);
        }
    }
}

/// A vsockmon device captures packets in both directions, in the format of its header.
pub fn vsockmon(lab: &Lab) -> Result<()> {
    const REQUEST: u16 = 1;
    const RESPONSE: u16 = 2;
    const RST: u16 = 3;
    const RW: u16 = 5;
    let guest = lab.guest_with_modules(&["vsockmon"])?;
    let capture = start_capture(&guest)?;
    let listener = guest.listener(PORT)?;
    let mut stream = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    let request = next_capture(&guest, capture, REQUEST)?;
    let host = request.source;
    let own = (u64::from(GUEST_CID), PORT);
    let packet = |source, destination, purpose, operation, payload: &[u8]| Captured {
        source,
        destination,
        purpose,
        operation,
        payload: payload.to_vec(),
    };
    expect_eq("the request", request, packet(host, own, 1, REQUEST, b""))?;
    expect_eq("the host's CID", host.0, u64::from(HOST_CID))?;
    expect_eq(
        "the response",
        next_capture(&guest, capture, RESPONSE)?,
        packet(own, host, 1, RESPONSE, b""),
    )?;
    stream.write_all(b"from the host")?;
    expect_eq(
        "what the host sent",
        next_capture(&guest, capture, RW)?,
        packet(host, own, 4, RW, b"from the host"),
    )?;
    guest.send(fd, "from the guest")?;
    expect_eq(
        "what the guest sent",
        next_capture(&guest, capture, RW)?,
        packet(own, host, 4, RW, b"from the guest"),
    )?;
    // Payload of several pages comes whole.
    let long = "long ".repeat(8_000);
    guest.send(fd, &long)?;
    let mut seen = Vec::new();
    while seen.len() < long.len() {
        seen.extend(next_capture(&guest, capture, RW)?.payload);
    }
    expect_eq("a long packet's payload", seen == long.as_bytes(), true)?;
    guest.close(listener)?;
    guest.close(fd)?;
    drop(stream);
    let end = next_capture(&guest, capture, RST)?;
    expect_eq("what an RST is for", end.purpose, 2)?;
    guest.close(capture).map_err(Into::into)
}

/// Packets that wait for the device are captured when they go, once, and those that are taken back are not.
pub fn vsockmon_of_waiting_packets(lab: &Lab) -> Result<()> {
    // More than the ring takes, and not more than the capturing socket does.
    const PACKETS: usize = 100;
    let guest = lab.guest_with_modules(&["vsockmon"])?;
    let mut peer = Peer::watch(&guest);
    let listener = guest.listener(PORT)?;
    let mut fds = Vec::new();
    for host_port in [KEPT_PORT, RESET_PORT] {
        peer.set_ports(host_port, PORT);
        peer.send(Op::REQUEST);
        peer.expect(Op::RESPONSE)?;
        fds.push(guest.accept(listener)?);
    }
    let capture = start_capture(&guest)?;
    guest.device.hold_tx(true);
    for at in 0..PACKETS {
        for fd in &fds {
            guest.send(*fd, &format!("packet {at}"))?;
        }
    }
    peer.set_ports(RESET_PORT, PORT);
    peer.send(Op::RST);
    expect_eq(
        "recv() of the reset one",
        guest.recv(fds[1], 1)?,
        String::new(),
    )?;
    guest.device.hold_tx(false);

    let mut came = 0;
    let mut came_of_other = 0;
    while came < PACKETS {
        let packet = peer.next("what waited")?;
        let captured = next_capture(&guest, capture, Op::RW.0)?;
        expect_eq("the capture", captured.payload, packet.payload)?;
        expect_eq(
            "its destination",
            captured.destination,
            (packet.dst_cid, packet.dst_port),
        )?;
        match packet.dst_port {
            KEPT_PORT => came += 1,
            _ => came_of_other += 1,
        }
    }
    ensure!(came_of_other < PACKETS, "nothing was taken back");
    guest.close(capture).map_err(Into::into)
}

/// Tracepoints for packets, as ftrace and perf find them.
pub fn tracepoints(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let events = match lab.driver {
        Driver::Rs => "virtio_vsock_rs",
        Driver::C => "vsock",
    };
    guest.sh(&format!(
        "cd /sys/kernel/debug/tracing && echo 1 >events/{events}/enable"
    ))?;
    let listener = guest.listener(PORT)?;
    let mut stream = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    stream.write_all(b"12345")?;
    expect_eq("recv()", guest.recv(fd, 5)?, "12345".to_owned())?;
    guest.send(fd, "1234567")?;
    let mut answer = [0; 7];
    stream.read_exact(&mut answer)?;
    let port = guest.peer_address(fd)?.1;
    for expected in [
        format!("{HOST_CID}:{port} -> {GUEST_CID}:{PORT} len=0 type=STREAM op=REQUEST"),
        format!("{GUEST_CID}:{PORT} -> {HOST_CID}:{port} len=0 type=STREAM op=RESPONSE"),
        format!("{HOST_CID}:{port} -> {GUEST_CID}:{PORT} len=5 type=STREAM op=RW"),
        format!("{GUEST_CID}:{PORT} -> {HOST_CID}:{port} len=7 type=STREAM op=RW"),
    ] {
        wait_for(&format!("the trace to have {expected:?}"), || {
            Ok(guest
                .sh("cat /sys/kernel/debug/tracing/trace")?
                .contains(&expected))
        })?;
    }
    // Programs such as perf show the names by the numbers that the formats have.
    let formats = guest.sh(&format!(
        "cat /sys/kernel/debug/tracing/events/{events}/*/format"
    ))?;
    for number_and_name in ["{ 1, \"STREAM\" }", "{ 5, \"RW\" }"] {
        ensure!(
            formats.contains(number_and_name),
            "the formats of the tracepoints have no {number_and_name}"
        );
    }
    Ok(())
}

/// The kernel's diagnostics list listeners and connections.
pub fn diagnostics(lab: &Lab) -> Result<()> {
    let guest = lab.guest_with_modules(&["vsock_diag"])?;
    let listener = guest.listener(PORT)?;
    let _stream = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    let peer = guest.peer_address(fd)?;
    let shown = guest.sockets()?;
    let of_state = |state| {
        shown
            .iter()
            .filter(|socket| socket.state == state && socket.kind == 1)
            .map(|socket| (socket.own, socket.peer))
            .collect::<Vec<_>>()
    };
    expect_eq(
        "connections",
        of_state(ESTABLISHED),
        vec![((GUEST_CID, PORT), peer)],
    )?;
    expect_eq(
        "listeners",
        of_state(LISTEN)
            .into_iter()
            .map(|(own, _)| own)
            .collect::<Vec<_>>(),
        vec![(u32::MAX, PORT)],
    )
}

/// A BPF program of a sockmap redirects what one socket receives to another.
pub fn sockmap(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let mut from = guest.connect_from_host(PORT)?;
    let from_fd = guest.accept(listener)?;
    let mut to = guest.connect_from_host(PORT)?;
    let to_fd = guest.accept(listener)?;
    guest
        .start("redirect", json!({"from": from_fd, "to": to_fd}))
        .wait::<()>(LIMIT)?;
    // More than a buffer, so that credit has to come back.
    let sent: Vec<u8> = (0..1_000_000_u32)
        .map(|number| (number % 251) as u8)
        .collect();
    let writing = {
        let sent = sent.clone();
        std::thread::spawn(move || from.write_all(&sent).map(|()| from))
    };
    let mut received = vec![0; sent.len()];
    to.read_exact(&mut received)
        .context("reading what was redirected")?;
    expect_eq("what was redirected", received == sent, true)?;
    let _from = writing
        .join()
        .map_err(|_| anyhow::anyhow!("the writer panicked"))?
        .context("writing")?;
    // The other way nothing is redirected.
    to.write_all(b"direct")?;
    // A recv() that has to wait on a socket of a sockmap never ends: Linux 7.3 sleeps there with the socket's lock
    // (vsock_msg_wait_data), so that nothing can be received, with any transport.
    wait_for("the data", || Ok(guest.siocinq(to_fd)? == 6))?;
    expect_eq("recv()", guest.recv(to_fd, 6)?, "direct".to_owned())
}
