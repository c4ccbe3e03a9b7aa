// SPDX-License-Identifier: GPL-2.0

//! Connections that go on by other addresses (Documentation/checkpoint.md). The test plays the device's part and the
//! host's, packet by packet.

use anyhow::{ensure, Context, Result};
use serde_json::json;
use vsock_device::packet::{TYPE_SEQPACKET, TYPE_STREAM};
use vsock_device::update::FEATURE_CHECKPOINT;
use vsock_device::{Op, Packet, Tuple, Update};

use crate::lab::{
    expect_eq, expect_errno, wait_for, Guest, Lab, Peer, A_WHILE, CID_ANY, GUEST_CID, LIMIT, PORT,
    STREAM,
};
use crate::machine::Hardware;

/// The host's CID before and after, and the guest's.
const OLD_HOST: u64 = 100;
const NEW_HOST: u64 = 200;
const OLD_GUEST: u64 = GUEST_CID as u64;
const NEW_GUEST: u64 = OLD_GUEST + 10;

/// The first port of the host's ends.
const HOST_PORT: u32 = 5000;

fn guest(lab: &Lab) -> Result<Guest> {
    lab.guest_on(&Hardware {
        features: FEATURE_CHECKPOINT,
        ..Hardware::default()
    })
}

/// A connection of the host's port to [`PORT`].
fn tuple(host_port: u32) -> Tuple {
    Tuple {
        host_old_cid: OLD_HOST,
        host_new_cid: NEW_HOST,
        host_port,
        guest_port: PORT,
        socket_type: TYPE_STREAM,
    }
}

fn update(tuples: Vec<Tuple>) -> Update {
    Update {
        generation: 7,
        old_guest_cid: OLD_GUEST,
        new_guest_cid: NEW_GUEST,
        tuples,
    }
}

/// Connects from a port of the host, and accepts that.
fn connect(guest: &Guest, peer: &mut Peer, listener: i32, host_port: u32) -> Result<i32> {
    peer.set_ports(host_port, PORT);
    peer.send(Op::REQUEST);
    peer.expect(Op::RESPONSE)?;
    Ok(guest.accept(listener)?)
}

/// The host with its CID of before, a listener, and the connection to that from [`HOST_PORT`].
fn connected(guest: &Guest) -> Result<(Peer<'_>, i32, i32)> {
    let listener = guest.listener(PORT)?;
    let mut peer = Peer::watch(guest);
    peer.set_cids(OLD_HOST, OLD_GUEST);
    let fd = connect(guest, &mut peer, listener, HOST_PORT)?;
    Ok((peer, listener, fd))
}

/// Addresses of a packet: source, destination.
fn addresses(packet: &Packet) -> ((u64, u32), (u64, u32)) {
    (
        (packet.src_cid, packet.src_port),
        (packet.dst_cid, packet.dst_port),
    )
}

/// That the guest answers the tuple of a connection that goes on.
fn expect_kept(peer: &Peer, host_port: u32) -> Result<()> {
    let answer = peer.expect(Op::CREDIT_REQUEST)?;
    expect_eq(
        "the addresses of the answer",
        addresses(&answer),
        ((NEW_GUEST, PORT), (NEW_HOST, host_port)),
    )
}

/// Guest and host with new CIDs: an application notices nothing, but for the addresses when it asks.
pub fn connections_go_on(lab: &Lab) -> Result<()> {
    let guest = guest(lab)?;
    let (mut peer, listener, reader) = connected(&guest)?;
    let writer = connect(&guest, &mut peer, listener, HOST_PORT + 1)?;
    let half_closed = connect(&guest, &mut peer, listener, HOST_PORT + 2)?;
    guest.shutdown(half_closed, libc::SHUT_WR)?;
    peer.expect(Op::SHUTDOWN)?;
    peer.send_payload(b"unread");
    // A connection that the guest made.
    let made = guest.socket(STREAM)?;
    let connecting = guest.start_connect(made, OLD_HOST as u32, HOST_PORT);
    let request = peer.expect(Op::REQUEST)?;
    peer.set_ports(HOST_PORT, request.src_port);
    peer.send(Op::RESPONSE);
    connecting.wait::<()>(LIMIT)?;

    let reading = guest.start("recv", json!({"fd": reader, "len": 99}));
    // Not the one that recv() takes the data of.
    let polling = guest.start_poll(made, libc::POLLIN | libc::POLLRDHUP, LIMIT);
    // More than the credit.
    let writing = guest.start_send_pattern(writer, 1, 300_000);
    let mut came = 0;
    while came < 256 * 1024 {
        came += peer.expect(Op::RW)?.payload.len();
    }
    wait_for("the half-closed connection's data", || {
        Ok(guest.siocinq(half_closed)? == 6)
    })?;

    let tuples = vec![
        tuple(HOST_PORT),
        tuple(HOST_PORT + 1),
        tuple(HOST_PORT + 2),
        Tuple {
            guest_port: request.src_port,
            ..tuple(HOST_PORT)
        },
    ];
    guest.device.update_cids(&update(tuples));
    let mut answered = Vec::new();
    for _ in 0..4 {
        let answer = peer.expect(Op::CREDIT_REQUEST)?;
        expect_eq(
            "the CIDs of an answer",
            (answer.src_cid, answer.dst_cid),
            (NEW_GUEST, NEW_HOST),
        )?;
        answered.push((answer.dst_port, answer.src_port));
    }
    answered.sort_unstable();
    let mut expected = vec![
        (HOST_PORT, PORT),
        (HOST_PORT, request.src_port),
        (HOST_PORT + 1, PORT),
        (HOST_PORT + 2, PORT),
    ];
    expected.sort_unstable();
    expect_eq("the answers", answered, expected)?;
    reading.expect_blocked(A_WHILE)?;
    polling.expect_blocked(A_WHILE)?;
    writing.expect_blocked(A_WHILE)?;

    peer.set_cids(NEW_HOST, NEW_GUEST);
    peer.set_ports(HOST_PORT, PORT);
    peer.send_payload(b"from the new host");
    expect_eq(
        "the blocked recv()",
        reading.wait::<String>(LIMIT)?,
        "from the new host".to_owned(),
    )?;
    peer.set_ports(HOST_PORT, request.src_port);
    peer.send_payload(b"to the made one");
    expect_eq(
        "the blocked poll()",
        polling.wait::<i16>(LIMIT)?,
        libc::POLLIN,
    )?;
    peer.set_ports(HOST_PORT + 1, PORT);
    peer.set_credit(256 * 1024, 256 * 1024);
    peer.send(Op::CREDIT_UPDATE);
    while came < 300_000 {
        let packet = peer.find(Op::RW)?;
        expect_eq(
            "the addresses of more data",
            addresses(&packet),
            ((NEW_GUEST, PORT), (NEW_HOST, HOST_PORT + 1)),
        )?;
        came += packet.payload.len();
    }
    expect_eq("the blocked send()", writing.wait::<u64>(LIMIT)?, 300_000)?;
    expect_eq(
        "unread data",
        guest.recv(half_closed, 99)?,
        "unread".to_owned(),
    )?;
    expect_errno(
        "send() on the half-closed",
        guest.send(half_closed, "x"),
        "EPIPE",
    )?;
    expect_eq("send() on the made one", guest.send(made, "made")?, 4)?;
    let packet = peer.find(Op::RW)?;
    expect_eq(
        "the addresses of its data",
        addresses(&packet),
        ((NEW_GUEST, request.src_port), (NEW_HOST, HOST_PORT)),
    )?;

    expect_eq(
        "getpeername()",
        guest.peer_address(reader)?,
        (NEW_HOST as u32, HOST_PORT),
    )?;
    expect_eq(
        "getsockname()",
        guest.own_address(reader)?,
        (NEW_GUEST as u32, PORT),
    )?;
    expect_eq("the CID", guest.local_cid()?, NEW_GUEST as u32)?;
    for fd in [reader, writer, half_closed, made] {
        let error = guest.option(fd, libc::SOL_SOCKET, libc::SO_ERROR, 4)?;
        expect_eq("SO_ERROR", error, vec![0; 4])?;
    }
    // New connections have the new CIDs, too.
    connect(&guest, &mut peer, listener, HOST_PORT + 9)?;
    expect_eq("kept connections", guest.counter("kept_connections")?, 4)?;
    expect_eq(
        "connections that were reset",
        guest.counter("resets_by_transport")?,
        0,
    )
}

/// What is not listed is reset, and what is listed without being there is answered with RST.
pub fn unlisted_are_reset(lab: &Lab) -> Result<()> {
    let guest = guest(lab)?;
    let (mut peer, listener, kept) = connected(&guest)?;
    let unlisted = connect(&guest, &mut peer, listener, HOST_PORT + 1)?;
    let other_type = connect(&guest, &mut peer, listener, HOST_PORT + 2)?;
    let reading = guest.start("recv", json!({"fd": unlisted, "len": 1}));
    // It has no business with the host: it is bound, and follows.
    let bound = guest.socket(STREAM)?;
    guest.bind(bound, OLD_GUEST as u32, PORT + 1)?;

    let missing = Tuple {
        guest_port: 4711,
        ..tuple(HOST_PORT)
    };
    let wrong_type = Tuple {
        socket_type: TYPE_SEQPACKET,
        ..tuple(HOST_PORT + 2)
    };
    guest
        .device
        .update_cids(&update(vec![missing, tuple(HOST_PORT), wrong_type]));
    expect_kept(&peer, HOST_PORT)?;
    let mut answers = Vec::new();
    for _ in 0..2 {
        let rst = peer.expect(Op::RST)?;
        answers.push((addresses(&rst), rst.socket_type));
    }
    answers.sort_unstable();
    let of = |guest_port, host_port| ((NEW_GUEST, guest_port), (NEW_HOST, host_port));
    let mut expected = vec![
        (of(PORT, HOST_PORT + 2), TYPE_SEQPACKET),
        (of(4711, HOST_PORT), TYPE_STREAM),
    ];
    expected.sort_unstable();
    expect_eq("the answers to what is not there", answers, expected)?;
    expect_errno(
        "the blocked recv()",
        reading.wait::<String>(LIMIT),
        "ECONNRESET",
    )?;
    expect_errno(
        "recv() on the other type",
        guest.recv(other_type, 1),
        "ECONNRESET",
    )?;
    peer.expect_silence()?;
    expect_eq("send() on the kept one", guest.send(kept, "x")?, 1)?;
    peer.expect(Op::RW)?;
    expect_eq(
        "the bound socket",
        guest.own_address(bound)?,
        (NEW_GUEST as u32, PORT + 1),
    )
}

/// Packets that wait in the guest come by the new addresses, in order, after the answer.
pub fn packets_that_wait(lab: &Lab) -> Result<()> {
    const PACKETS: usize = 500;
    let guest = guest(lab)?;
    let (mut peer, listener, kept) = connected(&guest)?;
    let unlisted = connect(&guest, &mut peer, listener, HOST_PORT + 1)?;
    guest.device.hold_tx(true);
    for at in 0..PACKETS {
        let text = format!("packet {at}");
        expect_eq("send()", guest.send(kept, &text)?, text.len())?;
        guest.send(unlisted, "lost")?;
    }
    // A connection that is being made meanwhile.
    let connecting = guest.socket(STREAM)?;
    let waiting = guest.queue_length("tx_waiting")?;
    let connect = guest.start_connect(connecting, OLD_HOST as u32, HOST_PORT);
    wait_for("the request to wait", || {
        Ok(guest.queue_length("tx_waiting")? > waiting)
    })?;
    guest.device.update_cids(&update(vec![tuple(HOST_PORT)]));
    guest.wait_counter("cid_updates", 1)?;
    guest.device.hold_tx(false);

    let (mut came, mut answered, mut requested) = (0, false, None);
    while came < PACKETS || requested.is_none() {
        let packet = peer.next("what waited")?;
        let is_new = packet.src_cid == NEW_GUEST;
        match packet.op {
            Op::CREDIT_REQUEST => {
                ensure!(!answered && is_new, "unexpected: {packet:?}");
                answered = true;
            }
            Op::REQUEST => {
                expect_eq("the guest's CID in the request", packet.src_cid, NEW_GUEST)?;
                requested = Some(packet.src_port);
            }
            _ if packet.dst_port == HOST_PORT + 1 => {
                ensure!(!is_new, "a packet of a connection that is gone: {packet:?}");
            }
            _ => {
                expect_eq("the operation", packet.op, Op::RW)?;
                expect_eq("whether the answer came before", answered, is_new)?;
                let text = String::from_utf8_lossy(&packet.payload).into_owned();
                expect_eq("the payload", text, format!("packet {came}"))?;
                came += 1;
            }
        }
    }
    ensure!(answered, "there was no answer");
    peer.set_cids(OLD_HOST, NEW_GUEST);
    peer.set_ports(HOST_PORT, requested.context("there was no request")?);
    peer.send(Op::RESPONSE);
    connect.wait::<()>(LIMIT).context("connect()")?;
    Ok(())
}

/// The credit in packets that wait is older than that in the answer, which goes before them: a peer that believes them gets news
/// of the rest in time.
pub fn credit_of_packets_that_wait(lab: &Lab) -> Result<()> {
    const PACKETS: usize = 500;
    const PART: u32 = 3_500;
    /// Too little to be worth an update.
    const BEFORE: u32 = 50 * PART;
    /// Several times what the guest's buffer takes.
    const AFTER: u32 = 200 * PART;
    let guest = guest(lab)?;
    let (mut peer, _listener, fd) = connected(&guest)?;
    guest.device.hold_tx(true);
    for _ in 0..PACKETS {
        expect_eq("send()", guest.send(fd, "waits")?, 5)?;
    }
    let read_part = |peer: &Peer| -> Result<()> {
        peer.send_payload(&[1; PART as usize]);
        expect_eq("recv()", guest.recv_len(fd, PART as usize)?, PART as usize)
    };
    for _ in 0..BEFORE / PART {
        read_part(&peer)?;
    }
    guest.device.update_cids(&update(vec![tuple(HOST_PORT)]));
    guest.wait_counter("cid_updates", 1)?;
    peer.set_cids(NEW_HOST, NEW_GUEST);
    guest.device.hold_tx(false);

    let (mut came, mut room_until, mut sent) = (0, 0, BEFORE);
    while sent < BEFORE + AFTER {
        if came < PACKETS || room_until < sent + PART {
            let packet = peer.next("what waited, and news of room")?;
            came += usize::from(packet.op == Op::RW);
            room_until = packet.fwd_cnt + packet.buf_alloc;
        } else {
            read_part(&peer)?;
            sent += PART;
        }
    }
    Ok(())
}

/// Packets of before the update that the guest has not looked at, and packets behind it.
pub fn packets_before_and_after(lab: &Lab) -> Result<()> {
    let guest = guest(lab)?;
    let listener = guest.listener(PORT)?;
    let mut peer = Peer::watch(&guest);
    for round in 0..30 {
        let (old_guest, new_guest) = (OLD_GUEST + round, OLD_GUEST + round + 1);
        let host_port = HOST_PORT + round as u32 * 10;
        peer.set_cids(OLD_HOST, old_guest);
        let kept = connect(&guest, &mut peer, listener, host_port)?;
        let old = connect(&guest, &mut peer, listener, host_port + 1)?;
        guest.device.hold_rx(true);
        peer.set_ports(host_port, PORT);
        for at in 0..20 {
            peer.send_payload(format!("{at},").as_bytes());
        }
        // A connection of before, which the update does not list.
        peer.set_ports(host_port + 2, PORT);
        peer.send(Op::REQUEST);
        guest.device.update_cids(&Update {
            generation: round as u32,
            old_guest_cid: old_guest,
            new_guest_cid: new_guest,
            tuples: vec![Tuple {
                host_old_cid: OLD_HOST,
                host_new_cid: OLD_HOST,
                ..tuple(host_port)
            }],
        });
        // One of after, from the same port as one of before.
        peer.set_cids(OLD_HOST, new_guest);
        peer.set_ports(host_port + 1, PORT);
        peer.send(Op::REQUEST);
        guest.device.hold_rx(false);

        let mut expected = String::new();
        for at in 0..20 {
            expected += &format!("{at},");
        }
        let mut received = String::new();
        while received.len() < expected.len() {
            received += &guest.recv(kept, 99)?;
        }
        expect_eq("what the kept one has received", received, expected)?;
        expect_errno("recv() on the old one", guest.recv(old, 1), "ECONNRESET")?;
        let early = guest.accept(listener)?;
        expect_errno(
            "recv() on that of before",
            guest.recv(early, 1),
            "ECONNRESET",
        )?;
        let late = guest.accept(listener)?;
        expect_eq("send() on that of after", guest.send(late, "x")?, 1)?;
        let packet = peer.find(Op::RW)?;
        expect_eq("its CID", packet.src_cid, new_guest)?;
        for fd in [kept, old, early, late] {
            guest.close(fd)?;
        }
        for host_port in [host_port, host_port + 1] {
            // The guest says goodbye on both that are alive.
            peer.find(Op::SHUTDOWN)?;
            peer.set_ports(host_port, PORT);
            peer.send(Op::RST);
        }
    }
    Ok(())
}

/// The receiver has stopped because too many answers wait, and packets of before the update are not handled yet.
pub fn behind_a_flood(lab: &Lab) -> Result<()> {
    let guest = guest(lab)?;
    let (mut peer, _listener, fd) = connected(&guest)?;
    guest.device.hold_tx(true);
    for at in 0..400 {
        // Nobody has this port, so RST is due.
        let mut stray = peer.packet(Op::RW);
        stray.dst_port = 50_000 + at;
        guest.device.inject(stray);
    }
    peer.send_payload(b"before");
    guest.wait_congested()?;
    guest.device.update_cids(&update(vec![tuple(HOST_PORT)]));
    std::thread::sleep(A_WHILE);
    expect_eq(
        "updates that were applied",
        guest.counter("cid_updates")?,
        0,
    )?;
    guest.device.hold_tx(false);
    while peer.find(Op::CREDIT_REQUEST)?.src_cid != NEW_GUEST {}
    expect_eq("recv()", guest.recv(fd, 99)?, "before".to_owned())?;
    peer.set_cids(NEW_HOST, NEW_GUEST);
    peer.send_payload(b"after");
    expect_eq("recv()", guest.recv(fd, 99)?, "after".to_owned())
}

/// With the CIDs of before, and packets of after the update that the driver could take for ones of before: it looks for
/// the event first.
pub fn same_cids(lab: &Lab) -> Result<()> {
    let guest = guest(lab)?;
    let (mut peer, _listener, kept) = connected(&guest)?;
    let made = guest.socket(STREAM)?;
    let connecting = guest.start_connect(made, OLD_HOST as u32, HOST_PORT);
    let request = peer.expect(Op::REQUEST)?;

    let listed = Tuple {
        host_new_cid: OLD_HOST,
        ..tuple(HOST_PORT)
    };
    guest.device.update_cids_silently(&Update {
        new_guest_cid: OLD_GUEST,
        ..update(vec![listed])
    });
    peer.set_ports(HOST_PORT, PORT);
    peer.send_payload(b"at once");
    peer.set_ports(HOST_PORT, request.src_port);
    peer.send(Op::RESPONSE);

    connecting
        .wait::<()>(LIMIT)
        .context("connect() that was under way")?;
    expect_eq(
        "the addresses of the answer",
        addresses(&peer.expect(Op::CREDIT_REQUEST)?),
        ((OLD_GUEST, PORT), (OLD_HOST, HOST_PORT)),
    )?;
    expect_eq("recv()", guest.recv(kept, 99)?, "at once".to_owned())?;
    guest.send(made, "established")?;
    expect_eq(
        "what the peer reads",
        peer.find(Op::RW)?.payload,
        b"established".to_vec(),
    )?;
    expect_eq("refused updates", guest.counter("refused_updates")?, 0)?;
    expect_eq(
        "connections that went on",
        guest.counter("kept_connections")?,
        1,
    )
}

/// A connection goes on through many updates, several of which are under way at once.
pub fn again_and_again(lab: &Lab) -> Result<()> {
    let guest = guest(lab)?;
    let (mut peer, _listener, fd) = connected(&guest)?;
    let mut cids = (OLD_HOST, OLD_GUEST);
    for round in 1..=50 {
        let (host, guest_cid) = cids;
        cids = (OLD_HOST + round, OLD_GUEST + round);
        guest.device.update_cids(&Update {
            generation: round as u32,
            old_guest_cid: guest_cid,
            new_guest_cid: cids.1,
            tuples: vec![Tuple {
                host_old_cid: host,
                host_new_cid: cids.0,
                ..tuple(HOST_PORT)
            }],
        });
        if round % 5 == 0 {
            peer.set_cids(cids.0, cids.1);
            peer.set_ports(HOST_PORT, PORT);
            while addresses(&peer.expect(Op::CREDIT_REQUEST)?)
                != ((cids.1, PORT), (cids.0, HOST_PORT))
            {}
            peer.send_payload(b"x");
            expect_eq("recv()", guest.recv(fd, 99)?, "x".to_owned())?;
        }
    }
    expect_eq("updates", guest.counter("cid_updates")?, 50)
}

/// An update that lists nothing is a transport reset.
pub fn update_of_nothing(lab: &Lab) -> Result<()> {
    let guest = guest(lab)?;
    let (mut peer, listener, fd) = connected(&guest)?;
    guest.device.update_cids(&update(vec![]));
    expect_errno("recv()", guest.recv(fd, 1), "ECONNRESET")?;
    expect_eq("the CID", guest.local_cid()?, NEW_GUEST as u32)?;
    peer.expect_silence()?;
    peer.set_cids(NEW_HOST, NEW_GUEST);
    connect(&guest, &mut peer, listener, HOST_PORT)?;
    Ok(())
}

/// Updates that cannot be: all connections are reset, what they list is answered with RST, and the guest serves on.
pub fn refused_updates(lab: &Lab) -> Result<()> {
    let guest = guest(lab)?;
    let listener = guest.listener(PORT)?;
    let mut peer = Peer::watch(&guest);
    let mut guest_cid = OLD_GUEST;
    let good = |guest_cid: u64| Update {
        // Otherwise it could be the rest of the one before.
        generation: guest_cid as u32,
        old_guest_cid: guest_cid,
        new_guest_cid: guest_cid + 1,
        ..update(vec![tuple(HOST_PORT)])
    };
    let with = |guest_cid: u64, change: &dyn Fn(&mut Tuple)| {
        let mut bad = tuple(HOST_PORT + 1);
        change(&mut bad);
        let update = good(guest_cid);
        update.part(2, 0, 2, &[tuple(HOST_PORT), bad])
    };
    type Parts = Vec<Vec<u8>>;
    // Each has how many tuples the driver can read, and answer.
    type MakeParts<'a> = dyn Fn(u64) -> Parts + 'a;
    let cases: &[(&str, u32, &MakeParts<'_>)] = &[
        ("a reserved old CID", 1, &|cid| {
            vec![with(cid, &|tuple| tuple.host_old_cid = 0)]
        }),
        ("a reserved new CID", 1, &|cid| {
            vec![with(cid, &|tuple| tuple.host_new_cid = u64::from(CID_ANY))]
        }),
        ("a wide CID", 1, &|cid| {
            vec![with(cid, &|tuple| tuple.host_new_cid = 1 << 32)]
        }),
        ("the guest's own CID", 2, &|cid| {
            vec![with(cid, &|tuple| tuple.host_new_cid = cid + 1)]
        }),
        ("a connection twice", 2, &|cid| {
            vec![with(cid, &|tuple| tuple.host_port = HOST_PORT)]
        }),
        ("two connections that become one", 2, &|cid| {
            vec![with(cid, &|tuple| {
                tuple.host_port = HOST_PORT;
                tuple.host_old_cid = OLD_HOST + 1;
            })]
        }),
        ("an unknown type", 1, &|cid| {
            vec![with(cid, &|tuple| tuple.socket_type = 3)]
        }),
        ("another old CID of the guest", 1, &|cid| {
            let mut update = good(cid);
            update.old_guest_cid = cid + 5;
            update.to_events()
        }),
        ("a reserved CID of the guest", 1, &|cid| {
            let mut update = good(cid);
            update.new_guest_cid = 2;
            update.to_events()
        }),
        ("a part that is missing", 2, &|cid| {
            let tuple = [tuple(HOST_PORT)];
            vec![
                good(cid).part(3, 0, 1, &tuple),
                good(cid).part(3, 2, 1, &tuple),
            ]
        }),
        ("a part that comes again", 2, &|cid| {
            let tuple = [tuple(HOST_PORT)];
            vec![
                good(cid).part(3, 0, 1, &tuple),
                good(cid).part(3, 0, 1, &tuple),
            ]
        }),
        ("too many tuples", 1, &|cid| {
            vec![good(cid).part(65537, 0, 1, &[tuple(HOST_PORT)])]
        }),
        ("a part behind the end", 1, &|cid| {
            vec![good(cid).part(1, 1, 1, &[tuple(HOST_PORT)])]
        }),
        ("an empty part", 0, &|cid| {
            vec![good(cid).part(1, 0, 0, &[])]
        }),
        ("reserved bits", 1, &|cid| {
            let mut event = good(cid).part(1, 0, 1, &[tuple(HOST_PORT)]);
            event[38] = 1;
            vec![event]
        }),
        ("reserved bits of a tuple", 0, &|cid| {
            let mut event = good(cid).part(1, 0, 1, &[tuple(HOST_PORT)]);
            event[71] = 1;
            vec![event]
        }),
    ];
    for (what, answers, parts) in cases {
        peer.set_cids(OLD_HOST, guest_cid);
        let fd = connect(&guest, &mut peer, listener, HOST_PORT).context(*what)?;
        let refused = guest.counter("refused_updates")?;
        guest.device.set_guest_cid(guest_cid + 1);
        guest.device.send_update_parts(parts(guest_cid));
        expect_errno(
            &format!("recv() after an update with {what}"),
            guest.recv(fd, 1),
            "ECONNRESET",
        )?;
        guest.wait_counter("refused_updates", refused + 1)?;
        guest_cid += 1;
        expect_eq(
            &format!("the CID after an update with {what}"),
            u64::from(guest.local_cid()?),
            guest_cid,
        )?;
        guest.close(fd)?;
        for _ in 0..*answers {
            peer.expect(Op::RST)
                .with_context(|| format!("the answers to {what}"))?;
        }
    }
    peer.expect_silence()
}

/// More comes of a refused update after a response of before it has made a connection that it lists.
pub fn rest_of_a_refused_update(lab: &Lab) -> Result<()> {
    let guest = guest(lab)?;
    let mut peer = Peer::watch(&guest);
    peer.set_cids(OLD_HOST, OLD_GUEST);
    let made = guest.socket(STREAM)?;
    let connecting = guest.start_connect(made, OLD_HOST as u32, HOST_PORT);
    let request = peer.expect(Op::REQUEST)?;
    peer.set_ports(HOST_PORT, request.src_port);
    let refused = Update {
        new_guest_cid: OLD_GUEST,
        ..update(Vec::new())
    };
    let listed = |host_port| Tuple {
        host_new_cid: OLD_HOST,
        guest_port: request.src_port,
        ..tuple(host_port)
    };
    // The first part is missing.
    let part = |first, tuple| vec![refused.part(3, first, 1, &[tuple])];
    guest
        .device
        .send_update_parts(part(1, listed(HOST_PORT + 1)));
    expect_eq(
        "the port in the answer",
        peer.expect(Op::RST)?.dst_port,
        HOST_PORT + 1,
    )?;
    peer.send(Op::RESPONSE);
    connecting.wait::<()>(LIMIT).context("connect()")?;
    peer.expect(Op::CREDIT_UPDATE)?;
    guest.device.send_update_parts(part(2, listed(HOST_PORT)));
    expect_eq(
        "the port in the answer",
        peer.expect(Op::RST)?.dst_port,
        HOST_PORT,
    )?;
    expect_errno("recv()", guest.recv(made, 1), "ECONNRESET")?;
    expect_eq("refused updates", guest.counter("refused_updates")?, 1)
}
