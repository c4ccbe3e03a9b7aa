// SPDX-License-Identifier: GPL-2.0

//! Credit, seen from both ends: the test plays the peer.

use std::time::Duration;

use anyhow::{ensure, Context, Result};
use serde_json::json;
use vsock_device::packet::{SEQ_EOM, SHUTDOWN_SEND};
use vsock_device::{Op, Packet};

use super::stream::HOST;
use crate::lab::{
    expect_eq, expect_errno, expect_pollerr, wait_for, Guest, Lab, Peer, A_WHILE, LIMIT, PORT,
    SEQPACKET, STREAM,
};

/// `SO_VM_SOCKETS_BUFFER_SIZE` and its limits, level `AF_VSOCK`.
const BUFFER_SIZE: i32 = 0;
const BUFFER_MIN_SIZE: i32 = 1;
const BUFFER_MAX_SIZE: i32 = 2;

/// An accepted connection whose peer has a buffer of `buf_alloc` bytes.
fn connection(guest: &Guest, buf_alloc: u32) -> Result<(Peer<'_>, i32)> {
    let listener = guest.listener(PORT)?;
    let mut peer = Peer::connect(guest)?;
    let fd = guest.accept(listener)?;
    peer.set_credit(buf_alloc, 0);
    peer.send(Op::CREDIT_REQUEST);
    // The answer says that the guest knows the credit.
    peer.expect(Op::CREDIT_UPDATE)?;
    Ok((peer, fd))
}

/// Receives payload until there are `len` bytes of it.
fn receive(peer: &Peer, len: usize) -> Result<()> {
    let mut received = 0;
    while received < len {
        received += peer
            .find(Op::RW)
            .with_context(|| format!("{received} of {len} bytes came"))?
            .payload
            .len();
    }
    expect_eq("bytes received", received, len)
}

/// A writer stops at the end of the peer's buffer and goes on with its credit.
pub fn window_blocks_writer(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (mut peer, fd) = connection(&guest, 10_000)?;
    let sending = guest.start_send_pattern(fd, 1, 25_000);
    receive(&peer, 10_000)?;
    sending.expect_blocked(A_WHILE)?;
    expect_eq("more packets than credit", peer.drain(), vec![])?;
    peer.set_credit(10_000, 4_000);
    peer.send(Op::CREDIT_UPDATE);
    receive(&peer, 4_000)?;
    peer.set_credit(40_000, 14_000);
    peer.send(Op::CREDIT_UPDATE);
    receive(&peer, 11_000)?;
    expect_eq("bytes sent", sending.wait::<u64>(LIMIT)?, 25_000)
}

/// A peer that makes its buffer smaller than what is on its way gets nothing until there is room again.
pub fn peer_shrinks_its_buffer(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (mut peer, fd) = connection(&guest, 10_000)?;
    expect_eq(
        "send()",
        guest.start_send_pattern(fd, 1, 8_000).wait::<u64>(LIMIT)?,
        8_000,
    )?;
    receive(&peer, 8_000)?;
    peer.set_credit(5_000, 0);
    peer.send(Op::CREDIT_UPDATE);
    peer.send(Op::CREDIT_REQUEST);
    // The answer says that the update was seen.
    peer.expect(Op::CREDIT_UPDATE)?;
    expect_errno(
        "send() without room",
        guest.send_flags(fd, "x", libc::MSG_DONTWAIT),
        "EAGAIN",
    )?;
    let sending = guest.start_send_pattern(fd, 1, 3_000);
    sending.expect_blocked(A_WHILE)?;
    peer.set_credit(5_000, 8_000);
    peer.send(Op::CREDIT_UPDATE);
    receive(&peer, 3_000)?;
    expect_eq("bytes sent", sending.wait::<u64>(LIMIT)?, 3_000)
}

/// A peer that sends more than its credit loses the connection, and the reader is told.
pub fn peer_exceeds_its_credit(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (peer, fd) = connection(&guest, 10_000)?;
    peer.send(Op::CREDIT_REQUEST);
    let credit = peer.find(Op::CREDIT_UPDATE)?.buf_alloc;
    let part = vec![7; 4096 - 500];
    let mut sent = 0;
    while sent <= credit as usize {
        peer.send_payload(&part);
        sent += part.len();
    }
    peer.find(Op::RST)?;
    expect_pollerr(&guest, fd)?;
    expect_eq(
        "SO_ERROR",
        guest.option(fd, libc::SOL_SOCKET, libc::SO_ERROR, 4)?,
        libc::ENOBUFS.to_ne_bytes().to_vec(),
    )?;
    expect_errno("send()", guest.send(fd, "x"), "EPIPE")
}

/// CREDIT_REQUEST is answered with the credit as it is.
pub fn requests_are_answered(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (peer, fd) = connection(&guest, 10_000)?;
    peer.send(Op::CREDIT_REQUEST);
    let first = peer.expect(Op::CREDIT_UPDATE)?;
    expect_eq("fwd_cnt", first.fwd_cnt, 0)?;
    expect_eq("the default buffer", first.buf_alloc, 256 * 1024)?;
    peer.send_payload(&[1; 3000]);
    wait_for("the data", || Ok(guest.siocinq(fd)? == 3000))?;
    expect_eq("recv()", guest.recv_len(fd, 3000)?, 3000)?;
    peer.send(Op::CREDIT_REQUEST);
    expect_eq(
        "fwd_cnt after reading",
        peer.find(Op::CREDIT_UPDATE)?.fwd_cnt,
        3000,
    )
}

/// A reader that keeps up sends an update for each part of its buffer, not for each packet.
pub fn updates_are_few(lab: &Lab) -> Result<()> {
    const PART: usize = 1000;
    const PARTS: usize = 400;
    let guest = lab.guest()?;
    let (peer, fd) = connection(&guest, 256 * 1024)?;
    for _ in 0..PARTS {
        peer.send_payload(&[1; PART]);
        expect_eq("recv()", guest.recv_len(fd, PART)?, PART)?;
    }
    let updates = peer
        .drain()
        .iter()
        .filter(|packet| packet.op == Op::CREDIT_UPDATE)
        .count();
    // 400,000 bytes are more than the buffer, so there have to be some; one for three quarters of it are 2 to 3.
    ensure!(
        (1..=8).contains(&updates),
        "{updates} credit updates for {PARTS} packets"
    );
    Ok(())
}

/// A peer that sends no more is not told of room.
pub fn no_updates_at_the_end(lab: &Lab) -> Result<()> {
    // Three quarters of the buffer and more.
    const LEN: usize = 200_000;
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    for end in [Op::RST, Op::SHUTDOWN] {
        let peer = Peer::connect(&guest)?;
        let fd = guest.accept(listener)?;
        for _ in 0..LEN / 1000 {
            peer.send_payload(&[b'x'; 1000]);
        }
        guest.device.inject(Packet {
            flags: SHUTDOWN_SEND,
            ..peer.packet(end)
        });
        wait_for("the end", || {
            Ok(guest.poll(fd, libc::POLLRDHUP, Duration::ZERO)? & libc::POLLRDHUP != 0)
        })?;
        expect_eq("bytes read", guest.recv_len(fd, LEN)?, LEN)?;
        peer.expect_silence()?;
    }
    Ok(())
}

/// The end of a connection is not answered with an update, though it makes the peer's buffer one of 0 bytes.
pub fn no_update_answers_the_end(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (mut peer, fd) = connection(&guest, 10_000)?;
    peer.send_payload(&[1; 100]);
    expect_eq("recv()", guest.recv_len(fd, 100)?, 100)?;
    peer.set_credit(0, 0);
    peer.send(Op::RST);
    let wanted = libc::POLLRDHUP;
    let end = guest.poll(fd, wanted, LIMIT)?;
    ensure!(end & wanted != 0, "poll() says {end:#x}");
    peer.expect_silence()
}

/// The peer of a seqpacket socket may send a message for which there is room, though another one is not read.
pub fn room_beside_an_unread_message(lab: &Lab) -> Result<()> {
    const LEN: usize = 100_000;
    let guest = lab.guest()?;
    let fd = guest.socket(SEQPACKET)?;
    let mut peer = Peer::accept(&guest, fd)?;
    peer.set_credit(256 * 1024, 0);
    for _ in 0..2 {
        peer.send_message(&[1; LEN]);
    }
    wait_for("both messages", || {
        Ok(guest.siocinq(fd)? as usize == 2 * LEN)
    })?;
    peer.drain();
    expect_eq("recv()", guest.recv_len(fd, LEN)?, LEN)?;
    let update = peer.expect(Op::CREDIT_UPDATE)?;
    expect_eq("fwd_cnt", update.fwd_cnt as usize, LEN)
}

/// SO_RCVLOWAT wakes at the mark, and a sender without credit gets what the reader waits for.
pub fn low_water_mark(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (peer, fd) = connection(&guest, 10_000)?;
    let mark = 5_000_i32;
    guest.set_option(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &mark.to_ne_bytes())?;
    peer.send_payload(&[1; 3000]);
    wait_for("the data", || Ok(guest.siocinq(fd)? == 3000))?;
    expect_eq(
        "poll() below the mark",
        guest.poll(fd, libc::POLLIN, A_WHILE)?,
        0,
    )?;
    peer.send_payload(&[1; 2000]);
    expect_eq(
        "poll() at the mark",
        guest.poll(fd, libc::POLLIN, LIMIT)?,
        libc::POLLIN,
    )?;
    expect_eq("recv()", guest.recv_len(fd, 5000)?, 5000)?;

    // Fill the buffer, read all but a little, and wait for more than the peer knows to have room for.
    let buffer = 256 * 1024;
    let mut sent = 0;
    while sent < buffer - 5_000 {
        let part = 3_000.min(buffer - 5_000 - sent);
        peer.send_payload(&vec![1; part]);
        sent += part;
    }
    wait_for("the buffer to be full", || {
        Ok(guest.siocinq(fd)? as usize == sent)
    })?;
    peer.drain();
    expect_eq("recv()", guest.recv_len(fd, 20_000)?, 20_000)?;
    let mark = 250_000_i32;
    guest.set_option(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &mark.to_ne_bytes())?;
    let update = peer.find(Op::CREDIT_UPDATE)?;
    ensure!(
        update.fwd_cnt >= 20_000,
        "the update says fwd_cnt {}",
        update.fwd_cnt
    );
    Ok(())
}

/// SO_RCVLOWAT does not keep readers of a seqpacket socket from a short message.
pub fn message_below_the_mark(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let fd = guest.socket(SEQPACKET)?;
    let mark = 1_000_i32.to_ne_bytes();
    guest.set_option(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &mark)?;
    let peer = Peer::accept(&guest, fd)?;
    let reading = guest.start("recv", json!({"fd": fd, "len": 99}));
    reading.expect_blocked(A_WHILE)?;
    guest.device.inject(Packet {
        flags: SEQ_EOM,
        payload: b"short".to_vec(),
        ..peer.packet(Op::RW)
    });
    expect_eq(
        "the blocked recv()",
        reading.wait::<String>(LIMIT)?,
        "short".to_owned(),
    )?;
    Ok(())
}

/// SIOCINQ and SIOCOUTQ.
pub fn ioctls(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (peer, fd) = connection(&guest, 10_000)?;
    peer.send(Op::CREDIT_REQUEST);
    peer.find(Op::CREDIT_UPDATE)?;
    expect_eq("SIOCINQ of nothing", guest.siocinq(fd)?, 0)?;
    peer.send_payload(&[1; 1000]);
    wait_for("SIOCINQ to be 1000", || Ok(guest.siocinq(fd)? == 1000))?;
    expect_eq("recv()", guest.recv_len(fd, 400)?, 400)?;
    expect_eq("SIOCINQ after a read", guest.siocinq(fd)?, 600)?;
    guest.device.hold_tx(true);
    expect_eq("send()", guest.send(fd, "0123456789")?, 10)?;
    expect_eq(
        "SIOCOUTQ before the device has taken it",
        guest.siocoutq(fd)?,
        10,
    )?;
    guest.device.hold_tx(false);
    wait_for("SIOCOUTQ to be 0", || Ok(guest.siocoutq(fd)? == 0))
}

/// Edge-triggered epoll: an edge for each arrival, and one when there is room to write again.
pub fn epoll_edges(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (mut peer, fd) = connection(&guest, 1_000)?;
    peer.send(Op::CREDIT_REQUEST);
    peer.find(Op::CREDIT_UPDATE)?;
    let readable = guest.epoll(fd, libc::EPOLLIN | libc::EPOLLET)?;
    for _ in 0..3 {
        peer.send_payload(b"x");
        expect_eq(
            "epoll_wait() after an arrival",
            guest.epoll_wait(readable, LIMIT)?,
            libc::EPOLLIN,
        )?;
        expect_eq(
            "epoll_wait() without one",
            guest.epoll_wait(readable, A_WHILE)?,
            0,
        )?;
    }
    let writable = guest.epoll(fd, libc::EPOLLOUT | libc::EPOLLET)?;
    expect_eq(
        "epoll_wait() at first",
        guest.epoll_wait(writable, LIMIT)?,
        libc::EPOLLOUT,
    )?;
    guest.set_nonblocking(fd, true)?;
    expect_eq(
        "send() of more than fits",
        guest.send(fd, &"x".repeat(5_000))?,
        1_000,
    )?;
    expect_errno("send() without room", guest.send(fd, "x"), "EAGAIN")?;
    // The device taking the data is no room in the peer's buffer, though it may wake pollers.
    receive(&peer, 1_000)?;
    expect_eq(
        "poll() without room",
        guest.poll(fd, libc::POLLOUT, A_WHILE)?,
        0,
    )?;
    while guest.epoll_wait(writable, A_WHILE)? != 0 {}
    peer.set_credit(1_000, 500);
    peer.send(Op::CREDIT_UPDATE);
    expect_eq(
        "epoll_wait() with room",
        guest.epoll_wait(writable, LIMIT)?,
        libc::EPOLLOUT,
    )?;
    expect_eq(
        "send() of what fits",
        guest.send(fd, &"x".repeat(5_000))?,
        500,
    )
}

/// A receive buffer that grows while connect() waits for the answer: the peer gets to know, for it may have to send more than it
/// was promised before a program reads.
pub fn buffer_grows_while_connecting(lab: &Lab) -> Result<()> {
    // More than the peer knows of, 256 KiB, by so little that a reader of single bytes could wait with it.
    const SIZE: u32 = 512 * 1024;
    const LOW_WATER: i32 = 400 * 1024;
    let guest = lab.guest()?;
    for kind in [STREAM, SEQPACKET] {
        let peer = Peer::watch_kind(&guest, kind);
        let fd = guest.socket(kind)?;
        let set = |name| guest.set_option(fd, libc::AF_VSOCK, name, &u64::from(SIZE).to_ne_bytes());
        set(BUFFER_MAX_SIZE)?;
        let connecting = guest.start_connect(fd, HOST, PORT);
        let request = peer.expect(Op::REQUEST)?;
        set(BUFFER_SIZE)?;
        let low_water = LOW_WATER.to_ne_bytes();
        guest.set_option(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &low_water)?;
        guest.device.inject(Packet {
            buf_alloc: SIZE,
            ..request.reply(Op::RESPONSE)
        });
        connecting.wait::<()>(LIMIT).context("connect()")?;
        let told = peer.expect(Op::CREDIT_UPDATE)?.buf_alloc;
        expect_eq("the buffer that the peer knows of", told, SIZE)?;
        guest.close(fd)?;
        peer.expect(Op::SHUTDOWN)?;
        guest.device.inject(request.reply(Op::RST));
    }
    Ok(())
}

/// SO_VM_SOCKETS_BUFFER_SIZE keeps to its limits, and the peer is told.
pub fn buffer_size_limits(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (peer, fd) = connection(&guest, 10_000)?;
    let get = |name| -> Result<u64> {
        let value = guest.option(fd, libc::AF_VSOCK, name, 8)?;
        Ok(u64::from_ne_bytes(value.as_slice().try_into()?))
    };
    let set = |name, value: u64| guest.set_option(fd, libc::AF_VSOCK, name, &value.to_ne_bytes());
    set(BUFFER_SIZE, 1 << 20)?;
    expect_eq("a size above the limit", get(BUFFER_SIZE)?, 256 * 1024)?;
    set(BUFFER_MAX_SIZE, 8 << 20)?;
    set(BUFFER_SIZE, 1 << 20)?;
    expect_eq("a size below the new limit", get(BUFFER_SIZE)?, 1 << 20)?;
    wait_for("the peer to be told", || {
        Ok(peer.find(Op::CREDIT_UPDATE)?.buf_alloc == 1 << 20)
    })?;
    set(BUFFER_MIN_SIZE, 4096)?;
    set(BUFFER_SIZE, 1)?;
    expect_eq("a size below the minimum", get(BUFFER_SIZE)?, 4096)?;
    wait_for("the peer to be told", || {
        Ok(peer.find(Op::CREDIT_UPDATE)?.buf_alloc == 4096)
    })?;
    set(BUFFER_MAX_SIZE, u64::MAX)?;
    set(BUFFER_SIZE, u64::MAX)?;
    expect_eq("the largest size", get(BUFFER_SIZE)?, u64::from(u32::MAX))?;
    let unconnected: i32 = guest.start("socket", json!({"kind": STREAM})).wait(LIMIT)?;
    expect_errno(
        "recv() of a socket without a connection",
        guest.recv(unconnected, 1),
        "ENOTCONN",
    )
}
