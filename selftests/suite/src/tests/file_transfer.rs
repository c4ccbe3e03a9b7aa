// SPDX-License-Identifier: GPL-2.0

//! A file that grows in a guest, and its transfer to the host by examples/vsock-forwarder, which goes on through a reset
//! and through migrations. By the former its connection fails, and it connects again; of the latter it notices nothing.

use anyhow::{ensure, Context, Result};

use super::carrier::Carrier;
use super::recovery::{
    begin_growing, end_growing, growing_file, start_agent, status, wait_status, Collector, Status,
    COLLECTOR_PORT,
};
use crate::lab::{expect_eq, Lab, MovingGuest};

/// The first number in the file.
const FIRST_NUMBER: u32 = 1;

/// How many numbers are written at once.
const NUMBERS: u32 = 5000;

/// How often the guest moves.
const MIGRATIONS: u32 = 3;

/// A transfer under way.
pub struct FileTransfer {
    collector: Collector,
    carrier: Carrier,
}

impl FileTransfer {
    /// Starts the programs at both ends, and waits until some of the file has come.
    pub fn begin(lab: &Lab, guest: &MovingGuest) -> Result<Self> {
        let socket = lab.file("collector.sock");
        let collector = Collector::start_at(lab, &socket)?;
        let carrier = Carrier::start(&guest.uds, COLLECTOR_PORT, &socket)?;
        begin_growing(guest, FIRST_NUMBER, NUMBERS)?;
        start_agent(guest, "", "/tmp/log")?;
        wait_for_more(guest)?;
        Ok(Self { collector, carrier })
    }

    /// Resets the guest's device to another CID, and waits until the transfer goes on.
    pub fn reset(&self, guest: &mut MovingGuest, cid: u32) -> Result<Status> {
        let before = status(guest)?;
        guest.reset(cid);
        wait_status(guest, "the program to be connected again", |is| {
            is.connected && is.starts.resume > before.starts.resume
        })?;
        wait_for_more(guest)
    }

    /// Moves the guest to another device, and waits until the transfer goes on.
    pub fn migrate(&mut self, lab: &Lab, guest: &mut MovingGuest, host_cid: u64) -> Result<Status> {
        let destination = lab.destination(guest.cid + 1, host_cid)?;
        guest.stop()?;
        let carried = self.carrier.move_to(guest, &destination.uds)?;
        expect_eq("connections that were carried over", carried, 1)?;
        guest.go_on(destination)?;
        wait_for_more(guest)
    }

    /// Waits until all of the file is stored, and compares it; returns its length.
    pub fn end(self, guest: &MovingGuest) -> Result<usize> {
        let file = end_growing(guest)?;
        let boot = status(guest)?.boot;
        ensure!(
            file == growing_file(FIRST_NUMBER, file.len()),
            "the file is not what was written"
        );
        let stored = self.collector.stored("log", &boot)?;
        ensure!(stored == file, "what is stored is not the file");
        Ok(file.len())
    }
}

/// Waits until more has come than by now.
fn wait_for_more(guest: &MovingGuest) -> Result<Status> {
    let before = status(guest)?.acknowledged;
    wait_status(guest, "more of the file to be stored", |is| {
        is.acknowledged > before
    })
}

/// A reset ends the connection of the transfer, and it goes on with another one; migrations do not. All of the file comes.
pub fn reset_and_migrations(lab: &Lab) -> Result<()> {
    let mut guest = lab.moving_guest_with_program(&lab.env.forwarder)?;
    let mut transfer = FileTransfer::begin(lab, &guest)?;
    let begun = status(&guest)?;
    expect_eq("retries before the reset", begun.retries.at_once, 0)?;
    let cid = guest.cid + 1;
    let reset = transfer.reset(&mut guest, cid)?;
    expect_eq("retries at once, after the reset", reset.retries.at_once, 1)?;
    for number in 1..=MIGRATIONS {
        let host_cid = vsock_device::HOST_CID + u64::from(number % 2) * 40;
        let moved = transfer
            .migrate(lab, &mut guest, host_cid)
            .with_context(|| format!("migration {number}"))?;
        expect_eq("retries after it", &moved.retries, &reset.retries)?;
        expect_eq("starts after it", &moved.starts, &reset.starts)?;
    }
    expect_eq(
        "connections that went on",
        guest.counter("kept_connections")?,
        i64::from(MIGRATIONS),
    )?;
    transfer.end(&guest)?;
    Ok(())
}
