// SPDX-License-Identifier: GPL-2.0

//! The module and the device come and go.

use std::io::{Read, Write};
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use serde_json::json;
use vsock_device::Op;

use super::stream::{exchange_over_the_bridge, HOST, PACKET};
use crate::agent::{sh, Ended, Pending};
use crate::lab::{
    expect_eq, expect_errno, wait_for, Guest, Lab, Peer, CID_ANY, GUEST_CID, LIMIT, PORT,
    SEQPACKET, STREAM,
};
use crate::machine::Hardware;
use crate::Driver;

/// Finds the device and takes the driver from it, or gives it back.
pub(super) const UNBIND: &str = "cd /sys/bus/virtio/drivers/*vsock*/ && basename virtio* >/tmp/device && cat /tmp/device >unbind";
pub(super) const BIND: &str = "cd /sys/bus/virtio/drivers/*vsock*/ && cat /tmp/device >bind";

/// With the C driver loaded, ours is refused and says why.
pub fn c_driver_first(lab: &Lab) -> Result<()> {
    let guest = lab.guest_with(GUEST_CID, Some(Driver::C), &[Driver::Rs])?;
    let tried = sh(
        &guest.machine.agent,
        "insmod /extra/virtio_vsock_rs.ko",
        LIMIT,
    )?;
    ensure!(tried.status != 0, "both drivers are loaded");
    ensure!(
        tried.output.contains("busy"),
        "insmod says {:?}",
        tried.output
    );
    wait_for("the kernel's log to say why", || {
        Ok(guest
            .machine
            .log()
            .contains("another transport from guest to host is loaded"))
    })?;
    // The C driver works as before.
    let listener = guest.listener(PORT)?;
    let _stream = guest.connect_from_host(PORT)?;
    guest.accept(listener)?;
    Ok(())
}

/// The device goes while sockets wait for an answer to connect(): there will be none.
pub fn unbind_while_connecting(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let peer = Peer::watch(&guest);
    let mut waiting = Vec::new();
    for kind in [STREAM, SEQPACKET] {
        let fd = guest.socket(kind)?;
        waiting.push((fd, guest.start_connect(fd, HOST, PORT)));
        peer.expect(Op::REQUEST)?;
    }
    guest.sh(UNBIND)?;
    let mut fds = Vec::new();
    for (fd, connecting) in waiting {
        expect_errno("connect()", connecting.wait::<()>(LIMIT), "ECONNRESET")?;
        expect_errno("connect()", guest.connect(fd, HOST, PORT), "ENODEV")?;
        fds.push(fd);
    }
    // They are told once.
    guest.sh(BIND)?;
    guest.device.wait_ready(LIMIT)?;
    guest.sh(UNBIND)?;
    for fd in fds {
        let error = guest.option(fd, libc::SOL_SOCKET, libc::SO_ERROR, 4)?;
        expect_eq("SO_ERROR", error, vec![0; 4])?;
    }
    Ok(())
}

/// With ours loaded, the C driver is refused, and ours works on.
pub fn rust_driver_first(lab: &Lab) -> Result<()> {
    let guest = lab.guest_with(GUEST_CID, Some(Driver::Rs), &[Driver::C])?;
    let script = "cd /extra; insmod vmw_vsock_virtio_transport_common.ko; insmod vmw_vsock_virtio_transport.ko";
    let tried = sh(&guest.machine.agent, script, LIMIT)?;
    ensure!(
        tried.output.contains("busy"),
        "insmod says {:?}",
        tried.output
    );
    let listener = guest.listener(PORT)?;
    let _stream = guest.connect_from_host(PORT)?;
    guest.accept(listener)?;
    Ok(())
}

/// A listener and two connections of it, one with a reader that blocks and one with a writer whose data flows.
struct Busy {
    listener: i32,
    reader: i32,
    writer: i32,
    reading: Pending,
    writing: Pending,
}

impl Busy {
    /// Makes the connections, and waits until data flows.
    fn start(guest: &Guest) -> Result<Self> {
        let listener = guest.listener(PORT)?;
        // The host's end stays open, and nothing comes from it.
        std::mem::forget(guest.connect_from_host(PORT)?);
        let reader = guest.accept(listener)?;
        let mut at_host = guest.connect_from_host(PORT)?;
        let writer = guest.accept(listener)?;
        let (sender, flows) = channel();
        std::thread::spawn(move || {
            let mut first = vec![0; 1 << 20];
            if at_host.read_exact(&mut first).is_ok() {
                let _ = sender.send(());
                // Until the device has gone.
                let _ = std::io::copy(&mut at_host, &mut std::io::sink());
            }
        });
        let busy = Self {
            listener,
            reader,
            writer,
            reading: guest.start("recv", json!({"fd": reader, "len": 1})),
            writing: guest.start_send_pattern(writer, 1, u64::MAX),
        };
        flows
            .recv_timeout(LIMIT)
            .context("waiting for the writer's data at the host")?;
        Ok(busy)
    }

    /// That both calls fail, and closes the connections. The listener is left.
    fn expect_reset(self, guest: &Guest) -> Result<i32> {
        expect_errno(
            "the blocked recv()",
            self.reading.wait::<String>(LIMIT),
            "ECONNRESET",
        )?;
        expect_errno("the send()", self.writing.wait::<u64>(LIMIT), "ECONNRESET")?;
        guest.close(self.reader)?;
        guest.close(self.writer)?;
        Ok(self.listener)
    }
}

/// The device is taken away under load: calls fail, nothing hangs, and it works when it is back.
pub fn unbind_with_traffic(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let busy = Busy::start(&guest)?;
    guest.sh(UNBIND)?;
    let listener = busy.expect_reset(&guest)?;
    let fd = guest.socket(STREAM)?;
    expect_errno(
        "connect() without a device",
        guest.connect(fd, 2, PORT),
        "ENODEV",
    )?;
    expect_eq("the CID without a device", guest.local_cid()?, u32::MAX)?;

    guest.sh(BIND)?;
    wait_for("the CID to be back", || Ok(guest.local_cid()? == GUEST_CID))?;
    let _stream = guest.connect_from_host(PORT)?;
    guest.accept(listener)?;
    Ok(())
}

/// The device is taken away while a send() that has sent a part waits for memory: the call says how much it has sent, so the
/// next one has to say that the connection is lost.
pub fn unbind_within_a_send(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    // It sends nothing by itself: what waits for the socket, which is locked, holds up the driver, and so what unbinds it.
    let mut peer = Peer::watch(&guest);
    peer.set_credit(4 * PACKET as u32, 0);
    peer.send(Op::REQUEST);
    peer.expect(Op::RESPONSE)?;
    let fd = guest.accept(listener)?;
    let userfaultfd: i32 = guest.start("userfaultfd", json!({})).wait(LIMIT)?;
    let sending = guest.start(
        "send_held_back",
        json!({"fd": fd, "len": 3 * PACKET, "there": PACKET, "userfaultfd": userfaultfd}),
    );
    expect_eq(
        "what the userfaultfd is while send() waits for memory",
        guest.poll(userfaultfd, libc::POLLIN, LIMIT)?,
        libc::POLLIN,
    )?;
    let unbinding = guest.start("sh", json!({"script": UNBIND}));
    wait_for("the guest to be without a CID", || {
        Ok(guest.local_cid()? == CID_ANY)
    })?;
    guest.close(userfaultfd)?;
    expect_eq("bytes sent", sending.wait::<usize>(LIMIT)?, PACKET)?;
    expect_errno("recv()", guest.recv(fd, 1), "ECONNRESET")?;
    let unbound: Ended = unbinding.wait(LIMIT)?;
    expect_eq("how unbinding ended", unbound.status, 0)
}

/// rmmod is refused while sockets use the driver, works when they are closed, whether there is a device or not, and the module
/// can be loaded again.
pub fn remove_while_in_use(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let busy = Busy::start(&guest)?;
    let module = lab.driver.module();
    let refused = sh(&guest.machine.agent, &format!("rmmod {module}"), LIMIT)?;
    ensure!(
        refused.status != 0,
        "rmmod has removed a module that sockets use"
    );
    guest.sh(UNBIND)?;
    let listener = busy.expect_reset(&guest)?;
    // Without the device nobody has to be waited for. The listener stays: no transport is asked about it.
    load_again(&guest, lab.driver)?;
    guest.device.wait_ready(LIMIT)?;
    let stream = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    guest.close(listener)?;
    guest.close(fd)?;
    drop(stream);
    // The driver takes its leave of the device as well.
    load_again(&guest, lab.driver)?;
    guest.device.wait_ready(LIMIT)?;
    exchange_over_the_bridge(&guest)
}

/// Removes the driver's module, as soon as nothing uses it, and loads it again.
fn load_again(guest: &Guest, driver: Driver) -> Result<()> {
    let module = driver.module();
    wait_for("rmmod", || {
        Ok(sh(&guest.machine.agent, &format!("rmmod {module}"), LIMIT)?.status == 0)
    })?;
    guest.sh(&format!("insmod /modules/{module}.ko"))?;
    Ok(())
}

/// Unbind and bind again and again, with a connection each time.
pub fn unbind_in_a_loop(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    for _ in 0..20 {
        let _stream = guest.connect_from_host(PORT)?;
        let fd = guest.accept(listener)?;
        guest.sh(UNBIND)?;
        expect_errno("recv()", guest.recv(fd, 1), "ECONNRESET")?;
        guest.close(fd)?;
        guest.sh(BIND)?;
        guest.device.wait_ready(LIMIT)?;
    }
    Ok(())
}

/// The device is unplugged under load, and another one with another CID plugged in.
pub fn hotplug(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest()?;
    let mut monitor = guest.machine.monitor()?;
    for cid in GUEST_CID + 1..GUEST_CID + 4 {
        let busy = Busy::start(&guest)?;
        let plugged = format!("vsock{}", guest.cid - GUEST_CID);
        monitor.unplug(&plugged)?;
        let listener = busy.expect_reset(&guest)?;

        let (device, config) = lab.spare_device(cid)?;
        monitor.plug_vsock(&format!("vsock{}", cid - GUEST_CID), &config.socket, 64)?;
        wait_for(
            "the CID of the new device",
            || Ok(guest.local_cid()? == cid),
        )?;
        device.wait_ready(LIMIT)?;
        guest.device = device;
        guest.uds = config.uds_path.unwrap_or_default();
        guest.cid = cid;
        // The listener of before is reached through the new device.
        let _stream = guest.connect_from_host(PORT)?;
        let fd = guest.accept(listener)?;
        guest.close(fd)?;
        guest.close(listener)?;
    }
    monitor.unplug(&format!("vsock{}", guest.cid - GUEST_CID))?;
    load_again(&guest, lab.driver)?;
    let fd = guest.socket(STREAM)?;
    expect_errno(
        "connect() of a driver that has never had a device",
        guest.connect(fd, 2, PORT),
        "ENODEV",
    )
}

/// A second device is refused with the reason, and the first works on. Once that has gone the second can be used.
pub fn two_devices(lab: &Lab) -> Result<()> {
    // The one that has no driver.
    const BIND_SECOND: &str = "cd /sys/bus/virtio/drivers/*vsock*/
        for device in $(grep -l 0x0013 ../../devices/*/device); do
            device=${device%/device}
            [ -e $device/driver ] || basename $device >bind
        done";
    let mut guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let _stream = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    let (second, config) = lab.spare_device(GUEST_CID + 1)?;
    let mut monitor = guest.machine.monitor()?;
    monitor.plug_vsock("second", &config.socket, 64)?;
    wait_for("the kernel's log to refuse the second device", || {
        Ok(guest.machine.log().contains("error -16"))
    })?;
    if lab.driver == Driver::Rs {
        let log = guest.machine.log();
        ensure!(
            log.contains("another one is in use"),
            "the log says no reason"
        );
    }
    expect_eq("send() over the first", guest.send(fd, "x")?, 1)?;
    expect_eq("the CID", guest.local_cid()?, GUEST_CID)?;

    monitor.unplug("vsock0")?;
    wait_for("the guest to be without a CID", || {
        Ok(guest.local_cid()? == CID_ANY)
    })?;
    guest.sh(BIND_SECOND)?;
    expect_eq("the second's CID", guest.local_cid()?, GUEST_CID + 1)?;
    second.wait_ready(LIMIT)?;
    guest.device = second;
    guest.uds = config.uds_path.context("it has a path")?;
    guest.close(listener)?;
    exchange_over_the_bridge(&guest)
}

/// The machine is suspended to RAM under load and woken up: connections are reset, listeners work on.
pub fn suspend(lab: &Lab) -> Result<()> {
    let guest = lab.guest_on(&Hardware {
        agent_on_serial_port: true,
        ..Hardware::default()
    })?;
    let mut monitor = guest.machine.monitor()?;
    for _ in 0..2 {
        let busy = Busy::start(&guest)?;
        let suspending = guest.start("sh", json!({"script": "echo mem >/sys/power/state"}));
        monitor.wake_when_suspended()?;
        let ended: Ended = suspending.wait(LIMIT)?;
        expect_eq("how suspending ended", ended.status, 0)?;
        let listener = busy.expect_reset(&guest)?;
        expect_eq("the CID", guest.local_cid()?, GUEST_CID)?;
        guest.device.wait_ready(LIMIT)?;
        let mut stream = guest.connect_from_host(PORT)?;
        stream.write_all(b"awake")?;
        let fd = guest.accept(listener)?;
        expect_eq("recv()", guest.recv(fd, 99)?, "awake".to_owned())?;
        guest.close(fd)?;
        guest.close(listener)?;
    }
    Ok(())
}

/// How long a machine may take to write its memory to its disk.
const HIBERNATION_LIMIT: Duration = Duration::from_secs(300);

/// The machine hibernates, and goes on as another one with the same disk: connections are reset, listeners work on.
pub fn hibernation(lab: &Lab) -> Result<()> {
    // What comes after the first command happens in the later machine; that waits for the agent to be ready.
    const HIBERNATE: &str = r#"echo disk >/sys/power/state && echo '{"ready": true}' >/dev/ttyS1"#;
    let hardware = Hardware {
        agent_on_serial_port: true,
        disk: Some("swap"),
        ..Hardware::default()
    };
    let before = lab.guest_on(&hardware)?;
    before.sh("mkswap /dev/vda && swapon /dev/vda")?;
    let listener = before.listener(PORT)?;
    let _stream = before.connect_from_host(PORT)?;
    let fd = before.accept(listener)?;
    before.start("sh", json!({"script": HIBERNATE}));
    before.machine.wait_off(HIBERNATION_LIMIT)?;

    let after = lab.guest_on(&hardware)?;
    expect_errno("recv()", after.recv(fd, 1), "ECONNRESET")?;
    expect_eq("the CID", after.local_cid()?, GUEST_CID)?;
    let mut stream = after.connect_from_host(PORT)?;
    stream.write_all(b"awake")?;
    let fd = after.accept(listener)?;
    expect_eq("recv()", after.recv(fd, 99)?, "awake".to_owned())
}
