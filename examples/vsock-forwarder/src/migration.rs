// SPDX-License-Identifier: GPL-2.0

//! What the driver tells of migrations: the generation in sysfs, and uevents (Documentation/migration-events.md).

use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::net::{
    bind, netlink, recv, socket_with, AddressFamily, RecvFlags, SocketFlags, SocketType,
};

use crate::policy::{migrated, Generation};

/// The kernel's own uevents, not those that udev passes on.
const KERNEL_GROUP: u32 = 1;

/// Knows of the driver's migrations.
pub struct Migrations {
    driver: PathBuf,
    uevents: OwnedFd,
}

impl Migrations {
    /// Those of the driver whose folder in sysfs this is.
    pub fn of(driver: PathBuf) -> Result<Self> {
        let uevents = socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(netlink::KOBJECT_UEVENT),
        )
        .context("opening a socket for uevents")?;
        bind(&uevents, &netlink::SocketAddrNetlink::new(0, KERNEL_GROUP))
            .context("listening for uevents")?;
        Ok(Self { driver, uevents })
    }

    /// The present generation. The driver has one device at most.
    pub fn generation(&self) -> Generation {
        fs::read_dir(&self.driver)
            .ok()?
            .flatten()
            .find_map(|entry| fs::read_to_string(entry.path().join("migration/generation")).ok())?
            .trim()
            .parse()
            .ok()
    }

    /// Waits until there is a migration, or the time is over; returns whether it was the former.
    pub fn wait(&self, before: Generation, time: Duration) -> Result<bool> {
        let end = Instant::now() + time;
        while !migrated(before, self.generation()) {
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                return Ok(false);
            };
            let left = Timespec::try_from(left).context("a wait that long")?;
            let mut uevents = [PollFd::new(&self.uevents, PollFlags::IN)];
            match poll(&mut uevents, Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("waiting for a uevent"),
            }
            // What they say, and whether some were lost, does not matter: the generation tells.
            let mut buffer = [0; 64];
            while recv(&self.uevents, &mut buffer, RecvFlags::empty()).is_ok() {}
        }
        Ok(true)
    }
}
