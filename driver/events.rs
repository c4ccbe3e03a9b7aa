// SPDX-License-Identifier: GPL-2.0

//! Events of the device.

use super::{queue_work, work, VsockDriver};
use crate::{
    af_vsock_glue::{
        skb::SkBuff,
        socket::{Address, Socket},
        virtio::{FromDevice, LiveDevice, RawQueue, Virtqueue},
        workqueue::{cond_resched, may_log},
    },
    protocol::{
        cid::Cid,
        event::{Event, EVENT_LEN},
    },
};
use kernel::{
    prelude::*,
    sync::{atomic::Relaxed, Arc},
};

/// How many events the device can have under way.
const BUFFERS: usize = 8;

/// How many events one run of the work item handles, so that others get the CPU and the locks.
const BUDGET: u32 = 64;

/// Offset of `guest_cid` in the device's configuration space, in bytes.
const CONFIG_GUEST_CID: u32 = 0;

/// The event virtqueue.
pub(crate) struct EventQueue {
    queue: Virtqueue<(), FromDevice>,
    /// Buffers that the device has.
    posted: usize,
}

impl EventQueue {
    /// Takes over an empty queue.
    pub(crate) fn new(queue: RawQueue) -> Self {
        Self {
            queue: queue.into(),
            posted: 0,
        }
    }

    /// Gives the device the buffers that it does not have. May sleep.
    pub(crate) fn fill(&mut self) {
        while self.posted < BUFFERS {
            let Ok(buffer) = SkBuff::empty(EVENT_LEN as u32, ()) else {
                break;
            };
            // A smaller queue takes fewer. Without memory the device has those that it has.
            if self.queue.push(buffer).is_err() {
                break;
            }
            self.posted += 1;
        }
        self.queue.kick();
    }
}

/// Reads the CID from a device's configuration space.
pub(crate) fn read_guest_cid(device: &LiveDevice) -> Result<Cid> {
    let raw = device.read_config_le64(CONFIG_GUEST_CID);
    Cid::guest_from_config(raw).map_err(|_| {
        if may_log() {
            pr_err!("the device's guest_cid {raw:#x} is not a CID that a guest can have\n");
        }
        EINVAL
    })
}

impl VsockDriver {
    /// Handles the events that the device has made available. Work item; sleeps, and takes sockets' locks.
    pub(super) fn process_events(self: &Arc<Self>) {
        // Packets wait meanwhile: a connection of after the event is not reset by it.
        let _rx = self.rx.lock();
        self.handle_events();
    }

    /// Handles the events that the device has made available. Needs the rx mutex; sleeps, and takes sockets'
    /// locks.
    pub(super) fn handle_events(self: &Arc<Self>) {
        let mut guard = self.events.lock();
        let Some(events) = (*guard).as_mut() else {
            return;
        };
        let mut budget = BUDGET;
        loop {
            events.queue.disable_interrupts();
            while let Some(event) = events.queue.pop() {
                events.posted = events.posted.saturating_sub(1);
                self.handle_event(event.ok(), events.queue.device());
                events.fill();
                budget -= 1;
                if budget == 0 {
                    queue_work::<{ work::EVENTS }>(self.clone());
                    return;
                }
                cond_resched();
            }
            if events.queue.is_broken() || events.queue.enable_interrupts() {
                break;
            }
        }
    }

    /// Handles one event, `None` where its buffer was used wrongly.
    fn handle_event(&self, buffer: Option<SkBuff<()>>, device: &LiveDevice) {
        // One byte more than an event has, to tell a longer one.
        let mut bytes = [0; EVENT_LEN + 1];
        match buffer.map(|buffer| Event::parse(buffer.copy_into(&mut bytes))) {
            Some(Ok(Event::TransportReset)) => self.transport_reset(device),
            Some(Err(_)) | None => self.statistics.unknown_events.increment(),
        }
    }

    /// The device has lost all connections, and perhaps has another CID.
    fn transport_reset(&self, device: &LiveDevice) {
        let before = self.guest_cid();
        let cid = read_guest_cid(device).ok();
        self.set_guest_cid(cid);
        self.statistics.transport_resets.increment();
        let reset = self.reset_all_connections();
        if let Some(cid) = cid {
            self.let_bound_sockets_follow(cid);
        }
        if may_log() {
            pr_info!(
                "transport reset: CID {} is now {}, {reset} connections were reset\n",
                before.map_or(0, Cid::get),
                cid.map_or(0, Cid::get)
            );
        }
    }

    /// Gives sockets that are bound to the CID that the guest had its present one. Sleeps, and takes sockets'
    /// locks. The caller has the rx mutex, or begins to use a device.
    pub(super) fn let_bound_sockets_follow(&self, cid: Cid) {
        let before = self.bound_cid.xchg(cid.get(), Relaxed);
        if before != cid.get() && before != Address::CID_ANY {
            Socket::change_bound_cid(before, cid.get());
        }
    }

    /// Resets all connections and returns how many there were. Sleeps, and takes sockets' locks.
    ///
    /// The caller sees to it that no new ones are made meanwhile: by the rx mutex, or without a device.
    pub(super) fn reset_all_connections(&self) -> usize {
        let mut count = 0;
        loop {
            let sockets = Socket::some_connected::<Self>();
            for socket in sockets.iter().flatten() {
                let socket = socket.lock();
                if let Some(connection) = socket.connection::<Self>() {
                    self.reset_connection(&socket, &connection);
                }
                // So that it is not found again.
                socket.remove_from_tables();
                count += 1;
            }
            if sockets.iter().any(Option::is_none) {
                return count;
            }
            cond_resched();
        }
    }
}
