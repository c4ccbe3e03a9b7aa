// SPDX-License-Identifier: GPL-2.0

//! Network namespaces: those of global mode share the guest's CID, those of local mode have no way to the host.
//!
//! Nobody is in the namespaces of these tests but the sockets: whoever made one has left it.

use std::io::{Read, Write};

use anyhow::{ensure, Result};
use vsock_device::HOST_CID;

use crate::lab::{expect_eq, expect_errno, Guest, Lab, CID_ANY, LIMIT, PORT};

/// That a socket of a namespace reaches the host, and serves it as well.
fn expect_reachable(guest: &Guest) -> Result<()> {
    let host = guest.host_listener(PORT)?;
    let fd = guest.socket_in_new_namespace()?;
    guest.connect(fd, HOST_CID as u32, PORT)?;
    let (mut stream, _) = host.accept()?;
    guest.send(fd, "to the host")?;
    let mut received = [0; 11];
    stream.set_read_timeout(Some(LIMIT))?;
    stream.read_exact(&mut received)?;
    expect_eq("what the host received", &received, b"to the host")?;
    stream.write_all(b"to the guest")?;
    expect_eq("recv()", guest.recv(fd, 99)?, "to the guest".to_owned())?;
    guest.close(fd)?;

    let listener = guest.socket_in_new_namespace()?;
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
    for _ in 0..5 {
        expect_reachable(&guest)?;
    }
    Ok(())
}

/// A namespace of local mode reaches nobody over virtio and cannot be reached; others are as before.
pub fn local_mode(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let _host = guest.host_listener(PORT + 1)?;
    let before = guest.socket_in_new_namespace()?;
    guest.connect(before, HOST_CID as u32, PORT + 1)?;
    guest.sh("echo local >/proc/sys/net/vsock/child_ns_mode")?;

    let fd = guest.socket_in_new_namespace()?;
    let refused = guest.connect(fd, HOST_CID as u32, PORT + 1);
    expect_errno("connect() in local mode", refused, "ENETUNREACH")?;
    let listener = guest.socket_in_new_namespace()?;
    guest.bind(listener, CID_ANY, PORT)?;
    guest.listen(listener, 1)?;
    ensure!(
        guest.connect_from_host(PORT).is_err(),
        "the host reached a listener in a namespace of local mode"
    );
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
