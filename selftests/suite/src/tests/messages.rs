// SPDX-License-Identifier: GPL-2.0

//! Messages of seqpacket sockets: each comes whole, alone, or not at all.

use std::time::Duration;

use anyhow::{ensure, Result};
use serde::Deserialize;
use serde_json::json;
use vsock_device::packet::{SEQ_EOM, SEQ_EOR};
use vsock_device::{Op, Packet};

use crate::agent::Pending;
use crate::lab::{
    expect_eq, expect_errno, wait_for, Guest, Lab, Peer, A_WHILE, BULK_LIMIT, LIMIT, PORT,
    SEQPACKET,
};
use crate::pattern;
use crate::sockets::{Call, Completion};

const PAGE: usize = 4096;

const SO_VM_SOCKETS_BUFFER_SIZE: i32 = 0;
const SO_VM_SOCKETS_BUFFER_MAX_SIZE: i32 = 2;

/// What the pattern of the agent's messages has for a seed.
const SEED: u64 = 0;

/// A message of the agent's.
fn message(len: usize) -> Vec<u8> {
    let mut message = vec![0; len];
    pattern::fill(&mut message, SEED, 0);
    message
}

/// A connection whose peer has a buffer of `buf_alloc` bytes.
fn connection(guest: &Guest, buf_alloc: u32) -> Result<(Peer<'_>, i32)> {
    let fd = guest.socket(SEQPACKET)?;
    let mut peer = Peer::accept(guest, fd)?;
    give_credit(&mut peer, buf_alloc, 0)?;
    Ok((peer, fd))
}

/// Tells the guest of the peer's buffer, and waits until it knows.
fn give_credit(peer: &mut Peer, buf_alloc: u32, fwd_cnt: u32) -> Result<()> {
    peer.set_credit(buf_alloc, fwd_cnt);
    peer.send(Op::CREDIT_REQUEST);
    peer.expect(Op::CREDIT_UPDATE).map(drop)
}

fn start_send(guest: &Guest, fd: i32, len: usize, flags: i32) -> Pending {
    let params = json!({"fd": fd, "len": len, "flags": flags});
    guest.start("send_bytes", params)
}

fn send(guest: &Guest, fd: i32, len: usize, flags: i32) -> Call<usize> {
    start_send(guest, fd, len, flags).wait(LIMIT)
}

/// The next message that the peer gets, its packets up to the one that ends it, and the flags of that one.
fn receive(peer: &Peer) -> Result<(Vec<u8>, u32)> {
    let mut message = Vec::new();
    loop {
        let packet = peer.expect(Op::RW)?;
        message.extend(packet.payload);
        if packet.flags != 0 {
            return Ok((message, packet.flags));
        }
    }
}

fn expect_message(peer: &Peer, len: usize) -> Result<()> {
    expect_message_with(peer, len, SEQ_EOM)
}

fn expect_message_with(peer: &Peer, len: usize, should: u32) -> Result<()> {
    let (is, flags) = receive(peer)?;
    expect_eq("the message's length", is.len(), len)?;
    let wrong = pattern::first_difference(&is, SEED, 0);
    ensure!(
        wrong.is_none(),
        "the message is another one from byte {wrong:?} on"
    );
    expect_eq("the flags of its last packet", flags, should)
}

/// A sender that finds too little room for a message, and does not wait for it, leaves nothing of it with the peer.
pub fn without_room(lab: &Lab) -> Result<()> {
    const BUFFER: u32 = 100_000;
    const FIRST: usize = 30_000;
    const LONG: usize = 90_000;
    let guest = lab.guest()?;
    let (mut peer, fd) = connection(&guest, BUFFER)?;
    expect_eq("send()", send(&guest, fd, FIRST, 0)?, FIRST)?;
    expect_message(&peer, FIRST)?;
    let too_long = send(&guest, fd, BUFFER as usize + 1, 0);
    expect_errno("send() of too much", too_long, "EMSGSIZE")?;
    let timeout = [0, A_WHILE.as_micros() as u64]
        .map(u64::to_ne_bytes)
        .concat();
    guest.set_option(fd, libc::SOL_SOCKET, libc::SO_SNDTIMEO, &timeout)?;
    for flags in [0, libc::MSG_DONTWAIT] {
        expect_errno("send()", send(&guest, fd, LONG, flags), "EAGAIN")?;
        peer.expect_silence()?;
    }
    expect_eq("poll()", guest.poll(fd, libc::POLLOUT, Duration::ZERO)?, 0)?;
    // What there is room for goes, and does not wait for that.
    expect_eq(
        "send() of less",
        send(&guest, fd, 10, libc::MSG_DONTWAIT)?,
        10,
    )?;
    expect_message(&peer, 10)?;
    expect_errno(
        "send() again",
        send(&guest, fd, LONG, libc::MSG_DONTWAIT),
        "EAGAIN",
    )?;
    let polling = guest.start_poll(fd, libc::POLLOUT, LIMIT);
    polling.expect_blocked(A_WHILE)?;
    // More room, though not enough.
    give_credit(&mut peer, BUFFER, 10_000)?;
    polling.expect_blocked(A_WHILE)?;
    give_credit(&mut peer, BUFFER, FIRST as u32)?;
    expect_eq("poll()", polling.wait::<i16>(LIMIT)?, libc::POLLOUT)?;
    expect_eq("send()", send(&guest, fd, LONG, libc::MSG_DONTWAIT)?, LONG)?;
    expect_message(&peer, LONG)?;
    // Another one that waits does not change what poll() waits for.
    guest.set_option(fd, libc::SOL_SOCKET, libc::SO_SNDTIMEO, &[0; 16])?;
    expect_errno(
        "send() of what does not wait",
        send(&guest, fd, FIRST, libc::MSG_DONTWAIT),
        "EAGAIN",
    )?;
    let sending = start_send(&guest, fd, LONG, 0);
    sending.expect_blocked(A_WHILE)?;
    give_credit(&mut peer, BUFFER, FIRST as u32 + 10_000)?;
    sending.expect_blocked(A_WHILE)?;
    expect_eq("poll()", guest.poll(fd, libc::POLLOUT, Duration::ZERO)?, 0)?;
    peer.set_credit(BUFFER, (FIRST + 10 + LONG) as u32);
    peer.send(Op::CREDIT_UPDATE);
    expect_message(&peer, LONG)?;
    expect_eq("send() of what waits", sending.wait::<usize>(LIMIT)?, LONG)
}

/// A message that waits for room goes as a whole when there is some. Others, for which there is room, do not wait for it, and do
/// not come in between.
pub fn waits_for_room(lab: &Lab) -> Result<()> {
    const BUFFER: u32 = 200_000;
    const FIRST: usize = 150_000;
    const LONG: usize = 170_000;
    const MIDDLE: usize = 70_000;
    const SHORT: usize = 1_000;
    let guest = lab.guest()?;
    let (mut peer, fd) = connection(&guest, BUFFER)?;
    expect_eq("send()", send(&guest, fd, FIRST, 0)?, FIRST)?;
    expect_message(&peer, FIRST)?;
    // In either order: the one that began to wait last must not decide for the other.
    let sending = [LONG, MIDDLE, LONG].map(|len| {
        let sending = start_send(&guest, fd, len, 0);
        let blocked = sending.expect_blocked(A_WHILE);
        blocked.map(|()| sending)
    });
    let [long, middle, last] = sending;
    let (long, middle, last) = (long?, middle?, last?);
    expect_eq(
        "poll() for another",
        guest.poll(fd, libc::POLLOUT, LIMIT)?,
        libc::POLLOUT,
    )?;
    expect_eq("send() of another", send(&guest, fd, SHORT, 0)?, SHORT)?;
    expect_message(&peer, SHORT)?;
    give_credit(&mut peer, BUFFER, 50_000)?;
    expect_message(&peer, MIDDLE)?;
    expect_eq("send()", middle.wait::<usize>(LIMIT)?, MIDDLE)?;
    long.expect_blocked(A_WHILE)?;
    expect_eq("packets of the others", peer.drain(), vec![])?;
    let mut read = FIRST + SHORT + MIDDLE;
    for _ in 0..2 {
        give_credit(&mut peer, BUFFER, read as u32)?;
        expect_message(&peer, LONG)?;
        read += LONG;
    }
    for sending in [long, last] {
        expect_eq("send()", sending.wait::<usize>(LIMIT)?, LONG)?;
    }
    Ok(())
}

/// A buffer, of the peer or of the sender, that becomes too small for a message ends the wait of its sender.
pub fn buffer_becomes_too_small(lab: &Lab) -> Result<()> {
    const BUFFER: u32 = 200_000;
    const FIRST: usize = 60_000;
    const LONG: usize = 170_000;
    let guest = lab.guest()?;
    let (mut peer, fd) = connection(&guest, BUFFER)?;
    expect_eq("send()", send(&guest, fd, FIRST, 0)?, FIRST)?;
    expect_message(&peer, FIRST)?;
    let sending = start_send(&guest, fd, LONG, 0);
    sending.expect_blocked(A_WHILE)?;
    // There is no room at all.
    peer.set_credit(FIRST as u32, 0);
    peer.send(Op::CREDIT_UPDATE);
    expect_errno("send()", sending.wait::<usize>(LIMIT), "EMSGSIZE")?;
    expect_errno(
        "send() that does not wait",
        send(&guest, fd, LONG, libc::MSG_DONTWAIT),
        "EMSGSIZE",
    )?;
    give_credit(&mut peer, BUFFER, 0)?;
    peer.drain();
    let sending = start_send(&guest, fd, LONG, 0);
    sending.expect_blocked(A_WHILE)?;
    // A half of it is in use, and there is less room than before.
    peer.set_credit(BUFFER / 2, FIRST as u32 / 2);
    peer.send(Op::CREDIT_UPDATE);
    expect_errno("send()", sending.wait::<usize>(LIMIT), "EMSGSIZE")?;
    expect_eq(
        "poll() for others",
        guest.poll(fd, libc::POLLOUT, LIMIT)?,
        libc::POLLOUT,
    )?;
    // So does the sender's own.
    give_credit(&mut peer, BUFFER, FIRST as u32 / 2)?;
    let sending = start_send(&guest, fd, BUFFER as usize, 0);
    sending.expect_blocked(A_WHILE)?;
    let size = u64::from(BUFFER / 2).to_ne_bytes();
    guest.set_option(fd, libc::AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &size)?;
    expect_errno("send()", sending.wait::<usize>(LIMIT), "EMSGSIZE")?;
    let packets = peer.drain();
    ensure!(
        packets.iter().all(|packet| packet.op != Op::RW),
        "packets of the message: {packets:?}"
    );
    Ok(())
}

/// A message of which the end cannot be read fails, and nothing of it comes to the peer.
pub fn unreadable_end(lab: &Lab) -> Result<()> {
    const LEN: usize = 50 * PAGE;
    // Behind the first packet, which has 64 KiB.
    const READABLE: usize = 30 * PAGE;
    let guest = lab.guest()?;
    const BUFFER: u32 = 256 * 1024;
    let (mut peer, fd) = connection(&guest, BUFFER)?;
    let mut received = 0;
    let on = 1_i32.to_ne_bytes();
    guest.set_option(fd, libc::SOL_SOCKET, libc::SO_ZEROCOPY, &on)?;
    for (flags, error) in [(0, "EFAULT"), (libc::MSG_ZEROCOPY, "ENOMEM")] {
        let params = json!({"fd": fd, "len": LEN, "readable": READABLE, "flags": flags});
        let sent: Call<usize> = guest.start("send_bytes", params).wait(LIMIT);
        expect_errno("send()", sent, error)?;
        peer.expect_silence()?;
        wait_for("SIOCOUTQ to be 0", || Ok(guest.siocoutq(fd)? == 0))?;
        expect_eq("send() of the next", send(&guest, fd, LEN, 0)?, LEN)?;
        expect_message(&peer, LEN)?;
        // All the credit came back, and no pages are in use.
        expect_eq("send() of one more", send(&guest, fd, PAGE, 0)?, PAGE)?;
        expect_message(&peer, PAGE)?;
        expect_eq("completions", guest.zero_copy_completions(fd)?, vec![])?;
        received += LEN + PAGE;
        give_credit(&mut peer, BUFFER, received as u32)?;
    }
    // Calls that have failed have no number.
    let sent = send(&guest, fd, 10, libc::MSG_ZEROCOPY)?;
    expect_eq("send() with MSG_ZEROCOPY", sent, 10)?;
    let completions = guest.wait_zero_copy_completions(fd)?;
    let first = Completion {
        first: 0,
        last: 0,
        is_copied: false,
    };
    expect_eq("completions", completions, vec![first])
}

/// Messages of many packets, more than the ring takes at once, in both directions.
pub fn long_ones(lab: &Lab) -> Result<()> {
    const BUFFER: u32 = 16 << 20;
    const LEN: usize = 12 << 20;
    let guest = lab.guest()?;
    let fd = guest.socket(SEQPACKET)?;
    for name in [SO_VM_SOCKETS_BUFFER_MAX_SIZE, SO_VM_SOCKETS_BUFFER_SIZE] {
        let size = u64::from(BUFFER).to_ne_bytes();
        guest.set_option(fd, libc::AF_VSOCK, name, &size)?;
    }
    let mut peer = Peer::accept(&guest, fd)?;
    give_credit(&mut peer, BUFFER, 0)?;
    expect_eq("send()", send(&guest, fd, LEN, 0)?, LEN)?;
    expect_message(&peer, LEN)?;

    peer.send_message(&message(LEN));
    let receiving = guest.start("recv_long_message", json!({"fd": fd, "len": LEN + 1}));
    expect_eq("recv()", receiving.wait(BULK_LIMIT)?, LEN)
}

/// The ends of records are where the sender has them, with messages of one packet and of several, and where the end comes alone.
pub fn ends_of_records(lab: &Lab) -> Result<()> {
    const BUFFER: u32 = 256 * 1024;
    let guest = lab.guest()?;
    let (mut peer, fd) = connection(&guest, BUFFER)?;
    let mut sent = 0;
    for (len, flags) in [
        (10, 0),
        (10, libc::MSG_EOR),
        (100_000, 0),
        (100_000, libc::MSG_EOR),
    ] {
        expect_eq("send()", send(&guest, fd, len, flags)?, len)?;
        let eor = if flags == 0 { 0 } else { SEQ_EOR };
        expect_message_with(&peer, len, SEQ_EOM | eor)?;
        sent += len;
        give_credit(&mut peer, BUFFER, sent as u32)?;
    }
    for (flags, payload) in [(0, "all of it"), (SEQ_EOM | SEQ_EOR, "")] {
        guest.device.inject(Packet {
            flags,
            payload: payload.into(),
            ..peer.packet(Op::RW)
        });
    }
    let received = Received {
        len: 9,
        bytes: b"all of it".to_vec(),
        ends_record: true,
        is_cut: false,
    };
    expect_eq("recvmsg()", recv_message(&guest, fd, 100, 0)?, received)
}

/// A message as recvmsg() gives it.
#[derive(Debug, Deserialize, PartialEq, Eq)]
struct Received {
    len: usize,
    bytes: Vec<u8>,
    ends_record: bool,
    is_cut: bool,
}

fn recv_message(guest: &Guest, fd: i32, len: usize, flags: i32) -> Result<Received> {
    let params = json!({"fd": fd, "len": len, "flags": flags});
    Ok(guest.start("recv_message", params).wait(LIMIT)?)
}

/// Messages that share memory, because there are many short ones, keep their lengths and the ends of their records.
pub fn many_short_ones(lab: &Lab) -> Result<()> {
    const COUNT: u64 = 16_000;
    let guest = lab.guest()?;
    let listener = guest.listener_of_kind(SEQPACKET, PORT)?;
    let peer = Peer::connect_kind(&guest, SEQPACKET)?;
    let fd = guest.accept(listener)?;
    // As the agent's recv_short_messages has them.
    let mut bytes = 0;
    for number in 0..COUNT {
        let payload = vec![number as u8; 1 + (number % 7) as usize];
        bytes += payload.len();
        let eor = if number % 3 == 0 { SEQ_EOR } else { 0 };
        guest.device.inject(Packet {
            payload,
            flags: SEQ_EOM | eor,
            ..peer.packet(Op::RW)
        });
    }
    wait_for("all messages", || Ok(guest.siocinq(fd)? as usize == bytes))?;
    let receive = |len: usize, flags: i32| recv_message(&guest, fd, len, flags);
    let first = || Received {
        len: 1,
        bytes: vec![0],
        ends_record: true,
        is_cut: false,
    };
    expect_eq("the first", receive(100, libc::MSG_PEEK)?, first())?;
    let received: u64 = guest
        .start("recv_short_messages", json!({"fd": fd, "count": COUNT - 2}))
        .wait(LIMIT)?;
    expect_eq("messages", received, COUNT - 2)?;
    // Of the one before the last a part is lost, and the last is whole.
    let len = |number: u64| 1 + (number % 7) as usize;
    let cut = receive(1, 0)?;
    ensure!(len(COUNT - 2) > 1, "the message is too short for this");
    expect_eq("what was cut", (cut.bytes.len(), cut.is_cut), (1, true))?;
    let last = receive(100, 0)?;
    expect_eq(
        "the last",
        last.bytes,
        vec![(COUNT - 1) as u8; len(COUNT - 1)],
    )?;
    expect_eq("bytes that are left", guest.siocinq(fd)?, 0)
}
