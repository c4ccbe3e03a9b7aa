// SPDX-License-Identifier: GPL-2.0

//! How many instructions a guest executes for what it transfers, with this driver and with the C driver.
//!
//! QEMU counts the guest's instructions and lets its clock go on by one nanosecond with each; real time goes by only while the
//! processor is idle. So what else this machine does meanwhile changes little, where it changes any throughput under emulation:
//! only how often the guest goes idle for want of packets, and is woken.

use std::fmt;
use std::io::{Read, Write};

use anyhow::{anyhow, ensure, Context, Result};

use crate::lab::{accept_at_host, wait_for, Guest, Lab, LIMIT};
use crate::machine::Env;
use crate::perf::{self, Direction, Receiver};
use crate::Driver;

const HOST_CID: u32 = vsock_device::HOST_CID as u32;

/// The default of Linux.
const SOCKET_BUFFER: u64 = 256 << 10;

/// How much the host writes and reads at a time, in bytes.
const HOST_CALL: usize = 64 << 10;

/// A transfer between the guest and the host.
struct Transfer {
    direction: Direction,
    /// Length of each of the guest's calls, in bytes.
    call: u64,
    bytes: u64,
}

impl Transfer {
    const fn new(direction: Direction, call: u64, bytes: u64) -> Self {
        Self {
            direction,
            call,
            bytes,
        }
    }
}

const TRANSFERS: [Transfer; 5] = [
    Transfer::new(Direction::HostToGuest, 64 << 10, 256 << 20),
    Transfer::new(Direction::HostToGuest, 4 << 10, 256 << 20),
    Transfer::new(Direction::GuestToHost, 64 << 10, 256 << 20),
    Transfer::new(Direction::GuestToHost, 4 << 10, 64 << 20),
    Transfer::new(Direction::GuestToHost, 128, 8 << 20),
];

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let call = match self.direction {
            Direction::HostToGuest => "recv()",
            Direction::GuestToHost => "send()",
        };
        f.pad(&format!("{}, {call} of {}", self.direction, self.call))
    }
}

/// Instructions for each KiB, in the order of [`TRANSFERS`]; printed, it is a table.
pub struct Counts {
    rs: Vec<f64>,
    c: Vec<f64>,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<36}{:<16}{:<16}Rust / C",
            "instructions of the guest for 1 KiB", "Rust driver", "C driver"
        )?;
        for (transfer, (rs, c)) in TRANSFERS.iter().zip(self.rs.iter().zip(&self.c)) {
            writeln!(f, "{transfer:<36}{rs:<16.0}{c:<16.0}{:.2}", rs / c)?;
        }
        Ok(())
    }
}

/// Counts for both drivers; `progress` hears of each transfer.
pub fn bench(env: &Env, progress: &mut dyn FnMut(&str)) -> Result<Counts> {
    Ok(Counts {
        rs: count(env, Driver::Rs, progress)?,
        c: count(env, Driver::C, progress)?,
    })
}

fn count(env: &Env, driver: Driver, progress: &mut dyn FnMut(&str)) -> Result<Vec<f64>> {
    let lab = Lab::new(env, driver, "instructions")?;
    let guest = lab.guest_that_counts_instructions()?;
    let mut counts = Vec::new();
    for transfer in &TRANSFERS {
        let before = executed(&guest)?;
        let bytes = carry_out(&guest, transfer).with_context(|| transfer.to_string())?;
        let for_each_kib = (executed(&guest)? - before) / (bytes as f64 / 1024.0);
        progress(&format!("{transfer}, {driver:?}: {for_each_kib:.0}"));
        counts.push(for_each_kib);
    }
    lab.remove_files();
    Ok(counts)
}

/// How many instructions the guest has executed: its time, in nanoseconds, but for that in which it was idle.
fn executed(guest: &Guest) -> Result<f64> {
    let uptime = guest.sh("cat /proc/uptime")?;
    let mut seconds = uptime.split_whitespace().map(str::parse::<f64>);
    let (Some(Ok(up)), Some(Ok(idle))) = (seconds.next(), seconds.next()) else {
        return Err(anyhow!("/proc/uptime is {uptime:?}"));
    };
    Ok((up - idle) * 1e9)
}

/// Returns how many bytes were received.
fn carry_out(guest: &Guest, transfer: &Transfer) -> Result<u64> {
    match transfer.direction {
        Direction::HostToGuest => send_to_guest(guest, transfer),
        Direction::GuestToHost => receive_from_guest(guest, transfer),
    }
}

fn send_to_guest(guest: &Guest, transfer: &Transfer) -> Result<u64> {
    let agent = &guest.machine.agent;
    let receiver = Receiver::start(agent, transfer.call, SOCKET_BUFFER)?;
    let mut connected = None;
    wait_for("the receiver to listen", || {
        connected = guest.connect_from_host(perf::PORT).ok();
        Ok(connected.is_some())
    })?;
    let mut stream = connected.context("it is connected")?;
    stream.set_write_timeout(Some(LIMIT))?;
    let mut left = transfer.bytes;
    while left > 0 {
        let part = left.min(HOST_CALL as u64);
        stream.write_all(&[0; HOST_CALL][..part as usize])?;
        left -= part;
    }
    drop(stream);
    receiver.wait()?.received()
}

fn receive_from_guest(guest: &Guest, transfer: &Transfer) -> Result<u64> {
    let listener = guest.host_listener(perf::PORT)?;
    let total = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| -> Result<u64> {
            let mut stream = accept_at_host(&listener)?;
            stream.set_read_timeout(Some(LIMIT))?;
            let mut total = 0;
            loop {
                match stream.read(&mut [0; HOST_CALL])? {
                    0 => return Ok(total),
                    len => total += len as u64,
                }
            }
        });
        perf::send(
            &guest.machine.agent,
            HOST_CID,
            transfer.bytes,
            transfer.call,
        )?;
        receiving.join().map_err(|_| anyhow!("a thread panicked"))?
    })?;
    ensure!(
        total == transfer.bytes,
        "{total} bytes were received, of {}",
        transfer.bytes
    );
    Ok(total)
}
