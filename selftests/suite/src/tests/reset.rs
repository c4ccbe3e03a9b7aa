// SPDX-License-Identifier: GPL-2.0

//! The device has lost all connections, and perhaps has another CID (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`).

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use serde_json::json;
use vsock_device::packet::{SEQ_EOM, SHUTDOWN_RCV, SHUTDOWN_SEND};
use vsock_device::{Op, Packet, HOST_CID};

use crate::lab::{
    accept_at_host, expect_eq, expect_errno, expect_pollerr, wait_for, Guest, Lab, Peer, A_WHILE,
    CID_ANY, GUEST_CID, LIMIT, PORT, PORT_ANY, SEQPACKET, STREAM,
};
use crate::machine::DEFAULT_RING;

/// Waits until the guest knows its new CID.
fn wait_for_cid(guest: &Guest, cid: u32) -> Result<()> {
    wait_for(&format!("the guest's CID to be {cid}"), || {
        Ok(guest.local_cid()? == cid)
    })
}

/// What the application sees of a connection that was reset: ECONNRESET, then the end, as with TCP.
fn expect_reset(guest: &Guest, fd: i32) -> Result<()> {
    expect_pollerr(guest, fd)?;
    expect_errno("recv()", guest.recv(fd, 1), "ECONNRESET")?;
    expect_eq("the next recv()", guest.recv(fd, 1)?, String::new())?;
    expect_errno("the next send()", guest.send(fd, "x"), "EPIPE")
}

/// With another CID: connections fail, the listener is reached at the new CID.
pub fn new_cid(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let _from_host = guest.connect_from_host(PORT)?;
    let reader = guest.accept(listener)?;
    let _from_host_too = guest.connect_from_host(PORT)?;
    let writer = guest.accept(listener)?;
    expect_eq("the CID before", guest.local_cid()?, GUEST_CID)?;

    guest.device.transport_reset(u64::from(GUEST_CID + 7));
    wait_for_cid(&guest, GUEST_CID + 7)?;
    expect_reset(&guest, reader)?;
    expect_pollerr(&guest, writer)?;
    expect_errno("send()", guest.send(writer, "x"), "ECONNRESET")?;
    expect_errno("the next send()", guest.send(writer, "x"), "EPIPE")?;
    expect_eq("recv() after that", guest.recv(writer, 1)?, String::new())?;

    let _again = guest
        .connect_from_host(PORT)
        .context("connecting to the listener at the new CID")?;
    let fd = guest.accept(listener)?;
    expect_eq(
        "the address of the new connection",
        guest.own_address(fd)?,
        (GUEST_CID + 7, PORT),
    )
}

/// Sockets that are bound to the guest's own CID have the new one, again and again, also after the device was gone.
pub fn bound_sockets_follow(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.socket(STREAM)?;
    guest.bind(listener, GUEST_CID, PORT)?;
    guest.listen(listener, 8)?;
    let bound = guest.socket(STREAM)?;
    guest.bind(bound, GUEST_CID, PORT + 1)?;
    let any = guest.listener(PORT + 2)?;
    // More than one batch.
    let mut many = Vec::new();
    for number in 0..100 {
        let fd = guest.socket(STREAM)?;
        // The kernel's table has 251 lists; these are all in one of them.
        guest.bind(fd, GUEST_CID, 100_000 + 251 * number)?;
        many.push((fd, 100_000 + 251 * number));
    }
    many.extend([(listener, PORT), (bound, PORT + 1)]);
    let reset_to = |cid: u32| -> Result<()> {
        guest.device.transport_reset(u64::from(cid));
        for (fd, port) in &many {
            wait_for(&format!("port {port} to have CID {cid}"), || {
                Ok(guest.own_address(*fd)? == (cid, *port))
            })?;
        }
        expect_eq(
            "VMADDR_CID_ANY",
            guest.own_address(any)?,
            (u32::MAX, PORT + 2),
        )?;
        for (listener, port) in [(listener, PORT), (any, PORT + 2)] {
            let _stream = guest.connect_from_host(port)?;
            let fd = guest.accept(listener)?;
            expect_eq("the connection", guest.own_address(fd)?, (cid, port))?;
            guest.close(fd)?;
        }
        Ok(())
    };
    for cid in [GUEST_CID + 7, GUEST_CID, GUEST_CID, GUEST_CID + 1] {
        reset_to(cid)?;
    }
    // No CID for a while: the sockets stay as they are, and have the next one.
    let connecting = guest.socket(STREAM)?;
    guest.bind(connecting, GUEST_CID + 1, PORT + 3)?;
    guest.device.transport_reset(0);
    wait_for_cid(&guest, u32::MAX)?;
    let connected = guest.connect(connecting, HOST_CID as u32, PORT);
    expect_errno("connect()", connected, "ENODEV")?;
    reset_to(GUEST_CID + 3)?;
    // One that has tried to connect has it when it tries again.
    let _host = guest.host_listener(PORT)?;
    guest.connect(connecting, HOST_CID as u32, PORT)?;
    expect_eq(
        "the address of the socket that has tried",
        guest.own_address(connecting)?,
        (GUEST_CID + 3, PORT + 3),
    )
}

/// With the same CID, as after a snapshot; calls that block at that moment end, unread and unsent data is gone.
pub fn same_cid_and_blocked_calls(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    // One of its own: a recv() or send() that fails takes the socket's error away, of which poll() tells.
    let (polled, _stream) = connected(&guest)?;
    let listener = guest.listener(PORT)?;
    let mut peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    // A send() that had sent a part would return how much, and the next one might come when recv() has told of the reset.
    peer.set_credit(0, 0);
    peer.send(Op::CREDIT_REQUEST);
    // The answer says that the guest knows the credit.
    peer.expect(Op::CREDIT_UPDATE)?;
    let reading = guest.start("recv", json!({"fd": fd, "len": 1}));
    let sending = guest.start_send_pattern(fd, 1, 5_000);
    let polling = guest.start_poll(polled, libc::POLLIN, LIMIT);
    reading.expect_blocked(A_WHILE)?;
    sending.expect_blocked(A_WHILE)?;
    polling.expect_blocked(A_WHILE)?;
    guest.wait_counter("credit_stalls", 1)?;
    guest.device.transport_reset(u64::from(GUEST_CID));
    expect_errno(
        "the blocked recv()",
        reading.wait::<String>(LIMIT),
        "ECONNRESET",
    )?;
    expect_errno(
        "the blocked send()",
        sending.wait::<u64>(LIMIT),
        "ECONNRESET",
    )?;
    let poll: i16 = polling.wait(LIMIT)?;
    ensure!(
        poll & libc::POLLERR != 0,
        "the blocked poll() says {poll:#x}, without POLLERR"
    );
    guest.device.set_manual(false);
    guest.connect_from_host(PORT)?;
    Ok(())
}

/// A connected stream socket of the guest, whose peer is on the host.
fn connected(guest: &Guest) -> Result<(i32, UnixStream)> {
    let listener = guest.host_listener(PORT + 1)?;
    let fd = guest.socket(STREAM)?;
    guest.connect(fd, HOST_CID as u32, PORT + 1)?;
    Ok((fd, accept_at_host(&listener)?))
}

/// Whoever waits for data when the reset comes learns of it, in whatever way.
pub fn every_blocked_reader(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let ways = [
        "recv",
        "recv with MSG_PEEK",
        "recv with MSG_WAITALL",
        "read",
        "readv",
        "recvmsg",
        "splice",
        "io_uring",
    ];
    let mut waiting = Vec::new();
    for kind in [STREAM, SEQPACKET] {
        for way in ways {
            let fd = guest.socket(kind)?;
            Peer::accept(&guest, fd)?;
            let call = guest.start("receive_by", json!({"fd": fd, "way": way, "len": 100}));
            waiting.push((format!("{way} on a socket of type {kind}"), fd, call));
        }
    }
    guest.device.set_manual(false);
    let (epoll_fd, _stream) = connected(&guest)?;
    let epoll = guest.epoll(epoll_fd, libc::EPOLLIN | libc::EPOLLET)?;
    let ms = LIMIT.as_millis() as i32;
    let epoll_wait = guest.start(
        "epoll_wait",
        json!({"fd": epoll, "events": 0, "timeout_ms": ms}),
    );
    // Two readers of one socket.
    let (shared, _stream) = connected(&guest)?;
    let two = [(); 2].map(|()| guest.start("recv", json!({"fd": shared, "len": 1})));
    for (what, _, call) in &waiting {
        call.expect_blocked(A_WHILE / 8).context(what.clone())?;
    }
    for call in &two {
        call.expect_blocked(A_WHILE).context("one of two readers")?;
    }

    guest.device.transport_reset(u64::from(GUEST_CID));
    for (what, fd, call) in waiting {
        expect_errno(&what, call.wait::<usize>(LIMIT), "ECONNRESET")?;
        expect_eq(
            &format!("recv() after {what}"),
            guest.recv(fd, 1)?,
            String::new(),
        )?;
        expect_errno(
            &format!("send() after {what}"),
            guest.send(fd, "x"),
            "EPIPE",
        )?;
        expect_eq(&format!("SO_ERROR after {what}"), error_of(&guest, fd)?, 0)?;
        expect_eq(&format!("SIOCINQ after {what}"), guest.siocinq(fd)?, 0)?;
    }
    let events: i32 = epoll_wait.wait(LIMIT)?;
    ensure!(
        events & libc::EPOLLERR != 0,
        "epoll says {events:#x}, without EPOLLERR"
    );
    expect_reset(&guest, epoll_fd)?;
    for call in two {
        expect_errno(
            "one of two readers",
            call.wait::<String>(LIMIT),
            "ECONNRESET",
        )?;
    }
    expect_eq(
        "recv() after two readers",
        guest.recv(shared, 1)?,
        String::new(),
    )?;
    expect_eq("what can be read after that", guest.siocinq(shared)?, 0)
}

/// A reader that has got a part of what it waits for gets that, and then learns of the reset.
pub fn reader_with_a_part(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (fd, mut stream) = connected(&guest)?;
    let params = json!({"fd": fd, "way": "recv with MSG_WAITALL", "len": 100});
    let call = guest.start("receive_by", params);
    stream.write_all(b"a part")?;
    // It is the reader's when there is nothing to be read any more.
    guest.wait_counter("rx_bytes", 6)?;
    guest.wait_handled()?;
    wait_for(
        "the reader to take the part",
        || Ok(guest.siocinq(fd)? == 0),
    )?;
    call.expect_blocked(A_WHILE)?;
    guest.device.transport_reset(u64::from(GUEST_CID));
    expect_eq("what the reader has got", call.wait::<usize>(LIMIT)?, 6)?;
    expect_reset(&guest, fd)
}

/// Whoever waits for room when the reset comes learns of it, in whatever way.
pub fn every_blocked_writer(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let ways = [
        "send",
        "write",
        "writev",
        "sendmsg",
        "splice",
        "io_uring",
        "io_uring zerocopy",
    ];
    let mut waiting = Vec::new();
    for kind in [STREAM, SEQPACKET] {
        for way in ways {
            let fd = guest.socket(kind)?;
            Peer::accept(&guest, fd)?;
            waiting.push((format!("{way} on a socket of type {kind}"), fd, way));
        }
    }
    let waiting: Vec<_> = waiting
        .into_iter()
        .map(|(what, fd, way)| {
            let call = guest.start("send_by", json!({"fd": fd, "way": way}));
            (what, fd, call)
        })
        .collect();
    for (what, fd, call) in &waiting {
        wait_for(&format!("{what} to fill the peer's buffer"), || {
            Ok(guest.poll(*fd, libc::POLLOUT, Duration::ZERO)? == 0)
        })?;
        call.expect_blocked(A_WHILE / 8).context(what.clone())?;
    }
    guest.device.transport_reset(u64::from(GUEST_CID));
    for (what, fd, call) in waiting {
        expect_errno(&what, call.wait::<()>(LIMIT), "ECONNRESET")?;
        // What a writer is told by stays for another one that may be blocked, so it may come once more.
        let next = guest.send(fd, "x");
        if next.as_ref().err().map(ToString::to_string).as_deref() != Some("EPIPE") {
            expect_errno(&format!("send() after {what}"), next, "ECONNRESET")?;
        }
        expect_errno("send() after that", guest.send(fd, "x"), "EPIPE")?;
        expect_eq(
            &format!("recv() after {what}"),
            guest.recv(fd, 1)?,
            String::new(),
        )?;
    }
    Ok(())
}

/// The value of `SO_ERROR`.
fn error_of(guest: &Guest, fd: i32) -> Result<i32> {
    let bytes = guest.option(fd, libc::SOL_SOCKET, libc::SO_ERROR, 4)?;
    let bytes = bytes.try_into().ok().context("the length of SO_ERROR")?;
    Ok(i32::from_ne_bytes(bytes))
}

/// `SO_ERROR` says it, once, and is then what the application was told by.
pub fn so_error(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    for kind in [STREAM, SEQPACKET] {
        let fd = guest.socket(kind)?;
        let peer = Peer::accept(&guest, fd)?;
        guest.device.inject(Packet {
            flags: if kind == SEQPACKET { SEQ_EOM } else { 0 },
            payload: b"unread".to_vec(),
            ..peer.packet(Op::RW)
        });
        wait_for("data", || {
            Ok(guest.poll(fd, libc::POLLIN, Duration::ZERO)? != 0)
        })?;
        guest.device.transport_reset(u64::from(GUEST_CID));
        expect_pollerr(&guest, fd)?;
        expect_eq("SO_ERROR", error_of(&guest, fd)?, libc::ECONNRESET)?;
        expect_eq("SO_ERROR again", error_of(&guest, fd)?, 0)?;
        expect_eq("recv()", guest.recv(fd, 1)?, String::new())?;
        expect_errno("send()", guest.send(fd, "x"), "EPIPE")?;
    }
    Ok(())
}

/// Connections of which one direction was shut down, by the application or by the peer; one that the peer has closed
/// has nothing to lose, and what it has sent can still be read.
pub fn half_closed(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (no_more_sending, _stream) = connected(&guest)?;
    guest.shutdown(no_more_sending, libc::SHUT_WR)?;
    let (peer_sends_no_more, stream) = connected(&guest)?;
    stream.shutdown(Shutdown::Write)?;
    expect_eq(
        "the peer's end",
        guest.recv(peer_sends_no_more, 1)?,
        String::new(),
    )?;
    let listener = guest.listener(PORT)?;
    let closed_by_peer = {
        let peer = Peer::connect(&guest)?;
        let fd = guest.accept(listener)?;
        peer.send_payload(b"the last words");
        peer.send(Op::RST);
        guest.device.wait_delivered(LIMIT)?;
        wait_for("the peer's RST", || {
            Ok(guest.poll(fd, libc::POLLRDHUP, Duration::ZERO)? & libc::POLLRDHUP != 0)
        })?;
        fd
    };

    guest.device.transport_reset(u64::from(GUEST_CID));
    expect_errno(
        "recv() after SHUT_WR",
        guest.recv(no_more_sending, 1),
        "ECONNRESET",
    )?;
    expect_errno(
        "send() after SHUT_WR",
        guest.send(no_more_sending, "x"),
        "EPIPE",
    )?;
    expect_pollerr(&guest, peer_sends_no_more)?;
    expect_errno(
        "recv() after the peer's shutdown",
        guest.recv(peer_sends_no_more, 1),
        "ECONNRESET",
    )?;
    expect_errno(
        "send() after the peer's shutdown",
        guest.send(peer_sends_no_more, "x"),
        "EPIPE",
    )?;
    expect_eq(
        "what the peer sent before it closed",
        guest.recv(closed_by_peer, 100)?,
        "the last words".to_owned(),
    )?;
    expect_eq(
        "the end after it",
        guest.recv(closed_by_peer, 100)?,
        String::new(),
    )
}

/// Connections that nobody has accepted yet are reset like any other, in their order, and do not take the place of those
/// that come later.
pub fn accept_queue(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.socket(STREAM)?;
    guest.bind(listener, u32::MAX, PORT)?;
    guest.listen(listener, 3)?;
    let mut old: Vec<UnixStream> = Vec::new();
    for _ in 0..2 {
        let mut stream = guest.connect_from_host(PORT)?;
        stream.write_all(b"of before")?;
        old.push(stream);
    }
    guest.wait_counter("rx_bytes", 18)?;
    guest.device.transport_reset(u64::from(GUEST_CID + 5));
    wait_for_cid(&guest, GUEST_CID + 5)?;
    let mut new = guest.connect_from_host(PORT)?;
    new.write_all(b"of after")?;
    for _ in 0..2 {
        let fd = guest.accept(listener)?;
        expect_eq("its address", guest.own_address(fd)?, (GUEST_CID, PORT))?;
        expect_reset(&guest, fd)?;
        guest.close(fd)?;
    }
    let fd = guest.accept(listener)?;
    expect_eq("its address", guest.own_address(fd)?, (GUEST_CID + 5, PORT))?;
    wait_for("data", || Ok(guest.siocinq(fd)? == 8))?;
    expect_eq("what it reads", guest.recv(fd, 100)?, "of after".to_owned())
}

/// Nothing is sent of a connection that was reset: the peer could take it for one of a new connection with the same
/// addresses.
pub fn silence_afterwards(lab: &Lab) -> Result<()> {
    // Less than what the peer is told of at once.
    const LEN: usize = 100_000;
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    for _ in 0..LEN / 1000 {
        peer.send_payload(&[b'x'; 1000]);
    }
    wait_for("the data", || Ok(guest.siocinq(fd)? == LEN as i32))?;
    expect_eq("bytes read", guest.recv_len(fd, LEN)?, LEN)?;
    guest.device.transport_reset(u64::from(GUEST_CID));
    expect_pollerr(&guest, fd)?;
    // No peer could send so much that does not know of what was read.
    let low_water = 250_000_i32.to_ne_bytes();
    guest.set_option(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &low_water)?;
    peer.expect_silence()?;
    expect_reset(&guest, fd)?;
    guest.close(fd)?;
    peer.expect_silence()?;

    // Of one that the peer had closed what was unread can still be read.
    peer.send(Op::REQUEST);
    peer.expect(Op::RESPONSE)?;
    let fd = guest.accept(listener)?;
    peer.send_payload(b"last words");
    peer.send_shutdown(SHUTDOWN_RCV | SHUTDOWN_SEND);
    let wanted = libc::POLLRDHUP;
    let end = guest.poll(fd, wanted, LIMIT)?;
    ensure!(end & wanted != 0, "poll() says {end:#x}");
    let resets = guest.counter("transport_resets")?;
    guest.device.transport_reset(u64::from(GUEST_CID));
    guest.wait_counter("transport_resets", resets + 1)?;
    let read = guest.recv(fd, 4)?;
    expect_eq("what was unread", read, "last".to_owned())?;
    guest.close(fd)?;
    peer.expect_silence()
}

/// Resets the device to a CID and sends a packet after that, which the driver is to see before the event. The queues of the device
/// share an interrupt, so it sees both unless it is busy with packets.
fn reset_before_packet(guest: &Guest, peer: &Peer, cid: u32, packet: Packet) {
    const ENOUGH: usize = 5_000;
    for _ in 0..ENOUGH {
        // Of no connection, and nothing answers it.
        guest.device.inject(Packet {
            dst_port: PORT_ANY - 1,
            ..peer.packet(Op::RST)
        });
    }
    guest
        .device
        .transport_reset_silently(u64::from(cid), packet);
}

/// A request of the new host for the very addresses of an old connection, that is there before the driver knows of the
/// event: it meets the listener, and not the connection of before (firecracker issue 5688).
pub fn request_before_event(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let mut peer = Peer::connect(&guest)?;
    let old = guest.accept(listener)?;
    for cid in [GUEST_CID, GUEST_CID + 4, GUEST_CID] {
        let request = Packet {
            dst_cid: u64::from(cid),
            ..peer.packet(Op::REQUEST)
        };
        reset_before_packet(&guest, &peer, cid, request);
        peer.set_cids(HOST_CID, u64::from(cid));
        peer.expect(Op::RESPONSE)?;
        let new = guest.accept(listener)?;
        expect_eq("its address", guest.own_address(new)?, (cid, PORT))?;
        peer.send_payload(b"hello");
        expect_eq("what it reads", guest.recv(new, 5)?, "hello".to_owned())?;
        reset_before_packet(&guest, &peer, cid, peer.packet(Op::REQUEST));
        peer.expect(Op::RESPONSE)?;
        expect_reset(&guest, new)?;
        let newest = guest.accept(listener)?;
        guest.send(newest, "still here")?;
        expect_eq(
            "what the peer reads",
            peer.expect(Op::RW)?.payload,
            b"still here".to_vec(),
        )?;
    }
    expect_reset(&guest, old)?;

    // One of before the event makes no connection.
    let stale = peer.packet(Op::REQUEST);
    let cid = GUEST_CID + 9;
    reset_before_packet(&guest, &peer, cid, stale);
    wait_for_cid(&guest, cid)?;
    guest.device.wait_delivered(LIMIT)?;
    peer.expect_silence()?;
    guest.set_nonblocking(listener, true)?;
    expect_errno("accept()", guest.accept(listener), "EAGAIN")
}

/// Sends from the application's pages that are on their way when the reset comes: each gets its completion.
pub fn zerocopy_completions(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (in_queues, stream) = connected(&guest)?;
    guest.device.hold_tx(true);
    let sends: usize = guest
        .start("send_zero_copy", json!({"fd": in_queues, "count": 1000}))
        .wait(LIMIT)?;
    ensure!(sends > 2, "only {sends} sends fit");
    guest.device.transport_reset(u64::from(GUEST_CID));
    expect_errno("send()", guest.send(in_queues, "x"), "ECONNRESET")?;
    guest.device.hold_tx(false);
    let mut completed = vec![false; sends];
    wait_for(&format!("the completions of {sends} sends"), || {
        for completion in guest.zero_copy_completions(in_queues)? {
            for number in completion.first..=completion.last {
                let completed = completed
                    .get_mut(number as usize)
                    .with_context(|| format!("a completion of send {number}, of {sends}"))?;
                ensure!(!*completed, "a second completion of send {number}");
                *completed = true;
            }
        }
        Ok(completed.iter().all(|completed| *completed))
    })?;
    drop(stream);
    guest.close(in_queues)?;
    Ok(())
}

/// close() that waits for unsent data does not wait for a connection that was reset.
pub fn lingering_close(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (fd, _stream) = connected(&guest)?;
    let linger = [1_i32.to_ne_bytes(), 1000_i32.to_ne_bytes()].concat();
    guest.set_option(fd, libc::SOL_SOCKET, libc::SO_LINGER, &linger)?;
    guest.device.hold_tx(true);
    guest.send(fd, "unsent")?;
    let closing = guest.start("close", json!({"fd": fd}));
    closing.expect_blocked(A_WHILE)?;
    guest.device.transport_reset(u64::from(GUEST_CID));
    closing.wait::<()>(LIMIT).context("close()")?;
    guest.device.hold_tx(false);
    let (_fd, _stream) = connected(&guest)?;
    Ok(())
}

/// Sockets in a sockmap, both the one whose data goes elsewhere and the one that it goes to.
pub fn sockets_in_a_sockmap(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (from, mut stream) = connected(&guest)?;
    let (to, mut other) = connected(&guest)?;
    guest
        .start("redirect", json!({"from": from, "to": to}))
        .wait::<()>(LIMIT)?;
    stream.write_all(b"redirected")?;
    let mut redirected = [0; 10];
    other
        .read_exact(&mut redirected)
        .context("what was redirected")?;
    expect_eq("what was redirected", &redirected, b"redirected")?;
    guest.device.transport_reset(u64::from(GUEST_CID + 1));
    wait_for_cid(&guest, GUEST_CID + 1)?;
    for fd in [from, to] {
        expect_reset(&guest, fd)?;
        guest.close(fd)?;
    }
    let (_fd, _stream) = connected(&guest)?;
    Ok(())
}

/// An RST of the old connection that comes after the event does not turn ECONNRESET into an end of the stream.
pub fn late_rst_does_not_hide_it(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let fd = guest.socket(STREAM)?;
    let peer = Peer::accept(&guest, fd)?;
    guest.device.transport_reset(u64::from(GUEST_CID));
    guest.wait_counter("resets_by_transport", 1)?;
    peer.send(Op::RST);
    peer.send_payload(b"stale");
    guest.device.wait_delivered(LIMIT)?;
    peer.find(Op::RST)
        .context("the answer to the stale payload")?;
    expect_reset(&guest, fd)
}

/// Attempts to connect that are under way, whose answer of before comes after the event.
pub fn attempts(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let mut peer = Peer::watch(&guest);
    let begin = |peer: &mut Peer, own_cid: u32| -> Result<_> {
        let fd = guest.socket(STREAM)?;
        guest.bind(fd, own_cid, PORT_ANY)?;
        let connecting = guest.start_connect(fd, HOST_CID as u32, PORT);
        let request = peer.find(Op::REQUEST)?;
        peer.set_ports(PORT, request.src_port);
        Ok((fd, connecting))
    };

    // An answer to another CID is of a connection that has ended: there will be no other. The driver may know of the event by then,
    // or not.
    let mut cid = GUEST_CID;
    for is_known in [true, false] {
        for (answer, is_bound) in [
            (Op::RESPONSE, false),
            (Op::RST, false),
            (Op::RESPONSE, true),
        ] {
            let own_cid = if is_bound { cid } else { CID_ANY };
            let (fd, connecting) = begin(&mut peer, own_cid)?;
            peer.set_cids(HOST_CID, u64::from(cid));
            cid += 1;
            if is_known {
                guest.device.transport_reset(u64::from(cid));
                wait_for_cid(&guest, cid)?;
                peer.send(answer);
            } else {
                reset_before_packet(&guest, &peer, cid, peer.packet(answer));
            }
            expect_errno("connect()", connecting.wait::<()>(LIMIT), "ECONNRESET")?;
            // Where it was an RST the driver may not know of the event yet: this makes it look.
            peer.set_cids(HOST_CID, u64::from(cid));
            peer.send(Op::RST);
            wait_for_cid(&guest, cid)?;
            guest.close(fd)?;
        }
    }

    // One to the present CID is what a socket waits for that was bound to the CID of before.
    let (fd, connecting) = begin(&mut peer, cid)?;
    cid += 1;
    guest.device.transport_reset(u64::from(cid));
    wait_for_cid(&guest, cid)?;
    peer.set_cids(HOST_CID, u64::from(cid));
    peer.send(Op::RESPONSE);
    connecting.wait::<()>(LIMIT).context("connect()")?;
    expect_eq("its CID", guest.own_address(fd)?.0, cid)?;
    guest.close(fd)?;
    peer.find(Op::SHUTDOWN)?;
    peer.send(Op::RST);

    // With the same CID it may be of after the event: the peer says whether there is a connection.
    for is_there in [true, false] {
        let resets = guest.counter("transport_resets")?;
        let (fd, connecting) = begin(&mut peer, CID_ANY)?;
        guest.device.transport_reset(u64::from(cid));
        guest.wait_counter("transport_resets", resets + 1)?;
        peer.send(Op::RESPONSE);
        connecting.wait::<()>(LIMIT).context("connect()")?;
        peer.expect(Op::CREDIT_UPDATE)?;
        let read = if is_there {
            peer.send_payload(b"hello");
            "hello"
        } else {
            peer.send(Op::RST);
            ""
        };
        expect_eq("recv()", guest.recv(fd, 5)?, read.to_owned())?;
        guest.close(fd)?;
    }
    Ok(())
}

/// An attempt that has not gone to the device yet when the CID changes, and its shutdown() behind it: the peer gets both from
/// the new CID.
pub fn attempt_that_waits(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let peer = Peer::connect(&guest)?;
    let busy = guest.accept(listener)?;
    guest.device.hold_tx(true);
    guest
        .start_send_small(busy, u64::from(DEFAULT_RING))
        .wait::<u64>(LIMIT)?;
    let fd = guest.socket(STREAM)?;
    let connecting = guest.start_connect(fd, HOST_CID as u32, PORT);
    wait_for("the request to wait", || {
        Ok(guest.queue_length("tx_waiting")? == 1)
    })?;
    guest.shutdown(fd, libc::SHUT_WR)?;
    expect_eq("packets that wait", guest.queue_length("tx_waiting")?, 2)?;
    let cid = GUEST_CID + 1;
    guest.device.transport_reset(u64::from(cid));
    wait_for_cid(&guest, cid)?;
    guest.wait_handled()?;
    guest.device.hold_tx(false);
    let request = peer.find(Op::REQUEST)?;
    let shutdown = peer.expect(Op::SHUTDOWN)?;
    for packet in [&request, &shutdown] {
        expect_eq("the source", packet.src_cid, u64::from(cid))?;
    }
    guest.device.inject(request.reply(Op::RESPONSE));
    connecting.wait::<()>(LIMIT).context("connect()")
}

/// Many resets in a row, with connections in between and several events waiting at once.
pub fn repeated(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    for round in 0..20 {
        let _stream = guest.connect_from_host(PORT)?;
        let fd = guest.accept(listener)?;
        let cid = GUEST_CID + round % 3;
        if round % 4 == 0 {
            guest.device.hold_events(true);
            guest.device.transport_reset(u64::from(GUEST_CID + 50));
            guest.device.transport_reset(u64::from(GUEST_CID + 60));
        }
        guest.device.transport_reset(u64::from(cid));
        guest.device.hold_events(false);
        wait_for_cid(&guest, cid)?;
        expect_errno("recv()", guest.recv(fd, 1), "ECONNRESET")
            .with_context(|| format!("round {round}"))?;
        guest.close(fd)?;
    }
    let fd = guest.socket(STREAM)?;
    let _listener = guest.host_listener(PORT)?;
    guest.connect(fd, HOST_CID as u32, PORT)?;
    Ok(())
}
