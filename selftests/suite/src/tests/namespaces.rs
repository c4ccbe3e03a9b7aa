// SPDX-License-Identifier: GPL-2.0

//! Network namespaces: those of global mode share the guest's CID, those of local mode have no way to the host.
//!
//! Nobody is in the namespaces of these tests but the sockets: whoever made one has left it.

use std::io::{Read, Write};

use anyhow::{Context, Result};
use vsock_device::{Op, HOST_CID};

use super::lifecycle::{BIND, UNBIND};
use crate::agent::CallError;
use crate::lab::{
    accept_at_host, expect_eq, expect_errno, wait_for, Guest, Lab, Peer, CID_ANY, LIMIT, PORT,
    SEQPACKET, STREAM,
};

/// Allows one namespace besides the first: another can be made when that has gone.
const ALLOW_ONE: &str = "echo 1 >/proc/sys/user/max_net_namespaces";

/// A stream socket in the only namespace that may be, as soon as the one of before has gone.
fn socket_in_only_namespace(guest: &Guest) -> Result<i32> {
    socket_of_kind_in_only_namespace(guest, STREAM)
}

/// The same of a kind, [`STREAM`] or [`SEQPACKET`].
fn socket_of_kind_in_only_namespace(guest: &Guest, kind: i32) -> Result<i32> {
    let mut made = None;
    wait_for("the namespace of before to go", || {
        match guest.socket_in_new_namespace(kind) {
            Ok(fd) => {
                made = Some(fd);
                Ok(true)
            }
            Err(CallError::Errno(name)) if name == "ENOSPC" => Ok(false),
            Err(error) => Err(error.into()),
        }
    })?;
    made.context("it was made")
}

/// That a socket of a namespace reaches the host, and serves it as well.
fn expect_reachable(guest: &Guest) -> Result<()> {
    let host = guest.host_listener(PORT)?;
    let fd = socket_in_only_namespace(guest)?;
    guest.connect(fd, HOST_CID as u32, PORT)?;
    let mut stream = accept_at_host(&host)?;
    guest.send(fd, "to the host")?;
    let mut received = [0; 11];
    stream.set_read_timeout(Some(LIMIT))?;
    stream.read_exact(&mut received)?;
    expect_eq("what the host received", &received, b"to the host")?;
    stream.write_all(b"to the guest")?;
    expect_eq("recv()", guest.recv(fd, 99)?, "to the guest".to_owned())?;
    guest.close(fd)?;

    let listener = socket_in_only_namespace(guest)?;
    guest.bind(listener, CID_ANY, PORT)?;
    guest.listen(listener, 1)?;
    let mut stream = guest.connect_from_host(PORT)?;
    stream.write_all(b"served")?;
    let fd = guest.accept(listener)?;
    expect_eq("recv()", guest.recv(fd, 99)?, "served".to_owned())?;
    guest.close(fd)?;
    guest.close(listener)?;
    Ok(())
}

/// Namespaces of global mode, which is the default, behave as if there were none.
pub fn global_mode(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    guest.sh(ALLOW_ONE)?;
    for _ in 0..5 {
        expect_reachable(&guest)?;
    }
    // So do messages.
    let fd = socket_of_kind_in_only_namespace(&guest, SEQPACKET)?;
    let peer = Peer::accept(&guest, fd)?;
    guest.send(fd, "to the host")?;
    let received = peer.expect(Op::RW)?.payload;
    expect_eq("what the host received", received, b"to the host".to_vec())?;
    guest.close(fd)?;
    peer.expect(Op::SHUTDOWN)?;
    peer.send(Op::RST);
    let listener = socket_of_kind_in_only_namespace(&guest, SEQPACKET)?;
    guest.bind(listener, CID_ANY, PORT)?;
    guest.listen(listener, 1)?;
    Peer::connect_kind(&guest, SEQPACKET)?;
    guest.accept(listener)?;
    Ok(())
}

/// A namespace is there as long as a socket of it is, and goes with the last one, however that ends.
pub fn deletion(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    guest.sh(ALLOW_ONE)?;
    let fd = socket_in_only_namespace(&guest)?;
    expect_errno(
        "a second namespace",
        guest.socket_in_new_namespace(STREAM),
        "ENOSPC",
    )?;
    // The peer does not answer its end.
    let peer = Peer::accept(&guest, fd)?;
    guest.close(fd)?;
    peer.expect(Op::SHUTDOWN)?;
    peer.expect(Op::RST)?;

    // Nobody has accepted it.
    let listener = socket_in_only_namespace(&guest)?;
    guest.bind(listener, CID_ANY, PORT)?;
    guest.listen(listener, 1)?;
    let peer = Peer::connect(&guest)?;
    guest.close(listener)?;
    peer.expect(Op::SHUTDOWN)?;
    peer.send(Op::RST);

    // The device goes before the peer has answered.
    let fd = socket_in_only_namespace(&guest)?;
    let peer = Peer::accept(&guest, fd)?;
    guest.close(fd)?;
    peer.expect(Op::SHUTDOWN)?;
    guest.sh(UNBIND)?;
    let fd = socket_in_only_namespace(&guest)?;
    guest.sh(BIND)?;
    guest.device.wait_ready(LIMIT)?;
    Peer::accept(&guest, fd)?;
    Ok(())
}

/// A namespace of local mode reaches nobody over virtio and cannot be reached; others are as before.
pub fn local_mode(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let _host = guest.host_listener(PORT + 1)?;
    let before = guest.socket_in_new_namespace(STREAM)?;
    guest.connect(before, HOST_CID as u32, PORT + 1)?;
    guest.sh("echo local >/proc/sys/net/vsock/child_ns_mode")?;

    for (kind, errno) in [(STREAM, "ENETUNREACH"), (SEQPACKET, "ESOCKTNOSUPPORT")] {
        let fd = guest.socket_in_new_namespace(kind)?;
        let refused = guest.connect(fd, HOST_CID as u32, PORT + 1);
        expect_errno("connect() in local mode", refused, errno)?;
        let listener = guest.socket_in_new_namespace(kind)?;
        guest.bind(listener, CID_ANY, PORT)?;
        guest.listen(listener, 1)?;
        let peer = Peer::watch_kind(&guest, kind);
        peer.send(Op::REQUEST);
        peer.expect(Op::RST)?;
    }
    guest.device.set_manual(false);
    // The port is free in the guest's own namespace, which goes on.
    let own = guest.listener(PORT)?;
    let _stream = guest.connect_from_host(PORT)?;
    guest.accept(own)?;
    expect_eq(
        "send() on the older connection",
        guest.send(before, "x")?,
        1,
    )
}
