// SPDX-License-Identifier: GPL-2.0

//! The device has lost all connections, and perhaps has another CID (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`).

use anyhow::{ensure, Context, Result};
use serde_json::json;
use vsock_device::{Op, HOST_CID};

use crate::lab::{
    expect_eq, expect_errno, wait_for, Guest, Lab, Peer, A_WHILE, GUEST_CID, LIMIT, PORT, STREAM,
};

/// Waits until the guest knows its new CID.
fn wait_for_cid(guest: &Guest, cid: u32) -> Result<()> {
    wait_for(&format!("the guest's CID to be {cid}"), || {
        Ok(guest.local_cid()? == cid)
    })
}

/// What the application sees of a connection that was reset: ECONNRESET, then the end, as with TCP.
fn expect_reset(guest: &Guest, fd: i32) -> Result<()> {
    let poll = guest.poll(fd, libc::POLLIN | libc::POLLRDHUP, LIMIT)?;
    ensure!(
        poll & libc::POLLERR != 0,
        "poll() says {poll:#x}, without POLLERR"
    );
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
    guest.device.transport_reset(0);
    wait_for_cid(&guest, u32::MAX)?;
    reset_to(GUEST_CID + 3)
}

/// With the same CID, as after a snapshot; calls that block at that moment end, unread and unsent data is gone.
pub fn same_cid_and_blocked_calls(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let mut peer = Peer::connect(&guest)?;
    let fd = guest.accept(listener)?;
    peer.set_credit(1000, 0);
    peer.send(Op::CREDIT_REQUEST);
    // The answer says that the guest knows the credit.
    peer.expect(Op::CREDIT_UPDATE)?;
    let reading = guest.start("recv", json!({"fd": fd, "len": 1}));
    let sending = guest.start_send_pattern(fd, 1, 5_000);
    let polling = guest.start_poll(fd, libc::POLLIN, LIMIT);
    reading.expect_blocked(A_WHILE)?;
    sending.expect_blocked(A_WHILE)?;
    polling.expect_blocked(A_WHILE)?;
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

/// An RST of the old connection that comes after the event does not turn ECONNRESET into an end of the stream.
pub fn late_rst_does_not_hide_it(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let fd = guest.socket(STREAM)?;
    let peer = Peer::accept(&guest, fd)?;
    guest.device.transport_reset(u64::from(GUEST_CID));
    guest.wait_counter("reset_connections", 1)?;
    peer.send(Op::RST);
    peer.send_payload(b"stale");
    guest.device.wait_delivered(LIMIT)?;
    peer.find(Op::RST)
        .context("the answer to the stale payload")?;
    expect_reset(&guest, fd)
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
