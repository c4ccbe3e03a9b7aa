// SPDX-License-Identifier: GPL-2.0

//! What our driver shows in a machine's debugfs.

use anyhow::{Context, Result};

use crate::agent::{sh_ok, Agent};
use crate::lab::LIMIT;

impl Agent {
    /// A counter of our driver.
    pub fn counter(&self, name: &str) -> Result<i64> {
        self.number_in_debugfs("statistics", name)
    }

    /// How much waits in a queue of our driver.
    pub fn queue_length(&self, name: &str) -> Result<i64> {
        self.number_in_debugfs("queues", name)
    }

    /// Waits until our driver has handled what it has begun with of packets and events: it reads the lengths of its queues with
    /// their locks held. A counter or a CID may be seen before that.
    pub fn wait_handled(&self) -> Result<()> {
        self.queue_length("rx_buffers").map(drop)
    }

    fn number_in_debugfs(&self, file: &str, name: &str) -> Result<i64> {
        let show = format!("cat /sys/kernel/debug/virtio_vsock_rs/{file}");
        let text = sh_ok(self, &show, LIMIT)?;
        let line = text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(is, _)| *is == name);
        let (_, value) = line.with_context(|| format!("there is no {name} in {text:?}"))?;
        Ok(value.parse()?)
    }
}
