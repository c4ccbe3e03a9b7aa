// SPDX-License-Identifier: GPL-2.0

//! A device that breaks the rules. The guest drops what makes no sense and counts it, and everything else goes on.

use anyhow::{ensure, Result};
use serde_json::json;
use vsock_device::device::Queue;
use vsock_device::{Op, HOST_CID};

use super::hardware::expect_out_of_use_and_bind_again;
use super::lifecycle::{BIND, UNBIND};
use super::migration::expect_told;
use crate::agent::sh;
use crate::lab::{
    expect_eq, expect_errno, wait_for, Guest, Lab, Peer, A_WHILE, GUEST_CID, LIMIT, NO_ANSWER,
    PORT, SEQPACKET, STREAM, WAITING_ANSWERS, WAITING_UPDATES,
};
use crate::machine::{Hardware, DEFAULT_RING};

/// That the guest still serves.
fn expect_alive(guest: &Guest, listener: i32) -> Result<()> {
    guest.device.set_manual(false);
    let _stream = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    guest.close(fd)?;
    Ok(())
}

/// That the guest gets back what the device has taken, the last answer included.
fn expect_tx_idle(guest: &Guest) -> Result<()> {
    wait_for("the device to have used all packets", || {
        Ok(guest.queue_length("tx_in_flight")? == 0)
    })
}

/// Packets shorter than a header, headers that lie about the length, used lengths that lie.
pub fn malformed_packets(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    let mut data = peer.packet(Op::RW);
    data.payload = b"data".to_vec();
    for len in [0, 1, 43] {
        guest
            .device
            .inject_raw(data.to_bytes()[..len].to_vec(), None);
    }
    guest.device.inject_raw(data.to_bytes_with_len(5), None);
    guest
        .device
        .inject_raw(data.to_bytes_with_len(u32::MAX), None);
    // The used length leaves out what the header promises.
    guest.device.inject_raw(data.to_bytes(), Some(47));
    guest.wait_counter("dropped_short", 6)?;
    guest.device.inject_raw(data.to_bytes(), Some(u32::MAX));
    guest.device.inject_raw(data.to_bytes(), Some(5000));
    guest.wait_counter("dropped_long", 2)?;
    // A payload shorter than what was used is no error: the rest is not looked at.
    guest.device.inject_raw(data.to_bytes_with_len(3), None);
    expect_eq("recv()", guest.recv(fd, 99)?, "dat".to_owned())?;
    // Payload of no length is no end of the stream.
    peer.send_payload(b"");
    peer.send_payload(b"more");
    expect_eq("recv()", guest.recv(fd, 99)?, "more".to_owned())?;
    expect_alive(&guest, listener)
}

/// Where the device says that it has written a packet, and the memory does not have it, no reader gets what comes behind the
/// hole, nor what the memory had before.
pub fn unwritten_packets(lab: &Lab) -> Result<()> {
    let ring = usize::from(DEFAULT_RING);
    // New buffers have no zeros but those of the driver.
    let guest = lab.guest_on(&Hardware {
        kernel_parameters: "init_on_alloc=0 slab_debug=P",
        ..Hardware::default()
    })?;
    let uevents = guest.uevent_socket()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::watch(&guest);
    let packet = peer.packet(Op::RW).to_bytes().len() + b"old".len();
    let leave_unwritten = |packets: usize| {
        for _ in 0..packets {
            guest.device.inject_raw(Vec::new(), Some(packet as u32));
        }
    };
    // Buffers that have never had a packet, and no connection that could have lost one.
    leave_unwritten(3 * ring);
    guest.wait_counter("dropped_unwritten", 3 * ring as i64)?;

    peer.send(Op::REQUEST);
    peer.expect(Op::RESPONSE)?;
    let fd = guest.accept(listener)?;
    for _ in 0..3 * ring {
        peer.send_payload(b"old");
        expect_eq("recv()", guest.recv(fd, 99)?, "old".to_owned())?;
    }
    leave_unwritten(2 * ring);
    peer.send_payload(b"behind the hole");
    peer.expect(Op::RST)?;
    expect_errno("recv()", guest.recv(fd, 99), "ECONNRESET")?;
    let told = [
        ("CAUSE", "transport-reset"),
        ("GENERATION", "1"),
        ("CONNECTIONS_RESET", "1"),
    ];
    expect_told(&guest, uevents, &told)?;
    guest.wait_counter("dropped_unwritten", 5 * ring as i64)?;
    expect_eq("resets", guest.counter("lost_packet_resets")?, 1)?;
    expect_alive(&guest, listener)
}

/// Types and operations that nobody knows, and packets for connections that do not exist.
pub fn unknown_packets(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;

    let mut packet = peer.packet(Op::RW);
    packet.socket_type = 77;
    guest.device.inject(packet.clone());
    let rst = peer.expect(Op::RST)?;
    expect_eq("the type of the answer", rst.socket_type, 77)?;
    packet.op = Op::RST;
    guest.device.inject(packet);

    guest.device.inject(peer.packet(Op(99)));
    guest.device.inject(peer.packet(Op(0)));
    guest.device.inject(peer.packet(Op::RESPONSE));

    let mut stranger = peer.packet(Op::RW);
    stranger.dst_port = 4711;
    guest.device.inject(stranger.clone());
    let rst = peer.expect(Op::RST)?;
    expect_eq(
        "who answers",
        (rst.src_port, rst.dst_port),
        (4711, stranger.src_port),
    )?;
    stranger.op = Op::RST;
    guest.device.inject(stranger);
    peer.expect_silence()?;

    // A listener takes requests and nothing else.
    let mut no_request = peer.packet(Op::CREDIT_UPDATE);
    no_request.src_port = 9999;
    guest.device.inject(no_request);
    peer.expect(Op::RST)?;

    peer.send_payload(b"unharmed");
    expect_eq("recv()", guest.recv(fd, 99)?, "unharmed".to_owned())?;

    // A request for a connection that exists: the peer has forgotten it, and both get to know.
    peer.send(Op::REQUEST);
    peer.expect(Op::RST)?;
    expect_errno("recv()", guest.recv(fd, 1), "ECONNRESET")?;
    expect_alive(&guest, listener)?;
    guest.wait_counter("dropped_state", 3)
}

/// Packets from CIDs that nobody has, or for somebody else.
pub fn wrong_cids(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    let mut data = peer.packet(Op::RW);
    data.payload = b"stray".to_vec();
    let sources = [
        0,
        1,
        u64::from(u32::MAX),
        (1 << 32) | HOST_CID,
        u64::MAX,
        u64::from(GUEST_CID),
    ];
    let destinations = [
        0,
        1,
        HOST_CID,
        u64::from(GUEST_CID) + 1,
        (1 << 32) | u64::from(GUEST_CID),
        u64::MAX,
    ];
    for source in sources {
        let mut stray = data.clone();
        stray.src_cid = source;
        guest.device.inject(stray);
    }
    for destination in destinations {
        let mut stray = data.clone();
        stray.dst_cid = destination;
        guest.device.inject(stray);
    }
    peer.send_payload(b"its own");
    expect_eq("recv()", guest.recv(fd, 999)?, "its own".to_owned())?;
    peer.expect_silence()?;
    expect_alive(&guest, listener)?;
    let strays = sources.len() + destinations.len();
    expect_eq("strays", guest.counter("dropped_cid")?, strays as i64)
}

/// Buffers used that the device was never given: the driver stops using the device, connections fail, and it works again
/// when it was unbound and bound.
pub fn forged_completions(lab: &Lab) -> Result<()> {
    for queue in [Queue::Rx, Queue::Tx, Queue::Event] {
        let guest = lab.guest()?;
        let listener = guest.listener(PORT)?;
        let _stream = guest.connect_from_host(PORT)?;
        let reader = guest.accept(listener)?;
        let reading = guest.start("recv", json!({"fd": reader, "len": 1}));
        // The guest puts nothing into the queue meanwhile: in a packed ring that would take the place of what is forged.
        expect_tx_idle(&guest)?;
        guest.device.forge_completions(queue, &[9999, 127]);
        wait_for("the kernel's log to tell of it", || {
            Ok(guest.machine.log().contains("id 9999 out of range"))
        })?;
        expect_errno("recv()", reading.wait::<String>(LIMIT), "ECONNRESET")?;
        expect_out_of_use_and_bind_again(&guest, listener)?;
        guest.close(reader)?;
        lab.end_machines()?;
    }
    Ok(())
}

/// Events of unknown kinds and lengths.
pub fn bad_events(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let _stream = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    let bad: [&[u8]; 5] = [&[], &[0], &[0, 0, 0], &[7, 0, 0, 0], &[255, 255, 255, 255]];
    // More than there are buffers, so that each has to come back.
    for _ in 0..4 {
        for event in bad {
            guest.device.send_event(event.to_vec());
        }
    }
    guest.wait_counter("unknown_events", 4 * bad.len() as i64)?;
    expect_eq("send() on the connection", guest.send(fd, "x")?, 1)?;
    // CIDs that a guest cannot have: the guest is without one until it gets another.
    for (resets, cid) in (1..).zip([0, 1, HOST_CID, u64::from(u32::MAX), 1 << 40]) {
        guest.device.transport_reset(cid);
        guest.wait_counter("transport_resets", resets)?;
        expect_eq("the CID that the guest has", guest.local_cid()?, u32::MAX)?;
    }
    guest.device.transport_reset(77);
    wait_for("the guest to have its CID", || Ok(guest.local_cid()? == 77))?;
    expect_errno("recv() on the connection", guest.recv(fd, 1), "ECONNRESET")?;
    expect_alive(&guest, listener)
}

/// CIDs that a guest cannot have, from the beginning: the driver does not take the device, and does once it has another one.
pub fn bad_cid(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    for cid in [0, 1, HOST_CID, u64::from(u32::MAX), 1 << 40] {
        guest.sh(UNBIND)?;
        guest.device.set_guest_cid(cid);
        let bound = sh(&guest.machine.agent, BIND, LIMIT)?;
        ensure!(
            bound.status != 0 && bound.output.contains("Invalid argument"),
            "binding a device with the CID {cid} says: {}",
            bound.output
        );
        ensure!(
            guest.sh("dmesg")?.contains(&format!("guest_cid {cid:#x}")),
            "the log does not say what is wrong with the CID {cid}"
        );
        expect_eq("the CID without a device", guest.local_cid()?, u32::MAX)?;
        for kind in [STREAM, SEQPACKET] {
            let fd = guest.socket(kind)?;
            let connected = guest.connect(fd, HOST_CID as u32, PORT);
            expect_errno("connect() without a device", connected, "ENODEV")?;
            guest.close(fd)?;
        }
        guest.device.set_guest_cid(u64::from(GUEST_CID));
        guest.sh(BIND)?;
        expect_alive(&guest, listener)?;
    }
    Ok(())
}

/// The device takes no packets: writers block, close() does not, nothing piles up, and it can be unbound.
pub fn tx_not_consumed(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let mut peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    guest.device.hold_tx(true);
    peer.set_credit(1 << 30, 0);
    peer.send(Op::CREDIT_UPDATE);
    let writing = guest.start_send_pattern(fd, 1, 64 << 20);
    // The peer claims to have got everything, again and again.
    for claim in 1..=50 {
        peer.set_credit(1 << 30, claim * 100_000);
        peer.send(Op::CREDIT_UPDATE);
    }
    writing.expect_blocked(A_WHILE)?;
    let unsent = guest.siocoutq(fd)?;
    ensure!(
        unsent <= 256 * 1024,
        "{unsent} bytes wait for the device, more than the socket's buffer"
    );
    let second = guest.socket(STREAM)?;
    guest.set_connect_timeout(second, NO_ANSWER)?;
    expect_errno(
        "connect()",
        guest.connect(second, HOST_CID as u32, PORT),
        "ETIMEDOUT",
    )?;
    guest.close(second)?;
    let unbind =
        "cd /sys/bus/virtio/drivers/*vsock*/ && for d in virtio*; do echo $d >unbind; done";
    guest.sh(unbind)?;
    expect_errno(
        "the blocked send()",
        writing.wait::<u64>(LIMIT),
        "ECONNRESET",
    )?;
    guest.close(fd)?;
    Ok(())
}

/// How many packets that want an answer come at once.
const FLOOD: u32 = 3000;

/// Thousands of packets that want an answer, none of which is taken: the guest stops receiving and goes on later.
pub fn reply_flood(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    expect_tx_idle(&guest)?;
    guest.device.hold_tx(true);
    for at in 0..FLOOD {
        // Nobody has this port, so RST is due.
        let mut stray = peer.packet(Op::RW);
        stray.dst_port = 50_000 + at;
        guest.device.inject(stray);
    }
    peer.send_payload(b"after the flood");
    guest.wait_congested()?;
    let waited = guest.counter("tx_waited")?;
    expect_eq("answers that wait", waited, WAITING_ANSWERS)?;
    expect_eq("SIOCINQ", guest.siocinq(fd)?, 0)?;
    guest.device.hold_tx(false);
    expect_eq("recv()", guest.recv(fd, 99)?, "after the flood".to_owned())?;
    for at in 0..FLOOD {
        let rst = peer.expect(Op::RST)?;
        expect_eq("the port that answers", rst.src_port, 50_000 + at)?;
    }
    let more = guest.start("recv", json!({"fd": fd, "len": 1}));
    peer.send_payload(b"!");
    expect_eq("recv()", more.wait::<String>(LIMIT)?, "!".to_owned())?;
    // The bridge does not know the test's connection, and ends it when a packet of it comes.
    guest.device.set_manual(false);
    expect_alive(&guest, listener)
}

/// Thousands of requests for credit, no answer to which is taken: the guest receives all of them, for one answer to the last
/// says what any before it did.
pub fn credit_request_flood(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    guest.device.hold_tx(true);
    for _ in 0..FLOOD {
        peer.send(Op::CREDIT_REQUEST);
    }
    peer.send_payload(b"after the flood");
    wait_for("the guest to have received all of them", || {
        Ok(guest.siocinq(fd)? > 0)
    })?;
    guest.device.hold_tx(false);
    guest.send(fd, "the end")?;
    let mut updates = 0;
    while peer.next("the payload after the updates")?.op == Op::CREDIT_UPDATE {
        updates += 1;
    }
    // Those that the device had, those that may wait, and one in their place.
    let bound = u32::from(DEFAULT_RING) + WAITING_UPDATES + 1;
    ensure!(
        updates <= bound,
        "{updates} credit updates for {FLOOD} requests, the bound is {bound}"
    );
    expect_eq("recv()", guest.recv(fd, 99)?, "after the flood".to_owned())
}
