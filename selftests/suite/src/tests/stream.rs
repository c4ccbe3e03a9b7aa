// SPDX-License-Identifier: GPL-2.0

//! Stream sockets as applications use them.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use serde_json::json;
use vsock_device::packet::{SEQ_EOM, SHUTDOWN_RCV, SHUTDOWN_SEND};
use vsock_device::{Op, Packet, HOST_CID};

use crate::lab::{
    accept_at_host, expect_eq, expect_errno, Guest, Lab, Peer, A_WHILE, BULK_LIMIT, CID_ANY,
    GUEST_CID, LIMIT, NO_ANSWER, PORT, SEQPACKET, STREAM,
};
use crate::Driver;

pub(super) const HOST: u32 = HOST_CID as u32;

/// What a packet carries at most, in bytes.
pub(super) const PACKET: usize = 64 * 1024;

/// How much goes each way where the amount matters, in bytes.
const BULK: u64 = 4 << 20;

/// A guest with the driver under test and one with the C driver, each as client and as server, both ways at once.
pub fn between_guests(lab: &Lab) -> Result<()> {
    let ours = lab.guest()?;
    let theirs = lab.guest_with(GUEST_CID + 1, Some(Driver::C), &[])?;
    for (server, client) in [(&ours, &theirs), (&theirs, &ours)] {
        let listener = server.listener(PORT)?;
        let client_fd = client.socket(STREAM)?;
        // Without this the core keeps connections to guests' CIDs for a host's transport.
        client.connect(client_fd, server.cid, PORT)?;
        let server_fd = server.accept(listener)?;
        expect_eq(
            "the server's peer",
            server.peer_address(server_fd)?.0,
            client.cid,
        )?;
        let moving = [
            client.start_send_pattern(client_fd, 1, BULK),
            server.start_send_pattern(server_fd, 2, BULK),
            server.start_recv_pattern(server_fd, 1, BULK),
            client.start_recv_pattern(client_fd, 2, BULK),
        ];
        for moved in moving {
            expect_eq("bytes moved", moved.wait::<u64>(LIMIT)?, BULK)?;
        }
        client.close(client_fd)?;
        expect_eq(
            "what the server reads at the end",
            server.recv(server_fd, 1)?,
            String::new(),
        )?;
        server.close(server_fd)?;
        server.close(listener)?;
    }
    Ok(())
}

/// A program of the host connects to the guest and the other way round, through Unix sockets.
pub fn over_the_bridge(lab: &Lab) -> Result<()> {
    exchange_over_the_bridge(&lab.guest()?)
}

/// Moves data over connections that the host and the guest make.
pub(super) fn exchange_over_the_bridge(guest: &Guest) -> Result<()> {
    let listener = guest.listener(PORT)?;
    let mut from_host = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    exchange(guest, fd, &mut from_host).context("the host has connected")?;
    guest.close(listener)?;

    let host_listener = guest.host_listener(PORT)?;
    let fd = guest.socket(STREAM)?;
    guest.connect(fd, HOST, PORT)?;
    let mut at_host = accept_at_host(&host_listener)?;
    exchange(guest, fd, &mut at_host).context("the guest has connected")
}

/// Moves data both ways and ends the connection from the host's side.
fn exchange(guest: &Guest, fd: i32, host: &mut std::os::unix::net::UnixStream) -> Result<()> {
    host.set_read_timeout(Some(LIMIT))?;
    let sending = guest.start_send_pattern(fd, 7, BULK);
    let mut received = vec![0; BULK as usize];
    host.read_exact(&mut received)
        .context("reading at the host")?;
    expect_eq("bytes sent by the guest", sending.wait::<u64>(LIMIT)?, BULK)?;
    // What the guest sent comes back, and the guest knows what it was.
    let returning = guest.start_recv_pattern(fd, 7, BULK);
    host.write_all(&received).context("writing at the host")?;
    expect_eq("bytes that came back", returning.wait::<u64>(LIMIT)?, BULK)?;
    host.shutdown(Shutdown::Write)?;
    expect_eq("the guest's last read", guest.recv(fd, 1)?, String::new())?;
    guest.close(fd)?;
    let mut rest = Vec::new();
    host.read_to_end(&mut rest)
        .context("reading to the end at the host")?;
    expect_eq("bytes after the guest's close", rest.len(), 0)
}

/// send() of memory of which a part cannot be read sends what is before that, and fails where nothing is.
pub fn unreadable_memory(lab: &Lab) -> Result<()> {
    const PAGE: usize = 4096;
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let mut stream = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    let send = |readable: usize| {
        let params = json!({"fd": fd, "len": 2 * PACKET, "readable": readable});
        guest.start("send_bytes", params).wait::<usize>(LIMIT)
    };
    expect_errno("send() of nothing that can be read", send(0), "EFAULT")?;
    let sent = send(PACKET + PAGE)?;
    ensure!(
        (PACKET..=PACKET + PAGE).contains(&sent),
        "send() has sent {sent} bytes, of {} that can be read",
        PACKET + PAGE
    );
    guest.send(fd, "after")?;
    let mut received = vec![0; sent + 5];
    stream.read_exact(&mut received)?;
    expect_eq("what follows", &received[sent..], b"after")
}

/// Nobody listens: ECONNRESET at once, as the C driver has it, and the socket can try again.
pub fn connect_refused(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let fd = guest.socket(STREAM)?;
    expect_errno(
        "connect() to nobody",
        guest.connect(fd, HOST, PORT),
        "ECONNRESET",
    )?;
    let _listener = guest.host_listener(PORT)?;
    guest.connect(fd, HOST, PORT)?;
    Ok(())
}

/// Lets a socket connect to a host that does not answer. Returns the request.
fn connect_in_vain(guest: &Guest, peer: &Peer, fd: i32) -> Result<Packet> {
    guest.set_connect_timeout(fd, NO_ANSWER)?;
    expect_errno(
        "connect() without an answer",
        guest.connect(fd, HOST, PORT),
        "ETIMEDOUT",
    )?;
    peer.expect(Op::REQUEST)
}

/// The host does not answer: ETIMEDOUT, and an answer that comes later is refused.
pub fn connect_timeout(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let peer = Peer::watch(&guest);
    let fd = guest.socket(STREAM)?;
    let request = connect_in_vain(&guest, &peer, fd)?;
    guest.device.inject(request.reply(Op::RESPONSE));
    let rst = peer.expect(Op::RST)?;
    expect_eq("the port that refuses", rst.src_port, request.src_port)
}

/// A request is repeated where a connect() that a signal or its timeout has ended is called again: the peer is answered
/// again, and it is the same connection. After something was sent on it the peer is asked whether it has it.
pub fn connect_again(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let mut peer = Peer::connect(&guest)?;
    peer.send(Op::REQUEST);
    peer.expect(Op::RESPONSE)?;
    let fd = guest.accept(listener)?;
    expect_eq("send()", guest.send(fd, "hello")?, 5)?;
    let hello = peer.expect(Op::RW)?.payload;
    expect_eq("the payload", hello, b"hello".to_vec())?;
    peer.send(Op::REQUEST);
    peer.expect(Op::CREDIT_UPDATE)?;
    peer.send_payload(b"world");
    expect_eq("recv()", guest.recv(fd, 99)?, "world".to_owned())?;
    expect_eq(
        "another connection",
        guest.poll(listener, libc::POLLIN, Duration::ZERO)?,
        0,
    )?;

    // A peer that was started anew has neither the connection nor what was sent.
    peer.set_ports(5001, PORT);
    peer.send(Op::REQUEST);
    peer.expect(Op::RESPONSE)?;
    let fd = guest.accept(listener)?;
    guest.send(fd, "hello")?;
    peer.expect(Op::RW)?;
    peer.send(Op::REQUEST);
    peer.expect(Op::CREDIT_UPDATE)?;
    peer.send(Op::RST);
    expect_eq("recv()", guest.recv(fd, 99)?, String::new())?;
    peer.send(Op::REQUEST);
    peer.expect(Op::RESPONSE)?;
    guest.accept(listener)?;

    let socket = guest.socket(STREAM)?;
    let first = connect_in_vain(&guest, &peer, socket)?;
    guest.set_connect_timeout(socket, LIMIT)?;
    let connecting = guest.start_connect(socket, HOST, PORT);
    let second = peer.expect(Op::REQUEST)?;
    expect_eq("the port", second.src_port, first.src_port)?;
    guest.device.inject(first.reply(Op::RESPONSE));
    Ok(connecting.wait::<()>(LIMIT)?)
}

/// connect() of a non-blocking socket, and what poll() says before and after the answer.
pub fn nonblocking_connect(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let peer = Peer::watch(&guest);
    let fd = guest.socket(STREAM)?;
    guest.set_nonblocking(fd, true)?;
    expect_errno("connect()", guest.connect(fd, HOST, PORT), "EINPROGRESS")?;
    let request = peer.expect(Op::REQUEST)?;
    expect_errno(
        "a second connect()",
        guest.connect(fd, HOST, PORT),
        "EALREADY",
    )?;
    let mut response = request.reply(Op::RESPONSE);
    response.buf_alloc = 4096;
    guest.device.inject(response);
    expect_eq(
        "poll()",
        guest.poll(fd, libc::POLLOUT, LIMIT)?,
        libc::POLLOUT,
    )?;
    expect_eq(
        "SO_ERROR",
        guest.option(fd, libc::SOL_SOCKET, libc::SO_ERROR, 4)?,
        vec![0; 4],
    )?;
    expect_errno(
        "a third connect()",
        guest.connect(fd, HOST, PORT),
        "EISCONN",
    )?;
    expect_eq("send()", guest.send(fd, "hello")?, 5)?;
    expect_eq(
        "the payload",
        peer.expect(Op::RW)?.payload,
        b"hello".to_vec(),
    )
}

/// More connections than the backlog has room for are refused until some are accepted.
pub fn backlog_full(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.socket(STREAM)?;
    guest.bind(listener, CID_ANY, PORT)?;
    guest.listen(listener, 1)?;
    let peer = Peer::watch(&guest);
    let mut accepted = 0;
    for port in 0..8 {
        let mut request = peer.packet(Op::REQUEST);
        request.src_port = 6000 + port;
        guest.device.inject(request);
        match peer.next("an answer to the request")?.op {
            Op::RESPONSE => accepted += 1,
            op => expect_eq("the answer to a request too many", op, Op::RST)?,
        }
    }
    ensure!(
        (1..8).contains(&accepted),
        "{accepted} of 8 connections fit into a backlog of 1"
    );
    for _ in 0..accepted {
        guest.accept(listener)?;
    }
    Peer::connect(&guest)?;
    Ok(())
}

/// Ports in use, ports for the privileged, addresses of others.
pub fn bind_conflicts(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let first = guest.listener(PORT)?;
    let second = guest.socket(STREAM)?;
    expect_errno(
        "bind() to a port in use",
        guest.bind(second, CID_ANY, PORT),
        "EADDRINUSE",
    )?;
    expect_errno(
        "bind() to another's CID",
        guest.bind(second, 99, PORT),
        "EADDRNOTAVAIL",
    )?;
    guest.bind(second, GUEST_CID, PORT + 1)?;
    expect_eq(
        "getsockname()",
        guest.own_address(second)?,
        (GUEST_CID, PORT + 1),
    )?;
    guest.close(first)?;
    let third = guest.socket(STREAM)?;
    guest.bind(third, CID_ANY, PORT)?;
    Ok(())
}

/// MSG_PEEK leaves the data, MSG_DONTWAIT does not wait, MSG_WAITALL waits for all.
pub fn peek_and_dontwait(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    expect_errno(
        "recv() of nothing",
        guest.recv_flags(fd, 1, libc::MSG_DONTWAIT),
        "EAGAIN",
    )?;
    peer.send_payload(b"hello ");
    peer.send_payload(b"world");
    let all = json!({"fd": fd, "len": 11, "flags": libc::MSG_WAITALL | libc::MSG_PEEK});
    // What is peeked at is not waited for, so the second packet may be missing yet; it is there in the end.
    crate::lab::wait_for("both packets", || Ok(guest.siocinq(fd)? == 11))?;
    expect_eq(
        "MSG_PEEK",
        guest.start("recv", all).wait::<String>(LIMIT)?,
        "hello world".to_owned(),
    )?;
    expect_eq("recv()", guest.recv(fd, 6)?, "hello ".to_owned())?;
    expect_eq(
        "MSG_PEEK of the rest",
        guest.recv_flags(fd, 99, libc::MSG_PEEK)?,
        "world".to_owned(),
    )?;
    let waiting = guest.start(
        "recv",
        json!({"fd": fd, "len": 10, "flags": libc::MSG_WAITALL}),
    );
    waiting.expect_blocked(A_WHILE)?;
    peer.send_payload(b"!!!!!");
    expect_eq(
        "MSG_WAITALL",
        waiting.wait::<String>(LIMIT)?,
        "world!!!!!".to_owned(),
    )
}

/// The guest sends no more: the peer is told, and can still send.
pub fn shutdown_send(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    guest.shutdown(fd, libc::SHUT_WR)?;
    expect_eq(
        "the flags of SHUTDOWN",
        peer.expect(Op::SHUTDOWN)?.flags,
        SHUTDOWN_SEND,
    )?;
    expect_errno("send() after shutdown()", guest.send(fd, "x"), "EPIPE")?;
    peer.send_payload(b"still here");
    expect_eq("recv()", guest.recv(fd, 99)?, "still here".to_owned())?;
    guest.shutdown(fd, libc::SHUT_RD)?;
    expect_eq(
        "the flags of SHUTDOWN",
        peer.expect(Op::SHUTDOWN)?.flags,
        SHUTDOWN_RCV,
    )?;
    expect_eq(
        "recv() after shutdown()",
        guest.recv(fd, 99)?,
        String::new(),
    )
}

/// The peer sends no more, receives no more, and closes.
pub fn shutdown_by_peer(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    peer.send_payload(b"last words");
    peer.send_shutdown(SHUTDOWN_SEND);
    let wanted = libc::POLLIN | libc::POLLRDHUP;
    crate::lab::wait_for("poll() to see the end", || {
        Ok(guest.poll(fd, wanted, LIMIT)? & libc::POLLRDHUP != 0)
    })?;
    expect_eq(
        "recv() of what was sent before",
        guest.recv(fd, 99)?,
        "last words".to_owned(),
    )?;
    expect_eq("recv() at the end", guest.recv(fd, 99)?, String::new())?;
    expect_eq("send() the other way", guest.send(fd, "heard")?, 5)?;
    expect_eq("the payload", peer.find(Op::RW)?.payload, b"heard".to_vec())?;
    peer.send_shutdown(SHUTDOWN_RCV);
    peer.find(Op::RST)?;
    expect_errno(
        "send() to a peer that is gone",
        guest.send(fd, "x"),
        "EPIPE",
    )
}

/// close() with data that was not read: the peer is told that the connection is over.
pub fn close_with_unread_data(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    peer.send_payload(b"never read");
    crate::lab::wait_for("the data", || Ok(guest.siocinq(fd)? == 10))?;
    guest.close(fd)?;
    expect_eq(
        "the flags of SHUTDOWN",
        peer.find(Op::SHUTDOWN)?.flags,
        SHUTDOWN_RCV | SHUTDOWN_SEND,
    )?;
    peer.send(Op::RST);
    // The connection is forgotten: a packet of it is refused.
    peer.send_payload(b"too late");
    peer.find(Op::RST)?;

    // The same where both ends close: nobody waits for another answer.
    peer.send(Op::REQUEST);
    peer.find(Op::RESPONSE)?;
    let fd = guest.accept(listener)?;
    peer.send_payload(b"never read");
    crate::lab::wait_for("the data", || Ok(guest.siocinq(fd)? == 10))?;
    guest.close(fd)?;
    peer.find(Op::SHUTDOWN)?;
    peer.send_shutdown(SHUTDOWN_RCV | SHUTDOWN_SEND);
    peer.expect(Op::RST)?;
    let timeouts = guest.counter("resets_by_close_timeout")?;
    expect_eq("connections that timed out", timeouts, 0)
}

/// A peer that has ended a connection makes one between the same ports, before the guest has closed the old one. Nothing
/// of that is sent any more, for the peer would take it for the new one's.
pub fn ports_used_anew(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    for ends_by_rst in [true, false] {
        let peer = Peer::connect(&guest)?;
        let old = guest.accept(listener)?;
        peer.send_payload(b"of the old one");
        // More packets than the device has room for, so that some wait in the guest.
        guest.device.hold_tx(true);
        guest.start_send_small(old, 500).wait::<u64>(LIMIT)?;
        if ends_by_rst {
            peer.send(Op::RST);
        } else {
            peer.send_shutdown(SHUTDOWN_RCV | SHUTDOWN_SEND);
        }
        peer.send(Op::REQUEST);
        let new = guest.accept(listener)?;
        peer.send_payload(b"of the new one");
        expect_eq(
            "recv() on the old connection",
            guest.recv(old, 99)?,
            "of the old one".to_owned(),
        )?;
        guest.device.hold_tx(false);
        peer.find(Op::RESPONSE)?;
        peer.expect_silence()?;
        guest.shutdown(old, libc::SHUT_WR)?;
        guest.close(old)?;
        peer.expect_silence()?;
        expect_eq(
            "recv() on the new connection",
            guest.recv(new, 99)?,
            "of the new one".to_owned(),
        )?;
        guest.close(new)?;
        peer.expect(Op::SHUTDOWN)?;
        peer.send(Op::RST);
    }
    Ok(())
}

/// A peer that does not answer the guest's close gets RST when its time is up.
pub fn close_timeout(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    guest.close(fd)?;
    peer.expect(Op::SHUTDOWN)?;
    // The peer has time to answer.
    peer.expect_silence()?;
    peer.expect(Op::RST)?;
    peer.send_payload(b"too late");
    peer.expect(Op::RST)?;
    Ok(())
}

/// SO_LINGER: close() waits until the device has taken what was sent.
pub fn linger(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    let on_for_a_minute = [1_i32.to_ne_bytes(), 60_i32.to_ne_bytes()].concat();
    guest.set_option(fd, libc::SOL_SOCKET, libc::SO_LINGER, &on_for_a_minute)?;
    guest.device.hold_tx(true);
    expect_eq("send()", guest.send(fd, "unsent")?, 6)?;
    let closing = guest.start("close", json!({"fd": fd}));
    closing.expect_blocked(A_WHILE)?;
    guest.device.hold_tx(false);
    expect_eq(
        "the payload",
        peer.find(Op::RW)?.payload,
        b"unsent".to_vec(),
    )?;
    closing.wait::<()>(LIMIT).context("close()")?;
    peer.find(Op::SHUTDOWN)?;
    Ok(())
}

/// Writing to a connection that the peer has ended.
pub fn epipe(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    peer.send(Op::RST);
    let hup = guest.poll(fd, libc::POLLRDHUP, LIMIT)?;
    ensure!(hup & libc::POLLRDHUP != 0, "poll() says {hup:#x}");
    expect_errno("send()", guest.send(fd, "x"), "EPIPE")?;
    expect_eq("recv()", guest.recv(fd, 1)?, String::new())
}

/// shutdown() when the peer has ended the connection: readers find what was sent before, and the end of the stream.
pub fn shutdown_after_the_end(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    for (end, unread) in [(Op::RST, ""), (Op::RST, "last words"), (Op::SHUTDOWN, "")] {
        let peer = Peer::connect(&guest)?;
        let fd = guest.accept(listener)?;
        if !unread.is_empty() {
            peer.send_payload(unread.as_bytes());
        }
        guest.device.inject(Packet {
            flags: SHUTDOWN_RCV | SHUTDOWN_SEND,
            ..peer.packet(end)
        });
        let poll = guest.poll(fd, libc::POLLRDHUP, LIMIT)?;
        ensure!(poll & libc::POLLRDHUP != 0, "poll() says {poll:#x}");
        if end == Op::SHUTDOWN {
            peer.expect(Op::RST)?;
        }
        guest.shutdown(fd, libc::SHUT_WR)?;
        if !unread.is_empty() {
            expect_eq("what was unread", guest.recv(fd, 99)?, unread.to_owned())?;
        }
        expect_eq("recv() at the end", guest.recv(fd, 1)?, String::new())?;
        guest.close(fd)?;
        // The peer has no such connection any more.
        peer.expect_silence()?;
    }
    Ok(())
}

/// A program that waits for room finds that the peer reads no more, also where the peer has given no credit and the program itself
/// has something to read.
pub fn poll_for_room_at_the_end(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    for (kind, flags) in [(STREAM, 0), (SEQPACKET, SEQ_EOM)] {
        let listener = guest.listener_of_kind(kind, PORT)?;
        for end in [SHUTDOWN_RCV, SHUTDOWN_RCV | SHUTDOWN_SEND] {
            let mut peer = Peer::watch_kind(&guest, kind);
            peer.set_credit(0, 0);
            peer.send(Op::REQUEST);
            peer.find(Op::RESPONSE)?;
            let fd = guest.accept(listener)?;
            guest.device.inject(Packet {
                flags,
                payload: b"unread".to_vec(),
                ..peer.packet(Op::RW)
            });
            guest.poll(fd, libc::POLLIN, LIMIT)?;
            let polling = guest.start_poll(fd, libc::POLLOUT, LIMIT);
            polling.expect_blocked(A_WHILE)?;
            guest.device.inject(Packet {
                flags: end,
                ..peer.packet(Op::SHUTDOWN)
            });
            let events = polling.wait::<i16>(LIMIT)?;
            ensure!(events & libc::POLLOUT != 0, "poll() says {events:#x}");
            expect_errno("send()", guest.send(fd, "x"), "EPIPE")?;
            expect_eq("recv()", guest.recv(fd, 99)?, "unread".to_owned())?;
            peer.send(Op::RST);
            guest.close(fd)?;
        }
        guest.close(listener)?;
    }
    Ok(())
}

/// shutdown() of an attempt to connect that fails, and of the connection that the socket has later: the peer is told each time.
pub fn shutdown_while_connecting(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let peer = Peer::watch(&guest);
    let fd = guest.socket(STREAM)?;
    let begin = || -> Result<_> {
        let connecting = guest.start_connect(fd, HOST, PORT);
        Ok((connecting, peer.expect(Op::REQUEST)?))
    };
    let shut_down = || {
        guest.shutdown(fd, libc::SHUT_WR)?;
        expect_eq("flags", peer.expect(Op::SHUTDOWN)?.flags, SHUTDOWN_SEND)
    };

    let (connecting, request) = begin()?;
    shut_down()?;
    guest.device.inject(request.reply(Op::RST));
    expect_errno("connect()", connecting.wait::<()>(LIMIT), "ECONNRESET")?;

    let (connecting, request) = begin()?;
    guest.device.inject(request.reply(Op::RESPONSE));
    connecting.wait::<()>(LIMIT).context("connect()")?;
    shut_down()
}

/// Makes so many connections to a listener at once, sends data on each, and ends them; all of it is handled afterwards.
fn use_connections(guest: &Guest, peer: &Peer, listener: i32, count: u32) -> Result<()> {
    let accepting = guest.start("accept_many", json!({"fd": listener, "count": count}));
    for port in 0..count {
        let mut request = peer.packet(Op::REQUEST);
        request.src_port = 10_000 + port;
        guest.device.inject(request);
    }
    let fds: Vec<i32> = accepting.wait(BULK_LIMIT).context("accepting all")?;
    for port in 0..count {
        let mut data = peer.packet(Op::RW);
        data.src_port = 10_000 + port;
        data.payload = format!("{port}").into_bytes();
        guest.device.inject(data);
    }
    for at in [0, count as usize / 2, count as usize - 1] {
        let port = guest.peer_address(fds[at])?.1 - 10_000;
        expect_eq(
            "the data of a connection",
            guest.recv(fds[at], 99)?,
            format!("{port}"),
        )?;
    }
    for fd in fds {
        guest.start("close", json!({"fd": fd}));
    }
    // Each close is answered as a peer does.
    let mut ended = 0;
    while ended < count {
        let packet = peer.next("all connections to be shut down")?;
        if packet.op == Op::SHUTDOWN {
            guest.device.inject(packet.reply(Op::RST));
            ended += 1;
        }
    }
    // The guest has handled all of that when it answers what comes after.
    let mut last = peer.packet(Op::RW);
    last.dst_port = PORT + 1;
    guest.device.inject(last);
    // A socket whose peer was answered late sends one, too.
    while peer.find(Op::RST)?.src_port != PORT + 1 {}
    Ok(())
}

/// Several thousand connections at once, with data on each, and all of their memory back.
pub fn many_connections(lab: &Lab) -> Result<()> {
    const COUNT: u32 = 3000;
    let guest = lab.guest()?;
    let listener = guest.socket(STREAM)?;
    guest.bind(listener, CID_ANY, PORT)?;
    guest.sh(&format!("echo {COUNT} >/proc/sys/net/core/somaxconn"))?;
    guest.listen(listener, COUNT as i32)?;
    let peer = Peer::watch(&guest);
    // The kernel keeps some memory for the next connections, and with KASAN what was freed last.
    use_connections(&guest, &peer, listener, COUNT)?;
    let before = guest.available_memory()?;
    use_connections(&guest, &peer, listener, COUNT)?;
    crate::lab::wait_for("the memory of the connections to come back", || {
        // A connection takes about 4 KiB and its data another page: together some 25 MiB.
        Ok(before - guest.available_memory()? < 4 * 1024)
    })
}
