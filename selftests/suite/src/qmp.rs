// SPDX-License-Identifier: GPL-2.0

//! QEMU's monitor: devices are plugged in and out, machines woken up.

use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use qapi::{qmp, Command};
use serde_json::json;

use crate::lab::LIMIT;
use crate::machine::vsock_properties;

type Connection = qapi::Stream<BufReader<UnixStream>, UnixStream>;

/// A connection to the monitor of a machine.
pub struct Monitor(qapi::Qmp<Connection>);

impl Monitor {
    /// Connects to the monitor's socket.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connecting to {}", socket.display()))?;
        stream.set_read_timeout(Some(LIMIT))?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut monitor = qapi::Qmp::new(qapi::Stream::new(reader, stream));
        monitor.handshake().context("greeting QEMU's monitor")?;
        Ok(Self(monitor))
    }

    fn execute<C: Command>(&mut self, command: &C) -> Result<C::Ok> {
        self.0
            .execute(command)
            .with_context(|| format!("QEMU's monitor, {}", C::NAME))
    }

    /// Waits for an event that `is_it` knows.
    fn wait_event(&mut self, what: &str, is_it: impl Fn(&qmp::Event) -> bool) -> Result<()> {
        let end = std::time::Instant::now() + LIMIT;
        loop {
            self.0.nop().context("asking QEMU's monitor for events")?;
            if self.0.events().any(|event| is_it(&event)) {
                return Ok(());
            }
            ensure!(std::time::Instant::now() < end, "waited for {what}");
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
}
