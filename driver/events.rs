// SPDX-License-Identifier: GPL-2.0

//! Events of the device.

use super::VsockDriver;
use crate::{
    af_vsock_glue::{
        skb::SkBuff,
        socket::Socket,
        virtio::{FromDevice, LiveDevice, PushError, RawQueue, Virtqueue},
        workqueue::cond_resched,
    },
    protocol::{
        cid::Cid,
        event::{Event, EVENT_LEN},
    },
};
use kernel::{prelude::*, sync::Arc};

/// How many events the device can have under way.
const BUFFERS: usize = 8;

/// Offset of `guest_cid` in the device's configuration space, in bytes.
const CONFIG_GUEST_CID: u32 = 0;

/// The event virtqueue.
pub(crate) struct EventQueue {
    queue: Virtqueue<(), FromDevice>,
}

impl EventQueue {
    /// Takes over an empty queue.
    pub(crate) fn new(queue: RawQueue) -> Self {
        Self {
            queue: queue.into(),
        }
    }

    /// Gives the device its buffers. May sleep.
    pub(crate) fn fill(&mut self) -> Result {
        for _ in 0..BUFFERS {
            let buffer = SkBuff::empty(EVENT_LEN as u32, ())?;
            match self.queue.push(buffer) {
                Ok(()) => {}
                Err((_, PushError::Full)) => break,
                Err((_, PushError::Failed(error))) => return Err(error),
            }
        }
        self.queue.kick();
        Ok(())
    }
}

/// Reads the CID from a device's configuration space.
pub(crate) fn read_guest_cid(device: &LiveDevice) -> Result<Cid> {
    let raw = device.read_config_le64(CONFIG_GUEST_CID);
    Cid::guest_from_config(raw).map_err(|_| {
        pr_err!("the device's guest_cid {raw:#x} is not a CID that a guest can have\n");
        EINVAL
    })
}

impl VsockDriver {
    /// Handles the events that the device has made available. Work item, and called with the rx mutex held
    /// where a packet may be newer than an event; sleeps, and takes sockets' locks.
    pub(super) fn process_events(self: &Arc<Self>) {
        let mut guard = self.events.lock();
        let Some(events) = (*guard).as_mut() else {
            return;
        };
        loop {
            events.queue.disable_interrupts();
            while let Some(buffer) = events.queue.pop() {
                let Ok(mut buffer) = buffer else {
                    self.statistics.unknown_events.increment();
                    continue;
                };
                // One byte more than an event has, to tell a longer one.
                let mut event = [0; EVENT_LEN + 1];
                let event = Event::parse(buffer.copy_into(&mut event));
                match event {
                    Ok(Event::TransportReset) => self.transport_reset(events.queue.device()),
                    Err(_) => self.statistics.unknown_events.increment(),
                }
                buffer.truncate(0);
                // There is room, as this buffer just left. A broken queue gets no more events anyway.
                let _ = events.queue.push(buffer);
            }
            events.queue.kick();
            if events.queue.is_broken() || events.queue.enable_interrupts() {
                break;
            }
        }
    }

    /// The device has lost all connections, and perhaps has another CID.
    fn transport_reset(&self, device: &LiveDevice) {
        let before = self.guest_cid();
        let cid = read_guest_cid(device).ok();
        self.set_guest_cid(cid);
        self.statistics.transport_resets.increment();
        let reset = self.reset_all_connections();
        pr_info!(
            "transport reset: CID {} is now {}, {reset} connections were reset\n",
            before.map_or(0, Cid::get),
            cid.map_or(0, Cid::get)
        );
    }

    /// Resets all connections and returns how many there were. Sleeps, and takes sockets' locks.
    pub(super) fn reset_all_connections(&self) -> usize {
        let sockets = loop {
            match Socket::all_connected::<Self>() {
                Ok(sockets) => break sockets,
                // A connection that looks alive and is not would be worse than waiting for memory.
                Err(_) => cond_resched(),
            }
        };
        for socket in &sockets {
            let socket = socket.lock();
            if let Some(connection) = socket.connection::<Self>() {
                self.reset_connection(&socket, &connection);
            }
        }
        sockets.len()
    }
}
