// SPDX-License-Identifier: GPL-2.0

//! QEMU's monitor: devices are plugged in and out, machines woken up and migrated.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use qapi::{qmp, Command};
use serde_json::json;

use crate::lab::{wait_for, LIMIT};
use crate::machine::vsock_properties;

type Connection = qapi::Stream<BufReader<UnixStream>, UnixStream>;

/// How long a guest may go on while it writes to its memory faster than that is copied, as on a machine with much else to
/// do. Then it is stopped for the rest, however long that takes.
const LIVE_PHASE: Duration = Duration::from_secs(5);

/// A connection to the monitor of a machine.
pub struct Monitor(qapi::Qmp<Connection>);

impl Monitor {
    /// Connects to the monitor's socket.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connecting to {}", socket.display()))?;
        Self::greet(stream)
    }

    /// Waits for the greeting of a QEMU. What another one has said before, on the same port, is passed over.
    pub fn greet(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(LIMIT))?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        while serde_json::from_str::<qmp::QapiCapabilities>(&line).is_err() {
            line.clear();
            let len = reader.read_line(&mut line);
            let len = len.context("waiting for the greeting of QEMU's monitor")?;
            ensure!(len > 0, "QEMU has closed its monitor");
        }
        let mut monitor = Self(qapi::Qmp::new(qapi::Stream::new(reader, stream)));
        monitor.execute(&qmp::qmp_capabilities { enable: None })?;
        Ok(monitor)
    }

    fn execute<C: Command>(&mut self, command: &C) -> Result<C::Ok> {
        self.0
            .execute(command)
            .with_context(|| format!("QEMU's monitor, {}", C::NAME))
    }

    /// Waits for an event that `is_it` knows.
    fn wait_event(&mut self, what: &str, is_it: impl Fn(&qmp::Event) -> bool) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            self.0.nop().context("asking QEMU's monitor for events")?;
            if self.0.events().any(|event| is_it(&event)) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "waited for {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Unplugs a device and waits until the guest has let it go.
    pub fn unplug(&mut self, id: &str) -> Result<()> {
        self.execute(&qmp::device_del { id: id.to_owned() })?;
        self.wait_event(&format!("the guest to let {id} go"), |event| {
            matches!(event, qmp::Event::DEVICE_DELETED { data, .. } if data.device.as_deref() == Some(id))
        })
    }

    /// Plugs in a socket device whose backend serves `socket`.
    pub fn plug_vsock(&mut self, id: &str, socket: &Path, ring: u16) -> Result<()> {
        let chardev = format!("{id}-backend");
        let address = json!({"type": "unix", "data": {"path": socket}});
        let backend = json!({"type": "socket", "data": {"addr": address, "server": false}});
        let command: qmp::chardev_add =
            serde_json::from_value(json!({"id": chardev, "backend": backend}))?;
        self.execute(&command)?;
        let mut properties = vsock_properties(ring);
        properties["driver"] = "vhost-user-test-device-pci".into();
        properties["id"] = id.into();
        properties["chardev"] = chardev.into();
        let command: qmp::device_add = serde_json::from_value(properties)?;
        self.execute(&command)?;
        Ok(())
    }

    /// Stops the guest's processors, and its devices.
    pub fn pause(&mut self) -> Result<()> {
        self.execute(&qmp::stop {})?;
        Ok(())
    }

    /// Lets a guest go on that was paused.
    pub fn resume(&mut self) -> Result<()> {
        self.execute(&qmp::cont {})?;
        Ok(())
    }

    /// Waits until the guest has suspended itself to RAM, and wakes it up.
    pub fn wake_when_suspended(&mut self) -> Result<()> {
        self.wait_event("the guest to sleep", |event| {
            matches!(event, qmp::Event::SUSPEND { .. })
        })?;
        self.execute(&qmp::system_wakeup {})?;
        Ok(())
    }

    /// Lets a QEMU that was started for it wait for the state of a guest.
    pub fn wait_for_migration(&mut self, uri: &str) -> Result<()> {
        self.execute(&qmp::migrate_incoming {
            channels: None,
            exit_on_error: None,
            uri: Some(uri.to_owned()),
        })?;
        Ok(())
    }

    /// Migrates the guest to a QEMU that waits for it, and waits until it has left.
    pub fn migrate(&mut self, uri: &str) -> Result<MigrationFigures> {
        self.execute(&qmp::migrate {
            channels: None,
            detach: None,
            resume: None,
            uri: Some(uri.to_owned()),
        })?;
        let begun = Instant::now();
        let mut live = true;
        let mut figures = None;
        wait_for("the migration to be completed", || {
            let info = self.execute(&qmp::query_migrate {})?;
            let milliseconds =
                |value: Option<i64>| Duration::from_millis(value.unwrap_or(0) as u64);
            match info.status {
                Some(qmp::MigrationStatus::completed) => {
                    figures = Some(MigrationFigures {
                        total: milliseconds(info.total_time),
                        down: milliseconds(info.downtime),
                    });
                }
                Some(qmp::MigrationStatus::failed | qmp::MigrationStatus::cancelled) => {
                    bail!("the migration has failed: {:?}", info.error_desc)
                }
                Some(qmp::MigrationStatus::active) if live && begun.elapsed() > LIVE_PHASE => {
                    live = false;
                    let milliseconds = LIMIT.as_millis() as u64;
                    let longer: qmp::migrate_set_parameters =
                        serde_json::from_value(json!({"downtime-limit": milliseconds}))?;
                    self.execute(&longer)?;
                }
                _ => (),
            }
            Ok(figures.is_some())
        })?;
        figures.context("the migration has no figures")
    }

    /// Ends QEMU.
    pub fn quit(&mut self) -> Result<()> {
        self.execute(&qmp::quit {})?;
        Ok(())
    }

    /// What QEMU answers to a command for people.
    pub fn human(&mut self, command: &str) -> Result<String> {
        self.execute(&qmp::human_monitor_command {
            command_line: command.to_owned(),
            cpu_index: None,
        })
    }
}

/// What QEMU says of a migration that is over.
#[derive(Clone, Copy, Debug)]
pub struct MigrationFigures {
    /// From its begin to its end.
    pub total: Duration,
    /// While the guest did not run.
    pub down: Duration,
}
