// SPDX-License-Identifier: GPL-2.0

//! Whoever looks at sockets from outside: captures, tracepoints, diagnostics, BPF programs.

use std::io::{Read, Write};

use anyhow::{ensure, Context, Result};
use serde_json::json;

use vsock_device::packet::Op;

use super::lifecycle::UNBIND;
use crate::lab::{
    expect_eq, expect_errno, wait_for, Guest, Lab, Peer, GUEST_CID, LIMIT, PORT, STREAM,
};
use crate::machine::DEFAULT_RING;
use crate::sockets::{HowFar, ESTABLISHED, LISTEN};
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
    transport: u16,
    operation: u16,
    payload: Vec<u8>,
}

/// `AF_VSOCK_TRANSPORT_VIRTIO`: a header of virtio follows.
const TRANSPORT_VIRTIO: u16 = 2;

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
            transport: u16_at(26)?,
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

/// What counters are more than they were, by name.
fn growth(guest: &Guest, before: &[(&str, i64)]) -> Result<Vec<(String, i64)>> {
    let grown =
        |(name, before): &(&str, i64)| Ok((name.to_string(), guest.counter(name)? - before));
    before.iter().map(grown).collect()
}

/// That what happens in `act` adds to counters what it should.
fn expect_counted(
    guest: &Guest,
    should: &[(&str, i64)],
    act: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let names = should.iter().map(|(name, _)| *name);
    let before: Vec<(&str, i64)> = names
        .map(|name| Ok((name, guest.counter(name)?)))
        .collect::<Result<_>>()?;
    act()?;
    let should: Vec<(String, i64)> = should
        .iter()
        .map(|(name, by)| (name.to_string(), *by))
        .collect();
    let mut is = Vec::new();
    let counted = wait_for("the counters", || {
        is = growth(guest, &before)?;
        Ok(is == should)
    });
    counted.with_context(|| format!("the counters grew by {is:?} instead of {should:?}"))?;
    // Not more afterwards, either.
    guest.device.wait_delivered(LIMIT)?;
    expect_eq("what the counters grew by", growth(guest, &before)?, should)
}

/// Counters of packets, of senders without room, of RST in both directions, and of resets by their cause.
pub fn counters(lab: &Lab) -> Result<()> {
    const BUFFER: u32 = 256 * 1024;
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let mut peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    expect_counted(
        &guest,
        &[
            ("rx_packets", 2),
            ("rx_bytes", 7),
            ("tx_packets", 1),
            ("tx_bytes", 0),
            ("credit_updates", 1),
        ],
        || {
            peer.send_payload(b"payload");
            peer.send(Op::CREDIT_REQUEST);
            peer.expect(Op::CREDIT_UPDATE).map(drop)
        },
    )?;
    expect_counted(&guest, &[("tx_packets", 1), ("tx_bytes", 6)], || {
        guest.send(fd, "answer")?;
        peer.expect(Op::RW).map(drop)
    })?;
    let no_room = || {
        expect_errno(
            "send()",
            guest.send_flags(fd, "more", libc::MSG_DONTWAIT),
            "EAGAIN",
        )
    };
    // However often they look, it is one stall until something was sent.
    peer.set_credit(6 + 4, 0);
    peer.send(Op::CREDIT_REQUEST);
    // The answer says that the guest knows the credit.
    peer.expect(Op::CREDIT_UPDATE)?;
    expect_counted(
        &guest,
        &[("credit_stalls", 1), ("device_stalls", 0)],
        || {
            guest.send(fd, "four")?;
            wait_for("the device to have taken it", || {
                Ok(guest.siocoutq(fd)? == 0)
            })?;
            no_room()?;
            no_room()
        },
    )?;
    guest.device.hold_tx(true);
    peer.set_credit(BUFFER, 6 + 4);
    peer.send(Op::CREDIT_UPDATE);
    wait_for("room", || {
        Ok(guest.poll(fd, libc::POLLOUT, LIMIT)? == libc::POLLOUT)
    })?;
    expect_counted(
        &guest,
        &[("credit_stalls", 0), ("device_stalls", 1)],
        || {
            guest.set_nonblocking(fd, true)?;
            let sent: HowFar = guest.start_send_pattern_until_error(fd, 1).wait(LIMIT)?;
            guest.set_nonblocking(fd, false)?;
            expect_eq("the error", sent.error.as_deref(), Some("EAGAIN"))?;
            expect_eq("bytes sent", sent.bytes, u64::from(BUFFER))?;
            no_room()
        },
    )?;
    guest.device.hold_tx(false);
    expect_counted(&guest, &[("resets_by_peer", 1)], || {
        peer.send(Op::RST);
        Ok(())
    })?;
    guest.close(fd)?;
    guest.device.wait_delivered(LIMIT)?;
    peer.drain();

    let connect = |peer: &Peer| -> Result<i32> {
        peer.send(Op::REQUEST);
        peer.find(Op::RESPONSE)?;
        Ok(guest.accept(listener)?)
    };
    peer.set_credit(BUFFER, 0);
    // An end that was asked for is no reset.
    let fd = connect(&peer)?;
    expect_counted(&guest, &[("resets_by_peer", 0), ("rx_packets", 1)], || {
        guest.close(fd)?;
        peer.find(Op::SHUTDOWN)?;
        peer.send(Op::RST);
        Ok(())
    })?;
    connect(&peer)?;
    expect_counted(&guest, &[("resets_by_new_request", 1)], || {
        // Not a repeated one, for the peer knows of the connection.
        peer.send(Op::CREDIT_UPDATE);
        peer.send(Op::REQUEST);
        peer.find(Op::RST).map(drop)
    })?;
    connect(&peer)?;
    expect_counted(&guest, &[("resets_by_credit", 1)], || {
        for _ in 0..=BUFFER / 2048 {
            peer.send_payload(&[0; 2048]);
        }
        peer.find(Op::RST).map(drop)
    })?;
    expect_counted(
        &guest,
        &[
            ("refused_requests", 1),
            ("rst_no_connection", 1),
            ("unknown_type", 1),
        ],
        || {
            let mut stray = peer.packet(Op::REQUEST);
            stray.dst_port = PORT + 1;
            guest.device.inject(stray.clone());
            peer.find(Op::RST)?;
            stray.op = Op::RW;
            guest.device.inject(stray.clone());
            peer.find(Op::RST)?;
            stray.socket_type = 99;
            stray.op = Op::RST;
            guest.device.inject(stray);
            Ok(())
        },
    )?;
    expect_counted(&guest, &[("refused_connects", 1)], || {
        let connecting = guest.start_connect(guest.socket(STREAM)?, HOST_CID, PORT);
        let request = peer.find(Op::REQUEST)?;
        peer.set_ports(PORT, request.src_port);
        peer.send(Op::RST);
        expect_errno("connect()", connecting.wait::<()>(LIMIT), "ECONNRESET")
    })?;
    peer.set_ports(KEPT_PORT, PORT);
    let fd = connect(&peer)?;
    expect_counted(&guest, &[("resets_by_close_timeout", 1)], || {
        guest.close(fd)?;
        peer.find(Op::SHUTDOWN)?;
        peer.find(Op::RST).map(drop)
    })?;
    connect(&peer)?;
    expect_counted(
        &guest,
        &[("transport_resets", 1), ("resets_by_transport", 1)],
        || {
            guest.device.transport_reset(u64::from(GUEST_CID));
            Ok(())
        },
    )?;
    // Packets that the device has not even got are lost with it.
    const WAITING: i64 = 10;
    let fd = connect(&peer)?;
    guest.device.hold_tx(true);
    guest
        .start_send_small(fd, u64::from(DEFAULT_RING) + WAITING as u64)
        .wait::<u64>(LIMIT)?;
    wait_lengths(&guest, &[("tx_waiting", WAITING)])?;
    expect_counted(
        &guest,
        &[("resets_by_device_loss", 1), ("dropped_tx", WAITING)],
        || guest.sh(UNBIND).map(drop),
    )
}

/// That queues come to have lengths.
fn wait_lengths(guest: &Guest, should: &[(&str, i64)]) -> Result<()> {
    let mut is = Vec::new();
    let waited = wait_for("the lengths", || {
        is = should
            .iter()
            .map(|(name, _)| Ok((*name, guest.queue_length(name)?)))
            .collect::<Result<_>>()?;
        Ok(is == should)
    });
    waited.with_context(|| format!("the lengths are {is:?} instead of {should:?}"))
}

/// How much waits, while the device takes no packets and afterwards.
pub fn queue_lengths(lab: &Lab) -> Result<()> {
    const EVENT_BUFFERS: i64 = 8;
    const WAITING: i64 = 20;
    let ring = i64::from(DEFAULT_RING);
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    guest.device.hold_tx(true);
    let sent: i64 = guest
        .start_send_small(fd, (ring + WAITING) as u64)
        .wait(LIMIT)?;
    peer.send(Op::CREDIT_REQUEST);
    let full = [
        ("tx_in_flight", ring),
        ("tx_waiting", sent - ring + 1),
        ("tx_waiting_replies", 1),
        ("rx_is_stopped", 0),
    ];
    wait_lengths(&guest, &full)?;
    guest.device.hold_tx(false);
    for _ in 0..sent {
        peer.find(Op::RW)?;
    }
    let empty = full.map(|(name, _)| (name, 0));
    wait_lengths(&guest, &empty)?;
    expect_eq(
        "buffers for events",
        guest.queue_length("event_buffers")?,
        EVENT_BUFFERS,
    )?;
    let rx_buffers = guest.queue_length("rx_buffers")?;
    ensure!(
        (1..=ring).contains(&rx_buffers),
        "{rx_buffers} buffers for packets on a ring of {ring}"
    );
    guest.sh(UNBIND)?;
    wait_lengths(&guest, &empty)?;
    wait_lengths(&guest, &[("event_buffers", 0), ("rx_buffers", 0)])
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
        transport: TRANSPORT_VIRTIO,
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
    // So that the first packet for which there is no room is one of the connection that ends.
    guest.send(fds[0], "before the others")?;
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
    while came <= PACKETS {
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
    // Programs such as perf count them.
    for event in guest
        .sh(&format!("ls /sys/kernel/debug/tracing/events/{events}"))?
        .split_whitespace()
        .filter(|event| event.contains("packet_") || event.contains("_pkt"))
    {
        let id = guest.sh(&format!(
            "cat /sys/kernel/debug/tracing/events/{events}/{event}/id"
        ))?;
        let id: u64 = id.trim().parse()?;
        let counters: Vec<i32> = guest
            .start("count_tracepoint", json!({"number": id}))
            .wait(LIMIT)?;
        stream.write_all(b"12345")?;
        expect_eq("recv()", guest.recv(fd, 5)?, "12345".to_owned())?;
        guest.send(fd, "1234567")?;
        stream.read_exact(&mut answer)?;
        wait_for(&format!("a count of {event}"), || {
            let count: u64 = guest
                .start("read_counters", json!({"fds": counters}))
                .wait(LIMIT)?;
            Ok(count > 0)
        })?;
    }
    // They show the names by the numbers that the formats have.
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
