// SPDX-License-Identifier: GPL-2.0

//! The main job, shown: a guest on the stock kernel with this driver, a line for each step, and beside it what the same
//! reset looks like with the C driver.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vsock_device::HOST_CID;

use crate::agent::{sh, CallError};
use crate::lab::{expect_eq, wait_for, Call, Guest, Lab, GUEST_CID, LIMIT, PORT, STREAM};
use crate::machine::{check_log, Env};
use crate::tests::file_transfer::FileTransfer;
use crate::Driver;

/// How much goes each way, in bytes.
const AMOUNT: u64 = 8 << 20;

/// How often the guest moves with its connections.
const MIGRATIONS: u32 = 5;

/// The CID that the guest gets by the reset.
const NEW_CID: u32 = GUEST_CID + 1;

/// How wide the description of a step is.
const WIDTH: usize = 76;

/// Shows the driver at work; returns whether every step was verified.
pub fn run(env: &Env) -> Result<bool> {
    println!("virtio_vsock_rs on the kernel {}\n", env.release);
    let ours = match show(env) {
        Ok(ours) => ours,
        Err(error) => {
            println!(
                "\nFAILED: {error:#}\nThe machine's files are in {}",
                env.run.display()
            );
            return Ok(false);
        }
    };
    println!("\nThe same reset with the C driver, vmw_vsock_virtio_transport:");
    let lab = Lab::new(env, Driver::C, "demo-c")?;
    let guest = step("boot a guest with the C driver", || {
        Ok((lab.guest()?, String::new()))
    })?;
    let theirs = step("reset its device to another CID", || {
        Ok((observe_reset(&guest)?, String::new()))
    })?;
    println!("\n{}", Comparison { ours, theirs });
    println!("Every step with virtio_vsock_rs was verified.");
    Ok(true)
}

/// Does one step and prints a line about it, with what it adds.
fn step<T>(what: &str, act: impl FnOnce() -> Result<(T, String)>) -> Result<T> {
    let begun = Instant::now();
    let (result, detail) = act().with_context(|| what.to_owned())?;
    let text = if detail.is_empty() {
        what.to_owned()
    } else {
        format!("{what}: {detail}")
    };
    println!("  {text:WIDTH$} {:6.1} s", begun.elapsed().as_secs_f64());
    Ok(result)
}

fn show(env: &Env) -> Result<Observed> {
    let lab = Lab::new(env, Driver::Rs, "demo")?;
    let mut guest = step("boot a guest, load the module", || {
        let guest = lab.moving_guest_with_program(&env.forwarder)?;
        let driver = guest
            .sh("basename $(readlink /sys/bus/virtio/drivers/virtio_vsock_rs/virtio*/driver)")?;
        expect_eq("the device's driver", driver.trim(), "virtio_vsock_rs")?;
        let cid = guest.local_cid()?;
        Ok((guest, format!("CID {cid}")))
    })?;
    let listener = guest.listener(PORT)?;
    step("the host reaches a service of the guest", || {
        let stream = guest.connect_from_host(PORT)?;
        let fd = guest.accept(listener)?;
        let sent = exchange(&guest, fd, stream)?;
        Ok(((), sent))
    })?;
    step("the guest reaches a service of the host", || {
        let host = guest.host_listener(PORT)?;
        let fd = guest.socket(STREAM)?;
        guest.connect(fd, HOST_CID as u32, PORT)?;
        let (stream, _) = host.accept()?;
        let sent = exchange(&guest, fd, stream)?;
        Ok(((), sent))
    })?;
    guest.close(listener)?;
    let observed = step(
        "reset the device to another CID, as a migration does",
        || {
            let observed = observe_reset(&guest)?;
            let detail = format!("{GUEST_CID} is now {NEW_CID}");
            Ok((observed, detail))
        },
    )?;
    step("the open connection has failed", || {
        let (recv, after) = (&observed.recv, &observed.recv_again);
        expect_eq("recv()", recv.as_str(), "ECONNRESET")?;
        expect_eq("the next recv()", after.as_str(), "end of stream")?;
        Ok(((), format!("recv() gave {recv}, then {after}")))
    })?;
    step("the service is reached again at the new CID", || {
        expect_eq("a new connection", observed.reconnect.as_str(), "accepted")?;
        Ok(((), String::new()))
    })?;
    let mut transfer = step(
        "vsock-forwarder sends a file that grows to the host",
        || {
            let transfer = FileTransfer::begin(&lab, &guest)?;
            Ok((transfer, String::new()))
        },
    )?;
    let cid = NEW_CID + 1;
    let reset = step("reset the device once more", || {
        let status = transfer.reset(&mut guest, cid)?;
        let times = status.retries.at_once;
        expect_eq("connections made again", times, 1)?;
        let detail = format!("vsock-forwarder has connected again, {times} time");
        Ok((status, detail))
    })?;
    step("move the guest, connections and all", || {
        for _ in 0..MIGRATIONS {
            let status = transfer.migrate(&lab, &mut guest, HOST_CID)?;
            expect_eq("what vsock-forwarder saw", &status.retries, &reset.retries)?;
        }
        let went_on = guest.counter("kept_connections")?;
        expect_eq("times it went on", went_on, i64::from(MIGRATIONS))?;
        let detail = format!("{MIGRATIONS} times, it has noticed nothing");
        Ok(((), detail))
    })?;
    step("the file is at the host, byte for byte", || {
        let len = transfer.end(&guest)?;
        Ok(((), format!("{} KiB", len >> 10)))
    })?;
    step("end vsock-forwarder", || {
        guest.sh("killall vsock-forwarder")?;
        Ok(((), String::new()))
    })?;
    step("remove the module", || {
        let removed = || Ok(sh(&guest.machine.agent, "rmmod virtio_vsock_rs", LIMIT)?.status == 0);
        // A connection that both ends have closed may hold it for another moment.
        wait_for("rmmod", removed)?;
        Ok(((), String::new()))
    })?;
    step("power off, nothing wrong in the kernel's log", || {
        guest.start_power_off();
        guest.machine.wait_off(LIMIT)?;
        check_log("the guest", &guest.machine.log())?;
        Ok(((), String::new()))
    })?;
    Ok(observed)
}

/// Moves data from the guest to the host and back, and checks every byte of it.
fn exchange(guest: &Guest, fd: i32, mut host: UnixStream) -> Result<String> {
    host.set_read_timeout(Some(LIMIT))?;
    host.set_write_timeout(Some(LIMIT))?;
    let begun = Instant::now();
    let sending = guest.start_send_pattern(fd, 1, AMOUNT);
    let mut data = vec![0; AMOUNT as usize];
    host.read_exact(&mut data).context("reading at the host")?;
    expect_eq("bytes sent", sending.wait::<u64>(LIMIT)?, AMOUNT)?;
    let returning = guest.start_recv_pattern(fd, 1, AMOUNT);
    host.write_all(&data).context("writing at the host")?;
    expect_eq(
        "bytes that came back",
        returning.wait::<u64>(LIMIT)?,
        AMOUNT,
    )?;
    let rate = 2.0 * AMOUNT as f64 / begun.elapsed().as_secs_f64() / 1e6;
    drop(host);
    expect_eq("the guest's last read", guest.recv(fd, 1)?, String::new())?;
    guest.close(fd)?;
    Ok(format!("{} MiB each way, {rate:.0} MB/s", AMOUNT >> 20))
}

/// What applications of a guest saw of a reset.
struct Observed {
    recv: String,
    recv_again: String,
    send: String,
    blocked: String,
    reconnect: String,
}

/// Resets a guest's device to another CID and observes.
fn observe_reset(guest: &Guest) -> Result<Observed> {
    let listener = guest.listener(PORT)?;
    let mut streams = Vec::new();
    let mut connect = || -> Result<i32> {
        streams.push(guest.connect_from_host(PORT)?);
        Ok(guest.accept(listener)?)
    };
    let (reader, writer, blocked_reader) = (connect()?, connect()?, connect()?);
    let blocked = guest.start("recv", serde_json::json!({"fd": blocked_reader, "len": 1}));
    blocked.expect_blocked(Duration::from_millis(200))?;
    guest.device.transport_reset(u64::from(NEW_CID));
    wait_for("the guest to have its new CID", || {
        Ok(guest.local_cid()? == NEW_CID)
    })?;
    let blocked = outcome(blocked.wait::<String>(LIMIT))?;
    let recv = outcome(guest.recv(reader, 1))?;
    let recv_again = outcome(guest.recv(reader, 1))?;
    let send = outcome(guest.send(writer, "x").map(|len| format!("{len} bytes")))?;
    let reconnect = match guest.connect_from_host(PORT) {
        Ok(stream) => {
            let fd = guest.accept(listener)?;
            drop(stream);
            guest.close(fd)?;
            "accepted".to_owned()
        }
        Err(error) => format!("{error:#}"),
    };
    for fd in [reader, writer, blocked_reader] {
        guest.close(fd)?;
    }
    guest.close(listener)?;
    Ok(Observed {
        recv,
        recv_again,
        send,
        blocked,
        reconnect,
    })
}

/// The result of a call in words; an error where there was no answer.
fn outcome(result: Call<String>) -> Result<String> {
    match result {
        Ok(data) if data.is_empty() => Ok("end of stream".to_owned()),
        Ok(data) => Ok(data),
        Err(CallError::Errno(name)) => Ok(name),
        Err(CallError::Lost(error)) => Err(error),
    }
}

/// What applications saw with either driver.
struct Comparison {
    ours: Observed,
    theirs: Observed,
}

impl std::fmt::Display for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut row =
            |what: &str, ours: &str, theirs: &str| writeln!(f, "  {what:44} {ours:18} {theirs}");
        let (ours, theirs) = (&self.ours, &self.theirs);
        row("after the reset", "virtio_vsock_rs", "C driver")?;
        row("recv() that was blocked", &ours.blocked, &theirs.blocked)?;
        row("recv()", &ours.recv, &theirs.recv)?;
        row("recv() once more", &ours.recv_again, &theirs.recv_again)?;
        row("send()", &ours.send, &theirs.send)?;
        row(
            "connection to the listener at the new CID",
            &ours.reconnect,
            &theirs.reconnect,
        )
    }
}
