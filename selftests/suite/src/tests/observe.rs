// SPDX-License-Identifier: GPL-2.0

//! Whoever looks at sockets from outside: captures, tracepoints, diagnostics, BPF programs.

use std::io::{Read, Write};

use anyhow::{ensure, Context, Result};
use serde_json::json;

use vsock_device::packet::{TYPE_SEQPACKET, TYPE_STREAM};
use vsock_device::{Op, Packet};

use super::lifecycle::{BIND, UNBIND};
use super::stream::exchange_over_the_bridge;
use crate::lab::{
    expect_eq, expect_errno, wait_for, Guest, Lab, Peer, CID_ANY, GUEST_CID, LIMIT, PORT,
    SEQPACKET, STREAM,
};
use crate::machine::{Hardware, DEFAULT_RING};
use crate::sockets::{HowFar, ESTABLISHED, LISTEN};
use crate::Driver;

const HOST_CID: u32 = vsock_device::HOST_CID as u32;

/// How many buffers of packets to the device are kept at most, by Documentation/data-path.md: 512 KiB of 64 KiB each.
const SPARE_TX_BUFFERS: i64 = 8;

/// Ports of the host of connections that test packets one by one.
const KEPT_PORT: u32 = 5000;
const RESET_PORT: u32 = 5001;

/// `struct af_vsockmon_hdr`: addresses, what the packet is for, and what follows.
const MONITOR_HEADER: usize = 32;

/// `AF_VSOCK_TRANSPORT_VIRTIO`: a header of virtio follows.
const TRANSPORT_VIRTIO: u16 = 2;

/// What a packet is for: `AF_VSOCK_OP_*` of linux/vsockmon.h.
const CONNECT: u16 = 1;
const DISCONNECT: u16 = 2;
const CONTROL: u16 = 3;
const PAYLOAD: u16 = 4;

/// A packet as a vsockmon device gives it.
#[derive(Debug, PartialEq, Eq)]
struct Captured {
    purpose: u16,
    packet: Packet,
}

impl Captured {
    fn parse(bytes: &[u8]) -> Result<Self> {
        let (header, rest) = bytes
            .split_at_checked(MONITOR_HEADER)
            .context("a capture that is too short")?;
        let packet = Packet::from_bytes(rest).context("a capture of a part of a packet")?;
        let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let captured = Self {
            purpose: u16_at(24),
            packet,
        };
        let should = captured.monitor_header(rest.len());
        ensure!(
            header == should,
            "the capture of {captured:?} has the header {header:?} instead of {should:?}"
        );
        Ok(captured)
    }

    /// What stands before a packet of so many bytes.
    fn monitor_header(&self, len: usize) -> Vec<u8> {
        let packet = &self.packet;
        let mut header = Vec::new();
        header.extend(packet.src_cid.to_le_bytes());
        header.extend(packet.dst_cid.to_le_bytes());
        header.extend(packet.src_port.to_le_bytes());
        header.extend(packet.dst_port.to_le_bytes());
        header.extend(self.purpose.to_le_bytes());
        header.extend(TRANSPORT_VIRTIO.to_le_bytes());
        let header_len = (len - packet.payload.len()) as u16;
        header.extend(header_len.to_le_bytes());
        header.resize(MONITOR_HEADER, 0);
        header
    }
}

/// A packet socket on a vsockmon device.
fn start_capture(guest: &Guest) -> Result<i32> {
    guest.sh("ip link add name vsockmon0 type vsockmon && ip link set vsockmon0 up")?;
    Ok(guest
        .start("packet_socket", json!({"interface": "vsockmon0"}))
        .wait(LIMIT)?)
}

/// The next packet on a packet socket that has an operation.
fn next_capture(guest: &Guest, fd: i32, op: Op) -> Result<Captured> {
    loop {
        let bytes: Vec<u8> = guest
            .start("recv_bytes", json!({"fd": fd, "len": 65536}))
            .wait(LIMIT)
            .with_context(|| format!("waiting for a capture of {op:?}"))?;
        let captured = Captured::parse(&bytes)?;
        if captured.packet.op == op {
            return Ok(captured);
        }
    }
}

/// That the next capture of a packet's operation is that packet, for a purpose.
fn expect_captured(guest: &Guest, fd: i32, packet: Packet, purpose: u16) -> Result<()> {
    let captured = next_capture(guest, fd, packet.op)?;
    expect_eq("the capture", captured, Captured { purpose, packet })
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
    // The old one may still be found by its port when its RST is sent.
    peer.set_ports(RESET_PORT, PORT);
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

/// That queues have lengths now.
fn expect_lengths(guest: &Guest, should: &[(&str, i64)]) -> Result<()> {
    for (name, length) in should {
        expect_eq(name, guest.queue_length(name)?, *length)?;
    }
    Ok(())
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

/// Buffers are used again within bounds, and none is kept without a device, or where freed memory is to be wiped.
pub fn spare_buffers(lab: &Lab) -> Result<()> {
    /// So many packets, of so many bytes: too long to be small ones.
    const FEW: usize = 10;
    const LONG: usize = 2000;
    let none = [("rx_spare_buffers", 0), ("tx_spare_buffers", 0)];
    let guest = lab.guest()?;
    expect_lengths(&guest, &none)?;
    // More than once, so that what comes has gone through buffers of before.
    for _ in 0..3 {
        exchange_over_the_bridge(&guest)?;
    }
    let most = [
        ("rx_spare_buffers", i64::from(DEFAULT_RING) / 2),
        ("tx_spare_buffers", SPARE_TX_BUFFERS),
    ];
    for (name, most) in most {
        let kept = guest.queue_length(name)?;
        ensure!(kept <= most, "{name} is {kept}, of {most} at most");
    }
    guest.sh(UNBIND)?;
    expect_lengths(&guest, &none)?;
    guest.sh(BIND)?;
    wait_for("the CID to be back", || Ok(guest.local_cid()? == GUEST_CID))?;

    // Fewer than the device has to use before it is given more.
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    peer.send(Op::REQUEST);
    peer.expect(Op::RESPONSE)?;
    let fd = guest.accept(listener)?;
    for _ in 0..FEW {
        peer.send_payload(&[b'x'; LONG]);
    }
    let received = guest.recv_flags(fd, FEW * LONG, libc::MSG_WAITALL);
    expect_eq("bytes received", received?.len(), FEW * LONG)?;
    for _ in 0..FEW {
        guest.send(fd, &"y".repeat(LONG))?;
        peer.find(Op::RW)?;
    }
    expect_lengths(&guest, &[("rx_spare_buffers", FEW as i64)])?;
    wait_for("a buffer of a packet to the device to be kept", || {
        Ok(guest.queue_length("tx_spare_buffers")? > 0)
    })?;
    // They are what the device gets when it has used half of its buffers, and what is sent next is put into.
    let half = usize::from(DEFAULT_RING) / 2;
    for _ in 0..half {
        peer.send_payload(&[b'x'; LONG]);
    }
    wait_for("the packets", || {
        Ok(guest.siocinq(fd)? as usize == half * LONG)
    })?;
    expect_lengths(&guest, &[("rx_spare_buffers", 0)])?;
    wait_for("the device to have used what was sent", || {
        Ok(guest.siocoutq(fd)? == 0)
    })?;
    let kept = guest.queue_length("tx_spare_buffers")?;
    guest.device.hold_tx(true);
    guest.send(fd, &"y".repeat(LONG))?;
    expect_lengths(&guest, &[("tx_spare_buffers", kept - 1)])?;
    guest.device.hold_tx(false);
    peer.find(Op::RW)?;
    guest.sh(UNBIND)?;
    expect_lengths(&guest, &none)?;
    lab.end_machines()?;
    drop(guest);

    let guest = lab.guest_on(&Hardware {
        kernel_parameters: "init_on_free=1",
        ..Hardware::default()
    })?;
    exchange_over_the_bridge(&guest)?;
    expect_lengths(&guest, &none)
}

/// A vsockmon device captures packets in both directions, in the format of its header.
pub fn vsockmon(lab: &Lab) -> Result<()> {
    let guest = lab.guest_with_modules(&["vsockmon"])?;
    let capture = start_capture(&guest)?;
    let expect = |packet, purpose| expect_captured(&guest, capture, packet, purpose);
    let listener = guest.listener(PORT)?;
    let peer = Peer::watch(&guest);
    peer.send(Op::REQUEST);
    expect(peer.packet(Op::REQUEST), CONNECT)?;
    expect(peer.expect(Op::RESPONSE)?, CONNECT)?;
    let fd = guest.accept(listener)?;

    let mut from_host = peer.packet(Op::RW);
    from_host.payload = b"from the host".to_vec();
    guest.device.inject(from_host.clone());
    expect(from_host, PAYLOAD)?;
    guest.send(fd, "from the guest")?;
    let from_guest = peer.expect(Op::RW)?;
    expect_eq("what is sent", &from_guest.payload[..], b"from the guest")?;
    expect(from_guest, PAYLOAD)?;
    // Payload of several pages comes whole.
    let long = "long ".repeat(8_000);
    guest.send(fd, &long)?;
    let mut sent: Vec<u8> = Vec::new();
    while sent.len() < long.len() {
        let packet = peer.expect(Op::RW)?;
        sent.extend(&packet.payload);
        expect(packet, PAYLOAD)?;
    }
    expect_eq("a long packet's payload", sent == long.as_bytes(), true)?;

    peer.send(Op::CREDIT_REQUEST);
    expect(peer.packet(Op::CREDIT_REQUEST), CONTROL)?;
    expect(peer.expect(Op::CREDIT_UPDATE)?, CONTROL)?;
    guest.close(fd)?;
    expect(peer.expect(Op::SHUTDOWN)?, DISCONNECT)?;
    peer.send(Op::RST);
    expect(peer.packet(Op::RST), DISCONNECT)?;
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
        match packet.dst_port {
            KEPT_PORT => came += 1,
            _ => came_of_other += 1,
        }
        expect_captured(&guest, capture, packet, PAYLOAD)?;
    }
    ensure!(came_of_other < PACKETS, "nothing was taken back");
    guest.close(capture).map_err(Into::into)
}

/// Tracepoints for packets, as ftrace and perf find them.
pub fn tracepoints(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (events, received, sent) = match lab.driver {
        Driver::Rs => ("virtio_vsock_rs", "packet_received", "packet_sent"),
        Driver::C => (
            "vsock",
            "virtio_transport_recv_pkt",
            "virtio_transport_alloc_pkt",
        ),
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
    // The C driver's have no credit.
    let credit = |fwd_cnt: u32| match lab.driver {
        Driver::Rs => format!(" flags=0x0 buf_alloc=262144 fwd_cnt={fwd_cnt}\n"),
        Driver::C => String::new(),
    };
    let (before, after) = (credit(0), credit(5));
    for expected in [
        format!("{received}: {HOST_CID}:{port} -> {GUEST_CID}:{PORT} len=0 type=STREAM op=REQUEST"),
        format!(
            "{sent}: {GUEST_CID}:{PORT} -> {HOST_CID}:{port} len=0 type=STREAM op=RESPONSE{before}"
        ),
        format!("{received}: {HOST_CID}:{port} -> {GUEST_CID}:{PORT} len=5 type=STREAM op=RW"),
        format!("{sent}: {GUEST_CID}:{PORT} -> {HOST_CID}:{port} len=7 type=STREAM op=RW{after}"),
    ] {
        wait_for(&format!("the trace to have {expected:?}"), || {
            Ok(guest
                .sh("cat /sys/kernel/debug/tracing/trace")?
                .contains(&expected))
        })?;
    }
    // Programs such as perf count them.
    for event in [received, sent] {
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
    for kind in [STREAM, SEQPACKET] {
        let listener = guest.listener_of_kind(kind, PORT)?;
        let peer = Peer::connect_kind(&guest, kind)?;
        let packet = peer.packet(Op::RST);
        let fd = guest.accept(listener)?;
        let shown = guest.sockets()?;
        let of_state = |state| {
            shown
                .iter()
                .filter(|socket| socket.state == state && i32::from(socket.kind) == kind)
                .map(|socket| (socket.own, socket.peer))
                .collect::<Vec<_>>()
        };
        expect_eq(
            "connections",
            of_state(ESTABLISHED),
            vec![((GUEST_CID, PORT), (HOST_CID, packet.src_port))],
        )?;
        expect_eq(
            "listeners",
            of_state(LISTEN)
                .into_iter()
                .map(|(own, _)| own)
                .collect::<Vec<_>>(),
            vec![(CID_ANY, PORT)],
        )?;
        guest.close(listener)?;
        // The ports are free for the next one.
        guest.close(fd)?;
        peer.expect(Op::SHUTDOWN)?;
        peer.send(Op::RST);
    }
    Ok(())
}

/// A BPF program of a sockmap redirects what one socket receives to another.
pub fn sockmap(lab: &Lab) -> Result<()> {
    const PIECE: usize = 10_000;
    let guest = lab.guest()?;
    // More than a buffer, so that credit has to come back.
    let sent: Vec<u8> = (0..1_000_000_u32)
        .map(|number| (number % 251) as u8)
        .collect();
    for (kind, socket_type) in [(STREAM, TYPE_STREAM), (SEQPACKET, TYPE_SEQPACKET)] {
        let listener = guest.listener_of_kind(kind, PORT)?;
        let (mut from, _) = guest.connect_from_host_by(socket_type, PORT)?;
        let from_fd = guest.accept(listener)?;
        let (mut to, _) = guest.connect_from_host_by(socket_type, PORT)?;
        let to_fd = guest.accept(listener)?;
        guest.close(listener)?;
        guest
            .start("redirect", json!({"from": from_fd, "to": to_fd}))
            .wait::<()>(LIMIT)?;
        let writing = {
            let sent = sent.clone();
            std::thread::spawn(move || {
                sent.chunks(PIECE)
                    .try_for_each(|piece| from.write_all(piece))
                    .map(|()| from)
            })
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
        expect_eq("recv()", guest.recv(to_fd, 6)?, "direct".to_owned())?;
    }
    Ok(())
}
