// SPDX-License-Identifier: GPL-2.0

//! The module and the device come and go.

use std::io::Write;

use anyhow::{ensure, Result};
use serde_json::json;

use crate::agent::sh;
use crate::lab::{expect_eq, expect_errno, wait_for, Guest, Lab, GUEST_CID, LIMIT, PORT, STREAM};
use crate::machine::Hardware;
use crate::Driver;

/// Finds the device and takes the driver from it, or gives it back.
const UNBIND: &str = "cd /sys/bus/virtio/drivers/*vsock*/ && basename virtio* >/tmp/device && cat /tmp/device >unbind";
const BIND: &str = "cd /sys/bus/virtio/drivers/*vsock*/ && cat /tmp/device >bind";

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

/// A listener and two connections of it, for a reader that blocks and a writer in the middle of much.
fn busy_connections(guest: &Guest) -> Result<(i32, i32, i32)> {
    let listener = guest.listener(PORT)?;
    // The host's ends stay open and are not read.
    std::mem::forget(guest.connect_from_host(PORT)?);
    let reader = guest.accept(listener)?;
    std::mem::forget(guest.connect_from_host(PORT)?);
    let writer = guest.accept(listener)?;
    Ok((listener, reader, writer))
}

/// The device is taken away under blocked calls: they fail, nothing hangs, and it works when it is back.
pub fn unbind_with_traffic(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (_listener, reader, writer) = busy_connections(&guest)?;
    let reading = guest.start("recv", json!({"fd": reader, "len": 1}));
    let writing = guest.start_send_pattern(writer, 1, 1 << 30);
    guest.sh(UNBIND)?;
    expect_errno(
        "the blocked recv()",
        reading.wait::<String>(LIMIT),
        "ECONNRESET",
    )?;
    expect_errno("the send()", writing.wait::<u64>(LIMIT), "ECONNRESET")?;
    let fd = guest.socket(STREAM)?;
    expect_errno(
        "connect() without a device",
        guest.connect(fd, 2, PORT),
        "ENODEV",
    )?;
    expect_eq("the CID without a device", guest.local_cid()?, u32::MAX)?;

    guest.sh(BIND)?;
    wait_for("the CID to be back", || Ok(guest.local_cid()? == GUEST_CID))?;
    let listener = guest.listener(PORT + 1)?;
    let _stream = guest.connect_from_host(PORT + 1)?;
    guest.accept(listener)?;
    guest.close(reader)?;
    guest.close(writer)?;
    Ok(())
}

/// rmmod is refused while sockets use the driver, and works when they are closed.
pub fn remove_while_in_use(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let (_listener, reader, writer) = busy_connections(&guest)?;
    let module = lab.driver.module();
    let refused = sh(&guest.machine.agent, &format!("rmmod {module}"), LIMIT)?;
    ensure!(
        refused.status != 0,
        "rmmod has removed a module that sockets use"
    );
    guest.sh(UNBIND)?;
    guest.close(reader)?;
    guest.close(writer)?;
    // Without the device nobody has to be waited for.
    wait_for("rmmod", || {
        Ok(sh(&guest.machine.agent, &format!("rmmod {module}"), LIMIT)?.status == 0)
    })
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

/// The device is unplugged under blocked calls, and another one with another CID plugged in.
pub fn hotplug(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest()?;
    let mut monitor = guest.machine.monitor()?;
    for cid in GUEST_CID + 1..GUEST_CID + 4 {
        let (listener, reader, writer) = busy_connections(&guest)?;
        let reading = guest.start("recv", json!({"fd": reader, "len": 1}));
        let writing = guest.start_send_pattern(writer, 1, 1 << 30);
        let plugged = format!("vsock{}", guest.cid - GUEST_CID);
        monitor.unplug(&plugged)?;
        expect_errno(
            "the blocked recv()",
            reading.wait::<String>(LIMIT),
            "ECONNRESET",
        )?;
        expect_errno("the send()", writing.wait::<u64>(LIMIT), "ECONNRESET")?;

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
        guest.accept(listener)?;
        for fd in [reader, writer, listener] {
            guest.close(fd)?;
        }
    }
    Ok(())
}

/// A second device is refused with the reason, and the first works on.
pub fn two_devices(lab: &Lab) -> Result<()> {
    let guest = lab.guest()?;
    let listener = guest.listener(PORT)?;
    let _stream = guest.connect_from_host(PORT)?;
    let fd = guest.accept(listener)?;
    let (_second, config) = lab.spare_device(GUEST_CID + 1)?;
    guest
        .machine
        .monitor()?
        .plug_vsock("second", &config.socket, 64)?;
    wait_for("the kernel's log to refuse the second device", || {
        let log = guest.machine.log();
        Ok(log.contains("another one is in use") && log.contains("error -16"))
    })?;
    expect_eq("send() over the first", guest.send(fd, "x")?, 1)?;
    expect_eq("the CID", guest.local_cid()?, GUEST_CID)
}

/// The machine is suspended to RAM and woken up: connections are reset, listeners work on.
pub fn suspend(lab: &Lab) -> Result<()> {
    let guest = lab.guest_on(&Hardware {
        agent_on_serial_port: true,
        ..Hardware::default()
    })?;
    let mut monitor = guest.machine.monitor()?;
    let listener = guest.listener(PORT)?;
    for _ in 0..2 {
        let _stream = guest.connect_from_host(PORT)?;
        let fd = guest.accept(listener)?;
        let suspending = guest.start("sh", json!({"script": "echo mem >/sys/power/state"}));
        monitor.wake_when_suspended()?;
        let ended: crate::agent::Ended = suspending.wait(LIMIT)?;
        expect_eq("how suspending ended", ended.status, 0)?;
        expect_errno("recv()", guest.recv(fd, 1), "ECONNRESET")?;
        expect_eq("the CID", guest.local_cid()?, GUEST_CID)?;
        guest.device.wait_ready(LIMIT)?;
        let mut stream = guest.connect_from_host(PORT)?;
        stream.write_all(b"awake")?;
        let fd = guest.accept(listener)?;
        expect_eq("recv()", guest.recv(fd, 99)?, "awake".to_owned())?;
        guest.close(fd)?;
    }
    Ok(())
}
